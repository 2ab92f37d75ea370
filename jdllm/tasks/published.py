"""A published table row as settings: the task, its shots and frame, how to decode, the number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jdllm.tasks.lm_eval import stock

# The versions of lm-eval's tasks that the rows were written for.
VERSIONS = {
    "arc_challenge": 1.0,
    "arc_challenge_chat": 1.0,
    "arc_easy": 1.0,
    "bbh": 3.0,
    "ceval-valid": 2.0,
    "cmmlu": 1.0,
    "gpqa_main_generative_n_shot": 2.2,
    "gpqa_main_n_shot": 2.2,
    "gsm8k": 3.0,
    "gsm8k_cot": 3.0,
    "hellaswag": 1.0,
    "humaneval": 1.0,
    "humaneval_instruct": 4.0,
    "humaneval_plus": 1.0,
    "ifeval": 4.0,
    "mbpp": 1.0,
    "mbpp_instruct": 1.0,
    "mbpp_plus": 1.0,
    "minerva_math": 1.0,
    "mmlu": 2,
    "mmlu_generative": 3,
    "mmlu_pro": 2.0,
    "piqa": 1.0,
    "race": 3.0,
    "truthfulqa_mc2": 3.0,
    "winogrande": 1.0,
}


@dataclass(frozen=True)
class Preset:
    """One row: what to run and what was published for it."""

    name: str
    model: str
    task: str
    metric: str
    """lm-eval's "metric,filter" of the number, or tokens_per_second."""
    published: float | None
    """In percent, or tokens per second; None where the source gives the settings alone."""
    source: str
    shots: int | None = None
    """None: the task's own."""
    chat: bool = False
    """Whether prompts are framed by the model's chat template."""
    decode: Mapping[str, Any] = field(default_factory=dict)
    """Settings of DecodeConfig by dotted name; empty for tasks scored by likelihood."""
    likelihood: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LikelihoodConfig; empty for tasks that generate."""
    tokens_per_second: float | None = None
    note: str = ""
    seen: bool = True

    @property
    def version(self) -> float | int:
        """The version of the task that the row is for."""
        return VERSIONS.get(self.task, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """What the row fixes, by the names of jdllm.eval's settings."""
        fixed = {"model": self.model, "task": self.task, "chat": self.chat}
        fixed |= {} if self.shots is None else {"shots": self.shots}
        fixed |= {f"decode.{name}": value for name, value in self.decode.items()}
        return fixed | {f"likelihood.{name}": value for name, value in self.likelihood.items()}


def installed_version(row: Preset) -> float | int | None:
    """The version of the row's task in the lm-eval that is installed; None for tasks of ours."""
    path = stock.names().get(row.task) if row.task in VERSIONS else None
    return stock.parse(path, functions=False)["metadata"]["version"] if path else None


def describe(
    row: Preset,
    measured: float | None = None,
    error: float | None = None,
    changed: Sequence[str] = (),
) -> str:
    """What a row fixes, and the published number beside the measured one (percent, or tokens/s).

    `changed` are the settings, as words, that are not those of the row.
    """
    unit = "tokens/s" if row.metric == "tokens_per_second" else "%"
    shots = "the task's own shots" if row.shots is None else f"{row.shots} shots"
    frame = "in the chat template" if row.chat else "without a chat template"
    settings = row.decode or row.likelihood
    here = installed_version(row)
    version = f"version {row.version}" + (
        f" (installed: {here}, which may differ)" if here not in (None, row.version) else ""
    )
    published = "not in the source" if row.published is None else f"{row.published:g} {unit}"
    if row.tokens_per_second:
        published += f" at {row.tokens_per_second:g} tokens/s"
    spread = "" if error is None else f" ± {error:.1f}"
    lines = {
        "preset": row.name,
        "model": row.model,
        "task": f"{row.task}, {version}, {shots}, {frame}",
        "decode" if row.decode else "likelihood": " ".join(f"{k}={v}" for k, v in settings.items()),
        "but here": " ".join(changed),
        "metric": row.metric,
        "published": published + f" [{row.source}]" + ("" if row.seen else " (not all verified)"),
        "measured": "not yet" if measured is None else f"{measured:.1f}{spread} {unit}",
        "note": row.note,
    }
    return "\n".join(f"{key:<11}{value}" for key, value in lines.items() if value)
