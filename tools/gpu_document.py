"""Makes docs/gpu.md: how to run on a GPU, what was predicted, and of each recorded run what came out."""

from gpu_headlines import HEADLINES, PREDICTED_FOR, REVISION, Headline
from on_gpu_dry_run import stages

from benchmarks.cases import CUDA_GROUPS
from benchmarks.goals import GOALS
from benchmarks.measure import MEASURES, Result
from benchmarks.report import NOTHING, duration, percent, table

WORDS = ("what it shows", "what it found", "verdict", "in the way, predicted")  # columns
NOT_YET = "not measured yet"
SHOWN = 20  # failures that are named; all of them are in run.json
HEAD = """\
# On a GPU

<!-- written by python tools/record_gpu.py -->

On a machine with an NVIDIA GPU, a CUDA toolkit (12.8 or newer), torch for CUDA, Triton, pytest with pytest-xdist and
pytest-timeout, hypothesis, rich and matplotlib, in a clone of this repository, two commands show what no other machine
can. They need no network, and take at most ten minutes each:

```sh
bash tools/on_gpu.sh             # builds for this GPU, checks the kernels, runs the tests, measures
bash tools/on_gpu.sh second      # hardware counters, more tests, other projects' kernels, Triton
```

A stage that fails, or is stopped at its limit, does not keep the next from running; a table of verdicts comes last.
Logs and numbers are in `build/on_gpu/first` and `build/on_gpu/second`, or where `$OUT` says: at most eight small files,
to be copied to where they are recorded. Wheels of other projects' kernels take part if they lie in `.whl`. Stages may
be named: what has been built is still there for `bash tools/on_gpu.sh facts ncu peers`. In a copy without the history,
`FUSEDLOSS_REVISION` says which revision it is of. Without a GPU, `bash tools/on_gpu.sh --dry-run` shows that files,
filters and limits fit.

```sh
python tools/record_gpu.py build/on_gpu/first build/on_gpu/second
```

writes the results into `benchmarks/results`, and makes this page anew, the tables of the READMEs, and each sentence of
the documents that says what no GPU has shown yet, as far as the stages that it speaks of have passed.

## The stages

"""
PREDICTIONS = f"""\
The predictions were made at revision {REVISION} from the machine code and a model of the memory's latency, before a GPU
had run the kernels; they may be off by 8 points, and what a later revision has cured is what they are beaten by. A
forward is measured in percent of a plain copy's bandwidth, a step in percent of the floor, both as defined in
`benchmarks/README.md`; latencies are in µs.
"""


def document(runs: dict[str, dict], results: dict[str, dict[str, Result]]) -> str:
    """Runs, and results by the name of a case, both by the folder that they are in."""
    parts = [HEAD, table(["stage", "set", "seconds", WORDS[0]], list(map(stage_row, stages())), WORDS)]
    if not runs:
        parts += ["\n## Predicted, and not measured yet\n\n", PREDICTIONS, "\n", headline_table({}, {})]
    for slug, run in runs.items():
        parts += [section(slug, run), "\n", PREDICTIONS, "\n", headline_table(run, results[slug])]
    return "".join(parts)


def stage_row(stage: dict[str, str]) -> list[str]:
    return [stage["stage"], stage["sets"].replace(",", ", "), stage["limit"], stage["shows"]]


# --- A run ---


def section(slug: str, run: dict) -> str:
    facts = run["facts"]["found"]
    known = [f"- {name}: {value}\n" for name, value in facts.items() if name not in ("ncu", "compute-sanitizer")]
    rows = [stage_verdict(stage["stage"], run.get(stage["stage"])) for stage in stages()]
    all_results = f"\nAll numbers are in `benchmarks/results/{slug}`.\n"
    titles = ["stage", "verdict", "seconds", WORDS[1]]
    return f"\n## {facts['gpu']}\n\n{''.join(known)}\n{table(titles, rows, WORDS)}{failures(run)}{all_results}"


def stage_verdict(name: str, stage: dict | None) -> list[str]:
    if stage is None:
        return [name, "not run", NOTHING, ""]
    show = FOUND.get(name, lambda found: "")
    text = show(stage["found"]) if stage["found"] else "" if stage["verdict"] == "passed" else stage["last"]
    return [name, stage["verdict"], str(stage["seconds"]), text.replace("|", "\\|")]


def of_kernels(found: dict) -> str:
    # They run side by side, and any may be the last.
    return "; ".join(f"{dtype}: {one['failed']} of {one['cases']} wrong" for dtype, one in sorted(found.items()))


def of_tests(found: dict) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in found["counts"].items()) or "no counts"


def of_sanitizers(found: dict) -> str:
    return "; ".join(
        f"{tool}: {one['verdict']}" + f" ({one['first']})" * bool(one["first"]) for tool, one in found.items()
    )


def of_benchmarks(found: dict) -> str:
    return f"{found['cases']} cases, {found['left out']} left out"


FOUND = {
    "kernels": of_kernels,
    **dict.fromkeys(("tests", "large", "devices", "triton"), of_tests),
    "sanitize": of_sanitizers,
    **dict.fromkeys(("bench", "peers"), of_benchmarks),
    "ncu": lambda found: f"{len(found)} calls",
}


def failures(run: dict) -> str:
    """Who failed, by name."""
    names = [name for stage in run.values() for name in stage["found"].get("failures", [])]
    more = [f"- and {len(names) - SHOWN} more\n"] if len(names) > SHOWN else []
    lines = [*(f"- `{name}`\n" for name in names[:SHOWN]), *more]
    return f"\nTests that failed:\n\n{''.join(lines)}" if names else ""


# --- Beside the predictions ---


def headline_table(run: dict, results: dict[str, Result]) -> str:
    seen = run.get("ncu", {}).get("found") or {}
    counters = ["memory", "occupancy", "registers", "stall"] if seen else []
    titles = [
        "case",
        "pass",
        *(f"{gpu}, predicted" for gpu in PREDICTED_FOR),
        "wanted",
        "measured",
        *counters,
        "in the way, predicted",
    ]
    rows = []
    for headline in HEADLINES:
        for measure in MEASURES:
            predicted, wanted = getattr(headline, measure), goal(headline, measure)
            result = results.get(headline.case)
            measured = fraction(result, headline, measure) if result else NOT_YET
            beside = [show_counter(seen.get(f"{headline.case}, {measure}", {}), name) for name in counters]
            if predicted or wanted or result:
                prediction = [with_unit(value) for value in predicted or [NOTHING] * len(PREDICTED_FOR)]
                limit = headline.limit if predicted else ""
                rows.append([headline.case, measure, *prediction, wanted, measured, *beside, limit])
    return table(titles, rows, WORDS)


def with_unit(prediction: str) -> str:
    return prediction if prediction.endswith(("s", NOTHING)) else f"{prediction}%"


def goal(headline: Headline, measure: str) -> str:
    (case,) = [case for group in CUDA_GROUPS.values() for case in group if str(case) == headline.case]
    of_this = [goal for goal in GOALS if goal.unit == "percent" and ("forward" in goal.title) == (measure == "forward")]
    return next((percent(goal.wanted) for goal in of_this if goal.cases(case)), "")


def fraction(result: Result, headline: Headline, measure: str) -> str:
    """In the prediction's unit."""
    seconds = result.seconds("fusedloss", measure)
    if seconds is None:
        return f"**{result.entries['fusedloss'].problem.partition(':')[0]}**"
    in_seconds = result.case.latency or "s" in "".join(getattr(headline, measure) or ())
    return (
        duration(seconds)
        if in_seconds
        else percent((result.bandwidth if measure == "forward" else result.floor)(measure))
    )


def show_counter(counters: dict, name: str) -> str:
    value = counters.get(name)
    if value is None:
        return ""
    return f"{value:.0f}%" if name in ("memory", "occupancy") else str(value).replace("_", " ").removesuffix(".0")
