"""Labels by completion, ready labels, training, and train_prm.py as a user runs it."""

import gzip
import json
import random
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, captured, command, life, refused
from faults import End

import bstar
import data
import toy
import train_prm
import trainer
from config import parse_config
from data import Query, Sample
from rewards import PRM, split_steps
from runs import Setup

ROWS = ROOT.parent / "shared" / "data" / "step_labels"
TINY = """--task stories --toy-texts 512 --sft-lr 3e-3 --sft-epochs 6 --start-epoch 2
--val-queries 10 --toy-queries 80 --toy-solutions 64 --toy-max-ops 3 --max-tokens 40 --chunk 30
--batch-size 16""".split()
LOOP = """--num-iters 1 --steps-per-iter 2 --queries-per-iter 12 --K 4 --balance-queries 6
--temperatures 0.6:1.0:0.4 --eval-queries 8 --eval-samples 4 --S 2""".split()
STORY = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"


def prm_config(flags=TINY):
    return parse_config(flags, train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    toy.make_tiny_llama(folder, toy.STORY_WORDS, 0)
    return folder


class Scripted:
    """An engine that answers from text(prompt's text, number of the response)."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text, self.asked = tokenizer, text, []

    @contextmanager
    def awake(self, policy):
        yield self.draw

    def draw(self, queries, n, temperature, name, prompt):
        prompts = [self.tokenizer.decode(prompt(q), skip_special_tokens=True) for q in queries]
        self.asked += prompts
        return [[Sample(self.text(p, j), "stop") for j in range(n)] for p in prompts]


def scripted(base, engine, text=None):
    """A Setup of the stories' tiny base and an engine of the class given."""
    tokenizer = trainer.load_tokenizer(base)
    splits = data.Splits([], [], {}, "{query}", "{query}")

    def prompt(query):
        return data.prompt_ids(tokenizer, query, splits, False)

    end_ids = [tokenizer.eos_token_id]
    return Setup(splits, str(base), tokenizer, prompt, engine(tokenizer, text), end_ids, human=[])


def test_labels_against_brute_force(base, tmp_path):
    """Each prefix completed by itself, nothing shared or pruned: the same labels, at a price."""
    cfg, rng, q = prm_config(), random.Random(0), Query("0", STORY, "0")

    def n_right(text):
        return round(random.Random(text).choice([0, 0, 0.25, 1]) * cfg.completions)

    setup = scripted(base, Scripted, lambda text, j: "# 0" if j < n_right(text) else "# 1")
    texts = set()
    for _ in range(40):
        steps = rng.choices(["Cid = 0", "Ann = 0"], k=rng.randint(1, 3))
        texts.add(" ; ".join([*steps, "# 0"]))
    solutions = [train_prm.steps_of(q, text) for text in sorted(texts)]
    share = train_prm.complete(setup, base, solutions, cfg, tmp_path)
    brute = {}
    for prefixes in solutions:
        lost = False
        for prefix in prefixes[:-1]:
            brute[prefix] = n_right(f"{STORY} {prefix.text}") / cfg.completions
            lost = lost or brute[prefix] == 0
            assert (share.get(prefix, 0.0) > 0) == (not lost)
            assert lost or share[prefix] == brute[prefix]
    asked = setup.engine.asked
    assert len(asked) == len(set(asked)) <= len(brute)
    counts = json.loads((tmp_path / "completions.json").read_text())
    assert counts["done"] == cfg.completions * len(asked)
    assert counts["without the lost"] == cfg.completions * len(brute) < counts["without sharing"]


def test_the_labels_grade_as_the_run_does(base, tmp_path):
    """An answer that only restates MATH's question is wrong, in a solution and in a completion."""
    cfg = prm_config("--task math --solutions 2 --completions 4 --engine hf".split())

    class Restates(Scripted):
        def draw(self, queries, n, temperature, name, prompt=None):
            start = "We see.\n" if name == "solutions0" else ""
            texts = [f"{start}\\boxed{{{x}}}" for x in ("81^{3/4}", "27") * n]
            return [[Sample(text, "stop") for text in texts[:n]] for _ in queries]

    queries = [Query("0", "Evaluate $81^{3/4}$.", "27")]
    rows = train_prm.annotate(scripted(base, Restates), [base], queries, cfg, tmp_path)
    assert [(r["correct"], r["share"]) for r in rows] == [(False, [0.5, 0.0]), (True, [0.5, 1.0])]


SHEPHERD = {
    "input": "2+2? Step 1: 2+2=4 ки\nStep 2: The answer is: 5 ки",
    "label": "2+2? Step 1: 2+2=4 +\nStep 2: The answer is: 5 -",
}


def prm800k_step(candidates, chosen=None, human=None):
    completions = [{"text": text, "rating": rating} for text, rating in candidates]
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


PRM800K_STEPS = [
    prm800k_step([("a", -1), ("b", 0)], chosen=1),
    prm800k_step([("c", -1)], human={"text": "d", "rating": None}),
    prm800k_step([("e", -1)]),
]
PRM800K = {"question": {"problem": "1+1?"}, "label": {"steps": PRM800K_STEPS}}
OURS = {"prompt": "q", "completions": ["x", "y"], "labels": [True, False]}
EXPECTED = [
    ("1+1?", ["a"], [0.0]),
    ("1+1?", ["b", "c"], [None, 0.0]),
    ("1+1?", ["b", "d", "e"], [None, None, 0.0]),
    ("1+1?", ["b", "d"], [1.0, 1.0]),
]
READY = {
    "shepherd": (SHEPHERD, [("2+2?", ["2+2=4", "The answer is: 5"], [1.0, 0.0])]),
    "prm800k": (PRM800K, EXPECTED),
    "ours": (OURS, [("q", ["x", "y"], [1.0, 0.0])]),
}


@pytest.mark.parametrize("layout", READY)
def test_ready_labels_of_a_file_and_of_a_data_set(tmp_path, monkeypatch, layout):
    """A folder of parquet is read by the call that reads a hub name; such names may have dots."""
    import datasets
    import pyarrow.parquet

    row, expected = READY[layout]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("labels.jsonl").write_text(json.dumps(row))
    Path("org/labels-v1.2").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, "org/labels-v1.2/train.parquet")
    for name in ("labels.jsonl", "org/labels-v1.2"):
        rows = train_prm.read_annotations(name)
        assert [(r["prompt"], r["completions"], r["labels"]) for r in rows] == expected, name


def shepherd(steps):
    """A row whose tags are set as in the text: + right, - wrong, and ~ none."""
    text = re.sub("[+-]", "ки", steps)
    return {"input": text.replace("~", ""), "label": steps.replace("~", "")}


BROKEN = [
    shepherd("2*2? Step 1: 4 ?"),
    shepherd("2*2? step 1: 4 +"),
    shepherd("2*2? Step 1: 4 +\nStep 2: so 4 ~"),
    shepherd("2*2? Step 1: 4 +\nSo it: is 4 +"),
    {"input": "Is ки a tag? Step 1: no ки", "label": "Is ки a tag? Step 1: no +"},
    {"input": None, "label": None},
    {"question": {"problem": "x"}, "label": {}},
    {"prompt": "q", "completions": ["a"], "labels": []},
    {"prompt": "q", "completions": ["a"], "labels": [float("nan")]},
    {"prompt": "q", "completions": "a", "labels": [1]},
    {"prompt": "q", "completions": ["a"], "labels": [1], "share": []},
    {"other": 1},
]


def test_broken_annotations_are_counted_and_left_out(tmp_path, capsys):
    f = tmp_path / "labels.jsonl"
    f.write_text("\n".join(map(json.dumps, (shepherd("2*2? Step 1: 4 +"), *BROKEN, OURS))))
    rows = train_prm.read_annotations(str(f))
    assert [row["prompt"] for row in rows] == ["2*2?", "q"]
    [line] = capsys.readouterr().err.splitlines()
    assert f"{len(BROKEN)} of {len(BROKEN) + 2} rows are broken and left out (first: {f}:2" in line


def test_an_error_where_no_annotation_is_left(tmp_path):
    f = tmp_path / "labels.jsonl"
    for row in BROKEN:
        f.write_text(json.dumps(row))
        with refused(f"none of its 1 rows can be used .{f}:1,"):
            train_prm.read_annotations(str(f))


@pytest.mark.parametrize("name, least", [("math_shepherd_sample", 7), ("prm800k_sample", 6)])
def test_real_step_labels(name, least):
    path = ROWS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}: the real rows are not here")
    rows = train_prm.read_annotations(str(path))
    labels, steps = [], []
    for row in rows:
        assert row["prompt"] and len(row["completions"]) == len(row["labels"])
        labels += row["labels"]
        steps += row["completions"]
    assert len(rows) >= least and {0.0, 1.0} <= set(labels)
    assert not any("ки" in step for step in steps)


def test_what_cannot_be_trained_on_is_counted_and_left_out(base, capsys):
    cfg = prm_config()
    prm = train_prm.new_prm(base, trainer.load_tokenizer(base), "{query}", cfg)
    long = {"prompt": STORY * 20, "completions": ["# 0"], "labels": [1.0]}
    bare = {"prompt": STORY, "completions": ["# 0"], "labels": [None]}
    with refused("none of 2 annotated .* fits --max-length 160"):
        train_prm.as_examples(prm, [long, bare], cfg)
    assert len(train_prm.as_examples(prm, [long, bare, {**bare, "labels": [0.5]}], cfg)) == 1
    assert "annotations: 2 of 3 have no label or are longer" in capsys.readouterr().err


def test_the_loss_is_the_mean_over_a_global_batchs_steps(base, tmp_path):
    """The gradient of plain float64 autograd over all steps at once, whatever the micro-batches."""
    prm = train_prm.new_prm(base, trainer.load_tokenizer(base), "{query}", prm_config())
    prm.model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForTokenClassification
    plain = auto.from_pretrained(tmp_path, dtype=torch.float64)
    batch, losses, rng = [], [], random.Random(0)
    for q in toy.story_texts(4, 12):
        ids, places = prm.encode(q.text, split_steps(q.solution))
        labels = [rng.random() for _ in places]
        batch.append((ids, (places, labels)))
        log_p = plain(torch.tensor([ids])).logits[0, places].log_softmax(-1)
        losses += [-(y * p[1] + (1 - y) * p[0]) for y, p in zip(labels, log_p)]
    mean = train_prm.accumulate(prm, None, batch, 160)
    reference = torch.stack(losses).mean()
    reference.backward()
    assert mean == pytest.approx(reference.item(), abs=1e-5)
    for a, b in zip(prm.model.parameters(), plain.parameters()):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)


@pytest.mark.parametrize(
    "question, steps, check, joint",
    [
        # one step more than its checker sees
        (STORY, ["Bob = Ann * 3 = 4 * 3 = 2", "# 0", ";"], toy.check_story, " ; "),
        ("3 > 17 :", ["+7 10", ""], toy.check_route, " "),
    ],
)
def test_labels_against_the_exact_truth(question, steps, check, joint):
    good = [True] + [False] * (len(steps) - 1)
    row = {"prompt": question, "completions": steps, "labels": good, "share": good}
    worth = train_prm.labels_worth([row], check, joint)
    assert worth == {"labels_agree": 1.0, "labels_auc": 1.0}


@pytest.mark.parametrize("labels, good", [([0, 0, None], 0), ([1.0, True], 1), ([0, 1, 0.5], 0.5)])
def test_labels_that_are_all_alike_are_said(capsys, labels, good):
    counts = train_prm.count([{"labels": labels[:1]}, {"labels": labels[1:]}])
    assert counts == {"solutions": 2, "steps": len(labels), "good": good}
    alike = f"PRM: {100 * good:.0f} % of the 2 labelled steps are good"
    err = capsys.readouterr().err
    assert (alike in err) == bool(err) == (good != 0.5)


def test_a_prm_is_read_before_anything_is_made(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("--prm nope"):
        bstar.main([*TINY, *LOOP, "--prm", "nope"])
    assert not Path("runs/cache").exists()
    assert train_prm.given(parse_config([])) is None
    prm = train_prm.new_prm(base, trainer.load_tokenizer(base), "{query}", prm_config())
    trainer.save(trainer.State(0, prm.model), tmp_path / "prm", prm.tokenizer)
    cfg = parse_config(["--task", "stories", "--prm", str(tmp_path / "prm")])
    assert train_prm.given(cfg).task == "stories"


@pytest.fixture(scope="module")
def default(cwd) -> tuple[list[dict], str, Path]:
    """The default run, which trains its PRM first: its metrics, stderr, and the PRM's folder."""
    _, err = captured(cwd, bstar.main, [*TINY, *LOOP])
    run = cwd / "runs/stories-bstar-answer+prm-0"
    rows, times = (data.read_jsonl(run / f"{name}.jsonl") for name in ("metrics", "times"))
    assert {"base", "sft", "prm"} <= {line["phase"] for line in times}
    [folder] = (cwd / "runs/cache").glob("prm-stories-*")
    return rows, err, folder


@pytest.mark.slow
def test_the_default_run_trains_its_prm_first_and_other_methods_share_it(cwd, default):
    rows, err, folder = default
    assert "PRM |" in err and "labels_agree" in err and "prm@4-2" in rows[0]
    keys = "prm/auc prm/step_auc prm/ece prm/wrong_admitted prm/min_last".split()
    assert rows[1].keys() >= set(keys)
    at = LOOP.index("--balance-queries")  # and the grid
    online = [*LOOP[:at], *LOOP[at + 4 :], "--method", "online-rft", "--tau", "1"]
    online += ["--token-budget", "2048"]  # a smaller one must not make another PRM
    assert "PRM |" not in captured(cwd, bstar.main, [*TINY, *online])[1]
    assert "PRM epoch" not in captured(cwd, train_prm.main, TINY)[1]
    given = ["--prm", str(folder / "prm"), "--out", "runs/given"]
    captured(cwd, bstar.main, [*TINY, *LOOP, *given])
    assert data.read_jsonl(cwd / "runs/given/metrics.jsonl") == rows


ENDS = [
    ("solutions0", 0.5),
    ("solutions2", 1.0),
    ("step1", 0.5),
    ("step2", 1.0),
    ("PRM epoch 1", 0.5),
    ("PRM epoch 1", 1.0),
    ("PRM epoch 2", 0.5),
    ("fresh", 1.0),
]


@pytest.mark.slow
def test_killed_in_every_phase_it_goes_on_to_the_same_bits(cwd, default):
    whole, argv = default[2], [*TINY, "--out", "killed"]
    for phase, share in ENDS:
        code, printed = life(cwd, train_prm.main, argv, End(phase, share, signal.SIGKILL))
        assert code == -signal.SIGKILL, (phase, printed)
    assert life(cwd, train_prm.main, argv)[0] == 0
    for name in ("prm.json", "annotations.jsonl.gz", "completions.json", "prm/model.safetensors"):
        assert (cwd / "killed" / name).read_bytes() == (whole / name).read_bytes(), name

    for row in map(json.loads, gzip.open(whole / "annotations.jsonl.gz", "rt")):
        assert len(row["completions"]) == len(row["labels"]) == len(row["share"])
        assert row["labels"] == sorted(row["labels"], reverse=True)  # lost stays lost
    init = PRM.load(whole / "prm").tokenizer.init_kwargs
    assert (init["step_separator"], init["prompt_template"]) == (";", "{query}")


@pytest.mark.slow
def test_ready_labels_need_the_first_sft_checkpoint_alone(tmp_path):
    steps = ["Bob = Ann * 3 = 4 * 3 = 2", "# 5"]
    # of any questions: they are held against no checker
    row = {"prompt": "Ann ?", "completions": steps, "share": [1, 0.5]}
    lines = [json.dumps({**row, "labels": [1, k % 2]}) + "\n" for k in range(40)]
    (tmp_path / "labels.jsonl").write_text("".join(lines))
    flags = [*TINY, "--annotations", "labels.jsonl", "--out", "prm"]
    captured(tmp_path, train_prm.main, flags)
    assert [f.name for f in tmp_path.glob("runs/cache/sft-*/epoch_*")] == ["epoch_2"]
    (tmp_path / "labels.jsonl").write_text("".join(lines[1:]))  # the labels are data
    p = command(tmp_path, "train_prm.py", *flags)
    assert p.returncode == 2 and p.stderr.count("\n") == 1
    assert "holds a PRM made from other settings, data" in p.stderr


ERRORS = [
    ("--labels x", "--labels: invalid choice: 'x'"),
    ("--completions 0", "--completions 0"),
    ("--annotations none.jsonl", "no such file"),
    ("--annotations org/labels-v1.2", "or --annotations"),
    ("--annotations empty.jsonl", "empty.jsonl: the file holds no rows"),
    ("--method bstar", "--method"),
    ("--task code", "--task code: its reward is unit tests"),
    ("--out empty.jsonl", "--out empty.jsonl: File exists"),
    ("--out .", "--out .: it is not empty and holds no PRM of ours"),
]


@pytest.mark.parametrize("flags, message", ERRORS)
def test_user_errors_are_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty.jsonl").touch()
    with refused(re.escape(message)):
        train_prm.main(flags.split() if "--task" in flags else [*TINY, *flags.split()])


WALK = """--task walk --reward answer+prm --toy-texts 32 --toy-queries 60 --toy-solutions 64
--val-queries 10 --steps-per-iter 2 --num-iters 1 --balance-queries 20 --eval-queries 8
--eval-samples 4 --K 4""".split()


@pytest.mark.slow
def test_walks_with_a_prm_from_one_command(cwd):
    """Its labels are sampled at a temperature of their own, so a run at another shares them."""
    _, err = captured(cwd, bstar.main, [*WALK, "--temperatures", "0.6:1.0:0.4"])
    assert "labels_agree" in err
    rows = data.read_jsonl(cwd / "runs/walk-bstar-answer+prm-0/metrics.jsonl")
    assert rows[1]["prm/step_auc"] is not None and "prm/auc_sound" not in rows[1]
    _, err = captured(cwd, bstar.main, [*WALK, "--temperature", "0.8", "--out", "runs/fixed"])
    assert "PRM |" not in err
    [path] = cwd.glob("runs/cache/prm-walk-*/annotations.jsonl.gz")
    for row in map(json.loads, gzip.open(path, "rt")):
        *moves, end = row["completions"]
        assert end == "" and {len(move.split()) for move in moves} <= {1, 2}
