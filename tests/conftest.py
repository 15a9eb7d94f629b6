"""Fixtures every test file shares."""

import pytest
import torch

import fusedloss


def missing_cuda():
    """Why tests cannot run on CUDA, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if fusedloss.build_info()["cuda"] else "fusedloss is built without CUDA kernels"


# Without CUDA its half of the tests is left out as a whole; test_cuda_is_there says so, in one line.
@pytest.fixture(params=["cpu"] if missing_cuda() else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads only slow these small samples down; test_threads shows that their number changes no bit."""
    torch.set_num_threads(1)
