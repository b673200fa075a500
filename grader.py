r"""Is the answer right: extraction and equality, one grader for training and for evaluation.

    response -> extract -> normalise -> trees -> exact values, else Math-Verify -> 0 or 1

A step runs only where the step before it did not decide. Model text is never run: no `eval`, no
sympy `parse_expr`. The parser below is our own. Math-Verify gets what it cannot read, in child
processes with limits on time and memory. The paper does not say how answers are compared (the
official code: strings in training, sympy in evaluation). Here: no tolerance, no percent rule
(2500 is not 25), no "last number" fallback. What cannot be decided is wrong.
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
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from typing import Callable, Sequence

from data import last_boxed
from sandbox import extract_program, passes
from toy import reaches

Number = Fraction | complex
Tree = str | tuple  # a leaf, or (kind, children)

# -- extract: response -> answer ----------------------------------------------------------------

_PHRASES = [
    re.compile(r".*####\s*([^\n]+)", re.S),
    re.compile(
        r".*(?:final answer is|answer is|answer\s*\**:)[:\s*]*(?:\$\$|\\\[)?\s*([^\n]+)",
        re.S | re.I,
    ),
]
# A full stop ends the answer, but "2.5" and "4 p.m." go on.
_SENTENCE_END = re.compile(
    r"(?<![ap]\.m)\.(?=[\s*$]|$)(?!\s*m\.)|,?\s+(?:because|since|which|where|I hope)\b"
)
# "A dog" and "3 meters" are no labels, but "A: a dog" and "B a dog" are.
_LABEL = re.compile(
    r"(?:(?i:option|choice|answer|letter)\s+)?"
    r"(?:\(([A-Ea-e1-5])\)|([A-E1-5])\)|([B-E])(?=[\s.:,]|$)"
    r"|([A1-5])(?=[.:,](?!\d)|\s*$)|([a-e])(?=[).]?$))"
)
_SECOND_LABEL = re.compile(
    r"[\s,.]*(?:or|and|/|&|,)\s*\(?[A-E1-5]\b"
    r"|[\s,.]+[B-E](?=[.,)]|$)"
    r"|[^.\n]*\bor\b[^.\n]*\([A-E1-5]\)"
)
_BARE_LABEL = re.compile(r"\s*\(?[A-E1-5](?:[.):][^\n]*|\s*)")


def _final_answer(text: str) -> str | None:
    r"""The last complete \boxed{}, else what follows "####", "answer is" or "Answer:".

    Boxes joined by "and" are one list. Boxes joined by "or" are no answer.
    """
    box = last_boxed(text, hedged=False)
    if box is not None:
        return box or None
    for phrase in _PHRASES:
        if m := phrase.match(text):
            sentence = _SENTENCE_END.split(m[1][:2000], maxsplit=1)[0]
            return sentence.strip(" *\t\r") or None
    return None


def _choice(text: str) -> str | None:
    """The one label a response names: "(B)", "B.", "B) text"; "A or B" names none."""
    named = re.sub(r"(?i)\b(?:correct|right|best) (?:option|choice)\b", "answer", text)
    answer = _final_answer(named)
    if answer is None:
        answer = text if _BARE_LABEL.fullmatch(text) else ""
    markup = r"\\(?:text|mathrm|textbf|mathbf)\b|[{}$*\\\"'`<>\[\]]"
    answer = re.sub(markup, "", answer[:2000]).strip()
    m = _LABEL.match(answer)
    if not m or _SECOND_LABEL.match(answer, m.end()):
        return None
    return m[m.lastindex].upper()


def _story_answer(text: str) -> str | None:
    """The integer after "#" at the end of a story."""
    m = re.search(r"#\s*(-?[0-9]+)\s*\Z", text)
    return m[1] if m else None


# -- normalise: one spelling for what LaTeX and prose spell in many ways ------------------------

MAX_CHARS = 500  # the longest reference answer of MATH has 159; longer ones compare as strings
_UNICODE = {
    **{"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi "},
    **{"∞": r"\infty ", "√": r"\sqrt ", "²": "^2", "³": "^3", "≤": r"\le ", "≥": r"\ge "},
    **{"∪": r"\cup ", "½": r"\frac12 ", "€": "", "£": "", "\0": "", "\1": ""},
}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# In \text a single letter is a unit, elsewhere it is a variable.
_UNIT_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter"}


def _unit_text(m: re.Match) -> str:
    """The content of a text command, its single unit letters spelled out."""
    spelled = re.sub(r"(?<![\w.])[mgshL](?![\w.])", lambda u: _UNIT_LETTERS[u[0]], m[1])
    return f" {spelled} "


def _repeating(m: re.Match) -> str:
    r"""0.1\overline{6} -> (0.10+6/90)"""
    whole, digits, period = m.groups()
    return f"({whole}{digits}0+{period}/{'9' * len(period)}{'0' * len(digits)})"


_SPELLINGS: list[tuple[str, str | Callable]] = [
    # layout that carries no meaning
    (r"\\phantom\s*(?:\{[^}]*\}|.)", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\[()\[\]]", ""),
    (r"(?<!\\)\$|\*\*", ""),
    # thousands: 1,\!000  1{,}000  1\,000  1~000
    (r"(?<=\d)\s*,\s*\\!\s*(?=\d{3})|\\!", ""),
    (r"(?<=\d)\{,\}(?=\d)|(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ""),
    # every space is one blank; 1 000 000 is one number, "12 34" is not
    (r"\\[,;: ]|~|\\q?quad(?![a-z])|\s+", " "),
    (
        r"(?<![\d.,] )(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d/]| \d)",
        lambda m: m[0].replace(" ", ""),
    ),
    # commands with several names
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:leq|leqslant|geq|geqslant|neq)(?![a-z])", lambda m: m[0][:3]),
    (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\l[bB]race(?![a-z])", r"\\{"),
    (r"\\r[bB]race(?![a-z])", r"\\}"),
    # text and fonts
    (
        r"\\(?:mbox|text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|operatorname|boxed|fbox)"
        r"\s*\{([^{}]*)\}",
        _unit_text,
    ),
    # subscripts; a choice (C) is C; a set of one element is the element
    (r"\s*_\{(\w+)\}", r"_\1"),
    (r"(?<![\w})])\(([A-Z])\)(?![\w({])", r"\1"),
    (r"^\s*\\\{([^,]*)\\\}\s*$", r"\1"),
    # money, percent, time of day
    (r"^\\\$\s*([\d.,]*\d)[.,\s]*$", r"\1 dollars"),
    (r"\\\$", ""),
    (r"\\?%", r"\\%"),
    (r"(?i)(?<=\d)(?::00)?\s*([ap])\.?\s?m\b\.?", lambda m: f" {m[1].lower()}m"),
    # functions without a backslash, arguments without braces
    (r"(?<![a-zA-Z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![a-zA-Z])", r"\\\1"),
    (r"(?<!\w)infinity", r"\\infty"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(frac|sqrt)\s*([\da-z])", r"\\\1{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([\da-z])", r"\1{\2}"),
    # lists in words
    (r"[,;]?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
    # repeating decimals and mixed numbers
    (r"(\d*\.)(\d*)\\overline\s*\{(\d+)\}", _repeating),
    (
        r"(?<![\d.\w}^])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<![\d.\w}^])(\d+)\s(\d+)/(\d+)",
        r"(\1\4+\2\5/\3\6)",
    ),
    # degrees count inside a function and are left out elsewhere
    (
        r"(\\(?:sin|cos|tan|cot|sec|csc)\s*)\(?([\d.]+)\s*\^\s*\{?\s*\\circ\s*\}?\)?",
        r"\1(\2\\pi/180)",
    ),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])|°", " "),
    # an approximation beside the answer
    (r"^\s*\\approx|\\approx.*", ""),
    # blanks stay between two words or numbers only; "2 3" is not 6
    (r"(?<![\w\s])\s+|\s+(?![\w\s])", ""),
    (r"(?<=\d)(?<!_\d)\s+(?=[\d.])|(?<=\.)(\d+)(?=\.\d)", r"\1|"),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]


@functools.lru_cache(100_000)
def _normal(text: str) -> str:
    """LaTeX or plain text -> one canonical spelling, still a string."""
    text = text.translate(str.maketrans(_UNICODE))
    row_end = "\1" if r"\begin" in text else "\\"
    text = text.replace(r"\\", row_end)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip(" \1").rstrip(" .,;:")
    if text.lower() in _NUMBER_WORDS:
        return str(_NUMBER_WORDS.index(text.lower()))
    return text


# -- structure: lists, tuples, intervals, matrices, unions --------------------------------------

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
_OPEN = ("(", "[", "{", r"\{", r"\langle", r"\begin")
_CLOSE = (")", "]", "}", r"\}", r"\rangle", r"\end")
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[^}]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.S
)
_BRACKETS = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.S)
_THOUSANDS = re.compile(r"(?<![\d,.(\[])(\d{1,3}(?:,\d{3})+)(?![\d,])(?![^(\[]*[)\]])")


def _split(text: str, *separators: str) -> list[str]:
    """The parts of `text` between the separators that stand outside all brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _items(text: str) -> list[str]:
    r"""The items of a list; x \pm y is the two items x + y and x - y."""
    items = []
    for item in filter(None, _split(text, ",", ";")):
        if r"\pm" in item:
            items += [item.replace(r"\pm", "+", 1), item.replace(r"\pm", "-", 1)]
        else:
            items.append(item)
    return items


def _matrix(cells: str) -> Tree:
    """The rows of a matrix; a column is the same as a tuple."""
    rows = [row for row in cells.split("\1") if row.strip()]
    children = []
    for row in rows:
        children.append(("row", tuple(_tree(cell, False) for cell in _split(row, "&"))))
    if all(len(cells) == 1 for _, cells in children):
        return "()", tuple(cells[0] for _, cells in children)
    return "rows", tuple(children)


@functools.lru_cache(100_000)
def _tree(text: str, thousands: bool) -> Tree:
    """A leaf, or (kind, children); the children of "any," and "any|" stand in any order.

    >>> _tree("(1,2]", False), _tree("2,1", False)
    (('(]', ('1', '2')), ('any,', ('2', '1')))
    """
    if thousands:
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    for kind, parts in (("any,", _items(text)), ("any|", _split(text, r"\cup"))):
        if len(parts) > 1:
            return kind, tuple(_tree(part, thousands) for part in parts)
    # a name in front of a structure, as in 'A = \begin{pmatrix}...' or 'x \in (1,2)', is dropped
    sides = _split(text, "=", r"\in")
    if len(sides) == 2 and not re.match(r"[-\d]", sides[0]):
        tree = _tree(sides[1], thousands)
        if not isinstance(tree, str):
            return tree
    if m := _MATRIX.fullmatch(text):
        return _matrix(m[2])
    m = _BRACKETS.fullmatch(text)
    parts = _split(m[2], ",") if m else []
    if len(parts) > 1:
        kind = {r"\{": "any,", r"\langle": "()"}.get(m[1], m[1] + m[3])
        return kind, tuple(_tree(part, False) for part in parts)
    return text


# -- value: exact arithmetic on what the text shows ---------------------------------------------

_LEXER = re.compile(
    r"\\[a-zA-Z]+"  # a command
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?"  # a number
    r"|[a-zA-Z](?:_(?:\{\w+\}|\w))?"  # a letter and its subscript
    r"|\S"
)
_UNKNOWN = re.compile(r"[a-zA-Z].*|\\(?:infty|pi|theta|alpha|beta|lambda|phi)")
_CONSTANTS = {"e": math.e, "i": 1j, r"\pi": math.pi}
_PRODUCTS = {
    "*": operator.mul,
    r"\cdot": operator.mul,
    r"\times": operator.mul,
    "/": operator.truediv,
}


class _Parser:
    """Recursive descent: sum -> product -> power -> atom; raises where it cannot read."""

    def __init__(self, text: str, point: int):
        self.tokens = _LEXER.findall(text)[::-1]  # the next token is the last
        self.point = point

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in tokens

    def unknown(self, name: str) -> Fraction:
        """A random number, the same for the same name and point."""
        return Fraction(random.Random(f"{name} {self.point}").randint(10**6, 10**7), 4_000_037)

    def sum(self) -> Number:
        value = self.product()
        while self.next_is("+", "-"):
            value += self.product() if self.tokens.pop() == "+" else -self.product()
        return value

    def product(self) -> Number:
        value = self.power()
        while self.tokens and not self.next_is("+", "-", ")", "}", "]"):
            times = operator.mul  # nothing between two factors
            if self.next_is(*_PRODUCTS):
                times = _PRODUCTS[self.tokens.pop()]
            value = times(value, self.power())
        return value

    def power(self) -> Number:
        value = self.atom()
        if self.next_is("^"):
            self.tokens.pop()
            value = self.raised(value, self.power())
        return value

    def raised(self, base: Number, exponent: Number) -> Number:
        if not isinstance(exponent, Fraction) or exponent.denominator > 1:
            return base**exponent if self.point else self.unknown(f"{base}^{exponent}")
        if isinstance(base, Fraction):
            bits = (base.numerator * base.denominator).bit_length()
            if abs(exponent) * bits > 100_000:
                raise OverflowError
        return base ** int(exponent)

    def atom(self) -> Number:
        token = self.tokens.pop()
        if token in ("+", "-"):
            value = self.power()
            return -value if token == "-" else value
        if token in ("(", "{", "["):
            value = self.sum()
            self.tokens.pop()
            return value
        if token == r"\frac":
            return self.atom() / self.atom()
        if token == r"\sqrt":
            degree = self.atom() if self.next_is("[") else Fraction(2)
            return self.raised(self.atom(), 1 / degree)
        if self.point and token in _CONSTANTS:
            return _CONSTANTS[token]
        if _UNKNOWN.fullmatch(token):
            return self.unknown(token)
        return Fraction(token)


@functools.lru_cache(100_000)
def _value(text: str, point: int) -> Number | None:
    r"""The value of an expression, None where the parser cannot read it.

    point 0: letters, pi and roots are random Fractions; texts that are equal here are equal
    point 1, 2: letters are other random Fractions, the rest is computed

    >>> _value("1+1/2 - 10^{-2}", 0), round(_value(r"\sqrt[3]{8} + 2\pi", 1), 4)
    (Fraction(149, 100), 8.2832)
    """
    parser = _Parser(text, point)
    try:
        value = parser.sum()
    except Exception:  # whatever the text holds, "cannot be read" is the answer
        return None
    return None if parser.tokens else value


# -- equality -----------------------------------------------------------------------------------

_WORDS = re.compile(r"(?=.*[a-zA-Z]{3}|[A-Z]{2}$)[a-zA-Z][a-zA-Z0-9 .'-]*")
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_(?:\{\w+\}|\w))?'?(?:\([a-z](?:, ?[a-z])*\))?")
_IN_A_BASE = re.compile(r"[0-9A-Z.-]+_\w+")
_INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_INTEGER = re.compile("-?[0-9]+")
_UNIT = re.compile(
    r"(.*(?:[\d})]|\\pi))\s*"  # what is measured
    r"((?:(?<![a-zA-Z\\])(?!dozen|hundred|thousand|[mb]illion)"
    r"(?:[a-z]{3,}|[ckm]m|[km]g|m[Lil]|ft|in|h|lb|oz|hr|yd|sq|cu|[ap]m|gm|th|USD)"
    r"(?![a-zA-Z])[./ -]*)+)"
    r"(?:\^\s*\{?\s*[123]\s*\}?)?"
)


def _measure(text: str) -> tuple[str, str]:
    """("12", "inche") of "12 inches": the number, and the last word of its unit."""
    m = _UNIT.fullmatch(text)
    if not m:
        return text, ""
    return m[1].strip(), re.findall("[a-zA-Z]+", m[2])[-1].removesuffix("s")


def _same_unit(a: str, b: str) -> bool:
    """A missing unit is any unit; "in" abbreviates "inches", but "m" is not "mm"."""
    short, long = sorted((a, b), key=len)
    letters_in_order = ".*".join(short) if len(long) > 2 else short + "$"
    return not short or bool(re.match(letters_in_order, long))


def _right_side(text: str) -> str:
    """'x = 2 + 3 = 5' -> '5'; an equation that says more than names and numbers is left whole."""
    *left, right = _split(text, "=")
    for side in left:
        values = {_value(side, 1), _value(side, 2)} - {None}
        if not _NAME.fullmatch(side) and len(values) != 1:
            return text
    return right


def _scales(p: str, g: str) -> list[tuple[int, int]]:
    """50% is 50, and it is 1/2: the factors of p and g that make them equal."""
    scales = [(1, 1)]
    if r"\%" in g:
        scales.append((100, 1))
    if r"\%" in p:
        scales.append((1, 100))
    return scales


def _same_value(p: str, g: str, scales: list[tuple[int, int]]) -> bool | None:
    """Equal or not by value; None where only Math-Verify can tell."""
    a, b = _value(p, 0), _value(g, 0)
    if a is not None and b is not None and any(u * a == v * b for u, v in scales):
        return True
    a, b = _value(p, 1), _value(g, 1)
    if a is not None and b is not None and abs(a - b) > 1e-6 * max(abs(a), abs(b), 0.001):
        return False
    p_exact, g_exact = isinstance(a, Fraction), isinstance(b, Fraction)
    if p_exact and g_exact:
        return False
    # no decimal is irrational; Math-Verify takes 3.14159265358979 for pi
    if (p_exact and "." in p) or (g_exact and "." in g):
        return False
    return None


def _same_leaf(p: str, g: str, budget: list[float]) -> bool:
    """Compare two answers without inner structure."""
    if _IN_A_BASE.fullmatch(p) or _IN_A_BASE.fullmatch(g):
        (a, _, a_base), (b, _, b_base) = p.partition("_"), g.partition("_")
        return a == b and "" in (a_base, b_base)
    if _WORDS.fullmatch(p) and _WORDS.fullmatch(g):
        return re.sub(r"[\W_]", "", p).lower() == re.sub(r"[\W_]", "", g).lower()
    (p, p_unit), (g, g_unit) = _measure(p), _measure(g)
    if not _same_unit(p_unit, g_unit):
        return False
    p_sides, g_sides = _split(p, "="), _split(g, "=")
    if len(p_sides) == len(g_sides) == 2 and p_sides[0] != g_sides[0]:
        has_letters = re.search("[a-z]", p_sides[0]) and re.search("[a-z]", g_sides[0])
        return bool(has_letters) and math_verify.ask(p, g, budget)
    p, g = _right_side(p), _right_side(g)
    scales = _scales(p, g)
    p = re.sub(r"^(\d+):(\d+)$", r"\1/\2", p.replace(r"\%", ""))
    g = re.sub(r"^(\d+):(\d+)$", r"\1/\2", g.replace(r"\%", ""))
    if "=" in p + g or p == g:
        return p == g
    verdict = _same_value(p, g, scales)
    return math_verify.ask(p, g, budget) if verdict is None else verdict


def _same_tree(p: Tree, g: Tree, budget: list[float]) -> bool:
    """Compare two trees: tuples and intervals in order, lists and unions in any order."""
    if isinstance(p, str) and isinstance(g, str):
        return p == g or _same_leaf(p, g, budget)
    if isinstance(p, str) or isinstance(g, str) or p[0] != g[0] or len(p[1]) != len(g[1]):
        return False
    rest = list(g[1])
    for child in p[1]:
        candidates = rest if "any" in p[0] else rest[:1]
        equal = next((x for x in candidates if _same_tree(child, x, budget)), None)
        if equal is None:
            return False
        rest.remove(equal)
    return True


def _same(pred: str, gold: str) -> bool:
    """Compare an answer of MATH or GSM8K with the reference."""
    if pred == gold or max(len(pred), len(gold)) > MAX_CHARS:
        return pred == gold
    if _INTEGER.fullmatch(pred) and _INTEGER.fullmatch(gold):  # most of GSM8K
        return int(pred) == int(gold)
    pred, gold, budget = _normal(pred), _normal(gold), [HARD_LIMIT]
    inequalities = [bool(_INEQUALITY.search(x)) for x in (pred, gold)]
    if sum(inequalities) == 1:  # x > 3 is (3, \infty); Math-Verify wants the inequality second
        ordered = (gold, pred) if inequalities[0] else (pred, gold)
        return math_verify.ask(*ordered, budget)
    readings = [True]
    if not re.search(r",0\d", pred + gold):  # "70,110" may be one number or two, "115,000" is one
        readings.append(False)
    try:
        trees = dict.fromkeys((_tree(pred, x), _tree(gold, x)) for x in readings)
        return bool(pred) and any(_same_tree(p, g, budget) for p, g in trees)
    except (ArithmeticError, ValueError, RecursionError):  # hostile nesting, too large a number
        return False


def copies(pred: str, gold: str, question: str) -> bool:
    r"""Is an answer a formula of the question, with nothing computed?

    741 of MATH's questions hold a formula that is equal to the answer. A number or words may
    stand in the question and in the answer.

    >>> [copies(pred, "27", r"Evaluate $81^{3/4}$.") for pred in ("$81^{3/4}$", "3^3", "27")]
    [True, False, False]
    >>> copies("0.5", r"\frac12", "Is it 0.5?")
    False
    """
    spacing = r"\\left|\\right|[dt](?=frac)|[\s{}$]"
    pred = re.sub(spacing, "", _normal(pred[:10_000]))
    gold = re.sub(spacing, "", _normal(gold[:10_000]))
    question = re.sub(spacing, "", _normal(question[:10_000]))
    is_number = re.fullmatch(r"-?(\\frac)?[\d.,/]+", pred)
    has_operator = re.search(r"(?!^)[-+*/^<>!]|\\[a-z]", pred)
    return pred != gold and not is_number and bool(has_operator) and pred in question


# -- slow path: Math-Verify in child processes --------------------------------------------------

WORKERS = min(16, os.cpu_count() or 1)  # children
HARD_LIMIT = 6.0  # seconds a pair may take
# Not for Math-Verify: plain words, and what makes it hang or fill the memory.
_HOPELESS = re.compile(
    r"\^\s*(?:\{[^}]*|.)[\^!]|\^\s*\{?-?\d{4}|\)\^\{?\d{3}"  # towers and large powers
    r"|(?<!\d)!|\d{3}!|\d{60}"  # factorials of formulas, large numbers
    r"|(?<![a-zA-Z\\])[a-zA-Z]{4}"  # words
    r"|\\(?:sum|prod|i*int|oint|lim|uparrow|begin)(?![a-z])"
)


def _serve() -> None:
    """The child: reads [gold, pred] a line, answers 1 or 0 a line, ends with its parent."""
    # This source runs alone.
    import json
    import resource
    import signal
    import sys

    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    config, out, sys.stdout = [LatexExtractionConfig()], sys.stdout, sys.stderr
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        # Math-Verify's own alarm is lost inside C code, and the parent may be gone.
        signal.setitimer(signal.ITIMER_PROF, 10)
        try:
            limits = {"fallback_mode": "no_fallback", "parsing_timeout": 2}
            gold, pred = (parse(f"${x}$", config, **limits) for x in json.loads(line))
            limits = {"float_rounding": 12, "strict": True, "timeout_seconds": 2}
            verdict = bool(gold and pred) and verify(gold, pred, **limits)
        except BaseException:
            verdict = False
        print(int(verdict), file=out, flush=True)


class MathVerify:
    """A pool of child processes that run Math-Verify; each decides one pair at a time."""

    def __init__(self):
        self.idle: list[subprocess.Popen] = []
        os.register_at_fork(after_in_child=self.idle.clear)  # a fork must not share children

    def ask(self, pred: str, gold: str, budget: list[float]) -> bool:
        """The verdict, or False once the pair's `budget` of seconds is spent."""
        while budget[0] > 0 and not _HOPELESS.search(pred + " " + gold):
            try:
                child = self.idle.pop()
            except IndexError:
                child = self.spawn()
            start = time.monotonic()
            reply = self.talk(child, json.dumps([gold, pred]).encode() + b"\n", budget[0])
            budget[0] -= time.monotonic() - start
            if reply:
                self.idle.append(child)
                return reply == b"1\n"
            budget[0] -= HARD_LIMIT / 2  # the child ended: one more chance
        return False

    def spawn(self) -> subprocess.Popen:
        """A fresh interpreter, never a fork: torch's threads and the main script stay out."""
        source = inspect.getsource(_serve) + "\n_serve()"
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        if self.talk(child, b"", 120) != b"ready\n":
            install = "pip install 'math-verify[antlr4_13_2]==0.9.0'"
            raise RuntimeError(f"the answer checker did not start: {install}")
        return child

    def talk(self, child: subprocess.Popen, line: bytes, seconds: float) -> bytes:
        """Send a line and read the child's; b"" where it ended, or took too long and was killed."""
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        try:
            child.stdin.write(line)
            return child.stdout.readline()
        except OSError:
            return b""
        finally:
            timer.cancel()


math_verify = MathVerify()

# -- the graders: a new task is one entry here --------------------------------------------------


@dataclass(frozen=True)
class Grader:
    """How a task's responses are graded."""

    extract: Callable[[str], str | None]  # response -> answer
    equal: Callable[[str, str], bool]  # (answer, reference) -> same
    no_answer: Callable[[str, str, str], bool] | None = None  # (answer, reference, question)


GRADERS = {
    "walk": Grader(str.strip, reaches),
    "stories": Grader(_story_answer, operator.eq),
    "arc": Grader(_choice, lambda pred, gold: (_choice(pred) or pred) == gold),
    "gsm8k": Grader(_final_answer, _same),
    "math": Grader(_final_answer, _same, no_answer=copies),
    "code": Grader(extract_program, passes),
}


def extract_answer(text: str, task: str) -> str | None:
    r"""The answer a whole response commits to, None where there is none.

    >>> extract_answer(r"so $x=\boxed{\frac{1}{2}}$.", "math")
    '\\frac{1}{2}'
    """
    return GRADERS[task].extract(text)


def answers_match(pred: str | None, gold: str, task: str) -> bool:
    r"""1[pred = gold], pred from extract_answer   [Eq. 1, Sec. 2.3]

    What cannot be decided within HARD_LIMIT seconds is False.

    raises  RuntimeError where Math-Verify is needed and missing

    >>> pairs = [(r"x = \frac12", "0.5"), ("2, x=1", "1,2"), ("[1,2)", "(1,2)")]
    >>> [answers_match(pred, gold, "math") for pred, gold in pairs]
    [True, True, False]
    """
    return bool(pred and pred.strip()) and GRADERS[task].equal(pred, gold)


def grade(
    responses: Sequence[str],
    golds: Sequence[str],
    task: str,
    questions: Sequence[str] | None = None,
) -> list[bool]:
    """1[extract(y) = a*] for every response y   [Eq. 1, Sec. 2.3]

    Each distinct pair is decided once. With its question, a MATH answer that only restates the
    question's formula is wrong.

    raises  as answers_match

    >>> grade(["#### 1,000", "#### 7", "7"], ["1000", "8", "7"], "gsm8k")
    [True, False, False]
    """
    answers = [extract_answer(response, task) for response in responses]
    pairs = list(zip(answers, golds, strict=True))
    distinct = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(WORKERS) as pool:  # the threads only wait for the children
        equal = pool.map(lambda pair: answers_match(*pair, task), distinct)
        verdicts = dict(zip(distinct, equal))
    no_answer = GRADERS[task].no_answer
    correct = []
    for pair, question in zip(pairs, questions or repeat("", len(pairs)), strict=True):
        restated = bool(no_answer and verdicts[pair] and no_answer(*pair, question))
        correct.append(verdicts[pair] and not restated)
    return correct
