"""The two figures of RESULTS.md; `python results/tables.py --write` draws them.

the lines of results/walk/runs.jsonl -> docs/walk.png, docs/repeats.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lines import Lines, Runs, at, difference, law_runs, law_shares, mean_of, readings

# variant -> its label and colour
CURVES = {
    "bstar": ("bstar", "#0072b2"),
    "T 0.5": ("T 0.5", "#009e73"),
    "online-rft cap 6": ("T 1.0, capped", "#e69f00"),
    "online-rft": ("T 1.0", "#d55e00"),
}
STYLE = {"font.size": 18, "axes.spines.top": False, "axes.spines.right": False}
CURVE = {"linewidth": 3, "marker": "o", "markersize": 8}
POINT = {"linestyle": "", "marker": "o", "markersize": 6, "alpha": 0.35}
BAND = {"alpha": 0.2, "linewidth": 0}
READINGS = [2, 5, 10, 20, 50, 100]  # ticks of R


def draw_walk(runs: Runs, path: Path) -> None:
    """pass@1 over the iterations, and under it the T that bstar chose."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    shape = dict(figsize=(7, 7), sharex=True, height_ratios=(2.2, 1), layout="constrained")
    figure, (top, bottom) = plt.subplots(2, 1, **shape)
    for variant, (label, colour) in CURVES.items():
        if variant in runs:
            end = draw_band(top, runs[variant], "pass@1", 0, colour)
            top.annotate(f"  {label}", end, color=colour, va="center", annotation_clip=False)
    draw_band(bottom, runs["bstar"], "temperature", 1, CURVES["bstar"][1])

    top.set_ylabel("pass@1, %")
    top.yaxis.set_major_locator(plt.MultipleLocator(5))
    bottom.set_ylabel("T of bstar")
    bottom.set_ylim(0.4, 1.2)
    bottom.set_yticks([0.5, 0.75, 1.0])
    bottom.set_xlabel("iteration")
    bottom.set_xticks(range(7))
    save(figure, path)


def draw_band(ax, lines: Lines, key: str, first: int, colour: str) -> tuple[float, float]:
    """A metric's mean over the iterations with a band of one standard error; returns its end."""
    iterations = range(first, min(len(line["metrics"]) for line in lines.values()))
    by_iteration = [at(lines, key, i) for i in iterations]
    means = [mean_of(list(values.values())) for values in by_iteration]
    middle = np.array([m.mean for m in means])
    error = np.nan_to_num([m.error for m in means])
    low, high = middle - error, middle + error
    ax.plot(iterations, middle, color=colour, **CURVE)
    ax.fill_between(iterations, low, high, color=colour, **BAND)
    return iterations[-1], middle[-1]


def draw_law(every: dict[float, Runs], path: Path) -> None:
    """Gain of bstar over T = 1.0 against R, with and without the cap: a point a seed, and means."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure, ax = plt.subplots(figsize=(7, 5.4), layout="constrained")
    draw_gains(ax, every, "", "#0072b2", "uncapped")
    draw_gains(ax, every, " cap 6", "#e69f00", "both capped")
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks(READINGS, labels=map(str, READINGS))
    ax.minorticks_off()
    ax.set_xlabel("R at T 1.0, iteration 1")
    ax.set_ylabel("bstar less T 1.0, pass@1")
    ax.legend(frameon=False)
    save(figure, path)


def draw_gains(ax, every: dict[float, Runs], cap: str, colour: str, label: str) -> None:
    """The points of all shares of wrong words, and the line through their means."""
    middle = []
    for share in law_shares(every):
        R, gains = law_points(law_runs(every[share]), cap)
        ax.plot(R, gains, color=colour, **POINT)
        if gains:
            middle.append((np.exp(np.mean(np.log(R))), np.mean(gains)))
    ax.plot(*np.transpose(middle), color=colour, label=label, **CURVE)


def law_points(runs: Runs, cap: str) -> tuple[list[float], list[float]]:
    """R at T = 1.0, uncapped, and the gain of bstar, a seed a value."""
    balanced = at(runs.get(f"bstar{cap}", {}), "pass@1")
    fixed = at(runs.get(f"online-rft{cap}", {}), "pass@1")
    R = readings(runs["online-rft"], 1)
    seeds = sorted(balanced.keys() & fixed.keys())
    return [R[seed] for seed in seeds], difference(balanced, fixed)


def save(figure, path: Path) -> None:
    """Writes a figure on white, so that it can be read on a dark page, too."""
    import matplotlib.pyplot as plt

    for ax in figure.axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=115, facecolor="white")
    plt.close(figure)
