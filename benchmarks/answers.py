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


def calls_of(target, sample_weight, denominator) -> dict:
    """By measure, calls with what they have beside the first, which is the plain one; a step writes its gradient in
    forward."""
    log_probs = partial(fusedloss.token_log_probs, target=target)
    loss = partial(fusedloss.cross_entropy, target=target)
    return {
        "forward": {
            "nothing": log_probs,
            "entropy": partial(log_probs, return_entropy=True),
            "scale": partial(log_probs, logit_scale=0.7),
            "predictions": partial(loss, reduction="none", return_argmax=True),
        },
        "step": {
            "nothing": loss,
            "denominator": partial(loss, denominator=denominator),
            "weights of samples": partial(loss, sample_weight=sample_weight),
            "predictions": lambda input: loss(input, return_argmax=True)[0],
        },
    }


def costs(case: Case, device) -> dict[str, str]:
    logits, target, _ = case.draw(device.name)
    sample_weight = torch.rand(target.shape, device=device.name)
    denominator = torch.tensor(float(target.numel()), device=device.name)
    clock = device.clock(case)
    parties = {
        (measure, name): Party(partial(MEASURES[measure], call, (), None), clock, differentiates=measure == "step")
        for measure, calls in calls_of(target, sample_weight, denominator).items()
        for name, call in calls.items()
    }
    take_turns(list(parties.values()), logits, BUDGETS[device.name])
    medians = {key: party.times().median for key, party in parties.items()}
    return {
        f"{measure} with {name}": f"{median / medians[measure, 'nothing']:.3f}"
        for (measure, name), median in medians.items()
        if name != "nothing"
    }


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
            print(case, costs(case, device), flush=True)


if __name__ == "__main__":
    main()
