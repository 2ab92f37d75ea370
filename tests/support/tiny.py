"""A data folder of made-up documents, in the layout of the real files."""

import gzip
import json
from pathlib import Path


def gsm8k(start: str, a: int, b: int) -> dict:
    return {
        "question": f"{start} have {a} pears and buy {b} more. How many pears are there?",
        "answer": f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pears.\n#### {a + b:,}",
    }


def math(problem: str, answer: str) -> dict:
    solution = f"By hand one finds $\\boxed{{{answer}}}$."
    facts = {"subject": "Algebra", "level": 1, "unique_id": f"test/{problem[:9]}.json"}
    return {"problem": problem, "solution": solution, "answer": answer, **facts}


def humaneval(number: int, name: str, body: str, test: str) -> dict:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """ {name} of a number """\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {test}\n",
    }


def mbpp(number: int, name: str, body: str, test: str, field: str) -> dict:
    tests = [f"assert {name}(3) == {test}", f"assert {name}(0) == {name}(0)", "assert True"]
    return {
        "task_id": number,
        field: f"Write a function {name} of a number.",
        "code": f"def {name}(x):\n    return {body}",
        "test_list": tests,
        **({"test_imports": ["import math"]} if field == "prompt" else {"test_setup_code": ""}),
    }


def mmlu(subject: str, answer: int) -> dict:
    choices = [f"{word} in {subject}" for word in ("one", "two", "three", "four")]
    return {
        "question": f"Which of these stands at place {answer} of {subject}?",
        "subject": subject,
        "choices": choices,
        "answer": answer,
    }


def truthful(question: str, right: str, wrong: str) -> dict:
    return {
        "type": "Adversarial",
        "category": "Made up",
        "question": question,
        "best_answer": right,
        "correct_answers": [right],
        "incorrect_answers": [wrong],
        "source": "none",
    }


SHOTS = (
    "Angelo and Melanie",
    "Mark's basketball team",
    "Bella has two times",
    "A group of 4 fruit",
)


def files(subjects: list[str]) -> dict[str, list[dict]]:
    """Returns the rows of every file, by file name."""
    found = {
        "gsm8k/train.jsonl.gz": [gsm8k(f"{who} traders", n, n) for n, who in enumerate(SHOTS, 2)]
        + [gsm8k("Six friends", 1, 2)],
        "gsm8k/test.jsonl": [gsm8k("Two sisters", 700, 800), gsm8k("Three cousins", 5, 6)],
        "math500/test.jsonl": [math("What is half of one?", "\\frac{1}{2}"), math("Solve.", "7")],
        "humaneval/test.jsonl": [
            humaneval(0, "double", "2 * x", "4"),
            humaneval(1, "square", "x * x", "4"),
        ],
        "truthfulqa/validation.jsonl": [
            truthful(
                "What do pears turn into at night?",
                "Pears stay pears at night.",
                "They become owls and fly away.",
            )
        ],
        "mmlu/test.jsonl.gz": [mmlu(subject, n % 4) for n, subject in enumerate(subjects)],
        "mmlu/dev.jsonl": [mmlu(subject, 1) for subject in subjects],
        "mmlu/sample50.jsonl": [mmlu("anatomy", 2), mmlu("astronomy", 0)],
        "hotpotqa/longbench_sample50.jsonl": [
            {"question": "Who grew the pears?", "context": "", "answers": ["the Grand Duke"]}
        ],
        "sudoku4x4/d1_test.jsonl": [
            {"Puzzle": "1030030100000000", "Solution": "1432234131244213"},
        ],
        "countdown/d1_cd3_test.jsonl": [{"input": "30,100,93", "output": "23"}],
        "countdown/dream_cd4_test.jsonl": [
            {"input": "8,2,3,1,8", "output": "3+1=4,8-4=4,4*2=8"},
        ],
    }
    numbers = {"prompt": (2, 3), "test": (11, 2), "validation": (511, 1), "train": (601, 1)}
    for name, field in (("full", "text"), ("sanitized", "prompt")):
        for split, (first, count) in numbers.items():
            found[f"mbpp/{name}_{split}.jsonl"] = [
                mbpp(first + n, f"add_{n}", f"x + {n}", str(3 + n), field) for n in range(count)
            ]
    return found


def write(folder: Path, subjects: list[str]) -> Path:
    """Writes the files below `folder` and returns it."""
    for name, rows in files(subjects).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return folder
