"""The site that `make docs` builds from the Markdown beside this file, which reads as well without it."""

import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # autodoc imports the fusedloss of this checkout, built in place

project = "fusedloss"
version = release = (ROOT / "fusedloss/version.txt").read_text().strip()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # index.rst shows it
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
napoleon_use_rtype = False
autodoc_mock_imports = ["transformers"]  # whose integration is described without it

html_theme = "furo"
html_title = f"fusedloss {version}"

# Overloads are for type checkers. A reader wants the defaults, which the function itself has.
functional = ModuleAnalyzer.for_module("fusedloss.functional")
functional.analyze()
functional.overloads.clear()
