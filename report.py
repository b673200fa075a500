"""What finished runs show: tables, alarms, one page with all figures; and a run's balancing decisions, taken again.

    python report.py RUN [RUN ...]           a Markdown table of the runs, alarms, and report.html with all figures (also as figures/*.png)
    python report.py --replay RUN            its balancing decisions taken again, by other settings if given, and the paper's Fig. 4
"""
from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import re
from html import escape
from math import isfinite
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np

import data
from config import Parser, grid
from data import UserError
from metrics import decide, effects, exact_taus, nearest, read_jsonl


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder, read

class Run(NamedTuple):
    """A run's folder, as much of it as can be read; `config` is without the seed."""
    path: Path
    name: str
    seed: int
    config: dict
    rows: list[dict]                       # metrics.jsonl
    ledger: list[dict]                     # ledger.jsonl
    seconds: list[dict]                    # times.jsonl


def read_run(path: Path) -> Run:
    """Raises UserError where the folder is no run of bstar.py; lines that are torn, or not as ours are, are left out."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        missing = {"method", "reward", "seed", "steps_per_iter"} - config.keys()
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: no readable config.json in it; expected the folder of a run, e.g. runs/toy-bstar-answer-0") from None
    if missing or not _is_number(config["steps_per_iter"]):
        raise UserError(f"{path}: its config.json is not one of bstar.py (no number {', '.join(sorted(missing)) or 'steps_per_iter'})")
    read = lambda name, *keys: [r for r in read_jsonl(path / name) if all(_is_number(r.get(k)) for k in keys)]
    rows = {r["iter"]: r for r in read("metrics.jsonl", "iter", "eval_samples", "S", "pass@1", "val/pass@1")}
    ledger = {d["iter"]: d for d in read("ledger.jsonl", "iter", "temperature", "tau", "qe", "n_star", "ties", "empty") if _is_decision(d)}
    seconds = [r for r in read("times.jsonl", "iter", "seconds") if isinstance(r.get("phase"), str)]
    return Run(path, path.resolve().name, config.pop("seed"), config, [rows[i] for i in sorted(rows)], [ledger[i] for i in sorted(ledger)], seconds)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def _is_decision(d: dict) -> bool:
    try:
        Ts, taus = len(d["temperatures"]), len(d["taus"])
        shapes = [np.array(d[k], dtype=float).shape for k in ("temperatures", "taus", "surface", "interval")]
        return (d["temperature"] in d["temperatures"] and d["tau"] in d["taus"] and d["n_star"] >= 1 and shapes == [(Ts,), (taus,), (Ts, taus), (2,)]
                and all(T in d["temperatures"] and tau in d["taus"] for T, tau in d.get("tied", [])) and set(d["edge"]) <= {"temperature", "tau"})
    except (KeyError, TypeError, ValueError):
        return False


class Group(NamedTuple):
    """Runs that differ in the seed alone."""
    label: str
    runs: list[Run]
    colour: str                            # the same in every figure


def by_seed(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order given; the same seed a second time is not another seed and makes its own group."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        key = json.dumps(run.config, sort_keys=True)
        copies = sum(r.seed == run.seed for (k, _), g in found.items() if k == key for r in g)
        found.setdefault((key, copies), []).append(run)
    name = lambda g: os.path.commonprefix([r.name for r in g]).rstrip("-_ ") or f"{g[0].config['method']} {g[0].config['reward']}"
    label = lambda g: shorten(g[0].name if len(g) == 1 else f"{name(g)}, {len(g)} seeds", 44)
    return [Group(label(g), g, colour) for g, colour in zip(found.values(), itertools.cycle(COLOURS))]


def shorten(text: str, n: int) -> str:
    """A long label without its middle.

    >>> shorten("toy-bstar-answer+oracle-1", 12)
    'toy-b…acle-1'
    """
    return text if len(text) <= n else f"{text[:(n - 1) // 2]}…{text[-(n // 2):]}"


def value(row: dict, key: str) -> float | None:
    """row[key] if it is a number; K and S in the key stand for the run's own, so that runs of different K and S share a column.

    >>> value({"eval_samples": 32, "S": 4, "pass@32-4": 63.5}, "pass@K-S")
    63.5
    """
    x = row.get(key.replace("@K", f"@{row['eval_samples']}").replace("-S", f"-{row['S']}"))
    return x if _is_number(x) else None


def markdown(lines: Sequence[Sequence]) -> str:
    """A Markdown table; the first line is its head.

    >>> print(markdown([["T", "tau"], [0.5, 1]]))
    | T | tau |
    |---|---|
    | 0.5 | 1 |
    """
    head, *rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


COLUMNS = ["val/pass@1", "pass@1", "pass@K", "pass@K-S", "reward@K-S", "prm@K-S", "distinct", "sound@1", "sound@K", "false_reasoning", "selected/false_reasoning",
           "temperature", "tau"]


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: the mean over seeds, then each run's first, last and best iteration (best by validation pass@1, not by the test set).

    Runs whose config.json differs in the seed alone are one group: mean ± standard error of their first and last iterations and of the gain.
    """
    names = [n for n in COLUMNS if any(value(r, n) is not None for run in runs for r in run.rows)]
    lines = [["run", "iteration", *names]]
    several = len({(r["eval_samples"], r["S"]) for run in runs for r in run.rows[:1]}) > 1
    for label, group, _ in by_seed([run for run in runs if run.rows]):
        ends = {n: [(a, b) for r in group if (a := value(r.rows[0], n)) is not None and (b := value(r.rows[-1], n)) is not None] for n in names}
        for when, pick in (("first", lambda a, b: a), ("last", lambda a, b: b), ("gain", lambda a, b: b - a)) if len(group) > 1 else ():
            lines.append([f"mean of {label}", when, *(_mean_cell(n, [pick(*e) for e in ends[n]], len(group)) for n in names)])
    for run in runs:
        name = run.name + (f" (K {run.rows[0]['eval_samples']}, S {run.rows[0]['S']})" if several and run.rows else "")
        ends = [("first", run.rows[0]), ("last", run.rows[-1]), ("best", max(run.rows, key=lambda r: r["val/pass@1"]))] if run.rows else []
        lines += [[name, f"{r['iter']} ({label})", *(_cell(n, value(r, n)) for n in names)] for label, r in ends]
        lines += [] if ends else [[name, "no metrics yet", *[""] * len(names)]]
    return markdown(lines)


def comparison(runs: Sequence[Run], against: Path) -> str:
    """A Markdown table as the paper's Table 1: the last iteration of each group of runs, mean ± standard error over seeds, and under it the
    difference to the group that `against` is in, paired by seed."""
    groups = by_seed([run for run in runs if run.rows])
    last = [{run.seed: run.rows[-1] for run in g.runs} for g in groups]
    base = next((rows for g, rows in zip(groups, last) if against.resolve() in [run.path.resolve() for run in g.runs]), None)
    if base is None:
        raise UserError(f"--against {against}: not one of the runs given, or without metrics")
    names = [n for n in COLUMNS if any(value(r, n) is not None for rows in last for r in rows.values())]
    lines = [["runs", "", *names]]
    for g, rows in zip(groups, last):
        pairs = {n: [(value(r, n), value(base.get(seed, r), n), seed in base) for seed, r in rows.items()] for n in names}
        lines.append([g.label, "last", *(_mean_cell(n, [a for a, *_ in pairs[n] if a is not None], len(rows)) for n in names)])
        if rows is not base and (both := rows.keys() & base.keys()):
            lines.append(["", f"difference, {len(both)} seed{'s' * (len(both) > 1)}",
                          *(_mean_cell(n, [a - b for a, b, ok in pairs[n] if ok and None not in (a, b)], len(both)) for n in names)])
    return markdown(lines)


def _cell(name: str, x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if name in ("distinct", "false_reasoning", "selected/false_reasoning") else f"{x:.1f}"


def _mean_cell(name: str, values: list[float], n: int) -> str:
    return "" if len(values) < n else _cell(name, np.mean(values)) + (f" ± {_cell(name, standard_error(values))}" if n > 1 else "")


def standard_error(values) -> float | np.ndarray:
    """Of the mean over the first axis; 0 of a single value.

    >>> float(standard_error([1.0, 3.0]))
    1.0
    """
    return np.std(values, axis=0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Alarms

def alarms(rows: Sequence[dict], ledger: Sequence[dict]) -> list[str]:
    """What to look at in a run, one line each; the word before the colon is the kind. `rows` of metrics.jsonl, `ledger` of ledger.jsonl.

    reversal  from the first row to the last pass@1 rose while pass@K or distinct equations fell, each beyond noise (see `shift`): the policy
              gets better at what it could do and loses the rest ("self-improvement reversal", Wu et al. 2024)
    drift     prm/auc more than 0.05 below the first one: the PRM no longer knows the policy's solutions   [Sec. 2.3, Observation 3]
    edge      a choice at an end of its grid is better than its neighbour inside, so the best may lie outside
    ties      other grid points are within noise of the choice (95 %, paired bootstrap over the subset's queries)
    """
    return [*_reversal(rows), *_drift(rows), *_edge(ledger), *_ties(ledger)]


def shift(before: float, after: float, n_before: float, n_after: float) -> int:
    """+1 or -1 where a share of n rose or fell by more than two standard errors, else 0.

    Binomial, with a success and a failure added on each side (Agresti & Caffo 2000), so that shares of 0 and 1 have an error too; for a mean
    of shares, as distinct equations are, it is an upper bound. The two sides ask the same questions: unpaired, it errs to silence.

    >>> shift(0.96, 0.82, 200, 200), shift(0.96, 0.93, 200, 200)
    (-1, 0)
    """
    (p, n), (q, m) = (((x * n + 1) / (n + 2), n + 2) for x, n in ((before, n_before), (after, n_after)))
    return int(np.sign(q - p)) * int(abs(q - p) > 2 * (p * (1 - p) / n + q * (1 - q) / m) ** 0.5)


def _reversal(rows: Sequence[dict]) -> Iterator[str]:
    ends = [[value(r, k) for k in ("pass@1", "pass@K", "distinct", "queries", "coverage")] for r in (*rows[:1], *rows[-1:])]
    if not rows or None in ends[0] + ends[1]:
        return
    (one, many, distinct, n, share), (one_, many_, distinct_, n_, share_) = ends
    fell = [f"pass@{rows[0]['eval_samples']} fell {many:.1f} -> {many_:.1f}"] * (shift(many / 100, many_ / 100, n, n_) < 0)
    fell += [f"distinct equations fell {distinct:.2f} -> {distinct_:.2f}"] * (shift(distinct, distinct_, n * share, n_ * share_) < 0)
    if fell and shift(one / 100, one_ / 100, n, n_) > 0:
        yield (f"reversal: from iteration {rows[0]['iter']} to {rows[-1]['iter']} pass@1 rose {one:.1f} -> {one_:.1f} while {' and '.join(fell)}, "
               f"each by more than two standard errors on {n_} questions")


def _drift(rows: Sequence[dict]) -> Iterator[str]:
    seen = [r for r in rows if _is_number(r.get("prm/auc"))]
    if seen and (low := min(seen, key=lambda r: r["prm/auc"]))["prm/auc"] < seen[0]["prm/auc"] - 0.05:
        yield (f"drift: the PRM's AUC fell from {seen[0]['prm/auc']:.3f} (iteration {seen[0]['iter']}) to {low['prm/auc']:.3f} (iteration {low['iter']}); "
               "train it again, on solutions of the policy as it is now")


def _edge(ledger: Sequence[dict]) -> Iterator[str]:
    for axis, (name, grid_) in enumerate((("temperature", "temperatures"), ("tau", "taus"))):
        found = []
        for d in ledger:
            at = [d["temperatures"].index(d["temperature"]), d["taus"].index(d["tau"])]
            surface = np.moveaxis(np.array(d["surface"]), axis, 0)[:, at[1 - axis]]
            if name in d["edge"] and len(surface) > 1 and surface[at[axis]] > surface[1 if at[axis] == 0 else -2]:
                found.append(d)
        if found:
            d = found[-1]
            yield (f"edge: the best {name} was an end of its grid, {d[grid_][0]:g} to {d[grid_][-1]:g}, in {len(found)} of {len(ledger)} decisions, "
                   f"last {d[name]:g} in iteration {d['iter']}; a wider --{grid_} may hold a better one")


def _ties(ledger: Sequence[dict]) -> Iterator[str]:
    if found := [d for d in ledger if d["ties"]]:
        d = found[-1]
        spread = [f"{name} {min(x):g} to {max(x):g}" for name, x in zip(("T", "tau"), zip(*d.get("tied", []), [d["temperature"], d["tau"]]))]
        yield (f"ties: {d['ties']} of {np.array(d['surface']).size - 1} other grid points are within noise of iteration {d['iter']}'s choice"
               f"{f' ({spread[0]}, {spread[1]})' if d.get('tied') else ''}; so it was in {len(found)} of {len(ledger)} decisions; more --balance-queries "
               "tell more of them apart")


# ---------------------------------------------------------------------------------------------------------------------
# Replay: a finished run's decisions taken again, without any model

def load_pool(run: Run, d: dict, queries: int | None = None) -> list[np.ndarray]:
    """reward, correct, text (G_T, Q, K) of the samples behind a ledger line, of the first `queries`; raises UserError where they can't be had."""
    path = run.path / "samples" / f"balance_{d['iter']}.npz"
    try:
        with np.load(path) as saved:
            arrays = [saved[name].astype(kind) for name, kind in (("reward", float), ("correct", bool), ("text", int))]
    except Exception as e:                                   # missing, torn, no zip, no such array: zipfile, zlib and NumPy each have their own
        said = "missing" if isinstance(e, FileNotFoundError) else "broken, or of a version that kept no texts"
        raise UserError(f"{path}: {said}; replay needs the samples that the run balanced on") from None
    if len({a.shape for a in arrays}) > 1 or arrays[0].ndim != 3 or not arrays[0].size or len(arrays[0]) != len(d["temperatures"]):
        raise UserError(f"{path}: its shapes {[a.shape for a in arrays]} don't fit the ledger's {len(d['temperatures'])} temperatures")
    if queries and queries > arrays[0].shape[1]:
        raise UserError(f"--queries {queries}: the run balanced on {arrays[0].shape[1]}")
    return [a[:, :queries] for a in arrays]


def replay(run: Run, temperatures: Sequence[float] | None = None, taus: Sequence[float] | None = None, n_star: int | None = None,
           queries: int | None = None, samples: int | None = None, exact_tau: bool = False) -> list[tuple[dict, dict]]:
    """The ledger's decisions with other settings; with none, the ledger's own lines to the last bit   [Sec. 3.2, Fig. 4]

    temperatures  some of those sampled at; taus any, or exact_tau for all observed rewards (see `exact_taus`) and the paper's 0
    queries       the first so many of the subset, whose order is random; samples: the expectation over so many of the K (see `effects`)
    returns       for each decision its ledger line and `fig4` of it
    """
    found, bar = [], data.progress(len(run.ledger), "replay") if samples else None           # minutes at 64 samples of 600 queries
    for d in run.ledger:
        Ts, n = temperatures or d["temperatures"], n_star or d["n_star"]
        if not set(Ts) <= set(d["temperatures"]):
            say = lambda values: ", ".join(f"{T:g}" for T in values)
            raise UserError(f"--temperatures {say(Ts)}: the run sampled at {say(d['temperatures'])}; choose among these")
        pool = [a[[d["temperatures"].index(T) for T in Ts]] for a in load_pool(run, d, queries)]
        if samples and samples > pool[0].shape[2]:
            raise UserError(f"--samples {samples}: the run drew {pool[0].shape[2]} a question")
        line = decide(*pool, Ts, sorted({0.0, *exact_taus(*pool, n, samples)}) if exact_tau else taus or d["taus"], n, d.get("seed", 0), k=samples)
        found.append(({"iter": d["iter"], **line}, fig4(line, pool)))
        if bar:
            bar.update(1)
    if bar:
        bar.close()
    return found


def fig4(line: dict, pool: Sequence[np.ndarray]) -> dict:
    """What Fig. 4 shows, at the paper's fixed T = 1 and tau = 0 or the grid's nearest; equal ones to the lower T and the higher tau   [Sec. 3.2]

    returns  T, tau (the fixed ones), sizes {k: mean query effect of k = K/4, K/2, 3K/4, K samples}, best_T at that tau, best_tau at that T
    """
    Ts, taus, surface, K = line["temperatures"], line["taus"], np.array(line["surface"]), pool[0].shape[2]
    i, j = nearest(Ts, 1.0), nearest(taus, 0.0)
    sizes = {k: float(effects(*(a[i] for a in pool), [taus[j]], line["n_star"], k)[0].mean()) for k in sorted({-(-K * part // 4) for part in (1, 2, 3, 4)})}
    return {"T": Ts[i], "tau": taus[j], "sizes": sizes, "best_T": Ts[int(surface[:, j].argmax())], "best_tau": taus[::-1][int(surface[i, ::-1].argmax())]}


def replay_table(run: Run, again: Sequence[tuple[dict, dict]]) -> str:
    """The decisions taken again beside the logged ones, and Fig. 4's numbers: qe@k of k samples a query at T = 1 and tau = 0, see `fig4`."""
    f = again[0][1]
    head = ["iter", "T", "tau", "qe", "95 %", "ties", "logged T", "tau", "qe", *(f"qe@{k}" for k in f["sizes"]),
            f"best T (tau {f['tau']:g})", f"best tau (T {f['T']:g})"]
    rows = [[d["iter"], f"{line['temperature']:g}", f"{line['tau']:g}", f"{line['qe']:.4f}", "{:.3f} to {:.3f}".format(*line["interval"]), line["ties"],
             f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}", *(f"{x:.4f}" for x in f["sizes"].values()), f"{f['best_T']:g}", f"{f['best_tau']:g}"]
            for d, (line, f) in zip(run.ledger, again)]
    return markdown([head, *rows])


# ---------------------------------------------------------------------------------------------------------------------
# The report: figures as data, each drawn once for the page and as PNG

INK, STYLES = "#1b1f24", ["-", "--", "-.", ":"]
COLOURS = ["#2f7fc1", "#e0722c", "#3a9a5b", "#c24f93", "#8a6fd1", "#a8862b", "#2aa3a3", "#d2514f", "#7d8590", "#6b8e23",
           "#5d55d8", "#d8b500", "#e58fb5", "#14806f"]          # seen on white and on black


class Line(NamedTuple):
    """A curve: mean and standard error over the runs of a group, a level line, or only a label for the legend."""
    label: str
    x: Sequence[float]
    y: Sequence[float]
    se: Sequence[float] = ()
    colour: str = INK
    style: str = "-"
    marker: str = "o"


class Panel(NamedTuple):
    """A figure: what is in it, and one sentence on what to see there and what in the paper it answers to."""
    name: str
    title: str
    see: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line] = ()
    bars: Sequence[tuple[str, dict[str, float]]] = ()        # (label, seconds by phase)
    heat: dict | None = None                                 # a ledger line


STEPS, ITER, SHARE = "training steps", "iteration", "% of test questions"
# name, title, x, y, {key of metrics.jsonl: its name in the legend; * is every K in the rows}, what to see; drawn if a run has the first key
CURVES = {"Exploration and exploitation": [
    ("pass1", "Greedy pass@1", STEPS, SHARE, {"pass@1": ""}, "A curve that ends above the level line has gained by teaching itself. Paper: Fig. 1."),
    ("distinct", "Distinct equations", STEPS, "unique / all equations", {"distinct": ""},
     "How different a question's right answers are: the lower, the more the policy repeats itself. Paper: Fig. 2, right."),
    ("passk", "Pass@K", STEPS, SHARE, {"pass@*": "K = *"},
     "What the policy finds at all in K tries; it falls where luck or variety is trained away. Paper: Figs. 3, 5 (S = 1)."),
    ("passks", "Pass@K-S", STEPS, SHARE, {"pass@*-S": "K = *"}, "What it finds S times in K tries, which luck does less for. Paper: Figs. 3, 5."),
    ("rewardks", "Reward@K-S", STEPS, SHARE, {"reward@*-S": "K = *"},
     "Are the S best-rewarded of K all right? A reward that holds the answer itself (Eq. 1) makes this Pass@K-S. Paper: Figs. 3, 6."),
    ("temperature", "Temperature", ITER, "T", {"temperature": ""},
     "The T that an iteration's pool was sampled at; level where it is fixed. Paper: Tables 2, 3."),
    ("tau", "Threshold", ITER, "tau", {"tau": ""}, "The reward that a response had to exceed to be trained on. Paper: Tables 2, 3."),
    ("qe", "Query effect of the pool", ITER, "mean query effect", {"qe": ""},
     "What exploration and exploitation come to together, at that T and tau. Paper: Fig. 6, right."),
], "The process reward": [
    ("auc", "PRM: AUC", ITER, "AUC on the pool", {"prm/auc": "right answers", "prm/auc_sound": "all steps right", "prm/step_auc": "steps"},
     "0.5 is a coin; a falling curve is a PRM that the policy has left behind. Paper: Observation 3 (the reward is static)."),
    ("admitted", "PRM: what gets past it", ITER, "share", {
        "prm/wrong_admitted": "wrong answers with r > tau", "prm/false_admitted": "right by a wrong step, r > tau",
        "prm/min_last": "lowest step is the last", "prm/ece": "calibration error"},
     "The first two are what it lets into training that it should not. Paper: Sec. 2.3, the threshold on r."),
    ("ranked", "PRM: ranking alone", STEPS, SHARE, {"prm@K-S": "r_prm alone", "reward@K-S": "r of Eq. 1"},
     "The distance is what the known answer does for the ranking. Paper: Figs. 3, 6 (Reward@K-S)."),
]}


def curve_panels(groups: Sequence[Group], section: str) -> list[Panel]:
    """The figures of CURVES in which some run has a value; all runs in each."""
    rows, found = [r for g in groups for run in g.runs for r in run.rows], []
    sizes = sorted({int(m[1]) for r in rows for k in r if (m := re.fullmatch(r"reward@(\d+)-\d+", k))}, reverse=True)
    S, shown = {r["S"] for r in rows}, sizes[:len(STYLES)] if len(groups) == 1 else sorted({*sizes[:1], *sizes[-1:]}, reverse=True)
    for name, title, x, y, keys, see in CURVES[section]:
        x = ITER if all(g.runs[0].config["method"] == "sft" for g in groups) else x                # whose iterations are epochs
        keys = {k.replace("*", str(n)): note.replace("*", str(n)) for k, note in keys.items() for n in (shown if "*" in k else [0])}
        if any(value(r, k) is not None for r in rows for k in list(keys)[:1]):
            lines = curves(groups, keys, x == STEPS)
            if "" in keys.values() and x == STEPS and not any(line.marker == "" for line in lines) and lines and lines[0].x[0] == 0:
                lines.append(Line("iteration 0", [0, max(x for line in lines for x in line.x)], lines[0].y[:1] * 2, style="--", marker=""))
            found.append(Panel(name, title.replace("-S", f"-{min(S)}") if len(S) == 1 else title, see, x, y, lines))
    return found


def curves(groups: Sequence[Group], keys: dict[str, str], steps: bool) -> list[Line]:
    """A colour a group, a line style a key; an SFT run beside others is a level line at its last value."""
    lines, scale = [], lambda run: run.config["steps_per_iter"] if steps else 1
    end = max((run.rows[-1]["iter"] * scale(run) for g in groups for run in g.runs if run.config["method"] != "sft"), default=0)
    for label, runs, colour in groups:
        level, before = end and runs[0].config["method"] == "sft", len(lines)
        for style, (key, note) in zip(STYLES, keys.items()):
            seen = [{r["iter"]: v for r in run.rows if (v := value(r, key)) is not None} for run in runs]
            shared = sorted(set.intersection(*map(set, seen)))
            y = np.array([[s[i] for i in shared] for s in seen])
            x, mean, se = [i * scale(runs[0]) for i in shared], y.mean(axis=0).tolist(), standard_error(y).tolist()
            if level and shared:
                x, mean, se = [0, end], mean[-1:] * 2, se[-1:] * 2
            if shared:
                name = note or label if len(groups) == 1 else label if len(lines) == before else ""
                lines.append(Line(name, x, mean, se, colour, style, "" if level else "o"))
    return lines + [Line(note, [], [], style=style, marker="") for style, note in zip(STYLES, keys.values()) if len(groups) > 1 < len(keys)]


def calibration_panel(groups: Sequence[Group]) -> Panel:
    """Score against share of right answers, in the first iteration (dashed) and the last of each group's first run."""
    lines = []
    for _, (run, *_), colour in groups:
        seen = [(r["iter"], c) for r in run.rows if isinstance(c := r.get("prm/calibration"), dict) and {"score", "correct"} <= c.keys()]
        for style, (i, c) in zip(["-", "--"], [seen[-1], seen[0]] if seen else []):
            points = [(a, b) for a, b in zip(c["score"], c["correct"]) if _is_number(a) and _is_number(b)]
            lines += [Line(shorten(f"{run.name}, iteration {i}", 44), *zip(*points), colour=colour, style=style)] * bool(points)
    if lines:
        lines.append(Line("calibrated", [0, 1], [0, 1], style=":", marker=""))
    return Panel("calibration", "PRM: calibration", "Below the dotted line the PRM promises more than it holds. Paper: Sec. 2.3 (the score that Eq. 1 adds).",
                 "score of a solution", "share with a right answer", lines)


def replay_panels(name: str, again: Sequence[tuple[dict, dict]]) -> list[Panel]:
    """Fig. 4 from one run, see `fig4`."""
    x, f = [line["iter"] for line, _ in again], again[0][1]
    path = lambda key: [Line("", x, [f[key] for _, f in again], colour=COLOURS[0])]
    sizes = [Line(f"{k} samples", x, [f["sizes"].get(k, np.nan) for _, f in again], colour=c) for c, k in zip(COLOURS, f["sizes"])]
    T, tau = f"T {f['T']:g}", f"tau {f['tau']:g}"
    see = f"Where the curves lie apart, more samples a question are worth it (at {T}, {tau}; exact expectation over subsets). Paper: Fig. 4 (a)."
    return [Panel(f"{name}_fig4a", "Query effect by sample size", see, ITER, "mean query effect", sizes),
            Panel(f"{name}_fig4b", f"Best temperature at {tau}", "The paper's is low at first and rises later. Paper: Fig. 4 (b).", ITER, "T", path("best_T")),
            Panel(f"{name}_fig4c", f"Best threshold at {T}", "The paper's is high at first and falls later. Paper: Fig. 4 (c).", ITER, "tau", path("best_tau"))]


def heat_panels(name: str, ledger: Sequence[dict]) -> list[Panel]:
    """The surface of each decision, with what can't be told from the best marked."""
    see = "Ring: the choice, T {:g}, tau {:g}; {}{} of {} other points are within noise of it. Paper: Table 2 has the choice, not the surface."
    said = lambda d: see.format(d["temperature"], d["tau"], "dots: " if "tied" in d else "", d["ties"], np.array(d["surface"]).size - 1)
    return [Panel(f"{name}_surface{d['iter']}", f"Query effect, iteration {d['iter']}", said(d), "temperature", "tau", heat=d) for d in ledger]


def time_panel(groups: Sequence[Group]) -> Panel:
    """Seconds by phase: an iteration a bar for one run, else a group a bar (the mean of its runs)."""
    runs = [run for g in groups for run in g.runs]
    bars = [(f"iteration {i}", 1, [s for s in run.seconds if s["iter"] == i]) for run in runs for i in sorted({s["iter"] for s in run.seconds})]
    if len(runs) > 1:
        bars = [(shorten(g.label, 26), len(g.runs), [s for run in g.runs for s in run.seconds]) for g in groups]
    totals = [(label, {p: sum(s["seconds"] for s in rows if s["phase"] == p) / n for p in dict.fromkeys(s["phase"] for s in rows)}) for label, n, rows in bars]
    see = "Sampling (gen) and training are any method's; balance is what B-STaR adds. Paper: Sec. 3.3, which calls that negligible."
    return Panel("time", "Where the time went", see, "seconds", "", bars=[bar for bar in totals if bar[1]])


def draw(p: Panel, png: Path) -> str:
    """A panel by matplotlib, of a phone's width, as a PNG file and as SVG (returned), whose text takes the page's colour."""
    import matplotlib
    from matplotlib.figure import Figure
    entries = list(dict.fromkeys([line.label for line in p.lines if line.label] + [k for _, b in p.bars for k in b]))
    columns = 1 if max(map(len, entries), default=0) > 28 else 2 if p.lines else 3
    rows = -(-len(entries) // columns) if len(entries) > 1 else 0
    ink = {k: INK for k in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": "bstar", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        fig = Figure(figsize=(4.6, max(2.7, 0.6 + 0.26 * len(p.bars)) + 0.19 * rows), layout="constrained")
        ax = fig.subplots()
        (_draw_heat if p.heat else _draw_bars if p.bars else _draw_lines)(fig, ax, p)
        ax.set(xlabel=p.xlabel, ylabel=p.ylabel)
        if rows:
            fig.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=2.6)
        fig.savefig(png, dpi=130)
        fig.savefig(buffer := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue().decode(), flags=re.S).replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{p.name}-", svg)                        # many figures, one page: no id twice
    label = escape(f"{p.title}. {p.see}")
    return re.sub(r'.*?<svg .*?(viewBox="[^"]*").*?>', lambda m: f'<svg {m[1]} role="img" aria-label="{label}">', svg, count=1, flags=re.S)


def _draw_lines(fig, ax, p: Panel) -> None:
    for line in p.lines:
        ax.plot(line.x, line.y, line.style, color=line.colour, marker=line.marker, markersize=3, linewidth=1.4, label=line.label or None)
        if any(line.se):
            y, se = np.array(line.y), np.array(line.se)
            ax.fill_between(line.x, y - se, y + se, color=line.colour, alpha=0.18, linewidth=0)
    ax.grid(alpha=0.25)
    if p.xlabel == ITER:
        ax.xaxis.get_major_locator().set_params(integer=True)


def _draw_bars(fig, ax, p: Panel) -> None:
    left = np.zeros(len(p.bars))
    for colour, phase in zip(itertools.cycle(COLOURS), dict.fromkeys(k for _, b in p.bars for k in b)):
        width = np.array([b.get(phase, 0.0) for _, b in p.bars])
        ax.barh(range(len(p.bars)), width, left=left, color=colour, label=phase, height=0.7)
        left += width
    ax.set_yticks(range(len(p.bars)), [label for label, _ in p.bars])
    ax.invert_yaxis()


def _draw_heat(fig, ax, p: Panel) -> None:
    d = p.heat
    image = ax.imshow(np.array(d["surface"], dtype=float).T, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    at = lambda T, tau: (d["temperatures"].index(T), d["taus"].index(tau))
    if d.get("tied"):
        ax.scatter(*zip(*(at(*point) for point in d["tied"])), s=9, color="white", edgecolors="black", linewidths=0.5)
    for colour, width in (("white", 3.2), ("#d2304f", 1.8)):
        ax.scatter(*at(d["temperature"], d["tau"]), s=90, facecolors="none", edgecolors=colour, linewidths=width)
    for axis, grid_ in ((ax.xaxis, d["temperatures"]), (ax.yaxis, d["taus"])):
        ticks = range(0, len(grid_), -(-len(grid_) // 8))
        axis.set_ticks(ticks, [f"{grid_[i]:g}" for i in ticks])
    fig.colorbar(image, ax=ax, label="mean query effect").outline.set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--line:#d6dbe1;--warn:#fff4dc}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b1;--paper:#14171a;--line:#343b43;--warn:#3a2f14}}
body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.2rem;margin:1rem 0}
figure{margin:0;min-width:0}figure h3{margin:0}figcaption{font-size:.87rem;color:var(--soft)}
svg{width:100%;height:auto;display:block}svg *{stroke-linejoin:round;stroke-linecap:butt}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
.alarm{background:var(--warn);padding:.4rem .7rem;border-radius:4px;margin:.4rem 0}summary{cursor:pointer;font-weight:600;padding:.3rem 0}"""


def report(runs: Sequence[Run], out: Path) -> Path:
    """out/report.html, one page that needs nothing else, and its figures as out/figures/*.png; runs without metrics are in its table only."""
    drawn = [run for run in runs if run.rows]
    groups = by_seed(drawn)
    parts, warn = [table_html(table(runs), "all runs")], lambda run: [f'<p class="alarm">{escape(line)}</p>' for line in alarms(run.rows, run.ledger)]
    parts += warn(drawn[0]) if len(drawn) == 1 else []
    with_prm = [g for g in groups if any(k.startswith("prm") for run in g.runs for r in run.rows for k in r)]
    explore, prm = CURVES
    for title, panels in ((explore, curve_panels(groups, explore)), (prm, [*curve_panels(with_prm, prm), calibration_panel(with_prm)]),
                          ("Time", [time_panel(groups)])):
        if figures := figures_html(panels, out):
            parts += [f"<h2>{title}</h2>", figures]
    for number, run in enumerate(drawn, 1):
        parts += [f"<h2>{escape(run.name)}</h2>", *(warn(run) if len(drawn) > 1 else [])]
        parts += [f"<details><summary>Every number of metrics.jsonl</summary>{table_html(numbers_table(run), run.name)}</details>"]
        if run.ledger:
            parts += ["<h3>What the balancer saw and chose</h3>", table_html(decisions_table(run), "decisions"),
                      figures_html(heat_panels(f"run{number}", run.ledger), out)]
            try:
                parts.append(figures_html(replay_panels(f"run{number}", replay(run)), out))
            except UserError as e:
                parts.append(f"<p>No Fig. 4: {escape(str(e))}</p>")
    return write_page(out / "report.html", drawn[0].name if len(drawn) == 1 else f"{len(drawn)} runs with metrics", parts)


def replay_report(run: Run, again: Sequence[tuple[dict, dict]], out: Path) -> Path:
    """out/replay.html: the decisions taken again, their surfaces, and Fig. 4."""
    panels = replay_panels("replay", again) + heat_panels("replay", [line for line, _ in again])
    return write_page(out / "replay.html", f"{run.name}, replayed", [table_html(replay_table(run, again), "decisions"), figures_html(panels, out)])


def numbers_table(run: Run) -> str:
    """Every number of metrics.jsonl as it stands there, an iteration a column."""
    keys = [k for k in dict.fromkeys(k for r in run.rows for k in r) if k != "iter" and any(_is_number(r.get(k)) for r in run.rows)]
    cells = lambda k: [json.dumps(r[k]) if _is_number(r.get(k)) else "" for r in run.rows]
    return markdown([["key", *(f"iteration {r['iter']}" for r in run.rows)], *([k, *cells(k)] for k in keys)])


def decisions_table(run: Run) -> str:
    """The balancer's choices   [Tables 2, 3]"""
    return markdown([["iter", "T", "tau", "qe on the subset", "95 %", "ties", "queries without a selection", "ends of the grid"],
                     *([d["iter"], f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}", "{:.3f} to {:.3f}".format(*d["interval"]),
                        f"{d['ties']} of {np.array(d['surface']).size - 1}", f"{d['empty']:.0%}", ", ".join(d["edge"])] for d in run.ledger)])


def table_html(text: str, name: str) -> str:
    """A Markdown table as HTML that scrolls by itself where it is too wide."""
    rows = [[escape(c.strip()) for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    lines = ["".join(f"<{tag}>{c}</{tag}>" for c in row) for tag, row in zip(["th"] + ["td"] * len(rows), rows)]
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def figures_html(panels: Sequence[Panel], out: Path) -> str:
    """The panels that hold anything as figures with inline SVG, side by side where there is room, and each as out/figures/NAME.png; "" if none does."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figures = [f"<figure><h3>{escape(p.title)}</h3>{draw(p, out / 'figures' / f'{p.name}.png')}<figcaption>{escape(p.see)}</figcaption></figure>"
               for p in panels if p.bars or p.heat or p.lines]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Writes parts of HTML as one page."""
    head = (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
            f'<title>{escape(title)}</title><style>{STYLE}</style>')
    body = f'<main><h1>{escape(title)}</h1>{"".join(parts)}</main>'
    path.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>', encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def at_least_one(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """python report.py RUN [RUN ...] | --replay RUN"""
    p = Parser(prog="report.py", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; with --replay, one")
    p.add_argument("--out", type=Path, help="where the page and figures/ go (default: the run's folder; of several runs, the folder that they share)")
    p.add_argument("--against", type=Path, metavar="RUN", help="one of the runs: prints the last iterations alone, and their differences to its group, paired by seed")
    p.add_argument("--replay", action="store_true", help="take the run's balancing decisions again, from the samples it saved")
    other = p.add_argument_group("with --replay, settings other than the run's own")
    other.add_argument("--temperatures", type=functools.partial(grid, "temperatures"), help="FROM:TO:STEP, some of those that it sampled at")
    other.add_argument("--taus", type=functools.partial(grid, "taus"), help="FROM:TO:STEP")
    other.add_argument("--exact-tau", action="store_true", default=None, help="every observed reward is a threshold, instead of a grid")
    other.add_argument("--n-star", type=at_least_one, help="n* of Eq. 2")
    other.add_argument("--queries", type=at_least_one, help="so many of the subset's queries")
    other.add_argument("--samples", type=at_least_one, help="so many of the K samples a query, in exact expectation over all such subsets")
    settings = vars(p.parse_intermixed_args(argv))
    paths, out, replaying, against = (settings.pop(k) for k in ("runs", "out", "replay", "against"))
    settings = {k: v for k, v in settings.items() if v is not None}
    if replaying and against:
        raise UserError("--against: not with --replay")
    if settings and not replaying or {"taus", "exact_tau"} <= settings.keys():
        raise UserError(f"--{next(iter(settings)).replace('_', '-')}: only with --replay" if not replaying else "--taus, --exact-tau: expected one of them")
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else run._replace(name=str(run.path)) for run in runs]
    if against:
        return print(comparison(runs, against))
    out = out or (paths[0] if len(runs) == 1 else Path(os.path.commonpath([path.resolve().parent for path in paths])))
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None
    if not replaying:
        warnings = [f"{run.name}, {line}" for run in runs for line in alarms(run.rows, run.ledger)]
        return print("\n".join([table(runs), "", *warnings, str(report(runs, out))]))
    if len(runs) > 1 or not runs[0].ledger:
        raise UserError(f"--replay: expected one run, not {len(runs)}" if len(runs) > 1 else f"--replay {paths[0]}: no decision in its ledger.jsonl")
    again = replay(runs[0], **settings)
    same = f"{sum(line == d for d, (line, _) in zip(runs[0].ledger, again))} of {len(again)} decisions equal the ledger's in every field"
    print("\n".join([replay_table(runs[0], again), "", *([] if settings else [same]), str(replay_report(runs[0], again, out))]))


if __name__ == "__main__":
    data.run(main)
