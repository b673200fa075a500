"""bstar.py: configuration, engine, selection, gradients, schedules, checkpoints, and whole runs that are killed and go on."""
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import bstar
import data
import faults
import metrics
from bstar import Config, Job
from data import Query, Sample, UserError

ROOT = Path(bstar.__file__).parent
torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
TINY = ("--toy-texts 512 --sft-lr 3e-3 --sft-epochs 12 --start-epoch 6 --num-iters 2 --steps-per-iter 4 --queries-per-iter 24 --K 4 --balance-queries 8 --temperatures 0.6:1.0:0.4 "
        "--eval-queries 10 --eval-samples 4 --S 2 --val-queries 10 --toy-queries 200 --toy-solutions 128 --toy-max-ops 3 --max-tokens 40 --chunk 10 "
        "--batch-size 16 --taus=-1:1:0.1 --reward answer+oracle").split()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(policy, tokenizer, splits, prompt, folder): the toy's real base model, a little trained so that it ends its responses."""
    folder = tmp_path_factory.mktemp("base")
    data.make_toy_model(folder, 0)
    cfg = bstar.parse_config(TINY)
    tokenizer, splits = bstar.load_tokenizer(folder), data.load_toy(cfg)
    prompt = lambda q: data.prompt_ids(tokenizer, q, splits, False)
    policy = bstar.load_policy(cfg, folder)
    examples = bstar.encode([(q, q.solution) for q in splits.train if q.solution], prompt, tokenizer, cfg, "toy")
    bstar.train(policy, bstar.adamw(policy, 3e-3), examples, range(60), lambda s: 3e-3, cfg, 0, "toy")
    return policy, tokenizer, splits, prompt, folder


# -- configuration --------------------------------------------------------------------------------------------------------

def test_default_is_below_preset_is_below_flag():
    assert bstar.parse_config([]).task == "toy" and bstar.parse_config([]).K == bstar.PRESETS["toy"]["K"]
    assert bstar.parse_config(["--K", "7"]).K == 7
    assert bstar.parse_config(["--task", "math"]).K == Config.K == 64
    paper = bstar.parse_config(["--task", "math"])                                  # Sec. 4.1 and App. A
    assert paper.temperature_grid == [i / 10 for i in range(5, 13)] and paper.tau_grid == [i / 10 for i in range(-10, 11)]
    assert paper.samples_per_iter == 64_000 and math.ceil(paper.samples_per_iter / 11_500) == 6
    assert (paper.num_iters, paper.steps_per_iter, paper.batch_size, paper.sft_lr, paper.balance_queries) == (9, 500, 128, 5e-6, 600)
    assert (paper.sft_epochs, paper.start_epoch, paper.val_queries, paper.eval_samples, paper.S) == (3, 1, 500, 32, 4)
    for task in ("arc", "code"):
        cfg = bstar.parse_config(["--task", task])
        assert cfg.temperature_grid == [i / 10 for i in range(4, 12)] and cfg.tau_grid == paper.tau_grid and cfg.K == 32
    assert cfg.reward == "tests" and bstar.parse_config(["--task", "arc"]).start_epoch == 0


def test_with_a_binary_reward_the_balancer_sees_that_tau_has_no_say():
    """r is 0 or 1: every tau in [0, 1) selects the same, one below 0 the wrong ones too, 1 nothing; so the decision is one of T alone."""
    rng, cfg = np.random.default_rng(5), bstar.parse_config(["--task", "arc"])
    p = rng.beta(1, 1, (40, 1))
    correct = np.stack([rng.random((40, cfg.K)) < p ** (1 + abs(T - 0.7)) for T in cfg.temperature_grid])
    line = metrics.decide(correct.astype(float), correct, np.broadcast_to(np.arange(cfg.K), correct.shape), cfg.temperature_grid, cfg.tau_grid, n_star=30)
    surface = np.array(line["surface"])
    ties = [i for i, tau in enumerate(cfg.tau_grid) if 0 <= tau < 1]
    assert len(ties) == 10 and (surface[:, ties] == surface[:, ties[:1]]).all() and (surface[:, 0] < surface[:, ties[0]]).all() and not surface[:, -1].any()
    alone = metrics.decide(correct.astype(float), correct, np.broadcast_to(np.arange(cfg.K), correct.shape), cfg.temperature_grid, [0.0], n_star=30)
    assert line["temperature"] == alone["temperature"] and line["qe"] == pytest.approx(alone["qe"]) and 0 <= line["tau"] < 1


def test_every_field_is_a_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        bstar.parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        assert f"{flag} " in text or f"{flag}," in text
    assert text.count("(default") == len(dataclasses.fields(Config))
    help_of = dict(bstar.re.findall(r"^    (\w+): .*?# (.*)$", Path(bstar.__file__).read_text(), bstar.re.M))
    assert {f.name for f in dataclasses.fields(Config)} <= help_of.keys() | {"taus"}


def test_every_field_is_used():
    """A flag that does nothing is a defect: each field is read somewhere outside the class."""
    code = "".join((ROOT / f).read_text() for f in ("bstar.py", "data.py"))
    for f in dataclasses.fields(Config):
        assert bstar.re.search(rf"(cfg|self)\.{f.name}\b", code), f.name


@pytest.mark.parametrize("flags, said", [
    ("--task chess", "--task chess: expected one of toy, gsm8k, math"), ("--method ppo", "--method ppo: expected one of sft, rest-em"),
    ("--K 0", "--K 0: expected at least 1"), ("--K many", "--K: invalid int value: 'many'"), ("--nonsense 1", "unrecognized arguments: --nonsense"),
    ("--S 5 --eval-samples 4", "--S 5: pass@K-S needs S <= K, but --eval-samples is 4"), ("--K 3", "S <= K, but --K is 3"), ("--temperature 0", "expected 0.01 to 100"), ("--temperature -1", "expected 0.01 to 100"),
    ("--temperature nan", "expected 0.01 to 100"), ("--warmup nan", "--warmup nan: expected a number from 0 to 1"), ("--seed -1", "--seed -1: expected"),
    ("--taus 0:inf:1", "--taus 0:inf:1: expected FROM:TO:STEP"), ("--method sft --start-epoch 2", "a multiple of --start-epoch"), ("--tau 2", "no reward is above 2"), ("--reward answer --tau 1.0", "no reward is above 1"),
    ("--taus 1:0:0.1", "--taus 1:0:0.1: expected FROM:TO:STEP"), ("--temperatures x", "--temperatures x: expected FROM:TO:STEP"),
    ("--lr 0", "--lr 0.0: expected a number from"), ("--task gsm8k --reward answer+oracle", "only the toy's steps can be checked exactly"),
    ("--task math --reward tests", "--reward tests: --task math is rewarded by answers"), ("--task code --reward answer", "--reward answer: --task code is rewarded by unit tests"),
    ("--task arc --unsafe-code", "--unsafe-code: --task arc runs no programs"), ("--task arc --method sft", "--method sft: expected --sft-epochs"),
    ("--reward answer --prm x", "--reward answer uses no PRM"), ("--task gsm8k --prm-format qwen", "--reward answer uses no PRM"),
    ("--prm-format qwen", "--prm-format qwen: it says how to read --prm, which is missing"), ("--reward vibes", "--reward vibes: expected one of answer"), ("--optim sgd", "--optim sgd: expected one of adamw, adamw8bit"),
    ("--method rest-em --offload-optimizer", "--offload-optimizer: --method rest-em has no optimizer while it samples"), ("--start-epoch 99", "expected at most --sft-epochs"),
])
def test_a_bad_value_is_one_line_that_names_the_flag(flags, said):
    with pytest.raises(UserError) as e:
        bstar.parse_config(flags.split())
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_grid_may_start_below_zero_with_or_without_an_equals_sign():
    assert bstar.parse_config(["--taus", "-1:1:0.5"]).tau_grid == bstar.parse_config(["--taus=-1:1:0.5"]).tau_grid == [-1, -0.5, 0, 0.5, 1]
    assert bstar.parse_config(["--tau", "-1e-3"]).tau == -1e-3


def cli(*flags, cwd, **env):
    return subprocess.run([sys.executable, str(ROOT / "bstar.py"), *flags], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("flags, said", [
    ("--task chess", "--task chess"), ("--task gsm8k --model nobody/none-1M --train-file none.jsonl", "no such file: none.jsonl"),
    ("--task gsm8k --model .", "--model .: Unrecognized model"),
    ("--task math", "104 GiB|--engine hf|smaller --model"), ("--engine vllm", "vllm is not installed"),
    ("--task gsm8k --model nobody/none-1M", "hub"),
])
def test_user_errors_end_with_exit_code_2_and_one_line(tmp_path, flags, said):
    if "vllm" in flags and find_spec("vllm"):
        pytest.skip("vllm is installed here")
    if torch.cuda.is_available() and "math" in flags:
        pytest.skip("a GPU may hold it")                                            # without one 2B parameters is the limit, whatever the memory
    p = cli(*flags.split(), cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert p.returncode == 2, p.stderr
    last = p.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("bstar.py: ") and all(part in last[0] for part in said.split("|")), p.stderr


def test_preflight_says_what_a_run_needs_and_refuses_what_cannot_fit_before_a_weight_is_read(tmp_path):
    from transformers import LlamaConfig
    LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path / "m")
    say = lambda *flags: cli("--task", "gsm8k", "--model", "m", "--engine", "hf", *flags, cwd=tmp_path)
    p = say("--preflight")                                                          # the folder has a config and nothing else
    assert p.returncode == 0 and not p.stderr and p.stdout.count("\n") == 1 and "preflight | 0.00182B parameters | training" in p.stdout and not (tmp_path / "runs").exists()
    for flags, said in (("--token-budget 999999999", "training needs|lower --token-budget 999999999"), ("--sample-budget 9999999999", "sampling needs|--sample-budget"),
                        ("--token-budget 999999999 --no-gradient-checkpointing", "or take --gradient-checkpointing")):
        p = say("--preflight", *flags.split())
        assert p.returncode == 2 and all(x in p.stderr.splitlines()[-1] for x in said.split("|")), p.stderr
    assert cli("--preflight", cwd=tmp_path).returncode == 2
    for flags in ([], ["--preflight"]):                                             # no other run: the flag is not of its config
        bstar.open_run(bstar.parse_config([*flags, "--out", str(tmp_path / "run")]))
        bstar.open_run.locks.pop().close()


def test_no_room_on_the_disk_is_told_at_the_start(tmp_path, monkeypatch):
    from transformers import LlamaConfig
    LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(bstar.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 << 20}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="more on the disk, 0.00977 GiB are free"):
        bstar.fits(bstar.parse_config("--task gsm8k --model m --engine hf".split()))


def test_help_needs_no_torch(tmp_path):
    p = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "bstar.py"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0 and not any(f"| {m}\n" in p.stderr.replace(" ", "").replace("|", "| ") for m in ("torch", "transformers", "matplotlib", "datasets"))


ONE_ITERATION = ("--num-iters 1 --steps-per-iter 1 --batch-size 4 --K 4 --balance-queries 3 --temperatures 0.6:1.0:0.4 --eval-queries 2 --max-tokens 8 "
                 "--max-length 200 --engine hf --no-gradient-checkpointing --out run").split()


def test_arc_from_rows_to_report(toy, tmp_path, monkeypatch, capsys):
    """No SFT, and greedy pass@1 alone in every line, with the toy's model (whose vocabulary has no choice: all is wrong)."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "Ann has 5 ?", "choices": {"text": ["5", "6", "7"], "label": ["A", "B", "C"]}, "answerKey": "A"}
    for name, n in (("train", 9), ("test", 3)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({**row, "question": f"{name} {i} ?"}) + "\n" for i in range(n)))
    bstar.main([*f"--task arc --model {toy[4]} --train-file train.jsonl --test-file test.jsonl --queries-per-iter 5".split(), *ONE_ITERATION])
    first, last = metrics.read_jsonl(Path("run/metrics.jsonl"))
    assert {k for k in last if "@" in k} == {"pass@1", "val/pass@1"} and "distinct" not in last and first["iter"] == 0 and last["sampled"] == 20
    assert "iter 1/1 | T 1 tau 0 qe 0.000 | kept 0/20 | pass@1 0.0 | balance" in capsys.readouterr().out


def test_code_from_rows_to_report(toy, tmp_path, monkeypatch, capsys):
    """SFT on several human solutions a problem, then programs of the toy's model through the sandbox."""
    monkeypatch.chdir(tmp_path)
    row = {"solutions": json.dumps(["5", "6"]), "input_output": json.dumps({"inputs": [""], "outputs": [""]}), "starter_code": ""}
    for name, n in (("train", 9), ("test", 3)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({**row, "question": f"{name} {i} ?"}) + "\n" for i in range(n)))
    bstar.main([*(f"--task code --model {toy[4]} --train-file train.jsonl --test-file test.jsonl --eval-samples 4 --sft-epochs 12 --start-epoch 12 "
                  "--sft-lr 3e-3 --val-queries 1").split(), *ONE_ITERATION])
    last = metrics.read_jsonl(Path("run/metrics.jsonl"))[-1]
    assert last["pass@1"] == 100 and 0 < last["pool/correct"] and last["kept"] > 0                # "5" is a program that prints nothing
    assert json.loads(Path("run/config.json").read_text())["unsafe_code"] is False


def test_code_fails_closed_before_anything_is_loaded(tmp_path):
    """Without libseccomp (here: a name that is none) the run ends with one line that says what is missing and what else can be done."""
    for name in ("bstar", "data", "metrics", "rewards", "sandbox"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text().replace("libseccomp.so.2", "libnone.so"))
    p = subprocess.run([sys.executable, "bstar.py", "--task", "code", "--model", "none"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "apt-get install libseccomp2" in p.stderr and "--unsafe-code" in p.stderr
    p = subprocess.run([sys.executable, "bstar.py", "--task", "code", "--unsafe-code", "--out", "b", "--model", "none", "--train-file", "none.jsonl", "--test-file", "none.jsonl"],
                       cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 2 and "no such file: none.jsonl" in p.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what, flags", [("train", "--token-budget 2048"), ("train", "--token-budget 2048 --gradient-checkpointing"), ("draw", "--sample-budget 32768 --max-tokens 8"),
                                         pytest.param("train", "--token-budget 4096 --optim adamw8bit", marks=torchao)])
def test_what_the_preflight_says_is_the_peak_of_a_real_process_within_15_percent(what, flags):
    found = bench.child("memory", json.dumps([what, bench.shape("llama", 2000, 384, 1056, 6, 6, 2), 128, flags]), ROOT, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="131072")
    assert 0.85 < found["said"] / found["held"] < 1.15, found


@pytest.fixture
def gpu_80(monkeypatch):
    """A GPU of 80 GiB, as far as the preflight looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("Properties", (), {"total_memory": 80 << 30}))
    monkeypatch.setattr(bstar.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 50}))
    monkeypatch.setattr(bstar, "find_spec", lambda name: True)


def test_the_preflight_counts_both_optimizers_and_names_the_flags_that_make_room(gpu_80, capsys, monkeypatch):
    cfg = lambda flags="": bstar.parse_config(f"--task math --model x/Mistral-7B --preflight {flags}".split())
    with pytest.raises(UserError, match="needs 104 GiB .*: take a larger GPU, --optim adamw8bit, or a smaller --model .up to 5B"):
        bstar.fits(cfg())
    with pytest.raises(SystemExit):
        bstar.fits(cfg("--optim adamw8bit"))
    assert "training 39.3 GiB: weights 13 GiB, gradients 13 GiB, optimizer 13.2 GiB" in capsys.readouterr().out
    with pytest.raises(UserError, match="beside 78 GiB of weights and optimizer vLLM has no room .*, --offload-optimizer, "):
        bstar.gpu_share(cfg(), "x/Mistral-7B")
    shares = [bstar.gpu_share(cfg(flags), "x/Mistral-7B") for flags in ("--offload-optimizer", "--optim adamw8bit", "--optim adamw8bit --offload-optimizer", "--method iterative-rft")]
    assert shares == [0.574, 0.571, 0.737, 0.574]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--offload-optimizer: without a GPU the optimizer is in host memory all the time"):
        bstar.fits(cfg("--offload-optimizer"))


def test_without_torchao_adamw8bit_is_one_line(monkeypatch):
    monkeypatch.setattr(bstar, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--optim adamw8bit: it needs torchao and a C.. compiler; pip install torchao"):
        bstar.parse_config(["--optim", "adamw8bit"])


# -- the transformers engine --------------------------------------------------------------------------------------------------

def engine(tokenizer, budget=4000):
    return bstar.HFEngine(tokenizer, [tokenizer.eos_token_id], budget)


def naive_greedy(policy, ids, stop, max_tokens):
    out = []
    for _ in range(max_tokens):
        with torch.no_grad():
            token = policy(torch.tensor([ids + out])).logits[0, -1].argmax().item()
        if token == stop:
            return out, "stop"
        out.append(token)
    return out, "length"


def test_greedy_equals_a_naive_loop_without_cache_padding_or_batch(toy):
    policy, tokenizer, splits, prompt, _ = toy
    e = engine(tokenizer)
    e.wake(policy)
    prompts = [prompt(q) for q in splits.val[:6]]
    for p, [s] in zip(prompts, e.sample(prompts, 1, 0.0, 30, seed=0)):
        ids, reason = naive_greedy(policy, p, tokenizer.eos_token_id, 30)
        assert (s.response, s.finish_reason) == (tokenizer.decode(ids), reason)


def test_greedy_with_a_sliding_window_and_rows_that_leave_early():
    """The cache of a Mistral keeps a window only; prompts of unequal length, responses that end at unequal times."""
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(1)
    policy = MistralForCausalLM(MistralConfig(vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                              num_key_value_heads=2, sliding_window=8, initializer_range=0.3)).eval()
    words = type("Words", (), {"batch_decode": staticmethod(lambda rows, **_: [" ".join(map(str, r)) for r in rows])})
    e = bstar.HFEngine(words, [2, 9, 17, 30], 4000)
    e.wake(policy)
    prompts = [[random.randrange(3, 44) for _ in range(random.randint(1, 20))] for _ in range(12)]
    samples = [g[0] for g in e.sample(prompts, 1, 0.0, 30, seed=0)]
    for p, s in zip(prompts, samples):
        out = []
        while len(out) < 30 and not (out and out[-1] in e.stop_ids):
            with torch.no_grad():
                out.append(policy(torch.tensor([p + out])).logits[0, -1].argmax().item())
        stopped = out[-1] in e.stop_ids
        assert (s.response, s.finish_reason) == (" ".join(map(str, out[:-1] if stopped else out)), "stop" if stopped else "length")
    assert len({s.finish_reason for s in samples}) == 2 or len({len(s.response) for s in samples}) > 3


def test_sampling_is_seeded_whole_and_budgeted(toy):
    policy, tokenizer, splits, prompt, _ = toy
    e = engine(tokenizer, budget=300)                                               # forces many calls, and n over several of them
    e.wake(policy)
    prompts = [prompt(q) for q in splits.val[:5]]
    a, b, c = (e.sample(prompts, 9, 1.0, 20, seed=s) for s in (1, 1, 2))
    assert a == b != c and [len(g) for g in a] == [9] * 5
    assert len({s.response for g in a for s in g}) > 20


def test_sampling_follows_the_policy_at_every_temperature(toy):
    """First-token frequencies against softmax(logits / T): no top-k, no top-p, no penalty is left on."""
    policy, tokenizer, splits, prompt, _ = toy
    e, p, n = engine(tokenizer, budget=10**6), prompt(splits.val[0]), 4000
    e.wake(policy)
    with torch.no_grad():
        logits = policy(torch.tensor([p])).logits[0, -1].double()
    for T in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits / T, -1)
        [samples] = e.sample([p], n, T, 1, seed=3)
        counts = torch.zeros(len(expected), dtype=torch.double)
        for s in samples:
            ids = tokenizer(s.response)["input_ids"]
            counts[ids[0] if ids else tokenizer.eos_token_id] += 1
        special = expected[tokenizer.all_special_ids].sum()                         # decoded to nothing, like the end
        expected[tokenizer.all_special_ids], expected[tokenizer.eos_token_id] = 0, special
        error = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-3)
        assert error.max() < 5, T


def test_max_tokens_ends_with_length(toy):
    policy, tokenizer, splits, prompt, _ = toy
    e = engine(tokenizer)
    e.wake(policy)
    [[s]] = e.sample([prompt(splits.val[0])], 1, 0.0, 3, seed=0)
    assert s.finish_reason == "length" and len(s.response.split()) == 3


# -- score, select -----------------------------------------------------------------------------------------------------------

def test_score_fills_eq_1_and_never_rewards_a_cut_off_response():
    story = Query("0", "Ann has 4 . Bob has Ann times 3 . Bob ?", "2")
    right, lucky, wrong = "Bob = Ann * 3 = 4 * 3 = 2 ; # 2", "Bob = Ann * 3 = 4 * 3 = 1 ; # 2", "# 1"
    group = [Sample(right, "stop"), Sample(lucky, "stop"), Sample(wrong, "stop"), Sample(right, "length")]
    for reward, expected in (("answer+oracle", [2, 0, -1, -math.inf]), ("answer", [1, 1, 0, -math.inf])):
        bstar.score([story], [group], bstar.parse_config(["--reward", reward]))
        assert [s.reward for s in group] == expected and [s.correct for s in group] == [True, True, False, True]
        assert [s.sound for s in group] == [True, False, False, True] and [s.pred for s in group] == ["2", "2", "1", "2"]


def test_of_equal_texts_the_best_rewarded_is_the_one_that_counts():
    cut, whole = Sample("x  # 5", "length"), Sample("x # 5", "stop", correct=True, reward=1.0)
    assert bstar.repeats([cut, whole]) == [True, False] and bstar.select([[cut, whole]], 0.0, 5, 0) == [[whole]]


def naive_select(groups, tau, N):
    """Counts only: how many each query gives when queries take turns, best first."""
    left = [len({s.response for s in g if s.reward > tau}) for g in groups]
    given, full = [0] * len(groups), 0
    while N and any(left):
        turn = [i for i, k in enumerate(left) if k]
        if len(turn) > N:
            return given, full                                                      # the last, partial turn is drawn
        for i in turn:
            given[i], left[i], N = given[i] + 1, left[i] - 1, N - 1
        full += 1
    return given, full


def test_select_is_round_robin_unique_strict_and_capped():
    rng = random.Random()
    for _ in range(50):
        groups = [[Sample(t := rng.choice("abcdef"), "stop", reward=ord(t) % 4 / 2) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 6))]
        N, tau = rng.randint(1, 30), rng.choice([-1.0, 0.0, 0.5, 1.0])
        kept = bstar.select(groups, tau, N, seed=0)
        given, full = naive_select(groups, tau, N)
        total = sum(len({s.response for s in g if s.reward > tau}) for g in groups)
        assert sum(map(len, kept)) == min(N, total)
        for g, k, n in zip(groups, kept, given):
            assert n <= len(k) <= n + 1 and len({s.response for s in k}) == len(k)
            assert all(s.reward > tau for s in k) and [s.reward for s in k] == sorted((s.reward for s in k), reverse=True)
            rest = [s.reward for s in g if s.reward > tau and s.response not in {x.response for x in k}]
            assert not k or not rest or max(rest) <= k[-1].reward


# -- train --------------------------------------------------------------------------------------------------------------------

def random_batch(n=9):
    rng = random.Random()
    lengths = [rng.randint(4, 30) for _ in range(n)]
    return [([rng.randrange(4, 38) for _ in range(L)], rng.randint(1, L - 2)) for L in lengths]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_the_naive_full_batch(toy, tied):
    """Micro-batches by token budget, head at response positions, global mean = one loop over sequences in float64 with every logit."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = dict(vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    policy = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied))
    batch = random_batch()
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    mean = bstar.accumulate(policy, batch, token_budget=40)
    ours = {n: p.grad.clone() for n, p in policy.named_parameters()}
    naive = LlamaForCausalLM(policy.config).double()
    naive.load_state_dict(policy.state_dict())
    losses = []
    for ids, n in batch:
        logp = naive(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[i - 1, ids[i]] for i in range(n, len(ids))]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert mean == pytest.approx(loss.item(), rel=1e-5)
    for name, p in naive.named_parameters():
        assert torch.allclose(ours[name].double(), p.grad, rtol=1e-3, atol=1e-6), name


def test_training_sees_every_example_before_any_comes_again(toy):
    policy, tokenizer, splits, prompt, folder = toy
    cfg = bstar.parse_config(TINY)
    seen = []
    note = lambda policy, batch, budget: seen.extend(i[0][0] for i in batch) or 0.0
    model = bstar.load_policy(cfg, folder)
    bstar.train(model, torch.optim.SGD(model.parameters(), lr=0.0), [([k, 0, 0], 1) for k in range(40)], range(5), lambda s: 0.0, cfg, 0, "x", note)
    assert sorted(seen[:40]) == list(range(40)) and len(seen) == 80


def steps_of(folder, tmp_path, n, disturb=lambda step: None, optim="adamw"):
    """n real steps on random examples, disturb(i) before the i-th; returns (log, the weights after it)."""
    cfg, seen = bstar.parse_config([*TINY, "--out", str(tmp_path), "--optim", optim]), []
    policy = bstar.load_policy(cfg, folder)
    examples = [([1, *range(4, 12 + k)], 3) for k in range(24)]

    def accumulate(policy, batch, budget):
        loss = bstar.accumulate(policy, batch, budget)
        seen.append(len(seen))
        return disturb(seen[-1]) or loss
    try:
        log = bstar.train(policy, bstar.adamw(policy, 1e-2), examples, range(n), lambda s: 1e-2 / (s + 1), cfg, 0, "train 1", accumulate)
    except KeyboardInterrupt:
        data._asked.clear()
        return len(seen), None
    return log, policy.state_dict()


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_three_in_a_row_stop_the_run(toy, tmp_path):
    log, weights = steps_of(toy[4], tmp_path, 6, lambda i: math.nan if i in (0, 1, 3, 4) else None)
    _, untouched = steps_of(toy[4], tmp_path, 2, lambda i: math.nan)
    assert log["skipped"] == 4 and math.isfinite(log["loss"] + log["grad_norm"]) and all(p.isfinite().all() for p in weights.values())
    assert all(torch.equal(p, toy_p) for p, toy_p in zip(untouched.values(), bstar.load_policy(Config(), toy[4]).state_dict().values()))
    with pytest.raises(UserError, match="three steps in a row without a finite loss and gradient; the last checkpoint is kept"):
        steps_of(toy[4], tmp_path, 6, lambda i: math.inf if i > 1 else None)


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw8bit", marks=torchao)])
def test_ctrl_c_in_training_finishes_the_step_and_the_same_call_goes_on_bit_for_bit(toy, tmp_path, optim, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "steps_of", functools.partial(steps_of, optim=optim))
    whole, weights = steps_of(toy[4], tmp_path, 9, lambda i: math.nan if i == 2 else None)
    interrupt = lambda at: lambda i: os.kill(os.getpid(), signal.SIGINT) or (math.nan if i == at else None) if i == 3 else math.nan if i == at else None
    assert steps_of(toy[4], tmp_path, 9, interrupt(2)) == (4, None) and len(list(tmp_path.glob("paused-*.pt"))) == 1
    assert steps_of(toy[4], tmp_path, 9, interrupt(-1)) == (4, None)                  # and again: four more steps, none twice
    log, again = steps_of(toy[4], tmp_path, 9)
    assert log == whole and all(torch.equal(a, b) for a, b in zip(weights.values(), again.values())) and not list(tmp_path.iterdir())


@torchao
def test_adamw8bit_moves_bf16_weights_as_float32_in_the_mean_and_goes_on_from_a_checkpoint_bit_for_bit(toy, tmp_path):
    examples, moved = [([1, *range(4, 12 + k)], 3) for k in range(24)], {}
    for optim in ("adamw", "adamw8bit"):
        cfg = bstar.parse_config([*TINY, "--optim", optim])
        policy = bstar.load_policy(cfg, toy[4])
        before, optimizer = torch.cat([p.detach().float().ravel() for p in policy.parameters()]), bstar.adamw(policy, 1e-5)
        bstar.train(policy, optimizer, examples, range(10), lambda s: 1e-5, cfg, 0, "first")
        moved[optim] = torch.cat([p.detach().float().ravel() for p in policy.parameters()]) - before
    assert 0.8 < moved["adamw8bit"] @ moved["adamw"] / (moved["adamw"] @ moved["adamw"]) < 1.2      # rounded to the nearest it is far less: most steps are below half a bit
    held = sum(v.codes.nbytes + v.scale.nbytes if hasattr(v, "codes") else v.nbytes for state in optimizer.state.values() for v in state.values())
    assert held == pytest.approx(bstar.needs(cfg, policy.num_parameters(), None, False)["optimizer"], rel=0.1) and policy.dtype == torch.bfloat16
    bstar.save_checkpoint(tmp_path / "c", policy, toy[1], optimizer, {"loss": 1.5})
    again = bstar.load_policy(cfg, tmp_path / "c")
    fresh = bstar.adamw(again, 1e-5)
    assert bstar.load_trainer(tmp_path / "c", fresh) == {"loss": 1.5}
    for p, o in ((policy, optimizer), (again, fresh)):                              # the second finds torch's generator in another state
        bstar.train(p, o, examples, range(10, 13), lambda s: 1e-5, cfg, 1, "second")
    bstar.train(again, fresh, examples, range(13, 14), lambda s: 0.0, cfg, 2, "third")              # the rate is the schedule's
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values()))


def test_the_optimizer_is_on_the_host_while_the_engine_samples(toy, monkeypatch):
    policy, tokenizer, *_, folder = toy
    optimizer, moves = bstar.adamw(policy, 1e-3), []
    bstar.accumulate(policy, random_batch(), 4096)
    optimizer.step()
    optimizer.zero_grad()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    bstar.place(optimizer, torch.float64)                                           # a dtype stands in for the device that there is not
    assert all(s["exp_avg"].dtype == s["exp_avg_sq"].dtype == torch.float64 and s["step"].dtype == torch.float32 for s in optimizer.state.values())
    bstar.place(optimizer, torch.float32)
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, optimizer.state.values()))
    monkeypatch.setattr(bstar, "place", lambda o, where: moves.append(where if o is optimizer else None))
    monkeypatch.setattr(bstar, "train", lambda *args: moves.append("train") or {})
    for flags in ([], ["--offload-optimizer"]):
        bstar.improve(policy, optimizer, [(Query("0", "Ida has 5 . Ida ?", "5"), "# 5")], str(folder), tokenizer, lambda q: [1, 2], bstar.parse_config([*TINY, *flags]), 1, 8)
    assert moves == [policy.device, "train", policy.device, "train", "cpu"]


def test_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), data.unbroken() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked
        signal.raise_signal(signal.SIGINT)
        asked.append("not reached")
    assert asked == [True]
    with pytest.raises(KeyboardInterrupt), data.unbroken():                          # the first was lost on its way: the next batch is not begun
        asked.append("not reached")
    assert asked == [True]
    asked.clear()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_gpu_names_the_flags_and_the_run_goes_on_with_them(toy, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\nmore")
    with pytest.raises(UserError, match=r"out of memory. Tried to allocate 2.00 GiB; .* --token-budget, or with --gradient-checkpointing,") as e:
        steps_of(toy[4], tmp_path, 1, full)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(bstar.HFEngine, "_generate", full)
    with pytest.raises(UserError, match="the same command with a smaller --sample-budget goes on"):
        engine(toy[1]).sample([[1, 5]], 1, 1.0, 4, seed=0)
    monkeypatch.setattr(bstar.rewards, "step_scores", full)
    with pytest.raises(UserError, match="a smaller --token-budget"):
        bstar.score([Query("0", "x", "0")], [[Sample("# 0", "stop")]], bstar.parse_config([]))
    other = ["--token-budget", "100", "--gradient-checkpointing", "--sample-budget", "7"]
    for flags in ([], other):                                                       # the second process would be refused, were it another config
        bstar.open_run(bstar.parse_config([*TINY, "--out", str(tmp_path / "run"), *flags]))
        bstar.open_run.locks.pop().close()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["token_budget"] == 100


def test_a_head_that_the_loss_would_get_wrong_is_refused(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    Gemma2ForCausalLM(Gemma2Config(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                   head_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        bstar.load_policy(Config(), tmp_path)


def test_cosine_is_one_schedule_over_all_iterations():
    rates = [bstar.cosine(s, 100, 1.0, 0.1, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_checkpoint_round_trip_and_broken_ones(toy, tmp_path):
    policy, tokenizer, *_ , folder = toy
    cfg, optimizer = bstar.parse_config(TINY), bstar.adamw(policy, 1e-3)
    bstar.accumulate(policy, random_batch(), 4096)
    optimizer.step()
    optimizer.zero_grad()
    bstar.save_checkpoint(tmp_path / "c", policy, tokenizer, optimizer, {"loss": 1.5})
    again = bstar.load_policy(cfg, tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values()))
    fresh = bstar.adamw(again, 1e-3)
    assert bstar.load_trainer(tmp_path / "c", fresh) == {"loss": 1.5}
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(optimizer.state.values(), fresh.state.values()))
    assert bstar.is_complete(tmp_path / "c") and not bstar.is_complete(tmp_path / "none")
    whole = (tmp_path / "c" / "model.safetensors").read_bytes()
    for broken in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:5000] + b"\0" * 4096 + whole[9096:]):            # truncated; of the right size
        (tmp_path / "c" / "model.safetensors").write_bytes(broken)
        assert not bstar.is_complete(tmp_path / "c")
    with open(tmp_path / "large", "wb") as f:                                       # sparse: 1 GiB of zeros
        f.truncate(2**30)
    marks = [bstar.fingerprint(tmp_path / "large")]
    for at in (0, 2**30 - 1):
        with open(tmp_path / "large", "r+b") as f:
            f.seek(at)
            f.write(b"x")
        assert (mark := bstar.fingerprint(tmp_path / "large")) not in marks and mark[0] == 2**30
        marks.append(mark)


def test_a_save_that_fails_half_way_is_one_line_and_leaves_the_old_checkpoint(toy, tmp_path, monkeypatch):
    policy, tokenizer, *_ = toy
    bstar.save_checkpoint(tmp_path / "iter_1", policy, tokenizer, None, {"loss": 1.0})

    def full(obj, path):                                                            # what torch says of a full disk
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 663040 vs 662928\nmore")
    monkeypatch.setattr(torch, "save", full)
    for name in ("iter_1", "iter_2"):
        with pytest.raises(UserError, match="can't be written .* MiB free") as e:
            bstar.save_checkpoint(tmp_path / name, policy, tokenizer, None, {"loss": 2.0})
        assert "\n" not in str(e.value)
    assert bstar.is_complete(tmp_path / "iter_1") and bstar.load_trainer(tmp_path / "iter_1") == {"loss": 1.0}
    assert not (tmp_path / "iter_2").exists()


# -- whole runs ---------------------------------------------------------------------------------------------------------------

def finished(cwd, out, *flags):
    p = cli(*TINY, "--out", out, *flags, cwd=cwd)
    assert p.returncode == 0, p.stderr
    return p


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An undisturbed tiny run: (folder, its output)."""
    cwd = tmp_path_factory.mktemp("reference")
    return cwd, finished(cwd, "run")


def test_a_run_leaves_what_the_design_says(reference):
    cwd, p = reference
    run = cwd / "run"
    rows, ledger = metrics.read_jsonl(run / "metrics.jsonl"), metrics.read_jsonl(run / "ledger.jsonl")
    assert [r["iter"] for r in rows] == [0, 1, 2] and [d["iter"] for d in ledger] == [1, 2]
    for d in ledger:
        assert np.array(d["surface"]).shape == (2, 21) and (d["temperature"], d["tau"]) == (rows[d["iter"]]["temperature"], rows[d["iter"]]["tau"])
    assert (run / "figures" / "pass1.png").stat().st_size > 10_000 and "<svg" in (run / "report.html").read_text() and not (run / "parts").exists()
    assert bstar.load_policy(Config(), run / "policy").num_parameters() > 0
    best = max(rows, key=lambda r: r["val/pass@1"])["iter"]
    assert (run / "best").resolve().name == (f"iter_{best}" if best else "epoch_6") and bstar.is_complete(run / "best")
    lines = [x for x in p.stdout.splitlines() if x.startswith("iter ")]
    assert len(lines) == 3 and all(k in lines[2] for k in ("| T ", " tau ", " qe ", "| kept ", "| loss ", "pass@1 ", "pass@4-2 ", "reward@4-2 ", "distinct ", "balance "))
    import gzip
    samples = [json.loads(x) for x in gzip.open(run / "samples" / "iter_1.jsonl.gz", "rt")]
    assert len(samples) == 24 * 4 and sum(s["selected"] for s in samples) == rows[1]["kept"]
    pool = np.load(run / "samples" / "balance_1.npz")                               # the subset's samples at the chosen T are in the pool
    first = [s["reward"] if s["reward"] is not None else -math.inf for s in samples[:32]]
    assert pool["reward"][ledger[0]["temperatures"].index(ledger[0]["temperature"])].ravel().tolist() == first


def test_the_logged_decision_follows_from_the_saved_subset(reference):
    run = reference[0] / "run"
    ledger = metrics.read_jsonl(run / "ledger.jsonl")
    again = metrics.replay(metrics.read_run(run))
    assert [line for line, _ in again] == ledger and [d["seed"] for d in ledger] == [bstar.seed_of(0, t, "bootstrap") for t in (1, 2)]
    for d, (_, f) in zip(ledger, again):
        assert round(f["sizes"][4], 6) == d["surface"][d["temperatures"].index(f["T"])][d["taus"].index(f["tau"])]       # Fig. 4 (a) at the full K


def test_alarms_are_told_once(reference):
    lines = [x for x in reference[1].stderr.splitlines() if x.startswith("alarm | ")]
    kinds = [x.split()[2] for x in lines]
    assert "ties:" in kinds and len(kinds) == len(set(kinds))


def test_a_finished_run_says_so_and_another_config_is_refused(reference):
    cwd, _ = reference
    assert "finished (2 iterations)" in finished(cwd, "run").stdout
    p = cli(*TINY, "--out", "run", "--lr", "0.5", "--K", "8", cwd=cwd)
    assert p.returncode == 2 and "K 4 -> 8" in p.stderr and "lr 0.0003 -> 0.5" in p.stderr


def test_a_start_that_failed_does_not_hold_its_folder(tmp_path):
    for model in ("nope", "nor-this"):
        p = cli(*TINY, "--out", "run", "--model", model, cwd=tmp_path)
        assert p.returncode == 2 and f"--model {model}" in p.stderr.splitlines()[-1], p.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == "nor-this"


def test_the_same_command_gives_the_same_bits(reference, tmp_path):
    finished(tmp_path, "again")
    for name in ("metrics.jsonl", "ledger.jsonl", "samples/iter_2.jsonl.gz"):
        assert (tmp_path / "again" / name).read_bytes() == (reference[0] / "run" / name).read_bytes(), name


def start(cwd, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / "bstar.py"), *TINY, "--out", "run", *flags], cwd=cwd, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "BSTAR_TEST_KILL": ""})


@pytest.mark.slow
def test_ended_in_every_kind_of_phase_the_same_command_ends_in_the_same_bits(capsys):
    """SFT, the PRM's annotation and training, evaluation, balance, sampling, training: kill -9 and Ctrl-C; `python tests/faults.py` does 30 of them."""
    where = {at.split()[0] for at, _ in faults.main(["--kills", "9", *TINY[:-2]])}
    assert len(where & {"SFT", "solutions", "complete", "PRM", "fresh"}) >= 3 and len(where & {"evaluate", "balance", "sample", "train"}) >= 2, capsys.readouterr()


@pytest.mark.slow
def test_a_broken_checkpoint_is_told_and_the_one_before_it_used(reference, tmp_path):
    shutil.copytree(reference[0] / "run", tmp_path / "run", symlinks=True)
    shutil.copytree(reference[0] / "runs", tmp_path / "runs", symlinks=True)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(True)
    (tmp_path / "run" / "checkpoints" / "iter_2" / "trainer.pt").unlink()
    finished(tmp_path, "run", "--num-iters", "2")                                   # complete by its metrics: nothing to do
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:2]))              # as after a kill in evaluation 2
    finished(tmp_path, "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "".join(rows)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:2]))
    for i in (1, 2):
        (tmp_path / "run" / "checkpoints" / f"iter_{i}" / "complete.json").write_text("{")
    p = finished(tmp_path, "run")
    assert "iter_1 is missing or broken: going on from" in p.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "".join(rows)


def test_two_processes_on_one_folder(tmp_path):
    p = start(tmp_path)
    try:
        while not (tmp_path / "run" / "config.json").exists():
            time.sleep(0.01)
        second = cli(*TINY, "--out", "run", cwd=tmp_path)
        assert second.returncode == 2 and "another process is writing to it" in second.stderr
    finally:
        p.kill()
        p.wait()


@pytest.mark.parametrize("method", ["sft", "rest-em", "iterative-rft", "online-rft"])
def test_every_method_runs(reference, method):
    cwd, _ = reference
    finished(cwd, method, "--method", method, "--reward", "answer", "--num-iters", "1")
    rows = metrics.read_jsonl(cwd / method / "metrics.jsonl")
    assert len(rows) == 2 and not (cwd / method / "ledger.jsonl").exists()
    assert rows[0]["pass@1"] == metrics.read_jsonl(cwd / "run" / "metrics.jsonl")[0]["pass@1"]    # all start from the same SFT checkpoint
    if method != "sft":
        assert rows[1]["temperature"] == 1.0 and rows[1]["tau"] == 0.0


def test_methods_differ_only_by_their_switches(reference, monkeypatch, capsys):
    """rest-em starts from base with all steps, iterative-rft restarts the optimizer, online-rft and bstar inherit it and one schedule."""
    cwd, _ = reference
    calls = {}

    def spy(policy, optimizer, examples, steps, rate, cfg, seed, desc):
        calls[cfg.method] = (steps, len(optimizer.state), [rate(s) for s in steps])
        return {"loss": 0.0, "grad_norm": 0.0}
    monkeypatch.setattr(bstar, "train", spy)
    base = next((cwd / "runs" / "cache").glob("toy-base-3-512"))
    tokenizer = bstar.load_tokenizer(base)
    for method in ("rest-em", "iterative-rft", "online-rft"):
        cfg = bstar.parse_config([*TINY, "--method", method, "--num-iters", "4"])
        policy = bstar.load_policy(cfg, base)
        optimizer = bstar.adamw(policy, 1e-3)
        bstar.accumulate(policy, random_batch(), 4096)
        optimizer.step()
        bstar.improve(policy, optimizer, [(Query("0", "Ida has 5 . Ida ?", "5"), "# 5")], str(base), tokenizer, lambda q: [1, 2], cfg, 3, 8)
    assert calls["online-rft"][0] == range(8, 12) and calls["online-rft"][1] > 0
    assert calls["iterative-rft"][0] == range(0, 4) and calls["iterative-rft"][1] == 0
    assert calls["rest-em"][0] == range(0, 8 + 12) and calls["rest-em"][1] == 0
    assert capsys.readouterr().err.count("iteration 3: 1 responses fill 64 places; a policy that reads each 64 times can forget the rest") == 3
    assert calls["iterative-rft"][2][-1] == pytest.approx(1e-4) and calls["online-rft"][2][-1] > 1e-4   # only the fresh one is at its end


def test_nothing_selected_keeps_the_policy_and_goes_on(reference):
    cwd, _ = reference
    p = finished(cwd, "nothing", "--method", "online-rft", "--reward", "answer+oracle", "--tau", "1.99", "--max-tokens", "1")
    assert p.stderr.count("no response was selected; the policy stays as it is") == 2
    rows = metrics.read_jsonl(cwd / "nothing" / "metrics.jsonl")
    assert [r.get("loss") for r in rows] == [None] * 3 and rows[2]["kept"] == 0


def test_fixed_temperature_and_tau_need_no_balance(reference):
    cwd, _ = reference
    finished(cwd, "fixed", "--temperature", "0.7", "--tau", "0.2", "--num-iters", "1")
    assert not (cwd / "fixed" / "ledger.jsonl").exists()
    finished(cwd, "fixed_T", "--temperature", "0.7", "--num-iters", "1")
    [d] = metrics.read_jsonl(cwd / "fixed_T" / "ledger.jsonl")
    assert d["temperatures"] == [0.7] and len(d["taus"]) == 21


def test_sample_keeps_chunks_and_does_not_draw_them_again(toy, tmp_path):
    policy, tokenizer, splits, prompt, _ = toy
    cfg, e = bstar.parse_config(TINY), engine(tokenizer)
    job = Job("iter1.pool", splits.val[:10], 2, 1.0)
    [first] = bstar.sample(e, policy, [job], prompt, dataclasses.replace(cfg, chunk=4), tmp_path, "x")
    assert len(list(tmp_path.iterdir())) == 3
    e.sample = None                                                                  # would raise if called again
    [second] = bstar.sample(e, policy, [job], prompt, dataclasses.replace(cfg, chunk=4), tmp_path, "x")
    assert first == second and [len(g) for g in second] == [2] * 10
