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

import argparse
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

import data
import metrics
import rewards
from data import Query, Sample, Splits, UserError
from metrics import Parser, grid
from rewards import PRM


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every setting, once. default < preset of the task < flag

@dataclass
class Config:
    """All settings; `python bstar.py --help` prints this block. Sections are the paper's: M and N of Sec. 3.1, the rest of Sec. 4.1 and App. A."""
    task: str = "toy"                      # whose questions: a loader of data.py, a grader of rewards.py and a preset below
    method: str = "bstar"                  # sft | rest-em | iterative-rft | online-rft | bstar [App. B]
    reward: str = "answer"                 # answer ("w/o RM") | answer+prm ("w/ RM") | tests (code) | answer+oracle (the toy's exact step checker) [Sec. 2.3]
    model: str = ""                        # base model: hub name or folder; empty for the toy, whose base is made on the spot
    seed: int = 0                          # of everything but the toy's questions and base
    out: str = ""                          # run folder; default runs/TASK-METHOD-REWARD-SEED
    prm: str = ""                          # process reward model, hub name or folder; empty = train_prm.py's for this task, trained if there is none
    prm_format: str = "own"                # own (two-label token classification, as TRL's) | shepherd | qwen (Math-Shepherd's and Qwen2.5-Math-PRM's)
    engine: str = "auto"                   # auto | vllm | hf: who samples; auto = vllm with a GPU, else transformers
    # data
    train_file: str = ""                   # local .jsonl, .jsonl.gz or .parquet (several with commas) instead of the hub's rows
    test_file: str = ""                    # the same for the test sets, one a file
    chat: str = "auto"                     # auto | on | off: prompts through the tokenizer's chat template; auto = where there is one
    val_queries: int = 500                 # held out to choose checkpoints on [App. A]
    unsafe_code: bool = False              # run model-written programs even where Landlock or seccomp is missing (--task code)
    toy_max_ops: int = 5                   # operations in the toy's longest stories
    toy_texts: int = 32000                 # what its base model has read: so many solutions by careless authors
    toy_queries: int = 20000               # its training questions ...
    toy_solutions: int = 500               # ... of which so many, mostly easy ones, show a careful solution (the SFT set)
    # the start [App. A]
    sft_epochs: int = 3                    # of the SFT baseline, one cosine schedule
    start_epoch: int = 1                   # the SFT checkpoint that self-training starts from, iteration 0; 0 = the model as it is
    sft_lr: float = 5e-6                   # its peak learning rate
    # the loop [Sec. 2.1, App. A]
    num_iters: int = 9                     # iterations
    queries_per_iter: int = 0              # M, drawn afresh each iteration; 0 = all training queries
    K: int = 64                            # samples a query
    steps_per_iter: int = 500              # optimizer steps an iteration; N = steps_per_iter * batch_size responses are selected at most
    batch_size: int = 128                  # responses a step
    lr: float = 5e-6                       # peak of self-training; cosine over all iterations (online-rft, bstar), else over each
    lr_end: float = 2e-7                   # the cosine's end
    warmup: float = 0.02                   # share of the schedule in linear warm-up
    clip: float = 1.0                      # gradient norm
    optim: str = "adamw"                   # adamw (float32) | adamw8bit (torchao's, on bf16 weights with stochastic rounding: 6 instead of 16 bytes a parameter)
    offload_optimizer: bool = False        # keep the optimizer's state in host memory while the engine samples
    # the balance [Sec. 3]
    temperature: float | None = None       # fixes T; default: 1.0, and the grid for bstar
    tau: float | None = None               # fixes tau; default: 0.0, and the grid for bstar
    temperatures: str = "0.5:1.2:0.1"      # grid from:to:step, both ends in [Sec. 4.1]
    taus: str = "-1:1:0.1"
    balance_queries: int = 600             # subset on which query effect is measured [Sec. 3.3]
    # lengths and memory
    max_tokens: int = 768                  # longest response sampled
    max_length: int = 1024                 # prompt and response in training, tokens
    token_budget: int = 16384              # tokens a training micro-batch, padding included
    sample_budget: int = 65536             # tokens held at once by the transformers engine
    chunk: int = 1000                      # queries sampled between two saves
    preflight: bool = False                # say what memory and disk the run needs, from the model's config alone, and stop
    gradient_checkpointing: bool = False   # less memory, about a third more time
    gpu_memory: float = 0.0                # share of the GPU for vLLM while it is awake; 0 = what the trainer leaves
    # evaluation
    eval_queries: int = 0                  # test queries; 0 = all
    eval_samples: int = 32                 # K of the reported pass@K-S and reward@K-S, drawn at T = 1; 0 = greedy pass@1 alone
    S: int = 4                             # S of pass@K-S and reward@K-S [Sec. 2.2]

    @property
    def samples_per_iter(self) -> int:
        """N = steps_per_iter * batch_size   [Sec. 3.1]"""
        return self.steps_per_iter * self.batch_size

    @property
    def temperature_grid(self) -> list[float]:
        """The temperatures the balancer tries: one if --temperature fixes it."""
        return grid("temperatures", self.temperatures) if self.temperature is None else [self.temperature]

    @property
    def tau_grid(self) -> list[float]:
        """The thresholds the balancer tries: one if --tau fixes it."""
        return grid("taus", self.taus) if self.tau is None else [self.tau]


PRESETS = {
    "toy": dict(reward="answer+prm", sft_lr=3e-4, num_iters=4, queries_per_iter=500, K=16, steps_per_iter=80,
                batch_size=32, lr=3e-4, lr_end=1e-4, balance_queries=60, max_tokens=64, max_length=160, eval_queries=200, val_queries=200,
                token_budget=4096),
    "gsm8k": dict(model="mistralai/Mistral-7B-v0.1", max_tokens=512, gradient_checkpointing=True, token_budget=8192),
    "math": dict(model="mistralai/Mistral-7B-v0.1", gradient_checkpointing=True, token_budget=8192),
    # No human chains of thought, so no SFT; one guess in four is right, so pass@K says nothing and only pass@1 is reported [Sec. 4.1]
    "arc": dict(model="mistralai/Mistral-7B-Instruct-v0.1", sft_epochs=0, start_epoch=0, K=32, temperatures="0.4:1.1:0.1", val_queries=200, eval_samples=0,
                max_tokens=512, gradient_checkpointing=True, token_budget=8192),
    "code": dict(model="meta-llama/Meta-Llama-3-8B", reward="tests", K=32, temperatures="0.4:1.1:0.1", max_length=2048, gradient_checkpointing=True,
                 token_budget=8192),
}


# Query effect counts right answers, however they were reached (the paper's footnote 1): on the paper's grid, -1..1, the balancer takes the lowest
# tau that keeps wrong answers out, and so every lucky guess. With r = 1 + r_prm, above tau means p > tau / 2 for a right answer's lowest step.
PRESETS["toy answer+oracle"] = dict(taus="1:1.9:0.1")
PRESETS["toy answer+prm"] = dict(taus="0.6:1.9:0.1")


MEMORY = {"token_budget", "sample_budget", "gradient_checkpointing", "gpu_memory", "offload_optimizer"}           # may differ when a run goes on: it had run out of it


class Method(NamedTuple):
    """The switches that tell the methods apart   [App. B, "Rejection Sampling Fine-tuning"]"""
    iterate: bool = True                   # sample and train in turn (else: only the SFT checkpoints)
    from_base: bool = False                # every iteration trains from the base model again
    inherit: bool = False                  # optimizer state and one schedule run through all iterations
    balance: bool = False                  # T and tau maximise query effect before each iteration [Sec. 3.3]


METHODS = {"sft": Method(iterate=False), "rest-em": Method(from_base=True), "iterative-rft": Method(), "online-rft": Method(inherit=True),
           "bstar": Method(inherit=True, balance=True)}


def parse_config(argv: Sequence[str] | None = None, kind: type = Config, presets: dict = PRESETS, without: Sequence[str] = (), doc: str = __doc__):
    """Flags -> Config, checked. The flags are the fields of Config (or of a record made from it, less some); help texts are its comments.

    raises UserError  naming the flag, what was given and what is allowed
    """
    p = Parser(prog=Path(sys.argv[0]).name, description=doc, argument_default=argparse.SUPPRESS)
    notes = {k: v for c in kind.__mro__[-2::-1] for k, v in re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(c), re.M)}
    notes["task"] = " | ".join(data.LOADERS)
    for f in [f for f in dataclasses.fields(kind) if f.name not in without]:
        flag, text = "--" + f.name.replace("_", "-"), f"{notes.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        typ = {"int": int, "float": float, "float | None": float, "str": str}.get(f.type)
        p.add_argument(flag, dest=f.name, help=text, **({"type": typ} if typ else {"action": argparse.BooleanOptionalAction}))
    given = vars(p.parse_args(argv))
    task = given.get("task", "toy")
    one_of("task", task, data.LOADERS)
    preset = presets[task]
    cfg = kind(**{**preset, **presets.get(f"{task} {given.get('reward', preset.get('reward', Config.reward))}", {}), **given})
    check(cfg)
    return cfg


def one_of(flag: str, value: str, allowed) -> None:
    """Raises UserError, naming what is allowed, unless value is."""
    if value not in allowed:
        raise UserError(f"--{flag} {value}: expected one of {', '.join(allowed)}")


def check(cfg: Config) -> None:
    """Values that can be told wrong before anything is loaded; raises UserError."""
    one_of("method", cfg.method, METHODS)
    one_of("reward", cfg.reward, rewards.REWARDS)
    one_of("prm-format", cfg.prm_format, rewards.PRM_FORMATS)
    one_of("engine", cfg.engine, ("auto", "vllm", "hf"))
    one_of("chat", cfg.chat, ("auto", "on", "off"))
    one_of("optim", cfg.optim, ("adamw", "adamw8bit"))
    if cfg.optim == "adamw8bit" and not (find_spec("torchao") and any(map(shutil.which, ("g++", "c++", "clang++")))):
        raise UserError("--optim adamw8bit: it needs torchao and a C++ compiler; pip install torchao==0.18.0 and install g++, or --optim adamw")
    if cfg.offload_optimizer and not METHODS[cfg.method].inherit:
        raise UserError(f"--offload-optimizer: --method {cfg.method} has no optimizer while it samples; leave the flag out")
    if cfg.engine == "vllm" and find_spec("vllm") is None:
        raise UserError("--engine vllm: vllm is not installed; pip install -r requirements.txt on a GPU node, or --engine hf")
    if (cfg.prm or cfg.prm_format != "own") and cfg.reward != "answer+prm":
        raise UserError(f"--prm, --prm-format: --reward {cfg.reward} uses no PRM; expected --reward answer+prm")
    if cfg.prm_format != "own" and not cfg.prm:
        raise UserError(f"--prm-format {cfg.prm_format}: it says how to read --prm, which is missing; train_prm.py's own PRMs have the format own")
    if cfg.reward == "answer+oracle" and cfg.task != "toy":
        raise UserError(f"--reward answer+oracle: only the toy's steps can be checked exactly, not those of --task {cfg.task}")
    if (cfg.reward == "tests") != (tested := PRESETS[cfg.task].get("reward") == "tests"):
        raise UserError(f"--reward {cfg.reward}: --task {cfg.task} is rewarded by {'unit tests' if tested else 'answers'}")
    if cfg.unsafe_code and not tested:
        raise UserError(f"--unsafe-code: --task {cfg.task} runs no programs")
    for name, low in dict(num_iters=1, K=1, S=1, steps_per_iter=1, batch_size=1, eval_samples=0, sft_epochs=0, start_epoch=0, max_tokens=1,
                          balance_queries=1, queries_per_iter=0, eval_queries=0, val_queries=1, chunk=1, token_budget=1, sample_budget=1,
                          toy_max_ops=2, toy_texts=1, toy_queries=10, toy_solutions=1, max_length=2).items():
        if getattr(cfg, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected at least {low}")
    for name, low, high in (("lr", 1e-12, 1e3), ("sft_lr", 1e-12, 1e3), ("clip", 1e-12, math.inf), ("lr_end", 0, 1e3), ("warmup", 0, 1),
                            ("gpu_memory", 0, 1), ("seed", 0, 2**31)):
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected a number from {low:g} to {high:g}")
    for flag, k in (("eval-samples", cfg.eval_samples), ("K", cfg.K)):
        if k < cfg.S and k:
            raise UserError(f"--S {cfg.S}: pass@K-S needs S <= K, but --{flag} is {k}")
    if cfg.toy_max_ops >= len(data.NAMES):
        raise UserError(f"--toy-max-ops {cfg.toy_max_ops}: the toy has names for at most {len(data.NAMES) - 1}")
    if not all(0.01 <= T <= 100 for T in cfg.temperature_grid):
        given = cfg.temperatures if cfg.temperature is None else cfg.temperature
        raise UserError(f"--temperature(s) {given}: expected 0.01 to 100 (greedy decoding would draw K equal samples)")
    top = rewards.REWARDS[cfg.reward][1]
    if not min(cfg.tau_grid) < top:
        raise UserError(f"--tau {min(cfg.tau_grid)}: no reward is above {top:g} with --reward {cfg.reward}, so nothing would ever be selected")
    if cfg.start_epoch > cfg.sft_epochs:
        raise UserError(f"--start-epoch {cfg.start_epoch}: expected at most --sft-epochs {cfg.sft_epochs}")
    if cfg.method == "sft" and (cfg.start_epoch == 0 or cfg.sft_epochs % cfg.start_epoch):
        raise UserError(f"--method sft: expected --sft-epochs (now {cfg.sft_epochs}) to be a multiple of --start-epoch (now {cfg.start_epoch})")


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: whole or not at all

def write(path: Path, content: bytes) -> None:
    """Writes a file so that it appears complete or not at all: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


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


def seed_of(*key) -> int:
    """A 31-bit seed from a key such as (seed, iteration, phase): no generator's state has to be saved, no two phases share a stream."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


@contextmanager
def clock(out: Path, t: int, phase: str) -> Iterator[None]:
    """Appends the seconds of a phase to times.jsonl (apart from metrics.jsonl, which is the same bits every time)."""
    start = time.perf_counter()
    yield
    with open(out / "times.jsonl", "a", encoding="utf-8") as f:
        f.write("\n" + json.dumps({"iter": t, "phase": phase, "seconds": round(time.perf_counter() - start, 3)}) + "\n")   # after a torn line, too


# ---------------------------------------------------------------------------------------------------------------------
# The policy: load, save, resume

def device() -> str:
    """"cuda" where there is a GPU, else "cpu"."""
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_dtype(cfg: Config):
    """float32 (plain bf16 weights lose most updates at lr 5e-6 to rounding), or bf16 for adamw8bit, which rounds stochastically."""
    import torch
    return torch.bfloat16 if cfg.optim == "adamw8bit" else torch.float32


def load_policy(cfg: Config, model: str | Path, where: str = ""):
    """The policy, on the device or `where`."""
    import transformers
    try:
        policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=weights_dtype(cfg))
    except Exception as e:                         # missing, truncated, of an unknown kind: a dozen exception types, one way out
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    for scaled in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(policy.config, scaled, None) not in (None, 1.0):
            raise UserError(f"--model {model}: its head has {scaled}, which the loss here leaves out; take a Llama, Mistral or Qwen")
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.to(where or device())


def settle(cfg: Config) -> None:
    """transformers' own bars and warnings off, ours say what a user needs; and the toy, too small for more, on two threads unless told otherwise."""
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not cfg.model and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count()))


def load_tokenizer(model: str | Path):
    """The tokenizer of a model folder or hub name; raises UserError where there is none."""
    import transformers
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {model}: its tokenizer has no end-of-text token, so no response could end")
    return tokenizer


def adamw(policy, lr: float):
    """AdamW, fused; over bf16 weights torchao's, with moments of 8 bits and stochastic rounding. No weight decay (the paper names none)."""
    import torch
    if policy.dtype == torch.bfloat16:
        from torchao.optim import AdamW8bit
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")      # of a cache of compiled code, from torchao's tensors
        return AdamW8bit(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, bf16_stochastic_round=True)
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def place(optimizer, where) -> None:
    """Moves the moments to a device; the step counts, which torch and torchao keep where each wants them, stay."""
    for state in optimizer.state.values():
        state.update({k: v.to(where) for k, v in state.items() if v.dim()})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that fills up is one line; it reaches us as OSError, RuntimeError or SafetensorError."""
    try:
        yield
    except Exception as e:
        free = shutil.disk_usage(path.parent).free >> 20
        raise UserError(f"{path}: can't be written ({str(e).splitlines()[0]}; {free} MiB free on the disk); "
                        "what was complete is kept, the same command goes on") from None


@data.unbroken()
def save_checkpoint(folder: Path, policy, tokenizer, optimizer, log: dict) -> None:
    """folder/ = a Hugging Face model (vLLM, transformers and lm-eval load it) + trainer.pt, and last complete.json with every file's `fingerprint`."""
    import torch
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    with writing(folder):
        policy.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        torch.save({"optimizer": optimizer and optimizer.state_dict(), "log": log}, tmp / "trainer.pt")
    files = [f for f in tmp.rglob("*") if f.is_file()]
    for f in files:
        with open(f, "rb") as handle:
            os.fsync(handle.fileno())
    write(tmp / "complete.json", json.dumps({str(f.relative_to(tmp)): fingerprint(f) for f in files}).encode())
    shutil.rmtree(folder, ignore_errors=True)      # only ever an incomplete one
    os.replace(tmp, folder)


def fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file; above 64 MiB the CRC is of 64 blocks of 1 MiB, spread from its start to its end (seconds, not minutes, at 7B)."""
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as f:
        for at in range(0, size, 1 << 20) if size <= 1 << 26 else [(size - (1 << 20)) * i // 63 for i in range(64)]:
            f.seek(at)
            crc = zlib.crc32(f.read(1 << 20), crc)
    return [size, crc]


def is_complete(folder: Path) -> bool:
    """Does a checkpoint hold every file as it was written?"""
    try:
        return all(fingerprint(folder / name) == mark for name, mark in json.loads((folder / "complete.json").read_text()).items())
    except (OSError, ValueError):
        return False


def load_trainer(folder: Path, optimizer=None) -> dict:
    """trainer.pt's log, after its state has gone into the optimizer where one is given."""
    import torch
    saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    if optimizer is not None and saved["optimizer"]:
        optimizer.load_state_dict(saved["optimizer"])
    return saved["log"]


def prune(out: Path, starts: Sequence[Path | str], t: int, best: int) -> None:
    """Keeps the last two checkpoints and the best; policy and best are links to the newest and to the best on validation."""
    folder = out / "checkpoints"
    for old in folder.glob("iter_*"):
        if int(old.name[5:]) not in (t, t - 1, best):
            shutil.rmtree(old)
    for name, i in (("policy", t), ("best", best)):
        target = folder / f"iter_{i}" if (folder / f"iter_{i}").exists() else Path(starts[min(i, len(starts) - 1)])
        if target.exists():                        # not where the start is a model on the hub
            link = out / f".{name}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, out))
            os.replace(link, out / name)


def n_parameters(model: str) -> int | None:
    """Parameters of a local model from its config alone, of a hub name from the name ("Mistral-7B"); None where neither says."""
    if Path(model).is_dir():
        import torch
        import transformers
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model)).num_parameters()
        except (OSError, ValueError) as e:
            raise UserError(f"--model {model}: {data.hub_reason(e)}") from None
    named = re.search(r"(\d+(?:\.\d+)?)\s*([BbMm])(?![a-z])", model)
    return int(float(named[1]) * {"b": 1e9, "m": 1e6}[named[2].lower()]) if named else None


def needs(cfg: Config, n: int, shape, gpu: bool) -> dict[str, int]:
    """Bytes that a run of n parameters holds at its peaks, from the model's config alone (`shape`; None: activations and KV cache are left out).

    A layer keeps 8 h + 2 kv + 4 i numbers a token for its backward pass (h hidden, i intermediate, kv = key heads x head size), of 4 bytes; in bf16
    of 2, and 4 h bytes as its norms are float32, 14 h under autocast, where the residual stream is float32, each matrix casts its own input, and
    the casts of the weights stay, too. The backward pass of the layer at work holds 3 i more, or the head 12 bytes a vocabulary entry, whichever is
    more. Gradient checkpointing keeps the layers' inputs alone, and one layer. Sampling holds the cache, one layer of it twice, and under
    autocast the weights' casts. 24 MiB are buffers, 128 MiB torch's compiler, which adamw8bit runs.
    `python tests/bench.py --memory` sets this beside real peaks on a CPU; on a GPU it has not been compared.
    """
    bf16 = cfg.optim == "adamw8bit"
    size, mixed = 2 if bf16 else 4, gpu and not bf16
    stages = cfg.sft_epochs // max(1, cfg.start_epoch) if cfg.method == "sft" or cfg.reward == "answer+prm" and not cfg.prm else min(1, cfg.start_epoch)
    found = {"weights": size * n, "gradients": size * n, "optimizer": int(2 * n * (1 + 4 / 256)) if bf16 else 8 * n, "activations": 0, "KV cache": 0}
    found["disk"] = (found["weights"] + found["optimizer"]) * (5 + stages)          # the last two checkpoints, the best, one in writing, one paused; the SFT's
    if shape is not None:
        h, i, L, V, number = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size, 2 if gpu or bf16 else 4
        kv = getattr(shape, "num_key_value_heads", shape.num_attention_heads) * (getattr(shape, "head_dim", None) or h // shape.num_attention_heads)
        layer = number * (8 * h + 2 * kv + 4 * i) + (14 * mixed + 4 * bf16) * h
        last = 12 * V + 16 * h
        kept = L * size * h + max(last, layer + 3 * number * i) if cfg.gradient_checkpointing else L * layer + max(last, 3 * number * i)
        casts = mixed * 2 * (V * h if cfg.gradient_checkpointing else n)
        found["activations"] = max(cfg.token_budget, cfg.max_length) * kept + casts + 3 * 2**23 + bf16 * 2**27
        found["KV cache"] = number * max(cfg.sample_budget, cfg.max_tokens) * 2 * (L + 1) * kv + mixed * 2 * n
    return found


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


def beside(cfg: Config, need: dict[str, int]) -> int:
    """Bytes of the trainer that stay on the device while the engine samples: the weights, and where the method inherits it the optimizer."""
    return need["weights"] + need["optimizer"] * (METHODS[cfg.method].inherit and not cfg.offload_optimizer)


@contextmanager
def memory_by(flags: str) -> Iterator[None]:
    """A GPU that runs out of memory is one line that names the flags to change; the run then goes on (see MEMORY)."""
    import torch
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise UserError(f"{'. '.join(str(e).split('. ')[:2])}; what was complete is kept, the same command with {flags} goes on") from None


# ---------------------------------------------------------------------------------------------------------------------
# Engines: who samples

class HFEngine:
    """Samples from the policy itself, in plain PyTorch on a transformers cache: no start-up, no copy of the weights, nothing to go stale."""

    def __init__(self, tokenizer, stop_ids: list[int], budget: int):
        self.tokenizer, self.stop_ids, self.budget, self.policy = tokenizer, stop_ids, budget, None

    def wake(self, policy) -> None:
        """Takes the policy to sample from."""
        self.policy = policy.eval()

    def sleep(self) -> None:
        """Lets go of the policy."""
        self.policy = None

    @memory_by("a smaller --sample-budget")
    def sample(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None) -> list[list[Sample]]:
        """n responses to each prompt (token ids) from the whole distribution at `temperature`; 0 = greedy. The same seed, the same samples."""
        groups: list[list[Sample]] = [[] for _ in prompts]
        for call, (rows, copies) in enumerate(self._calls(prompts, n, max_tokens)):
            responses = self._generate([prompts[i] for i in rows], copies, temperature, max_tokens, seed + call)
            for k, s in enumerate(responses):
                groups[rows[k // copies]].append(s)
            if bar is not None:
                bar.update(len(responses))
        return groups

    def _calls(self, prompts: list[list[int]], n: int, max_tokens: int) -> Iterator[tuple[list[int], int]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))        # longest first, little padding
        while order:
            fit = max(1, self.budget // (len(prompts[order[0]]) + max_tokens))     # sequences held at once
            rows, order = order[:max(1, fit // n)], order[max(1, fit // n):]
            for done in range(0, n, fit):
                yield rows, min(fit, n - done)

    def _generate(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int) -> list[Sample]:
        """One batch. Two things `generate` does not do make it 2-3 times faster: a prompt is read once for its n responses, and
        responses that have ended leave the batch."""
        import torch
        from transformers import DynamicCache
        L, dev, inner = max(map(len, prompts)), self.policy.device, self.policy.base_model
        ids = torch.tensor([[0] * (L - len(p)) + p for p in prompts], device=dev)                               # (B, L)
        mask = torch.tensor([[0] * (L - len(p)) + [1] * len(p) for p in prompts], device=dev)
        tokens = torch.full((len(prompts) * n, max_tokens), self.stop_ids[0], device=dev)                       # (B n, max_tokens)
        stops, live, cache = torch.tensor(self.stop_ids, device=dev), torch.arange(len(tokens), device=dev), DynamicCache(config=self.policy.config)
        generator = torch.Generator(dev).manual_seed(seed)
        with torch.inference_mode(), autocast(cache=True):
            hidden = inner(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
                           use_cache=True).last_hidden_state[:, -1].repeat_interleave(n, 0)
            cache.batch_repeat_interleave(n)
            mask, ended = mask.repeat_interleave(n, 0), torch.zeros(len(tokens), dtype=torch.bool, device=dev)
            for step in range(max_tokens):
                logits = self.policy.get_output_embeddings()(hidden).float()                                    # (rows, vocabulary)
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0] if temperature else logits.argmax(-1)
                tokens[live, step] = torch.where(ended, self.stop_ids[0], token)
                ended = ended | torch.isin(token, stops)
                if ended.float().mean() > 0.2 or step + 1 == max_tokens:                                        # not every step: a copy costs
                    stay = (~ended).nonzero()[:, 0]
                    live, token, mask, ended = live[stay], token[stay], mask[stay], ended[stay]
                    if not len(stay) or step + 1 == max_tokens:
                        break
                    cache.batch_select_indices(stay)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                hidden = inner(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
                               use_cache=True).last_hidden_state[:, -1]
        cut_off, rows = set(live.tolist()), [r[:next((i for i, t in enumerate(r) if t in self.stop_ids), None)] for r in tokens.tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Sample(text, "length" if i in cut_off else "stop") for i, text in enumerate(texts)]


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undoes what starting vLLM does to the whole process: it reseeds python, numpy and torch; on a CPU it also changes the thread count,
    replaces torch.set_num_threads by a stub and sets LD_PRELOAD for children."""
    import torch
    states, cuda = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.cuda.is_available() and torch.cuda.get_rng_state_all()
    threads, set_num_threads, preload = torch.get_num_threads(), torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None) if preload is None else os.environ.update(LD_PRELOAD=preload)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class Draft(NamedTuple):
    """One response as vLLM returns it: ids without the stop token, "stop" or "length", log-probabilities where asked for."""
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None


class VLLMEngine:
    """vLLM inside this process: weights pass by reference, nothing goes through disk. Built before the trainer, it starts asleep and empty.

    model_dir         only its config.json is read: no weights, no tokenizer
    dtype             "bfloat16" on a GPU; "float32" on a CPU, where sleep frees nothing
    stop_ids          the only tokens that end a response, whatever (generation_)config.json says
    gpu_memory        share of the GPU's whole memory; must be free now and at every `wake`
    cpu_kv_gib        KV cache on a CPU; VLLM_CPU_KVCACHE_SPACE (whole GiB) overrides it
    """

    def __init__(self, model_dir, tokenizer, *, dtype: str, seed: int, stop_ids: list[int], max_model_len: int, gpu_memory: float = 0.9,
                 max_num_seqs: int = 1024, cpu_kv_gib: int = 2):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                          # the engine lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.tokenizer, self.dtype, self.stop_ids, self.gpu = tokenizer, dtype, list(stop_ids), device() == "cuda"
        memory = (dict(enable_sleep_mode=True, gpu_memory_utilization=gpu_memory, max_num_seqs=max_num_seqs, max_cudagraph_capture_size=max_num_seqs)
                  if self.gpu else dict(enforce_eager=True, kv_cache_memory_bytes=cpu_kv_gib << 30,
                                        # a prompt read in two parts rewinds its generator, which torch's CPU generators can't
                                        enable_chunked_prefill=False, max_num_batched_tokens=max(4096, max_model_len)))
        with process_state_kept():
            from vllm import LLM
            self.llm = LLM(str(model_dir), load_format="dummy", skip_tokenizer_init=True, seed=seed, dtype=dtype, max_model_len=max_model_len,
                           generation_config="vllm", **memory)
        self.awake = True
        self.sleep()

    @memory_by("a smaller --gpu-memory")
    def wake(self, policy) -> None:
        """Memory for the weights, the policy's weights into it, memory for the KV cache: in this order the peak is lowest.

        The weights are state_dict's: named_parameters would name tied embeddings once and leave lm_head stale.
        """
        if self.gpu and not self.awake:
            import torch
            torch.cuda.empty_cache()                                               # vLLM's memory is not torch's: what training has freed goes back first
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(policy.state_dict().items())})
        if self.gpu and not self.awake:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()                                              # no cached prefix outlives the weights that made it
        self.awake = True

    def sleep(self) -> None:
        """Frees the GPU of weights and KV cache (level 2: nothing is kept, so nothing stale can be sampled)."""
        if self.gpu and self.awake:
            self.llm.sleep(level=2)
        self.awake = False

    def generate(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None, logprobs: bool = False
                 ) -> list[list[Draft]]:
        """n responses a prompt (token ids) from the whole distribution; no two of them, nor calls of different seeds, share a random stream.

        temperature 0 is greedy, with n = 1; logprobs are those at temperature 1. raises RuntimeError between sleep and wake
        """
        if not self.awake:
            raise RuntimeError("the sampling engine is asleep and holds no policy: call engine.wake(policy) first")
        from vllm import SamplingParams
        first = int(np.random.SeedSequence(seed).generate_state(1)[0])             # child j of prompt i draws from seed first + i n + j
        params = [SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens, seed=first + i * n, stop_token_ids=self.stop_ids,
                                 ignore_eos=True, detokenize=False, logprobs=0 if logprobs else None) for i in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False if bar is None else forward_to(bar))
        return [[self._draft(o) for o in output.outputs] for output in outputs]

    def _draft(self, output) -> Draft:
        tokens = list(output.token_ids)[:-1 if output.finish_reason == "stop" else None]       # vLLM leaves the stop token in
        return Draft(tokens, output.finish_reason, output.logprobs and [row[t].logprob for row, t in zip(output.logprobs, tokens)])

    def sample(self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, seed: int, bar=None) -> list[list[Sample]]:
        """As HFEngine.sample: n responses to each prompt, as text."""
        return [[Sample(self.tokenizer.decode(d.tokens, skip_special_tokens=True), d.finish_reason) for d in drafts]
                for drafts in self.generate(prompts, n, temperature, max_tokens, seed, bar)]


def forward_to(bar):
    """What vLLM takes for use_tqdm, moving our own bar: its bar over prompts being read is left out, its bar over responses prints nowhere."""
    from tqdm import tqdm

    class Forward(tqdm):
        def update(self, n=1):
            bar.update(n)
            return super().update(n)
    return lambda *args, **kwargs: args[0] if args else Forward(**{**kwargs, "file": io.StringIO(), "dynamic_ncols": False})


CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}   # mean nats a token; with the right weights 1e-6 and 0.007 were measured on a CPU


def canary_gap(engine: VLLMEngine, policy, prompts: list[list[int]], seed: int) -> tuple[float, float]:
    """(mean, max) over tokens of |log p_engine - log p_policy|, on one short response a prompt."""
    import torch
    training, gaps = policy.training, []
    policy.eval()
    for prompt, [d] in zip(prompts, engine.generate(prompts, 1, 1.0, 16, seed, logprobs=True)):
        if d.tokens:
            with torch.no_grad():
                logp = -token_nll(policy, [prompt + d.tokens], [len(prompt)]).cpu()            # (response,)
            gaps += (logp - torch.tensor(d.logprobs)).abs().tolist()
    policy.train(training)
    return (float(np.mean(gaps)), float(np.max(gaps))) if gaps else (0.0, 0.0)


def check_canary(engine: VLLMEngine, policy, prompts: list[list[int]], seed: int) -> float:
    """Stops a run whose engine does not hold this very policy: sampling from stale weights is silent otherwise.

    returns the mean gap in nats a token; raises RuntimeError above CANARY_TOLERANCE
    """
    mean, worst = canary_gap(engine, policy, prompts, seed)
    if not mean <= CANARY_TOLERANCE[engine.dtype]:                                 # NaN included
        raise RuntimeError(f"the sampling engine does not hold the policy's weights: log-probabilities of its samples differ by {mean:.3g} nats "
                           f"a token (max {worst:.3g}), {CANARY_TOLERANCE[engine.dtype]:g} is allowed")
    return mean


def autocast(cache: bool = False):
    """bf16 arithmetic over float32 weights on a GPU; nothing on a CPU. Its cache is a second copy of the model: only worth it in sampling."""
    import torch
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available(), cache_enabled=cache)


def stop_ids(tokenizer, model: str | Path) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config (chat models end turns with another)."""
    from transformers import GenerationConfig
    try:
        more = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        more = None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def gpu_share(cfg: Config, model: str | Path) -> float:
    """What the trainer leaves of the GPU while vLLM is awake: its weights, its optimizer (see `beside`) and 8 GiB stay."""
    import torch
    n, total = n_parameters(str(model)), torch.cuda.get_device_properties(0).total_memory if device() == "cuda" else 0
    if not total or n is None:
        return 0.4
    need = needs(cfg, n, None, True)
    held = beside(cfg, need)
    share = (total - held - 2**33) / total
    if share * total < 2.5 * n:
        raise UserError(f"--model {model}: beside {held / 2**30:.0f} GiB of weights and optimizer vLLM has no room on a GPU of {total / 2**30:.0f} GiB; "
                        f"take a larger GPU, {'--offload-optimizer, ' * (held > need['weights'])}a smaller --model, or --engine hf")
    return round(share, 3)


def make_engine(cfg: Config, tokenizer, model: str | Path):
    """The sampler. vLLM is built before the trainer takes memory, and put to sleep at once   [README, "vLLM and the swap"]"""
    stops = stop_ids(tokenizer, model)
    if cfg.engine == "hf" or cfg.engine == "auto" and not (device() == "cuda" and find_spec("vllm")):
        return HFEngine(tokenizer, stops, cfg.sample_budget)
    return VLLMEngine(model, tokenizer, dtype="bfloat16" if device() == "cuda" or cfg.optim == "adamw8bit" else "float32", seed=cfg.seed, stop_ids=stops,
                      max_model_len=cfg.max_length + cfg.max_tokens, gpu_memory=cfg.gpu_memory or gpu_share(cfg, model))


def use_chat(cfg: Config, tokenizer) -> bool:
    """--chat auto: through the chat template where the tokenizer has one; raises UserError if it is asked for and missing."""
    if cfg.chat == "on" and tokenizer.chat_template is None:
        raise UserError(f"--chat on: the tokenizer of --model {cfg.model} has no chat template")
    return cfg.chat != "off" and tokenizer.chat_template is not None


class Job(NamedTuple):
    """One batch of sampling: n responses to each query at a temperature, kept under parts/NAME until the iteration is written."""
    name: str
    queries: list[Query]
    n: int
    temperature: float


def sample(engine, policy, jobs: Sequence[Job], prompt: Callable[[Query], list[int]], cfg: Config, parts: Path, desc: str) -> list[list[list[Sample]]]:
    """Wakes the engine with the policy's weights, runs the jobs in chunks that survive a kill, puts the engine to sleep.

    returns  for each job, for each of its queries, n Samples (text and finish_reason)
    """
    if not jobs:
        return []
    bar = data.progress(sum(len(j.queries) * j.n for j in jobs), desc)
    engine.wake(policy)
    if isinstance(engine, VLLMEngine):             # it holds a copy of the weights, and a copy can be stale
        check_canary(engine, policy, [prompt(q) for q in jobs[0].queries[:4]], cfg.seed)
    results = []
    for job in jobs:
        groups: list[list[Sample]] = []
        for k in range(0, len(job.queries), cfg.chunk):
            queries, part = job.queries[k:k + cfg.chunk], parts / f"{job.name}.{k}.jsonl.gz"
            if part.exists():
                chunk = [[Sample(**s) for s in json.loads(line)] for line in gzip.decompress(part.read_bytes()).decode().splitlines()]
                bar.update(len(queries) * job.n)
            else:
                with data.unbroken():
                    chunk = engine.sample([prompt(q) for q in queries], job.n, job.temperature, cfg.max_tokens, seed_of(cfg.seed, job.name, k), bar)
                    lines = (json.dumps([{"response": s.response, "finish_reason": s.finish_reason} for s in g]) for g in chunk)
                    write(part, gzip.compress("\n".join(lines).encode(), 3, mtime=0))
            groups += chunk
        results.append(groups)
    engine.sleep()
    bar.close()
    return results


@memory_by("a smaller --token-budget")
def score(queries: Sequence[Query], groups: Sequence[Sequence[Sample]], cfg: Config, prm: PRM | None = None, desc: str = "score") -> None:
    """Fills pred, correct, sound, steps, r_prm and reward of every sample (Eq. 1); a cut-off response keeps r = -inf.   [Sec. 2.3]"""
    flat = [(q, s) for q, g in zip(queries, groups, strict=True) for s in g]
    bar = data.progress(len(flat), desc)
    for k in range(0, len(flat), 10_000):
        part = flat[k:k + 10_000]
        questions, responses = [q.text for q, _ in part], [s.response for _, s in part]
        correct = rewards.grade(responses, [q.gold for q, _ in part], cfg.task, questions)
        steps = rewards.step_scores(questions, responses, cfg.reward, prm)
        for (q, s), ok, p in zip(part, correct, steps, strict=True):
            s.pred, s.correct, s.steps = rewards.extract_answer(s.response, cfg.task), ok, p
            s.r_prm = rewards.r_prm(p) if p else None
            if cfg.task == "toy":
                s.sound = ok and all(data.check_toy(q.text, s.response))
            if s.finish_reason == "stop":
                s.reward = rewards.combine(ok, p)
        bar.update(len(part))
    bar.close()


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
        fresh = [s for s, again in zip(g, repeats(g)) if not again and s.reward > tau]
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


def as_arrays(groups: Sequence[Sequence[Sample]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """reward (Q, K) float, correct (Q, K) bool, duplicate (Q, K) bool: what the metrics and the balancer need of the samples."""
    return (np.array([[s.reward for s in g] for g in groups]), np.array([[s.correct for s in g] for g in groups]),
            np.array([repeats(g) for g in groups]))


def repeats(group: Sequence[Sample]) -> list[bool]:
    """Does another sample of the query say the same, at a reward at least as high?  See metrics.repeats."""
    return metrics.repeats([[s.reward for s in group]], [metrics.classes([s.response for s in group])])[0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Train

def token_nll(policy, rows: Sequence[Sequence[int]], n_prompts: Sequence[int]):
    """-log p(y_t | x, y_<t) of every response token, flat   [Eq. 3, App. B]

    rows (B, l_i) ids of prompt and response, n_prompts (B,). Padding stands on the right, where causal attention never looks back from,
    so no mask is needed; the head runs at response positions only, and no (B, L, vocabulary) tensor exists.
    returns (sum of response lengths,) float32
    """
    import torch
    lengths, L = torch.tensor([len(r) for r in rows]), max(map(len, rows))
    ids = torch.tensor([list(r) + [0] * (L - len(r)) for r in rows], device=policy.device)                      # (B, L)
    place = torch.arange(1, L)
    at = ((place >= torch.tensor(n_prompts)[:, None]) & (place < lengths[:, None])).to(policy.device)          # (B, L-1) response tokens
    with autocast():
        hidden = policy.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[at]               # (tokens, width)
        logits = policy.get_output_embeddings()(hidden)                                                        # (tokens, vocabulary)
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][at], reduction="none")


def accumulate(policy, batch: list[tuple[list[int], int]], token_budget: int) -> float:
    """Adds to .grad the gradient of the mean over *all* response tokens of a global batch, whatever the micro-batches; returns that mean."""
    total = sum(len(ids) - n for ids, n in batch)
    mean = 0.0
    for rows, n_prompts in data.micro_batches(batch, token_budget):
        loss = token_nll(policy, rows, n_prompts).sum() / total
        loss.backward()
        mean += loss.item()
    return mean


def cosine(step: int, horizon: int, peak: float, end: float, warmup: float) -> float:
    """Learning rate of a step: linear warm-up over a share of the horizon, then a cosine from peak to end.

    >>> [round(cosine(s, 10, 1.0, 0.1, 0.1), 3) for s in (0, 1, 5, 9)]
    [1.0, 0.973, 0.472, 0.1]
    """
    rise = max(1, round(warmup * horizon))
    if step < rise:
        return peak * (step + 1) / rise
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, (step + 1 - rise) / max(1, horizon - rise)))) / 2


@memory_by("a smaller --token-budget, or with --gradient-checkpointing,")
def train(policy, optimizer, examples: list[tuple[list[int], int]], steps: range, rate: Callable[[int], float], cfg: Config, seed: int,
          desc: str, accumulate: Callable = accumulate) -> dict:
    """The optimizer steps of one phase; every example once before any comes again. Ctrl-C ends after a step, which the same command goes on from.

    examples  (ids, n_prompt) pairs; steps numbers them on the schedule `rate`
    returns   {"loss": mean over the phase's tokens-weighted steps, "grad_norm": mean before clipping, "skipped": steps whose loss or gradient was not finite}
    raises    UserError  after three such steps in a row
    """
    import torch
    rng, order, log = np.random.default_rng(seed), np.zeros(0, dtype=int), {"done": 0, "loss": [], "grad_norm": [], "skipped": 0, "in_a_row": 0}
    paused = Path(cfg.out or "runs/cache") / f"paused-{seed_of(desc, seed, steps, len(examples))}.pt"
    if paused.exists():
        saved = torch.load(paused, map_location="cpu", weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    policy.train()
    bar = data.progress(len(steps), desc)
    bar.update(log["done"])
    for i, step in enumerate(steps):
        while len(order) < cfg.batch_size:
            order = np.concatenate([order, rng.permutation(len(examples))])
        batch, order = [examples[j] for j in order[:cfg.batch_size]], order[cfg.batch_size:]
        if i < log["done"]:
            continue
        with data.unbroken() as asked:
            torch.manual_seed(seed_of(seed, i))    # stochastic rounding and dropout draw from it: a step draws the same, however the run came to it
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(rate(step)) if torch.is_tensor(group["lr"]) else rate(step)
            loss = accumulate(policy, batch, cfg.token_budget)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip).item()
            if math.isfinite(loss + norm):
                optimizer.step()
                log["loss"].append(loss)
                log["grad_norm"].append(norm)
                log["in_a_row"] = 0
            else:
                log["skipped"], log["in_a_row"] = log["skipped"] + 1, log["in_a_row"] + 1
                print(f"{desc}: loss {loss:g}, gradient norm {norm:g} at step {step}, which is skipped", file=sys.stderr)
            optimizer.zero_grad(set_to_none=True)
            log["done"] += 1
            bar.update()
            if log["in_a_row"] == 3:
                raise UserError(f"{desc}: three steps in a row without a finite loss and gradient; the last checkpoint is kept, lower --lr and --sft-lr")
            if asked:
                with writing(paused):
                    torch.save({"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, tmp := paused.with_suffix(".tmp"))
                    os.replace(tmp, paused)
    bar.close()
    paused.unlink(missing_ok=True)
    return {**{k: float(np.mean(log[k])) if log[k] else None for k in ("loss", "grad_norm")}, "skipped": log["skipped"]}


def encode(pairs: Sequence[tuple[Query, str]], prompt: Callable[[Query], list[int]], tokenizer, cfg: Config, name: str) -> list[tuple[list[int], int]]:
    """(query, response) pairs as training examples; over-long ones are dropped and counted on stderr."""
    encoded = [data.example(tokenizer, prompt(q), response, cfg.max_length) for q, response in pairs]
    fit = [e for e in encoded if e is not None]
    if len(fit) < len(encoded):
        print(f"{name}: {len(encoded) - len(fit)} of {len(encoded)} are longer than --max-length {cfg.max_length} tokens and left out", file=sys.stderr)
    return fit


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
    """The base model: --model, or the toy's, the same for all seeds: a tiny Llama that has read `data.toy_text` once, made on the spot and cached."""
    if cfg.model:
        return cfg.model
    folder = Path("runs/cache") / f"toy-base-{cfg.toy_max_ops}-{cfg.toy_texts}"
    with one_at_a_time(folder):
        if not is_complete(folder):
            data.make_toy_model(tmp := folder.with_name(f".{folder.name}.tmp"), 0)
            tokenizer, cfg = load_tokenizer(tmp), dataclasses.replace(cfg, out="", optim="adamw", batch_size=32, clip=1.0, token_budget=4096)
            policy, texts = load_policy(cfg, tmp), data.toy_text(cfg.toy_max_ops, cfg.toy_texts)
            examples = [data.example(tokenizer, tokenizer("<s> " + q.text, add_special_tokens=False)["input_ids"], q.solution, 1000) for q in texts]
            n = math.ceil(len(texts) / cfg.batch_size)
            train(policy, adamw(policy, 5e-3), examples, range(n), lambda s: cosine(s, n, 5e-3, 1e-4, 0.02), cfg, 0, "toy base")
            save_checkpoint(folder, policy, tokenizer, None, {})
    return str(folder)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Runs that share a cached folder wait for the one that makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def sft(cfg: Config, base: str, examples: list[tuple[list[int], int]], tokenizer, stages: int) -> list[Path | str]:
    """Fine-tunes base on the human solutions, one cosine over sft_epochs, and keeps every start_epoch-th epoch   [App. A; Eq. 3]

    Cached under what it is made of (settings, base, examples), so methods and rewards share it.
    returns the first `stages` checkpoints; [0] is iteration 0's policy
    """
    if not cfg.start_epoch:
        return [base]
    if not examples:
        raise UserError("no human solutions to fine-tune on; --start-epoch 0 starts from the model as it is")
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(base).iterdir())] if Path(base).is_dir() else []
    made_of = (base, parts, examples, [getattr(cfg, n) for n in "seed sft_epochs start_epoch sft_lr lr_end warmup clip batch_size optim".split()])
    folder = Path("runs/cache") / f"sft-{cfg.task}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"
    paths = [folder / f"epoch_{(i + 1) * cfg.start_epoch}" for i in range(stages)]
    per_stage = cfg.start_epoch * math.ceil(len(examples) / cfg.batch_size)
    rate = lambda s: cosine(s, per_stage * cfg.sft_epochs // cfg.start_epoch, cfg.sft_lr, cfg.lr_end, cfg.warmup)
    with one_at_a_time(folder):
        first = next((i for i, p in enumerate(paths) if not is_complete(p)), stages)
        if first < stages:
            policy = load_policy(cfg, paths[first - 1] if first else base)
            optimizer = adamw(policy, cfg.sft_lr)
            if first:
                load_trainer(paths[first - 1], optimizer)
        for i in range(first, stages):
            log = train(policy, optimizer, examples, range(i * per_stage, (i + 1) * per_stage), rate, cfg, seed_of(cfg.seed, "sft", i), f"SFT to {paths[i].name}")
            save_checkpoint(paths[i], policy, tokenizer, optimizer, log)
    return paths


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
    splits, base = data.LOADERS[cfg.task](cfg), base_model(cfg)
    tokenizer = load_tokenizer(base)
    chat = use_chat(cfg, tokenizer)
    prompt = functools.cache(lambda q: data.prompt_ids(tokenizer, q, splits, chat))
    drop_long_prompts(splits, prompt, cfg)
    engine = make_engine(cfg, tokenizer, base)
    human = [(q, y) for q in splits.train for y in (q.solution, *q.more_solutions) if y]
    return Setup(splits, base, tokenizer, prompt, engine, encode(human, prompt, tokenizer, cfg, "human solutions"))


def load_prm(cfg: Config, have: Setup) -> PRM | None:
    """The reward's process model: --prm, or the task's own, which train_prm.py makes once."""
    if cfg.reward != "answer+prm":
        return None
    import train_prm                               # imports this file
    return PRM.load(cfg.prm or train_prm.ready(cfg, have), cfg.prm_format, cfg.token_budget)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate

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


def percent(x) -> float:
    """The mean of 0s and 1s in percent, to four places."""
    return round(100 * float(np.mean(x)), 4)


def metrics_of(greedy: list[list[Sample]], sampled: list[list[Sample]], K: int, S: int) -> dict:
    """The numbers of one test set   [Sec. 2.2]; `sound` ones count a response only if every step is right too (where that can be told)."""
    reward, correct, _ = as_arrays(sampled)
    distinct = metrics.distinct_equations([[s.response for s in g] for g in sampled], correct)
    row = {"pass@1": percent([[s.correct for s in g] for g in greedy]),
           f"pass@{K}": percent(metrics.pass_at_k_s(K, correct.sum(1), K, 1)),
           f"pass@{K}-{S}": percent(metrics.pass_at_k_s(K, correct.sum(1), K, S)),
           f"reward@{K}-{S}": percent(metrics.reward_at_k_s(reward, correct, K, S)),
           "distinct": round(distinct.distinct, 4), "coverage": round(distinct.coverage, 4),
           "truncated": percent([[s.finish_reason != "stop" for s in g] for g in sampled]), "queries": len(sampled)}
    for k in [2**i for i in range(1, K.bit_length()) if S <= 2**i < K]:             # smaller K, exactly, from the same samples [Figs. 3, 5, 6]
        row.update({f"pass@{k}": percent(metrics.pass_at_k_s(K, correct.sum(1), k, 1)),
                    f"pass@{k}-{S}": percent(metrics.pass_at_k_s(K, correct.sum(1), k, S)),
                    f"reward@{k}-{S}": percent(metrics.reward_at_k_s(reward, correct, k, S))})
    if sampled[0][0].r_prm is not None:            # ranked without the gold answer: what one could do with a question of one's own
        r_prm = np.array([[s.r_prm if s.finish_reason == "stop" else -np.inf for s in g] for g in sampled])
        row[f"prm@{K}-{S}"] = percent(metrics.reward_at_k_s(r_prm, correct, K, S))
    if sampled[0][0].sound is not None:
        sound = np.array([[s.sound for s in g] for g in sampled])
        row.update({"sound@1": percent([[s.sound for s in g] for g in greedy]), f"sound@{K}": percent(sound.any(1)),
                    f"sound@{K}-{S}": percent(metrics.pass_at_k_s(K, sound.sum(1), K, S)),
                    "false_reasoning": false_reasoning([s for g in sampled for s in g])})
    return row


def false_reasoning(samples: Sequence[Sample]) -> float | None:
    """The share of right answers reached by a wrong step; None where steps cannot be told or no answer is right."""
    right = [s for s in samples if s.correct and s.sound is not None]
    return round(sum(not s.sound for s in right) / len(right), 4) if right else None


# ---------------------------------------------------------------------------------------------------------------------
# Balance

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


# ---------------------------------------------------------------------------------------------------------------------
# The loop

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


def watch_prm(queries: list[Query], pool: list[list[Sample]], tau: float) -> dict:
    """Does the PRM still know this policy's solutions?  On an iteration's pool; a PRM is trained once, the policy moves   [Sec. 2.3, Observation 3]

    AUC and calibration are of r_prm (as a probability) against the right answer, on the toy also against the truth of every step.
    """
    flat = [(q, s) for q, g in zip(queries, pool) for s in g if s.finish_reason == "stop" and s.steps]
    if not flat:
        return {}
    p, correct = np.array([min(s.steps) for _, s in flat]), np.array([s.correct for _, s in flat])
    admitted, share = np.array([s.reward > tau for _, s in flat]), lambda x: float(x.mean()) if len(x) else None
    row = {"auc": metrics.auc(p, correct), **metrics.calibration(p, correct), "wrong_admitted": share(admitted[~correct]),
           "min_last": share(np.array([s.steps[-1] == min(s.steps) for _, s in flat]))}
    if flat[0][1].sound is not None:
        sound, right = np.array([s.sound for _, s in flat]), [data.check_toy(q.text, s.response) for q, s in flat]
        scores, truth = zip(*((x, all(ok[:j + 1])) for (_, s), ok in zip(flat, right) for j, x in enumerate(s.steps)))
        row.update(auc_sound=metrics.auc(p, sound), step_auc=metrics.auc(scores, truth), false_admitted=share(admitted[correct & ~sound]))
    return {f"prm/{k}": None if v != v else round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def pool_metrics(queries: list[Query], pool: list[list[Sample]], kept: list[list[Sample]], tau: float, n_star: int) -> dict:
    """What an iteration's pool says of exploration and exploitation: query effect at the (T, tau) used, what was kept, false reasoning."""
    n_sel, n_correct = metrics.sweep(*as_arrays(pool), [tau])
    flat = [s for g in kept for s in g]
    row = {"qe": round(float(metrics.query_effect(n_sel, n_correct, n_star).mean()), 6), "n_star": n_star, "kept": len(flat),
           "sampled": sum(map(len, pool)), "pool/correct": percent([[s.correct for s in g] for g in pool]),
           "selected/correct": percent([s.correct for s in flat]) if flat else None, "queries_kept": sum(map(bool, kept))}
    if pool[0][0].sound is not None:
        row.update({"pool/false_reasoning": false_reasoning([s for g in pool for s in g]), "selected/false_reasoning": false_reasoning(flat)})
    return row | (watch_prm(queries, pool, tau) if pool[0][0].r_prm is not None else {})


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


def report(out: Path, row: dict, starts: Sequence[Path | str], cfg: Config) -> None:
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
    told = {line.split(":")[0] for line in metrics.alarms(rows[:-1], [d for d in ledger if d["iter"] < row["iter"]])}
    for line in metrics.alarms(rows, ledger):
        if line.split(":")[0] not in told:             # once, when it begins; the report has them as they stand at the end
            print(f"alarm | {line}", file=sys.stderr)


def total_iters(cfg: Config) -> int:
    """The last iteration's number: for `sft`, whose iterations are its later epochs, what is left after the start."""
    return cfg.num_iters if METHODS[cfg.method].iterate else cfg.sft_epochs // max(1, cfg.start_epoch) - 1


def main(argv: Sequence[str] | None = None) -> None:
    """Algorithm 1."""
    cfg = parse_config(argv)
    if cfg.preflight:
        fits(cfg)                                  # and stops
    out = open_run(cfg)
    done = metrics.read_jsonl(out / "metrics.jsonl")
    if len(done) > total_iters(cfg):
        shutil.rmtree(out / "parts", ignore_errors=True)
        metrics.report([metrics.read_run(out)], out)
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
        report(out, row, starts, cfg)
        t, log = t + 1, None

    run = metrics.read_run(out)
    print(metrics.table([run]), f"\n{metrics.report([run], out)}  {out}/metrics.jsonl  {out}/policy")


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
    import bstar                                   # as train_prm.py sees it: one copy of this file, not two
    data.run(bstar.main)
