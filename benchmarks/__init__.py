"""How fast the losses are, beside native torch, torch.compile and a plain copy: python -m benchmarks."""

import os

# Below this level torch's profiler, which counts the memory of a CPU, prints lines of its own into the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
