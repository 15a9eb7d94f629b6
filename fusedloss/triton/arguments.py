"""The arguments of a launch: the structs of csrc/kernels, by the same names. csrc/triton.cpp makes them.

A pointer is a tensor of one element, since Triton takes an address and a type from a tensor; the tensor's type stands
for the struct's dtype. What is absent is None.
"""

from dataclasses import dataclass
from enum import Enum

import torch

Pass = Enum("Pass", ["forward", "forward_with_gradient", "backward"])
Reduction = Enum("Reduction", ["none", "mean", "sum"])


@dataclass(frozen=True)
class Total:
    reduction: Reduction
    loss: torch.Tensor | None
    divisor: torch.Tensor | None

    @property
    def is_mean(self):
        return self.reduction is Reduction.mean


@dataclass(frozen=True)
class PositionTensor:
    data: torch.Tensor
    stride: int


# --- csrc/kernels/class_loss.h -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassShape:
    outer: int
    classes: int
    inner: int

    @property
    def positions(self):
        return self.outer * self.inner


@dataclass(frozen=True)
class ClassTensor:
    data: torch.Tensor
    outer_stride: int
    class_stride: int
    inner_stride: int


@dataclass(frozen=True)
class ClassFlow:
    grad_loss: PositionTensor | None
    divisor: torch.Tensor | None


@dataclass(frozen=True)
class ClassTarget:
    index: PositionTensor
    ignore_index: int


@dataclass(frozen=True)
class CrossEntropyArgs:
    device: torch.device
    shape: ClassShape
    logits: ClassTensor
    has_probabilities: bool
    target: ClassTarget | None
    probabilities: ClassTensor | None
    weight: torch.Tensor | None
    label_smoothing: float
    z_loss: float
    logit_softcap: float
    every_lse: bool
    row_max: torch.Tensor | None
    row_log_sum: torch.Tensor | None
    loss: PositionTensor | None
    lse: torch.Tensor | None
    total: Total
    flow: ClassFlow
    grad_lse: torch.Tensor | None
    grad_logits: ClassTensor | None
    grad_probabilities: ClassTensor | None


@dataclass(frozen=True)
class NllArgs:
    device: torch.device
    shape: ClassShape
    log_probs: ClassTensor
    target: ClassTarget
    weight: torch.Tensor | None
    loss: PositionTensor | None
    total: Total
    flow: ClassFlow
    grad_log_probs: ClassTensor | None


# --- csrc/kernels/elementwise.h ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementwiseShape:
    numel: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ElementwiseTensor:
    data: torch.Tensor
    linear: bool
    strides: tuple[int, ...]


@dataclass(frozen=True)
class ElementwiseFlow:
    grad_loss: ElementwiseTensor | None
    divisor: torch.Tensor | None


@dataclass(frozen=True)
class ElementwiseArgs:
    device: torch.device
    shape: ElementwiseShape
    input: ElementwiseTensor
    target: ElementwiseTensor
    weight: ElementwiseTensor | None
    pos_weight: ElementwiseTensor | None
    has_ignore_index: bool
    ignore_index: int
    loss: ElementwiseTensor | None
    total: Total
    flow: ElementwiseFlow
    grad_input: ElementwiseTensor | None
    grad_target: ElementwiseTensor | None


# --- csrc/kernels/cuda/cuda.h ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RescaleArgs:
    device: torch.device
    grad: torch.Tensor
    numel: int
    grad_output: torch.Tensor
    scale: torch.Tensor | None
    keep_zeros: bool
