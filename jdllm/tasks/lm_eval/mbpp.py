"""MBPP's sanitized problems: three-shot as lm-eval asks the full ones, and as dInfer asks them.

Programs are graded by code.py. Where the reference's way of finding the program in a completion
differs from ours, both verdicts are reported, as filters of one metric.
"""

import ast
import re
from typing import Any

from jdllm.tasks.graders import code

HUB = {"dataset_path": "google-research-datasets/mbpp", "dataset_name": "sanitized"}
SPLITS = ("prompt", "test", "validation", "train")

_FENCE = re.compile(r"```(?:[pP]ython3?)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)
_QUOTED = re.compile(r"\[?BEGIN\]?\s*'?(.*?)'?\s*\[?DONE\]?", re.DOTALL)


def program(completion: str) -> str:
    """Returns the program in a completion: the first fenced block of Python, else the first.

    Without a fence: everything up to [DONE], from [BEGIN] on where that stands.
    """
    blocks = _FENCE.findall(completion)
    if blocks:
        return next((block for block in blocks if _parses(block)), blocks[0])
    return completion.partition("[DONE]")[0].rpartition("[BEGIN]")[2].split("```")[0]


def _parses(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def dinfer_program(completion: str) -> str:
    r"""Returns the program as dInfer's filter finds it: the first closed fence, or all without one.

    Of that what stands between BEGIN and DONE, cut at the next fence; \_ becomes _.
    """
    fenced = re.search(r"```(?:python)?\s*\n(.*?)```", completion, re.DOTALL)
    text = fenced[1] if fenced else completion
    quoted = _QUOTED.search(text)
    text = quoted[1] if quoted else text
    return text.split("```")[0].replace("\\_", "_")


def tests(doc: dict) -> str:
    """Returns the assertions of a document, after the imports they need."""
    return "\n".join([*doc.get("test_imports", []), *doc["test_list"]])


def grade(doc: dict, results: list) -> dict[str, float]:
    """Returns pass@k of the programs that a filter found in a document's completions."""
    imports = "\n".join(doc.get("test_imports", []))
    found = results[0] if isinstance(results[0], list) else [results[0]]
    return code.scores([f"{imports}\n{text}" for text in found], tests(doc))


def picking(name: str, find) -> dict:
    """Returns an lm-eval filter that applies `find` to every sample of every document."""
    return {
        "name": name,
        "filter": [
            {
                "function": "custom",
                "filter_fn": lambda samples, docs: [[find(t) for t in row] for row in samples],
            }
        ],
    }


def sampled(config: dict, samples: int) -> dict:
    """Returns the config with several samples per document and pass@k over them."""
    return config | {
        "repeats": samples,
        "process_results": grade,
        "filter_list": config.get("filter_list") or [picking("none", str)],
        "metric_list": [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True}
            for k in code.ks(samples)
        ],
    }


_CODE = {
    "output_type": "generate_until",
    "test_split": "test",
    "unsafe_code": True,
    "doc_to_target": "{{test_list | join('\n')}}",
}


def sanitized() -> dict:
    """Returns MBPP with three shots (problems 2, 3, 4), [BEGIN] and [DONE], as in lm-eval."""
    config = {
        **HUB,
        **_CODE,
        "doc_to_text": (
            "You are an expert Python programmer, and here is your task: {{prompt}} "
            "Your code should pass these tests:\n\n{{test_list | join('\n')}}\n[BEGIN]\n"
        ),
        "target_delimiter": "",
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n", "doc_to_target": "{{code}}\n[DONE]"},
        "num_fewshot": 3,
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 512},
        "filter_list": [picking("extracted", program), picking("raw", str)],
        "metadata": {"version": 1, "quoted": "pass@1,extracted"},
    }
    return sampled(config, 1)


def whole(**_) -> dict:
    """Returns all 427 sanitized problems, of every split, in the order of their numbers."""
    import datasets

    found: Any = datasets.load_dataset(path=HUB["dataset_path"], name=HUB["dataset_name"])
    rows: list[dict] = [row for split in SPLITS for row in found[split]]
    return {"test": datasets.Dataset.from_list(sorted(rows, key=lambda row: row["task_id"]))}


def _dinfer() -> dict:
    """Returns MBPP without examples, which asks for a fenced block, over all problems."""
    config = {
        **_CODE,
        "custom_dataset": whole,
        "doc_to_text": (
            "You are an expert Python programmer, and here is your task:\n{{prompt}}\n\n"
            "Your code has to pass these tests:\n{{test_list | join('\n')}}\n\n"
            "Write the code inside one block that starts with ```python and ends with ```.\n"
        ),
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "max_gen_toks": 1024},  # dInfer never applies its own
        "filter_list": [picking("extracted", program), picking("dinfer", dinfer_program)],
        "metadata": {"version": 1, "quoted": "pass@1,extracted"},
    }
    return sampled(config, 1)


CONFIGS = {
    "mbpp_sanitized": sanitized,
    **dict.fromkeys(
        ("mbpp_sanitized_llada1.5", "mbpp_sanitized_llada_moe", "mbpp_sanitized_llada_mini"),
        _dinfer,
    ),
}
