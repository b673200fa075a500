"""Metrics: exploration, exploitation and their balance, in NumPy.

    samples -> reward, correct, text (Q, K) -> Pass@K-S, Reward@K-S; query effect -> next (T, tau)

Pass@K-S and Reward@K-S (Sec. 2.2) are expectations over all K-subsets of the n samples drawn; the
paper does not say whether it draws one. `query_effect` is Eq. 2, and `decide` maximizes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain, pairwise, takewhile
from math import comb, isnan
from pathlib import Path

import numpy as np

from data import Query, Sample

Array = np.ndarray
Groups = Sequence[Sequence[Sample]]  # the K samples of each of Q queries
Check = Callable[[str, str], list[bool]] | None  # question, response -> is each step right

# -- exploration -----------------------------------------------------------------------------------


def pass_at_k_s(n, c, K: int, S: int) -> Array:
    """Pass@K-S = sum_{s=S}^{min(c,K)} C(c,s) C(n-c,K-s) / C(n,K)   [Sec. 2.2, "Exploration"]

    The probability that at least S of K samples are correct, drawn without replacement from n of
    which c are correct. S = 1 is the pass@k of Chen et al. (2021). n = K gives 1[c >= S].

    n, c     (Q,) int, or one int for all: samples and correct samples of each query
    returns  (Q,) float in [0, 1]
    raises   ValueError unless 1 <= S <= K <= n and 0 <= c <= n

    >>> pass_at_k_s(4, [0, 1, 2, 4], K=2, S=2).round(3).tolist()
    [0.0, 0.0, 0.167, 1.0]
    """
    n, c = np.broadcast_arrays(np.asarray(n, int), np.asarray(c, int))
    in_range = (K <= n) & (0 <= c) & (c <= n)
    if not (1 <= S <= K and in_range.all()):
        raise ValueError(f"need 1 <= S <= K <= n and 0 <= c <= n; K={K}, S={S}, n={np.unique(n)}")
    shares = []
    for size, right in zip(n.flat, c.flat):
        shares.append(_at_least(S, right, size, K) / comb(size, K))
    return np.array(shares, float).reshape(n.shape)


def _at_least(S: int, c: int, n: int, K: int) -> int:
    """The number of K-subsets of n samples with S or more of c given ones."""
    # the complement has only S terms; Python's integers neither round nor overflow
    fewer = [comb(c, s) * comb(n - c, K - s) for s in range(S)]
    return comb(n, K) - sum(fewer)


def distinct_equations(responses: Sequence[Sequence[str]], correct) -> tuple[float, float]:
    """Distinct Equations = unique / all equations of a query's correct responses   [Sec. 2.2]

    The ratio is of Wu et al. (2024); the mean is over the queries that have an equation.

    responses  (Q,) lists of K texts; correct (Q, K) bool
    returns    the mean ratio and the share of queries that have an equation; 0, 0 where none has
    raises     ValueError unless the lengths agree

    >>> distinct_equations([["1+1=2", "1+1=2", "2-0=2"], ["1=2", "3"]], [[1, 1, 1], [0, 0]])
    (0.6666666666666666, 0.5)
    """
    ratios = []
    for texts, verdicts in zip(responses, correct, strict=True):
        right = [text for text, is_right in zip(texts, verdicts, strict=True) if is_right]
        written = list(chain.from_iterable(map(equations, right)))
        if written:
            ratios.append(len(set(written)) / len(written))
    if not ratios:
        return 0.0, 0.0
    return float(np.mean(ratios)), len(ratios) / len(responses)


def equations(text: str) -> list[str]:
    """The equations of a solution: GSM8K's <<a=b>> where there are any, else around each "=".

    Wu et al. (2024) do not define them. A chain a = b = c has two; English words are cut off.

    >>> equations("He sprints 3*3=<<3*3=9>>9 times")
    ['3*3=9']
    >>> equations("so she has 3 + 4 = 7 apples, and $x^2 = 9$.")
    ['3+4=7', 'x^2=9']
    """
    annotated = [note for note in re.findall(r"<<([^<>]*)>>", text) if "=" in note]
    if annotated:
        return ["".join(note.split()) for note in annotated]
    written = []
    for clause in re.split(r"[;\n$]|,(?!\d)|\.(?!\d)|\\[\[\]()]", text):
        sides = re.sub(r"(?<![<>!:])=", " = ", clause).split(" = ")
        for left, right in pairwise(map(str.split, sides)):
            before = list(takewhile(_is_formula, reversed(left)))
            after = list(takewhile(_is_formula, right))
            if before and after:
                written.append("".join([*reversed(before), "=", *after]))
    return written


def _is_formula(word: str) -> bool:
    """True unless the word is English; LaTeX commands and capitalized names are formula."""
    return not re.fullmatch(r"[a-z]{2,}[:']?\w*", word)


# -- exploitation ----------------------------------------------------------------------------------


def reward_at_k_s(reward, correct, K: int, S: int) -> Array:
    """Reward@K-S = sum_j y_j C(c_<j,S-1) C(n-j,K-S) / C(n,K)   [Sec. 2.2, "Exploitation"]

    The probability that the S best-ranked of K samples, drawn without replacement from n, are all
    correct; S = 1 is Best-of-K. j = 1..n counts by falling reward, y_j is the correctness at rank
    j, the lowest of the S, and c_<j the number of correct ones above it. Samples of equal reward
    are averaged over all their orders. -inf and NaN rank last.

    reward   (Q, n) float; correct (Q, n) bool
    returns  (Q,) float in [0, 1]
    raises   ValueError unless the shapes agree and 1 <= S <= K <= n

    >>> reward_at_k_s([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]], [[1, 0, 1], [1, 0, 0]], K=2, S=1).round(3)
    array([0.667, 0.333])
    """
    reward = _table(reward, float)
    correct = _table(correct, bool)
    n = reward.shape[-1] if len(reward) else K
    if reward.ndim != 2 or reward.shape != correct.shape or not 1 <= S <= K <= n:
        shapes = f"{reward.shape} and {correct.shape}"
        raise ValueError(f"need one shape (Q, n), 1 <= S <= K <= n; got {shapes}, K={K}, S={S}")
    reward = np.where(np.isnan(reward), -np.inf, reward)
    return np.array([_reward_at_k_s(r, y, K, S) for r, y in zip(reward, correct)])


def _table(values, dtype: type) -> Array:
    """(Q, K) of lists; an empty list, which is no queries, is (0, 0)."""
    table = np.asarray(values, dtype)
    return table.reshape(0, 0) if table.shape == (0,) else table


def _reward_at_k_s(reward: Array, correct: Array, K: int, S: int) -> float:
    """Reward@K-S of one query, a sum over ties: g samples of equal reward, h of them correct."""
    total, below, c_above = Fraction(0), len(reward), 0
    for value in np.unique(reward)[::-1]:
        tie = correct[reward == value]
        g, h = len(tie), int(tie.sum())
        below -= g
        # the S best end in this tie: S - s are above it, and s or more of the tie are drawn
        for s in range(1, min(S, h) + 1):
            subsets = comb(c_above, S - s) * _at_least(s, g, g + below, K - S + s)
            # in a random order the first s of the tie are all correct: C(h,s) / C(g,s)
            total += Fraction(comb(h, s) * subsets, comb(g, s))
        c_above += h
    return float(total / comb(len(reward), K))


def auc(score, label) -> float:
    """P(score of a positive > score of a negative), ties half: the area under the ROC curve.

    score, label  (n,) float, (n,) bool
    returns       float in [0, 1]; NaN where all labels are the same

    >>> auc([0.9, 0.8, 0.4, 0.4], [1, 0, 1, 0])
    0.625
    """
    score, label = np.asarray(score, float), np.asarray(label, bool)
    positives, negatives = score[label], np.sort(score[~label])
    if not len(positives) or not len(negatives):
        return float("nan")
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    return float((below + not_above).sum() / 2 / (len(positives) * len(negatives)))


def calibration(p, label, bins: int = 10) -> dict:
    """ECE = sum_b n_b / n * |mean p of bin b - share of positives in bin b|, bins of equal width.

    p, label  (n,) float in [0, 1], (n,) bool
    returns   {"ece": float, "calibration": {"score": mean p, "correct": share of positives, "n":
              count}}, the three with a number a bin; a mean over none is None

    >>> calibration([0.2, 0.9, 0.8, 1.0], [1, 1, 0, 1], bins=2)
    {'ece': 0.375, 'calibration': {'score': [0.2, 0.9], 'correct': [1.0, 0.6667], 'n': [1, 3]}}
    """
    p = np.asarray(p, float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    n = np.bincount(place, minlength=bins)
    score = np.bincount(place, p, bins)
    positives = np.bincount(place, np.asarray(label, float), bins)
    table = {
        "score": list(map(_ratio, score, n)),
        "correct": list(map(_ratio, positives, n)),
        "n": n.tolist(),
    }
    return {"ece": _ratio(np.abs(score - positives).sum(), len(p)), "calibration": table}


def _ratio(total, count) -> float | None:
    """total / count to four places, None where the count is 0."""
    return round(float(total / count), 4) if count else None


# -- the balance -----------------------------------------------------------------------------------


def query_effect(n_sel, n_correct, n_star: int) -> Array:
    """qe_i = min(n'_i / n*, 1) * n'_i / n_i   [Eq. 2, Sec. 3.1]

    n_sel      (...) int    n_i, unique responses with r > tau (the paper counts all)
    n_correct  (...) int    n'_i, the correct ones among them
    n_star     int          n* = ceil(N / M), correct responses wanted of a query
    returns    (...) float  in [0, 1]; 0 where n_i = 0 (the paper is silent)
    raises     ValueError unless 0 <= n'_i <= n_i and n* >= 1

    >>> query_effect([2, 64, 6, 0], [2, 16, 6, 0], 6).round(3).tolist()  # Sec. 3.1 has the first 2
    [0.333, 0.25, 1.0, 0.0]
    """
    n_sel = np.asarray(n_sel, float)
    n_correct = np.asarray(n_correct, float)
    if n_star < 1 or (n_correct < 0).any() or (n_correct > n_sel).any():
        raise ValueError(f"need 0 <= n_correct <= n_sel and n_star >= 1, got n_star={n_star}")
    return np.minimum(n_correct / n_star, 1) * n_correct / np.maximum(n_sel, 1)


def classes(texts: Sequence[str]) -> list[int]:
    """Class numbers of texts; a difference in white space alone makes no other class.

    "Unique" in Eq. 2 counts classes; the paper does not define it.

    >>> classes(["1 + 1 = 2", "2 = 2", "1 + 1  = 2\\n"])
    [0, 1, 0]
    """
    numbers: dict[str, int] = {}
    return [numbers.setdefault(" ".join(text.split()), len(numbers)) for text in texts]


def repeats(reward, text) -> Array:
    """Marks all samples but one of each class: the best-rewarded stays, the first of equals.

    reward   (Q, K) float; text (Q, K) int, see `classes`
    returns  (Q, K) bool

    >>> repeats([[0.5, 0.9, 0.9]], [[0, 0, 0]]).tolist()
    [[True, False, True]]
    """
    reward = _table(reward, float)
    text = np.asarray(text)
    repeated = np.ones(reward.shape, bool)
    falling = np.where(np.isnan(reward), np.inf, -reward)
    for q, order in enumerate(np.argsort(falling, axis=1, kind="stable")):
        _, first = np.unique(text[q, order], return_index=True)
        repeated[q, order[first]] = False
    return repeated


def sweep(reward, correct, repeated, taus: Sequence[float]) -> tuple[Array, Array]:
    """n_i and n'_i at every tau: the unique responses with r > tau, the correct ones   [Sec. 2.3]

    reward, correct, repeated  (Q, K) float, bool, bool, see `repeats`; NaN is above no tau
    taus                       (G,) float
    returns                    n_sel, n_correct, (Q, G) int
    """
    above = _table(reward, float)[:, :, None] > np.asarray(taus, float)  # (Q, K, G)
    selected = above & ~_table(repeated, bool)[:, :, None]
    right = selected & _table(correct, bool)[:, :, None]
    return selected.sum(axis=1), right.sum(axis=1)


def effects(reward, correct, text, taus: Sequence[float], n_star: int) -> tuple[Array, Array]:
    """qe_i and 1[n_i = 0] of every query at every tau   [Eq. 2]

    reward, correct, text  (Q, K), see `as_arrays`; taus (G,) float
    returns                two (Q, G) float
    """
    n_sel, n_correct = sweep(reward, correct, repeats(reward, text), taus)
    return query_effect(n_sel, n_correct, n_star), (n_sel == 0).astype(float)


def decide(reward, correct, text, temperatures: list, taus: list, n_star: int, seed=0) -> dict:
    """(T, tau) = argmax of the mean query effect over the subset   [Sec. 3.3, Algorithm 1]

    The mean is over all queries, and one without a selection counts 0: otherwise a high tau would
    win by dropping the hard ones. Each call looks up this module's `query_effect`, so that a fork
    changes the threshold rule with `metrics.query_effect = another`.

    reward, correct, text  (G_T, Q, K), see `as_arrays`: the subset's samples at each temperature
    temperatures, taus     (G_T,), (G_tau,) float, rising
    returns  the ledger's line: the chosen temperature and tau, their mean effect qe and its 95 %
             interval, the points [T, tau] not significantly below it (tied, and their number ties),
             the share of queries without a selection (empty), which of the two lie at an end of the
             grid (edge), blind if every mean is 0, at each T the share of right samples (yield) and
             unique right ones a query (unique), all means (surface, G_T lists of G_tau)
    """
    by_T = [effects(*pool, taus, n_star) for pool in zip(reward, correct, text, strict=True)]
    qe = np.stack([effect for effect, _ in by_T])  # (G_T, Q, G_tau)
    surface = qe.mean(axis=1)  # (G_T, G_tau)
    i, j = _argmax(surface, temperatures, taus)
    interval, lead = _bootstrap(qe, i, j, seed)
    lead[i, j] = np.inf
    tied = [[temperatures[a], taus[b]] for a, b in np.argwhere(lead <= 0)]
    return {
        "temperature": temperatures[i],
        "tau": taus[j],
        "qe": float(surface[i, j]),
        "interval": interval.round(6).tolist(),
        "ties": len(tied),
        "tied": tied,
        "empty": float(by_T[i][1][:, j].mean()),
        "edge": _edges(temperature=(i, len(temperatures)), tau=(j, len(taus))),
        "blind": not surface.max(),
        "n_star": n_star,
        "seed": seed,
        "temperatures": list(temperatures),
        "yield": [round(float(np.mean(c)), 4) for c in correct],
        "unique": [unique_correct(*pool) for pool in zip(reward, correct, text)],
        "taus": list(taus),
        "surface": surface.round(6).tolist(),
    }


def _argmax(surface: Array, temperatures: list, taus: list) -> tuple[int, int]:
    """The place of the maximum. Ties go to the lower T, then to the higher tau."""
    if not surface.max():  # no right answer was selected anywhere: the paper's fixed T = 1, tau = 0
        return nearest(temperatures, 1.0), nearest(taus, 0.0)
    best = np.argwhere(surface >= surface.max() - 1e-12).tolist()
    return min(best, key=lambda place: (place[0], -place[1]))


def _bootstrap(qe: Array, i: int, j: int, seed: int) -> tuple[Array, Array]:
    """95 % interval of the chosen mean, and the low end of its lead on each point (G_T, G_tau)."""
    Q = qe.shape[1]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(Q, np.full(Q, 1 / Q), size=1000) / Q  # (draws, Q)
    # a draw of queries serves all points, so that the differences between points are paired
    means = np.einsum("bq,tqg->btg", weights, qe, optimize=True)
    chosen = means[:, i, j]
    lead = np.quantile(chosen[:, None, None] - means, 0.025, axis=0)
    return np.quantile(chosen, [0.025, 0.975]), lead


def _edges(**places: tuple[int, int]) -> list[str]:
    """The names of the places (i, n) that are the first or last of n > 1."""
    edges = []
    for name, (i, n) in places.items():
        if n > 1 and i in (0, n - 1):
            edges.append(name)
    return edges


def unique_correct(reward, correct, text) -> float:
    """Right samples a query that say different things; the arguments are (Q, K), see `as_arrays`.

    >>> unique_correct([[1, 1, 1, 0]], [[True, True, True, False]], [[0, 0, 1, 2]])
    2.0
    """
    counted = np.asarray(correct, dtype=bool) & ~repeats(reward, text)
    return round(float(counted.sum(axis=1).mean()), 4)


def nearest(values: Sequence[float], x: float) -> int:
    """The place of the value nearest to x, the first of equals."""
    return int(np.argmin(np.abs(np.array(values) - x)))


# -- an iteration's numbers ------------------------------------------------------------------------


def as_arrays(groups: Groups) -> tuple[Array, Array, Array]:
    """reward, correct, text of samples, (Q, K) float, bool, int; text is numbered by `classes`."""
    text = [classes(responses) for responses in _field(groups, "response", object)]
    return _field(groups, "reward"), _field(groups, "correct"), np.array(text)


def _field(groups: Groups, name: str, dtype: type | None = None) -> Array:
    """(Q, K): one field of every sample."""
    rows = []
    for group in groups:
        rows.append([getattr(sample, name) for sample in group])
    return np.array(rows, dtype)


def pass_at_1(groups: Groups) -> float:
    """The share of correct samples, in percent."""
    return _percent(_field(groups, "correct"))


def _percent(x) -> float:
    """The mean in percent, to four places."""
    return round(100 * float(np.mean(x)), 4)


def of_samples(greedy: Groups, sampled: Groups, K: int, S: int) -> dict:
    """The numbers of one test set   [Sec. 2.2]

    greedy   (Q, 1) samples at T = 0; sampled (Q, K) samples at T = 1
    returns  {"pass@1": %, "pass@K": %, "pass@K-S": %, "reward@K-S": %, "distinct": share, ...}, at
             K and at smaller powers of two [Figs. 3, 5, 6]; `sound` responses, where steps can be
             checked, are right in every step, too
    """
    reward, correct, _ = as_arrays(sampled)
    stopped = _field(sampled, "finish_reason") == "stop"
    distinct, coverage = distinct_equations(_field(sampled, "response", object), correct)
    row = {
        "pass@1": pass_at_1(greedy),
        **_at_k(reward, correct, K, S),
        "distinct": round(distinct, 4),
        "coverage": round(coverage, 4),
        "truncated": _percent(~stopped),
        "queries": len(sampled),
    }
    for i in range(1, K.bit_length()):
        if S <= 2**i < K:
            row |= _at_k(reward, correct, 2**i, S)
    if sampled[0][0].r_prm is not None:
        # ranked without the gold answer, as one can rank answers to a question of one's own
        r_prm = np.where(stopped, _field(sampled, "r_prm"), -np.inf)
        row[f"prm@{K}-{S}"] = _percent(reward_at_k_s(r_prm, correct, K, S))
    if sampled[0][0].sound is not None:
        sound = _field(sampled, "sound")
        row["sound@1"] = _percent(_field(greedy, "sound"))
        row[f"sound@{K}"] = _percent(sound.any(axis=1))
        row[f"sound@{K}-{S}"] = _percent(pass_at_k_s(K, sound.sum(axis=1), K, S))
        row["false_reasoning"] = _false_reasoning(sampled)
    return row


def _at_k(reward: Array, correct: Array, K: int, S: int) -> dict:
    """Pass@K, Pass@K-S and Reward@K-S in percent."""
    n, c = correct.shape[1], correct.sum(axis=1)
    return {
        f"pass@{K}": _percent(pass_at_k_s(n, c, K, 1)),
        f"pass@{K}-{S}": _percent(pass_at_k_s(n, c, K, S)),
        f"reward@{K}-{S}": _percent(reward_at_k_s(reward, correct, K, S)),
    }


def _false_reasoning(groups: Groups) -> float | None:
    """The share of right answers that a wrong step led to; None where there is none to check."""
    right = [s for s in chain.from_iterable(groups) if s.correct]
    sound = [s.sound for s in right if s.sound is not None]
    return _ratio(sound.count(False), len(sound))


def of_pool(
    queries: list[Query], pool: Groups, kept: Groups, tau: float, n_star: int, check: Check = None
) -> dict:
    """The numbers of an iteration's pool: query effect, what was kept, the PRM's state.

    pool     (Q, K) samples; kept (Q,) lists of those selected for training
    check    the exact step checker of the task, or None
    returns  {"qe": mean, "n_star", "kept", "sampled", "pool/correct": %, ...}; see `watch_prm`
    """
    arrays = as_arrays(pool)
    qe, _ = effects(*arrays, [tau], n_star)
    n_kept = sum(map(len, kept))
    row = {
        "qe": round(float(qe.mean()), 6),
        "n_star": n_star,
        "kept": n_kept,
        "sampled": sum(map(len, pool)),
        "pool/correct": pass_at_1(pool),
        "pool/unique": unique_correct(*arrays),
        "selected/correct": pass_at_1([list(chain.from_iterable(kept))]) if n_kept else None,
        "queries_kept": sum(map(bool, kept)),
    }
    if pool[0][0].sound is not None:
        row["pool/false_reasoning"] = _false_reasoning(pool)
        row["selected/false_reasoning"] = _false_reasoning(kept)
    if pool[0][0].r_prm is not None:
        row |= watch_prm(queries, pool, tau, check)
    return row


def watch_prm(queries: list[Query], pool: Groups, tau: float, check: Check = None) -> dict:
    """How well the PRM, trained once, knows this policy's solutions   [Sec. 2.3, Observation 3]

    check    the exact step checker of the task, or None
    returns  "prm/auc", "prm/ece", "prm/calibration": lowest step score against the right answer;
             "prm/wrong_admitted": share of the wrong answers with r > tau; "prm/min_last": share of
             the solutions whose last step scores lowest; with `check` also "prm/auc_sound",
             "prm/step_auc", "prm/false_admitted" against the truth; None where there is none
    """
    scored = []
    for query, group in zip(queries, pool):
        scored += [(query.text, s) for s in group if s.finish_reason == "stop" and s.steps]
    if not scored:
        return {}
    samples = [sample for _, sample in scored]
    lowest = np.array([min(s.steps) for s in samples])
    last = np.array([s.steps[-1] for s in samples])
    correct = np.array([s.correct for s in samples])
    admitted = np.array([s.reward > tau for s in samples])
    row = {"auc": _auc(lowest, correct), **calibration(lowest, correct)}
    wrong = ~correct
    row["wrong_admitted"] = _ratio((admitted & wrong).sum(), wrong.sum())
    row["min_last"] = _ratio((last == lowest).sum(), len(last))
    if check is not None:
        sound = np.array([s.sound for s in samples])
        row["auc_sound"] = _auc(lowest, sound)
        row["step_auc"] = _step_auc(scored, check)
        unsound = correct & ~sound
        row["false_admitted"] = _ratio((admitted & unsound).sum(), unsound.sum())
    return {f"prm/{name}": value for name, value in row.items()}


def _step_auc(scored: list[tuple[str, Sample]], check: Callable) -> float | None:
    """AUC of step scores; a step is right if it and all before it are."""
    scores, truth = [], []
    for question, sample in scored:
        right = check(question, sample.response)
        scores += sample.steps
        truth += [all(right[: j + 1]) for j in range(len(sample.steps))]
    return _auc(scores, truth)


def _auc(score, label) -> float | None:
    """`auc` to four places, None for NaN, which JSON does not know."""
    value = auc(score, label)
    return None if isnan(value) else round(value, 4)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, [] without one; a line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
