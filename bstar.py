"""B-STaR: self-taught reasoning that watches exploration and exploitation, and balances them.

    python bstar.py                                   number walks, on a CPU, in minutes
    python bstar.py --task math                       the paper's main run, on one GPU (vLLM)
    torchrun --nproc-per-node 8 bstar.py --task math  the same on eight
    python bstar.py --task gsm8k --model DIR --train-file train.jsonl --test-file test.jsonl
    python bstar.py --method online-rft --tau 0.2     a baseline, at a fixed tau

`main`, at the end, is Algorithm 1; what it calls stands above it in that order:

    balance -> explore (draw, score) -> exploit (select) -> improve -> evaluate

The five methods are one loop with the four switches of config.METHODS. Every random number comes
from a seed made of (seed, iteration, phase), and files appear whole or not at all. So whoever kills
a run starts the same command again and gets, on a CPU, the same bits.

Around it: config.py (settings), data.py and toy.py (questions), engine.py (sampling), trainer.py
(SFT, checkpoints), grader.py and sandbox.py (is it right), rewards.py (Eq. 1, PRM), metrics.py
(Eq. 2, Pass@K-S), runs.py (the run's folder), ranks.py (torchrun), train_prm.py, report.py.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable

import numpy as np

import data
import metrics
import ranks
import rewards
import toy
import train_prm
from config import METHODS, Config, parse_config
from data import Query, Sample
from runs import Run, Setup, preflight, set_up
from trainer import (
    Phase,
    State,
    adamw,
    as_examples,
    load_policy,
    memory_by,
    place,
    resume,
    save,
    seed_of,
    sft,
    train,
)

# -- balance --------------------------------------------------------------------------------------


def balance(
    M: State, queries: list[Query], n_star: int, setup: Setup, score: Callable, run: Run
) -> tuple[float, float, list[list[Sample]]]:
    """The (T, tau) of the greatest query effect on a subset of the queries   [Sec. 3.3, Eq. 2]

    Every T is sampled, the samples are scored once, and every tau is swept.

    returns  T, tau, and the subset's samples at that T: they are on-policy and join the pool
    """
    cfg, t = run.cfg, M.t + 1
    temperatures = cfg.temperature_grid
    with setup.engine.awake(M.policy) as draw:
        # all temperatures in one block: each waking of vLLM loads all weights
        by_T = [draw(queries, cfg.K, T, f"iter{t}.T{T:g}") for T in temperatures]
    for groups in by_T:
        score(queries, groups)

    outcomes = [metrics.as_arrays(groups) for groups in by_T]
    seed = seed_of(cfg.seed, t, "bootstrap")
    decision = metrics.decide(outcomes, temperatures, cfg.tau_grid, n_star, seed)
    reward, correct, text = (np.stack(x) for x in zip(*outcomes))  # (G_T, Q, K) each
    run.save_decision(t, decision, reward, correct, text)
    T, tau = decision["temperature"], decision["tau"]
    return T, tau, by_T[temperatures.index(T)]


# -- exploit --------------------------------------------------------------------------------------


def select(groups: list[list[Sample]], tau: float, N: int, seed: int) -> list[list[Sample]]:
    """At most N responses with r > tau, unique in their query   [Sec. 2.3]

    Every query gives its best before any gives its second, so that easy queries don't crowd out
    hard ones. In the round that would overflow N, a seeded draw says which queries still give.

    returns  for each query the samples kept, best first

    >>> a, b, c, d = (Sample(x, "stop", reward=r) for x, r in zip("abcd", (1, 2, 0.5, 0)))
    >>> kept = select([[a, a, b], [c], [d]], tau=0.0, N=2, seed=0)
    >>> [[x.response for x in group] for group in kept]
    [['b'], ['c'], []]
    """
    ranked = []
    for group in groups:
        reward, _, text = metrics.as_arrays([group])
        duplicate = metrics.duplicates(reward, text)[0]
        fresh = [s for s, again in zip(group, duplicate) if not again and s.reward > tau]
        # the sort is stable: ties stay as they were drawn
        ranked.append(sorted(fresh, key=lambda s: -s.reward))

    kept: list[list[Sample]] = [[] for _ in groups]
    left, rng = N, random.Random(seed)
    for rank in range(max(map(len, ranked), default=0)):
        givers = [i for i, group in enumerate(ranked) if len(group) > rank]
        if len(givers) > left:
            givers = sorted(rng.sample(givers, left))
        for i in givers:
            kept[i].append(ranked[i][rank])
        left -= len(givers)
    return kept


# -- improve --------------------------------------------------------------------------------------


def improve(M: State, queries: list[Query], kept, setup: Setup, cfg: Config) -> State:
    """M_t from M_{t-1} and the selected responses, by the method's switches   [Sec. 2.1; App. B]"""
    method, t = METHODS[cfg.method], M.t + 1
    pairs = []
    for query, group in zip(queries, kept):
        pairs += [(query, s.response) for s in group]
    examples = as_examples(pairs, setup, cfg, f"iteration {t}")
    if not examples:
        nothing = "no response was selected; the policy stays as it is"
        print(f"iteration {t}: {nothing}", file=sys.stderr)
        return State(t, M.policy, M.optimizer, {"loss": None, "grad_norm": None})
    phase = phase_of(t, len(examples), setup, cfg)
    R = len(phase.steps) * cfg.batch_size / len(examples)  # readings of each response
    if R > 20:
        reads = f"training reads each selected response {R:.0f} times"
        way_out = "the policy can forget the rest: --max-repeats 6, or a larger --K"
        print(f"iteration {t}: {reads}, and {way_out}", file=sys.stderr)

    policy, optimizer = M.policy, M.optimizer
    if method.from_base:
        # into the weights that stand: a second policy on the GPU would take as much memory again
        ranks.load(policy, load_policy(cfg, setup.base, "cpu").state_dict())
    if optimizer is None or not method.inherit:
        optimizer = adamw(policy, cfg.lr)
    place(optimizer, policy.device)
    log = train(policy, optimizer, examples, phase, cfg)
    if cfg.offload_optimizer:
        place(optimizer, "cpu")
    log = {"repeats": round(R, 2), **log}
    return State(t, policy, optimizer if method.inherit else None, log)


def phase_of(t: int, n_examples: int, setup: Setup, cfg: Config) -> Phase:
    """The steps of iteration t and their place on the method's schedule   [App. A, B]"""
    method, n = METHODS[cfg.method], cfg.steps_per_iter
    if method.from_base:  # as many steps as a policy that was never set back has had in all
        n = t * n + cfg.start_epoch * math.ceil(len(setup.human) / cfg.batch_size)
    if cfg.max_repeats:  # fewer steps; their places on an inherited schedule stay
        n = min(n, math.ceil(cfg.max_repeats * n_examples / cfg.batch_size))
    first, horizon = 0, n
    if method.inherit:  # one schedule over all iterations
        first, horizon = (t - 1) * cfg.steps_per_iter, cfg.num_iters * cfg.steps_per_iter
    # from the base it trains as the SFT does; --lr is for a policy that is trained already
    peak = cfg.sft_lr if method.from_base else cfg.lr
    seed = seed_of(cfg.seed, t, "train")
    steps = range(first, first + n)
    return Phase(f"train {t}", seed, steps, horizon, peak, cfg.lr_end, cfg.warmup)


# -- evaluate -------------------------------------------------------------------------------------


def evaluate(M: State, setup: Setup, score: Callable, cfg: Config) -> dict:
    """Greedy pass@1 on validation and test; from eval_samples at T = 1 the rest   [Sec. 2.2]

    T is fixed so that curves compare.

    returns  {"val/pass@1": %, "pass@1": %, "pass@K-S": %, ...}; further test sets carry their name
    """
    val, name = setup.splits.val, f"iter{M.t}"
    n = cfg.eval_queries or None
    tests = {test: queries[:n] for test, queries in setup.splits.tests.items()}
    greedy, sampled = {}, {}
    with setup.engine.awake(M.policy) as draw:
        val_greedy = draw(val, 1, 0.0, f"{name}.val")
        for test, queries in tests.items():
            greedy[test] = draw(queries, 1, 0.0, f"{name}.{test}.greedy")
            if cfg.eval_samples:
                sampled[test] = draw(queries, cfg.eval_samples, 1.0, f"{name}.{test}.sampled")

    score(val, val_greedy)
    row = {"val/pass@1": metrics.pass_at_1(val_greedy)}
    for i, (test, queries) in enumerate(tests.items()):
        score(queries, greedy[test])
        scores = {"pass@1": metrics.pass_at_1(greedy[test]), "queries": len(queries)}
        if cfg.eval_samples:
            score(queries, sampled[test])
            scores = metrics.of_samples(greedy[test], sampled[test], cfg.eval_samples, cfg.S)
        prefix = f"{test}/" if i else ""
        row |= {prefix + key: value for key, value in scores.items()}
    return row


# -- the loop -------------------------------------------------------------------------------------


def draw_queries(train: list[Query], cfg: Config, t: int) -> list[Query]:
    """The iteration's M queries, the balancing subset first."""
    # all, not M, are drawn: another M keeps the balancing subset
    rng = random.Random(seed_of(cfg.seed, t, "queries"))
    order = rng.sample(train, len(train))
    return order[: cfg.queries_per_iter or None]


def sft_baseline(run: Run, setup: Setup, starts: list, score: Callable) -> None:
    """The SFT baseline has no loop: its iterations are its epochs   [Sec. 2.3, App. A]"""
    for t in range(len(run.rows), len(starts)):
        M = State(t, load_policy(run.cfg, starts[t]))
        row = {"iter": t, **evaluate(M, setup, score, run.cfg)}
        run.lap(t, "eval")
        run.end_iteration(row, starts)


def make_reward(cfg: Config, setup: Setup, prm: rewards.PRM | None, run: Run) -> Callable:
    """score(queries, groups): fills r and what it is made of   [Eq. 1]"""
    if cfg.reward == "answer+prm":
        prm = prm or train_prm.own(cfg, setup)
        run.lap(0, "prm")
    score = functools.partial(rewards.score, task=cfg.task, reward=cfg.reward, prm=prm)
    return memory_by("a smaller --token-budget")(score)


@ranks.together
def main(argv: list[str] | None = None) -> None:
    """Algorithm 1: balance, explore, exploit, improve, num_iters times."""
    cfg = parse_config(argv, doc=__doc__)
    if cfg.preflight:
        preflight(cfg)  # and stops
    run = Run(cfg)  # run.rows are the iterations that are done
    if run.finished:
        print(f"{run.out}: finished; another --out or --seed starts a new run")
        return run.finish()
    prm = train_prm.given(cfg)  # where it can't be read, before anything is made
    setup = set_up(cfg, run)
    score = make_reward(cfg, setup, prm, run)
    starts = sft(cfg, setup.base, setup.human, setup.tokenizer)  # M_0 first   [App. A]
    run.lap(0, "sft")
    if not METHODS[cfg.method].iterate:
        sft_baseline(run, setup, starts, score)
        return run.finish()

    M = resume(cfg, run.out, starts[0], len(run.rows))  # M_t of the newest checkpoint
    first = M.t + 1 if cfg.probe else min(len(run.rows), M.t + 1)
    for t in range(first, cfg.num_iters + 1):
        if t > M.t:  # else M_t is trained, and a kill came before its evaluation
            queries = draw_queries(setup.splits.train, cfg, t)
            n_star = math.ceil(cfg.samples_per_iter / len(queries))  # N / M   [Sec. 3.1]

            # -- balance: the (T, tau) of the greatest query effect on a small subset   [Sec. 3.3]
            T, tau, pool = cfg.temperature_grid[0], cfg.tau_grid[0], []
            if len(cfg.temperature_grid) * len(cfg.tau_grid) > 1:
                subset = queries[: cfg.balance_queries]
                T, tau, pool = balance(M, subset, n_star, setup, score, run)
            run.lap(t, "balance")
            if cfg.probe:
                return run.print_probe(len(queries))

            # -- explore: K responses to every other query, sampled at T
            rest = queries[len(pool) :]
            with setup.engine.awake(M.policy) as draw:
                responses = draw(rest, cfg.K, T, f"iter{t}.pool")
            run.lap(t, "gen")

            # -- exploit: keep what is above tau, unique, the best of every query first   [Sec. 2.3]
            score(rest, responses)
            pool += responses
            kept = select(pool, tau, cfg.samples_per_iter, seed_of(cfg.seed, t, "select"))
            run.save_samples(t, queries, pool, kept)
            run.lap(t, "score")

            # -- improve: M_t is M_{t-1} fine-tuned on what was kept   [Sec. 2.1, App. B]
            check = toy.CHECKERS.get(cfg.task)
            pool_log = metrics.of_pool(queries, pool, kept, tau, n_star, check)
            M = improve(M, queries, kept, setup, cfg)
            M.log = {"temperature": T, "tau": tau, **pool_log, **M.log}
            save(M, run.out / "checkpoints" / f"iter_{t}", setup.tokenizer)
            run.lap(t, "train")

        # -- evaluate; the row ends the iteration
        row = {"iter": t, **M.log, **evaluate(M, setup, score, cfg)}
        run.lap(t, "eval")
        run.end_iteration(row, starts)
    run.finish()


if __name__ == "__main__":
    data.run(main)
