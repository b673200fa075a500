"""What finished runs show: a table, alarms, one page with figures; and decisions taken again.

runs/NAME/{config.json, *.jsonl, samples/} -> a Markdown table, report.html

python report.py RUN [RUN ...]                   table, alarms and page
python report.py RUN [RUN ...] --against RUN     the same, and differences to RUN's group
python report.py --replay RUN [--taus=-1:1:0.1] [--n-star 6] [--queries 100] [--samples 16]
"""

from __future__ import annotations

import argparse
import base64
import functools
import gzip
import json
import re
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

import data
from config import Parser, grid
from data import UserError
from metrics import decide, read_jsonl

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
    lost: int  # iterations whose line in one of the first two is torn, foreign or gone


ROW = "iter eval_samples S pass@1 val/pass@1".split()
DECISION = "iter temperature tau qe ties n_star seed empty".split()


def read_run(path: Path) -> Run:
    """Reads a run's folder; lines that are torn or lack what is shown are left out, and counted.

    raises  UserError  where the folder is no run of bstar.py
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        seed = config.pop("seed")
        config["method"], config["reward"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: no config.json of bstar.py; expected a run's folder") from None
    rows = read_lines(path / "metrics.jsonl", is_row)
    ledger = read_lines(path / "ledger.jsonl", is_decision)
    times = read_jsonl(path / "times.jsonl")
    times = [line for line in times if has_numbers(line, ["iter", "seconds"])]
    lost = 0
    if rows:
        last = int(rows[-1]["iter"])
        lost = last + 1 - len(rows)
        if (path / "ledger.jsonl").is_file():  # without one, T and tau were given
            lost += max(0, last - len(ledger))
    return Run(path, path.resolve().name, seed, config, rows, ledger, times, lost)


def read_lines(path: Path, is_one: Callable) -> list[dict]:
    """The last line of each iteration, by iteration."""
    lines = filter(is_one, read_jsonl(path))
    latest = {line["iter"]: line for line in lines}
    return [latest[i] for i in sorted(latest)]


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def has_numbers(line: dict, keys: Sequence[str]) -> bool:
    return all(map(is_number, map(line.get, keys)))


def is_row(line: dict) -> bool:
    return has_numbers(line, ROW)


def is_decision(line: dict) -> bool:
    """Whether it is a line of ledger.jsonl, of the shapes that `decide` gives it."""
    try:
        np.array(line["tied"], dtype=float).reshape(-1, 2)
        surface = np.array(line["surface"], dtype=float)
        fits = surface.shape == (len(line["temperatures"]), len(line["taus"])) and "edge" in line
        on_grid = line["temperature"] in line["temperatures"] and line["tau"] in line["taus"]
        return fits and on_grid and has_numbers(line, DECISION)
    except (KeyError, TypeError, ValueError):
        return False


# -- the table -------------------------------------------------------------------------------------

COLUMNS = """pass@1 val/pass@1 pass@K pass@K-S reward@K-S prm@K-S distinct sound@1 sound@K
             false_reasoning selected/false_reasoning temperature tau iter""".split()


def spelled(key: str, row: dict) -> str:
    """A metric's name with the K and S of a run, as pass@32-4 for pass@K-S."""
    return key.replace("@K", f"@{row['eval_samples']}").replace("-S", f"-{row['S']}")


def by_seed(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed alone, under a common name; a seed twice makes two groups."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not run.rows:
            raise UserError(f"{run.path}: no metrics yet; leave it out")
        key = json.dumps(run.config, sort_keys=True)
        while run.seed in [other.seed for other in groups.get(key, [])]:
            key += " again"
        groups.setdefault(key, []).append(run)
    named = {}
    for group in groups.values():
        seeds = [str(run.seed) for run in group]
        named[f"{group[0].name}, seed {' '.join(seeds)}"] = group
    return named


def ends(group: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """The first, last and best iteration of runs, a seed a line; best on validation questions."""
    import pandas as pd

    picked = {
        "first": [run.rows[0] for run in group],
        "last": [run.rows[-1] for run in group],
        "best": [max(run.rows, key=lambda row: row["val/pass@1"]) for run in group],
    }
    seeds = [run.seed for run in group]
    return {when: pd.DataFrame(x, seeds).select_dtypes("number") for when, x in picked.items()}


def cells(values: pd.DataFrame) -> dict[str, str]:
    """Mean ± standard error over seeds of each column; "" where a seed has no value."""
    texts = {}
    for name, column in values.items():
        texts[name] = f"{column.mean():.4g}"
        if len(column) > 1:
            texts[name] += f" ± {column.sem():.2g}"
        if column.isna().any():
            texts[name] = ""
    return texts


def summary(runs: Sequence[Run], against: Path | None = None) -> pd.DataFrame:
    """Each group's first, last and best iteration, its gain, its distance to `against`   [Table 1]

    The gain is from first to last; the distance is that of the last iterations, paired by seed.
    """
    import pandas as pd

    groups = by_seed(runs)
    lines, columns = [], ["run", "iteration"]
    for name, group in groups.items():
        values = ends(group)
        values["gain"] = values["last"] - values["first"]
        if against:
            base = ends(home_of(groups, against))["last"]
            difference = (values["last"] - base).dropna(how="all")
            values[f"difference, {len(difference)} seeds"] = difference
        for when, line in values.items():
            lines.append({"run": name, "iteration": when, **cells(line)})
        columns += [spelled(key, group[0].rows[-1]) for key in COLUMNS]
    table = pd.DataFrame(lines)
    columns = [name for name in dict.fromkeys(columns) if name in table]
    return table[columns].fillna("")


def home_of(groups: dict[str, list[Run]], against: Path) -> list[Run]:
    """The group of a run."""
    for group in groups.values():
        if against.resolve() in [run.path.resolve() for run in group]:
            return group
    raise UserError(f"--against {against}: not one of the runs given")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [table.columns, ["---"] * table.shape[1], *table.values]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def table(runs: Sequence[Run], against: Path | None = None) -> str:
    """`summary` as Markdown."""
    return markdown(summary(runs, against))


# -- alarms ----------------------------------------------------------------------------------------


def alarms(rows: Sequence[dict], ledger: Sequence[dict]) -> list[str]:
    """What to look at in a run, one line each; the word before the colon is the kind.

    reversal  from the first row to the last pass@1 rose while pass@K or distinct equations fell,
              each beyond noise: "self-improvement reversal" (Wu et al. 2024)
    drift     prm/auc is more than 0.05 below the first: the PRM lost the policy   [Observation 3]
    edge      a choice at an end of its grid is better than its neighbour inside
    ties      other grid points are within noise of the choice (95 %, paired bootstrap over queries)
    """
    rows = list(filter(is_row, rows))
    ledger = list(filter(is_decision, ledger))
    edges = [*edge(ledger, "temperature"), *edge(ledger, "tau")]
    return [*reversal(rows), *drift(rows), *edges, *ties(ledger)]


def shift(before: float, n_before: float, after: float, n_after: float) -> int:
    """+1 or -1 where a share of n rose or fell by more than two standard errors, else 0.

    A success and a failure are added on each side (Agresti & Caffo 2000), so that shares of 0 and 1
    have an error too. For a mean of shares, as distinct equations are, the error is an upper bound.

    >>> shift(0.96, 200, 0.82, 200), shift(0.96, 200, 0.93, 200)
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
    changed = {}
    first, last = rows[0], rows[-1]
    for name in ("pass@1", "pass@K", "pass@K-S", "sound@1", "distinct"):
        key = spelled(name, first)
        needed = [key, "queries", "coverage"]
        if has_numbers(first, needed) and has_numbers(last, needed):
            sign = shift(*share(first, key), *share(last, key))
            changed[key] = (first[key], last[key], sign)
    return changed


def share(row: dict, key: str) -> tuple[float, float]:
    """A metric as a share, and of how many questions."""
    if key == "distinct":
        return row[key], row["queries"] * row["coverage"]
    return row[key] / 100, row["queries"]


def reversal(rows: Sequence[dict]) -> Iterator[str]:
    """The alarm of pass@1 rising while pass@K or distinct equations fall."""
    fell, changed = [], changes(rows)
    for key, (before, after, sign) in changed.items():
        if sign < 0 and key in ("distinct", spelled("pass@K", rows[0])):
            fell.append(f"{key} fell {before:.3g} -> {after:.3g}")
    if fell and changed["pass@1"][2] > 0:
        before, after, _ = changed["pass@1"]
        yield (
            f"reversal: from iteration {rows[0]['iter']} to {rows[-1]['iter']} pass@1 rose "
            f"{before:.1f} -> {after:.1f} while {' and '.join(fell)}, each beyond noise"
        )


def drift(rows: Sequence[dict]) -> Iterator[str]:
    """The alarm of a PRM that the policy has left behind."""
    aucs = [row["prm/auc"] for row in rows if is_number(row.get("prm/auc"))]
    if aucs and min(aucs) < aucs[0] - 0.05:
        yield (
            f"drift: the PRM's AUC fell {aucs[0]:.3f} -> {min(aucs):.3f}; train it again, on "
            "solutions of the policy as it is now"
        )


def edge(ledger: Sequence[dict], name: str) -> Iterator[str]:
    """The alarm of choices at an end of a grid that beat their neighbour inside."""
    n = 0
    for d in ledger:
        i, j = d["temperatures"].index(d["temperature"]), d["taus"].index(d["tau"])
        surface = np.array(d["surface"])  # (G_T, G_tau)
        if name == "tau":
            i, j, surface = j, i, surface.T
        inside = 1 if i == 0 else i - 1
        if name in d["edge"] and len(surface) > 1 and surface[i, j] > surface[inside, j]:
            n += 1
            last = d
    if n:
        yield (
            f"edge: the best {name} was an end of its grid in {n} of {len(ledger)} decisions, last "
            f"{last[name]:g} in iteration {last['iter']}; a wider --{name}s may hold a better one"
        )


def ties(ledger: Sequence[dict]) -> Iterator[str]:
    """The alarm of choices that noise may have made."""
    seen = [d for d in ledger if np.any(d["surface"])]  # of zeros there is nothing to tell apart
    tied = [d for d in seen if d["ties"]]
    if tied:
        last = tied[-1]
        yield (
            f"ties: {last['ties']} of {np.size(last['surface']) - 1} other grid points are within "
            f"noise of iteration {last['iter']}'s choice, as in {len(tied)} of {len(ledger)} "
            "decisions; more --balance-queries tell more of them apart"
        )


def warnings(run: Run) -> str:
    """A run's name, the number of its lost lines, and its alarms, one a line."""
    lines = [run.name, *alarms(run.rows, run.ledger)]
    if run.lost:
        lines.append(f"lost: the lines of {run.lost} iterations are torn, foreign or gone")
    return "\n".join(lines)


# -- replay: a run's decisions taken again, without any model --------------------------------------


def load_pool(run: Run, d: dict) -> list[np.ndarray]:
    """reward, correct, text (G_T, Q, K) of the samples behind a ledger line."""
    path = run.path / "samples" / f"balance_{d['iter']}.npz"
    kinds = {"reward": float, "correct": bool, "text": int}
    try:
        with np.load(path) as saved:
            pool = [saved[name].astype(kind) for name, kind in kinds.items()]
        G, Q, K = np.broadcast_shapes(*(array.shape for array in pool))
        if G != len(d["temperatures"]) or 0 in (Q, K):
            raise ValueError
    except Exception:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path}: missing, broken, or not of this ledger") from None
    return pool


def replay(
    run: Run,
    temperatures: list[float] | None = None,
    taus: list[float] | None = None,
    n_star: int | None = None,
    queries: int | None = None,
    samples: int | None = None,
) -> list[dict]:
    """The ledger's decisions with other settings; with none, the ledger itself   [Sec. 3.2, Fig. 4]

    temperatures  some of those sampled at
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
        Ts = temperatures or d["temperatures"]
        if (queries or 0) > Q or (samples or 0) > K:
            raise UserError(f"--queries, --samples: the run has {Q} questions, {K} samples each")
        if not set(Ts) <= set(d["temperatures"]):
            raise UserError(f"--temperatures: expected some of the run's, {d['temperatures']}")
        places = [d["temperatures"].index(T) for T in Ts]
        pool = [array[places, :queries, :samples] for array in pool]
        line = decide(*pool, Ts, taus or d["taus"], n_star or d["n_star"], d["seed"])
        again.append({"iter": d["iter"], **line})
    return again


def decisions_table(ledger: Sequence[dict]) -> pd.DataFrame:
    """The balancer's choices   [Tables 2, 3]"""
    import pandas as pd

    columns = ["iter", "temperature", "tau", "qe", "interval", "ties", "empty", "edge"]
    return pd.DataFrame(ledger, columns=columns).round(4)


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


def curve_figures(groups: dict[str, list[Run]], folder: Path) -> list[str]:
    """PLOTS, means over seeds with their standard errors, a curve a group; none comes twice."""
    import pandas as pd

    lines = []
    for name, group in groups.items():
        for run in group:
            lines += [{**row, "group": name} for row in run.rows]
    values = pd.DataFrame(lines)
    figures = {}
    for key, see in PLOTS.items():
        key = spelled(key, lines[-1])
        without_equations = key == "distinct" and not values.get(key, pd.Series()).any()
        if key in values.select_dtypes("number") and not without_equations:
            cell = values.groupby(["iter", "group"])[key]
            mean = cell.mean().unstack()[list(groups)].dropna(how="all")
            error = cell.sem().unstack().fillna(0)
            ax = axes()
            mean.plot(ax=ax, yerr=error, marker=".", grid=True, legend=False)
            curves = mean.to_csv() if "@" in key else key  # reward@K-S may be pass@K-S again
            if curves not in figures:
                figures[curves] = figure(ax, key, see, folder)
    return list(figures.values())


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
        ax = axes()
        times = pd.DataFrame(run.times)
        table = times.pivot_table("seconds", "iter", "phase", aggfunc="sum", sort=False)
        table[::-1].plot.barh(stacked=True, ax=ax)
        see = f"{times['seconds'].sum():,.0f} in all; base model, SFT and PRM are in 0. Sec. 3.3."
        figures.append(figure(ax, "Seconds of each iteration", see, folder))
    return figures + [surface_figure(d, folder) for d in run.ledger]


def surface_figure(d: dict, folder: Path) -> str:
    """The query effect at every (T, tau) of a decision."""
    ax = axes(xlabel="temperature T", ylabel="threshold tau")
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

    ax = Figure(figsize=(4.6, 3.1)).subplots()
    ax.set(**labels)
    return ax


def figure(ax, title: str, see: str, folder: Path) -> str:
    """What is drawn on axes, as HTML; also a PNG file in the folder."""
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
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
    groups, figures = by_seed(runs), out / "figures"
    parts = [verdict(name, group) for name, group in groups.items()]
    parts.append(html(summary(runs, against)))
    parts += [f'<pre class="alarm">{escape(warnings(run))}</pre>' for run in runs]
    parts.append(settings(groups))
    parts.append(section("Over the iterations", curve_figures(groups, figures)))
    for run in runs:
        parts.append(section(run.name, run_figures(run, figures / run.name) + response_cards(run)))
        if run.ledger:
            parts.append(html(decisions_table(run.ledger)))
    page = out / "report.html"
    title = escape("; ".join(groups))
    page.write_text(PAGE.format(title=title, body="".join(parts)), encoding="utf-8")
    return page


def verdict(name: str, runs: Sequence[Run]) -> str:
    """In words: what rose and fell beyond noise in all seeds, and the pools' mean T and tau."""
    import pandas as pd

    sentences = {"Rose": [], "Fell": [], "Not clearly changed": []}
    words = {1: "Rose", -1: "Fell"}
    # means over seeds: a metric a column; before, after, sign
    for key, change in pd.DataFrame([changes(run.rows) for run in runs]).items():
        before, after, sign = np.mean(list(change.dropna()), axis=0)
        word = words.get(sign, "Not clearly changed")
        sentences[word].append(f"{key} {before:.3g} → {after:.3g}")
    pools = pd.concat([pd.DataFrame(run.rows) for run in runs]).select_dtypes("number")
    for key, chosen in pools.groupby("iter").mean().filter(["temperature", "tau"]).items():
        sentences[f"{key} of the pools"] = [f"{x:.3g}" for x in chosen.dropna()]
    texts = [f"{word}: {', '.join(parts)}." for word, parts in sentences.items() if parts]
    return f"<p><b>{escape(name)}</b><br>{'<br>'.join(map(escape, texts))}</p>"


def settings(groups: dict[str, list[Run]]) -> str:
    """The settings of each group, to unfold."""
    import pandas as pd

    table = pd.DataFrame({name: group[0].config for name, group in groups.items()})
    text = html(table.astype(str).reset_index(names="setting"))
    return f"<details><summary>Settings</summary>{text}</details>"


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
    shared = [query for query in pools[1] if query in pools[last]]
    shown = ["question", "response", "gold", "correct", "reward", "selected"]
    cards = []
    for i, pool in pools.items():
        for query in [*shared, *pool][:3]:
            texts = [f"{key}: {pool[query].get(key)}" for key in shown]
            title = escape(f"{query}, drawn by M_{i - 1} in iteration {i}")
            text = escape("\n\n".join(texts))
            cards.append(f"<figure><h3>{title}</h3><pre>{text}</pre></figure>")
    return cards


def html(table: pd.DataFrame) -> str:
    """A table as HTML that scrolls by itself where it is too wide."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", None):
        text = table.to_html(index=False, border=0)
    return f'<div class="wide" tabindex="0">{text}</div>'


def section(title: str, figures: Iterable[str]) -> str:
    """A heading and figures, side by side where there is room."""
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(figures)}</div>'


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
    kinds = {
        "temperatures": functools.partial(grid, "temperatures"),
        "taus": functools.partial(grid, "taus"),
        "n_star": at_least_one,
        "queries": at_least_one,
        "samples": at_least_one,
    }
    for name, kind in kinds.items():
        flag = "--" + name.replace("_", "-")
        p.add_argument(flag, type=kind, help="with --replay, instead of the run's")
    args = p.parse_intermixed_args(argv)
    args.settings = {name: getattr(args, name) for name in kinds}
    if any(args.settings.values()) and not args.replay:
        raise UserError(f"--{', --'.join(kinds)}: only with --replay")
    if args.replay and (args.against or len(args.runs) > 1):
        raise UserError("--replay: expected one run, and no --against")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """python report.py RUN [RUN ...] | --replay RUN"""
    args = arguments(argv)
    runs = [read_run(path) for path in dict.fromkeys(args.runs)]
    if args.replay:
        again = replay(runs[0], **args.settings)
        same = sum(map(dict.__eq__, again, runs[0].ledger))
        print(markdown(decisions_table(again)))
        print(f"\n{same} of {len(again)} decisions equal the ledger's in every field")
        return
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(run.path)) for run in runs]
    out = args.out or runs[0].path
    if len(runs) > 1 and not args.out:
        out = out.resolve().parent
    print(table(runs, args.against), *map(warnings, runs), sep="\n\n")
    try:
        out.mkdir(parents=True, exist_ok=True)
        print(report(runs, out, args.against))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None


if __name__ == "__main__":
    data.run(main)
