"""What a run stands on: its folder, and its data, models and sampler."""
from __future__ import annotations

import dataclasses
import fcntl
import functools
import gzip
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import data
import metrics
import report as report_
import rewards
import toy
from config import LOADERS, MEMORY, METHODS, Config
from data import Query, Sample, Splits, UserError
from engine import make_engine
from trainer import (adamw, beside, cosine, device, encode, is_complete, load_policy, load_tokenizer, n_parameters, needs, one_at_a_time, prune, save_checkpoint,
                     train, write)


def put_line(path: Path, row: dict) -> None:
    """Sets the line of row["iter"] in a JSON-lines file and drops later ones (they would come from before a step back)."""
    rows = [r for r in metrics.read_jsonl(path) if r["iter"] < row["iter"]] + [row]
    write(path, "".join(json.dumps(r) + "\n" for r in rows).encode())


def open_run(cfg: Config) -> Path:
    """Makes or re-opens runs/NAME: one process at a time, always with the same config; only what memory is used (MEMORY) may change on the way.

    raises UserError  if another process holds it, or its config.json differs (naming the keys)
    """
    cfg.out = cfg.out or f"runs/{cfg.task}-{cfg.method}-{cfg.reward}-{cfg.seed}"
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another process is writing to it") from None
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None
    open_run.locks = [*getattr(open_run, "locks", []), lock]        # held until the process ends
    mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "preflight")}
    theirs = None
    if (out / "config.json").exists() and any(f.name not in ("lock", "config.json") for f in out.iterdir()):       # a start that failed holds nothing
        try:
            theirs = json.loads((out / "config.json").read_text())
        except ValueError:
            raise UserError(f"--out {out}: its config.json is broken; choose another --out") from None
        differing = sorted(k for k in (mine.keys() | theirs.keys()) - MEMORY if mine.get(k) != theirs.get(k))
        if differing:
            said = ", ".join(f"{k} {theirs.get(k)!r} -> {mine.get(k)!r}" for k in differing)
            raise UserError(f"--out {out} holds a run with another config ({said}); choose another --out")
    if mine != theirs:
        write(out / "config.json", (json.dumps(mine, indent=2) + "\n").encode())
    return out


@contextmanager
def clock(out: Path, t: int, phase: str) -> Iterator[None]:
    """Appends the seconds of a phase to times.jsonl (apart from metrics.jsonl, which is the same bits every time)."""
    start = time.perf_counter()
    yield
    with open(out / "times.jsonl", "a", encoding="utf-8") as f:
        f.write("\n" + json.dumps({"iter": t, "phase": phase, "seconds": round(time.perf_counter() - start, 3)}) + "\n")   # after a torn line, too


def settle(cfg: Config) -> None:
    """transformers' own bars and warnings off, ours say what a user needs; and the toy, too small for more, on two threads unless told otherwise."""
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not cfg.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count()))


def fits(cfg: Config) -> None:
    """The preflight: says what the run needs and stops, before a weight is read, where programs can't be run safely or it can't fit.

    raises UserError  naming the flags that would make it fit; SystemExit after --preflight
    """
    if cfg.offload_optimizer and device() == "cpu":
        raise UserError("--offload-optimizer: without a GPU the optimizer is in host memory all the time; leave the flag out")
    if cfg.reward == "tests":                      # fails closed, hours before the first program
        rewards.run_unit_tests("", {"inputs": [""], "outputs": [""]}, unsafe=cfg.unsafe_code)
    n = n_parameters(cfg.model) if cfg.model else None
    if n is None:
        if cfg.preflight:
            raise UserError(f"--preflight: {f'the size of --model {cfg.model} is not known without its config.json' if cfg.model else 'the toy needs 1 GiB'}; give a --model")
        return
    import torch
    import transformers
    gpu = torch.cuda.is_available()
    have = torch.cuda.get_device_properties(0).total_memory if gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = needs(cfg, n, transformers.AutoConfig.from_pretrained(cfg.model) if Path(cfg.model).is_dir() else None, gpu)
    state, hf = need["weights"] + need["gradients"] + need["optimizer"], cfg.engine == "hf" or not gpu
    train, draw = state + need["activations"], beside(cfg, need) + need["KV cache"] * hf
    where = next(p for p in [Path(cfg.out).resolve(), *Path(cfg.out).resolve().parents] if p.exists())
    there = sum(f.stat().st_size for root in (Path(cfg.out) / "checkpoints", Path("runs/cache")) for f in root.rglob("*") if f.is_file())
    free, gib = shutil.disk_usage(where).free, lambda x: f"{x / 2**30:.3g} GiB"
    print(f"preflight | {n / 1e9:.3g}B parameters | training {gib(train)}: " + ", ".join(f"{k} {gib(need[k])}" for k in ("weights", "gradients", "optimizer", "activations") if need[k])
          + f" | sampling {gib(draw)}" + (f": KV cache {gib(need['KV cache'])}" * bool(need["KV cache"]) if hf else " and vLLM in what is left")
          + f" | this machine has {gib(have)}{' on its GPU' if gpu else ''} | host {gib(need['weights'] + need['optimizer'] if gpu else max(train, draw))} | disk {gib(need['disk'])}, free {gib(free)}", flush=True)
    if state > have or not gpu and n > 2e9 and cfg.engine != "hf":
        raise UserError(f"--model {cfg.model}: training {n / 1e9:.2g}B parameters needs {state / 2**30:.0f} GiB (weights, gradients, --optim {cfg.optim}); this "
                        f"machine has {have / 2**30:.0f} GiB{' on its GPU' if gpu else ' and no GPU'}: take a larger GPU, "
                        f"{'--optim adamw8bit, ' * (cfg.optim == 'adamw')}or a smaller --model (up to {have * n / state / 1e9:.1g}B){'' if gpu else ' with --engine hf'}")
    for what, total, flags in (("training", train, f"--token-budget {cfg.token_budget}" + ("" if cfg.gradient_checkpointing else ", or take --gradient-checkpointing")),
                               ("sampling", draw, f"--sample-budget {cfg.sample_budget}" + ", or take --offload-optimizer" * (gpu and beside(cfg, need) > need["weights"]))):
        if total > have:
            raise UserError(f"--model {cfg.model}: {what} needs {gib(total)} of {gib(have)}; lower {flags}")
    if need["disk"] - there > free:
        raise UserError(f"--out {cfg.out}: its checkpoints need {gib(need['disk'] - there)} more on the disk, {gib(free)} are free; take another --out, or free some")
    if cfg.preflight:
        sys.exit(0)


def use_chat(cfg: Config, tokenizer) -> bool:
    """--chat auto: through the chat template where the tokenizer has one; raises UserError if it is asked for and missing."""
    if cfg.chat == "on" and tokenizer.chat_template is None:
        raise UserError(f"--chat on: the tokenizer of --model {cfg.model} has no chat template")
    return cfg.chat != "off" and tokenizer.chat_template is not None


def drop_long_prompts(splits: Splits, prompt: Callable[[Query], list[int]], cfg: Config) -> None:
    """Leaves out questions whose prompt alone fills --max-length; says how many on stderr."""
    for name, queries in {"train": splits.train, "val": splits.val, **splits.tests}.items():
        fit = [q for q in queries if len(prompt(q)) < cfg.max_length]
        if len(fit) < len(queries):
            print(f"{name}: {len(queries) - len(fit)} of {len(queries)} prompts fill --max-length {cfg.max_length} and are left out", file=sys.stderr)
            queries[:] = fit
        if not fit:
            raise UserError(f"--max-length {cfg.max_length}: no prompt of the {name} set fits")


def base_model(cfg: Config) -> str:
    """The base model: --model, or the toy's, the same for all seeds: a tiny Llama that has read `toy.toy_text` once, made on the spot and cached."""
    if cfg.model:
        return cfg.model
    folder = Path("runs/cache") / f"toy-base-{cfg.toy_max_ops}-{cfg.toy_texts}"
    with one_at_a_time(folder):
        if not is_complete(folder):
            toy.make_toy_model(tmp := folder.with_name(f".{folder.name}.tmp"), 0)
            tokenizer, cfg = load_tokenizer(tmp), dataclasses.replace(cfg, out="", optim="adamw", batch_size=32, clip=1.0, token_budget=4096)
            policy, texts = load_policy(cfg, tmp), toy.toy_text(cfg.toy_max_ops, cfg.toy_texts)
            examples = [data.example(tokenizer, tokenizer("<s> " + q.text, add_special_tokens=False)["input_ids"], q.solution, 1000) for q in texts]
            n = math.ceil(len(texts) / cfg.batch_size)
            train(policy, adamw(policy, 5e-3), examples, range(n), lambda s: cosine(s, n, 5e-3, 1e-4, 0.02), cfg, 0, "toy base")
            save_checkpoint(folder, policy, tokenizer, None, {})
    return str(folder)


class Setup(NamedTuple):
    """What a run stands on, made from its Config alone."""
    splits: Splits
    base: str                              # the base model's folder or hub name
    tokenizer: object
    prompt: Callable[[Query], list[int]]
    engine: object                         # asleep
    human: list[tuple[list[int], int]]     # the SFT set, as training examples


def set_up(cfg: Config) -> Setup:
    """Data, tokenizer, the sampling engine and the SFT set; everything that can be told wrong before training is told here, by UserError."""
    settle(cfg)
    fits(cfg)
    splits, base = LOADERS[cfg.task](cfg), base_model(cfg)
    tokenizer = load_tokenizer(base)
    chat = use_chat(cfg, tokenizer)
    prompt = functools.cache(lambda q: data.prompt_ids(tokenizer, q, splits, chat))
    drop_long_prompts(splits, prompt, cfg)
    engine = make_engine(cfg, tokenizer, base)
    human = [(q, y) for q in splits.train for y in (q.solution, *q.more_solutions) if y]
    return Setup(splits, base, tokenizer, prompt, engine, encode(human, prompt, tokenizer, cfg, "human solutions"))


def save_samples(path: Path, queries: list[Query], pool: list[list[Sample]], kept: list[list[Sample]]) -> None:
    """samples/iter_N.jsonl.gz: one object a sample, for anyone to read."""
    chosen = {id(s) for g in kept for s in g}
    lines = (json.dumps({"query": q.id, **dataclasses.asdict(s), "reward": s.reward if s.reward > -math.inf else None, "selected": id(s) in chosen})
             for q, g in zip(queries, pool) for s in g)
    write(path, gzip.compress("\n".join(lines).encode(), 5, mtime=0))


def log_line(row: dict, num_iters: int, seconds: dict[str, float]) -> str:
    """The one greppable line of an iteration."""
    K, S = row["eval_samples"], row["S"]
    parts = [f"iter {row['iter']}/{num_iters}"]
    if row.get("qe") is not None:
        parts += [f"T {row['temperature']:g} tau {row['tau']:g} qe {row['qe']:.3f}", f"kept {row['kept']}/{row['sampled']}"]
    if row.get("loss") is not None:
        parts += [f"loss {row['loss']:.4f}"]
    parts += [" ".join(f"{k} {row[k]:.1f}" for k in ("pass@1", f"pass@{K}", f"pass@{K}-{S}", f"reward@{K}-{S}") if k in row)]
    if "distinct" in row:
        parts[-1] += f" distinct {row['distinct']:.2f}"
    if row.get("false_reasoning") is not None:
        parts += [f"sound@{K} {row[f'sound@{K}']:.1f} false {row['false_reasoning']:.2f}"]
    return " | ".join([*parts, " ".join(f"{k} {v:.0f}s" for k, v in seconds.items())])


def end_iteration(out: Path, row: dict, starts: Sequence[Path | str], cfg: Config) -> None:
    """Writes an iteration's metrics (from here on it is done), prints its line, and clears what only a restart would have needed."""
    row = {"iter": row["iter"], "eval_samples": cfg.eval_samples, "S": cfg.S, **row}
    rows = [r for r in metrics.read_jsonl(out / "metrics.jsonl") if r["iter"] < row["iter"]] + [row]
    prune(out, starts, row["iter"], max(rows, key=lambda r: r["val/pass@1"])["iter"])
    put_line(out / "metrics.jsonl", row)
    shutil.rmtree(out / "parts", ignore_errors=True)
    [old.unlink() for old in out.glob("paused-*")]     # a stale one: another process finished the phase
    seconds: dict[str, float] = {}
    for r in metrics.read_jsonl(out / "times.jsonl"):
        if r["iter"] == row["iter"]:
            seconds[r["phase"]] = seconds.get(r["phase"], 0) + r["seconds"]
    print(log_line(row, total_iters(cfg), seconds), flush=True)
    ledger = [d for d in metrics.read_jsonl(out / "ledger.jsonl") if d["iter"] <= row["iter"]]
    told = {line.split(":")[0] for line in report_.alarms(rows[:-1], [d for d in ledger if d["iter"] < row["iter"]])}
    for line in report_.alarms(rows, ledger):
        if line.split(":")[0] not in told:             # once, when it begins; the report has them as they stand at the end
            print(f"alarm | {line}", file=sys.stderr)


def total_iters(cfg: Config) -> int:
    """The last iteration's number: for `sft`, whose iterations are its later epochs, what is left after the start."""
    return cfg.num_iters if METHODS[cfg.method].iterate else cfg.sft_epochs // max(1, cfg.start_epoch) - 1
