"""metrics.py against brute force: every subset, every order, fresh random inputs; float64 and exact integers, no copied formulae."""
import itertools
import math

import numpy as np
import pytest

import metrics

RNG = np.random.default_rng()                      # fresh every time: what holds must hold for any input
print("metrics tests draw from", RNG.bit_generator.seed_seq.entropy)


def subsets(n, K):
    return list(itertools.combinations(range(n), K))


def test_pass_at_k_s_is_the_mean_over_all_subsets():
    for _ in range(30):
        n = int(RNG.integers(1, 9))
        correct = RNG.random((4, n)) < RNG.random()
        K = int(RNG.integers(1, n + 1))
        S = int(RNG.integers(1, K + 1))
        brute = [np.mean([row[list(s)].sum() >= S for s in subsets(n, K)]) for row in correct]
        assert np.allclose(metrics.pass_at_k_s(n, correct.sum(1), K, S), brute, atol=1e-12)
        assert np.allclose(metrics.pass_at_k_s([n] * 4, correct.sum(1), K, S), brute, atol=1e-12)


def test_pass_at_k_s_known_forms():
    c = np.arange(65)
    assert (metrics.pass_at_k_s(64, c, 64, 4) == (c >= 4)).all()                                 # n = K: the plug-in 1[c >= S]
    product = [1 - np.prod([(64 - k - i) / (64 - i) for i in range(32)]) for k in c]             # Chen et al. 2021's form of pass@k
    assert np.allclose(metrics.pass_at_k_s(64, c, 32, 1), product, atol=1e-12)
    big = metrics.pass_at_k_s(2000, [0, 1, 1000, 2000], 1000, 4)                                 # floats would overflow here
    assert big[0] == 0 and big[1] == 0 and big[2] == pytest.approx(1) and big[3] == 1
    values = [metrics.pass_at_k_s(16, 5, 8, S) for S in range(1, 9)]
    assert all(a >= b for a, b in zip(values, values[1:])) and values[5:] == [0, 0, 0]


@pytest.mark.parametrize("n, c, K, S", [(4, 2, 5, 1), (4, 2, 2, 3), (4, 2, 2, 0), (4, 5, 2, 1), (4, -1, 2, 1)])
def test_pass_at_k_s_refuses_nonsense(n, c, K, S):
    with pytest.raises(ValueError, match="1 <= S <= K <= n"):
        metrics.pass_at_k_s(n, [c], K, S)


def brute_reward_at_k_s(reward, correct, K, S):
    """Every subset of K, every order of its ties."""
    values = []
    for s in subsets(len(reward), K):
        orders = [p for p in itertools.permutations(s) if all(reward[a] >= reward[b] for a, b in zip(p, p[1:]))]
        values.append(np.mean([all(correct[i] for i in p[:S]) for p in orders]))
    return np.mean(values)


@pytest.mark.parametrize("levels", [1, 2, 3, 100])                                               # 1: all tied ... 100: hardly a tie
def test_reward_at_k_s_is_the_mean_over_all_subsets_and_tie_orders(levels):
    for _ in range(8):
        n = int(RNG.integers(1, 7))
        reward = RNG.integers(0, levels, (3, n)) / levels
        correct = RNG.random((3, n)) < 0.6
        K = int(RNG.integers(1, n + 1))
        S = int(RNG.integers(1, K + 1))
        brute = [brute_reward_at_k_s(r, y, K, S) for r, y in zip(reward, correct)]
        assert np.allclose(metrics.reward_at_k_s(reward, correct, K, S), brute, atol=1e-12)


def test_reward_at_k_s_does_not_depend_on_storage_order_and_ranks_nan_last():
    reward = RNG.integers(0, 3, (5, 12)).astype(float)
    correct = RNG.random((5, 12)) < 0.5
    order = RNG.permutation(12)
    assert np.allclose(metrics.reward_at_k_s(reward, correct, 8, 3), metrics.reward_at_k_s(reward[:, order], correct[:, order], 8, 3))
    assert metrics.reward_at_k_s([[np.nan, -5.0]], [[1, 0]], 2, 1) == [0.0]
    assert metrics.reward_at_k_s([[-np.inf, 0.0]], [[0, 1]], 2, 1) == [1.0]


def test_reward_at_k_s_with_the_answer_reward_equals_pass_at_k_s():
    correct = RNG.random((50, 16)) < RNG.random((50, 1))                                         # the paper's remark in Sec. 2.2
    got = metrics.reward_at_k_s(correct.astype(float), correct, 8, 3)
    assert np.allclose(got, metrics.pass_at_k_s(16, correct.sum(1), 8, 3), atol=1e-12)


def test_reward_at_k_s_refuses_nonsense():
    for args in [([1.0], [1], 1, 1), ([[1.0, 2.0]], [[1]], 1, 1), ([[1.0]], [[1]], 2, 1), ([[1.0]], [[1]], 1, 2)]:
        with pytest.raises(ValueError):
            metrics.reward_at_k_s(*args)


def test_distinct_equations():
    d = metrics.distinct_equations([["<<1+1=2>>2 <<2+2=4>>4", "<<1+1=2>>2", "<<9=9>>"], ["", ""]], [[1, 1, 0], [1, 1]])
    assert d.distinct == pytest.approx(2 / 3) and d.coverage == 0.5
    assert metrics.distinct_equations([["none"], ["1=1"]], [[1], [0]]) == (0.0, 0.0)             # never 0/0
    assert metrics.distinct_equations(["1=1", "1=1"], [1, 1]) == (0.5, 1.0)                      # one query's list
    with pytest.raises(ValueError):
        metrics.distinct_equations([["a", "b"]], [[1]])


@pytest.mark.parametrize("text, expected", [
    ("She sells 9 * $2 = $<<9*2=18>>18", ["9*2=18"]),
    (r"\[x^2 - 4 = (x-2)(x+2) = 0\]", ["x^2-4=(x-2)(x+2)", "(x-2)(x+2)=0"]),
    ("so 1,000 + 2.5 = 1,002.5. Then nothing", ["1,000+2.5=1,002.5"]),
    ("a <= b and a != c, no equation", []),
    ("", []),
])
def test_equations(text, expected):
    assert metrics.equations(text) == expected


def naive_counts(reward, correct, texts, tau):
    chosen = [(r, ok, t) for r, ok, t in zip(reward, correct, texts) if r > tau]
    unique = {t: ok for r, ok, t in chosen}
    return len(unique), sum(unique.values())


def test_sweep_equals_counting_at_every_tau():
    for _ in range(10):
        Q, K = int(RNG.integers(1, 6)), int(RNG.integers(1, 12))
        taus = sorted(RNG.choice(np.arange(-20, 21) / 10, size=int(RNG.integers(1, 15)), replace=False).tolist())
        texts = RNG.integers(0, 5, (Q, K))
        correct = (texts + RNG.integers(0, 2, (Q, 1))) % 2 == 0                                  # one text, one verdict and one reward
        reward = np.round(np.sin(texts * 7.0 + np.arange(Q)[:, None]) * 2, 1)                    # lands on grid points: strictness matters
        reward[texts == 4] = -np.inf                                                             # cut-off responses
        n_sel, n_correct = metrics.sweep(reward, correct, metrics.repeats(reward, texts), taus)
        for q in range(Q):
            for g, tau in enumerate(taus):
                assert (n_sel[q, g], n_correct[q, g]) == naive_counts(reward[q], correct[q], texts[q].tolist(), tau)


def test_query_effect_paper_examples_and_bounds():
    n = RNG.integers(0, 65, 500)
    n_correct = np.minimum(n, RNG.integers(0, 65, 500))
    qe = metrics.query_effect(n, n_correct, 6)
    assert ((0 <= qe) & (qe <= 1)).all() and (qe[n_correct == 0] == 0).all()
    assert (qe[(n_correct >= 6) & (n == n_correct)] == 1).all()
    for bad in [([1], [2], 6), ([1], [1], 0), ([1], [-1], 6)]:
        with pytest.raises(ValueError):
            metrics.query_effect(*bad)


def test_auc_is_the_share_of_ordered_pairs():
    score, label = RNG.integers(0, 6, 60), RNG.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    assert metrics.auc(score, label) == pytest.approx(np.mean(pairs))
    assert math.isnan(metrics.auc([1.0], [1]))


def random_pools(G=3, Q=20, K=8):
    correct = RNG.random((G, Q, K)) < 0.5
    return np.where(correct, 1.0, 0.0) + RNG.uniform(-1, 1, (G, Q, K)), correct, RNG.integers(0, K, (G, Q, K))


def test_decide_takes_the_grid_point_of_the_greatest_mean_query_effect():
    reward, correct, text = random_pools()
    temperatures, taus = [0.5, 0.7, 0.9], [-0.5, 0.0, 0.5, 1.0]
    d = metrics.decide(reward, correct, text, temperatures, taus, n_star=3)
    naive = {}
    for i, T in enumerate(temperatures):
        for tau in taus:
            best = [{x: ok for r, ok, x in sorted(zip(*row), key=lambda s: s[0]) if r > tau} for row in zip(reward[i], correct[i], text[i])]
            n, c = [len(b) for b in best], [sum(b.values()) for b in best]                       # of one text the best-rewarded counts
            naive[T, tau] = np.mean([min(b / 3, 1) * b / a if a else 0.0 for a, b in zip(n, c)])
    assert d["qe"] == pytest.approx(max(naive.values())) == naive[d["temperature"], d["tau"]]
    assert np.allclose(np.array(d["surface"]).ravel(), list(naive.values()), atol=1e-6)
    assert d["interval"][0] <= d["qe"] <= d["interval"][1]


def distinct(pool):
    return np.broadcast_to(np.arange(pool.shape[-1]), pool.shape)                                # every text its own class


def test_decide_breaks_exact_ties_to_the_lower_temperature_then_the_higher_tau():
    correct = np.ones((2, 5, 4), dtype=bool)                                                     # a binary reward: tau has no say in [0, 1)
    d = metrics.decide(np.ones((2, 5, 4)), correct, distinct(correct), [0.5, 0.6], [-0.5, 0.0, 0.5, 1.0], n_star=4)
    assert (d["temperature"], d["tau"], d["qe"], d["ties"]) == (0.5, 0.5, 1.0, 5)


def test_decide_falls_back_to_the_default_where_nothing_is_right():
    zero = np.zeros((3, 4, 4))                                                                   # else the tie would go to the highest tau and select nothing
    d = metrics.decide(zero, zero, distinct(zero), [0.5, 1.0, 1.2], [-0.5, 0.0, 0.5], n_star=2)
    assert (d["temperature"], d["tau"], d["qe"], d["blind"]) == (1.0, 0.0, 0.0, True)


def test_decide_counts_queries_without_a_selection_as_zero():
    reward = np.array([[[0.9, 0.9], [0.1, 0.1]]])                                                # tau 0.5 drops the second query
    d = metrics.decide(reward, np.ones((1, 2, 2)), distinct(reward), [1.0], [0.0, 0.5], n_star=2)
    assert d["tau"] == 0.0 and d["surface"] == [[1.0, 0.5]] and d["empty"] == 0.0


def test_effects_of_fewer_samples_are_the_mean_over_all_subsets():
    for _ in range(12):
        Q, K = 3, int(RNG.integers(2, 8))
        k, n_star, taus = int(RNG.integers(1, K + 1)), int(RNG.integers(1, 5)), [-0.6, 0.0, 0.5]
        text = RNG.integers(0, 4, (Q, K))
        correct = text % 2 == 0                                                                  # one text, one verdict; rewards may differ (a cut-off one)
        reward = np.where(RNG.random((Q, K)) < 0.2, -np.inf, RNG.uniform(-1, 1, (Q, K)).round(1))
        qe, empty = metrics.effects(reward, correct, text, taus, n_star, k)
        every = [metrics.effects(reward[:, s], correct[:, s], text[:, s], taus, n_star) for s in map(list, subsets(K, k))]
        assert np.allclose(qe, np.mean([e[0] for e in every], axis=0), atol=1e-12) and np.allclose(empty, np.mean([e[1] for e in every], axis=0), atol=1e-12)


def test_effects_of_the_paper_s_64_samples_in_floats():
    right, wrong = (1,) * 20 + (2,) * 6, (1,) * 12 + (3,) * 4
    full, _ = metrics._expected_effect(right, wrong, 64, 64, 6)
    assert full == metrics.query_effect(26 + 16, 26, 6)                                          # every class is met: no rounding at all
    sizes = [metrics._expected_effect((1,) * 8, (1,) * 8, 64, k, 6)[0] for k in (16, 32, 48, 64)]
    draws = [RNG.hypergeometric(8, 56, 32) for _ in range(4000)]
    assert sizes == sorted(sizes) and metrics._expected_effect((1,) * 8, (), 64, 32, 6)[0] == pytest.approx(np.mean([min(d / 6, 1) for d in draws]), abs=0.02)


def test_exact_taus_hold_the_best_threshold_there_is():
    for k in (None, 5):
        reward, correct, text = random_pools()
        reward[0, 0, :3] = -np.inf
        taus = metrics.exact_taus(reward, correct, text, 3, k)
        every = sorted({-3.0, *reward[np.isfinite(reward)].tolist()})
        best = max(metrics.effects(*pool, every, 3, k)[0].mean(0).max() for pool in zip(reward, correct, text))
        d = metrics.decide(reward, correct, text, [0.5, 0.7, 0.9], taus, 3, k=k)
        assert len(taus) <= 3 and d["qe"] == pytest.approx(best, abs=1e-9)
    none = np.full((1, 2, 3), -np.inf)
    assert len(metrics.exact_taus(none, none > 0, distinct(none), 2)) == 1                        # nothing but cut-off responses


def test_a_decision_names_its_ties():
    d = metrics.decide(*random_pools(), [0.5, 0.7, 0.9], [-0.5, 0.0, 0.5, 1.0], n_star=3)
    assert d["ties"] == len(d["tied"]) and [d["temperature"], d["tau"]] not in d["tied"]
    assert all(T in d["temperatures"] and tau in d["taus"] for T, tau in d["tied"])


def test_read_jsonl_leaves_out_a_torn_last_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert metrics.read_jsonl(tmp_path / "m.jsonl") == [{"a": 1}, {"a": 2}]
    assert metrics.read_jsonl(tmp_path / "none") == []
