"""Metrics: exploration, exploitation and their product, in NumPy; then the balancer's arithmetic, and what a finished run shows.

    correct (Q, K) -> Pass@K-S, Distinct Equations            exploration, Sec. 2.2
    reward, correct (Q, K) -> Reward@K-S                      exploitation, Sec. 2.2
    reward, correct, text (T, Q, K) -> query effect           Eq. 2 -> `decide`: the next iteration's (temperature, tau)

    python metrics.py RUN [RUN ...]           a Markdown table of the runs, alarms, and report.html with all figures (also as figures/*.png)
    python metrics.py --replay RUN            its balancing decisions taken again, by other settings if given, and the paper's Fig. 4

Pass@K-S and Reward@K-S are the exact expectations over all K-subsets of the n samples drawn, not one draw of K (the paper does not say).
"""
from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import re
from decimal import Decimal
from html import escape
from math import comb, isfinite
from pathlib import Path
from typing import Iterator, NamedTuple, NoReturn, Sequence

import numpy as np

import data
from data import UserError


# ---------------------------------------------------------------------------------------------------------------------
# Exploration

def pass_at_k_s(n, c, K: int, S: int) -> np.ndarray:
    """Pass@K-S = sum_{s=S}^{min(c,K)} C(c,s) C(n-c,K-s) / C(n,K)   [Sec. 2.2, "Exploration"]

    The probability that at least S of K samples, drawn without replacement from n of which c are correct, are correct. S=1 is the usual
    unbiased pass@k (Chen et al. 2021); n=K gives the plug-in 1[c >= S].

    n, c     (Q,) int, or one n for all     samples and correct samples of each query
    returns  (Q,) float in [0, 1]
    raises   ValueError  unless 1 <= S <= K <= n and 0 <= c <= n

    >>> pass_at_k_s(4, [0, 1, 2, 4], K=2, S=1).round(3).tolist()
    [0.0, 0.5, 0.833, 1.0]
    >>> pass_at_k_s(4, [0, 1, 2, 4], K=2, S=2).round(3).tolist()
    [0.0, 0.0, 0.167, 1.0]
    """
    n, c = np.broadcast_arrays(np.asarray(n, dtype=int), np.asarray(c, dtype=int))
    if n.size and not (1 <= S <= K <= n.min() and (0 <= c).all() and (c <= n).all()):
        raise ValueError(f"need 1 <= S <= K <= n and 0 <= c <= n, got K={K}, S={S}, n>={n.min()}, c in [{c.min()}, {c.max()}]")
    # integers of any size, divided once: exact to the last bit, where products of floats would drift or overflow
    table = {(m, k): sum(comb(k, s) * comb(m - k, K - s) for s in range(S, min(k, K) + 1)) / comb(m, K)
             for m, k in set(zip(n.ravel().tolist(), c.ravel().tolist()))}
    return np.array([table[m, k] for m, k in zip(n.ravel().tolist(), c.ravel().tolist())], dtype=float).reshape(n.shape)


def equations(text: str) -> list[str]:
    """The equations of a solution: GSM8K's annotations <<a=b>> where there are any, else neighbours around each "=".

    What Wu et al. (2024) count as an equation could not be read; a chain a = b = c gives two here, and words around a formula are cut off.

    >>> equations("He sprints 3*3=<<3*3=9>>9 times")
    ['3*3=9']
    >>> equations("Cid = Ida * 6 = 5 * 6 = 0 ; # 0")
    ['Cid=Ida*6', 'Ida*6=5*6', '5*6=0']
    >>> equations("so she has 3 + 4 = 7 apples, and $x^2 = 9$.")
    ['3+4=7', 'x^2=9']
    """
    notes = re.findall(r"<<([^<>]*=[^<>]*)>>", text)
    if notes:
        return ["".join(e.split()) for e in notes]
    found = []
    for clause in re.split(r"[;\n$]|,(?!\d)|\.(?!\d)|\\[\[\]()]", text):
        sides = [s.split() for s in re.sub(r"(?<![<>!:])=", " = ", clause).split(" = ")]
        for left, right in zip(sides, sides[1:]):
            a, b = "".join(_formula(left[::-1])[::-1]), "".join(_formula(right))
            if a and b:
                found.append(f"{a}={b}")
    return found


def _formula(tokens: list[str]) -> list[str]:
    for i, t in enumerate(tokens):
        if re.fullmatch(r"[a-z]{2,}[:']?\w*", t):      # an English word ends the formula; LaTeX commands and names do not
            return tokens[:i]
    return tokens


class Distinct(NamedTuple):
    """`distinct` is the mean over the queries that have an equation, `coverage` the share of queries that do."""
    distinct: float
    coverage: float


def distinct_equations(responses: Sequence[Sequence[str]], correct) -> Distinct:
    """Distinct Equations = unique / total equations among a query's correct responses, averaged over queries   [Sec. 2.2, Wu et al. 2024]

    responses (Q,) lists of K texts (or one list of K texts: one query); correct (Q, K) bool
    returns   Distinct(distinct, coverage); (0.0, 0.0) where no correct response holds an equation

    >>> distinct_equations([["1+1=2", "1+1=2", "2-0=2"], ["no idea", "1=2", "3"]], [[1, 1, 1], [0, 0, 0]])
    Distinct(distinct=0.6666666666666666, coverage=0.5)
    """
    if responses and isinstance(responses[0], str):
        responses, correct = [responses], [correct]
    ratios = []
    for texts, right in zip(responses, correct, strict=True):
        found = [e for text, ok in zip(texts, right, strict=True) if ok for e in equations(text)]
        if found:
            ratios.append(len(set(found)) / len(found))
    return Distinct(float(np.mean(ratios)), len(ratios) / len(responses)) if ratios else Distinct(0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Exploitation

def reward_at_k_s(reward, correct, K: int, S: int) -> np.ndarray:
    """Reward@K-S = sum_j y_j C(c_<j, S-1) C(n-j, K-S) / C(n,K),  j = 1..n by falling reward   [Sec. 2.2, "Exploitation"]

    The probability that the S best-ranked of K samples drawn without replacement are all correct: y_j is the correctness at rank j, the
    lowest of the S; c_<j the correct ones above it. S=1 is Best-of-K. Samples of equal reward are averaged over all their orders, so
    that no order of storage favours the correct ones; -inf and NaN rank last.

    reward   (Q, n) float, correct (Q, n) bool
    returns  (Q,) float in [0, 1]
    raises   ValueError  unless the shapes agree and 1 <= S <= K <= n

    >>> reward_at_k_s([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]], [[1, 0, 1], [0, 1, 1]], K=2, S=1).round(3).tolist()
    [0.667, 0.333]
    >>> reward_at_k_s([[1.0, 1.0]], [[1, 0]], K=2, S=1).tolist()          # a tie: either may come first
    [0.5]
    """
    reward, correct = np.asarray(reward, dtype=float), np.asarray(correct, dtype=bool)
    if reward.ndim != 2 or reward.shape != correct.shape or not 1 <= S <= K <= reward.shape[1]:
        raise ValueError(f"need reward and correct of one shape (Q, n) and 1 <= S <= K <= n, got {reward.shape}, {correct.shape}, K={K}, S={S}")
    reward = np.where(np.isnan(reward), -np.inf, reward)
    return np.array([_reward_at_k_s(r, y, K, S) for r, y in zip(reward, correct)])


def _reward_at_k_s(reward: np.ndarray, correct: np.ndarray, K: int, S: int) -> float:
    n, total, above, c_above = len(reward), 0.0, 0, 0
    for value in np.unique(reward)[::-1]:
        tie = correct[reward == value]
        g, h = len(tie), int(tie.sum())
        for p in range(g if h else 0):                       # a correct one at place p of the tie has m correct before it, hypergeometric
            ways = comb(n - above - p - 1, K - S)
            for m in range(max(0, p - g + h), min(p, h - 1) + 1):
                chance = h * comb(p, m) * comb(g - 1 - p, h - 1 - m) / (g * comb(g - 1, h - 1))
                total += chance * comb(c_above + m, S - 1) * ways
        above, c_above = above + g, c_above + h
    return total / comb(n, K)


def auc(score, label) -> float:
    """P(score of a positive > score of a negative), ties half: the area under the ROC curve by rank sums (Mann-Whitney); NaN with one class.

    >>> auc([0.9, 0.8, 0.4, 0.4], [1, 0, 1, 0])
    0.625
    """
    score, label = np.asarray(score, dtype=float), np.asarray(label, dtype=bool)
    n_pos, n_neg = int(label.sum()), int((~label).sum())
    if not n_pos or not n_neg:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]     # the mean rank of a tie
    return float((rank[label].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def calibration(p, label, bins: int = 10) -> dict:
    """Reliability of probabilities: in ten equal bins the mean of p, the share of positives, the count; and ECE = sum_b n_b/n |difference|.

    >>> c = calibration([0.05, 0.95, 0.85, 0.95], [0, 1, 0, 1])
    >>> c["ece"], c["calibration"]["n"], c["calibration"]["correct"][9]
    (0.25, [1, 0, 0, 0, 0, 0, 0, 0, 1, 2], 1.0)
    """
    p, label = np.asarray(p, dtype=float), np.asarray(label, dtype=float)
    at = np.minimum((p * bins).astype(int), bins - 1)
    n, score, right = (np.bincount(at, w, bins) for w in (None, p, label))
    mean = lambda total: [round(float(x / k), 4) if k else None for x, k in zip(total, n)]
    return {"ece": round(float(np.abs(score - right).sum() / len(p)), 4),
            "calibration": {"score": mean(score), "correct": mean(right), "n": n.astype(int).tolist()}}


# ---------------------------------------------------------------------------------------------------------------------
# The balance: query effect, the tau sweep, the decision

def query_effect(n_sel, n_correct, n_star: int) -> np.ndarray:
    """qe_i = min(n'_i / n*, 1) * n'_i / n_i   [Eq. 2, Sec. 3.1]

    n_sel     (...,) int   n_i, unique responses with r > tau
    n_correct (...,) int   n'_i, the correct ones among them
    n_star    int          n* = ceil(N / M): correct responses wanted a query
    returns   (...,) float in [0, 1]; 0 where n_i = 0 (the paper is silent)
    raises    ValueError  unless 0 <= n'_i <= n_i and n* >= 1

    >>> query_effect([2, 64, 6, 0], [2, 16, 6, 0], 6).round(3).tolist()      # the section's two examples, the ideal, nothing selected
    [0.333, 0.25, 1.0, 0.0]
    """
    n_sel, n_correct = np.asarray(n_sel, dtype=float), np.asarray(n_correct, dtype=float)
    if n_star < 1 or (n_correct < 0).any() or (n_correct > n_sel).any():
        raise ValueError(f"need 0 <= n_correct <= n_sel and n_star >= 1, got n_star={n_star}")
    return np.minimum(n_correct / n_star, 1) * n_correct / np.maximum(n_sel, 1)


def sweep(reward, correct, duplicate, taus: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """n_i and n'_i for every tau at once: a response is selected by the taus strictly below its reward, r > tau   [Sec. 2.3]

    Each response falls into the bin of the number of taus below it; counts above every tau are one reversed cumulative sum. So the cost
    is one binary search a response, however many thresholds there are.

    reward, correct (Q, K); duplicate (Q, K) bool, an earlier sample of the query has the same text; taus (G,) rising
    returns  n_sel, n_correct (Q, G) int
    """
    reward, taus = np.nan_to_num(np.asarray(reward, dtype=float), nan=-np.inf, posinf=np.inf, neginf=-np.inf), np.asarray(taus, dtype=float)
    below = np.searchsorted(taus, reward, side="left")       # (Q, K) the number of taus < r
    n_sel, n_correct = (_counts_above(below, keep, len(taus)) for keep in (~np.asarray(duplicate, bool),
                                                                          ~np.asarray(duplicate, bool) & np.asarray(correct, bool)))
    return n_sel, n_correct


def _counts_above(below: np.ndarray, keep: np.ndarray, G: int) -> np.ndarray:
    Q = len(below)
    bins = (below + np.arange(Q)[:, None] * (G + 1))[keep]
    counts = np.bincount(bins, minlength=Q * (G + 1)).reshape(Q, G + 1)
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]    # responses with at least j + 1 taus below them are selected by tau_j


def classes(texts: Sequence[str], key=lambda text: " ".join(text.split())) -> list[int]:
    """The number of each text's class: the same text, white space folded, is the same class  ("unique" in Eq. 2; the paper does not define it).

    >>> classes(["1 + 1 = 2", "2 = 2", "1 + 1  = 2\\n"])
    [0, 1, 0]
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(k, len(seen)) for k in map(key, texts)]


def repeats(reward, text) -> np.ndarray:
    """Does another sample of the query say the same, at a reward at least as high?  One of each class stays, the best-rewarded, first drawn.

    reward (Q, K) float, text (Q, K) int, see `classes`; returns (Q, K) bool

    >>> repeats([[0.5, 0.9, 0.9]], [[0, 0, 0]]).tolist()
    [[True, False, True]]
    """
    reward, text = np.asarray(reward, dtype=float), np.asarray(text)
    again = np.ones(reward.shape, dtype=bool)
    for row, order in enumerate(np.argsort(-reward, axis=1, kind="stable")):
        again[row, order[np.unique(text[row, order], return_index=True)[1]]] = False
    return again


def effects(reward, correct, text, taus: Sequence[float], n_star: int, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """E[qe_i] and P(n_i = 0) at every tau, when k of a query's K samples are drawn without replacement   [Eq. 2; Fig. 4 (a)]

    Exact: no subset is drawn. A class is in n_i if one of its samples with r > tau is drawn, right if its best-rewarded one is. k = None
    or K takes the samples as they are.

    reward, correct, text (Q, K), text as in `repeats`; taus (G,) rising; returns two (Q, G) float

    >>> effects([[1.0, 1.0, 1.0]], [[1, 1, 1]], [[0, 0, 1]], [0.0], n_star=2, k=2)[0].round(3).tolist()     # of 3 pairs, one says a thing twice
    [[0.833]]
    """
    reward, correct, text = np.asarray(reward, dtype=float), np.asarray(correct, dtype=bool), np.asarray(text)
    (Q, K), again = reward.shape, repeats(reward, text)
    if k in (None, K):
        n_sel, n_correct = sweep(reward, correct, again, taus)
        return query_effect(n_sel, n_correct, n_star), (n_sel == 0).astype(float)
    found = np.empty((2, Q, len(taus)))
    for q in range(Q):
        best = text[q][~again[q]]                            # each class once, and whether it is right
        right = np.isin(text[q], best[correct[q][~again[q]]])
        for g, tau in enumerate(taus):
            sizes = [tuple(sorted(np.unique(text[q][(reward[q] > tau) & of], return_counts=True)[1].tolist())) for of in (right, ~right)]
            found[:, q, g] = _expected_effect(*sizes, K, k, n_star)
    return found[0], found[1]


@functools.lru_cache(maxsize=100_000)
def _expected_effect(right: tuple[int, ...], wrong: tuple[int, ...], K: int, k: int, n_star: int) -> tuple[float, float]:
    """E[qe] and P(n = 0) over the k-subsets of K samples, which hold right and wrong classes of the sizes given; the other samples have r <= tau."""
    rest, drawn = K - sum(right) - sum(wrong), np.arange(k + 1)
    others = np.array([comb(rest, k - j) for j in drawn.tolist()] + [0] * k, dtype=float)[np.add.outer(drawn, drawn)]   # [j right ones, j wrong ones]
    chance = _ways(right, k).T @ others @ _ways(wrong, k) / comb(K, k)                       # (n' + 1, n - n' + 1)
    a, b = np.indices(chance.shape)
    return float((chance * query_effect(a + b, a, n_star)).sum()), float(chance[0, 0])


@functools.lru_cache(maxsize=100_000)
def _ways(sizes: tuple[int, ...], k: int) -> np.ndarray:
    """[j, a]: the number of ways to draw j samples from classes of these sizes so that a of the classes are met."""
    ways = np.zeros((k + 1, len(sizes) + 1))
    ways[0, 0] = 1
    for size in sizes:
        ways[:, 1:] += sum(comb(size, d) * np.pad(ways, ((d, 0), (0, 0)))[:k + 1, :-1] for d in range(1, min(size, k) + 1))
    return ways


def exact_taus(reward, correct, text, n_star: int, k: int | None = None) -> list[float]:
    """For each temperature the threshold of the greatest mean query effect among all observed rewards; none of a grid's is better.

    A query's effect is a step function of tau that changes at its own rewards only; the mean is the sum of all those steps, sorted. The
    lowest candidate is 1 below the least reward and keeps all; equal ones go to the higher tau.

    reward, correct, text (G_T, Q, K); returns at most G_T thresholds, rising

    >>> exact_taus([[[0.3, 0.7]]], [[[0, 1]]], [[[0, 1]]], n_star=1)
    [0.3]
    """
    found = set()
    for pool in zip(np.asarray(reward, dtype=float), correct, text, strict=True):
        at, step = [], []
        low = min(pool[0][np.isfinite(pool[0])], default=1.0) - 1
        for r, c, x in zip(*pool):
            taus = np.array([low, *np.unique(r[np.isfinite(r)])])
            at.append(taus)
            step.append(np.diff(effects(r[None], np.asarray(c)[None], np.asarray(x)[None], taus, n_star, k)[0][0], prepend=0.0))
        taus, place = np.unique(np.concatenate(at), return_inverse=True)
        mean = np.cumsum(np.bincount(place, np.concatenate(step)))
        found.add(float(taus[np.flatnonzero(mean >= mean.max() - 1e-9)[-1]]))
    return sorted(found)


def decide(reward, correct, text, temperatures: Sequence[float], taus: Sequence[float], n_star: int, seed: int = 0, draws: int = 1000,
           k: int | None = None) -> dict:
    """(T, tau) = argmax of the mean query effect over the subset, as one line of the ledger   [Sec. 3.3, Algorithm 1]

    The mean is over all queries, those without a selection counting 0: otherwise a high tau would win by dropping the hard ones. Exact
    ties go to the lower T, then to the higher tau; where the whole surface is 0, T and tau are those nearest 1.0 and 0.0. `interval`, `ties`
    and `tied` come from a bootstrap over queries, paired between grid points.

    reward, correct, text  (G_T, Q, K) of the subset's samples at each temperature, text as in `repeats`
    k        None for all K samples, else the expectation over k of them, see `effects`
    returns  dict: temperature, tau, qe, interval (95 %), ties (other points not significantly below), tied (these, [T, tau]), empty (share of
             queries without a selection), edge (which ends of the grid were chosen), blind (the surface is 0), n_star, seed, and the whole
             surface (G_T, G_tau)
    """
    qe, empty = map(np.stack, zip(*(effects(r, c, x, taus, n_star, k) for r, c, x in zip(reward, correct, text, strict=True))))   # (G_T, Q, G_tau)
    surface = qe.mean(axis=1)
    best = np.argwhere(surface >= surface.max() - 1e-12)
    i, j = min(best.tolist(), key=lambda g: (g[0], -g[1]))
    if blind := not surface.max():                           # not one right answer selected anywhere: nothing to choose by
        i, j = nearest(temperatures, 1.0), nearest(taus, 0.0)
    Q = qe.shape[1]
    weights = np.random.default_rng(seed).multinomial(Q, np.full(Q, 1 / Q), size=draws) / Q  # (draws, Q)
    boot = np.einsum("bq,tqg->btg", weights, qe, optimize=True)
    lead = np.quantile(boot[:, i, j][:, None, None] - boot, 0.025, axis=0)
    tied = [[temperatures[a], taus[b]] for a, b in np.argwhere(lead <= 0).tolist() if (a, b) != (i, j)]
    edge = [name for name, n, grid in (("temperature", i, temperatures), ("tau", j, taus)) if len(grid) > 1 and n in (0, len(grid) - 1)]
    return {"temperature": temperatures[i], "tau": taus[j], "qe": float(surface[i, j]),
            "interval": np.quantile(boot[:, i, j], [0.025, 0.975]).round(6).tolist(), "ties": len(tied), "tied": tied,
            "empty": float(empty[i, :, j].mean()), "edge": edge, "blind": blind, "n_star": n_star, "seed": seed,
            "temperatures": list(temperatures), "taus": list(taus), "surface": surface.round(6).tolist()}


def nearest(values: Sequence[float], x: float) -> int:
    """The place of the value nearest to x, the first of equals."""
    return int(np.argmin(np.abs(np.array(values) - x)))


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder, read

def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file; [] where it is missing. A torn line (a kill in mid-write) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in rows if isinstance(r, dict)]


class Run(NamedTuple):
    """A run's folder, as much of it as can be read; `config` is without the seed."""
    path: Path
    name: str
    seed: int
    config: dict
    rows: list[dict]                       # metrics.jsonl
    ledger: list[dict]                     # ledger.jsonl
    seconds: list[dict]                    # times.jsonl


def read_run(path: Path) -> Run:
    """Raises UserError where the folder is no run of bstar.py; lines that are torn, or not as ours are, are left out."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        missing = {"method", "reward", "seed", "steps_per_iter"} - config.keys()
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: no readable config.json in it; expected the folder of a run, e.g. runs/toy-bstar-answer-0") from None
    if missing or not _is_number(config["steps_per_iter"]):
        raise UserError(f"{path}: its config.json is not one of bstar.py (no number {', '.join(sorted(missing)) or 'steps_per_iter'})")
    read = lambda name, *keys: [r for r in read_jsonl(path / name) if all(_is_number(r.get(k)) for k in keys)]
    rows = {r["iter"]: r for r in read("metrics.jsonl", "iter", "eval_samples", "S", "pass@1", "val/pass@1")}
    ledger = {d["iter"]: d for d in read("ledger.jsonl", "iter", "temperature", "tau", "qe", "n_star", "ties", "empty") if _is_decision(d)}
    seconds = [r for r in read("times.jsonl", "iter", "seconds") if isinstance(r.get("phase"), str)]
    return Run(path, path.resolve().name, config.pop("seed"), config, [rows[i] for i in sorted(rows)], [ledger[i] for i in sorted(ledger)], seconds)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def _is_decision(d: dict) -> bool:
    try:
        Ts, taus = len(d["temperatures"]), len(d["taus"])
        shapes = [np.array(d[k], dtype=float).shape for k in ("temperatures", "taus", "surface", "interval")]
        return (d["temperature"] in d["temperatures"] and d["tau"] in d["taus"] and d["n_star"] >= 1 and shapes == [(Ts,), (taus,), (Ts, taus), (2,)]
                and all(T in d["temperatures"] and tau in d["taus"] for T, tau in d.get("tied", [])) and set(d["edge"]) <= {"temperature", "tau"})
    except (KeyError, TypeError, ValueError):
        return False


class Group(NamedTuple):
    """Runs that differ in the seed alone."""
    label: str
    runs: list[Run]
    colour: str                            # the same in every figure


def by_seed(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order given; the same seed a second time is not another seed and makes its own group."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        key = json.dumps(run.config, sort_keys=True)
        copies = sum(r.seed == run.seed for (k, _), g in found.items() if k == key for r in g)
        found.setdefault((key, copies), []).append(run)
    name = lambda g: os.path.commonprefix([r.name for r in g]).rstrip("-_ ") or f"{g[0].config['method']} {g[0].config['reward']}"
    label = lambda g: shorten(g[0].name if len(g) == 1 else f"{name(g)}, {len(g)} seeds", 44)
    return [Group(label(g), g, colour) for g, colour in zip(found.values(), itertools.cycle(COLOURS))]


def shorten(text: str, n: int) -> str:
    """A long label without its middle.

    >>> shorten("toy-bstar-answer+oracle-1", 12)
    'toy-b…acle-1'
    """
    return text if len(text) <= n else f"{text[:(n - 1) // 2]}…{text[-(n // 2):]}"


def value(row: dict, key: str) -> float | None:
    """row[key] if it is a number; K and S in the key stand for the run's own, so that runs of different K and S share a column.

    >>> value({"eval_samples": 32, "S": 4, "pass@32-4": 63.5}, "pass@K-S")
    63.5
    """
    x = row.get(key.replace("@K", f"@{row['eval_samples']}").replace("-S", f"-{row['S']}"))
    return x if _is_number(x) else None


def markdown(lines: Sequence[Sequence]) -> str:
    """A Markdown table; the first line is its head.

    >>> print(markdown([["T", "tau"], [0.5, 1]]))
    | T | tau |
    |---|---|
    | 0.5 | 1 |
    """
    head, *rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


COLUMNS = ["val/pass@1", "pass@1", "pass@K", "pass@K-S", "reward@K-S", "prm@K-S", "distinct", "sound@1", "sound@K", "false_reasoning", "selected/false_reasoning",
           "temperature", "tau"]


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: the mean over seeds, then each run's first, last and best iteration (best by validation pass@1, not by the test set).

    Runs whose config.json differs in the seed alone are one group: mean ± standard error of their first and last iterations and of the gain.
    """
    names = [n for n in COLUMNS if any(value(r, n) is not None for run in runs for r in run.rows)]
    lines = [["run", "iteration", *names]]
    several = len({(r["eval_samples"], r["S"]) for run in runs for r in run.rows[:1]}) > 1
    for label, group, _ in by_seed([run for run in runs if run.rows]):
        ends = {n: [(a, b) for r in group if (a := value(r.rows[0], n)) is not None and (b := value(r.rows[-1], n)) is not None] for n in names}
        for when, pick in (("first", lambda a, b: a), ("last", lambda a, b: b), ("gain", lambda a, b: b - a)) if len(group) > 1 else ():
            lines.append([f"mean of {label}", when, *(_mean_cell(n, [pick(*e) for e in ends[n]], len(group)) for n in names)])
    for run in runs:
        name = run.name + (f" (K {run.rows[0]['eval_samples']}, S {run.rows[0]['S']})" if several and run.rows else "")
        ends = [("first", run.rows[0]), ("last", run.rows[-1]), ("best", max(run.rows, key=lambda r: r["val/pass@1"]))] if run.rows else []
        lines += [[name, f"{r['iter']} ({label})", *(_cell(n, value(r, n)) for n in names)] for label, r in ends]
        lines += [] if ends else [[name, "no metrics yet", *[""] * len(names)]]
    return markdown(lines)


def comparison(runs: Sequence[Run], against: Path) -> str:
    """A Markdown table as the paper's Table 1: the last iteration of each group of runs, mean ± standard error over seeds, and under it the
    difference to the group that `against` is in, paired by seed."""
    groups = by_seed([run for run in runs if run.rows])
    last = [{run.seed: run.rows[-1] for run in g.runs} for g in groups]
    base = next((rows for g, rows in zip(groups, last) if against.resolve() in [run.path.resolve() for run in g.runs]), None)
    if base is None:
        raise UserError(f"--against {against}: not one of the runs given, or without metrics")
    names = [n for n in COLUMNS if any(value(r, n) is not None for rows in last for r in rows.values())]
    lines = [["runs", "", *names]]
    for g, rows in zip(groups, last):
        pairs = {n: [(value(r, n), value(base.get(seed, r), n), seed in base) for seed, r in rows.items()] for n in names}
        lines.append([g.label, "last", *(_mean_cell(n, [a for a, *_ in pairs[n] if a is not None], len(rows)) for n in names)])
        if rows is not base and (both := rows.keys() & base.keys()):
            lines.append(["", f"difference, {len(both)} seed{'s' * (len(both) > 1)}",
                          *(_mean_cell(n, [a - b for a, b, ok in pairs[n] if ok and None not in (a, b)], len(both)) for n in names)])
    return markdown(lines)


def _cell(name: str, x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if name in ("distinct", "false_reasoning", "selected/false_reasoning") else f"{x:.1f}"


def _mean_cell(name: str, values: list[float], n: int) -> str:
    return "" if len(values) < n else _cell(name, np.mean(values)) + (f" ± {_cell(name, standard_error(values))}" if n > 1 else "")


def standard_error(values) -> float | np.ndarray:
    """Of the mean over the first axis; 0 of a single value.

    >>> float(standard_error([1.0, 3.0]))
    1.0
    """
    return np.std(values, axis=0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Alarms

def alarms(rows: Sequence[dict], ledger: Sequence[dict]) -> list[str]:
    """What to look at in a run, one line each; the word before the colon is the kind. `rows` of metrics.jsonl, `ledger` of ledger.jsonl.

    reversal  from the first row to the last pass@1 rose while pass@K or distinct equations fell, each beyond noise (see `shift`): the policy
              gets better at what it could do and loses the rest ("self-improvement reversal", Wu et al. 2024)
    drift     prm/auc more than 0.05 below the first one: the PRM no longer knows the policy's solutions   [Sec. 2.3, Observation 3]
    edge      a choice at an end of its grid is better than its neighbour inside, so the best may lie outside
    ties      other grid points are within noise of the choice (95 %, paired bootstrap over the subset's queries)
    """
    return [*_reversal(rows), *_drift(rows), *_edge(ledger), *_ties(ledger)]


def shift(before: float, after: float, n_before: float, n_after: float) -> int:
    """+1 or -1 where a share of n rose or fell by more than two standard errors, else 0.

    Binomial, with a success and a failure added on each side (Agresti & Caffo 2000), so that shares of 0 and 1 have an error too; for a mean
    of shares, as distinct equations are, it is an upper bound. The two sides ask the same questions: unpaired, it errs to silence.

    >>> shift(0.96, 0.82, 200, 200), shift(0.96, 0.93, 200, 200)
    (-1, 0)
    """
    (p, n), (q, m) = (((x * n + 1) / (n + 2), n + 2) for x, n in ((before, n_before), (after, n_after)))
    return int(np.sign(q - p)) * int(abs(q - p) > 2 * (p * (1 - p) / n + q * (1 - q) / m) ** 0.5)


def _reversal(rows: Sequence[dict]) -> Iterator[str]:
    ends = [[value(r, k) for k in ("pass@1", "pass@K", "distinct", "queries", "coverage")] for r in (*rows[:1], *rows[-1:])]
    if not rows or None in ends[0] + ends[1]:
        return
    (one, many, distinct, n, share), (one_, many_, distinct_, n_, share_) = ends
    fell = [f"pass@{rows[0]['eval_samples']} fell {many:.1f} -> {many_:.1f}"] * (shift(many / 100, many_ / 100, n, n_) < 0)
    fell += [f"distinct equations fell {distinct:.2f} -> {distinct_:.2f}"] * (shift(distinct, distinct_, n * share, n_ * share_) < 0)
    if fell and shift(one / 100, one_ / 100, n, n_) > 0:
        yield (f"reversal: from iteration {rows[0]['iter']} to {rows[-1]['iter']} pass@1 rose {one:.1f} -> {one_:.1f} while {' and '.join(fell)}, "
               f"each by more than two standard errors on {n_} questions")


def _drift(rows: Sequence[dict]) -> Iterator[str]:
    seen = [r for r in rows if _is_number(r.get("prm/auc"))]
    if seen and (low := min(seen, key=lambda r: r["prm/auc"]))["prm/auc"] < seen[0]["prm/auc"] - 0.05:
        yield (f"drift: the PRM's AUC fell from {seen[0]['prm/auc']:.3f} (iteration {seen[0]['iter']}) to {low['prm/auc']:.3f} (iteration {low['iter']}); "
               "train it again, on solutions of the policy as it is now")


def _edge(ledger: Sequence[dict]) -> Iterator[str]:
    for axis, (name, grid_) in enumerate((("temperature", "temperatures"), ("tau", "taus"))):
        found = []
        for d in ledger:
            at = [d["temperatures"].index(d["temperature"]), d["taus"].index(d["tau"])]
            surface = np.moveaxis(np.array(d["surface"]), axis, 0)[:, at[1 - axis]]
            if name in d["edge"] and len(surface) > 1 and surface[at[axis]] > surface[1 if at[axis] == 0 else -2]:
                found.append(d)
        if found:
            d = found[-1]
            yield (f"edge: the best {name} was an end of its grid, {d[grid_][0]:g} to {d[grid_][-1]:g}, in {len(found)} of {len(ledger)} decisions, "
                   f"last {d[name]:g} in iteration {d['iter']}; a wider --{grid_} may hold a better one")


def _ties(ledger: Sequence[dict]) -> Iterator[str]:
    if found := [d for d in ledger if d["ties"]]:
        d = found[-1]
        spread = [f"{name} {min(x):g} to {max(x):g}" for name, x in zip(("T", "tau"), zip(*d.get("tied", []), [d["temperature"], d["tau"]]))]
        yield (f"ties: {d['ties']} of {np.array(d['surface']).size - 1} other grid points are within noise of iteration {d['iter']}'s choice"
               f"{f' ({spread[0]}, {spread[1]})' if d.get('tied') else ''}; so it was in {len(found)} of {len(ledger)} decisions; more --balance-queries "
               "tell more of them apart")


# ---------------------------------------------------------------------------------------------------------------------
# Replay: a finished run's decisions taken again, without any model

def load_pool(run: Run, d: dict, queries: int | None = None) -> list[np.ndarray]:
    """reward, correct, text (G_T, Q, K) of the samples behind a ledger line, of the first `queries`; raises UserError where they can't be had."""
    path = run.path / "samples" / f"balance_{d['iter']}.npz"
    try:
        with np.load(path) as saved:
            arrays = [saved[name].astype(kind) for name, kind in (("reward", float), ("correct", bool), ("text", int))]
    except Exception as e:                                   # missing, torn, no zip, no such array: zipfile, zlib and NumPy each have their own
        said = "missing" if isinstance(e, FileNotFoundError) else "broken, or of a version that kept no texts"
        raise UserError(f"{path}: {said}; replay needs the samples that the run balanced on") from None
    if len({a.shape for a in arrays}) > 1 or arrays[0].ndim != 3 or not arrays[0].size or len(arrays[0]) != len(d["temperatures"]):
        raise UserError(f"{path}: its shapes {[a.shape for a in arrays]} don't fit the ledger's {len(d['temperatures'])} temperatures")
    if queries and queries > arrays[0].shape[1]:
        raise UserError(f"--queries {queries}: the run balanced on {arrays[0].shape[1]}")
    return [a[:, :queries] for a in arrays]


def replay(run: Run, temperatures: Sequence[float] | None = None, taus: Sequence[float] | None = None, n_star: int | None = None,
           queries: int | None = None, samples: int | None = None, exact_tau: bool = False) -> list[tuple[dict, dict]]:
    """The ledger's decisions with other settings; with none, the ledger's own lines to the last bit   [Sec. 3.2, Fig. 4]

    temperatures  some of those sampled at; taus any, or exact_tau for all observed rewards (see `exact_taus`) and the paper's 0
    queries       the first so many of the subset, whose order is random; samples: the expectation over so many of the K (see `effects`)
    returns       for each decision its ledger line and `fig4` of it
    """
    found, bar = [], data.progress(len(run.ledger), "replay") if samples else None           # minutes at 64 samples of 600 queries
    for d in run.ledger:
        Ts, n = temperatures or d["temperatures"], n_star or d["n_star"]
        if not set(Ts) <= set(d["temperatures"]):
            say = lambda values: ", ".join(f"{T:g}" for T in values)
            raise UserError(f"--temperatures {say(Ts)}: the run sampled at {say(d['temperatures'])}; choose among these")
        pool = [a[[d["temperatures"].index(T) for T in Ts]] for a in load_pool(run, d, queries)]
        if samples and samples > pool[0].shape[2]:
            raise UserError(f"--samples {samples}: the run drew {pool[0].shape[2]} a question")
        line = decide(*pool, Ts, sorted({0.0, *exact_taus(*pool, n, samples)}) if exact_tau else taus or d["taus"], n, d.get("seed", 0), k=samples)
        found.append(({"iter": d["iter"], **line}, fig4(line, pool)))
        if bar:
            bar.update(1)
    if bar:
        bar.close()
    return found


def fig4(line: dict, pool: Sequence[np.ndarray]) -> dict:
    """What Fig. 4 shows, at the paper's fixed T = 1 and tau = 0 or the grid's nearest; equal ones to the lower T and the higher tau   [Sec. 3.2]

    returns  T, tau (the fixed ones), sizes {k: mean query effect of k = K/4, K/2, 3K/4, K samples}, best_T at that tau, best_tau at that T
    """
    Ts, taus, surface, K = line["temperatures"], line["taus"], np.array(line["surface"]), pool[0].shape[2]
    i, j = nearest(Ts, 1.0), nearest(taus, 0.0)
    sizes = {k: float(effects(*(a[i] for a in pool), [taus[j]], line["n_star"], k)[0].mean()) for k in sorted({-(-K * part // 4) for part in (1, 2, 3, 4)})}
    return {"T": Ts[i], "tau": taus[j], "sizes": sizes, "best_T": Ts[int(surface[:, j].argmax())], "best_tau": taus[::-1][int(surface[i, ::-1].argmax())]}


def replay_table(run: Run, again: Sequence[tuple[dict, dict]]) -> str:
    """The decisions taken again beside the logged ones, and Fig. 4's numbers: qe@k of k samples a query at T = 1 and tau = 0, see `fig4`."""
    f = again[0][1]
    head = ["iter", "T", "tau", "qe", "95 %", "ties", "logged T", "tau", "qe", *(f"qe@{k}" for k in f["sizes"]),
            f"best T (tau {f['tau']:g})", f"best tau (T {f['T']:g})"]
    rows = [[d["iter"], f"{line['temperature']:g}", f"{line['tau']:g}", f"{line['qe']:.4f}", "{:.3f} to {:.3f}".format(*line["interval"]), line["ties"],
             f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}", *(f"{x:.4f}" for x in f["sizes"].values()), f"{f['best_T']:g}", f"{f['best_tau']:g}"]
            for d, (line, f) in zip(run.ledger, again)]
    return markdown([head, *rows])


# ---------------------------------------------------------------------------------------------------------------------
# The report: figures as data, each drawn once for the page and as PNG

INK, STYLES = "#1b1f24", ["-", "--", "-.", ":"]
COLOURS = ["#2f7fc1", "#e0722c", "#3a9a5b", "#c24f93", "#8a6fd1", "#a8862b", "#2aa3a3", "#d2514f", "#7d8590", "#6b8e23",
           "#5d55d8", "#d8b500", "#e58fb5", "#14806f"]          # seen on white and on black


class Line(NamedTuple):
    """A curve: mean and standard error over the runs of a group, a level line, or only a label for the legend."""
    label: str
    x: Sequence[float]
    y: Sequence[float]
    se: Sequence[float] = ()
    colour: str = INK
    style: str = "-"
    marker: str = "o"


class Panel(NamedTuple):
    """A figure: what is in it, and one sentence on what to see there and what in the paper it answers to."""
    name: str
    title: str
    see: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line] = ()
    bars: Sequence[tuple[str, dict[str, float]]] = ()        # (label, seconds by phase)
    heat: dict | None = None                                 # a ledger line


STEPS, ITER, SHARE = "training steps", "iteration", "% of test questions"
# name, title, x, y, {key of metrics.jsonl: its name in the legend; * is every K in the rows}, what to see; drawn if a run has the first key
CURVES = {"Exploration and exploitation": [
    ("pass1", "Greedy pass@1", STEPS, SHARE, {"pass@1": ""}, "A curve that ends above the level line has gained by teaching itself. Paper: Fig. 1."),
    ("distinct", "Distinct equations", STEPS, "unique / all equations", {"distinct": ""},
     "How different a question's right answers are: the lower, the more the policy repeats itself. Paper: Fig. 2, right."),
    ("passk", "Pass@K", STEPS, SHARE, {"pass@*": "K = *"},
     "What the policy finds at all in K tries; it falls where luck or variety is trained away. Paper: Figs. 3, 5 (S = 1)."),
    ("passks", "Pass@K-S", STEPS, SHARE, {"pass@*-S": "K = *"}, "What it finds S times in K tries, which luck does less for. Paper: Figs. 3, 5."),
    ("rewardks", "Reward@K-S", STEPS, SHARE, {"reward@*-S": "K = *"},
     "Are the S best-rewarded of K all right? A reward that holds the answer itself (Eq. 1) makes this Pass@K-S. Paper: Figs. 3, 6."),
    ("temperature", "Temperature", ITER, "T", {"temperature": ""},
     "The T that an iteration's pool was sampled at; level where it is fixed. Paper: Tables 2, 3."),
    ("tau", "Threshold", ITER, "tau", {"tau": ""}, "The reward that a response had to exceed to be trained on. Paper: Tables 2, 3."),
    ("qe", "Query effect of the pool", ITER, "mean query effect", {"qe": ""},
     "What exploration and exploitation come to together, at that T and tau. Paper: Fig. 6, right."),
], "The process reward": [
    ("auc", "PRM: AUC", ITER, "AUC on the pool", {"prm/auc": "right answers", "prm/auc_sound": "all steps right", "prm/step_auc": "steps"},
     "0.5 is a coin; a falling curve is a PRM that the policy has left behind. Paper: Observation 3 (the reward is static)."),
    ("admitted", "PRM: what gets past it", ITER, "share", {
        "prm/wrong_admitted": "wrong answers with r > tau", "prm/false_admitted": "right by a wrong step, r > tau",
        "prm/min_last": "lowest step is the last", "prm/ece": "calibration error"},
     "The first two are what it lets into training that it should not. Paper: Sec. 2.3, the threshold on r."),
    ("ranked", "PRM: ranking alone", STEPS, SHARE, {"prm@K-S": "r_prm alone", "reward@K-S": "r of Eq. 1"},
     "The distance is what the known answer does for the ranking. Paper: Figs. 3, 6 (Reward@K-S)."),
]}


def curve_panels(groups: Sequence[Group], section: str) -> list[Panel]:
    """The figures of CURVES in which some run has a value; all runs in each."""
    rows, found = [r for g in groups for run in g.runs for r in run.rows], []
    sizes = sorted({int(m[1]) for r in rows for k in r if (m := re.fullmatch(r"reward@(\d+)-\d+", k))}, reverse=True)
    S, shown = {r["S"] for r in rows}, sizes[:len(STYLES)] if len(groups) == 1 else sorted({*sizes[:1], *sizes[-1:]}, reverse=True)
    for name, title, x, y, keys, see in CURVES[section]:
        x = ITER if all(g.runs[0].config["method"] == "sft" for g in groups) else x                # whose iterations are epochs
        keys = {k.replace("*", str(n)): note.replace("*", str(n)) for k, note in keys.items() for n in (shown if "*" in k else [0])}
        if any(value(r, k) is not None for r in rows for k in list(keys)[:1]):
            lines = curves(groups, keys, x == STEPS)
            if "" in keys.values() and x == STEPS and not any(line.marker == "" for line in lines) and lines and lines[0].x[0] == 0:
                lines.append(Line("iteration 0", [0, max(x for line in lines for x in line.x)], lines[0].y[:1] * 2, style="--", marker=""))
            found.append(Panel(name, title.replace("-S", f"-{min(S)}") if len(S) == 1 else title, see, x, y, lines))
    return found


def curves(groups: Sequence[Group], keys: dict[str, str], steps: bool) -> list[Line]:
    """A colour a group, a line style a key; an SFT run beside others is a level line at its last value."""
    lines, scale = [], lambda run: run.config["steps_per_iter"] if steps else 1
    end = max((run.rows[-1]["iter"] * scale(run) for g in groups for run in g.runs if run.config["method"] != "sft"), default=0)
    for label, runs, colour in groups:
        level, before = end and runs[0].config["method"] == "sft", len(lines)
        for style, (key, note) in zip(STYLES, keys.items()):
            seen = [{r["iter"]: v for r in run.rows if (v := value(r, key)) is not None} for run in runs]
            shared = sorted(set.intersection(*map(set, seen)))
            y = np.array([[s[i] for i in shared] for s in seen])
            x, mean, se = [i * scale(runs[0]) for i in shared], y.mean(axis=0).tolist(), standard_error(y).tolist()
            if level and shared:
                x, mean, se = [0, end], mean[-1:] * 2, se[-1:] * 2
            if shared:
                name = note or label if len(groups) == 1 else label if len(lines) == before else ""
                lines.append(Line(name, x, mean, se, colour, style, "" if level else "o"))
    return lines + [Line(note, [], [], style=style, marker="") for style, note in zip(STYLES, keys.values()) if len(groups) > 1 < len(keys)]


def calibration_panel(groups: Sequence[Group]) -> Panel:
    """Score against share of right answers, in the first iteration (dashed) and the last of each group's first run."""
    lines = []
    for _, (run, *_), colour in groups:
        seen = [(r["iter"], c) for r in run.rows if isinstance(c := r.get("prm/calibration"), dict) and {"score", "correct"} <= c.keys()]
        for style, (i, c) in zip(["-", "--"], [seen[-1], seen[0]] if seen else []):
            points = [(a, b) for a, b in zip(c["score"], c["correct"]) if _is_number(a) and _is_number(b)]
            lines += [Line(shorten(f"{run.name}, iteration {i}", 44), *zip(*points), colour=colour, style=style)] * bool(points)
    if lines:
        lines.append(Line("calibrated", [0, 1], [0, 1], style=":", marker=""))
    return Panel("calibration", "PRM: calibration", "Below the dotted line the PRM promises more than it holds. Paper: Sec. 2.3 (the score that Eq. 1 adds).",
                 "score of a solution", "share with a right answer", lines)


def replay_panels(name: str, again: Sequence[tuple[dict, dict]]) -> list[Panel]:
    """Fig. 4 from one run, see `fig4`."""
    x, f = [line["iter"] for line, _ in again], again[0][1]
    path = lambda key: [Line("", x, [f[key] for _, f in again], colour=COLOURS[0])]
    sizes = [Line(f"{k} samples", x, [f["sizes"].get(k, np.nan) for _, f in again], colour=c) for c, k in zip(COLOURS, f["sizes"])]
    T, tau = f"T {f['T']:g}", f"tau {f['tau']:g}"
    see = f"Where the curves lie apart, more samples a question are worth it (at {T}, {tau}; exact expectation over subsets). Paper: Fig. 4 (a)."
    return [Panel(f"{name}_fig4a", "Query effect by sample size", see, ITER, "mean query effect", sizes),
            Panel(f"{name}_fig4b", f"Best temperature at {tau}", "The paper's is low at first and rises later. Paper: Fig. 4 (b).", ITER, "T", path("best_T")),
            Panel(f"{name}_fig4c", f"Best threshold at {T}", "The paper's is high at first and falls later. Paper: Fig. 4 (c).", ITER, "tau", path("best_tau"))]


def heat_panels(name: str, ledger: Sequence[dict]) -> list[Panel]:
    """The surface of each decision, with what can't be told from the best marked."""
    see = "Ring: the choice, T {:g}, tau {:g}; {}{} of {} other points are within noise of it. Paper: Table 2 has the choice, not the surface."
    said = lambda d: see.format(d["temperature"], d["tau"], "dots: " if "tied" in d else "", d["ties"], np.array(d["surface"]).size - 1)
    return [Panel(f"{name}_surface{d['iter']}", f"Query effect, iteration {d['iter']}", said(d), "temperature", "tau", heat=d) for d in ledger]


def time_panel(groups: Sequence[Group]) -> Panel:
    """Seconds by phase: an iteration a bar for one run, else a group a bar (the mean of its runs)."""
    runs = [run for g in groups for run in g.runs]
    bars = [(f"iteration {i}", 1, [s for s in run.seconds if s["iter"] == i]) for run in runs for i in sorted({s["iter"] for s in run.seconds})]
    if len(runs) > 1:
        bars = [(shorten(g.label, 26), len(g.runs), [s for run in g.runs for s in run.seconds]) for g in groups]
    totals = [(label, {p: sum(s["seconds"] for s in rows if s["phase"] == p) / n for p in dict.fromkeys(s["phase"] for s in rows)}) for label, n, rows in bars]
    see = "Sampling (gen) and training are any method's; balance is what B-STaR adds. Paper: Sec. 3.3, which calls that negligible."
    return Panel("time", "Where the time went", see, "seconds", "", bars=[bar for bar in totals if bar[1]])


def draw(p: Panel, png: Path) -> str:
    """A panel by matplotlib, of a phone's width, as a PNG file and as SVG (returned), whose text takes the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure
    entries = list(dict.fromkeys([line.label for line in p.lines if line.label] + [k for _, b in p.bars for k in b]))
    columns = 1 if max(map(len, entries), default=0) > 28 else 2 if p.lines else 3
    rows = -(-len(entries) // columns) if len(entries) > 1 else 0
    ink = {k: INK for k in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": "bstar", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        fig = Figure(figsize=(4.6, max(2.7, 0.6 + 0.26 * len(p.bars)) + 0.19 * rows), layout="constrained")
        ax = fig.subplots()
        (_draw_heat if p.heat else _draw_bars if p.bars else _draw_lines)(fig, ax, p)
        ax.set(xlabel=p.xlabel, ylabel=p.ylabel)
        if rows:
            fig.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=2.6)
        fig.savefig(png, dpi=130)
        fig.savefig(buffer := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue().decode(), flags=re.S).replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{p.name}-", svg)                        # many figures, one page: no id twice
    label = escape(f"{p.title}. {p.see}")
    return re.sub(r'.*?<svg .*?(viewBox="[^"]*").*?>', lambda m: f'<svg {m[1]} role="img" aria-label="{label}">', svg, count=1, flags=re.S)


def _draw_lines(fig, ax, p: Panel) -> None:
    for line in p.lines:
        ax.plot(line.x, line.y, line.style, color=line.colour, marker=line.marker, markersize=3, linewidth=1.4, label=line.label or None)
        if any(line.se):
            y, se = np.array(line.y), np.array(line.se)
            ax.fill_between(line.x, y - se, y + se, color=line.colour, alpha=0.18, linewidth=0)
    ax.grid(alpha=0.25)
    if p.xlabel == ITER:
        ax.xaxis.get_major_locator().set_params(integer=True)


def _draw_bars(fig, ax, p: Panel) -> None:
    left = np.zeros(len(p.bars))
    for colour, phase in zip(itertools.cycle(COLOURS), dict.fromkeys(k for _, b in p.bars for k in b)):
        width = np.array([b.get(phase, 0.0) for _, b in p.bars])
        ax.barh(range(len(p.bars)), width, left=left, color=colour, label=phase, height=0.7)
        left += width
    ax.set_yticks(range(len(p.bars)), [label for label, _ in p.bars])
    ax.invert_yaxis()


def _draw_heat(fig, ax, p: Panel) -> None:
    d = p.heat
    image = ax.imshow(np.array(d["surface"], dtype=float).T, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    at = lambda T, tau: (d["temperatures"].index(T), d["taus"].index(tau))
    if d.get("tied"):
        ax.scatter(*zip(*(at(*point) for point in d["tied"])), s=9, color="white", edgecolors="black", linewidths=0.5)
    for colour, width in (("white", 3.2), ("#d2304f", 1.8)):
        ax.scatter(*at(d["temperature"], d["tau"]), s=90, facecolors="none", edgecolors=colour, linewidths=width)
    for axis, grid_ in ((ax.xaxis, d["temperatures"]), (ax.yaxis, d["taus"])):
        ticks = range(0, len(grid_), -(-len(grid_) // 8))
        axis.set_ticks(ticks, [f"{grid_[i]:g}" for i in ticks])
    fig.colorbar(image, ax=ax, label="mean query effect").outline.set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--line:#d6dbe1;--warn:#fff4dc}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b1;--paper:#14171a;--line:#343b43;--warn:#3a2f14}}
body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.2rem;margin:1rem 0}
figure{margin:0;min-width:0}figure h3{margin:0}figcaption{font-size:.87rem;color:var(--soft)}
svg{width:100%;height:auto;display:block}svg *{stroke-linejoin:round;stroke-linecap:butt}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
.alarm{background:var(--warn);padding:.4rem .7rem;border-radius:4px;margin:.4rem 0}summary{cursor:pointer;font-weight:600;padding:.3rem 0}"""


def report(runs: Sequence[Run], out: Path) -> Path:
    """out/report.html, one page that needs nothing else, and its figures as out/figures/*.png; runs without metrics are in its table only."""
    drawn = [run for run in runs if run.rows]
    groups = by_seed(drawn)
    parts, warn = [table_html(table(runs), "all runs")], lambda run: [f'<p class="alarm">{escape(line)}</p>' for line in alarms(run.rows, run.ledger)]
    parts += warn(drawn[0]) if len(drawn) == 1 else []
    with_prm = [g for g in groups if any(k.startswith("prm") for run in g.runs for r in run.rows for k in r)]
    explore, prm = CURVES
    for title, panels in ((explore, curve_panels(groups, explore)), (prm, [*curve_panels(with_prm, prm), calibration_panel(with_prm)]),
                          ("Time", [time_panel(groups)])):
        if figures := figures_html(panels, out):
            parts += [f"<h2>{title}</h2>", figures]
    for number, run in enumerate(drawn, 1):
        parts += [f"<h2>{escape(run.name)}</h2>", *(warn(run) if len(drawn) > 1 else [])]
        parts += [f"<details><summary>Every number of metrics.jsonl</summary>{table_html(numbers_table(run), run.name)}</details>"]
        if run.ledger:
            parts += ["<h3>What the balancer saw and chose</h3>", table_html(decisions_table(run), "decisions"),
                      figures_html(heat_panels(f"run{number}", run.ledger), out)]
            try:
                parts.append(figures_html(replay_panels(f"run{number}", replay(run)), out))
            except UserError as e:
                parts.append(f"<p>No Fig. 4: {escape(str(e))}</p>")
    return write_page(out / "report.html", drawn[0].name if len(drawn) == 1 else f"{len(drawn)} runs with metrics", parts)


def replay_report(run: Run, again: Sequence[tuple[dict, dict]], out: Path) -> Path:
    """out/replay.html: the decisions taken again, their surfaces, and Fig. 4."""
    panels = replay_panels("replay", again) + heat_panels("replay", [line for line, _ in again])
    return write_page(out / "replay.html", f"{run.name}, replayed", [table_html(replay_table(run, again), "decisions"), figures_html(panels, out)])


def numbers_table(run: Run) -> str:
    """Every number of metrics.jsonl as it stands there, an iteration a column."""
    keys = [k for k in dict.fromkeys(k for r in run.rows for k in r) if k != "iter" and any(_is_number(r.get(k)) for r in run.rows)]
    cells = lambda k: [json.dumps(r[k]) if _is_number(r.get(k)) else "" for r in run.rows]
    return markdown([["key", *(f"iteration {r['iter']}" for r in run.rows)], *([k, *cells(k)] for k in keys)])


def decisions_table(run: Run) -> str:
    """The balancer's choices   [Tables 2, 3]"""
    return markdown([["iter", "T", "tau", "qe on the subset", "95 %", "ties", "queries without a selection", "ends of the grid"],
                     *([d["iter"], f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}", "{:.3f} to {:.3f}".format(*d["interval"]),
                        f"{d['ties']} of {np.array(d['surface']).size - 1}", f"{d['empty']:.0%}", ", ".join(d["edge"])] for d in run.ledger)])


def table_html(text: str, name: str) -> str:
    """A Markdown table as HTML that scrolls by itself where it is too wide."""
    rows = [[escape(c.strip()) for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    lines = ["".join(f"<{tag}>{c}</{tag}>" for c in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def figures_html(panels: Sequence[Panel], out: Path) -> str:
    """The panels that hold anything as figures with inline SVG, side by side where there is room, and each as out/figures/NAME.png; "" if none does."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figures = [f"<figure><h3>{escape(p.title)}</h3>{draw(p, out / 'figures' / f'{p.name}.png')}<figcaption>{escape(p.see)}</figcaption></figure>"
               for p in panels if p.bars or p.heat or p.lines]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Writes parts of HTML as one page."""
    head = (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
            f'<title>{escape(title)}</title><style>{STYLE}</style>')
    body = f'<main><h1>{escape(title)}</h1>{"".join(parts)}</main>'
    path.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>', encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, one line, instead of printing its usage; a value may begin with a minus, as in --taus -1:1:0.1."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")         # argparse's private rule of what is a value and no flag

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def grid(name: str, spec: str) -> list[float]:
    """"from:to:step" -> the grid, both ends in, from decimals: np.arange drifts, and under a strict r > tau drift matters.

    >>> grid("temperatures", "0.5:1.2:0.1")
    [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]
    """
    try:
        low, high, step = map(Decimal, spec.split(":"))
        if step <= 0 or low > high:
            raise ValueError
        return [float(low + i * step) for i in range(min(int((high - low) / step), 10_000) + 1)]
    except (ValueError, ArithmeticError):
        raise UserError(f"--{name} {spec}: expected FROM:TO:STEP with FROM <= TO and STEP > 0, e.g. 0.5:1.2:0.1") from None


def at_least_one(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """python metrics.py RUN [RUN ...] | --replay RUN"""
    p = Parser(prog="metrics.py", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; with --replay, one")
    p.add_argument("--out", type=Path, help="where the page and figures/ go (default: the run's folder; of several runs, the folder that they share)")
    p.add_argument("--against", type=Path, metavar="RUN", help="one of the runs: prints the last iterations alone, and their differences to its group, paired by seed")
    p.add_argument("--replay", action="store_true", help="take the run's balancing decisions again, from the samples it saved")
    other = p.add_argument_group("with --replay, settings other than the run's own")
    other.add_argument("--temperatures", type=functools.partial(grid, "temperatures"), help="FROM:TO:STEP, some of those that it sampled at")
    other.add_argument("--taus", type=functools.partial(grid, "taus"), help="FROM:TO:STEP")
    other.add_argument("--exact-tau", action="store_true", default=None, help="every observed reward is a threshold, instead of a grid")
    other.add_argument("--n-star", type=at_least_one, help="n* of Eq. 2")
    other.add_argument("--queries", type=at_least_one, help="so many of the subset's queries")
    other.add_argument("--samples", type=at_least_one, help="so many of the K samples a query, in exact expectation over all such subsets")
    settings = vars(p.parse_intermixed_args(argv))
    paths, out, replaying, against = (settings.pop(k) for k in ("runs", "out", "replay", "against"))
    settings = {k: v for k, v in settings.items() if v is not None}
    if replaying and against:
        raise UserError("--against: not with --replay")
    if settings and not replaying or {"taus", "exact_tau"} <= settings.keys():
        raise UserError(f"--{next(iter(settings)).replace('_', '-')}: only with --replay" if not replaying else "--taus, --exact-tau: expected one of them")
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else run._replace(name=str(run.path)) for run in runs]
    if against:
        return print(comparison(runs, against))
    out = out or (paths[0] if len(runs) == 1 else Path(os.path.commonpath([path.resolve().parent for path in paths])))
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None
    if not replaying:
        warnings = [f"{run.name}, {line}" for run in runs for line in alarms(run.rows, run.ledger)]
        return print("\n".join([table(runs), "", *warnings, str(report(runs, out))]))
    if len(runs) > 1 or not runs[0].ledger:
        raise UserError(f"--replay: expected one run, not {len(runs)}" if len(runs) > 1 else f"--replay {paths[0]}: no decision in its ledger.jsonl")
    again = replay(runs[0], **settings)
    same = f"{sum(line == d for d, (line, _) in zip(runs[0].ledger, again))} of {len(again)} decisions equal the ledger's in every field"
    print("\n".join([replay_table(runs[0], again), "", *([] if settings else [same]), str(replay_report(runs[0], again, out))]))


if __name__ == "__main__":
    data.run(main)
