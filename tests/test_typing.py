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
from fusedloss.functional import CrossEntropyCall, CrossEntropyOptions

ROOT = Path(__file__).parent.parent
OF_A_CALL = {"denominator", "sample_weight"}  # what a module is given with each batch


def keyword_only(function):
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


@pytest.mark.long
def test_what_a_type_checker_sees():
    pytest.importorskip("mypy", reason="mypy, which checks types, is not installed")
    command = [sys.executable, "-m", "mypy", "--warn-unused-ignores", "tests/typed.py"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 forgets what typing.overload is given")
def test_overloads_take_what_the_function_takes():
    overloads = [list(inspect.signature(overload).parameters) for overload in get_overloads(fusedloss.cross_entropy)]
    native = list(inspect.signature(LOSSES["cross_entropy"].native).parameters)
    answers = ["return_lse", "return_entropy", "return_argmax"]
    assert overloads == [[*native, *answers, "options"]] * 9
    assert {*answers, *CrossEntropyCall.__annotations__} == keyword_only(fusedloss.cross_entropy).keys()
    assert CrossEntropyCall.__annotations__.keys() - CrossEntropyOptions.__annotations__.keys() == OF_A_CALL
    for overload in get_overloads(fusedloss.token_log_probs):
        assert list(inspect.signature(overload).parameters) == list(
            inspect.signature(fusedloss.token_log_probs).parameters
        )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_module_has_the_options_of_its_function(loss):
    module = getattr(fusedloss, loss.module)
    added = {name: default for name, default in keyword_only(loss.ours).items() if name not in OF_A_CALL}
    assert keyword_only(module) == added
    assert {name: getattr(module, name) for name in added} == added
    assert vars(module(**added)).items() >= added.items()


def test_the_stub_of_the_compiled_module_names_what_it_has():
    stub = ast.parse((ROOT / "fusedloss/_C.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    named |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in vars(_C) if not name.startswith("_")}
