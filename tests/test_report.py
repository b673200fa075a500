"""What report.py makes of runs: table, alarms, replay, page; whole, broken and foreign folders."""

import gzip
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import metrics
import report
from data import UserError

RNG = np.random.default_rng()
ROOT = Path(report.__file__).parent
TS, TAUS = [0.5, 0.8, 1.1], [-0.5, 0.0, 0.5, 1.0]
PRM = {"prm/auc_sound": 0.8, "prm/step_auc": 0.85, "prm/ece": 0.1, "prm/min_last": 0.4}
BINS = {"score": [None, 0.5, 0.9], "correct": [None, 0.4, 0.95], "n": [0, 7, 9]}


def make_run(folder, seed=0, method="bstar", passes=(30.0, 41.5, 50.25), prm=False, **config):
    """A run's folder as bstar.py leaves it, with numbers drawn afresh; passes are its pass@1."""
    (folder / "samples").mkdir(parents=True)
    config = {"task": "stories", "method": method, "reward": "answer", **config, "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    rows, ledger, times = [], [], []
    for t, greedy in enumerate(passes):
        row = {
            "iter": t,
            "eval_samples": 8,
            "S": 2,
            "pass@1": greedy,
            "val/pass@1": 50 - greedy / 2,
        }
        row |= {"queries": 200, "distinct": 0.5, "coverage": 0.9, "loss": None}
        for key in ("pass@8", "pass@4", "pass@8-2", "pass@4-2", "reward@8-2", "reward@4-2"):
            row[key] = round(RNG.uniform(0, 100), 4)
        if t and prm:
            row |= {"prm/auc": 0.9 - 0.03 * t, "prm/calibration": BINS, "prm@8-2": 12.5, **PRM}
        if t and method == "bstar":
            ledger.append(balance(folder / "samples" / f"balance_{t}.npz", t, seed))
            row |= {"temperature": ledger[-1]["temperature"], "tau": ledger[-1]["tau"], "qe": 0.25}
        rows.append(row)
        for phase in ("eval", "gen"):
            times.append({"iter": t, "phase": phase, "seconds": round(RNG.uniform(1, 9), 3)})
    for name, content in (("metrics", rows), ("ledger", ledger), ("times", times)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in content))
    return folder


def balance(path, t, seed):
    """Samples of a balance, saved; returns the ledger's line."""
    correct = RNG.random((3, 20, 6)) < 0.4
    reward = correct + RNG.uniform(-1, 1, correct.shape)
    text = RNG.integers(0, 5, correct.shape).astype(np.int32)
    np.savez_compressed(path, reward=reward, correct=correct, text=text)
    return {"iter": t, **metrics.decide(reward, correct, text, TS, TAUS, 2, seed=seed + t)}


def cells_of(text, column):
    """(first cell, second cell) -> the cell of a column, of a Markdown table."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    at = rows[0].index(column)
    return {(row[0], row[1]): row[at] for row in rows[2:] if len(row) == len(rows[0])}


# -- tables ----------------------------------------------------------------------------------------


def test_table_shows_first_last_best_and_the_mean_over_seeds(tmp_path):
    paths = [
        make_run(tmp_path / "run-1", 1, passes=[10.0, 30.0, 20.0]),
        make_run(tmp_path / "run-2", 2, passes=[20.0, 40.0, 34.0]),
        make_run(tmp_path / "new", passes=[]),
    ]
    cells = cells_of(report.table([report.read_run(path) for path in paths]), "pass@1")
    assert cells["run-1", "2 (last)"] == "20.0" and cells["new", "no metrics yet"] == ""
    assert cells["run-1", "0 (best)"] == "10.0"  # best on validation, which here falls
    means = [cells["mean of run, seeds 1 2", when] for when in ("first", "last", "gain")]
    assert means == ["15.0 ± 5.0", "27.0 ± 7.0", "12.0 ± 2.0"]


def test_differences_are_paired_by_seed(tmp_path, capsys):
    a = [make_run(tmp_path / f"a-{s}", s, passes=[10.0, x]) for s, x in ((1, 20.0), (2, 60.0))]
    last = {2: 64.0, 1: 22.0, 3: 99.0}
    b = [make_run(tmp_path / f"b-{s}", s, "online-rft", [10.0, x]) for s, x in last.items()]
    report.main([*map(str, a + b), "--against", str(a[1])])
    assert cells_of(capsys.readouterr().out, "pass@1") == {
        ("a, seeds 1 2", "last"): "40.0 ± 20.0",
        ("b, seeds 2 1 3", "last"): "61.7 ± 22.3",
        ("", "difference, seeds: 2"): "3.0 ± 1.0",
    }
    assert not (tmp_path / "report.html").exists()


def test_only_runs_that_differ_in_the_seed_alone_are_seeds_of_one():
    named = [("a-1", 1, 2), ("a-2", 2, 2), ("b-1", 1, 3), ("a-1'", 1, 2)]
    runs = []
    for name, seed, K in named:
        config = {"method": "bstar", "K": K}
        runs.append(report.Run(Path(name), name, seed, config, [], [], [], []))
    groups = report.by_seed(runs)
    assert {k: len(g) for k, g in groups.items()} == {"a, seeds 1 2": 2, "b-1": 1, "a-1'": 1}


# -- alarms ----------------------------------------------------------------------------------------


def kinds(rows=(), ledger=()):
    return [line.split(":")[0] for line in report.alarms(rows, ledger)]


def row(t, one, many, distinct=0.5, **more):
    row = {"iter": t, "eval_samples": 32, "S": 4, "pass@1": one, "val/pass@1": one, "queries": 200}
    return {**row, "pass@32": many, "distinct": distinct, "coverage": 1.0, **more}


@pytest.mark.parametrize(
    "after, fires",
    [
        (row(1, 45.0, 80.0, 0.2), True),
        (row(1, 45.0, 93.0), False),  # the fall is noise
        (row(1, 35.0, 80.0), False),  # the rise is noise
        (row(1, 45.0, 96.0, 0.3), True),  # distinct equations alone
        (row(1, 45.0, 80.0, queries=None), False),
    ],
)
def test_reversal_is_a_rise_with_a_fall_both_beyond_noise(after, fires):
    assert kinds([row(0, 30.0, 96.0), after]) == ["reversal"] * fires
    assert kinds([after]) == kinds([]) == []
    for line in report.alarms([row(0, 30.0, 96.0), row(1, 45.0, 80.0)], []):
        assert "pass@1 rose 30.0 -> 45.0 while pass@32 fell 96 -> 80" in line


def test_noise_alone_rarely_alarms():
    fired = 0
    for p in (0.02, 0.3, 0.97):
        for a, b in RNG.binomial(200, p, (2000, 2)):
            fired += report.shift(a / 200, b / 200, 200, 200) != 0
    assert fired < 6000 * 0.065  # two standard errors: 4.6 % for both signs


def test_drift_is_more_than_0_05_below_the_first():
    for aucs, expected in (([None, 0.9, 0.86, 0.84, 0.91], ["drift"]), ([0.9, 0.86, np.nan], [])):
        rows = [row(t, 30.0, 90.0, **{"prm/auc": auc}) for t, auc in enumerate(aucs)]
        assert kinds(rows) == expected


def decision(T, tau, surface, **more):
    ends = {"temperature": T in (TS[0], TS[-1]), "tau": tau in (TAUS[0], TAUS[-1])}
    d = {"iter": 1, "temperature": T, "tau": tau, "temperatures": TS, "taus": TAUS, "ties": 0}
    edge = [name for name, at_end in ends.items() if at_end]
    d |= {"qe": 0.3, "interval": [0.2, 0.4], "n_star": 2, "seed": 1, "empty": 0.1, "tied": []}
    return {**d, "surface": np.asarray(surface).tolist(), "edge": edge, **more}


def test_an_end_of_the_grid_alarms_only_where_it_is_better_than_inside():
    surface = np.add.outer([0.1, 0.2, 0.3], [0.0, 0.1, 0.05, 0.0])
    assert report.alarms([], [decision(1.1, 0.0, surface)]) == [
        "edge: the best temperature was an end of its grid, 0.5 to 1.1, in 1 of 1 decisions, "
        "last 1.1 in iteration 1; a wider --temperatures may hold a better one"
    ]
    assert kinds([], [decision(0.8, 0.0, surface)]) == []
    assert kinds([], [decision(1.1, 1.0, np.ones((3, 4)))]) == []  # flat: the tie went to the end
    falling = -np.add.outer(range(3), range(4))
    assert kinds([], [decision(0.5, -0.5, falling)]) == ["edge", "edge"]


def test_ties_are_counted_once_for_all_decisions():
    tied = decision(0.8, 0.0, np.ones((3, 4)), ties=2, tied=[[0.5, 0.0], [1.1, 0.5]])
    clear = decision(0.8, 0.0, np.ones((3, 4)), iter=3)
    [line] = report.alarms([], [tied, {**tied, "iter": 2}, clear])
    assert line.startswith(
        "ties: 2 of 11 other grid points are within noise of iteration 2's choice (T 0.5 to 1.1, "
        "tau 0 to 0.5); so it was in 2 of 3 decisions"
    )


def test_a_surface_of_zeros_has_no_ties():
    everything = [[T, tau] for T in TS for tau in TAUS]
    blind = decision(1.1, 0.0, np.zeros((3, 4)), ties=11, tied=everything)
    assert kinds([], [blind]) == []


# -- replay ----------------------------------------------------------------------------------------


def test_replay_with_the_run_s_own_settings_is_the_ledger_to_the_last_bit(tmp_path, capsys):
    run = report.read_run(make_run(tmp_path / "run"))
    again = report.replay(run)
    assert [line for line, _ in again] == run.ledger
    for d, (_, parts) in zip(run.ledger, again):
        surface = np.array(d["surface"])
        assert list(parts["left"]) == [f"{k} samples, T 1.1, tau 0" for k in (2, 3, 5, 6)]
        assert parts["left"]["6 samples, T 1.1, tau 0"] == pytest.approx(surface[2, 1], abs=1e-6)
        assert surface[TS.index(parts["middle"]["best T at tau 0"]), 1] == surface[:, 1].max()
        assert surface[2, TAUS.index(parts["right"]["best tau at T 1.1"])] == surface[2].max()
    report.main(["--replay", str(tmp_path / "run")])
    assert "2 of 2 decisions equal the ledger's in every field" in capsys.readouterr().out
    assert (tmp_path / "run" / "replay.html").exists()


def test_replay_with_other_settings(tmp_path):
    run = report.read_run(make_run(tmp_path / "run"))
    settings = {"temperatures": [0.5, 1.1], "taus": [0.25], "n_star": 4, "queries": 9, "samples": 5}
    (line, _), _ = report.replay(run, **settings)
    pool = [array[[0, 2], :9, :5] for array in report.load_pool(run, run.ledger[0])]
    expected = [metrics.effects(*at_T, [0.25], 4)[0].mean() for at_T in zip(*pool)]
    assert np.allclose(np.ravel(line["surface"]), expected, atol=1e-6)
    assert line["n_star"] == 4 and line["temperatures"] == [0.5, 1.1]


# -- what a user can get wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--replay --temperatures 0.5:0.6:0.1", "--temperatures: expected some of the run's"),
        ("--replay --queries 21", "the run has 20 questions"),
        ("--replay --samples 7", "6 samples each"),
        ("--replay --samples 0", "argument --samples: 0: expected a whole number, at least 1"),
        ("--replay --taus 1:2", "--taus 1:2: expected FROM:TO:STEP"),
        ("--taus -1:1:1", "only with --replay"),
        ("--what", "unrecognized arguments"),
        ("--replay OTHER", "--replay: expected one run"),
        ("--replay --against OTHER", "no --against"),
        ("--against OTHER", "not one of the runs given"),
        ("--out /dev/null/x", "--out /dev/null/x: Not a directory"),
    ],
)
def test_a_user_s_error_is_one_line(tmp_path, flags, part):
    other, run = make_run(tmp_path / "b" / "run"), make_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        report.main([str(run), *flags.replace("OTHER", str(other)).split()])
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("samples/balance_1.npz", None, "balance_1.npz: missing"),
        ("samples/balance_2.npz", b"PK\3\4", "balance_2.npz: broken"),
        ("samples/balance_1.npz", {"reward": [1.0]}, "without texts"),
        ("samples/balance_1.npz", dict.fromkeys(("reward", "correct", "text"), [1]), "broken"),
        ("ledger.jsonl", b'{"iter": 1}\n[]\n{"it', "no decision in its ledger.jsonl"),
    ],
)
def test_replay_without_its_samples_is_one_line(tmp_path, name, content, part):
    path = make_run(tmp_path / "run") / name
    path.unlink()
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        report.main(["--replay", str(tmp_path / "run")])
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, change, part",
    [
        ("metrics.jsonl", lambda lines: [*lines[:1], *lines[2:]], "no line of iteration 1"),
        ("ledger.jsonl", lambda lines: lines[1:], "no line of iteration 1"),
        ("ledger.jsonl", lambda lines: [], "no line of iteration 1, 2"),
        ("metrics.jsonl", lambda lines: [*lines, '{"pass@1": 3}'], "1 of 4 lines are torn"),
        ("ledger.jsonl", lambda lines: [*lines, '{"qe": 3}', '{"it'], "2 of 4 lines are torn"),
    ],
)
def test_a_lost_line_is_told_in_one_line(tmp_path, capsys, monkeypatch, name, change, part):
    path = make_run(tmp_path / "run") / name
    assert report.read_run(tmp_path / "run").lost == []
    path.write_text("\n".join(change(path.read_text().splitlines())))
    monkeypatch.setattr(report, "figure", lambda *args: "")
    report.main([str(tmp_path / "run")])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert part in line and html.escape(line) in (tmp_path / "run" / "report.html").read_text()
    foreign = [{}, {"iter": 1}]
    assert kinds(foreign, foreign) == []


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"task": "stories", "seed": 1}'])
def test_a_foreign_folder_is_one_line_and_exit_code_2(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    command = [sys.executable, ROOT / "report.py", tmp_path]
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "expected a run's folder" in p.stderr


def test_report_stays_light():
    heavy = "{'torch', 'transformers', 'matplotlib', 'pandas'}"
    code = f"import sys, report; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- the page --------------------------------------------------------------------------------------


def tables_of(page):
    """The tables of a page as rows of cells."""
    tables = []
    for table in re.findall(r"<table.*?</table>", page, re.S):
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
        tables.append([[html.unescape(cell) for cell in row] for row in rows if row])
    return tables


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page and its folders: two seeds with a PRM, a baseline, SFT, a new run, odd lines."""
    top = tmp_path_factory.mktemp("runs")
    odd = make_run(top / "odd")
    metrics_, ledger = odd / "metrics.jsonl", odd / "ledger.jsonl"
    metrics_.write_text('5\n{"iter": "x"}\n' + metrics_.read_text() + '{"iter": 3, "pass@1": "hi')
    ledger.write_text('{"iter": 1}\nnull\n' + ledger.read_text().splitlines()[1])
    (odd / "times.jsonl").write_bytes(b'\xff\xfe\n{"iter": 1, "phase": 3, "seconds": 2}\n')
    (odd / "samples" / "balance_2.npz").write_bytes(b"PK")
    runs = [
        make_run(top / "toy <&> prm-1", 1, prm=True),
        make_run(top / "toy <&> prm-2", 2, prm=True, passes=(20.0, 33.5)),
        make_run(top / "rft", method="online-rft"),
        make_run(top / "sft", method="sft"),
        make_run(top / "new", passes=()),
        odd,
    ]
    report.main(list(map(str, runs)))
    return (top / "report.html").read_text(encoding="utf-8"), runs


def test_the_page_needs_nothing_else_and_suits_phones_and_dark_mode(page):
    text, runs = page
    refs = re.findall(r"(?:src|href|srcset)=\W?(\w+:?)", text)
    assert "<script" not in text and set(refs) == {"data:"}
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert text.count("<table") == text.count('<div class="wide"')  # each scrolls by itself
    figures = list((runs[0].parent / "figures").glob("*.png"))
    assert text.count("<figure>") == text.count("<figcaption>") == len(figures) > 15
    assert "toy &lt;&amp;&gt; prm-1" in text and "toy <&>" not in text
    assert "No Fig. 4: " in text and "balance_2.npz: broken" in text  # of the odd run


def test_every_number_of_the_page_is_the_one_in_metrics_jsonl(page):
    text, paths = page
    tables = tables_of(text)
    runs = [run for run in map(report.read_run, paths) if run.rows]
    shown = [table for table in tables if table[0][0] == "iter" and "T" not in table[0]]
    for run, (head, *lines) in zip(runs, shown, strict=True):
        assert head[1:] == [str(row["iter"]) for row in run.rows]
        cells = {line[0]: line[1:] for line in lines if line[0] not in ("seed", "iter")}
        for t, row in enumerate(run.rows):
            for key, x in report.numbers(row).items():
                if key != "iter":
                    assert float(cells[key][t]) == pytest.approx(x, rel=1e-5)
        assert set(cells) == set().union(*map(report.numbers, run.rows)) - {"iter"}
    with_ledger = [run for run in runs if run.ledger]
    decisions = [table for table in tables if "T" in table[0]]
    for run, lines in zip(with_ledger, decisions, strict=True):
        for d, line in zip(run.ledger, lines[1:], strict=True):
            chosen = [str(d["iter"]), f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}"]
            assert line[:4] == chosen


def test_curves_are_means_over_seeds_where_all_have_one_and_sft_is_a_level_line():
    a = [("a", "bstar", t, x) for t, x in enumerate((10.0, 30.0, 20.0))]
    b = [("a", "bstar", t, x) for t, x in enumerate((20.0, 40.0))]
    sft = [("s", "sft", 0, 1.0), ("s", "sft", 1, 2.0)]
    values = pd.DataFrame(a + b + sft, columns=["group", "method", "iter", "value"])
    mean, error = report.curves(values, "group")
    assert mean["a"].dropna().to_dict() == {0: 15.0, 1: 35.0} and error["a"][0] == 5.0
    assert mean["s"].to_dict() == {0: 2.0, 1: 2.0, 2: 2.0}
    alone, _ = report.curves(values[values["group"] == "s"], "group")
    assert alone["s"].to_dict() == {0: 1.0, 1: 2.0}


def test_one_run_has_a_colour_a_curve(tmp_path, monkeypatch):
    drawn = {}

    def keep(out, name, title, see, paint):
        import matplotlib.figure

        ax = matplotlib.figure.Figure().subplots()
        paint(ax=ax)
        drawn[name] = dict(zip(*ax.get_legend_handles_labels()[::-1]))
        return ""

    monkeypatch.setattr(report, "figure", keep)
    run = report.read_run(make_run(tmp_path / "run", prm=True))
    report.report([run], tmp_path)
    names = "pass1 distinct passk passks rewardks temperature tau qe auc admitted ranked".split()
    assert set(names) < set(drawn)
    assert not [name for name in drawn if "middle" in name or "right" in name]  # T and tau again
    lines = {label: handle[0] for label, handle in drawn["passk"].items()}
    assert list(lines["pass@4"].get_ydata()) == [row["pass@4"] for row in run.rows]
    assert len({line.get_color() for line in lines.values()}) == len(lines) == 2


def test_no_figure_comes_twice(tmp_path):
    path = make_run(tmp_path / "run")
    text = (path / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:  # without a PRM
        row |= {"reward@8-2": row["pass@8-2"], "reward@4-2": row["pass@4-2"]}
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report.main([str(path)])
    images = [file.read_bytes() for file in (path / "figures").iterdir()]
    assert len(set(images)) == len(images)
    page = (path / "report.html").read_text()
    assert "Reward@K-S, %: the same curves as in Pass@K-S, %" in page


def test_the_time_counts_base_sft_and_prm(tmp_path):
    path = make_run(tmp_path / "run")
    start = [{"iter": 0, "phase": phase, "seconds": 1000.0} for phase in ("base", "sft", "prm")]
    (path / "times.jsonl").write_text("\n".join(map(json.dumps, [*start, {"iter": 1}])))
    (path / "figures").mkdir()
    [figure] = report.time_figure(path, [report.read_run(path)])
    assert "3,000 seconds a run: base 33%, sft 33%, prm 33%" in figure


def test_the_page_begins_with_a_verdict_in_words_and_the_settings(tmp_path):
    path = make_run(tmp_path / "run", passes=(20.0, 60.0), prm=True)
    text = (path / "metrics.jsonl").read_text().replace('"distinct": 0.5', '"distinct": 0.1')
    first, last = text.splitlines()
    (path / "metrics.jsonl").write_text(first.replace("0.1,", "0.9,") + "\n" + last)
    report.main([str(path)])
    page = (path / "report.html").read_text()
    begin, _ = page.split("<figure>", 1)
    rose, fell = begin.index("Rose: pass@1 20 → 60"), begin.index("Fell: ")
    assert rose < fell < begin.index("distinct 0.9 → 0.1")
    [d] = report.read_run(path).ledger
    assert (
        f"T of the pools: {d['temperature']:g}." in begin
        and f"tau of the pools: {d['tau']:g}." in begin
    )
    assert (
        re.search("Alarms: .*reversal in 1 of 1", begin) and "reversal: from iteration 0" in begin
    )
    assert tables_of(begin)[0][0][2] == "pass@1"  # the first number of the first table
    assert "Settings: task toy, method bstar, reward answer." in begin


def test_the_page_of_several_runs_shows_the_settings_that_differ(tmp_path):
    paths = [make_run(tmp_path / f"k{K}", K=K, passes=(1.0,)) for K in (8, 16)]
    report.report(list(map(report.read_run, paths)), tmp_path)
    differing = tables_of((tmp_path / "report.html").read_text())[1]
    assert differing[1:] == [["K", "8", "16"]]


@pytest.mark.parametrize("content", [None, b"", b"PK", "{}", '{"query": 3}', "torn"])
def test_three_responses_before_and_after(tmp_path, content):
    path = make_run(tmp_path / "run")
    texts = {}
    for t, order in ((1, "abcde"), (2, "edcba")):
        samples = []
        for query in order:
            sample = {"query": query, "response": f"<{query}{t}>", "correct": True, "reward": 1.0}
            samples.append({**sample, "selected": query == "a", "question": "2+2?", "gold": "4"})
            samples.append({**sample, "response": "a second one"})
        texts[t] = gzip.compress("\n".join(map(json.dumps, samples)).encode())
        (path / "samples" / f"iter_{t}.jsonl.gz").write_bytes(texts[t])
    run = report.read_run(path)
    [_, page] = report.samples_html(run)
    for t in (1, 2):
        assert re.findall(rf"<pre>&lt;(.){t}&gt;</pre>", page) == list("abc")
    assert page.count("<pre>2+2?</pre>") == 6 and "a second one" not in page
    assert "right, reward 1.0, trained on, gold 4" in page
    broken = path / "samples" / "iter_2.jsonl.gz"
    broken.unlink()
    if content == "torn":
        broken.write_bytes(texts[2][:60])
    elif content is not None:
        broken.write_bytes(
            content if isinstance(content, bytes) else gzip.compress(content.encode())
        )
    [_, page] = report.samples_html(run)
    assert page.count("<pre>2+2?</pre>") == 3 and "<pre>&lt;a1&gt;</pre>" in page
