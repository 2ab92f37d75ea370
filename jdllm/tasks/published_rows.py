"""The published rows: LLaDA, LLaDA-1.5, Fast-dLLM, dInfer, Dream, DiffuCoder, d1 and EDIT.

Every row says where its number is from. `seen` is False where number or settings could not be
compared with the source and stand here from memory. Toolkits differ in prompts and graders: `note`
says what keeps a row from being the published one to the letter.
"""

from collections.abc import Iterator
from typing import Any

from jdllm.decode.presets import PRESETS as decoding
from jdllm.runtime.hints import asked, nearest
from jdllm.tasks.published import Preset

LLADA, LLADA_BASE = "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base"
DREAM, DREAM_BASE = "Dream-org/Dream-v0-Instruct-7B", "Dream-org/Dream-v0-Base-7B"
FLEXIBLE = "exact_match,flexible-extract"


def vanilla(length: int, block: int | None = None, steps: int | None = None, **more: Any) -> dict:
    """LLaDA's own loop: a fixed number of tokens per step, no cache."""
    fixed = {"gen_length": length, "block_length": block or length, "steps": steps or length}
    return {**fixed, "rule": "quota", "cache": "none", **more}


def _llada_base() -> Iterator[Preset]:
    source = "LLaDA, EVAL.md, lm-eval"
    tables = {1024: (49.7, 70.3, 31.4, 35.4, 40.0), 512: (50.4, 70.8, 30.9, 32.9, 39.2),
              256: (45.0, 70.0, 30.3, 32.9, 40.2)}  # fmt: skip
    tasks = {
        "bbh": "exact_match,get-answer",
        "gsm8k": FLEXIBLE,
        "minerva_math": "exact_match,none",
        "humaneval": "pass@1,create_test",
        "mbpp": "pass_at_1,none",
    }
    for length, numbers in tables.items():
        for (task, metric), number in zip(tasks.items(), numbers, strict=True):
            name = f"llada-base-{task.removeprefix('minerva_')}-{length}"
            yield Preset(
                name, LLADA_BASE, task, metric, number, source, decode=vanilla(length),
                note="shots: the task's own; the table names none",
            )  # fmt: skip
    scored = {  # task: shots, metric, published, guidance and what was published with it
        "arc_challenge": (0, "acc_norm,none", 45.9, (0.5, 47.9)),
        "hellaswag": (0, "acc_norm,none", 70.5, (0.5, 72.5)),
        "truthfulqa_mc2": (0, "acc,none", 46.1, (2.0, 46.4)),
        "winogrande": (5, "acc,none", 74.8, None),
        "gpqa_main_n_shot": (5, "acc_norm,none", 25.2, (0.5, 26.1)),
        "piqa": (0, "acc_norm,none", 73.6, (0.5, 74.4)),
        "mmlu": (5, "acc,none", 65.9, None),
        "cmmlu": (5, "acc,none", 69.9, None),
        "ceval-valid": (5, "acc,none", 70.5, None),
    }
    for task, (shots, metric, number, guided) in scored.items():
        drawn = {"mc_num": 1 if task in ("mmlu", "cmmlu", "ceval-valid") else 128}
        note = "acc or acc_norm: the table does not say" if "norm" in metric else ""
        yield Preset(
            f"llada-base-{task}", LLADA_BASE, task, metric, number, source, shots,
            likelihood=drawn, note=note,
        )  # fmt: skip
        if guided:
            yield Preset(
                f"llada-base-{task}-cfg", LLADA_BASE, task, metric, guided[1], source, shots,
                likelihood=drawn | {"cfg_scale": guided[0]}, note=note,
            )  # fmt: skip


def _llada_instruct() -> Iterator[Preset]:
    source = "LLaDA, EVAL.md, internal toolkit"
    other = "published with LLaDA's internal toolkit (OpenCompass: {}), whose prompts differ"
    late = {"confidence_eos_eot_inf": True}
    rows = [  # task, metric, length, block, flags, published, by OpenCompass
        ("mmlu", "mmlu_generative", "exact_match,get_response", 3, 3, {}, 65.5, 65.4),
        ("mmlu_pro", "mmlu_pro", "exact_match,custom-extract", 256, 256, {}, 37.0, 36.6),
        ("hellaswag", "hellaswag", "acc,none", 3, 3, {}, 74.6, 75.3),
        ("arc", "arc_challenge_chat", "exact_match,remove_whitespace", 512, 512, {}, 88.5, 89.2),
        ("gsm8k", "gsm8k", FLEXIBLE, 512, 512, late, 69.4, 68.8),
        ("math", "minerva_math", "exact_match,none", 512, 512, late, 31.9, 29.6),
        ("gpqa", "gpqa_main_generative_n_shot", FLEXIBLE, 64, 64, late, 33.3, 32.3),
        ("humaneval", "humaneval_instruct", "pass@1,create_test", 512, 512,
         {"logits_eos_inf": True}, 49.4, 47.0),
        ("mbpp", "mbpp_instruct", "pass_at_1,extract_code", 256, 256, late, 41.0, 39.6),
        ("gsm8k-blocks", "gsm8k", FLEXIBLE, 256, 8, {}, 78.6, 78.9),
        ("math-blocks", "minerva_math", "exact_match,none", 512, 64, {}, 42.2, 42.7),
    ]  # fmt: skip
    for name, task, metric, length, block, flags, number, second in rows:
        note = other.format(second)
        if task == "hellaswag":
            note += "; there the letter is generated, lm-eval's task scores likelihoods"
        yield Preset(
            f"llada-instruct-{name}", LLADA, task, metric, number, source, chat=True,
            decode=vanilla(length, block, **flags), note=note,
        )  # fmt: skip
    rows = [
        ("gsm8k", "gsm8k", FLEXIBLE, 256, 16, True, 83.8, 83.6),
        ("math", "minerva_math", "exact_match,none", 1024, 128, True, 42.6, 42.3),
        ("gpqa", "gpqa_main_generative_n_shot", FLEXIBLE, 256, 16, False, 36.9, 34.8),
        ("humaneval", "humaneval_instruct", "pass@1,create_test", 512, 32, True, 52.4, 51.2),
        ("mbpp", "mbpp_instruct", "pass_at_1,extract_code", 512, 32, True, 42.8, 42.6),
        ("ifeval", "ifeval", "prompt_level_strict_acc,none", 256, 16, True, 66.2, 65.2),
    ]
    for name, task, metric, length, block, flag, number, second in rows:
        yield Preset(
            f"llada1.5-{name}", "GSAI-ML/LLaDA-1.5", task, metric, number, source, chat=True,
            decode=vanilla(length, block, **(late if flag else {})), note=other.format(second),
        )  # fmt: skip


def _fast_dllm() -> Iterator[Preset]:
    ways = {
        "vanilla": lambda length: vanilla(length, 32),
        "prefix": lambda length: vanilla(length, 32, cache="prefix"),
        "parallel": lambda length: _threshold(length, "none"),
        "prefix-parallel": lambda length: _threshold(length, "prefix"),
    }
    tables = {  # (accuracy, tokens per second) of the four ways
        ("gsm8k", 256): ((79.3, 6.73), (79.5, 21.2), (79.2, 16.5), (78.5, 54.4)),
        ("gsm8k", 512): ((77.5, 3.23), (77.0, 10.4), (77.6, 18.6), (77.2, 35.3)),
        ("humaneval", 256): ((41.5, 30.5), (42.7, 40.7), (43.9, 101.5), (43.3, 114.1)),
        ("humaneval", 512): ((43.9, 18.4), (45.7, 29.3), (43.3, 57.1), (44.5, 73.7)),
    }
    for (task, length), numbers in tables.items():
        for (way, settings), (number, speed) in zip(ways.items(), numbers, strict=True):
            yield Preset(
                f"fast-dllm-{task}-{length}-{way}",
                LLADA,
                task,
                FLEXIBLE if task == "gsm8k" else "pass@1,create_test",
                number,
                "Fast-dLLM, README",
                5 if task == "gsm8k" else 0,
                chat=True,
                decode=settings(length),
                tokens_per_second=speed,
                note="batch 1 (an A100 of 80 GB, from memory)"
                + ("; programs were repaired by a script afterwards" * (task == "humaneval")),
            )


def _threshold(length: int, cache: str) -> dict[str, Any]:
    return {"gen_length": length, "block_length": 32, "threshold": 0.9, "cache": cache}


def _dinfer() -> Iterator[Preset]:
    models = {
        "llada1.5": "GSAI-ML/LLaDA-1.5",
        "llada_moe": "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
        "llada_mini": "inclusionAI/LLaDA2.0-mini-preview",
    }
    near = {"vicinity.before": 16, "vicinity.after": 16, "vicinity.warmup": 4}
    for short, model in models.items():
        decode = {
            "gen_length": 1024,
            "block_length": 64,
            "rule": "hierarchy",
            "threshold": 0.92,
            "low_threshold": 0.62,
            "cache": "dual",
            "stop": "eos_fill",
            **near,
        }
        if short == "llada_moe":
            decode["smooth.weight"] = 0.3
        if short == "llada_mini":
            decode = {"gen_length": 2048, "block_length": 32, "cache": "block", "rule": "hierarchy",
                      "threshold": 0.8, "low_threshold": 0.62, "stop": "eos_fill"}  # fmt: skip
        for task, metric in (("gsm8k", FLEXIBLE), ("mbpp_sanitized", "pass@1,dinfer")):
            yield Preset(
                f"dinfer-{task}-{short}", model, f"{task}_{short}", metric, None,
                "dInfer, evaluation scripts", chat=True, decode=decode, seen=False,
                note="settings of its documentation; its accuracy table was not at hand",
            )  # fmt: skip
        if short == "llada_moe":
            yield Preset(
                "dinfer-humaneval-speed", model, "humaneval_instruct", "tokens_per_second", 1100,
                "dInfer, README and arXiv 2510.08666: more than this", chat=True, decode=decode,
                note="batch 1 on 8 H800; the average over six benchmarks is above 800",
            )  # fmt: skip


def _dream() -> Iterator[Preset]:
    source = "Dream, arXiv 2508.15487, as the dllm repository reports it"
    rows = [  # task, metric, length, shots, published
        ("mmlu", "mmlu_generative", "exact_match,get_response", 128, 4, 67.0),
        ("mmlu_pro", "mmlu_pro", "exact_match,custom-extract", 128, 4, 43.3),
        ("gsm8k", "gsm8k_cot", FLEXIBLE, 256, 0, 81.0),
        ("math", "minerva_math", "math_verify,none", 512, 0, 39.2),
        ("humaneval", "humaneval_instruct", "pass@1,create_test", 768, 0, 55.5),
        ("mbpp", "mbpp_instruct", "pass_at_1,extract_code", 1024, 0, 58.8),
        ("ifeval", "ifeval", "prompt_level_strict_acc,none", 1280, 0, 62.5),
    ]
    for name, task, metric, length, shots, number in rows:
        yield Preset(
            f"dream-instruct-{name}", DREAM, task, metric, number, source, shots, chat=True,
            decode=timesteps(length, temperature=0.1, top_p=0.9),
            note="settings of Dream's evaluation script",
        )  # fmt: skip
    yield Preset(
        "dream-instruct-gpqa", DREAM, "gpqa_main_n_shot", "acc_norm,none", 33.0, source, 5,
        chat=True, likelihood={"estimator": "bernoulli"},
    )  # fmt: skip
    rows = [
        ("gsm8k", "gsm8k_cot", FLEXIBLE, 256, 8, 0.0, 77.2),
        ("math", "minerva_math", "math_verify,none", 512, 4, 0.0, 39.6),
        ("humaneval", "humaneval", "pass@1,create_test", 512, 0, 0.2, 57.9),
        ("mbpp", "mbpp", "pass_at_1,none", 512, 3, 0.2, 56.2),
    ]
    for name, task, metric, length, shots, temperature, number in rows:
        yield Preset(
            f"dream-base-{name}", DREAM_BASE, task, metric, number, source, shots,
            decode=timesteps(length, temperature=temperature, top_p=0.95), seen=False,
            note="the number is the paper's; lengths, shots and temperature from memory",
        )  # fmt: skip
    scored = {"mmlu": (5, 69.5), "arc_challenge": (0, 59.9), "arc_easy": (0, 83.9),
              "hellaswag": (0, 73.3), "winogrande": (5, 74.8), "piqa": (0, 75.8),
              "gpqa_main_n_shot": (5, 36.6), "race": (0, 44.7)}  # fmt: skip
    for task, (shots, number) in scored.items():
        norm = task in ("arc_challenge", "arc_easy", "hellaswag", "piqa", "gpqa_main_n_shot")
        yield Preset(
            f"dream-base-{task}", DREAM_BASE, task, "acc_norm,none" if norm else "acc,none",
            number, source, shots, likelihood={"estimator": "bernoulli"}, seen=False,
            note="the number is the paper's; shots and metric from memory",
        )  # fmt: skip


def timesteps(length: int, **more: Any) -> dict[str, Any]:
    """Dream's own loop: the most certain positions by entropy, as many as its timesteps ask."""
    fixed = {"remasking": "entropy", "schedule": "timesteps", "eps": 1e-3}
    return vanilla(length, **fixed, sampling="categorical", **more)


def _diffucoder() -> Iterator[Preset]:
    tasks = {
        "humaneval": "pass@1,create_test",
        "humaneval_plus": "pass@1,create_test",
        "mbpp": "pass_at_1,none",
        "mbpp_plus": "pass_at_1,none",
    }
    for short, numbers in {
        "base": (67.1, 60.4, 74.2, 60.9),
        "instruct": (72.0, 65.2, 75.1, 61.9),
        "cpgrpo": (73.2, 68.3, 78.6, 67.5),
    }.items():
        full = {"base": "Base", "instruct": "Instruct", "cpgrpo": "cpGRPO"}[short]
        for (task, metric), number in zip(tasks.items(), numbers, strict=True):
            yield Preset(
                f"diffucoder-{short}-{task}",
                f"apple/DiffuCoder-7B-{full}",
                task,
                metric,
                number,
                "DiffuCoder, arXiv 2506.20639, table 1",
                chat=short != "base",
                decode=timesteps(512, temperature=0.2, top_p=0.95),
                seen=False,
                note="graded with EvalPlus's prompts there; 512 tokens and steps from memory",
            )


def _d1_and_edit() -> Iterator[Preset]:
    tasks = {
        "gsm8k_boxed": "d1_match,none",
        "math500_boxed": "d1_match,none",
        "countdown_d1": "d1_match,none",
        "sudoku_d1": "d1_cells,none",
    }
    baseline = {  # per task: 128, 256, 512 tokens
        "gsm8k_boxed": (69.29, 76.37, 78.14),
        "math500_boxed": (26.00, 32.40, 36.20),
        "countdown_d1": (20.70, 19.53, 16.02),
        "sudoku_d1": (11.72, 6.69, 5.47),
    }
    edit = {
        "gsm8k_boxed": (67.32, 77.56, 76.19),
        "math500_boxed": (27.40, 32.80, 36.60),
        "countdown_d1": (28.91, 31.64, 27.73),
        "sudoku_d1": (16.11, 11.28, 7.57),
    }
    wording = "prompts are worded differently (prompt_file= takes the original)"
    drawn = {"sudoku_d1": "; 256 of the 500 puzzles were drawn"}
    part = {"gsm8k_boxed": "; 1130 of the 1319 problems are in d1's files", **drawn}
    lost = "; it needs an adapter with its dynamics: EDIT's checkpoint 200 is not public"
    for system, numbers, block, model in (
        ("d1", baseline, 32, LLADA),
        ("edit", edit, 64, LLADA),
    ):
        for task, row in numbers.items():
            for length, number in zip((128, 256, 512), row, strict=True):
                short = task.removesuffix("_boxed").removesuffix("_d1")
                yield Preset(
                    f"{system}-{short}-{length}",
                    model,
                    task,
                    tasks[task],
                    number,
                    f"{system.upper() if system == 'edit' else system}'s published generations, "
                    "counted by its parser",
                    0,
                    chat=True,
                    decode=decoding.get(f"{system}-{short}-{length}")
                    or vanilla(length, block, length // 2),
                    note=wording
                    + (part if system == "d1" else drawn).get(task, "")
                    + (lost if system == "edit" else ""),
                )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for rows in (_llada_base, _llada_instruct, _fast_dllm, _dinfer, _dream, _diffucoder,
                 _d1_and_edit)
    for preset in rows()
}  # fmt: skip


def find(name: str) -> Preset:
    """The row of a name; ValueError, with those that begin so or are near, where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = asked(nearest(name, PRESETS, most=len(PRESETS)))
    families = dict.fromkeys(each.split("-")[0] for each in PRESETS)
    hint = near and f"{near} "
    raise ValueError(
        f"preset={name} is unknown. {hint}preset=NAME lists those that begin with NAME, which is "
        f"one of {', '.join(families)}"
    )
