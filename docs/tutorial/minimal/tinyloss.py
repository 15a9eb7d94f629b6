import _tinyloss
import torch
from torch.autograd.function import once_differentiable


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return _tinyloss.forward(logits, target)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return _tinyloss.backward(grad_output, *ctx.saved_tensors), None


cross_entropy = CrossEntropy.apply
