r"""Rewards. 1. Is the answer right: extraction and equality, one grader for training and for evaluation. 2. Unit tests. 3. Is every
step right: the process reward model. 4. Eq. 1.

    response -> extract -> normalise -> lists, tuples, intervals, matrices -> exact values, else Math-Verify -> 0 or 1

Each step runs only where the one before it could not decide. Model text is never run: no `eval`, no sympy `parse_expr`; the
parser below is ours, and Math-Verify gets what is left, in child processes with limits on time and memory. The paper does
not say how answers are compared (the official code: strings in training, sympy in evaluation). Here: no tolerance, no
percent rule (2500 is not 25), no "last number" fallback; what cannot be decided is wrong.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import json
import math
import operator
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from typing import Sequence

from data import UserError, check_toy, hub_reason, last_boxed, micro_batches

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
           "arc": (_choice, lambda p, g: (_choice(p) or p) == g), "gsm8k": (_said, _same), "math": (_said, _same, copies)}


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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Unit tests
#
# Model-written programs run in sandbox.py's children: programs, inputs and calls go there, bytes come back and are compared
# here. No expected output enters a program's process.

_OUTPUT = 64 << 10  # bytes a program may print, beside twice what is expected
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_PROBE = """
import os, socket
for act, *args in [(os.fork,), (socket.socket,), (open, {file!r}), (open, {file!r}, "r+"), (os.kill, os.getppid(), 0),
                   (os.execv, {python!r}, [{python!r}, "-c", "print('execv')"])]:
    try: act(*args), print(act.__name__, flush=True)
    except OSError: pass
"""
_servers = {False: [], True: []}  # unsafe -> fork servers without work; a forked process must not share its parent's
os.register_at_fork(after_in_child=lambda: [idle.clear() for idle in _servers.values()])


class SandboxError(UserError):
    """One line: model-written programs can't be run safely here, why, and what to do."""


class ForkServer:
    """sandbox.py as a process, and the socket that controls it; it ends when the socket is closed."""

    def __init__(self, unsafe: bool):
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"model-written programs run on Linux only (Landlock, seccomp), and this is {sys.platform}")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = str(Path(__file__).resolve().with_name("sandbox.py"))
        command = [sys.executable, "-s", "-S", "-P", script, str(theirs.fileno()), *["--unsafe"] * unsafe]
        with theirs:
            self.process = subprocess.Popen(command, env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}, pass_fds=[theirs.fileno()],
                                            cwd="/", start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        state = self.control.recv(4096).decode() or "its fork server did not start"
        if state == "ready" and not unsafe:
            ended, out = self.run(_PROBE.format(file=script, python=sys.executable))
            state = f"open to them: {', '.join(sorted({*out.decode().split()}))}" if out else "ready" if ended else "the probe failed"
        if state != "ready":
            raise SandboxError(f"model-written programs can't be run safely here: {state}; or accept less with --unsafe-code")

    def run(self, program: str, stdin: str = "", calls: list | None = None, expected: int = 0) -> tuple[bool, bytes]:
        """(ended with exit status 0 in time, what it printed, or the JSON lines of its calls' values); sets `alive`"""
        (read, write), out, status = os.pipe(), bytearray(), b""
        with open(read, "rb", buffering=0) as answer, suppress(ConnectionError):
            with open(write, "wb"), open(os.memfd_create("job"), "w+") as job:
                json.dump({"program": program, "stdin": stdin, "calls": calls}, job)
                job.seek(0)
                socket.send_fds(self.control, [b"run"], [job.fileno(), write])
            while len(out) <= _OUTPUT + 2 * expected and (chunk := answer.read(1 << 16)):
                out += chunk
            answer.close()  # a flood meets a broken pipe
            status = self.control.recv(64)
        self.alive = status != b""
        return status == b"0" and not chunk, bytes(out)


def same_tokens(out: bytes, want: bytes) -> bool:
    """Valid UTF-8, equal tokens on equal lines, blank lines aside; 1e-6 relative where the expected token has . or e

    >>> same_tokens(b"1 2 \\n0.333333333\\n", b"1 2\\n\\n0.3333333"), same_tokens(b"1\\n2\\n", b"1 2"), same_tokens(b"2.0", b"2")
    (True, False, False)
    """
    def same(x: bytes, y: bytes) -> bool:
        close = re.search(rb"[.eE]", y) and _NUMBER.fullmatch(x) and _NUMBER.fullmatch(y)
        return x == y or bool(close) and math.isclose(float(x), float(y), rel_tol=1e-6, abs_tol=1e-9)

    got, gold = ([line.split() for line in text.split(b"\n") if line.split()] for text in (out, want))
    same_shape = out.decode(errors="replace").encode() == out and [*map(len, got)] == [*map(len, gold)]
    return same_shape and all(map(same, chain(*got), chain(*gold)))


def same_value(got: object, want: object) -> bool:
    """Equal as JSON values: a tuple is a list, a key its string, a bool no number; floats within 1e-6 relative

    >>> same_value((1, 2.0), [1, 2]), same_value(True, 1), same_value({1: "a"}, {"1": "a"}), same_value(0.1 + 0.2, 0.3)
    (True, False, True, True)
    """
    if isinstance(want, list):
        return isinstance(got, (list, tuple)) and len(got) == len(want) and all(map(same_value, got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        got = {str(k): v for k, v in got.items()}
        return got.keys() == want.keys() and all(same_value(got[k], want[k]) for k in want)
    close = isinstance(want, float) and isinstance(got, float) and math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9)
    return close or got == want and isinstance(got, bool) == isinstance(want, bool)


def _decode(line: bytes) -> object:
    """The plain data that sandbox.plain wrote as a line; an object equal to nothing where a hostile child sent other bytes."""
    kinds = {"tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset, "complex": lambda v: complex(*v)}
    try:
        return json.loads(line, object_hook=lambda o: [kinds[kind](v) for kind, v in o.items()][0])
    except Exception:  # no plain data, deep nesting, unhashable members, endless digits
        return object()


# The test code of a data set, run in a child of its own, without the program: each call it makes of the tested function
# is answered from `known`; the first unknown one is printed, and the program answers it in another child.
_REPLAY = """
import math, os, random, sys
inf, nan, known = math.inf, math.nan, iter([{known}])
def stub(name):
    def ask(*args, **named):
        for value in known: return value
        os._exit(print(f"{{name}}(*{{args!r}}, **{{named!r}})", flush=True) or 0)
    return ask
random.seed(0)
{source}
print("passed")
"""


def assert_tests(source: str, entry: str | None = None, setup: str = "", reference: str = "") -> dict:
    """The `tests` of run_unit_tests from assert lines (MBPP), or from a module with check(candidate) for `entry` (HumanEval)

    `setup` runs after the program, before the calls (MBPP's test_setup_code); `reference` is code that the test needs and no
    program is asked for (HumanEval: prompt + canonical solution). Only f(...) == literal is compared in this process.

    >>> assert_tests("assert add(2, 3) == 5"), *assert_tests("assert abs(half(3) - 1.5) < 1e-6")
    ({'inputs': ['add(2, 3)'], 'outputs': ['5'], 'setup': ''}, 'replay')
    """
    tree = ast.parse(source)
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    names = {"candidate"} if entry else called - set(dir(builtins)) or called
    tests = {"inputs": [], "outputs": [], "setup": f"{setup}\ncandidate = {entry}" if entry else setup}
    try:
        for node in next(n for n in tree.body if getattr(n, "name", "") == "check").body if entry else tree.body:
            match node:
                case ast.Pass() | ast.Expr(ast.Constant()) | ast.Assert(ast.Constant(True)):
                    continue
                case ast.Assert(ast.Compare(ast.Call(ast.Name(f)) as call, [ast.Eq()], [value])) if f in names:
                    tests["inputs"].append(ast.unparse(call))
                    tests["outputs"].append(repr(ast.literal_eval(value)))
                case _:
                    raise ValueError
    except ValueError:  # some assert has another form
        stubs = [f"{n} = stub({entry or n!r})" for n in sorted(names)]
        return {"replay": "\n".join([reference, *stubs, source, "check(candidate)" * bool(entry)])}
    return tests


def _passes(server: ForkServer, program: str, tests: dict, fn_name: str | None) -> bool:
    known, same = [], same_value
    while "replay" in tests:
        ended, out = server.run(_REPLAY.format(known=", ".join(known), source=tests["replay"]))
        question = out.decode().rstrip("\n").rpartition("\n")[2]
        if not ended or question == "passed":
            return ended and known != []  # a test that asks nothing is none
        known.append(repr(_decode(server.run(program, calls=[question])[1])))  # what is no plain data is no Python either
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"tests need as many outputs as inputs, and one at least: {len(inputs)} inputs, {len(outputs)} outputs")
    if "setup" in tests:
        program, outputs, same = f"{program}\n{tests['setup']}", [*map(ast.literal_eval, outputs)], operator.eq
    elif fn_name is None:
        for pair in zip(inputs, outputs):
            given, want = ("\n".join(t) if isinstance(t, list) else t for t in pair)
            ended, out = server.run(program, given, expected=len(want := want.encode("utf-8", "surrogatepass")))
            if not ended or not same_tokens(out, want):
                return False
        return True
    else:
        # APPS wraps the value of most problems, [9] for 9: of 460 rows with a function that we looked at, 455 have one-item lists alone and
        # mean the item; in the other 5 some output is no such list, and all stand for themselves. So [9] is wrong for 9.
        inputs = [[fn_name, i] for i in inputs]
        outputs = [o[0] for o in outputs] if all(isinstance(o, list) and len(o) == 1 for o in outputs) else outputs
    while inputs:  # all calls in one process while all goes well; the first failure again in a fresh one, where it is final
        ended, out = server.run(program, calls=inputs, expected=len(repr(outputs)))
        pairs = [*zip(map(_decode, out.split(b"\n")[:-1]), outputs)]
        right = next((k for k, (value, want) in enumerate(pairs) if not same(value, want)), len(pairs))
        inputs, outputs = inputs[right:], outputs[right:]
        if right == 0 or not (inputs or ended):
            return False
    return True


def run_unit_tests(program: str, tests: dict, fn_name: str | None = None, unsafe: bool = False) -> bool:
    """1[the program passes every test], run in sandbox.py's fork server; no reward for half of them

    `tests`: {"inputs": [...], "outputs": [...]} as in APPS (stdin texts, or argument lists of `fn_name`), or what assert_tests
    returns; `fn_name` and `unsafe` may stand in them. Raises SandboxError where isolation falls short, unless `unsafe`.

    >>> run_unit_tests("def square(x): return x + x", {"inputs": [[2], [3]], "outputs": [[4], [9]]}, "square")
    False
    """
    unsafe = unsafe or tests.get("unsafe", False)
    for _ in range(2):  # once more where the fork server was killed from outside
        try:
            server = _servers[unsafe].pop()
        except IndexError:
            server = ForkServer(unsafe)
        verdict = _passes(server, program, tests, fn_name or tests.get("fn_name"))
        if server.alive:
            _servers[unsafe].append(server)
            break
    return verdict


_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)


def extract_program(text: str) -> str | None:
    r"""The program of a response: its last fenced code block, else all of it, without a stray fence.

    >>> extract_program("Here:\n```python\nprint(1)\n```\nIt prints."), extract_program("print(1)"), extract_program("")
    ('print(1)', 'print(1)', None)
    """
    blocks = [block for block in _BLOCK.findall(text) if block.strip()]
    return (blocks or [re.sub(r"(?m)^[ \t]*```.*", "", text)])[-1].strip("\n") or None


def passes(program: str, gold: str) -> bool:
    """1[y^ passes all unit tests of x]; gold is their JSON: those of APPS, or {"asserts": arguments of assert_tests}   [Eq. 1, Sec. 2.1]"""
    tests = json.loads(gold)
    return run_unit_tests(program, {**tests, **assert_tests(**tests["asserts"])} if "asserts" in tests else tests)


GRADERS["code"] = (extract_program, passes)


def grade_programs(programs: Sequence[str], tests: Sequence[dict], fn_names: Sequence[str | None] | None = None,
                   workers: int | None = None, unsafe: bool = False) -> list[bool]:
    """run_unit_tests for many programs, tests and fn_names one a program, in `workers` fork servers."""
    with ThreadPoolExecutor(workers or WORKERS) as pool:
        return list(pool.map(run_unit_tests, programs, tests, fn_names or repeat(None), repeat(unsafe)))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Steps, and the process reward model
#
# Text goes between policy and PRM, never token ids, so their tokenizers may differ. A PRM reads
# query, step, separator, step, separator, ... and says at each separator how likely the steps so far are right.

_FORMULA = (r"\\[$\\](?![\[(])|\$\$(?:(?!\$\$).){0,4000}\$\$|\$[^$\n]+\$|\$(?!<|\d[\d,.]*+(?!\s*[=+\-*/^\\(<>]))[^$]{1,1000}\$|\\\[(?:(?!\\\[).){0,4000}?\\\]|\\\((?:(?!\\\().){0,4000}?\\\)|"
            r"\\begin\{(\w+\*?)\}(?:(?!\\begin\{\1\}).){0,8000}?\\end\{\1\}|\[asy\](?:(?!\[asy\]).){0,8000}?\[/asy\]")
_STEP_END = re.compile(rf"{_FORMULA}|(?P<end>\s*\n\s*(?![a-z\s]|\\\[|\\begin|\$\$)|(?<=[.!?])(?= +[A-Z$\\])|(?<=[.!?][$)])(?= +[A-Z$\\])| ;(?= ))",
                       re.S)


def step_ends(text: str) -> list[int]:
    r"""Where each step of a solution ends: at a new line, at the end of a sentence, or at the toy's " ;", never inside a formula.

    A formula is what stands in $, $$, \[ \], \( \), \begin \end or [asy]. A line that goes on with a small letter or a displayed formula is the
    same step still.
    """
    ends = [m.end() for m in _STEP_END.finditer(text) if m["end"] is not None]
    cuts = [e for a, e in zip([0, *ends], ends) if text[a:e].strip()]
    last = cuts[-1] if cuts else 0
    return [*cuts, len(text)] if text[last:].strip() else [*cuts[:-1], len(text)] if cuts else []


def split_steps(text: str) -> list[str]:
    r"""The steps of a solution, as `step_ends` cuts them, without the white space and " ;" between them   [App. A]

    >>> split_steps("3 boxes hold $1.5. X$ each. So $x = 4.5$.\n#### 4.5")
    ['3 boxes hold $1.5. X$ each.', 'So $x = 4.5$.', '#### 4.5']
    >>> split_steps("Cid = Ida * 6 = 5 * 6 = 0 ; # 0")
    ['Cid = Ida * 6 = 5 * 6 = 0', '# 0']
    """
    ends = step_ends(text)
    return [text[a:e].strip().removesuffix(" ;") for a, e in zip([0, *ends], ends)]


PRM_FORMATS = ("own", "shepherd", "qwen")


class PRM:
    """A process reward model: p_j = P(steps 1..j are right | query), in [0, 1]   [Sec. 2.3, App. A]

    own       AutoModelForTokenClassification with two labels, 1 = right, read at the end of the separator after each step: what train_prm.py
              and TRL's PRMTrainer write. `step_separator` and `prompt_template` stand in tokenizer_config.json ("\\n" and "{query}" if not).
    shepherd  Math-Shepherd's: a causal model whose next token at the tag is + or -.
    qwen      Qwen2.5-Math-PRM's: a two-class head at <extra_0>, in a chat.
    """

    def __init__(self, model, tokenizer, kind: str = "own", token_budget: int = 16384):
        self.model, self.tokenizer, self.kind, self.budget = model.eval(), tokenizer, kind, token_budget
        self.separator = tokenizer.init_kwargs.get("step_separator", "\n")
        self.template = tokenizer.init_kwargs.get("prompt_template", "{query}")
        self.limit = min(getattr(model.config, "max_position_embeddings", 1 << 30), tokenizer.model_max_length)

    @classmethod
    def load(cls, path: str | Path, kind: str = "own", token_budget: int = 16384) -> "PRM":
        """A PRM from a folder or the hub, bfloat16 on a GPU; raises UserError where it can't be read or is of another kind"""
        import torch
        import transformers
        maker = {"own": transformers.AutoModelForTokenClassification, "shepherd": transformers.AutoModelForCausalLM, "qwen": _qwen_prm()}[kind]
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model, info = maker.from_pretrained(path, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32, output_loading_info=True)
        except Exception as e:  # missing, torn, of an unknown kind: many exception types, one way out
            raise UserError(f"--prm {path}: {hub_reason(e)}") from None
        if info["missing_keys"] or kind == "own" and (model.config.num_labels != 2 or not hasattr(model, "score")):  # BERT's and GPT-2's heads have other names
            raise UserError(f"--prm {path}: it has no two-label head of --prm-format {kind}; the formats are {', '.join(PRM_FORMATS)}")
        return cls(model, tokenizer, kind, token_budget)

    def encode(self, query: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """ids (L,) of query and steps, and the place of each step's score"""
        ask = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.kind == "own":
            ids = [self.tokenizer.bos_token_id] * (self.tokenizer.bos_token_id is not None) + ask(self.template.replace("{query}", query))
            separator, places = ask(self.separator), []
            for step in steps:
                ids = ids + ask(step) + separator
                places.append(len(ids) - 1)
            return ids, places
        tag = {"shepherd": "ки", "qwen": "<extra_0>"}[self.kind]
        steps = [s.replace(tag, "") for s in steps]
        if self.kind == "shepherd":
            text = query.replace(tag, "") + " " + "\n".join(f"Step {j}: {s} {tag}" for j, s in enumerate(steps, 1))
            ids = self.tokenizer(text)["input_ids"]
        else:
            turns = zip(("system", "user", "assistant"), (r"Please reason step by step, and put your final answer within \boxed{}.",
                                                          query.replace(tag, ""), tag.join([*steps, ""])))
            ids = self.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=True, return_dict=False)
        mark = ask(f" {tag}" if self.kind == "shepherd" else tag)[-1]
        return ids, [i for i, t in enumerate(ids) if t == mark]

    def logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]):
        """(steps of all rows, 2) for wrong and right; the head runs at the steps' places only, and causal attention needs no mask for padding"""
        import torch
        L, dev = max(map(len, rows)), self.model.device
        ids = torch.tensor([list(r) + [0] * (L - len(r)) for r in rows], device=dev)                # (B, L)
        row = torch.tensor([b for b, at in enumerate(places) for _ in at], dtype=torch.long, device=dev)
        column = torch.tensor([i for at in places for i in at], dtype=torch.long, device=dev)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[row, column]   # (steps, width)
        if self.kind != "shepherd":
            return self.model.score(hidden).float()
        signs = [self.tokenizer(f" {sign}", add_special_tokens=False)["input_ids"][-1] for sign in "-+"]
        return torch.nn.functional.linear(hidden, self.model.get_output_embeddings().weight[signs]).float()

    def score(self, queries: Sequence[str], responses: Sequence[str]) -> list[list[float]]:
        """Probabilities in [0, 1], one a step of each response; equal pairs are read once, batches are of equal length and a token budget

        What the PRM can't read it does not vouch for: a response without any step is one step of 0, steps beyond the longest
        input it takes are 0, and so is a score that is not a number (said on stderr).
        """
        import torch
        pairs, found, odd = list(dict.fromkeys(zip(queries, responses, strict=True))), {}, 0
        inputs = [self.encode(q, split_steps(r)) for q, r in pairs]
        home, gpu = self.model.device, "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(gpu)
        with torch.inference_mode():
            for rows, which in micro_batches([(ids[:self.limit], k) for k, (ids, _) in enumerate(inputs) if ids], self.budget):
                places = [[i for i in inputs[k][1] if i < self.limit] for k in which]
                p = self.logits(rows, places).softmax(-1)[:, 1].tolist()
                odd += sum(x != x for x in p)
                for k, at in zip(which, places):
                    mine, p = p[:len(at)], p[len(at):]
                    found[k] = [x if x == x else 0.0 for x in mine] + [0.0] * (len(inputs[k][1]) - len(at)) or [0.0]
        self.model.to(home)
        if odd:
            print(f"PRM: {odd} step scores are not a number and count as 0", file=sys.stderr)
        scores = {pair: found.get(k, [0.0]) for k, pair in enumerate(pairs)}
        return [scores[pair] for pair in zip(queries, responses)]


def _qwen_prm():
    import torch
    from transformers import Qwen2Model, Qwen2PreTrainedModel

    class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
        """The layout of the released weights, so that no code from the hub has to run"""
        def __init__(self, config):
            super().__init__(config)
            self.model, width = Qwen2Model(config), config.hidden_size
            self.score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
            self.post_init()
    return Qwen2ForProcessRewardModel


# ---------------------------------------------------------------------------------------------------------------------
# 4. The reward

REWARDS = {"answer": (0.0, 1.0), "tests": (0.0, 1.0), "answer+prm": (-1.0, 2.0), "answer+oracle": (-1.0, 2.0)}   # name -> the least and the greatest r


def step_scores(queries: Sequence[str], responses: Sequence[str], reward: str, prm: PRM | None = None) -> list[list[float]]:
    """The process scores of each response, one in [0, 1] a step; empty lists where the reward has no process part.

    answer+oracle is the toy's exact step checker in the place of a perfect PRM: the ceiling to compare a learned one with.
    """
    if reward == "answer+oracle":
        return [[float(ok) for ok in check_toy(q, r)] for q, r in zip(queries, responses, strict=True)]
    return prm.score(queries, responses) if reward == "answer+prm" else [[] for _ in responses]


def r_prm(steps: Sequence[float]) -> float:
    """r_prm = 2 min_j p_j - 1, in [-1, 1]: a solution is as good as its worst step   [Sec. 2.3, App. A]

    >>> r_prm([1.0, 0.25, 0.5])
    -0.5
    """
    return 2 * min(steps) - 1


def combine(correct: bool, steps: Sequence[float]) -> float:
    """r = 1[a^ = a*] + r_prm(x, y^)   [Eq. 1, Sec. 2.3]; without step scores the first term alone

    >>> combine(True, []), combine(True, [0.9, 0.5]), combine(False, [0.9, 0.5])
    (1.0, 1.0, 0.0)
    """
    return float(correct) + (r_prm(steps) if steps else 0.0)
