"""What the README and the demo show, run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_s_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].grad.shape == names["logits"].shape
    assert names["output"]._version == 1, "overwritten by its gradient"


def test_the_readme_s_links_lead_somewhere():
    links = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_demo(tmp_path):
    """A few steps of each training: exits with an error if native and fused curves part."""
    picture = tmp_path / "curves.png"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--threads", "1", "--output", str(picture)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in ("Digits", "Attributes", "Language", "Ratio"))
    assert picture.read_bytes().startswith(b"\x89PNG")
