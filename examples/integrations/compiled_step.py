"""torch.compile of model and loss as one graph, and of the optimizer's step."""

import torch
from torch import nn

import fusedloss
from examples.integrations.compare import Comparison, batches, compare


def train(criterion: nn.Module, backend: str = "aot_eager") -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    @torch.compile(fullgraph=True, backend=backend)
    def loss_of(x, y):
        return criterion(model(x), y)

    @torch.compile(backend=backend)
    def update():
        optimizer.step()

    losses = []
    for x, y in batches(8, (64, 16), 50, (64,)):
        loss = loss_of(x, y)
        loss.backward()
        update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def comparisons() -> list[Comparison]:
    native, fused = nn.CrossEntropyLoss(label_smoothing=0.1), fusedloss.CrossEntropyLoss(label_smoothing=0.1)
    return [compare("torch.compile", lambda: train(native), lambda: train(fused))]
