"""What several test files share: a tiny run and the models it makes.

The tests run offline, on one core, without a GPU, whatever the machine has.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Iterator

import pytest
from faults import End

import bstar
import data
from config import Config, parse_config, unread
from data import UserError
from engine import HFEngine
from runs import Setup, set_up
from trainer import load_policy, sft

# before anything imports torch
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(bstar.__file__).parent
torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
TINY = """
    --sft-lr 3e-3 --sft-epochs 12 --start-epoch 6 --batch-size 16 --chunk 10 --max-tokens 40
    --val-queries 10 --eval-queries 10 --eval-samples 4 --S 2
"""
LOOP = """
    --num-iters 2 --steps-per-iter 4 --queries-per-iter 24 --K 4
    --balance-queries 8 --temperatures 0.6:1.0:0.4 --taus -1:1:0.1
"""
STORIES = """
    --task stories --reward answer+oracle
    --toy-max-ops 3 --toy-texts 512 --toy-queries 200 --toy-solutions 128
"""


def flags_of(*flags: str) -> list[str]:
    """The flags of a tiny run, those without a say left out; each may be of the form "--K 8"."""
    given = " ".join(flags).split()
    argv = TINY.split() + given
    if "--task" not in given:
        argv = STORIES.split() + argv
    idle = unread(parse_config(argv))
    of_loop = LOOP.split()
    for name, value in zip(of_loop[::2], of_loop[1::2]):
        if name[2:].replace("-", "_") not in idle:
            argv = [name, value, *argv]
    return argv


def tiny(*flags: str) -> Config:
    """The settings of a tiny run."""
    return parse_config(flags_of(*flags))


def captured(cwd: Path, main: Callable, argv: list[str]) -> tuple[str, str]:
    """main(argv) in this process; returns what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(argv)
    return out.getvalue(), err.getvalue()


def run(cwd: Path, *flags: str) -> tuple[str, str]:
    """A tiny run to its end; returns what it wrote to stdout and stderr."""
    return captured(cwd, bstar.main, flags_of(*flags))


def command(cwd: Path, script: str | Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """`python script flags` in a process of its own."""
    argv = [sys.executable, str(ROOT / script), *" ".join(flags).split()]
    how = dict(cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    return subprocess.run(argv, **how)


@contextlib.contextmanager
def refused(message: str = "") -> Iterator[None]:
    """Expects a user's error of one line, which matches message."""
    with pytest.raises(UserError, match=message) as e:
        yield
    assert "\n" not in str(e.value)


def tiny_llama(kind: str = "llama", seed: int = 0, **settings):
    """A model of two layers and random weights, on which nobody has trained."""
    import torch
    import transformers

    shape = dict(vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(kind, **{**shape, **heads, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def life(cwd: Path, main: Callable, argv: list[str], end: End | None = None) -> tuple[int, str]:
    """main(argv) in a fork of this process.

    returns  its exit code, negative for a signal, and what it printed
    """
    printed = cwd / "printed"

    def live() -> None:
        os.chdir(cwd)
        sys.stdout = sys.stderr = open(printed, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if end:
            _end_at(end)
        data.run(lambda: main(argv))

    # a fork, since a new process would import torch again for each of many lives
    child = multiprocessing.get_context("fork").Process(target=live)
    child.start()
    child.join()
    return child.exitcode, printed.read_text()


def _end_at(end: End) -> None:
    """Makes this process send itself the signal when the phase's bar comes to its share."""
    progress = data.progress

    def watched(total: int, desc: str):
        bar = progress(total, desc)
        update = bar.update

        def update_and_end(n: int = 1):
            update(n)
            if desc == end.phase and bar.n >= end.share * total:
                os.kill(os.getpid(), end.sig)

        bar.update = update_and_end
        return bar

    data.progress = watched


@dataclasses.dataclass
class Toy:
    """The toy as a tiny run sets it up, and M_0."""

    cwd: Path
    cfg: Config
    setup: Setup
    start: Path  # M_0: the SFT checkpoint

    def policy(self, optim: str = "adamw"):
        """M_0, loaded afresh."""
        return load_policy(dataclasses.replace(self.cfg, optim=optim), self.start)

    def engine(self, out: Path) -> HFEngine:
        """A sampler that keeps its chunks in another folder."""
        cfg = dataclasses.replace(self.cfg, out=str(out))
        tokenizer = self.setup.tokenizer
        return HFEngine(cfg, tokenizer, self.setup.prompt, [tokenizer.eos_token_id])


@pytest.fixture(scope="session")
def cwd(tmp_path_factory) -> Path:
    """A folder whose runs share their base models and SFT checkpoints."""
    return tmp_path_factory.mktemp("cwd")


@pytest.fixture(scope="session")
def toy(cwd) -> Toy:
    cfg = tiny()
    with contextlib.chdir(cwd):
        setup = set_up(cfg)
        setup.base = str(Path(setup.base).resolve())
        [start] = sft(cfg, setup.base, setup.human, setup.tokenizer)
        return Toy(cwd, cfg, setup, start.resolve())
