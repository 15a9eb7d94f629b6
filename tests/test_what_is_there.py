"""Stands for the parts of the suite that are left out here, and says so."""

import pytest
from conftest import HAS_GPU, HAS_TRITON, missing_cuda


@pytest.mark.gpu
def test_every_test_over_devices_also_runs_on_cuda():
    if reason := missing_cuda():
        pytest.skip(f"{reason}: no test over devices has run on CUDA")


@pytest.mark.gpu
def test_every_test_over_devices_also_runs_in_triton(request):
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: no test over devices has run in it")
    if not HAS_GPU:
        pytest.skip(f"no GPU: the Triton kernels were interpreted on the CPU, --interpreted={interpreted(request)}")


def interpreted(request):
    return request.config.getoption("--interpreted")


def test_no_test_has_an_address_in_its_name(request):
    """It would differ between the workers of pytest-xdist, and none of them would start."""
    assert [item.nodeid for item in request.session.items if " at 0x" in item.nodeid] == []


def test_a_group_of_tests_has_one_process(request):
    """pytest-xdist knows it by the name of the test. Else its processes all do what one would do for the group."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("tests are not grouped: not pytest -n NUMBER --dist loadgroup")
    grouped = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert [item.nodeid for item in grouped if not item.nodeid.endswith(("@ranks", "@headers"))] == []
