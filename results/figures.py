"""The two figures of RESULTS.md; `python results/tables.py --write` draws them.

the lines of results/walk/runs.jsonl -> docs/walk.png, docs/repeats.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from lines import Lines, Runs, at, law_runs, length

# variant -> its label and colour
CURVES = {
    "bstar": ("bstar", "#0072b2"),
    "T 0.5": ("T 0.5", "#009e73"),
    "online-rft cap 6": ("T 1.0, capped", "#e69f00"),
    "online-rft": ("T 1.0", "#d55e00"),
}
STYLE = {"font.size": 18, "axes.spines.top": False, "axes.spines.right": False}
CURVE = {"linewidth": 3, "marker": "o", "markersize": 8}
READINGS = [2, 5, 10, 20, 50, 100]  # ticks of R


def draw_walk(runs: Runs, path: Path) -> None:
    """pass@1 over the iterations, and under it the T that bstar chose."""
    plt.rcParams.update(STYLE)
    shape = dict(figsize=(7, 7), sharex=True, height_ratios=(2.2, 1), layout="constrained")
    figure, (top, bottom) = plt.subplots(2, 1, **shape)
    for variant, (label, colour) in CURVES.items():
        if variant in runs:
            end = draw_band(top, runs[variant], "pass@1", 0, colour)
            # at its curve's end: with four curves a legend would cover one
            top.annotate(f"  {label}", end, color=colour, va="center", annotation_clip=False)
    draw_band(bottom, runs["bstar"], "temperature", 1, CURVES["bstar"][1])

    top.set_ylabel("pass@1, %")
    top.yaxis.set_major_locator(plt.MultipleLocator(5))
    bottom.set(ylabel="T of bstar", ylim=(0.4, 1.2), yticks=[0.5, 0.75, 1.0])
    bottom.set(xlabel="iteration", xticks=range(7))
    save(figure, path)


def draw_band(ax, lines: Lines, key: str, first: int, colour: str) -> tuple[float, float]:
    """A metric's mean over the iterations with a band of one standard error; returns its end."""
    values = pd.DataFrame({i: at(lines, key, i) for i in range(first, length(lines))})
    middle, error = values.mean(), values.sem().fillna(0)
    low, high = middle - error, middle + error
    ax.plot(middle, color=colour, **CURVE)
    ax.fill_between(middle.index, low, high, color=colour, alpha=0.2, linewidth=0)
    return middle.index[-1], middle.iloc[-1]


def draw_law(every: dict[float, Runs], path: Path) -> None:
    """Gain of bstar over T = 1.0 against R, with and without the cap: a point a seed, and means."""
    plt.rcParams.update(STYLE)
    figure, ax = plt.subplots(figsize=(7, 5.4), layout="constrained")
    draw_gains(ax, every, "", "#0072b2", "uncapped")
    draw_gains(ax, every, " cap 6", "#e69f00", "both capped")
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks(READINGS, labels=map(str, READINGS))
    ax.minorticks_off()
    ax.set(xlabel="R at T 1.0, iteration 1", ylabel="bstar less T 1.0, pass@1")
    ax.legend(frameon=False)
    save(figure, path)


def draw_gains(ax, every: dict[float, Runs], cap: str, colour: str, label: str) -> None:
    """The points of all shares of wrong words, and the line through their means."""
    middle = []
    for runs in law_runs(every).values():
        balanced = at(runs.get(f"bstar{cap}", {}), "pass@1")
        fixed = at(runs.get(f"online-rft{cap}", {}), "pass@1")
        # R says how starved the pool is: that of the uncapped run, for both lines
        R = at(runs["online-rft"], "repeats", 1)
        points = pd.DataFrame({"R": R, "gain": balanced - fixed}).dropna()
        ax.plot(points["R"], points["gain"], "o", color=colour, markersize=6, alpha=0.35)
        if len(points):
            middle.append((np.exp(np.log(points["R"]).mean()), points["gain"].mean()))
    ax.plot(*np.transpose(middle), color=colour, label=label, **CURVE)


def save(figure, path: Path) -> None:
    """Writes a figure on white, so that it can be read on a dark page, too."""
    for ax in figure.axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=115, facecolor="white")
    plt.close(figure)
