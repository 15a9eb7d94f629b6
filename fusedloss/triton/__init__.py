"""The Triton kernels: the operators of torch.ops.fusedloss_triton.

The way down: csrc/ops checks and allocates for every backend alike; for this one, csrc/triton.cpp calls a function of
this package with the arguments that a CUDA kernel would get. The losses are cross_entropy.py, nll.py and elementwise.py
(binary cross entropy), over math.py, the formulas.

Importing this package imports Triton.
"""

from functools import partial
from types import SimpleNamespace

from fusedloss._library import _C
from fusedloss.triton import cross_entropy, elementwise, nll, rescale

_C.install_triton(
    SimpleNamespace(
        cross_entropy=cross_entropy.launch,
        nll=nll.launch,
        rescale=rescale.launch,
        **{name: partial(elementwise.launch, loss) for name, loss in elementwise.LOSSES.items()},
    )
)
