"""What metrics.py makes of runs' folders: table, alarms, replay, page; made-up runs, whole, broken and foreign."""
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics
from data import UserError

RNG = np.random.default_rng()
ROOT = Path(metrics.__file__).parent
TS, TAUS = [0.5, 0.8, 1.1], [-0.5, 0.0, 0.5, 1.0]


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def make_run(folder, seed=0, method="bstar", K=8, passes=(30.0, 41.5, 50.25), prm=False, **config):
    """A run's folder as bstar.py leaves it, with numbers drawn afresh; passes are its pass@1."""
    (folder / "samples").mkdir(parents=True)
    settings = {"task": "toy", "method": method, "reward": "answer", "steps_per_iter": 20, "eval_samples": K, **config, "seed": seed}
    (folder / "config.json").write_text(json.dumps(settings))
    rows, ledger, times = [], [], []
    for t, p in enumerate(passes):
        few = {f"{name}@{k}{s}": round(RNG.uniform(0, 100), 4) for k in (K // 2, K) for name, s in (("pass", ""), ("pass", "-2"), ("reward", "-2"))}
        row = {"iter": t, "eval_samples": K, "S": 2, "pass@1": p, "val/pass@1": 50 - p / 2, "queries": 200, "distinct": 0.5, "coverage": 0.9, **few}
        if t and prm:
            row |= {"prm/auc": 0.9 - 0.03 * t, "prm/auc_sound": 0.8, "prm/step_auc": 0.85, "prm/ece": 0.1, "prm/wrong_admitted": 0.2, "prm/false_admitted": 0.3,
                    "prm/min_last": 0.4, "prm/calibration": {"score": [None, 0.5, 0.9], "correct": [None, 0.4, 0.95], "n": [0, 7, 9]}, f"prm@{K}-2": 12.5}
        if t and method == "bstar":
            correct = RNG.random((3, 20, 6)) < 0.4
            pool = np.where(correct, 1.0, 0.0) + RNG.uniform(-1, 1, correct.shape), correct, RNG.integers(0, 5, correct.shape).astype(np.int32)
            np.savez_compressed(folder / "samples" / f"balance_{t}.npz", **dict(zip(("reward", "correct", "text"), pool)))
            ledger.append({"iter": t, **metrics.decide(*pool, TS, TAUS, 2, seed=seed + t)})
            row |= {"temperature": ledger[-1]["temperature"], "tau": ledger[-1]["tau"], "qe": 0.25, "loss": None}
        rows.append(row)
        times += [{"iter": t, "phase": phase, "seconds": round(RNG.uniform(1, 9), 3)} for phase in ("eval", "gen")]
    for name, content in (("metrics", rows), ("ledger", ledger), ("times", times)):
        (folder / f"{name}.jsonl").write_text(lines(content))
    return folder


def cli(*args):
    return subprocess.run([sys.executable, str(ROOT / "metrics.py"), *map(str, args)], capture_output=True, text=True)


# -- table ----------------------------------------------------------------------------------------------------------------

def test_table_shows_first_last_best_and_the_mean_over_seeds(tmp_path):
    runs = [make_run(tmp_path / "run-1", 1, passes=[10.0, 30.0, 20.0]), make_run(tmp_path / "run-2", 2, passes=[20.0, 40.0, 34.0]), make_run(tmp_path / "new", passes=[])]
    cells = {tuple(c.strip() for c in x.split("|")[1:3]): x.split("|")[4].strip() for x in metrics.table([metrics.read_run(r) for r in runs]).splitlines()[2:]}
    assert cells["run-1", "2 (last)"] == "20.0" and cells["run-1", "0 (best)"] == "10.0"         # best on validation, which here falls
    assert cells["mean of run, 2 seeds", "first"] == "15.0 ± 5.0" and cells["mean of run, 2 seeds", "last"] == "27.0 ± 7.0"
    assert cells["mean of run, 2 seeds", "gain"] == "12.0 ± 2.0" and cells["new", "no metrics yet"] == ""


def test_differences_are_paired_by_seed(tmp_path):
    a = [make_run(tmp_path / f"a-{s}", s, passes=[10.0, x]) for s, x in ((1, 20.0), (2, 60.0))]
    b = [make_run(tmp_path / f"b-{s}", s, passes=[10.0, x], method="online-rft") for s, x in ((2, 64.0), (1, 22.0), (3, 99.0))]
    asked = cli(*a, *b, "--against", a[1])
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in asked.stdout.splitlines()]
    column = cells[0].index("pass@1")
    assert {(c[0], c[1]): c[column] for c in cells[2:]} == {("a, 2 seeds", "last"): "40.0 ± 20.0", ("b, 3 seeds", "last"): "61.7 ± 22.3", ("", "difference, 2 seeds"): "3.0 ± 1.0"}
    assert not (tmp_path / "report.html").exists()
    for args, said in (([*a, "--against", b[0]], "not one of the runs given"), ([a[0], "--replay", "--against", a[0]], "not with --replay")):
        wrong = cli(*args)
        assert wrong.returncode == 2 and said in wrong.stderr and wrong.stderr.count("\n") == 1


def test_only_runs_that_differ_in_the_seed_alone_are_seeds_of_one():
    def run(name, seed, **config):
        return metrics.Run(Path(name), name, seed, {"method": "bstar", "reward": "answer", **config}, [], [], [])
    groups = metrics.by_seed([run("a-1", 1), run("a-2", 2), run("b-1", 1, K=3), run("a-1", 1)])
    assert [(g.label, len(g.runs)) for g in groups] == [("a, 2 seeds", 2), ("b-1", 1), ("a-1", 1)] and len({g.colour for g in groups}) == 3


# -- alarms ---------------------------------------------------------------------------------------------------------------

def kinds(rows=(), ledger=()):
    return [line.split(":")[0] for line in metrics.alarms(rows, ledger)]


def row(t, one, many, distinct=0.5, **more):
    return {"iter": t, "eval_samples": 32, "S": 4, "pass@1": one, "pass@32": many, "distinct": distinct, "coverage": 1.0, "queries": 200, **more}


def test_reversal_is_a_rise_with_a_fall_both_beyond_noise():
    assert metrics.alarms([row(0, 30.0, 96.0), row(1, 45.0, 80.0, 0.2)], []) == [
        "reversal: from iteration 0 to 1 pass@1 rose 30.0 -> 45.0 while pass@32 fell 96.0 -> 80.0 and distinct equations fell 0.50 -> 0.20, "
        "each by more than two standard errors on 200 questions"]
    assert kinds([row(0, 30.0, 96.0), row(1, 45.0, 93.0)]) == []                                 # the fall is noise
    assert kinds([row(0, 30.0, 96.0), row(1, 35.0, 80.0)]) == []                                 # the rise is noise
    assert kinds([row(0, 30.0, 96.0), row(1, 45.0, 96.0, 0.3)]) == ["reversal"]                  # distinct equations alone
    assert kinds([row(0, 30.0, 96.0)]) == kinds([]) == []
    assert kinds([{k: v for k, v in r.items() if k != "queries"} for r in (row(0, 30.0, 96.0), row(1, 45.0, 80.0))]) == []       # a run of before they were counted


def test_noise_alone_rarely_alarms():
    fired = sum(metrics.shift(a / 200, b / 200, 200, 200) != 0 for p in (0.02, 0.3, 0.97) for a, b in RNG.binomial(200, p, (2000, 2)))
    assert fired < 6000 * 0.065                                                                  # two standard errors: 4.6 % for both signs


def test_drift_is_more_than_0_05_below_the_first():
    assert kinds([row(t, 30.0, 90.0, **{"prm/auc": x}) for t, x in enumerate([None, 0.90, 0.86, 0.84, 0.91])]) == ["drift"]
    assert kinds([row(t, 30.0, 90.0, **{"prm/auc": x}) for t, x in enumerate([None, 0.90, 0.86, float("nan")])]) == []


def decision(T, tau, surface, **more):
    edge = [n for n, x, grid in (("temperature", T, TS), ("tau", tau, TAUS)) if x in (grid[0], grid[-1])]
    return {"iter": 1, "temperature": T, "tau": tau, "temperatures": TS, "taus": TAUS, "surface": np.asarray(surface).tolist(), "edge": edge, "ties": 0, **more}


def test_an_end_of_the_grid_alarms_only_where_it_is_better_than_inside():
    surface = np.add.outer([0.1, 0.2, 0.3], [0.0, 0.1, 0.05, 0.0])
    assert metrics.alarms([], [decision(1.1, 0.0, surface)]) == [
        "edge: the best temperature was an end of its grid, 0.5 to 1.1, in 1 of 1 decisions, last 1.1 in iteration 1; a wider --temperatures may hold a better one"]
    assert kinds([], [decision(0.8, 0.0, surface)]) == []
    assert kinds([], [decision(1.1, 1.0, np.ones((3, 4)))]) == []                                # a flat surface: the tie went to the end
    assert kinds([], [decision(0.5, -0.5, -np.add.outer(range(3), range(4)))]) == ["edge", "edge"]


def test_ties_are_counted_once_for_all_decisions():
    tied = decision(0.8, 0.0, np.ones((3, 4)), ties=2, tied=[[0.5, 0.0], [1.1, 0.5]])
    [line] = metrics.alarms([], [{**tied, "iter": t} for t in (1, 2)] + [decision(0.8, 0.0, np.ones((3, 4)), iter=3)])
    assert line.startswith("ties: 2 of 11 other grid points are within noise of iteration 2's choice (T 0.5 to 1.1, tau 0 to 0.5); so it was in 2 of 3 decisions")


# -- replay ---------------------------------------------------------------------------------------------------------------

def test_replay_with_the_run_s_own_settings_is_the_ledger_to_the_last_bit(tmp_path):
    run = metrics.read_run(make_run(tmp_path / "run"))
    again = metrics.replay(run)
    assert [line for line, _ in again] == run.ledger == metrics.read_jsonl(tmp_path / "run" / "ledger.jsonl")
    for d, (_, f) in zip(run.ledger, again):
        assert (f["T"], f["tau"]) == (1.1, 0.0) and list(f["sizes"]) == [2, 3, 5, 6]
        assert round(f["sizes"][6], 6) == d["surface"][2][1]                                     # Fig. 4 (a) at the full size
        assert d["surface"][TS.index(f["best_T"])][1] == max(s[1] for s in d["surface"]) and d["surface"][2][TAUS.index(f["best_tau"])] == max(d["surface"][2])
    p = cli("--replay", tmp_path / "run")
    assert p.returncode == 0 and "2 of 2 decisions equal the ledger's in every field" in p.stdout and (tmp_path / "run" / "replay.html").exists()


def test_replay_with_other_settings(tmp_path):
    run = metrics.read_run(make_run(tmp_path / "run"))
    pool = metrics.load_pool(run, run.ledger[0])
    [(line, _), _] = metrics.replay(run, temperatures=[0.5, 1.1], taus=[0.25], n_star=4, queries=9)
    expected = [metrics.effects(*(a[i, :9] for a in pool), [0.25], 4)[0].mean() for i in (0, 2)]
    assert np.allclose(line["surface"], np.array(expected)[:, None], atol=1e-6) and line["n_star"] == 4 and line["temperatures"] == [0.5, 1.1]
    exact, fewer = metrics.replay(run, exact_tau=True), metrics.replay(run, samples=3)
    for d, (e, _), (f, sizes) in zip(run.ledger, exact, fewer):
        assert e["qe"] >= d["qe"] - 1e-9 and 0.0 in e["taus"]
        assert sizes["sizes"][3] == pytest.approx(f["surface"][2][1], abs=1e-6)


@pytest.mark.parametrize("flags, said", [
    ("--replay --temperatures 0.5:0.6:0.1", "--temperatures 0.5, 0.6: the run sampled at 0.5, 0.8, 1.1; choose among these"),
    ("--replay --queries 21", "--queries 21: the run balanced on 20"), ("--replay --samples 7", "--samples 7: the run drew 6 a question"),
    ("--replay --samples 0", "argument --samples: 0: expected a whole number, at least 1"), ("--replay --n-star x", "argument --n-star: x: expected a whole number"),
    ("--replay --taus 1:2", "--taus 1:2: expected FROM:TO:STEP"),
    ("--replay --taus 0:1:0.5 --exact-tau", "--taus, --exact-tau: expected one of them"), ("--taus -1:1:1", "--taus: only with --replay"),
    ("--what", "unrecognized arguments"), ("--replay OTHER", "expected one run, not 2"), ("--out /dev/null/x", "--out /dev/null/x: Not a directory"),
])
def test_a_user_s_error_is_one_line(tmp_path, flags, said):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError) as e:
        metrics.main([str(run), *flags.replace("OTHER", str(make_run(tmp_path / "b" / "run"))).split()])
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("break_it, said", [
    (lambda r: (r / "samples" / "balance_1.npz").unlink(), "balance_1.npz: missing"),
    (lambda r: (r / "samples" / "balance_2.npz").write_bytes((r / "samples" / "balance_2.npz").read_bytes()[:300]), "balance_2.npz: broken"),
    (lambda r: np.savez(r / "samples" / "balance_1.npz", reward=[1.0], duplicate=[True]), "of a version that kept no texts"),
    (lambda r: np.savez(r / "samples" / "balance_1.npz", reward=[1.0], correct=[1], text=[0]), "its shapes [(1,), (1,), (1,)] don't fit the ledger's 3 temperatures"),
    (lambda r: (r / "ledger.jsonl").write_text('{"iter": 1}\n[]\n{"it'), "no decision in its ledger.jsonl"),
])
def test_replay_without_its_samples_is_one_line(tmp_path, break_it, said):
    run = make_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(UserError) as e:
        metrics.main(["--replay", str(run)])
    assert said in str(e.value) and "\n" not in str(e.value)


def test_an_error_exits_2_with_one_line_on_stderr(tmp_path):
    p = cli(tmp_path)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and p.stderr.startswith("metrics.py: ") and "expected the folder of a run" in p.stderr


# -- the page -------------------------------------------------------------------------------------------------------------

class Page(html.parser.HTMLParser):
    """Tags, ids, references, SVGs, and tables as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.refs, self.svgs, self.tables, self.open = [], [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs, self.open = dict(attrs), tag
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.refs += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset")]
        self.refs += [u for v in attrs.values() for u in re.findall(r"url\(([^)]*)", v or "")]
        self.svgs += [attrs] if tag == "svg" else []
        {"table": lambda: self.tables.append([]), "tr": lambda: self.tables[-1].append([]), "td": lambda: self.tables[-1][-1].append(""),
         "th": lambda: self.tables[-1][-1].append("")}.get(tag, int)()

    def handle_data(self, text):
        if self.open in ("td", "th"):
            self.tables[-1][-1][-1] += text

    def handle_endtag(self, tag):
        self.open = ""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(the page of six runs, its parse, their folders): two seeds with a PRM, a fixed baseline of another K, SFT, a run without metrics, one with odd lines."""
    top = tmp_path_factory.mktemp("runs")
    runs = [make_run(top / "toy <&> prm-1", 1, prm=True), make_run(top / "toy <&> prm-2", 2, prm=True, passes=(20.0, 33.5)),
            make_run(top / "rft", method="online-rft", K=4), make_run(top / "sft", method="sft"), make_run(top / "new", passes=()), make_run(top / "odd")]
    (runs[-1] / "metrics.jsonl").write_text('5\n{"iter": "x"}\n' + (runs[-1] / "metrics.jsonl").read_text() + '{"iter": 3, "pass@1": "high", "eval_sam')
    (runs[-1] / "ledger.jsonl").write_text('{"iter": 1}\nnull\n' + (runs[-1] / "ledger.jsonl").read_text().splitlines()[1] + '\n{"iter": 3, "surface": [[1], [2, 3]]}')
    (runs[-1] / "times.jsonl").write_bytes(b'\xff\xfe\n{"iter": 1, "phase": 3, "seconds": 2}\n')
    (runs[-1] / "samples" / "balance_2.npz").write_bytes(b"PK")
    metrics.main(list(map(str, runs)))
    text = (top / "report.html").read_text(encoding="utf-8")
    return text, Page(text), runs


def test_the_page_needs_nothing_else_and_no_id_comes_twice(page):
    text, p, runs = page
    assert "script" not in p.tags and all(r.startswith(("#", "data:")) for r in p.refs) and "@import" not in text
    assert len(p.ids) == len(set(p.ids)) and {r[1:] for r in p.refs if r.startswith("#")} <= set(p.ids)
    assert p.svgs and all(s["role"] == "img" and "Paper: " in s["aria-label"] for s in p.svgs)   # each says what it answers to
    assert p.tags.count("figure") == p.tags.count("figcaption") == len(p.svgs) == len(list((runs[0].parent / "figures").glob("*.png")))
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text and metrics.INK not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert "toy &lt;&amp;&gt; prm-1" in text and "toy <&>" not in text
    assert "No Fig. 4: " in text and "balance_2.npz: broken" in text                             # of the odd run


def test_every_number_of_the_page_is_the_one_in_metrics_jsonl(page):
    _, p, paths = page
    runs = [metrics.read_run(path) for path in paths]
    ends = {(r[0].split(" (K")[0], r[1]): dict(zip(p.tables[0][0], r)) for r in p.tables[0][1:]}
    for run, shown in zip([r for r in runs if r.rows], [t for t in p.tables if t[0][0] == "key"], strict=True):
        cells = {row[0]: row[1:] for row in shown}
        numbers = [{k: json.dumps(v) for k, v in row.items() if metrics._is_number(v)} for row in run.rows]
        assert cells.pop("key") == [f"iteration {r['iter']}" for r in run.rows]
        expected = {(k, t, x) for t, row in enumerate(numbers) for k, x in row.items() if k != "iter"}
        assert {(k, t, x) for k, row in cells.items() for t, x in enumerate(row) if x} == expected
        for which, row in (("first", run.rows[0]), ("last", run.rows[-1])):
            top = ends[run.name, f"{row['iter']} ({which})"]
            assert all(top[n] == metrics._cell(n, metrics.value(row, n)) for n in metrics.COLUMNS if n in top)
    for run, shown in zip([r for r in runs if r.ledger], [t for t in p.tables if t[0][0] == "iter"], strict=True):
        assert [row[:4] for row in shown[1:]] == [[str(d["iter"]), f"{d['temperature']:g}", f"{d['tau']:g}", f"{d['qe']:.4f}"] for d in run.ledger]


def test_every_curve_is_what_metrics_jsonl_says(tmp_path):
    run = metrics.read_run(make_run(tmp_path / "run", prm=True))
    groups = metrics.by_seed([run])
    found = {panel.name: panel for section in metrics.CURVES for panel in metrics.curve_panels(groups, section)}
    assert found.keys() == {"pass1", "distinct", "passk", "passks", "rewardks", "temperature", "tau", "qe", "auc", "admitted", "ranked"}
    assert found["pass1"].lines[0].y == [r["pass@1"] for r in run.rows] and found["pass1"].lines[0].x == [0, 20, 40]
    assert found["pass1"].lines[1].y == [run.rows[0]["pass@1"]] * 2                              # the level line is iteration 0
    for name, keys in (("passk", ["pass@8", "pass@4"]), ("rewardks", ["reward@8-2", "reward@4-2"]), ("auc", ["prm/auc", "prm/auc_sound", "prm/step_auc"])):
        assert [line.y for line in found[name].lines] == [[r[k] for r in run.rows if k in r] for k in keys]
    assert found["temperature"].lines[0].y == [d["temperature"] for d in run.ledger]
    assert metrics.calibration_panel(groups).lines[0][1:3] == ((0.5, 0.9), (0.4, 0.95))
    bars = dict(metrics.time_panel(groups).bars)
    assert bars["iteration 1"] == {s["phase"]: s["seconds"] for s in run.seconds if s["iter"] == 1}


def test_bands_are_mean_and_standard_error_over_seeds_and_sft_is_a_level_line(tmp_path):
    runs = [make_run(tmp_path / "a-1", 1, passes=[10.0, 30.0, 20.0]), make_run(tmp_path / "a-2", 2, passes=[20.0, 40.0]),
            make_run(tmp_path / "s", method="sft", passes=[1.0, 2.0])]
    seeds, sft = metrics.curves(metrics.by_seed([metrics.read_run(r) for r in runs]), {"pass@1": ""}, True)
    assert (seeds.label, seeds.x, seeds.y, seeds.se) == ("a, 2 seeds", [0, 20], [15.0, 35.0], [5.0, 5.0])       # the iterations that all have
    assert (sft.label, sft.x, sft.y) == ("s", [0, 40], [2.0, 2.0])


def test_runs_of_different_k_share_a_page_and_say_their_k(tmp_path):
    runs = [metrics.read_run(make_run(tmp_path / f"k{K}", K=K)) for K in (8, 16)]
    assert "| k8 (K 8, S 2) |" in metrics.table(runs) and "| k16 (K 16, S 2) |" in metrics.table(runs)
    [passk] = [p for p in metrics.curve_panels(metrics.by_seed(runs), "Exploration and exploitation") if p.name == "passk"]
    assert {line.label for line in passk.lines} == {"k8", "k16", "K = 16", "K = 4"}


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"task": "toy", "seed": 1}',
                                     '{"method": "bstar", "reward": "answer", "seed": 1, "steps_per_iter": "many"}'])
def test_a_foreign_folder_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as e:
        metrics.main([str(tmp_path)])
    assert "config.json" in str(e.value) and "\n" not in str(e.value)


def test_metrics_stays_light():
    code = "import sys, metrics; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
