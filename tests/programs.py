"""Random programs around the losses: a small language, its interpreter, generator, judge and minimiser.

A program is plain data, so that it can be printed, replayed and shrunk: a list of steps, each a dictionary with the
name of an operation, the registers it reads ("args"), the one it writes ("out") and options. Registers are called "%0",
"%1", ..., each is written once. A step with a "body" is a block: its steps run in a context (a checkpoint, a mode, a
module with hooks), and see the registers outside as those outside see theirs. Derivatives are steps like others.

Each program runs three times from the same data: natively in float64, which is the truth, natively in its own types,
and with ours. Ours may be no further from the truth than native is, and may raise where native raises or where
REFUSALS, the documented refusals, lists the message and its condition. Everything else is a finding.
"""

import contextlib
import math
import random
import re
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from support import outputs_of
from torch._dynamo import compiled_autograd
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedloss
from fusedloss import reference

LOSSES = {
    "cross_entropy": "CrossEntropyLoss",
    "nll_loss": "NLLLoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "binary_cross_entropy": "BCELoss",
}
OVERWRITING = {"cross_entropy", "binary_cross_entropy_with_logits"}  # those that take inplace
HINTS = {"grad_in_forward", "grad_scale", "grad_scale_tensor", "inplace"}  # options that no result depends on
OPTIONS = {"weight", "pos_weight", "z_loss", "logit_scale", "denominator", "sample_weight"}  # on which they do
OPTIONS |= {"return_lse", "return_entropy"}
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


# --- the language: operations on tensors ------------------------------------------------------------------------------


def class_dim(x):
    return min(1, x.dim() - 1)


def eighths(x, flow=1.0):
    """A grad_output without zeros, of both signs, times flow; for a scalar, flow."""
    if not x.dim():
        return torch.full_like(x, flow)
    pattern = (torch.arange(x.numel(), dtype=torch.float64) * 5 % 16 - 7.5) / 8
    return (pattern * flow).view(x.shape).to(x.dtype)


LAYERS = {
    "scale": lambda x, by: x * by,
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "softplus": lambda x: F.softplus(x),
    "exp": lambda x: (x * 0.25).exp(),
    "squares": lambda x: x * x * 0.5,
    "softmax": lambda x: x.softmax(class_dim(x)),
    "log_softmax": lambda x: x.log_softmax(class_dim(x)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "linear": lambda x, w: x @ w,
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "clone": lambda x: x.clone(),
    "mask": lambda x: x.masked_fill((torch.arange(x.numel()) % 5 == 3).view(x.shape), -math.inf),
    "detach": lambda x: x.detach(),
    "stack": lambda *x: torch.stack(x),
    "concatenate": lambda *x, dim: torch.cat(x, dim),
}
VIEWS = {
    "narrow": lambda x, dim, start, length: x.narrow(dim, start, length),
    "every": lambda x, dim, step: x[(slice(None),) * dim + (slice(None, None, step),)],
    "select": lambda x, dim, index: x.select(dim, index),
    "transpose": lambda x, a, b: x.transpose(a, b),
    "reshape": lambda x, shape: x.reshape(shape),
    "unfold": lambda x, dim, size, step: x.unfold(dim, size, step),
    "expand": lambda x, times: x.unsqueeze(0).expand(times, *x.shape),
    "chunk": lambda x, chunks, dim, index: x.chunk(chunks, dim)[index],
    "index": lambda x, rows: x[rows],
    "flip": lambda x, dim: x.flip(dim),
    "contiguous": lambda x: x.contiguous(),
}
FUNCTIONS = {
    "square": lambda y: y.square(),
    "log": lambda y: (y.abs() + 0.5).log(),
    "exp_of_minus": lambda y: (-y).exp(),
    "focal": lambda y: (1 - torch.exp(-y)) ** 2 * y,
    "divide": lambda y, by: y / by,
    "weigh": lambda y, x: y * x.sigmoid().mean(),
    "weigh_each": lambda y, x: y * x.sigmoid(),
    "mean": lambda y: y.mean(),
    "sum": lambda y: y.sum(),
    "total": lambda *y: sum(y[1:], y[0]),
}
PENALTIES = {
    "norm": lambda *g: sum(x.square().sum() for x in g),
    "direction": lambda *g: sum((x * eighths(x)).sum() for x in g),
    "cubes": lambda *g: sum((x * x * x).sum() for x in g),
}
PLAIN = LAYERS | VIEWS | FUNCTIONS | PENALTIES
RECORDED = {*LOSSES, *FUNCTIONS, *PENALTIES}
NOT_OPTIONS = {"op", "out", "args", "body"}


def options_of(step):
    return {name: value for name, value in step.items() if name not in NOT_OPTIONS}


def is_register(value):
    return isinstance(value, str) and value.startswith("%")


def reads(step):
    """The registers that a step reads, those of its body included; an option may name one."""
    if "body" in step:
        inside = defined(step["body"])
        return {*step.get("args", []), *(name for s in step["body"] for name in reads(s) if name not in inside)}
    return {*step["args"], *filter(is_register, step.get("options", {}).values())}


def writes(step):
    """The registers that are there after a step."""
    if "body" in step and step["op"] != "function":
        return defined(step["body"])
    return step.get("out", []) if isinstance(step.get("out"), list) else [step["out"]] if "out" in step else []


def defined(steps):
    return [name for step in steps for name in writes(step)]


def recorded(steps):
    return [step["out"] for step in walk(steps) if step["op"] in RECORDED]


def walk(steps):
    for step in steps:
        yield step
        yield from walk(step.get("body", []))


# --- the interpreter --------------------------------------------------------------------------------------------------


class Native:
    """Native's losses, composed with what ours add where an option asks for it."""

    def call(self, step, input, target, options):
        plain = {name: value for name, value in options.items() if name not in HINTS}
        function = partial(getattr(reference, step["op"]), **plain)
        return Criterion(function)(input, target) if step.get("module") else function(input, target)


class Criterion(torch.nn.Module):
    """A function as a module, which modes and trackers see as one."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Saves(torch.autograd.Function):
    """Does nothing, and needs what it is given in backward, as any loss may."""

    @staticmethod
    def forward(ctx, input, target):
        ctx.save_for_backward(input, target)
        return input.view_as(input), target.view_as(target)

    @staticmethod
    def backward(ctx, *gradients):
        assert len(ctx.saved_tensors) == 2
        return gradients


class Overwriting(Native):
    """Native's losses, which need their arguments, or else count the input as overwritten where inplace=True would.

    What conflicts with that natively may conflict with ours.
    """

    def call(self, step, input, target, options):
        weight = options.get("weight")
        fixed = not target.requires_grad and (weight is None or not weight.requires_grad)
        if not options.get("inplace") or not fixed:
            return super().call(step, *Saves.apply(input, target), options)
        value = super().call(step, input.clone(), target, options)
        torch.autograd.graph.increment_version(input)
        return value


class Ours:
    """Ours; a function may be replaced, for the tests of this file."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def call(self, step, input, target, options):
        options = dict(options)
        if "grad_scale_tensor" in options:
            options["grad_scale"] = torch.tensor(float(options.pop("grad_scale_tensor")))
        if step["op"] in self.replaced:
            return self.replaced[step["op"]](input, target, **options)
        if step.get("patched"):
            with fusedloss.patch():
                return getattr(F, step["op"])(input, target, **options)
        if step.get("module"):
            of_call = {name: options.pop(name) for name in ("denominator", "sample_weight") if name in options}
            return getattr(fusedloss, LOSSES[step["op"]])(**options)(input, target, **of_call)
        return getattr(fusedloss.functional, step["op"])(input, target, **options)


class Tagged(torch.Tensor):
    """A subclass that does nothing but be one, which results are of, too."""


CLASSES = {"parameter": partial(torch.nn.Parameter, requires_grad=False), "tagged": lambda x: x.as_subclass(Tagged)}


class Changed(Exception):
    """A tensor that hooks had been handed was written to."""


class Run:
    """One execution: the registers, and the results that are compared."""

    def __init__(self, losses, wide=False, salt=0):
        self.losses, self.wide, self.salt = losses, wide, salt
        self.values, self.results, self.leaves, self.kept = {}, {}, {}, []
        self.recording = True

    def inner(self, names, tensors):
        """A run of a body as a function of some registers."""
        run = Run(self.losses, self.wide, self.salt)
        run.values = dict(zip(names, tensors, strict=True))
        run.results, run.kept, run.recording = self.results, self.kept, self.recording
        return run

    def execute(self, steps):
        for step in steps:
            if "body" in step:
                BLOCKS[step["op"]](self, step)
            else:
                self.step(step)
        return self

    def step(self, step):
        op = step["op"]
        args = [self.values[name] for name in step["args"]]
        if op in PLAIN:
            value = PLAIN[op](*args, **options_of(step))
        else:
            value = STEPS.get(op, Run.loss)(self, step, *args)
        if isinstance(step.get("out"), list):
            self.values.update(zip(step["out"], value, strict=True))
        elif "out" in step:
            self.values[step["out"]] = value
        if op in RECORDED:
            self.record(step["out"], value)

    def record(self, name, value):
        if self.recording:
            self.results[name] = value.detach().clone()

    def type(self, name):
        return torch.float64 if self.wide else TYPES[name]

    def drawn(self, step, generate):
        generator = torch.Generator().manual_seed(step["seed"] + 1_000_003 * self.salt)
        return generate(step["shape"], generator=generator)

    def leaf(self, step):
        normal = partial(torch.randn, dtype=torch.float64)
        value = DRAWS[step.get("like", "normal")](self.drawn(step, normal)) * step.get("size", 1.0)
        value = value.to(TYPES[step["type"]]).to(self.type(step["type"]))
        if step.get("class"):
            value = CLASSES[step["class"]](value)
        if step.get("grad"):
            value.requires_grad_()
            self.leaves[step["out"]] = value
        return value

    def indices(self, step):
        value = self.drawn(step, partial(torch.randint, step["classes"]))
        ignored = self.drawn(step, torch.rand) < step.get("ignored", 0.0)
        return value.masked_fill(ignored, step.get("ignore_index", -100)).to(INTEGERS[step.get("type", "int64")])

    def cast(self, step, x):
        return x.to(self.type(step["type"]))

    def loss(self, step, input, target):
        options = step.get("options", {})
        options = {name: self.values[value] if is_register(value) else value for name, value in options.items()}
        value, *answers = outputs_of(self.losses.call(step, input, target, options))
        for answer in answers:
            value = value + step.get("lse", 0.1) * answer.mean().to(value.dtype)
        return value

    def hook(self, step, x):
        """A tensor hook on an alias of x."""
        name, scale = f"gradient at {step['out']}", step.get("by")
        alias = x * 1.0

        def call(gradient):
            if gradient is None:
                return None
            # What is kept is compared when all is done: nobody may write to it meanwhile.
            self.kept.append((name, gradient.detach()))
            return None if scale is None else gradient * scale

        if alias.requires_grad and self.recording:
            alias.register_hook(call)
        return alias

    def grad(self, step, y, *inputs):
        flags = {"create_graph": step.get("create_graph", False), "retain_graph": step.get("retain", True)}
        flow = eighths(y.detach(), float(step.get("flow", 1.0)))
        if step.get("batched"):
            flags["is_grads_batched"] = True
            flow = torch.stack([flow, -0.5 * flow, torch.ones_like(flow)])
        found = torch.autograd.grad(y, inputs, flow, allow_unused=True, **flags)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
        for name, gradient in zip(step["out"], found, strict=True):
            self.record(name, gradient)
        return found

    def backward(self, step, y):
        flags = {"create_graph": step.get("create_graph", False), "retain_graph": step.get("retain", True)}
        y.backward(eighths(y.detach(), float(step.get("flow", 1.0))), **flags)

    def update(self, step, x):
        """Writes to x behind autograd's graph, as an optimiser does."""
        with torch.no_grad():
            x.detach().mul_(1.5)

    def update_grad(self, step, x):
        """Writes to the gradient that a leaf has got, as clipping does."""
        if x.is_leaf and x.grad is not None:
            with torch.no_grad():
                x.grad.mul_(0.5)

    def finish(self):
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                self.record(f"{name}.grad", leaf.grad)
        counts = Counter()
        for name, value in self.kept:
            if isinstance(value, tuple):
                if not value[0].equal(value[1]) and not value[1].isnan().any():
                    raise Changed("a tensor that saved_tensors_hooks was handed has changed")
                continue
            counts[name] += 1
            self.record(f"{name}, {counts[name]}", value)
        return self.results


DRAWS = {
    "normal": lambda x: x,
    "unit": lambda x: x.sigmoid(),
    "simplex": lambda x: x.softmax(class_dim(x)) if x.dim() else x.sigmoid(),
    "positive": lambda x: x.exp(),
    "ones": torch.ones_like,
}
STEP_NAMES = ("leaf", "indices", "cast", "hook", "grad", "backward", "update", "update_grad")
STEPS = {name: getattr(Run, name) for name in STEP_NAMES}


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def kept_by_hooks(run, step):
    """saved_tensors_hooks that keep what they are handed, or a copy."""

    def pack(tensor):
        if step["how"] == "unchanged":
            run.kept.append(("saved", (tensor.detach(), tensor.detach().clone())))
        return tensor.clone() if step["how"] == "copy" else tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


@contextlib.contextmanager
def compiled_backward():
    torch._dynamo.reset()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        yield


CONTEXTS = {
    "mode": lambda run, step: {
        "watch": Watching,
        "listen": Listening,
        "flops": partial(FlopCounterMode, display=False),
    }[step["how"]](),
    "saved": lambda run, step: save_on_cpu() if step["how"] == "cpu" else kept_by_hooks(run, step),
    "autocast": lambda run, step: torch.autocast("cpu", TYPES[step["type"]]),
    "no_grad": lambda run, step: torch.no_grad(),
    "inference": lambda run, step: torch.inference_mode(),
    "compiled_autograd": lambda run, step: compiled_backward(),
}
UNSEEN = {
    "mode",
    "saved",
    "autocast",
    "checkpoint",
    "compile",
    "compiled_autograd",
}  # blocks that the truth goes without


def in_context(run, step):
    with contextlib.nullcontext() if run.wide and step["op"] in UNSEEN else CONTEXTS[step["op"]](run, step):
        run.execute(step["body"])


def as_function(run, step, body):
    """The body as a function of the registers that it reads, which returns those that it writes."""
    inputs, outputs = sorted(reads(step)), defined(body)

    def function(*tensors):
        values = run.inner(inputs, tensors).execute(body).values
        return tuple(values[name] for name in outputs)

    return function, [run.values[name] for name in inputs], outputs


def by_call(through):
    """A block that hands its body, as a function, to something that calls it."""

    def block(run, step):
        if run.wide and step["op"] in UNSEEN:
            run.execute(step["body"])
            return
        function, inputs, outputs = as_function(run, step, step["body"])
        run.values.update(zip(outputs, through(run, step, function, inputs), strict=True))
        for name in recorded(step["body"]) if step["op"] == "compile" else ():
            run.record(name, run.values[name])

    return block


def checkpointed(run, step, function, inputs):
    return checkpoint(function, *inputs, use_reentrant=step["reentrant"], preserve_rng_state=False)


def compiled(run, step, function, inputs):
    run.recording, recording = False, run.recording
    try:
        torch._dynamo.reset()
        return torch.compile(function, backend=step["backend"])(*inputs)
    finally:
        run.recording = recording


def in_module(run, step, function, inputs):
    """Through a module with hooks: forward's doubles the outputs, backward's looks or halves the gradients."""

    module = Criterion(function)
    if step.get("forward_hook"):
        module.register_forward_hook(lambda module, args, outputs: tuple(y * 2 for y in outputs))
    if step.get("backward_hook") == "look":
        module.register_full_backward_hook(lambda module, inputs, outputs: None)
    if step.get("backward_hook") == "halve":
        halve = lambda gradients: tuple(  # noqa: E731
            g * 0.5 if g is not None and g.is_floating_point() else g for g in gradients
        )
        module.register_full_backward_hook(lambda module, inputs, outputs: halve(inputs))
    return module(*inputs)


def transformed(run, step):
    """A transform of torch.func, of the body as a function of one register to the sum of another."""
    argument, others = step["args"][0], sorted(reads(step) - {step["args"][0]})

    def function(x):
        inner = run.inner([argument, *others], [x, *(run.values[name].detach() for name in others)])
        inner.recording = False
        return inner.execute(step["body"]).values[step["of"]].sum()

    x = run.values[argument].detach()
    value = TRANSFORMS[step["how"]](function, x)
    run.values[step["out"]] = value
    run.record(step["out"], value)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.full_like(f(x), 0.5))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (eighths(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x * 0.5])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x * 0.5])),
}
BLOCKS = {
    **dict.fromkeys(CONTEXTS, in_context),
    "checkpoint": by_call(checkpointed),
    "compile": by_call(compiled),
    "module": by_call(in_module),
    "function": transformed,
}


def execute(program, losses, wide=False, salt=0):
    """The results, or the exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Run(losses, wide, salt).execute(program).finish()
    except Exception as error:
        # Before 2.13 a checkpoint whose function raises has hooks on saved tensors until its frame is gone.
        traceback.clear_frames(error.__traceback__)
        return error.with_traceback(None)


# --- the judge --------------------------------------------------------------------------------------------------------


def has(program, op=None, **options):
    """Whether a step has these options (True: any true value), be they its own or those of its loss."""

    def fits(step):
        given = {**step, **step.get("options", {})}
        return (op is None or step["op"] == op) and all(
            bool(given.get(name)) if value is True else given.get(name) == value for name, value in options.items()
        )

    return any(fits(step) for step in walk(program))


def conflicts(program):
    """Whether something else needs what is overwritten, which autograd must find out."""
    if has(program, "update"):
        return True
    return has(program, inplace=True) and isinstance(execute(program, Overwriting()), Exception)


# The messages that ours may raise where native does not, and when.
REFUSALS = [
    (r"modified by an inplace operation", conflicts),
    (r"modified inplace", lambda p: has(p, inplace=True) or has(p, "update")),
    (r"inplace=True cannot overwrite", lambda p: has(p, inplace=True)),
    (r"inplace=True writes the gradient over the input in forward", lambda p: has(p, inplace=True)),
    (r"(more than one element of the written-to|refer to a single memory)", lambda p: has(p, inplace=True)),
    (r"that inplace=True has overwritten", lambda p: has(p, inplace=True) and has(p, create_graph=True)),
    (r"grad_in_forward=True needs reduction", lambda p: has(p, grad_in_forward=True)),
    # The compiler's own: which buffers a graph gives away depends on what its operators save.
    (r"compiled with non-empty donated buffers", lambda p: has(p, "compile")),
    (r"grad_scale must be", lambda p: has(p, grad_scale=True) or has(p, grad_scale_tensor=True)),
]
# Units in the last place of the coarsest type that are luck. In float64 the truth is native's own.
UNITS = {torch.float64: 2.0**20, torch.float32: 24.0, torch.bfloat16: 8.0, torch.float16: 8.0}
# The size below which a result is taken for the difference of larger ones; half precision sees less of them.
ZERO = {torch.float64: 1.0, torch.float32: 0.25, torch.bfloat16: 0.05, torch.float16: 0.05}
DRAWN_AGAIN = 12  # a program under suspicion is run with other data: what is luck does not stay


@dataclass(frozen=True)
class Finding:
    kind: str  # what the minimiser keeps
    text: str


def grain(program):
    """The coarsest type that a program goes through."""
    names = [step["type"] for step in walk(program) if step.get("type") in TYPES]
    return max((TYPES[name] for name in names), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


@dataclass
class Measured:
    """How far one result is from the truth: ours, native's, and how large it is."""

    error: float
    native: float
    size: float
    odd: str = ""
    bias: float = 0.0
    native_bias: float = 0.0


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def kind(x):
    return type(x).__name__, x.dtype, list(x.shape)


def measured(ours, native, truth):
    if kind(ours) != kind(native):
        return Measured(math.inf, 0, 1, "is {}, {}, {}, native {}, {}, {}".format(*kind(ours), *kind(native)))
    ours, native, truth = (x.as_subclass(torch.Tensor) for x in (ours, native, truth))
    ours, native = ours.double(), native.double()
    ours_finite, native_finite, true_finite = ours.isfinite(), native.isfinite(), truth.isfinite()
    odd = ""
    if (~ours_finite & native_finite & true_finite).any():
        odd = "is not finite where native and the truth are"
    elif (ours_finite & ~native_finite & ~true_finite & (ours != 0)).any():
        odd = "is finite where native and the truth are not"
    both = ours_finite & native_finite & true_finite
    # Where native overflows on its way to a finite result ours is judged alone.
    alone = ours_finite & true_finite & ~native_finite & (ours != native)
    error = largest((ours - truth)[both | alone])
    found = Measured(error, largest((native - truth)[both]), largest(truth[true_finite]), odd)
    squares = truth[both].square().sum().item()
    if squares:
        found.bias = (ours * truth)[both].sum().item() / squares - 1
        found.native_bias = (native * truth)[both].sum().item() / squares - 1
    return found


def flows(program):
    """How much larger or smaller than usual each result is made by what flows back, as far as flows are finite."""
    found = {}
    for step in walk(program):
        size = max([found.get(name, 1.0) for name in reads(step)], default=1.0)
        if step["op"] in ("grad", "backward"):
            flow = abs(float(step.get("flow", 1.0)))
            size *= flow if math.isfinite(flow) and flow else 1.0
            found[""] = max(found.get("", 0.0), size)  # of the gradients that leaves and hooks have got
        found.update(dict.fromkeys(writes(step), size))
    return found


def measure(program, ours, native, truth):
    """Every result, by name; what is zero but for roundings is taken for larger."""
    different = [name for name in ours.keys() ^ native.keys() if (ours.get(name, native.get(name)) != 0).any()]
    if different:
        return {name: Measured(math.inf, 0, 1, "is only there for one of ours and native") for name in different}
    found = {
        name: measured(ours[name], native[name], truth[name]) for name in ours.keys() & native.keys() & truth.keys()
    }
    sizes, zero = flows(program), ZERO[grain(program)]
    for name, one in found.items():
        one.size = max(one.size, zero * sizes.get(name, sizes.get("", 1.0)))
    for step in walk(program):
        if step["op"] == "total" and step["out"] in found:
            found[step["out"]].size = max(found[name].size for name in [step["out"], *step["args"]] if name in found)
    return found


def rms(values):
    return math.sqrt(sum(value * value for value in values) / max(1, len(values)))


def fault(draws, dtype, biased=False):
    """(kind, text) of what is wrong with a result that was measured with one or several draws of the data, or Nones.

    All elements of a gradient that are too large alike show a rounded factor, where factors are not half (autocast).
    """
    odd = [one.odd for one in draws if one.odd]
    if len(odd) * 2 > len(draws):
        return odd[0], odd[0]
    calm = [one for one in draws if not one.odd]
    info = torch.finfo(dtype)
    error, native, size = (rms([getattr(one, name) for one in calm]) for name in ("error", "native", "size"))
    if error > 3 * native + UNITS[dtype] * info.eps * size + 8 * info.smallest_normal * info.eps:
        return "wrong", f"is off by {error:.2g} of {size:.2g} (native: {native:.2g})"
    bias, native_bias = (
        sum(getattr(one, name) for one in calm) / max(1, len(calm)) for name in ("bias", "native_bias")
    )
    spread = rms([one.bias - bias for one in calm]) / math.sqrt(max(1, len(calm)))
    if biased and len(calm) > 3 and abs(bias) > max(info.eps / 16, 3 * abs(native_bias), 8 * spread):
        return "bias", f"has a bias of {bias:.2g} (native: {native_bias:.2g})"
    return None, None


def judge(program, ours=None):
    """(verdict, finding or None)."""
    ours = ours or Ours()
    native, found = execute(program, Native()), execute(program, ours)
    if isinstance(native, Exception):
        return ("refused by both" if isinstance(found, Exception) else "refused by native"), None
    if isinstance(found, Exception):
        return judge_refusal(program, found)
    truth = execute(program, Native(), wide=True)
    if isinstance(truth, Exception):
        return "without a truth", None
    dtype = grain(program)
    first = measure(program, found, native, truth)
    biased = {name for name in first if factors_are_float32(program, name, truth)}
    suspects = {name for name, one in first.items() if suspicious(one, dtype, name in biased)}
    draws = measure_again(program, ours, suspects) if suspects else {}
    for name in sorted(draws):
        kind, text = fault(draws[name], dtype, name in biased)
        if kind:
            return "finding", Finding(kind, f"{name} {text}")
    return "judged", None


def judge_refusal(program, error):
    message = str(error)
    if any(re.search(pattern, message) and legal(program) for pattern, legal in REFUSALS):
        return "documented refusal", None
    head = f"raises {type(error).__name__}: {(message.strip().splitlines() or [''])[0]}"
    return "finding", Finding(re.sub("[0-9]+", "#", head)[:80], head[:240])


def factors_are_float32(program, name, truth):
    """Whether a result is a gradient through a loss under autocast, large enough to tell a bias from luck."""
    return has(program, "autocast") and name in truth and truth[name].numel() >= 8 and name not in recorded(program)


def suspicious(one, dtype, biased):
    """Whether one draw is a reason to look at others."""
    return fault([one], dtype)[0] or (biased and abs(one.bias) > torch.finfo(dtype).eps / 8)


def measure_again(program, ours, suspects):
    """The suspects' measures, with other data."""
    draws = {name: [] for name in suspects}
    for salt in range(1, DRAWN_AGAIN + 1):
        runs = [execute(program, *how, salt=salt) for how in ((ours,), (Native(),), (Native(), True))]
        if any(isinstance(run, Exception) for run in runs):
            continue
        again = measure(program, *runs)
        for name in suspects & again.keys():
            draws[name].append(again[name])
    return draws


# --- the generator ----------------------------------------------------------------------------------------------------

SHAPES = [
    [5],
    [4, 5],
    [3, 7],
    [6, 2],
    [2, 3, 4],
    [2, 4, 2, 2],
    [1, 6],
    [4, 1],
    [0, 3],
    [2, 3, 0],
    [16, 4],
    [3, 40],
    [2, 33],
    [40, 3],
]
FLOWS = [1.0, 1.0, 1.0, 0.5, 1 / 3, -2.5, 1 / 7, 1024.0, 0.0, 1e-6, "inf", "nan"]
HINTED = [0.5, 1 / 3, 1.0, -2.5, 1024.0, 65536.0, 1e-6, 1e-300]


def footprint(tensor):
    """The bytes of memory at which the elements of a tensor lie."""
    places = {tensor.data_ptr()} if tensor.numel() else set()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = {place + i * stride * tensor.element_size() for place in places for i in range(size)}
    return places


class Generator:
    """Draws one program. Each step is tried natively as it is drawn, and left out where it fails or explodes."""

    def __init__(self, seed, compiles=False):
        self.random = random.Random(seed)
        self.leaves, self.steps, self.names = [], [], 0
        self.trial = Run(Native())
        self.compiles = compiles
        self.type = self.choice(["float32"] * 5 + ["float64"] * 5 + ["bfloat16"] * 2 + ["float16"] * 2)
        self.autocast = self.choice(["bfloat16", "float16"]) if self.odds(0.12) else None

    def choice(self, items):
        return self.random.choice(items)

    def odds(self, probability):
        return self.random.random() < probability

    def seed(self):
        return self.random.randrange(10**6)

    def name(self):
        self.names += 1
        return f"%{self.names - 1}"

    # --- steps and registers

    def add(self, op, *args, **options):
        step = {"op": op, "args": list(args), "out": self.name(), **options}
        try:
            with torch.autocast("cpu", TYPES[self.autocast]) if self.autocast else contextlib.nullcontext():
                self.trial.step(step)
        except Exception:
            return None
        value = self.trial.values[step["out"]]
        if value.numel() > 256 or (op != "mask" and value.is_floating_point() and not largest(value) <= 200):
            del self.trial.values[step["out"]]
            return None
        (self.leaves if op in ("leaf", "indices") else self.steps).append(step)
        return step["out"]

    def leaf(self, shape, **options):
        return self.add("leaf", shape=list(shape), seed=self.seed(), **{"type": self.type, **options})

    def value(self, name):
        return self.trial.values[name]

    def pick(self, fits=lambda x: True):
        """A register of floats, rather a late one."""
        names = [name for name, x in self.trial.values.items() if x.is_floating_point() and fits(x)]
        if self.odds(0.8):
            names = [name for name in names if self.value(name).requires_grad] or names
        return names[-1 - int(len(names) * self.random.random() ** 2)] if names else None

    # --- layers

    def layer(self):
        x = self.pick(lambda x: x.dim() > 0 and x.dtype != torch.int64)
        op = self.choice([*LAYERS, "linear", "linear", *["view"] * 6, "cast", "cast", "hook"])
        shape = list(self.value(x).shape)
        if op == "view":
            return self.view(x)
        if op == "cast":
            return self.add("cast", x, type=self.choice(list(TYPES)))
        if op == "hook":
            return self.add("hook", x, **({"by": 0.5} if self.odds(0.5) else {}))
        if op == "linear":
            dtype = str(self.value(x).dtype).removeprefix("torch.")
            w = self.leaf([shape[-1], self.choice([2, 4, 5])], size=0.5, grad=True, type=dtype)
            return self.add(op, x, w)
        if op in ("add", "multiply"):
            return self.add(op, x, self.pick(lambda y: list(y.shape) == shape))
        if op == "scale":
            return self.add(op, x, by=self.choice([1.0, -0.5, 1.5]))
        if op == "stack":
            scalar = self.pick(lambda y: y.dim() == 0)
            return scalar and self.add(op, *([scalar] * self.choice([1, 3]) + [self.pick(lambda y: y.dim() == 0)]))
        if op == "concatenate":
            return self.add(op, x, self.pick(lambda y: list(y.shape) == shape), dim=self.random.randrange(len(shape)))
        return self.add(op, x)

    def view(self, x):
        shape, op = list(self.value(x).shape), self.choice(list(VIEWS))
        dim = self.random.randrange(len(shape))
        size = shape[dim]
        options = {
            "narrow": {"dim": dim, "start": size // 3, "length": (size + 1) // 2},
            "every": {"dim": dim, "step": 2},
            "select": {"dim": dim, "index": size - 1},
            "transpose": {"a": dim, "b": self.random.randrange(len(shape))},
            "reshape": {"shape": self.choice([[-1, shape[-1]], [shape[0], -1], [*shape[:-1], 1, shape[-1]]])},
            "unfold": {"dim": dim, "size": max(1, size - 1), "step": 1},
            "expand": {"times": 3},
            "chunk": {"chunks": 2, "dim": dim, "index": self.choice([0, 1])},
            "index": {"rows": [size - 1, 0, 0]},
            "flip": {"dim": dim},
            "contiguous": {},
        }
        return self.add(op, x, **options[op])

    # --- losses

    def loss(self):
        op = self.choice([*LOSSES, "cross_entropy", "cross_entropy", "binary_cross_entropy_with_logits"])
        if op == "nll_loss" or op == "cross_entropy":
            logits = self.pick(lambda x: x.dim() > 0 and x.shape[class_dim(x)] > 0)
        else:
            logits = self.pick()
        if logits is None:
            return None
        if op == "nll_loss" and self.odds(0.7):
            logits = self.add("log_softmax", logits)
        if op == "binary_cross_entropy" and logits:
            logits = self.add("sigmoid", logits)
        if logits is None:
            return None
        dtype = str(self.value(logits).dtype).removeprefix("torch.")
        reduction = self.choice(["none", "mean", "mean", "sum"])
        options = {} if reduction == "mean" and self.odds(0.5) else {"reduction": reduction}
        describe = self.class_options if "binary" not in op else self.element_options
        target = describe(op, logits, dtype, options)
        if target is None:
            return None
        self.hints(op, options, dtype, target)
        how = {self.choice(["module", "module", "patched"]): True} if self.odds(0.3) else {}
        return self.add(op, logits, target, options=options, **how)

    def class_options(self, op, logits, dtype, options):
        shape = list(self.value(logits).shape)
        dim = min(1, len(shape) - 1)
        soft = op == "cross_entropy" and self.odds(0.35)
        if self.odds(0.3):
            like = self.choice(["positive", "positive", "normal"])
            options["weight"] = self.leaf([shape[dim]], like=like, type=dtype)
        if op == "cross_entropy":
            if self.odds(0.3):
                options["label_smoothing"] = self.choice([0.1, 0.5, 1.0])
            if self.odds(0.15):
                options["z_loss"] = self.choice([1e-4, 0.1])
            if self.odds(0.15):
                options["logit_softcap"] = self.choice([1.0, 5.0])
            if self.odds(0.15):
                options["logit_scale"] = self.choice([0.5, 2.0])
            if self.odds(0.15):
                options["sample_weight"] = self.leaf(shape[:dim] + shape[dim + 1 :], like="positive", type=dtype)
            if self.odds(0.15) and options.get("reduction", "mean") == "mean":
                options["denominator"] = self.choice([1, 7.0])
            options |= {name: True for name in ("return_lse", "return_entropy") if self.odds(0.15)}
        if soft:
            if "weight" in options and self.odds(0.2):
                self.leaves[-1]["grad"] = True
            return self.soft_target(logits, "softmax", ["simplex", "simplex", "normal"])
        ignored = {}
        if self.odds(0.4):
            index = self.choice([-100, -1, 0, 255])
            ignored = {"ignored": self.choice([0.3, 0.3, 1.0]), "ignore_index": index}
            options["ignore_index"] = index
        kind = {"type": self.choice(["int32", "uint8"])} if self.odds(0.1) else {}
        if ignored.get("ignore_index", 0) < 0:
            kind.pop("type", None)
        shape = shape[:dim] + shape[dim + 1 :]
        return self.add(
            "indices", shape=shape, classes=self.value(logits).shape[dim], seed=self.seed(), **ignored, **kind
        )

    def element_options(self, op, logits, dtype, options):
        shape = list(self.value(logits).shape)
        broadcast = [self.choice([1, size]) for size in shape][self.random.randrange(len(shape) + 1) :]
        if self.odds(0.3):
            options["weight"] = self.leaf(broadcast, like="positive", type=dtype)
        if op.endswith("logits") and self.odds(0.3):
            options["pos_weight"] = self.leaf(shape[-1:], like="positive", type=dtype)
        if self.odds(0.3):
            options["ignore_index"] = self.choice([0, 1, -100])
            target = {"ignored": self.choice([0.3, 1.0]), "ignore_index": options["ignore_index"]}
            return self.add("indices", shape=shape, classes=2, seed=self.seed(), **target)
        return self.soft_target(logits, "sigmoid", ["unit", "unit", "ones"])

    def soft_target(self, logits, op, likes):
        if self.odds(0.3):
            shape = self.value(logits).shape
            return self.add(op, logits if self.odds(0.6) else self.pick(lambda x: x.shape == shape))
        dtype = str(self.value(logits).dtype).removeprefix("torch.") if self.odds(0.8) else self.choice(list(TYPES))
        grad = {"grad": True} if self.odds(0.2) else {}
        return self.leaf(self.value(logits).shape, like=self.choice(likes), type=dtype, **grad)

    def writes_in_forward(self, options, target):
        """Whether forward can write the gradient; where it cannot, asking for it is refused."""
        answers = options.get("return_lse") or options.get("return_entropy")
        can = options.get("reduction") != "none" and not answers
        return (can and not self.value(target).requires_grad) or self.odds(0.03)

    def hints(self, op, options, dtype, target):
        if op == "nll_loss":
            return
        if self.odds(0.3):
            # In float16 a gradient that is written in forward needs a scale: it may underflow.
            able = dtype != "float16" and self.writes_in_forward(options, target)
            options["grad_in_forward"] = able and self.odds(0.7)
        if self.odds(0.2):
            options["grad_scale"] = self.choice(HINTED)
        elif self.odds(0.1):
            options["grad_scale_tensor"] = self.choice([*HINTED, 0.0, "inf", "nan"])

    def heads(self):
        """Losses of disjoint views of one tensor, each of which writes its gradient over its own."""
        base = self.add("scale", self.pick(lambda x: x.dim() > 0 and x.requires_grad and x.shape[-1] > 1), by=1.0)
        if base is None:
            return []
        dim = self.random.randrange(self.value(base).dim())
        half = (self.value(base).shape[dim] + 1) // 2
        rest = self.value(base).shape[dim] - half
        views = [self.add("narrow", base, dim=dim, start=start, length=n) for start, n in ((0, half), (half, rest))]
        ends = []
        # Nothing else may read what is overwritten.
        hidden = {name: self.trial.values.pop(name) for name in filter(None, [base, *views])}
        for view in filter(None, views):
            self.trial.values[view] = hidden[view]
            dtype = str(self.value(view).dtype).removeprefix("torch.")
            options = {"reduction": self.choice(["mean", "sum"])}
            op = self.choice(["cross_entropy", "binary_cross_entropy_with_logits"])
            describe = self.class_options if op == "cross_entropy" else self.element_options
            if self.value(view).numel():
                target = describe(op, view, dtype, options)
                if target and self.writes_in_forward(options, target):
                    options |= {"inplace": True, **({"grad_scale": 1.0} if dtype == "float16" else {})}
                ends.append(target and self.add(op, view, target, options=options))
            del self.trial.values[view]
        return ends

    # --- functions of losses

    def function(self, y):
        shape = self.value(y).shape
        op = self.choice(["square", "log", "exp_of_minus", "focal", "divide", "divide", "weigh", "weigh_each"])
        if op == "divide":
            return self.add(op, y, by=self.choice([3, 4, 7]))
        if op == "weigh":
            return self.add(op, y, self.pick(lambda x: x.dim() > 0))
        if op == "weigh_each":
            x = self.pick(lambda x: x.shape == shape and x is not self.value(y))
            return x and self.add(op, y, x)
        return self.add(op, y)

    def scalar(self, y):
        return y if not self.value(y).dim() else self.add(self.choice(["mean", "sum"]), y)

    # --- derivatives: steps that are not tried

    def later(self, op, *args, **options):
        step = {"op": op, "args": list(args), **options}
        self.steps.append(step)
        return step.get("out")

    def grad(self, y, inputs, **options):
        out = [self.name() for _ in inputs]
        return self.later("grad", y, *inputs, out=out, **options)

    def flow(self, options):
        """A grad_output; often the one that the losses were told of."""
        # A second derivative of inf and nan is as it happens to be computed.
        flow = self.choice(FLOWS[:-2] if options.get("create_graph") else FLOWS)
        hints = [step["options"]["grad_scale"] for step in self.steps if "grad_scale" in step.get("options", {})]
        if hints and self.odds(0.4):
            flow = self.choice(hints)
        return options if flow == 1.0 else {**options, "flow": flow}

    def derivatives(self, y):
        above = self.above(y) if self.odds(0.95) else self.trial.values.keys()
        inputs = [step["out"] for step in self.leaves if step.get("grad") and step["out"] in above]
        inputs = self.random.sample(inputs, self.random.randint(1, min(3, len(inputs))))
        middle = [name for name in above if self.value(name).requires_grad and not self.value(name).is_leaf]
        if self.odds(0.2) and middle:
            inputs.append(self.choice(middle))
        plan = self.choice([self.first] * 4 + [self.again] * 3 + [self.second] * 5 + [self.third, self.batched])
        plan(y, inputs)

    def above(self, y):
        """The registers that y was computed from, and y."""
        found = [y]
        for step in reversed(self.steps):
            if found and set(writes(step)) & set(found):
                found += [name for name in reads(step) if name not in found]
        return sorted(set(found) & self.trial.values.keys(), key=lambda name: int(name[1:]))

    def first(self, y, inputs):
        if self.odds(0.7):
            self.later("backward", y, **self.flow({"retain": False}))
        else:
            self.grad(y, inputs, **self.flow({"retain": False}))

    def again(self, y, inputs):
        for _ in range(self.random.randint(1, 3)):
            if self.odds(0.3):
                self.later("backward", y, **self.flow({}))
                self.later("update_grad", self.choice(inputs))
                continue
            found = self.grad(y, inputs, **self.flow({"create_graph": True} if self.odds(0.2) else {}))
            if self.odds(0.4):
                self.later("update", self.choice(found))
        self.first(y, inputs)

    def second(self, y, inputs):
        penalty = self.penalty(y, self.grad(y, inputs, **self.flow({"create_graph": True})))
        for _ in range(self.random.randint(0, 1)):
            self.grad(penalty, inputs, retain=True)
        self.first(penalty, inputs)

    def third(self, y, inputs):
        penalty = self.penalty(y, self.grad(y, inputs, create_graph=True))
        self.second(penalty, inputs)

    def penalty(self, y, found):
        penalty = self.later(self.choice(list(PENALTIES)), *found, out=self.name())
        return self.later("total", y, penalty, out=self.name()) if self.odds(0.8) else penalty

    def batched(self, y, inputs):
        self.grad(y, inputs, batched=True)

    # --- blocks

    def wrap(self, first, last, op, **options):
        body = self.steps[first:last]
        self.steps[first:last] = [{"op": op, **options, "body": body}]

    def wrap_some(self, start, stop, op, **options):
        first = self.random.randrange(start, stop)
        last = stop if self.odds(0.4) else self.random.randint(first + 1, stop)
        self.wrap(first, last, op, **options)
        return stop - (last - first) + 1

    def block(self, stop):
        """Wraps some of the first steps in a block; returns how many steps are before the derivatives now."""
        kinds = ["checkpoint"] * 4 + ["saved"] * 4 + ["mode"] * 4 + ["module"] * 3
        kind = self.choice(kinds)
        options = {
            "checkpoint": {"reentrant": self.odds(0.05 if has(self.steps, "grad") else 0.5)},
            "saved": {"how": self.choice(["identity", "unchanged", "copy", "cpu"])},
            "mode": {"how": self.choice(["watch", "flops", "listen"])},
            "module": {"forward_hook": self.odds(0.3), "backward_hook": self.choice([None, "look", "halve"])},
        }
        return self.wrap_some(0, stop, kind, **options.get(kind, {}))

    def evaluate(self, stop):
        """A loss once more, without a gradient; returns how many steps there are more."""
        places = [i for i in range(stop) if self.steps[i]["op"] in LOSSES]
        if not places:
            return 0
        place = self.choice(places)
        again = {**self.steps[place], "out": self.name(), "options": dict(self.steps[place]["options"])}
        self.steps.insert(place, {"op": self.choice(["no_grad", "inference"]), "body": [again]})
        return 1

    def function_block(self):
        """A loss under a transform of torch.func, in the place of the loss."""
        step = self.steps.pop()
        del self.trial.values[step["out"]]
        out, how = self.name(), self.choice(list(TRANSFORMS))
        body = [step]
        self.steps.append(
            {"op": "function", "how": how, "args": step["args"][:1], "of": step["out"], "out": out, "body": body}
        )

    def overwrite(self):
        """Lets losses overwrite their input, or a copy of it, where no later step reads that memory."""
        for step in [step for step in self.steps if step["op"] in OVERWRITING]:
            input, target = step["args"]
            if input not in self.trial.values or self.odds(0.5):
                continue
            place = self.steps.index(step)
            memory = footprint(self.value(input))
            later = self.steps[place + 1 :]
            read = {
                target,
                *(name for step in later for name in (step["args"][:1] if step["op"] == "grad" else reads(step))),
            }
            free = not any(footprint(self.value(name)) & memory for name in read & self.trial.values.keys())
            options = step["options"]
            if not self.writes_in_forward(options, target):
                continue
            if self.odds(0.5):
                copy = self.name()
                self.steps.insert(place, {"op": "scale", "args": [input], "out": copy, "by": 1.0})
                step["args"] = [copy, target]
            elif not free or self.value(input).is_leaf:
                continue
            options["inplace"] = True
            options.pop("grad_in_forward", None)
            if self.value(input).dtype == torch.float16:
                options.setdefault("grad_scale", 1.0)

    # --- the whole

    def program(self):
        shape = self.choice(SHAPES)
        options = {"size": self.choice([0.1, 4.0])} if self.odds(0.2) else {}
        if self.odds(0.2):
            options["class"] = self.choice(["parameter", "tagged"])
        self.leaf(shape, grad=True, **options)
        if self.odds(0.3):
            self.leaf(self.choice([shape, shape, self.choice(SHAPES)]), grad=self.odds(0.5))
        for _ in range(self.random.randint(0, 5)):
            self.layer()
        ends = []
        for _ in range(self.choice([1, 1, 1, 2, 2, 3, 4])):
            if self.odds(0.06):
                ends += filter(None, self.heads())
                continue
            y = self.loss()
            if y is None:
                continue
            if self.odds(0.05):
                self.function_block()
                continue
            for _ in range(self.choice([0, 0, 1, 1, 2])):
                y = self.function(y) or y
            if self.odds(0.3):
                self.layer()
            if self.value(y).requires_grad:
                ends.append(y)
        if len(ends) > 1 or self.odds(0.7):
            ends = [y for y in map(self.scalar, ends) if y]
            ends = [ends[0] if len(ends) == 1 else self.add("total", *ends)] if ends else []
        if ends and ends[0]:
            self.around(ends[0])
        return self.leaves + self.steps

    def around(self, y):
        """Derivatives of y, and blocks around everything."""
        forward = len(self.steps)
        self.derivatives(y)
        for _ in range(self.choice([0, 0, 0, 1, 1, 2, 3])):
            forward = self.block(forward)
        if self.odds(0.05):
            forward = self.wrap_some(0, forward, self.choice(["no_grad", "inference"]))
        if self.odds(0.1):
            forward += self.evaluate(forward)
        if self.compiles and self.odds(0.7):
            self.wrap(0, forward, "compile", backend=self.choice(["eager", "aot_eager"]))
            forward = 1
        elif self.compiles:
            self.wrap(len(self.steps) - 1, len(self.steps), "compiled_autograd")
        if self.autocast:
            self.wrap(0, forward, "autocast", type=self.autocast)
            forward = 1
        if self.odds(0.2):
            self.wrap_some(forward, len(self.steps), "mode", how=self.choice(["watch", "flops"]))
        blind = has(self.steps, "checkpoint") or any(
            has(self.steps, "saved", how=how) for how in ("identity", "unchanged", "cpu")
        )
        # Where a checkpoint or a hook keeps a tensor, native does not notice either that it is written to.
        if blind:
            for step in walk(self.steps):
                step.get("options", {}).pop("inplace", None)
            return
        before = len(self.steps)
        self.overwrite()
        forward += len(self.steps) - before
        candidates = [name for name, x in self.trial.values.items() if x.is_floating_point()]
        if self.odds(0.1):
            self.steps.insert(forward, {"op": "update", "args": [self.choice(candidates)]})


def generate(seed, compiles=False):
    return Generator(seed, compiles).program()


# --- the minimiser ----------------------------------------------------------------------------------------------------


def minimise(program, fails, most=400):
    """The program, with whatever can go gone, as long as it fails."""
    tries = 0
    progress = True
    while progress:
        progress = False
        for smaller in candidates(program):
            tries += 1
            if tries > most:
                return program
            if fails(smaller):
                program, progress = smaller, True
                break
    return program


def candidates(program):
    """Programs that are smaller by one change, the largest changes first."""
    yield from pruned(program)
    for path, step in paths(program):
        if "body" in step:
            yield replaced(program, path, step["body"])
    for path, step in paths(program):
        yield bypassed(replaced(program, path, []), step)
    for path, step in paths(program):
        for smaller in simpler(step):
            yield replaced(program, path, [smaller])
    sizes = sorted(
        {size for step in walk(program) for size in step.get("shape", []) if isinstance(size, int) and size > 1}
    )
    for size in reversed(sizes):
        for smaller in range(1, size):
            yield resized(program, size, smaller)


def pruned(program):
    """Without the steps that nothing reads."""
    needed = {name for step in walk(program) for name in reads(step)}
    kept = [step for step in program if step["op"] not in ("leaf", "indices") or step["out"] in needed]
    if len(kept) < len(program):
        yield kept


def paths(program, prefix=()):
    for i, step in reversed(list(enumerate(program))):
        yield (*prefix, i), step
        yield from paths(step.get("body", []), (*prefix, i))


def replaced(program, path, steps):
    i, *rest = path
    if rest:
        steps = [{**program[i], "body": replaced(program[i]["body"], rest, steps)}]
    return [*program[:i], *steps, *program[i + 1 :]]


def bypassed(program, step):
    """Readers of a step that is gone read what it has read."""
    gone = writes(step)
    args = step.get("args", [])
    if not args:
        return program
    instead = dict(zip(gone, [*args[1:], *args[:1]] if len(gone) > 1 or step["op"] == "grad" else args, strict=False))

    def renamed(step):
        step = dict(step)
        if "args" in step:
            step["args"] = [instead.get(name, name) for name in step["args"]]
        if "body" in step:
            step["body"] = [renamed(one) for one in step["body"]]
        return step

    return [renamed(step) for step in program]


def simpler(step):
    """One step with an option less, or a simpler one."""
    keep = {*NOT_OPTIONS, "shape", "seed", "classes", "type"}
    for name in [name for name in step if name not in keep and name != "options"]:
        yield {key: value for key, value in step.items() if key != name}
    for name in step.get("options", {}):
        yield {**step, "options": {key: value for key, value in step["options"].items() if key != name}}
    for simple in ("float64", "float32"):
        if step.get("type") in TYPES and list(TYPES).index(simple) < list(TYPES).index(step["type"]):
            yield {**step, "type": simple}
    if step["op"] in ("grad", *PENALTIES, "total", "stack") and len(step["args"]) > 1 + (step["op"] == "grad"):
        for i in range(1 if step["op"] == "grad" else 0, len(step["args"])):
            smaller = {**step, "args": step["args"][:i] + step["args"][i + 1 :]}
            if step["op"] == "grad":
                smaller["out"] = step["out"][: i - 1] + step["out"][i:]
            yield smaller


def resized(program, size, smaller):
    def change(step):
        step = dict(step)
        if "shape" in step:
            step["shape"] = [smaller if s == size else s for s in step["shape"]]
        if step.get("classes") == size:
            step["classes"] = smaller
        if "body" in step:
            step["body"] = [change(one) for one in step["body"]]
        return step

    return [change(step) for step in program]


def as_text(program, indent=""):
    """One step a line; ast.literal_eval reads it back."""
    lines = []
    for step in program:
        plain = ", ".join(f"{name!r}: {value!r}" for name, value in step.items() if name != "body")
        if "body" in step:
            inside = as_text(step["body"], indent + "    ").rstrip()
            lines.append(f"{indent}    {{{plain}, 'body': {inside.lstrip()}}},")
        else:
            lines.append(f"{indent}    {{{plain}}},")
    return "\n".join([f"{indent}[", *lines, f"{indent}]"])


def same_finding(finding, ours=None):
    """Whether a program fails in the way of this finding."""

    def fails(program):
        found = judge(program, ours)[1]
        return found is not None and found.kind == finding.kind

    return fails


# --- what a program exercises -----------------------------------------------------------------------------------------


def ingredients(program):
    """Names of all that a program is made of, for the table of what has been exercised."""
    found, kinds = set(), {}
    for step in walk(program):
        op = step["op"]
        how = step.get(
            "how", step.get("backend", {True: "reentrant", False: "not reentrant"}.get(step.get("reentrant")))
        )
        if step.get("class"):
            found.add(f"leaf: {step['class']}")
        if op in ("leaf", "indices"):
            kinds[step["out"]] = step.get("like", "normal") if op == "leaf" else op
            found.add(f"{op}: {step.get('type', 'int64')}")
        elif op in LOSSES:
            found |= {op, f"target: {kinds.get(step['args'][1], 'from the model')}"}
            found |= {f"option: {name}" for name, value in step["options"].items() if value}
            found |= {f"reduction: {step['options'].get('reduction', 'mean')}"}
            found |= {"through the loss's module"} if step.get("module") else set()
        elif op in ("grad", "backward"):
            found |= {
                op,
                f"flow: {step.get('flow', 1.0):.3g}"
                if step.get("flow") not in ("inf", "nan")
                else "flow: " + step["flow"],
            }
            found |= {f"{op}: {flag}" for flag in ("batched", "create_graph") if step.get(flag)}
        else:
            kind = "block" if "body" in step else "view" if op in VIEWS else "function" if op in FUNCTIONS else "step"
            found.add(": ".join(filter(None, (kind, op, how))))
        if op == "hook":
            found.add("step: hook that scales" if "by" in step else "step: hook that looks")
    found.add(f"derivatives of order {order(program)}")
    return found


def order(program):
    """The highest order of a derivative."""
    orders = {}
    for step in walk(program):
        below = max([orders.get(name, 0) for name in reads(step)], default=0)
        for name in writes(step):
            orders[name] = max(orders.get(name, 0), below) + (step["op"] == "grad")
        orders[""] = max(orders.get("", 0), below + (step["op"] in ("grad", "backward")))
    return orders.get("", 0)
