"""data.py: the toy and its checker, loaders on small files of our own and on the real rows, prompts, batches."""
import gzip
import json
import random
from pathlib import Path

import pytest

import bstar
import data
import rewards
from data import Query, UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data sets in ../shared/data")


def config(*flags):
    return bstar.parse_config(list(flags))


# -- the toy ------------------------------------------------------------------------------------------------------------

def test_toy_solutions_are_right_and_splits_disjoint():
    splits = data.load_toy(config("--toy-queries", "600", "--toy-solutions", "200"))
    solved = [q for q in splits.train if q.solution]
    assert len(solved) == 200 and len(splits.train) == 600
    assert all(all(data.check_toy(q.text, q.solution)) and q.solution.endswith(f"# {q.gold}") for q in solved)
    questions = [q.text for q in splits.train + splits.val + splits.tests["toy"]]
    assert len(set(questions)) == len(questions)
    assert splits.train == data.load_toy(config("--toy-queries", "600", "--toy-solutions", "200")).train


def naive_truth(text):
    """A second, slow reading of a story: substitution until nothing is left to replace."""
    words = {"plus": "+", "minus": "-", "times": "*"}
    defs = {s.split()[0]: " ".join(words.get(w, w) for w in s.split()[2:]) for s in text.split(" . ")[:-1]}
    expr = f"( {text.split()[-2]} )"
    while any(name in expr.split() for name in defs):
        expr = " ".join(f"( {defs[w]} )" if w in defs else w for w in expr.split())
    return eval(expr) % 5                                      # our own story, not model text


def test_toy_answers_against_a_naive_reading():
    rng = random.Random()
    for i in range(300):
        q = data.toy_query(rng, 6, str(i))
        assert int(q.gold) == naive_truth(q.text), q


def test_any_change_of_one_token_breaks_a_step_unless_it_is_in_whose_the_numbers_are():
    """The checker accepts the right numbers alone: a single-token change of a right solution makes some step wrong, but for X, A and B in X = A op B = ..."""
    rng = random.Random()
    for i in range(20):
        q = data.toy_query(rng, 5, str(i))
        tokens = q.solution.split()
        for k in range(len(tokens)):
            other = rng.choice([w for w in data.TOY_WORDS if w not in (tokens[k], ";", "#")])
            changed = " ".join(tokens[:k] + [other] + tokens[k + 1:])
            gloss = k % 12 in (0, 2, 4) and k < len(tokens) - 2                         # a step and its ";" are 12 tokens, the last step is "# r"
            assert all(data.check_toy(q.text, changed)) == gloss, (q, changed)


def test_a_misread_sentence_is_another_number_and_a_wrong_step():
    """What a careless author writes: the first misread step is wrong although it is well formed, and its number is not the true one."""
    rng, misread, lucky = random.Random(), 0, 0
    for i in range(500):
        q = data.toy_query(rng, 5, str(i), slip=0.5)
        truth = dict(zip(data.parse_toy(q.text)[0], [None, *data._solve(data.parse_toy(q.text)[0]).values()]))
        right = data.check_toy(q.text, q.solution)
        for step, ok in zip(q.solution.split(" ; "), right):
            if not ok:
                assert step.split()[-1] != truth[step.split()[0]].split()[-1], (q, step)
                break
        misread, lucky = misread + (not all(right)), lucky + (not all(right) and q.solution.split()[-1] == q.gold)
    assert misread > 300 and 0.05 < lucky / misread < 0.3


def test_human_solutions_are_mostly_of_easy_stories():
    shown = [q for q in data.load_toy(config("--toy-queries", "4000", "--toy-solutions", "1500")).train if q.solution]
    assert len(shown) == 1500 and 0.05 < sum("times" in q.text for q in shown) / 1500 < 0.2


def test_too_few_different_stories_are_told_and_not_looked_for_for_ever():
    with pytest.raises(UserError, match="--toy-max-ops 2: there are hardly more than 5.. such stories, too few for 500 test questions"):
        data.load_toy(config("--toy-max-ops", "2"))


@pytest.mark.parametrize("response, right", [
    ("Bob = 3 * Ann = 3 * 4 = 2 ; Cid = Bob + Ann = 2 + 4 = 1 ; # 1", [True, True, True]),      # either order of + and *
    ("Cid = Ann + Bob = 4 + 2 = 1 ; # 1", [False, False]),                                      # Bob was never derived
    ("# 1", [False]),                                                                           # right answer, no reasoning
    ("Bob = Ann * 3 = 4 * 3 = 2 ; # 1", [True, False]),                                         # a lucky answer after a right step
    ("Bob = Ann * 3 = 4 * 3 = 1 ; Bob = Ann * 3 = 4 * 3 = 2 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1", [False, False, False, False]),
    ("Bob = Ann * 3 = 4 * 3 = 1 ; Cid = Ann + Bob = 4 + 2 = 1 ; # 1", [False, False, False]),   # a right number that was never derived
    ("", [False]), ("; ; ;", [False]), ("# 1 # 1", [False]), ("Cid = = = = = = = = = 1", [False]), ("Ann = 4 ; # 1", [False, False]),
])
def test_check_toy(response, right):
    assert data.check_toy("Ann has 4 . Bob has Ann times 3 . Cid has Ann plus Bob . Cid ?", response) == right


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
    assert "train: 1 of 62 rows dropped, a question twice (first: " in said and said.count("math.jsonl:61)") == 1
    assert "1 of 62 rows dropped, no gold answer (first: " in said and "1 of 62 rows dropped, in another split (first: " in said


@pytest.mark.parametrize("text, box", [("\\boxed{\\frac{1}{2}} and \\boxed{3", "\\frac{1}{2}"), ("none", None), ("\\fbox {a{b}c}", "a{b}c"), ("\\boxed{1}, \\boxed{2}", "1, 2"), ("\\boxed{", None), ("\\boxed 2.", "2"), ("\\boxed{}", "")])
def test_last_boxed(text, box):
    assert data.last_boxed(text) == box


@pytest.mark.parametrize("content, said", [
    (b"", "holds no rows"), (b"{}\n", "no text in column 'solution' .found: nothing. .first: .*f.jsonl:1"), (b'{"question": "x"}\n', "no text in column 'answer'"),
    (b'{"question": "x", "answer": "#### 1"}\nnot json\n', "f.jsonl:2: not JSON"), (b"[1]\n", "f.jsonl:1: expected a JSON object"), (b"\xff\xfe", "can't be read"),
    (b'{"question": "x", "answer": "no number"}\n', "none of its rows can be used: 1 of 1 rows dropped, no gold answer")])
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
def test_real_gsm8k(capsys):
    s = data.load_gsm8k(config("--task", "gsm8k", "--train-file", str(REAL / "gsm8k/train.jsonl.gz"), "--test-file", str(REAL / "gsm8k/test.jsonl")))
    assert (len(s.train), len(s.val), len(s.tests["test"])) == (7473 - 500, 500, 1319)
    assert all(float(q.gold) == int(float(q.gold)) for q in s.tests["test"]) and capsys.readouterr().err == ""


@real_rows
@pytest.mark.parametrize("train, dropped", [
    ("train12k", {"no gold answer": "2 of 12000", "a question twice": "2 of 12000"}),
    ("train,test", {"no gold answer": "2 of 12500", "a question twice": "2 of 12500", "in another split": "500 of 12500"})])
def test_real_math_is_appendix_a(capsys, train, dropped):
    s = data.load_math(config("--task", "math", "--train-file", ",".join(f"{REAL}/math/{name}.jsonl.gz" for name in train.split(",")),
                              "--test-file", f"{REAL}/math/math500.jsonl,{REAL}/gsm8k/test.jsonl"))
    assert {name: len(qs) for name, qs in s.tests.items()} == {"math500": 500, "test": 1319} and len(s.val) == 500
    assert len(s.train) == 11_500 - 4 and all(q.solution for q in s.train)                       # the paper's number less the rows dropped
    assert all(q.id.startswith("test/") for q in s.val) and sum(q.id.startswith("test/") for q in s.train) in range(3_990, 4_001)
    assert not data.texts(s.train) & data.texts(s.val) and not data.texts(s.train + s.val) & data.texts(s.tests["math500"])
    said = capsys.readouterr().err
    assert all(f"train: {n} rows dropped, {why} (first: " in said for why, n in dropped.items()) and said.count("\n") == len(dropped)


ARC = [{"id": f"a{i}", "question": f"Which is {i}?", "choices": {"text": [f"{i + k}" for k in range(n)], "label": [*labels[:n]]}, "answerKey": labels[i % n]}
       for i, (n, labels) in enumerate([(4, "ABCD"), (3, "ABC"), (5, "ABCDE"), (4, "1234"), (4, "ABCD")] * 4)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_arc_rows(tmp_path, ending):
    path = rows(tmp_path / "arc.jsonl", ARC)
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(ARC), path := str(tmp_path / "arc.parquet"))
    s = data.load_arc(config("--task", "arc", "--train-file", path, "--test-file", rows(tmp_path / "test.jsonl", [{**ARC[3], "question": "Else?"}])))
    assert (len(s.train), len(s.val)) == (16, 4) and not any(q.solution for q in s.train)
    assert s.tests["test"][0].text == "Else?\n(1) 3\n(2) 4\n(3) 5\n(4) 6" and s.tests["test"][0].gold == "4"


@real_rows
def test_real_arc(capsys):
    s = data.load_arc(config("--task", "arc", "--train-file", f"{REAL}/arc_challenge/train.jsonl,{REAL}/arc_challenge/validation.jsonl",
                             "--test-file", f"{REAL}/arc_challenge/test.jsonl"))
    assert (len(s.train), len(s.val), len(s.tests["test"])) == (1217, 200, 1172)
    assert "1 of 1418 rows dropped, a question twice" in capsys.readouterr().err
    every = s.train + s.val + s.tests["test"]
    assert {q.gold for q in every} == {*"ABCDE1234"} and all(f"\n({q.gold}) " in q.text for q in every)


def apps(tests, **row):
    return {"question": "Add.", "solutions": '["print(sum(map(int, input().split())))"]', "input_output": tests if isinstance(tests, str) else json.dumps(tests),
            "starter_code": "", **row}


SUM = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
BAD_ROWS = {
    "gsm8k": [({"question": "x", "answer": None}, "no text in column 'answer'"), ({"question": " ", "answer": "#### 1"}, "no question"), ({"question": "x", "answer": "1"}, "no gold")],
    "math": [({"problem": "x", "solution": "no box"}, "no gold"), ({"problem": "x", "solution": None}, "no text in column 'solution'"), ({"problem": 3, "answer": "1"}, "'problem'")],
    "arc": [({**ARC[0], "answerKey": "E"}, "none of the choices' labels"), ({**ARC[0], "choices": {"text": [], "label": []}}, "no question with choices"),
            ({**ARC[0], "choices": None}, "no question with choices"), ({**ARC[0], "choices": [1]}, "no question with choices"), ({**ARC[0], "answerKey": None}, "no question"),
            ({**ARC[0], "choices": {"text": ["a"], "label": ["A", "B"]}}, "no question with choices"), ({**ARC[0], "choices": {"text": ["a", "b"], "label": [[], "A"]}}, "no question with choices"),
            ({**ARC[0], "choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "none of the"), ({**ARC[0], "choices": {"text": ["a", "b"], "label": ["A", "Z"]}}, "none of the")],
    "code": [(apps(""), "no tests"), (apps("null"), "no tests"), (apps("{broken"), "broken JSON in column 'input_output'"), (apps("[" * 99_999), "broken JSON"), (apps("9" * 5000), "broken JSON"),
             (apps([]), "another form"), (apps({"inputs": [], "outputs": []}), "no tests"), (apps({"inputs": ["1"], "outputs": []}), "another form"), (apps({"inputs": [1], "outputs": [1]}), "another form"),
             (apps({"inputs": ["1"] * 3000, "outputs": ["1"] * 3000}), "more than 1,000 tests"), (apps({"inputs": ["1" * 200_000], "outputs": ["1"]}), "more than 100 kB"),
             (apps({"inputs": [3], "outputs": [4], "fn_name": "f"}), "another form"), (apps({**SUM, "fn_name": 7}), "another form"), (apps(SUM, solutions="[broken"), "broken JSON in column 'solutions'"),
             (apps(SUM, solutions='{"a": 1}'), "no list of programs"), (apps(SUM, solutions="[1]"), "no list of programs"), (apps(SUM, question=None), "no text in column 'question'"),
             ({"text": "x", "code": "y", "test_list": ["assert f(1) =="]}, "no Python"), ({"text": "x", "code": "y", "test_list": None}, "no tests"), ({"text": "x", "code": "y", "test_list": ["#" * 200_000]}, "no tests"),
             ({"prompt": "def f():", "entry_point": "f", "canonical_solution": "", "test": "x = 1"}, "no tests"), ({"inputs": 1}, "no text in column 'input_output'")],
}
GOOD = {"gsm8k": GSM, "math": MATH, "arc": ARC, "code": [apps({"inputs": [f"{i} 2\n"], "outputs": [f"{i + 2}\n"]}, question=f"Add {i}.") for i in range(12)]}


@pytest.mark.parametrize("task", BAD_ROWS)
def test_bad_rows_are_skipped_with_a_count_and_the_first_ones_place(tmp_path, capsys, task):
    test = rows(tmp_path / "test.jsonl", [{**GOOD[task][0], "question": "Else?", "problem": "Else?"}] if task != "gsm8k" else GSM[:1])
    for row, why in BAD_ROWS[task]:
        train = rows(tmp_path / "train.jsonl", [*GOOD[task][1:], row, row])
        s = data.LOADERS[task](config("--task", task, "--train-file", train, "--test-file", test))
        said = capsys.readouterr().err
        assert len(s.train) + len(s.val) == len(GOOD[task]) - 1, row
        n = len(GOOD[task])
        assert data.re.search(rf"train: 2 of {n + 1} rows dropped, [^\n]*({why})[^\n]*\(first: {train}:{n}\)\n", said), (said, why)
        with pytest.raises(UserError, match="none of its rows can be used: 2 of 2 rows dropped") as e:
            data.LOADERS[task](config("--task", task, "--train-file", rows(tmp_path / "train.jsonl", [row, row]), "--test-file", test))
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("task, train, tests", [
    ("gsm8k", ["openai/gsm8k/main[train]"], {"gsm8k": "openai/gsm8k/main[test]"}),
    ("math", [f"EleutherAI/hendrycks_math/{s}[{split}]" for split in ("train", "test") for s in data.MATH_SUBJECTS],
     {"math500": "HuggingFaceH4/MATH-500/[test]", "gsm8k": "openai/gsm8k/main[test]"}),
    ("arc", ["allenai/ai2_arc/ARC-Challenge[train]", "allenai/ai2_arc/ARC-Challenge[validation]"], {"arc": "allenai/ai2_arc/ARC-Challenge[test]"}),
    ("code", ["hf://datasets/codeparrot/apps/train.jsonl/[train]"], {"apps": "hf://datasets/codeparrot/apps/test.jsonl/[test]", "mbpp": "google-research-datasets/mbpp/full[test]"})])
def test_what_is_read_from_the_hub(monkeypatch, task, train, tests):
    """No network here: the public names asked for, and rows of each one's columns (MATH-500 and GSM8K have an answer, hendrycks_math has none)."""
    read = []

    def rows_of(name, config, split):
        read.append(at := f"{name}/{config or ''}[{split}]")
        for i in range(10):
            row = {"question": f"{at} {i}", "answer": "#### 1"} if "gsm8k" in at else {"problem": f"{at} {i}", "solution": r"\boxed{1}"} if task == "math" else \
                {**ARC[i], "question": f"{at} {i}"} if task == "arc" else apps(SUM, question=f"{at} {i}")
            yield f"{at}:{i}", row
    monkeypatch.setattr(data, "hub_rows", rows_of)
    s = data.LOADERS[task](config("--task", task))
    assert sorted(read) == sorted([*train, *tests.values()]) and {name: len(qs) for name, qs in s.tests.items()} == dict.fromkeys(tests, 10)
    assert len(s.train) + len(s.val) == 10 * len(train) and len({q.id for q in s.train + s.val}) == 10 * len(train)
    assert all(q.solution for q in s.train) == (task != "arc") and (task != "math" or all("[test]" in q.id for q in s.val))


def test_code_rows(tmp_path):
    call = apps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, question="Call.", starter_code="def add(a, b):\n\t", solutions=json.dumps([f"# {i}\n" for i in range(9)]))
    train = rows(tmp_path / "train.jsonl", [*GOOD["code"], call])
    mbpp = {"text": "Add two.", "code": "def f(x):\r\n    return x + 2", "test_list": ["assert f(1) == 3"], "test_setup_code": "", "task_id": 1}
    he = {"task_id": "HumanEval/0", "prompt": "def g(x):\n    # x + 1\n", "entry_point": "g", "canonical_solution": "    return x + 1", "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
    tests = ",".join([rows(tmp_path / "mbpp.jsonl", [mbpp]), rows(tmp_path / "he.jsonl", [he])])
    s = data.load_code(config("--task", "code", "--train-file", train, "--test-file", tests, "--val-queries", "1"))
    q = next(q for q in s.train + s.val if "Call." in q.text)
    assert q.text == "Call.\n\ndef add(a, b):\n\t\nUse Call-Based format" and len({q.solution, *q.more_solutions}) == 5
    [m], [h] = s.tests["mbpp"], s.tests["he"]
    assert "assert f(1) == 3" in m.text and m.solution == "def f(x):\n    return x + 2"
    said = ["```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return a * b", m.solution, "def f(x): return 3", "def f(x): return x", he["prompt"] + he["canonical_solution"], he["prompt"]]
    assert rewards.grade(said, [q.gold, q.gold, m.gold, m.gold, m.gold, h.gold, h.gold], "code") == [True, False, True, True, False, True, False]
    assert not any(json.loads(x.gold)["unsafe"] for x in s.train + [m, h])


@real_rows
def test_real_code():
    s = data.load_code(config("--task", "code", "--train-file", f"{REAL}/apps/train.jsonl", "--test-file", f"{REAL}/apps/test.jsonl,{REAL}/mbpp/mbpp.jsonl,{REAL}/humaneval/HumanEval.jsonl.gz"))
    assert (len(s.train) + len(s.val), {name: len(qs) for name, qs in s.tests.items()}) == (508, {"test": 4, "mbpp": 974, "HumanEval": 164})
    solved = [(q, y) for q in s.train + s.val for y in (q.solution, *q.more_solutions) if y]
    assert len(solved) == 21 and sum(rewards.grade([y for _, y in solved], [q.gold for q, _ in solved], "code")) >= 18   # problem 2287 takes several answers
    some = s.tests["mbpp"][:100]
    assert all(rewards.grade([q.solution for q in some], [q.gold for q in some], "code")) and not any(rewards.grade(["pass"] * 100, [q.gold for q in some], "code"))


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
