"""The README is code too: its commands, its example, its fork."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_screen_has_exactly_the_two_one_liners():
    block = re.search(r"```sh\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert block == [
        "pip install -r requirements-cpu.txt && python bstar.py",
        "pip install -r requirements-cpu.txt && python -m pytest",
    ]
    assert "`pip install -r requirements.txt && python bstar.py --task math`" in README


def test_the_worked_example_is_right():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 4 and result.failed == 0


def test_the_fork_of_under_25_lines_runs(tmp_path):
    code = re.search(r"```python\n(# parity\.py.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) < 25
    (tmp_path / "parity.py").write_text(code)
    tiny = (
        "--task parity --sft-epochs 2 --start-epoch 1 --num-iters 1 --steps-per-iter 3 --queries-per-iter 30 --K 4 --balance-queries 5 "
        "--temperatures 0.6:1.0:0.4 --eval-queries 5 --eval-samples 4 --out run"
    ).split()
    p = subprocess.run(
        [sys.executable, "parity.py", *tiny],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert p.returncode == 0 and "iter 1/1 | T " in p.stdout, p.stderr


def test_the_prms_folder_is_read_as_the_snippet_says(tmp_path):
    import bstar
    import data
    import rewards
    import train_prm

    data.make_toy_model(tmp_path / "base", 0)
    cfg = bstar.parse_config([], train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    prm = train_prm.new_prm(
        tmp_path / "base", bstar.load_tokenizer(tmp_path / "base"), "{query} ?", cfg
    )
    bstar.save_checkpoint(tmp_path / "prm", prm.model, prm.tokenizer, None, {})
    names = {
        "folder": tmp_path / "prm",
        "question": "Ann has 4 . Bob has Ann plus 1 . Bob",
        "response": "Bob = Ann + 1 = 4 + 1 = 0 ; # 0",
    }
    exec(re.search(r"```python\n(import rewards, torch.*?)```", README, re.S)[1], names)
    [want] = rewards.PRM.load(names["folder"]).score([names["question"]], [names["response"]])
    assert (
        len(want) == 2
        and max(abs(x - y) for x, y in zip(names["p"].tolist(), want, strict=True)) < 1e-5
        and names["ids"].count(prm.tokenizer("?").input_ids[-1]) == 1
    )


def test_every_log_key_is_explained():
    import bstar
    from data import Query, Sample

    group = [Sample("Bob = Ann * 3 = 4 * 3 = 2 ; # 2", "stop")] * 4
    bstar.score(
        [Query("0", "Ann has 4 . Bob has Ann times 3 . Bob ?", "2")],
        [group],
        bstar.parse_config(["--reward", "answer"]),
    )
    for s in group:
        s.steps, s.r_prm = [0.9, 0.8], 0.6
    row = {
        **bstar.metrics_of([group[:1]], [group], 4, 2),
        **bstar.pool_metrics([], [group], [group[:1]], 0.0, 1),
    }
    keys = {re.sub(r"@[2-9]\d*", "@K", re.sub(r"@\d+-\d+", "@K-S", k)) for k in row} | {
        "iter",
        "loss",
        "grad_norm",
        "skipped",
        "temperature",
        "tau",
        "val/pass@1",
    }
    table = README[README.index("## Log keys") : README.index("## Paper, official code")]
    missing = {k for k in keys if f"`{k}`" not in table and f"`{k.split('/')[0]}/...`" not in table}
    assert not missing
