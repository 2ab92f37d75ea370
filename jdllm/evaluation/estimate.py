"""An estimate of evaluations before any weight is read: prompts, model calls, memory."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdllm.batches import bucket, plan_batches
from jdllm.convert.families import read_facts as read_published
from jdllm.convert.fetch import converted_folder, fetch
from jdllm.decode import DecodeConfig
from jdllm.decode.memory import Planner
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.grading import quiet
from jdllm.evaluation.harness import JdllmLM
from jdllm.evaluation.report import table
from jdllm.evaluation.settings import label, longest
from jdllm.llm import LLM
from jdllm.load import compute_dtype, locate, read_facts
from jdllm.model.config import ModelConfig, count_parameters, is_converted
from jdllm.model.model import abstract
from jdllm.parity import make_setup
from jdllm.runtime import sharding
from jdllm.score.scoring import batch_count
from jdllm.tokenizer import load_tokenizer, read_lengths

SMALL = ("*config.json", "tokenizer*", "*.jinja", "merges.txt", "vocab*")  # not the weights


def small_files(model: str) -> Path | None:
    """The folder with a model's small files, fetched where there is none; None for random:<name>.

    ValueError or OSError, in one sentence, where there is no such model.
    """
    if model == "bundled" or model.startswith("random:") or Path(model).expanduser().is_dir():
        return locate(model)
    converted = converted_folder(model)
    return converted if is_converted(converted) else fetch(model, SMALL)


def weightless(config: EvalConfig) -> Any:
    """An LLM that encodes prompts and resolves settings, but has no weights to decode with."""
    folder = small_files(config.model)
    if folder is None or is_converted(folder):
        facts = read_facts(config.model if folder is None else str(folder), config.dtype)
    else:
        facts = read_published(folder, allow_unknown=config.allow_unknown)[1]
        dtype = compute_dtype(config.dtype, facts.dtype)
        facts = dataclasses.replace(facts, dtype=dtype)
    tokenizer, defaults = None, DecodeConfig()
    if folder:
        tokenizer, defaults = load_tokenizer(folder), DecodeConfig(**read_lengths(folder))
    mesh = sharding.parse_mesh(config.mesh)
    model = dataclasses.replace(abstract(facts), mesh=mesh, dtype=facts.dtype)
    return LLM(model, tokenizer, defaults)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one task asks of a model with one setting."""

    documents: int
    prompts: int
    """Texts to complete or to score."""
    calls: int
    """Model calls of batches, at most."""
    rows: int = 0
    """Of the fullest batch that decodes."""
    columns: int = 0
    """Of the longest canvas that is decoded; 0 where texts are scored alone."""
    decode: DecodeConfig | None = None
    """Settings of that canvas, their lengths filled in."""


def requests(task: Any, limit: int | None) -> list[Any]:
    """lm-eval's requests of a task, each as often as it is made."""
    with quiet():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [request for request in task.instances for _ in range(request.repeats or 1)]


def work_of(config: EvalConfig, name: str, llm: Any) -> Work:
    """Counts what a task asks for: its requests are made as they would be, and not answered."""
    loaded = config.load_task(name, config.samples)
    lm = JdllmLM(
        llm, decode=config.settings, likelihood=config.likelihood, batch_size=config.batch_size,
        length=longest({name: loaded}), chat=config.chat is not False,
    )  # fmt: skip
    asked = [one for task in loaded["tasks"].values() for one in requests(task, config.limit)]
    replicas = llm.mesh.shape["data"]
    completed = [one for one in asked if one.request_type == "generate_until"]
    pairs = lm.pairs([one for one in asked if one.request_type != "generate_until"])
    flat = [pair for split in pairs for pair in split]
    calls = batch_count(flat, config.likelihood, llm.config, config.batch_size, replicas)
    rows, columns, decode = 0, 0, None
    for group, members in lm.groups(completed).items():
        lengths = [len(row) for row in lm.encode([completed[i].args[0] for i in members])]
        batches = plan_batches(lengths, config.batch_size, replicas)
        setup = make_setup(group.decode, llm.config)
        # Every step of a block fills a column; one call more keeps its keys, one reads the prompt.
        calls += len(batches) * (setup.blocks * (setup.step_limit + 1) + 1)
        canvas = setup.canvas_length(bucket(max(1, *lengths)))
        if canvas > columns:
            rows, columns, decode = max(map(len, batches)), canvas, group.decode
    documents = len({(one.task_name, one.doc_id) for one in asked})
    return Work(documents, len(asked), calls, rows, columns, decode)


def memory(config: EvalConfig, model: ModelConfig, work: Work) -> str:
    """A sentence on what one device holds in the batch of `work`."""
    if work.decode is None or work.decode.rule == "verify":
        return "memory is planned for decoding without a verifier alone"
    planner = Planner(model, sharding.abstract_mesh(config.mesh), work.columns, work.decode)
    plan = planner.plan(work.rows)
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in dataclasses.asdict(plan).items())
    return (
        f"{plan.total / 1e9:.3f} GB on each device for {work.rows} rows of {work.columns} columns "
        f"({parts})"
    )


def estimate(runs: Sequence[EvalConfig]) -> str:
    """A table of what evaluations would do, and the memory of the longest canvas of each model.

    No weight is read or fetched; documents are. ValueError or OSError where a run could not start.
    """
    lines = [["task", "setting", "documents", "prompts", "model calls, at most"]]
    notes, total = [], 0
    for model, own in itertools.groupby(runs, key=lambda run: run.model):
        llm = weightless(first := next(own))
        found = []
        for run in itertools.chain([first], own):
            for name in run.tasks:
                work = work_of(run, name, llm)
                found.append(work)
                numbers = [f"{n}" for n in (work.documents, work.prompts, work.calls)]
                lines.append([name, label(run.settings) or "the defaults", *numbers])
        total += sum(work.calls for work in found)
        fullest = max(found, key=lambda work: work.columns)
        size = f"{count_parameters(llm.config):,} parameters in {llm.config.held}"
        notes.append(f"{model}: {size}; {memory(first, llm.config, fullest)}")
    return "\n".join([table(lines), "", f"{total} model calls of batches at most", *notes])
