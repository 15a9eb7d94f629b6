"""Each layer knows only the ones before it: math, kernels, ops, register, Python."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = {"csrc/math", "csrc/kernels"}
BELOW = {  # folder of csrc: the others whose files its own may include
    "csrc/math": set(),
    "csrc/kernels": {"csrc/math"},
    "csrc/kernels/cpu": KERNELS,
    "csrc/kernels/cuda": KERNELS,
    "csrc/ops": {*KERNELS, "csrc/kernels/cpu", "csrc/kernels/cuda"},
    "csrc": {*KERNELS, "csrc/kernels/cpu", "csrc/kernels/cuda", "csrc/ops"},
}
GENERATED = {"fusedloss_build_info.h"}
TORCH = re.compile(r"(torch|ATen|c10|pybind11)/")
WAITS = re.compile(r"\.(item|cpu|tolist)\(")  # for the GPU
READ_ON_THE_CPU = [  # where other devices assert
    "vocab_parallel.py:     marks, failures, *compared = every[:, : len(_COMPARED) + 2].T.tolist()"
]
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)


def sources(folder):
    return [path for path in folder.rglob("*") if path.suffix in {".h", ".inl", ".cuh", ".cpp", ".cu"}]


def misplaced_includes(root):
    """What files of csrc include that is not below them, whatever path they name it by."""
    found = []
    for path in sources(root / "csrc"):
        folder = path.parent.relative_to(root).as_posix()
        for quote, name in INCLUDE.findall(path.read_text()):
            included = next((at / name for at in (path.parent, root / "csrc") if (at / name).exists()), None)
            if included is not None:
                below = included.resolve().parent.relative_to(root.resolve()).as_posix() in {folder, *BELOW[folder]}
            elif TORCH.match(name):
                below = folder in ("csrc/ops", "csrc")
            else:
                below = quote == "<" or name in GENERATED
            if not below:
                found.append(f"{path.relative_to(root)} includes {name}")
    return sorted(found)


def test_a_layer_includes_only_what_is_below_it():
    assert {path.parent.relative_to(ROOT).as_posix() for path in sources(ROOT / "csrc")} == BELOW.keys()
    assert misplaced_includes(ROOT) == []


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("csrc/math", "../kernels/types.h"),
        ("csrc/math", "kernels/types.h"),
        ("csrc/math", "ATen/ATen.h"),
        ("csrc/kernels", "../ops/launch.h"),
        ("csrc/kernels/cpu", "../cuda/cuda.h"),
        ("csrc/kernels/cpu", "c10/util/Half.h"),
        ("csrc/kernels/cuda", "../../ops/launch.h"),
        ("csrc/kernels/cuda", "../../kernels/cpu/../../ops/launch.h"),
        ("csrc/kernels/cuda", "../cpu/cpu.h"),
        ("csrc/ops", "../triton.h"),
        ("csrc/ops", "../no_such_file.h"),
    ],
)
def test_a_misplaced_include_is_found(place, name, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / place / "planted.h").write_text(f'  #  include "{name}"\n')
    assert misplaced_includes(tmp_path) == [f"{place}/planted.h includes {name}"]


def test_only_the_python_module_includes_all_of_torch():
    """These headers cost seconds in every file that includes them."""
    everything = {"torch/extension.h", "torch/torch.h", "torch/all.h"}
    including = {
        path.name
        for path in sources(ROOT / "csrc")
        if everything & {name for _, name in INCLUDE.findall(path.read_text())}
    }
    assert including <= {"module.cpp"}


def test_python_never_waits_for_a_gpu():
    files = list((ROOT / "fusedloss").rglob("*.py"))
    found = [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if WAITS.search(line)]
    assert files
    assert found == READ_ON_THE_CPU


def test_one_file_loads_the_library():
    """It says what to do where that fails; another that loads it first would let the loader speak."""
    files = (ROOT / "fusedloss").rglob("*.py")
    loading = re.compile(r"from fusedloss import .*\b_C\b|import fusedloss\._C")
    assert [path.name for path in files if loading.search(path.read_text())] == ["_library.py"]
