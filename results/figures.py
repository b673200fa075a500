"""The figures of RESULTS.md's section on the toy that are not in its table: python results/figures.py"""
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import metrics

SEEDS = (1, 2, 3)


def rows(name: str, seed: int) -> list[dict]:
    """Iterations 0, 1, ... of a run"""
    return metrics.read_jsonl(HERE / f"toy-{name}-{seed}" / "metrics.jsonl")


def said(values, digits: int = 2) -> str:
    """mean ± standard error over seeds"""
    return f"{np.mean(values):.{digits}f} ± {metrics.standard_error(values):.{digits}f}"


def at(name: str, key: str, i: int) -> list[float]:
    """A metric of iteration i (-1: the last) for each seed"""
    return [rows(name, s)[i][key] for s in SEEDS]


def over(name: str, key: str) -> list[float]:
    """Its mean over the iterations from 1 on, for each seed"""
    return [float(np.mean([r[key] for r in rows(name, s)[1:]])) for s in SEEDS]


print("the start, iteration 0:", {k: said(at("bstar-answer", k, 0), 2 if "f" in k else 1) for k in ("pass@1", "pass@32", "sound@1", "false_reasoning")})
print("sft after two epochs, 32 steps:", {k: said(at("sft-answer", k, 1), 1) for k in ("pass@1", "pass@32", "sound@1")})
gap = {k: [np.mean(np.subtract(at(f"bstar-answer+{a}", k, -1), at("bstar-answer", k, -1))) for a in ("prm", "oracle")] for k in ("pass@1", "sound@1")}
print("share of the distance from answer to oracle that the PRM closes (bstar):", {k: f"{100 * a / b:.0f} %" for k, (a, b) in gap.items()})
for a, b in (("bstar-answer+prm", "bstar-answer"), ("online-rft-answer+prm", "online-rft-answer"), ("bstar-answer", "online-rft-answer"),
             ("bstar-answer+prm", "online-rft-answer+prm")):
    print(f"{a} less {b}:", {k: said(np.subtract(at(a, k, -1), at(b, k, -1)), 1) for k in ("pass@1", "sound@1")})
print("\nfalse reasoning among the selected | iteration 1 | mean of all")
for name in ("bstar-answer", "bstar-answer+prm", "online-rft-answer", "online-rft-answer+prm"):
    print(f"{name} | {said(at(name, 'selected/false_reasoning', 1))} | {said(over(name, 'selected/false_reasoning'))}")
print("\nthe PRM on fresh SFT solutions, seeds", SEEDS)
for key in ("step_auc", "auc_sound", "auc", "labels_agree"):
    print(key, [json.loads((HERE / f"toy-prm/{s}.json").read_text())[key] for s in SEEDS])
print("\non the pools | iteration 1 | the last")
for name in ("bstar-answer+prm", "online-rft-answer+prm"):
    for key, digits in (("prm/step_auc", 3), ("prm/auc", 3), ("prm/false_admitted", 2), ("selected/correct", 0)):
        print(f"{name} {key} | {said(at(name, key, 1), digits)} | {said(at(name, key, -1), digits)}")
print("\nthe balance | mean T | decisions at the lowest tau offered | decisions whose query effect at that tau is lowest at the lowest T")
for name in ("bstar-answer", "bstar-answer+prm"):
    ledger = [d for s in SEEDS for d in metrics.read_jsonl(HERE / f"toy-{name}-{s}" / "ledger.jsonl")]
    cold = sum(int(np.argmin(np.array(d["surface"])[:, d["taus"].index(d["tau"])])) == 0 for d in ledger)
    print(f"{name} | {said(over(name, 'temperature'))} | {sum(d['tau'] == d['taus'][0] for d in ledger)} of {len(ledger)} | {cold} of {len(ledger)}")
hot = [(r["temperature"], r["pool/false_reasoning"]) for name in ("bstar-answer", "bstar-answer+prm") for s in SEEDS for r in rows(name, s)[1:]]
for low, high in ((0, 0.95), (0.95, 1.15), (1.15, 2)):
    print(f"false reasoning in pools at {low} < T <= {high}:", said([f for T, f in hot if low < T <= high]), f"({sum(low < T <= high for T, _ in hot)} pools)")
