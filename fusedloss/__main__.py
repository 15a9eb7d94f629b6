"""`python -m fusedloss`: what is here, what is missing and the command that adds it, and a training step beside native.

The step is timed where its tensors would lie in training: on the GPU if this build has kernels for it, else on the CPU.
"""

import importlib.metadata
import importlib.util
import platform
import statistics

import torch
from torch.utils.benchmark import Timer

import fusedloss
from fusedloss import backend

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
ROWS, CLASSES, RUNS = 512, 32000, 7


def main() -> None:
    info = fusedloss.build_info()
    sets = f"{', '.join(info['cpu_capabilities'])}; torch takes {torch.backends.cpu.get_cpu_capability()}"
    print(f"fusedloss {info['version']}, revision {info['git_revision']}, beside torch {torch.__version__}")
    print(f"  built beside       torch {info['torch']}, by {info['compiler']}")
    print(f"  instruction sets   {sets}")
    print(f"  CUDA kernels for   {info['cuda'] or 'no GPU'}")
    print(f"  runs on            Python {platform.python_version()}, {threads(info)}")
    print("\nWhose kernels can be used here:")
    for name, missing in fusedloss.backends().items():
        print(f"  {name:7} {f'no: {missing}' if missing else 'yes'}")
    for problem, command in missing_here(info):
        print(f"\nMissing: {problem}:\n  {command}")
    print()
    on_gpu = torch.cuda.is_available() and not all(fusedloss.backends()[name] for name in ("cuda", "triton"))
    compare("cuda" if on_gpu else "cpu")


def threads(info) -> str:
    return f"{torch.get_num_threads()} threads" if info["openmp"] else "one thread for each loss, without OpenMP"


def missing_here(info):
    """(what is missing, the command that adds it) for all that this machine could have."""
    if not info["openmp"]:
        yield "Threads: in a clone of the repository, with a compiler that has OpenMP", REBUILD
    if torch.cuda.is_available() and not torch.version.hip:
        architecture = "{}.{}".format(*torch.cuda.get_device_capability())
        if not info["cuda"] or backend._not_compiled_for(torch.device("cuda")):
            command = f"FUSEDLOSS_CUDA=1 TORCH_CUDA_ARCH_LIST={architecture} {REBUILD}"
            yield "CUDA kernels for this GPU: in a clone of the repository, with a CUDA toolkit", command
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        of_torch = (each for each in importlib.metadata.requires("torch") or () if each.startswith("triton"))
        yield "Triton kernels", f"pip install '{next(of_torch, 'triton').partition(';')[0].strip()}'"


def compare(device: str) -> None:
    """Loss and gradient of one step, with native torch and fused, taking turns."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, device=device, requires_grad=True)
    target = torch.randint(CLASSES, (ROWS,), device=device)
    timers = {
        name: Timer(
            "logits.grad = None; criterion(logits, target).backward()",
            globals={"logits": logits, "target": target, "criterion": criterion},
            num_threads=torch.get_num_threads(),
        )
        for name, criterion in (
            ("native", torch.nn.CrossEntropyLoss()),
            ("fusedloss", fusedloss.CrossEntropyLoss()),
        )
    }
    for timer in timers.values():
        timer.timeit(3)
    rounds = [{name: timer.timeit(1).median for name, timer in timers.items()} for _ in range(RUNS)]
    native, fused = (statistics.median(times[name] for times in rounds) for name in timers)
    print(f"Cross entropy of {ROWS} x {CLASSES} float32 logits and its gradient on {device}, median of {RUNS}:")
    print(f"  native     {native * 1e3:8.2f} ms")
    print(f"  fusedloss  {fused * 1e3:8.2f} ms, {native / fused:.1f} times as fast")


if __name__ == "__main__":
    main()
