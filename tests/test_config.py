"""config.py: defaults, presets and flags, and what a bad value says."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, refused

import config
from config import PRESETS, Config, grid, parse_config
from results import walk


def parse(flags: str) -> Config:
    return parse_config(flags.split())


def test_a_flag_beats_the_preset_and_the_preset_the_default():
    assert Config.K == parse("--task math").K == 64
    assert parse("").task == "walk"
    assert parse("").K == PRESETS["walk"]["K"] != Config.K
    assert parse("--K 7").K == 7
    assert parse("--task stories").tau_grid[0] == 0.6  # a preset of the reward
    assert parse("--task stories --reward answer+oracle").tau_grid[0] == 1.0
    assert parse("--task stories --reward answer").tau_grid[0] == -1.0
    assert parse("--taus 0:1:0.5").tau_grid == [0.0, 0.5, 1.0]


PAPER = {  # Sec. 4.1 and App. A
    "num_iters": 9,
    "steps_per_iter": 500,
    "batch_size": 128,
    "samples_per_iter": 64_000,
    "balance_queries": 600,
    "K": 64,
    "sft_lr": 5e-6,
    "sft_epochs": 3,
    "start_epoch": 1,
    "val_queries": 500,
    "eval_samples": 32,
    "S": 4,
    "temperature_grid": [i / 10 for i in range(5, 13)],
    "tau_grid": [i / 10 for i in range(-10, 11)],
}


def test_the_settings_of_math_are_the_papers():
    cfg = parse("--task math")
    assert {name: getattr(cfg, name) for name in PAPER} == PAPER


def test_arc_and_code_differ_as_the_paper_says():
    for task in ("arc", "code"):
        cfg = parse(f"--task {task}")
        assert cfg.temperature_grid == [i / 10 for i in range(4, 12)]
        assert cfg.tau_grid == PAPER["tau_grid"]
        assert cfg.K == 32
    assert parse("--task code").reward == "tests"
    assert parse("--task arc").start_epoch == 0  # no SFT


def test_a_fixed_temperature_or_tau_is_a_grid_of_one():
    assert parse("--temperature 0.7").temperature_grid == [0.7]
    assert parse("--tau 0.2").tau_grid == [0.2]
    online = parse("--method online-rft")
    assert (online.temperature_grid, online.tau_grid) == ([1.0], [0.0])


def test_a_grid_is_made_of_decimals_and_may_start_below_zero():
    assert parse("--taus -1:1:0.5").tau_grid == [-1, -0.5, 0, 0.5, 1]
    assert parse("--taus=-1:1:0.5") == parse("--taus -1:1:0.5")
    assert parse("--tau -1e-3").tau == -1e-3
    assert grid("taus", "-1:1:0.01") == [i / 100 for i in range(-100, 101)]


BAD = [
    ("--task chess", "--task: invalid choice: 'chess' (choose from"),
    ("--nonsense 1", "unrecognized arguments: --nonsense"),
    ("--K 0", "--K 0: expected a finite number, 1 to inf"),
    ("--K many", "--K: invalid int value: 'many'"),
    ("--S 5 --eval-samples 4", "--S 5: expected at most --eval-samples 4"),
    ("--temperatures 0:1:0.5", "--temperatures 0:1:0.5: expected 0.01 to 100"),
    ("--max-repeats nan", "--max-repeats nan: expected a finite number"),
    ("--taus 0:inf:1", "--taus 0:inf:1: expected FROM:TO:STEP"),
    ("--temperatures x", "--temperatures x: expected FROM:TO:STEP"),
    ("--tau=-inf", "--tau -inf: expected a finite number"),
    ("--taus=-1:1:0.0001", "and at most 10,000 points"),
    ("--task stories --tau 2", "no reward is above 2"),
    ("--start-epoch 99", "expected at most --sft-epochs"),
    ("--method sft --start-epoch 2", "a multiple of --start-epoch"),
    ("--task gsm8k --reward answer+oracle", "only a toy's steps can be checked exactly"),
    ("--task math --reward tests", "--reward tests: --task math is rewarded by answers"),
    ("--task code --reward answer", "--reward answer: --task code is rewarded by unit tests"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_a_bad_value_is_one_line_that_names_the_flag(flags, message):
    with refused(re.escape(message)):
        parse(flags)


SFT = "num-iters queries-per-iter K steps-per-iter max-repeats lr temperature tau".split()
IDLE = [
    *(("--method sft", f"--{name} 1") for name in SFT),
    ("--method online-rft", "--taus 0:1:0.1"),
    ("--method sft", "--offload-optimizer"),
    ("--method online-rft", "--balance-queries 5"),
    ("--method online-rft", "--temperatures 0.5:1:0.1"),
    ("--method iterative-rft", "--probe"),
    ("--method rest-em", "--lr 1e-4"),
    ("--temperature 1", "--temperatures 0.5:1:0.1"),
    ("--tau 0", "--taus 0:1:0.1"),
    ("--temperature 1 --tau 0", "--balance-queries 5"),
    ("--task walk", "--train-file x.jsonl"),
    ("--task walk", "--toy-max-ops 4"),
    ("--task stories", "--chat off"),
    ("--task math", "--toy-texts 5"),
    ("--task arc", "--unsafe-code"),
    ("--task stories --model x", "--toy-texts 5"),
    ("--task stories", "--prm-format qwen"),
    ("--reward answer", "--prm x"),
]


@pytest.mark.parametrize("given, idle", IDLE)
def test_a_flag_that_does_nothing_is_refused(given, idle):
    parse(given)
    with refused(f"^{idle.split()[0]}: it does nothing with"):
        parse(f"{given} {idle}")


SHELL = {"$seed": "1", "$reward": "answer", "$method": "rest-em", "$1": "0.7", "$2": "0.6"}


def documented() -> list[str]:
    """The flags of the pages' commands of bstar.py, and of results/walk.py's runs."""
    pages = [ROOT / "README.md", ROOT / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    text = text.replace("$flags", " ".join(re.findall(r'flags="(.*)"', text)).replace("$flags", ""))
    for variable, value in SHELL.items():
        text = text.replace(variable, value)
    walks = {" ".join((*walk.COMMON, *run.flags)) for run in walk.plan()}
    return re.findall(r"bstar\.py (--[^`#;\n]*)", text) + sorted(walks)


@pytest.mark.parametrize("flags", documented())
def test_a_documented_command_is_accepted(flags):
    parse(flags)


def test_a_missing_library_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    for flags, library in (("--engine vllm", "vllm"), ("--optim adamw8bit", "torchao")):
        with refused(f"^{flags}: .*{library}.*; .*pip install.* or --"):
            parse(flags)


def test_every_field_is_a_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert re.search(rf"--{f.name.replace('_', '-')}[ ,]", text), f.name
        assert f.metadata["text"], f.name
    assert text.count("(default") == len(fields(Config))
    with pytest.raises(SystemExit):
        parse("--task stories --help")
    assert "(default '0.6:1.9:0.1')" in capsys.readouterr().out  # of stories' reward


def test_every_field_is_used():
    """A flag that does nothing is a defect."""
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for f in fields(Config):
        assert re.search(rf"(cfg|self)\.{f.name}\b", code), f.name


@pytest.mark.parametrize("use", ["import bstar; bstar.main(['--help'])", "import report"])
def test_help_and_the_tables_need_no_torch(use):
    heavy = {"torch", "transformers", "matplotlib", "pandas", "datasets"}
    code = f"import sys\ntry: {use}\nexcept SystemExit: pass\nprint({heavy} & {{*sys.modules}})"
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.splitlines()[-1] == "set()" and not p.stderr
