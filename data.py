"""Data: the records, one loader a task, prompts, and batches of token ids.

    rows -> Query -> prompt ids -> [engine] -> Sample -> (ids, n_prompt) -> micro-batches

A task is one loader, a function Config -> Splits, and a line in each of config.LOADERS,
config.PRESETS and grader.GRADERS. `train` queries that have a human `solution` are also the SFT
set, `val` queries choose checkpoints, and the named `tests` are only reported. A loader of real
rows is a function that makes a Query of one row (`math_row`, `arc_row`, `code_row`), the places of
the rows on the hub, and two prompts.
"""

from __future__ import annotations

import ast
import functools
import gzip
import json
import os
import random
import re
import select
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

# -- records and errors ----------------------------------------------------------------------------


# frozen, so that prompts can be cached by query
@dataclass(frozen=True)
class Query:
    """x: one question."""

    id: str
    text: str
    gold: str  # a*, never shown to the policy; for code the tests, as JSON
    solution: str = ""  # a human y, where there is one
    more_solutions: tuple[str, ...] = ()  # further human y's (code)


@dataclass
class Sample:
    """y^: one response to a query; `rewards.score` fills all fields but the first two."""

    response: str
    finish_reason: str  # "stop" by the policy; "length" if it was cut off, and is never selected
    pred: str | None = None  # a^
    correct: bool = False  # 1[a^ = a*]
    sound: bool | None = None  # every step is right as well; None outside of toy.LUCKY's tasks
    steps: list[float] = field(default_factory=list)  # scores in [0, 1]; empty without a PRM
    r_prm: float | None = None  # 2 min(steps) - 1
    reward: float = float("-inf")  # r of Eq. 1; -inf for a cut-off response: no tau selects it


@dataclass
class Splits:
    """What a loader returns."""

    train: list[Query]
    val: list[Query]
    tests: dict[str, list[Query]]
    base: str  # the prompt of a base model, around {query}
    chat: str  # the user's turn for a chat model, around {query}
    human: list[Query] = field(default_factory=list)  # the SFT set, where it is not train's own


class UserError(Exception):
    """Something that the user can mend, in one line."""


class BadRow(Exception):
    """A row that cannot be used, and why. `clean` counts it and goes on."""


# -- rows of a file or of the hub ------------------------------------------------------------------

Row = tuple[str, dict]  # its place, "FILE:LINE" or "NAME/CONFIG[SPLIT]:NUMBER", and its columns


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, each with its place.

    raises UserError  at once where there is no such file; while it is read, where it is empty or
                      torn, or a line is no JSON object
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    return _numbered_rows(path)


def _numbered_rows(path: str) -> Iterator[Row]:
    n = 0
    try:
        for n, line in enumerate(_lines(path), 1):
            if isinstance(line, str) and line.isspace():
                continue
            row = json.loads(line) if isinstance(line, str) else line
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield f"{path}:{n}", row
    # zlib.error: damaged inside a .gz; RecursionError: nesting without end
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as e:
        kinds = "expected a .parquet file, or JSON objects, one a line"
        raise UserError(f"{path}:{n}: can't be read ({_one_line(e)}); {kinds}") from None
    if n == 0:
        raise UserError(f"{path}: the file holds no rows")


def _lines(path: str) -> Iterator[str | dict]:
    if path.endswith(".parquet"):
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from lines


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a data set on the hub, or of a folder that `datasets` can read.

    raises UserError  the data set cannot be loaded
    """
    check_hub(name)
    try:
        import datasets

        datasets.disable_progress_bars()
        # datasets 4 refuses APPS, a repository with a loading script; its JSON lines need none
        if name.startswith("hf://"):
            rows = datasets.load_dataset("json", data_files=name, split="train")
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as e:  # a dozen kinds mean "no network", and the way out is the same for all
        way_out = "give local copies by --train-file and --test-file, or --annotations"
        raise UserError(f"can't load {name} from the hub ({_one_line(e)}); {way_out}") from None
    for i, row in enumerate(rows):
        yield f"{name}/{config or ''}[{split}]:{i}", row


@functools.cache
def check_hub(name: str | Path) -> None:
    """Turns the hub's libraries offline where it does not answer, unless `name` is local.

    What they have cached still loads.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if Path(name).exists():
        return
    # the libraries would ask for each file six times, half a minute a file
    try:
        # any answer will do, even "forbidden": only silence means offline
        get_session().head(constants.ENDPOINT, timeout=8)
    except Exception:  # the session's library differs by version, and so do its exceptions
        constants.HF_HUB_OFFLINE = True


def hub_reason(e: Exception) -> str:
    """An exception of the hub's libraries as the one line that a user needs."""
    line = _one_line(e)
    if "Repo id must" in line:  # a path, or a text with blanks
        return "no such folder, and no name that the hub could have"
    if "gated" in line:
        return "it is gated: accept the terms on its page, then `hf auth login`"
    if re.search("connect|offline", str(e), re.I):
        way_out = "download the model elsewhere and give its folder"
        return f"not a local folder, and the hub can't be reached; {way_out}"
    return line


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__


def column(row: dict, name: str) -> str:
    """The text in a column; raises BadRow where there is none."""
    if isinstance(row.get(name), str):
        return row[name]
    columns = ", ".join(sorted(row)) or "nothing"
    raise BadRow(f"no text in column {name!r} (found: {columns})")


def json_column(row: dict, name: str):
    """What the JSON text of a column holds, None where it has none; raises BadRow."""
    try:
        return json.loads(row.get(name) or "null")
    # TypeError: not a text; the others: numbers without end, nesting without end
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"broken JSON in column {name!r}") from None


def _texts_only(values: Iterable) -> bool:
    return all(isinstance(value, str) for value in values)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, [] without one; a line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    # bytes that are no UTF-8 cost their line, not the file
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


# -- rows to queries, queries to splits ------------------------------------------------------------

MakeQuery = Callable[[str, dict], Query]  # of a row's place and its columns
HubPlace = tuple[str, str | None, str]  # name, config, split


def load(
    cfg, make: MakeQuery, train: list[HubPlace], tests: dict[str, HubPlace], prompts: tuple
) -> Splits:
    """The splits of a task with real rows; `prompts` are Splits.base and Splits.chat.

    The rows come from --train-file and --test-file, without these from `train` and `tests` on the
    hub. No training question is in a test set. The validation set is drawn from the training rows.
    """
    # nothing is read before all sources stand, so that a wrong path shows before a download
    if cfg.train_file:
        parts = [read_rows(path) for path in cfg.train_file.split(",")]
    else:
        parts = [hub_rows(*place) for place in train]
    if cfg.test_file:
        test_rows = _local_tests(cfg.test_file.split(","))
    else:
        test_rows = {name: hub_rows(*place) for name, place in tests.items()}
    test_sets = {name: clean(rows, make, f"{name} test") for name, rows in test_rows.items()}
    # the tests are read first: a question of theirs leaves training, not the other way round
    taken = {folded(query) for query in chain.from_iterable(test_sets.values())}
    queries = clean(chain.from_iterable(parts), make, "train", taken)
    # drawn by the task's name, so that runs of all seeds validate on the same questions
    val, rest = hold_out(queries, cfg.val_queries, f"{cfg.task} val")
    return Splits(rest, val, test_sets, *prompts)


def _local_tests(paths: list[str]) -> dict[str, Iterator[Row]]:
    """Each file of --test-file is a test set, named without its endings."""
    # the name opens log keys (val/pass@1), where two of one name would overwrite each other
    named = {Path(path).name.split(".")[0]: read_rows(path) for path in paths}
    if len(named) < len(paths) or named.keys() & {"train", "val", "pool", "selected"}:
        why = "a test set can't be called as another or by a word of the log (train, val, ...)"
        raise UserError(f"--test-file {','.join(paths)}: {why}; rename the file")
    return named


def clean(
    rows: Iterable[Row], make: MakeQuery, name: str, taken: set[str] = frozenset()
) -> list[Query]:
    """The queries that `make` makes of the rows; stderr says how many rows are dropped, and why.

    Dropped are bad rows, rows without a gold answer, and questions seen before or in `taken`.

    raises UserError  no row is left
    """
    queries: list[Query] = []
    dropped: dict[str, list[str]] = {}  # why -> where
    seen = dict.fromkeys(taken, "in another split")  # a question -> why it can't come again
    total = 0
    for total, (where, row) in enumerate(rows, 1):
        try:
            query = make(where, row)
            _check(query, seen)
            queries.append(query)
        except (BadRow, UnicodeEncodeError) as e:
            dropped.setdefault(str(e), []).append(where)
    lines = []
    for why, places in dropped.items():
        lines.append(f"{len(places)} of {total} rows dropped, {why} (first: {places[0]})")
    if not queries:
        raise UserError(f"{name}: none of its {total} rows can be used ({'; '.join(lines[:3])})")
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    return queries


def _check(query: Query, seen: dict[str, str]) -> None:
    """Adds a question to `seen`; raises BadRow where it is no use."""
    text = folded(query)
    f"{text}{query.gold}{query.solution}".encode()  # half a surrogate pair cannot be written
    if not text:
        raise BadRow("no question")
    if not query.gold:
        raise BadRow("no gold answer")
    if text in seen:
        raise BadRow(seen[text])
    seen[text] = "a question twice"


def folded(query: Query) -> str:
    """The question with white space folded: two queries are the same one if these are equal."""
    return " ".join(query.text.split())


def hold_out(queries: list[Query], n: int, seed: str) -> tuple[list[Query], list[Query]]:
    """n queries drawn uniformly for validation, and the rest.

    Where some queries are of a data set's test part, as MATH's are [App. A], they alone are drawn
    from, and stand first in the rest. At most a fifth is drawn.
    """
    # by MATH's unique_id, or by the row's place on the hub
    of_test = [q for q in queries if q.id.startswith("test/") or "[test]" in q.id]
    pool = of_test or queries
    if len(pool) < 5:
        raise UserError(f"--train-file: {len(pool)} usable rows are too few to hold any out")
    drawn = random.Random(seed).sample(range(len(pool)), min(n, len(pool) // 5))
    val = [pool[i] for i in sorted(drawn)]
    held_out = set(val)
    # dict.fromkeys: what is in pool stands in queries as well
    rest = [q for q in dict.fromkeys(pool + queries) if q not in held_out]
    return val, rest


# -- GSM8K and MATH --------------------------------------------------------------------------------

# a pattern can't pair braces, so these tokens are counted
_BOX_TOKEN = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$\\]*[^\s{}$\\.,;])"  # \boxed 2
    r"|(?P<brace>\{)|(?P<close>\})|\\.",  # \{ is no brace
    re.S,
)
# what may stand between two boxes of one list, beside these joints
_NO_WORD = re.compile(
    r"\\(?:text|mbox|textrm|q?quad)(?![a-z])|\\[()\[\],;:! ]|[\s$~{}]"
    r"|[a-zA-Z](?:\([a-z]\))?\s*=\s*$"  # y = or f(x) =
)
# what tells that a box is a part of an answer, or none: -\boxed{5}, \sqrt{\boxed{5}}, \boxed{5}^2
_BEFORE = re.compile(
    r"(?:[^\s-]|[$(=] )[-+/^]$|(?:^|[\s$])-$|\\(?:sqrt|frac)\{(?:[^{}]*\}\{)?$"
    r"|(?:\bnot|n't)(?: be)? ?\$*$"
)
_BEHIND = re.compile(r"\^(?!\{?\\circ)|\s*[+*/]\s*[\d\\]")
_JOINTS = (",", ";", "and", ",and", ";and", "or", ",or", ";or")


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each complete outermost \boxed and \fbox, in one pass."""
    opened: list[re.Match] = []
    boxes: list[tuple[int, int, slice]] = []
    for token in _BOX_TOKEN.finditer(text):
        kind = token.lastgroup
        if kind in ("box", "brace"):
            opened.append(token)
        elif kind == "bare":
            boxes.append((*token.span(), slice(*token.span("bare"))))
        # a closing brace without an opening one is text; \frac{..} and others only pair braces
        elif kind == "close" and opened and (first := opened.pop()).lastgroup == "box":
            while boxes and boxes[-1][0] > first.start():  # it lies inside this one
                boxes.pop()
            boxes.append((first.start(), token.end(), slice(first.end(), token.start())))
    # only now: to copy the content of every inner box would take quadratic time
    return [(start, end, text[content].strip()) for start, end, content in boxes]


def last_boxed(text: str, of_gold: bool = True) -> str | None:
    r"""The content of the last complete outermost \boxed{...} or \fbox{...}, None without one.

    Boxes joined by commas or "and" are one list. Those joined by "or" are one in a response, and
    two ways to write a gold, of which the last is taken. A response whose box is only a part of an
    answer has none, "".

    >>> last_boxed(r"so $\boxed{\frac{1}{2}}$."), last_boxed(r"$\boxed 2$, and $x = \boxed{3}$")
    ('\\frac{1}{2}', '2, 3')
    >>> last_boxed(r"\boxed{1} or \boxed{2}"), last_boxed(r"\boxed{1} or \boxed{2}", of_gold=False)
    ('2', '1, 2')
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    start, end, last = boxes.pop()
    is_part = _BEFORE.search(text, max(0, start - 50), start) or _BEHIND.match(text, end)
    if is_part and not of_gold:
        return ""
    contents = [last]  # the last box first
    for left, end, content in reversed(boxes):
        # a longer gap is prose between two results
        gap = text[end:start]
        joint = _NO_WORD.sub("", gap) if len(gap) < 100 else ""
        if joint not in _JOINTS:
            break
        if joint.endswith("or") and of_gold:
            return last
        contents.append(content)
        start = left
    return ", ".join(reversed(dict.fromkeys(contents)))


# The golds of MATH that its boxes do not give: a problem's beginning -> the right answer, or "" if
# any of several is right. Found by reading all 75 of the 12,500 solutions whose boxes differ.
_MATH_GOLDS = {
    # train/precalculus/982, train/precalculus/865, train/intermediate_algebra/396
    r"Find the phase shift of the graph of $y = \sin (3x - \pi)": r"\frac{\pi}{3}",
    r"Find a unit vector that is orthogonal to both $\begin{pmatrix} 1 \\ 1 \\ 0 ": "",
    r"The hyperbola \[-x^2+2y^2-10x-16y+1=0\]has two foci": "",
    # test/prealgebra/177, test/algebra/1730, test/intermediate_algebra/747, /25 and /702
    r"Let $\boxed{N}$ mean the number of whole number divisors": "6",
    r"The sum of a 15-term arithmetic series with first term 7 ": "-3",
    r"The graph of $y = f(x)$ passes through the point $(-3,5)": "(3,-5)",
    r"Find the coordinates of one of the foci of the hyperbola \[x^2 - 10x =": "",
    r"Find the coordinates of either of the vertices of the hyperbola \[16x^2": "",
}
_ASKS_FOR_ALL = re.compile("separated by|all possible|find all", re.I)


def _math_gold(problem: str, solution: str) -> str:
    """The last box of a solution, or all its boxes where the problem asks for several answers."""
    for beginning, gold in _MATH_GOLDS.items():
        if problem.startswith(beginning):
            if not gold:
                raise BadRow("several answers are right")
            return gold
    if _ASKS_FOR_ALL.search(problem):
        return ", ".join(dict.fromkeys(content for _, _, content in _boxes(solution)))
    return last_boxed(solution) or ""


def math_row(where: str, row: dict) -> Query:
    """A row of MATH (`problem`, `solution`, maybe `answer`) or of GSM8K (`question`, `answer`)."""
    name = where.rpartition("/")[2]
    if "question" in row and "problem" not in row:
        solution = column(row, "answer").strip()
        # without the mark there is no gold, and rpartition would give the whole text
        _, mark, gold = solution.rpartition("####")  # the last line is "#### n"
        gold = gold.strip().replace(",", "") if mark else ""
        return Query(name, column(row, "question").strip(), gold, solution)
    problem = column(row, "problem").strip()
    if not isinstance(row.get("answer"), str):
        solution = column(row, "solution")
        answer = _math_gold(problem, solution)
    else:
        solution = row["solution"] if isinstance(row.get("solution"), str) else ""
        answer = row["answer"].strip()
        # MATH500's answer is the last box again; one of the user's own is left as it is
        if answer in [content for _, _, content in _boxes(solution)[-1:]]:
            answer = _math_gold(problem, solution)
    return Query(str(row.get("unique_id") or name), problem, answer, solution.strip())


GSM8K_PROMPTS = (
    "Question: {query}\nAnswer:\n",
    "{query}\nReason step by step, and end with the final number alone on a line, after '#### '.",
)
MATH_PROMPTS = (
    "Problem:\n{query}\n\nSolution:\n",
    "{query}\nReason step by step, and put the final answer within \\boxed{}.",
)
MATH_SUBJECTS = """algebra counting_and_probability geometry intermediate_algebra number_theory
prealgebra precalculus""".split()


def load_gsm8k(cfg) -> Splits:
    """GSM8K: 500 of the train rows are held out for validation."""
    name = "openai/gsm8k"
    tests = {"gsm8k": (name, "main", "test")}
    return load(cfg, math_row, [(name, "main", "train")], tests, GSM8K_PROMPTS)


def load_math(cfg) -> Splits:
    """MATH: MATH500 to test, 500 others of the test part to validate, 11,500 to train   [App. A]

    GSM8K's test rows are a second test set. --train-file takes both original files, or the 12,000
    rows that are not in MATH500; --test-file takes MATH500 and any further test sets.
    """
    name = "EleutherAI/hendrycks_math"
    train = [(name, subject, "train") for subject in MATH_SUBJECTS]
    train += [(name, subject, "test") for subject in MATH_SUBJECTS]
    tests = {
        "math500": ("HuggingFaceH4/MATH-500", None, "test"),
        "gsm8k": ("openai/gsm8k", "main", "test"),
    }
    return load(cfg, math_row, train, tests, MATH_PROMPTS)


# -- ARC-Challenge ---------------------------------------------------------------------------------

ARC_PROMPTS = (
    "Question: {query}\nAnswer:\n",
    "{query}\nThink step by step, and end with 'The answer is (X).', "
    "where X is the label of the one right choice.",
)


def arc_row(where: str, row: dict) -> Query:
    """A row of ARC: `question`, `choices` {text: [...], label: [...]}, `answerKey`, a label."""
    match row:
        case {
            "question": str(question),
            "choices": {"text": [*choices], "label": [*labels]},
            "answerKey": str(gold),
        } if _texts_only([*choices, *labels]):
            is_known = gold in labels and set(labels) <= set("ABCDE12345")
            fits = is_known and len(choices) == len(labels) == len(set(labels))
        case _:
            fits = False
    if not fits:
        raise BadRow("no question with choices {text: [...], label: [A-E or 1-5]} and answerKey")
    lines = [f"({label}) {choice}" for label, choice in zip(labels, choices)]
    return Query(where.rpartition("/")[2], "\n".join([question.strip(), *lines]), gold)


def load_arc(cfg) -> Splits:
    """ARC-Challenge: 200 of 1,418 rows are held out; no human solutions, so no SFT   [Sec. 4.1]"""
    name, config = "allenai/ai2_arc", "ARC-Challenge"
    train = [(name, config, "train"), (name, config, "validation")]
    return load(cfg, arc_row, train, {"arc": (name, config, "test")}, ARC_PROMPTS)


# -- code ------------------------------------------------------------------------------------------

MAX_TESTS = 1000  # a problem
MAX_TEST_CHARS = 100_000
MAX_SOLUTIONS = 5  # human solutions a problem   [Sec. 4.1]
CODE_PROMPTS = (
    "QUESTION:\n{query}\n\nANSWER:\n",
    "{query}\n\nAnswer with one Python program and nothing else.",
)


def apps_tests(row: dict) -> dict:
    """The `input_output` of an APPS row, checked; raises BadRow.

    returns  {"inputs": [...], "outputs": [...], "fn_name": name or None}
    """
    match json_column(row, "input_output"):
        case {"inputs": [_, *_] as inputs, "outputs": [*outputs], **more}:
            name = more.get("fn_name") or None
        case _:
            raise BadRow("no tests, or tests of another form than APPS's")
    if len(inputs) > MAX_TESTS or len(row["input_output"]) > MAX_TEST_CHARS:
        raise BadRow(f"more than {MAX_TESTS:,} tests, or {MAX_TEST_CHARS:,} characters of them")
    if name is None:  # a program reads and writes a text, or a list of lines
        lines = [t if isinstance(t, list) else [t] for t in inputs + outputs]
        fits = _texts_only(chain.from_iterable(lines))
    else:
        fits = isinstance(name, str) and all(isinstance(t, list) for t in inputs)
    if not fits or len(inputs) != len(outputs):
        raise BadRow("tests of another form than APPS's")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def assert_lines(source: str, **how: str) -> dict:
    """The tests of MBPP or HumanEval for sandbox.passes_asserts, checked; raises BadRow.

    source   Python with assert lines
    how      `setup`, or `entry` and `reference`
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadRow("tests that are no Python") from None
    names = [getattr(node, "name", "") for node in body]
    if not body or ("entry" in how and "check" not in names) or len(source) > MAX_TEST_CHARS:
        raise BadRow(f"no tests, or more than {MAX_TEST_CHARS:,} characters of them")
    return {"asserts": {"source": source, **how}}


def code_row(where: str, row: dict, unsafe: bool = False) -> Query:
    """A row of HumanEval, MBPP or APPS, which its columns tell.

    unsafe   whether sandbox.passes may run programs without its walls
    returns  a Query whose gold is the JSON that sandbox.passes reads
    """
    if "entry_point" in row:
        text, solutions = column(row, "prompt"), []
        entry, whole = column(row, "entry_point"), text + column(row, "canonical_solution")
        tests = assert_lines(column(row, "test"), entry=entry, reference=whole)
    elif "test_list" in row:
        if not isinstance(row["test_list"], list):
            raise BadRow("no tests")
        asserts = "\n".join(map(str, row["test_list"]))
        solutions = [column(row, "code").replace("\r\n", "\n")]
        tests = assert_lines(asserts, setup=row.get("test_setup_code") or "")
        # without the asserts a question of MBPP does not name its function
        text = f"{column(row, 'text').strip()}\nYour code should pass these tests:\n{asserts}"
    else:
        question, starter = column(row, "question").strip(), row.get("starter_code") or ""
        tests = apps_tests(row)
        form = "Call-Based" if tests["fn_name"] else "Standard Input"
        text = f"{question}\n\n{starter}\nUse {form} format"
        solutions = json_column(row, "solutions") or []
        if not isinstance(solutions, list) or not _texts_only(solutions):
            raise BadRow("solutions that are no list of programs")
    n = min(MAX_SOLUTIONS, len(solutions))
    # seeded by the question: the same solutions in every run and in every order of the rows
    # only line ends: blanks at the start are Python's
    drawn = [y.strip("\n") for y in random.Random(text).sample(solutions, n)]
    first, *more = drawn or [""]
    gold = json.dumps({**tests, "unsafe": unsafe})
    return Query(where.rpartition("/")[2], text.strip(), gold, first, tuple(more))


def load_code(cfg) -> Splits:
    """APPS to train and to test, MBPP's test rows as a small second test set   [Sec. 4.1]"""
    make = functools.partial(code_row, unsafe=cfg.unsafe_code)
    apps = "hf://datasets/codeparrot/apps/"
    tests = {
        "apps": (apps + "test.jsonl", None, "test"),
        "mbpp": ("google-research-datasets/mbpp", "full", "test"),
    }
    return load(cfg, make, [(apps + "train.jsonl", None, "train")], tests, CODE_PROMPTS)


# -- text to ids to batches ------------------------------------------------------------------------

Example = tuple[list[int], int]  # ids (L,) of prompt and response, and n_prompt
MicroBatch = tuple[list[list[int]], list[int]]  # ids (B, l_i), unpadded, and n_prompt (B,)


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text by people or models: "</s>" in it is text and never the end token."""
    try:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    except ValueError:  # mistral-common refuses the flag; it never reads special tokens in a text
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer, query: Query, splits: Splits, chat: bool) -> list[int]:
    """The prompt of a query as token ids (L,).

    chat  True: the task's chat prompt through the tokenizer's own template; False: its base prompt
    """
    if not chat:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + text_ids(tokenizer, splits.base.replace("{query}", query.text))
    content = splits.chat.replace("{query}", query.text)
    turn = {"role": "user", "content": content}
    how = dict(add_generation_prompt=True, return_dict=False)
    # in one piece where it can be, since tokens may join over the question's edges
    if text_ids(tokenizer, content) == tokenizer(content, add_special_tokens=False)["input_ids"]:
        return tokenizer.apply_chat_template([turn], tokenize=True, **how)
    # the question names a special token, and only the template's own are special
    text = tokenizer.apply_chat_template([turn], tokenize=False, **how)
    # stripped, since templates such as Llama's strip what a user says
    before, content, after = text.partition(content.strip())
    before, after = tokenizer([before, after], add_special_tokens=False)["input_ids"]
    return before + text_ids(tokenizer, content) + after


def end_ids(tokenizer, chat: bool) -> list[int]:
    """The tokens that end a response: training ends with the first, sampling stops at any.

    The last is the tokenizer's end of text. A chat template may end a turn with another token, as
    Gemma's <end_of_turn> and Phi-3's <|end|>: the first token of the tokenizer's added ones that
    stands after an assistant's words.
    """
    ends = [tokenizer.eos_token_id]
    if chat:
        # no tokenizer says which token it is, so a turn is rendered and looked at
        words = "ANSWER"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
        _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).partition(words)
        added = tokenizer.added_tokens_decoder
        special = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in added]
        ends = special[:1] + ends
    return list(dict.fromkeys(ends))


def example(
    tokenizer, prompt: list[int], response: str, max_length: int, end: int | None = None
) -> Example | None:
    """Prompt, response and end; None if they are longer than max_length tokens.

    A solution that is cut off would teach no ending.

    end  the first of end_ids; None: the tokenizer's end of text
    """
    ids = prompt + text_ids(tokenizer, response)
    ids.append(tokenizer.eos_token_id if end is None else end)
    if len(ids) > max_length:
        return None
    return ids, len(prompt)


def micro_batches(examples: list[Example], token_budget: int) -> Iterator[MicroBatch]:
    """Cuts a global batch, longest first, into micro-batches of at most token_budget padded tokens.

    A micro-batch has at least one row.

    >>> examples = [([1] * n, 1) for n in (2, 9, 8, 3)]
    >>> [(len(ids), len(ids[0])) for ids, _ in micro_batches(examples, 18)]
    [(2, 9), (2, 3)]
    """
    # rows of like length together need little padding; too little memory shows at the first
    order = sorted(examples, key=lambda e: len(e[0]), reverse=True)
    start = 0
    while start < len(order):
        longest = len(order[start][0])
        batch = order[start : start + max(1, token_budget // longest)]
        yield [e[0] for e in batch], [e[1] for e in batch]
        start += len(batch)


# -- how a script shows its work, and how it ends --------------------------------------------------

# by their words, since safetensors and torch raise kinds of their own; the last words are torch's
_DISK_FAULT = re.compile("No space left|Disk quota|Read-only file|Permission denied|unexpected pos")


def progress(total: int, desc: str, delay: float = 0):
    """A tqdm bar on stderr; without a terminal, a line every half minute.

    delay  seconds until it shows, where the work is mostly done by then
    """
    from tqdm import tqdm

    common = dict(total=total, desc=desc, delay=delay, smoothing=0.05)
    if sys.stderr.isatty():
        return tqdm(leave=False, mininterval=0.2, **common)
    line = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"
    return tqdm(mininterval=30, bar_format=line, **common)


def run(main: Callable[[], None]) -> None:
    """Runs a script's main; what the user or the machine did wrong is one line and exit code 2.

    Ctrl-C is exit code 130. A reader of the output that has gone, as of `| head`, is code 141 and
    no line. A traceback is for faults of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        # a notebook's streams have no such method
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # ASCII has no plus-minus sign
    try:
        main()
        # flushed here, where a reader that has gone is still caught below
        print(end="", flush=True)
        return
    except KeyboardInterrupt:
        code, line = 130, "\nstopped; the same command goes on from here"
    except BrokenPipeError:
        if not _output_is_unread():
            raise  # it was a pipe of ours
        code, line = 141, ""
    except Exception as e:
        reason = str(e) if isinstance(e, UserError) else _machine_fault(e)
        if not reason:
            raise
        code, line = 2, f"{Path(sys.argv[0]).name}: {reason}"
    try:
        print(end="", flush=True)
    except OSError:
        # the interpreter would flush once more, and end with an error of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def _output_is_unread() -> bool:
    """Whether the reader of stdout or stderr has gone."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _machine_fault(e: Exception) -> str:
    """A full or read-only disk, or a folder that has gone, in one line; "" for other exceptions."""
    try:
        os.getcwd()
    except OSError:
        return "the working directory is gone; go to another and give the same command"
    if not _DISK_FAULT.search(str(e)):
        return ""
    reason = _one_line(e)
    if "unexpected pos" in reason:  # torch.save knows how far it came, and not why
        reason = "a checkpoint can't be written whole; the disk is full"
    return f"{reason}; what was complete is kept, the same command goes on"
