"""bstar.py: selection, training by the method's switches, evaluation, and whole runs.

The whole runs are tiny. They are ended in every phase and go on to the same bits.
"""

import dataclasses
import gzip
import json
import math
import random
import shutil
import signal
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import flags_of, life, refused, run, tiny
from faults import End

import bstar
import data
import report
from config import METHODS
from data import Query, Sample
from trainer import State, adamw, is_complete, load_policy, seed_of


def test_of_equal_texts_the_best_rewarded_is_the_one_that_counts():
    cut_off = Sample("x  # 5", "length", reward=-math.inf)
    whole = Sample("x # 5", "stop", correct=True, reward=1.0)
    assert bstar.select([[cut_off, whole]], 0.0, 5, 0) == [[whole]]


@pytest.mark.parametrize("seed", range(50))
def test_select_takes_turns_and_is_unique_strict_and_capped(seed):
    rng = random.Random(seed)
    groups = []
    for _ in range(rng.randint(1, 6)):
        texts = rng.choices("abcdef", k=rng.randint(1, 8))
        groups.append([Sample(x, "stop", reward=ord(x) % 4 / 2) for x in texts])
    N, tau = rng.randint(1, 30), rng.choice([-1.0, 0.0, 0.5, 1.0])
    kept = bstar.select(groups, tau, N, seed)

    allowed = [{s.response for s in group if s.reward > tau} for group in groups]
    most = max(map(len, kept))
    assert sum(map(len, kept)) == min(N, sum(map(len, allowed)))
    for group, some, texts in zip(groups, kept, allowed):
        chosen, rewards = [s.response for s in some], [s.reward for s in some]
        assert len(some) == len(texts) or most <= len(some) + 1  # turns
        assert len(set(chosen)) == len(chosen) and set(chosen) <= texts
        assert rewards == sorted(rewards, reverse=True)
        others = [s.reward for s in group if s.response in texts - set(chosen)]
        assert not others or not rewards or max(others) <= rewards[-1]
    assert kept == bstar.select(groups, tau, N, seed)


@pytest.fixture
def phases(toy, monkeypatch):
    """improve(flags, t, n): the phases of iteration t on n responses, training left out."""
    calls = []

    def spy(policy, optimizer, examples, phase, cfg):
        n_steps = max(float(state["step"]) for state in optimizer.state.values())
        calls.append(("train", phase, n_steps, policy.get_input_embeddings().weight))
        return {"loss": 0.0, "grad_norm": 0.0}

    monkeypatch.setattr(bstar, "train", spy)
    monkeypatch.setattr(bstar, "place", lambda optimizer, where: calls.append(str(where)))

    def improve(flags: str, t: int = 3, n: int = 1):
        calls.clear()
        policy, q = toy.policy(), Query("0", "Ida has 5 . Ida ?", "5")
        optimizer = adamw(policy, 1e-3)
        policy(torch.tensor([[1]])).logits.sum().backward()
        optimizer.step()
        kept = [[Sample(f"# {i}", "stop") for i in range(n)]]
        M = bstar.improve(State(t - 1, policy, optimizer), [q], kept, toy.setup, tiny(flags))
        return M, calls

    return improve


BASE_STEPS = 3 * 4 + 6 * 8  # of three iterations, and of SFT's six epochs


STEPS = {
    "rest-em": range(BASE_STEPS),
    "iterative-rft": range(4),
    "online-rft": range(8, 12),
    "bstar": range(8, 12),
}


@pytest.mark.parametrize("method", STEPS)
def test_methods_differ_by_their_switches(toy, phases, capsys, method):
    steps, inherited = STEPS[method], method in ("online-rft", "bstar")
    M, calls = phases(f"--method {method} --num-iters 4")
    [(_, phase, n_steps, weights)] = [c for c in calls if c[0] == "train"]
    assert phase.steps == steps and (n_steps > 0) == inherited == (M.optimizer is not None)
    assert phase.horizon == (16 if inherited else len(steps))
    at_its_end = phase.rate(steps[-1]) == pytest.approx(1e-4)
    assert at_its_end == (not inherited)
    base = load_policy(toy.cfg, toy.setup.base).get_input_embeddings().weight
    assert torch.equal(weights, base) == (method == "rest-em")
    assert M.t == 3 and "forget the rest" in capsys.readouterr().err


def test_max_repeats_takes_fewer_steps_of_the_same_schedule(phases, capsys):
    M, [_, (_, whole, *_)] = phases("--method online-rft", t=2, n=20)
    assert (whole.steps, M.log["repeats"]) == (range(4, 8), 3.2)
    M, [_, (_, capped, *_)] = phases("--method online-rft --max-repeats 2", t=2, n=20)
    assert (capped.steps, M.log["repeats"]) == (range(4, 7), 2.4)
    assert capped.rate(5) == whole.rate(5) and "forget" not in capsys.readouterr().err


def test_the_optimizer_waits_on_the_host_where_it_is_told_to(phases):
    for flags, after in (("", []), ("--offload-optimizer", ["cpu"])):
        device, _, *rest = phases(flags)[1]
        assert device == "cpu" and rest == after


def test_a_full_gpu_in_scoring_names_the_flag(toy, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bstar.rewards, "score", full)
    monkeypatch.setattr(bstar.Run, "lap", lambda *args: None)
    score = bstar.make_reward(toy.cfg, toy.setup, None, bstar.Run)
    with refused("a smaller --token-budget"):
        score([], [])


def test_evaluate_names_further_test_sets_and_can_be_greedy_alone(toy, tmp_path):
    test = toy.setup.splits.tests["toy"]
    splits = dataclasses.replace(toy.setup.splits, tests={"toy": test, "more": test[5:]})
    cfg = tiny(f"--out {tmp_path} --eval-queries 4")
    setup = dataclasses.replace(toy.setup, splits=splits, engine=toy.engine(tmp_path))
    score = bstar.make_reward(cfg, setup, None, bstar.Run(cfg))
    row = bstar.evaluate(State(0, toy.policy()), setup, score, cfg)
    assert {"val/pass@1", "pass@1", "pass@4-2", "reward@4-2", "more/pass@4"} <= set(row)
    drawn = sorted(path.name for path in setup.engine.parts.glob("iter0.more*"))
    assert drawn == ["iter0.more.greedy.0.jsonl.gz", "iter0.more.sampled.0.jsonl.gz"]
    cfg.eval_samples = 0
    row = bstar.evaluate(State(0, toy.policy()), setup, score, cfg)
    assert set(row) == {"val/pass@1", "pass@1", "queries", "more/pass@1", "more/queries"}


@pytest.fixture(scope="module")
def reference(toy) -> tuple[Path, str, str]:
    """An undisturbed run: its folder, and what it wrote to stdout and stderr."""
    return toy.cwd / "run", *run(toy.cwd, "--out run")


def bits(folder: Path) -> dict[str, bytes]:
    """What must be the same to the last bit however often a run was ended."""
    paths = [folder / "metrics.jsonl", folder / "ledger.jsonl", *folder.glob("samples/*")]
    return {path.name: path.read_bytes() for path in paths}


def test_a_run_leaves_its_folder_complete(reference):
    folder, out, _ = reference
    rows, ledger = (data.read_jsonl(folder / f"{x}.jsonl") for x in ("metrics", "ledger"))
    assert [r["iter"] for r in rows] == [0, 1, 2] and [d["iter"] for d in ledger] == [1, 2]
    phases = {line["phase"] for line in data.read_jsonl(folder / "times.jsonl")}
    assert phases >= {"base", "sft", "balance", "gen", "score", "train", "eval"}
    for d, row in zip(ledger, rows[1:]):
        assert np.array(d["surface"]).shape == (2, 21)
        assert (d["temperature"], d["tau"]) == (row["temperature"], row["tau"])
    assert "<table" in (folder / "report.html").read_text() and not (folder / "parts").exists()
    best = max(rows, key=lambda r: r["val/pass@1"])["iter"]
    name = f"iter_{best}" if best else "epoch_6"
    assert (folder / "best").resolve().name == name and is_complete(folder / "best")
    assert (folder / "policy").resolve().name == "iter_2" and is_complete(folder / "policy")
    lines = [line for line in out.splitlines() if line.startswith("iter ")]
    keys = "| T . tau . qe .| kept .| loss .pass@1 .pass@4-2 .reward@4-2 .distinct .balance "
    assert len(lines) == 3 and all(key in lines[2] for key in keys.split("."))


def test_the_subsets_samples_at_the_chosen_temperature_join_the_pool(reference):
    folder, *_ = reference
    text = gzip.decompress((folder / "samples" / "iter_1.jsonl.gz").read_bytes()).decode()
    samples = [json.loads(line) for line in text.splitlines()]
    row = data.read_jsonl(folder / "metrics.jsonl")[1]
    decision = data.read_jsonl(folder / "ledger.jsonl")[0]
    assert len(samples) == 24 * 4 and sum(s["selected"] for s in samples) == row["kept"]
    pool = [-math.inf if s["reward"] is None else s["reward"] for s in samples[: 8 * 4]]
    subset = np.load(folder / "samples" / "balance_1.npz")["reward"]  # (2, 8, 4)
    at = decision["temperatures"].index(decision["temperature"])
    assert subset[at].ravel().tolist() == pool


def test_the_logged_decisions_follow_from_the_saved_subset(reference, capsys):
    report.main(["--replay", str(reference[0])])
    assert "2 of 2 decisions equal the ledger's in every field" in capsys.readouterr().out
    ledger = data.read_jsonl(reference[0] / "ledger.jsonl")
    assert [d["seed"] for d in ledger] == [seed_of(0, t, "bootstrap") for t in (1, 2)]


def test_an_alarm_is_raised_once(reference):
    kinds = [line.split()[2] for line in reference[2].splitlines() if line.startswith("alarm | ")]
    assert "ties:" in kinds and len(kinds) == len(set(kinds))


def test_a_finished_run_says_so_and_does_nothing(reference, toy):
    before = bits(reference[0])
    assert "finished; another --out" in run(toy.cwd, "--out run")[0]
    assert bits(reference[0]) == before


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bstar"])
def test_every_method_runs(reference, toy, method):
    short = "" if method == "sft" else "--num-iters 1"
    run(toy.cwd, f"--out {method} --method {method} --reward answer {short}")
    first, last = data.read_jsonl(toy.cwd / method / "metrics.jsonl")
    assert not (toy.cwd / method / "ledger.jsonl").exists()
    of_bstar = data.read_jsonl(reference[0] / "metrics.jsonl")[0]
    assert first["pass@1"] == of_bstar["pass@1"]  # all start from the same SFT checkpoint
    if method != "sft":
        assert (last["temperature"], last["tau"]) == (1.0, 0.0) and last["loss"] > 0


def test_where_nothing_is_selected_the_policy_stays_as_it_is(toy):
    _, err = run(toy.cwd, "--out nothing --method online-rft --tau 1.99 --max-tokens 1")
    assert err.count("no response was selected; the policy stays as it is") == 2
    rows = data.read_jsonl(toy.cwd / "nothing" / "metrics.jsonl")
    assert [r.get("loss") for r in rows] == [None] * 3 and rows[2]["kept"] == 0
    assert rows[2]["pass@1"] == rows[0]["pass@1"]


def test_a_fixed_temperature_leaves_tau_to_the_balance(toy):
    run(toy.cwd, "--out fixed --temperature 0.7 --num-iters 1")
    [decision] = data.read_jsonl(toy.cwd / "fixed" / "ledger.jsonl")
    assert decision["temperatures"] == [0.7] and len(decision["taus"]) == 21


SHORT = "--num-iters 1 --steps-per-iter 1 --batch-size 4 --queries-per-iter 5 --balance-queries 3"
FILES = "--train-file train.jsonl --test-file test.jsonl --out run --max-tokens 8"


def run_rows(toy, monkeypatch, tmp_path, row: dict, flags: str) -> list[dict]:
    """Runs M_0 on nine training and three test questions like row; returns the metrics."""
    monkeypatch.chdir(tmp_path)
    for name, n in (("train", 9), ("test", 3)):
        rows = [{**row, "question": f"{name} {i} ?"} for i in range(n)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(tmp_path, f"--model {toy.start} {FILES} {SHORT} {flags} --no-gradient-checkpointing")
    return data.read_jsonl(Path("run/metrics.jsonl"))


def test_arc_runs_without_sft_and_reports_greedy_pass_at_1_alone(toy, tmp_path, monkeypatch):
    """The toy's words have no choices, so all is wrong."""
    row = {"choices": {"text": ["5", "6", "7"], "label": ["A", "B", "C"]}, "answerKey": "A"}
    flags = "--task arc --reward answer --sft-epochs 0 --start-epoch 0 --eval-samples 0"
    first, last = run_rows(toy, monkeypatch, tmp_path, row, flags)
    assert {key for key in last if "@" in key} == {"pass@1", "val/pass@1"}
    assert first["iter"] == 0 and last["sampled"] == 20 and "distinct" not in last


def test_code_trains_on_programs_that_pass_their_tests(toy, tmp_path, monkeypatch):
    """ "5" is a program that prints nothing, which is what the tests ask for."""
    tests = {"inputs": [""], "outputs": [""]}
    row = {"solutions": json.dumps(["5", "6"]), "input_output": json.dumps(tests)}
    row["starter_code"] = ""
    flags = "--task code --reward tests --start-epoch 12 --val-queries 1 --max-length 200"
    last = run_rows(toy, monkeypatch, tmp_path, row, flags)[-1]
    assert last["pass@1"] == 100 and last["pool/correct"] > 0 and last["kept"] > 0


# one iteration's phases in their order; 1.0 is after the phase and before what it has is saved
ENDS = [
    ("toy base", 0.5),
    ("SFT to epoch_6", 0.5),
    ("SFT to epoch_6", 1.0),
    ("iter0.val", 1.0),
    ("iter0.toy.sampled", 0.5),
    ("iter1.T0.6", 1.0),
    ("iter1.pool", 0.5),
    ("train 1", 0.5),
    ("train 1", 1.0),
    ("iter2.T1", 0.5),
    ("iter2.pool", 1.0),
    ("train 2", 0.25),
    ("iter2.toy.sampled", 1.0),
]


def test_ended_in_every_phase_the_same_command_ends_in_the_same_bits(reference, tmp_path):
    argv = flags_of("--out run")
    for phase, share in ENDS:
        sig, code = random.choice([(signal.SIGKILL, -9), (signal.SIGINT, 130)])
        ended, printed = life(tmp_path, bstar.main, argv, End(phase, share, sig))
        assert ended == code, (phase, printed)
        assert sig == signal.SIGKILL or "the same command goes on" in printed.splitlines()[-1]
    assert life(tmp_path, bstar.main, argv)[0] == 0
    assert bits(tmp_path / "run") == bits(reference[0])


def test_a_broken_checkpoint_is_told_and_the_one_before_it_used(reference, toy):
    folder = toy.cwd / "broken"
    shutil.copytree(reference[0], folder, symlinks=True)
    rows, flags = (folder / "metrics.jsonl").read_text().splitlines(True), "--out broken"
    (folder / "checkpoints" / "iter_2" / "trainer.pt").unlink()
    (folder / "metrics.jsonl").write_text("".join(rows[:2]))  # as after a kill in evaluation 2
    run(toy.cwd, flags)
    assert bits(folder) == bits(reference[0])
    (folder / "metrics.jsonl").write_text("".join(rows[:2]))
    for t in (1, 2):
        (folder / "checkpoints" / f"iter_{t}" / "complete.json").write_text("{")
    assert "iter_1 is missing or broken: going on from" in run(toy.cwd, flags)[1]
    assert bits(folder) == bits(reference[0])


@pytest.mark.slow
def test_real_processes_ended_at_random_moments_end_in_the_same_bits():
    """kill -9 and Ctrl-C, the PRM's phases too; `python tests/faults.py` does 30 of them."""
    flags = "--reward answer+prm --num-iters 1 --toy-queries 60 --toy-solutions 32".split()
    ends = faults.main(["--kills", "4", *flags_of(*flags)])
    assert len({end.phase for end in ends}) >= 3
