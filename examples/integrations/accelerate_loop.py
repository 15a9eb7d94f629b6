"""Accelerate: a loop of one's own, with gradient accumulation, and a GradScaler for float16."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

import fusedloss
from examples.integrations.compare import Comparison, batches, compare

STEPS = 4  # that are accumulated


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 100))


def accumulate(loss_of) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=STEPS, cpu=True)
    network = model()
    network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.5))
    losses = []
    for x, y in batches(12, (16, 16), 100, (16,)):
        with accelerator.accumulate(network):
            loss = loss_of(network(x), y)
            accelerator.backward(loss)  # of loss / STEPS
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def scaled(loss_of) -> list[float]:
    """Accelerate has no float16 without a GPU; this is what it does there."""
    network, scaler = model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    losses = []
    for x, y in batches(8, (16, 16), 100, (16,)):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(network(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def announced(factor: float):
    """A loss that knows what backward will be called with, and so needs no pass over the gradient."""
    return lambda logits, target: fusedloss.cross_entropy(logits, target, grad_scale=factor)


def comparisons() -> list[Comparison]:
    native = functional.cross_entropy
    return [
        compare("Accelerate, 4 steps", lambda: accumulate(native), lambda: accumulate(announced(1 / STEPS))),
        compare("GradScaler, float16", lambda: scaled(native), lambda: scaled(announced(1024.0)), tolerance=1e-3),
    ]
