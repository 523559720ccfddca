"""Grading, prompts, data, evaluation and small tasks: the part of rl.py that needs no gradient."""

import cmath
import contextlib
import csv
import functools
import gzip
import itertools
import json
import math
import random
import re
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

import model as lm
from rl import encode_text, rollout

# -------------------------------------------------------------------------------------------------
# grading: an expression is neither searched nor simplified: it is evaluated while it is read, at
# fixed points of its variables, in exact fractions as long as it is rational. Two expressions are
# equal when they agree at all points (Schwartz-Zippel). The length of an answer, its nesting and
# the bits of its numbers are bounded, so that no text takes long; nothing is run, nothing waits.

MAX_ANSWER = 1000  # characters of a final answer; what is longer is none
MAX_TAIL = 4000  # characters at the end of a response that are searched for one without a box
MAX_NESTING = 10  # of lists, tuples and sets
MAX_ITEMS = 40  # of a set whose order is free
MAX_BITS = 8192  # of an exact number, 2,466 digits: towers of powers are refused
MAX_WORK = 16 * MAX_BITS  # bits of all numbers on the way
PROBES = 4  # points of the variables: all positive, all negative, two mixed
TOLERANCE = 1e-12  # relative, of irrational numbers, in float64

PLAIN_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
FORMULA = re.compile(r"\$\$?[^$]{1,1000}\$\$?")
UNION, LIST, RELATION = (
    r"\\cup(?![A-Za-z])", r"[,;]|\b(?:and|or)\b", r"\\(?:le|ge|ne|neq|in)(?![A-Za-z])|[=<>]")
NAME = re.compile(  # what may be called something: x, x_1, f(x), \theta, AB, \text{Area}
    r"(?:\\?(?!(?:pi|e|i|infty)\b)[A-Za-z]+|\\text\{[^{}]*\})(?:_(?:\{[^{}]*\}|\w))?"
    r"\s*(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?")
UNIT = re.compile(  # words in \text, words behind a space, a few short ones right behind a digit
    r"(?P<head>.+?)\s*(?:\\text\{(?P<text>[^{}]*)\}|(?<=[0-9)}.!]) (?P<words>[A-Za-z]{2,}"
    r"(?: [A-Za-z]+)?)|(?<=[0-9])(?P<short>[kcm]m|[km]g|ml|hrs?|mph|lbs?))"
    r"\s*(?P<power>\^\s*\{?[23]\}?)?", re.DOTALL)
UNIT_NAMES = {"¤": "dollar", "usd": "dollar", "percent": "%", "feet": "foot", "ft": "foot",
              "inche": "inch", "hr": "hour", "centimeter": "cm", "kilometer": "km", "unit": ""}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}
NO_UNITS = re.compile(  # words behind a number that change it
    r"\b(?:and|or|not|to|is|if|no|mod|pi|squared|cubed|factorial|half|halves|thirds?|quarters?|"
    r"fourths?|fifths?|tenths?|hundredths?|choose|plus|minus|times|over|divided|by|than|more|less|"
    r"sin|cos|tan|log|ln|sqrt)\b")

SPELLINGS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "√": r"\sqrt ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "\t": " ", "\n": " ", "\r": " "})
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\\$", "¤"),  # currency, not a delimiter of formulas
    (r"(?<!\\)\\[()\[\]]", " "),
    (r"\\(?:left|right)(?![A-Za-z])\.?|\\!", ""),
    (r"\\(?:[bB]igg?[lr]?|(?:display|text|script)style)(?![A-Za-z])", ""),
    (r"\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:text(?:bf|it|rm|sf|tt)|math(?:rm|bf|it|sf)|[mh]box|emph|operatorname|boldsymbol)\s*\{",
     r"\\text{"),
    (r"\\text\{\s*(and|or|,|;)\s*\}", r" \1 "),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
    (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\langle", "("), (r"\\rangle", ")"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"), (r"\\%", "%"), (r"\{,\}", ","), (r"\*\*", "^"),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\b([0-9]+)\.([0-9]*)\\overline\{([0-9]+)\}", lambda m: repeating_decimal(*m.groups())),
    (r"(?<![0-9.,^_}])([0-9]+) +([0-9]+) */ *([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}"),  # 7 3/4
    (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])", lambda m: m[0].replace(" ", "")),
)]


class Unreadable(Exception):
    """No mathematics that is known here: such texts are compared as text."""


class Refused(Exception):
    """Mathematics without a value: undefined, too large, unbalanced. Equal to nothing."""


class Value(NamedTuple):
    """What a text says. value is, by kind, number: the values at the probe points; text: a str;
    set: the items (a list may repeat some); tuple, relation, matrix and its rows: (bracket,
    items, bracket); equation: left minus right at the points; choice: a letter before more text."""

    kind: str
    value: object
    unit: str = ""
    name: str = ""


def answers_match(answer, ground_truth):
    """Whether two texts or numbers state the same value; False when either cannot be read. Both may
    be whole responses: see `final_answer`. A missing unit is forgiven, another is not; decimals are
    exact: 0.33 is not 1/3. An inequality may be answered by its interval, not the other way round,
    which would reward an echo of the question."""
    answers, golds = (readings(final_answer(str(text))) for text in (answer, ground_truth))
    try:
        return any(same(a, g) for a in answers for g in golds)
    except OverflowError:  # beyond float64, beside an irrational number
        return False


def is_gradable(ground_truth):
    """Whether a ground truth can be read: with one that cannot, no answer is ever rewarded."""
    return bool(readings(final_answer(str(ground_truth))))


def r1_zero_reward(response, ground_truth, strict=False):
    """The dict of reward, format_reward and answer_reward of a response to the r1_zero prompt. The
    format is </think> <answer> ... </answer>, of which the last pair counts; white space between
    the tags is free, `strict` wants exactly one space. source: [1] math_baseline"""
    tags = "</think> <answer>" if strict else r"</think>\s*<answer>"
    return reward_dict(last_tagged(response) if re.search(tags, response) else None, ground_truth)


def question_only_reward(response, ground_truth, strict=False):
    r"""The same for the bare question as the prompt: the format is an answer in \boxed{} behind all
    thinking; `strict` refuses \fbox{} and \boxed 5. source: [1] grpo_prompt_ablation"""
    thinking = response.rfind("<think>") > response.rfind("</think>")
    unusual = strict and r"\boxed{" not in response
    return reward_dict(None if thinking or unusual else last_boxed(response), ground_truth)


def reward_dict(answer, ground_truth):
    """The rewards for an answer, None where the format was wrong; a list of ground truths accepts
    any of its items."""
    golds = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    right = float(answer is not None and any(answers_match(answer, gold) for gold in golds))
    return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}


def parse_mmlu_response(mmlu_example, model_output):
    """The letter that the output gives as the answer, one of as many as the example (a dict) has
    "options"; None without one. source: [1] supplement, mmlu_baseline"""
    letters = "ABCDEFGHIJ"[: len(mmlu_example.get("options", "ABCD"))]
    tail = model_output[-MAX_TAIL:]
    letter = rf"[\s*_(\"'$]*([{letters}])(?![\w'])"
    said = re.findall(rf"(?i:answer(?:\s+is|\s*:)\s*:?(?:\s+(?:option|choice))?){letter}", tail)
    alone = re.fullmatch(rf"{letter}[\s*_)\"'$.]*(?:[.:)]\s.*)?", tail, re.DOTALL)
    return said[-1] if said else alone[1] if alone else None


def parse_gsm8k_response(model_output):
    """The last number in the output as text without thousands marks, None without one.
    source: [1] supplement, gsm8k_baseline"""
    end = max(model_output.rfind(digit) for digit in "0123456789") + 1
    window = model_output[max(0, end - MAX_ANSWER) : end]
    number = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
    found = [*re.finditer(number, window)]
    if not found:
        return None
    negative = re.search(r"(?:^|[\s(=:*])(?:-\$?|\$-)$", window[: found[-1].start()])
    return "-" * bool(negative) + found[-1][0].replace(",", "")


# where the answer stands


def final_answer(text):
    """The answer in a response: in its last box, else its last <answer> tags, behind ####, behind
    "answer is" or "answer:", the last formula among words, or all of it; "" when too long."""
    if len(text) < 24 and not re.search(r"[\\$#<:]|answer", text):
        return text
    if (boxed := last_boxed(text)) is not None:
        return boxed
    tagged = last_tagged(text)
    text = text if tagged is None else tagged
    tail = text[-MAX_TAIL:]
    if "####" in tail:
        return tail.rsplit("####", 1)[1].strip().split("\n", 1)[0]
    tail = re.sub(r"(?<!\\)\\[()\[\]]", "$", tail)
    said = [m.end() for m in re.finditer(r"(?i)\banswer(?: is(?! not\b):?|:)", tail)]
    if said:
        rest = tail[said[-1] :].strip()
        formula = FORMULA.match(rest)
        if formula and not re.match(r"\s*(?:[,;%°]|and\b|or\b|\w+\.?$)", rest[formula.end() :]):
            return formula[0]
        return re.split(r"\n|\.\s|,? (?:because|since|so|which)\b", rest, maxsplit=1)[0]
    formulas = FORMULA.findall(tail)
    words = re.findall(r"[A-Za-z]{2,}", FORMULA.sub(" ", tail)) if formulas else ()
    if len(set(words) - {"and", "or"}) > 1:
        return formulas[-1]
    return text if len(text) <= MAX_ANSWER else ""


def last_tagged(text):
    """What stands between the last <answer> and the </answer> behind it, None without both."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def last_boxed(text):
    r"""What stands in the last \boxed{} or \fbox{}, None without one or when it is cut off; boxes
    that a comma, "and" or "or" joins are one list."""
    at = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if at < 0:
        return None
    window, boxes = text[max(0, at - MAX_ANSWER) : at + MAX_ANSWER], []
    for box in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", window):
        inside = re.compile(r"[^\s$\\.,{]+").match(window, box.end())  # \boxed 5
        end = inside.end() if inside else closing(window, box.end())
        if not end:
            boxes = []  # cut off: only what follows can count
            continue
        if boxes and not re.fullmatch(r"[\s$]*(?:,|and|or|, and)[\s$]*",
                                      window[boxes[-1][1] : box.start()]):
            boxes = []
        boxes.append((inside[0] if inside else window[box.end() + 1 : end - 1], end))
    return ", ".join(content for content, _ in boxes) or None


def closing(text, start):
    """The place behind the brace that closes the one at `start`; 0 when there is none."""
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth <= 0:
            return brace.end() if brace[0] == "}" else 0
    return 0


# what it says


@functools.lru_cache(maxsize=1 << 14)
def readings(text):
    """The Values that `text` may stand for: a tuple, empty when it cannot be read. Several, since
    1,200 is a number or a list, 1,5 a list or a decimal, and (C) 12 an option."""
    text = text.strip().rstrip(".")
    if text[:1] == text[-1:] == "$":
        text = text.strip("$").strip()
    if len(text) > MAX_ANSWER:
        return ()
    if PLAIN_NUMBER.fullmatch(text):
        return (Value("number", (Fraction(text.replace(",", "")),)),)
    text = normalise(text)
    forms = [text]
    if text[:1] not in "([{\\":
        if THOUSANDS.search(text):
            forms.append(THOUSANDS.sub(lambda m: m[0].replace(",", ""), text))
        elif re.fullmatch(r"[^0-9,]*[0-9]+,[0-9]+[^0-9,]*", text):
            forms.append(text.replace(",", "."))
    try:
        values = [read(form) for form in forms]
    except (Refused, RecursionError):
        return ()
    if option := re.match(r"(?:\\text\{)?\(?([A-J])[).:]\}?\s+[\w\\](?!.*\b[A-J][).:])", text):
        values.append(Value("choice", option[1].lower()))
    return tuple(dict.fromkeys(values))


def normalise(text):
    """One spelling for what LaTeX, Unicode and plain text write in several ways."""
    text = text.translate(SPELLINGS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.replace("$", "¤" if text.count("$") % 2 else " ")
    return re.sub(" +", " ", text).strip().rstrip(" .,;:")


def repeating_decimal(whole, fixed, repeated):
    """The fraction, in LaTeX, of the decimal whole.fixed with `repeated` again and again."""
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(repeated) - 1)}}}"


def read(text, nesting=0):
    """The Value of a normalised text. raises Refused"""
    text = text.strip().rstrip(" .,;:")
    if not text or nesting > MAX_NESTING:
        raise Refused("nothing to read, or too deep")
    if option := re.fullmatch(r"(?:[({\s]|\\text)*([A-Z])[)}\s.]*", text):
        return Value("text", option[1].lower())
    if re.fullmatch(r"[A-Za-z]{2,}(?: +[A-Za-z]+)*", text) and text not in RULES:
        return read_words(text)  # "no" is not n times o
    try:
        for reader in (read_matrix, read_list, read_relation, read_bracketed, read_number):
            if (value := reader(text, nesting + 1)) is not None:
                return value
    except Unreadable:
        pass
    return read_words(text)


def read_words(text):
    """Text: spaces and \\text do not matter, nor capitals where there are no commands."""
    words = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    words = re.sub(r"\s+|\.(?![0-9])|(?<=\\mathbb)\{(?=\w\})|(?<=\\mathbb\{\w)\}", "", words)
    words = words if "\\" in words else words.lower()
    if not re.search(r"\w", words) or words in ("nan", "null", "n/a"):
        raise Refused("there is no word")
    return Value("text", words)


def split(text, separators):
    """[part, separator, part, ...]: `text` cut at the separators outside of all brackets."""
    parts, depth, start = [], 0, 0
    for m in re.finditer(rf"(?P<open>\\\{{|[({{\[])|(?P<close>\\\}}|[)}}\]])|{separators}", text):
        if m.lastgroup:
            depth += 1 if m.lastgroup == "open" else -1
            if depth < 0:
                raise Refused("a bracket is closed that was not open")
        elif depth == 0:
            parts += [text[start : m.start()].strip(), m[0]]
            start = m.end()
    if depth:
        raise Refused("a bracket is open at the end")
    return [*parts, text[start:].strip()]


def read_matrix(text, nesting):
    matrix = re.fullmatch(r"\\begin\{([pb]?)matrix\}(.*)\\end\{\1matrix\}", text, re.DOTALL)
    if matrix is None:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^]]*\])?", matrix[2]) if row.strip()]
    cells = [tuple(read(cell, nesting) for cell in split(row, "&")[::2]) for row in rows]
    return Value("matrix", ("", tuple(Value("matrix", ("", row, "")) for row in cells), ""))


def read_list(text, nesting):
    """A union, or what commas, semicolons, "and" or "or" separate: a set."""
    for separators in (UNION, LIST):
        parts = [part for part in split(text, separators)[::2] if part]
        if len(parts) > 1:
            return Value("set", tuple(read(part, nesting) for part in parts))
    return None


def make_set(values):
    return Value("set", tuple(dict.fromkeys(values)))


def read_relation(text, nesting):
    """x = 5, 2 + 3 = 5, y = 2x, x^2 + y^2 = 1, x in [0, 1), 0 < x < 1."""
    parts = split(text, RELATION)
    sides, signs = parts[::2], parts[1::2]
    if not signs:
        return None
    if len(sides) == 2 and not sides[0]:
        return read(sides[1], nesting)
    if set(signs) == {"="}:
        return read_equation(sides, nesting)
    if signs == [r"\in"] and NAME.fullmatch(sides[0]):
        return read(sides[1], nesting)._replace(name=sides[0])
    return read_inequality(sides, signs)


def read_equation(sides, nesting):
    """A named value (the last of a chain), the result of a right sum, or an equation."""
    if NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]):
        sides = sides[::-1]
    if NAME.fullmatch(sides[0]):
        *chain, last = (read(side, nesting) for side in sides[1:])
        for value in chain:
            constant = value.kind == last.kind == "number" and len(value.value + last.value) == 2
            if constant and not same(value, last):
                raise Refused("the sides of an equation differ")
        return last._replace(name=re.sub(r"\s|\\text", "", sides[0]))
    difference = fingerprint(f"({sides[0]})-({sides[-1]})")
    if len(difference) == 1:
        if not all(close(fingerprint(side), fingerprint(sides[-1])) for side in sides):
            raise Refused("the sides of an equation differ")
        return read(sides[-1], nesting)
    if len(sides) > 2 or not any(difference):
        raise Unreadable("several equations, or none that says something")
    return Value("equation", difference)


def read_inequality(sides, signs):
    """x < 5 and 0 < x <= 1: the interval of a name."""
    signs = [sign.replace(r"\le", "<=").replace(r"\ge", ">=") for sign in signs]
    if {sign[0] for sign in signs} == {">"}:
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    names = [i for i, side in enumerate(sides) if NAME.fullmatch(side)]
    shape = (len(sides), *names)
    if not set(signs) <= {"<", "<="} or shape not in ((2, 0), (2, 1), (3, 1)):
        raise Unreadable("relations of other kinds")
    at = names[0]
    low, left = (sides[at - 1], signs[at - 1]) if at else (r"-\infty", "<")
    high, right = (sides[at + 1], signs[at]) if at + 1 < len(sides) else (r"\infty", "<")
    ends = tuple(Value("number", fingerprint(end)) for end in (low, high))
    interval = ("[" if left == "<=" else "(", ends, "]" if right == "<=" else ")")
    return Value("relation", interval, name=sides[at])


def read_bracketed(text, nesting):
    """Sets, tuples and intervals; a pair of brackets around one thing is taken off."""
    opening = re.match(r"\\\{|[({\[]", text)
    if not opening or not text.endswith((")", "]", "}")):
        return None
    end = len(text) - (2 if text.endswith(r"\}") else 1)
    try:
        parts = [part for part in split(text[opening.end() : end], "[,;]")[::2] if part]
    except Refused:  # (x + 1)(x + 2)
        return None
    values = [read(part, nesting) for part in parts]
    if opening[0] == r"\{" and values:
        return make_set(values)
    if len(values) > 1:
        return Value("tuple", (opening[0], tuple(values), text[end:])) if opening[0] != "{" else (
            make_set(values))
    return values[0] if values else None


def read_number(text, nesting):
    """A number or an expression in variables, with a unit, currency, percent sign or base."""
    if r"\pm" in text:
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        return make_set(read(signed, nesting) for signed in (plus, minus))
    if m := re.fullmatch(r"([+-]?)\s*([¤€£¥₹])\s*(.+)", text):
        return with_unit(m[1] + m[3], m[2], nesting)
    if text.endswith("%"):
        return with_unit(text[:-1], "%", nesting)
    if m := re.fullmatch(r"(.+?)\s*\^\s*\\circ\s*(?:\\text\{)?\s*([CFK]?)\s*\}?", text):
        return with_unit(m[1], f"degree {m[2]}", nesting)
    if m := re.fullmatch(r"([0-9]+)_\{?\s*([0-9]+)\s*\}?", text):
        return with_unit(m[1], f"base {m[2]}", nesting)
    if m := re.fullmatch(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[eE]([+-]?[0-9]{1,3})", text):
        text = f"{m[1]}*10^({m[2]})"
    if m := UNIT.fullmatch(text):
        head, words = m["head"], (m["text"] or m["words"] or m["short"] or "").lower()
        if NO_UNITS.search(words):
            raise Unreadable("words that are no unit")
        words = words.split()
        if words and words[0] in SCALES:
            head, words = f"({head})*{SCALES[words[0]]}", words[1:]
        return with_unit(head, " ".join(words) + re.sub(r"[\s{}]", "", m["power"] or ""), nesting)
    return Value("number", fingerprint(text))


def with_unit(head, unit, nesting):
    """The number in `head` with `unit`: one spelling for singular, plural and squares."""
    value = read(head, nesting)
    if value.kind != "number":
        raise Unreadable("only numbers have units")
    unit = re.sub(r"^(?:square|sq) (\w+)$", r"\1^2", unit.lower().replace(".", "").strip())
    word, power, exponent = unit.partition("^")
    word = word[:-1] if len(word) > 3 and word.endswith("s") else word
    return value._replace(unit=UNIT_NAMES.get(word, word) + power + exponent or value.unit)


# what it is worth


def fingerprint(text):
    """The values of an expression at the probe points; one value where it has no variable."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[A-Za-z]+|\S", text)
    values = []
    try:
        for probe in range(PROBES):
            expression = Expression(tokens, probe)
            values.append(expression.evaluate())
            if not expression.has_variables:
                break
    except (ArithmeticError, ValueError) as error:
        raise Refused(f"no value: {error}") from None
    return tuple(values)


FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sinh": cmath.sinh,
             "cosh": cmath.cosh, "tanh": cmath.tanh, "exp": cmath.exp,
             "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
             "cot": lambda x: 1 / cmath.tan(x), "arcsin": cmath.asin, "arccos": cmath.acos,
             "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10}
GREEK = ("alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi "
         "varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell")
CONSTANTS = {"pi": math.pi, "infty": math.inf, "inf": math.inf, "infinity": math.inf,
             "e": math.e, "i": 1j}
CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


class Expression:
    """Evaluates tokens at one probe point by recursive descent: sums of products of powers."""

    def __init__(self, tokens, probe):
        self.tokens, self.at, self.probe = [*tokens, ""], 0, probe
        self.work, self.in_bars, self.has_variables = 0, False, False

    @property
    def token(self):
        return self.tokens[self.at]

    def accept(self, *expected):
        """Whether the next token is one of `expected`; if so, goes past it."""
        found = self.token in expected
        self.at += found
        return found

    def take(self):
        self.at += 1
        if self.at == len(self.tokens):
            raise Unreadable("something is missing at the end")
        return self.tokens[self.at - 1]

    def bounded(self, value):
        """`value`, real where it can be; raises Refused when it is too large or one too many."""
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.work += bits
            if bits > MAX_BITS or self.work > MAX_WORK:
                raise Refused("too large")
            return value
        if not cmath.isfinite(value):
            raise Refused("not a number")
        return value.real if value.imag == 0 else value  # -0.0j is the other side of a cut

    def evaluate(self):
        value = self.sum()
        if self.token:
            raise Unreadable(f"{self.token} does not belong there")
        return value

    def sum(self):
        value = self.product()
        while self.token in ("+", "-"):  # the sign is that of the product
            value = self.bounded(value + self.product())
        return value

    def product(self):
        value = self.signed_power()
        while True:
            if self.accept("/", r"\div"):
                value = self.bounded(value / self.signed_power())
            elif self.accept("*", r"\cdot", r"\times", r"\ast"):
                value = self.bounded(value * self.signed_power())
            elif self.starts_factor():
                value = self.bounded(value * self.power())
            else:
                return value

    def starts_factor(self):
        """Whether what follows is multiplied without a sign: 2x and x(y + 1), but not 2 3."""
        token = self.token
        if token[:1].isdigit() or token[:1] == ".":
            return not self.tokens[self.at - 1][-1].isdigit()
        return (token[:1].isalpha() or token.removeprefix("\\") in RULES
                or token in CLOSERS and not (token == "|" and self.in_bars))

    def signed_power(self):
        sign = 1
        while self.token in ("+", "-"):
            sign = -sign if self.accept("-") else sign
            self.accept("+")
        return sign * self.power()

    def power(self):
        """A primary with its factorials and its exponent, or degrees; exponents group from the
        right."""
        value = self.primary()
        while self.accept("!"):
            if not isinstance(value, Fraction) or value.denominator > 1 or not 0 <= value <= 900:
                raise Refused("a factorial of that")
            value = self.bounded(Fraction(math.factorial(int(value))))
        if not self.accept("^"):
            return value
        if self.accept(r"\circ"):
            return value * math.pi / 180
        return self.bounded(raise_to(value, self.signed_power()))

    def primary(self):
        token = self.take()
        if token[0].isdigit() or token[0] == "." and len(token) > 1:
            return self.number(token)
        if token in CLOSERS:
            return self.group(token)
        word = token.removeprefix("\\")
        if word in RULES:
            return RULES[word](self, word)
        if len(token) > 3 or not token.isalpha():  # longer ones are words, no products
            raise Unreadable(f"{token} is not known")
        if len(token) > 1:  # xy is x times y
            self.at -= 1
            self.tokens[self.at] = token[1:]
        return self.variable(token[0], whole=len(token) == 1)

    def number(self, token):
        value, before = self.bounded(Fraction(token)), self.tokens[self.at - 2]
        if token.isdigit() and before not in ("^", r"\sqrt") and self.accept(r"\frac"):
            top, bottom = self.argument(), self.argument()
            if all(isinstance(x, Fraction) and x.denominator == 1 for x in (top, bottom)) and (
                    0 < top < bottom):  # 2\frac{1}{3} is 7/3
                return value + top / bottom
            return self.bounded(value * top / bottom)
        return value

    def group(self, opening):
        outer, self.in_bars = self.in_bars, opening == "|"
        value = self.sum()
        if not self.accept(CLOSERS[opening]):
            raise Unreadable("a bracket stays open")
        self.in_bars = outer
        if opening == "|":
            return abs(value)
        if opening in (r"\lfloor", r"\lceil"):
            if not isinstance(value, Fraction):
                raise Refused("the rounding of a number that is not exact")
            return Fraction(math.floor(value) if opening == r"\lfloor" else math.ceil(value))
        return value

    def argument(self):
        r"""An argument of a LaTeX command: a group, a command, one letter or digit (\frac12)."""
        if self.token[:1].isdigit() and len(self.token) > 1:
            digit, self.tokens[self.at] = self.token[0], self.token[1:]
            return Fraction(digit)
        return self.primary()

    def variable(self, name, whole=True):
        if whole and self.accept("_"):
            name += "_" + self.take()
            while name.count("{") > name.count("}"):
                name += self.take()
        if name in CONSTANTS:
            return CONSTANTS[name]
        self.has_variables = True
        bits = zlib.crc32(f"{re.sub('[{}]', '', name)} {self.probe}".encode())
        negative = (False, True, bits >> 20 & 1, bits >> 21 & 1)[self.probe]
        return Fraction((-1 if negative else 1) * (2 * (bits % 150) + 1), 128)  # never an integer

    def fraction(self, _):
        return self.bounded(self.argument() / self.argument())

    def root(self, _):
        degree = self.group("[") if self.accept("[") else Fraction(2)
        value = self.primary()
        if isinstance(value, Fraction) and value < 0 and degree % 2 == 1:
            return -self.bounded(raise_to(-value, 1 / degree))  # the real root of an odd degree
        return self.bounded(raise_to(value, 1 / degree))

    def binomial(self, _):
        top, bottom = self.argument(), self.argument()
        if not isinstance(bottom, Fraction) or bottom.denominator > 1 or not 0 <= bottom <= 100:
            raise Refused("a binomial coefficient of that")
        value = Fraction(1)
        for k in range(int(bottom)):
            value = self.bounded(value * (top - k) / (k + 1))
        return value

    def function(self, name):
        base = self.argument() if name == "log" and self.accept("_") else None
        exponent = self.signed_power() if self.accept("^") else 1
        if exponent == -1 and name in ("sin", "cos", "tan"):
            name, exponent = f"arc{name}", 1
        if self.token in CLOSERS:
            value = self.primary()
        else:
            value = self.power()
            while self.starts_factor() and self.token.removeprefix("\\") not in FUNCTIONS:
                value = value * self.power()
        if base is None:
            value = FUNCTIONS[name](complex(value))
        else:
            value = cmath.log(complex(value)) / cmath.log(complex(base))
        return self.bounded(raise_to(value, exponent) if exponent != 1 else value)


RULES = {"frac": Expression.fraction, "sqrt": Expression.root, "binom": Expression.binomial,
         **dict.fromkeys(FUNCTIONS, Expression.function),
         **dict.fromkeys((*GREEK.split(), "pi", "infty", "inf", "infinity"), Expression.variable)}


def raise_to(base, exponent):
    """base ** exponent: exact where the result is rational. raises Refused where it is too large"""
    if not isinstance(base, Fraction) or not isinstance(exponent, Fraction):
        return complex(base) ** complex(exponent)
    if exponent.denominator > 1:
        root = exact_root(base, exponent.denominator)
        if root is None:
            return complex(base) ** float(exponent)
        base, exponent = root, Fraction(exponent.numerator)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and bits * abs(exponent) > MAX_BITS:
        raise Refused("a power is too large")
    return base ** int(exponent)


def exact_root(base, degree):
    """The rational root of a rational number, None where there is none."""
    if base < 0 or degree > 16:
        return None
    parts = base.numerator, base.denominator
    roots = [math.isqrt(n) if degree == 2 else round(n ** (1 / degree)) for n in parts]
    exact = all(root**degree == n for root, n in zip(roots, parts, strict=True))
    return Fraction(*roots) if exact else None


# whether two are the same


def same(answer, gold):
    """Whether two Values are equal; see `answers_match` for where it is not symmetric."""
    if gold.kind == "relation" and answer.kind == "tuple":
        answer = answer._replace(kind="relation")
    named_apart = answer.name and gold.name and answer.name != gold.name
    if "equation" in (answer.kind, gold.kind) or named_apart:
        a, g = left_minus_right(answer), left_minus_right(gold)
        return all(x and cmath.isfinite(x) for x in (*a, *g)) and (
            close([x * g[0] for x in a], [y * a[0] for y in g]))
    if answer.kind == gold.kind:
        if gold.kind in ("text", "choice"):
            return gold.kind == "text" and answer.value == gold.value
        return {"number": same_number, "set": same_set}.get(gold.kind, same_items)(answer, gold)
    if answer.kind == "set" and len(answer.value) == 1:
        return same(answer.value[0], gold)
    if gold.kind == "set" and len(gold.value) == 1:
        return same(answer, gold.value[0])
    return {answer.kind, gold.kind} == {"choice", "text"} and answer.value == gold.value


def left_minus_right(value):
    """Of an equation, at all probe points; (0,) where the value is none."""
    if value.kind == "equation":
        return value.value
    try:
        left = fingerprint(value.name) if value.kind == "number" and value.name else ()
    except (Unreadable, Refused):
        left = ()
    if not left:
        return (0,)
    return tuple(x - y for x, y in zip(spread(left), spread(value.value), strict=True))


def spread(values):
    return tuple(values) * (PROBES if len(values) == 1 else 1)


def close(a, g):
    """Whether values agree at all points: exactly where both are rational."""
    exact = [x for x in (*a, *g) if isinstance(x, Fraction)]
    if len(a) == len(g) == len(exact) == 1 and exact[0].denominator > 10**6:
        return False  # a rounded decimal is no irrational number
    return all(x == y or not (isinstance(x, Fraction) and isinstance(y, Fraction))
               and cmath.isclose(x, y, rel_tol=TOLERANCE, abs_tol=1e-15)
               for x, y in zip(spread(a), spread(g), strict=True))


def same_number(answer, gold):
    if answer.unit and gold.unit:
        return answer.unit == gold.unit and close(answer.value, gold.value)
    if close(answer.value, gold.value):
        return True
    a, g = ([v / 100 for v in x.value] if x.unit == "%" else x.value for x in (answer, gold))
    return "%" in (answer.unit, gold.unit) and close(a, g)


def same_set(answer, gold):
    """In any order; in the same one where one side alone says what is what (x = 1, y = 2)."""
    left, names = list(answer.value), [{v.name for v in x.value} for x in (answer, gold)]
    if len(left) != len(gold.value) or all(map(same, left, gold.value)):
        return len(left) == len(gold.value)
    if len(left) > MAX_ITEMS or {""} in names and max(map(len, names)) > 1:
        return False
    for item in gold.value:
        match = next((i for i, other in enumerate(left) if same(other, item)), None)
        if match is None:
            return False
        del left[match]
    return True


def same_items(answer, gold):
    (left, a, right), (gold_left, g, gold_right) = answer.value, gold.value
    return (left, right, len(a)) == (gold_left, gold_right, len(g)) and all(map(same, a, g))


# -------------------------------------------------------------------------------------------------
# prompts and data

PROMPTS = {
    # DeepSeek-AI 2025, DeepSeek-R1, arXiv 2501.12948, table 1
    "r1_zero": "A conversation between User and Assistant. The User asks a question, and the "
    "Assistant solves it. The Assistant first thinks about the reasoning process in the mind and "
    "then provides the User with the answer. The reasoning process is enclosed within <think> "
    "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>.\nUser: {question}\n"
    "Assistant: <think>",
    "question_only": "{question}",
    # in the form of the supplement: headings, query and answer between backticks
    "system": "# Instruction\nBelow is a conversation between a person and an AI assistant (you). "
    'What the person asks stands under "# Query:", what you reply under "# Answer:". You are '
    "helpful, respectful and honest: reply as well and as clearly as you can, make nothing up, and "
    "decline what is harmful, dangerous or illegal.\n\n# Query:\n```{question}```\n\n"
    "# Answer:\n```",
    # Taori et al. 2023, Stanford Alpaca; a training text goes on with the response
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{question}\n\n### Response:\n",
}
STOPS = {"r1_zero": ("</answer>",), "system": ("# Query:",)}
MMLU_QUESTION = (
    "Answer the following multiple choice question about {subject}. Respond with a single sentence "
    'of the form "The correct answer is _", filling the blank with the letter of the correct '
    "answer.\n\nQuestion: {question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")

QUESTION = ("question", "problem", "prompt", "instruction")  # the names that a field may have
ANSWER = ("answer", "ground_truth", "expected_answer", "solution")
RESPONSE = ("response", "output", "completion", "answer")


def read_table(path):
    """The rows, lists of texts, of a csv file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if row]


def read_records(path):
    """[(place, dict)] of a JSONL file (.gz too), a JSON list, or a csv file with a header.
    raises ValueError, naming the place, for what is none of these"""
    path, place = str(path), path
    try:
        if path.endswith(".csv"):
            header, *rows = read_table(path)
            records = [dict(zip(header, row, strict=False)) for row in rows]
        else:
            opener = gzip.open if path.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8-sig") as file:
                text = file.read()
            if text.lstrip()[:1] == "[":
                records = json.loads(text)
            else:
                records = []
                for i, line in enumerate(text.split("\n"), 1):
                    place = f"{path}:{i}"
                    records += [json.loads(line)] if line.strip() else [None]
    except (OSError, EOFError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{place} must be JSON or csv that can be read, got: {error}; give one "
                         "object a line") from None
    found = [(f"{path}:{i}", r) for i, r in enumerate(records, 1) if r is not None]
    for place, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{place} must be an object with fields, got {str(record)[:40]!r}; "
                             "correct it")
    if not found:
        raise ValueError(f"{path} must hold at least one record, got none; give another file")
    return found


def pick(place, record, *names):
    """The text in the first of the fields `names` that the record has, which must not be empty."""
    values = [record[name] for name in names if record.get(name) is not None]
    if not values:
        raise ValueError(f"{place} must have the field {' or '.join(names)}, got "
                         f"{', '.join(map(str, record))}; rename or add it")
    value = values[0] if isinstance(values[0], str) else json.dumps(values[0])
    if not value.strip():
        raise ValueError(f"{place} must have text in {' or '.join(names)}, got an empty one; fill "
                         "it or drop the record")
    return value


def read_pairs(path):
    """[{"prompt", "response", "ground_truth" (None without one)}] for SFT, of JSONL."""
    return [{"prompt": pick(place, r, "prompt", *QUESTION), "response": pick(place, r, *RESPONSE),
             "ground_truth": r.get("ground_truth")} for place, r in read_records(path)]


def read_problems(path):
    """[{"question", "answer"}] of GSM8K, MATH and their like, in JSONL."""
    return [{"question": pick(place, r, *QUESTION), "answer": pick(place, r, *ANSWER)}
            for place, r in read_records(path)]


def read_preferences(path):
    """[{"prompt", "chosen", "rejected"}] for DPO, of JSONL with these fields or with Anthropic's HH
    conversations, of which those of one turn are kept. source: [1] supplement, look_at_hh"""
    pairs = []
    for place, record in read_records(path):
        sides = [pick(place, record, side) for side in ("chosen", "rejected")]
        if "prompt" in record:
            prompts = [pick(place, record, "prompt")] * 2
        else:
            turns = [re.split(r"\n\n(?:Human|Assistant):", "\n\n" + s.strip())[1:] for s in sides]
            if [*map(len, turns)] != [2, 2]:
                continue
            prompts, sides = ([t[i].strip() for t in turns] for i in (0, 1))
        if prompts[0] == prompts[1] and all(prompts) and all(sides):
            pairs.append({"prompt": prompts[0], "chosen": sides[0], "rejected": sides[1]})
    if not pairs:
        raise ValueError(f"{path} must hold pairs with a prompt, or conversations of one turn, got "
                         "neither; give the fields prompt, chosen and rejected")
    return pairs


def read_mmlu(path):
    """[{"subject", "question", "options", "answer"}] of SUBJECT_test.csv or a folder of such files:
    rows of a question, four options and a letter, no header."""
    examples = []
    for file in sorted(Path(path).glob("*.csv")) if Path(path).is_dir() else [Path(path)]:
        subject = re.sub(r"_(?:test|val|dev)$", "", file.stem).replace("_", " ")
        try:
            rows = read_table(file)
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{file} must be csv, got: {error}; give another file") from None
        for i, row in enumerate(rows, 1):
            if len(row) != 6 or row[5].strip() not in {*"ABCD"} or not row[0].strip():
                raise ValueError(f"{file}:{i} must be a question, four options and a letter of A "
                                 f"to D, got {len(row)} fields, the last {row[-1][:20]!r}; correct "
                                 "it")
            examples.append({"subject": subject, "question": row[0], "options": row[1:5],
                             "answer": row[5].strip()})
    if not examples:
        raise ValueError(f"{path} must hold rows of MMLU, got none; give a csv file or a folder")
    return examples


def read_examples(task, path, prompt):
    """The examples of a task in the file `path`, dicts with asked (the question as it is put),
    prompt (that in the template `prompt`) and what grading needs."""
    if task == "mmlu":
        examples = read_mmlu(path)
        for e in examples:
            e["asked"] = MMLU_QUESTION.format(**e, **dict(zip("abcd", e["options"], strict=True)))
    elif task in ("alpaca_eval", "sst"):
        field = "instruction" if task == "alpaca_eval" else "prompts_final"
        examples = [{**r, "asked": pick(place, r, field)} for place, r in read_records(path)]
    else:
        examples = read_problems(path)
        ending = "\nAnswer:" if task == "gsm8k" and prompt in ("system", "alpaca") else ""
        for e in examples:
            e["asked"] = e["question"] + ending
    for e in examples:
        e["prompt"] = PROMPTS[prompt].replace("{question}", e["asked"])
    return examples


# -------------------------------------------------------------------------------------------------
# evaluation


def pass_at_k(n, c, k):
    """The probability that k of n samples, of which c are right, hold a right one, without bias:
    1 - C(n - c, k) / C(n, k). source: Chen et al. 2021, Codex, arXiv 2107.03374, equation 1"""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"k must lie in 1..n and c in 0..n, got k {k}, c {c}, n {n}; sample more")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def grade_response(task, prompt, example, response, strict=False):
    """The rewards of a response; {} for the tasks that a model of another kind grades."""
    if task in ("alpaca_eval", "sst"):
        return {}
    if task == "mmlu":
        said, gold = parse_mmlu_response(example, response), example["answer"]
    elif prompt == "r1_zero":
        return r1_zero_reward(response, example["answer"], strict)
    elif task == "gsm8k" and prompt != "question_only":
        said = parse_gsm8k_response(response)
        gold = parse_gsm8k_response(final_answer(example["answer"]))
        said, gold = (None if x is None else Fraction(x) for x in (said, gold))
    else:
        return question_only_reward(response, example["answer"], strict)
    right = float(said is not None and said == gold)
    return {"reward": right, "format_reward": float(said is not None), "answer_reward": right}


def generate_responses(model, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0,
                       num_samples=1, stop=(), seed=0):
    """num_samples responses to each prompt, lists of dicts with text and finish_reason. A prompt
    that leaves no room in the context gets "", for the reason "too long"."""
    room = model.config.context_length - max_new_tokens
    fits = [len(encode_text(tokenizer, prompt)) <= room for prompt in prompts]
    rows = iter(rollout(model, tokenizer, list(itertools.compress(prompts, fits)), max_new_tokens,
                        temperature, top_p, num_samples, stop, seed))
    missing = {"text": "", "finish_reason": "too long"}
    return [[next(rows) if fit else missing for _ in range(num_samples)] for fit in fits]


def read_generations(folder):
    """What an evaluation left in `folder`: {(index, sample): record}, and its flags or None."""
    done, flags = {}, None
    for file in sorted(Path(folder).glob("generations*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                record = json.loads(line)
                flags = record.get("flags", flags)
                if "index" in record:
                    done[record["index"], record["sample"]] = record
    return done, flags


def open_generations(args, rank, barrier):
    """(what there is already, this rank's file to add to); the file's first record is the flags."""
    skip = ("resume", "overwrite", "run", "device")
    flags = {k: v for k, v in vars(args).items() if k not in skip}
    folder = Path(args.out_dir)
    done, old = read_generations(folder)
    if old is not None and not (args.resume or args.overwrite):
        raise ValueError(f"out_dir must be a new folder, got {folder}, which holds an evaluation; "
                         "give --resume to go on, --overwrite to start anew, or another")
    changed = [k for k in flags if old and args.resume and old.get(k) != flags[k]]
    if changed:
        raise ValueError(f"--resume needs the flags of the evaluation in {folder}, got another "
                         f"{', '.join(changed)}; give the same ones, or --overwrite")
    barrier()  # all have read it
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("generations*.jsonl") if rank == 0 and not args.resume else ():
        file.unlink()
    barrier()
    path = folder / (f"generations.{rank}.jsonl" if rank else "generations.jsonl")
    file = lm.open_log(path, int(args.resume), {"flags": flags})  # drops a line that was cut off
    return done if args.resume else {}, file


def generate_missing(args, examples, model, tokenizer, done, file, rank, ranks):
    """Generates, grades and writes this rank's share of what `done` lacks. What is drawn depends on
    the seed and the example's place, so that resuming or more ranks give the same."""
    began, new = time.perf_counter(), 0
    samplings = [([None], 0.0), *[(range(args.num_samples), args.temperature)][: args.num_samples]]
    batches = [(first, *s) for first in range(0, len(examples), args.batch_size) for s in samplings]
    stop = (*STOPS.get(args.prompt, ()), *args.stop)
    for first, samples, temperature in batches[rank::ranks]:
        batch = examples[first : first + args.batch_size]
        keys = [[(first + i, sample) for sample in samples] for i in range(len(batch))]
        if all(key in done for group in keys for key in group):
            continue
        groups = generate_responses(
            model, tokenizer, [e["prompt"] for e in batch], args.max_new_tokens, temperature,
            args.top_p, len(samples), stop, args.seed * 10**9 + first)
        for e, group, rows in zip(batch, keys, groups, strict=True):
            for key, row in zip(group, rows, strict=True):
                rewards = grade_response(args.task, args.prompt, e, row["text"], args.strict)
                record = {"index": key[0], "sample": key[1], "prompt": e["prompt"],
                          "response": row["text"], "finish_reason": row["finish_reason"],
                          "ground_truth": e.get("answer"), **rewards}
                if key not in done:
                    file.write(json.dumps(record) + "\n")
                    new += 1
        file.flush()
        rate = new / (time.perf_counter() - began)
        print(f"{first + len(batch)}/{len(examples)} examples | {rate:.2f} responses/s", flush=True)


def evaluate(args):
    """Verb eval: generations*.jsonl, results.json and the files that other graders read."""
    rank, ranks, barrier = 0, 1, lambda: None
    if dist.is_initialized():
        rank, ranks, barrier = dist.get_rank(), dist.get_world_size(), dist.barrier
    if args.num_samples < max(args.pass_at, default=0):
        raise ValueError(f"--num_samples must be at least every --pass_at, got {args.num_samples} "
                         f"and {max(args.pass_at)}; raise it")
    examples = read_examples(args.task, args.data, args.prompt)[: args.num_examples or None]
    device = lm.resolve_device(args.device)
    dtype, reason = lm.resolve_dtype(args.dtype, device)
    if reason:
        print(reason)
    model, tokenizer = lm.load_model(args.model, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} must have a tokenizer.json beside it, got none; copy it "
                         "there")
    done, file = open_generations(args, rank, barrier)
    began, old = time.perf_counter(), len(done)
    with file:
        generate_missing(args, examples, model, tokenizer, done, file, rank, ranks)
    seconds = time.perf_counter() - began
    barrier()
    if rank == 0:
        done, _ = read_generations(args.out_dir)
        report(args, examples, done, (len(done) - old) / seconds)
    return 0


def report(args, examples, done, per_s):
    """Prints and writes results.json, and the file that the task's grader reads."""
    greedy = [done[i, None] for i in range(len(examples))]
    result = {"task": args.task, "prompt": args.prompt, "examples": len(examples),
              "responses_per_s": per_s,
              "too_long": sum(r["finish_reason"] == "too long" for r in greedy),
              "not_finished": sum(r["finish_reason"] == "length" for r in greedy)}
    if "reward" in greedy[0]:
        kinds = [(r["format_reward"], r["answer_reward"]) for r in greedy]
        result.update(accuracy=kinds.count((1, 1)) / len(kinds),
                      format_and_answer_right=kinds.count((1, 1)),
                      format_right_answer_wrong=kinds.count((1, 0)),
                      format_and_answer_wrong=kinds.count((0, 0)),
                      unreadable_ground_truths=sum(not is_gradable(e["answer"]) for e in examples))
        right = [sum(done[i, j]["reward"] for j in range(args.num_samples))
                 for i in range(len(examples))]
        for k in args.pass_at:
            found = [pass_at_k(args.num_samples, int(c), k) for c in right]
            result[f"pass@{k}"] = sum(found) / len(found)
    folder = Path(args.out_dir)
    outputs = [r["response"].split("# Query:")[0].strip().removesuffix("```").strip()
               for r in greedy]
    if args.task == "alpaca_eval":
        lm.write_json([{"instruction": e["instruction"], "output": output, "generator": args.model,
                        "dataset": e.get("dataset")}
                       for e, output in zip(examples, outputs, strict=True)],
                      folder / "alpaca_eval.json")
    if args.task == "sst":
        with lm.atomic_write(folder / "sst.jsonl") as file:
            for e, output in zip(examples, outputs, strict=True):
                line = {"prompts_final": e["prompts_final"], "output": output}
                file.write((json.dumps(line) + "\n").encode())
    lm.write_json(result, folder / "results.json")
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def add_eval_parser(subparsers):
    p = subparsers.add_parser("eval", help="zero-shot accuracy, pass@k, outputs for graders")
    add, counting, from_zero = p.add_argument, lm.positive(int), lm.positive(int, zero=True)
    add("--task", required=True, choices=("math", "gsm8k", "mmlu", "alpaca_eval", "sst"))
    add("--data", required=True, help="JSONL, JSON or csv; mmlu: or a folder of csv files")
    add("--model", required=True, help="a Hugging Face folder, a checkpoint or its folder")
    add("--prompt", default="r1_zero", choices=tuple(PROMPTS))
    add("--strict", action="store_true", help="the handout's exact spacing of tags")
    add("--num_examples", type=from_zero, default=0, help="the first ones (0: all)")
    add("--num_samples", type=from_zero, default=0, help="beside the greedy response")
    add("--pass_at", type=counting, nargs="*", default=[], metavar="K", help="of the samples")
    add("--temperature", type=lm.positive(float), default=1.0, help="of the samples")
    add("--top_p", type=float, default=1.0)
    add("--max_new_tokens", type=counting, default=1024)
    add("--stop", action="append", default=[], help="ends a response, beside the prompt's own")
    add("--batch_size", type=counting, default=32, help="prompts at a time")
    add("--out_dir", default="out_eval")
    add("--resume", action="store_true", help="go on where an evaluation was killed")
    add("--overwrite", action="store_true", help="start anew in out_dir")
    add("--seed", type=from_zero, default=0)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    p.set_defaults(run=evaluate)


# -------------------------------------------------------------------------------------------------
# small tasks that a program grades

COUNTDOWN_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
COUNTDOWN_ALPHABET = "0123456789+-*/=() no"  # of prompts and traces, beside the tags


def addition_problems(n, digits, seed):
    """n different sums of two numbers below 10**digits, {"prompt": "348+77=", "answer": "425"}; a
    greater n only adds to them."""
    base, rng, pairs = 10**digits, random.Random(seed), {}
    if n > base * base:
        raise ValueError(f"there are {base * base} sums of {digits} digits, got n {n}; lower it")
    while len(pairs) < n:
        pairs[rng.randrange(base), rng.randrange(base)] = None
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def countdown_problems(n, count, seed):
    """n different problems, [{"numbers", "target", "solution"}]: of `count` numbers, 1 to 99, make
    target, 1 to 99, by + - * /, each number used once; there is a way over positive integers. A
    greater n only adds to them. raises ValueError when so many are not found"""
    rng, found = random.Random(seed), {}
    for _ in range(1000 * (n + 1)):
        if len(found) == n:
            return [*found.values()]
        numbers = [rng.randint(1, 99) for _ in range(count)]
        _, target, solution = random_steps(numbers, rng)
        if target <= 99:
            problem = {"numbers": numbers, "target": target, "solution": solution}
            found.setdefault((*sorted(numbers), target), problem)
    raise ValueError(f"there must be {n} problems of {count} numbers, got {len(found)}; ask "
                     "for less")


def countdown_prompt(numbers, target):
    return f"{' '.join(map(str, numbers))}={target}<think>"


def countdown_trace(numbers, target, rng):
    """The text behind `countdown_prompt`: none to two attempts that fail, each given up with "no",
    the steps of a solution, and its expression in the answer. raises ValueError without one"""
    solution = solve_countdown([(n, str(n), 3) for n in numbers], target, rng)
    if solution is None:
        raise ValueError(f"a problem must have a solution, got {numbers} for {target}; take one of "
                         "countdown_problems")
    attempts = [random_steps(numbers, rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    thoughts = "".join(f"{' '.join(s)} no " for s, result, _ in attempts if result != target)
    steps, expression = solution
    return f"{thoughts}{' '.join(steps)}</think> <answer>{expression}</answer>"


def countdown_reward(response, numbers, target):
    """The rewards of a response in r1_zero's format: right when its expression uses each of
    `numbers` once and nothing but + - * / and brackets, and is exactly target."""
    answer = last_tagged(response) if re.search(r"</think>\s*<answer>", response) else None
    right = False
    if answer and len(answer) <= MAX_ANSWER and re.fullmatch(r"[0-9+\-*/() ]+", answer):
        used = sorted(map(int, re.findall("[0-9]+", answer)))
        if used == sorted(numbers) and not re.search(r"[0-9)] *\(|\) *[0-9]|[0-9] +[0-9]", answer):
            with contextlib.suppress(Unreadable, Refused, RecursionError):
                right = fingerprint(answer) == (target,)
    return {"reward": float(right), "format_reward": float(answer is not None),
            "answer_reward": float(right)}


def combine(a, b):
    """[(step, item)] of two items, (value, expression, how tightly it binds): all operations on
    them, in this order, whose result is a positive integer."""
    results = {"+": a[0] + b[0], "*": a[0] * b[0], "-": a[0] - b[0],
               "/": a[0] // b[0] if a[0] % b[0] == 0 else 0}
    combined = []
    for op, value in results.items():
        level = 1 if op in "+-" else 2
        left = a[1] if a[2] >= level else f"({a[1]})"
        right = b[1] if b[2] > level or b[2] == level and op in "+*" else f"({b[1]})"
        if value > 0:
            combined.append((f"{a[0]}{op}{b[0]}={value}", (value, f"{left}{op}{right}", level)))
    return combined


def random_steps(numbers, rng):
    """(steps, result, expression): all numbers combined by random operations in random order."""
    items, steps = [(n, str(n), 3) for n in numbers], []
    while len(items) > 1:
        a, b = (items.pop(rng.randrange(len(items))) for _ in range(2))
        step, item = rng.choice(combine(a, b))
        steps.append(step)
        items.append(item)
    return steps, items[0][0], items[0][1]


def solve_countdown(items, target, rng, steps=()):
    """(steps, expression) of a random solution, by exhaustive search; None when there is none."""
    if len(items) == 1:
        return (steps, items[0][1]) if items[0][0] == target else None
    moves = [(i, j, step, item) for i, a in enumerate(items) for j, b in enumerate(items) if i != j
             for step, item in combine(a, b) if len(items) > 2 or item[0] == target]
    rng.shuffle(moves)
    for i, j, step, item in moves:
        rest = [other for k, other in enumerate(items) if k not in (i, j)]
        if found := solve_countdown([*rest, item], target, rng, (*steps, step)):
            return found
    return None
