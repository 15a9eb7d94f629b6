"""Write the numbers of the documents from the committed results: python -m benchmarks.readme."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.pictures import most_threads, step
from benchmarks.report import NOTHING, busy, duration, size, table, times

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- written by python -m benchmarks.readme -->\n", "<!-- end -->\n"
SHOWN = {  # the names of cases, of a CPU's and of a GPU's
    "cross entropy 65536x10",
    "cross entropy 1024x1000",
    "cross entropy 4096x1000",
    "cross entropy 512x32000",
    "cross entropy 64x128256",
    "cross entropy 8192x128256",
    "cross entropy 2x19x512x512",
    "cross entropy 8x19x512x1024",
    "bce with logits 64x80",
    "bce with logits 4096x1000",
    "bce with logits 65536x1000",
}
GAINS = {  # what is trained, in a reader's words
    "cross entropy 1024x1000 float32": "images into 1000 classes, 1024 of them",
    "cross entropy 2x19x512x512 float32": "segmentation: 2 images of 512 x 512, 19 classes",
    "bce with logits 4096x1000 float32": "4096 samples with 1000 labels each, BCE",
    "cross entropy 512x32000 float32": "512 tokens of a language model, vocabulary of 32000",
    "cross entropy 64x128256 bfloat16": "64 tokens in bfloat16, vocabulary of 128256",
}


def machine_of(facts: dict, results: list[dict]) -> str:
    threads = f", {results[0]['threads']} threads" if "gpu" not in facts else ""
    return (
        f"{facts.get('gpu') or facts['cpu'] + ', ' + str(facts['cores']) + ' cores'}{threads}, torch {facts['torch']}"
    )


def gains(folder: Path) -> str:
    """Five cases of a machine, for a reader's first minute."""
    data = json.loads((folder / "results.json").read_text())
    results = {result["name"]: result for result in most_threads(data["results"])}
    titles = ["the loss of", "native torch", "fusedloss", "times as fast", "native's memory", "fusedloss's"]
    rows = []
    for name, words in GAINS.items():
        if name in results and step(results[name], "fusedloss"):
            _, native, _, ours, ratio, *peaks = row(results[name])
            rows.append([words, native, ours, ratio, *peaks])
    return f"{table(titles, rows)}\n{machine_of(data['machine'], list(results.values()))}.\n" if rows else ""


def block(folder: Path) -> str:
    """A machine's picture, and a table of some of its cases."""
    data = json.loads((folder / "results.json").read_text())
    facts, results = data["machine"], most_threads(data["results"])
    place = f"../{folder.relative_to(ROOT).as_posix()}"
    rows = [row(result) for result in results if shown(result)]
    titles = ["the loss in a training step", "native", "compiled", "fusedloss", "vs native", "native's peak", "peak"]
    columns = [column for column in zip(titles, *rows, strict=True) if set(column[1:]) != {NOTHING}]
    titles, *rows = map(list, zip(*columns, strict=True))
    return (
        f"{machine_of(facts, results)}, fusedloss at {facts['fusedloss']['git_revision']}, "
        f"{facts['date'].partition(' ')[0]};\neverything is in `{folder.relative_to(ROOT).as_posix()}/results.md`.\n"
        f"{busy(facts) if 'gpu' not in facts else ''}\n"
        f"![How many times faster a step is]({place}/speedup.svg)\n\n"
        f"![The bandwidth of a step, by number of classes]({place}/bandwidth.svg)\n\n{table(titles, rows)}"
    )


def shown(result: dict) -> bool:
    name, _, dtype = result["name"].rpartition(" ")
    return name in SHOWN and dtype in ("float32", "bfloat16") and step(result, "fusedloss") is not None


def row(result: dict) -> list[str]:
    native, compiled, ours = (step(result, name) for name in ("native", "compiled", "fusedloss"))
    peaks = [result["entries"].get(name, {}).get("peak_bytes") for name in ("native", "fusedloss")]
    return [
        result["name"],
        *(duration(value) if value else NOTHING for value in (native, compiled, ours)),
        times(native / ours if native and ours else None),
        *(NOTHING if peak is None else size(peak) for peak in peaks),
    ]


def defeats(folder: Path) -> str:
    """Where someone is quicker than we are: every case, with the quickest rival."""
    data = json.loads((folder / "results.json").read_text())
    rows = []
    for result in data["results"]:
        timed = {name: entry["times"] for name, entry in result["entries"].items() if entry["times"]}
        for measure, ours in timed.pop("fusedloss", {}).items():
            rivals = {name: taken[measure]["median"] for name, taken in timed.items() if measure in taken}
            best = min(rivals, key=rivals.__getitem__, default=None)
            if best and rivals[best] < ours["median"]:
                ratio = rivals[best] / ours["median"]
                rows.append([f"{result['name']}, {measure}", str(result["threads"]), best, times(ratio)])
    count = sum(len(result["entries"].get("fusedloss", {}).get("times", {})) for result in data["results"])
    title = f"{data['machine'].get('gpu') or data['machine']['cpu']}: {len(rows)} of {count} times.\n"
    return f"{title}\n{table(['case', 'threads', 'quicker', 'ratio'], rows)}" if rows else title


def written(text: str, block: Callable[[Path], str] = block) -> str:
    """A document with what stands between the markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    blocks = [block(path.parent) for path in sorted(RESULTS.glob("*/results.json"))]
    return before + BEGIN + "\n".join(blocks) + END + after


TABLES = {"README.md": gains, "docs/speed.md": block, "benchmarks/README.md": defeats}

if __name__ == "__main__":
    for name, part in TABLES.items():
        (ROOT / name).write_text(written((ROOT / name).read_text(), part))
