"""What finished runs show: a table, alarms, one page with all figures; and decisions taken again.

runs/NAME/{config.json, *.jsonl, samples/} -> a Markdown table, report.html, figures/*.png

python report.py RUN [RUN ...]                   table, alarms and page
python report.py RUN [RUN ...] --against RUN     differences to RUN's group in the last iteration
python report.py --replay RUN [--taus=-1:1:0.1] [--n-star 6] [--queries 100] [--samples 16]
"""

from __future__ import annotations

import argparse
import base64
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import data
from config import Parser, grid
from data import UserError
from metrics import decide, effects, nearest, read_jsonl

if TYPE_CHECKING:
    import pandas as pd

# -- a run's folder --------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run's folder, as much of it as can be read."""

    path: Path
    name: str
    seed: int
    config: dict  # without the seed
    rows: list[dict]  # metrics.jsonl
    ledger: list[dict]  # ledger.jsonl
    times: list[dict]  # times.jsonl
    lost: list[str]  # what of these is torn, foreign or gone, one line each


ROW = "iter eval_samples S pass@1 val/pass@1".split()
DECISION = "iter temperature tau qe ties n_star seed empty".split()


def read_run(path: Path) -> Run:
    """Reads a run's folder; lines that are torn or lack what is shown are left out, and told.

    raises  UserError  where the folder is no run of bstar.py
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        seed, method, _ = config.pop("seed"), config["method"], config["reward"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: no config.json of bstar.py; expected a run's folder") from None
    rows = list(filter(is_row, read_jsonl(path / "metrics.jsonl")))
    ledger = list(filter(is_decision, read_jsonl(path / "ledger.jsonl")))
    times = read_jsonl(path / "times.jsonl")
    times = [line for line in times if has_numbers(line, ["iter", "seconds"])]
    done = max((int(row["iter"]) for row in rows), default=-1)
    fixed = None not in (config.get("temperature"), config.get("tau"))
    decided = range(1, done + 1) if method == "bstar" and not fixed else []
    lost = [*losses(path / "metrics.jsonl", rows, range(done + 1))]
    lost += losses(path / "ledger.jsonl", ledger, decided)
    return Run(
        path, path.resolve().name, seed, config, in_order(rows), in_order(ledger), times, lost
    )


def losses(path: Path, lines: Sequence[dict], expected: Iterable[int]) -> Iterator[str]:
    """One sentence where lines of a file were left out, one where iterations are gone."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    n = len([line for line in text.splitlines() if line.strip()])
    if n > len(lines):
        yield f"{path}: {n - len(lines)} of {n} lines are torn or not a run's and are left out"
    gone = sorted(set(expected) - {line["iter"] for line in lines})
    if gone:
        yield f"{path}: no line of iteration {', '.join(map(str, gone))}"


def in_order(lines: Iterable[dict]) -> list[dict]:
    """The last line of each iteration, by iteration."""
    latest = {line["iter"]: line for line in lines}
    return [latest[i] for i in sorted(latest)]


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def has_numbers(line: dict, keys: Sequence[str]) -> bool:
    return all(map(is_number, map(line.get, keys)))


def is_row(line: dict) -> bool:
    """Whether it is a line of metrics.jsonl."""
    return has_numbers(line, ROW)


def is_decision(line: dict) -> bool:
    """Whether it is a line of ledger.jsonl, of the shapes that `decide` gives it."""
    try:
        for point in [(line["temperature"], line["tau"]), *line["tied"]]:
            place_of(line, *point)
        shape = np.array(line["surface"], dtype=float).shape
        fits = shape == (len(line["temperatures"]), len(line["taus"])) and "edge" in line
        return fits and has_numbers(line, DECISION) and len(line["interval"]) == 2
    except (KeyError, TypeError, ValueError):
        return False


def place_of(decision: dict, T: float, tau: float) -> tuple[int, int]:
    """Where a grid point stands in a decision's surface (G_T, G_tau)."""
    return decision["temperatures"].index(T), decision["taus"].index(tau)


def numbers(row: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl; the letters K and S stand for the run's own.

    >>> numbers({"eval_samples": 32, "S": 4, "pass@1": 50, "pass@32-4": 63.5, "loss": None})
    {'eval_samples': 32, 'S': 4, 'pass@1': 50, 'pass@K-S': 63.5}
    """
    K, S = row["eval_samples"], row["S"]
    general = {}
    for key, x in row.items():
        if is_number(x):
            key = re.sub(rf"-{S}$", "-S", key)
            general[key if K == 1 else re.sub(rf"@{K}(?=-|$)", "@K", key)] = x
    return general


def spelled(key: str, row: dict) -> str:
    """A key of `numbers` with the run's own K and S."""
    return key.replace("@K", f"@{row['eval_samples']}").replace("-S", f"-{row['S']}")


# -- tables ----------------------------------------------------------------------------------------

COLUMNS = """pass@1 val/pass@1 pass@K pass@K-S reward@K-S prm@K-S distinct sound@1 sound@K
             false_reasoning selected/false_reasoning temperature tau""".split()


def by_seed(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed alone, under a common name; a seed twice makes two groups."""
    groups: dict[tuple, list[Run]] = {}
    earlier = []
    for run in runs:
        config = json.dumps(run.config, sort_keys=True)
        copy = earlier.count((config, run.seed))
        earlier.append((config, run.seed))
        groups.setdefault((config, copy), []).append(run)
    return {group_name(group): group for group in groups.values()}


def group_name(runs: Sequence[Run]) -> str:
    """The run's name, or what the names share and the seeds."""
    if len(runs) == 1:
        return runs[0].name
    shared = os.path.commonprefix([run.name for run in runs]).rstrip("-_ ")
    return f"{shared}, seeds {' '.join(str(run.seed) for run in runs)}"


def all_numbers(runs: Sequence[Run]) -> pd.DataFrame:
    """metrics.jsonl of all runs: a line an iteration, with its group, run, seed and method."""
    import pandas as pd

    lines = []
    for label, group in by_seed([run for run in runs if run.rows]).items():
        for run in group:
            names = {"group": label, "run": run.name, "method": run.config["method"]}
            lines += [{**names, "seed": run.seed, **numbers(row)} for row in run.rows]
    return pd.DataFrame(lines) if lines else pd.DataFrame(columns=["group", "run", "iter"])


def markdown(lines: Sequence[Sequence]) -> str:
    """A Markdown table; the first line is its head.

    >>> print(markdown([["T", "tau"], [0.5, 1]]))
    | T | tau |
    |---|---|
    | 0.5 | 1 |
    """
    head, *rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


def ends(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The first, last and best iteration of runs, a seed a line; best on validation questions."""
    runs = part.groupby("run", sort=False)
    best = part.loc[runs["val/pass@1"].idxmax()]
    picked = {"first": runs.head(1), "last": runs.tail(1), "best": best}
    return {when: x.set_index("seed").select_dtypes("number") for when, x in picked.items()}


def cells(values: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Mean ± standard error over seeds of each column; "" where a seed has no value."""
    texts = []
    for name, column in values.reindex(columns=columns).items():
        digits = 1 if "@" in name else 2
        text = f"{column.mean():.{digits}f}"
        if len(column) > 1:
            text += f" ± {column.sem():.{digits}f}"
        texts.append("" if column.isna().any() else text)
    return texts


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: means over a group's seeds, then each run's first, last, best iteration."""
    values = all_numbers(runs)
    columns = [column for column in COLUMNS if column in values]
    lines = [["run", "iteration", *columns]]
    for label, part in values.groupby("group", sort=False):
        if part["run"].nunique() > 1:
            picked = ends(part)
            picked["best"] = picked["last"] - picked["first"]
            for when, line in zip(("first", "last", "gain"), picked.values()):
                lines.append([f"mean of {label}", when, *cells(line, columns)])
    for name, part in values.groupby("run", sort=False):
        for when, line in ends(part).items():
            lines.append([name, f"{line['iter'].iloc[0]} ({when})", *cells(line, columns)])
    for run in runs:
        if not run.rows:
            lines.append([run.name, "no metrics yet", *[""] * len(columns)])
    return markdown(lines)


def comparison(runs: Sequence[Run], against: Path) -> str:
    """Last iterations of the groups, and differences to `against`'s, paired by seed   [Table 1]

    raises  UserError  where `against` is none of the runs
    """
    values = all_numbers(runs)
    columns = [column for column in COLUMNS if column in values]
    last = {label: ends(part)["last"] for label, part in values.groupby("group", sort=False)}
    names = [run.name for run in runs if run.path.resolve() == against.resolve()]
    home = values.loc[values["run"].isin(names), "group"]
    if home.empty:
        raise UserError(f"--against {against}: not one of the runs given, or without metrics")
    lines = [["runs", "", *columns]]
    for label, line in last.items():
        lines.append([label, "last", *cells(line, columns)])
        difference = (line - last[home.iloc[0]]).dropna(how="all")
        if label != home.iloc[0] and len(difference):
            lines.append(["", f"difference, seeds: {len(difference)}", *cells(difference, columns)])
    return markdown(lines)


# -- alarms ----------------------------------------------------------------------------------------


def alarms(rows: Sequence[dict], ledger: Sequence[dict]) -> list[str]:
    """What to look at in a run, one line each; the word before the colon is the kind.

    reversal  from the first row to the last pass@1 rose while pass@K or distinct equations fell,
              each beyond noise: "self-improvement reversal" (Wu et al. 2024)
    drift     prm/auc is more than 0.05 below the first: the PRM lost the policy   [Observation 3]
    edge      a choice at an end of its grid is better than its neighbour inside
    ties      other grid points are within noise of the choice (95 %, paired bootstrap over queries)

    rows, ledger  lines of metrics.jsonl and of ledger.jsonl, by iteration; others are left out
    """
    rows, ledger = list(filter(is_row, rows)), list(filter(is_decision, ledger))
    edges = [*edge(ledger, "temperature"), *edge(ledger, "tau")]
    return [*reversal(rows), *drift(rows), *edges, *ties(ledger)]


def shift(before: float, after: float, n_before: float, n_after: float) -> int:
    """+1 or -1 where a share of n rose or fell by more than two standard errors, else 0.

    A success and a failure are added on each side (Agresti & Caffo 2000), so that shares of 0 and 1
    have an error too. For a mean of shares, as distinct equations are, the error is an upper bound.

    >>> shift(0.96, 0.82, 200, 200), shift(0.96, 0.93, 200, 200)
    (-1, 0)
    """
    p = (before * n_before + 1) / (n_before + 2)
    q = (after * n_after + 1) / (n_after + 2)
    error = (p * (1 - p) / (n_before + 2) + q * (1 - q) / (n_after + 2)) ** 0.5
    return int(np.sign(q - p)) if abs(q - p) > 2 * error else 0


def changes(rows: Sequence[dict]) -> dict[str, tuple[float, float, int]]:
    """metric -> its first value, its last, and the sign of the change where it is beyond noise."""
    if len(rows) < 2:
        return {}
    first, last = numbers(rows[0]), numbers(rows[-1])
    changed = {}
    for key in ("pass@1", "pass@K", "pass@K-S", "sound@1", "distinct"):
        if {key, "queries"} <= first.keys() & last.keys():
            scale = 1 if key == "distinct" else 100
            n, m = first["queries"], last["queries"]
            if key == "distinct":
                n, m = n * first["coverage"], m * last["coverage"]
            sign = shift(first[key] / scale, last[key] / scale, n, m)
            changed[key] = (first[key], last[key], sign)
    return changed


def reversal(rows: Sequence[dict]) -> Iterator[str]:
    """The alarm of pass@1 rising while pass@K or distinct equations fall."""
    changed = changes(rows)
    fell = []
    for key, name in (("pass@K", "pass@K"), ("distinct", "distinct equations")):
        before, after, sign = changed.get(key, (0, 0, 0))
        if sign < 0:
            fell.append(f"{spelled(name, rows[0])} fell {before:.3g} -> {after:.3g}")
    if fell and changed["pass@1"][2] > 0:
        before, after, _ = changed["pass@1"]
        yield (
            f"reversal: from iteration {rows[0]['iter']} to {rows[-1]['iter']} pass@1 rose "
            f"{before:.1f} -> {after:.1f} while {' and '.join(fell)}, each beyond noise"
        )


def drift(rows: Sequence[dict]) -> Iterator[str]:
    """The alarm of a PRM that the policy has left behind."""
    seen = [row for row in rows if is_number(row.get("prm/auc"))]
    low = min(seen, key=lambda row: row["prm/auc"], default=None)
    if low and low["prm/auc"] < seen[0]["prm/auc"] - 0.05:
        yield (
            f"drift: the PRM's AUC fell {seen[0]['prm/auc']:.3f} -> {low['prm/auc']:.3f} (iteration"
            f" {low['iter']}); train it again, on solutions of the policy as it is now"
        )


def edge(ledger: Sequence[dict], name: str) -> Iterator[str]:
    """The alarm of choices at an end of a grid that beat their neighbour inside."""
    at_end = []
    for d in ledger:
        i, j = place_of(d, d["temperature"], d["tau"])
        surface = np.array(d["surface"])  # (G_T, G_tau)
        at, values = (i, surface[:, j]) if name == "temperature" else (j, surface[i])
        inside = 1 if at == 0 else at - 1
        if name in d["edge"] and len(values) > 1 and values[at] > values[inside]:
            at_end.append(d)
    if at_end:
        values, last = at_end[-1][f"{name}s"], at_end[-1]
        yield (
            f"edge: the best {name} was an end of its grid, {values[0]:g} to {values[-1]:g}, in "
            f"{len(at_end)} of {len(ledger)} decisions, last {last[name]:g} in iteration "
            f"{last['iter']}; a wider --{name}s may hold a better one"
        )


def ties(ledger: Sequence[dict]) -> Iterator[str]:
    """The alarm of choices that noise may have made."""
    tied = [d for d in ledger if d["ties"] and np.any(d["surface"])]  # zeros: nothing to tell apart
    if tied:
        last = tied[-1]
        points = np.array([[last["temperature"], last["tau"]], *last["tied"]])
        low, high = points.min(axis=0), points.max(axis=0)
        yield (
            f"ties: {last['ties']} of {np.size(last['surface']) - 1} other grid points are within "
            f"noise of iteration {last['iter']}'s choice (T {low[0]:g} to {high[0]:g}, tau "
            f"{low[1]:g} to {high[1]:g}); so it was in {len(tied)} of {len(ledger)} decisions; "
            "more --balance-queries tell more of them apart"
        )


# -- replay: a run's decisions taken again, without any model --------------------------------------


def load_pool(run: Run, d: dict) -> list[np.ndarray]:
    """reward, correct, text (G_T, Q, K) of the samples behind a ledger line.

    raises  UserError  where they are missing, broken, or of another shape than the ledger
    """
    path = run.path / "samples" / f"balance_{d['iter']}.npz"
    kinds = {"reward": float, "correct": bool, "text": int}
    try:
        with np.load(path) as saved:
            pool = [saved[name].astype(kind) for name, kind in kinds.items()]
        G, Q, K = np.broadcast_shapes(*(array.shape for array in pool))
        if G != len(d["temperatures"]) or 0 in (Q, K):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path}: missing; replay needs the samples of the balance") from None
    except Exception:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path}: broken, or not of this ledger, or without texts") from None
    return pool


def replay(
    run: Run,
    temperatures: list[float] | None = None,
    taus: list[float] | None = None,
    n_star: int | None = None,
    queries: int | None = None,
    samples: int | None = None,
) -> list[tuple[dict, dict]]:
    """The ledger's decisions with other settings; with none, the ledger's own lines   [Sec. 3.2]

    temperatures  some of those sampled at
    queries       the first so many of the subset, whose order is random
    samples       the first so many of the K drawn to a query

    returns  for each decision its ledger line and `fig4` of it
    raises   UserError  where a setting asks for what was not sampled
    """
    again = []
    for d in run.ledger:
        pool = load_pool(run, d)
        Ts, (_, Q, K) = temperatures or d["temperatures"], pool[0].shape
        if (queries or 0) > Q or (samples or 0) > K:
            raise UserError(f"--queries, --samples: the run has {Q} questions, {K} samples each")
        if not set(Ts) <= set(d["temperatures"]):
            raise UserError(f"--temperatures: expected some of the run's, {d['temperatures']}")
        places = [d["temperatures"].index(T) for T in Ts]
        pool = [array[places, :queries, :samples] for array in pool]
        line = decide(*pool, Ts, taus or d["taus"], n_star or d["n_star"], d["seed"])
        again.append(({"iter": d["iter"], **line}, fig4(line, pool)))
    return again


def fig4(line: dict, pool: Sequence[np.ndarray]) -> dict:
    """Query effect by sample size, best T, best tau; at T = 1, tau = 0 or the nearest   [Fig. 4]

    Ties go to the lower T and the higher tau.

    returns  {part of Fig. 4: {name of a curve: value}}
    """
    Ts, taus, surface = line["temperatures"], line["taus"], np.array(line["surface"])
    i, j = nearest(Ts, 1.0), nearest(taus, 0.0)
    K = pool[0].shape[2]
    sizes = {}
    for k in sorted({-(-K * quarter // 4) for quarter in (1, 2, 3, 4)}):
        first_k = [array[i, :, :k] for array in pool]
        effect, _ = effects(*first_k, [taus[j]], line["n_star"])
        sizes[f"{k} samples, T {Ts[i]:g}, tau {taus[j]:g}"] = float(effect.mean())
    best_T = Ts[int(surface[:, j].argmax())]
    best_tau = taus[::-1][int(surface[i, ::-1].argmax())]
    best = {f"best T at tau {taus[j]:g}": best_T}, {f"best tau at T {Ts[i]:g}": best_tau}
    return {"left": sizes, "middle": best[0], "right": best[1]}


def decisions_table(ledger: Sequence[dict]) -> str:
    """The balancer's choices   [Tables 2, 3]"""
    lines = [
        ["iter", "T", "tau", "qe", "95 %", "ties", "nothing selected", "at an end of its grid"]
    ]
    for d in ledger:
        chosen = [f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}"]
        interval = "{:.3f} to {:.3f}".format(*d["interval"])
        ties_of = f"{d['ties']} of {np.size(d['surface']) - 1}"
        edges = ", ".join(d["edge"])
        lines.append([d["iter"], *chosen, interval, ties_of, f"{d['empty']:.0%}", edges])
    return markdown(lines)


# -- figures ---------------------------------------------------------------------------------------

# seen on white and on black
COLOURS = """#2f7fc1 #e0722c #3a9a5b #c24f93 #8a6fd1 #a8862b #2aa3a3 #d2514f #7d8590 #6b8e23
             #5d55d8 #d8b500 #e58fb5 #14806f""".split()

# name: title, keys of metrics.jsonl (* is every K), what to see and where in the paper
PLOTS = {
    "pass1": ("Greedy pass@1, %", "pass@1", "What rises above its start taught itself. Fig. 1."),
    "distinct": ("Distinct equations, share", "distinct", "Low: it repeats itself. Fig. 2, right."),
    "passk": ("Pass@K, %", "pass@*", "Right at least once in K tries. Figs. 3, 5."),
    "passks": ("Pass@K-S, %", "pass@*-S", "Right at least S times in K tries. Figs. 3, 5."),
    "rewardks": (
        "Reward@K-S, %",
        "reward@*-S",
        "Are the S best-rewarded of K right? The reward holds the gold answer (Eq. 1), so with the "
        "answer alone this is Pass@K-S; a process reward takes from it where it lifts a wrong one "
        "above a right one. What one has without the gold answer is prm@K-S. Figs. 3, 6.",
    ),
    "temperature": ("Temperature T", "temperature", "At which pools were sampled. Tables 2, 3."),
    "tau": ("Threshold tau", "tau", "Responses with r > tau are trained on. Tables 2, 3."),
    "qe": ("Mean query effect of the pool", "qe", "Eq. 2 at that T and tau. Fig. 6, right."),
    "auc": (
        "AUC of the PRM on the pool",
        "prm/auc|prm/auc_sound|prm/step_auc",
        "Of scores against right answers, against solutions right in all steps, and of steps. "
        "0.5 is a coin; a falling curve is a PRM left behind. Observation 3.",
    ),
    "admitted": (
        "What gets past the PRM, share",
        "prm/wrong_admitted|prm/false_admitted|prm/min_last|prm/ece",
        "Wrong answers, and right ones by a wrong step, with r > tau; solutions whose lowest step "
        "is the last; calibration error. Sec. 2.3.",
    ),
    "ranked": (
        "prm@K-S, %",
        "prm@K-S",
        "Are the S best of K by the PRM alone right? The distance to Reward@K-S is what the gold "
        "answer does for the ranking. Figs. 3, 6.",
    ),
}


def curves(values: pd.DataFrame, label: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard error of "value" by iteration, a column a label, where all seeds have one.

    SFT beside other methods, whose iterations are epochs, is a level line of its last value.
    """
    cell = values.groupby(["iter", label], sort=False)["value"]
    mean, error, count = cell.mean().unstack(), cell.sem().unstack(), cell.count().unstack()
    mean = mean[count == count.max()].dropna(axis=1, how="all").sort_index()
    levels = set(values.loc[values["method"] == "sft", label])
    if levels < set(mean):
        for name in levels:
            mean[name] = mean[name].dropna().iloc[-1]
    return mean, error.reindex_like(mean).fillna(0)


def panels(values: pd.DataFrame) -> Iterator[tuple]:
    """PLOTS that have values: name, title, what to see, means, errors.

    Of one group a plot is a figure with a curve a key; of several a key is one, a curve a group.
    """
    many = values["group"].nunique() > 1
    every_K = "K" if many else r"(K|[2-9]|\d\d+)"  # pass@1 is the greedy one
    sizes = values.iloc[0]
    for name, (title, pattern, see) in PLOTS.items():
        keys = [key for key in values if re.fullmatch(pattern.replace("*", every_K), key)]
        long = values.melt(["group", "method", "iter"], keys, "key", "value").dropna()
        if many:
            for number, (key, part) in enumerate(long.groupby("key", sort=False)):
                own_title = f"{title}: {key}" if len(keys) > 1 else title
                yield f"{name}{number or ''}", own_title, see, *curves(part, "group")
        elif keys:
            long["key"] = [spelled(key, sizes) for key in long["key"]]
            yield name, title, see, *curves(long, "key")


def figure(out: Path, name: str, title: str, see: str, paint: Callable) -> str:
    """Draws by paint(ax), writes out/figures/NAME.png, and returns it as HTML."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style["grid.alpha"] = 0.3
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(4.6, 3.1), layout="constrained")
        ax = fig.subplots()
        paint(ax=ax)
        labels = ax.get_legend_handles_labels()[1]
        if len(labels) > 1:
            columns = max(1, 80 // (max(map(len, labels)) + 10))
            fig.set_figheight(3.1 + 0.17 * -(-len(labels) // columns))
            fig.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        buffer = io.BytesIO()
        fig.savefig(buffer, dpi=140)
    (out / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
    image = base64.b64encode(buffer.getvalue()).decode()
    title, see = escape(title), escape(see)
    return (
        f'<figure><h3>{title}</h3><img alt="{title}. {see}" src="data:image/png;base64,{image}">'
        f"<figcaption>{see}</figcaption></figure>"
    )


def curve_figures(out: Path, values: pd.DataFrame) -> list[str]:
    """The figures of PLOTS, a colour a curve; what an earlier figure shows is not drawn again."""
    colour = dict(zip(values["group"].unique(), itertools.cycle(COLOURS)))
    figures, drawn = [], {}
    for name, title, see, mean, error in panels(values):
        content = mean.to_csv(header=False)
        if content in drawn:
            figures.append(f"<p>{escape(title)}: the same curves as in {drawn[content]}.</p>")
            continue
        drawn[content] = escape(title)
        colours = [colour.get(label, COLOURS[i]) for i, label in enumerate(mean)]
        look = {"yerr": error, "color": colours, **over_iterations(mean, title)}
        paint = functools.partial(mean.plot, **look)
        figures.append(figure(out, name, title, see, paint))
    return figures


def over_iterations(table: pd.DataFrame, ylabel: str) -> dict:
    """How pandas draws curves over the iterations."""
    ticks = table.index[:: -(-len(table) // 10)]
    axes = {"xlabel": "iteration", "ylabel": ylabel, "xticks": ticks}
    return {"marker": ".", "legend": False, "grid": True, **axes}


def calibration_figure(out: Path, runs: Sequence[Run]) -> list[str]:
    """Score against share of right answers: in the last pool, and the first of a single run."""
    import pandas as pd

    lines = {"calibrated": pd.Series({0.0: 0.0, 1.0: 1.0})}
    for run in runs:
        rows = [row for row in run.rows if isinstance(row.get("prm/calibration"), dict)]
        for row in rows[-1:] if len(runs) > 1 else rows[:: max(1, len(rows) - 1)]:
            bins = pd.DataFrame(row["prm/calibration"]).dropna().set_index("score")
            lines[f"{run.name[-30:]}, iteration {row['iter']}"] = bins["correct"]
    if len(lines) == 1:
        return []

    def paint(ax):
        for colour, (label, line) in zip(itertools.cycle(COLOURS), lines.items()):
            ax.plot(line.index, line, color=colour, marker=".", label=label)
        ax.set(xlabel="score of a solution", ylabel="share with a right answer")

    see = "Below the diagonal the PRM promises more than it holds. Sec. 2.3, Eq. 1."
    return [figure(out, "calibration", "Calibration of the PRM", see, paint)]


def time_figure(out: Path, runs: Sequence[Run]) -> list[str]:
    """Seconds by phase: a bar an iteration for one run, else a bar a group, its mean run."""
    import pandas as pd

    lines = []
    for label, group in by_seed(runs).items():
        for line in itertools.chain.from_iterable(run.times for run in group):
            bar = label if len(runs) > 1 else f"iteration {line['iter']:g}"
            share = {"bar": bar, "seconds": line["seconds"] / len(group)}
            lines.append({"phase": "?", **line, **share})
    if not lines:
        return []
    table = pd.DataFrame(lines).pivot_table("seconds", "bar", "phase", aggfunc="sum", sort=False)

    def paint(ax):
        table[::-1].plot.barh(stacked=True, ax=ax, color=COLOURS, legend=False)
        ax.set(xlabel="seconds", ylabel="")

    phases = table.sum().sort_values(ascending=False)
    shares = ", ".join(f"{phase} {x / phases.sum():.0%}" for phase, x in phases.items())
    see = (
        f"{phases.sum() / len(by_seed(runs)):,.0f} seconds a run: {shares}. Iteration 0 is the "
        "start (base model, SFT, PRM); balance is what B-STaR adds to other methods. Sec. 3.3."
    )
    return [figure(out, "time", "Where the time went", see, paint)]


def surface_figures(out: Path, name: str, ledger: Sequence[dict]) -> list[str]:
    """The query effect at every (T, tau) of each decision."""
    figures = []
    for d in ledger:
        chosen = (
            f"Ring: the choice, T {d['temperature']:g}, tau {d['tau']:g}; dots: the {d['ties']} of "
            f"{np.size(d['surface']) - 1} other points within noise of it. Table 2."
        )
        blind = "No right answer was selected at any point, so T and tau are the default."
        see = chosen if np.any(d["surface"]) else blind
        title = f"Query effect on the subset, iteration {d['iter']}"
        paint = functools.partial(draw_surface, d=d)
        figures.append(figure(out, f"{name}_surface{d['iter']}", title, see, paint))
    return figures


def draw_surface(ax, d: dict) -> None:
    """qe(T, tau) as a map; coordinates are places in the grids."""
    image = ax.imshow(np.transpose(d["surface"]), aspect="auto", origin="lower", cmap="Blues")
    ax.figure.colorbar(image, ax=ax, label="mean query effect")
    for point in d["tied"]:
        ax.plot(*place_of(d, *point), "o", color="white", markeredgecolor="black", markersize=3.5)
    chosen = place_of(d, d["temperature"], d["tau"])
    for colour, width in (("white", 3.2), ("#d2304f", 1.8)):
        ax.plot(*chosen, "o", markersize=10, fillstyle="none", color=colour, markeredgewidth=width)
    for axis, values in ((ax.xaxis, d["temperatures"]), (ax.yaxis, d["taus"])):
        places = range(0, len(values), -(-len(values) // 8))
        axis.set_ticks(places, [f"{values[place]:g}" for place in places])
    ax.set(xlabel="temperature T", ylabel="threshold tau")


FIG4 = {
    "left": "Where the curves lie apart, more samples a question are worth it.",
    "middle": "In the paper it rises.",
    "right": "In the paper it falls.",
}


def fig4_figures(out: Path, name: str, parts: Sequence[str], again: Sequence[tuple]) -> list[str]:
    """Parts of Fig. 4, of one run's replay."""
    import pandas as pd

    iterations = [line["iter"] for line, _ in again]
    figures = []
    for part in parts:
        table = pd.DataFrame([fig[part] for _, fig in again], index=iterations)
        title = "Mean query effect" if part == "left" else table.columns[0]
        paint = functools.partial(table.plot, color=COLOURS, **over_iterations(table, title))
        see = f"{FIG4[part]} Fig. 4, {part}."
        figures.append(figure(out, f"{name}_{part}", title, see, paint))
    return figures


# -- the page --------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<style>:root{{color-scheme:light dark;--soft:#59636e;--line:#d6dbe1;--warn:#fff4dc;--paper:#fff}}
body{{margin:0 auto;max-width:84rem;padding:1rem;font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere;background:var(--paper)}}
h1{{font-size:1.4rem}}h2{{font-size:1.15rem;border-bottom:1px solid var(--line)}}
h3{{font-size:1rem;margin:0}}.alarm{{background:var(--warn);padding:.4rem .7rem}}
.grid{{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}}
figure{{margin:0;min-width:0}}figcaption{{font-size:.87rem;color:var(--soft)}}img{{width:100%}}
pre{{white-space:pre-wrap;margin:.3rem 0;max-height:20rem;overflow:auto}}
.wide{{overflow-x:auto}}summary{{cursor:pointer;font-weight:600}}
table{{border-collapse:collapse;margin:.6rem 0;font-size:.85rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.15rem .55rem;text-align:right;border-bottom:1px solid var(--line)}}
th,td{{white-space:nowrap}}
th:first-child,td:first-child{{text-align:left}}
@media(max-width:40rem){{td:first-child{{white-space:normal;min-width:6.5rem}}}}
@media(prefers-color-scheme:dark){{
:root{{--soft:#9aa5b1;--line:#343b43;--warn:#3a2f14;--paper:#141414}}
img{{filter:invert(.92) hue-rotate(180deg)}}}}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


def report(runs: Sequence[Run], out: Path) -> Path:
    """Writes out/report.html, which needs nothing else, and its figures as out/figures/*.png."""
    drawn = [run for run in runs if run.rows]
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts = [verdict(label, group) for label, group in by_seed(drawn).items()]
    if len(drawn) == 1:
        parts += warnings(drawn[0])
    parts += [wide(table(runs)), *settings_html(drawn)]
    figures = []
    if drawn:
        figures = curve_figures(out, all_numbers(drawn)) + calibration_figure(out, drawn)
        figures += time_figure(out, drawn)
    parts += section("Over the iterations (figures and tables named are the paper's)", figures)
    for number, run in enumerate(drawn, 1):
        parts.append(f"<h2>{escape(run.name)}</h2>")
        parts += [] if len(drawn) == 1 else warnings(run)
        parts += run_html(out, f"run{number}", run)
    title = drawn[0].name if len(drawn) == 1 else f"{len(drawn)} runs with metrics"
    return write_page(out / "report.html", title, parts)


MAIN_SETTINGS = "task model method reward num_iters queries_per_iter K steps_per_iter".split()


def verdict(label: str, runs: Sequence[Run]) -> str:
    """In words: what rose and fell beyond noise in all seeds, T and tau, alarms, main settings."""
    values = all_numbers(runs)
    sentences = {"Rose": [], "Fell": [], "Not clearly changed": []}
    per_run = [changes(run.rows) for run in runs]
    for key in per_run[0]:
        seen = [changed[key] for changed in per_run if key in changed]
        before, after, sign = np.mean(seen, axis=0)
        word = {1: "Rose", -1: "Fell"}.get(sign, "Not clearly changed")
        sentences[word].append(f"{spelled(key, runs[0].rows[0])} {before:.3g} → {after:.3g}")
    for key, name in (("temperature", "T of the pools"), ("tau", "tau of the pools")):
        chosen = values.get(key, values["iter"][:0]).dropna()
        sentences[name] = [f"{x:g}" for x in (chosen if len(runs) == 1 else sorted(set(chosen)))]
    kinds = Counter()
    for run in runs:
        kinds.update({line.split(":")[0] for line in alarms(run.rows, run.ledger)} - {"ties"})
    sentences["Alarms"] = [f"{kind} in {n} of {len(runs)}" for kind, n in sorted(kinds.items())]
    config = runs[0].config
    sentences["Settings"] = [f"{key} {config[key]}" for key in MAIN_SETTINGS if config.get(key)]
    texts = [f"{word}: {', '.join(parts)}." for word, parts in sentences.items() if parts]
    return f"<p><b>{escape(label)}</b><br>{'<br>'.join(map(escape, texts))}</p>"


def warnings(run: Run) -> list[str]:
    """Lost lines and alarms."""
    lines = [*run.lost, *alarms(run.rows, run.ledger)]
    return [f'<p class="alarm">{escape(line)}</p>' for line in lines]


def settings_html(runs: Sequence[Run]) -> list[str]:
    """The settings in which groups differ, and all of them, to unfold."""
    import pandas as pd

    configs = {label: group[0].config for label, group in by_seed(runs).items()}
    every = pd.DataFrame(configs).astype(str)
    differing = every[every.nunique(axis=1) > 1]
    everything = f"<details><summary>All settings</summary>{frame_html(every)}</details>"
    return [everything] if differing.empty else [frame_html(differing), everything]


def frame_html(frame: pd.DataFrame) -> str:
    """A data frame as HTML that scrolls by itself where it is too wide."""
    text = frame.to_html(na_rep="", border=0, float_format="{:g}".format)
    return f'<div class="wide" tabindex="0">{text}</div>'


def run_html(out: Path, name: str, run: Run) -> list[str]:
    """What a run has of its own: every number, the balancer's decisions, Fig. 4."""
    every = frame_html(all_numbers([run]).set_index("iter").select_dtypes("number").T)
    parts = [f"<details><summary>Every number of metrics.jsonl</summary>{every}</details>"]
    parts += samples_html(run)
    if run.ledger:
        parts.append(wide(decisions_table(run.ledger)))
        figures = surface_figures(out, name, run.ledger)
        try:
            figures = fig4_figures(out, name, ["left"], replay(run)) + figures
        except UserError as error:
            parts.append(f"<p>No Fig. 4: {escape(str(error))}</p>")
        parts += section("What the balancer saw and chose", figures)
    return parts


def first_responses(path: Path) -> dict[str, dict]:
    """query id -> its first response in samples/iter_N.jsonl.gz; {} where that can't be read."""
    firsts: dict[str, dict] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                firsts.setdefault(sample["query"], sample)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return {}
    return firsts


def samples_html(run: Run) -> list[str]:
    """The first responses to three questions in the first pool and in the last."""
    last = run.rows[-1]["iter"]
    folder = run.path / "samples"
    before = first_responses(folder / "iter_1.jsonl.gz")
    after = first_responses(folder / f"iter_{last}.jsonl.gz") if last > 1 else {}
    shared = [query for query in before if query in after]
    cards = []
    for i, pool in ((1, before), (last, after)):
        for query in [*shared, *pool][:3] if pool else []:
            cards.append(card(f"{query}, drawn by M_{i - 1} in iteration {i}", pool[query]))
    return section("Responses before and after", cards)


def card(title: str, sample: dict) -> str:
    """A response with its question and gold answer, where they are known, and its marks."""
    marks = ["right" if sample.get("correct") else "wrong", f"reward {sample.get('reward')}"]
    marks.append("trained on" if sample.get("selected") else "not trained on")
    if "gold" in sample:
        marks.append(f"gold {sample['gold']}")
    texts = [str(sample[key]) for key in ("question", "response") if key in sample]
    body = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
    caption = f"<figcaption>{escape(', '.join(marks))}</figcaption>"
    return f"<figure><h3>{escape(title)}</h3>{body}{caption}</figure>"


def wide(text: str) -> str:
    """A Markdown table as HTML that scrolls by itself where it is too wide."""
    rows = []
    for line in text.splitlines():
        tag = "td" if rows else "th"
        texts = [f"<{tag}>{escape(cell.strip())}</{tag}>" for cell in line[1:-1].split("|")]
        rows.append(f"<tr>{''.join(texts)}</tr>")
    del rows[1]  # the rule under the head
    return f'<div class="wide" tabindex="0"><table>{"".join(rows)}</table></div>'


def section(title: str, figures: Sequence[str]) -> list[str]:
    """A heading and figures, side by side where there is room."""
    return [f"<h2>{title}</h2>", f'<div class="grid">{"".join(figures)}</div>'] if figures else []


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Writes parts of HTML as one page."""
    path.write_text(PAGE.format(title=escape(title), body="".join(parts)), encoding="utf-8")
    return path


# -- the command line ------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `settings` in it are a replay's."""
    p = Parser(prog="report.py", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("--out", type=Path, help="where the page goes (default: the folder of the runs)")
    p.add_argument("--against", type=Path, metavar="RUN", help="differences to its group, by seed")
    p.add_argument("--replay", action="store_true", help="take a run's decisions again")
    for name in ("temperatures", "taus"):
        kind = functools.partial(grid, name)
        p.add_argument(f"--{name}", type=kind, help="with --replay, FROM:TO:STEP")
    for name in ("--n-star", "--queries", "--samples"):
        p.add_argument(name, type=at_least_one, help="with --replay, instead of the run's")
    args = p.parse_intermixed_args(argv)
    names = ("temperatures", "taus", "n_star", "queries", "samples")
    args.settings = {name: getattr(args, name) for name in names}
    if any(args.settings.values()) and not args.replay:
        raise UserError(
            "--temperatures, --taus, --n-star, --queries, --samples: only with --replay"
        )
    if args.replay and (args.against or len(args.runs) > 1):
        raise UserError("--replay: expected one run, and no --against")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """python report.py RUN [RUN ...] | --replay RUN"""
    args = arguments(argv)
    runs = [read_run(path) for path in dict.fromkeys(args.runs)]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.path)) for run in runs]
    if args.against:
        print(comparison(runs, args.against))
        return
    parents = [run.path.resolve().parent for run in runs]
    out = args.out or (runs[0].path if len(runs) == 1 else Path(os.path.commonpath(parents)))
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    if args.replay:
        print(replayed(runs[0], args.settings, out))
        return
    print(table(runs), end="\n\n")
    for run in runs:
        alarm_lines = [f"{run.name}, {line}" for line in alarms(run.rows, run.ledger)]
        for line in run.lost + alarm_lines:
            print(line)
    print(report(runs, out))


def replayed(run: Run, settings: dict, out: Path) -> str:
    """The decisions taken again, as a table; and in out/replay.html, with surfaces and Fig. 4."""
    if not run.ledger:
        raise UserError(f"--replay {run.path}: no decision in its ledger.jsonl")
    again = replay(run, **settings)
    lines = [line for line, _ in again]
    text = decisions_table(lines)
    figures = fig4_figures(out, "replay", list(FIG4), again) + surface_figures(out, "replay", lines)
    page = write_page(
        out / "replay.html", f"{run.name}, replayed", [wide(text), *section("Decisions", figures)]
    )
    same = sum(map(dict.__eq__, lines, run.ledger))
    return f"{text}\n\n{same} of {len(again)} decisions equal the ledger's in every field\n{page}"


if __name__ == "__main__":
    data.run(main)
