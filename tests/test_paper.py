"""The paper's own numbers, and the README's map from equations to code."""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

import metrics
import rewards
from config import parse_config
from data import Query, Sample

README = (Path(metrics.__file__).parent / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| (`\w+\.py:\w+`[^|]*) \|$", README, re.M)


def test_n_star_is_computed_not_tuned():  # Sec. 3.1: N = 500 * 128 samples, M = 11,500 queries
    cfg = parse_config(["--task", "math"])
    assert math.ceil(cfg.samples_per_iter / 11_500) == 6


def test_the_two_examples_of_section_3_1():
    """2 of 2 selected are correct: too few. 16 of 64 are: three quarters are wrong."""
    few, diluted = metrics.query_effect([2, 64], [2, 16], 6)
    assert few == pytest.approx(2 / 6) and diluted == pytest.approx(16 / 64)


def test_ratio_is_one_with_the_answer_reward():  # Sec. 3.1: "this ratio is always 100 %"
    n = np.arange(1, 65)
    assert (metrics.query_effect(n, n, 6) == np.minimum(n / 6, 1)).all()


def test_best_of_k_is_reward_at_k_1_and_pass_at_k_is_pass_at_k_1():  # Sec. 2.2
    reward, correct = [[0.3, 0.9, 0.1]], [[1, 0, 1]]
    assert metrics.reward_at_k_s(reward, correct, 3, 1) == [0.0]  # the best-ranked one is wrong
    assert metrics.pass_at_k_s(3, [2], 3, 1) == [1.0]
    assert metrics.pass_at_k_s(3, [2], 3, 3) == [0.0]


def test_grids_of_appendix_c():
    cfg = parse_config(["--task", "math", "--temperatures", "0.5:1.2:0.05", "--taus=-1:1:0.01"])
    assert len(cfg.temperature_grid) == 15
    assert cfg.tau_grid == [i / 100 for i in range(-100, 101)]


def test_reward_range_of_eq_1():
    outcomes = [(True, [1.0]), (False, [0.0]), (True, [0.5, 0.0])]
    responses = [Sample("", "stop", correct=ok, r_prm=rewards.r_prm(p)) for ok, p in outcomes]
    query = Query("0", "", "")
    assert rewards.REWARDS["answer+prm"]([query] * 3, responses) == [2, -1, 0]


def test_the_map_is_there():
    assert len(ROWS) >= 10


@pytest.mark.parametrize("where, places", ROWS)
def test_every_equation_of_the_map_is_cited_by_what_it_names(where, places):
    cited = set(re.findall(r"Eq\. \d|Sec\. [\d.]+\d|App\. [A-F]|Algorithm 1", where))
    seen = set()
    for module, name in re.findall(r"`(\w+)\.py:(\w+)`", places):
        documented = getattr(importlib.import_module(module), name).__doc__
        here = {citation for citation in cited if citation in documented}
        assert here, f"{module}.{name} cites none of {cited}"
        seen |= here
    assert seen == cited
