"""The lines of results/walk/runs.jsonl, and how the tables say their numbers.

results/walk/runs.jsonl -> a number a seed -> "19.7 ± 2.3", "+9.2 [+6.7, +11.8]"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import read_jsonl  # noqa: E402

LINES = ROOT / "results" / "walk" / "runs.jsonl"
N = 1920  # places of an iteration: 60 steps of 32

# 97.5 % quantiles of Student's t with 1, 2, 3, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)

Lines = dict[int, dict]  # seed -> the line of its run
Runs = dict[str, Lines]  # variant -> its runs


# -- the runs -------------------------------------------------------------------------------------


def load(path: Path = LINES) -> dict[float, Runs]:
    """share of wrong words -> variant -> seed -> line of the run."""
    every: dict[float, Runs] = {}
    for line in read_jsonl(path):
        for row in line["metrics"]:
            # R where nothing was selected: a first response would have been read in all places
            row.setdefault("repeats", N)
        variants = every.setdefault(line["careless"], {})
        variants.setdefault(line["name"], {})[line["seed"]] = line
    return every


def length(lines: Lines) -> int:
    """The iterations, 0 included, that all runs have."""
    return min(len(line["metrics"]) for line in lines.values())


def at(lines: Lines, key: str, iteration: int = -1) -> pd.Series:
    """A metric of one iteration (-1: the last), by seed; without the seeds that lack it."""
    picked = {seed: line["metrics"][iteration].get(key) for seed, line in lines.items()}
    return pd.Series(picked, dtype=float).dropna()


def law_runs(every: dict[float, Runs]) -> dict[float, Runs]:
    """share of wrong words -> the runs of those of the seeds 1 to 4 that have both methods."""
    chosen = {}
    for share, runs in sorted(every.items()):
        seeds = {1, 2, 3, 4} & runs.get("bstar", {}).keys() & runs.get("online-rft", {}).keys()
        if seeds:
            chosen[share] = {name: among(lines, seeds) for name, lines in runs.items()}
    return chosen


def among(lines: Lines, seeds: set[int]) -> Lines:
    """The runs of some seeds."""
    return {seed: line for seed, line in sorted(lines.items()) if seed in seeds}


# -- how numbers are said -------------------------------------------------------------------------


def show(values: pd.Series, digits: int = 1) -> str:
    """mean ± standard error

    >>> show(pd.Series([1.0, 2.0, 3.0])), show(pd.Series([1.0])), show(pd.Series(dtype=float))
    ('2.0 ± 0.6', '1.0', '')
    """
    if values.empty:
        return ""
    text = f"{values.mean():.{digits}f}"
    return f"{text} ± {values.sem():.{digits}f}" if len(values) > 1 else text


def gain(a: pd.Series, b: pd.Series) -> str:
    """Mean of a less b over the seeds of both, with its 95 % interval by Student's t.

    >>> gain(pd.Series([2.0, 4.0, 6.0]), pd.Series([1.0, 2.0, 3.0]))
    '+2.0 [-0.5, +4.5]'
    """
    difference = (a - b).dropna()
    if difference.empty:
        return ""
    mean = difference.mean()
    if len(difference) < 3:  # of two, the interval would be wider than the scale
        return f"{mean:+.1f}"
    half = T_975[len(difference) - 2] * difference.sem()
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; the first column is text, the others stand on the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, rule, *rows])
