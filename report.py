"""What finished runs show: a table, alarms, one page with figures; and decisions taken again.

runs/NAME/{config.json, *.jsonl, samples/} -> a Markdown table, report.html

python report.py RUN [RUN ...]                   table, alarms and page
python report.py RUN [RUN ...] --against RUN     the same, and differences to RUN's group
python report.py --replay RUN [--taus=-1:1:0.1] [--n-star 6] [--queries 100] [--samples 16]
"""

from __future__ import annotations

import base64
import functools
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import data
from config import Parser, grid
from data import UserError, read_jsonl
from metrics import Outcomes, decide

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


Groups = dict[str, list[Run]]  # name -> runs that differ in the seed alone

# what a line must say in numbers
ROW = "iter eval_samples S pass@1 val/pass@1".split()
DECISION = "iter temperature tau qe ties n_star seed empty".split()
# and a decision in lists
GRIDS = "temperatures taus surface tied edge".split()


def read_run(path: Path) -> Run:
    """Reads a run's folder; lines that are torn or foreign are left out.

    raises  UserError  where the folder is no run of bstar.py
    """
    config = read_config(path)
    if not config:
        raise UserError(f"{path}: no config.json of bstar.py; expected a run's folder")
    # out of the config, so that runs which differ in the seed alone have equal ones
    seed = config.pop("seed")
    rows = with_numbers(read_jsonl(path / "metrics.jsonl"), ROW)
    ledger = decisions(read_jsonl(path / "ledger.jsonl"))
    return Run(path, path.resolve().name, seed, config, rows, ledger, read_times(path))


def read_config(folder: Path) -> dict:
    """config.json of a run's folder; {} where there is none, or one of something else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(config, dict) and {"seed", "method", "reward"} <= config.keys()
    return config if is_ours else {}


def read_times(folder: Path) -> list[dict]:
    """times.jsonl of a run's folder: the seconds of each phase of each iteration."""
    timed = with_numbers(read_jsonl(folder / "times.jsonl"), ["iter", "seconds"])
    return [row for row in timed if isinstance(row.get("phase"), str)]


def with_numbers(lines: Iterable[dict], keys: Sequence[str]) -> list[dict]:
    """The lines in which all keys have finite numbers; True and None are none."""
    whole = []
    for line in lines:
        values = [line.get(key) for key in keys]
        # not isinstance: True is an int
        if all(type(x) in (int, float) and isfinite(x) for x in values):
            whole.append(line)
    return whole


def decisions(lines: Iterable[dict]) -> list[dict]:
    """The ledger's lines that hold all numbers and lists of a decision."""
    whole = []
    for d in with_numbers(lines, DECISION):
        if all(isinstance(d.get(key), list) for key in GRIDS):
            whole.append(d)
    return whole


# -- the table -------------------------------------------------------------------------------------

COLUMNS = """pass@1 val/pass@1 pass@K pass@K-S reward@K-S prm@K-S distinct sound@1 sound@K
             false_reasoning selected/false_reasoning temperature tau iter seeds""".split()


def spelled(key: str, row: dict) -> str:
    """A metric's name with the K and S of a run, as pass@32-4 for pass@K-S."""
    return key.replace("@K", f"@{row['eval_samples']}").replace("-S", f"-{row['S']}")


def by_seed(runs: Sequence[Run]) -> Groups:
    """Runs that differ in the seed alone, under a common name; a seed twice makes two groups."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not run.rows:
            raise UserError(f"{run.path}: no metrics yet; leave it out")
        key = json.dumps(run.config, sort_keys=True)
        # otherwise differences, which are paired by seed, would have two values of one
        while run.seed in [other.seed for other in groups.get(key, [])]:
            key += " again"
        groups.setdefault(key, []).append(run)
    named = {}
    for group in groups.values():
        seeds = [str(run.seed) for run in group]
        named[f"{group[0].name}, seed {' '.join(seeds)}"] = group
    return named


def frame(groups: Groups) -> pd.DataFrame:
    """metrics.jsonl of all runs, a line an iteration; "run" names the group."""
    import pandas as pd

    lines = []
    for name, group in groups.items():
        for run in group:
            lines += [{"run": name, "seed": run.seed, **row} for row in run.rows]
    return pd.DataFrame(lines)


def summary(runs: Sequence[Run], against: Path | None = None) -> pd.DataFrame:
    """Each group's first, last and best iteration, its gain, its distance to `against`   [Table 1]

    A cell is the mean ± standard error over seeds, "" where a seed has no value. The gain is from
    first to last, the best is best on validation questions, the difference is that of the last
    iterations, paired by seed.
    """
    import pandas as pd

    groups = by_seed(runs)
    run = ["run", "seed"]
    # calibration is a dict a row, which no mean takes
    values = frame(groups).set_index(run).select_dtypes("number")
    by_run = values.groupby(run)
    # stable: of equals the earliest is the best, as in the run's own choice
    best_first = values.sort_values("val/pass@1", ascending=False, kind="stable")
    best = best_first.groupby(run).nth(0)
    picked = {"first": by_run.nth(0), "last": by_run.nth(-1), "best": best}
    picked["gain"] = picked["last"] - picked["first"]
    if against:
        home = home_of(groups, against)
        base = picked["last"].loc[home]
        # by seed, since runs of one seed share data and SFT: their common luck cancels out
        difference = picked["last"].drop(home, level="run").sub(base, level="seed")
        picked["difference"] = difference.dropna(how="all")
    stacked = pd.concat(picked, names=["iteration"])
    lines = stacked.groupby(["run", "iteration"], sort=False)
    error = lines.sem()  # NaN of one seed
    error = error.map(" ± {:.2g}".format).where(error.notna(), "")
    text = lines.mean().map("{:.4g}".format) + error
    is_whole = lines.count().eq(lines.size(), axis=0)
    # a mean over fewer seeds than the cell beside it would not compare
    text = text.where(is_whole, "")
    text["seeds"] = lines.size()
    columns = []
    for group in groups.values():  # each with its own K and S in the names
        columns += [spelled(key, group[0].rows[-1]) for key in COLUMNS]
    columns = [name for name in dict.fromkeys(columns) if name in text]
    if "distinct" in columns and not values["distinct"].any():
        columns.remove("distinct")  # no solution has an equation
    return text.loc[list(groups), columns].reset_index()


def home_of(groups: Groups, against: Path) -> str:
    """The name of a run's group."""
    for name, group in groups.items():
        if against.resolve() in [run.path.resolve() for run in group]:
            return name
    raise UserError(f"--against {against}: not one of the runs given")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [table.columns, ["---"] * table.shape[1], *table.values]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# -- alarms ----------------------------------------------------------------------------------------


def alarms(rows: Sequence[dict], ledger: Sequence[dict]) -> list[str]:
    """What to look at in a run, one line each; the word before the colon is the kind."""
    rows = with_numbers(rows, ROW)
    ledger = decisions(ledger)
    return [*reversal(rows), *drift(rows), *edges(ledger), *ties(ledger)]


def shift(before: float, n_before: float, after: float, n_after: float) -> int:
    """+1 or -1 where a share of n rose or fell by more than two standard errors, else 0.

    For a mean of shares, as distinct equations are, the error is an upper bound.

    >>> shift(0.96, 200, 0.82, 200), shift(0.96, 200, 0.93, 200)
    (-1, 0)
    """
    # one more success and failure on each side (Agresti & Caffo 2000): shares of 0 and 1 err, too
    p = (before * n_before + 1) / (n_before + 2)
    q = (after * n_after + 1) / (n_after + 2)
    p_variance = p * (1 - p) / (n_before + 2)
    q_variance = q * (1 - q) / (n_after + 2)
    if abs(q - p) <= 2 * (p_variance + q_variance) ** 0.5:
        return 0
    return 1 if q > p else -1


def changes(rows: Sequence[dict]) -> dict[str, tuple[float, float, int]]:
    """metric -> its first value, its last, and the sign of the change where it is beyond noise."""
    changed = {}
    for name in ("pass@1", "pass@K", "pass@K-S", "sound@1", "distinct"):
        key = spelled(name, rows[0])
        first, last = rows[0], rows[-1]
        if key == "distinct" and not any(row.get(key) for row in rows):
            continue  # no solution has an equation
        needed = [key, "queries", "coverage"] if key == "distinct" else [key, "queries"]
        if len(with_numbers([first, last], needed)) == 2:
            sign = shift(*share(first, key), *share(last, key))
            changed[key] = (first[key], last[key], sign)
    return changed


def share(row: dict, key: str) -> tuple[float, float]:
    """A metric as a share, and of how many questions."""
    if key == "distinct":  # a question without a right answer has no equations
        return row[key], row["queries"] * row["coverage"]
    return row[key] / 100, row["queries"]


def reversal(rows: Sequence[dict]) -> Iterator[str]:
    """pass@1 rose while pass@K or distinct equations fell: "reversal" of Wu et al. (2024)."""
    changed = changes(rows) if rows else {}
    fell = []
    for key, (before, after, sign) in changed.items():
        if sign < 0 and key in ("distinct", spelled("pass@K", rows[0])):
            fell.append(f"{key} fell {before:.3g} -> {after:.3g}")
    if fell and changed["pass@1"][2] > 0:
        before, after, _ = changed["pass@1"]
        rose = f"pass@1 rose {before:.1f} -> {after:.1f}"
        yield f"reversal: {rose} while {' and '.join(fell)}, each beyond noise"


def drift(rows: Sequence[dict]) -> Iterator[str]:
    """prm/auc is more than 0.05 below the first: the policy left the PRM   [Observation 3]"""
    aucs = [row["prm/auc"] for row in with_numbers(rows, ["prm/auc"])]
    if aucs and min(aucs) < aucs[0] - 0.05:
        fell = f"the PRM's AUC fell {aucs[0]:.3f} -> {min(aucs):.3f}"
        yield f"drift: {fell}; train it again, on solutions of the policy as it is now"


def edges(ledger: Sequence[dict]) -> Iterator[str]:
    """Choices at an end of a grid are better than their neighbour inside."""
    for name in ("temperature", "tau"):
        # a tie with the neighbour inside says nothing for a wider grid
        better = [d for d in ledger if name in d["edge"] and beats_inside(d, name)]
        if better:
            last, n = better[-1], f"{len(better)} of {len(ledger)} decisions"
            yield (
                f"edge: the best {name} was an end of its grid in {n}, last {last[name]:g} in "
                f"iteration {last['iter']}; a wider --{name}s may hold a better one"
            )


def beats_inside(d: dict, name: str) -> bool:
    """Whether a choice at an end of a grid is better than its neighbour, and no tie of the two."""
    at = d["temperatures"].index(d["temperature"])
    other = d["taus"].index(d["tau"])
    surface = np.array(d["surface"])  # (G_T, G_tau)
    if name == "tau":
        at, other, surface = other, at, surface.T
    inside = 1 if at == 0 else at - 1
    return surface[at, other] > surface[inside, other]


def ties(ledger: Sequence[dict]) -> Iterator[str]:
    """Other grid points are within noise of the choice (95 %, paired bootstrap over queries)."""
    # on a surface of zeros all points tie, and more queries would not change that
    tied = [d for d in ledger if d["ties"] and np.any(d["surface"])]
    if tied:
        last = tied[-1]
        yield (
            f"ties: {last['ties']} of {np.size(last['surface']) - 1} other grid points are within "
            f"noise of iteration {last['iter']}'s choice, as in {len(tied)} of {len(ledger)} "
            "decisions; more --balance-queries tell more of them apart"
        )


def notices(run: Run) -> str:
    """A run's name, its alarms, and the number of its lost lines, one a line."""
    lines = [run.name, *alarms(run.rows, run.ledger)]
    last = int(run.rows[-1]["iter"])
    lost = last + 1 - len(run.rows)
    # without a ledger T and tau were given; after a kill it may be a decision ahead
    if (run.path / "ledger.jsonl").is_file():
        lost += max(0, last - len(run.ledger))
    if lost:
        lines.append(f"lost: the lines of {lost} iterations are torn, foreign or gone")
    return "\n".join(lines)


# -- replay: a run's decisions taken again, without any model --------------------------------------


def load_pool(run: Run, d: dict) -> list[np.ndarray]:
    """reward, correct, text (G_T, Q, K) of the samples behind a ledger line."""
    path = run.path / "samples" / f"balance_{d['iter']}.npz"
    kinds = {"reward": float, "correct": bool, "text": int}
    try:
        with np.load(path) as saved:
            pool = [saved[name].astype(kind) for name, kind in kinds.items()]
        # raises unless the three have one shape, or where they are no (G_T, Q, K)
        G, Q, K = np.broadcast_shapes(*(array.shape for array in pool))
        if G != len(d["temperatures"]) or 0 in (Q, K):
            raise ValueError
    except Exception:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path}: missing, broken, or not of this ledger") from None
    return pool


def replay(run: Run, **settings) -> list[dict]:
    """The ledger's decisions with other settings; with none, the ledger itself   [Sec. 3.2, Fig. 4]

    temperatures  some of those sampled at
    taus, n_star  any
    queries       the first so many of the subset, whose order is random
    samples       the first so many of the K drawn to a query
    raises        UserError  where a setting asks for what was not sampled
    """
    if not run.ledger:
        raise UserError(f"--replay {run.path}: no decision in its ledger.jsonl")
    again = []
    for d in run.ledger:
        pool = load_pool(run, d)
        _, Q, K = pool[0].shape
        own = {key: d[key] for key in ("temperatures", "taus", "n_star")}
        # a key keeps the place where it came first, so the values come out in this order
        asked = {**own, "queries": Q, "samples": K, **settings}
        Ts, taus, n_star, queries, samples = asked.values()
        was_drawn = set(Ts) <= set(d["temperatures"]) and queries <= Q and samples <= K
        if not was_drawn or min(n_star, queries, samples) < 1:
            raise UserError(
                f"--replay: expected temperatures among {d['temperatures']}, 1 to {Q} queries, "
                f"1 to {K} samples, and an n-star from 1"
            )
        places = [d["temperatures"].index(T) for T in Ts]
        pool = [array[places, :queries, :samples] for array in pool]
        by_T = [Outcomes(*arrays) for arrays in zip(*pool)]
        # by the ledger's own seed, so that with no settings the bootstrap draws the same queries
        line = decide(by_T, Ts, taus, n_star, d["seed"])
        again.append({"iter": d["iter"], **line})
    return again


def decisions_table(ledger: Sequence[dict]) -> pd.DataFrame:
    """The balancer's choices, and the best T or tau where the other is fixed   [Table 2, Fig. 4]"""
    import pandas as pd

    columns = ["iter", "temperature", "tau", "qe", "interval", "ties", "empty", "edge"]
    table = pd.DataFrame(ledger, columns=columns).round(4)
    best_T, best_tau = [], []
    for d in ledger:
        T, taus = d["temperatures"], d["taus"]
        # the points nearest to those that the paper fixes
        i = np.abs(np.array(T) - 1.0).argmin()
        j = np.abs(taus).argmin()
        surface = np.array(d["surface"])  # (G_T, G_tau)
        # of equal points the lower T and the higher tau, as in `decide`
        best_T.append(T[surface[:, j].argmax()])
        best_tau.append(taus[::-1][surface[i, ::-1].argmax()])
    return table.assign(**{"best T at tau 0": best_T, "best tau at T 1": best_tau})


# -- figures ---------------------------------------------------------------------------------------

# a metric: what to see, and where in the paper
PLOTS = {
    "pass@1": "Greedy, %. What rises above its start taught itself. Fig. 1.",
    "distinct": "Share of distinct equations. Low: it repeats itself. Fig. 2, right.",
    "pass@K": "Right at least once in K tries, %. Figs. 3, 5.",
    "pass@K-S": "Right at least S times in K tries, %. Figs. 3, 5.",
    "reward@K-S": "Are the S best-rewarded of K right, %; the reward holds the answer. Figs. 3, 6.",
    "prm@K-S": "The same by the PRM alone, without the gold answer, %.",
    "temperature": "At which pools were sampled. Tables 2, 3.",
    "tau": "Responses with r > tau are trained on. Tables 2, 3.",
    "qe": "Mean query effect of the pool, Eq. 2, at that T and tau. Fig. 6, right.",
    "prm/auc": "The PRM's scores against right answers. 0.5 is a coin. Observation 3.",
    "prm/auc_sound": "The same against solutions that are right in all steps.",
    "prm/wrong_admitted": "Share of wrong answers with r > tau. Sec. 2.3.",
    "prm/false_admitted": "Share of right answers by a wrong step with r > tau. Sec. 2.3.",
}


def curve_figures(groups: Groups, folder: Path) -> list[str]:
    """PLOTS: means over seeds with their standard errors; a curve a group, or of one group a K."""
    values = frame(groups)
    methods = {name: group[0].config["method"] for name, group in groups.items()}
    figures = []
    for name, see in PLOTS.items():
        keys = columns_of(name, values.select_dtypes("number"))
        if len(groups) > 1:  # all K of all groups would be too many curves
            keys = keys[:1]
        if not keys:
            continue
        ax = axes(xlabel="iteration")
        ax.grid(alpha=0.4)
        curves = list(itertools.product(groups, keys))
        for (group, key), colour in zip(curves, distinct_colours(len(curves))):
            seeds = values[values["run"] == group].groupby("iter")[key]
            # one seed has no standard error, and still a curve
            curve = seeds.agg(["mean", "sem"]).dropna(subset="mean").fillna(0)
            if curve.empty:  # without a PRM there are none of its metrics
                continue
            if methods[group] == "sft" and set(methods.values()) != {"sft"}:
                # its iterations are epochs: beside other methods it is a level line at its end
                curve = curve.tail(1).reindex(values["iter"].unique(), method="nearest")
            label = group if len(groups) > 1 else key
            look = {"label": label, "color": colour, "marker": "."}
            ax.errorbar(curve.index, curve["mean"], curve["sem"], **look)
        title = keys[0] if len(keys) == 1 else name
        figures.append(figure(ax, title, see, folder))
    return figures


def columns_of(name: str, numbers: pd.DataFrame) -> list[str]:
    """The metrics that a name of PLOTS stands for, the largest K first, if they show anything."""
    # not @1: pass@1 is the greedy answer, no K of the samples
    pattern = name.replace("@K", r"@(?!1$)\d+").replace("-S", r"-\d+")
    keys = []
    for key, column in numbers.filter(regex=f"^{pattern}$").items():
        if key.startswith("reward@") and column.equals(numbers.get(key.replace("reward", "pass"))):
            continue  # by the answer alone the best-rewarded are the right ones: Pass@K-S again
        if key == "distinct" and not column.any():
            continue  # no solution has an equation
        keys.append(key)
    # by length first, so that 16 is above 8
    return sorted(keys, key=lambda key: (len(key), key), reverse=True)


def distinct_colours(n: int) -> Sequence:
    """n colours; the ten that are easiest to tell apart, where they suffice."""
    from matplotlib import colormaps

    if n <= 10:
        return colormaps["tab10"].colors
    return colormaps["turbo"](np.linspace(0, 1, n))


def run_figures(run: Run, folder: Path) -> list[str]:
    """The PRM's calibration in the first pool and the last, the time, the balancer's surfaces."""
    import pandas as pd

    figures = []
    rows = [row for row in run.rows if isinstance(row.get("prm/calibration"), dict)]
    if rows:
        ax = axes(xlabel="score of a solution", ylabel="share with a right answer")
        ax.plot([0, 1], [0, 1], label="calibrated")
        for row in (rows[0], rows[-1]):
            bins = pd.DataFrame(row["prm/calibration"]).dropna()
            ax.plot(bins["score"], bins["correct"], ".-", label=f"iteration {row['iter']}")
        see = "Below the diagonal the PRM promises more than it holds. Sec. 2.3, Eq. 1."
        figures.append(figure(ax, "Calibration of the PRM", see, folder))
    if run.times:
        figures.append(time_figure([run], "iteration", folder))
    return figures + [surface_figure(d, folder) for d in run.ledger]


def time_figure(runs: Sequence[Run], by: str, folder: Path) -> str:
    """Seconds of each phase, a bar an iteration or a run."""
    import pandas as pd

    lines = {run.name: pd.DataFrame(run.times) for run in runs}
    times = pd.concat(lines, names=["run"])
    times = times.rename(columns={"iter": "iteration"})
    table = times.pivot_table("seconds", by, "phase", aggfunc="sum", sort=False)
    ax = axes()
    # bars are drawn from below, and phases in the order in which they began
    table[::-1].plot.barh(stacked=True, ax=ax)
    ax.figure.set_figheight(max(3.1, 0.22 * len(table)))
    see = f"{times['seconds'].sum():,.0f} in all, base model, SFT and PRM included. Sec. 3.3."
    return figure(ax, f"Seconds of each {by}", see, folder)


def surface_figure(d: dict, folder: Path) -> str:
    """The query effect at every (T, tau) of a decision."""
    ax = axes(xlabel="temperature T", ylabel="threshold tau")
    # squares, not an image: steps may be uneven, and a grid may have one point
    T, tau = np.meshgrid(d["temperatures"], d["taus"], indexing="ij")
    points = ax.scatter(T, tau, c=d["surface"], cmap="Blues", marker="s", s=60)
    ax.figure.colorbar(points, label="mean query effect")
    for T, tau in d["tied"]:
        ax.plot(T, tau, ".", color="black")
    ax.plot(d["temperature"], d["tau"], "o", markersize=10, fillstyle="none", color="#d2304f")
    see = "Ring: the choice; dots: points within noise of it. Table 2."
    if not np.any(d["surface"]):
        see = "No right answer was selected at any point, so T and tau are the default."
    return figure(ax, f"Query effect on the subset, iteration {d['iter']}", see, folder)


def axes(**labels: str):
    """Empty axes of a figure."""
    from matplotlib.figure import Figure

    # not by pyplot, which keeps figures alive and asks for a screen
    return Figure(figsize=(4.6, 3.1)).subplots(subplot_kw=labels)


def figure(ax, title: str, see: str, folder: Path) -> str:
    """What is drawn on axes, as HTML; also a PNG file in the folder."""
    # below the axes, where it hides no curve
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    png = folder / (re.sub(r"\W+", "_", title) + ".png")
    ax.figure.savefig(png, dpi=140, bbox_inches="tight")
    image = base64.b64encode(png.read_bytes()).decode()
    title, see = escape(title), escape(see)
    return (
        f'<figure><h3>{title}</h3><img alt="{title}. {see}" src="data:image/png;base64,{image}">'
        f"<figcaption>{see}</figcaption></figure>"
    )


# -- the page --------------------------------------------------------------------------------------

# figures are dark on white: in dark mode they are inverted, and their hues turned back
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">
<style>:root{{color-scheme:light dark}}
body{{margin:0 auto;max-width:84rem;padding:1rem;font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}}
h1{{font-size:1.4rem}}h2{{font-size:1.15rem}}h3{{font-size:1rem;margin:0}}
.alarm{{border-left:4px solid #d90;padding-left:.6rem;max-height:none}}
.grid{{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}}
figure{{margin:0;min-width:0}}figcaption{{font-size:.87rem}}img{{width:100%}}
pre{{white-space:pre-wrap;max-height:20rem;overflow:auto}}.wide{{overflow-x:auto}}
th,td{{padding:.15rem .55rem;text-align:right;white-space:nowrap}}
th:first-child,td:first-child{{text-align:left}}
@media(max-width:40rem){{td:nth-child(-n+2){{white-space:normal;min-width:5.5rem}}}}
@media(prefers-color-scheme:dark){{img{{filter:invert(.92) hue-rotate(180deg)}}}}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


def report(runs: Sequence[Run], out: Path, against: Path | None = None) -> Path:
    """Writes out/report.html, which needs nothing else, and its figures as out/figures/*.png."""
    import pandas as pd

    groups = by_seed(runs)
    figures = out / "figures"
    parts = [verdict(name, group) for name, group in groups.items()]
    parts.append(html(summary(runs, against)))
    parts += [f'<pre class="alarm">{escape(notices(run))}</pre>' for run in runs]
    settings = pd.DataFrame({name: group[0].config for name, group in groups.items()})
    parts.append(details("Settings", settings.astype(str)))
    curves = curve_figures(groups, figures)
    if len(runs) > 1 and any(run.times for run in runs):
        curves.append(time_figure(runs, "run", figures))
    parts.append(section("Over the iterations", curves))
    for run in runs:
        folder = figures / re.sub(r"[^\w.+-]+", "_", run.name)  # the name may be a whole path
        parts.append(section(run.name, run_figures(run, folder) + response_cards(run)))
        if run.ledger:
            parts.append(html(decisions_table(run.ledger)))
        numbers = pd.DataFrame(run.rows).set_index("iter").select_dtypes("number")
        parts.append(details("Every number of each iteration", numbers.T))
    page = out / "report.html"
    title = escape("; ".join(groups))
    text = PAGE.format(title=title, body="".join(parts))
    page.write_text(text, encoding="utf-8")
    return page


def verdict(name: str, group: list[Run]) -> str:
    """In words: what rose and fell beyond noise in all seeds, and the pools' mean T and tau."""
    import pandas as pd

    words = {1: "Rose", -1: "Fell", 0: "Not clearly changed"}
    sentences: dict[str, list[str]] = {word: [] for word in words.values()}
    # a metric a column, a seed a line
    for key, seeds in pd.DataFrame([changes(run.rows) for run in group]).items():
        before, after, sign = np.mean(list(seeds.dropna()), axis=0)
        word = words[int(sign)]  # where seeds disagree the mean is a fraction, and no change
        sentences[word].append(f"{key} {before:.3g} → {after:.3g}")
    pools = frame({name: group}).groupby("iter").mean(numeric_only=True)
    for key, chosen in pools.filter(["temperature", "tau"]).items():
        sentences[f"{key} of the pools"] = [f"{x:.3g}" for x in chosen.dropna()]
    texts = [f"{word}: {', '.join(parts)}." for word, parts in sentences.items() if parts]
    return f"<p><b>{escape(name)}</b><br>{'<br>'.join(map(escape, texts))}</p>"


def first_responses(path: Path) -> dict[str, dict]:
    """query id -> its first response in samples/iter_N.jsonl.gz; {} where that can't be read."""
    firsts: dict[str, dict] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                firsts.setdefault(sample["query"], sample)
    except Exception:  # gzip, zlib and json each raise their own
        return {}
    return firsts


def response_cards(run: Run) -> list[str]:
    """The first responses to three questions in the first pool and in the last."""
    last = run.rows[-1]["iter"]
    pools = {i: first_responses(run.path / "samples" / f"iter_{i}.jsonl.gz") for i in (1, last)}
    # the same questions before and after, where both pools asked them
    shared = [query for query in pools[1] if query in pools[last]]
    shown = ["question", "response", "gold", "correct", "reward", "selected"]
    cards = []
    for i, pool in pools.items():
        for query in list(dict.fromkeys([*shared, *pool]))[:3]:
            texts = [f"{key}: {pool[query].get(key)}" for key in shown]
            title = escape(f"{query}, drawn by M_{i - 1} in iteration {i}")
            text = escape("\n\n".join(texts))
            cards.append(f"<figure><h3>{title}</h3><pre>{text}</pre></figure>")
    return cards


def html(table: pd.DataFrame) -> str:
    """A table as HTML that scrolls by itself where it is too wide."""
    import pandas as pd

    # pandas would cut long cells, such as the paths of settings
    with pd.option_context("display.max_colwidth", None):
        text = table.to_html(index=False, border=0, na_rep="", float_format="{:.6g}".format)
    return f'<div class="wide" tabindex="0">{text}</div>'


def details(title: str, table: pd.DataFrame) -> str:
    """A table to unfold, with its index as the first column."""
    text = html(table.rename_axis(columns=None).reset_index(names=""))
    return f"<details><summary>{title}</summary>{text}</details>"


def section(title: str, figures: Iterable[str]) -> str:
    """A heading and figures, side by side where there is room."""
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(figures)}</div>'


# -- the command line ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """python report.py RUN [RUN ...] [--against RUN] | --replay RUN"""
    p = Parser(prog="report.py", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("--out", type=Path, help="where the page goes (default: the folder of the runs)")
    p.add_argument("--against", type=Path, metavar="RUN", help="differences to its group, by seed")
    p.add_argument("--replay", action="store_true", help="take a run's decisions again")
    other = p.add_argument_group("with --replay, instead of the run's own")
    for name in ("temperatures", "taus"):
        other.add_argument(f"--{name}", type=functools.partial(grid, name), help="FROM:TO:STEP")
    for name in ("n-star", "queries", "samples"):
        other.add_argument(f"--{name}", type=int)
    # argparse's plain parse takes no RUN behind a flag that follows another RUN
    args = p.parse_intermixed_args(argv)
    runs = [read_run(path) for path in dict.fromkeys(args.runs)]
    settings = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("runs", "out", "against", "replay"):
        settings.pop(name, None)
    if args.replay:
        if args.against or len(runs) > 1:
            raise UserError("--replay: expected one run, and no --against")
        again = replay(runs[0], **settings)
        same = sum(map(dict.__eq__, again, runs[0].ledger))
        print(markdown(decisions_table(again)))
        print(f"\n{same} of {len(again)} decisions equal the ledger's in every field")
        return
    if settings:
        given = ", --".join(settings).replace("_", "-")
        raise UserError(f"--{given}: only with --replay")
    # a name stands for a run in figures and headings
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.path)) for run in runs]
    shared = runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent
    out = args.out or shared
    print(markdown(summary(runs, args.against)), *map(notices, runs), sep="\n\n")
    try:
        out.mkdir(parents=True, exist_ok=True)
        print(report(runs, out, args.against))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


if __name__ == "__main__":
    data.run(main)
