"""Every task, by name and offline: documents, prompts, and lm-eval's verdict on right and wrong.

The documents are those of tiny.py; JDLLM_DATA=FOLDER runs the same on the real files.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jdllm.tasks import TASKS, hub, ours, resolve, stock
from tests import tiny

SUBJECTS = sorted(
    name.removeprefix("mmlu_")
    for name, path in stock.names().items()
    if path.parent == stock.root() / "mmlu" / "default" and path.name == f"{name}.yaml"
)
# name -> what lm-eval says of right answers, for each "metric,filter"
RIGHT: dict[str, dict[str, float]] = {
    "gsm8k": {"exact_match,strict-match": 1, "exact_match,flexible-extract": 1},
    "gsm8k_cot": {"exact_match,strict-match": 1, "exact_match,flexible-extract": 1},
    "math500": {"exact_match,none": 1, "math_verify,none": 1},
    "humaneval": {"pass@1,create_test": 1},
    "humaneval_instruct": {"pass@1,create_test": 1},
    "mbpp": {"pass_at_1,none": 1},
    # lm-eval's own filter takes the "def" of an answer that starts with it for a language
    "mbpp_instruct": {"pass_at_1,extracted": 1, "pass_at_1,extract_code": 0},
    "truthfulqa": {"bleu_acc,none": 1, "rougeL_acc,none": 1, "rouge1_max,none": 100},
    "mmlu": {"acc,none": 1},
    "mmlu_generative": {"exact_match,get_response": 1},
    "sudoku": {"solved,none": 1, "exact_match,none": 1, "cell_acc,none": 1},
    "countdown": {"solved,none": 1, "exact_match,none": 1},
    "sudoku_d1": {"solved,none": 1, "d1_cells,none": 1},
    "countdown_d1": {"solved,none": 1, "d1_match,none": 1},
    "gsm8k_boxed": {"solved,none": 1},
    "math500_boxed": {"solved,none": 1},
    "mbpp_sanitized": {"pass@1,extracted": 1, "pass@1,raw": 1},
    "hotpotqa_sample": {"exact_match,none": 1, "f1,none": 1},
    "mmlu_sample": {"exact_match,none": 1},
    "mmlu_sample_likelihood": {"acc,none": 1},
    **{f"gsm8k_{name}": {"exact_match,flexible-extract": 1} for name in ("llada1.5", "llada_moe")},
    "gsm8k_llada_mini": {"exact_match,flexible-extract": 1, "exact_match,strict-match": 1},
    **{
        f"mbpp_sanitized_{name}": {"pass@1,extracted": 1, "pass@1,dinfer": 1}
        for name in ("llada1.5", "llada_moe", "llada_mini")
    },
}


def gold(task: str, doc: dict) -> str:
    """An answer that is right."""
    for start, answer in (
        ("gsm8k_cot", lambda: f"The answer is {doc['answer'].split('####')[1].strip()}."),
        ("gsm8k_boxed", lambda: rf"\boxed{{{doc['answer'].split('####')[1].strip()}}}"),
        ("gsm8k", lambda: doc["answer"]),
        ("minerva", lambda: f"{doc['solution']} Final Answer: The final answer is ${doc['answer']}$."
         " I hope it is correct."),
        ("math500", lambda: rf"\boxed{{{doc['answer']}}}"),
        ("humaneval", lambda: doc["canonical_solution"]),
        ("mbpp_sanitized_", lambda: f"Here:\n```python\n{doc['code']}\n```\nDone."),
        ("mbpp_instruct", lambda: doc["code"] + "\n```"),
        ("mbpp", lambda: doc["code"]),
        ("truthfulqa", lambda: doc["best_answer"]),
        ("mmlu_sample", lambda: f"So it is {{{'ABCD'[doc['answer']]}}}"),
        ("mmlu", lambda: "ABCD"[doc["answer"]]),
        ("hotpotqa", lambda: f"{{{doc['answers'][0]}}}"),
    ):  # fmt: skip
        if task.startswith(start):
            return answer()
    return TASKS[task].response(doc) if task != "sudoku_d1" else doc["solution"]


def wrong(task: str, doc: dict) -> str:
    """The right answer, spoilt."""
    text = gold(task, doc)
    if "humaneval" in task or "mbpp" in task:
        return text.replace("return", "return not")
    if "truthfulqa" in task:
        return doc["incorrect_answers"][0]
    if "mmlu" in task:
        letter = "ABCD"[doc["answer"]]
        return text.replace(letter, "ABCD"[doc["answer"] - 1])
    if "hotpotqa" in task:
        return "{nobody at all}"
    return "" if "minerva" in task else text.translate(str.maketrans("0123456789", "5555555550"))


def dummy(answer: Any, prompts: list[str]) -> Any:
    """An lm-eval model that answers with answer(task, doc) and keeps the prompts."""
    from lm_eval.api.model import LM

    class Dummy(LM):
        def generate_until(self, requests: list) -> list[str]:
            found = []
            for request in requests:
                prompts.append(request.args[0])
                text = answer(request.task_name, request.doc)
                for stop in request.args[1]["until"]:
                    text = text.split(stop)[0]
                found.append(text)
            return found

        def loglikelihood(self, requests: list) -> list:
            prompts.extend(request.args[0] for request in requests)
            return [
                (float(answer(r.task_name, r.doc).strip("So it is{}") == r.args[1].strip()), True)
                for r in requests
            ]

        def loglikelihood_rolling(self, requests: list) -> list:
            raise NotImplementedError

    return Dummy()


def evaluate(name: str, answer: Any, folder: Path, **settings: Any) -> tuple[dict, list[str]]:
    """lm-eval's results of a task, and the prompts it built."""
    from lm_eval.evaluator import evaluate as run

    limit = settings.pop("limit", None)
    settings.setdefault("confirm_run_unsafe_code", True)
    loaded: Any = resolve.resolve([name], data=folder, limit=limit, **settings)
    prompts: list[str] = []
    results: Any = run(
        lm=dummy(answer, prompts),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    return results["results"], prompts


def check(name: str, folder: Path, limit: int | None) -> list[str]:
    """Right answers score as RIGHT says, spoilt ones nothing of what is quoted."""
    if name == "math500":
        pytest.importorskip("math_verify", reason="lm-eval's MATH-500 needs lm-eval[math]")
    results, prompts = evaluate(name, gold, folder, limit=limit)
    top = results[resolve.ALIASES.get(name, name)]
    assert {key: top[key] for key in RIGHT[name]} == pytest.approx(RIGHT[name])
    spoilt, _ = evaluate(name, wrong, folder, limit=limit)
    loaded = resolve.resolve([name], data=folder, confirm_run_unsafe_code=True, limit=limit)
    for task in loaded["tasks"].values():
        key = resolve.quoted(task)
        assert (results[task.config.task][key], spoilt[task.config.task][key]) == (1, 0), key
    return prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("data"), SUBJECTS)


@pytest.fixture(scope="module")
def real() -> Path:
    if not os.environ.get("JDLLM_DATA"):
        pytest.skip("JDLLM_DATA is unset: it names the folder with the real files")
    return Path(os.environ["JDLLM_DATA"])


@pytest.mark.parametrize("name", RIGHT)
def test_every_task_offline(name: str, folder: Path):
    assert check(name, folder, 5 if name in ("sudoku", "countdown") else None)


# How many documents are graded: programs and MATH-500's checks take a while each.
FEW = {"humaneval": 20, "humaneval_instruct": 20, "math500": 15, "truthfulqa": 40}


@pytest.mark.parametrize("name", RIGHT)
def test_every_task_on_the_real_files(name: str, real: Path):
    loaded = resolve.resolve([name], data=real, confirm_run_unsafe_code=True)
    for task in loaded["tasks"].values():
        task.build_all_requests()
        assert all(request.args[0].strip() for request in task.instances)
    check(name, real, FEW.get(name, 20 if "mbpp" in name else 50))


def test_ours_and_the_aliases_are_all_here():
    assert {*TASKS, *ours.CONFIGS, *resolve.ALIASES} <= set(RIGHT)
