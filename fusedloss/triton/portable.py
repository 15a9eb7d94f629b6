"""Functions of a number: twins of csrc/math/portable.h, by the same names.

On the device the C++ side takes CUDA's functions. Triton has one for each that is accurate enough, but for exp and
tanh, which are the C++ host's: their reductions and series are explained there.
"""

import triton
import triton.language as tl

_INFINITY = tl.constexpr(float("inf"))


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
def max_ignoring_nan(a, b):
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
def product(a, b):
    """a * b, rounded once. A compiler is free to take an operator's, unrounded, into the addition that follows."""
    return tl.fma(a, b, constant(0.0, a))


@triton.jit
def fast_divide(a, b):
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
def exp_normal(x):
    """Below this number exp is denormal, in the type of x."""
    if x.dtype == tl.float64:
        return constant(-708.396418532264, x)
    else:
        return constant(-87.33654, x)


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0. Results below the smallest normal number are 0.

    tl.exp in float32 is an approximation of 2^(x log2(e)), whose product alone rounds off x times half a unit in the
    last place; the rest r of the reduction is small enough for it.
    """
    if x.dtype == tl.float64:
        return zero_if(x < exp_normal(x), tl.exp(x))
    else:
        biased_n, r = reduce_exp(x)
        result = tl.exp2(r * constant(_LOG2_E, x)) * exp_scale(biased_n)
        return zero_if(x < exp_normal(x), result)


@triton.jit
def fast_exp(x):
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
