"""data.py: the toy and its checker, loaders on small files of our own and on the real rows, prompts, batches."""
import gzip
import json
import random
from pathlib import Path

import pytest

import bstar
import data
from data import Query, UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data sets in ../shared/data")


def config(*flags):
    return bstar.parse_config(list(flags))


# -- the toy ------------------------------------------------------------------------------------------------------------

def test_toy_solutions_are_right_and_splits_disjoint():
    splits = data.load_toy(config("--toy-queries", "400", "--toy-solutions", "300"))
    solved = [q for q in splits.train if q.solution]
    assert len(solved) == 300 and len(splits.train) == 400
    assert all(all(data.check_toy(q.text, q.solution)) and q.solution.endswith(f"# {q.gold}") for q in solved)
    questions = [q.text for q in splits.train + splits.val + splits.tests["toy"]]
    assert len(set(questions)) == len(questions)
    assert splits.train == data.load_toy(config("--toy-queries", "400", "--toy-solutions", "300")).train


def naive_truth(text):
    """A second, slow reading of a story: substitution until nothing is left to replace."""
    defs = {}
    for sentence in text.split(" . ")[:-1]:
        words = sentence.split()
        defs[words[0]] = words[2] if len(words) == 3 else {
            "times": "{1} * {0}", "more": "{1} + {0}", "less": "{1} - {0}", "and": "{0} + {1}"}[words[3]].format(words[2], words[-1])
    expr = f"( {text.split()[-2]} )"
    while any(name in expr.split() for name in defs):
        expr = " ".join(f"( {defs[w]} )" if w in defs else w for w in expr.split())
    return eval(expr) % 10                                     # our own story, not model text


def test_toy_answers_against_a_naive_reading():
    rng = random.Random()
    for i in range(300):
        q = data.toy_query(rng, 6, str(i))
        assert int(q.gold) == naive_truth(q.text), q


def test_any_change_of_one_token_breaks_a_step_unless_it_only_swaps_operands():
    """The checker accepts exactly the right tokens: every single-token change of a right solution makes some step wrong."""
    rng = random.Random()
    for i in range(20):
        q = data.toy_query(rng, 5, str(i))
        tokens = q.solution.split()
        for k in range(len(tokens)):
            other = rng.choice([w for w in data.TOY_WORDS if w != tokens[k]])
            changed = " ".join(tokens[:k] + [other] + tokens[k + 1:])
            assert not all(data.check_toy(q.text, changed)), (q, changed)


@pytest.mark.parametrize("response, right", [
    ("Cid = 6 * Ida = 6 * 5 = 0 ; Ann = Cid + Ida = 0 + 5 = 5 ; # 5", [True, True, True]),      # either order of + and *
    ("Ann = Ida + Cid = 5 + 0 = 5 ; # 5", [False, False]),                                      # Cid was never derived
    ("# 5", [False]),                                                                           # right answer, no reasoning
    ("Cid = Ida * 6 = 5 * 6 = 0 ; # 5", [True, False]),                                         # a lucky answer after a right step
    ("Cid = Ida * 6 = 5 * 6 = 1 ; Cid = Ida * 6 = 5 * 6 = 0 ; Ann = Ida + Cid = 5 + 0 = 5 ; # 5", [False, True, True, True]),
    ("", [False]), ("; ; ;", [False, False]), ("# 5 # 5", [False]), ("Ann = = = = = = = = = 5", [False]),
])
def test_check_toy(response, right):
    assert data.check_toy("Ida has 5 . Cid has 6 times Ida . Ann has Ida and Cid . Ann ?", response) == right


# -- rows and loaders -----------------------------------------------------------------------------------------------------

def rows(path, objects):
    text = "".join(json.dumps(o) + "\n" for o in objects)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


GSM = [{"question": f"Tom has {i} pens and buys {i}. How many?", "answer": f"He has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(1, 41)]
MATH = [{"problem": f"What is ${i}+1$?", "solution": f"It is $\\boxed{{{i + 1}}}$.", "unique_id": f"{'test' if i % 2 else 'train'}/a/{i}"} for i in range(60)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_gsm8k_from_local_files(tmp_path, ending):
    train = tmp_path / f"train.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(GSM), train)
    else:
        rows(train, GSM)
    test = rows(tmp_path / "mine.jsonl", [{"question": "1,000 + 1?", "answer": "1,000 + 1 = 1,001\n#### 1,001"}, GSM[0]])
    s = data.load_gsm8k(config("--task", "gsm8k", "--train-file", str(train), "--test-file", test))
    assert [q.gold for q in s.tests["mine"]] == ["1001", "2"]
    assert len(s.train) + len(s.val) == 39 and len(s.val) == 7 and not data.texts(s.train + s.val) & data.texts(s.tests["mine"])   # the overlap is dropped
    assert all(q.solution.endswith("#### " + q.gold) for q in s.train)


def test_math_split_takes_validation_from_the_test_part(tmp_path, capsys):
    train = rows(tmp_path / "math.jsonl", MATH + [MATH[0], {"problem": "Empty?", "solution": "\\boxed{}"}])
    test = ",".join([rows(tmp_path / "math500.jsonl", [{**MATH[1], "answer": "2"}]), rows(tmp_path / "gsm.jsonl", GSM[:3])])
    s = data.load_math(config("--task", "math", "--train-file", train, "--test-file", test, "--val-queries", "2"))
    assert {name: len(qs) for name, qs in s.tests.items()} == {"math500": 1, "gsm": 3}
    assert len(s.val) == 2 and all(q.id.startswith("test/") for q in s.val) and len(s.train) == 60 - 1 - 2
    said = capsys.readouterr().err
    assert "1 of 62 rows twice" in said and "1 of 62 rows without a gold answer" in said and "1 of 62 rows in another split" in said


@pytest.mark.parametrize("text, box", [("\\boxed{\\frac{1}{2}} and \\boxed{3", "\\frac{1}{2}"), ("none", None), ("\\fbox {a{b}c}", "a{b}c"), ("\\boxed{1}, \\boxed{2}", "2"), ("\\boxed{", None)])
def test_last_boxed(text, box):
    assert data.last_boxed(text) == box


@pytest.mark.parametrize("content, said", [
    (b"", "holds no rows"), (b"{}\n", "f.jsonl:1: no column 'question' or 'problem'|no column 'problem'"), (b'{"question": "x"}\n', "f.jsonl:1: no column 'answer'"),
    (b'{"question": "x", "answer": "#### 1"}\nnot json\n', "f.jsonl:2: not JSON"), (b"[1]\n", "f.jsonl:1: expected a JSON object"), (b"\xff\xfe", "can't be read"),
    (b'{"question": "x", "answer": "no number"}\n', "none of its 1 rows can be used")])
def test_bad_files_are_one_line(tmp_path, content, said):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as e:
        data.load_gsm8k(config("--task", "gsm8k", "--train-file", str(tmp_path / "f.jsonl"), "--test-file", rows(tmp_path / "t.jsonl", GSM[:2])))
    assert "\n" not in str(e.value)


def test_test_sets_need_names_of_their_own(tmp_path):
    (tmp_path / "b").mkdir()
    a, b, val = (rows(tmp_path / n, GSM[:2]) for n in ("test.jsonl", "b/test.jsonl", "val.jsonl"))
    for spec in (f"{a},{b}", val):
        with pytest.raises(UserError, match="a test set can't be called"):
            data.load_gsm8k(config("--task", "gsm8k", "--train-file", rows(tmp_path / "t.jsonl", GSM), "--test-file", spec))


def test_too_few_rows_to_hold_any_out(tmp_path):
    with pytest.raises(UserError, match="4 usable rows are too few"):
        data.load_gsm8k(config("--task", "gsm8k", "--train-file", rows(tmp_path / "t.jsonl", GSM[:4]), "--test-file", rows(tmp_path / "x.jsonl", GSM[9:])))


def test_missing_file_wrong_kind_and_torn_gzip(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    for path, said in [("nowhere.jsonl", "no such file"), ("a.csv", "expected a .jsonl"), ("b.jsonl.gz", "can't be read"), ("c.parquet", "can't be read")]:
        with pytest.raises(UserError, match=said):
            list(data.read_rows(str(tmp_path / path)))


def test_a_hub_name_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="can't load openai/gsm8k from the hub .*--train-file") as e:
        list(data.hub_rows("openai/gsm8k", "main", "train"))
    assert "\n" not in str(e.value)


@real_rows
def test_real_gsm8k():
    s = data.load_gsm8k(config("--task", "gsm8k", "--train-file", str(REAL / "gsm8k/train.jsonl.gz"), "--test-file", str(REAL / "gsm8k/test.jsonl")))
    assert (len(s.train), len(s.val), len(s.tests["test"])) == (7473 - 500, 500, 1319)
    assert all(float(q.gold) == int(float(q.gold)) for q in s.tests["test"])


@real_rows
def test_real_math_is_appendix_a(capsys):
    s = data.load_math(config("--task", "math", "--train-file", str(REAL / "math/train12k.jsonl.gz"),
                              "--test-file", f"{REAL}/math/math500.jsonl,{REAL}/gsm8k/test.jsonl"))
    assert len(s.tests["math500"]) == 500 and len(s.tests["test"]) == 1319 and len(s.val) == 500
    assert 11_490 <= len(s.train) <= 11_500 and all(q.id.startswith("test/") for q in s.val)     # 11,500 less empty and repeated rows
    assert "without a gold answer" in capsys.readouterr().err


# -- prompts and batches ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    data.make_toy_model(folder, seed=0)
    return bstar.load_tokenizer(folder)


def test_toy_tokenizer_gives_every_text_back(tokenizer):
    q = data.toy_query(random.Random(), 6, "x")
    for text in (q.text, q.solution):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_prompts_of_base_and_chat_models(tokenizer):
    splits = data.Splits([], [], {}, "Question: {query}\nAnswer:\n", "{query} Use \\boxed{{}}.")
    base = data.prompt_ids(tokenizer, Query("0", "Ann ?", "1"), splits, chat=False)
    assert base[0] == tokenizer.bos_token_id and tokenizer.decode(base[1:]).endswith("Ann ? <unk>")
    tokenizer.chat_template = "{% for m in messages %}# {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
    chat = data.prompt_ids(tokenizer, Query("0", "Ann ?", "1"), splits, chat=True)
    assert tokenizer.decode(chat).split()[:3] == ["#", "Ann", "?"] and tokenizer.decode(chat).endswith("=")
    tokenizer.chat_template = None


def test_braces_in_a_question_survive_the_template():
    splits = data.Splits([], [], {}, "{query}\n", "{query}")
    assert splits.base.format(query="a_{1} {x}") == "a_{1} {x}\n"


def test_example_ends_with_eos_and_drops_the_over_long(tokenizer):
    ids, n = data.example(tokenizer, [1, 5], "Ann = 5", 10)
    assert n == 2 and ids[-1] == tokenizer.eos_token_id and len(ids) == 6
    assert data.example(tokenizer, [1, 5], "Ann = 5", 5) is None


def test_micro_batches_hold_every_row_once_within_budget():
    rng = random.Random()
    examples = [([i] * rng.randint(1, 60), 1) for i in range(100)]
    seen = []
    for rows_, n in data.micro_batches(examples, 200):
        assert len(rows_) == len(n) and (len(rows_) == 1 or len(rows_) * max(map(len, rows_)) <= 200)
        seen += [r[0] for r in rows_]
    assert sorted(seen) == list(range(100))
