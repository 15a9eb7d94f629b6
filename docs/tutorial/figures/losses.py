"""Draws the pictures of chapter 0: python docs/tutorial/figures/losses.py [FOLDER]"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fusedloss.functional as F

plt.switch_backend("svg")  # no screen is needed
# The same file from the same numbers: no date, no random names. Text stays text.
plt.rcParams.update({"svg.hashsalt": "fusedloss", "svg.fonttype": "none", "figure.figsize": (7, 3), "font.size": 9})


def surprise_and_entropy(left, right):
    p = torch.linspace(1e-3, 1 - 1e-3, 500, dtype=torch.float64)
    left.plot(p, -p.log())
    left.set(xlabel="probability p of what happened", ylabel="surprise, -log p (nats)")
    right.plot(p, -p * p.log() - (1 - p) * (1 - p).log())
    right.axhline(torch.log(torch.tensor(2.0)), color="grey", linestyle=":", label="log 2")
    right.set(xlabel="probability of heads", ylabel="entropy of a coin (nats)")
    right.legend()


def binary_loss_and_gradient(left, right):
    for pos_weight in (1.0, 3.0):
        x = torch.linspace(-6, 6, 500, dtype=torch.float64, requires_grad=True)
        for target, line in ((1, "-"), (0, "--")):
            options = {"pos_weight": torch.tensor(pos_weight, dtype=torch.float64), "reduction": "none"}
            loss = F.binary_cross_entropy_with_logits(x, torch.full((500,), target), **options)
            (slope,) = torch.autograd.grad(loss.sum(), x)
            if target or pos_weight == 1:  # a pos_weight leaves the loss of a 0 as it is
                name = f"target {target}" + (f", pos_weight {pos_weight:g}" if target else "")
                left.plot(x.detach(), loss.detach(), line, label=name)
                right.plot(x.detach(), slope, line)
    left.set(xlabel="logit", ylabel="loss")
    right.set(xlabel="logit", ylabel="gradient")
    left.legend()


FIGURES = {"00-surprise.svg": surprise_and_entropy, "00-binary.svg": binary_loss_and_gradient}


def main(folder):
    for name, draw in FIGURES.items():
        figure, axes = plt.subplots(1, 2, layout="constrained")
        draw(*axes)
        figure.savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
