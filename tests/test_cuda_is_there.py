"""Stands for the CUDA half of the suite where it is left out."""

import pytest
from conftest import missing_cuda


@pytest.mark.gpu
def test_every_test_over_devices_also_runs_on_cuda(device):
    if reason := missing_cuda():
        pytest.skip(f"{reason}: every test over devices has run on the CPU only")
    assert device in ("cpu", "cuda")
