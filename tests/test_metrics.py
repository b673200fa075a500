"""metrics.py against brute force: every subset, every order; fresh random inputs."""

import itertools
import json
import math

import numpy as np
import pytest

import metrics
from data import Query, Sample

RNG = np.random.default_rng()  # fresh every time: what holds must hold for any input
print("metrics tests draw from", RNG.bit_generator.seed_seq.entropy)


def random_sizes(largest: int) -> tuple[int, int, int]:
    """n, K, S with 1 <= S <= K <= n <= largest."""
    n = int(RNG.integers(1, largest + 1))
    K = int(RNG.integers(1, n + 1))
    return n, K, int(RNG.integers(1, K + 1))


NONSENSE = [
    *[(metrics.pass_at_k_s, a) for a in ((4, [2], 5, 1), (4, [2], 2, 3), (4, [5], 2, 1))],
    *[(metrics.pass_at_k_s, a) for a in ((4, [2], 2, 0), (4, [-1], 2, 1))],
    *[(metrics.reward_at_k_s, ([[1.0]], [[1]], K, S)) for K, S in ((2, 1), (1, 2))],
    *[(metrics.reward_at_k_s, (r, [[1]], 1, 1)) for r in ([1.0], [[]], [[1.0, 2.0]])],
    *[(metrics.query_effect, a) for a in (([1], [2], 6), ([1], [1], 0), ([1], [-1], 6))],
    (metrics.distinct_equations, ([["a", "b"]], [[1]])),
]


@pytest.mark.parametrize("function, arguments", NONSENSE)
def test_nonsense_is_refused(function, arguments):
    with pytest.raises(ValueError, match="need|zip"):
        function(*arguments)


def test_no_queries_give_no_numbers():
    assert metrics.pass_at_k_s(4, [], 2, 1).shape == (0,)
    for none in ([], np.zeros((0, 4))):
        assert metrics.reward_at_k_s(none, none, 2, 1).shape == (0,)
        n_sel, n_correct = metrics.sweep(none, none, metrics.duplicates(none, none), [0.0, 0.5])
        assert metrics.query_effect(n_sel, n_correct, 6).shape == (0, 2)


def test_pass_at_k_s_is_the_mean_over_all_subsets():
    for _ in range(30):
        n, K, S = random_sizes(8)
        correct = RNG.random((4, n)) < RNG.random()
        subsets = list(itertools.combinations(range(n), K))
        at_least_S = [correct[:, list(subset)].sum(axis=1) >= S for subset in subsets]
        passed = metrics.pass_at_k_s(n, correct.sum(axis=1), K, S)
        assert np.allclose(passed, np.mean(at_least_S, axis=0), atol=1e-12)


def test_pass_at_k_s_equals_chens_product():
    c = np.arange(65)
    chen = 1 - np.prod([(64 - c - i) / (64 - i) for i in range(32)], axis=0)
    assert np.allclose(metrics.pass_at_k_s([64] * 65, c, 32, 1), chen, atol=1e-12)


def brute_reward_at_k_s(reward, correct, K, S):
    """Every subset of K, every order of its ties."""
    means = []
    for subset in itertools.combinations(range(len(reward)), K):
        all_right = []
        for order in itertools.permutations(subset):
            if all(reward[a] >= reward[b] for a, b in itertools.pairwise(order)):
                all_right.append(correct[list(order[:S])].all())
        means.append(np.mean(all_right))
    return np.mean(means)


@pytest.mark.parametrize("levels", [1, 2, 3, 100])  # 1: all tied; 100: hardly a tie
def test_reward_at_k_s_is_the_mean_over_all_subsets_and_tie_orders(levels):
    for _ in range(8):
        n, K, S = random_sizes(6)
        reward = RNG.integers(0, levels, (3, n)) / levels
        correct = RNG.random((3, n)) < 0.6
        brute = [brute_reward_at_k_s(r, y, K, S) for r, y in zip(reward, correct)]
        assert np.allclose(metrics.reward_at_k_s(reward, correct, K, S), brute, atol=1e-12)


def test_reward_at_k_s_ignores_the_storage_order_and_ranks_nan_last():
    reward = RNG.integers(0, 3, (5, 12)).astype(float)
    correct = RNG.random((5, 12)) < 0.5
    order = RNG.permutation(12)
    shuffled = metrics.reward_at_k_s(reward[:, order], correct[:, order], 8, 3)
    assert np.allclose(metrics.reward_at_k_s(reward, correct, 8, 3), shuffled)
    assert metrics.reward_at_k_s([[np.nan, -5.0]], [[1, 0]], 2, 1) == [0.0]
    assert metrics.reward_at_k_s([[-np.inf, 0.0]], [[0, 1]], 2, 1) == [1.0]


def test_reward_at_k_s_with_the_answer_reward_equals_pass_at_k_s():  # the remark in Sec. 2.2
    correct = RNG.random((50, 16)) < RNG.random((50, 1))
    by_reward = metrics.reward_at_k_s(correct.astype(float), correct, 8, 3)
    by_count = metrics.pass_at_k_s(16, correct.sum(axis=1), 8, 3)
    assert (by_reward == by_count).all()  # both are integers, divided once


def test_a_thousand_samples_do_not_overflow():
    n, K, S = 1100, 550, 4
    correct = np.arange(n)[None] % 2 == 1
    passed = metrics.pass_at_k_s(n, correct.sum(axis=1), K, S)
    assert metrics.reward_at_k_s(correct, correct, K, S) == passed == pytest.approx(1)
    all_tied = metrics.reward_at_k_s(np.zeros((1, n)), correct, K, S)
    assert all_tied == math.comb(K, S) / math.comb(n, S)  # the S first of a random order


def test_distinct_equations():
    first = ["<<1+1=2>>2 <<2+2=4>>4", "<<1+1=2>>2", "<<9=9>>"]
    assert metrics.distinct_equations([first, ["", ""]], [[1, 1, 0], [1, 1]]) == (2 / 3, 0.5)
    assert metrics.distinct_equations([["none"], ["1=1"]], [[1], [0]]) == (0.0, 0.0)  # never 0 / 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She sells 9 * $2 = $<<9*2=18>>18", ["9*2=18"]),
        ("Cid = Ida * 6 = 5 * 6 = 0 ; # 0", ["Cid=Ida*6", "Ida*6=5*6", "5*6=0"]),
        (r"\[x^2 - 4 = (x-2)(x+2) = 0\]", ["x^2-4=(x-2)(x+2)", "(x-2)(x+2)=0"]),
        ("so 1,000 + 2.5 = 1,002.5. Then nothing", ["1,000+2.5=1,002.5"]),
        ("a <= b and a != c, no equation", []),
        ("", []),
    ],
)
def test_equations(text, expected):
    assert metrics.equations(text) == expected


def test_auc_is_the_share_of_ordered_pairs():
    score, label = RNG.integers(0, 6, 60), np.arange(60) % 3 == 0
    above = score[label][:, None] > score[~label]
    level = score[label][:, None] == score[~label]
    assert metrics.auc(score, label) == pytest.approx(np.mean(above + 0.5 * level), abs=1e-4)
    assert metrics.auc([1.0], [1]) is None


def naive_counts(reward, correct, text, tau):
    """n_i and n'_i of one query; of one text the best-rewarded sample counts."""
    rising = sorted(zip(reward, correct, text), key=lambda sample: sample[0])
    best = {x: bool(is_right) for r, is_right, x in rising if r > tau}
    return len(best), sum(best.values())


def test_sweep_equals_counting_at_every_tau():
    taus = (np.arange(-20, 21) / 10).tolist()
    for _ in range(5):
        text = RNG.integers(0, 5, (4, int(RNG.integers(1, 12))))
        query = np.arange(4)[:, None]
        correct = (text + query) % 2 == 0  # one text, one verdict, one reward
        reward = np.round(np.sin(text * 7.0 + query) * 2, 1)  # meets grid points
        reward[text == 4] = -np.inf  # cut-off responses
        n_sel, n_correct = metrics.sweep(reward, correct, metrics.duplicates(reward, text), taus)
        for q, g in itertools.product(range(4), range(len(taus))):
            expected = naive_counts(reward[q], correct[q], text[q], taus[g])
            assert (n_sel[q, g], n_correct[q, g]) == expected
        # at a tau below all rewards: of what was cut off nothing counts
        _, n_correct = metrics.sweep(reward, correct, metrics.duplicates(reward, text), [-9.0])
        assert metrics.unique_correct(reward, correct, text) == n_correct.mean()


def test_repeats_ranks_nan_with_cut_off_responses():
    reward = [[math.nan, -math.inf, -math.inf], [-math.inf, math.nan, 0.0]]
    repeated = metrics.duplicates(reward, [[0, 0, 1], [0, 0, 0]])
    assert repeated.tolist() == [[False, True, False], [True, True, False]]


TEMPERATURES, TAUS = [0.5, 0.7, 0.9], [-0.5, 0.0, 0.5, 1.0]


def random_pools(G=3, Q=20, K=8):
    """Outcomes at each of G temperatures."""
    correct = RNG.random((G, Q, K)) < 0.5
    reward = correct + RNG.uniform(-1, 1, (G, Q, K))
    text = RNG.integers(0, K, (G, Q, K))
    return [metrics.Outcomes(*at_T) for at_T in zip(reward, correct, text)]


def all_different(reward):
    """The outcomes of one temperature; what has a reward is right, and no text comes twice."""
    reward = np.asarray(reward, float)
    text = np.broadcast_to(np.arange(reward.shape[1]), reward.shape)
    return metrics.Outcomes(reward, reward > 0, text)


def test_decide_takes_the_grid_point_of_the_greatest_mean_query_effect():
    by_T = random_pools()
    line = metrics.decide(by_T, TEMPERATURES, TAUS, n_star=3)
    naive = {}
    for T, tau in itertools.product(TEMPERATURES, TAUS):
        outcomes = by_T[TEMPERATURES.index(T)]
        counts = [naive_counts(*query, tau) for query in zip(*outcomes)]
        naive[T, tau] = np.mean([min(c / 3, 1) * c / max(n, 1) for n, c in counts])
    assert line["qe"] == pytest.approx(max(naive.values()))
    assert line["qe"] == pytest.approx(naive[line["temperature"], line["tau"]])
    assert np.allclose(np.ravel(line["surface"]), list(naive.values()), atol=1e-6)


def test_a_decision_names_its_interval_ties_and_edges():
    for _ in range(8):
        line = metrics.decide(random_pools(), TEMPERATURES, TAUS, n_star=3)
        low, high = line["interval"]
        T, tau = line["temperature"], line["tau"]
        assert low < line["qe"] < high
        others = {*itertools.product(TEMPERATURES, TAUS)} - {(T, tau)}
        assert others.issuperset(map(tuple, line["tied"]))
        assert line["ties"] == len(line["tied"])
        assert ("temperature" in line["edge"]) == (T != 0.7)
        assert ("tau" in line["edge"]) == (tau in (-0.5, 1))


def test_decide_uses_the_rule_that_a_fork_sets(monkeypatch):
    monkeypatch.setattr(metrics, "query_effect", lambda n, c, n_star: (c == 1).astype(float))
    line = metrics.decide([all_different([[0.9, 0.1]])], [1.0], [0.0, 0.5], n_star=2)
    assert line["surface"] == [[0.0, 1.0]] and line["tau"] == 0.5


def test_decide_on_plateaus():
    """Ties go to the lower T, then to the higher tau, but not where nothing is right."""
    right = all_different(np.ones((5, 4)))  # a binary reward: tau has no say in [0, 1)
    line = metrics.decide([right, right], [0.5, 0.6], TAUS, n_star=4)
    assert (line["temperature"], line["tau"], line["qe"], line["ties"]) == (0.5, 0.5, 1.0, 5)
    wrong = all_different(np.zeros((4, 4)))
    line = metrics.decide([wrong] * 3, [0.5, 1.0, 1.2], [-0.5, 0.0, 0.5], n_star=2)
    assert (line["temperature"], line["tau"], line["qe"], line["blind"]) == (1.0, 0.0, 0.0, True)


def test_decide_counts_queries_without_a_selection_as_zero():
    outcomes = all_different([[0.9, 0.9], [0.1, 0.1]])  # tau 0.5 drops the second query
    line = metrics.decide([outcomes], [1.0], [0.0, 0.5], n_star=2)
    assert line["tau"] == 0.0 and line["surface"] == [[1.0, 0.5]] and line["empty"] == 0.0


SOUND, LUCKY = "Bob = Ann * 3 = 4 * 3 = 2 ; # 2", "Bob = Ann + 3 = 4 + 3 = 2 ; # 2"
STEPS = {SOUND: [True, True], LUCKY: [False, True], "# 1": [False]}


def check(question, response):
    return STEPS[response]


def scored(response, correct, sound, steps, finish_reason="stop"):
    r_prm = 2 * min(steps) - 1
    reward = correct + r_prm if finish_reason == "stop" else -math.inf
    return Sample(response, finish_reason, "", correct, sound, steps, r_prm, reward)


def test_the_numbers_of_an_iteration():
    right = scored(SOUND, True, True, [0.9, 0.8])
    lucky = scored(LUCKY, True, False, [0.2, 0.55])
    wrong = scored("# 1", False, False, [0.6, 0.5])
    cut = scored("Bob", False, False, [0.9], "length")
    pool, query = [[right, right, lucky, wrong, cut]], Query("0", "", "2")
    row = metrics.of_samples([[right]], pool, K=5, S=2)
    assert (row["pass@1"], row["pass@5"], row["truncated"], row["queries"]) == (100, 100, 20, 1)
    assert (row["distinct"], row["coverage"]) == (0.6667, 1)  # 6 unique equations of 9
    assert (row["reward@5-2"], row["prm@5-2"], row["sound@5-2"]) == (100, 100, 100)
    assert (row["pass@4-2"], row["pass@2-2"], row["false_reasoning"]) == (100, 30, 0.3333)

    row = metrics.of_pool([query], pool, [[right]], tau=0.3, n_star=4, check=check)
    assert (row["qe"], row["kept"], row["sampled"]) == (0.5, 1, 5)  # n = n' = 2 of n* = 4
    assert (row["prm/auc"], row["prm/auc_sound"], row["prm/step_auc"]) == (0.6667, 1, 1)
    assert (row["prm/wrong_admitted"], row["prm/false_admitted"]) == (0, 1)
    assert (row["prm/min_last"], row["pool/false_reasoning"]) == (0.75, 0.3333)
    assert "prm/step_auc" not in metrics.watch_prm([query], pool, tau=0.3)  # without a checker
    nothing = metrics.of_pool([query], [[cut]], [[]], tau=0.3, n_star=4)
    assert (nothing["qe"], nothing["selected/correct"]) == (0, None)
    json.dumps([row, nothing], allow_nan=False)
