"""fusedloss in the models of Hugging Face transformers, whatever trains them.

    with fusedloss.integrations.transformers.apply(linear=True):
        trainer.train()

A model takes its loss from ``PreTrainedModel.loss_function``, which looks it up in transformers' LOSS_MAPPING. The
table stays as it is, since the Trainer compares with it; what is found there is exchanged afterwards.
"""

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fusedloss import functional
from fusedloss.integrations.linear_logits import HALF, linear_logits
from fusedloss.patching import patch

try:
    import transformers
    from transformers import PreTrainedModel
    from transformers.loss import loss_utils
except ImportError as error:
    raise ImportError(f"fusedloss.integrations.transformers needs transformers 5.24 or newer: {error}") from error


# --- transformers' losses, of the logits as they are; arguments are transformers' -------------------------------------


def fixed_cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
    """transformers' function of that name; 0, where that is NaN, if num_items_in_batch is 0 and no target counts."""
    denominator = num_items_in_batch
    if isinstance(denominator, Tensor):
        denominator = denominator.to(source.device)
    elif denominator == 0:  # as a number it is an error
        denominator = source.new_zeros((), dtype=torch.int64)
    loss = functional.cross_entropy(source, target, ignore_index=ignore_index, denominator=denominator)
    if isinstance(denominator, Tensor):
        return loss.view(denominator.shape)  # of a sum divided by it: (1), if DataParallel has scattered it
    return loss


def _in_float32(logits, target, *args, **kwargs):
    """The loss of ``logits.float()``, of half-precision logits without that copy."""
    if logits.dtype not in HALF or not torch.amp.is_autocast_available(logits.device.type):
        return fixed_cross_entropy(logits.float(), target, *args, **kwargs)
    with torch.autocast(logits.device.type, logits.dtype):
        return fixed_cross_entropy(logits, target, *args, **kwargs)


def ForCausalLMLoss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
):
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    return _in_float32(logits.reshape(-1, vocab_size), target, num_items_in_batch, ignore_index)


def ForMaskedLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
    target = labels.view(-1).to(logits.device)
    return _in_float32(logits.reshape(-1, vocab_size), target, num_items_in_batch, ignore_index)


def ForTokenClassification(logits, labels, config, **kwargs):
    return _in_float32(logits.view(-1, config.num_labels), labels.view(-1).to(logits.device), **kwargs)


# --- What takes the place of what -------------------------------------------------------------------------------------

_native_loss_function, _native_call = PreTrainedModel.loss_function, PreTrainedModel.__call__
_OURS: list[tuple[Any, Callable]] = [  # theirs, or None where there is none of that name
    (getattr(loss_utils, ours.__name__, None), ours)
    for ours in (fixed_cross_entropy, ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification)
]


def _loss_of(model):
    found = _native_loss_function.fget(model)
    return next((ours for native, ours in _OURS if native is found), found)


_loss_function = property(_loss_of, _native_loss_function.fset, _native_loss_function.fdel)


def _call(model, *args, **kwargs):
    """nn.Module.__call__, with an output layer that gives unread logits where a loss is to follow."""
    has_labels = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
    if not (has_labels and _linear) or torch.compiler.is_compiling():
        return _native_call(model, *args, **kwargs)
    with _unread(model.get_output_embeddings()):
        return _native_call(model, *args, **kwargs)


@contextmanager
def _unread(head):
    """Has a plain linear layer give logits that nobody has read yet, and leaves any other as it is."""
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)
    if is_plain:
        vars(head)["forward"] = lambda input: linear_logits(head, input)
    try:
        yield
    finally:
        if is_plain:
            del vars(head)["forward"]


_REPLACED = (
    (loss_utils, "fixed_cross_entropy", fixed_cross_entropy),
    (PreTrainedModel, "loss_function", _loss_function),
    (PreTrainedModel, "__call__", _call),
)


# --- When -------------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_in_force: set["apply"] = set()
_linear = False  # whether any of them is; another thread may change the set
_undo = ExitStack()  # gives back what is replaced; empty where nothing is


class apply:
    """Gives the models of transformers our losses, until :func:`unapply`, or until the end of a ``with`` block.

    Those of language models and of token classification read half-precision logits without a float32 copy and give the
    float32 loss that transformers gives; ``num_items_in_batch`` is the ``denominator`` of all. Models and losses that
    call torch's losses themselves get ours by :class:`fusedloss.patch`, which is in force meanwhile. Losses that are
    made of neither stay as they are: CTC, transducers, and the boxes and masks of detectors.

    Args:
        linear: whether a model that is called with ``labels`` or ``shift_labels`` leaves it to the loss to compute its
            logits, in parts (:func:`fusedloss.linear_cross_entropy`). ``outputs.logits`` is then a
            :class:`~fusedloss.integrations.linear_logits.LinearLogits`, computed when it is read. Output layers that
            are no ``nn.Linear`` of plain parameters (LoRA, quantised, sharded) and compiled models compute their logits
            as ever.

    Blocks may nest and overlap, in threads or not. It acts on the whole process.

    Raises:
        RuntimeError: this version of transformers has other losses than those that are replaced.
    """

    def __init__(self, *, linear: bool = False) -> None:
        self.linear = linear
        self._blocks = 0
        _change(_in_force.add, self)

    def __enter__(self) -> "apply":
        with _lock:
            self._blocks += 1
            _change(_in_force.add, self)
        return self

    def __exit__(self, *exception) -> None:
        with _lock:
            self._blocks -= 1
            if self._blocks == 0:
                _change(_in_force.discard, self)


def unapply() -> None:
    """Gives transformers its own losses back, however often :class:`apply` was called, in blocks or not."""
    _change(_in_force.clear)


def _change(change, *arguments) -> None:
    """Changes what is in force, and transformers with it."""
    global _linear
    with _lock:
        _check_losses()
        was_applied = bool(_in_force)
        change(*arguments)
        _linear = any(block.linear for block in _in_force)
        if was_applied and not _in_force:
            _undo.close()
        elif _in_force and not was_applied:
            _undo.enter_context(patch())
            for owner, name, ours in _REPLACED:
                _undo.callback(_give_back, owner, name, ours, vars(owner).get(name))
                setattr(owner, name, ours)


def _give_back(owner, name, ours, native) -> None:
    if vars(owner).get(name) is not ours:  # but somebody else's, which stays
        return
    if native is None:
        delattr(owner, name)
    else:
        setattr(owner, name, native)


def _check_losses() -> None:
    for native, ours in _OURS:
        parameters = [*inspect.signature(native).parameters] if native else "not there"
        if parameters != [*inspect.signature(ours).parameters]:
            raise RuntimeError(
                "fusedloss.integrations.transformers knows the losses of transformers 5.24; in "
                f"{transformers.__version__} {ours.__name__} is another: its parameters are {parameters}"
            )
