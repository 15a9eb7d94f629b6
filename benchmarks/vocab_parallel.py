"""A training step of logits whose classes are shared between ranks, beside other ways to take it.

    python -m benchmarks.vocab_parallel [--ranks 2] [--dtype float32,bfloat16] [--rounds N] [--shapes 2048x32000,...]

Each rank is a process: with a GPU of its own and NCCL where there are enough of them, and else with one thread of the
CPU and gloo. Prints a table of the medians of the slowest rank's times. It takes a few minutes.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import fusedloss
from benchmarks import machine, report
from benchmarks.contestants import first_line
from benchmarks.devices import HostClock
from benchmarks.measure import fault, no_garbage_collection, non_leaf

SHAPES = "2048x32000,512x128256,8x128256"  # rows, and the classes of all ranks
JUDGED_ROWS, LATENCY_ROWS, LATENCY_CALLS = 8, 32, 20  # a sample of fewer rows than 32 is 20 calls


class MegatronFormula(torch.autograd.Function):
    """Megatron-LM's: the softmax of float32 logits is saved. Only, its caller's logits are not overwritten."""

    @staticmethod
    def forward(ctx, logits, target):
        wide = logits.float()
        max = wide.amax(1)
        dist.all_reduce(max, dist.ReduceOp.MAX)
        exps = wide - max.unsqueeze(1) if wide is logits else wide.sub_(max.unsqueeze(1))
        local = target - dist.get_rank() * logits.shape[1]  # as many classes on each rank
        elsewhere = (local < 0) | (local >= logits.shape[1])
        rows, local = torch.arange(len(target), device=target.device), local.masked_fill(elsewhere, 0)
        of_target = exps[rows, local].masked_fill(elsewhere, 0.0)
        dist.all_reduce(of_target)
        total = exps.exp_().sum(1)
        dist.all_reduce(total)
        ctx.save_for_backward(exps.div_(total.unsqueeze(1)), rows, local, elsewhere)
        return total.log() - of_target

    @staticmethod
    def backward(ctx, grad_losses):
        gradient, rows, local, elsewhere = ctx.saved_tensors
        gradient[rows, local] -= 1.0 - elsewhere.float()
        return gradient.mul_(grad_losses.unsqueeze(1)), None  # autograd casts it to the type of the logits


def step(loss_of: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, ...]:
    loss = loss_of(logits)
    return loss, *torch.autograd.grad(loss, logits)


def contestants(target: Tensor, classes: int) -> dict[str, Callable]:
    """Steps of this rank's logits, by name."""
    mesh = init_device_mesh(target.device.type, (dist.get_world_size(),))
    shared = {"process_group": mesh.get_group(), "num_classes": classes}
    whole = {"shape": (len(target), classes), "stride": (classes, 1), "run_check": False}

    def of_dtensor(logits):
        return F.cross_entropy(DTensor.from_local(logits, mesh, [Shard(1)], **whole), target).to_local()

    return {
        "fusedloss": partial(step, partial(fusedloss.cross_entropy, target=target, **shared)),
        "loss_parallel": loss_parallel()(partial(step, of_dtensor)),  # around backward, too
        "megatron": partial(step, lambda logits: MegatronFormula.apply(logits, target).mean()),
    }


def yardsticks(logits: Tensor, target: Tensor) -> dict[str, Callable]:
    """What the kernel alone takes, with its gradient in forward; what is exchanged; and what the memory can do."""
    collectives, mesh = torch.ops._c10d_functional, init_device_mesh(target.device.type, (dist.get_world_size(),))
    group = mesh.size(), mesh.get_group().group_name
    statistics, elsewhere = logits.new_zeros(4, len(logits), dtype=torch.float32), torch.empty_like(logits)
    return {
        "local shape": partial(step, partial(fusedloss.cross_entropy, target=target % logits.shape[1])),
        "all_gather": lambda _: collectives.wait_tensor(collectives.all_gather_into_tensor(statistics, *group)),
        "copy": lambda logits: elsewhere.copy_(logits.detach()),
    }


def mine(whole: Tensor) -> Tensor:
    return whole.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


def drawn(rows: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits of all ranks, and a target: every rank draws the same."""
    torch.manual_seed(0)
    return (3 * torch.randn(rows, classes)).to(device, dtype), torch.randint(classes, (rows,)).to(device)


def slowest(number: float, device: str) -> float:
    """The largest of all ranks' numbers."""
    dist.all_reduce(of_all := torch.tensor(number, dtype=torch.float64, device=device), dist.ReduceOp.MAX)
    return of_all.item()


def judge(classes: int, dtype: torch.dtype, device: str) -> dict[str, str]:
    """What is wrong with whom, on any rank, beside all classes in float64."""
    logits, target = drawn(JUDGED_ROWS, classes, dtype, device)
    loss, gradient = step(partial(F.cross_entropy, target=target), non_leaf(logits.double()))
    truth, problems = {"loss": loss.detach(), "gradient": mine(gradient)}, {}
    for name, one in contestants(target, classes).items():
        try:
            found = (each.detach() for each in one(non_leaf(mine(logits))))
            problem = fault(dict(zip(truth, found, strict=True)), truth, dtype)
        except Exception as error:  # whatever a contestant raises is its result
            problem = f"failed: {first_line(error)}"
        if slowest(float(bool(problem)), device):  # all ranks time the same ones, or they would wait for each other
            problems[name] = problem or "wrong: on another rank"
    return problems


def sample(one: Callable, logits: Tensor, calls: int) -> float:
    """Seconds per call on the slowest rank. A call that is not timed goes before, as in a training loop."""
    clock = HostClock(0.0, torch.cuda.synchronize) if logits.is_cuda else HostClock(0.0)
    own = [non_leaf(logits) for _ in range(calls + 1)]
    one(own.pop())
    dist.barrier()
    return slowest(clock.seconds(one, own), logits.device.type) / calls


def times(rows: int, classes: int, dtype: torch.dtype, device: str, rounds: int) -> tuple[dict, dict]:
    """Medians in seconds, and problems, by name."""
    problems = judge(classes, dtype, device)
    logits, target = drawn(rows, classes, dtype, device)
    logits = mine(logits)
    all_of_them = contestants(target, classes) | yardsticks(logits, target)
    samples: dict[str, list[float]] = {name: [] for name in all_of_them if name not in problems}
    calls, draw = LATENCY_CALLS if rows < LATENCY_ROWS else 1, random.Random(0)
    with no_garbage_collection():
        for name in (name for _ in range(rounds) for name in draw.sample(list(samples), len(samples))):
            samples[name].append(sample(all_of_them[name], logits, calls))  # in the same order on all ranks
    return {name: median(each) for name, each in samples.items()}, problems


def work(rank: int, options: argparse.Namespace, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    of_group = {"rank": rank, "world_size": options.ranks, "timeout": timedelta(minutes=2)}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/ranks", **of_group)
    found = []
    for shape, dtype in product(options.shapes.split(","), options.dtype.split(",")):
        rows, classes = map(int, shape.split("x"))
        found.append((f"{shape} {dtype}", *times(rows, classes, getattr(torch, dtype), device, options.rounds)))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def table(found: list[tuple[str, dict, dict]]) -> str:
    names, lines = ["loss_parallel", "megatron", "local shape", "all_gather", "copy"], []
    for case, seconds, problems in found:
        own = seconds.get("fusedloss")
        beside = {name: f", {report.times(each / own)}" for name, each in seconds.items() if own and name in names}
        cells = {name: f"{1e3 * each:.2f}{beside.get(name, '')}" for name, each in seconds.items()}
        cells |= {name: problem.partition(":")[0] for name, problem in problems.items()}
        # Forward reads the logits; for their gradient they are read again, and written: three against a copy's two.
        moved = report.percent(own and 1.5 * seconds["copy"] / own)
        lines.append([case, cells["fusedloss"], moved, *(cells[name] for name in names)])
    reasons = [f"{case}, {name}: {problem}\n" for case, _, of in found for name, problem in of.items()]
    return "\n".join([report.table(["rows x classes, ms", "fusedloss", "of copy", *names], lines), *reasons])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocab_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", default=SHAPES, help="rows x classes of all ranks, with commas between")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.device_count() >= options.ranks else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{machine.cpu_model()}, a thread each"
    print(f"{options.ranks} ranks on {name}; torch {torch.__version__}; load before: {machine.load()}\n", flush=True)
    if device == "cpu":
        machine.touch_memory()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (options, device, folder), options.ranks)
        print(table(json.loads(Path(folder, "found.json").read_text())))


if __name__ == "__main__":
    main()
