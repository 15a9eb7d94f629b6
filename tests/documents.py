"""Documents that cannot drift: Sybil finds the parts of a Markdown file that make a claim, and checks each.

    ```python                   runs; all blocks of a document share one namespace, in order
    <!-- needs: PACKAGES -->    before such a block: it runs where these are installed, and is left out elsewhere
    <!-- output --> ```text     equals what the block before has printed; what is printed must be shown
    <!-- output: torch 2.13 --> is compared beside that torch alone: some of it is torch's own words
    <!-- run --> ```sh          runs from the repository's root; without the mark it is for the reader alone
    <!-- excerpt: PATH -->      the block stands in that file, line for line, but for common indentation
    <!-- result: PATH -->       the same, for a file that a script has written
    <!-- value: PATH KEY -->1.2<!-- /value -->  is the number under KEY in a JSON file, rounded as it is shown

A value never opens a line: Markdown would take the rest of the paragraph for HTML. A marked block follows its mark
directly. A block in any other language needs one: without, nothing keeps it true.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import torch
from sybil import Region
from sybil.document import Document

ROOT = Path(__file__).resolve().parents[1]
FOR_THE_READER = ("sh", "text")
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>output(?:: torch [\d.]+)?|run|(?:excerpt|result): \S+|needs: [\w ]+) -->\n)?"
    r"```(?P<language>\S*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"<!-- (output|run|excerpt|result|needs|value)\b")
_VALUE = re.compile(r"<!-- value: (?P<path>\S+) (?P<key>[^>]+?) -->(?P<shown>[^<]*)<!-- /value -->")
_PRINTED = "printed, and not shown yet"
_MISSING = "packages that blocks need, and that are not installed"


def check(path: Path) -> list[str]:
    """Runs and compares everything that a document claims; returns which packages are missing for some of it."""
    document = Document.parse(str(path), _blocks, _values)
    document.namespace["__name__"] = path.stem
    document.namespace.update({_PRINTED: "", _MISSING: set()})
    marks = list(_MARK.finditer(document.text))
    read = sum(region.parsed["mark"] is not None for _, region in document.regions)
    assert len(marks) == read, f"{path}: {len(marks)} marks, of which {len(marks) - read} belong to no block"
    for example in document:
        example.evaluate()
    _all_is_shown(document.namespace, f"{path}: the last block")
    return sorted(document.namespace[_MISSING])


def _blocks(document):
    for match in _BLOCK.finditer(document.text):
        yield Region(match.start(), match.end(), match.groupdict(), _check_block)


def _values(document):
    for match in _VALUE.finditer(document.text):
        opens_a_line = f"\n{document.text}"[match.start()] == "\n"
        assert not opens_a_line, f"{document.path}: {match[0]} opens a line, which would become HTML"
        yield Region(match.start(), match.end(), {"mark": "value", **match.groupdict()}, _check_value)


def _check_block(example):
    __tracebackhide__ = True
    mark, language, text = (example.parsed[name] for name in ("mark", "language", "text"))
    where = f"{example.path}:{example.line}"
    kind, _, path = (mark or "").partition(": ")
    assert kind != "needs" or language == "python", (
        f"{where}: only a block of Python can need packages, got {language!r}"
    )
    if kind == "output":
        printed = example.namespace[_PRINTED]
        words_of = path.removeprefix("torch ")  # empty: everyone's
        if printed is not None and torch.__version__.startswith(words_of):
            assert text == printed, f"{where} shows\n{text}but the block before prints\n{printed}"
        example.namespace[_PRINTED] = ""
        return
    if kind in ("excerpt", "result"):
        assert _is_part_of((ROOT / path).read_text(), text), f"{where} is not what stands in {path}:\n{text}"
    elif language == "python":
        _all_is_shown(example.namespace, f"{where}: the block before")
        missing = {package for package in path.split() if find_spec(package) is None}
        example.namespace[_MISSING] |= missing
        example.namespace[_PRINTED] = None if missing else _printed_by_python(text, example)
    elif kind == "run":
        assert language == "sh", f"{where}: only a block of sh can be run, got {language!r}"
        _all_is_shown(example.namespace, f"{where}: the block before")
        example.namespace[_PRINTED] = _printed_by_shell(text, where)
    else:
        assert language in FOR_THE_READER, f"{where}: a block of {language!r} needs a mark, or nothing keeps it true"


def _printed_by_python(text, example):
    # The empty lines give tracebacks the document's line numbers.
    code = compile("\n" * example.line + text, example.path, "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, example.namespace)
    return printed.getvalue()


def _printed_by_shell(text, where):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, f"{where}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _all_is_shown(namespace, what):
    printed = namespace[_PRINTED]
    assert not printed, f"{what} prints what no <!-- output --> block shows:\n{printed}"


def _is_part_of(whole, part):
    """Whether the lines of `part` stand in `whole`, one after the other, all indented by as much as you like."""
    wanted = [line.rstrip() for line in textwrap.dedent(part).splitlines()]
    lines = [line.rstrip() for line in whole.splitlines()]
    runs = (lines[i : i + len(wanted)] for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent("\n".join(run)).splitlines() == wanted for run in runs if run[0].endswith(wanted[0]))


def _check_value(example):
    __tracebackhide__ = True
    path, key, shown = (example.parsed[name] for name in ("path", "key", "shown"))
    found = json.loads((ROOT / path).read_text())
    for part in [key] if key in found else key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    digits = shown.strip().replace(",", "")
    decimals = len(digits.partition(".")[2])
    expected = f"{found:.{decimals}f}"
    assert digits == expected, f"{example.path}:{example.line} shows {shown}, but {key} in {path} is {found}"
