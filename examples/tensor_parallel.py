"""A language model whose vocabulary is shared between ranks: tensor parallelism of its last layer, and of its loss.

    torchrun --nproc-per-node 2 -m examples.tensor_parallel    # on GPUs if each rank has one, else on the CPU

Each rank has the head's rows for some classes, and so their logits, of every token; the other layers are whole on all
ranks. Trains a model whole, and with its head in parts in four ways. Prints the losses, the bytes of logits that a rank
holds and the collectives of a step; and fails where the losses part.
"""

import math
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedloss

CLASSES, WIDTH, TOKENS, STEPS, RATE = 1001, 64, 256, 10, 1.0  # the number of ranks need not divide that of classes
TOLERANCE = 1e-5  # relative: rounding moves a loss by a millionth, a gradient wrong by one percent by a thousandth


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)


# --- The head of a model, shared -------------------------------------------------------------------------------------


def cut(model: Model, mesh: DeviceMesh) -> None:
    """Each rank keeps its classes: ceil(C / ranks) of them, as torch.chunk cuts; the last ranks fewer, or none."""
    step = math.ceil(CLASSES / mesh.size())
    first = mesh.get_local_rank() * step
    model.head.weight = nn.Parameter(model.head.weight[first : first + step].detach().clone())


def distribute(model: Model, mesh: DeviceMesh) -> None:
    """torch cuts likewise: the weight becomes a DTensor, and so do the logits, sharded over their classes."""
    parallelize_module(model.head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))


# --- The loss of a model. All ranks have the same tokens, and labels of all classes ----------------------------------


def whole(model: Model, tokens: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    return F.cross_entropy(model.head(model.body(tokens)), labels)


def of_logits(model: Model, tokens: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """Into the hidden states flows back, on each rank, what comes through its classes: the caller adds it up."""

    def add_up(grad: Tensor) -> Tensor:
        dist.all_reduce(total := grad.clone(), group=mesh.get_group())
        return total

    hidden = model.body(tokens)
    hidden.register_hook(add_up)
    return fusedloss.cross_entropy(model.head(hidden), labels, process_group=mesh.get_group(), num_classes=CLASSES)


def linear(model: Model, tokens: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """The layer and its loss in one call, which adds up that gradient while it computes the weight's."""
    hidden, group = model.body(tokens), mesh.get_group()
    return fusedloss.linear_cross_entropy(hidden, model.head.weight, labels, process_group=group, num_classes=CLASSES)


def of_dtensor(model: Model, tokens: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """A DTensor's placements say who has which classes: there is no group to give."""
    return fusedloss.cross_entropy(model.head(model.body(tokens)), labels)


def linear_dtensor(model: Model, tokens: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    hidden = DTensor.from_local(model.body(tokens), mesh, [Replicate()])
    return fusedloss.linear_cross_entropy(hidden, model.head.weight, labels)


WAYS = {
    "whole": (lambda *_: None, whole),
    "logits": (cut, of_logits),
    "linear": (cut, linear),
    "logits,\nDTensor": (distribute, of_dtensor),
    "linear,\nDTensor": (distribute, linear_dtensor),
}


# --- Training, and what is shown -------------------------------------------------------------------------------------


def train(share, loss, mesh: DeviceMesh) -> tuple[list[float], int, int, int]:
    """(the losses, this rank's bytes of logits, and of the last step the collectives of forward and of backward)"""
    torch.manual_seed(0)  # on all ranks: they cut their parts from one weight, and have the same tokens and labels
    model, (tokens, labels) = Model(), torch.randint(CLASSES, (2, TOKENS))
    labels[::8] = -100  # padding
    model, tokens, labels = (each.to(mesh.device_type) for each in (model, tokens, labels))
    share(model, mesh)
    # Adam would hide a gradient that is wrong by a factor, as one that is added up twice. SGD shows it.
    optimizer = torch.optim.SGD(model.parameters(), RATE, foreach=False)  # one by one: not all may be DTensors
    losses = []
    for _ in range(STEPS):
        with CommDebugMode() as forward:
            found = loss(model, tokens, labels, mesh)
        with CommDebugMode() as backward:
            found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    weight = model.head.weight.to_local() if isinstance(model.head.weight, DTensor) else model.head.weight
    return losses, TOKENS * len(weight) * weight.element_size(), forward.get_total_counts(), backward.get_total_counts()


def main() -> int:
    warnings.filterwarnings("ignore", "Full backward hook")  # CommDebugMode's, of modules whose input is tokens
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # torchrun's: the ranks of this machine
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
    losses, *counts = zip(*(train(*way, mesh) for way in WAYS.values()), strict=True)
    apart = [max(abs(a - b) / b for a, b in zip(each, losses[0], strict=True)) for each in losses]
    agree = max(apart) <= TOLERANCE
    shown = Table("step", *WAYS, box=box.SIMPLE_HEAD)
    for step, of_step in enumerate(zip(*losses, strict=True)):
        shown.add_row(str(step), *(f"{loss:.6f}" for loss in of_step), end_section=step == STEPS - 1)
    shown.add_row("apart from whole", *(f"{largest:.1e}" for largest in apart))
    for name, row in zip(("bytes of logits", "collectives: forward", "backward"), counts, strict=True):
        shown.add_row(name, *(f"{count:,}" for count in row))
    if dist.get_rank() == 0:
        console = Console(highlight=False)
        console.print(f"torch {torch.__version__} on {mesh.device_type}, {mesh.size()} ranks; what rank 0 has:", shown)
        console.print(f"The losses {'agree' if agree else 'part'}: {max(apart):.1e}, where {TOLERANCE} is allowed.")
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
