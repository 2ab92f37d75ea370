"""lm-eval's own tasks and a user's: found by name without its slow index, their traps mended.

lm-eval parses its 14 000 YAML files to know their names, which takes up to half a minute; reading
them for their task: and group: lines takes two seconds.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any
from unittest import mock

from jdllm.tasks.graders import code
from jdllm.tasks.lm_eval import mbpp

_NAME = re.compile(r"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)
UNSAFE = (
    "task {} runs the programs that the model writes, each in a sandbox with limits on time and "
    "memory, no network and a temporary folder: pass confirm_run_unsafe_code=true to run them"
)
_TAGS = re.compile(r"""^["']?tag["']?:[ \t]*(.*(?:\n[ \t]*-[ \t]*.*)*)""", re.MULTILINE)


@functools.cache
def root() -> Path:
    """Returns the folder of lm-eval's tasks; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.origin:
        raise ModuleNotFoundError("lm-eval is not installed: python -m pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


@functools.cache
def names() -> dict[str, Path]:
    """Returns lm-eval's tasks, groups and tags with a file of each, found without parsing."""
    found: dict[str, Path] = {}
    for path in sorted(root().rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for _, name in _NAME.findall(text):
            found.setdefault(name, path)
        for tags in _TAGS.findall(text):
            for name in re.findall(r"[\w.-]{2,}", tags):
                found.setdefault(name, path)
    return found


def index(user: Path | None) -> dict[str, Any]:
    """Returns the names in a user's folder, with lm-eval's entry of each."""
    if user is None:
        return {}
    from lm_eval.tasks import TaskManager

    return dict(TaskManager(include_defaults=False, include_path=[user]).task_index)


def manager(name: str, user: Path | None) -> Any:
    """Returns a TaskManager that knows `name` and what it is made of; a user's tasks win.

    It holds the user's folder and those of lm-eval's that have the name and its members;
    everything, which is slow, only for a tag, whose members may stand anywhere.
    """
    from lm_eval.tasks import TaskManager

    own: list[str | Path] = [user] if user else []
    folders: dict[Path, None] = {}
    wanted = [name]
    while True:
        near = [names()[each] for each in wanted if each in names()]
        more = {root() / path.relative_to(root()).parts[0]: None for path in near}
        if not more.keys() - folders.keys() and folders:
            return TaskManager(include_path=own)
        folders |= more
        found = TaskManager(include_defaults=False, include_path=[*folders, *own])
        wanted = missing(found.task_index, name)
        if not wanted and found.task_index[name].kind.name == "TAG" and name not in index(user):
            return TaskManager(include_path=own)
        if not wanted:
            return found


def missing(index: dict[str, Any], name: str) -> list[str]:
    """Returns what an index of lm-eval lacks of `name` and, if it is a group, of its members."""
    entry = index.get(name)
    if entry is None:
        return [name]
    members = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or not isinstance(members, list):
        return []
    return [lack for member in members for lack in _lacking(index, member)]


def _lacking(index: dict[str, Any], member: Any) -> list[str]:
    if isinstance(member, dict):
        if isinstance(member.get("task"), list):  # a group that is defined in place
            return [lack for inner in member["task"] for lack in _lacking(index, inner)]
        member = member.get("task") or member.get("group")
    return missing(index, member)


def check(folder: Path) -> None:
    """Raises ValueError for a folder that is missing, or a YAML in it that lm-eval would skip."""
    if not folder.is_dir():
        raise ValueError(f"include_path={folder} is no folder; name the one with your YAML files")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            parse(path, functions=False)
        except Exception as error:  # lm-eval's and its parser's errors are of many kinds
            raise ValueError(f"{path} cannot be read as a task: {error}") from error


def parse(path: Path, *, functions: bool) -> dict:
    """Returns a task's config from its YAML and its includes; `functions` also imports its code."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)


def config(path: Path, name: str, confirmed: bool) -> dict:
    """Returns the config of lm-eval's or a user's task `name`, mended where FIXES has something.

    ValueError where a package that the task needs is missing, and for a task that runs programs
    unless `confirmed`: before its code is imported, which may run some.
    """
    refuse_code(parse(path, functions=False) | {"task": name}, confirmed)
    try:
        found = parse(path, functions=True)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task {name} needs a package that is not installed ({error}); "
            f"python -m pip install 'lm-eval[math]' has those of the mathematical tasks"
        ) from error
    found = {key: found[key] for key in found if key not in ("tag", "group", "task_list")}
    return _own_helpers(FIXES.get(name, dict)(found))


def refuse_code(found: dict, confirmed: bool) -> None:
    """Raises ValueError for a task that runs what the model writes, unless `confirmed`.

    It does so, too, where there is no sandbox to run it in (code.sandbox()).
    """
    if not found.get("unsafe_code"):
        return
    if not confirmed:
        raise ValueError(UNSAFE.format(found["task"]))
    code.sandbox()


def sampled(found: dict, samples: int) -> dict:
    """Returns a code task's config with several samples per document and pass@k over them."""
    if any("k" in metric for metric in found.get("metric_list", ())):  # HumanEval and its kin
        metrics = [metric | {"k": code.ks(samples)} for metric in found["metric_list"]]
        return found | {"repeats": samples, "metric_list": metrics}
    return mbpp.sampled(found, samples)


def _quick_rouge(found: dict) -> dict:
    """Makes TruthfulQA bootstrap a single score once, not a thousand times: the result is equal.

    That saves 2 seconds per document.
    """
    score = found["process_results"]
    scoring = score.__globals__["scoring"]
    once = functools.partial(scoring.BootstrapAggregator, n_samples=1)

    def process_results(doc: dict, results: list) -> dict:
        with mock.patch.object(scoring, "BootstrapAggregator", once):
            return score(doc, results)

    return found | {"process_results": process_results}


def _find_program(found: dict) -> dict:
    """Adds `extracted`: mbpp_instruct's filter loses the first word where code comes at once.

    That filter stays, under its name. The answer follows an open fence.
    """
    ours = mbpp.picking("extracted", lambda text: mbpp.program("```python\n" + text))
    return found | {"filter_list": [ours, *found["filter_list"]]}


CHECK = "{{test}}\ncheck({{entry_point}})"


def _own_helpers(found: dict) -> dict:
    """Gives HumanEval's tests the functions of the prompt that they use.

    A program has functions of the same names, too, and could judge itself by them.
    """

    def doc_to_target(doc: dict) -> str:
        before = doc["prompt"].rpartition(f"def {doc['entry_point']}(")[0]
        return f"{before}\n{doc['test']}\ncheck({doc['entry_point']})"

    humaneval = found.get("doc_to_target") == CHECK
    return found | ({"doc_to_target": doc_to_target} if humaneval else {})


FIXES = {"truthfulqa_gen": _quick_rouge, "mbpp_instruct": _find_program}
QUOTED = {
    "gsm8k": "exact_match,flexible-extract",
    "gsm8k_cot": "exact_match,flexible-extract",
    "minerva_math500": "math_verify,none",
    "truthfulqa_gen": "bleu_acc,none",
    "mbpp_instruct": "pass_at_1,extracted",
}
