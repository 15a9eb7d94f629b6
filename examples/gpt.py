"""A whole training step of a small GPT with a large vocabulary: native torch's loss against fusedloss's.

    python -m examples.gpt                 # on a GPU: a vocabulary of 128256, bfloat16 autocast
    python -m examples.gpt --tiny          # on any machine, in seconds

All models start from the same weights and see the same tokens (random ones: what is measured is time and memory, and
that the losses agree). Prints tokens per second and the peak memory of a step, and fails where the losses part.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fusedloss


def of_logits(function, **options):
    return lambda model, tokens, target: function(model(tokens), target, **options)


def fused_linear(model, tokens, target):
    """The head is a part of the loss: only hidden states leave the model, and nobody holds all of the logits."""
    return fusedloss.functional.linear_cross_entropy(model.hidden(tokens), model.head.weight, target)


LOSSES = {
    "native": of_logits(F.cross_entropy),
    "fused": of_logits(fusedloss.functional.cross_entropy),
    "fused, inplace": of_logits(fusedloss.functional.cross_entropy, inplace=True),
    "fused linear": fused_linear,
}
# Relative. Losses differ by their rounding, and under autocast the gradients of the logits are rounded to bfloat16.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Size:
    vocabulary: int
    width: int
    heads: int
    layers: int
    batch: int
    context: int


SMALL = Size(vocabulary=128256, width=768, heads=12, layers=12, batch=8, context=1024)
TINY = Size(vocabulary=512, width=32, heads=2, layers=2, batch=2, context=16)


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))  # (batch, context, 3, heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Tokens (batch, context) to logits (batch * context, vocabulary)."""

    def __init__(self, size: Size):
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head makes the logits of: (batch * context, width)."""
        x = self.tokens(tokens) + self.places.weight
        return self.norm(self.blocks(x)).flatten(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    tokens_per_second: float
    peak_bytes: int | None  # of a step, with the model and the optimizer's state; on a GPU


def train(loss, size: Size, steps: int, warm_up: int, device: torch.device) -> Outcome:
    torch.manual_seed(0)
    model = GPT(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    losses, seconds = [], []
    for step in range(warm_up + steps):
        tokens = torch.randint(size.vocabulary, (size.batch, size.context + 1), device=device)
        if cuda and step == warm_up:
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            found = loss(model, tokens[:, :-1], tokens[:, 1:].flatten())
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(found.item())
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Outcome(losses, size.batch * size.context / median(seconds[warm_up:]), peak)


def compare(size: Size, steps: int, warm_up: int, device: torch.device) -> dict[str, Outcome]:
    outcomes = {}
    for name, loss in LOSSES.items():
        outcomes[name] = train(loss, size, steps, warm_up, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next one starts from nothing, too
    return outcomes


def table(outcomes: dict[str, Outcome]) -> Table:
    native = outcomes["native"]
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("Loss")
    for title in ("Last loss", "Tokens/s", "Ratio", "Peak memory"):
        shown.add_column(title, justify="right")
    for name, outcome in outcomes.items():
        shown.add_row(
            name,
            f"{outcome.losses[-1]:.5f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.tokens_per_second / native.tokens_per_second:.2f}x",
            "-" if outcome.peak_bytes is None else f"{outcome.peak_bytes / 1e9:.2f} GB",
        )
    return shown


def parted(outcomes: dict[str, Outcome]) -> str | None:
    """Which losses are further apart than rounding explains; None where none are."""
    for name, outcome in outcomes.items():
        for step, pair in enumerate(zip(outcomes["native"].losses, outcome.losses, strict=True)):
            if not math.isclose(*pair, rel_tol=TOLERANCE):
                return f"step {step}: native {pair[0]}, {name} {pair[1]} are further apart than rounding explains."
    return None


def main() -> str | None:
    parser = argparse.ArgumentParser(prog="python -m examples.gpt", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model for seconds on a CPU")
    parser.add_argument("--steps", type=int, default=20, help="that are timed, after 5 that are not; default: 20")
    options = parser.parse_args()
    backends = fusedloss.backends()
    cuda = torch.cuda.is_available() and "" in (backends["cuda"], backends["triton"])
    if not cuda and not options.tiny:
        return "There is no GPU with kernels for it, and the model needs one; --tiny runs everywhere."
    device, size = torch.device("cuda" if cuda else "cpu"), TINY if options.tiny else SMALL
    outcomes = compare(size, options.steps, 5, device)
    console = Console(highlight=False)
    console.print(f"torch {torch.__version__} on {device}; {size}")
    console.print(table(outcomes))
    return parted(outcomes)


if __name__ == "__main__":
    sys.exit(main())
