"""torchmetrics beside a loss: accuracy and perplexity, from what the loss has read already."""

import torch
from torch import nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

import fusedloss
from examples.integrations.compare import Comparison, batches, compare

CLASSES = 20


def train(step) -> list[float]:
    torch.manual_seed(0)
    model, accuracy = nn.Linear(16, CLASSES), MulticlassAccuracy(CLASSES, average="micro")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    numbers = []
    for x, y in batches(8, (64, 16), CLASSES, (64,)):
        loss, perplexity = step(model(x), y, accuracy)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        numbers += [loss.item(), perplexity.item(), 1 + accuracy.compute().item()]
    return numbers


def native(logits, target, accuracy):
    accuracy.update(logits, target)  # reads the logits again
    perplexity = Perplexity()
    perplexity.update(logits.detach()[None], target[None])  # and again
    return functional.cross_entropy(logits, target), perplexity.compute()


def fused(logits, target, accuracy):
    loss, predicted = fusedloss.cross_entropy(logits, target, return_argmax=True)
    accuracy.update(predicted, target)
    mean = MeanMetric()
    mean.update(loss.detach(), weight=target.numel())
    return loss, mean.compute().exp()


def comparisons() -> list[Comparison]:
    return [compare("torchmetrics beside the loss", lambda: train(native), lambda: train(fused))]
