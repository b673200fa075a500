"""What a run stands on: its folder, and its data, models and sampler.

Config -> Run (runs/NAME: config, metrics, ledger, samples, checkpoints)
Config -> Setup (splits, base model, tokenizer, sampler, the SFT set)
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

import data
import ranks
import report
import sandbox
import toy
import trainer
from config import LOADERS, MEMORY, METHODS, Config, unread
from data import Query, Splits, UserError
from engine import Engine, gpu_share, make_engine
from trainer import CACHE, Phase, write

ACTIONS = ("out", "probe", "preflight", "tokens_per_second")  # not settings of the run

# -- the run's folder -----------------------------------------------------------------------------


class Run:
    """runs/NAME: one process at a time, always with the same config, but for MEMORY's settings.

    rows    the iterations that are done, as in metrics.jsonl
    raises  UserError  if another process holds the folder, it holds something else than a run, or a
            run with another config
    """

    def __init__(self, cfg: Config):
        cfg.out = cfg.out or f"runs/{cfg.task}-{cfg.method}-{cfg.reward}-{cfg.seed}"
        self.cfg, self.out = cfg, Path(cfg.out)
        self.open()
        # every process reads them, behind the first one's lock and clearing
        self.rows = whole_rows(self.out / "metrics.jsonl")
        self.clock = time.perf_counter()

    @ranks.by_first
    def open(self) -> None:
        """Locks the folder, checks its config, and clears what a killed process left."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            # one lock a process: a second main in a notebook takes the first one's, and goes on
            self.lock = FileLock(self.out / "lock", is_singleton=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out {self.out}: another process is writing to it") from None
        except OSError as e:
            raise UserError(f"--out {self.out}: {e.strerror}") from None
        self.check_config()
        for leftover in self.out.rglob(".*.tmp"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def check_config(self) -> None:
        """Writes config.json, where the one that is there allows it.

        MEMORY's settings may change. Where each iteration has a learning-rate schedule of its own,
        a run may also go on to more iterations.
        """
        path = self.out / "config.json"
        # what a flag asks for now may differ between two starts of one run
        mine = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in ACTIONS}
        theirs = mine
        # a start that failed before it did anything does not hold the folder
        if {f.name for f in self.out.iterdir()} - {"lock", "config.json"}:
            theirs = earlier_config(self.out)
        # what nothing reads in such a run may have been given to an earlier version
        keys = (mine.keys() | theirs.keys()).difference(MEMORY, unread(self.cfg))
        changed = [key for key in sorted(keys) if theirs.get(key) != mine.get(key)]
        why = ""
        # each schedule is an iteration's own there, so more of them change no earlier one
        if changed == ["num_iters"] and mine["num_iters"] > theirs["num_iters"]:
            if not METHODS[self.cfg.method].inherit:
                changed = []
            why = f"; --method {self.cfg.method} has one schedule over all iterations"
        if changed:
            changes = ", ".join(f"{k} {theirs.get(k)!r} -> {mine.get(k)!r}" for k in changed)
            raise UserError(
                f"--out {self.out} holds a run with another config ({changes}){why}; "
                "choose another --out"
            )
        # written again, since a setting of MEMORY may be new
        write(path, (json.dumps(mine, indent=2) + "\n").encode())

    @property
    def finished(self) -> bool:
        """True if the last iteration's metrics are written."""
        # rows begin with iteration 0
        return len(self.rows) > self.cfg.last_iter

    @ranks.by_first
    def lap(self, t: int, phase: str) -> None:
        """Appends the seconds since the last lap to times.jsonl.

        They stand apart from metrics.jsonl, which is the same bits every time.
        """
        now = time.perf_counter()
        row = {"iter": t, "phase": phase, "seconds": round(now - self.clock, 3)}
        with open(self.out / "times.jsonl", "a", encoding="utf-8") as f:
            f.write("\n" + json.dumps(row) + "\n")  # on a line of its own after a torn one, too
        self.clock = now

    def put(self, name: str, row: dict) -> None:
        """Sets the line of row["iter"] in a JSON-lines file, and drops later ones."""
        # a later line is of what is now done again, by another policy
        rows = [r for r in numbered_rows(self.out / name) if r["iter"] < row["iter"]]
        lines = [json.dumps(r) + "\n" for r in [*rows, row]]
        write(self.out / name, "".join(lines).encode())

    @ranks.by_first
    def save_decision(self, t: int, decision: dict, reward, correct, text) -> None:
        """The ledger's line of an iteration, and the samples it was decided on, for replay."""
        arrays = io.BytesIO()
        np.savez_compressed(arrays, reward=reward, correct=correct, text=text)
        # the samples first: a line in the ledger promises that they are there
        write(self.out / "samples" / f"balance_{t}.npz", arrays.getvalue())
        self.put("ledger.jsonl", {"iter": t, **decision})
        if decision["blind"]:
            chosen = f"T {decision['temperature']:g} and tau {decision['tau']:g}"
            reason = "no right answer among the subset's samples"
            print(f"balance {t}: {reason}; {chosen} are the default", file=sys.stderr)

    @ranks.by_first
    def print_probe(self, n_queries: int) -> None:
        """Prints what the next iteration would find at each temperature   [--probe]

        R = N / (responses kept) says how often training would read each selected response.
        """
        decision = numbered_rows(self.out / "ledger.jsonl")[-1]
        N = self.cfg.samples_per_iter
        print(f"N = {N} places, {n_queries} questions, {self.cfg.K} samples each")
        print("| T | right, % | unique right a question | kept | R |\n|---|---|---|---|---|")
        columns = decision["temperatures"], decision["yield"], decision["unique"]
        for T, right, unique in zip(*columns):
            # by the answer alone: a tau above 0 may keep fewer, one below 0 more
            kept = min(N, round(unique * n_queries))
            R = f"{N / kept:.1f}" if kept else "-"
            print(f"| {T:g} | {100 * right:.1f} | {unique:.2f} | {kept} | {R} |")

    @ranks.by_first
    def save_samples(self, t: int, queries: list[Query], pool, kept) -> None:
        """samples/iter_N.jsonl.gz: one object a sample, for anyone to read."""
        chosen = set(map(id, chain(*kept)))  # two samples of a query may be equal
        rows = []
        for q, group in zip(queries, pool):
            for s in group:
                # a program's gold are its tests, which can be megabytes
                row = {"query": q.id, "question": q.text, "gold": q.gold[:1000]}
                row |= {**dataclasses.asdict(s), "selected": id(s) in chosen}
                if s.reward == -math.inf:  # cut off; JSON has no infinity
                    row["reward"] = None
                rows.append(row)
        trainer.write_rows(self.out / "samples" / f"iter_{t}.jsonl.gz", rows)

    def end_iteration(self, row: dict, starts: list[Path | str]) -> None:
        """Takes up an iteration's metrics, and it is done; prints its line and the new alarms."""
        # K and S stand in each row, as a reader of the file needs them to know its keys
        row = {"iter": row["iter"], "eval_samples": self.cfg.eval_samples, "S": self.cfg.S, **row}
        before = [r for r in self.rows if r["iter"] < row["iter"]]
        self.rows = [*before, row]  # in every process
        self.write_iteration(row, before, starts)

    @ranks.by_first
    def write_iteration(self, row: dict, before: list[dict], starts: list[Path | str]) -> None:
        """`end_iteration`, after self.rows have the row."""
        best = max(self.rows, key=lambda r: r["val/pass@1"])["iter"]
        # The line says that the iteration is done. What a kill before it leaves is done again; what
        # it needs for that, the sampled parts, goes last.
        prune(self.out, starts, row["iter"], best)
        self.put("metrics.jsonl", row)
        remove_parts(self.out / "parts")
        print(log_line(row, self.cfg.last_iter, self.seconds(row["iter"])), flush=True)

        ledger = numbered_rows(self.out / "ledger.jsonl")
        earlier = [d for d in ledger if d["iter"] < row["iter"]]
        # each kind once, when it begins; the report has them all
        known = {line.split(":")[0] for line in report.alarms(before, earlier)}
        for line in report.alarms(self.rows, ledger):
            if line.split(":")[0] not in known:
                print(f"alarm | {line}", file=sys.stderr)

    def seconds(self, t: int) -> dict[str, float]:
        """Seconds of each phase of an iteration, over all starts of the run."""
        total: Counter[str] = Counter()
        for row in report.read_times(self.out):
            if row["iter"] == t:
                total[row["phase"]] += row["seconds"]
        return total

    @ranks.by_first
    def finish(self) -> None:
        """Prints the run's table and writes its report."""
        remove_parts(self.out / "parts")
        run = report.read_run(self.out)
        print(report.markdown(report.summary([run])))
        print(report.report([run], self.out), f"{self.out}/metrics.jsonl", f"{self.out}/policy")


def earlier_config(out: Path) -> dict:
    """config.json of an earlier start; settings that it does not know yet have their defaults.

    raises  UserError  where the folder is not a run's
    """
    config = report.read_config(out)
    if not config:
        raise UserError(
            f"--out {out}: it holds files, but no readable config.json of a run; "
            "choose another --out"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in ACTIONS}
    return {**defaults, **config}


def numbered_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file that say their iteration."""
    return report.with_numbers(data.read_jsonl(path), ["iter"])


def whole_rows(path: Path) -> list[dict]:
    """The rows of iterations 0, 1, 2, ... up to the first that is missing, which is said."""
    rows = {row["iter"]: row for row in numbered_rows(path)}
    # only a row without a gap before it counts: what comes behind one is trained on what is lost
    n = next(i for i in count() if i not in rows)
    if len(rows) > n:
        print(f"{path}: iteration {n} is missing or broken, and done again", file=sys.stderr)
    return [rows[i] for i in range(n)]


def remove_parts(folder: Path) -> None:
    """The sampled chunks of an iteration that is written; what else lies there stays."""
    for part in folder.glob("*.jsonl.gz"):
        part.unlink()
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def prune(out: Path, starts: list[Path | str], t: int, best: int) -> None:
    """Keeps the last two checkpoints and the best; policy and best are links to newest and best."""
    checkpoints = out / "checkpoints"
    # the one before, too: should the newest be damaged, one iteration is lost
    kept = {f"iter_{i}" for i in (t, t - 1, best)}
    for old in checkpoints.glob("iter_*"):
        # a user's own copy, such as iter_1_backup, stays
        if old.name not in kept and old.name[5:].isdecimal():
            shutil.rmtree(old)
    for name, i in (("policy", t), ("best", best)):
        target = checkpoints / f"iter_{i}"
        if not target.exists():
            target = Path(starts[min(i, len(starts) - 1)])  # sft's iterations are its epochs
        if target.exists():  # not where the start is a model on the hub
            link = out / f".{name}.tmp"
            link.unlink(missing_ok=True)
            # relative, so that it survives a move of the folder; replaced, so that it is never gone
            link.symlink_to(os.path.relpath(target, out))
            os.replace(link, out / name)


def log_line(row: dict, last_iter: int, seconds: dict[str, float]) -> str:
    """The one greppable line of an iteration."""
    K, S = row["eval_samples"], row["S"]
    parts = [f"iter {row['iter']}/{last_iter}"]
    if row.get("qe") is not None:
        parts.append(f"T {row['temperature']:g} tau {row['tau']:g} qe {row['qe']:.3f}")
        parts.append(f"kept {row['kept']}/{row['sampled']}")
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    keys = ("pass@1", f"pass@{K}", f"pass@{K}-{S}", f"reward@{K}-{S}")
    scores = [f"{key} {row[key]:.1f}" for key in keys if key in row]
    if row.get("coverage"):  # walks hold no equations
        scores.append(f"distinct {row['distinct']:.2f}")
    parts.append(" ".join(scores))
    if row.get("false_reasoning") is not None:
        parts.append(f"sound@{K} {row[f'sound@{K}']:.1f} false {row['false_reasoning']:.2f}")
    parts.append(" ".join(f"{phase} {s:.0f}s" for phase, s in seconds.items()))
    return " | ".join(parts)


# -- data, models, sampler ------------------------------------------------------------------------


@dataclasses.dataclass
class Setup:
    """What a run stands on, made from its Config alone."""

    splits: Splits
    base: str  # the base model's folder or hub name
    tokenizer: object
    prompt: Callable[[Query], list[int]]
    engine: Engine  # asleep
    end_ids: list[int]  # training ends a response with the first, sampling stops at any
    human: list[tuple[list[int], int]]  # the SFT set, as training examples


def set_up(cfg: Config, run: Run | None = None) -> Setup:
    """Data, base model, tokenizer, sampler and SFT set; what can fail for a user fails here."""
    settle(cfg)
    preflight(cfg)
    splits = LOADERS[cfg.task](cfg)
    base = cfg.model or toy_base(cfg)
    if run:
        run.lap(0, "base")
    tokenizer = trainer.load_tokenizer(base)
    has_template = tokenizer.chat_template is not None
    if cfg.chat == "on" and not has_template:
        raise UserError(f"--chat on: the tokenizer of --model {cfg.model} has no chat template")
    chat = cfg.chat != "off" and has_template
    prompt = functools.cache(lambda q: data.prompt_ids(tokenizer, q, splits, chat))
    drop_long_prompts(splits, prompt, cfg)
    end_ids = data.end_ids(tokenizer, chat)
    # before the trainer takes memory: vLLM looks at what is free
    engine = make_engine(cfg, tokenizer, prompt, base, end_ids)
    setup = Setup(splits, base, tokenizer, prompt, engine, end_ids, human=[])
    pairs = []
    for q in splits.human or splits.train:
        pairs += [(q, y) for y in (q.solution, *q.more_solutions) if y]
    setup.human = trainer.as_examples(pairs, setup, cfg, "human solutions")
    if run:
        run.lap(0, "setup")
    return setup


def settle(cfg: Config) -> None:
    """Turns transformers' own bars and warnings off; gives the toy two threads.

    The toy's matrices are too small for more; OMP_NUM_THREADS overrides it.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not cfg.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count()))


def drop_long_prompts(splits: Splits, prompt: Callable, cfg: Config) -> None:
    """Leaves out questions whose prompt alone fills --max-length; says how many."""
    for name, queries in {"train": splits.train, "val": splits.val, **splits.tests}.items():
        fit = [q for q in queries if len(prompt(q)) < cfg.max_length]
        if not fit:
            raise UserError(f"--max-length {cfg.max_length}: no prompt of the {name} set fits")
        if len(fit) < len(queries):
            lost = f"{len(queries) - len(fit)} of {len(queries)} prompts"
            reason = f"fill --max-length {cfg.max_length} and are left out"
            print(f"{name}: {lost} {reason}", file=sys.stderr)
            queries[:] = fit


def toy_base(cfg: Config) -> str:
    """The toy's base model, a tiny Llama that has read the toy's texts; made once and cached."""
    # a fork's task without a model starts from the stories' base
    base = toy.BASES.get(cfg.task, toy.story_base)(cfg)
    folder = CACHE / base.name
    with trainer.one_at_a_time(folder):
        if trainer.is_complete(folder):
            return str(folder)
        blank = folder.with_name(f".{folder.name}.blank")
        ranks.by_first(toy.make_tiny_llama)(blank, base.words, base.seed, layers=base.layers)
        tokenizer = trainer.load_tokenizer(blank)
        settings = dict(optim="adamw", batch_size=base.batch_size, clip=1.0, token_budget=4096)
        # fixed, as the cached base is named by neither batch size nor the other flags
        cfg = dataclasses.replace(cfg, **settings)
        policy = trainer.load_policy(cfg, blank)
        examples = []
        for q in base.texts:
            # the prompt as data.prompt_ids makes it, without a Splits at hand
            ids = tokenizer("<s> " + q.text, add_special_tokens=False)["input_ids"]
            examples.append(data.example(tokenizer, ids, q.solution, 1000))
        n = base.steps
        phase = Phase("toy base", base.seed, range(n), n, peak=base.lr, end=1e-4, warmup=0.02)
        trainer.train(policy, trainer.adamw(policy, base.lr), examples, phase, cfg)
        trainer.save(trainer.State(0, policy), folder, tokenizer)
        ranks.by_first(shutil.rmtree)(blank, ignore_errors=True)
    return str(folder)


# -- will it fit ----------------------------------------------------------------------------------


def preflight(cfg: Config) -> None:
    """Says what the run needs, and stops before a weight is read where it can't fit.

    raises  UserError  naming the flags that would make it fit; SystemExit after --preflight
    """
    if cfg.offload_optimizer and trainer.device() == "cpu":
        raise UserError(
            "--offload-optimizer: without a GPU the optimizer is in host memory all the time; "
            "leave the flag out"
        )
    if cfg.reward == "tests":  # fails closed, hours before the first program
        tests = {"inputs": [""], "outputs": [""], "unsafe": cfg.unsafe_code}
        sandbox.passes("", json.dumps(tests))
    shape = trainer.model_config(cfg.model) if cfg.model else None
    n = trainer.n_parameters(cfg.model, shape)
    if n is None:
        if cfg.preflight:
            raise UserError(
                "--preflight: it needs a --model whose config.json can be read, or whose name says "
                "its size; a toy's takes 1 GiB"
            )
        return

    check_fit(cfg, n, shape)
    if cfg.preflight:
        sys.exit(0)


ADVICE = {
    "state": "take a larger GPU, a smaller --model, or --optim adamw8bit",
    "training": "lower --token-budget, or take --gradient-checkpointing",
    "sampling": "lower --sample-budget, or take --offload-optimizer",
    "host": "take a larger machine, --optim adamw8bit, or leave --offload-optimizer out",
    "disk": "free some, or take another --out",
}


def check_fit(cfg: Config, n: int, shape) -> None:
    """Prints what the run needs, in one line; raises UserError where this machine has less."""
    import torch

    gpu = torch.cuda.is_available()
    memory = host_memory()
    if gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    needed = trainer.needs(cfg, n, shape, gpu)
    keys = ("weights", "gradients", "optimizer", "activations", "context")
    parts = ", ".join(f"{key} {gib(needed[key])}" for key in keys if needed[key])
    peak = peaks(cfg, n, needed, gpu)
    limits = dict.fromkeys(peak, memory) | dict(host=host_memory(), disk=disk_left(Path(cfg.out)))
    line = [f"preflight | {n / 1e9:.3g}B parameters: {parts}"]
    line += [f"{what} {gib(x)} of {gib(limits[what])}" for what, x in peak.items()]
    has_loop = type(cfg) is Config and METHODS[cfg.method].iterate  # train_prm.py's has none
    if cfg.preflight and cfg.task in SIZES and has_loop:
        line.append(hours(cfg, n))
    print(" | ".join(line), flush=True)

    for what, x in peak.items():
        if x > limits[what]:
            short = f"{what} needs {gib(x)} of {gib(limits[what])}"
            raise UserError(f"--model {cfg.model}: {short}; {ADVICE[what]}")
    # whoever names the slow engine knows that it will take long
    if not gpu and n > 2e9 and cfg.engine != "hf":
        raise UserError(
            f"--model {cfg.model}: {n / 1e9:.2g}B parameters and no GPU, so a run takes weeks; "
            "take a smaller --model, or --engine hf all the same"
        )
    # it raises where vLLM has no room, before anything is read
    if gpu and cfg.engine != "hf":
        gpu_share(cfg, cfg.model)


def peaks(cfg: Config, n: int, needed: dict[str, int], gpu: bool) -> dict[str, int]:
    """Bytes that a run holds, beside those of trainer.needs: a key for each of ADVICE's.

    state  weights, gradients and moments; host  where training and sampling are on a GPU
    """
    state = needed["weights"] + needed["gradients"] + needed["optimizer"]
    training = state + needed["activations"] + needed["context"]
    sampling = trainer.beside(cfg, needed)
    if not gpu or cfg.engine == "hf":  # vLLM's cache takes what is left
        sampling += needed["KV cache"]
    peak = dict(state=state, training=training, sampling=sampling)
    if gpu:
        # the weights on their way from or to a file; 8 GiB of code, pool and text
        peak["host"] = needed["weights"] + (8 << 30)
        if cfg.offload_optimizer:
            peak["host"] += needed["optimizer"]
        if cfg.reward == "answer+prm":  # the PRM waits there
            peak["host"] += 2 * n
    # a run that goes on has written some of it, and an SFT may be cached
    checkpoints = bytes_in(Path(cfg.out) / "checkpoints")
    sfts = sum(map(bytes_in, CACHE.glob(f"sft-{cfg.task}-*")))
    disk = max(0, needed["disk"] - checkpoints) + max(0, needed["cache"] - sfts)
    return peak | dict(disk=disk)


def host_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disk_left(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def gib(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.3g} GiB"


# training questions, test questions of the tasks, for an estimate before they are read
SIZES = {"gsm8k": (7000, 1319), "math": (11500, 1819), "arc": (1200, 1172), "code": (5000, 5900)}


def hours(cfg: Config, n: int) -> str:
    """Hours of an iteration on one H200: estimates; the truth may be 1.5 times as long.

    balance, pool, evaluation   responses * max_tokens / 3 tokens at --tokens-per-second
    scoring by a PRM            2 n FLOP a token, training 8 n (recomputed), at 400 TFLOP/s
    a row of both               0.4 max_length tokens
    """
    n_train, n_test = SIZES[cfg.task]
    M = cfg.queries_per_iter or n_train
    subset, n_T = min(cfg.balance_queries, M), len(cfg.temperature_grid)
    if n_T * len(cfg.tau_grid) == 1:
        subset = 0  # nothing to balance
    balanced, sampled = n_T * subset * cfg.K, (M - subset) * cfg.K
    n_test = min(cfg.eval_queries or n_test, n_test)
    evaluated = cfg.val_queries + n_test * (1 + cfg.eval_samples)
    scored = 0
    if cfg.reward == "answer+prm":
        scored = balanced + sampled + evaluated

    rate = cfg.tokens_per_second or 1e14 / n
    response = cfg.max_tokens / 3 / rate / 3600  # hours
    flop = 0.4 * cfg.max_length * n / 400e12 / 3600  # hours of one FLOP a parameter and token
    estimate = {
        "balance": balanced * response,
        "pool": sampled * response,
        "scoring": scored * 2 * flop,
        "training": cfg.samples_per_iter * 8 * flop,
        "evaluation": evaluated * response,
    }
    parts = ", ".join(f"{phase} {h:.1f}" for phase, h in estimate.items() if h)
    total = sum(estimate.values())
    run = f"{total * cfg.num_iters:.0f} for {cfg.num_iters}"
    return f"hours on one H200, estimated: {total:.1f} an iteration ({parts}), {run}"
