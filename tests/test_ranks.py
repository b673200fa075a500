"""ranks.py: two and four processes on a CPU (gloo) do what one does; the death of any ends all."""

import atexit
import contextlib
import copy
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny, tiny_llama

import config
import data
import ranks
import rewards
import runs
import toy
import trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# what the runs and the PRM's maker share: stories, and micro-batches of a few rows
SHARED = """
    --task stories --toy-max-ops 3 --toy-texts 512 --toy-queries 80 --toy-solutions 64
    --sft-lr 3e-3 --sft-epochs 12 --start-epoch 12 --batch-size 16 --max-tokens 40 --chunk 4
    --val-queries 4 --token-budget 256
"""
OF_RUNS = """
    --reward answer+prm --num-iters 2 --steps-per-iter 3 --queries-per-iter 12 --K 4
    --temperatures 0.6:1.0:0.4 --taus -1:0:0.1 --balance-queries 4 --eval-queries 4
    --eval-samples 2 --S 1 --out run
"""


def start(cwd: Path, n: int, script: Path | str = ROOT / "bstar.py", flags=SHARED + OF_RUNS):
    """A script in one process or n of torchrun's; what it prints goes to files in cwd."""
    cwd.mkdir(exist_ok=True)
    python = [*TORCHRUN, str(n)] if n > 1 else [sys.executable]
    with open(cwd / "out", "w") as out, open(cwd / "err", "w") as err:
        argv = [*python, str(script), *flags.split()]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        settings = dict(cwd=cwd, env=env, stdout=out, stderr=err)
        return subprocess.Popen(argv, **settings, start_new_session=True)


def finish(p: subprocess.Popen, cwd: Path) -> int:
    """Its exit code; nothing of it is left behind where it takes too long."""
    try:
        return p.wait(600)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        raise AssertionError((cwd / "err").read_text()[-3000:]) from None


def run(cwd: Path, n: int, *args) -> Path:
    """A script to its good end; returns cwd."""
    code = finish(start(cwd, n, *args), cwd)
    assert code == 0, (cwd / "err").read_text()[-3000:]
    return cwd


def script(path: Path, *lines: str) -> Path:
    """A script of such lines."""
    path.write_text("\n".join(lines))
    return path


def kill_in(phase: str, cwd: Path, rank: int | None) -> None:
    """kill -9 of a rank, or of torchrun, when a phase has begun; checks that all end."""
    p = start(cwd, 2)
    while phase not in (cwd / "err").read_text():
        assert p.poll() is None, (cwd / "err").read_text()[-3000:]
        time.sleep(0.02)
    children = Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text()
    workers = sorted(map(int, children.split()))
    os.kill(p.pid if rank is None else workers[rank], signal.SIGKILL)
    assert finish(p, cwd) != 0
    ended = time.monotonic() + 60
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < ended, "a process stayed behind"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def check_equal(one: Path, other: Path) -> None:
    """The same pool, selection and ledger, and metrics but for float32 order."""
    for name in ("ledger.jsonl", "samples/iter_1.jsonl.gz", "samples/balance_2.npz"):
        assert (one / "run" / name).read_bytes() == (other / "run" / name).read_bytes(), name
    rows = [data.read_jsonl(cwd / "run/metrics.jsonl") for cwd in (one, other)]
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert (a.pop(key, None) or 0) == pytest.approx(b.pop(key, None) or 0, rel=1e-4)
        assert a == b


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "one", 1)


def beside(one: Path, cwd: Path) -> Path:
    """A folder whose runs start from the same SFT checkpoint and PRM."""
    shutil.copytree(one / "runs/cache", cwd / "runs/cache", copy_function=shutil.copy2)
    return cwd


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_the_death_of_any_ends_all(one, tmp_path):
    # as the README has them
    fork = script(tmp_path / "fork.py", "import bstar, data", "data.run(bstar.main)")
    two = run(beside(one, tmp_path / "two"), 2, fork)
    check_equal(one, two)
    assert (two / "out").read_text().count("iter 2/2") == 1  # one speaks
    policy = json.loads((two / "run/policy/config.json").read_text())
    assert policy["architectures"] == ["LlamaForCausalLM"]

    broken = beside(one, tmp_path / "broken")
    kill_in("train 1", broken, rank=1)
    kill_in("train 2", broken, rank=None)
    lines = [(cwd / "run/metrics.jsonl").read_text().splitlines() for cwd in (two, broken)]
    assert lines[1] == lines[0][:2]  # the same bits
    check_equal(one, run(broken, 1))  # alone from here


@pytest.mark.slow
def test_four_processes_on_two_nodes_do_what_one_does(one, tmp_path):
    lines = "import bstar, data, ranks", "ranks.LOCAL_WORLD = 2", "data.run(bstar.main)"
    fork = script(tmp_path / "fork.py", *lines)
    check_equal(one, run(beside(one, tmp_path / "four"), 4, fork))


def only_the_first_writes() -> None:
    """Makes the other processes fail where they write to a folder of runs, or remove one.

    Sampled parts are for all to write.
    """

    def guarded(function):
        def checked(path, *args, **kwargs):
            assert "/parts/" in str(path) or "runs/" not in str(path), (
                f"{path} in rank {ranks.RANK}"
            )
            return function(path, *args, **kwargs)

        return checked

    if ranks.RANK > 0:
        os.replace, shutil.rmtree = guarded(os.replace), guarded(shutil.rmtree)


@pytest.mark.slow
def test_a_prm_is_annotated_as_by_one_process_and_trained_alike(one, tmp_path):
    cwd = beside(one, tmp_path / "prm")
    [made] = (one / "runs/cache").glob("prm-stories-*/")
    shutil.rmtree(cwd / "runs/cache" / made.name)
    lines = "import data, test_ranks", "test_ranks.only_the_first_writes()", "import train_prm"
    run(cwd, 2, script(cwd / "fork.py", *lines, "data.run(train_prm.main)"), SHARED)
    again = cwd / "runs/cache" / made.name
    labels = [gzip.open(x / "annotations.jsonl.gz").read() for x in (made, again)]
    assert labels[0] == labels[1]
    first, second = (rewards.PRM.load(x / "prm") for x in (made, again))
    asked = ["Ida has 5 . Ida ?"] * 2, ["Ida = 5 ; # 5", "Ida = 7 ; # 7"]
    for p, q in zip(first.score(*asked), second.score(*asked)):
        assert p == pytest.approx(q, abs=1e-3)


FAILS_IN_ONE = """
import time, data, ranks
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 10)

@ranks.together
def main():
    if ranks.RANK == 1:
        raise data.UserError("only here")
    ranks.wait()

data.run(main)
"""


@pytest.mark.slow
def test_an_error_of_all_and_of_one_is_one_line_said_once(tmp_path):
    p = start(tmp_path, 2, ROOT / "bstar.py", "--optim adamw8bit")
    assert finish(p, tmp_path) != 0
    assert (tmp_path / "err").read_text().count("2 processes share the optimizer as it is") == 1

    (tmp_path / "fork.py").write_text(FAILS_IN_ONE)
    p = start(tmp_path, 2, tmp_path / "fork.py", "")
    assert finish(p, tmp_path) != 0
    assert (tmp_path / "err").read_text().count("only here") == 1


# -- gradients ------------------------------------------------------------------------------------


def check_shares(tied: bool) -> None:
    """Gradients in shares are one process's, and moments come back from a file as they were."""
    batch = [(list(range(1, 4 + n)), 2) for n in range(1, 12)]
    alone = tiny_llama(tie_word_embeddings=tied)
    policy = ranks.shard(copy.deepcopy(alone), "cpu")
    if tied:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    loss = trainer.accumulate(policy, batch, 24)
    rows_, n_prompts = map(list, zip(*batch))
    nll = trainer.token_nll(alone, rows_, n_prompts).mean()
    nll.backward()
    assert loss == pytest.approx(nll.item(), rel=1e-6)
    for p, q in zip(policy.parameters(), alone.parameters(), strict=True):
        assert (ranks.full(p.grad) - q.grad).abs().max() < 1e-6 * q.grad.abs().max()

    optimizer = trainer.adamw(policy, 1e-2)
    optimizer.step()
    saved = ranks.gathered(ranks.whole(optimizer.state_dict()))[0]
    again = trainer.adamw(policy, 1e-2)
    ranks.load_moments(again, copy.deepcopy(saved))
    state = ranks.gathered(ranks.whole(again.state_dict()))[0]["state"]
    for i, moments in saved["state"].items():
        assert all(state[i][name].equal(value) for name, value in moments.items())
    print("equal")


def fail() -> None:
    policy = ranks.shard(tiny_llama(), "cpu")
    raise data.UserError(f"with a model in shares: {policy.device}")


def check_threads() -> None:
    """Says how many of gloo's threads are left."""
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    left = [name for name in threads if "gloo" in name]
    print(f"{len(left)} left", flush=True)


def check_mains() -> None:
    """A main that fails in all processes, and two in one process that don't; then all is let go."""
    atexit.register(check_threads)  # first in, last out
    time.sleep = lambda seconds: None  # who fails waits for the first to speak
    with contextlib.suppress(data.UserError):
        ranks.together(fail)()
    main = ranks.together(check_shares)
    main(tied=False)
    main(tied=True)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])  # four are two nodes of two, each with all the weights
def test_gradients_in_shares_are_those_of_one_process_in_each_main(tmp_path, n):
    lines = "import ranks, test_ranks", "ranks.LOCAL_WORLD = 2", "test_ranks.check_mains()"
    run(tmp_path, n, script(tmp_path / "check.py", *lines), "")
    expected = ["0 left"] * n + ["equal"] * 2
    assert sorted((tmp_path / "out").read_text().splitlines()) == expected


# -- other engines --------------------------------------------------------------------------------


def test_the_recipe_chooses_T_from_another_engines_samples():
    """The engine is right once at T = 0.5, three times at 0.8, and by one of four texts at 1.1."""
    page = (ROOT / "docs/many-gpus.md").read_text(encoding="utf-8")
    recipe = re.search(r"```python\n(.*?)```", page, re.S)[1]
    asked = []

    def sample(texts, n, T):
        asked.append((len(texts), n, T))
        n_right = {0.5: 1, 0.8: 3, 1.1: 1}[T]
        answers = [rf"{k}. So \boxed{{{7 if k < n_right else k}}}" for k in range(n)]
        return [[(answer, "stop") for answer in answers] for _ in texts]

    names = {"sample": sample}
    exec(recipe, names)
    queries = [data.Query(str(i), f"What is {i} + 7 - {i}?", "7") for i in range(6)]
    rows, decision = names["training_set"](queries, n_subset=2, K=4, N=18, seed=0)
    assert (decision["temperature"], decision["qe"]) == (0.8, 1.0)
    assert asked == [(2, 4, 0.5), (2, 4, 0.8), (2, 4, 1.1), (4, 4, 0.8)]
    assert len(rows) == 18 and {row["completion"][-9:] for row in rows} == {r"\boxed{7}"}
    assert len(recipe.splitlines()) <= 30


# -- alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_the_micro_batches_of_all_processes_hold_every_row_once(monkeypatch, world):
    batch = [([1] * n, 1) for n in (30, 5, 7, 7, 9, 12, 3, 3, 28, 2, 16)]
    monkeypatch.setattr(ranks, "WORLD", world)
    dealt, numbers = [], set()
    for rank in range(world):
        monkeypatch.setattr(ranks, "RANK", rank)
        cut = ranks.micro_batches(batch, 32, nothing=len)
        numbers.add(len(cut))
        for rows, n_prompts in cut:
            assert len(rows[0]) * len(rows) <= 32
            dealt += [len(row) for row, n in zip(rows, n_prompts) if n < len(row)]
    assert len(numbers) == 1  # as many in each process
    assert sorted(dealt) == sorted(len(row) for row, _ in batch)


def test_every_process_knows_what_is_done_and_the_first_alone_writes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = tiny("--out run")
    run, base = runs.Run(cfg), toy.story_base(cfg)
    blank = trainer.CACHE / f".{base.name}.blank"
    toy.make_tiny_llama(blank, base.words, base.seed, layers=base.layers)
    monkeypatch.setattr(ranks, "RANK", 1)  # as far as writing goes
    monkeypatch.setattr(trainer, "train", lambda *args: {})
    run.end_iteration({"iter": 0, "val/pass@1": 0.0}, [])
    assert [row["iter"] for row in run.rows] == [0]
    assert not (run.out / "metrics.jsonl").exists()
    runs.toy_base(cfg)
    assert (blank / "config.json").exists()


@pytest.mark.parametrize("flags", ["--optim adamw8bit", "--offload-optimizer"])
def test_what_is_for_one_process_is_refused(monkeypatch, flags):
    monkeypatch.setattr(ranks, "WORLD", 8)
    with pytest.raises(data.UserError, match="8 processes share the optimizer as it is; leave"):
        config.parse_config(["--task", "math", *flags.split()])


def test_chunks_of_real_tasks_are_small_enough_to_deal():
    real = [task for task in config.PRESETS if task not in toy.BASES]
    assert {config.parse_config(["--task", task]).chunk for task in real} == {100}


def test_alone_nothing_does_anything():
    policy = tiny_llama()
    assert ranks.replica(policy) is policy and ranks.together(check_shares) is check_shares
    weights = policy.state_dict()
    assert all(x is weights[name] for name, x in ranks.whole(weights).items())
    batch = [([1, 2, 3], 1), ([1, 2], 1)]
    assert ranks.micro_batches(batch, 3, len) == list(data.micro_batches(batch, 3))
