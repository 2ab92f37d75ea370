"""Plans of a sweep: models x tasks x decode settings, from a file or under a name."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from jdllm.decode import DecodeConfig
from jdllm.evaluation.settings import decode_config


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: every model on every task with every setting."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    settings: tuple[DecodeConfig, ...]


def _quota(gen_length: int, block_length: int, tokens: int, **more: Any) -> dict[str, Any]:
    """A fixed number of tokens per step; the last step of a block takes what is left."""
    steps = gen_length // block_length * -(-block_length // tokens)
    lengths = {"gen_length": gen_length, "block_length": block_length}
    return lengths | {"rule": "quota", "steps": steps} | more


# The same keys as a plan file: models, tasks, settings (a list) and grid (lists by setting, all
# combinations of which are settings too).
BUILT_IN: dict[str, dict[str, Any]] = {
    # twelve settings of the bundled model: tokens per step, threshold, block, cache
    "bundled": {
        "models": ["bundled"],
        "tasks": ["sudoku", "countdown"],
        "settings": [
            *(_quota(40, 40, tokens, cache="none") for tokens in (1, 2, 4, 8)),
            {"gen_length": 40, "block_length": 40, "rule": "factor", "cache": "none"},
            *(
                {"gen_length": 40, "block_length": 40, "threshold": t, "cache": "none"}
                for t in (0.9, 0.7, 0.5)
            ),
            *(
                {"gen_length": 40, "block_length": 8, "threshold": t, "cache": cache}
                for t, cache in ((0.9, "none"), (0.9, "prefix"), (0.9, "dual"), (0.5, "dual"))
            ),
        ],
    },
    # dllmexp: four models, four tasks, one to three tokens per step (48 runs)
    "dllmexp": {
        "models": [
            "Dream-org/Dream-v0-Instruct-7B",
            "GSAI-ML/LLaDA-8B-Instruct",
            "GSAI-ML/LLaDA-1.5",
            "apple/DiffuCoder-7B-cpGRPO",
        ],
        "tasks": ["humaneval", "mbpp", "gsm8k", "truthfulqa"],
        "settings": [_quota(512, 64, tokens, cache="none") for tokens in (1, 2, 3)],
    },
    # what jdllm.tune tries on any model, its own lengths kept
    "tune": {
        "models": ["bundled"],
        "tasks": ["sudoku"],
        "settings": [{"rule": "quota", "cache": "none"}],
        "grid": {"threshold": [0.95, 0.9, 0.8, 0.7, 0.5], "cache": ["none", "prefix", "dual"]},
    },
}


def read_plan(name: str) -> Plan:
    """The plan of that name, or in that YAML or JSON file.

    ValueError, naming what is wrong, for an unknown name, an unreadable file, an unknown key or a
    setting that is none.
    """
    facts = BUILT_IN.get(name)
    if facts is None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(
                f"plan={name} is neither a file nor one of {', '.join(BUILT_IN)}, edit"
            )
        try:
            facts = json.loads(path.read_text()) if path.suffix == ".json" else _yaml(path)
        except ValueError as error:
            raise ValueError(f"plan={name} cannot be read: {error}") from None
    return make_plan(facts, name)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def make_plan(facts: Any, name: str) -> Plan:
    """A plan from JSON-like facts; ValueError as in `read_plan`."""
    known = {"models", "tasks", "settings", "grid"}
    if not isinstance(facts, dict) or not set(facts) <= known:
        raise ValueError(f"plan={name} must be an object with {', '.join(sorted(known))}")
    settings = list(facts.get("settings", []))
    grid: dict[str, list[Any]] = facts.get("grid", {})
    if grid:
        settings += [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
    configs = [decode_config(one, f"plan={name}") for one in settings]
    if len(set(configs)) < len(configs):
        raise ValueError(f"plan={name} names a setting twice")
    models, tasks = tuple(facts.get("models", ["bundled"])), tuple(facts.get("tasks", []))
    if not (models and tasks and configs):
        raise ValueError(f"plan={name} needs at least one of each: models, tasks, settings or grid")
    return Plan(models, tasks, tuple(configs))
