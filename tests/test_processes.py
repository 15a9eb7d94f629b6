"""Processes that are forked or spawned compute what their parent does."""

import multiprocessing

import pytest
import torch
from conftest import HAS_GPU
from support import LOSSES, differentiate


def results():
    """Of each loss, value and gradients, as lists: tensors would be shared between processes, not copied."""
    torch.manual_seed(0)
    cases = [(loss.ours, *loss.sample(512, 33)) for loss in LOSSES.values()]
    return [tensor.tolist() for case in cases for tensor in differentiate(*case)]


@pytest.fixture
def expected():
    """The parent's, on two threads: OpenMP's worker exists from then on, and no forked child has it."""
    torch.set_num_threads(2)
    yield results()
    torch.set_num_threads(1)


# Where there is a GPU, autograd has a thread for it, and refuses to run in a fork.
METHODS = ["spawn"] if HAS_GPU else ["fork", "spawn"]


# As for native losses, a forked child that wants several threads waits for ever for those of its parent.
@pytest.mark.parametrize("method", METHODS)
def test_children(method, expected):
    context = multiprocessing.get_context(method)
    with context.Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        children = [pool.apply_async(results) for _ in range(4)]
        for child in children:
            assert child.get(timeout=120) == expected


class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return results()


def test_workers_of_a_data_loader(expected):
    options = {"batch_size": None, "num_workers": 2, "timeout": 120, "multiprocessing_context": METHODS[0]}
    loader = torch.utils.data.DataLoader(Losses(), **options)
    for child in loader:
        assert [torch.as_tensor(part).tolist() for part in child] == expected
