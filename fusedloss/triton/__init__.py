"""The Triton kernels: the operators of torch.ops.fusedloss_triton.

The way down: csrc/ops checks and allocates for every backend alike; for this one, csrc/triton.cpp calls a function of
this package with the arguments that a CUDA kernel would get. The losses are cross_entropy.py, nll.py and elementwise.py
(binary cross entropy), over math.py, the formulas.

Importing this package imports Triton.
"""

from types import SimpleNamespace

from fusedloss import _C
from fusedloss.triton.cross_entropy import cross_entropy
from fusedloss.triton.elementwise import bce, bce_with_logits
from fusedloss.triton.nll import nll
from fusedloss.triton.rescale import rescale

_C.install_triton(
    SimpleNamespace(cross_entropy=cross_entropy, nll=nll, bce=bce, bce_with_logits=bce_with_logits, rescale=rescale)
)
