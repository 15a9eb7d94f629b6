"""Triton's interpreter, fit for these tests.

Kernels are interpreted with NumPy where there is no GPU (TRITON_INTERPRET=1). Five things are mended here: conversions
to bfloat16, which the interpreter truncates where a GPU rounds to the nearest; device_assert, which it passes over;
NumPy's warnings of infinities and NaN, which are right answers here; bounds of loops, arrays of one element that
Triton 3.6 takes for integers, and NumPy since 2.4 does not; and a truth value for a whole block, which becomes numbers
that Triton 3.9 refuses as a mask.
"""

import dataclasses
import warnings

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}


def _convert(data, input_dtype, output_dtype, rounding_mode):
    """Bits of one floating-point type from those of another, as torch rounds."""
    tensor = torch.from_numpy(np.ascontiguousarray(data).view(_bits(input_dtype)))
    converted = tensor.view(_TYPES[input_dtype]).to(_TYPES[output_dtype])
    bits = converted.view(getattr(torch, f"int{output_dtype.primitive_bitwidth}")).numpy()
    return bits.view(getattr(np, f"uint{output_dtype.primitive_bitwidth}")).reshape(data.shape)


def _bits(dtype):
    return getattr(np, f"int{dtype.primitive_bitwidth}")


def _quietly(call):
    def quiet(*arguments, **options):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return call(*arguments, **options)

    return quiet


_patch_tensors = interpreter._patch_lang_tensor


def _patch_tensors_and_bounds(tensor, scope):
    _patch_tensors(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _splat(self, type, value):
    first = np.ravel(value.data)[0]
    return interpreter.TensorHandle(np.full(type.shape, first, dtype=value.data.dtype), value.dtype.scalar)


def mend():
    interpreter.InterpreterBuilder.create_splat = _splat
    interpreter._patch_lang_tensor = _patch_tensors_and_bounds
    interpreter._convert_float = _convert
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _quietly(interpreter.GridExecutor.__call__)
