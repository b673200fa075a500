"""Data: the records, one loader a task, prompts, splits, and batches of token ids.

    rows (hub or file) -> Query -> prompt ids -> [engine] -> Sample -> (ids, n_prompt) -> micro-batches

A task is one loader here (`LOADERS`), one grader in rewards.py and one preset in bstar.py. Every loader returns `Splits`: `train` queries
(those with a human `solution` are also the SFT set), `val` queries to choose checkpoints on, and named `tests` that are only reported. A
loader of real rows is a function that makes a Query of one row (`math_row`, `arc_row`, `code_row`), where to find the rows, and two prompts.

The default task is a toy: chains of modular arithmetic in words, after iGSM ("Physics of Language Models 2.1"). Its base model has read
authors who misread most sentences, its human solutions are few, careful and mostly of easy stories, its answers can be guessed (there are
only five), and its steps can all be checked (`check_toy`): "right answer by wrong reasoning" is a number here and not a worry. It shows the
dynamics of self-training; it says nothing about how a pre-trained model reads English.

Where this file leaves the paper: see the README's table (what "the MATH split" means for local files, which rows are dropped).
"""
from __future__ import annotations

import ast
import errno
import functools
import gzip
import json
import random
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Callable, Iterable, Iterator


class UserError(Exception):
    """Something the user can mend: printed as one line on stderr, exit code 2."""


class BadRow(Exception):
    """A row that can't be used, and why: `clean` counts it and goes on."""


def run(main) -> None:
    """Runs a script's main; what the user can mend is one line on stderr and exit code 2, Ctrl-C is 130."""
    signal.signal(signal.SIGINT, _stop)
    try:
        main()
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"{Path(sys.argv[0]).name}: {e.strerror}: {e.filename or 'while writing'}; what was complete is kept, the same command goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


_asked: list[bool] = []                    # Ctrl-C was pressed: also where Python drops a KeyboardInterrupt, as it does in a destructor or callback


def _stop(*_) -> None:
    _asked.append(True)
    raise KeyboardInterrupt


@contextmanager
def unbroken() -> Iterator[list[bool]]:
    """Ctrl-C in this block waits for its end; the block sees it in the list that it is given. A second one does not wait."""
    def wait(*_) -> None:
        if _asked:
            raise KeyboardInterrupt
        _asked.append(True)
        print("\nfinishing the batch in hand; Ctrl-C once more loses it", file=sys.stderr)
    if _asked:
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, wait)
    try:
        yield _asked
    finally:
        signal.signal(signal.SIGINT, before)
    if _asked:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Query:
    """x: one question. `gold` is a* (never shown to the policy; for code its tests, as JSON), `solution` a human y where there is one."""
    id: str
    text: str
    gold: str
    solution: str = ""
    more_solutions: tuple[str, ...] = ()   # further human y's (code)


@dataclass
class Sample:
    """y^: one response to a query, and what the reward made of it (filled by `bstar.score`)."""
    response: str
    finish_reason: str                     # "stop" (the policy ended it) or "length" (cut off: never selected)
    pred: str | None = None                # a^
    correct: bool = False                  # 1[a^ = a*]
    sound: bool | None = None              # every step right as well; None where steps cannot be checked
    steps: list[float] = field(default_factory=list)   # one score in [0, 1] a step, empty without a process reward
    r_prm: float | None = None             # 2 min(steps) - 1
    reward: float = float("-inf")          # r of Eq. 1; -inf for a cut-off response, so that no tau selects it


@dataclass
class Splits:
    """What a loader returns. `base` and `chat` are the prompts around {query}: for a base model, and as a user's turn in a chat."""
    train: list[Query]
    val: list[Query]
    tests: dict[str, list[Query]]
    base: str
    chat: str


# ---------------------------------------------------------------------------------------------------------------------
# Rows from a hub or a file

def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) for each row of a .jsonl, .jsonl.gz or .parquet file; `where` is "FILE:LINE", for messages.

    raises UserError  if the file is missing, empty, of another kind, or a line is not a JSON object
    """
    p = Path(path)
    if not p.is_file():
        raise UserError(f"no such file: {path}")
    if p.suffix == ".parquet":
        import pyarrow.parquet
        try:
            rows: Iterable = pyarrow.parquet.read_table(p).to_pylist()
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: can't be read ({str(e).splitlines()[0]})") from None
    elif p.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".json")):
        rows = _json_lines(p)
    else:
        raise UserError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")
    n = 0
    for n, row in enumerate(rows, 1):
        yield f"{path}:{n}", row
    if n == 0:
        raise UserError(f"{path}: the file holds no rows")


def _json_lines(p: Path) -> Iterator[dict]:
    opener = gzip.open if p.suffix == ".gz" else open
    try:
        with opener(p, "rt", encoding="utf-8") as f:
            for n, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise UserError(f"{p}:{n}: not JSON ({e})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{p}:{n}: expected a JSON object, one a line")
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise UserError(f"{p}: can't be read ({e})") from None


def hub_reason(e: Exception) -> str:
    """An exception of the hub's libraries as the one line a user needs."""
    if "connect" in str(e).lower() or "offline" in str(e).lower():
        return "not a local folder, and the hub can't be reached; download the model elsewhere and give its folder"
    return " ".join(str(e).split())[:200]


def hub_rows(name: str, config: str | None, split: str, flags: str = "--train-file and --test-file") -> Iterator[tuple[str, dict]]:
    """(where, row) of a data set on the hub, by its public name, or of a folder that `datasets` can read.

    raises UserError  if it cannot be reached, naming the `flags` that take local files instead
    """
    try:
        import datasets
        datasets.disable_progress_bars()
        # datasets 4 refuses a repository with a loading script, as APPS is; its JSON lines can be read without
        rows = datasets.load_dataset("json", data_files=name, split="train") if name.startswith("hf://") else datasets.load_dataset(name, config, split=split)
    except Exception as e:                 # datasets raises a dozen kinds for "no network"; the user's way out is the same for all
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise UserError(f"can't load {name} from the hub ({reason}); give local copies by {flags}") from None
    return ((f"{name}/{config or ''}[{split}]:{i}", row) for i, row in enumerate(rows))


def column(row: dict, *names: str) -> str:
    """The first of the columns `names` that the row has, as text; raises BadRow.

    >>> column({"question": "2+2?"}, "problem", "question")
    '2+2?'
    """
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise BadRow(f"no text in column {' or '.join(map(repr, names))} (found: {', '.join(sorted(row)) or 'nothing'})")


def json_column(row: dict, name: str):
    """What the JSON text in a column holds, None where it is empty; raises BadRow."""
    try:
        return json.loads(column(row, name) or "null")
    except (ValueError, RecursionError):   # numbers without end, nesting without end
        raise BadRow(f"broken JSON in column {name!r}") from None


def clean(rows: Iterable[tuple[str, dict]], make: Callable[[str, dict], Query], name: str, taken: set[str] = frozenset()) -> list[Query]:
    """Rows -> queries by `make`, without bad rows, rows without a gold answer, questions seen before, and questions in `taken`; says how
    many on stderr, and where the first one is.

    raises UserError  if nothing is left
    """
    out, seen, dropped, total = [], set(), {}, 0
    for total, (where, row) in enumerate(rows, 1):
        try:
            q = make(where, row)
            key = " ".join(q.text.split())
            why = ("no question" if not key else "no gold answer" if not q.gold else "in another split" if key in taken
                   else "a question twice" if key in seen else "")
            seen.add(key)
        except BadRow as e:
            why = str(e)
        if why:
            dropped.setdefault(why, []).append(where)
        else:
            out.append(q)
    said = [f"{len(at)} of {total} rows dropped, {why} (first: {at[0]})" for why, at in dropped.items()]
    if not out:
        raise UserError(f"{name}: none of its rows can be used: {'; '.join(said[:3])}")
    for line in said:
        print(f"{name}: {line}", file=sys.stderr)
    return out


def texts(queries: Iterable[Query]) -> set[str]:
    """The questions, white space folded: what `clean` compares."""
    return {" ".join(q.text.split()) for q in queries}


def read_sets(cfg, make: Callable[[str, dict], Query], train: list[tuple], tests: dict[str, tuple]) -> tuple[list[Query], dict[str, list[Query]]]:
    """The training queries, none of them in a test set, and the test sets: of --train-file and --test-file, else from the hub.

    train, tests  (name, config, split) on the hub; a test file is a test set of its own, under its name without endings
    """
    for p in filter(None, f"{cfg.train_file},{cfg.test_file}".split(",")):
        if not Path(p).is_file():              # told before anything is fetched
            raise UserError(f"no such file: {p}")
    if cfg.test_file:
        paths = {Path(p).name.split(".")[0]: p for p in cfg.test_file.split(",")}
        if len(paths) < len(cfg.test_file.split(",")) or paths.keys() & {"train", "val", "pool", "selected"}:
            raise UserError(f"--test-file {cfg.test_file}: a test set can't be called as another or by a word of the log (train, val, ...); rename the file")
        found = {name: clean(read_rows(p), make, p) for name, p in paths.items()}
    else:
        found = {name: clean(hub_rows(*at), make, f"{name} test") for name, at in tests.items()}
    rows = chain.from_iterable(map(read_rows, cfg.train_file.split(",")) if cfg.train_file else (hub_rows(*at) for at in train))
    return clean(rows, make, "train", set().union(*map(texts, found.values()))), found


def hold_out(rows: list[Query], n: int, seed: str) -> tuple[list[Query], list[Query]]:
    """n queries drawn uniformly for validation, and the rest in their order. Never more than a fifth of what there is."""
    if len(rows) < 5:
        raise UserError(f"--train-file: {len(rows)} usable rows are too few to hold any out for validation")
    picked = set(random.Random(seed).sample(range(len(rows)), min(n, len(rows) // 5)))
    return [rows[i] for i in sorted(picked)], [q for i, q in enumerate(rows) if i not in picked]


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K and MATH

_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)\s+([^\s{}$\\]*[^\s{}$\\.,;])|(\\.|\{)|(\})", re.S)
_NO_WORD = re.compile(r"\\(?:text|mbox|textrm|q?quad)(?![a-z])|\\[()\[\],;:! ]|[\s$~{}]|[a-zA-Z](?:\([a-z]\))?\s*=\s*$")   # between two boxes


def last_boxed(text: str, hedged: bool = True) -> str | None:
    r"""The content of the last complete outermost \boxed{...} or \fbox{...}, in one pass however deep or long the text is.

    Several joined by commas or "and" are one list; of several joined by "or" the last is taken, or, where not `hedged`, none: "".

    >>> last_boxed(r"so $\boxed{\frac{1}{2}}$."), last_boxed(r"$x = \boxed{1}$, $\boxed 2$, and $x = \boxed{3}$")
    ('\\frac{1}{2}', '1, 2, 3')
    >>> last_boxed(r"$\boxed{1}$ and $\boxed{2}$"), last_boxed(r"\boxed{1} or \boxed{2}"), last_boxed(r"\boxed{1} or \boxed{2}", hedged=False)
    ('1, 2', '2', '')
    """
    opened, boxes = [], []
    for m in _BRACE.finditer(text):
        if m[1] or m[3] == "{":
            opened.append(m)
        elif m[2]:
            boxes.append((m.start(), *m.span(2), m.end()))
        elif m[4] and opened and (first := opened.pop())[1]:
            while boxes and boxes[-1][0] > first.start():      # inside this one
                boxes.pop()
            boxes.append((first.start(), first.end(), m.start(), m.end()))
    said: dict[str, None] = {}
    for i in range(len(boxes) - 1, -1, -1):
        said[text[boxes[i][1]:boxes[i][2]].strip()] = None
        joint = re.fullmatch("[,;]?(and|or)?", _NO_WORD.sub("", gap)) if i and len(gap := text[boxes[i - 1][3]:boxes[i][0]]) < 100 else None
        if not joint or not joint[0]:
            break
        if joint[1] == "or":
            return next(iter(said)) if hedged else ""
    return ", ".join(reversed(said)) if boxes else None


def math_row(where: str, row: dict) -> Query:
    """A row of MATH (`problem`, `solution`, maybe `answer`) or of GSM8K (`question`, `answer` ending in `#### n`) as a Query."""
    uid = where.rpartition("/")[2]
    if "question" in row and "problem" not in row:
        answer = column(row, "answer")
        gold = answer.rpartition("####")[2] if "####" in answer else ""
        return Query(uid, column(row, "question").strip(), gold.strip().replace(",", ""), answer.strip())
    solution = row["solution"] if isinstance(row.get("solution"), str) else ""
    gold = row["answer"] if isinstance(row.get("answer"), str) else last_boxed(column(row, "solution"))
    return Query(str(row.get("unique_id") or uid), column(row, "problem").strip(), (gold or "").strip(), solution.strip())


def load_gsm8k(cfg) -> Splits:
    """GSM8K (`question`, `answer`): 500 of the train rows are held out for validation; the test set is only reported."""
    rows, tests = read_sets(cfg, math_row, [("openai/gsm8k", "main", "train")], {"gsm8k": ("openai/gsm8k", "main", "test")})
    val, train = hold_out(rows, cfg.val_queries, "gsm8k val")
    return Splits(train, val, tests, "Question: {query}\nAnswer:\n",
                  "{query}\nReason step by step, and end with the final number alone on a line, after '#### '.")


MATH_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


def _of_test(q: Query) -> bool:
    return q.id.startswith("test/") or "[test]" in q.id        # a `unique_id`; a row's place on the hub


def load_math(cfg) -> Splits:
    """MATH split as in the paper [App. A]: MATH500 to test, 500 others of the test set to validate, 4,000 + 7,500 to train; GSM8K test besides.

    Local files: --train-file takes MATH rows (both original files, or the 12,000 that are not in MATH500), --test-file MATH500 and any
    further test sets. Validation comes from the test set's rows where it can be told (by `unique_id`, or on the hub), as in the paper.
    """
    rows, tests = read_sets(cfg, math_row, [("EleutherAI/hendrycks_math", s, split) for split in ("train", "test") for s in MATH_SUBJECTS],
                            {"math500": ("HuggingFaceH4/MATH-500", None, "test"), "gsm8k": ("openai/gsm8k", "main", "test")})
    of_test = [*filter(_of_test, rows)]
    val, rest = hold_out(of_test or rows, cfg.val_queries, "math val")
    train = rest + [q for q in rows if of_test and not _of_test(q)]
    return Splits(train, val, tests, "Problem:\n{query}\n\nSolution:\n",
                  "{query}\nReason step by step, and put the final answer within \\boxed{{}}.")


# ---------------------------------------------------------------------------------------------------------------------
# ARC-Challenge

def arc_row(where: str, row: dict) -> Query:
    """A row of ARC: `question`, `choices` {text: [...], label: [...]}, `answerKey`; the labels are letters or digits, as the row has them."""
    match row:
        case {"question": str(question), "choices": {"text": [_, *_] as choices, "label": [*labels]}, "answerKey": str(gold)} if \
                len(choices) == len(labels) and all(isinstance(x, str) for x in choices + labels):
            if gold in labels and len({*labels}) == len(labels) and {*labels} <= {*"ABCDE12345"}:
                return Query(where.rpartition("/")[2], "\n".join([question.strip(), *(f"({x}) {c}" for x, c in zip(labels, choices))]), gold)
            raise BadRow("answerKey is none of the choices' labels, or these are not from A-E or 1-5")
    raise BadRow("no question with choices {text: [...], label: [...]} and answerKey")


def load_arc(cfg) -> Splits:
    """ARC-Challenge [Sec. 4.1]: 1,119 train and 299 validation rows, 200 of them held out; no human solutions, so there is no SFT."""
    rows, tests = read_sets(cfg, arc_row, [("allenai/ai2_arc", "ARC-Challenge", split) for split in ("train", "validation")],
                            {"arc": ("allenai/ai2_arc", "ARC-Challenge", "test")})
    val, train = hold_out(rows, cfg.val_queries, "arc val")
    return Splits(train, val, tests, "Question: {query}\nAnswer:\n",
                  "{query}\nThink step by step, and end with 'The answer is (X).', where X is the label of the one right choice.")


# ---------------------------------------------------------------------------------------------------------------------
# Code

MAX_TESTS, MAX_TEST_CHARS, MAX_SOLUTIONS = 1000, 100_000, 5        # a problem; solutions as in the paper [Sec. 4.1]


def apps_tests(row: dict) -> dict:
    """`input_output` of an APPS row, checked: {"inputs": [...], "outputs": [...], "fn_name": name or None}; raises BadRow."""
    match json_column(row, "input_output"):
        case None | {"inputs": []}:
            raise BadRow("no tests")
        case {"inputs": [*inputs], "outputs": [*outputs], **rest} if len(inputs) == len(outputs):
            if len(inputs) > MAX_TESTS or len(row["input_output"]) > MAX_TEST_CHARS:
                raise BadRow(f"more than {MAX_TESTS:,} tests, or more than {MAX_TEST_CHARS // 1000} kB of them")
            name, texts = rest.get("fn_name"), chain.from_iterable(t if isinstance(t, list) else [t] for t in inputs + outputs)
            if all(isinstance(t, list) for t in inputs) and isinstance(name, str) if name else all(isinstance(t, str) for t in texts):
                return {"inputs": inputs, "outputs": outputs, "fn_name": name or None}
    raise BadRow("tests of another form than APPS's")


def assert_lines(source: str, **how: str) -> dict:
    """What rewards.assert_tests takes, checked: {"asserts": {"source": Python with assert lines, ...}}; raises BadRow."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadRow("tests that are no Python") from None
    if len(source) > MAX_TEST_CHARS or not body or "entry" in how and not any(getattr(n, "name", "") == "check" for n in body):
        raise BadRow(f"no tests, or more than {MAX_TEST_CHARS // 1000} kB of them")
    return {"asserts": {"source": source, **how}}


def code_row(where: str, row: dict, unsafe: bool = False) -> Query:
    """A row of APPS (`question`, `input_output`, `starter_code`, `solutions`), of MBPP (`text`, `test_list`, `code`) or of HumanEval
    (`prompt`, `test`, `entry_point`, `canonical_solution`). gold is the JSON that `rewards.passes` reads; `unsafe`: how it may run them."""
    solutions = []
    if "entry_point" in row:
        text = column(row, "prompt")
        tests = assert_lines(column(row, "test"), entry=column(row, "entry_point"), reference=text + column(row, "canonical_solution"))
    elif "test_list" in row:
        source, solutions = "\n".join(map(str, row["test_list"] or [])), [column(row, "code").replace("\r\n", "\n")]
        text = f"{column(row, 'text').strip()}\nYour code should pass these tests:\n{source}"
        tests = assert_lines(source, setup=row.get("test_setup_code") or "")
    else:
        tests, starter = apps_tests(row), row.get("starter_code") or ""
        text = f"{column(row, 'question').strip()}\n\n{starter}\nUse {'Call-Based' if tests['fn_name'] else 'Standard Input'} format"
        solutions = json_column(row, "solutions") or [] if row.get("solutions") else []
        if not isinstance(solutions, list) or not all(isinstance(y, str) for y in solutions):
            raise BadRow("solutions that are no list of programs")
    first, *more = [y.strip("\n") for y in random.Random(text).sample(solutions, min(MAX_SOLUTIONS, len(solutions)))] or [""]
    return Query(where.rpartition("/")[2], text.strip(), json.dumps({**tests, "unsafe": unsafe}), first, tuple(more))


def load_code(cfg) -> Splits:
    """APPS to train and to test, MBPP's test rows as a small second test set   [Sec. 4.1]"""
    apps = "hf://datasets/codeparrot/apps/{}.jsonl"
    rows, tests = read_sets(cfg, functools.partial(code_row, unsafe=cfg.unsafe_code), [(apps.format("train"), None, "train")],
                            {"apps": (apps.format("test"), None, "test"), "mbpp": ("google-research-datasets/mbpp", "full", "test")})
    val, train = hold_out(rows, cfg.val_queries, "code val")
    return Splits(train, val, tests, "QUESTION:\n{query}\n\nANSWER:\n", "{query}\n\nAnswer with one Python program and nothing else.")


# ---------------------------------------------------------------------------------------------------------------------
# Text -> ids -> batches

def prompt_ids(tokenizer, query: Query, splits: Splits, chat: bool) -> list[int]:
    """The prompt of a query as token ids (L,): the task's base prompt, or its chat prompt through the tokenizer's own template."""
    if chat:
        turn = [{"role": "user", "content": splits.chat.format(query=query.text)}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(splits.base.format(query=query.text), add_special_tokens=False)["input_ids"]


def example(tokenizer, prompt: list[int], response: str, max_length: int) -> tuple[list[int], int] | None:
    """(ids (L,), n_prompt): prompt, response and end-of-text; None if it is longer than max_length (a cut-off solution teaches no ending)."""
    ids = prompt + tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (ids, len(prompt)) if len(ids) <= max_length else None


def micro_batches(examples: list[tuple[list[int], int]], token_budget: int) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Cuts a global batch, longest first, into padded micro-batches of at most token_budget tokens (and at least one row).

    yields  (ids (B, l_i), n_prompt (B,)), rows of unequal length, longest first

    >>> [(len(ids), len(ids[0])) for ids, _ in micro_batches([([1] * n, 1) for n in (2, 9, 8, 3)], 18)]
    [(2, 9), (2, 3)]
    """
    order = sorted(examples, key=lambda e: -len(e[0]))
    while order:
        rows = max(1, token_budget // len(order[0][0]))
        yield [e[0] for e in order[:rows]], [e[1] for e in order[:rows]]
        order = order[rows:]


def progress(total: int, desc: str):
    """A tqdm bar on stderr; without a terminal, a line every half minute."""
    from tqdm import tqdm
    tty = sys.stderr.isatty()
    return tqdm(total=total, desc=desc, leave=not tty, file=sys.stderr, mininterval=0.2 if tty else 30, smoothing=0.05,
                bar_format=None if tty else "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n")
