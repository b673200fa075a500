r"""Is the answer right: extraction and equality, one grader for training and for evaluation.

    response -> extract -> normalise -> lists, tuples, intervals, matrices -> exact values, else Math-Verify -> 0 or 1

Each step runs only where the one before it could not decide. Model text is never run: no `eval`, no sympy `parse_expr`; the
parser below is ours, and Math-Verify gets what is left, in child processes with limits on time and memory. The paper does
not say how answers are compared (the official code: strings in training, sympy in evaluation). Here: no tolerance, no
percent rule (2500 is not 25), no "last number" fallback; what cannot be decided is wrong.
"""
from __future__ import annotations

import functools
import inspect
import json
import math
import operator
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import repeat
from typing import Sequence

from data import last_boxed
from unit_tests import extract_program, passes



# -- extract: response -> answer ------------------------------------------------------------------------------------------

_PHRASES = [re.compile(".*" + phrase, re.S | re.I) for phrase in (
    r"####\s*([^\n]+)",
    r"(?:final answer is|answer is|answer\s*\**:)[:\s*]*(?:\$\$|\\\[)?\s*([^\n]+)")]
# A full stop ends the answer, but "2.5" and "4 p.m." go on.
_SENTENCE_END = re.compile(r"(?<![ap]\.m)\.(?=[\s*$]|$)(?!\s*m\.)|,?\s+(?:because|since|which|where|I hope)\b")
# "A dog" and "3 meters" are no labels, but "A: a dog" and "B a dog" are.
_LABEL = re.compile(r"(?:(?i:option|choice|answer|letter)\s+)?(?:\(([A-Ea-e1-5])\)|([A-E1-5])\)|([B-E])(?=[\s.:,]|$)|([A1-5])(?=[.:,](?!\d)|\s*$)|([a-e])(?=[).]?$))")
_HEDGE = re.compile(r"[\s,.]*(?:or|and|/|&|,)\s*\(?[A-E1-5]\b|[\s,.]+[B-E](?=[.,)]|$)|[^.\n]*\bor\b[^.\n]*\([A-E1-5]\)")


def _said(text: str) -> str | None:
    r"""The last complete \boxed{} or the list of such, none of "\boxed{1} or \boxed{2}"; else what follows "####", "answer is" or "Answer:"."""
    if (box := last_boxed(text, hedged=False)) is not None:
        return box or None
    said = next((m[1] for phrase in _PHRASES if (m := phrase.match(text))), "")
    return _SENTENCE_END.split(said[:2000], maxsplit=1)[0].strip(" *\t\r") or None


def _choice(text: str) -> str | None:
    r"""The one choice a response names: "(B)", "B.", "B) text", "\text{(B)}"; "A or B" names none."""
    alone = re.fullmatch(r"\s*\(?[A-E1-5](?:[.):][^\n]*|\s*)", text)
    text = _said(re.sub(r"(?i)\b(?:correct|right|best) (?:option|choice)\b", "answer", text)) or (text if alone else "")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\b|[{}$*\\\"'`<>\[\]]", "", text[:2000]).strip()
    m = _LABEL.match(text)
    return None if not m or _HEDGE.match(text, m.end()) else m[m.lastindex].upper()


# -- normalise: one spelling for what LaTeX and prose spell in many ways --------------------------------------------------

MAX_CHARS = 500  # the longest reference answer of MATH has 159; longer answers are compared as strings only
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "²": "^2",
    "³": "^3", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "½": r"\frac12 ", "€": "", "£": "", "\0": "", "\1": ""})
_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter"}  # in \text; elsewhere variables
_WORD_VALUES = dict(zip("zero one two three four five six seven eight nine ten eleven twelve".split(), map(str, range(13))))
_RULES = [(re.compile(p), r) for p, r in (
    (r"\\phantom\s*(?:\{[^}]*\}|.)|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\[()\[\]]|(?<!\\)\$|\*\*", ""),
    (r"(?<=\d)\s*,\s*\\!\s*(?=\d{3})|\\!|(?<=\d)\{,\}(?=\d)|(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ""),
    (r"\\[,;: ]|~|\\q?quad(?![a-z])|\s+", " "),
    (r"(?<![\d.,] )(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d/]| \d)", lambda m: m[0].replace(" ", "")),
    (r"\\[dtc]frac", r"\\frac"), (r"\\(?:leq|leqslant|geq|geqslant|neq)(?![a-z])", lambda m: m[0][:3]),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"), (r"\\l[bB]race(?![a-z])", r"\\{"), (r"\\r[bB]race(?![a-z])", r"\\}"),
    (r"\\(?:mbox|text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|operatorname|boxed|fbox)\s*\{([^{}]*)\}",
     lambda m: " " + re.sub(r"(?<![\w.])[mgshL](?![\w.])", lambda u: _LETTERS[u[0]], m[1]) + " "),
    (r"\s*_\{(\w+)\}", r"_\1"), (r"(?<![\w})])\(([A-Z])\)(?![\w({])", r"\1"), (r"^\s*\\\{([^,]*)\\\}\s*$", r"\1"),
    (r"^\\\$\s*([\d.,]*\d)[.,\s]*$", r"\1 dollars"), (r"\\\$", ""), (r"\\?%", r"\\%"),
    (r"(?i)(?<=\d)(?::00)?\s*([ap])\.?\s?m\b\.?", lambda m: " " + m[1].lower() + "m"),
    (r"(?<![a-zA-Z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![a-zA-Z])", r"\\\1"), (r"(?<!\w)infinity", r"\\infty"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\(frac|sqrt)\s*([\da-z])", r"\\\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([\da-z])", r"\1{\2}"), (r"[,;]?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
    (r"(\d*\.)(\d*)\\overline\s*\{(\d+)\}", lambda m: f"({m[1]}{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\d.\w}^])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<![\d.\w}^])(\d+)\s(\d+)/(\d+)", r"(\1\4+\2\5/\3\6)"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*)\(?([\d.]+)\s*\^\s*\{?\s*\\circ\s*\}?\)?", r"\1(\2\\pi/180)"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])|°", " "), (r"^\s*\\approx|\\approx.*", ""),
    (r"(?<![\w\s])\s+|\s+(?![\w\s])", ""), (r"(?<=\d)(?<!_\d)\s+(?=[\d.])|(?<=\.)(\d+)(?=\.\d)", r"\1|"))]  # "2 3" is not 6


@functools.lru_cache(100_000)
def _normal(text: str) -> str:
    """LaTeX or plain text -> one canonical spelling, still a string: `_RULES` in order."""
    text = text.translate(_UNICODE).replace(r"\\", "\1" if r"\begin" in text else "\\")  # \1: the end of a matrix row
    for rule, to in _RULES:
        text = rule.sub(to, text)
    text = text.strip(" \1").rstrip(" .,;:")
    return _WORD_VALUES.get(text.lower(), text)


# -- structure: lists, tuples, intervals, matrices, unions ----------------------------------------------------------------

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
_DEPTH = dict(zip(r"( [ { \{ \langle \begin ) ] } \} \rangle \end".split(), [1] * 6 + [-1] * 6))
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[^}]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.S)
_BRACKETS = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.S)
_THOUSANDS = re.compile(r"(?<![\d,.(\[])(\d{1,3}(?:,\d{3})+)(?![\d,])(?![^(\[]*[)\]])")


def _split(text: str, *separators: str) -> list[str]:
    """The parts of `text` between the separators that stand outside all brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += _DEPTH.get(token, 0)
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


@functools.lru_cache(100_000)
def _tree(text: str, thousands: bool) -> str | tuple:
    """A leaf (str), or (kind, children): "(1, 2]" -> ("(]", ("1", "2")), and in any order "2, 1" -> ("any,", ("2", "1"))"""
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) if thousands else text
    items = [x.replace(r"\pm", sign, 1) for x in _split(text, ",", ";") if x for sign in "+-"[:1 + (r"\pm" in x)]]
    for kind, parts in (("any,", items), ("any|", _split(text, r"\cup"))):
        if len(parts) > 1:
            return kind, tuple(_tree(x, thousands) for x in parts)
    sides = _split(text, "=", r"\in")
    if len(sides) == 2 and not re.match(r"[-\d]", sides[0]) and not isinstance(tree := _tree(sides[1], thousands), str):
        return tree  # a name, as in 'A = \begin{pmatrix}...' or 'x \in (1, 2)', says nothing
    if m := _MATRIX.fullmatch(text):
        rows = [tuple(_tree(x, False) for x in _split(row, "&")) for row in m[2].split("\1") if row.strip()]
        return ("()", sum(rows, ())) if {len(row) for row in rows} == {1} else ("rows", tuple(("row", row) for row in rows))
    m = _BRACKETS.fullmatch(text)
    items = tuple(_tree(x, False) for x in _split(m[2], ",")) if m else ()
    if len(items) > 1:
        return {r"\{": "any,", r"\langle": "()"}.get(m[1], m[1] + m[3]), items
    return text


# -- value: exact arithmetic on what the text shows -----------------------------------------------------------------------

_LEXER = re.compile(r"\\[a-zA-Z]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?|[a-zA-Z](?:_(?:\{\w+\}|\w))?|\S")
_UNKNOWN = re.compile(r"[a-zA-Z].*|\\(?:infty|pi|theta|alpha|beta|lambda|phi)")
_OPERATORS = {"+": (0, operator.add), "-": (0, operator.sub), "/": (1, operator.truediv), "^": (2, None),
              **dict.fromkeys(("*", r"\cdot", r"\times"), (1, operator.mul))}
_CONSTANTS = {"e": math.e, "i": 1j, r"\pi": math.pi}


@functools.lru_cache(100_000)
def _value(text: str, point: int) -> Fraction | complex | None:
    r"""The value of an expression, None where this parser cannot read it.

    point 0: letters, pi and roots are independent random Fractions; texts that are equal here are equal
    point 1, 2: letters are other random Fractions, the rest is computed; texts that differ here by far differ

    >>> _value("1+1/2 - 10^{-2}", 0), round(_value(r"\sqrt[3]{8} + 2\pi", 1), 4), _value(r"\sin x", 0)
    (Fraction(149, 100), 8.2832, None)
    """
    tokens = _LEXER.findall(text)[::-1]

    def unknown(name: str) -> Fraction:
        return Fraction(random.Random(f"{name} {point}").randint(10**6, 10**7), 4_000_037)

    def power(base: Fraction | complex, exponent: Fraction | complex) -> Fraction | complex:
        if not isinstance(exponent, Fraction) or exponent.denominator > 1:
            return base ** exponent if point else unknown(f"{base}^{exponent}")
        if isinstance(base, Fraction) and abs(exponent) * (base.numerator * base.denominator).bit_length() > 100_000:
            raise OverflowError
        return base ** int(exponent)

    def atom() -> Fraction | complex:
        token = tokens.pop()
        if token in "+-":
            return expression(2) * (-1 if token == "-" else 1)
        if token in "({[":
            return (expression(0), tokens.pop())[0]
        if token == r"\frac":
            return atom() / atom()
        if token == r"\sqrt":
            degree = atom() if tokens[-1] == "[" else Fraction(2)
            return power(atom(), 1 / degree)
        if point and token in _CONSTANTS:
            return _CONSTANTS[token]
        return unknown(token) if _UNKNOWN.fullmatch(token) else Fraction(token)

    def expression(level: int) -> Fraction | complex:  # sums from level 0 on, products from 1, powers from 2
        value = atom()
        while tokens and tokens[-1] not in ")}]" and (rank := _OPERATORS.get(tokens[-1], (1,))[0]) >= level:
            f = _OPERATORS[tokens.pop()][1] if tokens[-1] in _OPERATORS else operator.mul
            other = expression(min(rank + 1, 2))
            value = f(value, other) if f else power(value, other)
        return value

    try:
        value = expression(0)
        return None if tokens else value
    except Exception:  # whatever the text holds, "cannot be read" is the answer
        return None


# -- equality -------------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"(?=.*[a-zA-Z]{3}|[A-Z]{2}$)[a-zA-Z][a-zA-Z0-9 .'-]*")
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_(?:\{\w+\}|\w))?'?(?:\([a-z](?:, ?[a-z])*\))?")
_UNIT = re.compile(
    r"(.*(?:[\d})]|\\pi))\s*((?:(?<![a-zA-Z\\])(?!dozen|hundred|thousand|[mb]illion)(?:[a-z]{3,}|[ckm]m|[km]g|m[Lil]|ft|in|h|lb"
    r"|oz|hr|yd|sq|cu|[ap]m|gm|th|USD)(?![a-zA-Z])[./ -]*)+)(?:\^\s*\{?\s*[123]\s*\}?)?")


def _right_side(text: str) -> str:
    """'x = 2 + 3 = 5' -> '5'; an equation that says more than names and numbers is left whole."""
    *left, last = _split(text, "=")
    return last if all(_NAME.fullmatch(x) or len({_value(x, 1), _value(x, 2)} - {None}) == 1 for x in left) else text


def _leaf(p: str, g: str, budget: list[float]) -> bool:
    """Are two answers without inner structure equal?"""
    if any(re.fullmatch(r"[0-9A-Z.-]+_\w+", x) for x in (p, g)):
        (a, _, a_base), (b, _, b_base) = p.partition("_"), g.partition("_")
        return a == b and "" in (a_base, b_base)
    if _WORDS.fullmatch(p) and _WORDS.fullmatch(g):
        return re.sub(r"[\W_]", "", p).lower() == re.sub(r"[\W_]", "", g).lower()
    units = [_UNIT.fullmatch(x) for x in (p, g)]
    p, g = (m[1].strip() if m else x for m, x in zip(units, (p, g)))
    short, long = sorted((re.findall("[a-zA-Z]+", m[2])[-1].removesuffix("s") if m else "" for m in units), key=len)
    if short and not re.match(".*".join(short) if len(long) > 2 else short + "$", long):  # 'in' is 'inches', 'm' is not 'mm'
        return False
    left = [sides[0] for sides in (_split(p, "="), _split(g, "=")) if len(sides) == 2]
    if len(left) == 2 and left[0] != left[1]:
        return all(re.search("[a-z]", x) for x in left) and _ask(p, g, budget)
    p, g = _right_side(p), _right_side(g)
    scales = [(1, 1)] + [(100, 1)] * (r"\%" in g) + [(1, 100)] * (r"\%" in p)  # 50% is 50, and it is 1/2
    p, g = (re.sub(r"^(\d+):(\d+)$", r"\1/\2", x.replace(r"\%", "")) for x in (p, g))
    if "=" in p + g or p == g:
        return p == g
    a, b = _value(p, 0), _value(g, 0)
    if None not in (a, b) and any(u * a == v * b for u, v in scales):
        return True
    a, b = _value(p, 1), _value(g, 1)
    far = None not in (a, b) and abs(a - b) > 1e-6 * max(abs(a), abs(b), 0.001)
    exact = [isinstance(x, Fraction) for x in (a, b)]  # no decimal is irrational; Math-Verify takes 3.14159265358979 for pi
    return not (far or all(exact) or exact[0] and "." in p or exact[1] and "." in g) and _ask(p, g, budget)


def _equal(p: str | tuple, g: str | tuple, budget: list[float]) -> bool:
    """Compare two trees: tuples and intervals in order and with their brackets, lists and unions in any order."""
    if isinstance(p, str) or isinstance(g, str):
        return p == g or isinstance(p, str) and isinstance(g, str) and _leaf(p, g, budget)
    if p[0] != g[0] or len(p[1]) != len(g[1]):
        return False
    rest = list(g[1])
    for x in p[1]:
        i = next((i for i, y in enumerate(rest[:None if "any" in p[0] else 1]) if _equal(x, y, budget)), None)
        if i is None:
            return False
        del rest[i]
    return True


_INTEGER = re.compile("-?[0-9]+")


def _same(pred: str, gold: str) -> bool:
    if pred == gold or max(len(pred), len(gold)) > MAX_CHARS:
        return pred == gold
    if _INTEGER.fullmatch(pred) and _INTEGER.fullmatch(gold):  # most of GSM8K
        return int(pred) == int(gold)
    pred, gold, budget = _normal(pred), _normal(gold), [HARD_LIMIT]
    unequal = [bool(re.search(r"[<>]|\\[lg]e(?![a-z])", x)) for x in (pred, gold)]
    if sum(unequal) == 1:  # x > 3 is (3, \infty); Math-Verify wants the inequality second
        return _ask(*((gold, pred) if unequal[0] else (pred, gold)), budget)
    try:  # '70,110' may be one number or two, '115,000' only one
        ways = (True,) if re.search(r",0\d", pred + gold) else (True, False)
        readings = dict.fromkeys((_tree(pred, thousands), _tree(gold, thousands)) for thousands in ways)
        return bool(pred) and any(_equal(p, g, budget) for p, g in readings)
    except (ArithmeticError, ValueError, RecursionError):  # hostile nesting, a number past every limit
        return False


# -- slow path: Math-Verify in child processes ------------------------------------------------------------------------------

WORKERS, HARD_LIMIT = min(16, os.cpu_count() or 1), 6.0  # children; seconds a pair may take
# Not for Math-Verify: plain words, and what makes it hang or fill the memory.
_HOPELESS = re.compile(r"\^\s*(?:\{[^}]*|.)[\^!]|\^\s*\{?-?\d{4}|\)\^\{?\d{3}|(?<!\d)!|\d{3}!|\d{60}|(?<![a-zA-Z\\])[a-zA-Z]{4}"
                       r"|\\(?:sum|prod|i*int|oint|lim|uparrow|begin)(?![a-z])")
_idle = []   # children without work; a forked process must not share its parent's
os.register_at_fork(after_in_child=_idle.clear)


def _serve() -> None:
    """The child: reads [gold, pred] a line, answers 1 or 0 a line, ends with its parent (end of file)."""
    import json, resource, signal, sys  # noqa: E401 (this source runs alone)
    from math_verify import LatexExtractionConfig, parse, verify
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    config, out, sys.stdout = [LatexExtractionConfig()], sys.stdout, sys.stderr
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 10)  # Math-Verify's own alarm is lost inside C code, and the parent may be gone
        try:
            gold, pred = (parse(f"${s}$", config, fallback_mode="no_fallback", parsing_timeout=2) for s in json.loads(line))
            verdict = bool(gold and pred) and verify(gold, pred, float_rounding=12, strict=True, timeout_seconds=2)
        except BaseException:
            verdict = False
        print(int(verdict), file=out, flush=True)


def _talk(child: subprocess.Popen, line: bytes, seconds: float) -> bytes:
    """Sends a line and returns the child's; b'' when it ended, or took too long and was killed."""
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        child.stdin.write(line)
        return child.stdout.readline()
    except OSError:
        return b""
    finally:
        timer.cancel()


def _spawn() -> subprocess.Popen:
    """A fresh interpreter, never a fork: torch's threads and locks stay out of it, and so does the main script."""
    child = subprocess.Popen([sys.executable, "-P", "-c", inspect.getsource(_serve) + "\n_serve()"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True)
    if _talk(child, b"", 120) != b"ready\n":
        raise RuntimeError("the answer checker did not start: pip install 'math-verify[antlr4_13_2]==0.9.0'")
    return child


def _ask(pred: str, gold: str, budget: list[float]) -> bool:
    """Math-Verify's verdict, or False once the pair's `budget` of seconds is spent."""
    while budget[0] > 0 and not _HOPELESS.search(pred + " " + gold):
        try:
            child = _idle.pop()
        except IndexError:
            child = _spawn()
        start = time.monotonic()
        reply = _talk(child, json.dumps([gold, pred]).encode() + b"\n", budget[0])
        budget[0] -= time.monotonic() - start + (0 if reply else HARD_LIMIT / 2)  # one more chance where the child ended
        if reply:
            _idle.append(child)
            return reply == b"1\n"
    return False


def copies(pred: str, gold: str, question: str) -> bool:
    r"""Is an answer that is right by its value a formula of the question, with nothing computed?  741 of MATH's questions hold one.

    >>> [copies(pred, "27", r"Evaluate $81^{3/4}$.") for pred in ("$81^{3/4}$", "3^3", "27")], copies("0.5", r"\frac12", "Is it 0.5?")
    ([True, False, False], False)
    """
    pred, gold, question = (re.sub(r"\\left|\\right|[dt](?=frac)|[\s{}$]", "", _normal(x[:10_000])) for x in (pred, gold, question))
    plain = re.fullmatch(r"-?(\\frac)?[\d.,/]+", pred) or not re.search(r"(?!^)[-+*/^<>!]|\\[a-z]", pred)   # a number or words may stand in both
    return pred != gold and not plain and pred in question


# -- the graders: task -> (extraction, equality[, what is no answer though it is equal]); a new task takes an entry here ------

GRADERS = {"toy": (lambda text: (re.findall(r"#\s*(-?[0-9]+)\s*\Z", text) or [None])[0], operator.eq),
           "arc": (_choice, lambda p, g: (_choice(p) or p) == g), "gsm8k": (_said, _same), "math": (_said, _same, copies),
           "code": (extract_program, passes)}


def extract_answer(text: str, task: str) -> str | None:
    r"""The answer a whole response commits to, None where there is none; `task` is a key of GRADERS.

    >>> extract_answer(r"so $x=\boxed{\frac{1}{2}}$.", "math"), extract_answer("The answer is (B).", "arc")
    ('\\frac{1}{2}', 'B')
    """
    return GRADERS[task][0](text)


def answers_match(pred: str | None, gold: str, task: str) -> bool:
    r"""1[pred = gold], pred from extract_answer   [Eq. 1, Sec. 2.3]

    What cannot be decided within HARD_LIMIT seconds is False. Raises RuntimeError where Math-Verify is needed and missing.

    >>> [answers_match(*pair, "math") for pair in [(r"x = \frac12", "0.5"), ("2, x=1", "1,2"), ("[1,2)", "(1,2)")]]
    [True, True, False]
    """
    return bool(pred and pred.strip()) and GRADERS[task][1](pred, gold)


def grade(responses: Sequence[str], golds: Sequence[str], task: str, questions: Sequence[str] | None = None) -> list[bool]:
    """1[extract(y) = a*] for every response y, each distinct pair decided once; raises as answers_match   [Eq. 1, Sec. 2.3]

    With its question a MATH answer that only restates it is wrong, too: the run, its evaluation and the PRM's labels give it.

    >>> grade(["#### 1,000", "#### 7", "7"], ["1000", "8", "7"], "gsm8k")
    [True, False, False]
    """
    pairs = [(extract_answer(response, task), gold) for response, gold in zip(responses, golds, strict=True)]
    with ThreadPoolExecutor(WORKERS) as pool:  # the threads only wait for the children, which work side by side
        verdicts = dict(pool.map(lambda pair: (pair, answers_match(*pair, task)), dict.fromkeys(pairs)))
    return [verdicts[pair] and not any(no_answer(*pair, q) for no_answer in GRADERS[task][2:])
            for pair, q in zip(pairs, questions or repeat("", len(pairs)), strict=True)]
