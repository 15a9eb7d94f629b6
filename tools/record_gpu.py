"""Write what tools/on_gpu.sh has found into the repository: the results, and what the documents say of them.

    python tools/record_gpu.py build/on_gpu/first build/on_gpu/second
    python tools/record_gpu.py              # the documents anew, from the results that are there
    python tools/record_gpu.py --check      # whether they are what this would write

The folders of one run, all of them at once, become benchmarks/results/<gpu>/ in the place of what was there. From these
results docs/gpu.md is made, the tables of both READMEs, and each sentence between <!-- gpu: KEY --> and <!-- /gpu -->,
which speaks of what no GPU has shown until the stages that it needs have passed.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: PYTHONPATH may name another checkout

from gpu_document import document  # noqa: E402
from gpu_run import Damaged, read  # noqa: E402
from ncu_cases import CALLS  # noqa: E402

from benchmarks import machine, pictures, readme, report  # noqa: E402

DOCUMENT = "docs/gpu.md"
MARK = re.compile(r"<!-- gpu: (?P<key>[\w ]+) -->.*?<!-- /gpu -->", re.DOTALL)
STATEMENTS = {  # the stages that have to pass; what is true before, and then. A run of `measured` has timed a case.
    "cuda": (("kernels", "tests"), "**have not been run yet**", "have passed their tests on {gpus}"),
    "triton": (("triton",), "**have not been run yet**", "have passed their tests on {gpus}"),
    "speed": (("measured",), "**has not been measured yet**", "has been measured on {gpus}"),
    "counts": (
        ("measured",),
        "none of it has been measured on a GPU yet",
        "what has been measured on {gpus} is in `docs/gpu.md`",
    ),
    "results": (
        ("measured",),
        "**The committed results are of CPUs; none of a GPU are there yet.**",
        "The committed results are of CPUs and, for a part of the cases, of {gpus}.",
    ),
    # No stage runs the tutorial's ladders: their chapters say themselves what they have measured.
    "ladders": ((None,), "**Nothing in this chapter has been measured on a GPU.**", ""),
}


def recorded() -> dict[str, dict]:
    """The runs by the folder of their results."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(readme.RESULTS.glob("*/run.json"))}


def record(folders: list[Path]) -> None:
    """Nothing is written unless all of it can be read."""
    run = read(folders)
    gpu = run["facts"]["found"]["gpu"]
    folder = readme.RESULTS / machine.slug_of(gpu)
    results, facts, left_out = {}, {}, {}
    for stage in ("bench", "peers"):  # a case that is in both has more rivals in the second
        data = run.get(stage, {}).get("found")
        if not data:
            continue
        try:
            if data["machine"]["gpu"] != gpu:
                raise Damaged(f"{stage}.json is of {data['machine']['gpu']}, the facts are of {gpu}")
            facts |= data["machine"]
            left_out |= data["left_out"]
            results |= {one["name"]: report.restored(one) for one in data["results"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise Damaged(f"{stage}.json is not what benchmarks/report.py writes: {error!r}") from error
        run[stage]["found"] = {"cases": len(data["results"]), "left out": len(data["left_out"])}
    calls = run.get("ncu", {}).get("found")
    if calls:
        whole = run["ncu"]["verdict"] == "passed"  # else the first of them
        if len(calls) > len(CALLS) or (whole and len(calls) < len(CALLS)):
            raise Damaged(f"ncu has seen {len(calls)} calls instead of {len(CALLS)}")
        run["ncu"]["found"] = {f"{name}, {measure}": one for (name, measure), one in zip(CALLS, calls, strict=False)}
    timed = [one for one in results.values() if one.seconds("fusedloss", "step")]
    run["measured"] = {"verdict": "passed" if timed else "failed", "found": {"cases": len(timed)}}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    if timed:
        left_out = {case: reason for case, reason in left_out.items() if case not in results}
        report.save(folder, facts, {None: list(results.values())}, left_out)
        pictures.draw(folder)


def results_of(slug: str) -> dict[str, report.Result]:
    path = readme.RESULTS / slug / "results.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return {row["name"]: report.restored(row) for row in rows}


def stated(text: str, runs: dict[str, dict]) -> str:
    """A document whose marked sentences say what is true by now."""

    def sentence(match):
        needs, before, then = STATEMENTS[match["key"]]
        gpus = [
            run["facts"]["found"]["gpu"]
            for run in runs.values()
            if all(run.get(need, {}).get("verdict") == "passed" for need in needs)
        ]
        words = then.format(gpus=" and ".join(gpus)) if gpus else before
        return f"<!-- gpu: {match['key']} -->{words}<!-- /gpu -->"

    return MARK.sub(sentence, text)


def documents() -> dict[Path, str]:
    """Every document as it should be."""
    runs = recorded()
    root = readme.ROOT
    found = [path for part in ("docs", "csrc", "benchmarks") for path in sorted((root / part).rglob("*.md"))]
    texts = {path: stated(path.read_text(), runs) for path in [root / "README.md", *found]}
    for name, block in readme.TABLES.items():
        texts[root / name] = readme.written(texts[root / name], block)
    return texts | {root / DOCUMENT: document(runs, {slug: results_of(slug) for slug in runs})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="what on_gpu.sh left: all folders of one run")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is not up to date")
    options = parser.parse_args()
    if options.folders and options.check:
        parser.error("--check records nothing")
    try:
        if options.folders:
            record(options.folders)
    except Damaged as reason:
        sys.exit(f"record_gpu: {reason}")
    changed = {path: text for path, text in documents().items() if not path.exists() or path.read_text() != text}
    names = ", ".join(str(path.relative_to(readme.ROOT)) for path in changed)
    if options.check:
        sys.exit(f"record_gpu: not up to date, run python tools/record_gpu.py: {names}" if changed else 0)
    for path, text in changed.items():
        path.write_text(text)
    print(f"record_gpu: written: {names or 'nothing new'}")


if __name__ == "__main__":
    main()
