"""How kernels are declared, started, and given memory; what the device is like."""

import functools
import struct

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # kernels are declared for one or the other, when they are imported


def kernel(function):
    """Declares a kernel: like triton.jit, with device_assert in force, and compiled for types and constexprs alone.

    Numbers are annotated with their type and not specialised: Triton would compile once for 1, once for multiples of
    16, once for each other number; and it would take a float for a float32. In a NamedTuple it does so whatever is
    annotated, so that a number is there `hidden`, and a float is two.
    """
    numbers = [name for name, kind in function.__annotations__.items() if kind is tl.int64]
    return triton.jit(function, debug=True, do_not_specialize=numbers)


_HIDING = 2**62 + 1
_HIDDEN = tl.constexpr(_HIDING)


def hidden(number):
    """A number of 0 to 2^60 as one that is neither 1 nor a multiple of 16, and takes 64 bits."""
    return number * 2 + _HIDING


@triton.jit
def shown(number):
    """What `hidden` has hidden."""
    return (number - _HIDDEN) >> 1


@functools.lru_cache
def hidden_floats(numbers):
    """A NamedTuple of float64 numbers; of each, the two halves of its bits."""
    bits = struct.pack(f"<{len(numbers)}d", *numbers)
    return numbers._make((hidden(low), hidden(high)) for low, high in struct.iter_unpack("<II", bits))


@triton.jit
def shown_floats(numbers):
    """What `hidden_floats` has hidden, as a tuple without names."""
    floats = ()
    for i in tl.static_range(len(numbers)):
        bits = shown(numbers[i][0]) | (shown(numbers[i][1]) << 32)
        floats += (bits.to(tl.float64, bitcast=True),)
    return floats


# device_assert alone is wanted of debug=True: checking each addition for an overflow would be slow. A product and a sum
# are one instruction with one rounding, which Triton warns from 3.9 on that it will no longer take for granted.
COMPILED_WITH = {"sanitize_overflow": False, "enable_fp_fusion": True}


def start(function, programs, *arguments, warps=4, **constants):
    """Starts a kernel of so many programs on the current stream; warps of 32 threads each."""
    if programs > 0:
        count = max(warps * 32 // warp_size(), 1)
        function[(programs,)](*arguments, **constants, num_warps=count, **COMPILED_WITH)


@functools.cache
def warp_size():
    """64 on some AMD GPUs, where as many warps as on others would be too many threads."""
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def accumulate_type(pointer):
    return tl.float64 if pointer.dtype == torch.float64 else tl.float32


def index_type(count):
    """The type of a number below count: 32 bits where they do, since a division of 64 takes several times as long."""
    return tl.int32 if count < 2**30 else tl.int64


def workspace(device, count, dtype=torch.float64):
    return torch.empty(count, dtype=dtype, device=device)


@functools.cache
def multiprocessors(device):
    if device.type == "cpu":  # the interpreter's
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count  # CUDA and HIP, or XPU


def ceil_div(a, b):
    return -(-a // b)


def next_power_of_2(count):
    return 1 << max(count - 1, 0).bit_length()
