"""Results as tables, the same for the terminal and in Markdown, and as JSON."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks.cases import CPU_GROUPS, CUDA_GROUPS, GOAL, Case
from benchmarks.contestants import PEERS
from benchmarks.goals import GOALS, judge
from benchmarks.measure import GRAPHED, MEASURES, Entry, Result, Times

RIVALS = ("native", "compiled")
LEGEND = """\
Times are medians. A ratio above 1 says how many times faster fusedloss is; **bold**: it is slower than native.
"of copy": the bytes that the forward or the step must move, per second, as a fraction of a plain copy's bytes per
second. "must move": these bytes, of a step. "x copy": a step in plain copies of the logits, where logits and gradient
together are larger than the last-level cache. "peak": the memory that a step takes beside the logits. "error": of the
gradient, the sum of what differs from float64 as a fraction of the whole. "vs peer", "peer's peak": of the best of the
other kernels. "TFLOP/s": of a linear layer's products in a step. "of products": the time of these products alone and a
plain copy of the logits, as a fraction of ours.
"""
CUDA_LEGEND = """\
Times are medians, with half the distance of the quartiles; of the GPU, but for latency of the host. A ratio above 1
says how many times faster fusedloss is; **bold**: it is slower than native. "GB/s": the bytes that the forward or the
step must move, per second. "of copy": as a fraction of what a plain copy of the logits moves in a second. "of floor":
the time of these bytes at the bandwidth of a large copy, as a fraction of ours. "vs peer", "peer's peak": of the best
of the other projects' kernels. "vs Triton": fusedloss's own Triton kernels. "TFLOP/s": of a linear layer's products in
a step. "of products": the time of these products alone and a plain copy of the logits, as a fraction of ours. "peak":
the memory that a step takes beside the logits. "error": of the gradient, the sum of what differs from float64 as a
fraction of the whole. "graphed": a step replayed from a CUDA graph.
"""
NOTHING = "-"
BUSY = 0.5  # of load, before a run: the machine has other work


def save(folder: Path, facts: dict, results: dict, left_out: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"results.md": document(facts, results, left_out), "results.json": as_json(facts, results, left_out)}
    for name, text in texts.items():  # whole, whenever the run is ended
        (folder / f"{name}.new").write_text(text)
        (folder / f"{name}.new").replace(folder / name)


def document(facts: dict, results: dict[int | None, list[Result]], left_out: dict[str, str]) -> str:
    """The whole report in Markdown; results by number of threads, which is None on a GPU."""
    return "\n".join([header(facts), *(section(facts, some, left_out) for some in results.values())])


def header(facts: dict) -> str:
    build = ", ".join(f"{name} {value}" for name, value in facts["fusedloss"].items() if value)
    if "gpu" in facts:
        peers = ", ".join(dict.fromkeys(f"{PEERS[name].package} {state}" for name, state in facts["peers"].items()))
        return (
            "# Benchmarks\n\n"
            f"- {facts['gpu']}, {facts['gpu_memory'] / 1e9:.0f} GB, {facts['multiprocessors']} multiprocessors, "
            f"{size(facts['last_level_cache'])} of L2; {facts['date']}\n"
            f"- A large copy reads and writes {facts['copy_bandwidth'] / 1e9:.0f} GB/s\n"
            f"- Python {facts['python']}, torch {facts['torch']}, triton {facts['triton']}, CUDA {facts['cuda']}, "
            f"driver {facts['driver'] or 'unknown'}\n"
            f"- {peers}\n"
            f"- fusedloss: {build}\n\n{CUDA_LEGEND}"
        )
    return (
        "# Benchmarks\n\n"
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['cpu_capability']}; {facts['date']}\n"
        f"- Python {facts['python']}, torch {facts['torch']}\n"
        f"- fusedloss: {build}\n{busy(facts)}\n{LEGEND}"
    )


def busy(facts: dict) -> str:
    """A warning, where others were at work: threads that wait for one another then measure the others."""
    load = facts.get("load") or 0
    return f"- **The machine was busy: a load of {load} before the first case**\n" if load > BUSY else ""


def section(facts: dict, results: list[Result], left_out: dict[str, str]) -> str:
    """What one number of threads, or the GPU, gave."""
    return cuda_section(results, left_out) if "gpu" in facts else cpu_section(facts, results, left_out)


def cuda_section(results: list[Result], left_out: dict[str, str]) -> str:
    """The goals, a table for each group, and what went wrong or was left out."""
    parts = ["## Goals\n", goals_table(results), "## Cases\n", *group_tables(CUDA_GROUPS, cuda_columns(), results)]
    parts += filter(None, [notes(results, left_out), compile_time(results)])
    return "\n".join(parts)


MANY = 4  # cases of one reason why a contestant does not take part; the JSON has it in each


def notes(results: list[Result], left_out: dict[str, str]) -> str:
    """What went wrong or was left out: each reason once, with its cases."""
    found: dict[str, list[str]] = {}
    refusals = set()
    for result in results:
        for name, entry in result.entries.items():
            if entry.problem:
                found.setdefault(f"{name} {entry.problem}", []).append(str(result.case))
                refusals |= {f"{name} {entry.problem}"} if entry.problem.startswith("cannot") else set()
            if entry.not_graphed:
                found.setdefault(f"{name} in no CUDA graph: {entry.not_graphed}", []).append(str(result.case))
    for case, reason in left_out.items():
        found.setdefault(f"left out, {reason}", []).append(case)
    for note in refusals:
        found[note] = found[note] if len(found[note]) <= MANY else [f"{len(found[note])} cases"]
    return "".join(f"- {note}: {'; '.join(cases)}\n" for note, cases in found.items())


def goals_table(results: list[Result]) -> str:
    show: dict[str, Callable] = {"percent": percent, "times": times, "launches": str}
    rows = []
    for verdict in (judge(goal, results) for goal in GOALS):
        number = show[verdict["unit"]]
        worst = NOTHING if verdict["worst"] is None else number(verdict["worst"])
        where = verdict["where"] + (f", {verdict['rival']}" if verdict["rival"] not in ("", "native") else "")
        counts = f"{verdict['met']} of {verdict['measured']}, of {verdict['cases']}"
        rows.append([verdict["goal"], number(verdict["wanted"]), verdict["verdict"], worst, where, counts])
    return table(["goal", "wanted", "verdict", "worst", "where", "met of measured, of all"], rows)


NOTHINGS = {"", NOTHING}


def group_tables(groups: dict, columns: list[tuple], results: list[Result]) -> list[str]:
    """Without the columns that nobody in a group has something for."""
    parts = []
    for group, cases in groups.items():
        chosen = [result for result in results if result.case in cases]
        if chosen:
            filled = [[title, *(cell(result) for result in chosen)] for title, cell in columns]
            titles, *rows = zip(*(column for column in filled if not NOTHINGS.issuperset(column[1:])), strict=True)
            parts += [f"### {group.capitalize()}\n", table(titles, rows)]
    return parts


def cuda_columns() -> list[tuple]:
    """The title of each column, and what makes its cell from a result."""

    def moving(cell):
        return lambda result: "" if result.case.latency else cell(result)

    def of(measure):
        return [
            (measure, partial(ours, measure=measure, spread=True)),
            ("GB/s", moving(lambda result: rate(result, measure))),
            ("of copy", moving(lambda result: percent(result.bandwidth(measure)))),
            ("of floor", moving(lambda result: percent(result.floor(measure)))),
            ("vs native", partial(ratio, measure=measure, rival="native")),
            ("vs compiled", partial(ratio, measure=measure, rival="compiled")),
            ("vs peer", partial(best_peer, measure=measure)),
            ("vs Triton", partial(ratio, measure=measure, rival="triton")),
        ]

    return [
        ("case", lambda result: result.case.name),
        ("dtype", lambda result: result.case.type),
        *of("forward"),
        *of("step"),
        ("TFLOP/s", flops),
        ("of products", lambda result: percent(result.of_products())),
        *beside_native(),
        ("graphed", partial(seconds_of, name="fusedloss", measure=GRAPHED)),
        ("native's graphed", partial(seconds_of, name="native", measure=GRAPHED)),
    ]


def beside_native() -> list[tuple]:
    """What is not time: memory and accuracy, ours and native's."""
    return [
        ("peak", partial(peak, name="fusedloss")),
        ("native's peak", partial(peak, name="native")),
        ("peer's peak", least_peak),
        ("error", partial(error, name="fusedloss")),
        ("native's error", partial(error, name="native")),
    ]


def least_peak(result: Result) -> str:
    """Of the peers; where there is a linear layer, not to hold its logits is what they are for."""
    entries = [(name, result.entries[name]) for name in PEERS if name in result.entries]
    peaks = {name: entry.peak_bytes for name, entry in entries if entry.peak_bytes is not None}
    name = min(peaks, key=peaks.__getitem__, default=None)
    return f"{size(peaks[name])} {name}" if name else NOTHING


def flops(result: Result) -> str:
    """A step's, of the three products of a linear layer: the logits, and the gradients of both inputs."""
    seconds = result.seconds("fusedloss", "step")
    products = result.case.products
    return f"{products / seconds / 1e12:.3g}" if products and seconds else ""


def rate(result: Result, measure: str) -> str:
    seconds = result.bound_by_memory("fusedloss", measure)
    return f"{result.bytes_to_move[measure] / seconds / 1e9:.3g}" if seconds else NOTHING


def best_peer(result: Result, measure: str) -> str:
    name = result.best(measure, PEERS)
    return f"{times(result.ratio(measure, name))} {name}" if name else NOTHING


def peak(result: Result, name: str) -> str:
    count = result.entries[name].peak_bytes if name in result.entries else None
    return NOTHING if count is None else size(count)


def error(result: Result, name: str) -> str:
    found = result.entries[name].errors if name in result.entries else {}
    return f"{found['gradient']:.1e}" if "gradient" in found else NOTHING


def seconds_of(result: Result, name: str, measure: str) -> str:
    if not result.case.latency:
        return ""
    seconds = result.seconds(name, measure)
    return NOTHING if seconds is None else duration(seconds)


def compile_time(results: list[Result]) -> str:
    """What the clock leaves out; empty without torch.compile."""
    first = [r.entries["compiled"].first_seconds for r in results if "compiled" in r.entries]
    if not first:
        return ""
    return f"torch.compile took {sum(first):.0f} s for the first calls of {len(first)} cases; no time above has them.\n"


def cpu_section(facts: dict, results: list[Result], left_out: dict[str, str]) -> str:
    """A table for each group, what went wrong, geometric means."""
    if not results:
        return notes(results, left_out)
    parts = [f"## Threads: {results[0].threads}\n"]
    parts += group_tables(CPU_GROUPS, columns_of(facts["last_level_cache"]), results)
    parts += filter(None, [notes(results, left_out), compile_time(results)])
    rows = [[f"{m['measure']} vs {m['rival']}", times(m["ratio"]), str(m["cases"])] for m in means(results)]
    if rows:
        parts.append(table([f"geometric mean, {GOAL}", "ratio", "cases"], rows))
    return "\n".join(parts)


def columns_of(cache: int) -> list[tuple]:
    """The title of each column, and what makes its cell from a result."""

    def x_copy(result):
        return times(result.copies()) if 2 * result.logits_bytes > cache else ""

    def of(measure):
        return [
            (measure, partial(ours, measure=measure)),
            ("vs native", partial(ratio, measure=measure, rival="native")),
            ("vs compiled", partial(ratio, measure=measure, rival="compiled")),
            ("vs peer", partial(best_peer, measure=measure)),
            ("GB/s", partial(rate, measure=measure)),
            ("of copy", lambda result: percent(result.bandwidth(measure))),
        ]

    return [
        ("case", lambda result: result.case.name),
        ("dtype", lambda result: result.case.type),
        *of("forward"),
        *of("step"),
        ("TFLOP/s", flops),
        ("of products", lambda result: percent(result.of_products())),
        *beside_native(),
        ("must move", lambda result: size(result.bytes_to_move["step"])),
        ("x copy", x_copy),
    ]


def ours(result: Result, measure: str, spread: bool = False) -> str:
    if found := problem(result, "fusedloss"):
        return found
    taken = result.entries["fusedloss"].times[measure]
    low, high = taken.quartiles
    return duration(taken.median) + (f" ±{(high - low) / 2 / taken.median:.1%}" if spread else "")


def ratio(result: Result, measure: str, rival: str) -> str:
    value = result.ratio(measure, rival)
    slower = rival == "native" and value is not None and value < 1
    return problem(result, rival) or (f"**{times(value)}**" if slower else times(value))


def problem(result: Result, name: str) -> str:
    return result.entries[name].problem.partition(":")[0] if name in result.entries else ""


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """Markdown with aligned columns: the first and those of words to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    signs = ["<" if title in (titles[0], *words) else ">" for title in titles]
    rule = ["-" * (width - (sign == ">")) + ":" * (sign == ">") for width, sign in zip(widths, signs, strict=True)]
    lines = [
        " | ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True))
        for line in [titles, rule, *rows]
    ]
    return "".join(f"| {line} |\n" for line in lines)


def means(results: list[Result]) -> list[dict]:
    """Geometric means of the ratios over the goal's cases, of those where both were timed."""
    found = []
    for measure in reversed(MEASURES):
        for rival in RIVALS:
            ratios = [result.ratio(measure, rival) for result in results if result.case in CPU_GROUPS[GOAL]]
            timed = [value for value in ratios if value is not None]
            if timed:
                mean = {"measure": measure, "rival": rival, "ratio": geometric_mean(timed), "cases": len(timed)}
                found.append(mean)
    return found


def as_json(facts: dict, results: dict[int | None, list[Result]], left_out: dict[str, str]) -> str:
    """Everything, in seconds and bytes."""
    if "gpu" in facts:
        summary: dict = {"goals": [judge(goal, some) for some in results.values() for goal in GOALS]}
    else:
        summary = {"geometric_means": {threads: means(some) for threads, some in results.items()}}
    data = {
        "machine": facts,
        **summary,
        "left_out": left_out,
        "results": [as_row(result) for some in results.values() for result in some],
    }
    return json.dumps(data, indent=1, default=str)


def as_row(result: Result) -> dict:
    row = {"name": str(result.case), **asdict(result)}
    return row if result.products else {name: value for name, value in row.items() if name != "products"}


def restored(data: dict) -> Result:
    """One of the results that as_json has written."""

    def times(data):
        return Times(**data | {"quartiles": tuple(data["quartiles"])})

    def entry(data):
        return Entry(**data | {"times": {measure: times(taken) for measure, taken in data["times"].items()}})

    case = dict(data["case"])
    case |= {name: tuple(case[name]) for name in ("shape", "options")}
    case["dtype"] = getattr(torch, case["dtype"].removeprefix("torch."))
    entries = {name: entry(one) for name, one in data["entries"].items()}
    fields = {name: value for name, value in data.items() if name != "name"}
    fields |= {name: times(fields[name]) for name in ("copy", "products") if fields.get(name)}
    return Result(**fields | {"case": Case(**case), "entries": entries})
