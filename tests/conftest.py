"""Fixtures every test file shares."""

import pytest
import torch

import fusedloss


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not fusedloss.build_info()["cuda"]:
            pytest.skip("fusedloss is built without CUDA kernels")
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads only slow these small samples down; test_threads shows that their number changes no bit."""
    torch.set_num_threads(1)
