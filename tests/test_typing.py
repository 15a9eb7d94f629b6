"""What an editor completes and a type checker checks: typed.py, and what types say twice agrees."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support import LOSSES
from typing_extensions import get_overloads

import fusedloss
from fusedloss import _C
from fusedloss.functional import CrossEntropyOptions

ROOT = Path(__file__).parent.parent


def keyword_only(function):
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_what_a_type_checker_sees():
    pytest.importorskip("mypy", reason="mypy, which checks types, is not installed")
    command = [sys.executable, "-m", "mypy", "--warn-unused-ignores", "tests/typed.py"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_overloads_take_what_the_function_takes():
    overloads = [list(inspect.signature(overload).parameters) for overload in get_overloads(fusedloss.cross_entropy)]
    native = list(inspect.signature(LOSSES["cross_entropy"].native).parameters)
    assert overloads == [[*native, "return_lse", "options"]] * 3
    assert {"return_lse", *CrossEntropyOptions.__annotations__} == keyword_only(fusedloss.cross_entropy).keys()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_module_has_the_options_of_its_function(loss):
    module, added = getattr(fusedloss, loss.module), keyword_only(loss.ours)
    assert keyword_only(module) == added
    assert {name: getattr(module, name) for name in added} == added
    assert vars(module(**added)).items() >= added.items()


def test_the_stub_of_the_compiled_module_names_what_it_has():
    stub = ast.parse((ROOT / "fusedloss/_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert functions == {name for name in vars(_C) if not name.startswith("_")}
