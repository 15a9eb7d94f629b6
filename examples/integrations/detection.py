"""A detector's objectness and classes: binary cross entropies, positives weighted up, crowded boxes ignored."""

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedloss
from examples.integrations.compare import Comparison, batches, compare

CLASSES, IGNORED = 12, -1
POS_WEIGHT = torch.full((CLASSES,), 6.0)


def train(loss_of) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, CLASSES, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for x, classes in batches(8, (4, 3, 8, 8), 2 * CLASSES, (4, 64)):
        target = functional.one_hot(classes, 2 * CLASSES)[..., :CLASSES].float()  # half of the boxes show nothing
        target[:, ::7] = IGNORED
        loss = loss_of(model(x).flatten(2).transpose(1, 2), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def native(logits: Tensor, target: Tensor) -> Tensor:
    known = target != IGNORED
    each = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=POS_WEIGHT, reduction="none")
    return (each * known).sum() / known.sum()


def fused(logits: Tensor, target: Tensor) -> Tensor:
    return fusedloss.binary_cross_entropy_with_logits(logits, target, pos_weight=POS_WEIGHT, ignore_index=IGNORED)


def comparisons() -> list[Comparison]:
    return [compare("detection, pos_weight", lambda: train(native), lambda: train(fused))]
