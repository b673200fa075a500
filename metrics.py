"""Metrics: exploration, exploitation and their product, in NumPy; then the balancer's arithmetic, and what a finished run shows.

    correct (Q, K) -> Pass@K-S, Distinct Equations            exploration, Sec. 2.2
    reward, correct (Q, K) -> Reward@K-S                      exploitation, Sec. 2.2
    reward, correct, text (T, Q, K) -> query effect           Eq. 2 -> `decide`: the next iteration's (temperature, tau)

Pass@K-S and Reward@K-S are the exact expectations over all K-subsets of the n samples drawn, not one draw of K (the paper does not say).
"""
from __future__ import annotations

import functools
import json
import re
from math import comb
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from data import Query, Sample
from toy import check_toy


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
# Of samples: an iteration's numbers


def as_arrays(groups: Sequence[Sequence[Sample]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """reward (Q, K) float, correct (Q, K) bool, duplicate (Q, K) bool: what the metrics and the balancer need of the samples."""
    return (np.array([[s.reward for s in g] for g in groups]), np.array([[s.correct for s in g] for g in groups]),
            np.array([group_repeats(g) for g in groups]))


def group_repeats(group: Sequence[Sample]) -> list[bool]:
    """Does another sample of the query say the same, at a reward at least as high?  See repeats."""
    return repeats([[s.reward for s in group]], [classes([s.response for s in group])])[0].tolist()


def percent(x) -> float:
    """The mean of 0s and 1s in percent, to four places."""
    return round(100 * float(np.mean(x)), 4)


def metrics_of(greedy: list[list[Sample]], sampled: list[list[Sample]], K: int, S: int) -> dict:
    """The numbers of one test set   [Sec. 2.2]; `sound` ones count a response only if every step is right too (where that can be told)."""
    reward, correct, _ = as_arrays(sampled)
    distinct = distinct_equations([[s.response for s in g] for g in sampled], correct)
    row = {"pass@1": percent([[s.correct for s in g] for g in greedy]),
           f"pass@{K}": percent(pass_at_k_s(K, correct.sum(1), K, 1)),
           f"pass@{K}-{S}": percent(pass_at_k_s(K, correct.sum(1), K, S)),
           f"reward@{K}-{S}": percent(reward_at_k_s(reward, correct, K, S)),
           "distinct": round(distinct.distinct, 4), "coverage": round(distinct.coverage, 4),
           "truncated": percent([[s.finish_reason != "stop" for s in g] for g in sampled]), "queries": len(sampled)}
    for k in [2**i for i in range(1, K.bit_length()) if S <= 2**i < K]:             # smaller K, exactly, from the same samples [Figs. 3, 5, 6]
        row.update({f"pass@{k}": percent(pass_at_k_s(K, correct.sum(1), k, 1)),
                    f"pass@{k}-{S}": percent(pass_at_k_s(K, correct.sum(1), k, S)),
                    f"reward@{k}-{S}": percent(reward_at_k_s(reward, correct, k, S))})
    if sampled[0][0].r_prm is not None:            # ranked without the gold answer: what one could do with a question of one's own
        r_prm = np.array([[s.r_prm if s.finish_reason == "stop" else -np.inf for s in g] for g in sampled])
        row[f"prm@{K}-{S}"] = percent(reward_at_k_s(r_prm, correct, K, S))
    if sampled[0][0].sound is not None:
        sound = np.array([[s.sound for s in g] for g in sampled])
        row.update({"sound@1": percent([[s.sound for s in g] for g in greedy]), f"sound@{K}": percent(sound.any(1)),
                    f"sound@{K}-{S}": percent(pass_at_k_s(K, sound.sum(1), K, S)),
                    "false_reasoning": false_reasoning([s for g in sampled for s in g])})
    return row


def false_reasoning(samples: Sequence[Sample]) -> float | None:
    """The share of right answers reached by a wrong step; None where steps cannot be told or no answer is right."""
    right = [s for s in samples if s.correct and s.sound is not None]
    return round(sum(not s.sound for s in right) / len(right), 4) if right else None


def watch_prm(queries: list[Query], pool: list[list[Sample]], tau: float) -> dict:
    """Does the PRM still know this policy's solutions?  On an iteration's pool; a PRM is trained once, the policy moves   [Sec. 2.3, Observation 3]

    AUC and calibration are of r_prm (as a probability) against the right answer, on the toy also against the truth of every step.
    """
    flat = [(q, s) for q, g in zip(queries, pool) for s in g if s.finish_reason == "stop" and s.steps]
    if not flat:
        return {}
    p, correct = np.array([min(s.steps) for _, s in flat]), np.array([s.correct for _, s in flat])
    admitted, share = np.array([s.reward > tau for _, s in flat]), lambda x: float(x.mean()) if len(x) else None
    row = {"auc": auc(p, correct), **calibration(p, correct), "wrong_admitted": share(admitted[~correct]),
           "min_last": share(np.array([s.steps[-1] == min(s.steps) for _, s in flat]))}
    if flat[0][1].sound is not None:
        sound, right = np.array([s.sound for _, s in flat]), [check_toy(q.text, s.response) for q, s in flat]
        scores, truth = zip(*((x, all(ok[:j + 1])) for (_, s), ok in zip(flat, right) for j, x in enumerate(s.steps)))
        row.update(auc_sound=auc(p, sound), step_auc=auc(scores, truth), false_admitted=share(admitted[correct & ~sound]))
    return {f"prm/{k}": None if v != v else round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def pool_metrics(queries: list[Query], pool: list[list[Sample]], kept: list[list[Sample]], tau: float, n_star: int) -> dict:
    """What an iteration's pool says of exploration and exploitation: query effect at the (T, tau) used, what was kept, false reasoning."""
    n_sel, n_correct = sweep(*as_arrays(pool), [tau])
    flat = [s for g in kept for s in g]
    row = {"qe": round(float(query_effect(n_sel, n_correct, n_star).mean()), 6), "n_star": n_star, "kept": len(flat),
           "sampled": sum(map(len, pool)), "pool/correct": percent([[s.correct for s in g] for g in pool]),
           "selected/correct": percent([s.correct for s in flat]) if flat else None, "queries_kept": sum(map(bool, kept))}
    if pool[0][0].sound is not None:
        row.update({"pool/false_reasoning": false_reasoning([s for g in pool for s in g]), "selected/false_reasoning": false_reasoning(flat)})
    return row | (watch_prm(queries, pool, tau) if pool[0][0].r_prm is not None else {})


# ---------------------------------------------------------------------------------------------------------------------
# A run's logs, read


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
