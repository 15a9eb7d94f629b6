"""Semantic segmentation: a loss of each pixel, of which 255 marks those that nobody has labelled."""

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import fusedloss
from examples.integrations.compare import Comparison, batches, compare

CLASSES, UNLABELLED = 19, 255


def train(cross_entropy) -> list[float]:
    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    head: nn.Module = model.classifier
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for x, y in batches(5, (2, 3, 32, 32), CLASSES, (2, 32, 32)):
        y[:, :5] = UNLABELLED
        loss = cross_entropy(model(x)["out"], y, ignore_index=UNLABELLED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def comparisons() -> list[Comparison]:
    native, fused = functional.cross_entropy, fusedloss.cross_entropy
    return [compare("segmentation, ignore_index=255", lambda: train(native), lambda: train(fused))]
