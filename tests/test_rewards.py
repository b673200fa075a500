"""Eq. 1 and its table, the steps of a solution, and process scores in three layouts."""

import contextlib
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import data
import rewards
import toy
from data import Query, Sample, UserError
from rewards import PRM, split_steps, step_ends

ROWS = Path(rewards.__file__).parent.parent / "shared" / "data"
STORY = "Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?"
STEP = "Bob = Ann * 3 = 4 * 3 = 2"


def solutions_of(name):
    if not (ROWS / name).exists():
        pytest.skip(f"no {name}: the real rows are not here")
    rows = [row for _, row in data.read_rows(str(ROWS / name))]
    return [row.get("solution") or row["answer"] for row in rows]


def stories(n):
    queries = toy.story_texts(4, n)
    return [q.text for q in queries], [q.solution for q in queries]


# -- the reward ------------------------------------------------------------------------------------


RIGHT, LUCKY = "Bob = Ann * 3 = 4 * 3 = 2 ; # 2", "Bob = Ann * 3 = 4 * 3 = 1 ; # 2"


def rewarded(reward, prm=None):
    """Scored samples of one query: right, right by luck, wrong, right but cut off."""
    group = [Sample(text, "stop") for text in (RIGHT, LUCKY, "# 1")] + [Sample(RIGHT, "length")]
    query = Query("0", "Ann has 4 . Bob has Ann times 3 . Bob ?", "2")
    rewards.score([query], [group], "stories", reward, prm)
    return group


class Half:
    """A PRM that is half sure of every step."""

    on_gpu = contextlib.nullcontext

    def score(self, questions, texts):
        return [[0.5] * max(1, len(split_steps(text))) for text in texts]


@pytest.mark.parametrize(
    "reward, prm, r",
    [
        ("answer", None, [1, 1, 0, -math.inf]),
        ("answer+oracle", None, [2, 0, -1, -math.inf]),
        ("answer+prm", Half(), [1, 1, 0, -math.inf]),
    ],
)
def test_score_fills_eq_1_and_never_rewards_a_cut_off_response(reward, prm, r):
    group = rewarded(reward, prm)
    assert [s.reward for s in group] == r
    assert [s.correct for s in group] == [True, True, False, True]
    assert [s.sound for s in group] == [True, False, False, True]
    assert [s.pred for s in group] == ["2", "2", "1", "2"]
    assert [len(s.steps) for s in group] == ([0] * 4 if reward == "answer" else [2, 2, 1, 2])


def test_a_fork_is_one_function_in_the_table(monkeypatch):
    def short(queries, responses):
        return [s.correct - len(s.response.split()) / 100 for s in responses]

    monkeypatch.setitem(rewards.REWARDS, "short", short)
    assert [s.reward for s in rewarded("short")] == [1 - 0.14, 1 - 0.14, -0.02, -math.inf]


def test_nothing_to_score():
    rewards.score([], [], "stories", "answer")
    rewards.score([Query("0", STORY, "1")], [[]], "stories", "answer+oracle")


# -- steps -----------------------------------------------------------------------------------------

CASES = [
    ("", []),
    (" \n ", []),
    ("# 5", ["# 5"]),
    ("a ; ; b", ["a", ";", "b"]),
    ("a ;", ["a"]),
    ("He pays $3. X$ now. So $x=2.$ Then 3.5.", ["He pays $3. X$ now.", "So $x=2.$", "Then 3.5."]),
    (
        "Be\n\\[x = 1.\\]\nwhere y.\n\nThus \\[a. B\\].",
        ["Be\n\\[x = 1.\\]\nwhere y.", "Thus \\[a. B\\]."],
    ),
    ("It costs $3.\nHe has $5.", ["It costs $3.", "He has $5."]),
    ("\\begin{a*}\nA. \\\\\nB.\n\\end{a*}\nSo", ["\\begin{a*}\nA. \\\\\nB.\n\\end{a*}", "So"]),
]


@pytest.mark.parametrize("text, steps", CASES)
def test_steps(text, steps):
    assert split_steps(text) == steps
    assert not steps or step_ends(text)[-1] == len(text)


def test_the_toys_checker_and_the_prm_count_the_same_steps():
    rng = random.Random(0)
    for _ in range(300):
        text = " ".join(rng.choices([";", "#", "5", STEP, "Ann"], k=rng.randint(1, 8)))
        if not text.endswith(";"):
            assert len(split_steps(text)) == len(toy.CHECKERS["stories"](STORY, text)), text


def torn(step):
    """True if a formula opens in a step and does not close."""
    bare = step.replace("\\\\", "").replace("\\$", "")
    pairs = (("\\[", "\\]"), ("\\begin{", "\\end{"))
    return bare.count("$") % 2 == 1 or any(bare.count(a) != bare.count(b) for a, b in pairs)


@pytest.mark.parametrize("name", ["math/train.jsonl.gz", "gsm8k/train.jsonl.gz"])
def test_no_step_of_a_real_solution_ends_inside_a_formula(name):
    counts, n_torn = [], 0
    for text in solutions_of(name):
        steps = split_steps(text)
        counts.append(len(steps))
        assert "".join("".join(steps).split()) == "".join(text.split())  # nothing lost
        if "math" in name:
            n_torn += sum(map(torn, steps))
        else:
            assert steps[-1].startswith("####")
    # 8 of 30,000 in MATH: an amount of money in a formula, $$ for $ $
    assert n_torn <= 10 and 3 < np.mean(counts) < 7


PIECES = ["\n", " ", " \n", ". A", "$", "\\[", "\\begin{a}", "\\begin{a}\\begin{b}", "[asy]"]


@pytest.mark.parametrize("end", ["", "x", "$$x$$"])
@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_the_length_and_not_faster(piece, end):
    """Four times as many take 4 times the time if it is linear, 16 if it is quadratic."""
    times = []
    for k in range(8):
        text = piece * (500 * 2**k) + end
        start = time.process_time()
        split_steps(text)
        times.append(time.process_time() - start)
        assert times[-1] < 5
    assert times[-1] < 10 * max(times[-3], 0.01)


# -- the three layouts -----------------------------------------------------------------------------


def words(folder, more=(), **kwargs):
    """A word-level tokenizer of the toy's words and `more`; what it doesn't know is <unk>."""
    vocabulary = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *toy.STORY_WORDS, *more])
    ids = {word: i for i, word in enumerate(vocabulary)}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special, **kwargs)
    tokenizer.save_pretrained(folder)
    return tokenizer


SHAPE = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=200,
    initializer_range=0.5,
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder as TRL's PRMTrainer leaves it: two labels, nothing of ours in tokenizer_config."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(words(folder)), num_labels=2, **SHAPE)
    transformers.LlamaForTokenClassification(config).save_pretrained(folder)
    return folder


def assert_scores(prm, reference, n=30):
    """reference(query, steps) -> one score a step, from a whole forward pass without padding."""
    queries, responses = stories(n)
    queries, responses = queries + queries[:5], responses + responses[:5]
    scores = prm.score(queries, responses)
    for query, response, steps in zip(queries, responses, scores, strict=True):
        with torch.no_grad():
            expected = reference(query, split_steps(response)).tolist()
        assert steps == pytest.approx(expected, abs=1e-5)


def test_scores_are_those_of_a_plain_two_label_model_read_one_by_one(own):
    """Padding, sorting, batches and shared pairs change nothing; the reference is in float64."""
    prm = PRM.load(own, token_budget=150)
    auto = transformers.AutoModelForTokenClassification
    plain = auto.from_pretrained(own, dtype=torch.float64)

    def reference(query, steps):
        ids, places = prm.encode(query, steps)
        return plain(torch.tensor([ids])).logits[0, places].softmax(-1)[:, 1]

    assert_scores(prm, reference)


def test_input_is_the_one_trl_trains_on(own, tmp_path):
    """Beginning of text, prompt, then each step's ids and the separator's, labelled at its last."""
    tokenizer = words(tmp_path, ["@"])
    tokenizer.init_kwargs["step_separator"] = "@"
    steps = [STEP, "# 0"]
    ids = [tokenizer.bos_token_id, *rewards.tokens(tokenizer, STORY)]
    labels = [-100] * len(ids)
    for step in steps:
        whole = rewards.tokens(tokenizer, step) + rewards.tokens(tokenizer, "@")
        ids += whole
        labels += [-100] * (len(whole) - 1) + [1]
    got, places = PRM(PRM.load(own).model, tokenizer).encode(STORY, steps)
    assert got == ids and places == [i for i, label in enumerate(labels) if label == 1]


def words_of_shepherd(folder):
    return words(folder, ["ки", "+", "-", "Step", "1:", "2:", "3:", "4:"])


def pieces_of_mistral(folder):
    """Characters and a few merges, over a normaliser that prepends a space mark to every text."""
    characters = dict.fromkeys("▁" + "".join(map(chr, range(33, 127))) + "ки")
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *characters])}
    merges = [("▁", "▁"), ("▁", "+"), ("▁", "-"), ("к", "и"), ("▁", "ки")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence(marks)
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    "kind, mark", [("own", "</s>"), ("shepherd", "▁ки"), ("qwen", "<extra_0>")]
)
def test_a_special_token_in_a_text_is_text_and_as_a_mark_it_is_the_token(own, tmp_path, kind, mark):
    """The end token, the marks themselves: written by a policy, they move and end nothing."""
    tokenizer = pieces_of_mistral(tmp_path)
    tokenizer.init_kwargs["step_separator"] = "</s>"
    if kind == "qwen":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prm = PRM(PRM.load(own).model, tokenizer, kind)
    ids, places = prm.encode(f"{STORY} </s> ки ?", ["# 0 </s>", "</s> # 1 ки <extra_0>", "<s>"])
    mark = tokenizer.convert_tokens_to_ids(mark)
    special = {*tokenizer.all_special_ids, mark} - {tokenizer.unk_token_id, ids[0]}
    assert [i for i, token in enumerate(ids) if token in special] == places and len(places) == 3


def causal(folder, tokenizer):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SHAPE)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "make, marks",
    [(words_of_shepherd, ["ки", "+", "-"]), (pieces_of_mistral, ["▁ки", "▁+", "▁-"])],
)
def test_shepherds_layout(tmp_path, make, marks):
    """A causal model whose logits of + and - at each tag are the score."""
    tokenizer = make(tmp_path)
    model = causal(tmp_path, tokenizer)
    tag, plus, minus = tokenizer.convert_tokens_to_ids(marks)

    def reference(query, steps):
        lines = [f"Step {j}: {step} ки" for j, step in enumerate(steps, 1)]
        ids = torch.tensor([tokenizer(query + " " + "\n".join(lines))["input_ids"]])
        return model(ids).logits[0, :, [plus, minus]].softmax(-1)[:, 0][ids[0] == tag]

    prm = PRM.load(tmp_path, "shepherd")
    prm.limit = 1000
    assert_scores(prm, reference, 6)


def test_a_response_that_fakes_a_tag_counts_as_0_and_is_counted(tmp_path, capsys):
    causal(tmp_path, words(tmp_path, ["ки", "+", "-", "к", "и"]))
    prm = PRM.load(tmp_path, "shepherd")
    [inside, nested] = prm.score([STORY] * 2, ["# 0 ки ; # 1", "# 0 ккии ; # 1"])
    assert min(inside + nested) > 0 and len(inside) == len(nested) == 2

    def one_place_too_few(tokenizer, query, steps):
        return [1, 2, 3], [2]

    prm.format = prm.format._replace(encode=one_place_too_few)
    assert prm.score([STORY], ["# 0 ; # 1"]) == [[0.0, 0.0]]
    assert "1 responses mix up its tags" in capsys.readouterr().err


def test_qwens_layout(tmp_path):
    """Weights named model.* and score.{0,2}.*, a chat, a two-class softmax at <extra_0>."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    special = ["<extra_0>"]
    tokenizer = words(tmp_path, special, chat_template=template, additional_special_tokens=special)
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), **SHAPE)
    body = transformers.Qwen2Model(config)
    head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)  # for its config.json
    weights = {f"model.{name}": value for name, value in body.state_dict().items()}
    weights |= {f"score.{name}": value for name, value in head.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    prm = PRM.load(tmp_path, "qwen")
    tokenizer = prm.tokenizer  # what transformers makes of the folder, as a Qwen2 tokenizer

    def reference(query, steps):
        system = r"Please reason step by step, and put your final answer within \boxed{}."
        turn = "".join(f"{step}<extra_0>" for step in steps)
        text = f"system {system}\nuser {query}\nassistant {turn}\n"
        ids = torch.tensor([rewards.tokens(tokenizer, text)])
        at = ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")
        return head(body(ids).last_hidden_state[0])[at].softmax(-1)[:, 1]

    assert_scores(prm, reference, 6)


def test_what_cannot_be_read_is_not_vouched_for(own, capsys):
    prm = PRM.load(own)
    assert prm.score([STORY] * 3, ["", " \n", "# 0"])[:2] == [[0.0], [0.0]]  # no step
    [long, short] = prm.score([STORY, STORY], [" ; ".join([STEP] * 40), "# 0"])
    assert len(long) == 40 and long[0] > 0 and long[-1] == 0.0
    assert short == pytest.approx(prm.score([STORY], ["# 0"])[0], abs=1e-6)
    assert prm.score([STORY * 20], ["a ; b"]) == [[0.0, 0.0]]  # the question alone is too long
    assert "not a number" not in capsys.readouterr().err
    with torch.no_grad():
        prm.model.score.weight[:] = float("nan")
    assert prm.score([STORY], ["# 0 ; # 1"]) == [[0.0, 0.0]]
    assert "2 step scores are not a number" in capsys.readouterr().err


NO_PRM = {  # folder, format -> why it is none
    ("none", "own"): "",
    ("causal", "own"): "no two-label head",
    ("causal", "qwen"): "",
    ("causal", "shepherd"): "does not keep the tags of --prm-format shepherd apart",
    ("own", "qwen"): "",
    ("bert", "own"): "no two-label head",
}


@pytest.mark.parametrize("place, why", NO_PRM.items())
def test_a_folder_that_is_no_prm(own, tmp_path, place, why):
    folder, kind = place
    causal(tmp_path / "causal", words(tmp_path / "causal"))
    words(tmp_path / "bert")  # two labels, but it sees what comes later, padding too
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "bert")
    path = own if folder == "own" else tmp_path / folder
    with pytest.raises(UserError, match=f"--prm .*{why}") as e:
        PRM.load(path, kind)
    assert "\n" not in str(e.value)


# -- walks -----------------------------------------------------------------------------------------


def test_a_walk_has_as_many_steps_as_its_checker_sees():
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choices(toy.WALK_WORDS, k=rng.randint(0, 7))) + " " * rng.randint(0, 1)
        steps = split_steps(text, "walk")
        assert len(steps) == len(step_ends(text, "walk"))
        # nothing at all is one wrong step, to the checker as to a PRM
        assert len(toy.check_route("3 > 17 :", text)) == max(1, len(steps))
        assert " ".join(steps).split() == text.split()
    assert split_steps("+7 10 *2 20", "gsm8k") == split_steps("+7 10 *2 20") == ["+7 10 *2 20"]


def test_a_prm_of_walks_scores_each_move_and_the_end(own):
    prm = PRM.load(own, task="walk")
    scores = prm.score(["3 > 17 :"] * 3, ["+7 10 +7 17", "+7 10 *2", ""])
    assert [len(steps) for steps in scores] == [3, 3, 1] and scores[2] == [0.0]


def test_eq_1_of_walks_with_the_exact_steps():
    """A walk that stops too soon ends in a wrong step; none is right by luck."""
    texts = ("+7 10 +7 17", "+7 10", "+7 11 +7 18", "")
    group = [Sample(text, "stop") for text in texts]
    rewards.score([toy.walk_query(3, 17, "0")], [group], "walk", "answer+oracle")
    assert [s.steps for s in group] == [[1, 1, 1], [1, 0], [0, 0, 0], [0]]
    assert [s.reward for s in group] == [2, -1, -1, -1]
    assert {s.sound for s in group} == {None}
