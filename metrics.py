"""Metrics: exploration, exploitation and their balance, in NumPy.

    samples -> reward, correct, text (Q, K) -> Pass@K-S, Reward@K-S; query effect -> next (T, tau)

Pass@K-S and Reward@K-S (Sec. 2.2) are expectations over all K-subsets of the n samples drawn; the
paper does not say whether it draws one. `query_effect` is Eq. 2, and `decide` maximizes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain, pairwise
from math import comb
from typing import NamedTuple

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
    returns  (Q,) float
    raises   ValueError unless 1 <= S <= K <= n and 0 <= c <= n

    >>> pass_at_k_s(4, [0, 1, 2, 4], K=2, S=2).round(3).tolist()
    [0.0, 0.0, 0.167, 1.0]
    """
    n, c = np.broadcast_arrays(n, c)
    in_range = (K <= n) & (0 <= c) & (c <= n)
    if not (1 <= S <= K and in_range.all()):
        raise ValueError(f"need 1 <= S <= K <= n and 0 <= c <= n, got K={K}, S={S}")

    def share(n: int, c: int) -> float:
        return _at_least(S, c, n, K) / comb(n, K)

    # without otypes NumPy would refuse an empty array
    return np.vectorize(share, otypes=[float])(n, c)


def _at_least(S: int, c: int, n: int, K: int) -> int:
    """The number of K-subsets of n samples that hold S or more of c given ones."""
    # the complement has only S terms; Python's integers neither round nor overflow
    fewer = 0
    for s in range(S):
        fewer += comb(c, s) * comb(n - c, K - s)
    return comb(n, K) - fewer


def distinct_equations(responses: Sequence[Sequence[str]], correct) -> tuple[float, float]:
    """Distinct Equations = unique / all equations of a query's correct responses   [Sec. 2.2]

    The ratio is of Wu et al. (2024); the mean is over the queries that have an equation.

    responses  (Q,) lists of K texts; correct (Q, K) bool
    returns    the mean ratio and the share of queries that have an equation; 0, 0 where none has

    >>> distinct_equations([["1+1=2", "1+1=2", "2-0=2"], ["1=2", "3"]], [[1, 1, 1], [0, 0]])
    (0.6666666666666666, 0.5)
    """
    ratios = []
    for texts, verdicts in zip(responses, correct, strict=True):
        written = []
        for text, is_right in zip(texts, verdicts, strict=True):
            if is_right:
                written += equations(text)
        if written:
            ratios.append(len(set(written)) / len(written))
    if not ratios:
        return 0.0, 0.0
    return float(np.mean(ratios)), len(ratios) / len(responses)


# no equation goes on behind one of these, of plain text or LaTeX; 1,000 and 2.5 are numbers
CLAUSE_END = re.compile(r"[;\n$]|,(?!\d)|\.(?!\d)|\\[\[\]()]")
EQUALS = re.compile(r"(?<![<>!:])=")
# LaTeX commands, capitalized names and single letters are none: they stand in formulas
ENGLISH_WORD = re.compile(r"(?<!\S)[a-z]{2,}[:']?\w*(?!\S)")


def equations(text: str) -> list[str]:
    """The equations of a solution: GSM8K's <<a=b>> where there are any, else around each "=".

    Wu et al. (2024) do not define them. A chain a = b = c has two; English words are cut off.

    >>> equations("He sprints 3*3=<<3*3=9>>9 times")
    ['3*3=9']
    >>> equations("so she has 3 + 4 = 7 apples, and $x^2 = 9$.")
    ['3+4=7', 'x^2=9']
    """
    # the prose around <<3*3=9>> says the same equation once more
    annotated = [note for note in re.findall(r"<<([^<>]*)>>", text) if "=" in note]
    if annotated:
        return ["".join(note.split()) for note in annotated]
    written = []
    for clause in CLAUSE_END.split(text):
        for left, right in pairwise(EQUALS.split(clause)):
            before = ENGLISH_WORD.split(left)[-1]
            after = ENGLISH_WORD.split(right)[0]
            if before.strip() and after.strip():
                written.append("".join(f"{before}={after}".split()))
    return written


# -- exploitation ----------------------------------------------------------------------------------


def reward_at_k_s(reward, correct, K: int, S: int) -> Array:
    """Reward@K-S = sum_j y_j C(c_<j,S-1) C(n-j,K-S) / C(n,K)   [Sec. 2.2, "Exploitation"]

    The probability that the S best-ranked of K samples, drawn without replacement from n, are all
    correct; S = 1 is Best-of-K. j = 1..n counts by falling reward, y_j is the correctness at rank
    j, the lowest of the S, and c_<j the number of correct ones above it. Samples of equal reward
    are averaged over all their orders. -inf and NaN rank last.

    reward   (Q, n) float; correct (Q, n) bool
    returns  (Q,) float
    raises   ValueError unless the shapes agree and 1 <= S <= K <= n

    >>> reward_at_k_s([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]], [[1, 0, 1], [1, 0, 0]], K=2, S=1).round(3)
    array([0.667, 0.333])
    """
    reward = _table(reward)
    correct = _table(correct)
    if reward.ndim != 2 or reward.shape != correct.shape:
        raise ValueError(f"need one shape (Q, n), got {reward.shape} and {correct.shape}")
    if len(reward) and not 1 <= S <= K <= reward.shape[1]:
        raise ValueError(f"need 1 <= S <= K <= n, got K={K}, S={S}, n={reward.shape[1]}")
    values = []
    for r, y in zip(reward, correct):
        values.append(_of_query(r, y, K, S))
    return np.array(values)


def _table(values) -> Array:
    """(Q, K) float of lists, (0, 0) of an empty list; NaN is -inf: last, and above no tau."""
    table = np.asarray(values, float)
    if table.shape == (0,):
        table = table.reshape(0, 0)
    return np.where(np.isnan(table), -np.inf, table)


def _of_query(reward: Array, correct: Array, K: int, S: int) -> float:
    """Reward@K-S of one query, summed over its ties, the best first."""
    # exact, rounded once as in pass_at_k_s: where the reward is the answer the two are equal bits
    total = Fraction(0)
    below = len(reward)
    c_above = 0
    for value in np.unique(reward)[::-1]:
        tie = correct[reward == value]
        g = len(tie)
        h = int(tie.sum())
        below -= g
        # the S best end in this tie: S - s are above it, and s or more of the tie are drawn
        for s in range(1, min(S, h) + 1):
            # none of the wrong ones above is drawn: it would be among the S best
            above = comb(c_above, S - s)
            rest = _at_least(s, g, g + below, K - S + s)
            # the share of the tie's orders in which its first s are all correct
            orders = Fraction(comb(h, s), comb(g, s))
            total += above * rest * orders
        c_above += h
    return float(total / comb(len(reward), K))


def auc(score, label) -> float | None:
    """P(score of a positive > score of a negative), ties half: the area under the ROC curve.

    score, label  (n,) float, (n,) bool
    returns       to four places; None where all labels are the same

    >>> auc([0.9, 0.8, 0.4, 0.4], [1, 0, 1, 0])
    0.625
    """
    score = np.asarray(score, float)
    label = np.asarray(label, bool)
    positives = score[label]
    negatives = np.sort(score[~label])
    # counted by bisection: a pool has too many pairs to compare each
    below = np.searchsorted(negatives, positives, side="left").sum()
    not_above = np.searchsorted(negatives, positives, side="right").sum()
    n_pairs = len(positives) * len(negatives)
    return _ratio((below + not_above) / 2, n_pairs)


def calibration(p, label, bins: int = 10) -> dict:
    """ECE = sum_b n_b / n * |mean p of bin b - share of positives in bin b|, bins of equal width.

    p, label  (n,) float in [0, 1], (n,) bool
    returns   ECE, and of each bin the mean p, the share of positives (None of none), the count

    >>> calibration([0.2, 0.9, 0.8, 1.0], [1, 1, 0, 1], bins=2)
    {'ece': 0.375, 'calibration': {'score': [0.2, 0.9], 'correct': [1.0, 0.6667], 'n': [1, 3]}}
    """
    p = np.asarray(p, float)
    place = np.minimum(p * bins, bins - 1).astype(int)  # p = 1 is in the last bin, too
    n = np.bincount(place, minlength=bins)
    score = np.bincount(place, p, bins)
    positives = np.bincount(place, np.asarray(label, float), bins)
    table = {
        "score": list(map(_ratio, score, n)),
        "correct": list(map(_ratio, positives, n)),
        "n": n.tolist(),
    }
    gap = np.abs(score - positives).sum()
    return {"ece": _ratio(gap, len(p)), "calibration": table}


def _ratio(total, count) -> float | None:
    """total / count to four places, None where the count is 0."""
    return round(float(total / count), 4) if count else None


def _share(marked) -> float | None:
    """The share of True, None of an empty array."""
    return _ratio(np.sum(marked), np.size(marked))


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
    in_range = (0 <= n_correct) & (n_correct <= n_sel)
    if n_star < 1 or not in_range.all():
        raise ValueError(f"need 0 <= n_correct <= n_sel and n_star >= 1, got n_star={n_star}")
    # capped, or easy queries with many right answers would decide alone (the paper's reason)
    enough = np.minimum(n_correct / n_star, 1)
    return enough * n_correct / np.maximum(n_sel, 1)


class Outcomes(NamedTuple):
    """What selection sees of the K samples of each of Q queries."""

    reward: Array  # (Q, K) float, r of Eq. 1; -inf for a cut-off response
    correct: Array  # (Q, K) bool
    text: Array  # (Q, K) int, equal where two samples of a query say the same, see `classes`


def classes(texts: Sequence[str]) -> list[int]:
    """Class numbers of texts; a difference in white space alone makes no other class.

    "Unique" in Eq. 2 counts classes; the paper does not define it.

    >>> classes(["1 + 1 = 2", "2 = 2", "1 + 1  = 2\\n"])
    [0, 1, 0]
    """
    # a copy that differs by a blank teaches nothing new, and would count as exploration
    folded = [" ".join(text.split()) for text in texts]
    numbers: dict[str, int] = {}
    return [numbers.setdefault(text, len(numbers)) for text in folded]


def duplicates(reward, text) -> Array:
    """Marks all samples but one of each class: the best-rewarded stays, the first of equals.

    reward   (Q, K) float; text (Q, K) int, see `classes`
    returns  (Q, K) bool

    >>> duplicates([[0.5, 0.9, 0.9]], [[0, 0, 0]]).tolist()
    [[True, False, True]]
    """
    falling = -_table(reward)
    text = np.asarray(text)
    duplicate = np.ones(falling.shape, bool)
    orders = np.argsort(falling, axis=1, kind="stable")
    for q, order in enumerate(orders):
        # np.unique gives a class's first place in the order: its best-rewarded sample
        _, first = np.unique(text[q, order], return_index=True)
        duplicate[q, order[first]] = False
    return duplicate


def sweep(reward, correct, duplicate, taus: Sequence[float]) -> tuple[Array, Array]:
    """n_i and n'_i at every tau: the unique responses with r > tau, the correct ones   [Sec. 2.3]

    reward, correct, duplicate  (Q, K) float, bool, bool, see `duplicates`
    taus                       (G,) float
    returns                    n_sel, n_correct, (Q, G) int
    """
    taus = np.asarray(taus, float)
    reward = _table(reward)
    # at any tau a class is in by its best sample, so one marking serves the whole grid
    unique = np.where(_table(duplicate), -np.inf, reward)  # no tau selects -inf
    right = np.where(_table(correct), unique, -np.inf)
    n_sel = (unique[:, :, None] > taus).sum(axis=1)  # (Q, K, G) -> (Q, G)
    n_correct = (right[:, :, None] > taus).sum(axis=1)
    return n_sel, n_correct


def decide(
    by_T: Sequence[Outcomes], temperatures: list, taus: list, n_star: int, seed: int = 0
) -> dict:
    """(T, tau) = argmax of the mean query effect over the subset   [Sec. 3.3, Algorithm 1]

    Each call looks up this module's `query_effect`, so that a fork changes the threshold rule with
    `metrics.query_effect = another`.

    by_T                the subset's samples at each temperature
    temperatures, taus  (G_T,), (G_tau,) float, rising
    returns             the ledger's line; docs/logs.md has its keys
    """
    qe, empty = [], []
    for reward, correct, text in by_T:
        n_sel, n_correct = sweep(reward, correct, duplicates(reward, text), taus)
        qe.append(query_effect(n_sel, n_correct, n_star))
        empty.append(n_sel == 0)
    qe = np.stack(qe)  # (G_T, Q, G_tau)
    # over all queries: a high tau would win if those that it leaves without a selection dropped out
    surface = qe.mean(axis=1)  # (G_T, G_tau)
    i, j = _argmax(surface, temperatures, taus)
    interval, lead = _bootstrap(qe, i, j, seed)
    lead[i, j] = np.inf  # the choice is no tie of itself
    tied = []
    for a, b in np.argwhere(lead <= 0):
        tied.append([temperatures[a], taus[b]])
    edge = []
    places = {"temperature": (i, temperatures), "tau": (j, taus)}
    for name, (place, grid) in places.items():
        if len(grid) > 1 and place in (0, len(grid) - 1):
            edge.append(name)
    return {
        "temperature": temperatures[i],
        "tau": taus[j],
        "qe": float(surface[i, j]),
        "interval": interval.round(6).tolist(),
        "ties": len(tied),
        "tied": tied,
        "empty": float(empty[i][:, j].mean()),
        "edge": edge,
        "blind": not surface.max(),
        "n_star": n_star,
        "seed": seed,
        "temperatures": list(temperatures),
        "yield": [_share(at_T.correct) for at_T in by_T],
        "unique": [unique_correct(*at_T) for at_T in by_T],
        "taus": list(taus),
        "surface": surface.round(6).tolist(),
    }


def _argmax(surface: Array, temperatures: list, taus: list) -> tuple[int, int]:
    """The place of the maximum. Ties go to the lower T, then to the higher tau."""
    # on a surface of zeros the tie rule would end at a corner of the grid
    if not surface.max():  # no right answer was selected anywhere: the paper's fixed T = 1, tau = 0
        i = np.argmin(np.abs(np.array(temperatures) - 1.0))
        return i, np.argmin(np.abs(taus))
    # nonzero lists by rising T, then tau; the slack is for sums that differ in their last bits
    i, j = np.nonzero(surface >= surface.max() - 1e-12)
    return i[0], j[i == i[0]][-1]


def _bootstrap(qe: Array, i: int, j: int, seed: int) -> tuple[Array, Array]:
    """95 % interval of the chosen mean, and the low end of its lead on each point (G_T, G_tau)."""
    Q = qe.shape[1]
    uniform = np.full(Q, 1 / Q)
    rng = np.random.default_rng(seed)
    # how often each query is drawn, not which: the means are then one matrix product
    counts = rng.multinomial(Q, uniform, size=1000)  # (draws, Q)
    # a draw of queries serves all points, so that the differences between points are paired
    means = np.einsum("bq,tqg->btg", counts / Q, qe, optimize=True)
    chosen = means[:, i : i + 1, j : j + 1]
    lead = np.quantile(chosen - means, 0.025, axis=0)
    return np.quantile(chosen, [0.025, 0.975]), lead


def unique_correct(reward, correct, text) -> float:
    """Right whole samples a query that say different things; arguments as in `Outcomes`.

    >>> unique_correct([[1, 1, 1, 0]], [[True, True, True, False]], [[0, 0, 1, 2]])
    2.0
    """
    # what was cut off is never selected
    whole = _table(reward) > -np.inf
    counted = np.asarray(correct, bool) & whole & ~duplicates(reward, text)
    n_counted = counted.sum(axis=1)  # (Q,)
    return round(float(n_counted.mean()), 4)


# -- an iteration's numbers ------------------------------------------------------------------------


def as_arrays(groups: Groups) -> Outcomes:
    """The samples of Q queries, K each, as arrays."""
    reward = _field(groups, "reward")
    correct = _field(groups, "correct")
    text = [classes(responses) for responses in _field(groups, "response", object)]
    return Outcomes(reward, correct, np.array(text))


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
    returns  what Figs. 3, 5 and 6 show, also at powers of two below K; docs/logs.md has the keys
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
    # from the same K samples, so that a smaller K costs nothing and errs less
    for i in range(1, K.bit_length()):
        if S <= 2**i < K:
            row |= _at_k(reward, correct, 2**i, S)
    # one sample speaks for all: a reward fills this field in every sample or in none
    if sampled[0][0].r_prm is not None:
        # ranked without the gold answer, as one can rank answers to a question of one's own
        r_prm = np.where(stopped, _field(sampled, "r_prm"), -np.inf)
        row[f"prm@{K}-{S}"] = _percent(reward_at_k_s(r_prm, correct, K, S))
    if sampled[0][0].sound is not None:
        sound = _field(sampled, "sound")
        row["sound@1"] = _percent(_field(greedy, "sound"))
        row[f"sound@{K}"] = _percent(sound.any(axis=1))
        row[f"sound@{K}-{S}"] = _percent(sound.sum(axis=1) >= S)
        row["false_reasoning"] = _false_reasoning(sampled)
    return row


def _at_k(reward: Array, correct: Array, K: int, S: int) -> dict:
    """Pass@K, Pass@K-S and Reward@K-S in percent."""
    n = correct.shape[1]
    c = correct.sum(axis=1)
    return {
        f"pass@{K}": _percent(pass_at_k_s(n, c, K, 1)),
        f"pass@{K}-{S}": _percent(pass_at_k_s(n, c, K, S)),
        f"reward@{K}-{S}": _percent(reward_at_k_s(reward, correct, K, S)),
    }


def _false_reasoning(groups: Groups) -> float | None:
    """The share of right answers that a wrong step led to; None where no answer is right."""
    right = [s for s in chain.from_iterable(groups) if s.correct]
    return _share([not s.sound for s in right])


def of_pool(
    queries: list[Query], pool: Groups, kept: Groups, tau: float, n_star: int, check: Check = None
) -> dict:
    """The numbers of an iteration's pool, which docs/logs.md explains.

    pool   (Q, K) samples; kept (Q,) lists of those selected for training
    check  the exact step checker of the task, or None
    """
    reward, correct, text = as_arrays(pool)
    duplicate = duplicates(reward, text)
    n_sel, n_correct = sweep(reward, correct, duplicate, [tau])
    qe = query_effect(n_sel, n_correct, n_star)
    selected = list(chain.from_iterable(kept))
    row = {
        "qe": round(float(qe.mean()), 6),
        "n_star": n_star,
        "kept": len(selected),
        "sampled": correct.size,
        "pool/correct": pass_at_1(pool),
        "pool/unique": unique_correct(reward, correct, text),
        "selected/correct": pass_at_1([selected]) if selected else None,
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

    A solution's lowest step score is held against its right answer, with `check` against the truth,
    too; docs/logs.md has the keys.
    """
    questions, samples = [], []
    for query, group in zip(queries, pool):
        finished = [s for s in group if s.finish_reason == "stop" and s.steps]
        questions += [query.text] * len(finished)
        samples += finished
    if not samples:
        return {}
    lowest = np.array([min(s.steps) for s in samples])
    last = np.array([s.steps[-1] for s in samples])
    correct = np.array([s.correct for s in samples])
    admitted = np.array([s.reward > tau for s in samples])
    row = {
        "auc": auc(lowest, correct),
        **calibration(lowest, correct),
        "wrong_admitted": _share(admitted[~correct]),
        # near 1 the PRM judges endings, not steps
        "min_last": _share(last == lowest),
    }
    if check is not None:
        scores, truth = [], []
        for question, s in zip(questions, samples):
            scores += s.steps
            truth += step_truth(check(question, s.response), len(s.steps))
        row["step_auc"] = auc(scores, truth)
    if check is not None and samples[0].sound is not None:
        sound = np.array([s.sound for s in samples])
        row["auc_sound"] = auc(lowest, sound)
        row["false_admitted"] = _share(admitted[correct & ~sound])
    return {f"prm/{name}": value for name, value in row.items()}


def step_truth(right: list[bool], n: int) -> list[bool]:
    """For n steps of a solution: is the step right, and are all before it?

    >>> step_truth([True, False, True], 3)
    [True, False, False]
    """
    # as in annotate, where all that stands behind a lost prefix is labelled 0
    return [all(right[: j + 1]) for j in range(n)]
