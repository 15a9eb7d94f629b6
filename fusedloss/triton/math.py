"""The formulas: twins of csrc/math, function for function, by the same names and in the same order.

What each formula is, and where it comes from, stands there. Here is what Triton needs in place of C++: the accumulate
type is a tensor's own, a template parameter is a constexpr, a struct of two results is a tuple.
tests/test_triton_math.py compares the twins.
"""

import triton
import triton.language as tl

# --- portable.h ------------------------------------------------------------------------------------------------
#
# On the device the C++ side takes CUDA's functions; Triton has one for each that is accurate enough, but for exp and
# tanh, which are the C++ host's (there, the reductions and series are explained).

_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def number(value, dtype: tl.constexpr):
    """A number in a type. A Python float that meets a float64 would be one rounded to float32."""
    return tl.full((), value, dtype)


@triton.jit
def constant(value, like):
    """A number in the type of `like`."""
    return tl.full((), value, like.dtype)


@triton.jit
def converted(x, pointer):
    """x in the type of what a pointer points to."""
    if x.dtype == tl.float64 and pointer.dtype.element_ty == tl.bfloat16:
        return x.to(tl.float32).to(tl.bfloat16)  # no device converts this at once
    else:
        return x.to(pointer.dtype.element_ty)


@triton.jit
def larger(a, b):
    """The larger number; NaN in `a` is passed over."""
    return tl.where(a > b, a, b)


@triton.jit
def clamp(a, low, high):
    """NaN in `a` wins."""
    raised = tl.where(a < low, low, a)
    return tl.where(raised > high, high, raised)


@triton.jit
def zero_if(condition, value):
    return tl.where(condition, 0.0, value)


@triton.jit
def quotient(a, b):
    """a / b, for a b that is neither denormal nor close to overflow."""
    return a / b


@triton.jit
def divide(a, b):
    """a / b, rounded once. C++ has an operator for it; Triton's is an approximation in float32."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


_LOG2_E = tl.constexpr(1.4426950408889634)

_EXP_SERIES_32: tl.constexpr = tl.constexpr(
    (0.5, 0.166665769896987757, 0.0416665546172045742, 0.00836317905272257737, 0.00139261835877134945)
)
_EXP_SERIES_64: tl.constexpr = tl.constexpr(
    (
        0.500000000000000102,
        0.166666666666666675,
        0.0416666666666241279,
        0.00833333333333006183,
        0.00138888889172137169,
        0.000198412698630536169,
        0.0000248015212959543751,
        2.75572684599970648e-6,
        2.76200884454097482e-7,
        2.51003854955103191e-8,
    )
)
_LOG1P_SERIES_32: tl.constexpr = tl.constexpr(
    (
        -0.499999995222237707,
        0.33333237346213987,
        -0.249967599082639252,
        0.199567079522518358,
        -0.163651528692055351,
        0.130333642382428156,
        -0.0913941377401492021,
        0.0493099734345496944,
        -0.0171842669824487093,
        0.00280164199280334992,
    )
)
_LOG1P_SERIES_64: tl.constexpr = tl.constexpr(
    (
        -0.49999999999999994,
        0.333333333333285468,
        -0.249999999993596206,
        0.199999999658224018,
        -0.166666656967697302,
        0.142856973681769039,
        -0.124998021936408679,
        0.111094697271044939,
        -0.0998994097833761753,
        0.0904403840581878174,
        -0.0816358369873179002,
        0.072060527838905025,
        -0.060245718496051139,
        0.0457183288742196421,
        -0.0300062489220241489,
        0.0161774482920837739,
        -0.0067614194988498022,
        0.0020308462484097632,
        -0.000387011110858030387,
        0.0000349649999951775279,
    )
)


@triton.jit
def polynomial(coefficients: tl.constexpr, COUNT: tl.constexpr, x):
    """coefficients[0] + coefficients[1] x + ..., the highest first."""
    result = constant(coefficients[COUNT - 1], x)
    for i in tl.static_range(1, COUNT):
        result = result * x + constant(coefficients[COUNT - 1 - i], x)
    return result


@triton.jit
def reduce_exp(x):
    """(biased_n, r): x = n ln 2 + r with |r| <= ln(2) / 2, and n + bias in the lowest bits of the mantissa."""
    if x.dtype == tl.float64:
        rounder = constant(6755399441055744.0 + 1023.0, x)
        high = constant(6.93147180369123816490e-01, x)
        low = constant(1.90821492927058770002e-10, x)
    else:
        rounder = constant(12582912.0 + 127.0, x)
        high = constant(0.693359375, x)
        low = constant(-2.12194440e-4, x)
    biased_n = x * constant(_LOG2_E, x) + rounder
    n = biased_n - rounder
    r = (x - n * high) - n * low
    return biased_n, r


@triton.jit
def exp_rest(r):
    """exp(r) - 1 for a reduced r."""
    if r.dtype == tl.float64:
        series = polynomial(_EXP_SERIES_64, 10, r)
    else:
        series = polynomial(_EXP_SERIES_32, 5, r)
    return (series * r + 1.0) * r


@triton.jit
def exp_scale(biased_n):
    """2^n, for n in the range of normal numbers."""
    if biased_n.dtype == tl.float64:
        return (biased_n.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
    else:
        return (biased_n.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0. Results below the smallest normal number are 0.

    tl.exp in float32 is an approximation of 2^(x log2(e)), whose product alone rounds off x times half a unit in the
    last place; the rest r of the reduction is small enough for it.
    """
    if x.dtype == tl.float64:
        return zero_if(x < constant(-708.396418532264, x), tl.exp(x))
    else:
        biased_n, r = reduce_exp(x)
        result = tl.exp2(r * constant(_LOG2_E, x)) * exp_scale(biased_n)
        return zero_if(x < -87.33654, result)


@triton.jit
def exp_roughly(x):
    """exp(x) for x <= 0, where half precision will hide what it loses."""
    return tl.exp(x)


@triton.jit
def times_exp(factor, x):
    """factor * exp(x) for x <= 0 where exp is normal, rounded about once."""
    biased_n, r = reduce_exp(x)
    rest = exp_rest(r)
    high = rest + 1.0
    low = rest - (high - 1.0)
    product = factor * high
    # An infinite factor stays one: times a low of 0 or less it would be NaN.
    finite = tl.abs(product) < _INFINITY
    return tl.where(finite, product + factor * low, product) * exp_scale(biased_n)


@triton.jit
def tanh(x):
    biased_n, r = reduce_exp(clamp(-2.0 * tl.abs(x), constant(-40.0, x), constant(0.0, x)))
    scale = exp_scale(biased_n)
    t = exp_rest(r) * scale + (scale - 1.0)
    result = divide(-t, t + 2.0)
    return tl.where(x < 0, -result, result)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]."""
    if x.dtype == tl.float64:
        series = polynomial(_LOG1P_SERIES_64, 20, x)
    else:
        series = polynomial(_LOG1P_SERIES_32, 10, x)
    return series * (x * x) + x


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-1, 1]."""
    y = 1.0 + x
    lost = x - (y - 1.0)
    return tl.where(y == 0, -_INFINITY, tl.log(y) + divide(lost, y))


# --- reduction.h -----------------------------------------------------------------------------------------------


@triton.jit
def reduced(is_mean: tl.constexpr, sum, divisor):
    if is_mean:
        return divide(sum, divisor)
    else:
        return sum


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


@triton.jit
def probability_mass(keep, spread, probability, weight):
    return weight * (keep * probability + spread)


@triton.jit
def entry_loss(shifted, log_sum, mass):
    return mass * (log_sum - shifted)


@triton.jit
def entry_loss_at_max(shifted, mass):
    return zero_if(shifted == 0, -mass * shifted)


@triton.jit
def z_term(lse, z_loss):
    return z_loss * lse * lse


@triton.jit
def normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss, HAS_Z: tl.constexpr):
    if HAS_Z:
        return grad_loss * (mass + 2.0 * z_loss * lse) + grad_lse
    else:
        return grad_loss * mass + grad_lse


@triton.jit
def logit_grad(e, softmax_grad, target_grad):
    return e * softmax_grad - target_grad


@triton.jit
def probability_grad(shifted, log_sum, grad_loss, keep, weight):
    return grad_loss * keep * weight * (log_sum - shifted)


@triton.jit
def soft_cap(x, cap):
    """(value, slope)"""
    t = tanh(divide(x, cap))
    return cap * t, (1.0 - t) * (1.0 + t)


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

    smaller = quotient(e, 1.0 + e)
    both = smaller * (negative + positive)
    slope = tl.where(x < 0, both - positive, negative - both) + (positive - positive)
    return loss, slope


@triton.jit
def bce_with_logits_target_grad(x, t, pos_weight, grad_loss):
    softplus = tl.where(x < 0, -x, 0.0) + log1p_unit(exp_nonpositive(-tl.abs(x)))
    weighted = tl.where(pos_weight == 1, 0.0, (pos_weight - 1.0) * softplus)
    return grad_loss * (weighted - x)


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
    return loss, quotient(p - t, tl.where(variance < least, least, variance))


@triton.jit
def bce_target_grad(p, t, pos_weight, grad_loss):
    return grad_loss * (log1p(-p) - tl.log(p))
