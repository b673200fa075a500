"""Steps, process scores in three layouts, labels by completion, ready labels, and train_prm.py as a user runs it."""
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import bstar
import data
import metrics
import train_prm
from data import Query, Sample, UserError
from rewards import PRM, split_steps, step_ends

ROOT = Path(bstar.__file__).parent
ROWS = ROOT.parent / "shared" / "data"
TINY = ("--toy-texts 512 --sft-lr 3e-3 --sft-epochs 6 --start-epoch 2 --val-queries 10 --toy-queries 80 --toy-solutions 64 --toy-max-ops 3 --max-tokens 40 --chunk 30 --batch-size 16").split()
STORY = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"


def rows_of(name):
    if not (ROWS / name).exists():
        pytest.skip(f"no {name}: the real rows are not here")
    return [row for _, row in data.read_rows(str(ROWS / name))]


# -- steps ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, steps", [
    ("", []), (" \n ", []), ("# 5", ["# 5"]), ("a ; # 5", ["a", "# 5"]), ("a ; ; b", ["a", ";", "b"]), ("a ;", ["a"]),
    ("He pays $3. X$ now. So $x=2.$ Then 3.5 is it.\n#### 3.5", ["He pays $3. X$ now.", "So $x=2.$", "Then 3.5 is it.", "#### 3.5"]),
    ("We have\n\\[x = 1.\\]\nwhere y is 2.\n\nThus \\[a. B\\] holds.", ["We have\n\\[x = 1.\\]\nwhere y is 2.", "Thus \\[a. B\\] holds."]),
    ("It costs $3.\nHe has $5.", ["It costs $3.", "He has $5."]),
    ("\\begin{align*}\nA &= 1. \\\\\nB &= 2.\n\\end{align*}\nSo A.", ["\\begin{align*}\nA &= 1. \\\\\nB &= 2.\n\\end{align*}", "So A."])])
def test_steps(text, steps):
    assert split_steps(text) == steps
    assert not steps or step_ends(text)[-1] == len(text)


def test_the_toys_checker_and_the_prm_count_the_same_steps():
    rng = random.Random()
    for _ in range(300):
        text = " ".join(rng.choice([";", "#", "5", "Bob = Ann * 3 = 4 * 3 = 2", "Ann"]) for _ in range(rng.randint(1, 8)))
        if text.split()[-1] != ";":
            assert len(split_steps(text)) == len(data.check_toy(STORY, text)), text


@pytest.mark.parametrize("name", ["math/train.jsonl.gz", "gsm8k/train.jsonl.gz"])
def test_no_step_of_a_real_solution_ends_inside_a_formula(name):
    counts, torn = [], 0
    for row in rows_of(name):
        text = row.get("solution") or row["answer"]
        steps = split_steps(text)
        counts.append(len(steps))
        assert "".join("".join(steps).split()) == "".join(text.split())            # nothing lost
        for step in steps if "math" in name else ():
            bare = step.replace("\\\\", "").replace("\\$", "")
            torn += any(bare.count(a) != bare.count(b) for a, b in (("\\[", "\\]"), ("\\begin{", "\\end{"))) or bare.count("$") % 2
    assert torn <= 10 and 3 < np.mean(counts) < 7                                  # 8 of 30,000 in MATH: an amount of money in a formula, $$ for $ $
    if "gsm8k" in name:
        assert all(split_steps(row["answer"])[-1].startswith("####") for row in rows_of(name)[:200])


def test_hostile_texts_take_no_time():
    for text in ("\\[" * 200_000, "$" * 400_000, "\\begin{a}" * 50_000, "\n" * 400_000, ". A" * 100_000, "[asy]" * 80_000):
        start = time.perf_counter()
        split_steps(text)
        assert time.perf_counter() - start < 10


# -- the three layouts ----------------------------------------------------------------------------------------------------

def words(folder, more=(), **kwargs):
    """A word-level tokenizer of the toy's words and `more`; what it doesn't know is <unk>."""
    vocabulary = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *data.TOY_WORDS, *more])
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny(kind, vocab):
    shape = dict(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 max_position_embeddings=200, initializer_range=0.5)
    return transformers.LlamaConfig(**shape, num_labels=2) if kind == "llama" else transformers.Qwen2Config(**shape)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder as TRL's PRMTrainer leaves it: two labels, and nothing of ours in the tokenizer's config."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    tokenizer = words(folder)
    transformers.LlamaForTokenClassification(tiny("llama", len(tokenizer))).save_pretrained(folder)
    return folder


def stories(n, seed=None):
    rng = random.Random(seed)
    qs = [data.toy_query(rng, 4, str(i)) for i in range(n)]
    return [q.text for q in qs], [q.solution for q in qs]


def test_scores_are_those_of_a_plain_two_label_model_read_one_by_one(own):
    """Padding, sorting, batches and shared pairs change nothing; the reference is a whole forward pass in float64."""
    prm, plain = PRM.load(own, token_budget=150), transformers.AutoModelForTokenClassification.from_pretrained(own, dtype=torch.float64)
    queries, responses = stories(30)
    queries, responses = queries + queries[:5], responses + responses[:5]
    for q, r, found in zip(queries, responses, prm.score(queries, responses), strict=True):
        ids, places = prm.encode(q, split_steps(r))
        with torch.no_grad():
            p = plain(torch.tensor([ids])).logits[0, places].softmax(-1)[:, 1]
        assert found == pytest.approx(p.tolist(), abs=1e-5) and len(found) == len(split_steps(r)) and all(0 <= x <= 1 for x in found)


def test_input_is_the_one_trl_trains_on(own):
    """TRL's PRMTrainer: beginning of text, prompt, then each step's ids and the separator's, labelled at its last one."""
    tokenizer = words(own.parent / "sep", ["@"])
    tokenizer.init_kwargs["step_separator"] = "@"
    ask = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    steps = ["Bob = Ann * 3 = 4 * 3 = 2", "# 0"]
    ids, labels = [tokenizer.bos_token_id, *ask(STORY)], []
    labels += [-100] * len(ids)
    for step in steps:
        whole = ask(step) + ask("@")
        ids, labels = ids + whole, labels + [-100] * (len(whole) - 1) + [1]
    got, places = PRM(transformers.LlamaForTokenClassification(tiny("llama", len(tokenizer))), tokenizer).encode(STORY, steps)
    assert got == ids and places == [i for i, y in enumerate(labels) if y == 1]


def test_shepherds_layout(tmp_path):
    """A causal model whose logits of + and - at each tag are the score."""
    torch.manual_seed(1)
    tokenizer = words(tmp_path, ["ки", "+", "-", "Step", "1:", "2:", "3:", "4:"])
    model = transformers.LlamaForCausalLM(tiny("llama", len(tokenizer)))
    model.save_pretrained(tmp_path)
    queries, responses = stories(6)
    for q, r, found in zip(queries, responses, PRM.load(tmp_path, "shepherd").score(queries, responses)):
        text = q + " " + "\n".join(f"Step {j}: {s} ки" for j, s in enumerate(split_steps(r), 1))
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        tag, plus, minus = map(tokenizer.convert_tokens_to_ids, ("ки", "+", "-"))
        with torch.no_grad():
            p = model(ids).logits[0, :, [plus, minus]].softmax(-1)[:, 0][ids[0] == tag]
        assert found == pytest.approx(p.tolist(), abs=1e-5) and len(found) == len(split_steps(r))


def test_qwens_layout(tmp_path):
    """Weights named model.* and score.{0,2}.*, a chat, and a two-class softmax at <extra_0>; no code from the hub."""
    torch.manual_seed(2)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    tokenizer = words(tmp_path, ["<extra_0>"], chat_template=template, additional_special_tokens=["<extra_0>"])
    config = tiny("qwen", len(tokenizer))
    body = transformers.Qwen2Model(config)
    head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)                # for its config.json
    from safetensors.torch import save_file
    save_file({**{f"model.{k}": v for k, v in body.state_dict().items()}, **{f"score.{k}": v for k, v in head.state_dict().items()}},
              tmp_path / "model.safetensors", {"format": "pt"})
    (queries, responses), prm = stories(6), PRM.load(tmp_path, "qwen")
    tokenizer = prm.tokenizer                                                      # what transformers makes of the folder, as a Qwen2 tokenizer
    for q, r, found in zip(queries, responses, prm.score(queries, responses)):
        system = r"Please reason step by step, and put your final answer within \boxed{}."
        text = f"system {system}\nuser {q}\nassistant " + "".join(f"{s}<extra_0>" for s in split_steps(r)) + "\n"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            p = head(body(ids).last_hidden_state[0])[ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")].softmax(-1)[:, 1]
        assert found == pytest.approx(p.tolist(), abs=1e-5) and len(found) == len(split_steps(r))


def test_what_cannot_be_read_is_not_vouched_for(own, capsys):
    prm = PRM.load(own)
    assert prm.score([STORY] * 3, ["", " \n", "# 0"])[:2] == [[0.0], [0.0]]        # no step
    long = " ; ".join(["Bob = Ann * 3 = 4 * 3 = 2"] * 40)
    scores = prm.score([STORY, STORY], [long, "# 0"])
    assert len(scores[0]) == 40 and scores[0][0] > 0 and scores[0][-1] == 0.0 and scores[1] == pytest.approx(prm.score([STORY], ["# 0"])[0], abs=1e-6)
    assert prm.score([STORY * 20], ["a ; b"]) == [[0.0, 0.0]]                      # the question alone is too long
    assert "not a number" not in capsys.readouterr().err
    with torch.no_grad():
        prm.model.score.weight[:] = float("nan")
    assert prm.score([STORY], ["# 0 ; # 1"]) == [[0.0, 0.0]] and "2 step scores are not a number" in capsys.readouterr().err


def test_a_prm_need_not_share_the_policys_tokenizer(tmp_path):
    """Text goes between them: a PRM of characters reads the toy's words."""
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted({*"\n", *map(chr, range(32, 127))}))}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    transformers.LlamaForTokenClassification(tiny("llama", 100)).save_pretrained(tmp_path)
    queries, responses = stories(4)
    assert [len(s) for s in PRM.load(tmp_path).score(queries, responses)] == [len(split_steps(r)) for r in responses]


def test_a_folder_that_is_no_prm(own, tmp_path):
    data.make_toy_model(tmp_path, 0)
    words(tmp_path / "bert")                                                       # two labels, but it sees what comes later, padding too
    transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2)).save_pretrained(tmp_path / "bert")
    for path, kind in ((tmp_path / "none", "own"), (tmp_path, "own"), (tmp_path, "qwen"), (own, "qwen"), (own, "shepherd"), (tmp_path / "bert", "own")):
        with pytest.raises(UserError, match="--prm") as e:
            PRM.load(path, kind)
        assert "\n" not in str(e.value)


# -- labels ---------------------------------------------------------------------------------------------------------------

class Rule:
    """An engine whose completions are right or not by a rule on the prompt, and which remembers what it was asked."""
    def __init__(self, tokenizer, share):
        self.tokenizer, self.share, self.asked = tokenizer, share, []

    def wake(self, policy):
        pass

    def sleep(self):
        pass

    def sample(self, prompts, n, temperature, max_tokens, seed, bar=None):
        texts = [self.tokenizer.decode(p, skip_special_tokens=True) for p in prompts]
        self.asked += texts
        return [[Sample("# 0" if j < round(n * self.share(t)) else "# 1", "stop") for j in range(n)] for t in texts]


def test_labels_against_brute_force(tmp_path):
    """Every prefix completed by itself, no sharing, nothing pruned: the labels are the same, with far fewer completions."""
    data.make_toy_model(tmp_path / "m", 0)
    cfg = bstar.parse_config(TINY, train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    tokenizer, rng = bstar.load_tokenizer(tmp_path / "m"), random.Random()
    q = Query("0", STORY, "0")
    share = lambda text: round(random.Random(text).choice([0, 0, 0.25, 1]) * cfg.completions) / cfg.completions
    engine = Rule(tokenizer, share)
    prompt = lambda q: data.prompt_ids(tokenizer, q, data.Splits([], [], {}, "{query}", "{query}"), False)
    have = bstar.Setup(None, "", tokenizer, prompt, engine, [])
    texts = list({" ; ".join(rng.choice(["Cid = 0", "Ann = 0"]) for _ in range(rng.randint(1, 3))) + " ; # 0" for _ in range(40)})
    found = train_prm.complete(have, tmp_path / "m", [(q, t, step_ends(t)) for t in texts], cfg, tmp_path, 1.0)
    brute = {t[:e]: share(f"{STORY} {t[:e]}") for t in texts for e in step_ends(t)[:-1]}
    for text in texts:
        lost = False
        for e in step_ends(text)[:-1]:
            lost = lost or brute[text[:e]] == 0
            assert (found.get((q, text[:e]), 0.0) > 0) == (not lost)
            assert lost or found[q, text[:e]] == brute[text[:e]]
    assert len(engine.asked) == len(set(engine.asked)) <= len(brute)
    saved = json.loads((tmp_path / "completions.json").read_text())
    assert saved["done"] == cfg.completions * len(engine.asked) <= saved["without the lost"] <= saved["without sharing"]


class Restates(Rule):
    """An engine whose solutions, and half of whose completions, end in the question's own formula."""
    def sample(self, prompts, n, temperature, max_tokens, seed, bar=None):
        said = ["\\boxed{81^{3/4}}", "\\boxed{27}"] * n
        return [[Sample(f"We see.\n{said[j]}" if n == 2 else said[j], "stop") for j in range(n)] for _ in prompts]


def test_the_labels_grade_as_the_run_does(tmp_path):
    """An answer that only restates MATH's question is wrong, in a solution and in a completion."""
    data.make_toy_model(tmp_path / "m", 0)
    flags = "--task math --solutions 2 --completions 4 --engine hf".split()
    cfg = bstar.parse_config(flags, train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    have = bstar.Setup(None, "", bstar.load_tokenizer(tmp_path / "m"), lambda q: [1], Restates(None, None), [])
    rows = train_prm.annotate(have, [tmp_path / "m"], [Query("0", "Evaluate $81^{3/4}$.", "27")], cfg, tmp_path)
    assert [(r["correct"], r["share"]) for r in rows] == [(False, [0.5, 0.0]), (True, [0.5, 1.0])]


SHEPHERD = {"input": "2+2? Step 1: 2+2=4 ки\nStep 2: The answer is: 5 ки", "label": "2+2? Step 1: 2+2=4 +\nStep 2: The answer is: 5 -", "task": "GSM8K"}
PRM800K = {"question": {"problem": "1+1?"}, "label": {"steps": [
    {"completions": [{"text": "a", "rating": -1}, {"text": "b", "rating": 0}], "human_completion": None, "chosen_completion": 1},
    {"completions": [{"text": "c", "rating": -1}], "human_completion": {"text": "d", "rating": None}, "chosen_completion": None},
    {"completions": [{"text": "e", "rating": -1}], "human_completion": None, "chosen_completion": None}]}}
READY = [(SHEPHERD, [("2+2?", ["2+2=4", "The answer is: 5"], [1.0, 0.0])]),
         (PRM800K, [("1+1?", ["a"], [0.0]), ("1+1?", ["b", "c"], [None, 0.0]), ("1+1?", ["b", "d", "e"], [None, None, 0.0]), ("1+1?", ["b", "d"], [1.0, 1.0])]),
         ({"prompt": "q", "completions": ["x", "y"], "labels": [True, False]}, [("q", ["x", "y"], [1.0, 0.0])])]


@pytest.mark.parametrize("row, want", READY, ids=["shepherd", "prm800k", "ours"])
def test_ready_labels_of_a_file_and_of_a_data_set(tmp_path, monkeypatch, row, want):
    """A folder of parquet is read by the very call that reads a name on the hub; such names may have dots in them."""
    import datasets
    import pyarrow.parquet
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("labels.jsonl").write_text(json.dumps(row))
    Path("org/labels-v1.2").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "org/labels-v1.2/train.parquet")
    for name in ("labels.jsonl", "org/labels-v1.2"):
        assert [(r["prompt"], r["completions"], r["labels"]) for r in train_prm.read_annotations(name)] == want, name


@pytest.mark.parametrize("row", [{"input": "2+2? Step 1: 4 ки", "label": "2+2? Step 1: 4 ?"}, {"input": "no steps ки", "label": "no steps +"},
                                 {"question": {"problem": "x"}, "label": {}}, {"prompt": "q", "completions": ["a"], "labels": []}, {"other": 1},
                                 {"prompt": "q", "completions": ["a"], "labels": [7]}, {"prompt": "q", "completions": ["a"], "labels": [float("nan")]},
                                 {"prompt": "q", "completions": "a", "labels": [1]}, {"prompt": "q", "completions": ["a"], "labels": [1], "share": []}])
def test_a_broken_annotation_names_file_and_line(tmp_path, row):
    f = tmp_path / "labels.jsonl"
    f.write_text(json.dumps({"prompt": "q", "completions": ["x"], "labels": [1]}) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=r"labels\.jsonl:2.*broken row"):
        list(train_prm.read_annotations(str(f)))


@pytest.mark.parametrize("name, least", [("step_labels/math_shepherd_sample.jsonl", 7), ("step_labels/prm800k_sample.jsonl", 6)])
def test_real_step_labels(name, least):
    rows_of(name)
    found = list(train_prm.read_annotations(str(ROWS / name)))
    assert len(found) >= least and all(len(r["completions"]) == len(r["labels"]) and r["prompt"] for r in found)
    assert {y for r in found for y in r["labels"]} >= {0.0, 1.0} and not any("ки" in s for r in found for s in r["completions"])


def test_what_cannot_be_trained_on_is_left_out_and_said(own, capsys):
    cfg = bstar.parse_config(TINY, train_prm.PRMConfig, train_prm.PRESETS, train_prm.OF_THE_LOOP)
    rows = [{"prompt": STORY * 20, "completions": ["# 0"], "labels": [1.0]}, {"prompt": STORY, "completions": ["# 0"], "labels": [None]}]
    with pytest.raises(UserError, match="none of 2 annotated solutions has a label and fits --max-length 160"):
        train_prm.encode(PRM.load(own), rows, cfg)
    assert len(train_prm.encode(PRM.load(own), [*rows, {"prompt": STORY, "completions": ["# 0"], "labels": [0.5]}], cfg)) == 1
    assert "annotations: 2 of 3 have no label or are longer" in capsys.readouterr().err


def test_the_loss_is_the_mean_over_a_global_batchs_steps(own):
    """Gradient against plain float64 autograd over all steps at once, for soft labels and micro-batches of unequal length."""
    prm, plain = PRM.load(own), transformers.AutoModelForTokenClassification.from_pretrained(own, dtype=torch.float64)
    queries, responses = stories(12)
    rng, batch = random.Random(), []
    for q, r in zip(queries, responses):
        ids, places = prm.encode(q, split_steps(r))
        batch.append(train_prm.Example(ids, (places, [rng.random() for _ in places])))
    mean = train_prm.accumulate(prm, batch, 160)
    losses = []
    for ids, (places, y) in batch:
        p = plain(torch.tensor([ids])).logits[0, places].softmax(-1)
        losses += [-(t * p[j, 1].log() + (1 - t) * p[j, 0].log()) for j, t in enumerate(y)]
    reference = torch.stack(losses).mean()
    reference.backward()
    assert mean == pytest.approx(reference.item(), abs=1e-5)
    for a, b in zip(prm.model.parameters(), plain.parameters()):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)


# -- watching -------------------------------------------------------------------------------------------------------------

def test_watching_against_counting():
    rng = np.random.default_rng()
    q = Query("0", STORY, "0")
    right, luck, wrong = "Cid = Ida * 6 = 5 * 6 = 0 ; Ann = Ida + Cid = 5 + 0 = 5 ; # 5", "Cid = Ida * 6 = 5 * 6 = 1 ; # 5", "# 7"
    group = []
    for text in rng.choice([right, luck, wrong], 60):
        steps = rng.random(len(split_steps(text))).tolist()
        ok = text != wrong
        group.append(Sample(str(text), "stop", correct=ok, sound=text == right, steps=steps, r_prm=2 * min(steps) - 1, reward=ok + 2 * min(steps) - 1))
    row, low = bstar.watch_prm([q], [group], 1.0), [min(s.steps) for s in group]
    pairs = [(a, b) for a, s in zip(low, group) for b, z in zip(low, group) if s.correct and not z.correct]
    assert row["prm/auc"] == pytest.approx(np.mean([a > b for a, b in pairs]), abs=1e-4)
    lucky = [s for s in group if s.correct and not s.sound]
    assert row["prm/false_admitted"] == pytest.approx(np.mean([s.reward > 1 for s in lucky]), abs=1e-4)
    assert row["prm/wrong_admitted"] == 0.0
    assert row["prm/min_last"] == pytest.approx(np.mean([s.steps[-1] == min(s.steps) for s in group]), abs=1e-4)
    bins = row["prm/calibration"]
    assert sum(bins["n"]) == 60 and sum(n * c for n, c in zip(bins["n"], bins["correct"]) if n) == pytest.approx(sum(s.correct for s in group), abs=0.01)
    assert bstar.watch_prm([q], [[Sample("# 1", "length", steps=[0.5])]], 1.0) == {}


# -- as a user runs it ----------------------------------------------------------------------------------------------------

def run(cwd, script, *flags, kill_after=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    p = subprocess.Popen([sys.executable, ROOT / script, *TINY, *flags], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_after is not None:
        time.sleep(kill_after)
        p.send_signal(signal.SIGKILL)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


LOOP = ("--num-iters 1 --steps-per-iter 2 --queries-per-iter 12 --K 4 --balance-queries 6 --temperatures 0.6:1.0:0.4 --eval-queries 8 --eval-samples 4 "
        "--S 2").split()


def bits(cwd):
    """What a run leaves that must not depend on who killed it when: labels, weights, metrics."""
    names = ("prm.json", "annotations.jsonl.gz", "completions.json", "model.safetensors", "metrics.jsonl", "ledger.jsonl")
    return {re.sub(r"-[0-9a-f]{12}/", "/", str(f.relative_to(cwd))): f.read_bytes() for f in cwd.rglob("*") if f.name in names}   # keys hold the base's date


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [("train_prm.py", ["--out", "prm"]), ("bstar.py", LOOP)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, script, flags):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    start = time.perf_counter()
    code, out, err = run(tmp_path / "a", script, *flags)
    seconds = time.perf_counter() - start
    assert code == 0 and "labels_agree" in err, err
    for _ in range(4):
        run(tmp_path / "b", script, *flags, kill_after=random.uniform(0.3, 1) * seconds)
    assert run(tmp_path / "b", script, *flags)[0] == 0
    a, b = bits(tmp_path / "a"), bits(tmp_path / "b")
    assert a.keys() == b.keys() and not [name for name in a if a[name] != b[name]]
    [path] = (tmp_path / "a").rglob("annotations.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt")]
    assert all(len(r["completions"]) == len(r["labels"]) == len(r["share"]) for r in rows)
    assert all(not (b and not a) for r in rows for a, b in zip(r["labels"], r["labels"][1:]))      # lost stays lost
    prm = PRM.load(path.parent / "prm")
    assert prm.separator == ";" and prm.tokenizer.init_kwargs["prompt_template"] == "{query}"


@pytest.mark.slow
def test_ready_labels_need_the_first_sft_checkpoint_alone(tmp_path):
    rows = [{"prompt": STORY, "completions": ["Bob = Ann * 3 = 4 * 3 = 2", "# 5"], "labels": [1, k % 2]} for k in range(40)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags, made = ["--annotations", "labels.jsonl", "--out", "prm"], lambda: sorted(f.name for f in tmp_path.glob("runs/cache/sft-*/epoch_*"))
    code, _, err = run(tmp_path, "train_prm.py", *flags)
    assert code == 0 and made() == ["epoch_2"], err
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    code, _, err = run(tmp_path, "train_prm.py", *flags)
    assert code == 2 and "holds a PRM made of other settings, data" in err         # the labels are data


@pytest.mark.slow
def test_the_default_run_trains_its_prm_first_and_other_methods_share_it(tmp_path):
    code, out, err = run(tmp_path, "bstar.py", *LOOP)
    assert code == 0, err
    assert "PRM |" in err and "prm@4-2" in (tmp_path / "runs/toy-bstar-answer+prm-0/metrics.jsonl").read_text()
    rows = metrics.read_jsonl(tmp_path / "runs/toy-bstar-answer+prm-0/metrics.jsonl")
    assert {"prm/auc", "prm/step_auc", "prm/ece", "prm/wrong_admitted", "prm/min_last"} <= rows[1].keys()
    code, _, err = run(tmp_path, "bstar.py", *LOOP, "--method", "online-rft", "--tau", "1")
    assert code == 0 and "PRM |" not in err, err
    [made] = (tmp_path / "runs/cache").glob("prm-toy-*")
    code, _, err = run(tmp_path, "train_prm.py")
    assert code == 0 and "PRM epoch" not in err
    code, _, err = run(tmp_path, "bstar.py", *LOOP, "--prm", str(made / "prm"), "--out", "runs/given")
    assert code == 0, err
    assert metrics.read_jsonl(tmp_path / "runs/given/metrics.jsonl") == rows


@pytest.mark.parametrize("flags, said", [(["--labels", "x"], "--labels x: expected one of hard, soft"), (["--completions", "0"], "--completions 0"),
                                         (["--annotations", "none.jsonl"], "no such file"), (["--method", "bstar"], "--method"),
                                         (["--annotations", "org/labels-v1.2"], "can't load org/labels-v1.2 from the hub"),
                                         (["--annotations", "org/labels-v1.2"], "give local copies by --annotations"),
                                         (["--annotations", "empty.jsonl"], "empty.jsonl: the file holds no rows"),
                                         (["--task", "code"], "--task code: its reward is unit tests"), (["--out", "empty.jsonl"], "--out empty.jsonl: File exists")])
def test_user_errors_are_one_line(tmp_path, flags, said):
    (tmp_path / "empty.jsonl").touch()
    code, _, err = run(tmp_path, "train_prm.py", *flags)
    last = err.strip().splitlines()[-1]
    assert code == 2 and said in last and "Traceback" not in err, err
