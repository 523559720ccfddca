"""rl.py: grading, data, evaluation and the small tasks; no real model, no network."""

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import model as lm
import rl
import rl_part as part
from bpe import Tokenizer

pytestmark = pytest.mark.usefixtures("same_random_numbers_in_every_order_of_tests", "one_thread")
ROOT = Path(__file__).resolve().parent.parent
RIGHT, WRONG, UNFORMATTED = (
    dict(reward=right, format_reward=form, answer_reward=right) for right, form in ((1, 1), (0, 1), (0, 0)))

# -------------------------------------------------------------------------------------------------
# grading

SAME = [
    ("5", "5"), ("5", "5.0"), ("1/2", "0.5"), (r"\frac12", "0.5"), (r"\frac{1}{2}", r"$\frac{1}{2}$"),
    (r"\dfrac{3}{4}", ".75"), (r"-\frac{3}{4}", r"\frac{-3}{4}"), ("7,425,000", "7425000"), ("1 000", "1000"),
    ("1000,99", "1000.99"), ("1,22", "1.22"), ("$1,000.99", "1000.99"), (r"10\%", "10"), ("10%", "0.1"),
    (r"10\%", r"10\%"), (r"10\text{ units}", "10"), (r"10\text{ cm}^2", "10"),
    (r"10 \text{ cm}^2", r"10\text{ square cm}"), (r"45^\circ", "45"), (r"45^{\circ}", "45 degrees"), (r"\$10", "10"),
    ("10 dollars", "$10"), ("5 million", "5000000"), ("$2.5 million", "2,500,000"), ("7 3/4", "7.75"),
    (r"7\frac34", "31/4"), (r"-7\frac{3}{4}", "-7.75"), (r"\frac1{72}", "1/72"), (r"\sqrt3", r"\sqrt{3}"),
    (r"\sqrt{12}", r"2\sqrt3"), (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"), ("(1,2)", "( 1, 2 )"),
    (r"\left(1,2\right)", "(1,2)"), ("[1,2)", "[1, 2)"), (r"\{1,2\}", "{2,1}"), ("1,2", "2, 1"), ("1 and 2", "1,2"),
    ("x=5", "5"), ("5", "x=5"), ("x=1 or x=2", "1,2"), (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"), (r"\pm 3", "3,-3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\text{Evelyn}", "evelyn"),
    ("(C)", "C"), (r"\text{(C)}", "C"), ("C. 12", "C"), ("(x+1)^2", "x^2+2x+1"), ("2x+4y+z-19=0", "z=19-2x-4y"),
    ("y=2x+3", "2x+3"), ("f(x)=2x+3", "2x+3"), (r"x \in [1,2]", "[1,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"), ("3+4i", "4i+3"), (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"), (r"\sin\frac{\pi}{6}", "1/2"), (r"\binom{5}{2}", "10"), ("5!", "120"),
    (r"0.\overline{3}", "1/3"), ("1101_2", "1101_{2}"), ("2^{2013}", "2^{2013}"), (r"1.5\times10^3", "1500"),
    ("1.5e3", "1500"), ("sqrt(2)/2", r"\frac{\sqrt2}{2}"), ("2*x**2", "2x^2"), ("√2", r"\sqrt2"), ("2π", r"2\pi"),
    (r"\boxed{5}", "5"), ("The answer is $x=5$. I hope it is correct.", "5"),
    (r"So the final answer is \boxed{\frac{1}{2}}.", "0.5"), ("Thus #### 42", "42"), ("2+3=5", "5"),
    (r"\frac{x}{2}", "0.5x"), (r"10,\!000", "10000"), ("1{,}000", "1000"), ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\text{June 20}", "June 20"), ("12:00", "12:00"), ("3:4", "3 : 4"), (r"\mathbb{R}", r"\mathbb R"),
    ("a_1+a_2", "a_2+a_{1}"), (r"\frac{1}{x-1}-\frac{1}{x+1}", r"\frac{2}{x^2-1}"), (r"(-\infty,5)", "x<5"),
    (r"\overline{AB}", r"\overline{AB}"), (r"\lfloor 3.7\rfloor", "3"), ("|-3|", "3"), (r"\sqrt[3]{-8}", "-2"),
    ("27^{1/3}", "3"), ("10^{-3}", "0.001"), (r"50^\circ\text{C}", "50"), (r"\textbf{(B)}", "B"), ("$5$ apples", "5"),
    (r"\$5", "5 dollars"), ("5 or -5", r"\pm5"), (r"\frac{3\pi}{2}", r"1.5\pi"), (r"\tan^{-1} x", r"\arctan x"),
    (r"2 \cdot 3^{4}", "162"), ("x^2 y", "yx^2"),
    (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), ("p - q", "-(q-p)"),
    ("18", "#### 18"), (r"36\pi \text{ cm}^3", r"36\pi"), (r"\frac{\pi}{4}", "pi/4"), ("{1, 2, 3}", r"\{3,2,1\}"),
    ("5,000", "5000"), ("-5", "−5"),
]  # fmt: skip
DIFFERENT = [
    ("1, 1, 2", "1, 2"), ("C. 12 or D. 13", "C"), ("1.2.3", "12.3."), ("x > 5", "y > 5"), (r"x \ge 5", "x > 5"),
    ("5 apples", "5 oranges"), (r"\$5", "5 cents"), ("45 degrees", "45 radians"), ("5 more", "5"), ("3 - 2 = 2", "2"),
    ("0.33", "1/3"), ("3.14", r"\pi"), ("3.14159265358979", r"\pi"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
    ("(1,2)", r"\{1,2\}"), ("(1,2)", "1,2"), ("5 or 6", "5"), ("5, 6", "5"), ("10 m", "10 cm"), ("x=5", "y=5"),
    ("2+2=5", "5"), (r"10\%", r"1000\%"), ("10 million", "10"), ("2xy", "2"), ("3 quarters", "3"), ("east", "seat"),
    ("x^2+y^2=1", "1"), ("0=0", "x+y=3"), (r"\sqrt{x^2}", "x"), ("1101_2", "13"), ("yx", "xyz"),
    ("x>5", r"(5,\infty)"), ("5 squared", "5"), ("x=2,y=1", "x=1,y=2"), ("2,1", "x=1,y=2"), ("", "5"), ("", ""),
    ("5", ""), ("nan", "5"), (r"\frac{", r"\frac{"), ("{", "{"), ("9^9^9^9", "9^9^9^9"),
    ("2003^{2002^{2001}}", "2003^{2002^{2001}}"), ("10**10**8", "10**10**8"), ("1/0", "1/0"), ("x=5=6", "6"),
    ("no", "on"), ("A", "B"), ("(A) 5", "(B) 5"), ("-5", "5"), ("5", "-5"), ("1.414213562373095", r"\sqrt2"),
    ("x", "5"), ("5", "x"), ("2x", "x"), ("12", "1,2"), ("1:2", "0.5"), ("5!", "5"), ("x=1", "1,2"), ("2^{10}", "10"),
    ("not 5", "5"), (r"\text{not }5", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_spellings_of_one_value_match(answer, gold):
    assert part.answers_match(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_what_is_not_the_same_value_does_not_match(answer, gold):
    assert not part.answers_match(answer, gold)


def test_numbers_are_graded_like_their_texts():
    assert part.answers_match(5, 5.0) and part.answers_match("0.5", 0.5)
    assert not part.answers_match(float("nan"), float("nan"))


@pytest.mark.parametrize("gold", ["", " ", ".", "{", r"\frac{", "(1, 2", "1/0", "9^9^9^9", r"0^{-1}", "???",
                                  r"2003^{2002^{2001}}", "10**10**8", "1000!", "x^{9999999}", r"\log 0",
                                  r"e^{e^{e^{e^e}}}", "(" * 400 + "1" + ")" * 400, "2^" * 400 + "2",
                                  "9" * 5000, r"\sin" * 300 + "1", "-" * 999 + "1)", "2 + 2 = 5"])  # fmt: skip
def test_a_gold_that_cannot_be_read_is_told_and_never_rewarded(gold):
    assert not part.is_gradable(gold) and part.is_gradable("5")
    boxed = rf"</think> <answer>\boxed{{{gold}}}</answer>"
    for response in (gold, "5", "", boxed, f"</think> <answer>{gold}</answer>"):
        assert not part.answers_match(response, gold)
        assert part.r1_zero_reward(response, gold)["reward"] == 0
        assert part.question_only_reward(response, gold)["reward"] == 0


def test_a_bracket_type_is_part_of_an_interval_and_of_no_list():
    for a, b in itertools.permutations(["(1, 2)", "[1, 2)", "(1, 2]", "[1, 2]", r"\{1, 2\}"], 2):
        assert part.answers_match(a, a) and not part.answers_match(a, b)


def test_an_inequality_may_be_answered_by_its_interval_but_does_not_answer_one():
    for inequality, interval in ((r"0 < x \le 1", "(0, 1]"), ("x > 5", r"(5, \infty)"), (r"7 \geq y", r"(-\infty, 7]"),
                                 (r"5 < x < \infty", r"(5, \infty)")):
        assert part.answers_match(interval, inequality) and part.answers_match(inequality, inequality)
        assert not part.answers_match(inequality, interval)


def test_random_fractions_match_exactly_when_they_are_equal():
    rng = random.Random(0)
    for _ in range(2000):
        a, b, c, d = (rng.randint(-12, 12) or 1 for _ in range(4))
        spelled = rng.choice([rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}", f"({a})/({b})", rf"${a} \div {b}$"])
        assert part.answers_match(spelled, rf"\dfrac{{{c}}}{{{d}}}") == (Fraction(a, b) == Fraction(c, d))


def test_random_polynomials_match_exactly_when_their_coefficients_are_equal():
    rng = random.Random(0)
    for _ in range(300):
        p, q, r, s = (rng.randint(1, 4) for _ in range(4))
        expanded = f"{p * r}x^2 + {p * s + q * r}xy + {q * s}y^{{2}}"
        assert part.answers_match(f"({p}x + {q}y)({r}x + {s}y)", expanded)
        assert not part.answers_match(f"({p}x + {q}y)({r}x + {s + 1}y)", expanded)


def test_the_answer_is_found_where_responses_put_it():
    for response, answer in [
            (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
            (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{1}. Then \boxed{2}", "2"), (r"\boxed 5 ok", "5"),
            (r"\fbox{7}", "7"), (r"\boxed{3", None), (r"\boxed{\boxed{4}}", "4"), ("none", None)]:  # fmt: skip
        assert part.last_boxed(response) == answer
    for response, answer in [
            ("<answer>1</answer> <answer>2</answer>", "2"), ("16 - 3 = 13\n#### 13", "13"),
            ("So the final answer is 42. Good luck!", "42"), ("Answer: $x = 3$.", "$x = 3$"),
            (r"Hence \(y = 2\) is what we want", "$y = 2$"), ("x" * 5000, ""), ("17", "17")]:  # fmt: skip
        assert part.final_answer(response) == answer


@pytest.mark.parametrize(("response", "free", "strict"), [
    ("2 + 3</think> <answer>5</answer>", RIGHT, RIGHT), ("2 + 3</think> <answer> \\boxed{5} </answer>", RIGHT, RIGHT),
    ("hm</think>\n\n<answer>5</answer>", RIGHT, UNFORMATTED), ("hm</think><answer>5</answer>", RIGHT, UNFORMATTED),
    ("hm</think> <answer>6</answer>", WRONG, WRONG), ("hm</think> <answer>5", UNFORMATTED, UNFORMATTED),
    ("hm <answer>5</answer>", UNFORMATTED, UNFORMATTED), ("5", UNFORMATTED, UNFORMATTED),
    ("", UNFORMATTED, UNFORMATTED),
    ("</answer></think> <answer>5", UNFORMATTED, UNFORMATTED),
    ("a</think> <answer>6</answer> <answer>5</answer>", RIGHT, RIGHT)])  # fmt: skip
def test_r1_zero_reward_wants_tags_then_the_answer(response, free, strict):
    assert part.r1_zero_reward(response, "5") == free
    assert part.r1_zero_reward(response, "5", strict=True) == strict


def test_question_only_reward_wants_a_box_behind_all_thinking():
    assert part.question_only_reward(r"so \boxed{0.5}", r"\frac12") == RIGHT
    assert part.question_only_reward(r"so \boxed{0.6}", r"\frac12") == WRONG
    assert part.question_only_reward("so 0.5", r"\frac12") == UNFORMATTED
    assert part.question_only_reward(r"<think> maybe \boxed{0.5}", r"\frac12") == UNFORMATTED
    assert part.question_only_reward(r"<think> hm </think> \boxed{0.5}", r"\frac12") == RIGHT
    assert part.question_only_reward(r"\fbox{5}", 5) == RIGHT
    assert part.question_only_reward(r"\fbox{5}", 5, strict=True) == UNFORMATTED
    assert part.question_only_reward(r"\boxed{7}", ["6", "7"]) == RIGHT  # any of several golds


def test_hostile_texts_are_graded_without_an_error():
    atoms = [*"0159.,;:!|_^{}()[]<>=+-*/%$&~'\" xyei", "\\", r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(",
             r"\pm", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\{", r"\log_",
             r"\sin", r"\binom", r"\overline{",
             r"\cup", r"\le", "and", "answer is", "####", "</think> <answer>", "</answer>", "٣", "²", "½", "∞", "\x00",
             "\ud800", "\n",
             "9" * 50, "million", r"^\circ", r"\infty", "1e999"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(4000):
        text = "".join(rng.choice(atoms) for _ in range(rng.randint(1, 12)))
        other = text[: rng.randint(0, len(text))]
        for answer, gold in ((text, "5"), ("5", text), (text, other), (text, text)):
            assert part.answers_match(answer, gold) in (True, False)
        for form in (part.r1_zero_reward, part.question_only_reward):
            assert set(form(text, other)) == {"reward", "format_reward", "answer_reward"}
        number = part.parse_gsm8k_response(text)
        assert number is None or float(number) >= 0 or number[0] == "-"
        part.parse_mmlu_response({"options": [*"abcd"]}, text)
        part.countdown_reward(text, [1, 2], 3)


@pytest.mark.parametrize("piece", ["9", "{", "}", "(", r"\frac", r"\boxed{", "$", r"\(", "1,", "1 ", "9^", "-",
                                   "</think>", "<answer>", "answer is ", r"\text{a}", " ", r"\pm", "x^{999}+",
                                   r"\\", r"\sqrt"])  # fmt: skip
def test_a_megabyte_of_anything_is_no_answer(piece):
    text = piece * (1_000_000 // len(piece))
    for response in (text, rf"\boxed{{{text}}}", f"</think> <answer>{text}</answer>"):
        assert not part.answers_match(response, "5") and not part.answers_match("5", response)
        assert part.r1_zero_reward(response, response)["reward"] == 0
        assert part.question_only_reward(response, "5")["reward"] == 0


def test_numbers_beyond_floating_point_are_no_error():
    assert not part.answers_match(r"\pi", "2^{2013}") and not part.answers_match("2^{2013}", r"\pi")
    assert not part.answers_match(r"x = \infty", r"y = \infty")


def test_threads_grade_like_one():
    jobs = [(a, g) for a, _ in SAME for _, g in SAME[::7]]
    alone = list(itertools.starmap(part.answers_match, jobs))
    part.readings.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(part.answers_match, *zip(*jobs, strict=True))) == alone


@pytest.mark.parametrize(("output", "letter"), [
    ("The correct answer is B. There is more.", "B"), ("The correct answer is (C).", "C"), ("Answer: D", "D"),
    ("The correct answer is **A**", "A"), ("B", "B"), ("(D)", "D"), ("C. because", "C"), ("I think A is it", None),
    ("The correct answer is 10000 polygons.", None), ("The correct answer is Apples", None), ("", None),
    ("The correct answer is E", None), ("The answer is A. No: the answer is B.", "B")])  # fmt: skip
def test_mmlu_responses_give_a_letter_or_none(output, letter):
    assert part.parse_mmlu_response({"options": ["1", "2", "3", "4"]}, output) == letter


@pytest.mark.parametrize(("output", "number"), [
    ("48 / 2 = 24 in May. 48 + 24 = 72 altogether.", "72"), ("She has $1,234.50.", "1234.50"), ("none", None),
    ("", None), ("It is -5", "-5"), ("16-3", "3"), ("3 - 5", "5"), ("-$7", "-7"), ("$-7", "-7"), ("1,2", "2"),
    (".5", ".5"), ("12,345,678 of them", "12345678"), ("1234,567", "567"),
    ("x" * 10**6 + "1 " + "y" * 10**6, "1")])  # fmt: skip
def test_gsm8k_responses_give_their_last_number_or_none(output, number):
    assert part.parse_gsm8k_response(output) == number


# -------------------------------------------------------------------------------------------------
# data


def write(path, *records):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        for record in records:
            file.write((record if isinstance(record, str) else json.dumps(record)) + "\n")
    return str(path)


def test_records_are_read_from_jsonl_gz_json_and_csv(tmp_path):
    records = [{"question": "2\u2028?", "answer": "2"}, {"question": "3?", "answer": "3"}]
    for path in (write(tmp_path / "a.jsonl", *records, ""), write(tmp_path / "a.jsonl.gz", *records),
                 write(tmp_path / "a.json", records)):  # fmt: skip
        assert part.read_problems(path) == records
    path = write(tmp_path / "a.csv", "id,prompts_final", '1,"one, two"')
    assert part.read_examples("sst", path, "question_only")[0]["prompt"] == "one, two"


def test_fields_go_by_their_usual_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"problem": "p", "solution": r"so \boxed{1}"})
    assert part.read_problems(path) == [{"question": "p", "answer": r"so \boxed{1}"}]
    path = write(tmp_path / "b.jsonl", {"instruction": "i", "output": "o", "ground_truth": "g"},
                 {"prompt": "p", "response": "r"})  # fmt: skip
    assert part.read_pairs(path) == [dict(prompt="i", response="o", ground_truth="g"),
                                        dict(prompt="p", response="r", ground_truth=None)]  # fmt: skip
    talk = "\n\nHuman: hi\n\nAssistant: {}"
    path = write(tmp_path / "c.jsonl", {"chosen": talk.format("good"), "rejected": talk.format("bad")},
                 {"chosen": talk.format("a") + talk.format("b"), "rejected": talk.format("c")},
                 {"prompt": "p", "chosen": "c", "rejected": "r"})  # fmt: skip
    assert part.read_preferences(path) == [dict(prompt="hi", chosen="good", rejected="bad"),
                                              dict(prompt="p", chosen="c", rejected="r")]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), [
    (['{"prompt": "a"}'], r"b\.jsonl:1 must have the field response or .*, got prompt"),
    (['{"prompt": "a", "response": "b"}', '{"prompt": " ", "response": "b"}'], r":2 must have text in prompt"),
    (['{"prompt": "a", "response": ""}'], r":1 must have text in response"),
    (['{"prompt": "a", "response": "b"}', '{"prompt"'], r":2 must be JSON"), (["[[1]]"], r":1 must be an object"),
    (["[" * 10**5], r"must be JSON"), ([""], r"at least one record"), (["3"], r":1 must be an object")])  # fmt: skip
def test_records_that_are_wrong_are_named_in_one_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        part.read_pairs(write(tmp_path / "b.jsonl", *lines))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    for name in ("missing.jsonl", "latin.jsonl", "cut.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name}.* must be JSON or csv that can be read"):
            part.read_pairs(tmp_path / name)
    with pytest.raises(ValueError, match="must hold pairs"):
        part.read_preferences(write(tmp_path / "d.jsonl", {"chosen": "a", "rejected": "b"}))
    with pytest.raises(ValueError, match="x_test.csv:2 must be a question, four options and a letter"):
        part.read_mmlu(write(tmp_path / "x_test.csv", "q,1,2,3,4,A", "q,1,2,3,4,E"))


def test_prompts_end_where_the_model_goes_on_and_hold_any_question():
    for name, template in part.PROMPTS.items():
        assert template.count("{question}") == 1, name
    assert part.PROMPTS["r1_zero"].endswith("User: {question}\nAssistant: <think>")
    assert part.PROMPTS["alpaca"].endswith("### Instruction:\n{question}\n\n### Response:\n")
    assert part.PROMPTS["system"].endswith("# Query:\n```{question}```\n\n# Answer:\n```")


# -------------------------------------------------------------------------------------------------
# evaluation


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert part.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match="k must lie in 1..n"):
        part.pass_at_k(4, 2, 5)


@pytest.fixture
def model_folder(tmp_path):
    """An untrained model of 256 bytes and an end, which answers nonsense."""
    torch.manual_seed(0)
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    config = lm.ModelConfig(vocab_size=257, context_length=700, d_model=16, num_layers=1, num_heads=2)
    lm.save_pretrained(lm.TransformerLM(config), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def eval_flags(tmp_path, folder, task, data, *more, out="eval"):
    return ["eval", "--task", task, "--data", data, "--model", str(folder), "--out_dir", str(tmp_path / out),
            "--device", "cpu", "--max_new_tokens", "6", "--batch_size", "2", *more]  # fmt: skip


def records(tmp_path, out="eval"):
    return sorted(part.read_generations(tmp_path / out)[0].items(), key=str)


def gsm8k(tmp_path):
    return write(tmp_path / "g.jsonl", *({"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(5)))


def test_an_evaluation_leaves_every_generation_and_its_results(tmp_path, model_folder, monkeypatch):
    texts = iter(["it is 1", "1 or 3", "none", "4", "5.0"])
    monkeypatch.setattr(part, "rollout", lambda m, t, prompts, *a: [
        dict(text=next(texts), finish_reason="stop") for _ in prompts])  # fmt: skip
    assert rl.main(eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), "--prompt", "alpaca")) == 0
    result = json.loads((tmp_path / "eval/results.json").read_text())
    assert result["accuracy"] == 0.6 and result["examples"] == 5
    kinds = ("format_and_answer_right", "format_right_answer_wrong", "format_and_answer_wrong")
    assert [result[k] for k in kinds] == [3, 1, 1]
    assert [r["response"] for _, r in records(tmp_path)] == ["it is 1", "1 or 3", "none", "4", "5.0"]
    assert "### Instruction:\n0 + 1?\nAnswer:" in records(tmp_path)[0][1]["prompt"]


def test_an_evaluation_that_was_killed_goes_on_to_the_same_end(tmp_path, model_folder):
    flags = ("--num_samples", "3", "--pass_at", "1", "3", "--prompt", "question_only")
    data = gsm8k(tmp_path)
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, out="whole"))
    assert len(records(tmp_path, "whole")) == 5 * (1 + 3)
    assert json.loads((tmp_path / "whole/results.json").read_text())["pass@3"] == 0
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags))
    file = tmp_path / "eval/generations.jsonl"
    file.write_bytes(file.read_bytes()[:-900])  # in the middle of a line, and of a batch
    assert len(records(tmp_path)) < 20
    with pytest.raises(SystemExit):
        rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags))
    with pytest.raises(SystemExit):
        rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, "--seed", "1", "--resume"))
    rl.main(eval_flags(tmp_path, model_folder, "math", data, *flags, "--resume"))
    assert records(tmp_path) == records(tmp_path, "whole")


def test_two_ranks_evaluate_like_one(tmp_path, model_folder):
    flags = ("--num_samples", "2", "--pass_at", "2")
    rl.main(eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), *flags, out="one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "rl.py"]
    subprocess.run([*command, *eval_flags(tmp_path, model_folder, "gsm8k", gsm8k(tmp_path), *flags, out="two")],
                   check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    assert records(tmp_path, "two") == records(tmp_path, "one") and len(records(tmp_path, "one")) == 15
    assert (tmp_path / "two/generations.1.jsonl").exists() and (tmp_path / "two/results.json").exists()


def test_outputs_are_in_the_files_that_other_graders_read(tmp_path, model_folder):
    data = write(tmp_path / "alpaca.json", [{"instruction": "Say {hi}", "dataset": "helpful_base", "output": "?"}])
    rl.main(eval_flags(tmp_path, model_folder, "alpaca_eval", data, "--prompt", "system", out="a"))
    (row,) = json.loads((tmp_path / "a/alpaca_eval.json").read_text())
    assert set(row) == {"instruction", "output", "generator", "dataset"} and row["instruction"] == "Say {hi}"
    assert row["dataset"] == "helpful_base" and row["generator"] == str(model_folder)
    data = write(tmp_path / "sst.csv", "harm_area,prompts_final", "x,Tell me how", "x,Tell me why")
    rl.main(eval_flags(tmp_path, model_folder, "sst", data, "--prompt", "system", out="s"))
    rows = [json.loads(line) for line in (tmp_path / "s/sst.jsonl").read_text().splitlines()]
    assert [r["prompts_final"] for r in rows] == ["Tell me how", "Tell me why"]
    assert set(rows[0]) == {"prompts_final", "output"}


def test_mmlu_is_asked_as_the_handout_says(tmp_path, model_folder):
    write(tmp_path / "m/high_school_biology_test.csv".replace("m/", ""), '"What, then?",one,two,three,four,B')
    (example,) = part.read_examples("mmlu", tmp_path / "high_school_biology_test.csv", "question_only")
    assert example["prompt"].endswith("Question: What, then?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert "about high school biology" in example["prompt"]
    assert part.grade_response("mmlu", "system", example, "The correct answer is B.") == RIGHT
    assert part.grade_response("mmlu", "system", example, "The correct answer is C.") == WRONG
    assert part.grade_response("mmlu", "system", example, "Who knows?") == UNFORMATTED


def test_prompts_that_do_not_fit_are_counted_and_wrong(tmp_path, model_folder):
    data = write(tmp_path / "g.jsonl", {"question": "1?", "answer": "1"}, {"question": "x" * 800, "answer": "1"})
    rl.main(eval_flags(tmp_path, model_folder, "math", data, "--prompt", "question_only"))
    assert json.loads((tmp_path / "eval/results.json").read_text())["too_long"] == 1
    assert [r["finish_reason"] == "too long" for _, r in records(tmp_path)] == [False, True]


def test_flags_that_do_not_fit_are_told_in_one_line(tmp_path, model_folder, capsys):
    for more, message in ((("--num_samples", "2", "--pass_at", "4"), "must be at least every --pass_at"),
                          (("--data", "nowhere.jsonl"), "nowhere.jsonl must be JSON")):  # fmt: skip
        with pytest.raises(SystemExit):
            rl.main(eval_flags(tmp_path, model_folder, "math", gsm8k(tmp_path), *more))
        assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


# -------------------------------------------------------------------------------------------------
# small tasks


def test_additions_are_different_right_and_the_first_of_more():
    problems = part.addition_problems(200, 3, 0)
    assert len({p["prompt"] for p in problems}) == 200 and problems == part.addition_problems(300, 3, 0)[:200]
    assert all(sum(map(int, p["prompt"].rstrip("=").split("+"))) == int(p["answer"]) for p in problems)
    assert problems != part.addition_problems(200, 3, 1) and len(part.addition_problems(100, 1, 0)) == 100
    with pytest.raises(ValueError, match="there are 100 sums"):
        part.addition_problems(101, 1, 0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_countdown_problems_have_solutions_that_the_reward_accepts(count):
    problems, rng = part.countdown_problems(60, count, 0), random.Random(0)
    assert problems == part.countdown_problems(90, count, 0)[:60]
    assert len({(*sorted(p["numbers"]), p["target"]) for p in problems}) == 60
    for p in problems:
        numbers, target = p["numbers"], p["target"]
        assert len(numbers) == count and 1 <= target <= 99
        assert part.countdown_reward(f"</think> <answer>{p['solution']}</answer>", numbers, target) == RIGHT
        trace = part.countdown_trace(numbers, target, rng)
        assert part.countdown_reward(trace, numbers, target) == RIGHT
        text = part.countdown_prompt(numbers, target) + trace
        assert set(re.sub("|".join(part.COUNTDOWN_TAGS), "", text)) <= set(part.COUNTDOWN_ALPHABET)


def test_traces_go_back_sometimes_and_their_steps_are_right():
    rng, problems = random.Random(0), part.countdown_problems(100, 3, 0)
    traces = [part.countdown_trace(p["numbers"], p["target"], rng) for p in problems]
    assert 20 < sum(" no " in trace for trace in traces) < 80  # half of them, within 6 standard deviations
    for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", " ".join(traces)):
        a, b = int(a), int(b)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[op] == int(c)
    with pytest.raises(ValueError, match="must have a solution"):
        part.countdown_trace([1, 1], 50, rng)


@pytest.mark.parametrize(("answer", "right"), [
    ("(3+5)*2", True), ("2*(5+3)", True), ("(3+5)*2 ", True), ("3*2+5*2", False), ("16", False), ("3+5+2", False),
    ("3+5*2", False), ("(3+5)*2*1", False), ("(3+5)(2)", False), ("(3+5)**2", False), ("3+5*2=16", False),
    ("((3+5)*2", False), ("", False), ("2**3+5", False), ("(5+3)/2", False), ("3 5*2", False), ("5//3/2", False),
    ("2/(3-5)", False)])  # fmt: skip
def test_countdown_wants_each_number_once_and_the_exact_target(answer, right):
    got = part.countdown_reward(f"hm</think> <answer>{answer}</answer>", [2, 3, 5], 16)
    assert got == (RIGHT if right else WRONG)
    assert part.countdown_reward(f"hm <answer>{answer}</answer>", [2, 3, 5], 16) == UNFORMATTED


def test_countdown_values_are_exact_fractions():
    answer = "</think> <answer>8/(3-8/3)</answer>"
    assert part.countdown_reward(answer, [3, 3, 8, 8], 24) == RIGHT
    assert part.countdown_reward("</think> <answer>3/(2-2)</answer>", [2, 2, 3], 1) == WRONG
