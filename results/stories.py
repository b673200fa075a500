"""The stories' tables of RESULTS.md; results/tables.py prints them with the others.

results/toy-*/metrics.jsonl, results/toy-prm/*.json -> Markdown tables
"""

from __future__ import annotations

import json

from lines import ROOT, markdown, read_jsonl, show

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


def values(run: str, key: str, iteration: int = -1) -> dict[int, float]:
    """seed -> a metric of one iteration; empty where the run has no such metric."""
    numbers = {}
    for seed in SEEDS:
        rows = read_jsonl(HERE / f"toy-{run}-{seed}" / "metrics.jsonl")
        if rows[iteration].get(key) is not None:
            numbers[seed] = rows[iteration][key]
    return numbers


def table() -> str:
    """The last iteration of each variant, and pass@1 at the start and after the first."""
    rows = []
    for run in RUNS:
        first = [show(values(run, "pass@1", i), 1) for i in (0, 1)]
        last = [show(values(run, key), digits) for key, digits in COLUMNS.items()]
        rows.append([run, *first, *last])
    return markdown(["3 seeds", "pass@1 at 0", "at 1", *COLUMNS], rows)


def prm_table() -> str:
    """The PRM against the exact step checker, at its start and on the pools of bstar."""
    prms = {seed: json.loads((HERE / "toy-prm" / f"{seed}.json").read_text()) for seed in SEEDS}
    rows = []
    names = {
        "step_auc": "AUC of step scores, fresh solutions of the SFT policy",
        "auc_sound": 'AUC of the lowest step score for "every step right"',
        "labels_agree": "hard labels that agree with the truth",
    }
    for key, name in names.items():
        rows.append([name, show({seed: prm[key] for seed, prm in prms.items()}, 3)])
    for i in (1, -1):
        when = {1: "first", -1: "last"}[i]
        auc = show(values("bstar-answer+prm", "prm/step_auc", i), 3)
        rows.append([f"AUC of step scores, pool of bstar's {when} iteration", auc])
        right = show(values("bstar-answer+prm", "selected/correct", i), 0)
        rows.append([f"% right among those selected, {when} iteration", right])
    return markdown(["the learned PRM", "3 seeds"], rows)
