"""Every table and figure of RESULTS.md and of the README's first screen.

    results/walk/runs.jsonl, results/toy-*/metrics.jsonl -> Markdown tables, docs/*.png

    python results/tables.py             prints the tables
    python results/tables.py --write     puts them into RESULTS.md, and draws the two figures

± is the standard error over seeds. Differences are paired by seed; in brackets stands the 95 %
interval of their mean, by Student's t. A row says how many seeds it has.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import figures
import numpy as np
import stories
from lines import (
    LINES,
    ROOT,
    Lines,
    Runs,
    at,
    difference,
    gain,
    law_runs,
    law_shares,
    load,
    markdown,
    of_last,
    readings,
    show,
)

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


def listed(runs: Runs) -> list[str]:
    """The variants that have run, in the tables' order."""
    return [name for name in ORDER if name in runs]


def name_of(variant: str) -> str:
    """The variant as the tables call it."""
    return LABELS.get(variant, variant)


def best_fixed(runs: Runs) -> str:
    """The fixed T of the highest mean pass@1, among those with the most seeds; in hindsight."""
    there = [name for name in ("online-rft", *FIXED) if name in runs]
    most = max(len(runs[name]) for name in there)
    full = [name for name in there if len(runs[name]) == most]
    return max(full, key=lambda name: np.mean(list(at(runs[name], "pass@1").values())))


# -- walks: the tables ----------------------------------------------------------------------------


def results_table(runs: Runs) -> str:
    """The last policy of each variant, and its paired differences."""
    best = best_fixed(runs)
    online, hindsight = at(runs["online-rft"], "pass@1"), at(runs[best], "pass@1")
    header = ["run", "seeds", "pass@1", "less online-rft", "less best fixed T"]
    rows = [start_row(runs)]
    for variant in listed(runs):
        rows.append(result_row(name_of(variant), runs[variant], online, hindsight))
    label = f"best fixed T in hindsight: {best.removeprefix('T ').replace('online-rft', '1.0')}"
    rows.append(result_row(label, runs[best], online, hindsight))
    return markdown([*header, "pass@32", "pass@32-4", "unique right"], rows)


def start_row(runs: Runs) -> list[str]:
    """Iteration 0, from which all variants start."""
    lines = runs["online-rft"]
    row = ["start (iteration 0)", len(lines), show(at(lines, "pass@1", 0)), "", ""]
    starts = {seed: line["last"]["start"] for seed, line in runs.get("sft", {}).items()}
    for key, digits in (("pass@32", 1), ("pass@32-4", 1), ("unique", 2)):
        row.append(show({seed: start[key] for seed, start in starts.items()}, digits))
    return row


def result_row(label: str, lines: Lines, online: dict, hindsight: dict) -> list:
    """A variant's row of the first table."""
    score = at(lines, "pass@1")
    row = [label, len(lines), show(score)]
    for other in (online, hindsight):
        row.append("" if other == score else gain(score, other))
    row += [show(of_last(lines, "pass@32")), show(of_last(lines, "pass@32-4"))]
    return [*row, show(of_last(lines, "unique"), 2)]


def comparisons_table(runs: Runs) -> str:
    """The comparisons that the plan names, and what the cap does by itself."""
    best = best_fixed(runs)
    pairs = [*PAIRS, ("bstar", best), ("bstar", f"{best} cap 6")]
    rows = []
    for a, b in dict.fromkeys(pairs):  # T 1.0 may be the best
        if a in runs and b in runs:
            x, y = at(runs[a], "pass@1"), at(runs[b], "pass@1")
            differences = difference(x, y)
            n, greater = len(differences), sum(d > 0 for d in differences)
            label = f"{name_of(a)} less {name_of(b)}"
            rows.append([label, n, gain(x, y), f"{greater} of {n}"])
    return markdown(["pass@1, last iteration", "seeds", "mean difference", "greater"], rows)


def iterations_table(runs: Runs) -> str:
    """pass@1 by iteration; those of sft are its epochs."""
    rows = []
    for variant in listed(runs):
        lines = runs[variant]
        n = min(len(line["metrics"]) for line in lines.values())
        scores = [show(at(lines, "pass@1", i)) for i in range(n)]
        rows.append([name_of(variant), len(lines), *scores, *[""] * (7 - n)])
    return markdown(["pass@1 after iteration", "seeds", *map(str, range(7))], rows)


def pools_table(runs: Runs) -> str:
    """What was selected in the first and the last iteration, and the T of each iteration."""
    rows = []
    for variant in [name for name in listed(runs) if name != "sft"]:
        lines = runs[variant]
        row = [name_of(variant), len(lines)]
        row += [show(at(lines, "kept", i), 0) for i in (1, -1)]
        row += [show(readings(lines, i)) for i in (1, -1)]
        row += [show(at(lines, "pool/correct", i)) for i in (1, -1)]
        rows.append([*row, temperatures(lines)])
    header = ["run", "seeds", "kept, first", "kept, last", "R, first", "R, last"]
    return markdown([*header, "% right, first", "% right, last", "T by iteration"], rows)


def temperatures(lines: Lines) -> str:
    """The mean T of each iteration, or the one T."""
    n = min(len(line["metrics"]) for line in lines.values())
    means = [np.mean(list(at(lines, "temperature", i).values())) for i in range(1, n)]
    if len(set(means)) == 1:
        return f"{means[0]:.1f}"
    return " ".join(f"{T:.2f}" for T in means)


# -- when does balancing pay ----------------------------------------------------------------------


def law_table(every: dict[float, Runs]) -> str:
    """Gain of bstar over T = 1.0 as the base gets more careless: R of T = 1.0 rises."""
    rows = []
    for share in law_shares(every):
        runs = law_runs(every[share])
        online, bstar = runs["online-rft"], runs["bstar"]
        capped, both = runs.get("online-rft cap 6", {}), runs.get("bstar cap 6", {})
        row = [f"{share:.0%}".replace("%", " %"), len(bstar), show(at(online, "pass@1", 0))]
        row += [show(readings(online, 1)), f"{yield_ratio(bstar):.1f}", show(at(online, "pass@1"))]
        row += [gain(at(bstar, "pass@1"), at(online, "pass@1"))]
        row += [gain(at(capped, "pass@1"), at(online, "pass@1"))]
        rows.append([*row, gain(at(both, "pass@1"), at(capped, "pass@1"))])
    header = ["wrong words", "seeds", "start", "R at T 1.0", "yield 0.5 / 1.0", "T 1.0"]
    gains = ["gain of bstar", "gain of the cap", "gain of bstar, both capped"]
    return markdown([*header, *gains], rows)


def yield_ratio(lines: Lines) -> float:
    """Share right at T = 0.5 over share right at T = 1.0, in the first balances of bstar."""
    cool, warm = 0.0, 0.0
    for line in lines.values():
        share = line["ledger"][0]["yield"]  # at 0.5, 0.6, ..., 1.2
        cool += share[0]
        warm += share[5]
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
    }


def insert(text: str, name: str, table: str) -> str:
    """The text with the table between <!-- table NAME --> and <!-- end -->."""
    place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
    return place.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


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
        text = insert(text, name, table)
    path.write_text(text, encoding="utf-8")
    every = load()
    figures.draw_walk(every[CARELESS], ROOT / "docs" / "walk.png")
    figures.draw_law(every, ROOT / "docs" / "repeats.png")


if __name__ == "__main__":
    main()
