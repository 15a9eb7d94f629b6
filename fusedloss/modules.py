"""The losses as modules: torch.nn's own classes with another forward.

Subclasses, so that isinstance, repr, state_dict, pickling and the constructor's behaviour are native's. What fusedloss
adds is keyword-only. Its defaults are class attributes: a native module whose class is exchanged for one of these
(fusedloss.replace_losses), or one that was pickled earlier, works without being constructed again. TorchScript leaves
their forward to Python: a scripted model may hold and call them, and can be saved if it does not call them.
"""

import torch
from torch import Tensor, nn

from fusedloss import functional


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss`; the options are those of :func:`fusedloss.functional.cross_entropy`."""

    z_loss: float = 0.0
    logit_softcap: float | None = None
    return_lse: bool = False
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    inplace: bool = False
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        return_lse: bool = False,
        grad_in_forward: bool | str = "auto",
        grad_scale: float | Tensor | None = None,
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.logit_softcap = logit_softcap
        self.return_lse = return_lse
        self.grad_in_forward = grad_in_forward
        self.grad_scale = grad_scale
        self.inplace = inplace
        self.backend = backend

    @torch.jit.ignore
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
            return_lse=self.return_lse,
            grad_in_forward=self.grad_in_forward,
            grad_scale=self.grad_scale,
            inplace=self.inplace,
            backend=self.backend,
        )


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss`; the options are those of :func:`fusedloss.functional.nll_loss`."""

    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        self.backend = backend

    @torch.jit.ignore
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss`; the options are those of
    :func:`fusedloss.functional.binary_cross_entropy_with_logits`."""

    ignore_index: int | None = None
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    inplace: bool = False
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        grad_in_forward: bool | str = "auto",
        grad_scale: float | Tensor | None = None,
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.ignore_index = ignore_index
        self.grad_in_forward = grad_in_forward
        self.grad_scale = grad_scale
        self.inplace = inplace
        self.backend = backend

    @torch.jit.ignore
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            grad_in_forward=self.grad_in_forward,
            grad_scale=self.grad_scale,
            inplace=self.inplace,
            backend=self.backend,
        )


class BCELoss(nn.BCELoss):
    """:class:`torch.nn.BCELoss`; the options are those of :func:`fusedloss.functional.binary_cross_entropy`."""

    ignore_index: int | None = None
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        ignore_index: int | None = None,
        grad_in_forward: bool | str = "auto",
        grad_scale: float | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.grad_in_forward = grad_in_forward
        self.grad_scale = grad_scale
        self.backend = backend

    @torch.jit.ignore
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            grad_in_forward=self.grad_in_forward,
            grad_scale=self.grad_scale,
            backend=self.backend,
        )
