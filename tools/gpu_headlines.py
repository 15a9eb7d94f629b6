"""The headline cases of the benchmarks on a GPU: what is predicted of them, and which stages of on_gpu.sh take them.

    python tools/gpu_headlines.py bench|peers|ncu       # a regular expression for the names of these cases

Predictions are for the kernels of REVISION, made from their machine code and a model of the memory's latency, before a
GPU had run them; they may be off by 8 points. Those of a forward are percent of the bandwidth of a plain copy, those of
a step percent of the floor (benchmarks/README.md), unless they say µs. A later revision may have cured what limits a
case: its measurement beside the old prediction shows by how much.
"""

import re
import sys
from dataclasses import dataclass

REVISION = "06fe240"
PREDICTED_FOR = ("H100", "H200")


@dataclass(frozen=True)
class Headline:
    case: str  # as the benchmarks name it
    forward: tuple[str, str] | None  # on the GPUs of PREDICTED_FOR
    step: tuple[str, str] | None
    limit: str = ""  # what the prediction says is in the way
    marks: str = ""  # the stages beside bench that take the case: peers, ncu


LOADS = "half-precision loads wait for one another"
GAPS = "each row begins with two latencies that nothing covers"
TILES = "instructions a logit; few warps"
CLUSTERS = "of the step: one cluster more than fit"
BCE = "instructions an element"
LAUNCHES = "launches"

HEADLINES = [
    Headline("cross entropy 32x10 float32", None, ("16-20 µs", "16-20 µs"), "the host"),
    Headline("cross entropy 32x10 bfloat16", None, ("16-20 µs", "16-20 µs"), "the host"),
    Headline("cross entropy 32x10 autocast bfloat16", None, None),
    Headline("bce with logits 32x10 float32", None, None),
    Headline("cross entropy 8192x32000 autocast bfloat16", None, None, marks="peers"),
    Headline("cross entropy 8192x128256 autocast bfloat16", None, None, marks="peers"),
    Headline("cross entropy 8192x32000 bfloat16", ("65-70", "52-57"), ("85-88", "72-78"), LOADS, "peers ncu"),
    Headline("cross entropy 8192x50257 bfloat16", ("57-62", "46-50"), ("68-72", "56-60"), LOADS),
    Headline("cross entropy 8192x128256 bfloat16", ("72-76", "58-62"), ("78-82", "62-68"), LOADS, "peers ncu"),
    Headline("cross entropy 8192x256000 bfloat16", ("77-80", "61-65"), ("50-58", "42-48"), CLUSTERS),
    Headline("cross entropy 4096x32000 float32", ("88", "76"), ("89", "82"), GAPS, "ncu"),
    Headline("cross entropy 4096x50257 float32", ("86", "76"), ("83", "75"), GAPS),
    Headline("cross entropy 4096x128256 float32", ("91", "87"), ("58", "54"), CLUSTERS),
    Headline("cross entropy 16777216x10 bfloat16", ("32", "22"), ("35", "24"), TILES, "ncu"),
    Headline("cross entropy 16777216x10 float32", ("48", "34"), ("56", "40"), TILES),
    Headline("cross entropy 2097152x91 bfloat16", ("25", "17"), None, TILES),
    Headline("cross entropy 2097152x91 float32", ("44", "31"), None, TILES),
    Headline("cross entropy 65536x1000 bfloat16", ("24", "17"), ("34", "24"), TILES, "peers ncu"),
    Headline("cross entropy 65536x1000 float32", ("37", "26"), ("45", "32"), TILES),
    Headline("cross entropy 4096x1000 bfloat16", ("25", "18"), ("32", "22"), "the mean's divisor; launches"),
    Headline("cross entropy 4096x1000 float32", None, ("50", "38"), "the mean's divisor; launches"),
    Headline("cross entropy 65536x10 bfloat16", ("6-7 µs", "6-7 µs"), None, LAUNCHES),
    Headline("cross entropy 65536x91 bfloat16", ("15 µs", "15 µs"), None, TILES),
    Headline("bce with logits 65536x1000 bfloat16", None, ("64", "46"), BCE, "peers ncu"),
    Headline("bce with logits 65536x1000 float32", None, ("83", "77"), "the last wave of blocks"),
    Headline("bce with logits, uint8 labels 65536x1000 bfloat16", None, ("16", "11"), BCE),
    Headline("bce with logits, pos_weight 65536x1000 bfloat16", None, ("11", "8"), BCE),
    Headline("bce with logits 4096x1000 bfloat16", None, ("45", "35"), LAUNCHES),
    Headline("bce with logits 4096x1000 float32", None, ("65", "55"), LAUNCHES),
    Headline("bce with logits 1000000x1 float32", None, ("45", "35"), LAUNCHES),
    Headline("cross entropy 8x19x512x1024 bfloat16", ("60", "43"), ("50", "35"), "registers; few warps", "peers ncu"),
    Headline("cross entropy 8x19x512x1024 float32", ("80", "60"), ("67", "52"), "registers; few warps"),
    Headline("cross entropy 4x150x512x512 bfloat16", None, ("10-14", "7-10"), "2 warps a multiprocessor", "ncu"),
    Headline("cross entropy 4x150x512x512 float32", None, ("22", "15"), "2 warps a multiprocessor"),
]


def names(stage: str) -> list[str]:
    return [headline.case for headline in HEADLINES if stage == "bench" or stage in headline.marks.split()]


if __name__ == "__main__":
    print(f"^({'|'.join(map(re.escape, names(sys.argv[1])))})$")
