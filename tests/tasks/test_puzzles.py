"""The tasks: graders, generators, the hold-out list, d1's files where they are.

JDLLM_DATA=FOLDER runs the tests that read d1's test files from that folder as well.
"""

import importlib.util
import itertools
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.tasks import TASKS
from jdllm.tasks.puzzles import countdown, countdown4, expression, held_out, sudoku

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def d1_folder() -> Path:
    folder = os.environ.get("JDLLM_DATA", "")
    if not folder:
        pytest.skip("JDLLM_DATA is unset: it names the folder with d1's test files")
    return Path(folder)


def script(name: str):
    """Load experiments/bundled/NAME.py, which is not part of the package."""
    path = ROOT / "experiments" / "bundled" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# sudoku

PINNED = {
    "sudoku": [
        {"puzzle": "0013030000202431", "solution": "4213134231242431"},
        {"puzzle": "3200102340102000", "solution": "3241142343122134"},
    ],
    "countdown": [
        {"numbers": [86, 64, 52], "target": 30},
        {"numbers": [27, 31, 5], "target": 9},
    ],
}


def grade_sudoku(doc: dict, completion: str) -> tuple[float, float, float]:
    scores = TASKS["sudoku"].grade(doc, completion)
    return scores["solved"], scores["exact_match"], scores["cell_acc"]


def test_every_grid_is_listed_once_in_order():
    assert len(sudoku.grids()) == 288
    assert list(sudoku.grids()) == sorted(set(sudoku.grids()))
    assert all(sudoku.is_grid(grid) for grid in sudoku.grids())


@pytest.mark.parametrize(
    "text", ["", "1234", "1" * 16, "1234341221434322", "1234341221434321 ", "1234234134124123"]
)
def test_is_grid_rejects(text):
    assert not sudoku.is_grid(text)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sudoku.grids()), st.sets(st.integers(0, 15)))
def test_completions_match_a_plain_filter(grid, cells):
    puzzle = "".join(digit if cell in cells else "0" for cell, digit in enumerate(grid))
    plain = [g for g in sudoku.grids() if all(g[cell] == grid[cell] for cell in cells)]
    assert sudoku.completions(puzzle) == plain


@pytest.mark.parametrize("puzzle", ["", "5" + "0" * 15, "11" + "0" * 14])
def test_impossible_puzzles_are_errors(puzzle):
    with pytest.raises(ValueError, match="puzzle"):
        sudoku.completions(puzzle)


def test_any_completion_of_an_ambiguous_puzzle_is_solved():
    puzzle = "1030030100000000"
    several = sudoku.completions(puzzle)
    assert len(several) > 1
    doc = {"puzzle": puzzle, "solution": several[1]}
    assert TASKS["sudoku"].response(doc) == f"<answer>{several[0]}</answer>"
    assert grade_sudoku(doc, f"<answer>{several[1]}</answer>") == (1, 1, 1)
    solved, exact, cells = grade_sudoku(doc, f"<answer>{several[0]}</answer>")
    assert (solved, exact) == (1, 0)
    assert 0 < cells < 1


def a_puzzle() -> dict:
    grid = sudoku.grids()[100]
    return {"puzzle": grid[:8] + "0" * 8, "solution": grid}


def test_sudoku_grader_finds_the_answer():
    doc = a_puzzle()
    good = doc["solution"]
    spaced = f"{good[:8]}\n{good[8:]}"
    for text in (f"so <answer> {spaced} </answer>", f"<answer>{good}", f"it is {good}."):
        assert grade_sudoku(doc, text)[:2] == (1, 1), text
    assert grade_sudoku(doc, f"<answer>{good}<|eot_id|>more")[:2] == (1, 1)
    assert grade_sudoku(doc, f"<answer>1</answer><answer>{good}</answer>")[:2] == (1, 1)


def test_sudoku_grader_rejects():
    doc = a_puzzle()
    good = doc["solution"]
    other = next(g for g in sudoku.grids() if g[:8] != good[:8])
    assert grade_sudoku(doc, f"<answer>{other}</answer>")[0] == 0, "a clue was changed"
    assert grade_sudoku(doc, f"<answer>{doc['puzzle']}</answer>") == (0, 0, 0)
    assert grade_sudoku(doc, f"<answer>{good}1</answer>")[:2] == (0, 0), "17 digits"
    assert grade_sudoku(doc, f"{good}1")[0] == 0, "part of a longer number"
    assert grade_sudoku(doc, "") == (0, 0, 0)


def test_cell_accuracy_counts_the_empty_cells_only():
    doc = a_puzzle()
    good = doc["solution"]
    assert grade_sudoku(doc, f"<answer>{good[:12]}0000</answer>") == (0, 0, 0.5)
    assert grade_sudoku(doc, f"<answer>{good[:12]}</answer>") == (0, 0, 0.5)
    assert grade_sudoku(doc, f"<answer>00000000{good[8:]}</answer>") == (0, 0, 1)


def test_generated_sudokus_are_solvable_and_partly_ambiguous():
    docs = TASKS["sudoku"].generate(2000, 3, held_out=False)
    several = 0
    for doc in docs:
        assert doc["puzzle"].count("0") == 8
        found = sudoku.completions(doc["puzzle"])
        assert doc["solution"] == found[0]
        several += len(found) > 1
    assert 0.15 < several / len(docs) < 0.25


# countdown

DOC = {"numbers": [30, 100, 93], "target": 23}


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{30-(100-93)}",
        r"100-93=7 \boxed{30 - (100 - 93) = 23}",
        r"\boxed{1} no, \boxed{93+30-100}",
        r"\boxed{30-\left(100-93\right)}",
        r"$\boxed{-100+93+30}$",
        "<answer>93-100+30</answer>",
        "  30+93-100\n",
        "\\boxed{30\u2212(100\u221293)}",
    ],
)
def test_countdown_grader_accepts(text):
    assert TASKS["countdown"].grade(DOC, text)["solved"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        r"\boxed{}",
        r"\boxed{23}",
        r"\boxed{30+93-100+0}",
        r"\boxed{30+93}",
        r"\boxed{30+93-100",
        r"\boxed{30+93-100} \boxed{nothing}",
        r"\boxed{30+93-1_00}",
        r"\boxed{30+093-100}",
        r"\boxed{30-(100-93}",
        r"\boxed{__import__('os').system('true')}",
        r"\boxed{100//93+30-8}",
        r"\boxed{2**3}",
        r"\boxed{30/(93-93)}",
        "\\boxed{" + "(" * 5000 + "}",
        "\\boxed{" + "-" * 180 + "1}",
        "\\boxed{3\u0660+93-100}",
    ],
)
def test_countdown_grader_rejects(text):
    assert TASKS["countdown"].grade(DOC, text) == {"solved": 0.0, "exact_match": 0.0}


def test_countdown_operator_spellings_and_exact_division():
    doc = {"numbers": [2, 3, 4], "target": 6}
    for text in (r"\boxed{3 \times 4 \div 2}", r"\boxed{3/2\cdot 4}", "\\boxed{3\u00d74\u00f72}"):
        assert TASKS["countdown"].grade(doc, text)["solved"] == 1.0
    # 1/3*3 is exactly 1 as a fraction
    thirds = {"numbers": [1, 3, 3], "target": 1}
    assert TASKS["countdown"].grade(thirds, r"\boxed{1/3*3}")["solved"] == 1.0


def test_countdown_exact_match_is_the_canonical_writing():
    task = TASKS["countdown"]
    assert task.response(DOC) == r"93+30=123,123-100=23 \boxed{93+30-100}"
    assert countdown.response(DOC, chain=False) == r"\boxed{93+30-100}"
    assert task.grade(DOC, task.response(DOC)) == {"solved": 1.0, "exact_match": 1.0}
    assert task.grade(DOC, r"\boxed{30+93-100}") == {"solved": 1.0, "exact_match": 0.0}


@pytest.mark.parametrize(
    ("numbers", "target", "answer"),
    [
        ([1, 2, 3], 6, r"3+2=5,5+1=6 \boxed{3+2+1}"),
        ([5, 90, 20], 65, r"90-20=70,70-5=65 \boxed{90-20-5}"),
        ([40, 3, 30], 30, r"40-30=10,10*3=30 \boxed{(40-30)*3}"),
        ([7, 80, 11], 3, r"11*7=77,80-77=3 \boxed{80-11*7}"),
        ([60, 10, 5], 12, r"10-5=5,60/5=12 \boxed{60/(10-5)}"),
        ([50, 2, 5], 5, r"50/5=10,10/2=5 \boxed{50/5/2}"),
    ],
)
def test_countdown_canonical_answers(numbers, target, answer):
    for order in itertools.permutations(numbers):
        doc = {"numbers": list(order), "target": target}
        assert TASKS["countdown"].response(doc) == answer


def test_unreachable_target_is_an_error():
    with pytest.raises(ValueError, match="makes 99"):
        TASKS["countdown"].response({"numbers": [1, 1, 1], "target": 99})


OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}


def reachable(numbers: list[int]) -> set[int]:
    """Brute force: the whole numbers from 1 to 100 which three numbers reach, fractions allowed."""
    found = set()
    for a, b, c in itertools.permutations(map(Fraction, numbers)):
        for first, second in itertools.product(OPERATIONS.values(), repeat=2):
            inner = first(a, b)
            if inner is not None:
                found |= {second(inner, c), second(c, inner)}
    return {int(v) for v in found if v is not None and v.denominator == 1 and 1 <= v <= 100}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100) | st.integers(1, 12), min_size=3, max_size=3))
def test_every_reachable_target_has_a_canonical_answer(numbers):
    for wanted in reachable(numbers):
        doc = {"numbers": numbers, "target": wanted}
        scores = TASKS["countdown"].grade(doc, TASKS["countdown"].response(doc))
        assert scores == {"solved": 1.0, "exact_match": 1.0}
        chain, _ = countdown.solution(doc)
        for step in chain.split(","):
            left, right = step.split("=")
            tree = expression.parse(left)
            assert tree is not None and expression.value(tree) == int(right) >= 0


TREES = st.recursive(
    st.integers(0, 100),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner),
    max_leaves=8,
)


def written(tree) -> str:
    return (
        str(tree) if isinstance(tree, int) else f"({written(tree[0])}{tree[1]}{written(tree[2])})"
    )


def leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[2])


def evaluated(tree) -> Fraction | None:
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = evaluated(tree[0]), evaluated(tree[2])
    return None if left is None or right is None else OPERATIONS[tree[1]](left, right)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_expressions_evaluate_as_fractions_do(tree):
    parsed = expression.parse(written(tree))
    assert parsed is not None
    assert expression.value(parsed) == evaluated(tree)
    assert sorted(expression.numbers(parsed)) == sorted(leaves(tree))


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text("0123456789+-*/() ", max_size=30))
def test_the_graders_never_raise(text):
    for completion in (text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>"):
        for name, doc in (("countdown", DOC), ("sudoku", a_puzzle())):
            assert all(0 <= score <= 1 for score in TASKS[name].grade(doc, completion).values())


def test_generated_countdowns_are_solvable_and_spread_like_d1():
    docs = TASKS["countdown"].generate(3000, 5, held_out=False)
    hard = 0
    for doc in docs:
        assert all(1 <= x <= 100 for x in [*doc["numbers"], doc["target"]])
        assert TASKS["countdown"].grade(doc, TASKS["countdown"].response(doc))["exact_match"] == 1
        a, b, c = sorted(doc["numbers"])
        sums = {a + b + c, b + c - a, a + c - b, a + b - c, c - b - a}
        hard += doc["target"] not in sums
    assert 0.08 < hard / len(docs) < 0.13  # 27 of 256 in d1's file
    assert any(doc["numbers"] != sorted(doc["numbers"], reverse=True) for doc in docs)


# generators and the hold-out


def test_four_numbers_are_documents_with_their_steps():
    """Steps are sums as they say, their expression is right, and few documents look alike."""
    task, docs = TASKS["countdown4"], countdown4.generate(400, 0, held_out=False)
    for doc in docs:
        for step in doc["steps"]:
            made, result = step.split("=")
            tree = expression.parse(made)
            assert tree is not None and expression.value(tree) == int(result)
        assert len(doc["steps"]) == 3 and 1 <= doc["target"] <= countdown4.LARGEST
        assert task.grade(doc, task.response(doc)) == {"solved": 1.0}
        assert len(task.response(doc)) <= 54
    assert {op for doc in docs for step in doc["steps"] for op in step if not op.isalnum()} == set(
        "+-*/="
    )
    assert task.grade(docs[0], "\\boxed{1+1}") == {"solved": 0.0}


@pytest.mark.parametrize(
    ("numbers", "steps", "written"),
    [
        ([8, 2, 3, 1], ["3+1=4", "8-4=4", "4*2=8"], "(8-(3+1))*2"),
        ([8, 4, 2, 1], ["4/2=2", "8/2=4", "4-1=3"], "8/(4/2)-1"),
        ([5, 6, 7, 8], ["8+7=15", "15+6=21", "21-5=16"], "8+7+6-5"),
    ],
)
def test_steps_become_an_expression_with_the_parentheses_it_needs(numbers, steps, written):
    doc = {"numbers": numbers, "target": int(steps[-1].split("=")[1]), "steps": steps}
    assert countdown4.written(doc) == written
    assert countdown4.grade(doc, countdown4.response(doc)) == {"solved": 1.0}
    with pytest.raises(ValueError, match="a step takes 9, which is not among"):
        countdown4.written(doc | {"steps": ["9+1=10"]})


@pytest.mark.parametrize("name", ["sudoku", "countdown", "countdown4"])
def test_the_same_seed_gives_the_same_documents(name):
    generate = TASKS[name].generate
    docs = generate(500, 11, held_out=False)
    assert len(docs) == 500
    assert docs == generate(500, 11, held_out=False)
    assert docs[:100] == generate(100, 11, held_out=False)
    assert docs != generate(500, 12, held_out=False)
    assert generate(0, 11, held_out=False) == []


def test_the_stream_is_pinned():
    assert TASKS["sudoku"].generate(2, 0, held_out=False) == PINNED["sudoku"]
    assert TASKS["countdown"].generate(2, 0, held_out=False) == PINNED["countdown"]


KEYS = [("sudoku", sudoku.key), ("countdown", countdown.key), ("countdown4", countdown.key)]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_held_out_documents_are_distinct_and_never_trained_on(name, key):
    generate = TASKS[name].generate
    kept = [key(doc) for doc in generate(300, 1, held_out=True)]
    assert len(set(kept)) == 300
    for seed in (1, 2):
        drawn = {key(doc) for doc in generate(10_000, seed, held_out=False)}
        assert not drawn & set(kept)
        assert not any(held_out.reserved(held_out.digest(key)) for key in drawn)


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_listed_items_are_dropped_from_training(name, key, monkeypatch):
    generate = TASKS[name].generate
    before = generate(50, 4, held_out=False)
    listed = {key(doc) for doc in before[:5]}
    monkeypatch.setattr(held_out, "listed", lambda: frozenset(map(held_out.digest, listed)))
    after = generate(50, 4, held_out=False)
    assert not listed & {key(doc) for doc in after}
    assert after[:45] == [doc for doc in before if key(doc) not in listed][:45]


def test_the_key_ignores_the_order_of_the_numbers():
    assert countdown.key(DOC) == "30,93,100=23"
    assert countdown.key(DOC) == countdown.key({"numbers": [93, 30, 100], "target": 23})


def test_the_committed_list_is_well_formed():
    assert len(held_out.listed()) == 1756
    assert held_out.digest("abc") == "ba7816bf8f01cfea"
    with pytest.raises(ValueError, match="line 2"):
        held_out.parse("# ok\nXYZ\n")


def test_make_held_out_writes_what_is_read_back():
    text = script("make_held_out").render(["1,2,3=6", "1" * 16, "1,2,3=6"])
    assert held_out.parse(text) == {held_out.digest("1,2,3=6"), held_out.digest("1" * 16)}
    assert text.startswith("#") and text.endswith("\n")


def test_bad_requests_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="n=-1"):
        TASKS["sudoku"].generate(-1, 0, held_out=False)
    with pytest.raises(ValueError, match="seed=-1"):
        TASKS["sudoku"].generate(1, -1, held_out=False)
    monkeypatch.setattr(held_out, "DRY_BATCHES", 2)
    with pytest.raises(ValueError, match="only 1 distinct"):
        held_out.draw(lambda rng, n: [{}], lambda doc: reserved_key(), 5, 0, held_out=True)


def reserved_key() -> str:
    return next(k for k in map(str, range(10_000)) if held_out.reserved(held_out.digest(k)))


# files


def read(name: str, folder: Path | None) -> list[dict]:
    reader = TASKS[name].read
    assert reader is not None
    return reader(folder)


@pytest.mark.parametrize("name", ["sudoku_d1", "countdown_d1", "countdown4_dream"])
def test_a_missing_file_is_an_error_that_says_what_to_do(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="data=") as caught:
        read(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="pass data=FOLDER"):
        read(name, None)


def test_small_files_are_read(tmp_path):
    (tmp_path / "countdown").mkdir()
    file = tmp_path / "countdown" / "d1_cd3_test.jsonl"
    file.write_text('{"input":"30,100,93","output":"23"}\n\n')
    assert read("countdown_d1", tmp_path) == [DOC]
    file.write_text('{"input":"30,100","output":"23"}\n')
    with pytest.raises(ValueError, match="jsonl:1: a row is"):
        read("countdown_d1", tmp_path)
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="must be a JSON object"):
        read("countdown_d1", tmp_path)
    file = tmp_path / "countdown" / "dream_cd4_test.jsonl"
    file.write_text('{"input": "8,2,3,1,8", "output": "3+1=4,8-4=4,4*2=8"}\n')
    (doc,) = read("countdown4_dream", tmp_path)
    assert doc == {"numbers": [8, 2, 3, 1], "target": 8, "steps": ["3+1=4", "8-4=4", "4*2=8"]}
    file.write_text('{"input": "8,2,3,8", "output": "8-3=5"}\n')
    with pytest.raises(ValueError, match="jsonl:1: a row is"):
        read("countdown4_dream", tmp_path)


def test_d1_files_match_the_committed_list(d1_folder):
    puzzles, sums = read("sudoku_d1", d1_folder), read("countdown_d1", d1_folder)
    four = read("countdown4_dream", d1_folder)
    assert (len(puzzles), len(sums), len(four)) == (500, 256, 1000)
    keys = {sudoku.key(doc) for doc in puzzles} | {countdown.key(doc) for doc in sums + four}
    assert {held_out.digest(key) for key in keys} == held_out.listed()
    assert sum(len(sudoku.completions(doc["puzzle"])) > 1 for doc in puzzles) == 124


@pytest.mark.parametrize("name", ["sudoku_d1", "countdown_d1", "countdown4_dream"])
def test_training_answers_solve_d1(name, d1_folder):
    for doc in read(name, d1_folder):
        assert TASKS[name].grade(doc, TASKS[name].response(doc))["solved"] == 1.0
