"""A gradient that was written in forward, once the grad_output is known: one launch, which writes nothing where it is
what forward has assumed."""

import triton.language as tl

from fusedloss.triton.launch import accumulate_type, ceil_div, index_type, kernel, start

_BLOCK = 2048


@kernel
def _rescale(grad, grad_output, assumed, numel: tl.int64, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(grad_output).to(tl.float64)
    if assumed is not None:
        factor = factor / tl.load(assumed).to(tl.float64)
    if factor != 1.0:
        i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(grad + i, mask=i < numel).to(ACC) * factor.to(ACC)
        tl.store(grad + i, values.to(grad.dtype.element_ty), mask=i < numel)


def launch(args):
    """Starts the kernel."""
    pointers = args.grad, args.grad_output, args.assumed
    types = {"ACC": accumulate_type(args.grad), "INDEX": index_type(args.numel)}
    start(_rescale, ceil_div(args.numel, _BLOCK), *pointers, args.numel, BLOCK=_BLOCK, **types)
