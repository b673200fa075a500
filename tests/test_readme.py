"""The README and docs/ are code too: their commands, their examples, their forks."""

import doctest
import re

import pytest
from conftest import ROOT, command

import metrics
import rewards
import toy
import train_prm
from config import parse_config
from data import Query, Sample
from trainer import State, load_tokenizer, save

README = (ROOT / "README.md").read_text(encoding="utf-8")
FORKS = re.findall(r"```python\n(# (\w+)\.py: .*?)```", README, re.S)
TINY = """--sft-epochs 2 --start-epoch 1 --num-iters 1 --steps-per-iter 3 --queries-per-iter 30
--K 4 --balance-queries 5 --temperatures 0.6:1.0:0.4 --eval-queries 5 --eval-samples 4
--val-queries 5"""


def test_the_readme_is_short_and_has_the_two_commands_and_a_fork_of_each_kind():
    block = re.search(r"```sh\n(.*?)```", README, re.S)[1].strip().splitlines()
    install = "pip install -r requirements-cpu.txt && "
    assert block == [install + "python bstar.py", install + "python -m pytest"]
    assert "`pip install -r requirements.txt && python bstar.py --task math`" in README
    assert len(README.split()) <= 1800
    assert [name for _, name in FORKS] == ["brief", "cubed", "sums"]


def test_the_worked_example_is_right():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("code, name", FORKS)
def test_a_fork_runs_as_it_stands(cwd, code, name):
    """A reward, a threshold rule and a task, each a whole file."""
    (cwd / f"{name}.py").write_text(code)
    flags = re.search(rf"python {name}\.py(.*)", code.splitlines()[0])[1]
    if "--tau" not in flags:
        flags += " --taus -1:1:0.5"
    if "--task" not in flags:
        flags += " --toy-texts 32 --toy-solutions 64"
    p = command(cwd, cwd / f"{name}.py", flags, TINY, f"--out {name}", PYTHONPATH=str(ROOT))
    assert p.returncode == 0 and "iter 1/1 | " in p.stdout, p.stderr


def test_the_policy_generates_as_the_snippet_says(tmp_path, capsys):
    toy.make_tiny_llama(tmp_path, toy.WALK_WORDS, 0)
    code = re.search(r"```python\n(from transformers import.*?)```", README, re.S)[1]
    folder = re.search(r'folder = "(.*)"', code)[1]
    exec(code.replace(folder, str(tmp_path)), {})
    words = capsys.readouterr().out.split()
    assert words and set(words) <= {*toy.WALK_WORDS, "<s>", "</s>"}


def test_the_prms_folder_is_read_as_the_snippet_says(tmp_path):
    toy.make_tiny_llama(tmp_path / "base", toy.STORY_WORDS, 0)
    cfg = parse_config([], train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    tokenizer = load_tokenizer(tmp_path / "base")
    prm = train_prm.new_prm(tmp_path / "base", tokenizer, "{query} ?", cfg)
    save(State(0, prm.model), tmp_path / "prm", prm.tokenizer)
    names = {
        "folder": tmp_path / "prm",
        "question": "Ann has 4 . Bob has Ann plus 1 . Bob",
        "response": "Bob = Ann + 1 = 4 + 1 = 0 ; # 0",
    }
    page = (ROOT / "docs/prm.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(import rewards, torch.*?)```", page, re.S)[1], names)
    prm = rewards.PRM.load(names["folder"])
    [scores] = prm.score([names["question"]], [names["response"]])
    assert names["p"].tolist() == pytest.approx(scores, abs=1e-5) and len(scores) == 2


def test_every_log_key_is_explained():
    page = (ROOT / "docs/logs.md").read_text(encoding="utf-8")
    query = Query("0", "Ann has 4 . Bob has Ann times 3 . Bob ?", "2")
    group = [Sample("Bob = Ann * 3 = 4 * 3 = 2 ; # 2", "stop") for _ in range(4)]
    rewards.score([query], [group], "stories", "answer+oracle")
    check = toy.CHECKERS["stories"]
    row = metrics.of_samples([group[:1]], [group], 4, 2)
    row |= metrics.of_pool([query], [group], [group[:1]], 0.0, 1, check)
    keys = {re.sub(r"@[2-9]\d*", "@K", re.sub(r"@\d+-\d+", "@K-S", key)) for key in row}
    keys |= {"iter", "loss", "grad_norm", "skipped", "repeats", "temperature", "tau", "val/pass@1"}
    by_T = [metrics.as_arrays([group])] * 2
    decision = metrics.decide(by_T, [0.5, 1.0], [0.0, 0.5], 1)
    missing = []
    for key in keys | decision.keys():
        if f"`{key}`" not in page and f"`{key.split('/')[0]}/...`" not in page:
            missing.append(key)
    assert not missing
