"""What is measured: a table of calls for each device, the data of each, and the bytes that each must move.

Only the logits of a call require a gradient; where a case begins before a linear layer, its embeddings and the layer's
weight. A case draws its data from a generator of its own, so that it is the same case whichever others run.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORED = -100  # the default ignore_index
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Case:
    """One call of one loss."""

    title: str
    loss: str  # a function of fusedloss.functional, and of torch.nn.functional unless contestants.py composes native's
    shape: tuple[int, ...]  # of the logits, with the classes second
    target: str = "indices"  # a row of TARGETS
    options: tuple[str, ...] = ()  # rows of OPTIONS
    channels_last: bool = False  # the classes are innermost in memory, whatever the number of dimensions
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # the call is made under torch.autocast
    reduction: str = "mean"
    grad_output: float = 1.0  # that a reduced loss is differentiated with; "none" has random ones
    latency: bool = False  # so small that on a GPU the launches count, not the kernels
    ours: dict = field(default_factory=dict)  # keyword arguments for fusedloss alone
    width: int = 0  # of the embeddings that a linear layer makes the logits of; 0: the call is given logits

    @property
    def name(self) -> str:
        layout = ["channels last"] if self.channels_last else []
        context = ["autocast"] if self.autocast else []
        reduction = ["unreduced"] if self.reduction == "none" else []
        scale = [f"grad_output {self.grad_output:g}"] if self.grad_output != 1 else []
        shape = "x".join(map(str, self.shape))
        linear = [f"of width {self.width}"] if self.width else []
        return " ".join([self.title, shape, *linear, *layout, *context, *reduction, *scale, *self.ours])

    @property
    def type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} {self.type}"

    @property
    def loss_type(self) -> torch.dtype:
        return torch.float32 if self.autocast or self.loss == "token_log_probs" else self.dtype

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.shape[0], self.width) if self.width else self.shape

    @property
    def products(self) -> int:
        """The operations of a step's three products, where there is a linear layer; ignored rows need none of them."""
        part, whole = IGNORED_PARTS.get(self.target, (0, 1))
        rows = self.shape[0] - self.shape[0] * part // whole
        return 6 * rows * self.shape[1] * self.width

    def draw(self, device: str) -> tuple[Tensor, Tensor, dict]:
        """Logits (or what the loss takes instead), target and options; drawn in float32, rounded once."""
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(self.input_shape, generator=generator, device=device)
        logits = INPUTS.get(self.loss, Tensor.contiguous)(logits).to(self.dtype)
        if self.channels_last:
            logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
        target = TARGETS[self.target](self, generator)
        return logits, target, {name: OPTIONS[name](self, generator) for name in self.options}

    def draw_grad_output(self, loss: Tensor) -> Tensor | None:
        """What the loss is differentiated with; None stands for 1, as in backward()."""
        if self.reduction == "none":
            generator = torch.Generator(loss.device).manual_seed(1)
            return torch.randn(loss.shape, generator=generator, device=loss.device).to(loss.dtype)
        return None if self.grad_output == 1 else torch.full_like(loss, self.grad_output)


def learned(options: dict) -> dict[str, Tensor]:
    """The options that are differentiated too."""
    return {name: value for name, value in options.items() if isinstance(value, Tensor) and value.requires_grad}


def bytes_to_move(case: Case, logits: Tensor, target: Tensor, options: dict) -> dict[str, int]:
    """What no implementation can avoid to read or write, by measure.

    An ignored row of logits need not be read, and NLL needs one entry of each row. A step that writes the gradient
    while the logits are at hand reads them once. That gradient is right for a grad_output of 1; for another one, known
    only later, the logits are read again (or the gradient is, and written again, which is more). Behind a linear layer
    the logits need not be written at all: the embeddings and the weight are read, the gradients of both written.
    """
    counted = int((target != IGNORED).sum())
    entries = 1 if case.loss == "nll_loss" else logits.numel() // target.numel()
    weights = sum(value.nbytes for value in options.values() if isinstance(value, Tensor))
    reads = counted * entries * logits.itemsize + target.nbytes + weights
    losses = logits.itemsize * logits.numel() // entries_of_a_loss(case, logits) if case.reduction == "none" else 0
    again = reads + losses if losses or case.grad_output != 1 else 0
    gradients = logits.nbytes + sum(value.nbytes for value in learned(options).values())
    return {"forward": reads + losses, "step": reads + losses + again + gradients}


def entries_of_a_loss(case: Case, logits: Tensor) -> int:
    return 1 if case.loss.startswith("binary") else logits.shape[1]


# --- What the rows below are made of -----------------------------------------------------------------------


def indices(case, generator):
    shape = (case.shape[0], *case.shape[2:])
    return torch.randint(case.shape[1], shape, generator=generator, device=generator.device)


def partly_ignored(case, generator):
    target = indices(case, generator)
    # In a random order: a processor would foresee a regular one.
    order = torch.randperm(target.numel(), generator=generator, device=generator.device)
    part, whole = IGNORED_PARTS[case.target]
    target.view(-1)[order[: target.numel() * part // whole]] = IGNORED
    return target


def probabilities(case, generator):
    return torch.randn(case.shape, generator=generator, device=generator.device).softmax(1).to(case.dtype)


def labels(case, generator):
    return torch.randint(2, case.shape, generator=generator, device=generator.device).to(case.dtype)


def classifier(case, generator):
    """A linear layer's weight, such that its logits of normal embeddings are normal."""
    weight = torch.randn(case.shape[1], case.width, generator=generator, device=generator.device) / case.width**0.5
    return weight.to(case.dtype).requires_grad_()


def class_weight(case, generator):
    return (0.5 + torch.rand(case.shape[1], generator=generator, device=generator.device)).to(case.dtype)


INPUTS = {  # of the losses that do not take logits
    "nll_loss": lambda logits: logits.log_softmax(1),
    "binary_cross_entropy": torch.sigmoid,
}
IGNORED_PARTS = {"a third ignored": (1, 3), "half ignored": (1, 2), "nine tenths ignored": (9, 10)}
TARGETS = {
    "indices": indices,
    **dict.fromkeys(IGNORED_PARTS, partly_ignored),
    "probabilities": probabilities,
    "labels": labels,
    "uint8 labels": lambda case, generator: labels(case, generator).byte(),
}
OPTIONS = {
    "classifier": classifier,
    "weight": class_weight,
    "pos_weight": class_weight,
    "label_smoothing": lambda case, generator: LABEL_SMOOTHING,
}


# --- The rows ----------------------------------------------------------------------------------------------


def cross_entropy(*shape, **fields):
    return Case(**{"title": "cross entropy", "loss": "cross_entropy", "shape": shape} | fields)


def linear_cross_entropy(*shape, width, **fields):
    """The call makes the logits, of embeddings of this width: nobody else sees them, and they need not all be held."""
    linear = {"title": "linear cross entropy", "loss": "linear_cross_entropy", "options": ("classifier",)}
    return cross_entropy(*shape, **linear | {"width": width} | fields)


def log_probs(*shape, **fields):
    """What reinforcement learning asks of a head: each token's log-probability, and the entropy as a bonus."""
    title = "log-probabilities and entropy"
    return Case(**{"title": title, "loss": "token_log_probs", "shape": shape, "reduction": "none"} | fields)


def bce_with_logits(*shape, **fields):
    loss = {"title": "bce with logits", "loss": "binary_cross_entropy_with_logits", "target": "labels"}
    return Case(**loss | {"shape": shape} | fields)


def each(dtypes, cases):
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def variants(case):
    """The other ways to take a step: scaled as by gradient accumulation, unreduced, under autocast."""
    return [
        replace(case, grad_output=0.5),
        replace(case, reduction="none"),
        replace(case, autocast=True, dtype=torch.bfloat16),
    ]


def ignoring(*shape, **fields):
    """A head whose targets are in part padding."""
    return [
        cross_entropy(*shape, title=f"cross entropy, {part}", target=part, **fields)
        for part in ("half ignored", "nine tenths ignored")
    ]


def uint8_masks(*shape):
    return bce_with_logits(*shape, title="bce with logits, uint8 labels", target="uint8 labels")


BOTH = [torch.bfloat16, torch.float32]
EVERYTHING = {
    "title": "cross entropy, options",
    "target": "a third ignored",
    "options": ("weight", "label_smoothing"),
}

# Of rows, a fifth to a fiftieth of what a GPU gets.
GRID = [
    cross_entropy(24, 10),
    cross_entropy(65536, 10),
    cross_entropy(16384, 100),
    cross_entropy(1024, 1000),
    cross_entropy(512, 32000),
    cross_entropy(64, 128256),
    cross_entropy(2, 19, 512, 512),
    cross_entropy(2, 19, 512, 512, channels_last=True),
    cross_entropy(8, 5000, 128, channels_last=True),
]

HALF = {"title": "linear cross entropy, half ignored", "target": "half ignored"}

GOAL = "float32 and bfloat16"  # the group that the geometric means are over
CPU_GROUPS = {
    GOAL: each(
        [torch.float32, torch.bfloat16],
        [
            *GRID,
            *(replace(case, **EVERYTHING) for case in GRID),
            cross_entropy(512, 1000, title="cross entropy, probabilities", target="probabilities"),
            Case("nll", "nll_loss", (4096, 1000)),
            bce_with_logits(64, 80),
            bce_with_logits(4096, 1000),
            bce_with_logits(4096, 1000, title="bce with logits, weights", options=("weight", "pos_weight")),
            uint8_masks(4096, 1000),
            Case("bce", "binary_cross_entropy", (4096, 1000), "labels"),
        ],
    ),
    "more of what models have": each(
        [torch.float32, torch.bfloat16],
        [
            cross_entropy(256, 50257),
            cross_entropy(64, 151936),
            cross_entropy(32, 256000),
            *ignoring(64, 128256),
            cross_entropy(4096, 1000),
            cross_entropy(16384, 91),
            cross_entropy(1, 150, 256, 256),
            uint8_masks(2, 1, 96, 96, 96),
            bce_with_logits(1000000, 1),
        ],
    ),
    "other ways to take a step": [*variants(cross_entropy(64, 128256)), *variants(bce_with_logits(4096, 1000))],
    "other dtypes": each(
        [torch.float16, torch.float64],
        [cross_entropy(65536, 10), cross_entropy(512, 32000), bce_with_logits(4096, 1000)],
    ),
    "log-probabilities": each(
        [torch.float32, torch.bfloat16], [log_probs(512, 32000), log_probs(64, 128256), log_probs(4096, 1000)]
    ),
    "gradient in place of the logits": [
        cross_entropy(512, 32000, ours={"inplace": True}),
        cross_entropy(64, 128256, ours={"inplace": True}),
        cross_entropy(2, 19, 512, 512, ours={"inplace": True}),
    ],
    "a linear layer and its loss": [
        *each(
            [torch.float32, torch.bfloat16],
            [linear_cross_entropy(512, 32000, width=512), linear_cross_entropy(2048, 50257, width=768)],
        ),
        linear_cross_entropy(2048, 50257, width=768, dtype=torch.bfloat16, **HALF),
    ],
}

# The first ones count most: where time is limited, it is the last ones that are left out.
HEADS = [cross_entropy(rows, classes) for classes in (32000, 50257, 128256, 151936, 256000) for rows in (4096, 8192)]
CUDA_GROUPS = {
    "latency": [
        cross_entropy(32, 10, latency=True),
        cross_entropy(32, 10, latency=True, dtype=torch.bfloat16),
        cross_entropy(32, 10, latency=True, autocast=True, dtype=torch.bfloat16),
        bce_with_logits(32, 10, latency=True),
    ],
    "autocast": each([torch.bfloat16], [cross_entropy(8192, classes, autocast=True) for classes in (32000, 128256)]),
    "language model heads": [
        *each([torch.bfloat16], [*HEADS, *(cross_entropy(16384, classes) for classes in (32000, 50257, 128256))]),
        *each([torch.float32], [cross_entropy(4096, classes) for classes in (32000, 50257, 128256)]),
    ],
    "few classes": each(
        BOTH,
        [
            cross_entropy(16777216, 10),
            cross_entropy(2097152, 91),
            cross_entropy(65536, 1000),
            cross_entropy(4096, 1000),
            cross_entropy(65536, 10),
            cross_entropy(65536, 91),
        ],
    ),
    "binary cross entropy": each(
        BOTH,
        [
            bce_with_logits(65536, 1000),
            uint8_masks(65536, 1000),
            uint8_masks(4, 1, 256, 256, 256),
            bce_with_logits(65536, 1000, title="bce with logits, pos_weight", options=("pos_weight",)),
            bce_with_logits(4096, 1000),
            bce_with_logits(64, 80),
            bce_with_logits(1000000, 1),
            Case("bce", "binary_cross_entropy", (65536, 1000), "labels"),
        ],
    ),
    "segmentation": [
        *each(BOTH, [cross_entropy(8, 19, 512, 1024), cross_entropy(4, 150, 512, 512)]),
        cross_entropy(8, 19, 512, 1024, channels_last=True, dtype=torch.bfloat16),
    ],
    "ignored rows and options": each(
        [torch.bfloat16],
        [
            *ignoring(8192, 128256),
            cross_entropy(8192, 32000, **EVERYTHING),
            cross_entropy(65536, 1000, **EVERYTHING),
            cross_entropy(8192, 128256, ours={"inplace": True}),
        ],
    ),
    "other ways to take a step": [
        *variants(cross_entropy(4096, 128256, dtype=torch.bfloat16))[:2],
        *variants(bce_with_logits(65536, 1000, dtype=torch.bfloat16)),
    ],
    "log-probabilities": each([torch.bfloat16], [log_probs(4096, 128256), log_probs(8192, 32000)]),
    "a linear layer and its loss": each(
        [torch.bfloat16],
        [
            linear_cross_entropy(4096, 128256, width=4096),
            linear_cross_entropy(8192, 128256, width=4096),
            linear_cross_entropy(8192, 256000, width=2304),
            linear_cross_entropy(8192, 32000, width=4096),
        ],
    ),
    "few rows": each(BOTH, [cross_entropy(8, 128256), cross_entropy(64, 128256)]),
    "nll": each(BOTH, [Case("nll", "nll_loss", (65536, 1000))]),
}
GROUPS = {"cpu": CPU_GROUPS, "cuda": CUDA_GROUPS}  # by device
