"""A GPU node, proven in ten minutes: python tests/gpu.py [--model DIR] [--quick]

    Llamas of random weights -> swap, sample, train, save, kill -> a table, "ready" or what is not

Nothing is downloaded. Each measurement is a process of its own, so that one which runs out of
memory ends no other. The table is Markdown. --quick takes one tiny Llama and two minutes, and a CPU
with vLLM's CPU build will do: it proves this script, and no number of it means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import bench  # puts the repository's root on the path
import faults
import numpy as np
import torch

import engine
import runs
import trainer
from config import parse_config

SHAPES = {  # vocabulary, hidden size, inner size, layers, heads, heads of keys
    "tiny": [1000, 64, 224, 2, 2, 1],
    "0.1B": [32000, 768, 2688, 12, 12, 4],
    "1B": [32000, 2048, 7168, 18, 32, 8],
    "7B": [32000, 4096, 14336, 32, 32, 8],
}
FLAGS = "--task gsm8k --reward answer --max-tokens {} --max-length {} --token-budget {}"


class Load(NamedTuple):
    """How much is done in a measurement."""

    flags: str
    n_prompts: int
    n: int  # responses to each
    n_rows: int  # of a training step
    least_rate: float  # of LLM.generate's


FULL = Load(FLAGS.format(128, 1024, 8192), n_prompts=64, n=16, n_rows=64, least_rate=0.9)
QUICK = Load(FLAGS.format(16, 128, 1024), n_prompts=8, n=4, n_rows=4, least_rate=0.0)
Rows = Iterator[tuple]  # of (what, measured[, wanted, whether it is that]): lines of the table


def make_llama(folder: Path, size: str) -> None:
    """A Llama of random weights in bf16; the GPU is left to the children."""
    scale = SHAPES[size][1] ** -0.5  # logits of about one nat, whatever the width
    bench.make_llama(folder, SHAPES[size], torch.bfloat16, scale)
    torch.cuda.empty_cache()


def tokens(n_rows: int, length: int) -> list[list[int]]:
    """Rows of random words."""
    return np.random.default_rng(0).integers(20, 1000, (n_rows, length)).tolist()


class Clock(defaultdict):
    """name -> seconds of each time that this piece of work was done."""

    def __init__(self):
        super().__init__(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            # a GPU's work is only begun when the call comes back
            torch.cuda.synchronize()
        self[name].append(time.perf_counter() - start)

    def __str__(self) -> str:
        return "; ".join(f"{name} {np.round(times, 2).tolist()}" for name, times in self.items())


def used_memory() -> float:
    """GiB in use: of the whole GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def train(policy, optimizer, cfg, n_rows: int, steps: int = 2) -> int:
    """Optimizer steps on rows of half the greatest length; returns the tokens trained on."""
    rows = [(ids, 8) for ids in tokens(n_rows, cfg.max_length // 2)]
    phase = trainer.Phase("train", 0, range(steps), steps, cfg.lr, cfg.lr_end, 0.0)
    trainer.train(policy, optimizer, rows, phase, dataclasses.replace(cfg, batch_size=n_rows))
    return steps * n_rows * cfg.max_length // 2


def rounds(cfg, load: Load) -> Rows:
    """Three rounds in one process: memory, seconds, the canary, and what vLLM samples."""
    clock, memory, gaps = Clock(), {"before": used_memory()}, []
    tokenizer = trainer.load_tokenizer(cfg.model)
    with clock("start"):
        sampler = engine.make_engine(cfg, tokenizer, None, cfg.model, [tokenizer.eos_token_id])
    memory["asleep"] = used_memory()
    policy = trainer.load_policy(cfg, cfg.model)
    optimizer = trainer.adamw(policy, cfg.lr)
    memory["with the trainer"] = used_memory()
    prompts = tokens(load.n_prompts, 32)
    for i in range(3):
        with clock("swap"):
            sampler.wake(policy)
        memory["awake"] = used_memory()
        gaps.append(sampler.check_canary(prompts[:4]))
        with clock("sample"):
            sampler.sample(prompts, load.n, 1.0, seed=i)
        with clock("sleep"):
            sampler.sleep()
        with clock("train"):
            train(policy, optimizer, cfg, n_rows=load.n_rows)
        memory["after training"] = used_memory()

    yield "memory in use, GiB", ", ".join(f"{when} {used:.2f}" for when, used in memory.items())
    yield "seconds", str(clock)
    # a gap above what is allowed has ended it
    yield "canary's gap at each swap, nats", ", ".join(f"{gap:.1g}" for gap in gaps)
    yield greedy_tokens(sampler, policy, prompts[:8])
    yield against_bare_vllm(sampler, policy, prompts, load)
    yield stale_weights(sampler, policy, prompts[:4])


def greedy_tokens(sampler, policy, prompts: list[list[int]]) -> tuple:
    """The share of vLLM's greedy tokens that transformers chooses after the same ones."""
    with sampler.awake(policy):
        outputs = sampler.generate(prompts, 1, seed=0, temperature=0.0, max_tokens=16)
    same = []
    for prompt, output in zip(prompts, outputs):
        theirs = list(output.outputs[0].token_ids)
        ids = torch.tensor([prompt + theirs], device=policy.device)
        with torch.no_grad():
            ours = policy(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        same += [a == b for a, b in zip(ours, theirs)]
    share = statistics.mean(same)
    # bf16 turns near ties
    least = {"float32": 1.0, "bfloat16": 0.8}[sampler.dtype]
    return "greedy tokens as transformers'", f"{share:.0%}", f"{least:.0%}", share >= least


def against_bare_vllm(sampler, policy, prompts: list[list[int]], load: Load) -> tuple:
    """engine.sample's rate beside that of `LLM.generate`."""
    with sampler.awake(policy):
        sampler.sample(prompts[:4], load.n, 1.0, seed=0)  # the canary's turn
        rates = bench.in_turns(sampler, prompts, load.n)
    shown, ratio = f"{rates['tokens/s']:.0f} ({rates['ratio']:.2f})", rates["ratio"]
    what = "engine.sample: tokens/s (by LLM.generate's)"
    return what, shown, f"{load.least_rate}", ratio >= load.least_rate


def stale_weights(sampler, policy, prompts: list[list[int]]) -> tuple:
    """A weight that the engine does not know of must stop the run."""
    shown = "goes unseen"
    with sampler.awake(policy):
        with torch.no_grad():
            policy.get_output_embeddings().weight.mul_(2)
        try:
            sampler.check_canary(prompts)
        except RuntimeError:
            shown = "stops"
    return "a weight changed behind vLLM's back", shown, "stops", shown == "stops"


def training(cfg, load: Load) -> Rows:
    """Tokens a second, the peak against the preflight, the attention kernel."""
    policy = trainer.load_policy(cfg, cfg.model)
    optimizer, clock, n = trainer.adamw(policy, cfg.lr), Clock(), policy.num_parameters()
    for _ in range(3):
        with clock("train"):
            n_tokens = train(policy, optimizer, cfg, n_rows=load.n_rows)
    rate = n_tokens / statistics.median(clock["train"])
    shown = f"{rate:.0f} ({6 * n * rate / bench.matmul_rate():.0%})"
    how = {True: "with", False: "without"}[cfg.gradient_checkpointing]
    yield f"{cfg.optim}, {how} gradient checkpointing: tokens/s (utilisation)", shown
    if torch.cuda.is_available():
        needed = trainer.needs(cfg, n, policy.config, True)
        counted = runs.peaks(cfg, n, needed, True)["training"] / 2**30
        peak = torch.cuda.max_memory_reserved() / 2**30
        yield "its peak, GiB", f"{peak:.1f}", f"preflight: {counted:.1f}", peak <= counted
    yield "its attention", attention_kernel(policy, cfg)


def attention_kernel(policy, cfg) -> str:
    """The kernels of scaled dot products that a forward pass ran."""
    prefix = "aten::_scaled_dot_product_"
    with torch.profiler.profile() as profile, torch.no_grad():
        trainer.token_nll(policy, tokens(2, cfg.max_length // 2), [8, 8])
    names = {event.key for event in profile.key_averages()}
    return ", ".join(x.removeprefix(prefix) for x in sorted(names) if x.startswith(prefix))


def trl(cfg, load: Load) -> Rows:
    """Ours and TRL's SFTTrainer on bench.py's rows, whose lengths differ."""
    key = "tokens/s without padding"
    ours, theirs = bench.train_ours(cfg.model)[key], bench.train_trl(cfg.model)[key]
    yield "tokens/s on bench.py's rows (by TRL's SFTTrainer's)", f"{ours:.0f} ({ours / theirs:.2f})"


def checkpoint(cfg, load: Load) -> Rows:
    """Seconds and size of a checkpoint, and whether its moments come back."""
    policy = trainer.load_policy(cfg, cfg.model)
    optimizer = trainer.adamw(policy, cfg.lr)
    train(policy, optimizer, cfg, n_rows=4, steps=1)
    folder, clock = Path(cfg.out, "checkpoint"), Clock()
    with clock("written"):
        state = trainer.State(1, policy, optimizer)
        trainer.save(state, folder, trainer.load_tokenizer(cfg.model))
    moments = optimizer.state[next(policy.parameters())]["exp_avg"].float().cpu()
    with clock("read"):
        trainer.load_trainer(folder, optimizer)
    again = optimizer.state[next(policy.parameters())]["exp_avg"].float().cpu()
    same = trainer.is_complete(folder) and torch.equal(moments, again)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 2**30
    shutil.rmtree(folder)
    yield "a checkpoint", f"{size:.2f} GiB; {clock} s", "its moments come back", same


def kill_and_go_on(folder: Path) -> Rows:
    """bstar.py ended by kill -9 while it trains, then started again by the same command."""
    for name, numbers in (("train", range(48)), ("test", range(48, 64))):
        rows = [{"question": f"w{i} w{i + 1}", "answer": f"w7 #### {i % 10}"} for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = """--task gsm8k --reward answer --method online-rft --tau -1 --train-file train.jsonl
        --test-file test.jsonl --val-queries 8 --sft-epochs 8 --start-epoch 8 --sft-lr 3e-3
        --batch-size 8 --num-iters 1 --steps-per-iter 100 --K 4 --max-tokens 8 --max-length 64
        --eval-samples 4 --out run"""
    argv = ["--model", str(folder), *flags.split()]
    # the bars that say where it is
    del os.environ["TQDM_DISABLE"]
    in_training = faults.End("train 1", 0.1, signal.SIGKILL)
    code, _, caught, _ = faults.live(str(folder), argv, ["train 1"], in_training)
    code_again, _, _, printed = faults.live(str(folder), argv, [])
    shown = "goes on"
    if code != -signal.SIGKILL or not caught.startswith("train 1"):
        shown = f"was not caught in training, but at {caught or 'no bar'}"
    elif code_again:
        shown = last_line(printed)
    yield "kill -9 in training, the same command again", shown, "goes on", shown == "goes on"


def last_line(text: str) -> str:
    """The last line of what a process printed: an error's message."""
    return (text.strip().splitlines() or ["no output"])[-1][:200]


def node(folder: Path) -> Rows:
    """What the machine is, and what vLLM, Triton and torchao want of it."""
    gpu = torch.cuda.is_available()
    if gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        card = torch.cuda.get_device_properties(0)
        yield "GPU", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
        yield "driver", driver, "580 for CUDA 13", int(driver.split(".")[0] or 0) >= 580
    there = {"gcc": shutil.which("gcc")}
    there["Python.h"] = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    present = ", ".join(name for name, is_there in there.items() if is_there) or "neither"
    yield "gcc, Python.h", present, "both, with a GPU", all(there.values()) or not gpu
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "host memory, free disk, GiB", f"{host:.0f}, {shutil.disk_usage(folder).free / 2**30:.0f}"
    yield "packages", bench.versions()


def left_out() -> str:
    """The one line that says what this machine can't show."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("no GPU: sleep, CUDA graphs, bf16, the peak against the preflight")
    lines = {"vllm": "swap and sampling", "torchao": "adamw8bit", "trl": "its rate"}
    missing += [f"no {name}: {what}" for name, what in lines.items() if not find_spec(name)]
    if not torch.__version__.startswith("2.13."):
        missing.append(f"torch is {torch.__version__}, not 2.13: what it shows is of that one")
    return "; ".join(missing) or "nothing"


def apart(measure: Callable, cfg, load: Load) -> Rows:
    """The rows of one measurement, made in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            yield from pool.submit(rows_of, measure, cfg, load).result()
        except Exception as e:  # whatever ended it
            yield measure.__name__, last_line(f"{type(e).__name__}: {e}"), "ends well", False


def rows_of(measure: Callable, cfg, load: Load) -> list[tuple]:
    """A measurement's rows; what it prints goes where errors go."""
    with redirect_stdout(sys.stderr):
        runs.settle(cfg)
        return list(measure(cfg, load))


def settings(model: Path, load: Load, *flags: str):
    """A Config for one measurement; beside the model there is room for its files."""
    out = ["--model", str(model), "--out", tempfile.gettempdir()]
    return parse_config([*load.flags.split(), *out, *flags])


def measurements(model: Path, load: Load) -> Rows:
    """All rows of one model; adamw8bit is the optimizer where adamw's 16 bytes do not fit."""
    optims = ["--optim=adamw"]
    if find_spec("torchao") and shutil.which("g++"):
        optims.append("--optim=adamw8bit")
    fitting = [optim for optim in optims if fits(settings(model, load, optim))]
    if not fitting:
        yield "all of it", "left out: too large for this machine"
        return
    if find_spec("vllm"):
        yield from apart(rounds, settings(model, load, fitting[0], "--engine=vllm"), load)
    for optim in fitting:
        for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
            cfg = settings(model, load, optim, flag)
            if fits(cfg):
                yield from apart(training, cfg, load)
    cfg = settings(model, load, fitting[0])
    if find_spec("trl") and load is FULL and cfg.optim == "adamw":
        yield from apart(trl, cfg, load)
    yield from apart(checkpoint, cfg, load)


def fits(cfg) -> bool:
    """True if training fits this machine, and so does vLLM beside what the trainer keeps."""
    shape, gpu = trainer.model_config(cfg.model), torch.cuda.is_available()
    n = trainer.n_parameters(cfg.model, shape)
    free = torch.cuda.mem_get_info()[0] if gpu else runs.host_memory()
    peak = runs.peaks(cfg, n, trainer.needs(cfg, n, shape, gpu), gpu)
    vllm = 2.5 * n + (12 << 30) if gpu else 0
    return max(peak["training"], peak["sampling"] + vllm) < free


def show(size: str, rows: Rows) -> list[str]:
    """Prints lines of the table; returns those that are not as wanted."""
    bad = []
    for what, value, *more in rows:
        wanted, is_that = more or ("", True)
        mark = "yes" if is_that else "**no**"
        print(f"| {size} | {what} | {value} | {wanted} | {mark} |", flush=True)
        if not is_that:
            bad.append(f"{what} ({size}): {value}")
    return bad


def main(argv: list[str] | None = None) -> None:
    """Prints the table as it is made; exits 1 where the node is not ready."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--model", help="a model's folder instead of those made here")
    parser.add_argument("--quick", action="store_true", help="one tiny Llama; proves the script")
    args = parser.parse_args(argv)
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    load, sizes = FULL, ["0.1B", "1B", "7B"]
    if args.quick:
        load, sizes = QUICK, ["tiny"]
    print(f"This leaves out: {left_out()}.\n")
    print("| model | what | measured | wanted | ok |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        tempfile.tempdir = tmp
        bad = show("", node(Path(tmp)))
        if args.model:
            sizes = []
            bad += show(args.model, measurements(Path(args.model).resolve(), load))
        for size in sizes:
            make_llama(Path(tmp, size), size)
            bad += show(size, measurements(Path(tmp, size), load))
            shutil.rmtree(Path(tmp, size))
        make_llama(Path(tmp, "killed"), "tiny")
        bad += show("tiny", kill_and_go_on(Path(tmp, "killed")))
    if bad:
        print("\nnot ready: " + "; ".join(bad))
        sys.exit(1)
    print("\nready")


if __name__ == "__main__":
    main()
