"""Logits of a linear layer that are computed when somebody reads them, and by a cross entropy never as a whole.

For models whose forward calls the layer and then the loss, and cannot be edited.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass, _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from fusedloss import functional, native

HALF = (torch.bfloat16, torch.float16)


def linear_logits(layer: nn.Linear, input: Tensor) -> Tensor:
    """The output of ``layer(input)``, as :class:`LinearLogits` wherever these can take its place.

    They cannot under a compiler, ``torch.jit.trace``, transforms of ``torch.func`` and forward-mode AD; nor on a device
    without autocast (meta); nor where the layer's tensors are no plain ones (quantised, sharded, replicated) or do not
    fit together. There it is computed.
    """
    is_eager = not _is_traced() and torch.amp.is_autocast_available(input.device.type)
    call = _Call(input, layer.weight, layer.bias) if is_eager else None
    return _place(_Later(call, input, call.dtype)) if call and call.is_plain else type(layer).forward(layer, input)


class LinearLogits(Tensor):
    """Logits (..., C) of a linear layer, which have a shape, a type and a device, but no values yet.

    Cross entropy of them, torch's or fusedloss's, is :func:`fusedloss.linear_cross_entropy`. A cast to float32, a
    multiplication or division by a number, a tanh, slices of rows and another shape of rows give such logits again, so
    that a scale, a soft cap, a shift and a float32 loss become arguments of it. Whatever else reads them computes them,
    once, as an ordinary tensor with its place in the graph, and works on that tensor; from then on a loss does so too.

    Raises:
        RuntimeError: they are read after the layer's input or a parameter has changed or been freed (what is written
            through ``parameter.data`` nobody can see); or a hook is registered, or ``retain_grad`` called, after a loss
            has been computed, which has no gradient of them.
    """

    later: "_Later"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        logits = args[0] if args else None
        if isinstance(logits, cls) and not logits.later.call.is_made and not torch.compiler.is_compiling():
            if function in _ASKS_FOR_NO_VALUES:
                with DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            # Within fusedloss.patch() torch's loss is another object, which equals it and has its hash.
            answer = _ANSWERS.get(function, _needs_values)(function, *args, **kwargs)
            if answer is not NotImplemented:
                return answer
        args, kwargs = tree_map_only(cls, lambda logits: logits.later.values, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Serves what comes past __torch_function__, from C++ or an autograd Function.

        Autograd is above, and hands gradients to _Place.backward.
        """
        args, kwargs = tree_map_only(cls, lambda logits: logits.later.compute().detach(), (args, kwargs or {}))
        return function(*args, **kwargs)


class _Call:
    """A call of a linear layer, and its output once there is one."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        self.input, self.weight, self.bias = input, weight, bias
        self.device = input.device.type
        self.casts = torch.is_autocast_enabled(self.device) and input.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(self.device) if self.casts else input.dtype
        self.in_inference_mode = torch.is_inference_mode_enabled()
        self.has_loss = False  # one that was computed without the output, and has a gradient
        self.hooks: list[Callable] = []
        self.classes = weight.shape[0]
        # Kept, so that no other storage gets the place of one of these, by which they are known.
        self.storages = [tensor.untyped_storage() for tensor in self.tensors] if self.is_plain else []
        self.identities = [_identity(tensor) for tensor in self.tensors] if self.is_plain else []

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.input, self.weight, self.bias) if tensor is not None]

    @cached_property
    def is_plain(self) -> bool:
        parameters = self.tensors[1:]
        return (
            type(self.input) is Tensor
            and self.input.is_floating_point()
            and self.input.dim() > 1
            and self.input.shape[-1] == self.weight.shape[-1]
            and all(type(each) is nn.Parameter and each.device == self.input.device for each in parameters)
            and not any(hasattr(each, "ds_id") for each in parameters)  # DeepSpeed's, freed when the layer has run
            and (self.casts or all(each.dtype == self.input.dtype for each in parameters))
        )

    @property
    def is_made(self) -> bool:
        return "output" in vars(self)

    @cached_property
    def output(self) -> Tensor:
        output = self.compute()
        for hook in self.hooks if output.requires_grad else ():
            output.register_hook(hook)
        return output

    def compute(self) -> Tensor:
        self.check()
        tensors = [tensor.to(self.dtype) for tensor in self.tensors] if self.casts else self.tensors
        with torch.autocast(self.device, enabled=False):
            return linear(*tensors)

    def check(self) -> None:
        for tensor, identity in zip(self.tensors, self.identities, strict=True):
            if _identity(tensor) != identity or (tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0):
                raise RuntimeError(
                    "logits are computed when they are read, and the input or a parameter of their linear layer has "
                    "changed or been freed since the layer was called: read them before, as before optimizer.step()"
                )


class _Later:
    """What logits will be: a step from what others will be, or the output of a layer's call.

    A loss takes them as ``outer * tanh(inner * output)``, or ``inner * output`` where outer is None, of the rows that
    ``input`` has.
    """

    def __init__(self, call, input, dtype, inner=1.0, outer=None, before=None, step=None):
        self.call, self.input, self.dtype, self.inner, self.outer = call, input, dtype, inner, outer
        self.before, self.step = before, step
        self.has_grad = torch.is_grad_enabled() and (before is None or before.has_grad)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.input.shape[:-1], self.call.classes)

    @cached_property
    def values(self) -> Tensor:
        """As they are in the graph of where the layer was called, whoever reads them first, and in whatever mode."""
        with (
            torch.inference_mode(self.call.in_inference_mode),
            torch.set_grad_enabled(self.has_grad),
            _nobody_keeps_count_of_saved_tensors(),
        ):
            if self.before is None:
                values = self.call.output
                self.version = _version(values)
                return values
            was_made = self.call.is_made
            values = self.step(self.before.values)
            if values.untyped_storage().data_ptr() == self.before.values.untyped_storage().data_ptr():
                self.version = self.before.version  # a view, which what is written to the whole changes too
                return values
            if was_made and self.before.has_changed is not False:
                values = self.step(self.before.fresh())  # a copy is of what there was when it was made
            self.version = _version(values)
            return values

    @property
    def has_changed(self) -> bool | None:
        """Whether somebody has written to the values since they were made; None where nobody knows."""
        version = _version(self.values)
        return None if version is None else version != self.version

    def fresh(self) -> Tensor:
        """The values before anybody wrote to them, computed anew and not kept."""
        return self.call.compute() if self.before is None else self.step(self.before.fresh())

    def compute(self) -> Tensor:
        """The values, computed anew: where a graph of those that are kept would lead nowhere."""
        if self.call.is_made and self.has_changed:
            raise RuntimeError(
                "logits were changed in place before an autograd Function, or C++, has read them: it would read them, "
                "and their gradient, as they were. Hand it a copy, as logits.clone()"
            )
        return self.fresh()

    def then(self, function, arguments, **changes) -> Tensor:
        given = {"input": self.input, "dtype": self.dtype, "inner": self.inner, "outer": self.outer, **changes}
        return _place(_Later(self.call, **given, before=self, step=lambda values: function(values, *arguments)))


class _Place(torch.autograd.Function):
    """The place in the graph of logits without values, for what reads them past __torch_function__."""

    @staticmethod
    def forward(ctx, later, *tensors):
        ctx.later = later
        logits = Tensor._make_wrapper_subclass(LinearLogits, later.shape, dtype=later.dtype, device=later.input.device)
        logits.later = later
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tensors = ctx.later.call.tensors
        with torch.enable_grad():
            values = ctx.later.compute()
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(values, wanted, grad_output))
        return None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


def _place(later: _Later) -> Tensor:
    with torch.set_grad_enabled(later.has_grad):
        return _Place.apply(later, *later.call.tensors)


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _identity(tensor: Tensor) -> tuple:
    """Another where the tensor has been written to or has another storage. One storage may move, as FSDP's do."""
    return _version(tensor), tensor.untyped_storage()._cdata, tensor.shape, tensor.dtype


def _nobody_keeps_count_of_saved_tensors():
    """A checkpoint runs its function again, and counts; the second time, values that are kept save nothing."""
    if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


# --- Answers without values, or NotImplemented -----------------------------------------------------------------------


def _needs_values(function, logits, *args, **kwargs):
    return NotImplemented


def _cast(function, logits, *args, **kwargs):
    if kwargs or args not in ((), (torch.float32,)):
        return NotImplemented
    return logits if logits.dtype == torch.float32 else logits.later.then(function, args, dtype=torch.float32)


def _copied(function, logits, *args, **kwargs):
    return NotImplemented if args or kwargs else logits.later.then(function, args)


def _reshaped(function, logits, *args, **kwargs):
    if kwargs or not all(isinstance(arg, (int, tuple, list)) for arg in args):
        return NotImplemented
    shape = function(torch.empty(logits.shape, device="meta"), *args).shape
    if len(shape) < 2 or shape[-1] != logits.shape[-1]:
        return NotImplemented
    input = logits.later.input
    return logits.later.then(function, args, input=input.reshape(*shape[:-1], input.shape[-1]))


def _sliced(function, logits, index):
    """Slices of rows that keep all classes: ``[:, :-1]``, ``[:, :-1, :]`` and ``[..., :-1, :]`` of three dimensions."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(each, slice) or each is ... for each in index):
        return NotImplemented
    everything = (slice(None),)
    of_classes = index[-1:] if index[:1] == (...,) or len(index) == logits.dim() else everything
    has_classes = of_classes == everything and ... not in index[1:]
    return logits.later.then(function, (index,), input=logits.later.input[index]) if has_classes else NotImplemented


def _scaled(function, logits, *args, **kwargs):
    if kwargs or len(args) != 1 or type(args[0]) not in (int, float) or not 0 < args[0] < math.inf:
        return NotImplemented
    factor = args[0] if function in _MULTIPLICATIONS else 1 / args[0]
    which = "inner" if logits.later.outer is None else "outer"
    return logits.later.then(function, args, **{which: factor * getattr(logits.later, which)})


def _bent(function, logits, *args, **kwargs):
    if args or kwargs or logits.later.outer is not None:
        return NotImplemented
    return logits.later.then(function, args, outer=1.0)


def _cross_entropy(function, logits, target, *args, **kwargs):
    later, call = logits.later, logits.later.call
    bound = _SIGNATURE.bind(logits, target, *args, **kwargs).arguments
    options = {name: value for name, value in bound.items() if value is not _SIGNATURE.parameters[name].default}
    del options["input"], options["target"]
    asked = {name: value for name, value in options.items() if name not in _HINTS}
    has_graph = logits.requires_grad or not torch.is_grad_enabled()
    if logits.dim() != 2 or target.is_floating_point() or not asked.keys() <= _OPTIONS or not has_graph:
        return NotImplemented
    call.check()
    call.has_loss |= torch.is_grad_enabled()
    casts = torch.is_autocast_enabled(call.device)
    with torch.autocast(call.device, call.dtype, enabled=call.dtype in HALF):
        loss = functional.linear_cross_entropy(
            later.input,
            call.weight,
            target,
            linear_bias=call.bias,
            logit_scale=later.inner * (later.outer or 1.0),
            logit_softcap=later.outer,
            **asked,
        )
    return loss.to(torch.float32 if casts and later.dtype in HALF else later.dtype)


def _watched(function, logits, *args, **kwargs):
    """The gradient of the logits, which a loss that was computed without them does not have."""
    if not logits.later.call.has_loss:
        return NotImplemented
    if function is Tensor.register_hook and args and _is_of_torch(args[0]):
        logits.later.call.hooks.append(args[0])
        return None
    raise RuntimeError(
        f"{function.__name__} on logits of which a loss was computed before: that loss has no gradient of the logits. "
        "Read the logits, or call this, before the loss is computed"
    )


def _is_of_torch(hook) -> bool:
    """FSDP and its like wait with their hooks for the first of all outputs that gets a gradient; the loss is one."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"


_SIGNATURE = inspect.signature(functional.cross_entropy)
_HINTS = {"grad_in_forward", "grad_scale", "inplace"}  # which change no result
_OPTIONS = {"weight", "ignore_index", "reduction", "label_smoothing", "z_loss", "denominator", "sample_weight"}
_MULTIPLICATIONS = {Tensor.mul, torch.mul}
_ANSWERS: dict[Any, Callable] = {
    native.cross_entropy: _cross_entropy,
    functional.cross_entropy: _cross_entropy,
    Tensor.float: _cast,
    Tensor.to: _cast,
    Tensor.contiguous: _copied,
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    Tensor.flatten: _reshaped,
    Tensor.__getitem__: _sliced,
    Tensor.mul: _scaled,
    torch.mul: _scaled,
    Tensor.div: _scaled,
    torch.div: _scaled,
    Tensor.tanh: _bent,
    torch.tanh: _bent,
    Tensor.register_hook: _watched,
    Tensor.retain_grad: _watched,
}
_ASKS_FOR_NO_VALUES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf", "_base")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
}
