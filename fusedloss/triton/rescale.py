"""A gradient that was written in forward, once the grad_output is known: one launch, which writes nothing where it is
what forward has assumed."""

import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.launch import accumulate_type, ceil_div, index_type, kernel, start
from fusedloss.triton.portable import converted

_BLOCK = 2048


@kernel
def _rescale(
    grad,
    grad_output,
    scale,
    numel: tl.int64,
    KEEP_ZEROS: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(grad_output).to(tl.float64)
    if scale is not None:
        factor = factor / tl.load(scale)
    if factor != 1.0:
        i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        # A block that is full has no mask, so that 16 bytes are moved at once whatever the number of elements.
        if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel:
            values = math.rescaled(tl.load(grad + i).to(ACC), factor.to(ACC), KEEP_ZEROS)
            tl.store(grad + i, converted(values, grad))
        else:
            values = math.rescaled(tl.load(grad + i, mask=i < numel).to(ACC), factor.to(ACC), KEEP_ZEROS)
            tl.store(grad + i, converted(values, grad), mask=i < numel)


def launch(args):
    """Starts the kernel."""
    if args.numel == 0:
        return
    pointers = args.grad, args.grad_output, args.scale
    constants = {"KEEP_ZEROS": args.keep_zeros, "ACC": accumulate_type(args.grad), "INDEX": index_type(args.numel)}
    start(_rescale, ceil_div(args.numel, _BLOCK), *pointers, args.numel, BLOCK=_BLOCK, **constants)
