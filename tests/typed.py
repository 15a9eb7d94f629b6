"""What a type checker makes of calls and modules. Nothing runs this file: test_typing.py hands it to mypy.

An error that must be found is marked with the code that mypy has for it; a mark where there is no error is one too.
"""

from torch import Tensor, nn
from typing_extensions import assert_type

import fusedloss
from fusedloss.functional import Answers


def returned(x: Tensor, t: Tensor, return_lse: bool) -> None:
    assert_type(fusedloss.cross_entropy(x, t), Tensor)
    assert_type(fusedloss.cross_entropy(x, t, None, z_loss=1e-4, return_lse=False), Tensor)
    assert_type(fusedloss.cross_entropy(x, t, reduction="sum", return_lse=True), tuple[Tensor, Tensor])
    assert_type(fusedloss.cross_entropy(x, t, return_lse=return_lse), Answers)
    assert_type(fusedloss.cross_entropy(x, t, return_entropy=True, denominator=8), tuple[Tensor, Tensor])
    assert_type(fusedloss.cross_entropy(x, t, return_lse=True, return_argmax=True), tuple[Tensor, Tensor, Tensor])
    every = fusedloss.cross_entropy(x, t, sample_weight=x, return_lse=True, return_entropy=True, return_argmax=True)
    assert_type(every, tuple[Tensor, Tensor, Tensor, Tensor])
    assert_type(fusedloss.token_log_probs(x, t, logit_scale=0.7), Tensor)
    assert_type(fusedloss.token_log_probs(x, t, return_entropy=True), tuple[Tensor, Tensor])
    fusedloss.cross_entropy(x, t, grad_in_forward=True, grad_scale=0.5, inplace=True, backend="triton").backward()
    assert_type(fusedloss.nll_loss(x, t, reduction="none"), Tensor)
    assert_type(fusedloss.binary_cross_entropy_with_logits(x, t, pos_weight=x, ignore_index=-1), Tensor)
    assert_type(fusedloss.binary_cross_entropy(x, t, grad_in_forward="auto"), Tensor)


def refused(x: Tensor, t: Tensor) -> None:
    fusedloss.cross_entropy(x, t, return_lse=True).backward()  # type: ignore[attr-defined]
    fusedloss.cross_entropy(x, t, backend="gpu")  # type: ignore[call-overload]
    fusedloss.cross_entropy(x, t, zloss=1e-4)  # type: ignore[call-overload]
    fusedloss.cross_entropy(x, t, return_lse=True, zloss=1e-4)  # type: ignore[call-overload]
    fusedloss.nll_loss(x, t, reduction="average")  # type: ignore[arg-type]
    fusedloss.binary_cross_entropy(x, t, grad_in_forward="always")  # type: ignore[arg-type]
    fusedloss.CrossEntropyLoss(denominator=8)  # type: ignore[call-arg]
    fusedloss.CrossEntropyLoss(reduction="average")  # type: ignore[arg-type]
    fusedloss.BCELoss(zloss=1e-4)  # type: ignore[call-arg]
    fusedloss.LinearCrossEntropyLoss(8, 4, memory="little")  # type: ignore[arg-type]
    fusedloss.LinearCrossEntropyLoss(8, 4, denominator=8)  # type: ignore[call-arg]
    fusedloss.LinearCrossEntropyLoss(8, 4, (2,))  # type: ignore[call-arg]
    fusedloss.use_backend("gpu")  # type: ignore[arg-type]


def modules(x: Tensor) -> None:
    loss = fusedloss.CrossEntropyLoss(x, label_smoothing=0.1, z_loss=1e-4, grad_in_forward="auto", backend="cpu")
    assert_type(loss, fusedloss.CrossEntropyLoss)
    assert_type(loss.z_loss, float)
    assert_type(loss.grad_scale, float | Tensor | None)
    assert_type(fusedloss.BCEWithLogitsLoss(pos_weight=x).ignore_index, int | None)
    native: nn.CrossEntropyLoss = loss
    linear = fusedloss.LinearCrossEntropyLoss(8, 4, out_features=(2,), weight=x, z_loss=1e-4, memory=2**30)
    assert_type(linear, fusedloss.LinearCrossEntropyLoss)
    assert_type(linear.memory, int | str)
    assert_type(linear.linear, nn.Linear)
    native_linear: nn.LinearCrossEntropyLoss = linear
    fusedloss.replace_losses(native_linear)
    assert_type(fusedloss.replace_losses(native), nn.Module)
    with fusedloss.patch() as patch, fusedloss.use_backend(None) as backend:
        assert_type(patch, fusedloss.patch)
        assert_type(backend, fusedloss.use_backend)
    assert_type(fusedloss.backends(), dict[str, str])
