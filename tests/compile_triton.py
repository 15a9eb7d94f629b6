"""Compile every Triton kernel for a GPU that is not there, and say what became of it.

    python tests/compile_triton.py 90 [--verbose]

Calls the losses on tensors of the CPU, with a driver of its own and launches that stop after compiling. Fails where a
kernel does not compile, where it spills registers, where the calls of LOOK_ALIKES compile anything anew, or where what
WIDE names does not move 16 bytes at once.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

import fusedloss
from fusedloss.triton.launch import COMPILED_WITH

SPILLED_BYTES = 32  # that a kernel may spill: a value or two, around a loop


class Nowhere(DriverBase):
    """The driver of a GPU that is not there: kernels can be compiled for it."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


@dataclass
class Compiled:
    kernel: str
    warps: int
    registers: int
    spilled: int
    wide: int  # loads and stores of 16 bytes
    narrow: int

    def __str__(self):
        return (
            f"{self.kernel:14} {self.warps:2} warps {self.registers:3} registers {self.spilled:3} bytes spilled, "
            f"{self.wide} wide and {self.narrow} narrow accesses"
        )


class Compiler:
    """Takes the place of fusedloss.triton.launch.start."""

    def __init__(self, capability):
        self.capability = capability
        self.compiled = {}

    def start(self, function, programs, *arguments, warps=4, **constants):
        if programs == 0:
            return
        kernel = function.warmup(*arguments, grid=(programs,), **constants, num_warps=warps, **COMPILED_WITH)
        if kernel.hash not in self.compiled:
            self.compiled[kernel.hash] = self.examine(function.fn.__name__, warps, kernel.asm["ptx"])

    def examine(self, name, warps, ptx):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx)
            suffix = "a" if self.capability >= 90 else ""
            arch = f"--gpu-name=sm_{self.capability}{suffix}"
            ptxas = get_ptxas(self.capability).path  # Triton brings two, for versions of PTX that it writes for each
            command = [ptxas, "-v", arch, source, "-o", Path(folder, "kernel.cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            report = done.stderr
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
        accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
        # 128 bits are 4 registers of 32, or 2 of 64.
        wide = sum(bool(re.search(r"\.v4\.b32|\.v2\.b64", access)) for access in accesses)
        return Compiled(name, warps, registers, spilled, wide, len(accesses) - wide)

    def by(self, call):
        """What a call has had compiled that was not there before."""
        before = set(self.compiled)
        call()
        return [self.compiled[key] for key in self.compiled.keys() - before]


# --- Calls -------------------------------------------------------------------------------------------------------


def step(loss, input, *arguments, **options):
    """Forward, and a backward pass with another grad_output than was assumed."""
    result = loss(input.requires_grad_() * 1, *arguments, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    (sum(output.sum() for output in outputs if output.requires_grad) * 2).backward()


def cross_entropy(*shape, dtype=torch.bfloat16, soft=False, weighted=False, samples=False, mean_over=None, **options):
    def call():
        input, positions = torch.zeros(shape, dtype=dtype), (shape[0], *shape[2:])
        target = torch.zeros(shape, dtype=dtype) if soft else torch.zeros(positions, dtype=torch.long)
        weight = torch.ones(shape[1], dtype=dtype) if weighted else None
        sample_weight = torch.ones(positions) if samples else None
        denominator = None if mean_over is None else torch.tensor(mean_over)
        step(
            fusedloss.cross_entropy,
            input,
            target,
            weight,
            sample_weight=sample_weight,
            denominator=denominator,
            **options,
        )

    return call


def nll(*shape, dtype=torch.bfloat16, **options):
    def call():
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
        step(fusedloss.nll_loss, torch.zeros(shape, dtype=dtype), target, **options)

    return call


def binary(name, *shape, dtype=torch.bfloat16, target_type=None, weighted=(), **options):
    def call():
        weights = {weight: torch.ones(shape[-1], dtype=dtype) for weight in weighted}
        target = torch.zeros(shape, dtype=target_type or dtype)
        step(getattr(fusedloss, name), torch.full(shape, 0.5, dtype=dtype), target, **weights, **options)

    return call


LOGITS, PROBABILITIES = "binary_cross_entropy_with_logits", "binary_cross_entropy"
EVERYTHING = {"weighted": True, "label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 30.0}
SEPARATE = {"grad_in_forward": False}
ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}
SAMPLES = {"samples": True, "logit_scale": 0.5}
CALLS = {  # by what is particular about them
    "few classes": cross_entropy(8192, 10),
    "few classes, totals of many programs": cross_entropy(600_000, 10),
    "rows that begin anywhere": cross_entropy(2048, 91),
    **{f"{classes} classes": cross_entropy(512, classes) for classes in (1000, 4000, 8192, 16000, 32000)},
    "few rows": cross_entropy(64, 32000),
    "swept rows": cross_entropy(512, 128256),
    "swept rows that begin anywhere": cross_entropy(512, 50257),
    "sliced rows": cross_entropy(1, 128256),
    "backward": cross_entropy(512, 32000, **SEPARATE),
    "images": cross_entropy(2, 19, 64, 64),
    "images of many classes": cross_entropy(2, 1000, 16, 16),
    "images of odd sizes": cross_entropy(2, 19, 5, 7),
    "unreduced": cross_entropy(64, 1000, reduction="none", return_lse=True),
    "everything": cross_entropy(64, 1000, **EVERYTHING),
    "everything, swept": cross_entropy(64, 128256, **EVERYTHING),
    "everything, backward": cross_entropy(64, 1000, **EVERYTHING, **SEPARATE),
    "everything, sliced": cross_entropy(1, 128256, **EVERYTHING),
    "probabilities": cross_entropy(64, 1000, soft=True, label_smoothing=0.1),
    **{f"answers, {classes} classes": cross_entropy(64, classes, **ANSWERS) for classes in (10, 1000, 8192, 32000)},
    "answers, swept": cross_entropy(512, 128256, **ANSWERS),
    "answers, sliced": cross_entropy(1, 128256, **ANSWERS),
    "answers, unreduced": cross_entropy(64, 50257, reduction="none", **ANSWERS),
    "answers, images": cross_entropy(2, 19, 64, 64, **ANSWERS),
    "answers, images of many classes": cross_entropy(2, 1000, 16, 16, **ANSWERS),
    "answers, everything": cross_entropy(64, 1000, **ANSWERS, **SAMPLES, **EVERYTHING),
    "answers, everything, swept": cross_entropy(64, 128256, **ANSWERS, **SAMPLES, **EVERYTHING),
    "answers, everything, sliced": cross_entropy(1, 128256, **ANSWERS, **SAMPLES, **EVERYTHING),
    "answers, probabilities": cross_entropy(64, 1000, soft=True, label_smoothing=0.1, **ANSWERS, **SAMPLES),
    "samples": cross_entropy(512, 1000, return_argmax=True, **SAMPLES),
    "samples, 32000 classes": cross_entropy(64, 32000, return_argmax=True, **SAMPLES),
    "samples, swept": cross_entropy(512, 128256, return_argmax=True, **SAMPLES),
    "samples, sliced": cross_entropy(1, 128256, return_argmax=True, **SAMPLES),
    "samples of probabilities": cross_entropy(512, 1000, soft=True, **SAMPLES),
    "samples over a denominator": cross_entropy(512, 1000, mean_over=7.0, **SAMPLES),
    "over a denominator": cross_entropy(64, 1000, mean_over=7.0),
    "nll": nll(4096, 1000),
    "nll of images": nll(2, 19, 64, 64),
    "bce with logits": binary(LOGITS, 512, 1000),
    "bce with logits, weights and labels": binary(
        LOGITS, 512, 1000, target_type=torch.uint8, weighted=("weight", "pos_weight"), ignore_index=2
    ),
    "bce with logits, few labels": binary(LOGITS, 4, 40, ignore_index=2),
    "bce with logits, backward": binary(LOGITS, 512, 1000, **SEPARATE),
    "bce": binary(PROBABILITIES, 512, 1000),
    "bce, unreduced": binary(PROBABILITIES, 512, 1000, reduction="none"),
}
BFLOAT16, FLOAT64 = torch.bfloat16, torch.float64
EDGES = {  # a loss, and what it is called with
    "a scalar": (fusedloss.binary_cross_entropy_with_logits, torch.tensor(0.5), torch.tensor(1.0)),
    "strides": (fusedloss.binary_cross_entropy_with_logits, torch.zeros(6, 7, 8)[::2, :, ::3], torch.zeros(3, 7, 3)),
    "bool labels": (fusedloss.binary_cross_entropy, torch.full((4, 40), 0.5), torch.zeros(4, 40, dtype=torch.bool)),
    "wide logits, narrow labels": (
        fusedloss.binary_cross_entropy_with_logits,
        torch.zeros(4, 40, dtype=FLOAT64),
        torch.zeros(4, 40, dtype=BFLOAT16).requires_grad_(),
    ),
    "no batch": (fusedloss.cross_entropy, torch.zeros(5), torch.tensor(1)),
    "no rows": (fusedloss.cross_entropy, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int32)),
    "no classes": (fusedloss.cross_entropy, torch.zeros(2, 0), torch.tensor([-100, -100])),
    "classes apart": (fusedloss.cross_entropy, torch.zeros(40, 19, 2)[:, :, 0], torch.zeros(40, dtype=torch.long)),
    "wide logits, narrow probabilities": (
        fusedloss.cross_entropy,
        torch.zeros(4, 40, dtype=FLOAT64),
        torch.zeros(4, 40, dtype=BFLOAT16).requires_grad_(),
    ),
    "images of probabilities": (fusedloss.cross_entropy, torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
}
FLOAT32 = {  # again, in types that are compiled anew
    "float32 swept rows": cross_entropy(512, 128256, dtype=torch.float32),
    "float32 32000 classes": cross_entropy(512, 32000, dtype=torch.float32),
    "float32 everything, backward": cross_entropy(64, 1000, dtype=torch.float32, **EVERYTHING, **SEPARATE),
    "float32 answers": cross_entropy(64, 1000, dtype=torch.float32, **ANSWERS, **SAMPLES),
    "float32 answers, 32000 classes": cross_entropy(64, 32000, dtype=torch.float32, **ANSWERS),
    "float32 answers, swept": cross_entropy(64, 128256, dtype=torch.float32, **ANSWERS, **SAMPLES),
    "float64": cross_entropy(64, 1000, dtype=torch.float64),
    "float64 answers": cross_entropy(64, 1000, dtype=torch.float64, **ANSWERS, **SAMPLES, **EVERYTHING),
    "float64 answers, sliced": cross_entropy(1, 128256, dtype=torch.float64, **ANSWERS, **SAMPLES, **EVERYTHING),
    "float64 everything": cross_entropy(64, 1000, dtype=torch.float64, **EVERYTHING, **SEPARATE),
    "float64 bce": binary(PROBABILITIES, 512, 1000, dtype=torch.float64),
    "float16": cross_entropy(64, 1000, dtype=torch.float16, grad_in_forward=True),
}
LOOK_ALIKES = {  # calls for which everything has been compiled
    "another smoothing": cross_entropy(64, 1000, **{**EVERYTHING, "label_smoothing": 0.3, "z_loss": 1.0}),
    "another ignore_index": cross_entropy(512, 1000, ignore_index=1),
    "another large ignore_index": cross_entropy(512, 1000, ignore_index=2**40),
    "as many classes, about": cross_entropy(512, 968),
    "as many odd classes, about": cross_entropy(512, 50259),
    "another number of rows": cross_entropy(301, 1000),
    "other images": cross_entropy(3, 21, 48, 16),
    "other images of odd sizes": cross_entropy(4, 17, 1, 9),
    "other parts": cross_entropy(590_000, 10),
    "another scale, and other samples": cross_entropy(301, 1000, return_argmax=True, samples=True, logit_scale=2.0),
    "another denominator": cross_entropy(64, 1000, mean_over=5.0),
    "other slices": cross_entropy(1, 131072),
}
WIDE = {  # calls whose kernels (all but these) load and store 16 bytes at once
    "swept rows": {"_sum_runs"},
    "swept rows that begin anywhere": {"_sum_runs"},
    "images": {"_count_kernel", "_sum_runs"},
    "backward": {"_sum_runs"},
    "bce with logits": {"_sum_runs"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, help="of the GPU: 80, 90, 100, ...")
    parser.add_argument("--verbose", action="store_true", help="show every kernel")
    options = parser.parse_args()

    driver.set_active(Nowhere(options.capability))
    from fusedloss.triton import class_loss, cross_entropy, elementwise, launch, nll, reduce, rescale

    compiler = Compiler(options.capability)
    for module in (class_loss, cross_entropy, elementwise, nll, reduce, rescale):
        module.start = compiler.start
    launch.INTERPRETED = True  # so that tensors of the CPU are taken

    faults = []
    with fusedloss.use_backend("triton"):
        edges = {title: partial(step, *call) for title, call in EDGES.items()}
        for title, call in {**CALLS, **FLOAT32, **edges}.items():
            for compiled in compiler.by(call):
                if options.verbose:
                    print(f"{title:36} {compiled}", flush=True)
                if compiled.spilled > SPILLED_BYTES:
                    faults.append(f"{title}: {compiled}")
                if title in WIDE and compiled.kernel not in WIDE[title] and not compiled.wide:
                    faults.append(f"{title}: {compiled}")
        for title, call in LOOK_ALIKES.items():
            faults += [f"{title}: compiles anew: {compiled}" for compiled in compiler.by(call)]
    print(f"{len(compiler.compiled)} kernels for compute capability {options.capability}")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
