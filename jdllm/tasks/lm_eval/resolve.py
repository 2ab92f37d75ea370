"""From names to lm-eval's task objects: ours, lm-eval's own, a user's; their data; what to quote.

loaded = resolve(["gsm8k", "sudoku"], data=folder)
lm_eval.evaluator.evaluate(lm=model, task_dict=loaded, limit=limit, ...)
"""

import contextlib
import logging
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdllm.runtime.hints import asked, nearest
from jdllm.tasks import TASKS, Task
from jdllm.tasks.lm_eval import hub, ours, stock

GENERATED = 100  # documents of a generated task, where no limit is given
FEWSHOT_SEED = 1234  # lm-eval's own default
ALIASES = {"math500": "minerva_math500", "truthfulqa": "truthfulqa_gen"}
NEED_FOLDER = {  # tasks whose documents no hub has -> the file to have
    "sudoku_d1": "sudoku4x4/d1_test.jsonl",
    "countdown_d1": "countdown/d1_cd3_test.jsonl",
    "hotpotqa_sample": "hotpotqa/longbench_sample50.jsonl",
    "mmlu_sample": "mmlu/sample50.jsonl",
    "mmlu_sample_likelihood": "mmlu/sample50.jsonl",
}


def check(
    names: Sequence[str],
    *,
    data: Path | None = None,
    include_path: Path | None = None,
    prompt_file: Path | None = None,
) -> None:
    """Raises ValueError for names that resolve() could not serve, as far as the words tell.

    Files are looked for by resolve(). Takes two seconds where a name is neither ours nor the
    user's: lm-eval's are looked through.
    """
    if not all(names):
        raise ValueError(f"task={','.join(names)} must be names of tasks, with commas between")
    if len({ALIASES.get(name, name) for name in names}) < len(names):
        raise ValueError(f"task={','.join(names)} names a task twice")
    if prompt_file and len(names) > 1:
        raise ValueError(
            f"prompt_file={prompt_file} is for one task alone; task={','.join(names)} are "
            f"{len(names)}"
        )
    if include_path and not include_path.is_dir():
        return
    if include_path:
        stock.check(include_path)  # else a broken file reads as an unknown task
    users = stock.index(include_path)
    for name in names:
        if name in users:
            continue
        if name in NEED_FOLDER and data is None:
            file = NEED_FOLDER[name]
            raise ValueError(
                f"task {name} reads its documents from {file}; pass data=FOLDER with that file"
            )
        if name in TASKS or name in ours.CONFIGS or ALIASES.get(name, name) in stock.names():
            continue
        known = dict.fromkeys([*TASKS, *ours.CONFIGS, *ALIASES, *users, *stock.names()])
        hint = (near := asked(nearest(name, known))) and f"{near} "
        raise ValueError(
            f"task={name} is unknown; {hint}There are {', '.join([*TASKS, *ours.CONFIGS])}, "
            f"every task of lm-eval, and those of include_path="
        )


def resolve(
    names: Sequence[str],
    *,
    data: Path | None = None,
    include_path: Path | None = None,
    prompt_file: Path | None = None,
    shots: int | None = None,
    samples: int = 1,
    limit: int | None = None,
    seed: int = 0,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Returns tasks by name, as lm_eval.evaluate takes them: {"tasks", "groups", "group_map"}.

    A user's task of include_path wins over ours, ours over lm-eval's. Documents come from `data`
    where it has the files (hub.FILES), else from the Hugging Face hub; generated tasks draw
    `limit` of them (100) with `seed`. prompt_file holds the prompt as a Jinja template over a
    document's fields, to the letter but for one line break at its end. `shots` and `samples`
    change the number of examples, and of completions per document. With several, metrics are
    means over them, and code tasks report pass@k. ValueError for what check() refuses and, before
    any of its code is imported, for a code task that is not confirmed; FileNotFoundError where
    neither folder nor hub has the documents.
    """
    if include_path:
        stock.check(include_path)
    if data and not data.is_dir():
        raise ValueError(f"data={data} is no folder; docs/tasks.md lists the files it may hold")
    check(names, data=data, include_path=include_path, prompt_file=prompt_file)
    changes: dict[str, Any] = {} if shots is None else {"num_fewshot": shots}
    if prompt_file:
        changes["doc_to_text"] = _template(prompt_file)
    users = stock.index(include_path)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _quiet(), hub.reading(data):
        for name in (ALIASES.get(name, name) for name in names):
            config: dict | None = None
            if name in users or name not in {**TASKS, **ours.CONFIGS}:
                manager = stock.manager(name, include_path)
                entry = manager.task_index[name]
                if entry.kind.name == "TASK":
                    config = stock.config(entry.yaml_path, name, confirm_run_unsafe_code)
                else:
                    _merge(loaded, manager.load([name]), changes, samples, confirm_run_unsafe_code)
            elif name in TASKS:
                config = ours.of_task(TASKS[name], documents(TASKS[name], data, limit, seed))
            else:
                config = ours.CONFIGS[name]()
            if config is not None:
                stock.refuse_code(config | {"task": name}, confirm_run_unsafe_code)
                if prompt_file:
                    _try_prompt(prompt_file, changes, config | {"task": name})
                loaded["tasks"][name] = build(config | {"task": name} | changes, samples)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def _template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise ValueError(f"prompt_file={file} cannot be read: {error.strerror}") from None


def documents(task: Task, data: Path | None, limit: int | None, seed: int) -> list[dict]:
    """Returns the documents of one of TASKS: held-out generated ones, or those of its file."""
    if task.read is None:
        return task.generate(limit or GENERATED, seed, held_out=True)
    docs = task.read(data)
    if not docs:
        raise ValueError(f"the file of {task.name} in data={data} has no documents")
    return docs


def _try_prompt(file: Path, changes: dict, config: dict) -> None:
    """Raises ValueError, with the fields, for a template that the first document cannot fill."""
    from lm_eval.utils import apply_template

    doc = dict(build(dict(config), 1).eval_docs[0])
    try:
        apply_template(changes["doc_to_text"], doc)
    except Exception as error:  # of jinja2, which is lm-eval's choice
        raise ValueError(
            f"{file} is no prompt for task {config['task']}: {error}; it is a Jinja template over "
            f"{', '.join(doc)}"
        ) from error


def build(config: dict, samples: int = 1) -> Any:
    """Returns lm-eval's object for a config; with several samples it averages over them."""
    from lm_eval.api.task import ConfigurableTask

    class Averaged(ConfigurableTask):
        """Grades every sample of a document by itself; its metrics are the means."""

        def grade(self, doc: dict, results: list) -> list[dict[str, float]]:
            """Returns the metrics of each sample."""
            one = super().process_results
            return [one(doc, [text]) for text in results[0]]

        def process_results(self, doc: dict, results: list) -> dict[str, float]:
            grades = self.grade(doc, results)
            return {name: statistics.fmean(each[name] for each in grades) for name in grades[0]}

    if samples == 1 or config.get("output_type") != "generate_until":
        return ConfigurableTask(config=config)
    if config.get("unsafe_code"):
        return ConfigurableTask(config=stock.sampled(config, samples))
    every = {"function": "take_first_k", "k": samples}
    filters = [
        part | {"filter": [f for f in part["filter"] if f["function"] != "take_first"] + [every]}
        for part in config.get("filter_list") or [{"name": "none", "filter": []}]
    ]
    return Averaged(config=config | {"repeats": samples, "filter_list": filters})


def _merge(loaded: dict, more: Any, changes: dict, samples: int, confirmed: bool) -> None:
    """Adds the tasks of a group or tag, which take `changes` after they are made."""
    for name, task in more["tasks"].items():
        code = {"task": name, "unsafe_code": getattr(task, "UNSAFE_CODE", False)}
        stock.refuse_code(code, confirmed)
        if "doc_to_text" in changes:
            raise ValueError(f"prompt_file= is for one task; this names a group, with {name} in it")
        if samples > 1 and task.OUTPUT_TYPE == "generate_until":
            raise ValueError(f"samples={samples} is for single tasks; name {name} by itself")
        for key, value in changes.items():
            task.set_config(key=key, value=value)
    for key in loaded:
        loaded[key] |= more.get(key, {})


def quoted(task: Any) -> str:
    """Returns the "metric,filter" of lm-eval's results to quote for one of its task objects."""
    name = task.config.task
    reported = task.aggregation()
    named = (task.config.metadata or {}).get("quoted") or stock.QUOTED.get(name)
    metric, _, part = (named or f"{next(iter(reported))},{task._filters[0].name}").partition(",")
    if metric not in reported or metric == "pass_at_k":  # with several samples, pass_at_1 is pass@1
        metric = "pass@1"
    return f"{metric},{part}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides lm-eval's remarks on configs, and that transformers, which it imports, has no PyTorch.

    Errors still show.
    """
    silence = logging.getLogger("transformers")
    silence.addFilter(_has_torch)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        silence.removeFilter(_has_torch)


def _has_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not" not in str(record.msg)
