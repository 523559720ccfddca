"""Post-training on one device or under torchrun: SFT, expert iteration, GRPO and its family, DPO.

    python rl.py                                     # SFT, then GRPO, on additions: a CPU's demo
    python rl.py sft --model out --data pairs.jsonl  # prompt and response pairs
    python rl.py grpo --model MODEL --data train.jsonl --algorithm dr_grpo
    torchrun --nproc_per_node 8 rl.py grpo ...       # the same update, prompts split over ranks

Responses are sampled by model.py's `generate` from the weights that are trained: no second engine,
so nothing to keep in step. A run leaves log.jsonl, checkpoint.pt and model/ in its --out_dir.

In this order: grading; prompts and data; log-probabilities; tokens; advantages and losses;
rollouts; a run's state; the steps (sft_step, ei_step, grpo_step, dpo_step: the algorithms); the
loop; tasks and files to learn from; evaluation; verbs and flags.

Sources
[1] CS336 assignment 5 (alignment) handout and its supplement, Stanford 2025
[2] Shao et al. 2024, DeepSeekMath (GRPO), arXiv 2402.03300
[3] Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783
[4] Yu et al. 2025, DAPO, arXiv 2503.14476
[5] Zheng et al. 2025, Group Sequence Policy Optimization (GSPO), arXiv 2507.18071
[6] MiniMax 2025, MiniMax-M1 (CISPO), arXiv 2506.13585
[7] Ahmadian et al. 2024, Back to Basics (RLOO), arXiv 2402.14740
[8] Ye et al. 2019, Mastering Complex Control in MOBA Games (dual clip), arXiv 1912.09729
[9] Schulman 2020, Approximating KL Divergence (k1, k2, k3), joschu.net/blog/kl-approx.html
[10] Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290

Dims: B sequences, T time, N tokens, C d_model, V vocab_size, G responses to a prompt.
"""

import argparse
import cmath
import contextlib
import copy
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import model as lm
from bpe import Tokenizer

# What each method is, in flags of `grpo`. A flag that is given goes before these.
ALGORITHMS = {
    "reinforce": dict(baseline="none", surrogate="reinforce", length_norm="response"),
    "reinforce_baseline": dict(surrogate="reinforce", length_norm="response"),
    "grpo": dict(normalize_by_std=True, length_norm="response"),  # [2]
    "dr_grpo": dict(length_norm="constant"),  # [3]
    "dapo": dict(normalize_by_std=True, clip_high=0.28, dynamic_sampling=4, overlong="mask"),  # [4]
    "gspo": dict(normalize_by_std=True, ratio="sequence", clip_low=3e-4, clip_high=4e-4,
                 length_norm="response"),  # [5]
    "cispo": dict(normalize_by_std=True, surrogate="cispo", clip_high=5.0),  # [6]
    "rloo": dict(baseline="leave_one_out", surrogate="reinforce", length_norm="constant"),  # [7]
}

# Texts that end a response. In training the first one that a tokenizer of ours has is appended, but
# before these come those that a model's folder names, since other programs stop at no others.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")

# Most |log-probability when sampled - in training|: of any token in float32, else of their mean.
MAX_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05}


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
NOTHING = ("", "none", "null", "nan", "n/a")  # what files and programs write for a missing answer
PROBES = 4  # points of the variables: all positive, all negative, two mixed
TOLERANCE = 1e-12  # relative, of irrational numbers, in float64
ROUNDING = 1e-14  # of a sum's term or a sine's argument: a smaller result is an error, and so 0

PLAIN_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
FORMULA = re.compile(r"\$\$?[^$]{1,1000}\$\$?")
UNION, LIST, RELATION = (
    r"\\cup(?![A-Za-z])", r"[,;]|\b(?:and|or)\b", r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]")
NAME = re.compile(  # what may be called something: x, x_1, f(x), (x, y), \theta, \text{Area}, a/b
    r"[A-Za-z]{1,2}/[A-Za-z]{1,2}|\\frac\{[A-Za-z]{1,2}\}\{[A-Za-z]{1,2}\}|"
    r"(?:\\angle\s*)?(?:\\?(?!(?:pi|e|i|infty)\b)[A-Za-z]+|\\text\{[^{}]*\})"
    r"(?:_(?:\{[^{}]*\}|\w))?\s*(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?|"
    r"[fghpqFGHPQ]\s*\([+-]?[0-9]+\)|\([A-Za-z](?:,\s*[A-Za-z])+\)")
UNIT = re.compile(  # words in \text, words behind a space, a few short ones right behind a digit
    r"(?P<head>.+?)\s*(?:\\text\{(?P<text>[^{}]*)\}|(?<=[0-9)}.!]) (?P<words>[A-Za-z]{2,}"
    r"(?:(?: |/| per )[A-Za-z]+)?|m/(?:s|min|h))|"
    r"(?<=[0-9])(?P<short>[kcm]m|[km]g|ml|hrs?|mph|lbs?))\s*(?P<power>\^\s*\{?[23]\}?)?", re.DOTALL)
DEGREES = re.compile(r"((?!.*\\(?:sin|cos|tan|sec|csc|cot)).+?)\s*\^\s*\\circ\s*"
                     r"(?:\\text\{)?\s*([CFK]?)\s*\}?")  # a function's argument has them itself
UNIT_NAMES = {"¤": "dollar", "usd": "dollar", "eur": "€", "euro": "€", "percent": "%",
              "feet": "foot", "ft": "foot", "inche": "inch", "in": "inch", "yd": "yard",
              "mi": "mile", "mph": "mile/hour", "hr": "hour", "h": "hour", "min": "minute",
              "sec": "s", "second": "s", "millimeter": "mm", "centimeter": "cm", "kilometer": "km",
              "meter": "m", "gram": "g", "kilogram": "kg", "lb": "pound", "oz": "ounce",
              "liter": "l", "milliliter": "ml", "unit": ""}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}
NO_UNITS = re.compile(  # words behind a number that change it
    r"\b(?:and|or|not|to|is|if|no|mod|pi|squared|cubed|factorial|half|halves|thirds?|quarters?|"
    r"fourths?|fifths?|tenths?|hundredths?|choose|plus|minus|times|over|divided|by|than|more|less|"
    r"sin|cos|tan|log|ln|sqrt)\b")

SPELLINGS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "√": r"\sqrt ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "°": r"^\circ ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
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
    (r"\\neq(?![A-Za-z])", r"\\ne "), (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
    (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\langle", "("), (r"\\rangle", ")"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"), (r"\\%", "%"), (r"\{,\}", ","), (r"\*\*", "^"),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\\varnothing(?![A-Za-z])|∅|\\\{ *\\\}", r"\\emptyset "),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
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
    set, union: the items (a list may repeat some); tuple, relation, matrix and its rows: (bracket,
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
    answers = readings(final_answer(str(answer)))
    golds = readings(final_answer(str(ground_truth)), True)
    try:
        return any(same(a, g) for a in answers for g in golds)
    except OverflowError:  # beyond float64, beside an irrational number
        return False


def is_gradable(ground_truth):
    """Whether a ground truth can be read: with one that cannot, no answer is ever rewarded."""
    return bool(readings(final_answer(str(ground_truth)), True))


def r1_zero_reward(response, ground_truth, strict=False):
    """The dict of reward, format_reward and answer_reward of a response to the r1_zero prompt. The
    format is </think> <answer> ... </answer>, of which the last pair counts; white space between
    the tags is free, `strict` wants exactly one space. source: [1] math_baseline"""
    return reward_dict(r1_zero_answer(response, strict), ground_truth)


def question_only_reward(response, ground_truth, strict=False):
    r"""The same for the bare question as the prompt: the format is an answer in \boxed{} behind all
    thinking; `strict` refuses \fbox{} and \boxed 5. source: [1] grpo_prompt_ablation"""
    said = response.rpartition("</think>")[2]
    return reward_dict(None if "<think>" in said else last_boxed(said, strict), ground_truth)


def reward_dict(answer, ground_truth):
    """The rewards for an answer, None where the format was wrong; a list of ground truths accepts
    any of its items."""
    golds = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    formatted = answer is not None
    return rewards_of(formatted, formatted and any(answers_match(answer, g) for g in golds))


def rewards_of(formatted, right):
    return {"reward": float(right), "format_reward": float(formatted),
            "answer_reward": float(right)}


def parse_mmlu_response(mmlu_example, model_output):
    """The letter that the output gives as the answer, one of as many as the example (a dict) has
    "options"; None without one. A small letter must be all that is said or stand in brackets, and
    A and I are words before others. source: [1] supplement, mmlu_baseline"""
    letters = "ABCDEFGHIJ"[: len(mmlu_example.get("options", "ABCD"))]
    tagged = last_tagged(model_output)
    tail = (model_output if tagged is None else tagged)[-MAX_TAIL:].strip()
    word = r"[AI] (?!(?:as|and|because|but|for|is|or|since|so|which|with)\b)[a-z]"
    small = rf"[{letters.lower()}](?:(?<=\(.)(?=\))|(?=[\W_]*\Z))"
    letter = (rf"(?:[\s*_(\"'`$<\[{{]|\\(?:text|boxed)\b){{0,9}}"
              rf"((?!{word})[{letters}]|{small})(?![^\W_]|')")
    said = re.findall(
        rf"(?:(?i:answer(?:\s+is|\s*:)\s*:?(?:\s+(?:option|choice))?)|\\boxed){letter}", tail)
    alone = re.fullmatch(rf"{letter}[\s*_)\"'`$>\]}}.]*(?:[.:)]\s.*)?", tail, re.DOTALL)
    return said[-1].upper() if said else alone[1].upper() if alone else None


def parse_gsm8k_response(model_output):
    """The last number in the output as text without thousands marks, None without one.
    source: [1] supplement, gsm8k_baseline"""
    end = max(model_output.rfind(digit) for digit in "0123456789") + 1
    window = model_output[max(0, end - MAX_ANSWER) : end]
    number = (r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|"
              r"[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+")
    found = [*re.finditer(number, window)]
    if not found:
        return None
    negative = re.search(  # a space behind the sign: not in 5 - 3
        r"(?:^|[\s(=:*])(?:[-−]\\?\$?|\\?\$[-−])$|(?:^|[=(:]) ?[-−] \\?\$?$",
        window[: found[-1].start()])
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


def r1_zero_answer(response, strict=False):
    """What stands in the last <answer> tags behind the last </think> <answer>, None without."""
    thought = re.match(r"(?s:.*)</think> (?=<answer>)" if strict
                       else r"(?s:.*)</think>\s*(?=<answer>)", response)
    return last_tagged(response[thought.end() :]) if thought else None


def last_tagged(text):
    """What stands between the last <answer> and the </answer> behind it, None without both."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def last_boxed(text, strict=False):
    r"""What stands in the last \boxed{} or \fbox{}, None without one or when it is cut off; boxes
    that a comma, "and" or "or" joins are one list. `strict`: None unless it is \boxed{}."""
    at = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if at < 0:
        return None
    window, boxes = text[max(0, at - MAX_ANSWER) : at + MAX_ANSWER], []
    for box in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", window):
        inside = re.compile(r"[^\s$\\.,{]+").match(window, box.end())  # \boxed 5
        end = inside.end() if inside else closing(window, box.end())
        if not end or strict and box[0] + window[box.end()] != r"\boxed{":
            boxes = []  # cut off, or refused: only what follows can count
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
def readings(text, gold=False):
    """The Values that `text` may stand for: a tuple, empty when it cannot be read. Several, since
    1,200 is a number or a list, 1,25 a list or a decimal (1,5 as a gold is a list alone), and
    (C) 12 an option."""
    text = text.strip().rstrip(".")
    if text[:1] == text[-1:] == "$":
        text = text.strip("$").strip()
    if len(text) > MAX_ANSWER or text.lower() in NOTHING:
        return ()
    if PLAIN_NUMBER.fullmatch(text):
        return (Value("number", (Fraction(text.replace(",", "")),)),)
    text = normalise(text)
    forms = [text]
    if re.search("[0-9] [mgs]$", text):  # 5 m: meters, or 5 times m
        forms.append(rf"{text[:-1]}\text{{{text[-1]}}}")
    if re.fullmatch("[abcxyz]{2,3}|[b-df-hj-np-tv-z]{2,3}", text):  # no word: a product too
        forms.append(" ".join(text))
    if text[:1] not in "([{\\":
        if THOUSANDS.search(text):
            forms.append(THOUSANDS.sub(lambda m: m[0].replace(",", ""), text))
        elif re.fullmatch(rf"[^0-9,]*[0-9]+,[0-9]{'{2,}' if gold else '+'}[^0-9,]*", text):
            forms.append(text.replace(",", "."))
        elif re.fullmatch(r"[^0-9]*[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+[^0-9]*", text):
            forms.append(text.replace(".", "").replace(",", "."))  # 1.000,5
    values = []
    with contextlib.suppress(Refused, RecursionError):
        values += [read(form) for form in forms]
    if option := re.match(r"(?:\\text\{)?\(?([A-J])[).:]\}?\s+[\w\\](?!.*\b[A-J][).:])", text):
        values.append(Value("choice", option[1].lower()))
    elif not gold and (option := re.fullmatch(r"\(?([a-e])\)?", text)):
        values.append(Value("choice", option[1]))
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
    if re.fullmatch(r"\\mathbb\s*(?:R|\{R\})|(?:all )?real numbers", text):
        text = r"(-\infty,\infty)"
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
    if not re.search(r"\w", words):
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
    for kind, separators in (("union", UNION), ("set", LIST)):
        parts = [part for part in split(text, separators)[::2] if part]
        if len(parts) > 1:
            values = [read(part, nesting) for part in parts]
            if kind == "set" and {v.name for v in values[1:]} == {""}:  # x = 2, 3
                values = [v._replace(name=values[0].name) for v in values]
            lists = [v.value if r"\pm" in part and v.kind == "set" else (v,)
                     for part, v in zip(parts, values, strict=True)]
            return Value(kind, tuple(itertools.chain(*lists)))
    return None


def make_set(values):
    return Value("set", tuple(dict.fromkeys(values)))


def read_relation(text, nesting):
    """x = 5, 2 + 3 = 5, y = 2x, x^2 + y^2 = 1, x in [0, 1), 0 < x < 1."""
    parts = split(text, RELATION)
    sides, signs = parts[::2], parts[1::2]
    if not signs:
        return None
    if signs[-1] == r"\approx":  # 1/3 \approx 0.333 says 1/3
        exact = read(text.rpartition(r"\approx")[0], nesting)
        if exact.kind != "number" or len(exact.value) > 1:
            raise Unreadable("a rounded number without an exact one")
        return exact
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
        name = re.sub(r"\s|\\text", "", sides[0])
        if name[0] == "(" and (last.kind != "tuple" or [*name[1::2]] != sorted(name[1::2])):
            raise Unreadable("(y, x) = (1, 2), which is not what (1, 2) says")
        return last._replace(name=name)
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
    if builder := re.fullmatch(r"\\\{ *[a-z] *(?:\\mid\b|[|:])(.+)\\\}", text):  # {x | x > 1}
        value = read(builder[1], nesting)
        if value.kind != "relation":
            raise Unreadable("a condition that is no inequality")
        return value._replace(kind="tuple")
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
    if m := re.fullmatch(r"([+-]?)\s*(?:US ?(?=¤))?([¤€£¥₹]|USD|EUR)\s*(.+)", text):
        return with_unit(m[1] + m[3], m[2], nesting)
    if text.endswith((*"%¤€£¥₹",)):
        return with_unit(text[:-1], text[-1], nesting)
    if m := DEGREES.fullmatch(text):
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
    """The number in `head` with `unit`: one spelling for singular, plural, squares and rates."""
    value = read(head, nesting)
    if value.kind != "number":
        raise Unreadable("only numbers have units")
    unit = re.sub(r"^(?:square|sq) (\w+)$", r"\1^2", unit.lower().replace(".", "").strip())
    word, power, exponent = unit.partition("^")
    words = [w[:-1] if len(w) > 2 and w.endswith("s") else w for w in re.split("/| per ", word)]
    name = "/".join(UNIT_NAMES.get(w, w) for w in words)
    return value._replace(unit=name + power + exponent or value.unit)


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
             "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10, "lg": cmath.log10}
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

    def bounded(self, value, term=0):
        """`value`, real where it can be, 0 where it is but the rounding error of `term`; raises
        Refused when it is too large or one too many."""
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.work += bits
            if bits > MAX_BITS or self.work > MAX_WORK:
                raise Refused("too large")
            return value
        if not cmath.isfinite(value):
            raise Refused("not a number")
        if abs(value) < ROUNDING * abs(term):
            return Fraction(0)
        return value.real if value.imag == 0 else value  # -0.0j is the other side of a cut

    def evaluate(self):
        value = self.sum()
        if self.token:
            raise Unreadable(f"{self.token} does not belong there")
        return value

    def sum(self):
        value = self.product()
        while self.token in ("+", "-"):  # the sign is that of the product
            term = self.product()
            value = self.bounded(value + term, term)
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
                raise (Unreadable if self.has_variables else Refused)("a factorial of that")
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
        whole = token.isdigit()  # int reads it ten times as fast
        value = self.bounded(Fraction(int(token) if whole else token))
        before = self.tokens[self.at - 2]
        if whole and before not in ("^", r"\sqrt") and self.accept(r"\frac"):
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
            if CONSTANTS[name] == math.inf and (
                    re.sub(r"[-+(){}\\]", "", "".join(self.tokens)) != name):
                raise Refused("infinity is no number to calculate with")
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
        term = 0 if isinstance(value, Fraction) or name == "exp" else value
        if base is None:
            value = FUNCTIONS[name](complex(value))
        else:
            value = cmath.log(complex(value)) / cmath.log(complex(base))
        value = self.bounded(value, term)
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
    if base == exponent == 0:
        raise Refused("0^0 has no value")
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
    if gold.kind == "tuple" and gold.name:  # x in (1, 2)
        gold = gold._replace(kind="relation")
    if gold.kind == "relation" and answer.kind == "tuple":
        answer = answer._replace(kind="relation")
    if answer.kind == "union" and gold.kind == "set" and (
            {item.kind for item in gold.value} == {"relation"}):  # x < 1 or x > 2
        answer = answer._replace(kind="set")
    named_apart = answer.name and gold.name and answer.name != gold.name
    if "equation" in (answer.kind, gold.kind) or named_apart:
        a, g = left_minus_right(answer), left_minus_right(gold)
        return all(x and cmath.isfinite(x) for x in (*a, *g)) and (
            close([x * g[0] for x in a], [y * a[0] for y in g]))
    if answer.kind == gold.kind:
        if gold.kind in ("text", "choice"):
            return gold.kind == "text" and answer.value == gold.value
        compare = {"number": same_number, "set": same_set, "union": same_set}
        return compare.get(gold.kind, same_items)(answer, gold)
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
        plain = value.kind == "number" and value.name and "(" not in value.name
        left = fingerprint(value.name) if plain else ()
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
               and cmath.isclose(x, y, rel_tol=TOLERANCE)
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


def ask(prompt, question):
    """The question in the template of that name, as it stands: its braces mean nothing."""
    return PROMPTS[prompt].replace("{question}", question)


MMLU_QUESTION = (
    "Answer the following multiple choice question about {subject}. Respond with a single sentence "
    'of the form "The correct answer is _", filling the blank with the letter of the correct '
    "answer.\n\nQuestion: {question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")

QUESTION = ("question", "problem", "prompt", "instruction")  # the names that a field may have
ANSWER = ("answer", "ground_truth", "expected_answer", "solution")
RESPONSE = ("response", "output", "completion", "answer")


def read_records(path):
    """[(place, dict)] of a JSONL file (.gz too), a JSON list, or a csv file with a header.
    raises ValueError, naming the place, for what is none of these"""
    place = path = str(path)
    csv.field_size_limit(2**31 - 1)  # not 131,072 characters: texts may be long
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if path.removesuffix(".gz").endswith(".csv"):
            records = [*csv.DictReader(io.StringIO(text))]
        elif text.lstrip()[:1] == "[":
            records = json.loads(text)
        else:
            records = []
            for i, line in enumerate(text.split("\n"), 1):
                place = f"{path}:{i}"
                records += [json.loads(line)] if line.strip() else [None]
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise ValueError(f"{place} must be JSON or csv that can be read, got: {error}; give a "
                         "file with one object a line") from None
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
    if not value.strip() or isinstance(values[0], (list, dict)):
        got = value[:40].strip() or "an empty one"
        raise ValueError(f"{place} must have text in {' or '.join(names)}, got {got}; write some, "
                         "or drop the record")
    return value


def read_pairs(path):
    """[{"prompt", "response", "ground_truth" (None without one)}] for SFT, of JSONL; an instruction
    goes on with its input."""
    pairs = []
    for place, r in read_records(path):
        prompt = pick(place, r, "prompt", *QUESTION)
        if prompt == r.get("instruction"):  # Alpaca's
            prompt = f"{prompt}\n\n{r.get('input') or ''}".rstrip()
        pairs.append({"prompt": prompt, "response": pick(place, r, *RESPONSE),
                      "ground_truth": r.get("ground_truth")})
    return pairs


def read_problems(path):
    """[{"prompt", "answer"}] of GSM8K, MATH and their like, in JSONL."""
    return [{"prompt": pick(place, r, *QUESTION), "answer": pick(place, r, *ANSWER)}
            for place, r in read_records(path)]


def read_preferences(path):
    """[{"prompt", "chosen", "rejected"}] for DPO, of JSONL with these fields or with Anthropic's HH
    conversations, of which those of one turn are kept. source: [1] supplement, look_at_hh"""
    pairs, records = [], read_records(path)
    for place, record in records:
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
    if len(pairs) < len(records):
        print(f"dropped {len(records) - len(pairs):,} of {len(records):,} pairs: they are not of "
              "one turn, or have no text on a side")
    return pairs


def read_mmlu(path):
    """[{"subject", "question", "options", "answer"}] of SUBJECT_test.csv or a folder of such files:
    rows of a question, four options and a letter, no header."""
    examples = []
    csv.field_size_limit(2**31 - 1)  # not 131,072 characters: texts may be long
    for file in sorted(Path(path).glob("*.csv")) if Path(path).is_dir() else [Path(path)]:
        subject = re.sub(r"_(?:test|val|dev)$", "", file.stem).replace("_", " ")
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                rows = [row for row in csv.reader(lines) if row]
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
            e["asked"] = e["prompt"] + ending
    for e in examples:
        e["prompt"] = ask(prompt, e["asked"])
    return examples


# -------------------------------------------------------------------------------------------------
# masks, entropy, log-probabilities


def masked_normalize(tensor, mask, normalize_constant, dim=None):
    """The sum over `dim` (None: all) of the elements where mask is 1, / normalize_constant.
    source: [1] masked_normalize"""
    kept = tensor.masked_fill(mask == 0, 0)  # not a product: what is masked may be inf
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def masked_mean(tensor, mask, dim=None):
    """The mean over `dim` (None: all) of the elements where mask is 1; NaN where there is none.
    source: [1] masked_mean"""
    kept = mask != 0
    return masked_normalize(tensor, mask, kept.sum() if dim is None else kept.sum(dim), dim)


def compute_entropy(logits):
    """The entropy (...) in nats of softmax(logits), logits (..., V); equal ones give ln V.
    source: [1] compute_entropy"""
    logits = from_peak(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # -inf has probability 0, not NaN
    return -(log_p.exp() * log_p).sum(-1)


def from_peak(logits):
    """The logits less their greatest, whose sum of exponents does not round away small ones."""
    return logits - logits.detach().amax(-1, keepdim=True)


def spans(size, step):
    """Slices that cut range(size) into runs of `step`."""
    return [slice(start, start + step) for start in range(0, size, step)]


class _LinearLogProbs(torch.autograd.Function):
    """Each chunk's logits are made, used and dropped, and made again in the backward pass, where
    their gradient takes their place. In float32 a 32nd of a chunk at a time, so that the most
    memory is a chunk of logits and a fifth."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy = torch.empty(2, len(hidden), dtype=wide, device=hidden.device)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.chunk, ctx.wide = temperature, chunk, wide
        ctx.set_materialize_grads(False)
        w, buffer = weight.to(hidden.dtype), hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for rows in spans(len(hidden), chunk):
            logits = torch.mm(hidden[rows], w.T, out=buffer[: len(hidden[rows])])
            for part in spans(len(logits), -(-chunk // 32)):
                x, t = logits[part].to(wide).div_(temperature), targets[rows][part]
                log_probs[rows][part] = _softmax_in_place(x, t)
                entropy[rows][part] = torch.special.entr(x).sum(-1)  # -p ln p
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_log_probs, d_entropy):
        hidden, weight, targets, entropy = ctx.saved_tensors
        if d_log_probs is None:
            d_log_probs = torch.zeros_like(entropy)
        w = weight.to(hidden.dtype)
        buffer = hidden.new_empty(min(ctx.chunk, len(hidden)), len(weight))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=ctx.wide)
        for rows in spans(len(hidden), ctx.chunk):
            logits = torch.mm(hidden[rows], w.T, out=buffer[: len(hidden[rows])])
            for part in spans(len(logits), -(-ctx.chunk // 32)):
                x, t = logits[part].to(ctx.wide).div_(ctx.temperature), targets[rows][part]
                _softmax_in_place(x, t)
                g = d_log_probs[rows][part].unsqueeze(-1)
                if d_entropy is None:
                    x.mul_(-g)  # d log p[t] / d z = onehot(t) - p
                else:  # d entropy / d z = -p ln p - p entropy
                    d = d_entropy[rows][part].unsqueeze(-1)
                    surprise = torch.special.entr(x).mul_(d)
                    x.mul_(-g - d * entropy[rows][part].unsqueeze(-1)).add_(surprise)
                x.scatter_add_(-1, t.unsqueeze(-1), g)
                logits[part] = x.div_(ctx.temperature)
            d_hidden[rows] = logits @ w
            if d_weight.dtype == logits.dtype:
                d_weight.addmm_(logits.T, hidden[rows])
            elif logits.is_cuda:  # adds up in float32, inside the matmul
                torch.addmm(d_weight, logits.T, hidden[rows], out_dtype=ctx.wide, out=d_weight)
            else:
                d_weight += logits.T @ hidden[rows]
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def _softmax_in_place(x, targets):
    """Turns logits x (n, V) into probabilities; returns the targets' log-probabilities (n,)."""
    picked, peak = x.gather(-1, targets.unsqueeze(-1)), x.amax(-1, keepdim=True)
    total = x.sub_(peak).exp_().sum(-1, keepdim=True)
    x.div_(total)
    return (picked - peak - total.log()).squeeze(-1)


def linear_log_probs(hidden, weight, targets, temperature=1.0, chunk=None):
    """Log-probability of each target and entropy under softmax(hidden @ weight.T / temperature),
    both (N,) float32, without the (N, V) logits.

    hidden: (N, C); weight: (V, C); targets: (N,) int; chunk: tokens whose logits exist at one time
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    chunk = chunk or max(1, lm.CHUNK_LOGITS[kind] // weight.shape[0])
    return _LinearLogProbs.apply(hidden, weight, targets, temperature, chunk)


def device_of(model):
    """Where a model has its weights: the CPU for one that has none, or is just a function."""
    tensors = [model.parameters(), model.buffers()] if isinstance(model, nn.Module) else []
    return next((t.device for t in itertools.chain(*tensors)), torch.device("cpu"))


def token_log_probs(model, input_ids, labels, mask=None, temperature=1.0):
    """(log-probabilities of labels, entropies), both (B, T): chunked and with 0 where the mask is
    0 for a model of ours, plainly for any other that returns logits or an object with .logits."""
    if not hasattr(model, "hidden_states"):
        logits = model(input_ids)
        logits = getattr(logits, "logits", logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = from_peak(logits.to(wide)) / temperature
        picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return picked - logits.logsumexp(-1), compute_entropy(logits)
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    hidden = model.hidden_states(input_ids)[mask]
    found = linear_log_probs(hidden, model.lm_head.weight, labels[mask], temperature)
    return tuple(put(mask, values) for values in found)


def put(mask, values):
    """(B, T) with `values` (N,) in order where mask (B, T) is 1, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def get_response_log_probs(model, input_ids, labels, return_token_entropy=False):
    """{"log_probs": log p(labels), and if asked "token_entropy"}, each (B, T), of any model that
    returns logits or an object with .logits. source: [1] get_response_log_probs"""
    log_probs, entropy = token_log_probs(model, input_ids, labels)
    found = {"log_probs": log_probs}
    return {**found, "token_entropy": entropy} if return_token_entropy else found


# -------------------------------------------------------------------------------------------------
# text to tokens


def encode_text(tokenizer, text):
    """The ids of `text` alone, none added: by a Tokenizer of ours or one with Hugging Face's
    methods."""
    encode = getattr(tokenizer, "encode", tokenizer)
    try:
        ids = encode(text, add_special_tokens=False)
    except TypeError:  # ours adds none
        ids = encode(text)
    return list(ids["input_ids"] if hasattr(ids, "keys") else getattr(ids, "ids", ids))


def special_ids(tokenizer, *texts):
    """The ids of those of `texts` that are special tokens, where a tokenizer tells them."""
    known = lm.special_ids(tokenizer) if hasattr(tokenizer, "special_tokens") else {}
    ids = {text: i for i, text in known.items()}
    return tuple(ids[text] for text in texts if text in ids)


def end_ids(tokenizer):
    """The ids that end a text, the first one is appended to text; () where there is none."""
    if hasattr(tokenizer, "eos_token_id"):
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return special_ids(tokenizer, *dict.fromkeys((*getattr(tokenizer, "ends", ()), *END_TOKENS)))


def load_model(path, *place, **given):
    """lm.load_model, with a tokenizer that also knows the ends that the folder's files name: they
    may have any name."""
    model, tokenizer = lm.load_model(path, *place, **given)
    named = [files.get("eos_token_id") for files in (model.text_bounds, model.generation_config)]
    if tokenizer and named != [None, None]:
        special = lm.special_ids(tokenizer)
        tokenizer.ends = [special[i] for i in lm.end_ids(model, tokenizer) if i in special]
    return model, tokenizer


def begin_ids(tokenizer):
    """The id that begins a text, as a tuple; () where there is none, or where it is the end's."""
    if hasattr(tokenizer, "eos_token_id"):
        begin = getattr(tokenizer, "bos_token_id", None)
        return () if begin in (None, tokenizer.eos_token_id) else (begin,)
    given = getattr(tokenizer, "post_processor", None) or {}  # of its tokenizer.json
    firsts = [part["single"][0].get("SpecialToken", {}).get("id")
              for part in (given, *given.get("processors", ())) if part.get("single")]
    return special_ids(tokenizer, *dict.fromkeys((*filter(None, firsts), "<|begin_of_text|>")))[:1]


def encode_prompt(tokenizer, text):
    """The ids of a text that begins a sequence."""
    begin, ids = begin_ids(tokenizer), encode_text(tokenizer, text)
    return ids if ids[:1] == list(begin) else [*begin, *ids]


def pad_id(tokenizer):
    """An id to fill rows with: what is right of a row's end is neither seen nor counted."""
    given = getattr(tokenizer, "pad_token_id", None)
    return given if given is not None else next(iter(end_ids(tokenizer)), 0)


def pad_pairs(pairs, pad=0, device="cpu"):
    """{"input_ids", "labels", "response_mask"}, each (B, T), of pairs of lists (prompt ids,
    response ids): labels are input_ids one token on, the mask has the labels in a response."""
    lengths = np.array([(len(p), len(r)) for p, r in pairs], np.int64).reshape(-1, 2)
    prompts, responses = lengths.T[:, :, None]
    ends = prompts + responses
    place = np.arange(ends.max(initial=1))
    ids = np.full((len(pairs), len(place)), pad)
    tokens = itertools.chain.from_iterable(itertools.chain.from_iterable(pairs))
    ids[place < ends] = np.fromiter(tokens, np.int64, ends.sum())
    ids = torch.from_numpy(ids).to(device)
    mask = (place >= np.maximum(prompts, 1)) & (place < ends)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:],
            "response_mask": torch.from_numpy(mask[:, 1:]).to(device)}


def tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    """{"input_ids", "labels", "response_mask"}, each (B, longest - 1): prompt and output are
    tokenized apart and joined, rows padded on the right. source: [1] tokenize_prompt_and_output"""
    pairs = [(encode_text(tokenizer, prompt), encode_text(tokenizer, output))
             for prompt, output in zip(prompt_strs, output_strs, strict=True)]
    return pad_pairs(pairs, pad_id(tokenizer))


class PackedSFTDataset(torch.utils.data.Dataset):
    """Instruction pairs (JSONL with prompt and response) in the Alpaca template, each between the
    tokenizer's begin and end tokens, joined and cut every seq_length tokens: item i is
    {"input_ids", "labels"}, each (seq_length,) int64, labels one token on across the cut.

    shuffle: the order of the documents, by `seed`. source: [1] supplement, data_loading
    """

    def __init__(self, tokenizer, dataset_path, seq_length, shuffle, seed=0):
        pairs = read_pairs(dataset_path)
        order = shuffled(len(pairs), seed, 0) if shuffle else range(len(pairs))
        end = end_ids(tokenizer)[:1]
        if not end:
            raise ValueError("the tokenizer must have an end-of-text token to part documents, got "
                             "none; add <|endoftext|>")
        texts = (ask("alpaca", pairs[i]["prompt"]) + pairs[i]["response"] for i in order)
        ids = [np.array([*encode_prompt(tokenizer, text), *end], np.int32) for text in texts]
        self.ids, self.seq_length = torch.from_numpy(np.concatenate(ids)), seq_length

    def __len__(self):
        return (len(self.ids) - 1) // self.seq_length

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item must be in 0..{len(self) - 1}, got {i}")
        window = self.ids[i * self.seq_length : (i + 1) * self.seq_length + 1].long()
        return {"input_ids": window[:-1], "labels": window[1:]}


def iterate_batches(dataset, batch_size, shuffle):
    """One pass over `dataset` in batches, dicts of (batch_size, seq_length); the last may be
    smaller. source: [1] supplement, data_loading"""
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


# -------------------------------------------------------------------------------------------------
# rewards, advantages and losses


def grade(reward_fn, responses, ground_truths):
    """The reward_fn(response, ground_truth) of each: dicts with reward, format_reward and
    answer_reward. raises ValueError, naming the response, where reward_fn fails"""
    grades = []
    for response, truth in zip(responses, ground_truths, strict=True):
        try:
            found = reward_fn(response, truth)
            if not math.isfinite(found["reward"]):
                raise ValueError(f"reward {found['reward']}")
        except Exception as error:  # anybody's function: whatever it raises is told the same way
            raise ValueError(f"the reward function must grade every response, got {error!r} for "
                             f"{response[:80]!r}; mend it") from error
        grades.append(found)
    return grades


def is_right(row):
    """Whether a graded response has the right answer: a reward may also be of a part of it."""
    return row.get("answer_reward", row["reward"]) > 0


def compute_advantages(rewards, baseline="mean", normalize_by_std=False, eps=1e-6):
    """Advantages (groups, G) of rewards (groups, G): less the baseline ("none", the group's
    "mean", or for each response the mean of the others, "leave_one_out" [7]), and / (std + eps),
    the unbiased one, if asked. With either, a group of equal rewards gives exact zeros, not
    rounding / eps."""
    G = rewards.shape[1]
    if baseline == "none" and not normalize_by_std:
        return rewards
    if G == 1:
        raise ValueError("group_size must be at least 2 with a baseline or a std, got 1; raise it, "
                         "or do without them")
    advantages = rewards if baseline == "none" else rewards - rewards.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * (G / (G - 1))
    if normalize_by_std:
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    same = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(same, 0)


def compute_group_normalized_rewards(reward_fn, rollout_responses, repeated_ground_truths,
                                     group_size, advantage_eps, normalize_by_std):
    """(advantages (n,), raw rewards (n,), metadata) of n = groups * group_size responses, group by
    group. source: [1] compute_group_normalized_rewards, equations 28 and 31"""
    if not rollout_responses or len(rollout_responses) % group_size:
        raise ValueError(f"responses must come in groups of {group_size}, got "
                         f"{len(rollout_responses)}; give whole groups")
    grades = grade(reward_fn, rollout_responses, repeated_ground_truths)
    raw = torch.tensor([g["reward"] for g in grades], dtype=torch.float64)
    groups = raw.view(-1, group_size)
    advantages = compute_advantages(groups, "mean", normalize_by_std, advantage_eps).flatten()
    same = (groups.amax(1) == groups.amin(1)).double().mean()
    metadata = {"reward_mean": raw.mean().item(), "reward_std": raw.std().item(),
                "reward_min": raw.min().item(), "reward_max": raw.max().item(),
                "no_signal": same.item()}
    return advantages.float(), raw.float(), metadata


def policy_loss(log_probs, old_log_probs, advantages, mask=None, surrogate="clip", ratio="token",
                clip_low=0.2, clip_high=0.2, dual_clip=0.0):
    """(loss of each token (B, T), clipped low (B, T) bool, clipped high (B, T) bool).

    log_probs, old_log_probs: (B, T), now and when sampled; advantages: (B, 1) or (B, T)
    surrogate: with rho = exp(log_probs - old_log_probs), A the advantage, sg no gradient, it is
    "reinforce" A log p; "ratio" rho A; "clip" min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),
    and where A < 0 at least dual_clip A, unless 0 [8]; "cispo" sg(min(rho, 1 + clip_high)) A log p
    ratio: "token", or "sequence": the geometric mean of rho over the mask, for all its tokens [5]
    source: [1] compute_grpo_clip_loss, [2] equation 3, [6] equation 4
    """
    if surrogate == "reinforce":
        never = torch.zeros_like(log_probs, dtype=torch.bool)
        return -advantages * log_probs, never, never
    log_rho = log_probs - old_log_probs
    if ratio == "sequence":
        mask = torch.ones_like(log_rho) if mask is None else mask
        total = masked_normalize(log_rho, mask, 1, dim=1)
        log_rho = (total / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(log_rho)
    rho = log_rho.clamp(max=20).exp()  # inf, at a token that is clipped or masked, has gradient NaN
    low, high = rho < 1 - clip_low, rho > 1 + clip_high
    if surrogate == "ratio":
        return -rho * advantages, low & False, high & False
    if surrogate == "cispo":
        return -rho.detach().clamp(max=1 + clip_high) * advantages * log_probs, low & False, high
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain, low & (advantages < 0), high & (advantages > 0)


def kl_estimate(log_probs, ref_log_probs, kind="k3"):
    """An estimate (B, T) of KL(policy, reference) from the sampled tokens alone: k1 unbiased, k2
    half the square, k3 never negative. In a loss k1's gradient has mean 0; k2's is the true one on
    fresh samples. source: [9]"""
    d = ref_log_probs - log_probs
    return {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.exp() - d - 1}[kind]()


def token_weights(mask, length_norm, sequences, tokens, max_tokens):
    """What the loss of each token counts in an update, (B, T): the mean over sequences of the mean
    over their tokens ("response" [2]), the mean over tokens ("tokens" [4]), or the sum over
    sequences * max_tokens ("constant" [3]). `sequences` and `tokens` are those of the whole
    update: micro-batches and ranks add up to it, however it is cut."""
    if length_norm == "response":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / sequences
    return mask / (tokens if length_norm == "tokens" else sequences * max_tokens)


def overlong_penalty(length, max_tokens, buffer):
    """0 up to max_tokens - buffer tokens, falling to -1 at max_tokens. source: [4] equation 13"""
    return -max(0.0, min(1.0, (length - (max_tokens - buffer)) / buffer)) if buffer else 0.0


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages, policy_log_probs):
    """-A log p, (B, T), of A (B, 1). source: [1] compute_naive_policy_gradient_loss"""
    return policy_loss(policy_log_probs, None, raw_rewards_or_advantages, surrogate="reinforce")[0]


def compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange):
    """(loss (B, T), {"clipped": (B, T) bool}) of advantages (B, 1). source: [1] equation 33"""
    loss, low, high = policy_loss(policy_log_probs, old_log_probs, advantages, clip_low=cliprange,
                                  clip_high=cliprange)
    return loss, {"clipped": low | high, "clipped_low": low, "clipped_high": high}


def compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None,
                                 old_log_probs=None, cliprange=None):
    """(loss (B, T), metadata) for loss_type no_baseline, reinforce_with_baseline, grpo_clip or
    grpo_no_clip. source: [1] compute_policy_gradient_loss, and equation 34"""
    old = {"old_log_probs": old_log_probs}
    needs = {"no_baseline": {"raw_rewards": raw_rewards},
             "reinforce_with_baseline": {"advantages": advantages},
             "grpo_clip": {"advantages": advantages, **old, "cliprange": cliprange},
             "grpo_no_clip": {"advantages": advantages, **old}}
    kind = loss_type.lower().replace("-", "_")
    if kind not in needs:
        raise ValueError(f"loss_type must be one of {', '.join(needs)}, got {loss_type!r}; "
                         "choose one")
    missing = [name for name, value in needs[kind].items() if value is None]
    if missing:
        raise ValueError(f"loss_type {loss_type} needs {', '.join(missing)}, got none; pass them")
    if kind == "grpo_clip":
        return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
    if kind == "grpo_no_clip":
        return policy_loss(policy_log_probs, old_log_probs, advantages, surrogate="ratio")[0], {}
    scale = raw_rewards if kind == "no_baseline" else advantages
    return compute_naive_policy_gradient_loss(scale, policy_log_probs), {}


def sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps,
                              normalize_constant=1.0):
    """(loss, metadata) after loss.backward(): minus the sum of each response's log-probabilities
    / normalize_constant, mean over the batch, / gradient_accumulation_steps. source: [1]"""
    sums = masked_normalize(policy_log_probs, response_mask, normalize_constant, dim=-1)
    loss = -sums.mean() / gradient_accumulation_steps
    loss.backward()
    return loss, {"response_tokens": response_mask.sum()}


def grpo_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps,
                               loss_type, raw_rewards=None, advantages=None, old_log_probs=None,
                               cliprange=None):
    """(loss, metadata) after loss.backward(): the masked mean over each response, mean over the
    batch, / gradient_accumulation_steps. source: [1] grpo_microbatch_train_step"""
    losses, metadata = compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards,
                                                    advantages, old_log_probs, cliprange)
    loss = masked_mean(losses, response_mask, dim=1).mean() / gradient_accumulation_steps
    loss.backward()
    shares = {f"{name}_share": masked_mean(value.float(), response_mask)
              for name, value in metadata.items()}
    return loss, {**metadata, **shares}


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), of log-probabilities
    (B,) of whole responses; ln 2 where policy and reference agree. source: [10] equation 7"""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return torch.logaddexp(torch.zeros_like(margin), -margin)


def compute_per_instance_dpo_loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen,
                                  response_rejected):
    """The DPO loss of one pair, a scalar: prompt and response in the Alpaca template, and the end
    token. source: [1] supplement, dpo_loss"""
    end = list(end_ids(tokenizer)[:1])
    ids = [encode_prompt(tokenizer, ask("alpaca", prompt) + response) + end
           for response in (response_chosen, response_rejected)]

    def log_probs(model):
        rows = [torch.tensor([row], device=device_of(model)) for row in ids]
        return torch.cat([token_log_probs(model, r[:, :-1], r[:, 1:])[0].sum(1) for r in rows])

    policy = log_probs(lm)
    with torch.no_grad():
        reference = log_probs(lm_ref).to(policy.device)
    return dpo_loss(*policy, *reference, beta)


# -------------------------------------------------------------------------------------------------
# rollouts


class AnyModel(nn.Module):
    """A model of others in the form that `lm.generate` takes, without a cache: the oracle's way."""

    def __init__(self, model):
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, device=device_of(model)), requires_grad=False)
        self.model, self.lm_head = model, nn.Identity()
        own = getattr(model, "config", None)
        self.config = SimpleNamespace(
            vocab_size=getattr(own, "vocab_size", sys.maxsize),
            context_length=getattr(own, "max_position_embeddings", sys.maxsize))

    def hidden_states(self, ids, cache=None):
        logits = self.model(ids)
        return getattr(logits, "logits", logits)


def rollout(model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_p=1.0, group_size=1,
            stop=(), seed=0, first_row=0, graphs=None):
    """group_size sampled responses to each prompt, prompt by prompt: a list of dicts with
    prompt_index, prompt_ids, tokens (with the end token, if drawn), logprobs (of tokens, under
    softmax(logits / temperature)), text and finish_reason ("stop" or "length").

    prompts: strings, or lists of ids; stop: strings that end a response, which keeps them
    seed, first_row: row r draws from (seed, first_row + r), whatever the other rows are
    graphs: see lm.generate
    raises ValueError where a prompt leaves no room for max_new_tokens in the model's context
    """
    ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    if not ids:
        return []
    ours = hasattr(model, "hidden_states")
    model = model if ours else AnyModel(model)
    longest, limit = max(map(len, ids)), model.config.context_length
    if longest + max_new_tokens > limit:
        raise ValueError(f"a prompt and max_new_tokens must fit the context of {limit} tokens, got "
                         f"{longest} + {max_new_tokens}; drop long prompts or ask for fewer tokens")
    rows = lm.generate(model, ids, max_new_tokens, temperature, top_p=top_p, num_samples=group_size,
                       stop_ids=end_ids(tokenizer), stop_strings=tuple(stop), tokenizer=tokenizer,
                       seed=seed, use_cache=ours, first_row=first_row, graphs=graphs)
    return [dict(prompt_index=r.prompt_index, prompt_ids=ids[r.prompt_index], tokens=r.tokens,
                 logprobs=r.logprobs, text=r.text, finish_reason=r.finish_reason) for r in rows]


@torch.no_grad()
def log_generations(model, tokenizer, prompts, ground_truths, reward_fn, max_new_tokens=256,
                    temperature=1.0, top_p=1.0, stop=(), seed=0):
    """{"examples": a dict for each prompt (prompt, response, ground_truth, rewards, mean entropy of
    its tokens, length in tokens), "summary": their means, lengths also of the right and the wrong
    (NaN where there is none)}. source: [1] log_generations"""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:  # turns dropout off, in models of others
        module.training = False
    try:
        rows = rollout(model, tokenizer, prompts, max_new_tokens, temperature, top_p, 1, stop, seed)
        batches = [pad_pairs([(row["prompt_ids"], row["tokens"])], device=device_of(model))
                   for row in rows]
        entropies = [token_log_probs(model, *b.values())[1] for b in batches]
    finally:
        for module in training:
            module.training = True
    grades = grade(reward_fn, [r["text"] for r in rows], ground_truths)
    examples = [
        dict(prompt=prompt, response=row["text"], ground_truth=truth, **rewards,
             entropy=masked_mean(entropy, b["response_mask"]).item(), length=len(row["tokens"]))
        for row, prompt, truth, rewards, entropy, b in zip(
            rows, prompts, ground_truths, grades, entropies, batches, strict=True)]
    right, wrong = ([e for e in examples if is_right(e) == kind] for kind in (True, False))
    names = [*(grades[0] if grades else ()), "entropy", "length"]
    means = {name: mean(e[name] for e in examples) for name in names}
    return {"examples": examples, "summary": {
        **means, "length_right": mean(e["length"] for e in right),
        "length_wrong": mean(e["length"] for e in wrong)}}


def mean(values):
    """The arithmetic mean, NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# -------------------------------------------------------------------------------------------------
# a run: what the verbs share


class Run:
    """The state of a run, and what every verb's step does with it."""

    def __init__(self, args):
        self.args, self.started = args, time.perf_counter()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.device, self.out_dir = lm.resolve_device(args.device), Path(args.out_dir)
        self.dtype, reason = lm.resolve_dtype(args.dtype, self.device)
        self.checkpoint = self.out_dir / "checkpoint.pt"
        if reason:
            print(reason)
        lm.check_out_dir(args)
        if args.overwrite and Path(args.model or "/").resolve().is_relative_to(
                self.out_dir.resolve()):
            raise ValueError(f"--overwrite must leave the model to start from, got {args.model} in "
                             f"{self.out_dir}; give another --out_dir")
        self.make_model()
        self.optimizer = lm.AdamW(lm.optimizer_groups(self.model, args.weight_decay), args.lr,
                                  (args.beta1, args.beta2))
        # all that is random comes of the seed and these two counts, so that a run can go on
        self.step = self.position = self.rollouts = 0
        self.saved, self.signals, self.said, self.gaps, self.dry = 0, [], set(), [], 0
        self.sampler, self.log, self.evaluated, self.stop = None, None, -1, args.stop
        self.graphs = {} if self.has_room_for_caches() else None
        args.prepare(self)
        if args.resume:
            self.load()
        print(f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.ranks} x "
              f"{self.device}, {str(self.dtype)[6:]}")

    def make_model(self):
        """The model to train, its tokenizer, and where one is needed a copy that stays."""
        args = self.args
        of_files = [name for name in ("data", "valid_data", "packed", "correct_only", "strict")
                    if getattr(args, name, None)]
        if (args.task and of_files) or not (args.task or args.data):
            got = " and ".join(["task", *of_files]) if of_files else "neither"
            raise ValueError(f"--task or --data must say what to learn from, got {got}; give one "
                             "of them and the flags that go with it")
        self.task = TASKS[args.task](args) if args.task else None
        given = {f: getattr(args, f) for f in asdict(lm.ModelConfig())
                 if getattr(args, f, None) is not None}
        if args.model:
            if set(given) - {"attention", "context_length"} or args.preset:
                raise ValueError("a trained model has its shape, got --model and flags of a shape "
                                 f"({', '.join(given) or 'preset'}); leave those out")
            length = given.pop("context_length", 0)
            self.model, self.tokenizer = load_model(args.model, self.device, torch.float32,
                                                    **given)
            if length > self.model.config.context_length:  # a shorter one is of this run alone
                self.model.config = replace(self.model.config, context_length=length)
                self.model.renew_rope(self.device)
        elif self.task:
            torch.manual_seed(args.seed)
            self.tokenizer = self.task.tokenizer
            config = lm.config_from_flags(args, vocab_size=self.tokenizer.vocab_size)
            self.model = lm.TransformerLM(config).to(self.device)
        else:
            raise ValueError("--model or --task must say what to train, got neither; give one")
        ends, V = self.tokenizer and end_ids(self.tokenizer), self.model.config.vocab_size
        if not ends or ends[0] >= V:
            got = f"id {ends[0]}, for a model of {V} ids" if ends else "none"
            raise ValueError(f"the tokenizer must have a token that ends a text, got {got}; add "
                             "<|endoftext|> to its special tokens, and to the model")
        if self.task and self.tokenizer.sha256 != self.task.tokenizer.sha256:
            raise ValueError(f"--task {args.task} needs a model trained on it, got {args.model}, "
                             f"which has another tokenizer; make one with sft --task {args.task}")
        self.context_length = args.context_length or self.model.config.context_length
        self.model.checkpoint_every = args.checkpoint_every
        self.reference = None
        if args.verb == "dpo" or getattr(args, "kl_coef", 0):
            self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def has_room_for_caches(self):
        """Whether rollouts may keep their graphs, each with its cache, from step to step: where a
        cache is small beside the card. A large model's steps are long, a capture is not."""
        if self.device.type != "cuda":
            return True
        c, rows = self.model.config, self.args.rollout_batch
        numbers = 2 * c.num_layers * c.num_kv_heads * c.d_head * self.context_length * rows
        return numbers * self.dtype.itemsize < torch.cuda.mem_get_info(self.device)[1] / 16

    # ranks: each does its contiguous share of what all of them drew; sums make one result

    def sum(self, values):
        """The sums over all ranks, float64 tensor, of a list of numbers or a tensor."""
        device = self.device if self.device.type == "cuda" else "cpu"
        total = torch.as_tensor(values, dtype=torch.float64, device=device)
        if self.ranks > 1:
            dist.all_reduce(total)
        return total.cpu()

    def share(self, n):
        """The slice of n things that is this rank's."""
        return slice(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks)

    def gather(self, values, n, each=1):
        """The `each` numbers of n things, of which each rank gives those of its share, on all."""
        full, mine = torch.zeros(n, each, dtype=torch.float64), self.share(n)
        full[mine] = torch.as_tensor(values, dtype=torch.float64).view_as(full[mine])
        return self.sum(full.flatten())

    def draw(self, items, n):
        """The next n of `items`, gone through in shuffled passes; the same on all ranks."""
        size, first = len(items), self.position
        self.position += n
        return [items[shuffled(size, self.args.seed, i // size)[i % size]]
                for i in range(first, first + n)]

    def update(self, rows, loss_of, names):
        """One optimizer step on the sum of loss_of(micro-batch) over all rows of all ranks; returns
        {name: sum} of the values that loss_of gives beside the loss, and the gradient's norm.

        loss_of(rows): (scalar loss, values (len(names),) to add up), scaled for the whole update
        """
        args, found = self.args, [torch.zeros(len(names), device=self.device)]
        self.optimizer.zero_grad(set_to_none=True)
        for part in self.micro_batches(rows):
            with lm.compute_context(self.device, self.dtype):
                loss, values = loss_of(part)
            loss.backward()
            found.append(torch.stack([v.detach() for v in values]))
        total = torch.stack(found).cpu().double().sum(0)  # here the host waits, and only here
        params = [p for p in self.model.parameters() if p.requires_grad]
        for p in params if self.ranks > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank without rows
            dist.all_reduce(p.grad)
        norm = lm.clip_grad_norm_(params, args.grad_clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient must be finite, got norm {norm} at step "
                                     f"{self.step + 1}; lower --lr, the last step that is saved is "
                                     f"{self.saved}")
        self.optimizer.step()
        return {**dict(zip(names, self.sum(total).tolist(), strict=True)), "grad_norm": norm}

    def cast_model(self):
        """The model as autocast would compute it, its matrices cast once instead of every token."""
        if self.dtype == torch.float32:
            return self.model
        if self.sampler is None:
            self.sampler = copy.deepcopy(self.model)
            for p in self.sampler.parameters():  # gains and biases stay, as under autocast
                p.data = p.data.to(self.dtype) if p.dim() > 1 else p.data
        for ours, theirs in zip(self.sampler.parameters(), self.model.parameters(), strict=True):
            ours.data.copy_(theirs)
        return self.sampler

    @torch.no_grad()
    def rollout(self, problems, group_size, temperature, top_p=1.0):
        """Graded responses to this rank's share of `problems`, as `rollout` gives them, with the
        keys reward, format_reward, answer_reward and group, the place in problems."""
        args, model = self.args, self.cast_model()
        seed, self.rollouts = (args.seed << 20) + self.rollouts, self.rollouts + 1
        rows, places = [], range(len(problems))[self.share(len(problems))]
        for part in spans(len(places), max(1, args.rollout_batch // group_size)):
            chosen = [problems[i] for i in places[part]]
            with lm.compute_context(self.device, self.dtype):
                rows += rollout(model, self.tokenizer, [p["prompt_ids"] for p in chosen],
                                args.max_new_tokens, temperature, top_p, group_size, self.stop,
                                seed, places[part][0] * group_size, self.graphs)
        for i, row in enumerate(rows):
            row["group"] = places[i // group_size]
        truths = [problems[row["group"]]["answer"] for row in rows]
        for row, found in zip(rows, grade(self.reward_fn, [r["text"] for r in rows], truths),
                              strict=True):
            row.update(found)
        return rows

    @torch.no_grad()
    def score(self, model, rows, name):
        """Puts the log-probabilities of a row's tokens under `model` into row[name], a tensor;
        returns the sum of their entropies."""
        total = 0.0
        for part in self.micro_batches(rows):
            ids, labels, mask = self.collate(part)
            with lm.compute_context(self.device, self.dtype):
                found, entropy = token_log_probs(model, ids, labels, mask, self.args.temperature)
            total += entropy.sum().item()
            of_rows = found[mask].split(mask.sum(1).tolist())
            for row, log_probs in zip(part, of_rows, strict=True):
                row[name] = log_probs
        return total

    def micro_batches(self, rows):
        return micro_batches(rows, self.args.micro_batch_size, self.args.micro_batch_tokens)

    def collate(self, rows):
        """(input ids, labels, response mask), each (B, T)."""
        pairs = [(row["prompt_ids"], row["tokens"]) for row in rows]
        return tuple(pad_pairs(pairs, pad_id(self.tokenizer), self.device).values())

    # files

    def open_log(self):
        """Of rank 0, once there is something to write: a run that fails at once leaves nothing."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if self.args.overwrite:
            lm.clear_run(self.out_dir)
        self.tokenizer.save(self.out_dir / "tokenizer.json")
        first = {"flags": self.flags(), "device": str(self.device), "ranks": self.ranks,
                 "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        return lm.open_log(self.out_dir / "log.jsonl", self.saved, first)

    def flags(self):
        skip = ("model_defaults", "resume", "overwrite", "run", "prepare", "take_step",
                "measure")
        return {name: value for name, value in vars(self.args).items() if name not in skip}

    def record(self, entry):
        if self.rank == 0:
            self.log = self.log or self.open_log()
            entry = {**entry, "elapsed_s": round(time.perf_counter() - self.started, 3)}
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()

    def save(self):
        if self.rank == 0:
            lm.save_checkpoint(
                self.model, self.optimizer, self.step, self.checkpoint, flags=self.flags(),
                config=asdict(self.model.config), position=self.position, rollouts=self.rollouts,
                dry=self.dry, elapsed_s=time.perf_counter() - self.started,
                text_bounds=self.model.text_bounds,
                generation_config=self.model.generation_config)
        self.saved = self.step

    def load(self):
        saved = {}
        with contextlib.suppress(FileNotFoundError):
            saved = lm.read_checkpoint(self.checkpoint)
        steps = self.gather([saved.get("iteration", 0)], self.ranks).int().tolist()
        if len({*steps}) > 1:
            raise ValueError(f"all ranks must see the same {self.checkpoint}, got steps {steps}; "
                             "share --out_dir, or copy it to every host")
        if not saved:
            print(f"no checkpoint in {self.out_dir} yet: starting from the beginning")
            return
        saved["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]  # flags
        lm.restore(saved, self.model, self.optimizer)
        self.step = self.saved = saved["iteration"]
        self.position, self.rollouts, self.dry = (saved[k] for k in ("position", "rollouts", "dry"))
        self.started -= saved["elapsed_s"]
        if self.rank == 0:
            self.log = self.open_log()
            lines = (self.out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
            self.evaluated = max((r["step"] for r in map(json.loads, lines)
                                  if not {"greedy", "held_out_loss"}.isdisjoint(r)), default=-1)
        self.evaluated = int(self.sum([self.evaluated if self.rank == 0 else 0]))
        print(f"resumed {self.checkpoint} at step {self.step}")

    def say_once(self, text):
        if text not in self.said:
            self.said.add(text)
            print(text, flush=True)


def row_length(row):
    return sum(len(row["prompt_ids"]) + len(row[k]) for k in ("tokens", "rejected") if k in row)


def micro_batches(rows, sequences, tokens=0):
    """`rows` by length, in lists of at most so many sequences and, unless 0, so many tokens with
    the padding: rows of like length need little."""
    parts = []
    for row in sorted(rows, key=row_length):
        size = len(parts[-1]) if parts else sequences
        if size == sequences or tokens and (size + 1) * row_length(row) > tokens:
            parts.append([])
        parts[-1].append(row)
    return parts


@functools.lru_cache(maxsize=4)
def shuffled(size, seed, epoch):
    """The order of one pass over `size` things."""
    return np.random.default_rng((seed, epoch)).permutation(size)


LOG_FORMATS = {  # of a step, in the order of the line; what a verb does not give is left out
    "loss": "loss {:.4f}", "reward": "reward {:.3f}", "format_reward": "format {:.3f}",
    "answer_reward": "answer {:.3f}", "kept": "kept {:.0f}", "no_signal": "no signal {:.0%}",
    "truncated": "cut {:.0%}", "length": "len {:.1f}", "length_right": "len right {:.1f}",
    "length_wrong": "len wrong {:.1f}", "entropy": "entropy {:.3f}", "clip_low": "clip- {:.2%}",
    "clip_high": "clip+ {:.2%}", "kl": "kl {:.4f}", "accuracy": "accuracy {:.1%}",
    "margin": "margin {:.3f}", "chosen": "chosen {:.2f}", "rejected": "rejected {:.2f}",
    "gap": "gap {:.1e}", "gap_max": "gap max {:.1e}", "grad_norm": "norm {:.2f}", "lr": "lr {:.1e}",
    "step_ms": "{:.0f} ms", "tokens_per_s": "{:,.0f} tok/s", "rollout_share": "rollout {:.0%}"}

LEGEND = (
    "Lines of steps: format, answer: shares of well-formed and of right responses; no signal: of "
    "groups whose responses all earn the same; cut: of responses that reached --max_new_tokens; "
    "len: tokens of a response, of a right and of a wrong one; clip-, clip+: share of tokens "
    "clipped below and above; gap, gap max: of log-probabilities when sampled and in training; "
    "norm: of the gradient; rollout: share of the time that sampling took.")


def log_line(entry, max_steps):
    shown = [form.format(entry[k]) for k, form in LOG_FORMATS.items() if k in entry]
    return " | ".join([f"step {entry['step']}/{max_steps}", *shown])


# -------------------------------------------------------------------------------------------------
# the steps: supervised, expert iteration, policy gradients, preferences


def sft_loss(run, rows, tokens):
    """(cross entropy of the rows' response tokens / tokens, [it])."""
    ids, labels, mask = run.collate(rows)
    documents = None
    if run.args.packed:  # a document's number is that of the ends before it
        ends = ids == end_ids(run.tokenizer)[0]
        documents = ends.cumsum(1) - ends.long()
    hidden = run.model.hidden_states(ids, documents=documents)
    loss = lm.linear_cross_entropy(hidden, run.model.lm_head.weight,
                                   labels.masked_fill(~mask, -100), reduction="sum") / tokens
    return loss, [loss]


def window_rows(windows):
    """Of items of a PackedSFTDataset what other pairs are: all but a window's first token is
    learnt."""
    return [dict(prompt_ids=window["input_ids"][:1].tolist(), tokens=window["labels"].tolist())
            for window in windows]


def sft_step(run):
    """One update on batch_size pairs: the mean loss over all their response tokens."""
    rows = run.draw(run.examples, run.args.batch_size)
    if run.args.packed:
        rows = window_rows(rows)
    tokens = sum(len(row["tokens"]) for row in rows)
    mine = rows[run.share(len(rows))]
    entry = run.update(mine, functools.partial(sft_loss, run, tokens=tokens), ["loss"])
    return {**entry, "tokens": sum(map(row_length, rows))}


def ei_step(run):
    """Expert iteration: sample, keep what is rewarded, train on it. source: [1] A5 algorithm 2"""
    args, began = run.args, time.perf_counter()
    problems = run.draw(run.problems, args.prompts_per_step)
    rows = run.rollout(problems, args.group_size, args.temperature, args.top_p)
    rollout_s = time.perf_counter() - began
    entropy, tokens = run.sum([run.score(run.model, rows, "log_probs"),
                               sum(len(row["tokens"]) for row in rows)]).tolist()
    good = run.gather([is_right(r) for r in rows], len(problems), args.group_size)
    entry = {**rollout_statistics(run, rows), "kept": int(good.sum()), "entropy": entropy / tokens}
    number = good.cumsum(0) - 1  # of each kept response among all that are kept
    first = run.share(len(problems)).start * args.group_size
    kept = {int(number[first + i]): r for i, r in enumerate(rows) if is_right(r)}
    say_when_dry(run, entry["kept"] == 0, entry)
    updates = []
    for epoch in range(args.epochs):
        order = shuffled(entry["kept"], args.seed, (run.rollouts << 20) + epoch)
        for part in spans(len(order), args.batch_size):
            mine = [kept[i] for i in order[part].tolist() if i in kept]
            tokens = run.sum([sum(len(r["tokens"]) for r in mine)]).item()
            loss_of = functools.partial(sft_loss, run, tokens=tokens)
            updates.append(run.update(mine, loss_of, ["loss"]))
    for name in ("loss", "grad_norm") if updates else ():
        entry[name] = mean(update[name] for update in updates)
    return {**entry, "rollout_share": rollout_s / (time.perf_counter() - began)}


def rollout_statistics(run, rows):
    """What the log says of all sampled responses of a step, on all ranks."""
    G, right = run.args.group_size, [r for r in rows if is_right(r)]
    sums = dict(
        count=len(rows), seen=sum(map(row_length, rows)),
        tokens=sum(len(r["tokens"]) for r in rows), right=len(right),
        right_tokens=sum(len(r["tokens"]) for r in right),
        cut=sum(r["finish_reason"] == "length" for r in rows),
        silent=sum(not any(r.get("advantage", is_right(r)) for r in rows[g])
                   for g in spans(len(rows), G)),
        **{k: sum(r[k] for r in rows) for k in ("reward", "format_reward", "answer_reward")})
    s = SimpleNamespace(**dict(zip(sums, run.sum([*sums.values()]).tolist(), strict=True)))
    entry = dict(tokens=s.seen, reward=s.reward / s.count, format_reward=s.format_reward / s.count,
                 answer_reward=s.answer_reward / s.count, no_signal=s.silent / (s.count / G),
                 truncated=s.cut / s.count, length=s.tokens / s.count)
    if s.right:
        entry["length_right"] = s.right_tokens / s.right
    if s.right < s.count:
        entry["length_wrong"] = (s.tokens - s.right_tokens) / (s.count - s.right)
    return entry


def say_when_dry(run, dry, entry):
    """Says it when many steps on end had nothing to learn from."""
    run.dry = run.dry + 1 if dry else 0
    if run.dry and run.dry % 10 == 0:
        advice = "harder problems" if entry["answer_reward"] > 0.5 else "easier problems, more SFT"
        print(f"no response has taught anything for {run.dry} steps: {entry['answer_reward']:.0%} "
              f"of the last are right, {entry['truncated']:.0%} cut off; try {advice}, or a larger "
              "--group_size", flush=True)


def sample_groups(run):
    """(this rank's responses with their advantages, the log's numbers). With dynamic sampling,
    groups with equal rewards are left out and others sampled in their place, up to that many
    rounds. source: [4] section 3.2"""
    args, n, G = run.args, run.args.prompts_per_step, run.args.group_size
    sampled, kept, found = [], [], 0
    for _ in range(max(1, args.dynamic_sampling)):
        rows = run.rollout(run.draw(run.problems, n), G, args.temperature, args.top_p)
        if run.reference is not None:
            run.score(run.reference, rows, "ref_log_probs")
        rewards = torch.tensor(shaped_rewards(args, rows), dtype=torch.float64)
        advantages = compute_advantages(rewards.view(len(rows) // G, G), args.baseline,
                                        args.normalize_by_std, args.advantage_eps)
        for row, advantage in zip(rows, advantages.flatten().tolist(), strict=True):
            row["advantage"] = advantage
        sampled += rows
        if not args.dynamic_sampling:
            kept = rows
            break
        groups = [{r["reward"] for r in rows[g]} for g in spans(len(rows), G)]
        alive = run.gather([len(group) > 1 for group in groups], n).int().tolist()
        place = [found + so_far - 1 for so_far in itertools.accumulate(alive)]
        for row in rows:
            if alive[row["group"]] and place[row["group"]] < n:
                row["group"] = place[row["group"]]
                kept.append(row)
        found += sum(alive)
        if found >= n:
            break
    return kept, rollout_statistics(run, sampled)


def shaped_rewards(args, rows):
    """The rewards of responses, less what length and distance from the reference cost."""
    rewards = [row["reward"] + overlong_penalty(len(row["tokens"]), args.max_new_tokens,
                                                args.overlong_buffer) for row in rows]
    if args.kl_coef and args.kl_in == "reward" and rows:
        kl = kl_estimate(joined(rows, "logprobs"), joined(rows, "ref_log_probs").cpu(), args.kl)
        of_rows = kl.split([len(row["tokens"]) for row in rows])
        return [r - args.kl_coef * k.sum().item() for r, k in zip(rewards, of_rows, strict=True)]
    return rewards


def joined(rows, name):
    """The values row[name] of all tokens of all rows, lists or tensors, in one tensor."""
    values = [row[name] for row in rows]
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(values), np.float32))


def grpo_step(run):
    """One step of policy gradients: sample groups, turn rewards into advantages, update.
    source: [1] A5 algorithm 3"""
    args, began = run.args, time.perf_counter()
    run.gaps = [torch.zeros((), device=run.device)]
    rows, entry = sample_groups(run)
    rollout_s = time.perf_counter() - began
    if args.epochs * args.updates_per_rollout > 1:  # else the policy is the one that sampled
        run.score(run.model, rows, "old_log_probs")
    if args.overlong == "mask":
        rows = [row for row in rows if row["finish_reason"] == "stop"]
    updates = []
    for update in range(args.epochs * args.updates_per_rollout):
        part = update % args.updates_per_rollout
        mine = [row for row in rows if row["group"] % args.updates_per_rollout == part]
        sequences, tokens = run.sum([len(mine), sum(len(row["tokens"]) for row in mine)]).tolist()
        if sequences:
            loss_of = functools.partial(grpo_loss, run, sequences=sequences, tokens=tokens)
            updates.append(run.update(mine, loss_of, GRPO_VALUES))
    for name in (*GRPO_VALUES, "grad_norm") if updates else ():
        if name != "kl" or run.reference is not None:
            entry[name] = mean(update[name] for update in updates)
    if updates:
        gap = torch.stack(run.gaps).max().item()
        entry["gap_max"] = run.gather([gap], run.ranks).max().item()
        check_gap(run, entry)
    other = args.entropy_coef or (args.kl_coef and args.kl_in == "loss")
    if args.baseline != "none" and args.surrogate in ("ratio", "clip") and not other:
        run.say_once("a loss near zero is normal: advantages have mean zero in a group, and the "
                     "ratio is 1 while the policy is the one that sampled; watch reward and norm")
    else:
        run.say_once("the loss is no measure of progress here: watch reward and norm")
    say_when_dry(run, not run.sum([sum(row["advantage"] != 0 for row in rows)]).item(), entry)
    return {**entry, "rollout_share": rollout_s / (time.perf_counter() - began)}


GRPO_VALUES = ("loss", "entropy", "clip_low", "clip_high", "kl", "gap")


def grpo_loss(run, rows, sequences, tokens):
    """(the rows' part of the loss of an update of that many sequences and tokens, GRPO_VALUES)."""
    args = run.args
    ids, labels, mask = run.collate(rows)

    def stored(name):  # values of the response tokens of each row, where the mask has them
        return put(mask, joined(rows, name).to(run.device))

    log_probs, entropy = token_log_probs(run.model, ids, labels, mask, args.temperature)
    sampled = stored("logprobs")
    old = stored("old_log_probs") if "old_log_probs" in rows[0] else log_probs.detach()
    advantages = torch.tensor([[row["advantage"]] for row in rows], dtype=log_probs.dtype,
                              device=run.device)
    loss, low, high = policy_loss(log_probs, old, advantages, mask, args.surrogate, args.ratio,
                                  args.clip_low, args.clip_high, args.dual_clip)
    if args.importance_cap:  # what sampled and what trains differ by rounding only: truncated
        loss = loss * (old - sampled).exp().clamp(max=args.importance_cap)
    kl = torch.zeros_like(loss)
    if run.reference is not None:
        kl = kl_estimate(log_probs, stored("ref_log_probs"), args.kl)
        if args.kl_in == "loss":
            loss = loss + args.kl_coef * kl
    if args.entropy_coef:
        loss = loss - args.entropy_coef * entropy
    weights = token_weights(mask, args.length_norm, sequences, tokens, args.max_new_tokens)
    loss = (loss * weights).sum()
    gap = (old - sampled).abs()
    run.gaps.append(gap.max().detach())
    shares = [(value * mask).sum() / tokens for value in (entropy, low, high, kl, gap)]
    return loss, [loss, *shares]


def check_gap(run, entry):
    """raises FloatingPointError where sampling and training disagree about log-probabilities: of
    any token in float32, on average in bfloat16, whose rounding may be large at a single one."""
    most = MAX_GAP[run.dtype] if run.args.max_gap is None else run.args.max_gap
    if entry["gap_max" if run.dtype == torch.float32 else "gap"] > most:
        raise FloatingPointError(
            f"log-probabilities when sampled and in training must agree to {most}, got a mean gap "
            f"of {entry['gap']:.2e}, the largest {entry['gap_max']:.2e}, at step {run.step + 1}; "
            "use --dtype float32, or raise --max_gap")


def dpo_losses(run, rows, pairs):
    """(the rows' part of the mean DPO loss over `pairs` pairs, DPO_VALUES)."""
    both = [(r["prompt_ids"], r["tokens"]) for r in rows] + [(r["prompt_ids"], r["rejected"])
                                                             for r in rows]
    batch = pad_pairs(both, pad_id(run.tokenizer), run.device)
    mask = batch.pop("response_mask")

    def log_probs(model):
        return token_log_probs(model, **batch, mask=mask)[0].sum(1).split(len(rows))

    chosen, rejected = log_probs(run.model)
    with torch.no_grad():
        ref_chosen, ref_rejected = log_probs(run.reference)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, run.args.beta).sum() / pairs
    up, down = chosen - ref_chosen, rejected - ref_rejected
    right = (up > down).float() + (up == down) / 2
    values = (right, run.args.beta * (up - down), chosen, rejected, up, down)
    return loss, [loss, *(value.sum() / pairs for value in values)]


DPO_VALUES = ("loss", "accuracy", "margin", "chosen", "rejected", "chosen_change",
              "rejected_change")


def dpo_step(run):
    """One update on batch_size preference pairs. source: [10], [1] supplement"""
    rows = run.draw(run.examples, run.args.batch_size)
    loss_of = functools.partial(dpo_losses, run, pairs=len(rows))
    entry = run.update(rows[run.share(len(rows))], loss_of, DPO_VALUES)
    if max(entry["chosen_change"], entry["rejected_change"]) < -1:
        run.say_once("warning: chosen and rejected responses have both become less likely than "
                     "under the reference: the margin grows while both are unlearned; lower --lr, "
                     "or raise --beta")
    return {**entry, "tokens": sum(map(row_length, rows))}


# -------------------------------------------------------------------------------------------------
# the loop of all of them, and how a model does on what is held out


def train_to_end(run):
    """Trains to max_steps; returns 0, or 128 + the signal that stopped it after a save."""
    args = run.args
    min_lr = args.lr if args.min_lr is None else args.min_lr
    validate(run)  # on resuming too: a kill may have come between saving and this
    while run.step < args.max_steps:
        began = time.perf_counter()
        lr = lm.lr_cosine_schedule(run.step + 1, args.lr, min_lr, args.warmup_steps,
                                   args.max_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        entry = args.take_step(run)
        run.step += 1
        seconds = time.perf_counter() - began
        tokens = entry.pop("tokens")
        entry = {"step": run.step, "lr": lr, **entry, "step_ms": seconds * 1e3,
                 "tokens_per_s": tokens / seconds}
        if run.step % args.log_every == 0 or run.step in (1, args.max_steps):
            print(log_line(entry, args.max_steps), flush=True)
            run.record(entry)
        signal = int(run.sum([max(run.signals, default=0)]))  # of any rank
        if run.step % args.save_every == 0 or run.step == args.max_steps or signal:
            run.save()
        if signal:
            signal = max(run.signals, default=signal)
            print(f"signal {signal}: saved at step {run.step}, --resume goes on")
            return 128 + signal
        validate(run)
    folder, told = run.out_dir / "model", f"wrote {run.out_dir / 'model'}"
    try:
        if run.rank == 0:
            lm.save_pretrained(run.model, run.tokenizer, folder)
    except ValueError as reason:  # some shapes have no Hugging Face class
        told = f"{folder} was not written ({reason})"
    print(f"{told} after {time.perf_counter() - run.started:.0f} s")
    return 0


def validate(run):
    """Where it is due and not yet done, prints and logs how the model does on what is held out."""
    last = run.step == run.args.max_steps
    due = run.step % run.args.eval_every == 0 or last
    if not run.held_out or not due or run.step == run.evaluated:
        return
    found = (lose_held_out if run.args.packed else run.args.measure)(run, last)
    shown = [f"{k} {v:.4f}" if k == "held_out_loss" else f"{k} {v:.1%}" for k, v in found.items()]
    what = "pairs" if run.args.verb == "dpo" else "windows" if run.args.packed else "problems"
    print(f"step {run.step}/{run.args.max_steps} | of {len(run.held_out)} held-out {what} | "
          + " | ".join(shown), flush=True)
    run.record({"step": run.step, **found})


def solve_held_out(run, last):
    """The share of held-out problems that greedy responses solve; at the end, and before the first
    step on rewards, also pass@1 and pass@eval_samples. Where problems are of several kinds, of each
    as well."""
    problems, entry, rollouts = run.held_out, {}, run.rollouts  # leaves the run as it is
    sampled = last or run.step == 0 and run.args.verb in ("ei", "grpo")
    samples, kinds = run.args.eval_samples * sampled, [p.get("kind") for p in problems]
    for name, n, temperature in (("greedy", 1, 0), ("pass", samples, 1.0)):
        if not n:
            continue
        rows = run.rollout(problems, n, temperature)
        right = [sum(is_right(r) for r in rows[g]) for g in spans(len(rows), n)]
        kind_of = [kinds[row["group"]] for row in rows[::n]]
        for k, kind in itertools.product(sorted({1, n}), (None, *sorted({*kinds} - {None}))):
            key = "greedy" if name == "greedy" else f"pass@{k}"
            found = sum(pass_at_k(n, c, k) for c, of in zip(right, kind_of, strict=True)
                        if kind in (None, of))
            among = len(problems) if kind is None else kinds.count(kind)
            entry[key + (f" {kind}" if kind else "")] = run.sum([found]).item() / among
    run.rollouts = rollouts
    return entry


@torch.no_grad()
def lose_held_out(run, last):
    """The loss of the held-out windows of --packed, in nats a token."""
    tokens, total = sum(len(row["tokens"]) for row in run.held_out), 0.0
    for part in run.micro_batches(run.held_out[run.share(len(run.held_out))]):
        with lm.compute_context(run.device, run.dtype):
            total += sft_loss(run, part, tokens)[0].item()
    return {"held_out_loss": run.sum([total]).item()}


@torch.no_grad()
def prefer_held_out(run, last):
    """The DPO loss of the held-out pairs, and the share of them that is preferred rightly."""
    total = torch.zeros(len(DPO_VALUES), dtype=torch.float64)
    for part in run.micro_batches(run.held_out[run.share(len(run.held_out))]):
        with lm.compute_context(run.device, run.dtype):
            _, values = dpo_losses(run, part, len(run.held_out))
        total += torch.stack(values).cpu()
    loss, accuracy, *_ = run.sum(total).tolist()
    return {"held_out_loss": loss, "held_out_accuracy": accuracy}


# -------------------------------------------------------------------------------------------------
# small tasks that a program grades

COUNTDOWN_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
COUNTDOWN_NO = " no "  # behind an attempt that is given up, one token as the tags are
COUNTDOWN_ALPHABET = "0123456789+-*/=() "  # of prompts and traces, beside these
COUNTDOWN_MOST = 99  # of numbers and targets, and of the results that a trace tries
COUNTDOWN_HASTE = 2 / 3  # of traces end with the first attempt
COUNTDOWN_PATIENCE = 16  # steps of the attempts that a trace has at most


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
    if count < 2:
        raise ValueError(f"a countdown problem must have two numbers or more, got {count}; give "
                         "--numbers 3 4")
    rng, found, misses = random.Random(seed), {}, 0
    while len(found) < n and misses < 10_000:  # in a row: then few are left to find
        misses += 1
        numbers = [int(rng.random() * COUNTDOWN_MOST) + 1 for _ in range(count)]
        _, (a, b) = random_steps(numbers, rng, 2)
        op, target = rng.choice(results(a, b))
        key = (*sorted(numbers), target)
        if target <= COUNTDOWN_MOST and key not in found:
            _, (_, solution, _) = join(a, b, op, target)
            found[key] = {"numbers": numbers, "target": target, "solution": solution}
            misses = 0
    if len(found) == n:
        return [*found.values()]
    raise ValueError(f"there must be {n} problems of {count} numbers, got {len(found)}; ask "
                     "for less")


def countdown_prompt(numbers, target):
    return f"{' '.join(map(str, numbers))}={target}<think>"


def countdown_trace(numbers, target, rng):
    """The text behind `countdown_prompt`, of a searcher with little patience: random attempts,
    whose last step makes the target if one can, each but the last given up with "no". The last one
    is right, or the patience is at its end; the answer is its expression all the same. To compare
    two numbers tells a failure, yet answers are often wrong: to go on is what rewards can teach, as
    in searches of both outcomes (Gandhi et al. 2024, Stream of Search, arXiv 2404.03683)."""
    patience = max(2, COUNTDOWN_PATIENCE // (len(numbers) - 1))
    attempts = 1 if rng.random() < COUNTDOWN_HASTE else rng.randint(2, patience)
    failed = {}
    while True:
        steps, (a, b) = random_steps(numbers, rng, 2, COUNTDOWN_MOST)
        ends = results(a, b, COUNTDOWN_MOST) or results(a, b)
        right = [end for end in ends if end[1] == target]
        step, (_, expression, _) = join(a, b, *rng.choice(right or ends))
        attempt, attempts = " ".join([*steps, step]), attempts - 1
        if right or not attempts:
            return f"{''.join(failed)}{attempt}</think> <answer>{expression}</answer>"
        failed[attempt + COUNTDOWN_NO] = None  # each attempt once


def countdown_reward(response, numbers, target):
    """The rewards of a response in r1_zero's format: right when its expression uses each of
    `numbers` once and nothing but + - * / and brackets, and is exactly target."""
    answer, right = r1_zero_answer(response), False
    if answer and len(answer) <= MAX_ANSWER and re.fullmatch(r"[0-9+\-*/() ]+", answer):
        used = sorted(map(int, re.findall("[0-9]+", answer)))
        if used == sorted(numbers) and not re.search(r"[0-9)] *\(|\) *[0-9]|[0-9] +[0-9]", answer):
            right = plain_value(answer) == target
    return rewards_of(answer is not None, right)


@functools.lru_cache(maxsize=1 << 14)  # responses of a group often end alike
def plain_value(expression):
    """The value of an expression of numbers alone, None without one."""
    with contextlib.suppress(Unreadable, Refused, RecursionError):
        return fingerprint(expression)[0]


def results(a, b, most=math.inf):
    """[(operation, value)] on two items, (value, expression, how tightly it binds), the greater one
    first, whose value is an integer of 1 to `most`."""
    a, b = (b[0], a[0]) if a[0] < b[0] else (a[0], b[0])
    found = (("+", a + b), ("*", a * b), ("-", a - b), ("/", 0 if a % b else a // b))
    return [result for result in found if 0 < result[1] <= most]


def join(a, b, op, value):
    """(the step's text, the item) of one of the `results` of two items: each has one step."""
    a, b = (b, a) if a[0] < b[0] else (a, b)
    level = 1 if op in "+-" else 2
    left = a[1] if a[2] >= level else f"({a[1]})"
    right = b[1] if b[2] > level or b[2] == level and op in "+*" else f"({b[1]})"
    return f"{a[0]}{op}{b[0]}={value}", (value, f"{left}{op}{right}", level)


def random_steps(numbers, rng, left, most=math.inf):
    """(steps, items): numbers combined by random operations in random order until `left` remain."""
    items, steps = [(n, str(n), 3) for n in numbers], []
    while len(items) > left:
        a, b = (items.pop(int(rng.random() * len(items))) for _ in range(2))
        step, item = join(a, b, *rng.choice(results(a, b, most) or results(a, b)))
        steps.append(step)
        items.append(item)
    return steps, items


# -------------------------------------------------------------------------------------------------
# what is trained on: tasks that are made here, and files


@dataclass
class Task:
    """A task whose problems are made here: its tokenizer, the reward of (response, answer),
    problems(n), the first n of an endless list of different ones, dicts with prompt and answer, and
    solve(problem, rng), a response to learn from."""

    tokenizer: Tokenizer
    reward_fn: Callable
    problems: Callable
    solve: Callable


def characters(text, special=()):
    """A tokenizer with an id for each character of `text` and each of the special texts."""
    return Tokenizer({i: c.encode() for i, c in enumerate(text)}, [], ["<|endoftext|>", *special])


def addition_task(args):
    def reward(response, answer):  # right digits earn a part of it: there are few right answers
        digits = sum(a == b for a, b in zip(response, answer, strict=False))
        return {"reward": digits / max(len(response), len(answer)),
                "format_reward": float(response.isdecimal()),
                "answer_reward": float(response == answer)}

    def problems(n):
        # always as many are drawn, whatever n is, so that the first ones stay the same; numbers of
        # all digits only: the few shorter ones teach a small model too little of their kind
        drawn = addition_problems(min(10 ** (2 * args.digits), 100_000), args.digits, DATA_SEED)
        return [p for p in drawn if len(p["prompt"]) == 2 * args.digits + 2][:n]

    return Task(characters("0123456789+="), reward, problems, lambda p, rng: p["answer"])


def countdown_task(args):
    def problems(n):
        of_each = -(-n // len(args.numbers))
        made = zip(*(countdown_problems(of_each, k, DATA_SEED) for k in args.numbers), strict=True)
        return [dict(prompt=countdown_prompt(p["numbers"], p["target"]),
                     answer=(p["numbers"], p["target"]),
                     **{"kind": f"of {len(p['numbers'])} numbers"} if len(args.numbers) > 1 else {})
                for ps in made for p in ps][:n]

    return Task(characters(COUNTDOWN_ALPHABET, (*COUNTDOWN_TAGS, COUNTDOWN_NO)),
                lambda response, answer: countdown_reward(response, *answer), problems,
                lambda p, rng: countdown_trace(*p["answer"], rng))


TASKS = {"addition": addition_task, "countdown": countdown_task}
TASK_EXAMPLES = 3000
DATA_SEED = 0  # of tasks: apart from --seed, so that what is held out is so in every run


def encode_asked(run, problem):
    """The ids of a problem's prompt: of a task as it is, of a file in the template."""
    template = "question_only" if run.task else run.args.prompt
    return encode_prompt(run.tokenizer, ask(template, problem["prompt"]))


def check_ids(run, ids):
    """raises ValueError where the tokenizer of a model has more tokens than the model."""
    V = run.model.config.vocab_size
    if (highest := max(ids, default=0)) >= V:
        raise ValueError(f"ids of tokens must lie below the model's {V}, got {highest}; use the "
                         "model's own tokenizer, or drop its added tokens from the data")


def encode_problems(run, problems):
    """Adds prompt_ids; drops, and counts, those that leave no room for a response."""
    limit = run.context_length - run.args.max_new_tokens
    problems = [{**p, "prompt_ids": encode_asked(run, p)} for p in problems]
    return keep_fitting(problems, lambda p: len(p["prompt_ids"]), limit, "prompts")


def encode_pairs(run, pairs):
    """Dicts of prompt_ids, tokens (the response or what is chosen) and rejected where there is it,
    each of these with the end token; drops, and counts, pairs that are too long."""
    end, rows = end_ids(run.tokenizer)[0], []
    for pair in pairs:
        row = {"prompt_ids": encode_asked(run, pair)}
        for name, key in (("tokens", "response"), ("tokens", "chosen"), ("rejected", "rejected")):
            if key in pair:
                row[name] = [*encode_text(run.tokenizer, pair[key]), end]
        rows.append(row)
        check_ids(run, itertools.chain(*row.values()))
    return keep_fitting(rows, lambda r: len(r["prompt_ids"]) - 1
                        + max(len(r["tokens"]), len(r.get("rejected", ()))),
                        run.context_length, "examples")


def keep_fitting(rows, length, limit, what):
    if not rows:
        raise ValueError(f"at least one of the {what} must be left, got none; give others")
    fitting = [row for row in rows if length(row) <= limit]
    if len(fitting) < len(rows):
        print(f"dropped {len(rows) - len(fitting):,} of {len(rows):,} {what}: they are longer than "
              f"{limit} tokens, all that the context allows")
    if not fitting:
        raise ValueError(f"some {what} must fit into {max(limit, 0)} tokens, got none; raise "
                         "--context_length or lower --max_new_tokens")
    return fitting


def task_problems(args, task, extra=0):
    """(held-out problems, solved ones to learn from, `extra` unsolved ones) of a task. Unsolved
    ones begin behind those that the model's own run here has learnt from, or behind --examples.
    The first args.held are never learnt from, neither here nor in the run before."""
    former, path = {}, Path(args.model or "")
    if args.model:  # RUN or RUN/model
        former = lm.saved_flags(path if (path / "checkpoint.pt").exists() else path.parent)
    if any(former.get(k) != getattr(args, k) for k in ("task", "digits")):
        former = {}
    before = former.get("held", former.get("eval_problems", args.eval_problems))
    learnt = before + (former.get("examples") or TASK_EXAMPLES)
    kinds, now = len(former.get("numbers", args.numbers)), len(args.numbers)
    if kinds != now:  # of each kind as many
        before, learnt = before // kinds * now, -(-learnt // kinds) * now
    if extra and former and args.examples is None:
        args.examples = learnt - before
    held = args.held = getattr(args, "held", before)  # on resuming as it was
    if args.eval_problems > held:
        raise ValueError(f"--eval_problems must be at most the {held} that were held out before, "
                         f"got {args.eval_problems}; lower it: others have been learnt from")
    end = held + (args.examples or TASK_EXAMPLES)
    problems, rng = task.problems(end + extra), random.Random(DATA_SEED)
    if len(problems) < end + extra:
        raise ValueError(f"the task must have as many problems as are asked for, got {end + extra} "
                         f"of {len(problems)}; lower --problems, --examples or --eval_problems")
    solved = problems[held:end] if not extra else []
    return (problems[: args.eval_problems], [{**p, "response": task.solve(p, rng)} for p in solved],
            problems[end:])


def prepare_problems(run):
    """Problems to sample responses to, held-out ones, and their reward."""
    args = run.args
    if args.verb == "grpo":  # what it refuses is refused before any work
        compute_advantages(torch.zeros(1, args.group_size), args.baseline, args.normalize_by_std)
        if args.overlong_buffer > args.max_new_tokens:
            raise ValueError("--overlong_buffer must be at most --max_new_tokens, got "
                             f"{args.overlong_buffer} and {args.max_new_tokens}; lower it")
        if 0 < args.dual_clip <= 1:  # it would bound, and so stop, what is on-policy too
            raise ValueError(f"--dual_clip must be above 1, got {args.dual_clip}; 3 is usual, 0 is "
                             "none")
    held_out = []
    if run.task:
        held_out, _, problems = task_problems(args, run.task, args.problems)
    else:
        problems = read_problems(args.data)[: args.examples]
        unreadable = sum(not is_gradable(p["answer"]) for p in problems)
        if unreadable:
            print(f"{unreadable:,} of {len(problems):,} answers cannot be read, and reward nothing")
    run.problems = encode_problems(run, problems)
    hold_out(run, held_out)


def hold_out(run, problems):
    """Sets the reward, and the problems that are evaluated on: these, or those of --valid_data."""
    args = run.args
    if run.task:
        run.reward_fn = run.task.reward_fn
    else:
        reward_fn = r1_zero_reward if args.prompt == "r1_zero" else question_only_reward
        run.reward_fn = functools.partial(reward_fn, strict=args.strict)
        run.stop = (*STOPS.get(args.prompt, ()), *args.stop)
        problems = read_problems(args.valid_data)[: args.eval_problems] if args.valid_data else []
    run.held_out = encode_problems(run, problems) if problems else []


def packed_windows(run, path, shuffle):
    length = run.context_length
    windows = PackedSFTDataset(run.tokenizer, path, length, shuffle, run.args.seed)
    if not len(windows):
        raise ValueError(f"--packed needs more than context_length = {length} tokens, got "
                         f"{len(windows.ids)} of {path}; give more pairs")
    check_ids(run, [windows.ids.max().item()])
    return windows


def prepare_pairs(run):
    """Pairs to learn from, and held-out problems where there are some."""
    args, held_out, run.held_out = run.args, [], []
    if run.task:
        held_out, pairs, _ = task_problems(args, run.task)
    elif args.packed:
        if args.correct_only or args.examples:
            raise ValueError("--packed takes a whole file, got --correct_only or --examples too; "
                             "leave them out")
        run.examples = packed_windows(run, args.data, shuffle=True)
        print(f"{len(run.examples):,} windows of {run.context_length} tokens: one pass is "
              f"{-(-len(run.examples) // args.batch_size):,} steps")
        if args.valid_data:
            windows = packed_windows(run, args.valid_data, shuffle=False)
            run.held_out = window_rows(
                windows[i] for i in range(min(len(windows), args.eval_problems)))
        return
    else:
        pairs = read_pairs(args.data)
        if args.correct_only:
            known = [p for p in pairs if p["ground_truth"] is not None]
            right = [p for p in known if answers_match(p["response"], p["ground_truth"])]
            told = (f"{len(right):,} of {len(pairs):,} examples have a right answer, "
                    f"{len(pairs) - len(known):,} no ground_truth")
            if not right:
                raise ValueError(f"--correct_only needs right answers, got none: {told}; give "
                                 "others, or leave it out")
            print(f"{told}: the right ones are used")
            pairs = right
    run.examples = encode_pairs(run, pairs[: args.examples])
    hold_out(run, held_out)


def prepare_preferences(run):
    """Pairs of a chosen and a rejected response, and held-out ones."""
    args, held_out = run.args, []
    if run.task:
        held_out, pairs, _ = task_problems(args, run.task)
        rng = random.Random(DATA_SEED + 1)
        held_out = [{**p, "response": run.task.solve(p, rng)} for p in held_out]
        pairs, held_out = (
            task_preferences([p for p in solved if is_right(run.task.reward_fn(
                p["response"], p["answer"]))]) for solved in (pairs, held_out))
    else:
        pairs = read_preferences(args.data)
        held_out = read_preferences(args.valid_data) if args.valid_data else []
    run.examples = encode_pairs(run, pairs[: args.examples])
    run.held_out = held_out and encode_pairs(run, held_out[: args.eval_problems])


def task_preferences(pairs):
    """Preferences, of solved problems: the rejected response is that of the next one."""
    return [{**p, "rejected": other["response"]}
            for p, other in zip(pairs, [*pairs[1:], *pairs[:1]], strict=True)
            if p["response"] != other["response"]]


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
        text = response if prompt != "r1_zero" else r1_zero_answer(response, strict) or ""
        said, gold = parse_mmlu_response(example, text), example["answer"]
    elif prompt == "r1_zero":
        return r1_zero_reward(response, example["answer"], strict)
    elif task == "gsm8k" and prompt != "question_only":
        said = parse_gsm8k_response(response)
        gold = parse_gsm8k_response(final_answer(example["answer"]))
        said, gold = (None if x is None else Fraction(x) for x in (said, gold))
    else:
        return question_only_reward(response, example["answer"], strict)
    return rewards_of(said is not None, said is not None and said == gold)


def generate_responses(model, tokenizer, prompts, max_new_tokens, temperature=0.0, top_p=1.0,
                       num_samples=1, stop=(), seed=0):
    """num_samples responses to each prompt, lists of dicts with text and finish_reason. A prompt
    that leaves no room in the context gets "", for the reason "too long"."""
    room = model.config.context_length - max_new_tokens
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    fits = [len(prompt) <= room for prompt in ids]
    rows = iter(rollout(model, tokenizer, list(itertools.compress(ids, fits)), max_new_tokens,
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
    names = ("generations*.jsonl", "results.json", "alpaca_eval.json", "sst.jsonl")
    outputs = [*itertools.chain(*map(folder.glob, names))]
    if any(file.samefile(args.data) for file in outputs):
        raise ValueError(f"--data must be no file that eval writes, got {args.data}; give another "
                         "--out_dir")
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
    for file in outputs if not (rank or args.resume) else ():
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
    firsts = range(0, len(examples), args.batch_size)
    batches = [(first, *s) for s in samplings for first in firsts]  # some of both for every rank
    stop = (*STOPS.get(args.prompt, ()), *args.stop)
    for first, samples, temperature in batches[rank::ranks]:
        batch = range(first, min(first + args.batch_size, len(examples)))
        keys = [(index, sample) for index in batch for sample in samples]
        if done.keys() >= {*keys}:
            continue
        groups = generate_responses(
            model, tokenizer, [examples[i]["prompt"] for i in batch], args.max_new_tokens,
            temperature, args.top_p, len(samples), stop, args.seed * 10**9 + first)
        for (index, sample), row in zip(keys, itertools.chain(*groups), strict=True):
            if (index, sample) not in done:
                e = examples[index]
                rewards = grade_response(args.task, args.prompt, e, row["text"], args.strict)
                record = {"index": index, "sample": sample, "prompt": e["prompt"],
                          "response": row["text"], "finish_reason": row["finish_reason"],
                          "ground_truth": e.get("answer"), **rewards}
                file.write(json.dumps(record) + "\n")
                new += 1
        file.flush()
        rate = new / (time.perf_counter() - began)
        kind = f"{len(samples)} samples each" if temperature else "greedy"
        print(f"{batch.stop}/{len(examples)} examples, {kind} | {rate:.2f} responses/s", flush=True)


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
    model, tokenizer = load_model(args.model, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.model} must have a tokenizer.json beside it, got none; copy it "
                         "there")
    if args.max_new_tokens >= model.config.context_length:
        raise ValueError(f"--max_new_tokens must leave room for a prompt in the model's context of "
                         f"{model.config.context_length} tokens, got {args.max_new_tokens}; lower "
                         "it")
    if not end_ids(tokenizer):
        print("the tokenizer has no end token: only --stop and --max_new_tokens end a response")
    done, file = open_generations(args, rank, barrier)
    asked = [(e["prompt"], e.get("answer")) for e in examples]
    changed = [i for (i, _), r in done.items()
               if i >= len(asked) or (r["prompt"], r["ground_truth"]) != asked[i]]
    if changed:
        raise ValueError(f"--resume needs the examples of the evaluation in {args.out_dir}, got "
                         f"another one in place {min(changed) + 1}; give the same --data, or "
                         "--overwrite")
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
    outputs = [r["response"].strip() for r in greedy]
    if args.prompt == "system":  # whose replies stand between backticks; others may end in code
        outputs = [o.split("# Query:")[0].strip().removesuffix("```").strip() for o in outputs]
    if args.task == "alpaca_eval":
        lm.write_json([{"instruction": e["instruction"], "output": output, "generator": args.model,
                        "dataset": e.get("dataset")}
                       for e, output in zip(examples, outputs, strict=True)],
                      folder / "alpaca_eval.json")
    if args.task == "sst":
        lines = [json.dumps({"prompts_final": e["prompts_final"], "output": output}) + "\n"
                 for e, output in zip(examples, outputs, strict=True)]
        with lm.atomic_write(folder / "sst.jsonl") as file:
            file.write("".join(lines).encode())
    lm.write_json(result, folder / "results.json")
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


# -------------------------------------------------------------------------------------------------
# verbs


def train(args):
    """Any of sft, ei, grpo and dpo."""
    if (args.min_lr or 0) > args.lr:
        raise ValueError(f"--min_lr must be at most --lr, got {args.min_lr} and {args.lr}; lower "
                         "it")
    run, plain = Run(args), vars(parse([args.verb]))
    unused = [f"--{name}" for name in dict.fromkeys(unused_flags(args))
              if name in plain and getattr(args, name) != plain[name]]
    if unused:
        print(f"not used in this run: {', '.join(unused)}")
    with lm.stop_politely(run.signals):
        return train_to_end(run)


def unused_flags(args):
    """The names of flags that have no say in this run: what is ignored is told."""
    evaluation, losses = ["eval_problems", "eval_samples", "eval_every"], []
    if args.verb == "grpo":
        losses = [*["kl", "kl_in"] * (not args.kl_coef),
                  *["advantage_eps"] * (not args.normalize_by_std),
                  *["dual_clip", "clip_low"] * (args.surrogate != "clip"),
                  *["clip_high"] * (args.surrogate in ("reinforce", "ratio")),
                  *["ratio"] * (args.surrogate == "reinforce")]
    sampling = ["max_new_tokens", "stop", "rollout_batch", "eval_samples", "strict"]
    if args.task:
        others = {"addition": ["numbers"], "countdown": ["digits"]}[args.task]
        return [*losses, "prompt", *others, *sampling * (args.verb == "dpo")]
    names = [*losses, "digits", "numbers", "problems", *["prompt"] * args.packed]
    if not args.valid_data:
        names += evaluation
    samples = args.verb in ("ei", "grpo") or (
        args.verb == "sft" and args.valid_data and not args.packed)
    return names if samples else [*names, *sampling]


PANELS = (  # of a plot, those that have data: label, x, the first of these that a run logs
    ("reward or loss", "step", ("reward", "loss")),
    ("held-out data, share right", "step", ("greedy", "held_out_accuracy")),
    ("held-out data, share right", "elapsed_s", ("greedy", "held_out_accuracy")),
    ("held-out data, loss", "step", ("held_out_loss",)),
    ("entropy, nats a token", "step", ("entropy",)),
    ("length of responses, tokens", "step", ("length",)),
    ("norm of the gradient", "step", ("grad_norm",)))


def plot(logs, out):
    """Draws the PANELS of each log.jsonl into the picture `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib, got none; pip install matplotlib") from None
    runs, panels = [], {}
    for path in map(Path, logs):
        try:
            records = [*map(json.loads, path.read_text(encoding="utf-8").splitlines())]
            records = [r for r in records if "step" in r and "elapsed_s" in r]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must be a run's log.jsonl, got: {error}; give another "
                             "file") from None
        runs.append((path.parent.name, records))
        if not any(key in r for key in ("reward", "loss") for r in records):
            raise ValueError(f"{path} must hold steps to draw, got none; give another log")
    for number, (run, records) in enumerate(runs):
        for label, x, keys in PANELS:
            key = next((k for k in keys if any(k in r for r in records)), None)
            points = [(r[x], r[key]) for r in records if key in r]
            if points:
                curve = (run if len(keys) == 1 else f"{run} {key}", f"C{number}", points)
                panels.setdefault((label, x), []).append(curve)
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for place, ((label, x), curves) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place)
        for name, color, points in curves:
            axis.plot(*zip(*points, strict=True), ".-", color=color, label=name)
        axis.set(xlabel="step" if x == "step" else "seconds", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


def share(text):
    """An argparse type: a number above 0, up to 1."""
    value = lm.positive(float)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}; change it")
    return value


def some_text(text):
    """An argparse type: what is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty; give some text or leave it out")
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, without the usage of so many flags
        self.exit(2, f"rl.py: error: {message}; see {self.prog} --help\n")


# types of flags
at_least_1, whole = lm.positive(int), lm.positive(int, zero=True)
above_0, from_0 = lm.positive(float), lm.positive(float, zero=True)

DEVICE = dict(device=(str, "auto", "auto, cpu, cuda, cuda:1, mps"),
              dtype=(("auto", "float32", "bfloat16"), "auto", "to compute in"))


def add_flags(parser, title, **flags):
    """Adds flags, name=(type or choices, default, meaning), as a group, which is returned."""
    group = parser.add_argument_group(title)
    for name, (kind, default, meaning) in flags.items():
        if kind is bool:
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default,
                               help=meaning)
            continue
        options = {"type": kind} if callable(kind) else {"choices": tuple(kind)}
        if kind not in (str, some_text) and callable(kind):
            options["metavar"] = "N" if kind in (at_least_1, whole) else "X"
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", default=default, help=meaning + shown, **options)
    return group


def add_run_flags(parser):
    """The flags of every verb that trains."""
    group = add_flags(
        parser, "model and data",
        model=(str, None, "a Hugging Face folder, or what a script here left (default: a new one)"),
        task=(TASKS, None, "learn from problems made here, instead of --data"),
        data=(str, None, "JSONL, JSON or csv of what the verb learns from"),
        valid_data=(str, None, "problems to evaluate on; of dpo, of sft --packed: pairs"),
        prompt=(PROMPTS, "question_only", "the template of the questions in both: answers "
                "are wanted in <answer> with r1_zero, in a box with the others"),
        strict=(bool, False, "want the handout's exact spacing of tags"),
        examples=(at_least_1, None, "the first ones of --data (default: all), or solved ones of "
                  f"--task (default: {TASK_EXAMPLES})"),
        digits=(at_least_1, 3, "of the numbers of --task addition"))
    group.add_argument("--numbers", type=at_least_1, nargs="+", default=[3, 4], metavar="N",
                       help="in a problem of --task countdown: as many of each (default: 3 4)")
    add_flags(parser, "evaluation on held-out problems",
              eval_every=(at_least_1, 50, "steps from one to the next"),
              eval_problems=(whole, 500, "at most"),
              eval_samples=(whole, 8, "responses to each at the end, for pass@k"))
    group = add_flags(
        parser, "sampling and memory", max_new_tokens=(at_least_1, 256, "of a response"),
        rollout_batch=(at_least_1, 512, "responses sampled at a time"),
        micro_batch_size=(at_least_1, 64, "sequences in a backward pass"),
        micro_batch_tokens=(whole, 0, "most tokens in it, with padding; 0: any"))
    group.add_argument("--stop", action="append", type=some_text, default=[],
                       help="text that ends a response, beside the end token and the prompt's own")
    group.add_argument("--checkpoint_every", type=at_least_1, nargs="*", default=[], metavar="K",
                       help="keep only the input of groups of K blocks")
    beta = lm.positive(float, zero=True, below=1)
    add_flags(parser, "optimizer", max_steps=(at_least_1, 200, "updates, or steps of rollouts"),
              lr=(above_0, 1e-5, "highest learning rate"),
              min_lr=(from_0, None, "of a cosine at its end (default: --lr, no decay)"),
              warmup_steps=(whole, 0, "in which the rate rises from 0"),
              weight_decay=(from_0, 0.0, "of matrices"), beta1=(beta, 0.9, "of AdamW"),
              beta2=(beta, 0.95, "of AdamW"),
              grad_clip=(above_0, 1.0, "largest norm of the gradient"))
    group = add_flags(
        parser, "files and device", out_dir=(str, "out_rl", "of log, checkpoint and model"),
        save_every=(at_least_1, 50, "steps from one checkpoint to the next"),
        log_every=(at_least_1, 1, "steps from one line to the next"),
        seed=(whole, 0, "of weights, order and samples"), **DEVICE)
    held = group.add_mutually_exclusive_group().add_argument
    held("--resume", action="store_true", help="go on with the run in --out_dir, same flags")
    held("--overwrite", action="store_true", help="start anew in an --out_dir that holds a run")
    lm.add_model_flags(parser, **TASK_MODEL)
    parser.set_defaults(run=train, temperature=1.0, packed=False)


# The demonstration: flags that both stages share, those of SFT, of its continuation, and of GRPO.
DEMO = ("--task addition --digits 2 --examples 750 --max_new_tokens 4 --eval_problems 1000 "
        "--save_every 1000 --log_every 25")
DEMO_STAGES = {"sft": "a model from scratch learns from a few solved additions",
               "control": "it goes on with the same ones, in the background, meanwhile:",
               "grpo": "it practises on unsolved additions, for rewards"}
DEMO_SFT = "--max_steps 800 --lr 2e-3 --warmup_steps 50 --eval_every 200"
DEMO_CONTROL = "--max_steps 1000000 --lr 1e-3 --eval_every 200"
DEMO_GRPO = ("--max_steps 600 --lr 1e-3 --min_lr 1e-4 --warmup_steps 10 --prompts_per_step 128 "
             "--temperature 1.2 --dynamic_sampling 1 --problems 6000 --eval_every 25 "
             "--rollout_batch 1024 --micro_batch_size 512")


def demo(args):
    """SFT on a few solved additions; then GRPO on unsolved ones and, beside it, more SFT."""
    out = Path(args.out_dir)
    logs = [out / name / "log.jsonl" for name in DEMO_STAGES]
    if any(log.exists() for log in logs) and not args.overwrite:
        raise ValueError(f"out_dir must be a new folder, got {out}, which holds a demonstration; "
                         "give --overwrite to start anew, or another --out_dir")
    torch.set_num_threads(1)  # the tensors are small, and the control has the other core

    def command(verb, name, flags, *start):
        folder = ["--out_dir", str(out / name), *["--overwrite"] * args.overwrite]
        words = [verb, *DEMO.split(), "--seed", str(args.seed), *flags.split(), *start, *folder]
        print(f"\n# {DEMO_STAGES[name]}\npython rl.py {' '.join(words)}", flush=True)
        return words

    if code := main(command("sft", "sft", DEMO_SFT)):
        return code
    start = "--model", str(out / "sft" / "model")
    words = command("sft", "control", DEMO_CONTROL, *start)
    control = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        if code := main(command("grpo", "grpo", DEMO_GRPO, *start)):
            return code
        while control.poll() is None and not (logs[1].exists() and "greedy" in logs[1].read_text()):
            time.sleep(0.1)
    finally:
        control.terminate()
        control.wait()
    print("\nheld-out problems solved, and seconds of the stage")
    for log in logs:
        records = [json.loads(line) for line in log.read_text().splitlines()]
        last = [r for r in records if "greedy" in r][-1]
        shown = [f"{k} {v:.1%}" for k, v in last.items() if k in ("greedy", "pass@1", "pass@8")]
        print(" | ".join([f"{log.parent.name:8}", *shown, f"{last['elapsed_s']:.0f} s"]))
    try:
        plot(logs, out / "curves.png")
    except ValueError as reason:
        print(reason)
    return 0


# A model of a size that a laptop trains in minutes.
TASK_MODEL = dict(context_length=16, d_model=128, num_layers=2, num_heads=4, d_ff=512)


def bench(args):
    """Rollouts of random weights, groups against the same prompts prefilled one by one, and the
    gradient of log-probabilities, in chunks against all logits at once: tokens a second, memory."""
    device = lm.resolve_device(args.device)
    dtype, _ = lm.resolve_dtype(args.dtype, device)
    torch.manual_seed(0)
    model = lm.TransformerLM(lm.config_from_flags(args)).to(device=device, dtype=dtype)
    V, G, new = model.config.vocab_size, args.group_size, args.new_tokens
    prompts = torch.randint(V, (args.prompts, args.prompt_tokens)).tolist()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {str(dtype)[6:]}, {device}, "
          f"{args.prompts} prompts of {args.prompt_tokens} tokens, {G} responses of {new}")
    rows = lm.generate(model, prompts, new, num_samples=G)[: args.micro_batch_size]
    ids, labels, mask = pad_pairs([(prompts[r.prompt_index], r.tokens) for r in rows],
                                  device=device).values()
    chunked, plain = (lambda m=m: token_log_probs(m, ids, labels, mask)[0][mask]
                      for m in (model, model.forward))
    with torch.no_grad():
        gap = (torch.tensor([r.logprobs for r in rows], device=device).flatten() - chunked()).abs()
        result = {"gap": gap.mean().item(), "error": (plain() - chunked()).abs().max().item()}
    if result["gap"] > MAX_GAP[dtype]:
        raise ValueError(f"rollout and training must agree to {MAX_GAP[dtype]}, got a mean gap of "
                         f"{result['gap']:.1e}; do not trust this machine")
    many, few = args.prompts * G * new, len(rows) * new
    for name, tokens, call in (
        ("rollout", many, lambda: lm.generate(model, prompts, new, num_samples=G)),
        ("rollout_repeated", many, lambda: lm.generate(
            model, [p for p in prompts for _ in range(G)], new)),
        ("log_probs", few, lambda: chunked().sum().backward()),
        ("log_probs_plain", few, lambda: plain().sum().backward()),
    ):
        rates, memory = [], ""
        for _ in range(args.repeats + 1):  # the first one warms up
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = lm.time_mark(device)
            call()
            rates.append(tokens / lm.seconds_between(start, lm.time_mark(device)))
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
                memory = f", {peak / 2**30:.2f} GiB more memory"
        rates = rates[1:]
        rate = result[f"{name}_tok_per_s"] = round(statistics.median(rates), 1)
        print(f"{name:16} {rate:12,.0f} tok/s, {min(rates):,.0f} to {max(rates):,.0f}{memory}")
    print(json.dumps(result))


def add_bench_flags(parser):
    add_flags(parser, "what to time", prompts=(at_least_1, 8, "prefilled once for their group"),
              group_size=(at_least_1, 8, "responses to a prompt"),
              prompt_tokens=(at_least_1, 32, "of a prompt"),
              new_tokens=(at_least_1, 64, "of a response"),
              micro_batch_size=(at_least_1, 16, "responses in a backward pass"),
              repeats=(at_least_1, 5, "after one that warms up"), **DEVICE)
    lm.add_model_flags(parser, vocab_size=4096, context_length=256, d_model=256, num_layers=4,
                       num_heads=4)
    parser.set_defaults(run=bench)


def add_eval_flags(parser):
    needed = parser.add_argument_group("what to evaluate").add_argument
    needed("--task", required=True, choices=("math", "gsm8k", "mmlu", "alpaca_eval", "sst"))
    needed("--data", required=True, help="JSONL, JSON or csv; mmlu: or a folder of csv files")
    needed("--model", required=True, help="a Hugging Face folder, a checkpoint or its folder")
    group = add_flags(
        parser, "responses", prompt=(PROMPTS, "r1_zero", "the template of the questions"),
        strict=(bool, False, "want the handout's exact spacing of tags"),
        num_examples=(whole, 0, "the first ones; 0: all"),
        num_samples=(whole, 0, "responses to sample beside the greedy one"),
        temperature=(above_0, 1.0, "of the samples"), top_p=(share, 1.0, "of the samples"),
        max_new_tokens=(at_least_1, 1024, "of a response"),
        batch_size=(at_least_1, 32, "prompts at a time"), seed=(whole, 0, "of the samples"))
    group.add_argument("--pass_at", type=at_least_1, nargs="*", default=[], metavar="K",
                       help="the chances that K of the samples hold a right one")
    group.add_argument("--stop", action="append", type=some_text, default=[],
                       help="text that ends a response, beside the prompt's own")
    add_flags(parser, "files and device", out_dir=(str, "out_eval", "of generations and results"),
              resume=(bool, False, "go on where an evaluation was killed"),
              overwrite=(bool, False, "start anew in an --out_dir that holds one"), **DEVICE)
    parser.set_defaults(run=evaluate)


def add_rollout_flags(parser):
    add_flags(parser, "rollouts", prompts_per_step=(at_least_1, 32, "problems"),
              group_size=(at_least_1, 8, "responses to each"),
              epochs=(at_least_1, 1, "passes over the responses of a step"),
              temperature=(above_0, 1.0, "in sampling and in training"),
              top_p=(share, 1.0, "sample from the likeliest tokens of this mass"),
              problems=(at_least_1, 20_000, "unsolved ones of --task"))


def add_grpo_flags(parser):
    gaps = ", ".join(f"{gap} in {str(dtype)[6:]}" for dtype, gap in MAX_GAP.items())
    add_flags(
        parser, "policy gradient",
        algorithm=(ALGORITHMS, None, "a published set of the flags below; those given go first"),
        baseline=(("none", "mean", "leave_one_out"), "mean", "what rewards are measured against"),
        normalize_by_std=(bool, False, "divide advantages by the group's std"),
        advantage_eps=(above_0, 1e-6, "beside the group's std"),
        surrogate=(("reinforce", "ratio", "clip", "cispo"), "clip", "what is maximised"),
        ratio=(("token", "sequence"), "token", "of probabilities now and when sampled, of what"),
        clip_low=(share, 0.2, "ratios below 1 - this are clipped"),
        clip_high=(above_0, 0.2, "ratios above 1 + this are clipped"),
        dual_clip=(from_0, 0.0, "bound of the loss where the advantage is negative; 0: off; 3 is "
                   "usual"),
        length_norm=(("response", "tokens", "constant"), "tokens", "mean over each response's "
                     "tokens, over all, or sum / --max_new_tokens"),
        kl_coef=(from_0, 0.0, "of the KL to the model at the start; 0: off"),
        kl=(("k1", "k2", "k3"), "k3", "its estimator"),
        kl_in=(("loss", "reward"), "loss", "where it counts"),
        entropy_coef=(from_0, 0.0, "of a bonus for entropy"),
        dynamic_sampling=(whole, 0, "sample up to so many times for groups with a signal; 0: off"),
        overlong=(("keep", "mask"), "keep", "responses that were cut off"),
        overlong_buffer=(whole, 0, "last tokens of --max_new_tokens that cost reward; 0: off"),
        updates_per_rollout=(at_least_1, 1, "parts that a step's responses are cut into"),
        importance_cap=(from_0, 0.0, "of weights against the gap between sampling and training; "
                        "0: off"),
        max_gap=(from_0, None, "stop beyond this gap, of any token in float32, else the mean "
                 f"(default: {gaps})"))


def build_parser():
    parser = Parser(prog="rl.py", description=__doc__.splitlines()[0], epilog="Without a verb: the "
                    "demonstration, which is demo. VERB --help tells a verb's flags.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add_verb(name, text, **options):
        return verbs.add_parser(name, help=text, description=text, **options)

    def training_verb(name, text, measure=solve_held_out, **defaults):
        usage = f"rl.py {name} (--task TASK | --data FILE) [--model MODEL] [flags]"
        p = add_verb(name, text, usage=usage, epilog=LEGEND)
        p.set_defaults(measure=measure, **defaults)
        return p

    p = training_verb("sft", "learn from prompt and response pairs", prepare=prepare_pairs,
                      take_step=sft_step)
    add_flags(p, "sft", batch_size=(at_least_1, 64, "pairs an update"),
              packed=(bool, False, "instruction pairs in the Alpaca template, end to end in "
                      "windows of context_length; they do not see each other"),
              correct_only=(bool, False, "only pairs whose response has the ground_truth"))
    p = training_verb("ei", "expert iteration: sample, keep the rewarded, learn from them",
                      prepare=prepare_problems, take_step=ei_step)
    add_rollout_flags(p)
    add_flags(p, "ei", batch_size=(at_least_1, 64, "responses an update"))
    p = training_verb("grpo", "policy gradients from groups of responses",
                      prepare=prepare_problems, take_step=grpo_step)
    add_rollout_flags(p)
    add_grpo_flags(p)
    p = training_verb("dpo", "learn from pairs of a chosen and a rejected response",
                      prepare=prepare_preferences, take_step=dpo_step, measure=prefer_held_out)
    add_flags(p, "dpo", batch_size=(at_least_1, 32, "pairs an update"),
              beta=(above_0, 0.1, "how much a margin counts"))
    for p in verbs.choices.values():
        add_run_flags(p)
    add_eval_flags(add_verb("eval", "zero-shot accuracy, pass@k, outputs for graders"))
    add_bench_flags(add_verb("bench", "speed of rollouts, memory of log-probabilities"))
    p = add_verb("plot", "learning curves of runs, as a picture")
    p.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl files")
    add_flags(p, "result", out=(str, "curves.png", "the picture"))
    p.set_defaults(run=lambda args: plot(args.logs, args.out))
    p = add_verb("demo", "SFT, GRPO and a control on additions; some minutes on a CPU")
    add_flags(p, "run", seed=(whole, 0, "of weights, order and samples"),
              out_dir=(str, "out_rl", "of the three runs"),
              overwrite=(bool, False, "start anew in an --out_dir that holds them"))
    p.set_defaults(run=demo)
    return parser, verbs.choices


def parse(argv):
    """The flags in argv, over those of --algorithm and of the run that --resume goes on with."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["demo", *argv]
    parser, verbs = build_parser()
    args = parser.parse_args(argv)
    algorithm = getattr(args, "algorithm", None)
    if getattr(args, "take_step", None) and args.resume:
        saved = lm.saved_flags(args.out_dir)
        if saved and saved.get("verb") != args.verb:
            raise ValueError(f"--resume must go on with the same verb, got {args.verb} for a run "
                             f"of {saved.get('verb', 'train.py')}; give another --out_dir")
        former = saved.get("algorithm")
        if algorithm and algorithm != former:  # another one begins from the plain flags
            saved = {k: v for k, v in saved.items() if k not in ALGORITHMS.get(former, ())}
        verbs[args.verb].set_defaults(**{**saved, "out_dir": args.out_dir})
        algorithm = None if algorithm == former else algorithm
    if algorithm:
        verbs[args.verb].set_defaults(**ALGORITHMS[algorithm])
    return parser.parse_args(argv)


def start_ranks(device):
    """Joins the processes of torchrun, once; returns this one's device."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or dist.is_initialized():
        return device
    kind = lm.resolve_device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # optimizers do; imported later it would hold on to the group, whose threads Python may abort
    from torch import _dynamo  # noqa: F401

    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def main(argv=None):
    lm.print_any_text()
    joined = not dist.is_initialized()  # here, not by whoever calls this
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK") or 0):  # rank 0 speaks for all
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            args = parse(sys.argv[1:] if argv is None else argv)
            if hasattr(args, "device"):
                args.device = start_ranks(args.device)
            return args.run(args)
        except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            return fail(lm.first_line(error), 2)
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        finally:
            if joined and dist.is_initialized():
                dist.destroy_process_group()


def fail(message, code):
    """Tells the error in one line and exits."""
    if dist.is_initialized() and dist.get_rank():
        time.sleep(2)  # rank 0 may have the same to tell, and torchrun then ends this one
    print(f"rl.py: error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main())
