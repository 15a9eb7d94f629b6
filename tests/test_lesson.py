"""The worked numbers of the lesson this project grew from, to the four digits it prints."""

import pytest
import torch

import fusedloss.functional as F

LOGITS, CLASSES = [[1.0, 2.0], [1.0, 3.0], [1.0, 3.0]], [0, 1, 1]
SCORES, LABELS = [[1.0, 2.0], [2.0, 2.0], [3.0, 4.0], [4.0, 5.0]], [[1, 0], [1, 0], [0, 1], [0, 1]]

CLASS_LOSSES = {
    "cross entropy": (F.cross_entropy, {}, [1.3133, 0.1269, 0.1269], 1.5671, 0.5224),
    "weighted cross entropy": (
        F.cross_entropy,
        {"weight": [1.0, 2.0]},
        [1.3133, 0.2539, 0.2539],
        1.8210,
        0.3642,
    ),
    "nll of the raw input": (F.nll_loss, {}, [-1.0, -3.0, -3.0], -7.0, -2.3333),
}
BINARY_LOSSES = {
    "plain": ({}, 0.3133, 11.7856, 1.4732),
    "positive class weighs 3": ({"pos_weight": [3.0, 3.0]}, 0.9398, 12.7158, 1.5895),
}


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, device=actual.device), rtol=0, atol=6e-5)


@pytest.mark.parametrize(("function", "options", "none", "total", "mean"), CLASS_LOSSES.values(), ids=CLASS_LOSSES)
def test_class_losses(function, options, none, total, mean, device):
    input, target = torch.tensor(LOGITS, device=device), torch.tensor(CLASSES, device=device)
    options = {name: torch.tensor(value, device=device) for name, value in options.items()}
    close(function(input, target, reduction="none", **options), none)
    close(function(input, target, reduction="sum", **options), total)
    close(function(input, target, **options), mean)


@pytest.mark.parametrize("labels", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize(("options", "first", "total", "mean"), BINARY_LOSSES.values(), ids=BINARY_LOSSES)
def test_binary_losses(options, first, total, mean, labels, device):
    input, target = torch.tensor(SCORES, device=device), torch.tensor(LABELS, device=device).to(labels)
    options = {name: torch.tensor(value, device=device) for name, value in options.items()}
    close(F.binary_cross_entropy_with_logits(input, target, reduction="none", **options)[0, 0], first)
    close(F.binary_cross_entropy_with_logits(input, target, reduction="sum", **options), total)
    close(F.binary_cross_entropy_with_logits(input, target, **options), mean)


def test_binary_loss_of_the_sigmoid_is_the_loss_of_the_logits(device):
    input, target = torch.tensor(SCORES, device=device).sigmoid(), torch.tensor(LABELS, device=device)
    close(F.binary_cross_entropy(input, target, reduction="sum"), 11.7856)
    close(F.binary_cross_entropy(input, target), 1.4732)
