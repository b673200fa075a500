"""B-STaR: self-taught reasoning that watches exploration and exploitation, and balances them before each iteration.

    python bstar.py                                   the toy, on a CPU, in minutes
    python bstar.py --task math                       the paper's main run, on one GPU node (vLLM); arc and code are its others
    python bstar.py --task gsm8k --model DIR --train-file train.jsonl --test-file test.jsonl
    python bstar.py --method online-rft --tau 0.2     a baseline, or a fixed (T, tau)

`main` reads as Algorithm 1. An iteration: balance -> sample -> score -> select -> train -> evaluate -> save. The five methods are the
five rows of `METHODS`: one loop with three switches. Whoever kills the process and starts the same command again gets, on a CPU, bit for
bit the metrics of an undisturbed run: every random number comes from a seed derived of (seed, iteration, phase), sampled chunks are kept
in parts/ until the iteration is written, and checkpoints and logs appear whole or not at all.

Where this leaves the paper and its official code: the table in README.md.
"""
from __future__ import annotations

import math
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

import data
import metrics
import report
import train_prm
from config import METHODS, Config, parse_config
from data import Query, Sample, Splits
from engine import Job, sample
from metrics import as_arrays, group_repeats, metrics_of, percent, pool_metrics
from rewards import PRM, score
from runs import Setup, clock, end_iteration, fits, open_run, put_line, save_samples, set_up, total_iters
from trainer import adamw, cosine, encode, is_complete, load_policy, load_trainer, place, save_checkpoint, seed_of, sft, train

def select(groups: Sequence[Sequence[Sample]], tau: float, N: int, seed: int) -> list[list[Sample]]:
    """At most N responses with r > tau, unique in their query, filled round-robin by rank so that easy queries don't crowd out hard ones.

    Every query gives its best before any gives its second. In the round that would overflow N, a seeded draw says which queries still give.
    returns  for each query the samples kept, best first

    >>> s = lambda text, r: Sample(text, "stop", reward=r)
    >>> kept = select([[s("a", 1), s("a", 1), s("b", 2)], [s("c", 0.5)], [s("d", 0)]], tau=0.0, N=2, seed=0)
    >>> [[x.response for x in g] for g in kept]
    [['b'], ['c'], []]
    """
    ranked = []
    for g in groups:
        fresh = [s for s, again in zip(g, group_repeats(g)) if not again and s.reward > tau]
        ranked.append(sorted(fresh, key=lambda s: -s.reward))                      # stable: equal rewards stay in the order drawn
    kept: list[list[Sample]] = [[] for _ in groups]
    left, rng = N, random.Random(seed)
    for rank in range(max(map(len, ranked), default=0)):
        givers = [i for i, g in enumerate(ranked) if len(g) > rank]
        if len(givers) > left:
            givers = sorted(rng.sample(givers, left))
        for i in givers:
            kept[i].append(ranked[i][rank])
        left -= len(givers)
    return kept



def load_prm(cfg: Config, have: Setup) -> PRM | None:
    """The reward's process model: --prm, or the task's own, which train_prm.py makes once."""
    if cfg.reward != "answer+prm":
        return None
    return PRM.load(cfg.prm or train_prm.ready(cfg, have), cfg.prm_format, cfg.token_budget)



def evaluate(engine, policy, prm: PRM | None, splits: Splits, prompt: Callable[[Query], list[int]], cfg: Config, t: int, parts: Path) -> dict:
    """Validation and test metrics of a policy: greedy pass@1, and from eval_samples at T = 1 (fixed, so that curves compare) the rest.

    returns  {"pass@1": %, "pass@K": %, "pass@K-S": %, "reward@K-S": %, "distinct": share, ...}; the first test set has no prefix
    """
    tests = {name: qs[:cfg.eval_queries or None] for name, qs in splits.tests.items()}
    jobs = [Job(f"iter{t}.val", splits.val, 1, 0.0)]
    for name, queries in tests.items():
        jobs += [Job(f"iter{t}.{name}.greedy", queries, 1, 0.0), Job(f"iter{t}.{name}.sampled", queries, cfg.eval_samples, 1.0)]
    jobs = [job for job in jobs if job.n]
    done = dict(zip((job.name for job in jobs), sample(engine, policy, jobs, prompt, cfg, parts, f"evaluate {t}")))
    for job in jobs:
        score(job.queries, done[job.name], cfg, prm)
    row = {"val/pass@1": percent([[s.correct for s in g] for g in done[f"iter{t}.val"]])}
    for name in tests:
        prefix, greedy, sampled = "" if name == next(iter(tests)) else f"{name}/", done[f"iter{t}.{name}.greedy"], done.get(f"iter{t}.{name}.sampled")
        found = metrics_of(greedy, sampled, cfg.eval_samples, cfg.S) if sampled else {"pass@1": percent([[s.correct for s in g] for g in greedy])}
        row.update({prefix + k: v for k, v in found.items()})
    return row



def balance(engine, policy, prm: PRM | None, queries: list[Query], n_star: int, prompt, cfg: Config, t: int, out: Path) -> tuple[dict, list[list[Sample]]]:
    """Algorithm 1's configuration step: samples the subset at every T, scores once, sweeps every tau, takes the best query effect   [Sec. 3.3]

    returns  the ledger's line (see metrics.decide) and the subset's samples at the chosen T, which are on-policy and join the pool
    """
    jobs = [Job(f"iter{t}.T{T:g}", queries, cfg.K, T) for T in cfg.temperature_grid]
    by_T = sample(engine, policy, jobs, prompt, cfg, out / "parts", f"balance {t}")
    for groups in by_T:
        score(queries, groups, cfg, prm)
    reward, correct, _ = map(np.stack, zip(*map(as_arrays, by_T)))                 # (G_T, Q, K) each
    text = np.array([[metrics.classes([s.response for s in g]) for g in groups] for groups in by_T], dtype=np.int32)
    path = out / "samples" / f"balance_{t}.npz"
    path.parent.mkdir(exist_ok=True)
    with open(tmp := path.with_suffix(".tmp"), "wb") as f:
        np.savez_compressed(f, reward=reward, correct=correct, text=text)
    os.replace(tmp, path)
    line = {"iter": t, **metrics.decide(reward, correct, text, cfg.temperature_grid, cfg.tau_grid, n_star, seed_of(cfg.seed, t, "bootstrap"))}
    put_line(out / "ledger.jsonl", line)
    if line["blind"]:
        print(f"balance {t}: no right answer among the subset's samples; T {line['temperature']:g} and tau {line['tau']:g} are the default", file=sys.stderr)
    return line, by_T[cfg.temperature_grid.index(line["temperature"])]



def draw_queries(train: list[Query], cfg: Config, t: int) -> list[Query]:
    """The iteration's M queries, the balancing subset first."""
    order = random.Random(seed_of(cfg.seed, t, "queries")).sample(train, len(train))
    return order[:cfg.queries_per_iter or None]


def improve(policy, optimizer, kept: list[tuple[Query, str]], base: str, tokenizer, prompt, cfg: Config, t: int, start_steps: int):
    """M_t from M_{t-1} and the selected responses, by the method's switches   [Sec. 2.1, "Improving"; App. B]

    returns  policy, optimizer, log
    """
    method, examples = METHODS[cfg.method], encode(kept, prompt, tokenizer, cfg, f"iteration {t}")
    if not examples:
        print(f"iteration {t}: no response was selected; the policy stays as it is", file=sys.stderr)
        return policy, optimizer, {"loss": None, "grad_norm": None}
    if cfg.samples_per_iter > 20 * len(examples):
        print(f"iteration {t}: {len(examples)} responses fill {cfg.samples_per_iter} places; a policy that reads each {cfg.samples_per_iter // len(examples)} "
              "times can forget the rest: fewer --steps-per-iter, more --queries-per-iter or a lower --tau", file=sys.stderr)
    if method.from_base:                           # as many steps in all as a policy that was never set back has had
        policy.load_state_dict(load_policy(cfg, base, "cpu").state_dict())
    if optimizer is None or not method.inherit:
        optimizer = adamw(policy, cfg.lr)
    place(optimizer, policy.device)
    first = (t - 1) * cfg.steps_per_iter if method.inherit else 0
    n_steps = start_steps + t * cfg.steps_per_iter if method.from_base else cfg.steps_per_iter
    horizon = cfg.num_iters * cfg.steps_per_iter if method.inherit else n_steps
    peak = cfg.sft_lr if method.from_base else cfg.lr
    log = train(policy, optimizer, examples, range(first, first + n_steps), lambda s: cosine(s, horizon, peak, cfg.lr_end, cfg.warmup), cfg,
                seed_of(cfg.seed, t, "train"), f"train {t}")
    if cfg.offload_optimizer:
        place(optimizer, "cpu")
    return policy, optimizer if method.inherit else None, log


def main(argv: Sequence[str] | None = None) -> None:
    """Algorithm 1."""
    cfg = parse_config(argv, doc=__doc__)
    if cfg.preflight:
        fits(cfg)                                  # and stops
    out = open_run(cfg)
    done = metrics.read_jsonl(out / "metrics.jsonl")
    if len(done) > total_iters(cfg):
        shutil.rmtree(out / "parts", ignore_errors=True)
        report.report([report.read_run(out)], out)
        return print(f"{out}: finished ({total_iters(cfg)} iterations); another --out or --seed starts a new run")
    have, method = set_up(cfg), METHODS[cfg.method]
    splits, base, tokenizer, prompt, engine, human = have
    prm = load_prm(cfg, have)
    starts = sft(cfg, base, human, tokenizer, 1 if method.iterate else total_iters(cfg) + 1)
    policy, optimizer, t, log = resume(cfg, out, starts, len(done))
    start_steps = cfg.start_epoch * math.ceil(len(human) / cfg.batch_size)

    while t <= total_iters(cfg):
        if log is None and t and method.iterate:
            # -- balance: the (T, tau) of the greatest query effect on a small subset, for the policy as it is now
            queries = draw_queries(splits.train, cfg, t)
            n_star = math.ceil(cfg.samples_per_iter / len(queries))
            T, tau, pool = cfg.temperature or 1.0, 0.0 if cfg.tau is None else cfg.tau, []
            if method.balance and len(cfg.temperature_grid) * len(cfg.tau_grid) > 1:
                with clock(out, t, "balance"):
                    choice, pool = balance(engine, policy, prm, queries[:cfg.balance_queries], n_star, prompt, cfg, t, out)
                    T, tau = choice["temperature"], choice["tau"]
            # -- sample: K responses to every other query
            with clock(out, t, "gen"):
                rest = queries[len(pool):]
                jobs = [Job(f"iter{t}.pool", rest, cfg.K, T)] if rest else []
                more = sum(sample(engine, policy, jobs, prompt, cfg, out / "parts", f"sample {t}"), [])
            # -- score and select: r > tau, unique, round-robin
            with clock(out, t, "score"):
                score(rest, more, cfg, prm)
                pool += more
                kept = select(pool, tau, cfg.samples_per_iter, seed_of(cfg.seed, t, "select"))
                save_samples(out / "samples" / f"iter_{t}.jsonl.gz", queries, pool, kept)
            # -- train: M_t from M_{t-1}
            with clock(out, t, "train"):
                pairs = [(q, s.response) for q, g in zip(queries, kept) for s in g]
                found = {"temperature": T, "tau": tau, **pool_metrics(queries, pool, kept, tau, n_star)}
                policy, optimizer, log = improve(policy, optimizer, pairs, base, tokenizer, prompt, cfg, t, start_steps)
                save_checkpoint(out / "checkpoints" / f"iter_{t}", policy, tokenizer, optimizer, log := found | log)
        elif t and not method.iterate:
            policy = load_policy(cfg, starts[t])
        # -- evaluate and write
        with clock(out, t, "eval"):
            row = {"iter": t, **(log or {}), **evaluate(engine, policy, prm, splits, prompt, cfg, t, out / "parts")}
        end_iteration(out, row, starts, cfg)
        t, log = t + 1, None

    run = report.read_run(out)
    print(report.table([run]), f"\n{report.report([run], out)}  {out}/metrics.jsonl  {out}/policy")


def resume(cfg: Config, out: Path, starts: Sequence[Path], n_done: int):
    """Where a run stands: (policy, optimizer, the iteration to do next, its training log if only its evaluation is missing).

    The newest complete checkpoint counts, at most one ahead of the metrics; if that one is broken, the run steps back and says so.
    """
    if not METHODS[cfg.method].iterate:
        return load_policy(cfg, starts[n_done]), None, n_done, None
    folder = lambda i: out / "checkpoints" / f"iter_{i}"
    c = next((i for i in range(n_done, 0, -1) if is_complete(folder(i))), 0)
    if c < n_done - 1:
        print(f"{folder(n_done - 1)} is missing or broken: going on from {folder(c) if c else starts[0]}", file=sys.stderr)
    if c == 0:
        return load_policy(cfg, starts[0]), None, min(n_done, 1), None
    policy = load_policy(cfg, folder(c))
    optimizer = adamw(policy, cfg.lr) if METHODS[cfg.method].inherit else None
    log = load_trainer(folder(c), optimizer)
    if cfg.offload_optimizer:
        place(optimizer, "cpu")
    return (policy, optimizer, c, log) if c == n_done else (policy, optimizer, c + 1, None)


if __name__ == "__main__":
    data.run(main)
