"""Every table and figure of RESULTS.md and of the README's first screen.

    results/walk/runs.jsonl, results/toy-*/metrics.jsonl -> Markdown tables, docs/*.png

    python results/tables.py             prints the tables
    python results/tables.py --write     puts them into RESULTS.md, and draws the two figures

± is the standard error over seeds. Differences are paired by seed; in brackets stands the 95 %
interval of their mean, by Student's t. A row says how many seeds it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import figures
import numpy as np
import pandas as pd
import stories
import tau
from lines import LINES, ROOT, Lines, Runs, at, gain, law_runs, length, load, markdown, show

CARELESS = 0.2  # share of wrong words in the human solutions, of all tables but the last
METHODS = ("sft", "rest-em", "iterative-rft", "online-rft", "bstar")
FIXED = ("T 0.5", "T 0.7", "T 0.9", "T 1.1", "T 1.2")  # and online-rft has T 1.0
UNCAPPED = (*METHODS, "two steps", *FIXED)
ORDER = (*UNCAPPED, *(f"{name} cap 6" for name in UNCAPPED))
LABELS = {"online-rft": "online-rft (T 1.0)", "two steps": "two steps (T 0.5, then 1.1)"}

PAIRS = (
    ("bstar", "online-rft"),
    ("bstar", "online-rft cap 6"),
    ("bstar cap 6", "online-rft cap 6"),
    ("online-rft cap 6", "online-rft"),
    ("two steps", "online-rft"),
    ("bstar", "two steps"),
    ("rest-em", "online-rft"),
    ("iterative-rft", "online-rft"),
    ("bstar", "rest-em"),
    ("bstar", "rest-em cap 6"),
    ("rest-em cap 6", "rest-em"),
    ("iterative-rft cap 6", "iterative-rft"),
    ("bstar", "iterative-rft cap 6"),
)


def listed(runs: Runs) -> dict[str, Lines]:
    """The variants that have run, in the tables' order."""
    return {name: runs[name] for name in ORDER if name in runs}


def name_of(variant: str) -> str:
    """The variant as the tables call it."""
    return LABELS.get(variant, variant)


def best_fixed(runs: Runs) -> str:
    """The fixed T of the highest mean pass@1, among those with the most seeds; in hindsight."""
    there = [name for name in ("online-rft", *FIXED) if name in runs]
    # seeds first: a T that ran with few of them could lead by luck
    return max(there, key=lambda name: (len(runs[name]), at(runs[name], "pass@1").mean()))


# -- walks: the tables ----------------------------------------------------------------------------


def results_table(runs: Runs) -> str:
    """The last policy of each variant, and its paired differences."""
    best = best_fixed(runs)
    T = best.removeprefix("T ").replace("online-rft", "1.0")
    variants = {name_of(name): name for name in listed(runs)}
    variants[f"best fixed T in hindsight: {T}"] = best
    # all variants start from the same policy, and sft has sampled from it
    start = at(runs["online-rft"], "pass@1", 0)
    samples = samples_of([line["last"]["start"] for line in runs.get("sft", {}).values()])
    rows = [["start (iteration 0)", len(start), show(start), "", "", *samples]]
    for label, variant in variants.items():
        score = at(runs[variant], "pass@1")
        # "" to itself: a difference of 0 with an interval of 0 would read as a finding
        row = [label, len(score), show(score)]
        for other in ("online-rft", best):
            row.append("" if variant == other else gain(score, at(runs[other], "pass@1")))
        rows.append([*row, *samples_of([line["last"] for line in runs[variant].values()])])
    header = ["run", "seeds", "pass@1", "less online-rft", "less best fixed T"]
    return markdown([*header, "pass@32", "pass@32-4", "unique right"], rows)


def samples_of(policies: list[dict]) -> list[str]:
    """What the 32 samples a question of some seeds' policies say."""
    digits = {"pass@32": 1, "pass@32-4": 1, "unique": 2}
    values = pd.DataFrame(policies, columns=list(digits), dtype=float)
    return [show(values[key], n) for key, n in digits.items()]


def comparisons_table(runs: Runs) -> str:
    """The comparisons that the plan names, and what the cap does by itself."""
    best = best_fixed(runs)
    pairs = [*PAIRS, ("bstar", best), ("bstar", f"{best} cap 6")]
    rows = []
    for a, b in dict.fromkeys(pairs):  # T 1.0 may be the best
        if a in runs and b in runs:
            x, y = at(runs[a], "pass@1"), at(runs[b], "pass@1")
            difference = (x - y).dropna()
            n, greater = len(difference), (difference > 0).sum()
            label = f"{name_of(a)} less {name_of(b)}"
            rows.append([label, n, gain(x, y), f"{greater} of {n}"])
    return markdown(["pass@1, last iteration", "seeds", "mean difference", "greater"], rows)


def iterations_table(runs: Runs) -> str:
    """pass@1 by iteration; those of sft are its epochs."""
    rows = []
    for variant, lines in listed(runs).items():
        n = length(lines)
        scores = [show(at(lines, "pass@1", i)) for i in range(n)]
        rows.append([name_of(variant), len(lines), *scores, *[""] * (7 - n)])
    return markdown(["pass@1 after iteration", "seeds", *map(str, range(7))], rows)


def pools_table(runs: Runs) -> str:
    """What was selected in the first and the last iteration, and the T of each iteration."""
    rows = []
    for variant, lines in listed(runs).items():
        if variant != "sft":
            row = [name_of(variant), len(lines)]
            for key, digits in (("kept", 0), ("repeats", 1), ("pool/correct", 1)):
                row += [show(at(lines, key, i), digits) for i in (1, -1)]
            rows.append([*row, temperatures(lines)])
    header = ["run", "seeds", "kept, first", "kept, last", "R, first", "R, last"]
    return markdown([*header, "% right, first", "% right, last", "T by iteration"], rows)


def temperatures(lines: Lines) -> str:
    """The mean T of each iteration, or the one T."""
    means = [at(lines, "temperature", i).mean() for i in range(1, length(lines))]
    if len(set(means)) == 1:
        return f"{means[0]:.1f}"
    return " ".join(f"{T:.2f}" for T in means)


# -- when does balancing pay ----------------------------------------------------------------------


def law_table(every: dict[float, Runs]) -> str:
    """Gain of bstar over T = 1.0 as the base gets more careless: R of T = 1.0 rises."""
    rows = []
    for share, runs in law_runs(every).items():
        names = ("bstar", "online-rft", "bstar cap 6", "online-rft cap 6")
        bstar, online, both, capped = [at(runs.get(name, {}), "pass@1") for name in names]
        start, R = at(runs["online-rft"], "pass@1", 0), at(runs["online-rft"], "repeats", 1)
        row = [f"{100 * share:.0f} %", len(bstar), show(start), show(R)]
        row += [f"{yield_ratio(runs['bstar']):.1f}", show(online)]
        rows.append([*row, gain(bstar, online), gain(capped, online), gain(both, capped)])
    header = ["wrong words", "seeds", "start", "R at T 1.0", "yield 0.5 / 1.0", "T 1.0"]
    gains = ["gain of bstar", "gain of the cap", "gain of bstar, both capped"]
    return markdown([*header, *gains], rows)


def yield_ratio(lines: Lines) -> float:
    """Share right at T = 0.5 over share right at T = 1.0, in the first balances of bstar."""
    yields = np.array([line["ledger"][0]["yield"] for line in lines.values()])
    # of sums, not a mean of ratios: one seed's yield at 1.0 is near 0
    cool, warm = yields[:, [0, 5]].sum(axis=0)  # at 0.5, 0.6, ..., 1.2
    return cool / warm if warm else np.inf


# -- RESULTS.md -----------------------------------------------------------------------------------


def tables(path: Path = LINES) -> dict[str, str]:
    """The name of each table's place in RESULTS.md -> the table."""
    every = load(path)
    runs = every[CARELESS]
    return {
        "walk": results_table(runs),
        "comparisons": comparisons_table(runs),
        "iterations": iterations_table(runs),
        "pools": pools_table(runs),
        "repeats": law_table(every),
        "stories": stories.table(),
        "prm": stories.prm_table(),
        **tau.tables(),
    }


def main() -> None:
    """Prints the tables, or writes them into RESULTS.md and draws the figures."""
    printed = tables()
    if "--write" not in sys.argv:
        for name, table in printed.items():
            print(f"{name}\n\n{table}\n")
        return
    path = ROOT / "RESULTS.md"
    text = path.read_text(encoding="utf-8")
    for name, table in printed.items():
        before, place, rest = text.partition(f"<!-- table {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{place}{table}\n{end}{after}"
    path.write_text(text, encoding="utf-8")
    every = load()
    figures.draw_walk(every[CARELESS], ROOT / "docs" / "walk.png")
    figures.draw_law(every, ROOT / "docs" / "repeats.png")


if __name__ == "__main__":
    main()
