"""Pictures of results, drawn from the JSON alone, as SVG and PNG."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"fusedloss": "#0b2545", "native": "#a9cbe8", "compiled": "#e0a458"}
STYLE: dict = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.hashsalt": "fusedloss",  # the same numbers make the same file
    "svg.fonttype": "none",
}


def speedups(results: list[dict], axes: Axes) -> None:
    """How many times faster a step is than native's and torch.compile's, in float32, without options."""
    rows = [result for result in results if usual(result, "float32") and step(result, "fusedloss")]
    for shift, rival in ((-0.2, "native"), (0.2, "compiled")):
        pairs = [
            (place, theirs / ours)
            for place, result in enumerate(rows)
            if (theirs := step(result, rival)) and (ours := step(result, "fusedloss"))
        ]
        if pairs:
            places, ratios = zip(*pairs, strict=True)
            bars = axes.barh(
                [place + shift for place in places], ratios, 0.38, color=COLORS[rival], label=f"vs {rival}"
            )
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [result["name"].removesuffix(" float32") for result in rows], fontsize=8)
    axes.set(xscale="log", xlabel="time of a step over ours, float32; right of the line fusedloss is faster")
    axes.invert_yaxis()


def bandwidth(results: list[dict], axes: Axes) -> None:
    """The bytes that a step must move, per second, against the number of classes."""
    largest = {}  # of each number of classes: the one that a cache holds the least of
    for result in sorted(filter(plain_rows, results), key=lambda result: result["logits_bytes"]):
        largest[result["case"]["shape"][1]] = result
    rows = list(largest.values())
    for name, color in COLORS.items():
        points = sorted(
            (result["case"]["shape"][1], result["bytes_to_move"]["step"] / step(result, name) / 1e9)
            for result in rows
            if step(result, name)
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=name)
    copies = sorted(
        (result["case"]["shape"][1], 2 * result["logits_bytes"] / result["copy"]["median"] / 1e9) for result in rows
    )
    if copies:
        axes.plot(*zip(*copies, strict=True), ":", color="grey", label="a plain copy")
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="GB/s of a cross entropy step, float32")
    axes.grid(color="#e6e6e6")


def memory(results: list[dict], axes: Axes) -> None:
    """What a step takes beside the logits, in multiples of them."""
    rows = [result for result in results if result["logits_bytes"] > 1e6 and usual(result, "bfloat16")]
    for shift, name in zip((-0.27, 0, 0.27), COLORS, strict=True):
        pairs = [
            (place + shift, result["entries"][name]["peak_bytes"] / result["logits_bytes"])
            for place, result in enumerate(rows)
            if result["entries"].get(name, {}).get("peak_bytes") is not None
        ]
        if pairs:
            places, sizes = zip(*pairs, strict=True)
            axes.barh(places, sizes, 0.26, color=COLORS[name], label=name)
    axes.set_yticks(range(len(rows)), [result["name"].removesuffix(" bfloat16") for result in rows], fontsize=8)
    axes.set(xlabel="peak memory of a step beside the logits, in sizes of the logits; bfloat16")
    axes.invert_yaxis()


def step(result: dict, name: str) -> float | None:
    times = result["entries"].get(name, {}).get("times", {})
    return times["step"]["median"] if "step" in times else None


def usual(result: dict, dtype: str) -> bool:
    """Whether a picture has room for it: without options, and a step as most are."""
    case = result["case"]
    special = case["options"] or case["ours"] or case["reduction"] == "none" or case["grad_output"] != 1
    return result["name"].endswith(dtype) and not special


def plain_rows(result: dict) -> bool:
    """A mean cross entropy of rows of logits in float32, without options, large enough to leave the caches."""
    case = result["case"]
    return result["name"] == f"cross entropy {'x'.join(map(str, case['shape']))} float32" and (
        len(case["shape"]) == 2 and result["logits_bytes"] > 1e6
    )


def linear_memory(found: dict[str, list[int | None]], vocabularies: list[int], axes: Axes) -> None:
    """A step's scratch with a linear layer; where it was not measured, the line goes on."""
    lines: dict[str, dict] = {
        "native": {"color": COLORS["native"], "marker": "o"},
        "native, chunked": {"color": COLORS["compiled"], "linewidth": 6, "solid_capstyle": "round"},  # under ours
        "fusedloss": {"color": COLORS["fusedloss"], "marker": "o"},
        "all logits": {"color": "grey", "linestyle": ":"},
    }
    for name, sizes in found.items():
        line = lines.get(name, {"color": COLORS["fusedloss"], "marker": "s", "markerfacecolor": "white"})
        points = [(classes, size / 1e6) for classes, size in zip(vocabularies, sizes, strict=True) if size is not None]
        axes.plot(*zip(*points, strict=True), label=name, **line)
        if len(points) > 1 and points[-1][0] < vocabularies[-1]:
            (before, low), (last, high) = points[-2:]
            end = high + (high - low) / (last - before) * (vocabularies[-1] - last)
            axes.plot((last, vocabularies[-1]), (high, end), color=line["color"], linewidth=6, linestyle=(0, (0.5, 1)))
    axes.set(xscale="log", yscale="log", xlabel="classes")
    axes.set_xticks(vocabularies, [f"{classes // 1024}k" for classes in vocabularies])
    axes.set_xticks([], minor=True)
    axes.grid(color="#e6e6e6")


@matplotlib.rc_context(STYLE)
def draw_linear_memory(found: dict[str, dict], vocabularies: list[int], rows: int, width: int, path: Path) -> None:
    """A panel for each dtype; found by the name of the dtype, then by that of what was measured."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (dtype, sizes) in zip(panels, found.items(), strict=True):
        linear_memory(sizes, vocabularies, axes)
        axes.set_title(dtype)
    panels[0].set_ylabel(f"MB of a step beside arguments and gradients\n{rows} rows of width {width}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=3)
    figure.savefig(path, metadata={"Date": None})


PICTURES: dict[str, Callable[[list[dict], Axes], None]] = {
    "speedup": speedups,
    "bandwidth": bandwidth,
    "memory": memory,
}


def most_threads(results: list[dict]) -> list[dict]:
    """A CPU's results with all its threads, or a GPU's."""
    most = max((result["threads"] for result in results), default=0)
    return [result for result in results if result["threads"] == most]


@matplotlib.rc_context(STYLE)
def draw(folder: Path) -> None:
    """Beside the results.json of the folder, one file of each kind for each picture that there are numbers for."""
    results = most_threads(json.loads((folder / "results.json").read_text())["results"])
    for name, paint in PICTURES.items():
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        paint(results, axes)
        if not axes.get_legend_handles_labels()[0]:
            continue
        bars = len(axes.get_yticklabels()) if name != "bandwidth" else 0
        if bars:
            axes.margins(y=0.01)
        figure.set_size_inches(9, 1.2 + 0.28 * bars if bars else 5)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=120)
