"""What the documents and the demo show, run; and that the checks of documents (documents.py) can fail."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("sybil", reason="no document is checked: sybil, which reads them, is not installed")

import documents
from documents import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])


@each_document
def test_a_document_keeps_what_it_claims(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if missing := documents.check(path):
        pytest.skip(f"all but the blocks that need {', '.join(missing)}, not installed")


def is_reached(path, link):
    """Also on the site, which is made of the Markdown in docs/. It takes in other files, but no folder, and no Markdown
    from elsewhere."""
    target = (path.parent / link).resolve()
    site = ROOT / "docs"
    if path.is_relative_to(site) and not target.is_relative_to(site):
        return target.is_file() and target.suffix != ".md"
    return target.exists()


@each_document
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text())
    assert [link for link in links if not is_reached(path, link)] == []


PRINTS = "```python\nprint(1 + 1)\n```\n"
EXCERPT = "<!-- excerpt: fusedloss/_library.py -->\n```python\n"
LEFT_OUT = "<!-- needs: torch no_such_package -->\n```python\nimport no_such_package\n```\n"
TRUE = {
    "output": PRINTS + "<!-- output -->\n```text\n2\n```\n",
    "the output of this torch": PRINTS + "<!-- output: torch 2. -->\n```text\n2\n```\n",
    "the output of another torch": PRINTS + "<!-- output: torch 1.0 -->\n```text\n3\n```\n",
    "a command": "<!-- run -->\n```sh\necho 2\n```\n<!-- output -->\n```text\n2\n```\n",
    "a command for the reader": "```sh\nfalse\n```\n",
    "packages that are there": "<!-- needs: torch sybil -->\n" + PRINTS + "<!-- output -->\n```text\n2\n```\n",
    "packages that are missing": LEFT_OUT
    + "<!-- output -->\n```text\n3\n```\n"
    + PRINTS
    + "<!-- output -->\n```text\n2\n```\n",
    "an excerpt": EXCERPT + "return _C.build_info()\n```\n",
    "a value": "It took <!-- value: {json} a.b -->1,234.6<!-- /value --> seconds.",
}
FALSE = {
    "another output": PRINTS + "<!-- output -->\n```text\n3\n```\n",
    "output that nothing shows": PRINTS,
    "another output of this torch": PRINTS + "<!-- output: torch 2. -->\n```text\n3\n```\n",
    "a command that fails": "<!-- run -->\n```sh\nfalse\n```\n",
    "what packages that are there print": "<!-- needs: torch sybil -->\n" + PRINTS,
    "what is printed behind a block that is left out": LEFT_OUT + PRINTS,
    "packages that a command needs": "<!-- needs: torch -->\n```sh\ntrue\n```\n",
    "an assert": "```python\nassert 1 == 2\n```\n",
    "an excerpt that drifts": EXCERPT + "return _C.build_infos()\n```\n",
    "an excerpt that leaves a line out": EXCERPT + "try:\nexcept ImportError as error:\n```\n",
    "a language that nothing checks": "```cpp\nint x;\n```\n",
    "no language": "```\nint x;\n```\n",
    "a mark without its block": "<!-- output -->\n\n```text\n2\n```\n",
    "a value that is rounded wrongly": "It took <!-- value: {json} a.b -->1234.5<!-- /value --> seconds.",
    "a value that opens a line": "It took\n<!-- value: {json} a.b -->1234.6<!-- /value --> seconds.",
    "a value without an end": "It took <!-- value: {json} a.b -->1234.6 seconds.",
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [*((text, True) for text in TRUE.values()), *((text, False) for text in FALSE.values())],
    ids=[*TRUE, *FALSE],
)
def test_the_checks_of_documents(text, holds, tmp_path):
    numbers = tmp_path / "numbers.json"
    numbers.write_text('{"a": {"b": 1234.56}}')
    path = tmp_path / "document.md"
    path.write_text(text.replace("{json}", str(numbers)))
    if holds:
        assert documents.check(path) == (["no_such_package"] if "no_such_package" in text else [])
    else:
        with pytest.raises(AssertionError):
            documents.check(path)


@pytest.mark.long
def test_the_demo(tmp_path):
    """A few steps of each training: exits with an error if native and fused curves part."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the demo's data, is not installed")
    picture = tmp_path / "curves.png"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--threads", "1", "--output", str(picture)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in ("Digits", "Attributes", "Language", "Ratio"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_example_of_shared_classes():
    """Two ranks with a part of the classes each: exits with an error if their losses are not those of the whole."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "examples.tensor_parallel"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "The losses agree" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["bytes", "of", "logits", "1,025,024", *["513,024"] * 4] in rows
    assert ["collectives:", "forward", "0", *["1"] * 4] in rows
    assert ["backward", "0", *["1"] * 4] in rows
