"""The tables of the second part of results/walk/PLAN.md; results/tables.py prints them.

results/walk/{runs,tau}.jsonl -> Markdown tables
"""

from __future__ import annotations

import pandas as pd
from lines import LINES, Lines, Runs, among, at, gain, length, load, markdown, show

ROWS = {  # variant -> how the tables call it
    "prm online-rft": "T 1.0, tau 0.0",
    "prm bstar": "bstar: T and tau balanced",
    "prm tau alone": "tau balanced, T 1.0",
    "prm T alone": "T balanced, tau 0.0",
    "prm tau 0.4": "T 1.0, tau 0.4",
    "prm tau 0.9": "T 1.0, tau 0.9",
    "prm tau 0.4, T balanced": "T balanced, tau 0.4",
    "prm tau 0.9, T balanced": "T balanced, tau 0.9",
    "prm cubed": "bstar with the precision cubed",
}
ANSWER = ("online-rft", "online-rft cap 6", "bstar")  # of runs.jsonl, for comparison
OFF_BY_ONE = ("online-rft", "online-rft cap 6", "bstar", "bstar cap 6")


def tables() -> dict[str, str]:
    """The name of each table's place in RESULTS.md -> the table."""
    first, second = load(LINES), load(LINES.with_name("tau.jsonl"))
    prm, answer = second[0.2], first[0.2]
    return {
        "tau": tau_table(prm, answer),
        "tau-pools": pools_table(prm),
        "tau-prm": prm_table(prm),
        "systematic": systematic_table(second[1.0], first[0.1]),
    }


def tau_table(prm: Runs, answer: Runs) -> str:
    """pass@1 of each setting, paired with (1.0, 0.0) and with bstar, both with the PRM."""
    online, bstar = at(prm["prm online-rft"], "pass@1"), at(prm["prm bstar"], "pass@1")
    rows = []
    for name, label in ROWS.items():
        if name in prm:
            rows.append(tau_row(label, prm[name], online, bstar))
    for name in ANSWER:
        shared = among(answer[name], set(bstar.index))
        rows.append(tau_row(f"answer reward: {name}", shared, online, bstar))
    header = ["run", "seeds", "pass@1", "less (1.0, 0.0)", "less bstar", "pass@32"]
    return markdown(header, rows)


def tau_row(label: str, lines: Lines, online: pd.Series, bstar: pd.Series) -> list:
    """One setting: its score, and its gain over two others; none over itself."""
    score = at(lines, "pass@1")
    row = [label, len(lines), show(score)]
    for other in (online, bstar):
        row.append("" if other.equals(score) else gain(score, other))
    return [*row, show(pd.Series([line["last"]["pass@32"] for line in lines.values()]))]


def pools_table(prm: Runs) -> str:
    """What was selected in the first and the last iteration, and the T and tau of each."""
    rows = []
    for name in [name for name in ROWS if name in prm]:
        lines = prm[name]
        row = [ROWS[name], len(lines)]
        for key, digits in (("kept", 0), ("repeats", 1), ("selected/correct", 0)):
            row += [show(at(lines, key, i), digits) for i in (1, -1)]
        rows.append([*row, course(lines, "temperature"), course(lines, "tau")])
    header = ["run", "seeds", "kept, first", "kept, last", "R, first", "R, last"]
    return markdown([*header, "% right, first", "% right, last", "T", "tau"], rows)


def course(lines: Lines, key: str) -> str:
    """The mean of each iteration, or the one value that all of them have."""
    means = [at(lines, key, i).mean() for i in range(1, length(lines))]
    if len(set(means)) == 1:
        return f"{means[0]:.1f}"
    return " ".join(f"{mean:.2f}" for mean in means)


def prm_table(prm: Runs) -> str:
    """What the PRM is worth on fresh solutions, and in the first and the last iteration's pools."""
    bstar, online = prm["prm bstar"], prm["prm online-rft"]
    rows = []
    for key, name in {
        "step_auc": "AUC of step scores, fresh solutions of the SFT policy, T 0.7",
        "auc": "AUC of the lowest step score for a right answer, the same",
        "labels_agree": "hard labels that agree with the truth",
    }.items():
        fresh = [line["last"]["prm"][key] for line in bstar.values()]
        rows.append([name, show(pd.Series(fresh), 3)])
    for label, lines in {"bstar": bstar, "(1.0, 0.0)": online}.items():
        for key, name in {"step_auc": "step scores", "auc": "a right answer"}.items():
            ends = [show(at(lines, f"prm/{key}", i), 3) for i in (1, -1)]
            rows.append([f"AUC of {name}, pools of {label}, first; last", "; ".join(ends)])
    return markdown(["the learned PRM", f"{len(bstar)} seeds"], rows)


def systematic_table(off_by_one: Runs, random: Runs) -> str:
    """One move always computed wrongly, beside as many wrong words at random, answer reward."""
    rows = []
    for label, prefix, runs in (
        ("after +7 one too high", "off by one ", off_by_one),
        ("10 % of the words at random", "", random),
    ):
        lines = {name: among(runs[prefix + name], {1, 2, 3, 4}) for name in OFF_BY_ONE}
        score = {name: at(of_one, "pass@1") for name, of_one in lines.items()}
        row = [label, len(score["bstar"]), show(at(lines["bstar"], "pass@1", 0))]
        row.append(show(at(lines["online-rft"], "repeats", 1)))
        row += [show(score[name]) for name in OFF_BY_ONE]
        row.append(gain(score["bstar"], score["online-rft"]))
        rows.append([*row, gain(score["bstar cap 6"], score["online-rft cap 6"])])
    header = ["wrong in the human solutions", "seeds", "start", "R at T 1.0", *OFF_BY_ONE]
    return markdown([*header, "gain of bstar", "both capped"], rows)


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")
