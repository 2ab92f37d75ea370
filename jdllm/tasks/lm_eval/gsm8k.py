r"""GSM8K as d1 asks it (zero-shot, the answer in \boxed{}) and as dInfer asks it (four shots).

The four shots are four problems of the training split, with the worked solutions that are there.
"""

import functools
import re
from fractions import Fraction

from jdllm.tasks.graders import answers, d1

HUB = {"dataset_path": "openai/gsm8k", "dataset_name": "main"}

INSTRUCTION = (
    "You solve mathematical problems. Work this one out step by step inside "
    "<reasoning></reasoning> and then give the final answer inside \\boxed{} within "
    "<answer></answer>:\n"
    "<reasoning>\nyour steps\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>\n\n"
)
SHOTS = (
    "Angelo and Melanie",
    "Mark's basketball team",
    "Bella has two times",
    "A group of 4 fruit",
)


def gold(answer: str) -> Fraction:
    """Returns the number after #### of a GSM8K answer, with its sign.

    Raises ValueError where there is none.
    """
    value = answers.number(answer.rpartition("####")[2])
    if value is None:
        raise ValueError(f"a GSM8K answer ends in '#### number'; this is {answer[-60:]!r}")
    return value


def value(completion: str) -> Fraction | None:
    r"""Returns the number a completion answers with.

    Of the last \boxed{} or answer tag: what follows its last "=", and of several numbers the
    first. Without either: the number after the last ####, else the last one of the text.
    """
    found = answers.final(completion)
    if found is not None:
        numbers = answers.numbers(answers.words(found).rpartition("=")[2])
        if numbers:
            return numbers[0]
    _, marked, rest = completion.rpartition("####")
    numbers = answers.numbers(rest)
    return (numbers[0] if marked else numbers[-1]) if numbers else None


def grade(doc: dict, completion: str) -> dict[str, float]:
    """Returns solved (the number equals the gold one) and d1_match (d1's verdict)."""
    return {
        "solved": float(value(completion) == gold(doc["answer"])),
        "d1_match": float(d1.gsm8k_match(d1.gsm8k_truth(doc["answer"]), completion)),
    }


def shots(train: list[dict]) -> list[dict]:
    """Returns dInfer's four examples, found in the training split by how they begin.

    The worked solution ends in "The answer is N" instead of "#### N", as dInfer's do. Raises
    ValueError when one is not there.
    """
    found = []
    for start in SHOTS:
        doc = next((doc for doc in train if doc["question"].startswith(start)), None)
        if doc is None:
            raise ValueError(f"the training split of GSM8K has no problem that begins {start!r}")
        answer = re.sub(r"<<.*?>>", "", doc["answer"]).replace("####", "The answer is")
        found.append({"question": doc["question"], "answer": answer + "\n"})
    return found


def _dinfer(request: str) -> dict:
    """Returns dInfer's GSM8K: four fixed shots in one user turn, strict and flexible filters."""
    return {
        **HUB,
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n", "process_docs": lambda rows: shots(list(rows))},
        "num_fewshot": len(SHOTS),
        "doc_to_text": f"Question: {{{{question}}}}\n{request}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "max_gen_toks": 1024},  # dInfer never applies its own
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
                    },
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$", r"(?<=\d)\.0+(?!\d)"],
            }
        ],
        "metadata": {"version": 1, "quoted": "exact_match,flexible-extract"},
    }


STEPS = "Let's think step by step"
REASON = "Please reason step by step"
CONFIGS = {
    "gsm8k_llada1.5": functools.partial(_dinfer, STEPS),
    "gsm8k_llada_moe": functools.partial(_dinfer, REASON),
    "gsm8k_llada_mini": functools.partial(_dinfer, REASON),
}
