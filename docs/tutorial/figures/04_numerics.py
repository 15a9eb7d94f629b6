"""The errors of csrc/math/portable.h, in units in the last place (ulp): the plot and the numbers of chapter 4.

    python docs/tutorial/figures/04_numerics.py [FOLDER]

Writes 04-exp-ulp.png beside itself and numerics.json and numerics.txt into ../results; or all of them into the folder.
The functions are compiled from the library's header and called through ctypes. Arguments are numbers of their range at
even steps in the order of their bits, so that each binade is sampled alike. The truth is that of a wider type: float64
for float32, the 80 bits of x86's long double for float64.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
STEP = 997
RANGES = {  # function: from, to, the truth
    "exp_nonpositive": (-87.33, -1e-10, np.exp),
    "exp_nonpositive_table": (-87.33, -1e-10, np.exp),  # of float32; on a processor with AVX2
    "libm_exp": (-87.33, -1e-10, np.exp),
    "log": (1e-37, 3e38, np.log),
    "log1p_unit": (1e-10, 1.0, np.log1p),
}


def compiled(folder):
    library = Path(folder) / "numerics.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([*command, str(HERE / "04_numerics.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def symbol(name, dtype):
    return f"{name}_{'float' if dtype == np.float32 else 'double'}"


def has(library, name, dtype):
    return hasattr(library, symbol(name, dtype)) and (
        "table" not in name or "AVX" in torch.backends.cpu.get_cpu_capability()
    )


def evaluate(library, name, x):
    y = np.empty_like(x)
    function = getattr(library, symbol(name, x.dtype))
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(x.size))
    return y


def arguments(low, high, dtype):
    """Numbers between low and high, of one sign, evenly spaced in the order of their bits."""
    integer = np.int32 if dtype == np.float32 else np.int64
    first, last = sorted(int(abs(dtype(end)).view(integer)) for end in (low, high))
    step = STEP if dtype == np.float32 else (last - first) // 1_000_000
    x = np.arange(first, last, step, dtype=integer).view(dtype)
    return -x if low < 0 else x


def ulps(y, truth):
    """Distance from the truth, in units in the last place of the truth rounded to y's type."""
    unit = np.spacing(np.abs(truth.astype(y.dtype))).astype(truth.dtype)
    return (y.astype(truth.dtype) - truth) / unit


def errors(y, x, function):
    return ulps(y, function(x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)))


def summary(error):
    return {
        "worst_ulp": float(np.abs(error).max()),
        "mean_ulp": float(np.abs(error).mean()),
        "correctly_rounded_percent": float(100 * (np.abs(error) <= 0.5).mean()),
        "arguments": int(error.size),
    }


def plot(x, found, folder):
    figure, axes = plt.subplots(len(found), 1, figsize=(8, 5), sharex=True, sharey=True, layout="constrained")
    edges = np.linspace(x.min(), 0, 400)
    where = np.clip(np.digitize(x, edges) - 1, 0, len(edges) - 2)
    for axis, (name, error) in zip(axes, found.items(), strict=True):
        high, low = (np.full(len(edges) - 1, start) for start in (-np.inf, np.inf))
        np.maximum.at(high, where, error)
        np.minimum.at(low, where, error)
        axis.fill_between((edges[1:] + edges[:-1]) / 2, low, high, step="mid", linewidth=0)
        axis.axhline(0.5, color="gray", linewidth=0.5)
        axis.axhline(-0.5, color="gray", linewidth=0.5)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel("error, ulp")
    axes[-1].set_xlabel("x; between the gray lines: correctly rounded")
    figure.savefig(folder / "04-exp-ulp.png", dpi=110, metadata={"Software": None})


def main(figures, results):
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder)
        for name, (low, high, truth) in RANGES.items():
            for dtype in (np.float32, np.float64):
                if not has(library, name, dtype):
                    continue
                x = arguments(low, high, dtype)
                result[f"{name}_{dtype.__name__}"] = summary(errors(evaluate(library, name, x), x, truth))
        x = arguments(*RANGES["exp_nonpositive"][:2], np.float32)
        found = {
            "exp_nonpositive of csrc/math/portable.h": evaluate(library, "exp_nonpositive", x),
            **(
                {"the same by a table, csrc/kernels/cpu/vector.h": evaluate(library, "exp_nonpositive_table", x)}
                if has(library, "exp_nonpositive_table", x.dtype)
                else {}
            ),
            "torch.exp": torch.exp(torch.from_numpy(x)).numpy(),
        }
        found = {name: errors(y, x, np.exp) for name, y in found.items()}
        result["torch_exp_float32"] = summary(found["torch.exp"])
        seen = x < -0.01  # nearer to 0 lie most of the numbers, and none of the picture
        plot(x[seen], {name: error[seen] for name, error in found.items()}, figures)
    lines = [f"{'':30}{'worst ulp':>12}{'mean ulp':>12}{'rounded correctly':>20}{'arguments':>12}"]
    for name, row in result.items():
        lines.append(
            f"{name:30}{row['worst_ulp']:12.3f}{row['mean_ulp']:12.3f}"
            f"{row['correctly_rounded_percent']:18.1f} %{row['arguments']:12}"
        )
    (results / "numerics.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "numerics.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    folders = [Path(sys.argv[1])] * 2 if len(sys.argv) > 1 else [HERE, HERE.parent / "results"]
    main(*folders)
