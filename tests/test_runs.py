"""runs.py: the run's folder, what it is set up from, and whether it will fit; user errors."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import bench
import pytest
from conftest import ROOT, command, flags_of, refused, tiny, torchao

import bstar
import config
import data
import runs
from config import Config, parse_config
from data import Query, Sample, Splits
from runs import Run, preflight, prune


def begun(out: Path, flags: str = "") -> Run:
    """A run that has done something in its folder."""
    run = Run(tiny(f"--out {out} {flags}"))
    run.lap(0, "base")
    return run


def test_another_config_is_refused_and_every_change_named(tmp_path):
    begun(tmp_path)
    with refused("K 4 -> 8, lr 0.0003 -> 0.5.*; choose another --out"):
        begun(tmp_path, "--lr 0.5 --K 8")


def test_settings_of_memory_may_change_after_a_full_gpu(tmp_path):
    begun(tmp_path)
    begun(tmp_path, "--token-budget 100 --gradient-checkpointing --sample-budget 7 --preflight")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["token_budget"] == 100 and "preflight" not in config


def test_a_start_that_failed_does_not_hold_its_folder(tmp_path):
    for K in (5, 6):
        Run(tiny(f"--out {tmp_path} --K {K}"))
    assert '"K": 6' in (tmp_path / "config.json").read_text()


def test_two_processes_on_one_folder(tmp_path):
    run = begun(tmp_path / "run")
    p = command(tmp_path, "bstar.py", *flags_of("--out run"))
    assert p.returncode == 2 and f"{run.out.name}: another process is writing to it" in p.stderr


@pytest.mark.parametrize(
    "name, content",
    [("mine", ""), ("notes/a", ""), *(("config.json", x) for x in ("", "{", "[]", '{"task": 1}'))],
)
def test_a_folder_that_is_no_run_is_refused_and_left_as_it_was(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    (tmp_path / "parts").mkdir()
    with refused("no readable config.json of a run; choose another --out"):
        Run(tiny(f"--out {tmp_path}"))
    assert path.read_text() == content and (tmp_path / "parts").is_dir()


def test_only_our_own_files_are_removed(tmp_path):
    begun(tmp_path)
    ours = ["parts/iter1.val.0.jsonl.gz", "checkpoints/iter_1/x", ".a.jsonl.7.tmp", "b/.c.tmp/x"]
    theirs = ["parts/notes.txt", "checkpoints/iter_1_backup/x", "paused-by-me"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    begun(tmp_path)  # sweeps what a killed process was writing
    runs.remove_parts(tmp_path / "parts")
    prune(tmp_path, ["nowhere"], 9, 8)
    assert [name for name in ours + theirs if (tmp_path / name).exists()] == theirs


def test_a_run_goes_on_to_more_iterations_where_each_has_its_schedule(tmp_path):
    begun(tmp_path / "a", "--method rest-em --num-iters 2")
    begun(tmp_path / "a", "--method rest-em --num-iters 3")
    with refused("num_iters 3 -> 2"):
        begun(tmp_path / "a", "--method rest-em --num-iters 2")
    begun(tmp_path / "b", "--method online-rft --num-iters 2")
    with refused("online-rft has one schedule over all iterations"):
        begun(tmp_path / "b", "--method online-rft --num-iters 3")


def change_config(folder: Path, **changes) -> None:
    """config.json as an earlier version could have left it; None takes a setting out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    known = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(known))


def test_a_setting_that_an_earlier_version_did_not_know_has_its_default(tmp_path):
    begun(tmp_path)
    change_config(tmp_path, max_repeats=None)
    begun(tmp_path)
    with refused("max_repeats 0.0 -> 6.0"):
        begun(tmp_path, "--max-repeats 6")


def test_a_setting_that_nothing_reads_may_differ(tmp_path):
    begun(tmp_path, "--method sft")
    change_config(tmp_path, num_iters=77, K=77)
    begun(tmp_path, "--method sft")


def test_an_iteration_without_its_line_is_done_again(tmp_path, capsys):
    begun(tmp_path)
    lines = [json.dumps({"iter": i, "pass@1": 1.0}) for i in (0, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"pass@1": 3}', "[]", "{"]))
    assert [row["iter"] for row in begun(tmp_path).rows] == [0]
    assert "iteration 1 is missing or broken, and done again" in capsys.readouterr().err


def test_samples_hold_question_and_gold(tmp_path):
    run, query = begun(tmp_path), Query("q0", "2 plus 2 ?", "4")
    group = [Sample("# 4", "stop", reward=1.0), Sample("# 5", "length")]
    run.save_samples(1, [query], [group], [group[:1]])
    text = gzip.decompress((tmp_path / "samples/iter_1.jsonl.gz").read_bytes()).decode()
    right, cut_off = map(json.loads, text.splitlines())
    assert right["question"] == "2 plus 2 ?" and right["gold"] == "4" and right["selected"]
    assert cut_off["reward"] is None and not cut_off["selected"]


def test_a_line_of_a_file_is_replaced_and_later_ones_dropped(tmp_path):
    run = begun(tmp_path)
    (tmp_path / "ledger.jsonl").write_text('{"qe": 3}\n{"iter": "x"}\n[]\n')  # no iteration's
    for t, value in ((1, "a"), (2, "b"), (3, "c"), (2, "d")):
        run.put("ledger.jsonl", {"iter": t, "value": value})
    rows = data.read_jsonl(tmp_path / "ledger.jsonl")
    assert [row["value"] for row in rows] == ["a", "d"]


def test_seconds_add_up_over_all_starts_also_after_a_torn_line(tmp_path):
    run = begun(tmp_path)
    with open(tmp_path / "times.jsonl", "a") as f:
        f.write('{"iter": 1, "phase": "gen", "seconds": 2}\n{"iter": 1, "phase": "gen", "sec')
    run.clock -= 3
    run.lap(1, "gen")
    assert run.seconds(1) == {"gen": pytest.approx(5, abs=0.1)}


def test_prune_keeps_the_last_two_and_the_best(tmp_path):
    run, start = tmp_path / "run", tmp_path / "cache" / "epoch_1"
    for path in (start, *(run / "checkpoints" / f"iter_{t}" for t in range(1, 6))):
        path.mkdir(parents=True)
    prune(run, [start], t=5, best=2)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["iter_2", "iter_4", "iter_5"]
    assert [(run / x).resolve().name for x in ("policy", "best")] == ["iter_5", "iter_2"]
    prune(run, [start], t=5, best=0)
    assert (run / "best").resolve() == start
    later = start.with_name("epoch_2")  # as of the SFT baseline
    later.mkdir()
    prune(tmp_path, [start, later], t=1, best=0)
    assert [(tmp_path / x).resolve() for x in ("policy", "best")] == [later, start]


def test_prompts_that_fill_max_length_are_left_out_and_counted(capsys):
    queries = [Query(str(n), "word " * n, "") for n in (3, 30, 4)]
    splits = Splits(queries[:], queries[:1], {"test": queries[:]}, "", "")
    runs.drop_long_prompts(splits, lambda q: q.text.split(), Config(max_length=10))
    assert [q.id for q in splits.train] == [q.id for q in splits.tests["test"]] == ["3", "4"]
    assert "train: 1 of 3 prompts fill --max-length 10" in capsys.readouterr().err
    with refused("--max-length 2: no prompt of the train set fits"):
        runs.drop_long_prompts(splits, lambda q: q.text.split(), Config(max_length=2))


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("bstar.py", "--task chess", "choose from"),
        ("bstar.py", "--task gsm8k --model x/none-1M", "hub"),
        ("report.py", ".", "expected a run's folder"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(tmp_path, script, flags, message):
    p = command(tmp_path, script, flags)
    assert p.returncode == 2 and p.stderr.count("\n") == 1, p.stderr
    assert p.stderr.startswith(f"{script}: ") and message in p.stderr


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with refused(f"^--model {tmp_path}: Unrecognized model"):
        bstar.main(f"--task gsm8k --model {tmp_path} --out {tmp_path}/run".split())


def test_code_fails_closed_before_anything_is_loaded(tmp_path):
    """Without libseccomp, here a name that is none, nothing runs unless --unsafe-code says so."""
    for path in ROOT.glob("*.py"):
        text = path.read_text().replace("libseccomp.so.2", "libnone.so")
        (tmp_path / path.name).write_text(text)
    p = command(tmp_path, tmp_path / "bstar.py", "--task code --model none")
    assert p.returncode == 2 and p.stderr.count("\n") == 1
    assert "apt-get install libseccomp2" in p.stderr and "--unsafe-code" in p.stderr
    with refused("no such file: none.jsonl"):
        files = f"--train-file none.jsonl --test-file none.jsonl --out {tmp_path}/run"
        bstar.main(f"--task code --model none --unsafe-code {files}".split())


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """A folder with the config of 1.8M parameters and no weights."""
    from transformers import LlamaConfig

    shape = dict(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    LlamaConfig(**shape, num_attention_heads=4).save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    return "--task gsm8k --model m --engine hf"


def test_the_preflight_says_what_a_run_needs_before_a_weight_is_read(model, capsys):
    with pytest.raises(SystemExit) as e:
        bstar.main(f"{model} --preflight".split())
    out, err = capsys.readouterr()
    assert not e.value.code and not err and out.count("\n") == 1
    assert re.search(r"preflight \| 0.00182B parameters: weights .* \| training .* of ", out)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--token-budget 999999999", "training needs .*; lower --token-budget, or take --grad"),
        ("--sample-budget 9999999999", "sampling needs .*; lower --sample-budget"),
        ("--offload-optimizer", "without a GPU the optimizer is in host memory all the time"),
        ("--model /no/where", "--model /no/where: no such folder, and no name that the hub"),
        ("--model x/some", "--preflight: it needs a --model whose config.json can be read"),
        ("--model x/Mistral-700B", "state needs 1.04e.04 GiB of .*smaller --model, or --optim"),
        ("--model x/llama-2.1B --engine auto --optim adamw8bit", "no GPU.*, or --engine hf"),
    ],
)
def test_the_preflight_refuses_what_cannot_fit_and_names_the_flag(
    model, flags, message, monkeypatch
):
    monkeypatch.setattr(config, "find_spec", lambda name: True)
    monkeypatch.setattr(runs, "host_memory", lambda: 64 << 30)
    with refused(message):
        preflight(parse_config(f"{model} --preflight {flags}".split()))


def test_no_room_on_the_disk_is_told_at_the_start(model, monkeypatch):
    usage = type("Usage", (), {"free": 10 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    other = Path("runs/cache/sft-math-1")  # another task's is none of this run's
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"")
    os.truncate(other / "model.safetensors", 1 << 40)
    with refused("disk needs .* of 0.00977 GiB; free some"):
        preflight(parse_config(model.split()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, flags",
    [
        ("train", "--token-budget 2048"),
        ("train", "--token-budget 2048 --gradient-checkpointing"),
        ("draw", "--sample-budget 32768 --max-tokens 8"),
        pytest.param("train", "--token-budget 4096 --optim adamw8bit", marks=torchao),
    ],
)
def test_the_preflight_is_near_a_real_process_peak(what, flags):
    line = f"{what} 128 llama 2000 384 1056 6 6 2 {flags}"
    peak = bench.child("memory", line, ROOT, **bench.GIVE_BACK)
    # the libraries' own buffers differ by processor: one held 50 MiB more than another
    assert 0.75 < peak["counted"] / peak["held"] < 1.25, peak
