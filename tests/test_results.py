"""The tables of RESULTS.md: their statistics, and that the page says what they say."""

import doctest
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))

import figures  # noqa: E402
import lines  # noqa: E402
import tables  # noqa: E402

PAGE = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
PRINTED = tables.tables()
BSTAR, ONLINE = {1: 20.0, 2: 23.0, 3: 30.5}, {1: 10.0, 2: 14.0, 3: 12.0, 4: 11.0}


def line(name: str, seed: int, score: float, T: float) -> dict:
    """A run of one iteration that starts at 9 and ends at `score`."""
    row = {"pass@1": score, "kept": 96, "repeats": 20.0, "pool/correct": 1.5, "temperature": T}
    last = {"pass@32": 2 * score, "pass@32-4": score, "unique": 0.5}
    ledger = [{"yield": [0.2, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]}]
    run = {"name": name, "seed": seed, "careless": 0.2, "ledger": ledger, "last": last}
    return run | {"metrics": [{"pass@1": 9.0}, row]}


@pytest.fixture
def path(tmp_path) -> Path:
    runs = [line("bstar", seed, score, 0.5 + seed / 10) for seed, score in BSTAR.items()]
    runs += [line("online-rft", seed, score, 1.0) for seed, score in ONLINE.items()]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


@pytest.mark.parametrize("degrees", range(1, len(lines.T_975) + 1))
def test_quantiles_of_student(degrees):
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / (degrees * math.pi) ** 0.5
    t = np.linspace(-lines.T_975[degrees - 1], lines.T_975[degrees - 1], 20_001)
    density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-4)


def test_examples_of_the_docstrings():
    assert doctest.testmod(lines) == (0, 2)


def test_rows_against_a_naive_computation(path):
    printed = tables.tables(path)
    d = [20.0 - 10, 23.0 - 14, 30.5 - 12]  # seed 4 has no bstar
    mean = sum(d) / 3
    half = 4.303 * (sum((x - mean) ** 2 for x in d) / 2 / 3) ** 0.5
    gain = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    row = f"| bstar | 3 | 24.5 ± 3.1 | {gain} | {gain} | 49.0 ± 6.2 | 24.5 ± 3.1 | 0.50 ± 0.00 |"
    assert row in printed["walk"]
    assert "| best fixed T in hindsight: 1.0 | 4 | 11.8 ± 0.9 |" in printed["walk"]
    assert f"| bstar less online-rft (T 1.0) | 3 | {gain} | 3 of 3 |" in printed["comparisons"]
    assert "| bstar | 3 | 96 ± 0 | 96 ± 0 | 20.0 ± 0.0 |" in printed["pools"]
    assert "| 20 % | 3 | 9.0 ± 0.0 | 20.0 ± 0.0 | 2.0 |" in printed["repeats"]


def test_the_figures_are_drawn_from_what_is_there(path, tmp_path):
    every = lines.load(path)
    figures.draw_walk(every[0.2], tmp_path / "walk.png")
    figures.draw_law(every, tmp_path / "repeats.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("walk.png", "repeats.png"))


@pytest.mark.parametrize("name", PRINTED)
def test_the_page_shows_what_the_command_prints(name):
    [shown] = re.findall(rf"<!-- table {name} -->\n(.*?)\n<!-- end -->", PAGE, re.S)
    assert shown == PRINTED[name]


def test_each_mean_in_the_text_stands_in_a_table():
    numbers = set(re.findall(r"[-+]?[\d.]+ (?:± \d+\.?\d+|\[[-+\d., ]+\])", PAGE))
    assert len(numbers) > 20 and not [x for x in numbers if x not in "".join(PRINTED.values())]
