"""The arguments of a launch: the structs of csrc/kernels, by the same names. csrc/triton.cpp makes them.

A pointer is a tensor of one element, since Triton takes an address and a type from a tensor; the tensor's type stands
for the struct's dtype. What is absent is None. These are NamedTuples: frozen dataclasses would take three times as long
to make, which is microseconds of each call.
"""

from enum import Enum
from typing import NamedTuple

import torch

from fusedloss.triton.math import RowOptions

Pass = Enum("Pass", ["forward", "forward_with_gradient", "backward"])
Reduction = Enum("Reduction", ["none", "mean", "sum"])


class Total(NamedTuple):
    reduction: Reduction
    loss: torch.Tensor | None
    divisor: torch.Tensor | None
    denominator: torch.Tensor | None = None

    @property
    def is_mean(self):
        return self.reduction is Reduction.mean


class PositionTensor(NamedTuple):
    data: torch.Tensor
    stride: int


# --- csrc/kernels/class_loss.h -----------------------------------------------------------------------------------


class ClassShape(NamedTuple):
    outer: int
    classes: int
    inner: int

    @property
    def positions(self):
        return self.outer * self.inner


class ClassTensor(NamedTuple):
    data: torch.Tensor
    outer_stride: int
    class_stride: int
    inner_stride: int


class ClassTarget(NamedTuple):
    index: PositionTensor  # type: ignore[assignment]  # hides a method of tuples, which nothing calls
    ignore_index: int


class CrossEntropyArgs(NamedTuple):
    device: torch.device
    options: RowOptions
    shape: ClassShape
    logits: ClassTensor
    first_class: int
    all_classes: int
    has_probabilities: bool
    target: ClassTarget | None
    probabilities: ClassTensor | None
    weight: torch.Tensor | None
    sample_weight: PositionTensor | None
    every_row: bool
    row_max: torch.Tensor | None
    row_log_sum: torch.Tensor | None
    row_gap: torch.Tensor | None
    row_mass: torch.Tensor | None
    loss: PositionTensor | None
    lse: torch.Tensor | None
    entropy: torch.Tensor | None
    argmax: torch.Tensor | None
    total: Total
    grad_loss: PositionTensor | None
    grad_divisor: torch.Tensor | None
    grad_lse: torch.Tensor | None
    grad_entropy: torch.Tensor | None
    grad_logits: ClassTensor | None
    grad_probabilities: ClassTensor | None


class NllArgs(NamedTuple):
    device: torch.device
    shape: ClassShape
    log_probs: ClassTensor
    target: ClassTarget
    weight: torch.Tensor | None
    loss: PositionTensor | None
    total: Total
    grad_loss: PositionTensor | None
    grad_divisor: torch.Tensor | None
    grad_log_probs: ClassTensor | None


# --- csrc/kernels/elementwise.h ----------------------------------------------------------------------------------


class ElementwiseShape(NamedTuple):
    numel: int
    sizes: tuple[int, ...]


class ElementwiseTensor(NamedTuple):
    data: torch.Tensor
    linear: bool
    strides: tuple[int, ...]


class ElementwiseArgs(NamedTuple):
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
    grad_loss: ElementwiseTensor | None
    grad_divisor: torch.Tensor | None
    grad_input: ElementwiseTensor | None
    grad_target: ElementwiseTensor | None


# --- csrc/kernels/cuda/cuda.h ------------------------------------------------------------------------------------


class RescaleArgs(NamedTuple):
    device: torch.device
    grad: torch.Tensor
    numel: int
    grad_output: torch.Tensor
    scale: torch.Tensor | None
    keep_zeros: bool
