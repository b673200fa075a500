"""The experiments on number walks: runs what is missing, one run after the other.

    results/walk/PLAN.md -> bstar.main -> results/walk/{runs,tau}.jsonl, one line a run

    python results/walk.py             all that the plan names, in its order
    python results/walk.py tau         its second part: tau with a learned PRM, systematic errors
    python results/walk.py --list      what is missing

It can be killed at any time, and the same command goes on. Each run is a child process of its own
with one thread, so that its numbers don't depend on the machine's cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

import bstar  # noqa: E402
import data  # noqa: E402
import metrics  # noqa: E402
import rewards  # noqa: E402
import toy  # noqa: E402
import train_prm  # noqa: E402
from config import Config, parse_config  # noqa: E402
from runs import Setup, set_up  # noqa: E402
from toy import careless  # noqa: E402
from trainer import load_policy, sft  # noqa: E402

HERE = ROOT / "results" / "walk"
COMMON = ("--task", "walk", "--eval-samples", "0", "--eval-queries", "800")
SAMPLED = 400  # test questions that the last policy is sampled on
PHASES = ("balance", "gen", "score", "train", "eval")


class Run(NamedTuple):
    """One run: its variant's name and flags, its seed, the share of wrong words in the SFT set.

    Of a variant "off by one ..." the share is 1, of the numbers after +7.
    """

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


PRM = ("--reward", "answer+prm")
TAU = {
    "prm online-rft": PRM + ONLINE,
    "prm bstar": PRM,
    "prm tau alone": (*PRM, "--temperature", "1.0"),
    "prm T alone": (*PRM, "--tau", "0.0"),
    "prm tau 0.4": (*PRM, *ONLINE, "--tau", "0.4"),
    "prm tau 0.9": (*PRM, *ONLINE, "--tau", "0.9"),
    "prm cubed": PRM,
}
T_BALANCED = {f"prm tau {tau}, T balanced": (*PRM, "--tau", tau) for tau in ("0.4", "0.9")}
OFF_BY_ONE = {f"off by one {name}": flags for name, flags in LAW.items()}


def plan() -> list[Run]:
    """Every run of the first part, in the plan's order; one that stands there twice counts once."""
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


def tau_plan() -> list[Run]:
    """Every run of the second part, in the plan's order."""
    runs = []
    for seed in range(1, 9):
        runs += [Run(name, flags, seed) for name, flags in TAU.items()]
        if seed <= 4:
            runs += [Run(name, flags, seed, 1.0) for name, flags in OFF_BY_ONE.items()]
    for name, flags in T_BALANCED.items():
        runs += [Run(name, flags, seed) for seed in range(1, 9)]
    return runs


PLANS = {"runs": plan, "tau": tau_plan}  # part -> its runs; their lines stand in PART.jsonl


def missing(part: str) -> list[Run]:
    """The runs of a part of the plan that have no line yet."""
    lines = data.read_jsonl(HERE / f"{part}.jsonl")
    done = {Run(line["name"], (), line["seed"], line["careless"]).key for line in lines}
    return [run for run in PLANS[part]() if run.key not in done]


# -- one run --------------------------------------------------------------------------------------


def do(run: Run, lines: Path) -> None:
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
    if run.name == "prm cubed":
        metrics.query_effect = cubed
    if run.name.startswith("off by one"):
        toy.careless = off_by_one

    argv = [*COMMON, *run.flags, "--seed", str(run.seed), "--out", str(out)]
    bstar.main(argv)
    last = {}
    if run.careless == 0.2:
        last = at_the_end(parse_config(argv), out / "policy")
    append(record(run, out, last, time.perf_counter() - start), lines)
    shutil.rmtree(out)


def in_two_steps(draw_queries: Callable) -> Callable:
    """bstar.draw_queries, which also sets T: 0.5 in iteration 1, then 1.1."""

    def draw(train: list, cfg: Config, t: int) -> list:
        cfg.temperature = 0.5 if t == 1 else 1.1
        return draw_queries(train, cfg, t)

    return draw


def cubed(n_sel, n_correct, n_star: int) -> np.ndarray:
    """min(n' / n*, 1) * (n' / n)^3: Eq. 2 with a higher price on wrong answers."""
    precision = np.asarray(n_correct, float) / np.maximum(n_sel, 1)
    return np.minimum(np.asarray(n_correct) / n_star, 1) * precision**3


def off_by_one(words: list[str], share: float, rng: random.Random) -> list[str]:
    """The words of a walk; unless share is 0, each number after +7 is one too high."""
    written = careless(words, 0.0, rng)  # as it draws from rng, too: the base's texts stay
    for at in range(1, len(words), 2):
        if share and words[at - 1] == "+7":
            written[at] = str(min(int(words[at]) + 1, toy.TOP))
    return written


def at_the_end(cfg: Config, policy: Path) -> dict:
    """The last policy's numbers at T = 1; for sft also those of iteration 0's policy."""
    setup = set_up(cfg)
    numbers = sampled(cfg, setup, policy, "last")
    if cfg.method == "sft":
        [first] = sft(cfg, setup.base, setup.human, setup.tokenizer, stages=1)
        numbers["start"] = sampled(cfg, setup, first, "start")
    if cfg.reward == "answer+prm":
        folder = train_prm.ready(cfg, setup).parent
        numbers["prm"] = json.loads((folder / "prm.json").read_text())
    return numbers


def sampled(cfg: Config, setup: Setup, model: Path, name: str) -> dict:
    """pass@32, pass@32-4, the share right, and different right walks of 32 a question, at T = 1."""
    queries = setup.splits.tests["walk"][:SAMPLED]
    with setup.engine.awake(load_policy(cfg, model)) as draw:
        groups = draw(queries, 32, 1.0, name)
    rewards.score(queries, groups, cfg.task, "answer")
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
    for row in data.read_jsonl(out / "times.jsonl"):
        if row["phase"] in total:
            total[row["phase"]] += row["seconds"]
    total["all"] = seconds
    rows = data.read_jsonl(out / "metrics.jsonl")
    for row in rows:
        row.pop("prm/calibration", None)  # 30 numbers
    return {
        "name": run.name,
        "seed": run.seed,
        "careless": run.careless,
        "config": json.loads((out / "config.json").read_text()),
        "metrics": rows,
        "ledger": [short(decision) for decision in data.read_jsonl(out / "ledger.jsonl")],
        "seconds": {phase: round(s, 1) for phase, s in total.items()},
        "last": last,
    }


def short(decision: dict) -> dict:
    """A line of the ledger with two lines of its surface: at the chosen tau, at the chosen T."""
    i = decision["temperatures"].index(decision["temperature"])
    j = decision["taus"].index(decision["tau"])
    kept = ("iter", "temperature", "tau", "qe", "interval", "yield", "unique")
    line = {key: decision[key] for key in kept}
    line["surface"] = [round(row[j], 4) for row in decision["surface"]]
    line["over tau"] = [round(qe, 4) for qe in decision["surface"][i]]
    return line


def append(line: dict, path: Path) -> None:
    """Adds a line to a file; a line that a kill has torn is ended first."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as f:
        if torn:
            f.write("\n")
        f.write(json.dumps(line) + "\n")
        f.flush()
        os.fsync(f.fileno())


# -- all of them ----------------------------------------------------------------------------------


def main() -> None:
    """Runs what is missing, or lists it."""
    os.chdir(ROOT)
    parts = [part for part in PLANS if part in sys.argv] or list(PLANS)
    if "--list" in sys.argv:
        for part in parts:
            for run in missing(part):
                print(run.key)
        return
    import torch  # noqa: F401  read once: the children are forks and have it
    import transformers  # noqa: F401

    for part in parts:
        for run in missing(part):
            in_a_child(run, HERE / f"{part}.jsonl")


def in_a_child(run: Run, lines: Path) -> None:
    """Does a run in a process of its own; says how long it took, or that it failed."""
    start = time.time()
    child = multiprocessing.get_context("fork").Process(target=do, args=(run, lines))
    child.start()
    child.join()
    note = "" if child.exitcode == 0 else f" failed, see {run.folder}.log"
    print(f"{time.strftime('%H:%M:%S')} {run.key} {time.time() - start:.0f} s{note}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
