"""Draws the pictures of chapters 5 and 6: python docs/tutorial/figures/ladders.py [FOLDER]

That of chapter 5 shows docs/tutorial/results/cpu-ladder.json. Draw it again when ladder/cpu/run.py has written that.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
plt.switch_backend("svg")  # no screen is needed
# The same file from the same numbers: no date, no random names. Text stays text.
plt.rcParams.update({"svg.hashsalt": "fusedloss", "svg.fonttype": "none", "font.size": 9})

YARDSTICKS = {"copy, 1 thread": ":", "copy into fresh memory": "--"}
SECTOR = 8  # floats
LOADED, FETCHED, NEITHER = "#0b2545", "#a9cbe8", "white"


def cpu_ladder(figure):
    """The time of each rung, for a logit."""
    found = json.loads((HERE.parent / "results" / "cpu-ladder.json").read_text())["many"]
    rungs = {name: row["ns"] for name, row in found.items() if name[:1].isdigit()}
    axes = figure.subplots()
    bars = axes.barh(list(rungs), list(rungs.values()), 0.7, color=LOADED)
    axes.bar_label(bars, [f"{ns:.2f}" for ns in rungs.values()], padding=3)
    for name, line in YARDSTICKS.items():
        axes.axvline(found[name]["ns"], color="grey", linestyle=line, label=name)
    axes.set(xlabel=f"nanoseconds a logit; {found['rows']} x {found['classes']}, float32")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")


def sectors(figure):
    """What one load of a warp fetches: a lane in each row, and all lanes in one row."""
    for axes, title, loaded in zip(
        figure.subplots(1, 2),
        ("rung 1: a lane for each row", "rung 2: all 32 lanes in one row"),
        (lambda row, c: c == 0, lambda row, c: row == 0),
        strict=True,
    ):
        for row in range(8):
            for c in range(32):
                sector = range(c // SECTOR * SECTOR, (c // SECTOR + 1) * SECTOR)
                fetched = any(loaded(row, other) for other in sector)
                color = LOADED if loaded(row, c) else FETCHED if fetched else NEITHER
                axes.add_patch(Rectangle((c, row), 1, 1, facecolor=color, edgecolor="#dddddd", linewidth=0.4))
        for c in range(0, 33, SECTOR):
            axes.axvline(c, color="black", linewidth=0.8)
        axes.set(title=title, xlim=(0, 32), ylim=(8, 0), xticks=range(0, 33, SECTOR), xlabel="class")
        axes.set_yticks([row + 0.5 for row in range(8)], range(8))
        axes.set_ylabel("row")


FIGURES = {"05-ladder.svg": (cpu_ladder, (7, 3.2)), "06-sectors.svg": (sectors, (7, 2.2))}


def main(folder):
    for name, (draw, size) in FIGURES.items():
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
