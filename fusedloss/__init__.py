"""Fused losses for PyTorch: drop-in cross entropy, NLL and binary cross entropy.

The functions have the signatures of torch.nn.functional, the modules those of torch.nn. The way down from here:
modules.py -> functional.py -> the operators in csrc/register.cpp -> csrc/ops -> csrc/kernels -> csrc/math.
"""

from fusedloss import decompositions, reference
from fusedloss._library import build_info
from fusedloss.backend import backends, use_backend
from fusedloss.calls import report
from fusedloss.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    nll_loss,
    token_log_probs,
)
from fusedloss.modules import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss, NLLLoss
from fusedloss.patching import patch, replace_losses, unpatch

__version__ = build_info()["version"]

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "backends",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "build_info",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "nll_loss",
    "patch",
    "reference",
    "replace_losses",
    "report",
    "token_log_probs",
    "unpatch",
    "use_backend",
]

decompositions.register()
