"""The numbers in RESULTS.md's text on the toy that are not in its table.

results/toy-*/{metrics.jsonl, ledger.jsonl} -> lines on stdout

python results/figures.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import metrics  # noqa: E402

SEEDS = (1, 2, 3)
BSTAR = ("bstar-answer", "bstar-answer+prm")
ONLINE = ("online-rft-answer", "online-rft-answer+prm")
LAST = -1


def rows(name: str) -> pd.DataFrame:
    """All iterations of a run's seeds, by (seed, iter)."""
    frames = {}
    for seed in SEEDS:
        lines = metrics.read_jsonl(HERE / f"toy-{name}-{seed}" / "metrics.jsonl")
        frames[seed] = pd.DataFrame(lines).set_index("iter")
    return pd.concat(frames, names=["seed"])


def at(name: str, key: str, iteration: int) -> pd.Series:
    """A metric of one iteration (-1: the last), a seed a value."""
    return rows(name)[key].groupby("seed").nth(iteration).droplevel("iter")


def mean_over(name: str, key: str) -> pd.Series:
    """A metric's mean over the iterations from 1 on, a seed a value."""
    return rows(name)[key].drop(index=0, level="iter").groupby("seed").mean()


def text(values: pd.Series, digits: int = 2) -> str:
    """Mean ± standard error."""
    return f"{values.mean():.{digits}f} ± {values.sem():.{digits}f}"


def show_start() -> None:
    print("the start, iteration 0:")
    for key, digits in (("pass@1", 1), ("pass@32", 1), ("sound@1", 1), ("false_reasoning", 2)):
        print(f"  {key} {text(at('bstar-answer', key, 0), digits)}")
    print("sft after two epochs, 32 steps:")
    for key in ("pass@1", "pass@32", "sound@1"):
        print(f"  {key} {text(at('sft-answer', key, 1), 1)}")


def show_differences() -> None:
    print("share of the distance from answer to oracle that the PRM closes (bstar):")
    for key in ("pass@1", "sound@1"):
        answer, prm, oracle = (
            at(f"bstar-{reward}", key, LAST) for reward in ("answer", "answer+prm", "answer+oracle")
        )
        print(f"  {key} {(prm - answer).mean() / (oracle - answer).mean():.0%}")
    for a, b in (BSTAR[::-1], ONLINE[::-1], (BSTAR[0], ONLINE[0]), (BSTAR[1], ONLINE[1])):
        for key in ("pass@1", "sound@1"):
            print(f"{a} less {b}: {key} {text(at(a, key, LAST) - at(b, key, LAST), 1)}")


def show_process_reward() -> None:
    print("\nfalse reasoning among the selected | iteration 1 | mean of all")
    key = "selected/false_reasoning"
    for name in BSTAR + ONLINE:
        print(f"{name} | {text(at(name, key, 1))} | {text(mean_over(name, key))}")
    print(f"\nthe PRM on fresh SFT solutions, seeds {SEEDS}")
    prms = [json.loads((HERE / f"toy-prm/{seed}.json").read_text()) for seed in SEEDS]
    for key in ("step_auc", "auc_sound", "auc", "labels_agree"):
        print(key, [prm[key] for prm in prms])
    print("\non the pools | iteration 1 | the last")
    digits = {"prm/step_auc": 3, "prm/auc": 3, "prm/false_admitted": 2, "selected/correct": 0}
    for name in (BSTAR[1], ONLINE[1]):
        for key, n in digits.items():
            print(f"{name} {key} | {text(at(name, key, 1), n)} | {text(at(name, key, LAST), n)}")


def show_balance() -> None:
    print("\nthe balance | mean T | at the lowest tau | there the effect is lowest at the lowest T")
    for name in BSTAR:
        ledger = []
        for seed in SEEDS:
            ledger += metrics.read_jsonl(HERE / f"toy-{name}-{seed}" / "ledger.jsonl")
        lowest = sum(d["tau"] == d["taus"][0] for d in ledger)
        cold = 0
        for d in ledger:
            effects = np.array(d["surface"])[:, d["taus"].index(d["tau"])]  # (G_T,)
            cold += int(effects.argmin() == 0)
        T = text(mean_over(name, "temperature"))
        print(f"{name} | {T} | {lowest} of {len(ledger)} | {cold} of {len(ledger)}")
    pools = pd.concat([rows(name).drop(index=0, level="iter") for name in BSTAR])
    bands = pd.cut(pools["temperature"], [0, 0.95, 1.15, 2])
    for band, pool in pools.groupby(bands, observed=True):
        false = pool["pool/false_reasoning"]
        print(f"false reasoning in pools at T in {band}: {text(false)} ({len(false)} pools)")


if __name__ == "__main__":
    show_start()
    show_differences()
    show_process_reward()
    show_balance()
