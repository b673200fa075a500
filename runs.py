"""What a run stands on: its folder, and its data, models and sampler.

Config -> Run (runs/NAME: config, metrics, ledger, samples, checkpoints)
Config -> Setup (splits, base model, tokenizer, sampler, the SFT set)
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
from filelock import FileLock, Timeout

import data
import metrics
import ranks
import report
import sandbox
import toy
from config import LOADERS, MEMORY, METHODS, Config
from data import Query, Splits, UserError
from engine import Engine, gpu_share, make_engine
from trainer import (
    CACHE,
    Phase,
    State,
    adamw,
    beside,
    device,
    encode,
    is_complete,
    load_policy,
    load_tokenizer,
    model_config,
    n_parameters,
    needs,
    one_at_a_time,
    save,
    train,
    write,
)

ACTIONS = ("out", "probe", "preflight")  # not settings of the run

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
        self.rows = whole_rows(self.out / "metrics.jsonl")
        self.clock = time.perf_counter()

    @ranks.by_first
    def open(self) -> None:
        """Locks the folder, checks its config, and clears what a killed process left."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.out / "lock", is_singleton=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out {self.out}: another process is writing to it") from None
        except OSError as e:
            raise UserError(f"--out {self.out}: {e.strerror}") from None
        self.check_config()
        for leftover in self.out.rglob(".*.tmp"):
            remove(leftover)

    def check_config(self) -> None:
        """Writes config.json, or compares it with the one that is there."""
        path = self.out / "config.json"
        mine = dataclasses.asdict(self.cfg)
        for name in ACTIONS:
            del mine[name]
        theirs = None
        if {f.name for f in self.out.iterdir()} - {"lock", "config.json"}:
            theirs = read_config(path)
            keys = sorted((mine.keys() | theirs.keys()) - MEMORY)
            self.check_changes({k: (theirs.get(k), mine.get(k)) for k in keys})
        if mine != theirs:
            write(path, (json.dumps(mine, indent=2) + "\n").encode())

    def check_changes(self, values: dict[str, tuple]) -> None:
        """Raises UserError where a setting (theirs, mine) differs, but for more iterations."""
        changed = {k: v for k, v in values.items() if v[0] != v[1]}
        theirs, mine = changed.get("num_iters", (0, 0))
        if not changed or (list(changed) == ["num_iters"] and self.extends(theirs, mine)):
            return
        changes = ", ".join(f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items())
        why = ""
        if list(changed) == ["num_iters"]:
            why = f"; --method {self.cfg.method} has one learning-rate schedule over all iterations"
        raise UserError(
            f"--out {self.out} holds a run with another config ({changes}){why}; "
            "choose another --out"
        )

    def extends(self, theirs: int, mine: int) -> bool:
        """True if a run may go on to more iterations: each has a schedule of its own."""
        method = METHODS[self.cfg.method]
        return mine > theirs and method.iterate and not method.inherit

    @property
    def finished(self) -> bool:
        """True if the last iteration's metrics are written."""
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
        rows = [r for r in numbered_rows(self.out / name) if r["iter"] < row["iter"]]
        lines = [json.dumps(r) + "\n" for r in [*rows, row]]
        write(self.out / name, "".join(lines).encode())

    @ranks.by_first
    def save_decision(self, t: int, decision: dict, reward, correct, text) -> None:
        """The ledger's line of an iteration, and the samples it was decided on, for replay."""
        path = self.out / "samples" / f"balance_{t}.npz"
        arrays = io.BytesIO()
        np.savez_compressed(arrays, reward=reward, correct=correct, text=text)
        write(path, arrays.getvalue())
        self.put("ledger.jsonl", {"iter": t, **decision})
        if decision["blind"]:
            print(
                f"balance {t}: no right answer among the subset's samples; "
                f"T {decision['temperature']:g} and tau {decision['tau']:g} are the default",
                file=sys.stderr,
            )

    @ranks.by_first
    def print_probe(self, M: int) -> None:
        """Prints what the next iteration would find at each temperature   [--probe]

        R = N / (responses kept) says how often training would read each selected response.
        """
        [decision] = numbered_rows(self.out / "ledger.jsonl")[-1:]
        N = self.cfg.samples_per_iter
        print(f"N = {N} places, {M} questions, {self.cfg.K} samples each")
        print(
            "| T | right, % | unique right a question | kept | R |",
            "|---|---|---|---|---|",
            sep="\n",
        )
        for T, right, unique in zip(*(decision[k] for k in ("temperatures", "yield", "unique"))):
            kept = min(N, round(unique * M))
            R = f"{N / kept:.1f}" if kept else "-"
            print(f"| {T:g} | {100 * right:.1f} | {unique:.2f} | {kept} | {R} |")

    @ranks.by_first
    def save_samples(self, t: int, queries: list[Query], pool, kept) -> None:
        """samples/iter_N.jsonl.gz: one object a sample, for anyone to read."""
        chosen = {id(s) for group in kept for s in group}
        lines = []
        for q, group in zip(queries, pool):
            for s in group:
                row = {"query": q.id, "question": q.text, "gold": q.gold[:1000]}
                row |= {**dataclasses.asdict(s), "selected": id(s) in chosen}
                if s.reward == -math.inf:  # cut off; JSON has no infinity
                    row["reward"] = None
                lines.append(json.dumps(row))
        content = gzip.compress("\n".join(lines).encode(), 5, mtime=0)
        write(self.out / "samples" / f"iter_{t}.jsonl.gz", content)

    @ranks.by_first
    def end_iteration(self, row: dict, starts: list[Path | str]) -> None:
        """Writes an iteration's metrics, and it is done; prints its line and the new alarms."""
        row = {"iter": row["iter"], "eval_samples": self.cfg.eval_samples, "S": self.cfg.S, **row}
        before = [r for r in self.rows if r["iter"] < row["iter"]]
        self.rows = [*before, row]
        best = max(self.rows, key=lambda r: r["val/pass@1"])["iter"]
        prune(self.out, starts, row["iter"], best)
        self.put("metrics.jsonl", row)
        remove_parts(self.out / "parts")
        print(log_line(row, self.cfg.last_iter, self.seconds(row["iter"])), flush=True)

        ledger = numbered_rows(self.out / "ledger.jsonl")
        earlier = [d for d in ledger if d["iter"] < row["iter"]]
        known = {line.split(":")[0] for line in report.alarms(before, earlier)}
        for line in report.alarms(self.rows, ledger):
            if line.split(":")[0] not in known:  # once, when it begins; the report has them all
                print(f"alarm | {line}", file=sys.stderr)

    def seconds(self, t: int) -> dict[str, float]:
        """Seconds of each phase of an iteration, over all starts of the run."""
        total: dict[str, float] = {}
        for row in numbered_rows(self.out / "times.jsonl"):
            if row["iter"] == t:
                total[row["phase"]] = total.get(row["phase"], 0) + row["seconds"]
        return total

    @ranks.by_first
    def finish(self) -> None:
        """Prints the run's table and writes its report."""
        remove_parts(self.out / "parts")
        run = report.read_run(self.out)
        print(report.markdown(report.summary([run])))
        print(report.report([run], self.out), f"{self.out}/metrics.jsonl", f"{self.out}/policy")


def read_config(path: Path) -> dict:
    """config.json of an earlier start; settings that it does not know yet have their defaults.

    raises  UserError  where the folder is not empty and not a run's
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not {"task", "method", "num_iters"} <= config.keys():
        raise UserError(
            f"--out {path.parent}: it holds files, but no readable config.json of a run; "
            "choose another --out"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in ACTIONS}
    return {**defaults, **config}


def numbered_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file that say their iteration."""
    rows = metrics.read_jsonl(path)
    return [row for row in rows if isinstance(row.get("iter"), int)]


def whole_rows(path: Path) -> list[dict]:
    """The rows of iterations 0, 1, 2, ... up to the first that is missing, which is said."""
    rows = {row["iter"]: row for row in numbered_rows(path)}
    n = 0
    while n in rows:
        n += 1
    if len(rows) > n:
        print(f"{path}: iteration {n} is missing or broken, and done again", file=sys.stderr)
    return [rows[i] for i in range(n)]


def remove(path: Path) -> None:
    """A file or a folder of our own."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """The sampled chunks of an iteration that is written; what else lies there stays."""
    for part in folder.glob("*.jsonl.gz"):
        part.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def prune(out: Path, starts: list[Path | str], t: int, best: int) -> None:
    """Keeps the last two checkpoints and the best; policy and best are links to newest and best."""
    checkpoints = out / "checkpoints"
    kept = {f"iter_{i}" for i in (t, t - 1, best)}
    for old in checkpoints.glob("iter_*"):
        if old.name not in kept and old.name[5:].isdecimal():
            shutil.rmtree(old)
    for name, i in (("policy", t), ("best", best)):
        target = checkpoints / f"iter_{i}"
        if not target.exists():
            target = Path(starts[min(i, len(starts) - 1)])  # sft's iterations are its epochs
        if target.exists():  # not where the start is a model on the hub
            link = out / f".{name}.tmp"
            link.unlink(missing_ok=True)
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
    tokenizer = load_tokenizer(base)
    chat = use_chat(cfg, tokenizer)
    prompt = functools.cache(lambda q: data.prompt_ids(tokenizer, q, splits, chat))
    drop_long_prompts(splits, prompt, cfg)
    end_ids = data.end_ids(tokenizer, chat)
    engine = make_engine(cfg, tokenizer, prompt, base, end_ids)  # before the trainer takes memory
    setup = Setup(splits, base, tokenizer, prompt, engine, end_ids, human=[])
    pairs = []
    for q in splits.human or splits.train:
        pairs += [(q, y) for y in (q.solution, *q.more_solutions) if y]
    setup.human = encode(pairs, setup, cfg, "human solutions")
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


def use_chat(cfg: Config, tokenizer) -> bool:
    """--chat auto: through the chat template where the tokenizer has one."""
    if cfg.chat == "on" and tokenizer.chat_template is None:
        raise UserError(f"--chat on: the tokenizer of --model {cfg.model} has no chat template")
    return cfg.chat != "off" and tokenizer.chat_template is not None


def drop_long_prompts(splits: Splits, prompt: Callable, cfg: Config) -> None:
    """Leaves out questions whose prompt alone fills --max-length; says how many."""
    for name, queries in {"train": splits.train, "val": splits.val, **splits.tests}.items():
        fit = [q for q in queries if len(prompt(q)) < cfg.max_length]
        if not fit:
            raise UserError(f"--max-length {cfg.max_length}: no prompt of the {name} set fits")
        if len(fit) < len(queries):
            print(
                f"{name}: {len(queries) - len(fit)} of {len(queries)} prompts fill "
                f"--max-length {cfg.max_length} and are left out",
                file=sys.stderr,
            )
            queries[:] = fit


def toy_base(cfg: Config) -> str:
    """The toy's base model, a tiny Llama that has read the toy's texts; made once and cached."""
    base = toy.BASES.get(cfg.task, toy.story_base)(cfg)
    folder = CACHE / base.name
    with one_at_a_time(folder):
        if is_complete(folder):
            return str(folder)
        blank = folder.with_name(f".{folder.name}.blank")
        ranks.by_first(toy.make_tiny_llama)(blank, base.words, base.seed, layers=base.layers)
        tokenizer = load_tokenizer(blank)
        settings = dict(optim="adamw", batch_size=base.batch_size, clip=1.0, token_budget=4096)
        cfg = dataclasses.replace(cfg, **settings)
        policy = load_policy(cfg, blank)
        examples = []
        for q in base.texts:
            ids = tokenizer("<s> " + q.text, add_special_tokens=False)["input_ids"]
            examples.append(data.example(tokenizer, ids, q.solution, 1000))
        n = base.steps
        phase = Phase("toy base", base.seed, range(n), n, peak=base.lr, end=1e-4, warmup=0.02)
        train(policy, adamw(policy, base.lr), examples, phase, cfg)
        save(State(0, policy), folder, tokenizer)
        remove(blank)
    return str(folder)


# -- will it fit ----------------------------------------------------------------------------------


def preflight(cfg: Config) -> None:
    """Says what the run needs, and stops before a weight is read where it can't fit.

    raises  UserError  naming the flags that would make it fit; SystemExit after --preflight
    """
    if cfg.offload_optimizer and device() == "cpu":
        raise UserError(
            "--offload-optimizer: without a GPU the optimizer is in host memory all the time; "
            "leave the flag out"
        )
    if cfg.reward == "tests":  # fails closed, hours before the first program
        tests = {"inputs": [""], "outputs": [""], "unsafe": cfg.unsafe_code}
        sandbox.passes("", json.dumps(tests))
    shape = model_config(cfg.model) if cfg.model else None
    n = n_parameters(cfg.model, shape)
    if n is None:
        if cfg.preflight:
            reason = "the toy needs 1 GiB"
            if cfg.model:
                reason = f"the size of --model {cfg.model} is not known without its config.json"
            raise UserError(f"--preflight: {reason}; give a --model")
        return

    import torch

    gpu = torch.cuda.is_available()
    have = host_memory()
    if gpu:
        have = torch.cuda.get_device_properties(0).total_memory
    budget = Budget(cfg, n, needs(cfg, n, shape, gpu), have, gpu)
    line = budget.line()
    if cfg.preflight and cfg.task in SIZES and METHODS[cfg.method].iterate:
        line += f" | {hours_line(cfg, hours(cfg, n))}"
    print(line, flush=True)
    budget.check()
    if gpu and cfg.engine != "hf":
        gpu_share(cfg, cfg.model)
    if cfg.preflight:
        sys.exit(0)


def host_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# training questions, test questions of the tasks, for an estimate before they are read
SIZES = {"gsm8k": (7000, 1319), "math": (11500, 1819), "arc": (1200, 1172), "code": (5000, 5900)}


def hours(cfg: Config, n: int) -> dict[str, float]:
    """Hours of an iteration on one H200: estimates; the truth may be 1.5 times as long.

    balance, pool, evaluation   responses * max_tokens / 3 tokens at 1e14 / n a second
    scoring by a PRM            2 n FLOP a token, training 8 n (recomputed), at 400 TFLOP/s
    a row of both               0.4 max_length tokens
    """
    n_train, n_test = SIZES[cfg.task]
    M = cfg.queries_per_iter or n_train
    balanced, sampled = 0, M * cfg.K
    if len(cfg.temperature_grid) * len(cfg.tau_grid) > 1:
        subset = min(cfg.balance_queries, M)
        balanced = len(cfg.temperature_grid) * subset * cfg.K
        sampled = (M - subset) * cfg.K
    n_test = min(cfg.eval_queries or n_test, n_test)
    evaluated = cfg.val_queries + n_test * (1 + cfg.eval_samples)

    response = cfg.max_tokens / 3 * n / 1e14 / 3600  # hours
    flop = 0.4 * cfg.max_length * n / 400e12 / 3600  # hours of one FLOP a parameter and token
    estimate = {"balance": balanced * response, "pool": sampled * response}
    if cfg.reward == "answer+prm":
        estimate["scoring"] = (balanced + sampled + evaluated) * 2 * flop
    estimate["training"] = cfg.samples_per_iter * 8 * flop
    estimate["evaluation"] = evaluated * response
    return estimate


def hours_line(cfg: Config, estimate: dict[str, float]) -> str:
    """The hours of an iteration and of the run, as far as they can be known."""
    parts = [f"{phase} {h:.1f}" for phase, h in estimate.items() if h]
    an_iteration = sum(estimate.values())
    return (
        f"hours on one H200, estimated: {an_iteration:.1f} an iteration "
        f"({', '.join(parts)}), {an_iteration * cfg.num_iters:.0f} for {cfg.num_iters}"
    )


def gib(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.3g} GiB"


class Budget:
    """What a run needs of this machine, in bytes, and whether that is there."""

    def __init__(self, cfg: Config, n: int, needed: dict[str, int], have: int, gpu: bool):
        self.cfg, self.n, self.needed, self.have, self.gpu = cfg, n, needed, have, gpu
        self.state = needed["weights"] + needed["gradients"] + needed["optimizer"]
        self.training = self.state + needed["activations"] + needed["context"]
        self.sampling = beside(cfg, needed)
        if cfg.engine == "hf" or not gpu:
            self.sampling += needed["KV cache"]
        self.host = max(self.training, self.sampling)
        if gpu:  # the weights on their way from or to a file; 8 GiB of code, pool and text
            self.host = needed["weights"] + (8 << 30)
            if cfg.offload_optimizer:
                self.host += needed["optimizer"]
            if cfg.reward == "answer+prm":  # the PRM waits there
                self.host += 2 * n
        folder = Path(cfg.out).resolve()
        there = next(p for p in (folder, *folder.parents) if p.exists())
        self.disk_left = shutil.disk_usage(there).free

    def line(self) -> str:
        """All of it in one line."""
        needed = self.needed
        keys = ("weights", "gradients", "optimizer", "activations", "context")
        parts = ", ".join(f"{key} {gib(needed[key])}" for key in keys if needed[key])
        beside_it = " and vLLM in what is left"
        if self.cfg.engine == "hf" or not self.gpu:
            beside_it = f": KV cache {gib(needed['KV cache'])}" if needed["KV cache"] else ""
        return (
            f"preflight | {self.n / 1e9:.3g}B parameters | "
            f"training {gib(self.training)}: {parts} | "
            f"sampling {gib(self.sampling)}{beside_it} | "
            f"this machine has {gib(self.have)}{' on its GPU' if self.gpu else ''} | "
            f"host {gib(self.host)} | disk {gib(needed['disk'])}, free {gib(self.disk_left)}"
        )

    def check(self) -> None:
        """Raises UserError where memory or disk is too small, naming the flags that would help."""
        cfg = self.cfg
        self.check_state()
        if self.training > self.have:
            more = "" if cfg.gradient_checkpointing else ", or take --gradient-checkpointing"
            raise UserError(
                f"--model {cfg.model}: training needs {gib(self.training)} of {gib(self.have)}; "
                f"lower --token-budget {cfg.token_budget}{more}"
            )
        if self.sampling > self.have:
            offload = self.gpu and beside(cfg, self.needed) > self.needed["weights"]
            more = ", or take --offload-optimizer" if offload else ""
            raise UserError(
                f"--model {cfg.model}: sampling needs {gib(self.sampling)} of {gib(self.have)}; "
                f"lower --sample-budget {cfg.sample_budget}{more}"
            )
        if self.gpu and self.host > host_memory():
            raise UserError(
                f"--model {cfg.model}: the host's memory is {gib(host_memory())}, and "
                f"{gib(self.host)} are needed; take a larger machine, --optim adamw8bit, or leave "
                "--offload-optimizer out"
            )
        missing = self.needed["disk"] - bytes_in(Path(cfg.out) / "checkpoints") - bytes_in(CACHE)
        if missing > self.disk_left:
            raise UserError(
                f"--out {cfg.out}: its checkpoints need {gib(missing)} more on the disk, "
                f"{gib(self.disk_left)} are free; take another --out, or free some"
            )

    def check_state(self) -> None:
        """Weights, gradients and optimizer against the machine."""
        cfg, have = self.cfg, self.have
        too_slow = not self.gpu and self.n > 2e9 and cfg.engine != "hf"
        if self.state <= have and not too_slow:
            return
        where = " on its GPU" if self.gpu else " and no GPU"
        smaller_state = "--optim adamw8bit, " if cfg.optim == "adamw" else ""
        engine = "" if self.gpu else " with --engine hf"
        fits = have * self.n / self.state / 1e9
        raise UserError(
            f"--model {cfg.model}: training {self.n / 1e9:.2g}B parameters needs "
            f"{self.state / 2**30:.0f} GiB (weights, gradients, --optim {cfg.optim}); this machine "
            f"has {have / 2**30:.0f} GiB{where}: take a larger GPU, {smaller_state}"
            f"or a smaller --model (up to {fits:.1g}B){engine}"
        )


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
