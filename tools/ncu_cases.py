"""Eight headline cases for Nsight Compute: forward and step of each, once, with all else out of its sight.

    ncu --profile-from-start off --csv --page raw ... python tools/ncu_cases.py
    python tools/ncu_cases.py --list        # what is run, in this order; no GPU is needed

Before each call a kernel of torch's arange is launched, which nothing of ours launches: in ncu's table the rows behind
the i-th of them are those of line i of the list.
"""

import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: PYTHONPATH may name another checkout

from gpu_headlines import names  # noqa: E402

from benchmarks.cases import CUDA_GROUPS, Case  # noqa: E402
from benchmarks.contestants import ours  # noqa: E402
from benchmarks.measure import MEASURES, non_leaf  # noqa: E402

CALLS = [(name, measure) for name in names("ncu") for measure in MEASURES]


def case_of(name: str) -> Case:
    (found,) = [case for group in CUDA_GROUPS.values() for case in group if str(case) == name]
    return found


def profile(case: Case) -> None:
    logits, target, options = case.draw("cuda")
    call = partial(ours(case), target=target, **options)
    grad_output = torch.ones((), dtype=case.dtype, device="cuda")  # a step that made its own would launch a fill
    for measure, action in MEASURES.items():
        with torch.set_grad_enabled(measure == "step"):
            step = partial(action, call, (), grad_output)
            step(non_leaf(logits))  # the first call loads modules and asks for memory
            own = non_leaf(logits)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.arange(8, device="cuda")
            step(own)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        print(*(f"{name}, {measure}" for name, measure in CALLS), sep="\n")
        return
    for name in names("ncu"):
        print(name, flush=True)
        profile(case_of(name))


if __name__ == "__main__":
    main()
