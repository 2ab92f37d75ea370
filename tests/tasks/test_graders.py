"""The graders: d1's verdicts on recorded rows, and the sane ones where d1's are wrong.

JDLLM_GOLDENS=FOLDER replays FOLDER/graders/{gsm8k,math500,countdown,sudoku}.jsonl as well: rows of
published generations, which are not committed.
"""

import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.tasks.graders import answers, d1
from jdllm.tasks.lm_eval import gsm8k, math500
from jdllm.tasks.puzzles import sudoku

COMMITTED = Path(__file__).parents[1] / "goldens" / "graders"
NAMES = ("gsm8k", "math500", "countdown", "sudoku")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def puzzle(question: str) -> str:
    found = re.match(r"\d{16}", question) or re.search(r"(?<=Sudoku puzzle: )\d{16}", question)
    assert found, question
    return found.group()


def replay(row: dict) -> dict:
    """What our copy of the reference says, in the words of the recorded row."""
    text, truth = row["generation"], row["ground_truth"]
    match row["dataset"]:
        case "gsm8k":
            value = d1.gsm8k_answer(text)
            odd = value is not None and not math.isfinite(value)
            return {
                "extracted_answer": str(value) if odd else value,
                "correct": d1.gsm8k_match(truth, text),
            }
        case "math500":
            return {
                "extracted_answer": d1.math_answer(text),
                "correct": d1.math_match(truth, text),
            }
        case "countdown":
            answer = d1.countdown_answer(text)
            value = d1.countdown_value(answer, truth[0])
            return {
                "extracted_answer": answer,
                "evaluation_result": str(value) if isinstance(value, complex) else value,
                "correct": d1.countdown_match(truth[0], truth[1], text),
            }
        case "sudoku":
            cells = d1.sudoku_cells(puzzle(row["question"]), truth, text)
            empty = puzzle(row["question"]).count("0")
            return {
                "extracted_answer": d1.sudoku_answer(text),
                "correct_cells": cells,
                "empty_cells": empty,
                "correct": cells == empty,
            }
    raise ValueError(row["dataset"])


def same(row: dict, name: str, value: object) -> bool:
    wanted = row[name]
    if wanted == "inf" and isinstance(value, float):
        return value == math.inf
    return wanted == value


def named(name: str):
    return lambda error: type(error).__name__ == name


def check(found: list[dict]) -> None:
    wrong = []
    for row in found:
        for name, value in replay(row).items():
            if not same(row, name, value):
                wrong.append((row["generation"][-200:], name, row[name], value))
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:3]}"


def test_hand_written_edge_cases_get_the_reference_verdict():
    found = rows(COMMITTED / "synthetic_edge_cases.jsonl")
    assert len(found) == 112 and {row["dataset"] for row in found} == set(NAMES)
    check(found)


@pytest.mark.parametrize("name", NAMES)
def test_published_generations_get_the_reference_verdict(name):
    root = Path(os.environ.get("JDLLM_GOLDENS", COMMITTED.parent))
    path = root / "graders" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is quoted text that is not committed; set JDLLM_GOLDENS to its folder")
    found = rows(path)
    assert len(found) == 120
    check(found)


def test_the_normaliser_of_the_reference():
    for pair in json.loads((COMMITTED / "math_normaliser.json").read_text()):
        if pair["out"].startswith("!"):
            with pytest.raises((IndexError, ValueError), check=named(pair["out"][1:])):
                d1.normalise(pair["in"])
        else:
            assert d1.normalise(pair["in"]) == pair["out"], pair


# the sane ones

EIGHTEEN = {"answer": "9 + 9 = <<9+9=18>>18\n#### 18"}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("#### 18", r"so \boxed{18}"),
        ("#### 18", r"\boxed{5}, no: \boxed{9+9 = 18 \text{ eggs}}"),
        ("#### 18", r"<answer>\boxed{\$18.00}</answer>"),
        ("#### 18", "#### 18 and that is all 3 of us"),
        ("#### 18", "The answer is 18."),
        ("#### 18", "<answer>18"),
        ("#### 18", r"\boxed{x=18}"),
        ("#### 1,000", r"\boxed{1000}"),
        ("#### 1000", r"\boxed{1,000}"),
        ("#### 1000", r"\boxed{1{,}000 \text{ m}}"),
        ("#### -10", r"\boxed{-10}"),
        ("#### 0.5", r"\boxed{\frac{1}{2}}"),
        ("#### 50", r"\boxed{50\%}"),
    ],
)
def test_gsm8k_right(answer, text):
    assert gsm8k.grade({"answer": answer}, text)["solved"] == 1


@pytest.mark.parametrize(
    "text",
    ["", "eighteen", r"\boxed{180}", r"\boxed{1,8}", r"\boxed{18.5}", "#### -18", r"\boxed{18/0}"],
)
def test_gsm8k_wrong(text):
    assert gsm8k.grade(EIGHTEEN, text)["solved"] == 0


def test_both_verdicts_are_reported_and_differ_where_the_reference_errs():
    thousand = {"answer": "#### 1,000"}
    assert gsm8k.grade(thousand, r"\boxed{1,000}") == {"solved": 1, "d1_match": 0}
    assert gsm8k.grade({"answer": "#### -10"}, r"\boxed{-10}") == {"solved": 1, "d1_match": 0}
    half = {"answer": r"\frac{1}{2}"}
    assert math500.grade(half, r"\boxed{0.50}") == {"solved": 1, "d1_match": 0}
    assert math500.grade(half, r"\boxed{\dfrac12}") == {"solved": 1, "d1_match": 1}


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("1000", "1,000"),
        ("10,\\!080", "10080"),
        (r"\frac{72}{1}", r"\frac{72}1"),
        ("5", "5.0"),
        ("5", r"5\text{cm}"),
        ("15\\mbox{ cm}^2", "15"),
        ("5", "x = 5"),
        ("5", "f(x) = 5"),
        ("[0,1]", r"x\in[0,1]"),
        (r"\text{five}", r"\mbox{Five}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        ("90^\\circ", "90"),
        ("\\$18.90", "18.9"),
        (r"3\sqrt{13}", r"3\sqrt{13}."),
        (r"\sqrt{3}", r"\sqrt3"),
        ("-\\frac{1}{2}", "-0.5"),
        (r"\text{(C)}", "(C)"),
        ("2k+2", "2k + 2"),
    ],
)
def test_math_same(truth, answer):
    assert math500.same(truth, answer)
    assert math500.grade({"answer": truth}, rf"so $\boxed{{{answer}}}$")["solved"] == 1


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("1000", "1,0"),
        ("a", "A"),
        ("(1,2)", "(2,1)"),
        ("1,2", "12"),
        ("5", ""),
        ("x^2", "x"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("-5", "5"),
        ("[0,1]", "(0,1)"),
    ],
)
def test_math_different(truth, answer):
    assert not math500.same(truth, answer)


def test_sudoku_solved_by_any_grid_while_d1_counts_the_cells_listed():
    doc = {"puzzle": "1030030100000000", "solution": sudoku.completions("1030030100000000")[1]}
    other = sudoku.completions(doc["puzzle"])[0]
    scores = sudoku.grade_d1(doc, f"<answer>{other}</answer>")
    assert scores["solved"] == 1 and 0 < scores["d1_cells"] < 1
    changed = doc["solution"].replace(doc["solution"][0], "9", 1)
    scores = sudoku.grade_d1(doc, f"<answer>{changed}</answer>")
    assert scores["solved"] == 0 and scores["d1_cells"] == 1


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text("0123456789\\{}boxedfractansw</>+-*/=., $%", max_size=40))
def test_graders_never_raise(text):
    for completion in (text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>", f"\\boxed {text}"):
        for scores in (
            gsm8k.grade(EIGHTEEN, completion),
            math500.grade({"answer": "\\frac{1}{2}"}, completion),
        ):
            assert set(scores.values()) <= {0.0, 1.0}
        d1.countdown_match([1, 2, 3], 6, completion)
        d1.sudoku_cells("1030030100000000", "1" * 16, completion)
        assert answers.number(completion) is None or answers.numbers(completion)
