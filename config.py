"""Every setting of a run, once: default < preset of the task < flag."""
from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import shutil
import sys
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn, Sequence

import rewards
import toy
from data import UserError, load_arc, load_code, load_gsm8k, load_math

LOADERS = {"toy": toy.load_toy, "gsm8k": load_gsm8k, "math": load_math, "arc": load_arc, "code": load_code}


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


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, one line, instead of printing its usage; a value may begin with a minus, as in --taus -1:1:0.1."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")         # argparse's private rule of what is a value and no flag

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def grid(name: str, spec: str) -> list[float]:
    """"from:to:step" -> the grid, both ends in, from decimals: np.arange drifts, and under a strict r > tau drift matters.

    >>> grid("temperatures", "0.5:1.2:0.1")
    [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]
    """
    try:
        low, high, step = map(Decimal, spec.split(":"))
        if step <= 0 or low > high:
            raise ValueError
        return [float(low + i * step) for i in range(min(int((high - low) / step), 10_000) + 1)]
    except (ValueError, ArithmeticError):
        raise UserError(f"--{name} {spec}: expected FROM:TO:STEP with FROM <= TO and STEP > 0, e.g. 0.5:1.2:0.1") from None


def parse_config(argv: Sequence[str] | None = None, kind: type = Config, presets: dict = PRESETS, without: Sequence[str] = (), doc: str | None = None):
    """Flags -> Config, checked. The flags are the fields of Config (or of a record made from it, less some); help texts are its comments.

    raises UserError  naming the flag, what was given and what is allowed
    """
    p = Parser(prog=Path(sys.argv[0]).name, description=doc, argument_default=argparse.SUPPRESS)
    notes = {k: v for c in kind.__mro__[-2::-1] for k, v in re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(c), re.M)}
    notes["task"] = " | ".join(LOADERS)
    for f in [f for f in dataclasses.fields(kind) if f.name not in without]:
        flag, text = "--" + f.name.replace("_", "-"), f"{notes.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        typ = {"int": int, "float": float, "float | None": float, "str": str}.get(f.type)
        p.add_argument(flag, dest=f.name, help=text, **({"type": typ} if typ else {"action": argparse.BooleanOptionalAction}))
    given = vars(p.parse_args(argv))
    task = given.get("task", "toy")
    one_of("task", task, LOADERS)
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
    if cfg.toy_max_ops >= len(toy.NAMES):
        raise UserError(f"--toy-max-ops {cfg.toy_max_ops}: the toy has names for at most {len(toy.NAMES) - 1}")
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
