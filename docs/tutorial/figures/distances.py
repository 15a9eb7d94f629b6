"""Draws the picture of chapter 11: python docs/tutorial/figures/distances.py [FOLDER]"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

plt.switch_backend("svg")  # no screen is needed
# The same file from the same numbers: no date, no random names. Text stays text.
plt.rcParams.update({"svg.hashsalt": "fusedloss", "svg.fonttype": "none", "font.size": 9})

PART, MERGED, LINE = "#a9cbe8", "#0b2545", "#9aa5b1"
# (distance, parts that are drawn, what they are, how they meet, what travels of a row, when)
DISTANCES = (
    ("lane", 32, "32 lanes of a warp", "shuffles, 5 steps", "8 bytes a lane and step", "row by row"),
    ("block", 16, "up to 32 warps of a block", "shared memory, a barrier", "8 bytes a warp", "row by row"),
    ("cluster", 8, "up to 8 blocks of a cluster", "distributed shared memory", "8 bytes a block", "row by row"),
    ("rank", 4, "R ranks of a process group", "an all_gather", "16 bytes a rank", "all rows at once"),
)
WIDTH = 32  # of a panel, in the narrowest parts


def four_distances(figure):
    """What is merged at each distance, how wide, and what travels of a row."""
    for axes, (name, count, *words) in zip(figure.subplots(1, 4), DISTANCES, strict=True):
        each = WIDTH / count
        for part in range(count):
            axes.add_patch(
                Rectangle((part * each, 10), each, 3, facecolor=PART, edgecolor="white", linewidth=0.7, zorder=2)
            )
            axes.plot([(part + 0.5) * each, WIDTH / 2], [10, 3.5], color=LINE, linewidth=0.6, zorder=1)
        axes.add_patch(Rectangle((WIDTH / 2 - 2.5, 1), 5, 3, facecolor=MERGED, edgecolor="white", zorder=2))
        for line, text in enumerate(words):
            axes.text(WIDTH / 2, -1.6 - 2.6 * line, text, ha="center", va="top")
        axes.set(xlim=(0, WIDTH), ylim=(-12, 13.5))
        axes.set_title(name, fontweight="bold")
        axes.axis("off")


FIGURES = {"four_distances.svg": (four_distances, (8.4, 2.9))}


def main(folder):
    for name, (draw, size) in FIGURES.items():
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
