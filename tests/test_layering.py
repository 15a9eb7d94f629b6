"""Each layer knows only the ones before it: math, kernels, ops, register, Python."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {  # folder: what none of its files may contain
    "csrc/math": r'#include\s*[<"](torch|ATen|c10|kernels|ops|.*\.\./)',
    "csrc/kernels": r'#include\s*[<"](torch|ATen|c10|ops)/',
    "csrc/ops": r"#include\s*[<\"]torch/(extension|torch|all)\.h",
    "fusedloss": r"\.(item|cpu|tolist)\(",
}


def sources(folder):
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in {".h", ".inl", ".cuh", ".cpp", ".cu", ".py"}]


@pytest.mark.parametrize(("folder", "pattern"), FORBIDDEN.items(), ids=FORBIDDEN)
def test_a_layer_stays_below_the_next(folder, pattern):
    files = sources(folder)
    assert files, f"nothing to check in {folder}"
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in files
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]
    assert found == []


def test_only_the_python_module_includes_all_of_torch():
    """torch/extension.h costs seconds in every file that includes it."""
    including = [
        path.name for path in sources("csrc") if re.search(r"#include\s*<torch/extension\.h>", path.read_text())
    ]
    assert including in ([], ["module.cpp"])
