"""Every setting of a run, once: default < preset of the task < flag.

    flags -> Config, checked

`python bstar.py --task math --help` prints the block below with that task's defaults;
train_prm.py takes the same block and a few settings more.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import data
import ranks
import rewards
import toy
from data import Splits, UserError

# -- tables: a fork adds an entry -----------------------------------------------------------------

LOADERS: dict[str, Callable[..., Splits]] = {
    "walk": toy.load_walk,
    "stories": toy.load_stories,
    "gsm8k": data.load_gsm8k,
    "math": data.load_math,
    "arc": data.load_arc,
    "code": data.load_code,
}


class Method(NamedTuple):
    """The switches that tell the methods apart   [App. B, "Rejection Sampling Fine-tuning"]"""

    iterate: bool = True  # sample and train in turn; else only the SFT checkpoints
    from_base: bool = False  # every iteration trains from the base model again
    inherit: bool = False  # optimizer state and one schedule run through all iterations
    balance: bool = False  # T and tau maximise query effect before each iteration [Sec. 3.3]


METHODS = {
    "sft": Method(iterate=False),
    "rest-em": Method(from_base=True),
    "iterative-rft": Method(),
    "online-rft": Method(inherit=True),
    "bstar": Method(inherit=True, balance=True),
}


# -- the settings ---------------------------------------------------------------------------------


def opt(default, text: str, low: float = -math.inf, high: float = math.inf, one_of: Iterable = ()):
    """A field that is also a flag: its default, its help text, and what is allowed."""
    # one_of may be the table itself, so that what a fork adds to it later is allowed
    return field(default=default, metadata=dict(text=text, low=low, high=high, one_of=one_of))


T_RANGE = (0.01, 100)


# fmt: off
@dataclass
class Config:
    """Sections are the paper's: M and N of Sec. 3.1, the rest of Sec. 4.1 and App. A."""

    task: str = opt("walk", "whose questions", one_of=LOADERS)
    method: str = opt("bstar", "App. B", one_of=METHODS)
    reward: str = opt("answer", "Eq. 1 [Sec. 2.3]; oracle: exact steps", one_of=rewards.REWARDS)
    model: str = opt("", "base model, hub name or folder; empty: the toy's, made on the spot")
    seed: int = opt(0, "of everything but the stories' questions and base model", 0, 2**31)
    out: str = opt("", "run folder; empty: runs/TASK-METHOD-REWARD-SEED")
    prm: str = opt("", "process reward model, hub name or folder; empty: train_prm.py makes one")
    prm_format: str = opt("own", "how --prm is read", one_of=rewards.PRM_FORMATS)
    engine: str = opt("auto", "who samples; auto: vLLM with a GPU", one_of=("auto", "vllm", "hf"))

    # data
    train_file: str = opt("", ".jsonl, .jsonl.gz, .parquet (commas) instead of the hub's rows")
    test_file: str = opt("", "the same for the test sets, one a file")
    chat: str = opt("auto", "prompts through the chat template", one_of=("auto", "on", "off"))
    val_queries: int = opt(500, "held out to choose checkpoints on [App. A]", 1)
    unsafe_code: bool = opt(False, "run programs even where Landlock or seccomp is missing")
    toy_max_ops: int = opt(5, "operations in the toy's longest stories", 2, 8)
    toy_texts: int = opt(32000, "texts that the toy's base model has read", 1)
    toy_queries: int = opt(20000, "the toy's training questions", 10)
    toy_solutions: int = opt(500, "human solutions of the toy, at most (the SFT set)", 1)

    # the start [App. A]
    sft_epochs: int = opt(3, "of the SFT baseline, one cosine schedule", 0)
    start_epoch: int = opt(1, "the SFT checkpoint that iteration 0 is; 0: the model as it is", 0)
    sft_lr: float = opt(5e-6, "its peak learning rate", 1e-12, 1e3)

    # the loop [Sec. 2.1, App. A]
    num_iters: int = opt(9, "iterations", 1)
    queries_per_iter: int = opt(0, "M, drawn afresh each iteration; 0: all", 0)
    K: int = opt(64, "samples a query", 1)
    steps_per_iter: int = opt(500, "optimizer steps an iteration; N = steps * batch_size", 1)
    batch_size: int = opt(128, "responses a step", 1)
    max_repeats: float = opt(0.0, "readings of a selected response an iteration; 0: no limit", 0)
    lr: float = opt(5e-6, "peak of a cosine over all iterations, or over each", 1e-12, 1e3)
    lr_end: float = opt(2e-7, "the cosine's end", 0, 1e3)
    warmup: float = opt(0.02, "share of the schedule in linear warm-up", 0, 1)
    clip: float = opt(1.0, "gradient norm", 1e-12)
    optim: str = opt("adamw", "16 bytes a parameter; adamw8bit: 6", one_of=("adamw", "adamw8bit"))
    offload_optimizer: bool = opt(False, "its state waits in host memory while the engine samples")

    # the balance [Sec. 3]
    # T near 0 is greedy decoding, which would draw K equal samples
    temperature: float | None = opt(None, "fixes T; else 1.0, and the grid for bstar", *T_RANGE)
    tau: float | None = opt(None, "fixes tau; else 0.0, and the grid for bstar")
    temperatures: str = opt("0.5:1.2:0.1", "grid FROM:TO:STEP, both ends in [Sec. 4.1]")
    taus: str = opt("-1:1:0.1", "the same for tau")
    balance_queries: int = opt(600, "subset on which query effect is measured [Sec. 3.3]", 1)

    # lengths and memory
    max_tokens: int = opt(768, "longest response sampled", 1)
    max_length: int = opt(1024, "prompt and response in training, tokens", 2)
    token_budget: int = opt(16384, "tokens a training micro-batch, padding included", 1)
    sample_budget: int = opt(65536, "tokens held at once by the transformers engine", 1)
    chunk: int = opt(1000, "queries sampled between two saves", 1)
    probe: bool = opt(False, "balance once, say what each T yields and R, and stop")
    preflight: bool = opt(False, "say what memory, disk and hours the run needs, and stop")
    tokens_per_second: float = opt(0.0, "sampling, for those hours; 0: 1e14 / parameters", 0)
    gradient_checkpointing: bool = opt(False, "less memory, about a third more time")
    gpu_memory: float = opt(0.0, "vLLM's share of the GPU; 0: what the trainer leaves", 0, 1)

    # evaluation
    eval_queries: int = opt(0, "test queries; 0: all", 0)
    eval_samples: int = opt(32, "K of pass@K-S and reward@K-S, at T = 1; 0: greedy pass@1 alone", 0)
    S: int = opt(4, "S of pass@K-S and reward@K-S [Sec. 2.2]", 1)

    # fmt: on
    @property
    def samples_per_iter(self) -> int:
        """N = steps_per_iter * batch_size   [Sec. 3.1]"""
        return self.steps_per_iter * self.batch_size

    @property
    def last_iter(self) -> int:
        """The last iteration's number; those of `sft` are its later epochs."""
        if METHODS[self.method].iterate:
            return self.num_iters
        return self.sft_epochs // max(1, self.start_epoch) - 1

    @property
    def temperature_grid(self) -> list[float]:
        """The temperatures that an iteration may sample at: one if it is fixed."""
        if self.temperature is not None:
            return [self.temperature]
        return grid("temperatures", self.temperatures) if METHODS[self.method].balance else [1.0]

    @property
    def tau_grid(self) -> list[float]:
        """The thresholds that an iteration may select by: one if it is fixed."""
        if self.tau is not None:
            return [self.tau]
        return grid("taus", self.taus) if METHODS[self.method].balance else [0.0]


# They may change when a stopped run goes on: it had run out of memory.
MEMORY = """token_budget sample_budget gradient_checkpointing gpu_memory
offload_optimizer""".split()

# chunks of 1,000 would leave eight GPUs 39 % over the mean
LARGE = dict(gradient_checkpointing=True, token_budget=8192, chunk=100)
MISTRAL = "mistralai/Mistral-7B-v0.1"

# fmt: off
PRESETS = {
    # Small enough for minutes on a CPU; N is far above what is selected, so that balancing shows.
    "walk": dict(
        toy_texts=4000, toy_queries=800, toy_solutions=6400, val_queries=100, eval_queries=200,
        sft_lr=5e-4, lr=1e-3, lr_end=3e-4, batch_size=32,
        num_iters=6, K=8, steps_per_iter=60, balance_queries=80,
        max_tokens=18, max_length=64, token_budget=4096,
    ),
    "stories": dict(
        reward="answer+prm", val_queries=200, eval_queries=200,
        sft_lr=3e-4, lr=3e-4, lr_end=1e-4, batch_size=32,
        num_iters=4, queries_per_iter=500, K=16, steps_per_iter=80, balance_queries=60,
        max_tokens=64, max_length=160, token_budget=4096,
    ),
    "gsm8k": dict(model=MISTRAL, max_tokens=512, **LARGE),
    "math": dict(model=MISTRAL, reward="answer+prm", **LARGE),
    # No human chains of thought, so no SFT. One guess in four is right, so pass@K says nothing.
    "arc": dict(
        model="mistralai/Mistral-7B-Instruct-v0.1", sft_epochs=0, start_epoch=0,
        K=32, temperatures="0.4:1.1:0.1", max_tokens=512, val_queries=200, eval_samples=0, **LARGE,
    ),
    # A vocabulary of 128,256: twice the token budget needs 142 GiB.
    "code": dict(
        model="meta-llama/Meta-Llama-3-8B", reward="tests",
        K=32, temperatures="0.4:1.1:0.1", max_length=2048, **LARGE | dict(token_budget=4096),
    ),
}
# fmt: on

# Query effect counts right answers, however they were reached (the paper's footnote 1): on the
# grid -1..1 the stories' balancer would keep every lucky guess. Of a right answer r = 2 p, so
# r > tau means p > tau / 2 for its lowest step.
REWARD_PRESETS = {
    ("stories", "answer+prm"): dict(taus="0.6:1.9:0.1"),
    ("stories", "answer+oracle"): dict(taus="1:1.9:0.1"),
}


# -- flags -> Config ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, one line, instead of printing its usage."""

    def __init__(self, **settings):
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=shape, allow_abbrev=False, **settings)
        # argparse takes -1:1:0.1 for a flag, and this private rule is its only say in that
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf)")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_config(
    argv: Sequence[str] | None = None,
    kind: type = Config,
    presets: dict = PRESETS,
    without: Sequence[str] = (),
    doc: str = __doc__,
):
    """Flags -> a checked Config, or a record made from it.

    without  names of fields that are no flags

    raises UserError  naming the flag, what was given and what is allowed
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # first of all: the other flags' defaults hang on these two
    first = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    first.add_argument("--task", choices=LOADERS)
    first.add_argument("--reward")
    known = vars(first.parse_known_args(argv)[0])
    task = known.get("task", kind.task)
    defaults = {"task": task, **presets[task]}
    reward = known.get("reward", defaults.get("reward", kind.reward))
    # it knows more than the task's preset, and less than the user
    defaults |= REWARD_PRESETS.get((task, reward), {})
    name = Path(sys.argv[0]).name
    # without defaults of argparse's, `given` holds only what the user gave
    p = Parser(prog=name, description=doc, argument_default=argparse.SUPPRESS)
    for f in fields(kind):
        if f.name not in without:
            add_flag(p, f, defaults.get(f.name, f.default))
    given = vars(p.parse_args(argv))
    cfg = kind(**{**defaults, **given})
    for name, reason in unread(cfg).items():
        if name in given:
            raise UserError(f"--{name.replace('_', '-')}: it does nothing {reason}; leave it out")
    check(cfg)
    return cfg


def add_flag(p: Parser, f: Field, default) -> None:
    """--name of a field, with its help text, what is allowed, and the task's default."""
    flag = "--" + f.name.replace("_", "-")
    one_of = f.metadata["one_of"]
    text = f"{f.metadata['text']}{': ' if one_of else ''}{', '.join(one_of)}"
    text = f"{text} (default {default!r})".replace("%", "%%")
    # f.type is text, since annotations are not evaluated here
    if f.type == "bool":
        p.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    kind = f.type.split()[0]  # "float | None" is read as a float
    convert = {"int": int, "float": float, "str": str}[kind]
    choices = one_of or None
    p.add_argument(flag, type=convert, metavar=kind.upper(), choices=choices, help=text)


def grid(name: str, spec: str) -> list[float]:
    """FROM:TO:STEP -> the grid, both ends in.

    It is made from decimals: np.arange drifts, and under a strict r > tau drift matters.

    >>> grid("temperatures", "0.5:1.2:0.1")
    [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]
    """
    try:
        low, high, step = map(Decimal, spec.split(":"))
        n = int((high - low) / step) + 1
        if step < 0 or low > high or n > 10_000:
            raise ValueError
    # ArithmeticError: a STEP of 0, an infinity or NaN
    except (ValueError, ArithmeticError):
        raise UserError(
            f"--{name} {spec}: expected FROM:TO:STEP, e.g. 0.5:1.2:0.1, with FROM <= TO, STEP > 0 "
            "and at most 10,000 points"
        ) from None
    return [float(low + i * step) for i in range(n)]


def unread(cfg: Config) -> dict[str, str]:
    """The settings that nothing reads in such a run, and why: their flags would do nothing.

    >>> unread(Config(method="online-rft"))["taus"]
    'with --method online-rft'
    """
    method, preset = METHODS[cfg.method], PRESETS[cfg.task]
    by_method, by_task = f"with --method {cfg.method}", f"with --task {cfg.task}"
    by_reward = f"with --reward {cfg.reward}"
    fixed_T, fixed_tau = cfg.temperature is not None, cfg.tau is not None
    one_T, one_tau = len(cfg.temperature_grid) == 1, len(cfg.tau_grid) == 1
    loop = "num_iters queries_per_iter K steps_per_iter max_repeats lr temperature tau"
    toys = "toy_max_ops toy_texts toy_queries toy_solutions"
    table = [
        (one_T, "with one temperature", "probe"),
        (one_T and one_tau, "with one temperature and one tau", "balance_queries"),
        (fixed_T, "with --temperature", "temperatures"),
        (fixed_tau, "with --tau", "taus"),
        (not method.balance, by_method, "temperatures taus balance_queries probe"),
        (not method.inherit, by_method, "offload_optimizer"),  # none waits while it samples
        (method.from_base, by_method, "lr"),  # it starts as the SFT does, and takes --sft-lr
        (not method.iterate, by_method, loop),
        (cfg.task in toy.BASES, by_task, "train_file test_file"),
        (cfg.task == "walk", by_task, "toy_max_ops"),
        ("model" in preset, by_task, toys),  # a fork's task may be a toy, too
        (preset.get("reward") != "tests", by_task, "unsafe_code"),
        (not cfg.model, "without --model", "chat"),
        (not cfg.preflight, "without --preflight", "tokens_per_second"),
        (cfg.model != "", "with --model", "toy_texts"),
        (not cfg.prm, "without --prm", "prm_format"),
        (cfg.reward != "answer+prm", by_reward, "prm prm_format"),
    ]
    reasons: dict[str, str] = {}
    for holds, reason, names in table:
        if holds:
            reasons |= dict.fromkeys(names.split(), reason)
    return reasons


def check(cfg: Config) -> None:
    """Raises UserError for what would otherwise fail hours later."""
    for f in fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        is_number = isinstance(value, (int, float))
        # NaN, too, fails such a comparison; argparse's float takes it
        if is_number and not (low <= value <= high and abs(value) < math.inf):
            flag = f.name.replace("_", "-")
            raise UserError(f"--{flag} {value}: expected a finite number, {low:g} to {high:g}")
    check_sampling(cfg)
    check_training(cfg)
    check_reward(cfg)


def check_sampling(cfg: Config) -> None:
    """Temperatures, engine, and the K and S of the metrics."""
    low, high = T_RANGE
    if not all(low <= T <= high for T in cfg.temperature_grid):
        raise UserError(f"--temperatures {cfg.temperatures}: expected {low:g} to {high:g}")
    if cfg.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "--engine vllm: vllm is not installed; pip install -r requirements.txt on a GPU node, "
            "or --engine hf"
        )
    if 0 < cfg.eval_samples < cfg.S:
        raise UserError(f"--S {cfg.S}: expected at most --eval-samples {cfg.eval_samples}")


def check_training(cfg: Config) -> None:
    """The start, the method and the optimizer."""
    if ranks.WORLD > 1 and (cfg.optim == "adamw8bit" or cfg.offload_optimizer):
        raise UserError(
            f"--optim adamw8bit, --offload-optimizer: {ranks.WORLD} processes share the optimizer "
            "as it is; leave them out"
        )
    # the one schedule ends with the last epoch, and there is no checkpoint behind it
    if cfg.start_epoch > cfg.sft_epochs:
        raise UserError(
            f"--start-epoch {cfg.start_epoch}: expected at most --sft-epochs {cfg.sft_epochs}"
        )
    if cfg.method == "sft" and (cfg.start_epoch == 0 or cfg.sft_epochs % cfg.start_epoch):
        raise UserError(
            f"--method sft: expected --sft-epochs (now {cfg.sft_epochs}) to be a multiple of "
            f"--start-epoch (now {cfg.start_epoch})"
        )
    compiler = any(map(shutil.which, ("g++", "c++", "clang++")))  # torchao compiles its step
    if cfg.optim == "adamw8bit" and not (find_spec("torchao") and compiler):
        raise UserError(
            "--optim adamw8bit: it needs torchao and a C++ compiler; pip install torchao==0.18.0 "
            "and install g++, or --optim adamw"
        )


def check_reward(cfg: Config) -> None:
    """The reward against the task and the threshold."""
    if cfg.reward == "answer+oracle" and cfg.task not in toy.CHECKERS:
        raise UserError(
            "--reward answer+oracle: only a toy's steps can be checked exactly, "
            f"not those of --task {cfg.task}"
        )
    tested = PRESETS[cfg.task].get("reward") == "tests"
    if tested != (cfg.reward == "tests"):
        rewarded_by = "unit tests" if tested else "answers"
        raise UserError(f"--reward {cfg.reward}: --task {cfg.task} is rewarded by {rewarded_by}")
    # a fork's reward may be any number
    greatest = {"answer": 1.0, "tests": 1.0, "answer+prm": 2.0, "answer+oracle": 2.0}
    highest, tau = greatest.get(cfg.reward, math.inf), min(cfg.tau_grid)
    if tau >= highest:
        raise UserError(
            f"--tau {tau}: no reward is above {highest:g} with --reward {cfg.reward}, "
            "so nothing would ever be selected"
        )
