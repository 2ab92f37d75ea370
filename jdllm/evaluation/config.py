"""What an evaluation runs, as commands set it: a model, tasks, and how to decode or score."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jdllm.arguments import SpreadArgs
from jdllm.decode import DecodeConfig
from jdllm.evaluation.settings import check_verifier, read_decode
from jdllm.runtime.fields import leaves
from jdllm.runtime.journal import going_on
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.tasks.lm_eval import resolve
from jdllm.tasks.published_rows import PRESETS, find


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArgs(SpreadArgs):
    """A model on tasks."""

    task: str = "sudoku"
    """One or more, separated by commas: ours (docs/tasks.md), lm-eval's, those of include_path."""
    limit: int | None = None
    """Documents of each task (default: 100 generated ones, or the whole file)."""
    data: Path | None = None
    """Folder with the documents' files; what it does not have comes from the Hugging Face hub."""
    include_path: Path | None = None
    """Folder with lm-eval YAML files of your own, which win over tasks of the same name."""
    prompt_file: Path | None = None
    """The prompt of the task: a Jinja template over a document's fields."""
    shots: int | None = None
    """Examples in the prompt (default: the task's own)."""
    chat: bool | None = None
    """Whether prompts are framed by the model's chat template, if it has one (default: yes)."""
    confirm_run_unsafe_code: bool = False
    """Run the programs that the model writes: HumanEval, MBPP and their kin need it."""
    batch_size: int = 32
    """Most rows of a batch."""

    def check_tasks(self, names: Sequence[str]) -> None:
        """ValueError for settings that cannot be, and for tasks that there are not."""
        if self.data and not self.data.is_dir():
            raise ValueError(f"data={self.data} is no folder; name the one with the tasks' files")
        resolve.check(
            names,
            data=self.data,
            include_path=self.include_path,
            prompt_file=self.prompt_file,
        )
        for name in ("limit", "batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        if (self.shots or 0) < 0:
            raise ValueError(f"shots={self.shots} must be 0 or more")

    def load_task(self, name: str, samples: int = 1) -> dict[str, Any]:
        """lm-eval's task objects for one name; errors as from resolve.resolve."""
        return resolve.resolve(
            [name],
            data=self.data,
            include_path=self.include_path,
            prompt_file=self.prompt_file,
            shots=self.shots,
            samples=samples,
            limit=self.limit,
            seed=self.seed,
            confirm_run_unsafe_code=self.confirm_run_unsafe_code,
        )

    def shared(self) -> dict[str, Any]:
        """What this class and those below it declare, for another command that extends it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(TaskArgs)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(TaskArgs):
    """Evaluation of a model on one or more tasks."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {n: row.settings for n, row in PRESETS.items()}

    preset: str = ""
    """A published table row (docs/tasks.md): what it fixes, its model too, where none is given."""
    decode: DecodeConfig = DecodeConfig()
    decode_file: Path | None = None
    """JSON with decode settings, as jdllm.tune writes it; decode.* changes them."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
    samples: int = 1
    """Completions of each document; metrics are means (one is enough without temperature)."""
    dry_run: bool = False
    """Say what would be done, without weights: prompts, model calls at most, memory."""
    output: Path | None = None
    """Folder for results.json and samples.jsonl (default: print only).

    What is finished is kept there at once: run the same command again to go on after a kill.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.preset and self.decode_file:
            raise ValueError("preset and decode_file both set how to decode; leave one out")
        self.check_tasks(self.tasks)
        if self.output and self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output={self.output} is a file; name a folder")
        check_verifier(self.verifier, [self.settings])
        if self.preset.startswith("edit-"):
            self.check_edit()
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be 1 or more")

    def check_edit(self) -> None:
        """ValueError where one of EDIT's presets is used for another task or length.

        Their thresholds were chosen for each.
        """
        kind, _, length = self.preset.removeprefix("edit-").rpartition("-")
        for name in self.tasks:
            if name.removesuffix("_boxed").removesuffix("_d1") != kind:
                raise ValueError(
                    f"preset={self.preset} has thresholds that were chosen for {kind}, not for "
                    f"task={name}; use a preset of that task, or set decode.exit.* yourself"
                )
        own = self.settings
        if (own.gen_length or 0) != int(length):
            raise ValueError(
                f"preset={self.preset} has thresholds and blocks for {length} columns, not for "
                f"decode.gen_length={own.gen_length}; use edit-{kind}-{own.gen_length} if there "
                "is one, or set decode.* yourself"
            )

    @property
    def departures(self) -> list[str]:
        """Words for what is not as in the published row that `preset` names."""
        row = find(self.preset)
        there: dict[str, Any] = {"model": row.model, "task": row.task, "chat": row.chat}
        there |= {"shots": row.shots, "limit": None, "samples": 1}
        there |= {"prompt_file": None, "include_path": None}
        words = {n: getattr(self, n) for n, value in there.items() if getattr(self, n) != value}
        for name, used, fixed in (
            ("decode", self.settings, DecodeConfig.of(row.decode)),
            ("likelihood", self.likelihood, LikelihoodConfig(**row.likelihood)),
        ):
            published = leaves(fixed)
            words |= {f"{name}.{n}": v for n, v in leaves(used).items() if v != published[n]}
        return [f"{name}={value}" for name, value in words.items()]

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return going_on(self.output)

    @property
    def settings(self) -> DecodeConfig:
        """`decode`, on top of what `decode_file` says."""
        return read_decode(self.decode_file, self.decode) if self.decode_file else self.decode

    @property
    def tasks(self) -> list[str]:
        """The names in `task`."""
        return [name.strip() for name in self.task.split(",")]
