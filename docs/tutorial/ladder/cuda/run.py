"""The CUDA ladder: what a machine without a GPU can show, and what only one with a GPU can.

    python docs/tutorial/ladder/cuda/run.py resources        # compile with nvcc: registers, spills, shared memory
    python docs/tutorial/ladder/cuda/run.py emulate FOLDER   # check under an emulator of CUDA; bytes each rung moves
    python docs/tutorial/ladder/cuda/run.py time             # check and time on this machine's GPU

With --write, the results go into docs/tutorial/results/cuda-{resources,bytes,times}.{json,txt}.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "results"
RUNGS = {  # bytes a logit that are read and written, as the rung's own header says
    "1_thread_per_row": (12, 4),
    "2_warp_per_row": (12, 4),
    "3_vector_loads": (12, 4),
    "4_online_chunks": (8, 4),
    "5_one_pass": (4, 4),
    "6_clusters": (4, 4),
}


def problem(rows, classes, scale=2.0, device="cpu"):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, classes, generator=generator) * scale
    target = torch.randint(classes, (rows,), generator=generator)
    return logits.to(device), target.to(device)


def check(loss, gradient, logits, target):
    """Against float64, with room for __expf, whose error grows with its argument's size."""
    x = logits.double().requires_grad_()
    true = torch.nn.functional.cross_entropy(x, target, reduction="none")
    true.sum().backward()
    torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), x.grad, rtol=0, atol=5e-6)


def resources():
    """What ptxas reports for each rung's kernel, for compute capability 9.0."""
    rows = {}
    for name in RUNGS:
        command = ["nvcc", "-std=c++20", "-arch=sm_90", "-Xptxas", "-v", "-c", str(HERE / f"{name}.cu")]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([*command, "-o", f"{folder}/rung.o"], capture_output=True, text=True, check=True)
        report = done.stdout + done.stderr
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        shared = re.search(r"(\d+) bytes smem", report)
        rows[name] = {
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "spilled_bytes": int(spills[1]) + int(spills[2]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"nvcc": re.search(r"release [\d.]+, V([\d.]+)", version)[1], "architecture": "sm_90", "rungs": rows}


def load_emulated(folder, name, **options):
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    import cuda_emu

    return cuda_emu.load([str(HERE / f"{name}.cu")], include_dirs=[str(HERE)], std="c++20", **options)


def run_emulated(library, rows, classes, scale=2.0):
    logits, target = problem(rows, classes, scale)
    loss, gradient = torch.full((rows,), torch.nan), torch.full((rows, classes), torch.nan)
    library.call("step", logits, target, loss, gradient, rows, classes)
    check(loss, gradient, logits, target)


def emulate(folder):
    """Bytes a logit, from two numbers of classes: what a row costs whatever its length drops out."""
    rows, few, many = 8, 4096, 12288
    counted = {}
    for name, (read, written) in RUNGS.items():
        for order in ("sequential", "reverse", "random"):
            run_emulated(load_emulated(folder, name, check=True, order=order, seed=1), 5, 52)
        library = load_emulated(folder, name, check=True)
        stats = []
        for classes in (few, many):
            library.stats()
            run_emulated(library, rows, classes)
            stats.append(library.stats())
        more = rows * (many - few)
        found = {k: (stats[1][f"global_{k}_bytes"] - stats[0][f"global_{k}_bytes"]) / more for k in ("read", "write")}
        counted[name] = {"read": found["read"], "written": found["write"]} | {"model": read + written}
    return {"rows": rows, "classes": [few, many], "rungs": counted}


def time_on_gpu():
    rows, classes, turns = 4096, 32000, 20
    device = torch.device("cuda")
    logits, target = problem(rows, classes, device=device)
    loss, gradient = torch.empty(rows, device=device), torch.empty_like(logits)
    contestants = {"copy": lambda: gradient.copy_(logits)}
    measured, refused = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        for name in RUNGS:
            if name == "6_clusters" and torch.cuda.get_device_capability() < (9, 0):
                refused[name] = "no clusters below compute capability 9.0"  # nvcc refuses them too
                continue
            library = f"{folder}/{name}.so"
            command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{capability}", "-shared", "-Xcompiler", "-fPIC"]
            subprocess.run([*command, str(HERE / f"{name}.cu"), "-o", library], check=True)
            step = ctypes.CDLL(library).step
            step.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
            contestants[name] = lambda step=step: step(
                logits.data_ptr(), target.data_ptr(), loss.data_ptr(), gradient.data_ptr(), rows, classes
            )
        for name, contestant in list(contestants.items()):
            torch.cuda.synchronize()
            error = contestant()
            torch.cuda.synchronize()
            if isinstance(error, int) and error != 0:
                refused[name] = error  # cudaError_t: of a row too long for shared memory, for instance
                del contestants[name]
                continue
            if name != "copy":
                check(loss, gradient, logits, target)
            measured[name] = []
        for _ in range(turns):
            for name, contestant in contestants.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                contestant()
                end.record()
                end.synchronize()
                measured[name].append(start.elapsed_time(end))
    medians = {name: sorted(times)[turns // 2] for name, times in measured.items()}
    return {
        "device": torch.cuda.get_device_name(),
        "rows": rows,
        "classes": classes,
        "refused": refused,
        "rungs": {n: {"ms": ms, "gbps": 8 * rows * classes / ms / 1e6} for n, ms in medians.items()},
    }


def table(result):
    about = ", ".join(f"{key}: {value}" for key, value in result.items() if key != "rungs")
    keys = list(next(iter(result["rungs"].values())))
    lines = [about, "", f"{'':20}" + "".join(f"{key:>22}" for key in keys)]
    for name, row in result["rungs"].items():
        lines.append(f"{name:20}" + "".join(f"{row[key]:22.6g}" for key in keys))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("resources", "emulate", "time"):
        command = commands.add_parser(name)
        command.add_argument("--write", action="store_true", help="store the results beside the tutorial")
        if name == "emulate":
            command.add_argument("folder", help="that of the emulator, cuda_emu")
    args = parser.parse_args()
    if args.command == "time" and not torch.cuda.is_available():
        sys.exit("time needs a GPU that torch can use, and torch.cuda.is_available() is False")
    work, stem = {
        "resources": (resources, "cuda-resources"),
        "emulate": (lambda: emulate(args.folder), "cuda-bytes"),
        "time": (time_on_gpu, "cuda-times"),
    }[args.command]
    result = work()
    print(table(result), end="")
    if args.write:
        (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{stem}.txt").write_text(table(result))


if __name__ == "__main__":
    main()
