"""The losses of timm's training script and of torchvision's reference: MixUp's soft targets, and label smoothing."""

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torchvision.transforms.v2 import MixUp

import fusedloss
from examples.integrations.compare import Comparison, batches, compare

CLASSES = 10


def train(criterion: nn.Module, mixup=None) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for x, y in batches(8, (16, 3, 16, 16), CLASSES, (16,)):
        loss = criterion(model(x), y) if mixup is None else criterion(*of(model, *mixup(x, y)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of(model, x, y):
    return model(x), y


def timm_mixup():
    import numpy

    numpy.random.seed(0)
    return Mixup(mixup_alpha=0.8, num_classes=CLASSES, label_smoothing=0.1)


def comparisons() -> list[Comparison]:
    fused, smooth = fusedloss.CrossEntropyLoss(), fusedloss.CrossEntropyLoss(label_smoothing=0.1)
    mixup = MixUp(num_classes=CLASSES)
    return [
        compare(
            "timm, SoftTargetCrossEntropy",
            lambda: train(SoftTargetCrossEntropy(), timm_mixup()),
            lambda: train(fused, timm_mixup()),
        ),
        compare(
            "timm, LabelSmoothingCrossEntropy", lambda: train(LabelSmoothingCrossEntropy(0.1)), lambda: train(smooth)
        ),
        compare(
            "torchvision, label smoothing",
            lambda: train(nn.CrossEntropyLoss(label_smoothing=0.1)),
            lambda: train(smooth),
        ),
        compare("torchvision, MixUp", lambda: train(nn.CrossEntropyLoss(), mixup), lambda: train(fused, mixup)),
    ]
