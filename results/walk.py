"""The experiments on number walks: runs what is missing, one run after the other.

    results/walk/PLAN.md -> bstar.main -> results/walk/runs.jsonl, one line a run

    python results/walk.py             all that the plan names, in its order
    python results/walk.py --list      what is missing

It can be killed at any time, and the same command goes on. Each run is a child process of its own
with one thread, so that its numbers don't depend on the machine's cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import bstar  # noqa: E402
import metrics  # noqa: E402
import rewards  # noqa: E402
import toy  # noqa: E402
from config import Config, parse_config  # noqa: E402
from runs import Setup, set_up  # noqa: E402
from trainer import load_policy, sft  # noqa: E402

LINES = ROOT / "results" / "walk" / "runs.jsonl"
COMMON = ("--task", "walk", "--eval-samples", "0", "--eval-queries", "800")
SAMPLED = 400  # test questions that the last policy is sampled on
PHASES = ("balance", "gen", "score", "train", "eval")


class Run(NamedTuple):
    """One run: its variant's name and flags, its seed, the share of wrong words in the SFT set."""

    name: str
    flags: tuple[str, ...]
    seed: int
    careless: float = toy.CARELESS

    @property
    def key(self) -> str:
        return f"{self.name}-{self.careless:g}-{self.seed}"

    @property
    def folder(self) -> Path:
        return Path("runs") / "walks" / self.key.replace(" ", "_")


# -- the plan -------------------------------------------------------------------------------------

CAP = ("--max-repeats", "6")
ONLINE = ("--method", "online-rft")
REST_EM = ("--method", "rest-em")
ITERATIVE = ("--method", "iterative-rft")

FIRST = {"bstar": (), "online-rft": ONLINE, "online-rft cap 6": ONLINE + CAP}
FIXED = {f"T {T}": (*ONLINE, "--temperature", T) for T in ("0.5", "0.7", "0.9", "1.1", "1.2")}
SECOND = {
    "bstar cap 6": CAP,
    **FIXED,
    "sft": ("--method", "sft"),
    "rest-em": REST_EM,
    "iterative-rft": ITERATIVE,
    "two steps": ONLINE,
    "rest-em cap 6": REST_EM + CAP,
    "iterative-rft cap 6": ITERATIVE + CAP,
}
LAW = {**FIRST, "bstar cap 6": CAP}
LAST = {f"{name} cap 6": flags + CAP for name, flags in FIXED.items()}


def plan() -> list[Run]:
    """Every run, in the plan's order; one that stands there twice counts once."""
    runs = []
    for seed in range(1, 9):
        runs += [Run(name, flags, seed) for name, flags in FIRST.items()]
    for name, flags in SECOND.items():
        runs += [Run(name, flags, seed) for seed in range(1, 9)]
    for seed in range(1, 5):
        for percent in range(0, 40, 5):
            runs += [Run(name, flags, seed, percent / 100) for name, flags in LAW.items()]
    for name, flags in LAST.items():
        runs += [Run(name, flags, seed) for seed in range(1, 9)]
    return list({run.key: run for run in runs}.values())


def missing() -> list[Run]:
    """The runs of the plan that have no line yet."""
    lines = metrics.read_jsonl(LINES)
    done = {Run(line["name"], (), line["seed"], line["careless"]).key for line in lines}
    return [run for run in plan() if run.key not in done]


# -- one run --------------------------------------------------------------------------------------


def do(run: Run) -> None:
    """One run from its start, or from where it was stopped, to its line; for a child process."""
    start = time.perf_counter()
    out = run.folder
    out.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    toy.CARELESS = run.careless
    if run.name == "two steps":
        bstar.draw_queries = in_two_steps(bstar.draw_queries)

    argv = [*COMMON, *run.flags, "--seed", str(run.seed), "--out", str(out)]
    bstar.main(argv)
    last = {}
    if run.careless == 0.2:
        last = at_the_end(parse_config(argv), out / "policy")
    append(record(run, out, last, time.perf_counter() - start))
    shutil.rmtree(out)


def in_two_steps(draw_queries: Callable) -> Callable:
    """bstar.draw_queries, which also sets T: 0.5 in iteration 1, then 1.1."""

    def draw(train: list, cfg: Config, t: int) -> list:
        cfg.temperature = 0.5 if t == 1 else 1.1
        return draw_queries(train, cfg, t)

    return draw


def at_the_end(cfg: Config, policy: Path) -> dict:
    """The last policy's numbers at T = 1; for sft also those of iteration 0's policy."""
    setup = set_up(cfg)
    numbers = sampled(cfg, setup, policy, "last")
    if cfg.method == "sft":
        [first] = sft(cfg, setup.base, setup.human, setup.tokenizer, stages=1)
        numbers["start"] = sampled(cfg, setup, first, "start")
    return numbers


def sampled(cfg: Config, setup: Setup, model: Path, name: str) -> dict:
    """pass@32, pass@32-4, the share right, and different right walks of 32 a question, at T = 1."""
    queries = setup.splits.tests["walk"][:SAMPLED]
    with setup.engine.awake(load_policy(cfg, model)) as draw:
        groups = draw(queries, 32, 1.0, name)
    rewards.score(queries, groups, cfg.task, cfg.reward)
    row = metrics.of_samples(groups, groups, 32, 4)
    return {
        "pass@32": row["pass@32"],
        "pass@32-4": row["pass@32-4"],
        "right at T 1": metrics.pass_at_1(groups),
        "unique": metrics.unique_correct(*metrics.as_arrays(groups)),
    }


# -- its line -------------------------------------------------------------------------------------


def record(run: Run, out: Path, last: dict, seconds: float) -> dict:
    """The line of a finished run."""
    total = dict.fromkeys(PHASES, 0.0)
    for row in metrics.read_jsonl(out / "times.jsonl"):
        if row["phase"] in total:
            total[row["phase"]] += row["seconds"]
    total["all"] = seconds
    return {
        "name": run.name,
        "seed": run.seed,
        "careless": run.careless,
        "config": json.loads((out / "config.json").read_text()),
        "metrics": metrics.read_jsonl(out / "metrics.jsonl"),
        "ledger": [short(decision) for decision in metrics.read_jsonl(out / "ledger.jsonl")],
        "seconds": {phase: round(s, 1) for phase, s in total.items()},
        "last": last,
    }


def short(decision: dict) -> dict:
    """A line of the ledger with the surface at tau = 0 alone; r is 0 or 1, so no tau differs."""
    at = decision["taus"].index(0.0)
    kept = ("iter", "temperature", "qe", "interval", "yield", "unique")
    line = {key: decision[key] for key in kept}
    line["surface"] = [round(row[at], 4) for row in decision["surface"]]
    return line


def append(line: dict) -> None:
    """Adds a line to LINES; a line that a kill has torn is ended first."""
    torn = LINES.exists() and not LINES.read_bytes().endswith(b"\n")
    with open(LINES, "a", encoding="utf-8") as f:
        if torn:
            f.write("\n")
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


# -- all of them ----------------------------------------------------------------------------------


def main() -> None:
    """Runs what is missing, or lists it."""
    os.chdir(ROOT)
    if "--list" in sys.argv:
        for run in missing():
            print(run.key)
        return
    import torch  # noqa: F401  read once: the children are forks and have it
    import transformers  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for run in missing():
        start = time.time()
        child = fork.Process(target=do, args=(run,))
        child.start()
        child.join()
        note = "" if child.exitcode == 0 else f" failed, see {run.folder}.log"
        print(
            f"{time.strftime('%H:%M:%S')} {run.key} {time.time() - start:.0f} s{note}", flush=True
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
