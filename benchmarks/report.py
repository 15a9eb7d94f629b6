"""Results as tables, the same for the terminal and in Markdown, and as JSON."""

import json
from dataclasses import asdict
from functools import partial
from statistics import geometric_mean

from benchmarks.cases import GOAL, GROUPS
from benchmarks.measure import MEASURES, Result

RIVALS = ("native", "compiled")
LEGEND = """\
Times are medians. A ratio above 1 says how many times faster fusedloss is; **bold**: it is slower than native.
"of copy": the bytes that the forward or the step must move, per second, as a fraction of a plain copy's bytes per
second. "must move": these bytes, of a step. "x copy": a step in plain copies of the logits, where logits and gradient
together are larger than the last-level cache.
"""
NOTHING = "-"


def document(facts: dict, results: dict[int, list[Result]]) -> str:
    """The whole report in Markdown; results by number of threads."""
    return "\n".join([header(facts), *(section(facts, some) for some in results.values())])


def header(facts: dict) -> str:
    build = ", ".join(f"{name} {value}" for name, value in facts["fusedloss"].items() if value)
    return (
        "# Benchmarks\n\n"
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['cpu_capability']}; {facts['date']}\n"
        f"- Python {facts['python']}, torch {facts['torch']}\n"
        f"- fusedloss: {build}\n\n{LEGEND}"
    )


def section(facts: dict, results: list[Result]) -> str:
    """What one number of threads gave: a table for each group, what went wrong, geometric means."""
    parts = [f"## Threads: {results[0].threads}\n"]
    for group, cases in GROUPS.items():
        columns = columns_of(facts["last_level_cache"])
        rows = [[cell(result) for _, cell in columns] for result in results if result.case in cases]
        if rows:
            parts += [f"### {group.capitalize()}\n", table([title for title, _ in columns], rows)]
    problems = [
        f"- {result.case}, {name}: {entry.problem}\n"
        for result in results
        for name, entry in result.entries.items()
        if entry.problem
    ]
    if problems:
        parts.append("".join(problems))
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
            ("of copy", lambda result: percent(result.bandwidth(measure))),
        ]

    return [
        ("case", lambda result: result.case.name),
        ("dtype", lambda result: result.case.type),
        *of("forward"),
        *of("step"),
        ("must move", lambda result: size(result.bytes_to_move["step"])),
        ("x copy", x_copy),
    ]


def ours(result: Result, measure: str) -> str:
    return problem(result, "fusedloss") or duration(result.seconds("fusedloss", measure))


def ratio(result: Result, measure: str, rival: str) -> str:
    value = result.ratio(measure, rival)
    slower = rival == "native" and value is not None and value < 1
    return problem(result, rival) or (f"**{times(value)}**" if slower else times(value))


def problem(result: Result, name: str) -> str:
    return result.entries[name].problem.partition(":")[0] if name in result.entries else ""


def duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def size(count: int) -> str:
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    signs = "<" + ">" * len(widths[1:])
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
            ratios = [result.ratio(measure, rival) for result in results if result.case in GROUPS[GOAL]]
            timed = [value for value in ratios if value is not None]
            if timed:
                mean = {"measure": measure, "rival": rival, "ratio": geometric_mean(timed), "cases": len(timed)}
                found.append(mean)
    return found


def as_json(facts: dict, results: dict[int, list[Result]]) -> str:
    """Everything, in seconds and bytes."""
    data = {
        "machine": facts,
        "geometric_means": {threads: means(some) for threads, some in results.items()},
        "results": [{"name": str(r.case), **asdict(r)} for some in results.values() for r in some],
    }
    return json.dumps(data, indent=1, default=str)
