"""What each answer and each weight costs: times over that of the plain call, interleaved in one run.

    python -m benchmarks.answers [--device cuda] [--threads N]

All of them come of one read of the logits, so that on a device that is bound by memory none should cost anything.
"""

import argparse
import gc
from functools import partial

import torch

import fusedloss
from benchmarks import machine
from benchmarks.cases import Case, cross_entropy
from benchmarks.devices import DEVICES
from benchmarks.measure import MEASURES, Budget, Party, take_turns

SHAPES = {
    "cpu": [(65536, 10), (4096, 1000), (512, 32000), (64, 128256)],
    "cuda": [(1048576, 10), (65536, 1000), (8192, 32000), (4096, 128256)],
}
BUDGETS = {"cpu": Budget(seconds=10, fewest=15, most=200), "cuda": Budget(seconds=3, fewest=15, most=100)}


def forwards(case: Case, target, sample_weight, denominator) -> dict:
    """Calls without a gradient; the first of a pair is the plain one."""
    unreduced = partial(fusedloss.token_log_probs, target=target)
    return {
        "log-probabilities": unreduced,
        "with the entropy": partial(unreduced, return_entropy=True),
        "with a scale": partial(unreduced, logit_scale=0.7),
        "predictions": partial(fusedloss.cross_entropy, target=target, reduction="none", return_argmax=True),
    }


def steps(case: Case, target, sample_weight, denominator) -> dict:
    """Calls with the gradient that forward writes."""
    loss = partial(fusedloss.cross_entropy, target=target, **({"grad_scale": 1.0} if case.type == "float16" else {}))
    return {
        "step": loss,
        "with a denominator": partial(loss, denominator=denominator),
        "with weights of samples": partial(loss, sample_weight=sample_weight),
        "with predictions": lambda input: loss(input, return_argmax=True)[0],
    }


def costs(case: Case, device) -> dict[str, float]:
    logits, target, _ = case.draw(device.name)
    sample_weight = torch.rand(target.shape, device=device.name)
    denominator = torch.tensor(float(target.numel()), device=device.name)
    clock, parties, found = device.clock(case), {}, {}
    for kind, calls in (("forward", forwards), ("step", steps)):
        for name, call in calls(case, target, sample_weight, denominator).items():
            run = partial(MEASURES[kind], call, (), None)
            parties[name] = Party(run, clock, differentiates=kind == "step")
    take_turns(list(parties.values()), logits, BUDGETS[device.name])
    plain = 1.0
    for name, party in parties.items():
        median = party.times().median
        plain = plain if name.startswith(("with", "predictions")) else median
        found[name] = median / plain
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--threads", type=int, help="on a CPU; default: all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        machine.touch_memory()
    gc.freeze()
    device = DEVICES[options.device]()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[options.device]:
            case = cross_entropy(*shape, dtype=dtype)
            print(case, {name: f"{ratio:.3f}" for name, ratio in costs(case, device).items() if ratio != 1}, flush=True)


if __name__ == "__main__":
    main()
