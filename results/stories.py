"""The stories' tables of RESULTS.md; results/tables.py prints them with the others.

results/toy-*/metrics.jsonl, results/toy-prm/*.json -> Markdown tables
"""

from __future__ import annotations

import json

import pandas as pd
from lines import ROOT, Lines, at, markdown, read_jsonl, show

HERE = ROOT / "results"

SEEDS = (1, 2, 3)
RUNS = (
    "sft-answer",
    "rest-em-answer",
    "rest-em-answer+prm",
    "iterative-rft-answer",
    "iterative-rft-answer+prm",
    "online-rft-answer",
    "online-rft-answer+prm",
    "bstar-answer",
    "bstar-answer+prm",
    "bstar-answer+oracle",
    "fixed-T0.7-tau0.6",
    "fixed-T0.7-tau1.0",
    "fixed-T1.0-tau1.0",
)
COLUMNS = {  # metric of the last iteration -> digits
    "pass@1": 1,
    "sound@1": 1,
    "pass@32-4": 1,
    "reward@32-4": 1,
    "selected/false_reasoning": 2,
    "temperature": 2,
    "tau": 2,
}
TRUTH = {  # key of results/toy-prm/*.json -> what it is
    "step_auc": "AUC of step scores, fresh solutions of the SFT policy",
    "auc_sound": 'AUC of the lowest step score for "every step right"',
    "labels_agree": "hard labels that agree with the truth",
}


def load(run: str) -> Lines:
    """seed -> the metrics of a variant."""
    folders = {seed: HERE / f"toy-{run}-{seed}" for seed in SEEDS}
    return {seed: {"metrics": read_jsonl(x / "metrics.jsonl")} for seed, x in folders.items()}


def table() -> str:
    """The last iteration of each variant, and pass@1 at the start and after the first."""
    rows = []
    for run in RUNS:
        lines = load(run)
        first = [show(at(lines, "pass@1", i)) for i in (0, 1)]
        last = [show(at(lines, key), digits) for key, digits in COLUMNS.items()]
        rows.append([run, *first, *last])
    return markdown(["3 seeds", "pass@1 at 0", "at 1", *COLUMNS], rows)


def prm_table() -> str:
    """The PRM against the exact step checker, at its start and on the pools of bstar."""
    prms = pd.DataFrame([json.loads((HERE / f"toy-prm/{seed}.json").read_text()) for seed in SEEDS])
    rows = [[name, show(prms[key], 3)] for key, name in TRUTH.items()]
    pools = load("bstar-answer+prm")
    for i, when in ((1, "first"), (-1, "last")):
        auc = show(at(pools, "prm/step_auc", i), 3)
        rows.append([f"AUC of step scores, pool of bstar's {when} iteration", auc])
        right = show(at(pools, "selected/correct", i), 0)
        rows.append([f"% right among those selected, {when} iteration", right])
    return markdown(["the learned PRM", "3 seeds"], rows)
