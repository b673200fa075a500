r"""Is the answer right: extraction and equality, one grader for training and for evaluation.

    response -> extract -> normalise -> tree -> values to 120 digits -> 0 or 1

Each leaf of the two trees is compared by its value: exact where the text is rational, to 120 digits
where it is not, and at three random points where it has letters. Model text is never run: no
`eval`, no sympy; the parser is our own, and every number it holds is bounded. The paper does not
say how answers are compared (the official code: strings in training, sympy in evaluation). Here:
no tolerance, no percent rule (2500 is not 25), no "last number" fallback. What cannot be read is
right only where it is the same text.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import os
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import mpmath

from data import last_boxed
from sandbox import extract_program, passes
from toy import reaches

# -- extract: response -> answer ----------------------------------------------------------------

_NOTES = re.compile(r"<<[^<>]*>>|</s>|<\|\w+\|>")  # GSM8K's calculations, and written end tokens
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox) ?\{\s*+\}")
# The first .* is greedy, so the last mention counts; *+ never gives back, so time is linear.
_PHRASES = [
    re.compile(r".*####\s*+([^\n]+)", re.S),
    re.compile(r".*<answer>\s*+([^\n<]+)", re.S),
    re.compile(r"(?i).*answer(?: is|\s*+\**+:)[:\s*]*+(?:\$\$|\\\[)?\s*+([^\n]+)", re.S),
]
# A full stop ends the answer, but "2.5" and "4 p.m." go on.
_SENTENCE_END = re.compile(
    r"(?<![ap]\.m)\.(?=[\s*$]|$)(?!\s*m\.)|,?\s+(?:because|since|which|where|I hope)\b|, not\b"
)
_MARKUP = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\b|[{}$*\\\"'`<>\[\]]")
# "A dog" and "3 meters" are no labels, but "A: a dog" and "B a dog" are.
_LABEL = re.compile(
    r"(?:(?i:option|choice|answer|letter)\s+)?"
    r"(?:\(([A-Ea-e1-5])\)|([A-E1-5])\)|([B-E])(?=[\s.:,]|$)"
    r"|([A1-5])(?=[.:,](?!\d)|\s*$)|([a-e])(?=[).]?$))"
)
# A response that is a label, or a label and its text
_BARE_LABEL = re.compile(
    r"(?:(?i:option|choice)\s+)?\(?(?:[A-E1-5](?:[.):][^\n]*| is (?:correct|right)\.?)?"
    r"|[a-e][.)]*|(?<=\()[a-e]\)[^\n]*)"
)
# After the label another one: "A or B", "(A) rain, (B) snow"; not "(A), not (B)"
_SECOND_LABEL = re.compile(
    r"[\s,.]*(?:or|and|/|&|,)\s*\(?[A-E1-5]\b"
    r"|[\s,.]+[B-E](?=[.,)]|$)"
    r"|[^\n]*?(?<!not )(?<!than )(?<!of )\(([A-E1-5])\)"
    r"|[^\n]*(?:,|\band|\bor|&)\s+[A-E][):]"
)


def _final_answer(text: str) -> str | None:
    r"""The last complete \boxed{}, else what follows "####", "answer is" or "Answer:".

    Boxes joined by "and" or "or" are one list. An empty box is a mention of the format.
    """
    text = _NOTES.sub("", text)
    box = last_boxed(_EMPTY_BOX.sub("", text), of_gold=False)
    if box is not None or _EMPTY_BOX.search(text):
        # An answer elsewhere does not count beside an empty box: the place for it was known.
        return box or None
    for phrase in _PHRASES:
        if m := phrase.match(text):
            # Bounded, as hostile text may be one endless line.
            sentence = _SENTENCE_END.split(m[1][:2000], maxsplit=1)[0]
            sentence = re.sub(r"(?<=\d)!$", "", sentence.strip(" *\t\r"))  # prose, no factorial
            return sentence or None
    return None


def _choice(text: str) -> str | None:
    """The one label a response names: "(B)", "B.", "B) text", "option b"; "A or B" names none."""
    # "The correct option is B" is then read by the same phrase as "The answer is B".
    named = re.sub(r"(?i)\b(?:(?:correct|right|best) (?:option|choice)|ans(?=:))", "answer", text)
    named = re.sub(r"\( ([A-E1-5]) \)", r"(\1)", named)
    answer = _final_answer(named)
    line, _, reasons = text.strip().partition("\n")
    # A label alone counts, one in the middle of prose does not: every sentence has an "A".
    if answer is None and _BARE_LABEL.fullmatch(_MARKUP.sub("", line[:2000]).strip()):
        answer = None if re.search(r"\([A-E1-5]\)", reasons) else line
    answer = _MARKUP.sub("", (answer or "")[:2000]).strip()
    m = _LABEL.match(answer)
    if not m or _SECOND_LABEL.match(answer, m.end()):
        return None
    return m[m.lastindex].upper()


def _story_answer(text: str) -> str | None:
    """The integer after "#" at the end of a story."""
    m = re.search(r"#\s*(-?[0-9]+)\s*\Z", text)
    return m and m[1]


# -- normalise: one spelling for what LaTeX and prose spell in many ways ------------------------

_SIGNS = r"\times |\cdot |\pi |\infty |\sqrt |^2|^3|\le |\ge |\ne |\cup ".split("|")
_SIGNS += r"\frac12|\frac13|\frac23|\frac14|\frac34".split("|")
_UNICODE = str.maketrans(dict(zip("×·π∞√²³≤≥≠∪½⅓⅔¼¾", _SIGNS)))
# \1 is to mark the end of a matrix's row, so a text's own must go.
_UNICODE |= str.maketrans("−–÷", "--/", "\0\1")
_WORDS_TO_12 = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS_TO_12)}
_NUMBER_WORDS |= {"one half": "1/2", "one third": "1/3", "two thirds": "2/3"}
_NUMBER_WORDS |= {"one fourth": "1/4", "one quarter": "1/4", "three fourths": "3/4"}
# In \text a single letter is a unit, elsewhere it is a variable.
_UNIT_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter"}
_UNIT_LETTERS |= {"sec": "second"}


def _unit_text(m: re.Match) -> str:
    """The content of a text command, its single unit letters spelled out."""
    spelled = re.sub(r"(?<![\w.\\])(?:[mgshL]|sec)(?![\w.])", lambda u: _UNIT_LETTERS[u[0]], m[1])
    return f" {spelled} "


def _repeating(m: re.Match) -> str:
    r"""0.1\overline{6} -> (0.10+6/90)"""
    whole, digits, period = m.groups()
    return f"({whole}{digits}0+{period}/{'9' * len(period)}{'0' * len(digits)})"


def _in_brackets(m: re.Match) -> str:
    """35 (hours) -> 35 hours, 6 (six) -> 6; 6 (two) stays as it is"""
    number, word = m.groups()
    if word not in _NUMBER_WORDS:
        return f"{number} {word}"
    return number if _NUMBER_WORDS[word] == number else m[0]


_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _large(m: re.Match) -> str:
    r"""2.5 million -> (2.5\cdot10^{6})"""
    return rf"({m[1]}\cdot10^{{{_LARGE[m[2]]}}})"


_COMMANDS = {"lt": "<", "gt": ">", "div": "/", "varnothing": r"\emptyset"}
_COMMANDS |= {"lbrace": r"\{", "lBrace": r"\{", "rbrace": r"\}", "rBrace": r"\}"}
_TRIG = "sin|cos|tan|cot|sec|csc"
_FONTS = "mbox|text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|operatorname|boxed|fbox"
_TEXT = rf"\\(?:{_FONTS})\s*\{{[^{{}}]*\}}"
# In this order: a rule reads what the rules before it have written.
_SPELLINGS: list[tuple[str, str | Callable]] = [
    # layout that carries no meaning
    (r"\\phantom\s*(?:\{[^}]*\}|.)", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\[()\[\]]", ""),
    (r"(?<=[\w)])\*\*(?=[\d(])", "^"),
    (r"(?<!\\)\$|\*\*", ""),
    (r"(?<=\d)\{:\}(?=\d)", ":"),
    # thousands: 1,\!000  1{,}000  1\,000  1~000
    (r"(?<=\d)\s*,\s*\\!\s*(?=\d{3})|\\!", ""),
    (r"(?<=\d)\{,\}(?=\d)|(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ""),
    # every space is one blank; 1 000 000 is one number, "12 34" is not
    (r"\\[,;: ]|~|\\q?quad(?![a-z])|\s+", " "),
    (r"(?<![\d.,] )(?<![\d.])\d{1,3}(?: \d{3})+(?![\d/]| \d)", lambda m: m[0].replace(" ", "")),
    # commands with several names
    (r"\\(?:[dtcs]|nice)?(frac|binom)", r"\\\1"),
    (r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}"),
    (r"(?:\{\s*\})?_\{?(\d+)\}?C_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\(?:[lr]?vert|mid)(?![a-z])", "|"),
    (r"\\(?:leq|leqslant|geq|geqslant|neq)(?![a-z])", lambda m: m[0][:3]),
    (r"\\([a-zA-Z]+)", lambda m: _COMMANDS.get(m[1], m[0])),
    (r"([<>])=|(?<!\d)(!)=", lambda m: {"<": r"\le ", ">": r"\ge ", "!": r"\ne "}[m[0][0]]),
    (r"\\\{\s*\\\}", r"\\emptyset"),
    # text and fonts
    (rf"\\frac\s*\{{\s*({_TEXT})\s*\}}\s*\{{\s*({_TEXT}[^{{}}]*)\}}", r"\1/\2"),  # m/s^2
    (r"_\s*\\text\s*\{\s*(\w+)\s*\}", r"_{\1}"),
    (rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}", _unit_text),
    (rf"\\(?:{_FONTS}|boldsymbol|bm|(?:text)?color\s*\{{\w+\}})(?=\s*\{{)", ""),
    (r"(?<=\d )((?:mi|[kc]?m|ft)/[hs])\s*$", _unit_text),
    (r"\\mathbb\s*\{?R\}?|^\s*all real(?: number)?s\s*$", r"(-\\infty,\\infty)"),
    # subscripts, logarithms and bases: braces where there is more than one character
    (r"(?<=\w)\s*\(?\s*(?:in )?base[ -]+(\w+)\s*\)?\s*$", r"_{\1}"),
    (r"_\s*\{\s*(?:\(|base)\s*(\w+)\s*\)?\s*\}", r"_{\1}"),
    (r"\s*_\s*\{\s*([a-z]+)\s*\}", lambda m: f"_{{{_NUMBER_WORDS.get(m[1], m[1])}}}"),
    (r"\s*_\s*\{\s*(\w)\s*\}(?!\d)", r"_\1"),  # x_{1}2 is not x_{12}
    (r"\\?\blog\s*_\s*(?:(\d+)(?=[\s({\\])|(\w))", r"\\log_{\1\2}"),
    (r"_(\d\d+)", r"_{\1}"),
    (rf"(\\(?:{_TRIG})\s*\^)\s*(\w)", r"\1{\2}"),
    # 24^{th}, words in front
    (r"\^\s*\{?\s*(st|nd|rd|th)\s*\}?\s*$", r" \1"),
    (r"(?i)^\s*(?:there (?:are|is)|the points?|all real numbers) +(?=[-\d(\\]|[a-z] *[\\<>=])", ""),
    (r"(?i)^\s*(?:final )?answer:", ""),
    # 35 (hours), 6 (six), 21 more than
    (r"([\d.,]*\d)\s*\(\s*([a-z]{3,})\s*\)\s*$", _in_brackets),
    (r"(?<=\d) (?:more|fewer) ([a-z]+) than [\w ]+$", r" \1"),
    # negative 6 is -6; the area is 6; in (D) 6 and (110)_2 the brackets add nothing
    (r"^\s*(?:negative|minus) +(?=[\d\\])", "-"),
    (r"^(\s*[a-zA-Z ]{6,} )is +(?=-?[\d\\])", r"\1="),
    (r"^\s*\([A-E]\)\s+(?=-?(?:\.?\d|\\(?:frac|sqrt|\$)))", ""),
    (r"^\s*\(([\dA-F]*\d[\dA-F]*)\)(?=_)", r"\1"),
    # a choice (C) is C; {x | x > 3} is x > 3; a set of one element is the element; {1, 2} is a set
    (r"(?<![\w})])\(([A-Z])\)(?![\w({])", r"\1"),
    (r"^\s*\\\{\s*[a-z]\s*(?:\\in *\(-\\infty,\\infty\)\s*)?[|:](.*)\\\}\s*$", r"\1"),
    (r"^\s*\\\{((?:(?!\\\}|,).)*)\\\}\s*$", r"\1"),
    (r"^\s*\{([^{}]*,[^{}]*)\}\s*$", r"\\{\1\\}"),
    # ]1,2[ is (1,2)
    (r"^\s*\](?=[^\[\]]*,)", "("),
    (r"(?<=,)([^\[\],]*)\[\s*$", r"\1)"),
    # money, percent, time of day, 1.5 million, 1.5e3
    (r"^\\\$\s*([\d.,]*\d)[.,\s]*$", r"\1 dollars"),
    (r"^\s*€\s*([\d.,]*\d)[.,\s]*$", r"\1 euros"),
    (r"(?<=\d)\s*¢", " cents"),
    (r"^\s*£\s*([\d.,]*\d)[.,\s]*$", r"\1 pounds"),
    (r"\\\$", ""),
    (r"\\?%", " percent "),
    (r"(?i)(?<=\d)(?::00)?\s*([ap])\.?\s?m\b\.?", lambda m: f" {m[1].lower()}m"),
    (rf"(?<![\w.])(\d+(?:\.\d+)?)\s+({'|'.join(_LARGE)})(?!s|th)", _large),
    (r"(?<![\d.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])", r"(\1\\cdot10^{\2})"),
    # functions without a backslash, arguments without braces
    (rf"(?<![a-zA-Z\\])({_TRIG}|sqrt|log|ln|pi)(?![a-zA-Z])", r"\\\1"),
    (r"(?<!\w)infinity", r"\\infty"),
    (r"\\(frac|sqrt|binom)\s*([\da-z])", r"\\\1{\2}"),
    (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([\da-z])", r"\1{\2}"),
    # lists in words
    (r"[,;]?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ","),
    # repeating decimals and mixed numbers
    (r"(\d*\.)(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", _repeating),
    (r"(?<![\d.\w}^])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.\w}^])(\d+)\s(\d+)/(\d+)", r"(\1+\2/\3)"),
    # degrees are a fraction of pi inside a function, a unit at the end, and left out elsewhere
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])|°", " degrees "),
    (rf"(\\(?:{_TRIG})\s*)(?:\(([\d.]+) degrees ?\)|([\d.]+) degrees ?)", r"\1(\2\3\\pi/180)"),
    (r" degrees (?=\s*[^\s.,;:)\]}])", " "),
    # a ratio
    (r"(?<=\d)\s+to\s+(?=\d+\s*$)", ":"),
    # an approximation beside the answer
    (r"^\s*\\approx|\\approx.*", ""),
    # blanks stay between words, numbers and brackets only; "2 3" is not 6
    (r"\s+", " "),
    (r"(?<![\w})\]]) | (?!\w)", ""),
    # the parser can read no "?", so "2 3" and "1.2.3" have no value
    (r"(?<=\d)(?<!_\d)\s+(?=[\d.])|(?<=\.)(\d+)(?=\.\d)", r"\1?"),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]


@functools.lru_cache(100_000)
def _normal(text: str) -> str:
    """LaTeX or plain text -> one canonical spelling, still a string."""
    text = text.translate(_UNICODE)
    text = re.sub(r"(?<=\\\\)\[[\d.]+(?:pt|em|ex|mm|cm)\]", "", text)  # \\[6pt] is layout
    # Outside of a matrix a double backslash is a command that was escaped twice, as in JSON.
    text = text.replace(r"\\", "\1" if r"\begin" in text else "\\")  # the end of a row
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip(" \1").rstrip(" .,;:")
    return _NUMBER_WORDS.get(text.lower(), text)


# -- structure: lists, tuples, intervals, matrices, unions --------------------------------------


class Node(NamedTuple):
    """An answer as a tree: (1,2] is Node("(]", (Node("", "1"), Node("", "2")))."""

    kind: str  # "" of a leaf; "any..." where the parts stand in any order
    parts: str | tuple  # the text of a leaf, else the children
    name: str = ""  # the x of "x = 5", "x > 3", "x \in [1,2]"


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
_OPEN = ("(", "[", "{", r"\{", r"\langle", r"\begin")
_CLOSE = (")", "]", "}", r"\}", r"\rangle", r"\end")
_MATRIX = re.compile(
    r"(?P<factor>[^&]*?)[(\[]?\s*\\begin\{(?P<kind>[pb]?matrix|array)\}(?:\{[^}]*\})?"
    r"(?P<rows>.*)\\end\{(?P=kind)\}\s*[)\]]?",
    re.S,
)
_ALL_BUT = re.compile(r"\(([^(),]+),([^(),]+)\)(?:\\setminus|\\backslash|-) ?\\\{([^{}]*)\\\}")
_BRACKETS = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.S)
# Not within brackets, where a comma parts the items of a tuple.
_THOUSANDS = re.compile(r"(?<![\d,.(\[])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])(?![^(\[]*[)\]])")
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\[a-z]{2,})(?:_(?:\{[^{}]*\}|\w))?'*")
_ARGUMENT = (
    r"(?:-?[\d.]+(?:/\d+)?|-?\\frac\{-?\d+\}\{\d+\}|[a-z]|[a-z]\(-?\w+\)"
    r"|[^(),]*(?:[A-Z]|(?<![a-z\\])[a-z]{3})[^(),]*)"
)
# What stands in front of "=" without changing the answer; xy, 2x, x^2 and f(2)+1 change it.
_NAME = re.compile(
    _VARIABLE.pattern + r"|(?:m?\\(?:angle|triangle|overline) ?)?\{?[A-Z]+\}?"  # AB, \angle ABC
    rf"|[a-wA-W]'*(?:_\w)?(?:\^\{{-1\}})?\({_ARGUMENT}(?:,{_ARGUMENT})*\)"  # f(2), P(A|B)
    r"|\\(?:sin|cos|tan|cot|sec|csc) ?\d?(?:\\angle ?)?(?:[A-Z]+|\\[a-z]+)"  # \sin A
    r"|\\?(?:det|gcd|lcm) ?(?:[A-Z]|\([\w, ]+\))"
    r"|\|\\?[a-zA-Z]+\||\\\|\\?[a-zA-Z]+\\\|"  # |z|, \|v\|
    r"|\((?:\\?[a-z]+,)+\\?[a-z]+\)|[A-Z]?\[[A-Z]+\]"  # (x,y), the area [ABC], E[X]
    r"|(?!abcd|wxyz)(?:[Tt]he )?[a-zA-Z]{4,}(?: [a-zA-Z]+)*"  # area
)
_DEPENDENT = re.compile(r"y|[a-zA-Z]\([a-z](?:,[a-z])*\)")  # y = 2x says what f(x) = 2x says


def _split(text: str, *separators: str) -> list[str]:
    """Like re.split with a group: part, separator, part, ...; none of those inside brackets."""
    pieces, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and token in separators:
            pieces += [token, ""]
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


def _items(text: str) -> list[str]:
    r"""The items of a list; x \pm y is the two items x + y and x - y."""
    items = []
    for item in filter(None, _split(text, ",", ";")[::2]):
        if item.startswith(r"\{"):  # what \pm stands for are items of this set
            items.append(item)
            continue
        upper = item.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = item.replace(r"\pm", "-").replace(r"\mp", "+")
        items += dict.fromkeys((upper, lower))
    return items


def _relation(text: str) -> tuple[list[str], list[str]]:
    r"""The sides and the signs of an equation or inequality, the smallest side first.

    >>> _relation(r"4>x\ge-1")
    (['-1', 'x', '4'], ['\\le', '<'])
    """
    pieces = _split(text, "=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
    sides, signs = pieces[::2], pieces[1::2]
    if signs and signs[0] in (">", r"\ge"):
        mirrored = {">": "<", r"\ge": r"\le"}
        return sides[::-1], [mirrored.get(sign, "mixed") for sign in reversed(signs)]
    return sides, signs


def _interval(sides: list[str], signs: list[str]) -> tuple[str, str]:
    """The name and the interval of "x > 3", "1 < x < 2" or "|x| < 3"; empty texts of others."""
    if len(sides) == 2 and _is_number(sides[1]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    elif len(sides) == 2:
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if len(sides) != 3 or not set(signs) <= {"<", r"\le"}:
        return "", ""
    (low, name, high), (left, right) = sides, signs
    # |x| < 3 is an interval around 0; |x| > 3 is all the rest.
    if name[:1] == "|" and low == r"-\infty":
        low, name, left = f"-({high})", name.strip("|"), right
    elif re.fullmatch(r"\|[a-z]\|", name) and high == r"\infty" and _is_number(low):
        end, start = {"<": ")(", r"\le": "]["}[left]
        return name.strip("|"), rf"(-\infty,-({low}){end}\cup{start}{low},\infty)"
    if not _VARIABLE.fullmatch(name) or not _is_number(low) or not _is_number(high):
        return "", ""
    brackets = {"<": "()", r"\le": "[]"}
    return name, f"{brackets[left][0]}{low},{high}{brackets[right][1]}"


def _without(numbers: list[str], low: str = r"-\infty", high: str = r"\infty") -> str:
    r"""All real numbers between two, but some, as a union of intervals.

    >>> _without(["3", "-1"])
    '(-\\infty,-1)\\cup(-1,3)\\cup(3,\\infty)'
    """
    ends = [low, *sorted(numbers, key=lambda x: _mp.re(_values(x)[0])), high]
    return r"\cup".join(f"({a},{b})" for a, b in itertools.pairwise(ends))


def _named(text: str) -> tuple[str, str]:
    r"""The name in front of an answer, and the answer without it.

    >>> _named("x=2+3=5"), _named("xy=5"), _named(r"x\in[0,1)"), _named(r"1<x\le2")
    (('x', '5'), ('', 'xy=5'), ('x', '[0,1)'), ('x', '(1,2]'))
    """
    sides, signs = _relation(text)
    if signs == [r"\in"] and _VARIABLE.fullmatch(sides[0]):
        return sides[0], sides[1]
    if signs == [r"\ne"] and _VARIABLE.fullmatch(sides[0]) and _is_number(sides[1]):
        return sides[0], _without([sides[1]])
    if not set(signs) <= {"="}:
        name, interval = _interval(sides, signs)
        return name, interval or text
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):
        sides.reverse()  # 5 = x
    *left, right = sides
    names = [side for side in left if _NAME.fullmatch(side)]
    # Every other side names the answer or equals it, as the steps of x = 2+3 = 5 do.
    if all(side in names or _same_leaf(side, right) for side in left):
        return (names or [""])[0], right
    return "", text


def _matrix(m: re.Match) -> Node:
    """The entries of a matrix, each times the factor in front of it; a column is a tuple."""
    factor = f"{m['factor']}1" if m["factor"] in ("", "-") else m["factor"]
    rows = []
    for row in filter(str.strip, m["rows"].split("\1")):
        entries = _split(row, "&")[::2]
        if factor != "1":
            entries = [f"({factor})({entry})" for entry in entries]
        rows.append(tuple(map(_tree, entries)))
    if all(len(row) == 1 for row in rows):
        return Node("()", tuple(row[0] for row in rows))
    return Node("rows", tuple(Node("row", row) for row in rows))


@functools.lru_cache(100_000)
def _tree(text: str) -> Node:
    """The tree of a normalised answer."""
    items, union = _items(text), _split(text, r"\cup")[::2]
    if len(items) > 1:
        if all(_same_leaf(item, items[0]) for item in items):
            return _tree(items[0])  # 5/2 or 2.5
        # "x < 1 or x > 2" is a union
        kind = "any|" if all(re.search(r"[<>]|\\[lg]e", item) for item in items) else "any,"
        return Node(kind, tuple(map(_tree, items)))
    if len(union) > 1:
        if all(part.startswith(r"\{") for part in union):
            return _tree(",".join(part[2:-2] for part in union))
        return Node("any|", tuple(map(_tree, union)))
    m = _ALL_BUT.fullmatch(text)
    if m and all(map(_is_number, _items(m[3]))):
        return _tree(_without(_items(m[3]), m[1], m[2]))
    name, answer = _named(text)
    if answer != text:
        return _tree(answer)._replace(name=name)
    if m := _MATRIX.fullmatch(text):
        return _matrix(m)
    m = _BRACKETS.fullmatch(text)
    parts = _split(m[2], ",")[::2] if m else []
    if m and m[1] == r"\{":
        parts = _items(m[2])
    if len(parts) > 1:
        # "(1,2)" may be a point or an open interval: both are in order, so one kind serves.
        kind = {r"\{": "any,", r"\langle": "()"}.get(m[1], m[1] + m[3])
        return Node(kind, tuple(map(_tree, parts)))
    return Node("", text)


# -- value: what an expression is worth ---------------------------------------------------------

Number = Fraction | mpmath.mpf | mpmath.mpc
# At each point a letter has another random value: positive at 1, negative at 2.
POINTS = (1, 2, 3)

_mp = mpmath.mp.clone()
_mp.dps = 120
_MAX_BITS = 30_000  # of a number: 10^{9000} can be written, 9^{9^9} cannot
_MAX_FACTORIAL = 1000

_LEXER = re.compile(
    r"\\log_\{\w+\}"
    r"|[fgh]\((?:[a-z]|-?\d+)\)"  # f(x) is as unknown as x, and f(2) is not 2 f(1)
    r"|(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\{[^{}]*\}|\w))?"  # a command or letter, its subscript
    r"|\d+\.?\d*|\.\d+"
    r"|\S"
)
# + 0, since mpmath's constants are lazy objects, and a number is wanted.
_FACTOR = re.compile(rf"\w|\\(?!{_TRIG}|arc|log|ln|exp|cdot|times|l?r?floor|l?r?ceil)[a-z]")
_CONSTANTS = {"e": _mp.e + 0, "i": _mp.mpc(0, 1), r"\pi": _mp.pi + 0}
_CONSTANTS[r"\infty"] = Fraction(7**99, 2)  # equal to itself only
_FUNCTIONS = {rf"\{name}": getattr(_mp, name) for name in "sin cos tan cot sec csc ln exp".split()}
_FUNCTIONS |= {rf"\arc{name}": getattr(_mp, f"a{name}") for name in ("sin", "cos", "tan")}
_FUNCTIONS[r"\log"] = _mp.log10
_BRACKET_PAIRS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor"}
_BRACKET_PAIRS[r"\lceil"] = r"\rceil"
_BRACKET_VALUES = {"|": abs, r"\lfloor": _mp.floor, r"\lceil": _mp.ceil}


def _bounded(value: Number) -> Number:
    """The value itself; raises OverflowError where computing on with it could take long."""
    if isinstance(value, Fraction):
        bits = (value.numerator * value.denominator).bit_length()
    else:
        # mag(0) is minus infinity.
        bits = abs(_mp.mag(value or 1))
    if not bits <= _MAX_BITS:  # also nan
        raise OverflowError
    return value


def _power(base: Number, exponent: Number) -> Number:
    """base^exponent; an odd root of a negative number is negative."""
    if abs(exponent) * max(1, abs(_mp.mag(_mp.convert(base or 1)))) > _MAX_BITS:
        raise OverflowError
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _bounded(base ** int(exponent))
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if base < 0 and exponent.denominator % 2:
            return (-1) ** exponent.numerator * _mp.power(-base, exponent)
    return _bounded(_mp.power(base, exponent))


def _factorial(value: Number) -> Number:
    """n!, exactly; where letters make it no whole number, Gamma(n + 1)."""
    if abs(value) > _MAX_FACTORIAL or value in range(-_MAX_FACTORIAL, 0):
        raise OverflowError
    if value in range(_MAX_FACTORIAL + 1):
        return Fraction(math.factorial(int(value)))
    return _mp.factorial(_mp.convert(value))


def _binomial(n: Number, k: Number) -> Number:
    """n (n-1) ... (n-k+1) / k!, for any n."""
    if k not in range(_MAX_FACTORIAL):
        raise OverflowError
    value = Fraction(1)
    for i in range(int(k)):
        value = _bounded(value * (n - i) / (i + 1))
    return value


class _Parser:
    """Recursive descent: sum -> product -> power -> atom; raises where it cannot read."""

    def __init__(self, text: str, point: int):
        self.tokens = _LEXER.findall(text)[::-1]  # the next token is the last
        self.point = point
        self.has_letters = False

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in tokens

    def takes(self, *tokens: str) -> bool:
        """Step over the next token if it is one of these."""
        return self.next_is(*tokens) and bool(self.tokens.pop())

    def sum(self) -> Number:
        value = self.product()
        while self.next_is("+", "-"):  # the sign belongs to the next product
            value += self.product()
        return _bounded(value)

    def product(self) -> Number:
        value = self.power()
        # Without a sign a factor follows, as in 2x and 2(3); only + - and closing brackets end it.
        while self.tokens and not self.next_is("+", "-", *_BRACKET_PAIRS.values()):
            exponent = Fraction(-1 if self.takes("/") else 1)
            self.takes("*", r"\cdot", r"\times")
            value = _bounded(value * _power(self.power(), exponent))
        return value

    def power(self) -> Number:
        value = self.atom()
        if self.takes("!"):
            value = _factorial(value)
        return _power(value, self.power()) if self.takes("^") else value

    def atom(self) -> Number:
        token = self.tokens.pop()
        name, _, index = token.partition("_")
        if token in ("+", "-"):
            # A power, not an atom: -2^2 is -4.
            return self.power() * (-1 if token == "-" else 1)
        if token in _BRACKET_PAIRS:
            value = self.sum()
            if not self.takes(_BRACKET_PAIRS[token]):
                raise ValueError
            return _BRACKET_VALUES.get(token, _bounded)(value)
        if token == r"\frac":
            return self.atom() * _power(self.atom(), Fraction(-1))
        if token == r"\binom":
            return _binomial(self.atom(), self.atom())
        if token == r"\sqrt":
            degree = self.atom() if self.next_is("[") else Fraction(2)
            return _power(self.atom(), 1 / degree)
        if name in _FUNCTIONS:
            return self.function(name, index.strip("{}"))
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if name.lstrip("\\")[:1].isalpha():
            self.has_letters = True
            # By its name, so that a letter is worth the same in both answers, and in every run.
            numbers = random.Random(f"{token} {self.point}")
            sign = {1: 1, 2: -1}.get(self.point) or numbers.choice((1, -1))
            return Fraction(sign * numbers.randint(1000, 9999), 307)
        return Fraction(token)

    def function(self, name: str, base: str) -> Number:
        r"""\sin x, \sin^{-1} x or \log_{2} x after its first token."""
        exponent = self.atom() if self.takes("^") else Fraction(1)
        if exponent == -1:
            name, exponent = rf"\arc{name[1:]}", Fraction(1)
        value = _bounded(_FUNCTIONS[name](self.argument()))
        if base:
            value /= _mp.log10(int(base))
        return _power(value, exponent)

    def argument(self) -> Number:
        """A bracket, else all factors up to an operator or another function."""
        if self.next_is(*_BRACKET_PAIRS):
            return self.atom()
        value = self.power()
        while self.tokens and _FACTOR.match(self.tokens[-1]):
            value *= self.power()
        return value


@functools.lru_cache(100_000)
def _values(text: str, points: tuple = POINTS) -> tuple[Number, ...]:
    r"""The value of an expression at each point; empty where the parser cannot read it.

    >>> _values("1+1/2 - 10^{-2}")[0], _values("1,2")
    (Fraction(149, 100), ())
    """
    if re.search(r"\.\d{60}", text):  # no decimal is as long as a computed value
        return ()
    if r"\infty" in text and not re.fullmatch(r"[-+(]*\\infty\)*", text):
        return ()  # nothing can be computed with it
    values = []
    for point in points:
        parser = _Parser(text, point)
        try:
            values.append(parser.sum())
        except Exception:  # whatever the text holds, "cannot be read" is the answer
            return ()
        if parser.tokens:
            return ()
        if not parser.has_letters:
            return (values[0],) * len(points)
    return tuple(values)


def _close(a: Number, b: Number) -> bool:
    """Equal: exactly where both are rational, else to 60 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return _mp.almosteq(_mp.convert(a), _mp.convert(b), _mp.mpf(10) ** -60, _mp.mpf(10) ** -90)


def _is_number(text: str) -> bool:
    """The text has a value that does not depend on a letter."""
    # A letter has another value at the second point, so two points tell.
    return len(set(_values(text, POINTS[:2]))) == 1


# -- units: a unit may be missing, but two units must be the same -------------------------------

# Words after a number that change its value. "3 negative roots" counts, "3 negative" does not.
_FRACTION = "four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*teen|[a-z]*tie|hundred|thousand"
_CHANGES_VALUE = re.compile(
    r"^(?:squared|cubed)\b|\b(?:negative|positive)$|\b(?:"
    "doubled|tripled|halved|negated|inverted|reciprocal|factorial|root|radical|power|log|inverse"
    "|recurring|repeating|plus|minus|over|divided|multiplied|choose|mod|modulo|percent of"
    "|dozens?|scores?|gross|tens|hundreds?|thousands?|[a-z]*illions?|[a-z]*fold"
    rf"|half|halves|quarters? .*|thirds?|(?:{_FRACTION}|[a-z]*illion)ths?"
    "|zero|one|two|three|four|five|six|seven|eight|nine|ten|[a-z]*teen|(?:twen|thir|for|fif)ty"
    "|not|but|maybe|than|less|fewer|greater|least|most|except|without|neither|nor|unless|infinity"
    r")\b"
)
_ABBREVIATIONS = (
    "mm=millimeter cm=centimeter km=kilometer in=inch ft=foot feet=foot yd=yard mi=mile"
    " mg=milligram kg=kilogram gm=gram lb=pound oz=ounce ml=milliliter hr=hour min=minute"
    " sec=second sq=square cu=cubic deg=degree usd=dollar rad=radian am=am pm=pm"
    " st=th nd=th rd=th th=th"
)
_UNITS = dict(pair.split("=") for pair in _ABBREVIATIONS.split())
_UNITS |= {"mph": "mile per hour", "kph": "kilometer per hour"}
_LENGTH = re.compile("unit|[a-z]*meter|inch|foot|yard|mile")
_POWER_WORDS = {"square": "2", "squared": "2", "cubic": "3", "cubed": "3"}
_MEASURE = re.compile(r"(.*(?:[\d})\]]|\\pi))( ?)([a-zA-Z][a-zA-Z./ -]*)(?:\^\{?([123])\}?)?", re.S)


def _singular(word: str) -> str:
    """One name for "inches", "inch" and "in", for "metres" and "meter"."""
    word = _UNITS.get(word.lower(), word.lower())
    word = re.sub(r"(?<=ch|sh|ss|x.)es$|(?<=[^s])s$", "", word)
    return _UNITS.get(word, re.sub("(?<=met|lit)re$", "er", word))


def _measure(text: str) -> tuple[str, tuple]:
    """The number, and of each part of its unit the last word and the power.

    >>> _measure("12 square inches"), _measure("5 mph"), _measure("5 squared")
    (('12', (('inch', '2'),)), ('5', (('mile', '1'), ('hour', '1'))), ('5 squared', ()))
    """
    m = _MEASURE.fullmatch(text)
    if not m or _CHANGES_VALUE.search(m[3].strip()):
        return text, ()
    if r"\pi" in m[1] and "degree" in m[3]:
        return text, ()  # it can't be a gold's number, which is in radians, with a unit
    number, blank, unit, exponent = m.groups()
    words = re.findall("[a-zA-Z]+", unit.replace("/", " per "))
    shortest = 3 if blank else 4  # "5abc" is a product
    for word in words:
        known = word == "of" or word.lower().removesuffix("s") in _UNITS
        if not known and not (word.islower() and len(word) >= shortest):
            return text, ()
    parts = []
    for part in " ".join(map(_singular, words)).split(" per "):
        powers = [_POWER_WORDS[word] for word in part.split() if word in _POWER_WORDS]
        *_, head = ["", *(word for word in part.split() if word not in _POWER_WORDS)]
        parts.append((head, [*powers, "1"][0]))
    if exponent:
        parts[-1] = (parts[-1][0], exponent)
    return number.strip(), tuple(parts)


def _same_unit(a: tuple, b: tuple) -> bool:
    """A missing unit is any unit, and "units" are lengths of the same power."""
    if not a or not b or a == b:
        return True
    (a_head, a_power), (b_head, b_power) = a[-1], b[-1]
    lengths = _LENGTH.fullmatch(a_head) and _LENGTH.fullmatch(b_head)
    return bool(lengths) and "unit" in (a_head, b_head) and a_power == b_power


# -- equality -----------------------------------------------------------------------------------

MAX_CHARS = 500  # the longest reference answer of MATH has 159; longer ones compare as strings
_PERCENT = (("percent", "1"),)
_WORDS = re.compile(r"(?=.*[a-zA-Z]{3}|[A-Z]{2}$)[a-zA-Z][a-zA-Z0-9 .'-]*")
_IN_A_BASE = re.compile(r"(?=[^_]*\d)[0-9A-Z.-]+_(?:\w|\{\w+\})")
_HAS_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in)(?![a-z])")
_INTEGER = re.compile("-?[0-9]+")
_RATIO = re.compile(r"[0-9]+(?::[0-9]+)+")
_MOD = re.compile(r"\\pmod\s*(?:\{[^{}]*\}|\d+)")


def _same_leaf(p: str, g: str) -> bool:
    """Compare two answers without inner structure."""
    if p.replace(" ", "") == g.replace(" ", ""):
        return True
    if _IN_A_BASE.fullmatch(p) or _IN_A_BASE.fullmatch(g):
        (a, _, a_base), (b, _, b_base) = (x.lstrip("0").partition("_") for x in (p, g))
        return a == b and (a_base == b_base or "" in (a_base, b_base))
    if _WORDS.fullmatch(p) and _WORDS.fullmatch(g):
        p, g = (re.sub(r"^(?:an?|the) |s$|[\W_]", "", x.lower()) for x in (p, g))
        return p == g
    if _HAS_RELATION.search(p) or _HAS_RELATION.search(g):
        return _same_relation(p, g)
    (p, p_unit), (g, g_unit) = _measure(p), _measure(g)
    if not _same_unit(p_unit, g_unit):
        return False
    if _RATIO.fullmatch(p) and _RATIO.fullmatch(g):
        return _same_ratio(p, g)
    if p_unit == g_unit or _PERCENT not in (p_unit, g_unit):
        # In a gold, quarters may be coins. In an answer to a plain number they are fourths.
        fourths = "quarter" in dict(p_unit) and not g_unit
        return (p == g and not fourths) or _same_value(p, g, Fraction(1, 4 if fourths else 1))
    # 50% is 1/2, and it is 50; but 2/3 is no percentage.
    is_share = any(abs(value) < 1 for value in _values(g, POINTS[:1]))
    scale = Fraction(1, 100) if p_unit == _PERCENT else Fraction(100)
    return _same_value(p, g, scale) or (not is_share and _same_value(p, g, Fraction(1)))


def _same_ratio(p: str, g: str) -> bool:
    """2:3:4 is 4:6:8; a time of day, 2:20, is no 1:10."""
    a, b = (list(map(Fraction, text.split(":"))) for text in (p, g))
    if 0 in a + b or re.fullmatch(r"\d?\d:\d\d", g):  # 0:0 would be any ratio
        return a == b
    return [x * b[0] for x in a] == [x * a[0] for x in b]


def _same_value(p: str, g: str, scale: Fraction) -> bool:
    """scale * p = g, whatever their letters stand for."""
    p, g = (re.sub(r"^(\d+):(\d+)$", r"\1/\2", x) for x in (p, g))
    for points in (POINTS[:1], POINTS):  # most wrong values differ at the first
        p_values, g_values = _values(p, points), _values(g, points)
        if not p_values or not g_values:
            return False
        for point, a, b in zip(points, p_values, g_values):
            # A root or logarithm of a negative letter has several values.
            outside = point > 1 and (_mp.im(a) or _mp.im(b))
            if not outside and not _close(scale * a, b):
                return False
    return True


def _same_relation(p: str, g: str) -> bool:
    """Equations and inequalities: left minus right of one is a multiple of the other's."""
    (p_sides, p_signs), (g_sides, g_signs) = _relation(p), _relation(g)
    if p_signs != g_signs or not p_signs:
        return False
    if len(p_signs) > 1:
        return all(map(_same_leaf, p_sides, g_sides))
    p_differences, g_differences = (_values("({})-({})".format(*x)) for x in (p_sides, g_sides))
    if not p_differences or not g_differences or 0 in p_differences + g_differences:
        return False
    ratios = [a * _power(b, Fraction(-1)) for a, b in zip(p_differences, g_differences)]
    # 2 = 3 has no letter, and would be a multiple of every other false equation.
    constant = _close(p_differences[0], p_differences[1])
    if constant or not all(_close(ratio, ratios[0]) for ratio in ratios):
        return False
    # A negative factor turns an inequality round.
    return p_signs[0] in ("=", r"\ne") or _mp.re(ratios[0]) > 0


def _same_named(p: Node, g: Node) -> bool:
    """Compare two leaves with their names: x = 5 is 5 and is not y = 5."""
    p_name, g_name = (re.sub(r"m?\\angle|\\overline|[{} ]", "", x.name) for x in (p, g))
    dependent = _DEPENDENT.fullmatch(p_name) and _DEPENDENT.fullmatch(g_name)
    other_names = p_name and g_name and p_name != g_name and not dependent
    if not other_names and not ((p_name or g_name) and _HAS_RELATION.search(p.parts + g.parts)):
        return _same_leaf(p.parts, g.parts)
    if any(x.name and _is_number(x.parts) for x in (p, g)):
        return False  # 2x = 10 is not yet x = 5
    return _same_relation(*("=".join(filter(None, (x.name, x.parts))) for x in (p, g)))


def _point(node: Node) -> Node:
    """The tuple of a list "y=-2, x=3", whose names follow one another; any other tree itself."""
    parts = sorted(node.parts, key=operator.attrgetter("name"))
    names = "".join(part.name for part in parts)
    if len(names) == len(parts) and names in string.ascii_lowercase:
        return Node("()", tuple(parts))
    return node


def _same_tree(p: Node, g: Node) -> bool:
    """Compare two trees: tuples and intervals in order, lists and unions in any order."""
    if {p.kind, g.kind} == {"()", "any,"}:
        p, g = _point(p), _point(g)
    if p.kind != g.kind:
        return False
    if not p.kind:
        return _same_named(p, g)
    if len(p.parts) != len(g.parts) or (p.name and g.name and p.name != g.name):
        return False
    rest = list(g.parts)
    for child in p.parts:
        candidates = rest if p.kind.startswith("any") else rest[:1]
        equal = next((x for x in candidates if _same_tree(child, x)), None)
        if equal is None:
            return False
        # Each item of the reference counts once, so "1, 1" is not "1, 2".
        rest.remove(equal)
    return True


def _same(pred: str, gold: str) -> bool:
    """Compare an answer of MATH or GSM8K with the reference."""
    if pred == gold or max(len(pred), len(gold)) > MAX_CHARS:
        return pred == gold
    if _INTEGER.fullmatch(pred) and _INTEGER.fullmatch(gold):  # most of GSM8K
        return int(pred) == int(gold)
    if re.fullmatch("[A-E]", _normal(gold)) and (label := _choice(f"answer: {pred}")):
        return label == _normal(gold)  # (C) 12 for the choice C
    if (r"\pmod" in pred) != (r"\pmod" in gold):  # it may be missing, as a unit may
        pred, gold = (_MOD.sub("", x).replace(r"\equiv", "=") for x in (pred, gold))
    pred, gold = _normal(pred), _normal(gold)
    # "70,110" may be one number or two, "115,000" is one
    readings = [tuple(_THOUSANDS.sub(lambda m: m[0].replace(",", ""), x) for x in (pred, gold))]
    if not re.search(r",0\d", pred + gold):
        readings.append((pred, gold))
    try:
        return bool(pred) and any(_same_tree(*map(_tree, pair)) for pair in dict.fromkeys(readings))
    except (ArithmeticError, ValueError, TypeError, RecursionError):  # hostile text
        return False


# -- copies: a right value that was not computed ------------------------------------------------

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.S)
_ROOT = re.compile(r"\\sqrt(?!\[)|(?<!\d)0?\.50*(?!\d)")
_IDLE_ZEROS = re.compile(r"(?<![\d.])0+(?=[\d.])|\.0*(?!\d)|(\.\d*[1-9])0+(?!\d)")
_LAYOUT = re.compile(r"[01]|\\(?:frac|cdot|times|sqrt)|[^\w\\!|]")


def _atoms(formula: str) -> Counter:
    """How often each number, letter and function stands in a formula; 0 and 1 add nothing."""
    # A root is the power 1/2, and 081.0 is 81.
    text = _normal(_IDLE_ZEROS.sub(r"\1", _normal(formula)))
    tokens = _LEXER.findall(_ROOT.sub(" 1/2 ", text))
    return Counter(token for token in tokens if not _LAYOUT.fullmatch(token))


def _formulas(text: str) -> list[str]:
    """What stands between dollars or brackets."""
    return ["".join(groups) for groups in _FORMULA.findall(text)]


def _bare(formula: str) -> str:
    """A formula without brackets and blanks."""
    return re.sub(r"[()\[\]{} ]", "", _normal(formula))


def _asked(pred: str, question: str) -> str:
    """The 7 of "x+y = 7" where x+y is a formula of the question; else the answer itself."""
    left, _, right = pred.rpartition("=")
    short = 0 < len(left) <= MAX_CHARS  # else a minute for a hostile one
    return right if short and _normal(left) in map(_normal, _formulas(question)) else pred


def copies(pred: str, gold: str, question: str) -> bool:
    r"""Is an answer a formula of the question, with nothing computed?

    741 of MATH's questions hold a formula that is equal to the answer. An answer that still has
    all its numbers, letters and functions restates it, whatever the brackets, the order and what
    was added. A plain number or words may stand in the question and in the answer.

    >>> [copies(pred, "27", r"Evaluate $81^{3/4}$.") for pred in ("(81)^{3/4}+0", "3^3", "27")]
    [True, False, False]
    """
    plain = re.fullmatch(r"-?[\d.,]+|[^-+*/^<>=!\\:({[|]*", _normal(pred))
    if plain or max(len(pred), len(gold)) > MAX_CHARS or _normal(pred) == _normal(gold):
        return False
    formulas = _formulas(question)
    if _bare(pred) in map(_bare, formulas):
        return True
    reference = _atoms(gold)
    if _atoms(pred) == reference:
        return False
    answer = _atoms(_named(_normal(pred))[1])
    for formula in formulas:
        sides = _split(formula.strip(" .,?\n"), "=", r"\le", r"\ge", "<", ">")[::2]
        for side in dict.fromkeys([formula, *sides]):
            atoms = _atoms(side)
            # A reference that keeps all atoms of the formula allows an answer to keep them, too.
            computed = atoms.total() < 2 or not atoms <= answer or atoms <= reference <= answer
            if not computed and _same(pred, side):
                return True
    return False


def is_uncomputed(pred: str, gold: str, question: str) -> bool:
    """Is an answer of GSM8K a calculation that is left to do, as 5*(16-3-4)?

    >>> [is_uncomputed(pred, "45", "") for pred in ("5*(16-3-4)", "5*9 = 45", "45.00")]
    [True, False, False]
    """
    value = _named(_normal(pred))[1]
    value = re.sub(r"\\(?:cdot|times) ?10\^\{?\d+\}?", "", value)  # 2 million
    return bool(re.search(r"[\d)} ](?:[-+*/^]|\\cdot|\\times) ?-?[\d({]", value))


# -- the graders: a new task is one entry here --------------------------------------------------


@dataclass(frozen=True)
class Grader:
    """How a task's responses are graded."""

    extract: Callable[[str], str | None]  # response -> answer
    equal: Callable[[str, str], bool]  # (answer, reference) -> same
    no_answer: Callable[[str, str, str], bool] | None = None  # (answer, reference, question)
    threads: int = 1  # more where `equal` waits for other processes; mpmath is not thread-safe


GRADERS = {
    "walk": Grader(str.strip, reaches),
    "stories": Grader(_story_answer, operator.eq),
    "arc": Grader(_choice, operator.eq),
    "gsm8k": Grader(_final_answer, _same, no_answer=is_uncomputed),
    "math": Grader(_final_answer, _same, no_answer=copies),
    "code": Grader(extract_program, passes, threads=min(16, os.cpu_count() or 1)),
}


def extract_answer(text: str, task: str) -> str | None:
    r"""The answer a whole response commits to, None where there is none.

    >>> extract_answer(r"so $x=\boxed{\frac{1}{2}}$.", "math")
    '\\frac{1}{2}'
    """
    return GRADERS[task].extract(text)


def answers_match(pred: str | None, gold: str, task: str, question: str = "") -> bool:
    r"""1[pred = gold], pred from extract_answer   [Eq. 1, Sec. 2.3]

    With its question, a MATH answer that only restates the question's formula is wrong.

    >>> pairs = [(r"x = \frac12", "0.5"), ("2, x=1", "1,2"), ("[1,2)", "(1,2)")]
    >>> [answers_match(pred, gold, "math") for pred, gold in pairs]
    [True, True, False]
    """
    grader = GRADERS[task]
    if not pred or not pred.strip():
        return False
    if not grader.no_answer:
        return grader.equal(pred, gold)
    answers = dict.fromkeys([pred, _asked(pred, question)])
    answer = next((x for x in answers if grader.equal(x, gold)), None)
    return answer is not None and not grader.no_answer(answer, gold, question)


def grade(
    responses: Sequence[str], golds: Sequence[str], task: str, questions: Sequence[str] = ()
) -> list[bool]:
    """1[extract(y) = a*] for every response y   [Eq. 1, Sec. 2.3]

    Each distinct answer is decided once.

    >>> grade(["#### 1,000", "#### 7", "7"], ["1000", "8", "7"], "gsm8k")
    [True, False, False]
    """
    answers = [extract_answer(response, task) for response in responses]
    tasks = [task] * len(golds)
    rows = list(zip(answers, golds, tasks, questions or [""] * len(golds), strict=True))
    distinct = list(dict.fromkeys(rows))
    with ThreadPoolExecutor(GRADERS[task].threads) as pool:
        verdicts = dict(zip(distinct, pool.map(lambda row: answers_match(*row), distinct)))
    return [verdicts[row] for row in rows]
