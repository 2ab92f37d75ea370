"""Every task, by name and offline: documents, prompts, and lm-eval's verdict on right and wrong.

The documents are those of tiny.py; JDLLM_DATA=FOLDER runs the same on the real files.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from jdllm.tasks import TASKS
from jdllm.tasks.lm_eval import blockinfer, mbpp, ours, resolve, stock
from tests.support import tiny

SUBJECTS = sorted(
    name.removeprefix("mmlu_")
    for name, path in stock.names().items()
    if path.parent == stock.root() / "mmlu" / "default" and path.name == f"{name}.yaml"
)
# name -> what lm-eval says of right answers, for each "metric,filter"
MINERVA = " Final Answer: The final answer is ${}$. I hope it is correct."
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
    "countdown4": {"solved,none": 1},
    "countdown4_dream": {"solved,none": 1},
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
        ("minerva", lambda: doc["solution"] + MINERVA.format(doc["answer"])),
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
    if "math" in task:
        return text.replace("{", "{7+", 1) if "boxed" in task else ""
    return text.translate(str.maketrans("0123456789", "1234567890"))


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
                (float(r.args[1].strip() in answer(r.task_name, r.doc).split("{")[-1]), True)
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


def check(name: str, folder: Path, limit: int | None, slack: float = 1e-6) -> list[str]:
    """Right answers score as RIGHT says, spoilt ones nothing of what is quoted."""
    if name == "math500":
        pytest.importorskip("math_verify", reason="lm-eval's MATH-500 needs lm-eval[math]")
    results, prompts = evaluate(name, gold, folder, limit=limit)
    top = results[resolve.ALIASES.get(name, name)]
    assert {key: top[key] for key in RIGHT[name]} == pytest.approx(RIGHT[name], rel=slack)
    spoilt, _ = evaluate(name, wrong, folder, limit=limit)
    loaded = resolve.resolve([name], data=folder, confirm_run_unsafe_code=True, limit=limit)
    for task in loaded["tasks"].values():
        key = resolve.quoted(task)
        scores = results[task.config.task][key], spoilt[task.config.task][key]
        assert scores == pytest.approx((1, 0), abs=slack), key
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
    assert check(name, folder, 5 if name in ("sudoku", "countdown", "countdown4") else None)


# How many documents are graded: programs and MATH-500's checks take a while each.
FEW = {"humaneval": 20, "humaneval_instruct": 20, "math500": 15, "mmlu": 3, "mmlu_generative": 3}


@pytest.mark.parametrize("name", RIGHT)
def test_every_task_on_the_real_files(name: str, real: Path):
    loaded = resolve.resolve([name], data=real, confirm_run_unsafe_code=True)
    for task in loaded["tasks"].values():
        task.build_all_requests()
        assert all(request.args[0].strip() for request in task.instances)
    # of the best answers of TruthfulQA a few are closer to a wrong one, in BLEU's eyes
    slack = 0.05 if name == "truthfulqa" else 1e-6
    check(name, real, FEW.get(name, 20 if "mbpp" in name else 50), slack)


def test_ours_and_the_aliases_are_all_here():
    assert {*TASKS, *ours.CONFIGS, *resolve.ALIASES} <= set(RIGHT)


# names


def refused(match: str, *names: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=match):
        resolve.resolve(names, **settings)


def test_unknown_names_are_errors_with_the_nearest(folder: Path):
    refused("task=gsm8kk is unknown; did you mean .*gsm8k", "gsm8kk")
    refused("did you mean .*sudoku", "sudokus")
    refused("names a task twice", "math500", "minerva_math500")


def test_tasks_without_a_hub_say_which_file_they_want(tmp_path: Path):
    refused("sudoku_d1 .*sudoku4x4/d1_test.jsonl; pass data=FOLDER", "sudoku_d1")
    refused("nowhere is no folder", "gsm8k", data=tmp_path / "nowhere")
    refused("task=sudoku, must be names", "sudoku", "")
    with pytest.raises(FileNotFoundError, match="not on the Hugging Face hub; data=.*holds none"):
        resolve.resolve(["hotpotqa_sample"], data=tmp_path)
    with pytest.raises(FileNotFoundError, match="sudoku4x4/d1_test.jsonl, which is not there"):
        resolve.resolve(["sudoku_d1"], data=tmp_path)


def test_without_a_folder_or_file_the_hub_is_asked(tmp_path: Path, monkeypatch):
    asked = []

    def offline(path: str, name: str | None = None, **_: Any) -> None:
        asked.append((path, name))
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="gsm8k/test.jsonl in it .no network"):
        resolve.resolve(["gsm8k"])
    with pytest.raises(FileNotFoundError, match="holds none of math500/test.jsonl"):
        resolve.resolve(["math500_boxed"], data=tmp_path)
    assert asked == [("openai/gsm8k", "main"), ("HuggingFaceH4/MATH-500", None)]


def test_a_missing_or_broken_file_is_named(folder: Path, tmp_path: Path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes((folder / "gsm8k/test.jsonl").read_bytes())
    with pytest.raises(FileNotFoundError, match="has no gsm8k/train.jsonl"):
        resolve.resolve(["gsm8k"], data=tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "x"}\n{"question"\n')
    with pytest.raises(ValueError, match="test.jsonl:2: every line must be a JSON object"):
        resolve.resolve(["gsm8k_boxed"], data=tmp_path)


@pytest.mark.parametrize("name", [n for n in RIGHT if "mbpp" in n or "humaneval" in n])
def test_programs_are_run_only_when_that_is_confirmed(name: str, folder: Path, monkeypatch):
    monkeypatch.setattr("jdllm.tasks.graders.code.run", lambda *_, **__: pytest.fail("it was run"))
    refused("confirm_run_unsafe_code=true", name, data=folder)


def test_several_tasks_at_once_and_their_lengths(folder: Path):
    loaded = resolve.resolve(["sudoku", "gsm8k", "countdown_d1"], data=folder, limit=3)
    tasks = loaded["tasks"]
    assert list(tasks) == ["sudoku", "gsm8k", "countdown_d1"]
    assert len(tasks["sudoku"].eval_docs) == 3
    again = resolve.resolve(["sudoku"], limit=3)["tasks"]["sudoku"]
    assert list(again.eval_docs) == list(tasks["sudoku"].eval_docs)


def test_a_group_has_its_members(folder: Path):
    loaded = resolve.resolve(["mmlu"], data=folder, shots=1)
    assert len(loaded["tasks"]) == len(SUBJECTS) == 57 and "mmlu_stem" in loaded["groups"]
    task = loaded["tasks"]["mmlu_anatomy"]
    task.build_all_requests()
    assert task.instances[0].args[0].count("Answer:") == 2
    refused("samples=2 is for single tasks", "mmlu_generative", data=folder, samples=2)


# shots, prompts, samples


def test_shots_are_the_tasks_own_or_those_asked_for(folder: Path):
    def prompt(name: str, **settings: Any) -> str:
        task = resolve.resolve([name], data=folder, **settings)["tasks"][name]
        task.build_all_requests()
        return task.instances[0].args[0]

    assert prompt("gsm8k").count("Question:") == 6
    assert prompt("gsm8k", shots=0).count("Question:") == 1
    assert prompt("gsm8k", shots=2) == prompt("gsm8k", shots=2)
    shown = prompt("gsm8k_llada1.5")
    order = [shown.index(start) for start in tiny.SHOTS]
    assert order == sorted(order) and "The answer is 4" in shown and "####" not in shown
    assert shown.endswith("buy 800 more. How many pears are there?\n"
                          "Let's think step by step\nAnswer:")  # fmt: skip
    shown = prompt("mbpp_sanitized", confirm_run_unsafe_code=True)
    assert shown.count("[BEGIN]") == 4 and shown.count("[DONE]") == 3


def test_a_prompt_of_the_users_own(folder: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("Now: {{question}}\nThink!\n\n")
    _, prompts = evaluate("gsm8k_boxed", gold, folder, prompt_file=file)
    question = tiny.gsm8k("Two sisters", 700, 800)["question"]
    assert prompts[0] == f"Now: {question}\nThink!\n"
    file.write_text("{{puzzle}}")
    _, prompts = evaluate("sudoku_d1", gold, folder, prompt_file=file)
    assert prompts == ["1030030100000000"]
    refused("for one task alone", "sudoku", "countdown", prompt_file=file)
    refused("none.txt cannot be read", "sudoku", prompt_file=tmp_path / "none.txt")
    file.write_text("{{nothing}} {% if %}")
    refused(f"{file}.*question", "gsm8k_boxed", data=folder, prompt_file=file)
    refused("one task; this names a group", "mmlu", data=folder, prompt_file=file)


def in_turn(*answers: Any) -> Any:
    """Right and wrong answers in turn."""
    turns = iter(range(10**6))
    return lambda task, doc: answers[next(turns) % len(answers)](task, doc)


def test_several_samples_are_averaged_or_give_pass_at_k(folder: Path):
    half = evaluate("gsm8k", in_turn(gold, wrong), folder, samples=2)[0]["gsm8k"]
    assert half["exact_match,flexible-extract"] == 0.5
    third = evaluate("gsm8k_boxed", in_turn(gold, wrong, wrong), folder, samples=3)[0]
    assert third["gsm8k_boxed"]["solved,none"] == pytest.approx(1 / 3)
    for name in ("humaneval", "mbpp", "mbpp_instruct", "mbpp_sanitized"):
        found, prompts = evaluate(name, in_turn(gold, wrong), folder, samples=2)
        settings: Any = {"samples": 2, "confirm_run_unsafe_code": True}
        key = resolve.quoted(resolve.resolve([name], data=folder, **settings)["tasks"][name])
        assert found[name][key] == 0.5, key
        assert found[name][key.replace("pass@1", "pass@2")] == 1
        assert len(prompts) == 2 * found[name]["sample_len"]


# the user's own


def test_the_users_yaml_is_found_and_wins(folder: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "task: gsm8k_boxed\ndataset_path: openai/gsm8k\ndataset_name: main\ntest_split: test\n"
        'doc_to_text: "Mine: {{question}}"\ndoc_to_target: "{{answer}}"\n'
        "output_type: generate_until\nnum_fewshot: 0\n"
        "generation_kwargs: {until: []}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "both.yaml").write_text("group: both\ntask: [gsm8k_boxed, gsm8k]\n")
    settings: Any = {"data": folder, "include_path": tmp_path}
    task = resolve.resolve(["gsm8k_boxed"], **settings)["tasks"]["gsm8k_boxed"]
    assert task.doc_to_text({"question": "x"}) == "Mine: x"
    assert list(resolve.resolve(["both"], **settings)["tasks"]) == ["gsm8k_boxed", "gsm8k"]
    refused("did you mean both", "bothh", **settings)


def test_yaml_that_cannot_be_read_is_an_error_and_not_skipped(tmp_path: Path):
    refused("is no folder", "sudoku", include_path=tmp_path / "none")
    (tmp_path / "broken.yaml").write_text("task: [unclosed\n")
    with pytest.raises(ValueError, match=r"broken.yaml cannot be read"):
        resolve.check(["theirs"], include_path=tmp_path)
    refused("broken.yaml cannot be read", "sudoku", include_path=tmp_path)


def test_dinfers_reading_of_a_program():
    closed = "Sure:\n```python\ndef f():\n    return 1\n```\nDone."
    assert mbpp.program(closed).strip() == mbpp.dinfer_program(closed).strip()
    assert mbpp.dinfer_program("[BEGIN]\n'def a\\_b(): pass'\n[DONE]") == "def a_b(): pass"
    assert mbpp.program("```\nnot python at all\n```\n```python\nx = 1\n```") == "x = 1\n"
    assert mbpp.program("[BEGIN]\nx = 1\n[DONE] y") == "\nx = 1\n"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("{B}", "B"), ("It is {A}. No: {C}", "C"), ("The answer is (D).", "D"), ("B", "B"),
        ("A dog, so answer: B", "B"), ("none", ""), ("{E}", ""),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(text: str, letter: str):
    assert blockinfer.letter(text) == letter


def test_hotpotqa_is_graded_by_words():
    doc = {"answers": ["the Grand Duke", "a duke"]}
    assert blockinfer.grade_hotpotqa(doc, "{Grand Duke!}") == {"exact_match": 1, "f1": 1}
    found = blockinfer.grade_hotpotqa(doc, "{the old grand duke}")
    assert found == {"exact_match": 0, "f1": pytest.approx(0.8)}
    assert blockinfer.grade_hotpotqa(doc, "") == {"exact_match": 0, "f1": 0}
