"""Compile, check and time the Triton ladder.

    python docs/tutorial/ladder/triton/run.py resources   compiles for a GPU that need not be there: registers, accesses
    python docs/tutorial/ladder/triton/run.py check       against float64: on a GPU, or interpreted on the CPU
    python docs/tutorial/ladder/triton/run.py time        on a GPU, beside a copy

`resources` writes docs/tutorial/results/triton-resources.json and .txt.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if "check" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
from rungs import RUNGS, arguments, run
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[4]
RESULTS = ROOT / "docs/tutorial/results"
CAPABILITY = 90
TOLERANCE = 1e-5
CLASSES = 1000  # whose rows are multiples of 16 bytes, and no multiple of 16 elements


def compiled(name):
    """The PTX of a rung for bfloat16 rows, as a call with these numbers has it compiled."""
    kernel, constants = RUNGS[name]
    constants = constants(CLASSES)
    types = ["*bf16", "*i64", "*fp32", "*bf16", "i32"]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}  # what Triton sees of torch's pointers
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32)).asm["ptx"]


def resources(name):
    ptx = compiled(name)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name=sm_{CAPABILITY}a",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    wide = sum(".v4." in access for access in accesses)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "accesses_of_16_bytes": wide,
        "smaller_accesses": len(accesses) - wide,
    }


def write_resources():
    found = {name: resources(name) for name in RUNGS}
    titles = list(next(iter(found.values())))
    lines = [f"Triton {triton.__version__}, sm_{CAPABILITY}, bfloat16, {CLASSES} classes", ""]
    lines += [f"{'':16}" + "".join(f"{title:>24}" for title in titles)]
    lines += [f"{name:16}" + "".join(f"{row[title]:>24}" for title in titles) for name, row in found.items()]
    (RESULTS / "triton-resources.txt").write_text("\n".join(lines) + "\n")
    (RESULTS / "triton-resources.json").write_text(json.dumps({"rungs": found}, indent=1) + "\n")
    print("\n".join(lines))


def check(rows=3, classes=104, dtype=torch.float32):
    """The largest errors of each rung's losses and gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    wide = logits.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    truth.sum().backward()
    errors = {}
    for name in RUNGS:
        loss, gradient = run(name, logits, target)
        pairs = ((loss, truth.detach()), (gradient, wide.grad))
        errors[name] = tuple(float((ours.double() - true).abs().max()) for ours, true in pairs)
    return errors


def time(rows=8192, classes=32000):
    """Milliseconds, and the fraction of a copy's bandwidth, of bfloat16 rows."""
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    copy = triton.testing.do_bench(lambda: torch.empty_like(logits).copy_(logits))
    for name, (kernel, constants) in RUNGS.items():
        given = arguments(logits, target)
        warps = {"num_warps": 16}
        taken = triton.testing.do_bench(lambda: kernel[(rows,)](*given, **constants(classes), **warps))  # noqa: B023
        print(f"{name:16}{taken:10.3f} ms{copy / taken:10.0%} of a copy")


if __name__ == "__main__":
    if "resources" in sys.argv:
        write_resources()
    elif "check" in sys.argv:
        for name, errors in check().items():
            if not max(errors) < TOLERANCE:  # NaN is not below
                sys.exit(f"{name}: loss and gradient differ from float64 by up to {errors[0]:.1e} and {errors[1]:.1e}")
            print(f"{name}: loss and gradient within {TOLERANCE} of float64")
    elif "time" in sys.argv:
        time()
    else:
        sys.exit(__doc__)
