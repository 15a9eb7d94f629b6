"""Train three models on real data, each twice in lockstep: with torch.nn's loss and with fusedloss's.

    make demo        or        python -m examples.demo --output curves.png

The two runs of an experiment start from the same weights and see the same batches, so their curves must
coincide; only the time spent in the loss may differ. The demo fails if the curves do not coincide. The loss of the
language model has the model's last layer in it, for both.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from types import ModuleType

import matplotlib
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusedloss

LINEAR = "linear_cross_entropy"  # the last layer and cross entropy
LIBRARIES = {"native": nn, "fused": fusedloss}
SEED = 0
WARM_UP = 5  # steps that also pay for first allocations and thread pools
LAST = 20  # one batch's loss is noisy: the final loss is the mean over this many

# Relative. Two right losses round differently, and training carries that along: their final losses differ by
# a millionth at most. A gradient that is wrong by one percent moves them by a thousandth to a hundredth.
TOLERANCE = 1e-4


# --- What is trained ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    name: str
    loss: str  # a class that torch.nn and fusedloss both have, or LINEAR
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    model: Callable[[], nn.Sequential]
    predict: Callable[[Tensor], Tensor]  # logits to what accuracy compares with the target
    steps: int
    batch: int
    rate: float
    options: dict[str, Tensor] = field(default_factory=dict)  # of the loss


def split(x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    cut = len(x) * 9 // 10
    return {"train": (x[:cut], y[:cut]), "held_out": (x[cut:], y[cut:])}


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    # Smooth: at the kink of a ReLU the last bit of one gradient can turn a whole training.
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def images() -> tuple[Tensor, Tensor]:
    pixels, answers = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(SEED))
    return pixels[order].float() / 16, answers[order]


def digits() -> Experiment:
    """Which digit is this? 1797 images of 8 x 8 pixels."""
    return Experiment(
        name="Digits",
        loss="CrossEntropyLoss",
        **split(*images()),
        model=lambda: perceptron(64, 128, 10),
        predict=lambda logits: logits.argmax(1),
        steps=1000,
        batch=128,
        rate=0.2,
    )


ATTRIBUTES = {
    "zero": (0,),
    "two loops": (8,),
    "at least eight": (8, 9),
    "multiple of five": (0, 5),
    "cube": (0, 1, 8),
    "has a loop": (0, 6, 8, 9),
    "prime": (2, 3, 5, 7),
}


def attributes() -> Experiment:
    """What is true of this digit? Between a tenth and four tenths of the answers are yes."""
    x, digit = images()
    y = torch.stack([torch.isin(digit, torch.tensor(yes)) for yes in ATTRIBUTES.values()], dim=1).float()
    data = split(x, y)
    frequency = data["train"][1].mean(0)
    return Experiment(
        name="Attributes",
        loss="BCEWithLogitsLoss",
        **data,
        model=lambda: perceptron(64, 128, len(ATTRIBUTES)),
        predict=lambda logits: logits > 0,
        steps=1000,
        batch=128,
        rate=0.2,
        options={"pos_weight": (1 - frequency) / frequency},
    )


def language(context: int = 8, width: int = 32, hidden: int = 48) -> Experiment:
    """Which word comes next in Python's own help texts? A network over the last few words (Bengio, 2003)."""
    text = "\n".join(topics[name] for name in sorted(topics))
    words = re.findall(r" ?\w+| ?[^\w\s]|\n+", text)  # a word owns the space before it, as in GPT-2
    counts = Counter(words[: len(words) * 9 // 10])
    vocabulary = ["<unk>", *(word for word, _ in counts.most_common(8191))]
    number = {word: i for i, word in enumerate(vocabulary)}
    windows = torch.tensor([number.get(word, 0) for word in words]).unfold(0, context + 1, 1)
    return Experiment(
        name="Language",
        loss=LINEAR,
        **split(windows[:, :-1], windows[:, -1]),
        model=lambda: nn.Sequential(
            nn.Embedding(len(vocabulary), width),
            nn.Flatten(),
            *perceptron(context * width, hidden, len(vocabulary)),
        ),
        predict=lambda logits: logits.argmax(1),
        steps=200,
        batch=2048,
        rate=1.0,
    )


# --- How it is trained -------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model, its loss, and what was seen on the way."""

    model: nn.Module
    body: nn.Module  # the part of the model that is before the loss
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    held_out_loss: float = 0.0
    accuracy: float = 0.0

    @property
    def final_loss(self) -> float:
        return fmean(self.losses[-LAST:])

    @property
    def loss_time(self) -> float:
        return median(self.milliseconds[WARM_UP:])

    def step(self, x: Tensor, y: Tensor) -> None:
        output = self.body(x)
        # The loss's graph ends at a leaf of its own: backward() on the output would time the model as well.
        leaf = output.detach().requires_grad_()
        with clock(self.milliseconds, leaf.device):
            loss = self.criterion(leaf, y)
            loss.backward()
        output.backward(leaf.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, predict: Callable[[Tensor], Tensor], batch: int) -> None:
        for inputs, targets in zip(x.split(batch), y.split(batch), strict=True):
            share = len(inputs) / len(x)
            self.held_out_loss += share * self.criterion(self.body(inputs), targets).item()
            self.accuracy += share * (predict(self.model(inputs)) == targets).float().mean().item()


@contextmanager
def clock(milliseconds: list[float], device: torch.device) -> Iterator[None]:
    # A GPU is only handed its work: without waiting for it, one would time the handing over.
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    milliseconds.append(1e3 * (time.perf_counter() - start))


def prepare(experiment: Experiment, library: ModuleType, steps: int, device: torch.device) -> Run:
    torch.manual_seed(SEED)
    model = experiment.model().to(device)
    if experiment.loss == LINEAR:
        body, criterion = model[:-1], behind(model[-1], library)
    else:
        body, criterion = model, getattr(library, experiment.loss)(**experiment.options).to(device)
    # Adam would hide a gradient that is wrong by a factor; SGD shows it.
    optimizer = torch.optim.SGD(model.parameters(), experiment.rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, experiment.rate, total_steps=steps)
    return Run(model, body, criterion, optimizer, schedule)


def behind(head: nn.Linear, library: ModuleType) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of what goes into the last layer; native's is what torch 2.13's function of that name does."""
    if library is nn:
        return lambda hidden, y: nn.functional.cross_entropy(head(hidden), y)
    return lambda hidden, y: fusedloss.linear_cross_entropy(hidden, head.weight, y, linear_bias=head.bias)


def train(experiment: Experiment, steps: int, device: torch.device, progress: Progress) -> dict[str, Run]:
    runs = {name: prepare(experiment, library, steps, device) for name, library in LIBRARIES.items()}
    x, y = (tensor.to(device) for tensor in experiment.train)
    generator = torch.Generator().manual_seed(SEED)
    order = list(runs.values())
    task = progress.add_task(experiment.name, total=steps, native=0.0, fused=0.0)
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (experiment.batch,), generator=generator).to(device)
        batch = x[rows], y[rows]
        for run in order:
            run.step(*batch)
        order.reverse()  # whoever goes second finds warmer caches, so they take turns
        losses = {name: run.losses[-1] for name, run in runs.items()}
        progress.update(task, advance=1, refresh=step % 10 == 0, **losses)
    held_out = [tensor.to(device) for tensor in experiment.held_out]
    for run in order:
        run.evaluate(*held_out, experiment.predict, experiment.batch)
    return runs


# --- What is shown -----------------------------------------------------------------------------------------

Results = list[tuple[Experiment, dict[str, Run]]]


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:>4}/{task.total}"),
        TextColumn("native {task.fields[native]:.4f}  fused {task.fields[fused]:.4f}"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # a thread that redraws would take a core while the clock runs
    )


def table(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("Experiment")
    table.add_column("Loss")
    for title in ("Train loss", "Difference", "Accuracy", "ms/step", "Ratio"):
        table.add_column(title, justify="right")
    for experiment, runs in results:
        native, fused = runs.values()
        table.add_row(
            f"{experiment.name}\n[dim]{experiment.loss}[/]",
            "native\nfused",
            f"{native.final_loss:.6f}\n{fused.final_loss:.6f}",
            f"\n{abs(native.final_loss - fused.final_loss):.1e}",
            f"{native.accuracy:.2%}\n{fused.accuracy:.2%}",
            f"{native.loss_time:.3f}\n{fused.loss_time:.3f}",
            f"\n{native.loss_time / fused.loss_time:.2f}x",
            end_section=True,
        )
    return table


def smooth(losses: list[float]) -> list[float]:
    """The mean over the steps just before each: single batches are too ragged to compare by eye."""
    window = max(1, len(losses) // 40)
    return [fmean(losses[max(0, stop - window) : stop]) for stop in range(1, len(losses) + 1)]


@matplotlib.rc_context(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlepad": 12}
)
def picture(results: Results, path: Path) -> None:
    pale, dark = "#a9cbe8", "#0b2545"
    lines = {
        "native": {"color": pale, "linewidth": 7, "solid_capstyle": "round"},
        "fused": {"color": dark, "linewidth": 1.4, "dashes": (5, 3)},
    }
    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15, w_pad=0.15)
    rows = figure.subplots(len(results), 2, width_ratios=(5, 3))
    for (experiment, runs), (curves, bars) in zip(results, rows, strict=True):
        for name, run in runs.items():
            curves.plot(smooth(run.losses), label=name, **lines[name])
        curves.set_title(f"{experiment.name}: {experiment.loss}", weight="bold")
        curves.set(xlabel="step", ylabel="training loss", ylim=(0, None))
        curves.grid(axis="y", color="#e6e6e6")

        times = [run.loss_time for run in runs.values()]
        bars.bar_label(bars.barh(list(runs), times, 0.55, color=(pale, dark)), fmt="%.3g ms", padding=5)
        bars.set(title="time in the loss, per step", xlim=(0, 1.3 * max(times)), xticks=[])
        bars.spines.bottom.set_visible(False)
        bars.tick_params(left=False)
        bars.invert_yaxis()
    rows[0][0].legend(frameon=False, handlelength=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="only a few steps of each training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available() and fusedloss.build_info()["cuda"]
    device = torch.device("cuda" if cuda else "cpu")

    console = Console(highlight=False)
    console.print(f"torch {torch.__version__} on {device}, {options.threads} threads")
    with progress_bar(console) as progress:
        results = [
            (experiment, train(experiment, 10 if options.quick else experiment.steps, device, progress))
            for experiment in (digits(), attributes(), language())
        ]
    console.print(table(results))
    console.print("ms/step: the loss alone, of the language model with its last layer; forward and backward, median.")
    perplexities = (f"{name} {math.exp(run.held_out_loss):.2f}" for name, run in results[-1][1].items())
    console.print(f"Perplexity of the language model on held-out text: {', '.join(perplexities)}.")
    picture(results, options.output)
    console.print(f"The curves are in {options.output}.")

    for experiment, runs in results:
        native, fused = (run.final_loss for run in runs.values())
        if not math.isclose(native, fused, rel_tol=TOLERANCE):
            return f"{experiment.name}: {native} and {fused} are further apart than rounding explains."
    return None


if __name__ == "__main__":
    sys.exit(main())
