"""The lines of results/walk/runs.jsonl, and how the tables say their numbers.

results/walk/runs.jsonl -> {seed: value} -> "19.7 ± 2.3", "+9.2 [+6.7, +11.8]"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from metrics import read_jsonl  # noqa: E402

LINES = ROOT / "results" / "walk" / "runs.jsonl"
N = 1920  # places of an iteration: 60 steps of 32

# 97.5 % quantiles of Student's t with 1, 2, 3, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)

Lines = dict[int, dict]  # seed -> the line of its run
Runs = dict[str, Lines]  # variant -> its runs


# -- the runs -------------------------------------------------------------------------------------


def load(path: Path = LINES) -> dict[float, Runs]:
    """share of wrong words -> variant -> seed -> line of the run."""
    runs: dict[float, Runs] = {}
    for line in read_jsonl(path):
        variants = runs.setdefault(line["careless"], {})
        variants.setdefault(line["name"], {})[line["seed"]] = line
    return runs


def at(lines: Lines, key: str, iteration: int = -1) -> dict[int, float]:
    """seed -> a metric of one iteration (-1: the last)."""
    return {seed: line["metrics"][iteration][key] for seed, line in lines.items()}


def of_last(lines: Lines, key: str) -> dict[int, float]:
    """seed -> a number of the last policy's 32 samples a question."""
    return {seed: line["last"][key] for seed, line in lines.items()}


def readings(lines: Lines, iteration: int) -> dict[int, float]:
    """seed -> R, the readings of a selected response; N where nothing was selected."""
    R = {}
    for seed, line in lines.items():
        R[seed] = line["metrics"][iteration].get("repeats", N)
    return R


def law_runs(runs: Runs) -> Runs:
    """The runs of the seeds 1 to 4 that have both bstar and online-rft."""
    seeds = {1, 2, 3, 4}
    for name in ("bstar", "online-rft"):
        seeds &= runs.get(name, {}).keys()
    chosen = {}
    for name, lines in runs.items():
        chosen[name] = {seed: lines[seed] for seed in sorted(seeds & lines.keys())}
    return chosen


def law_shares(every: dict[float, Runs]) -> list[float]:
    """The shares of wrong words that have such runs."""
    return [share for share, runs in sorted(every.items()) if law_runs(runs).get("bstar")]


# -- statistics -----------------------------------------------------------------------------------


class Mean(NamedTuple):
    """A mean, its standard error, and half of its 95 % interval; NaN where one value is all."""

    mean: float
    error: float
    half: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard error and half of the t interval.

    >>> [round(x, 3) for x in mean_of([1.0, 2.0, 3.0])]
    [2.0, 0.577, 2.484]
    """
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Mean(mean, np.nan, np.nan)
    error = float(np.std(values, ddof=1)) / n**0.5
    return Mean(mean, error, T_975[n - 2] * error)


def difference(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """a less b, of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def show(values: dict[int, float], digits: int = 1) -> str:
    """mean ± standard error

    >>> show({1: 1.0, 2: 2.0, 3: 3.0}), show({1: 1.0}), show({})
    ('2.0 ± 0.6', '1.0', '')
    """
    if not values:
        return ""
    mean = mean_of(list(values.values()))
    text = f"{mean.mean:.{digits}f}"
    return text if np.isnan(mean.error) else f"{text} ± {mean.error:.{digits}f}"


def gain(a: dict[int, float], b: dict[int, float]) -> str:
    """Mean of a less b with its 95 % interval, which two seeds are too few for."""
    differences = difference(a, b)
    if not differences:
        return ""
    mean = mean_of(differences)
    text = f"{mean.mean:+.1f}"
    if len(differences) < 3:
        return text
    low, high = mean.mean - mean.half, mean.mean + mean.half
    return f"{text} [{low:+.1f}, {high:+.1f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; the first column is text, the others stand on the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
