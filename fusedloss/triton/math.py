"""The formulas: twins of csrc/math, function for function, by the same names and in the same order.

What each formula is, and where it comes from, stands there. Here is what Triton needs in place of C++: the accumulate
type is a tensor's own, a template parameter is a constexpr, a struct is a NamedTuple, and of the functions in which an
`if` would be decided at run time some take `o`, which a kernel is compiled for (rows.py: Options).
tests/test_triton_math.py compares the twins.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedloss.triton.portable import (
    constant,
    divide,
    exp_nonpositive,
    exp_normal,
    fast_divide,
    log1p,
    log1p_unit,
    number,
    product,
    tanh,
    times_exp,
    zero_if,
)

_INFINITY = tl.constexpr(float("inf"))

# --- reduction.h -----------------------------------------------------------------------------------------------


@triton.jit
def reduced(is_mean: tl.constexpr, sum, divisor):
    if is_mean:
        return divide(sum, divisor)
    else:
        return sum


@triton.jit
def reduced_over(sum, denominator):
    return tl.where(sum == 0, sum, divide(sum, denominator))


@triton.jit
def rescaled(grad, factor, keep_zeros: tl.constexpr):
    if keep_zeros:
        return tl.where(grad == 0, 0.0, grad * factor)
    else:
        return grad * factor


# --- log_sum_exp.h ---------------------------------------------------------------------------------------------


@triton.jit
def finite_shift(max):
    return tl.where(max == -_INFINITY, 0.0, max)


@triton.jit
def rescale(sum, max, new_max):
    factor = exp_nonpositive(max - new_max)
    return sum * tl.where(max == new_max, 1.0, factor)


@triton.jit
def log_sum_exp(max, log_sum):
    return tl.where(max == _INFINITY, max, max + log_sum)


# --- cross_entropy.h -------------------------------------------------------------------------------------------


class RowOptions(NamedTuple):
    """As csrc/triton.cpp makes them. Kernels are handed them hidden (launch.py); formulas take float64 tensors."""

    label_smoothing: float
    z_loss: float
    logit_scale: float
    logit_softcap: float


class RowProblem(NamedTuple):
    """The numbers of it; `probabilities` and `dense` are o's."""

    keep: tl.tensor
    spread: tl.tensor
    spread_mass: tl.tensor
    z_loss: tl.tensor


@triton.jit
def row_problem(options, classes, weight_sum, o: tl.constexpr):
    spread = (options.label_smoothing / classes.to(tl.float64)).to(o.acc)
    spread_mass = number(0.0, o.acc)
    if o.dense and not o.probabilities:
        spread_mass = (spread.to(tl.float64) * weight_sum).to(o.acc)
    keep = 1.0 - options.label_smoothing
    return RowProblem(keep.to(o.acc), spread, spread_mass, options.z_loss.to(o.acc))


@triton.jit
def index_mass(problem, weight):
    return problem.keep * weight


@triton.jit
def row_mass(problem, target_mass, of_probabilities, o: tl.constexpr):
    if o.probabilities:
        return of_probabilities
    elif o.dense:
        return target_mass + problem.spread_mass
    else:
        return target_mass


@triton.jit
def probability_mass(problem, probability, weight):
    return weight * (problem.keep * probability + problem.spread)


@triton.jit
def entry_loss(shifted, log_sum, mass):
    return mass * (log_sum - shifted)


@triton.jit
def entry_loss_at_max(shifted, mass):
    return zero_if(shifted == 0, -mass * shifted)


@triton.jit
def times_gap(e, shifted):
    return -(e * zero_if(shifted < exp_normal(shifted), shifted))


class RowStatistics(NamedTuple):
    """The gap stands for nothing where the entropy is not wanted, the last two where not every class has mass."""

    max: tl.tensor
    sum: tl.tensor  # float64 beside an entropy, and so is the gap
    gap: tl.tensor
    dense_loss: tl.tensor
    mass: tl.tensor  # float64


@triton.jit
def relative_to(max, statistics, o: tl.constexpr):
    """Statistics relative to a maximum that is no smaller than their own. Those of one maximum are merged by adding."""
    sum = rescale(statistics.sum, statistics.max, max)
    gap = statistics.gap
    if o.entropy:
        wide = statistics.sum.dtype
        apart = finite_shift(max).to(wide) - finite_shift(statistics.max).to(wide)
        gap = rescale(gap + apart * statistics.sum, statistics.max, max)
    dense_loss = statistics.dense_loss
    if o.dense:
        apart = finite_shift(statistics.max) - finite_shift(max)
        dense_loss += entry_loss_at_max(apart, statistics.mass.to(o.acc))
    return RowStatistics(max, sum, gap, dense_loss, statistics.mass)


@triton.jit
def merge(parts, o: tl.constexpr):
    """C++ merges two parts. Here are many, along the last of two axes, which share the search for their maximum."""
    max = tl.max(parts.max, 1)
    parts = relative_to(max[:, None], parts, o)
    sum = tl.sum(parts.sum, 1)
    gap = sum
    if o.entropy:
        gap = tl.sum(parts.gap, 1)
    if o.dense:
        return RowStatistics(max, sum, gap, tl.sum(parts.dense_loss, 1), tl.sum(parts.mass, 1))
    else:
        return RowStatistics(max, sum, gap, sum, sum)


class FinishedRow(NamedTuple):
    max: tl.tensor
    log_sum: tl.tensor
    dense_loss: tl.tensor
    mass: tl.tensor
    gap: tl.tensor


@triton.jit
def finished(statistics, o: tl.constexpr):
    """From here on all is wanted in the accumulate type."""
    log_sum = tl.log(statistics.sum).to(o.acc)
    gap = log_sum
    if o.entropy:
        gap = divide(statistics.gap, statistics.sum).to(o.acc)
    return FinishedRow(statistics.max, log_sum, statistics.dense_loss, statistics.mass.to(o.acc), gap)


@triton.jit
def row_lse(row):
    """FinishedRow::lse."""
    return log_sum_exp(row.max, row.log_sum)


@triton.jit
def row_entropy(row):
    """FinishedRow::entropy."""
    return row.log_sum + row.gap


class RowTarget(NamedTuple):
    counts: tl.tensor
    mass: tl.tensor
    shifted: tl.tensor
    weight: tl.tensor  # stands for nothing where rows have none of their own


@triton.jit
def z_term(lse, z_loss):
    return z_loss * lse * lse


@triton.jit
def row_loss(problem, row, target, o: tl.constexpr):
    loss = entry_loss(target.shifted, row.log_sum, target.mass)
    if o.probabilities:
        loss += row.dense_loss + row.mass * row.log_sum
    elif o.dense:
        loss += problem.spread * row.dense_loss + problem.spread_mass * row.log_sum
    if o.has_z:
        loss += z_term(row_lse(row), problem.z_loss)
    if o.weighted:
        loss = target.weight * loss
    return tl.where(target.counts, loss, 0.0)


@triton.jit
def normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss, HAS_Z: tl.constexpr):
    if HAS_Z:
        return grad_loss * (mass + 2.0 * z_loss * lse) + grad_lse
    else:
        return grad_loss * mass + grad_lse


@triton.jit
def logit_grad(e, softmax_grad, target_grad):
    return e * softmax_grad - target_grad


class RowGradient(NamedTuple):
    """on_gap stands for nothing where the entropy gives no gradient."""

    factor: tl.tensor
    on_target: tl.tensor
    on_all: tl.tensor
    on_gap: tl.tensor


@triton.jit
def gradient_through(gradient, slope):
    """RowGradient::through."""
    on_target = gradient.on_target * slope
    return RowGradient(gradient.factor * slope, on_target, gradient.on_all * slope, gradient.on_gap * slope)


@triton.jit
def row_gradient(problem, target, mass, lse, grad_loss, grad_lse, o: tl.constexpr):
    g = tl.where(target.counts, grad_loss, 0.0)
    on_all = g * problem.spread
    if o.probabilities:
        on_all = g
    factor = normaliser_grad(g, grad_lse, tl.where(target.counts, mass, 0.0), lse, problem.z_loss, o.has_z)
    return RowGradient(factor, g * target.mass, on_all, number(0.0, o.acc))


@triton.jit
def add_entropy_grad(row, grad_entropy, gap):
    """The sum; C++ adds in place."""
    return RowGradient(row.factor - grad_entropy * gap, row.on_target, row.on_all, row.on_gap + grad_entropy)


@triton.jit
def times_factor(e, factor, on_gap, shifted):
    return e * factor + on_gap * times_gap(e, shifted)


@triton.jit
def over_sum(x, log_sum):
    return tl.where(log_sum >= 0, times_exp(x, -log_sum), log_sum - log_sum)


@triton.jit
def probability_grad(shifted, log_sum, grad_loss, keep, weight):
    return grad_loss * keep * weight * (log_sum - shifted)


@triton.jit
def soft_cap(x, cap):
    """(value, slope)"""
    t = tanh(divide(x, cap))
    return product(cap, t), (1.0 - t) * (1.0 + t)


@triton.jit
def seen_logit(x, scale, cap, o: tl.constexpr):
    """(value, slope). The value is rounded before anything is subtracted from it: from a maximum that is rounded, a
    product that is not would differ where both are the same logit's."""
    slope = constant(1.0, x)
    if o.scaled:
        x = product(x, scale)
        slope = scale
    if o.capped:
        x, cap_slope = soft_cap(x, cap)
        slope *= cap_slope
    return x, slope


# --- nll.h -----------------------------------------------------------------------------------------------------


@triton.jit
def nll_loss(log_probability, weight):
    return -weight * log_probability


@triton.jit
def nll_grad(grad_loss, weight):
    return -weight * grad_loss


# --- bce_with_logits.h -----------------------------------------------------------------------------------------


@triton.jit
def bce_with_logits_in_domain(value):
    return tl.full(value.shape, True, tl.int1)


@triton.jit
def bce_with_logits_evaluate(x, t, pos_weight):
    """(loss, slope)"""
    e = exp_nonpositive(-tl.abs(x))
    positive = pos_weight * t
    negative = 1.0 - t

    tail = log1p_unit(e)
    positive_part = 0.5 * x + 0.5 * tl.abs(x)
    negative_part = tl.where(x < 0, -x, 0.0)
    loss = negative * (positive_part + tail) + positive * (negative_part + tail)

    smaller = fast_divide(e, 1.0 + e)
    both = smaller * (negative + positive)
    slope = tl.where(x < 0, both - positive, negative - both) + (positive - positive)
    return loss, slope


@triton.jit
def bce_with_logits_target_grad(x, t, pos_weight, grad_loss):
    tail = log1p_unit(exp_nonpositive(-tl.abs(x)))
    weighted = tl.where(x < 0, pos_weight * (tail - x) - tail, (pos_weight - 1.0) * tail - x)
    return grad_loss * tl.where(pos_weight == 1, 0.0 - x, weighted)


# --- bce.h -----------------------------------------------------------------------------------------------------


@triton.jit
def bce_in_domain(value):
    return (value >= 0) & (value <= 1)


@triton.jit
def at_least_minus_100(value):
    return tl.where(value < -100.0, -100.0, value)


@triton.jit
def bce_evaluate(p, t, pos_weight):
    """(loss, slope)"""
    least = constant(9.999999960041972e-13, p)  # 1e-12 as a float
    variance = (1.0 - p) * p
    loss = (t - 1.0) * at_least_minus_100(log1p(-p)) - t * at_least_minus_100(tl.log(p))
    return loss, fast_divide(p - t, tl.where(variance < least, least, variance))


@triton.jit
def bce_target_grad(p, t, pos_weight, grad_loss):
    return grad_loss * (log1p(-p) - tl.log(p))
