"""What report.py makes of runs: table, alarms, replay, page; whole, broken and foreign folders."""

import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, refused

import metrics
import report

RNG = np.random.default_rng()
TS, TAUS = [0.5, 0.8, 1.1], [-0.5, 0.0, 0.5, 1.0]
PRM = {"prm/auc_sound": 0.8, "prm/step_auc": 0.85, "prm/ece": 0.1, "prm/min_last": 0.4}
BINS = {"score": [None, 0.5, 0.9], "correct": [None, 0.4, 0.95], "n": [0, 7, 9]}


def read(*args, **kwargs) -> report.Run:
    """A run whose numbers are drawn afresh, as report.py reads it."""
    return report.read_run(make_run(*args, **kwargs))


def make_run(folder, seed=0, method="bstar", passes=(30.0, 41.5, 50.25), prm=False, **config):
    """A run's folder as bstar.py leaves it, with numbers drawn afresh; passes are its pass@1."""
    (folder / "samples").mkdir(parents=True)
    config = {"task": "stories", "method": method, "reward": "answer", **config, "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    rows, ledger, times = [], [], []
    for t, greedy in enumerate(passes):
        row = {"iter": t, "eval_samples": 8, "S": 2, "pass@1": greedy}
        row |= {"val/pass@1": 50 - greedy / 2, "queries": 200, "distinct": 0.5}
        row |= {"coverage": 0.9, "loss": None}
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
    by_T = [metrics.Outcomes(*arrays) for arrays in zip(reward, correct, text)]
    return {"iter": t, **metrics.decide(by_T, TS, TAUS, 2, seed=seed + t)}


def test_where_no_solution_has_an_equation_nothing_is_said_of_distinct_ones():
    run = report.read_run(ROOT / "results" / "walk-bstar-answer-0")
    assert all(row["distinct"] == 0 for row in run.rows)
    assert "distinct" not in report.summary([run])
    assert "distinct" not in report.changes(run.rows)


def test_a_run_with_greedy_answers_alone_has_a_verdict(tmp_path):
    run = read(tmp_path / "run", passes=(30.0, 80.0))
    rows = [{key: row[key] for key in (*report.ROW, "queries")} for row in run.rows]
    assert report.changes(rows) == {"pass@1": (30, 80, 1)}


def test_table_shows_first_last_best_and_gain_with_means_over_seeds(tmp_path):
    runs = [
        read(tmp_path / "run-1", 1, passes=[10.0, 30.0, 20.0]),
        read(tmp_path / "run-2", 2, passes=[20.0, 40.0, 34.0]),
        read(tmp_path / "other", method="sft", passes=[7.0, 6.0]),
    ]
    table = report.summary(runs)
    cells = table.set_index(["run", "iteration"])
    means = cells.loc["run-1, seed 1 2", "pass@1"].to_dict()
    # best on validation, which falls here
    assert means == {"first": "15 ± 5", "last": "27 ± 7", "best": "15 ± 5", "gain": "12 ± 2"}
    other = cells.loc[("other, seed 0", "gain")]
    assert (other["pass@1"], other["tau"], other["seeds"]) == ("-1", "", 1)
    assert report.markdown(table).splitlines()[3].startswith("| run-1, seed 1 2 | last | 27 ± 7 |")


def test_differences_are_paired_by_seed(tmp_path):
    ends = {"a": {1: 20.0, 2: 60.0}, "b": {2: 64.0, 1: 22.0, 3: 99.0}, "unpaired": {4: 1.0}}
    runs = []
    for name, seeds in ends.items():
        for seed, end in seeds.items():
            runs.append(read(tmp_path / f"{name}-{seed}", seed, passes=[10.0, end], task=name))
    table = report.summary(runs, against=tmp_path / "a-2").set_index("run")
    [difference] = table[table["iteration"] == "difference"].iterrows()
    assert difference[0] == "b-2, seed 2 1 3"
    assert (difference[1]["pass@1"], difference[1]["seeds"]) == ("3 ± 1", 2)


def test_only_runs_that_differ_in_the_seed_alone_are_seeds_of_one():
    runs = []
    for name, seed, K in (("a-1", 1, 2), ("a-2", 2, 2), ("b-1", 1, 3), ("a-1'", 1, 2)):
        rows = [row(0, 1.0, 2.0)]
        runs.append(report.Run(Path(name), name, seed, {"K": K}, rows, [], []))
    assert list(report.by_seed(runs)) == ["a-1, seed 1 2", "b-1, seed 1", "a-1', seed 1"]
    with refused("no metrics yet"):
        report.by_seed([runs[0]._replace(rows=[])])


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
    rows = [row(0, 30.0, 96.0), after]
    assert kinds(rows) == ["reversal"] * fires and kinds(rows[1:]) == []


def test_noise_alone_rarely_alarms():
    fired = 0
    for p in (0.02, 0.3, 0.97):
        for a, b in RNG.binomial(200, p, (2000, 2)):
            fired += report.shift(a / 200, 200, b / 200, 200) != 0
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
        "edge: the best temperature was an end of its grid in 1 of 1 decisions, last 1.1 in "
        "iteration 1; a wider --temperatures may hold a better one"
    ]
    assert kinds([], [decision(0.8, 0.0, surface)]) == []
    assert kinds([], [decision(1.1, 1.0, np.ones((3, 4)))]) == []  # flat: the tie went to the end
    falling = -np.add.outer(range(3), range(4))
    assert kinds([], [decision(0.5, -0.5, falling)]) == ["edge", "edge"]


def test_ties_are_counted_once_for_all_decisions_but_not_on_a_surface_of_zeros():
    tied = decision(0.8, 0.0, np.ones((3, 4)), ties=2, tied=[[0.5, 0.0], [1.1, 0.5]])
    blind = decision(1.1, 0.0, np.zeros((3, 4)), ties=11, iter=3)
    [line] = report.alarms([], [tied, {**tied, "iter": 2}, blind])
    part = "ties: 2 of 11 other grid points are within noise of iteration 2's choice, as in 2 of 3"
    assert line.startswith(part)


def test_the_best_of_each_where_the_other_is_fixed():
    surface = [[0, 3, 1, 3], [0, 3, 9, 0], [5, 2, 5, 1]]  # T 0.5, 0.8, 1.1; tau -0.5, 0, 0.5, 1
    ledger = [decision(0.8, 0.5, surface), decision(0.8, 0.5, surface, taus=[0.5, 0.6, 0.7, 0.8])]
    table = report.decisions_table(ledger)
    assert table["best T at tau 0"].tolist() == [0.5, 1.1]  # or at the grid's nearest
    assert table["best tau at T 1"].tolist() == [0.5, 0.7]


def test_replay_with_other_settings(tmp_path):
    run = read(tmp_path / "run")
    settings = {"temperatures": [0.5, 1.1], "taus": [0.25], "n_star": 4, "queries": 9, "samples": 5}
    line, _ = report.replay(run, **settings)
    pool = [array[[0, 2], :9, :5] for array in report.load_pool(run, run.ledger[0])]
    expected = []
    for reward, correct, text in zip(*pool):
        n_sel, n_correct = metrics.sweep(reward, correct, metrics.duplicates(reward, text), [0.25])
        expected.append(metrics.query_effect(n_sel, n_correct, 4).mean())
    assert np.allclose(np.ravel(line["surface"]), expected, atol=1e-6)
    assert line["n_star"] == 4 and line["temperatures"] == [0.5, 1.1]


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--replay --temperatures 0.5:0.6:0.1", "temperatures among [0.5, 0.8, 1.1]"),
        ("--replay --samples 7", "1 to 6 samples"),
        ("--replay --n-star 0", "an n-star from 1"),
        ("--replay --n-star many", "argument --n-star: invalid int value"),
        ("--replay --taus 1:2", "--taus 1:2: expected FROM:TO:STEP"),
        ("--n-star 3", "--n-star: only with --replay"),
        ("--replay OTHER", "--replay: expected one run"),
        ("--replay --against OTHER", "no --against"),
        ("--against OTHER", "not one of the runs given"),
        ("--out /dev/null/x", "--out /dev/null/x: Not a directory"),
    ],
)
def test_a_user_s_error_is_one_line(tmp_path, flags, part):
    other, run = make_run(tmp_path / "b" / "run"), make_run(tmp_path / "run")
    with refused(re.escape(part)):
        report.main([str(run), *flags.replace("OTHER", str(other)).split()])


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("samples/balance_1.npz", None, "balance_1.npz: missing"),
        ("samples/balance_2.npz", b"PK\3\4", "balance_2.npz: missing, broken"),
        ("samples/balance_1.npz", [1], "not of this ledger"),
        ("ledger.jsonl", b'{"iter": 1}\n[]\n{"it', "no decision in its ledger.jsonl"),
    ],
)
def test_replay_without_its_samples_is_one_line(tmp_path, name, content, part):
    path = make_run(tmp_path / "run") / name
    path.unlink()
    if content == [1]:
        np.savez(path, reward=content, correct=content, text=content)
    elif content:
        path.write_bytes(content)
    with refused(part):
        report.main(["--replay", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "name, change, lost",
    [
        ("metrics.jsonl", lambda lines: [*lines[:1], *lines[2:]], 1),
        ("ledger.jsonl", lambda lines: [*lines[1:], '{"iter": 1'], 1),
        ("ledger.jsonl", lambda lines: ['{"qe": 3}'], 2),
        ("ledger.jsonl", lambda lines: [lines[0], lines[1].replace("surface", "s")], 1),
        ("metrics.jsonl", lambda lines: [*lines, '{"pass@1": 3}', "5"], 0),
        ("ledger.jsonl", None, 0),  # T and tau were given: nothing to decide
    ],
)
def test_lost_lines_are_counted_in_one_line(tmp_path, name, change, lost):
    path = make_run(tmp_path / "run") / name
    lines = path.read_text().splitlines()
    path.unlink()
    if change:
        path.write_text("\n".join(change(lines)))
    run = report.read_run(tmp_path / "run")
    line = f"lost: the lines of {lost} iterations are torn, foreign or gone"
    assert (line in report.notices(run)) == (lost > 0)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"task": "stories", "seed": 1}'])
def test_a_foreign_folder_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with refused("expected a run's folder$"):
        report.read_run(tmp_path)


def tables_of(page):
    """The tables of a page as rows of cells."""
    tables = []
    for table in re.findall(r"<table.*?</table>", page, re.S):
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
        tables.append([[html.unescape(cell) for cell in row] for row in rows if row])
    return tables


@pytest.fixture
def drawn(monkeypatch):
    """title -> the axes of a figure; legend and caption with them."""
    axes = {}

    def keep(ax, title, see, folder):
        ax.curves, ax.names = ax.get_legend_handles_labels()
        ax.see = see
        axes[title] = ax
        return ""

    monkeypatch.setattr(report, "figure", keep)
    return axes


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page and its folders: two seeds with a PRM, a baseline, SFT, odd lines."""
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
        make_run(top / "rft", method="online-rft", K=16),
        make_run(top / "sft", method="sft"),
        odd,
    ]
    report.main(list(map(str, runs)))
    return (top / "report.html").read_text(encoding="utf-8"), runs


def test_the_page_needs_nothing_else_and_suits_phones_and_dark_mode(page):
    text, _ = page
    refs = re.findall(r"(?:src|href|srcset)=\W?(\w+:?)", text)
    assert "<script" not in text and set(refs) == {"data:"}
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert text.count("<table") == text.count('<div class="wide"')  # each scrolls by itself
    assert text.count("<img") == text.count("<figcaption>") > 15
    assert "toy &lt;&amp;&gt; prm-1" in text and "toy <&>" not in text
    assert len(set(re.findall('base64,([^"]+)', text))) == text.count("<img")  # none comes twice


def test_runs_of_one_name_keep_their_figures_apart_and_in_the_page_s_folder(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in "ab"]
    report.main([*map(str, runs), "--out", str(tmp_path / "page")])
    assert not [run for run in runs if (run / "Seconds_of_each_iteration.png").exists()]
    assert len(list((tmp_path / "page").glob("figures/*/Seconds_of_each_iteration.png"))) == 2


def test_the_page_shows_settings_decisions_and_every_number(page):
    text, paths = page
    tables = tables_of(text)
    assert tables[0][0][2] == "pass@1"  # the first number of the first table
    assert ["method", "bstar", "online-rft", "sft"] in tables[1]
    every = [lines for lines in tables[2:] if lines[0][0] == ""]
    decided = [lines for lines in tables[2:] if lines[0][0] == "iter"]
    for path, lines in zip(paths, every, strict=True):
        run = report.read_run(path)
        shown = {key: cells for key, *cells in lines}
        assert shown[""] == [str(row["iter"]) for row in run.rows]
        for key in ("pass@4-2", "val/pass@1"):
            assert list(map(float, shown[key])) == [row[key] for row in run.rows]
        if run.ledger:
            for d, line in zip(run.ledger, decided.pop(0)[1:], strict=True):
                chosen = [d["iter"], d["temperature"], d["tau"], d["qe"]]
                # pandas and Python round halves of the last place apart
                assert list(map(float, line[:4])) == pytest.approx(chosen, rel=0, abs=1e-4)
    assert not decided


@pytest.mark.parametrize("prm", [False, True])
def test_curves_are_means_over_seeds(tmp_path, drawn, prm):
    runs = [read(tmp_path / f"{s}", s, passes=(10.0 * s, 30.0), prm=prm) for s in (1, 3)]
    report.report(runs, tmp_path)
    names = ["pass@1", "distinct", "pass@K", "pass@K-S", "reward@K-S", "temperature", "tau", "qe"]
    assert set(names) < set(drawn) and ("prm/auc" in drawn) == ("prm@8-2" in drawn) == prm
    assert ("Calibration of the PRM" in drawn) == prm
    assert drawn["pass@K-S"].names == ["pass@8-2", "pass@4-2"]
    assert "Pass@K-S" not in drawn["reward@K-S"].see  # with a PRM it is another number
    [curve] = drawn["pass@1"].curves
    assert list(curve[0].get_ydata()) == [20.0, 30.0]
    [bars] = curve[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()][0] == [10.0, 30.0]


def test_sft_beside_other_methods_is_a_level_line(tmp_path, drawn):
    sft = read(tmp_path / "sft", method="sft", passes=[10.0, 33.0])
    runs = [sft, read(tmp_path / "bstar")]
    for shown, level in ((runs, [33.0, 33.0, 33.0]), (runs[:1], [10.0, 33.0])):
        report.curve_figures(report.by_seed(shown), tmp_path)
        assert list(drawn["pass@1"].curves[0][0].get_ydata()) == level
    assert drawn["qe"].names == ["bstar, seed 0"]


def test_every_curve_has_its_own_colour(tmp_path, drawn):
    runs = [read(tmp_path / f"{K}", method="sft", K=K) for K in range(12)]
    for shown, title in ((runs, "pass@8"), (runs[:1], "pass@K")):  # a curve a run, or of one a K
        report.curve_figures(report.by_seed(shown), tmp_path)
        colours = [tuple(curve[0].get_color()) for curve in drawn[title].curves]
        assert len(set(colours)) == len(colours) == max(2, len(shown))


def test_no_figure_comes_twice(tmp_path, drawn):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    equal = [json.dumps({**row, "reward@8-2": row["pass@8-2"]}) for row in rows]  # as without a PRM
    path.write_text("\n".join(equal))
    report.main([str(path.parent)])
    assert "pass@K-S" in drawn and "reward@4-2" in drawn and "reward@K-S" not in drawn


@pytest.mark.parametrize("by, bars", [("iteration", ["1", "0"]), ("run", ["b", "a"])])
def test_the_time_counts_base_sft_and_prm(tmp_path, drawn, by, bars):
    runs = []
    for name in "ab":
        path = make_run(tmp_path / name, method="sft")
        times = [{"iter": 0, "phase": phase, "seconds": 500.0} for phase in ("base", "sft", "prm")]
        times += [{"iter": 1, "phase": "gen", "seconds": 3.0}, {"iter": 1}]
        (path / "times.jsonl").write_text("\n".join(map(json.dumps, times)))
        runs.append(report.read_run(path))
    report.time_figure(runs, by, tmp_path)
    [ax] = drawn.values()
    assert ax.names == ["base", "sft", "prm", "gen"] and "3,006 in all" in ax.see
    assert [label.get_text() for label in ax.get_yticklabels()] == bars


def test_the_page_begins_with_a_verdict_in_words(tmp_path):
    path = make_run(tmp_path / "run", passes=(20.0, 60.0), prm=True)
    text = (path / "metrics.jsonl").read_text().replace('"distinct": 0.5', '"distinct": 0.1')
    first, last = text.splitlines()
    (path / "metrics.jsonl").write_text(first.replace("0.1,", "0.9,") + "\n" + last)
    report.main([str(path)])
    begin, _ = (path / "report.html").read_text().split("<details", 1)
    rose, fell = begin.index("Rose: pass@1 20 → 60"), begin.index("Fell: ")
    assert rose < fell < begin.index("distinct 0.9 → 0.1") < begin.index("reversal: pass@1 rose")
    [d] = report.read_run(path).ledger
    assert f"temperature of the pools: {d['temperature']:g}." in begin
    assert f"tau of the pools: {d['tau']:g}." in begin


def save_pool(run, t, queries):
    """Two responses to each query, as samples/iter_t.jsonl.gz."""
    lines = []
    for query in queries:
        sample = {"query": query, "response": f"<{query}{t}>", "correct": True, "reward": 1.0}
        sample |= {"selected": query == "a", "question": "2+2?", "gold": "4"}
        lines += [json.dumps(sample), json.dumps({**sample, "response": "a second one"})]
    path = run.path / "samples" / f"iter_{t}.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.parametrize(
    "last, before, after",
    [
        ("edcba", "abc", "abc"),
        ("xeydc", "cde", "cde"),
        ("xyzd", "dab", "dxy"),  # the questions that both asked come first, and once
    ],
)
def test_three_responses_before_and_after(tmp_path, last, before, after):
    run = read(tmp_path / "run")
    save_pool(run, 1, "abcde")
    save_pool(run, 2, last)
    page = "".join(report.response_cards(run))
    for t, queries in ((1, before), (2, after)):
        assert re.findall(rf"response: &lt;(.){t}&gt;", page) == list(queries)
    assert page.count("question: 2+2?") == 6 and "a second one" not in page
    assert "gold: 4\n\ncorrect: True\n\nreward: 1.0\n\nselected: " in page


@pytest.mark.parametrize("content", [None, b"", b"PK", b"{}", b'{"query": 3}', "torn"])
def test_a_pool_that_can_t_be_read_has_no_responses(tmp_path, content):
    run = read(tmp_path / "run")
    save_pool(run, 1, "abcde")
    path = save_pool(run, 2, "abcde")
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:60] if content == "torn" else gzip.compress(content))
    page = "".join(report.response_cards(run))
    assert page.count("question: 2+2?") == 3 and "&lt;a1&gt;" in page
