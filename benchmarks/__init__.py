"""How fast the losses are, beside native torch, torch.compile and a plain copy: python -m benchmarks."""
