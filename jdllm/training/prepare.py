"""From settings to a job: output folder, model, text, objective. Whatever is wrong is said here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm.load import choose_mesh, locate, read_facts
from jdllm.model.config import ModelConfig, count_parameters
from jdllm.runtime import files, processes, sharding
from jdllm.tokenizer import FILES, load_tokenizer
from jdllm.train.objective import Objective
from jdllm.train.optimiser import Recipe
from jdllm.training import data
from jdllm.training.config import SFTConfig
from jdllm.training.data import Source
from jdllm.training.encode import Texts, cached_texts, encode_examples, fingerprint
from jdllm.training.rows import Layout, Order, Rows, choose_padding, make_rows
from jdllm.training.subject import Subject, load_subject, result

# Settings that a resumed run may change; on another mesh or accumulation sums are ordered
# differently, so its loss curve goes on alike, but not bit for bit.
FREE = {
    "output", "allow_unknown", "save_every", "log_every", "mesh", "preset", "logger", "eval_data",
    "eval_every", "sample_prompt", "sample_every",
}  # fmt: skip
TEXT = "training_text"


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that training needs, loaded and checked."""

    subject: Subject
    objective: Objective
    recipe: Recipe
    """The config's, but with as many steps as its epochs have."""
    rows: Rows
    order: Order
    held_out: Rows | None
    tokenizer: Path
    facts: dict[str, Any]
    """What every checkpoint says besides its state; a run goes on only where they agree."""


def flatten(facts: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name: recipe.steps stands for facts["recipe"]["steps"]."""
    flat = {}
    for name, value in facts.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{k}" if k else name: v for k, v in inner.items()}
    return flat


def settle(config: SFTConfig, digests: dict[str, str] | None = None) -> None:
    """Refuses an output folder whose run has other settings; with `digests`, writes config.json.

    These are the sources' names and hashes of their text. It is written when everything could be
    loaded, so that a mistyped first start blocks nobody. Settings that the old run did not know yet
    are taken to agree. ValueError names each change.
    """
    facts = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    path = config.output / "config.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
            texts = there.pop(TEXT, {})
            old = flatten(there)
            old["recipe.steps"]
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{path} is not of a training run; name another output") from None
        new = flatten(facts)
        free = FREE | ({"accumulation"} if config.normalise == "batch" else set())
        changed = [
            f"{name}={new[name]} (there {old[name]})"
            for name in sorted(new.keys() & old.keys() - free)
            if new[name] != old[name]
        ]
        if digests is not None and not changed and isinstance(texts, dict):
            changed = [
                f"the text of {name} is not what it was"
                for name, digest in digests.items()
                if texts.get(name, digest) != digest
            ]
        if changed:
            raise ValueError(
                f"{config.output} holds a run with other settings: {', '.join(changed)}; "
                "resume it with its own or name another output"
            )
    if digests is not None:
        files.write_json(path, facts | {TEXT: digests})


def split_rows(config: SFTConfig, mesh: jax.sharding.Mesh) -> int:
    """Rows of a micro-batch; ValueError where the data axis of the mesh does not divide them."""
    micro = config.batch // config.accumulation
    if micro % mesh.shape["data"]:
        raise ValueError(
            f"a micro-batch of {micro} rows (batch / accumulation) cannot be split over "
            f"{mesh.shape['data']} devices; change batch, accumulation or mesh"
        )
    return micro


def load_texts(
    config: SFTConfig, model: ModelConfig, folder: Path, sources: list[Source]
) -> dict[str, Texts]:
    """Encodes every source once; later starts of the same run read them back.

    `folder` is the tokenizer's. The cache goes by the content of the files, not their age.
    """
    if config.length > model.max_length:
        raise ValueError(f"length={config.length} exceeds the model's {model.max_length} columns")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json; name a tokenizer's folder: tokenizer=")
    shared = {
        "length": config.length,
        "response_length": config.response_length,
        "tokenizer": [fingerprint(folder / name) for name in FILES],
        "model": [model.vocab, model.eos_id, *model.stop_ids, model.shift_logits],
        "form": "every answer of a conversation",  # what the cache holds; older ones held less
    }
    gap = config.gap
    if gap:
        shared |= {"gap": [*gap, model.mask_id]}
    found = {}
    for source in sources:
        own = (
            data.generated(source, sources, config.examples, config.seed)
            if source.generated
            else data.read(source)
        )
        form = Path(source.name).suffix if data.is_file(source) else source.name
        key = shared | {"source": [form, source.split, source.generated]}
        key |= {"content": data.fingerprint(source)}
        if source.generated:
            total = sum(other.share or 0 for other in sources)
            key |= {"generated": [config.examples * (source.share or 0) / total, config.seed]}

        def build(own: Any = own) -> Texts:
            size = config.response_length
            return encode_examples(tokenizer, own, model, config.length, size, gap)

        name = source.name if source.name not in found else f"{source.name}@{source.split}"
        try:
            found[name] = cached_texts(config.output / "cache", key, build)
        except ValueError as error:
            if source.name in str(error):
                raise
            raise ValueError(f"{source.name}: {error}") from None
    return found


def joined(texts: list[Texts]) -> Texts:
    """All texts as one."""
    ends = np.cumsum([0] + [text.offsets[-1] for text in texts])
    parts = [text.offsets[1:] + start for text, start in zip(texts, ends, strict=False)]
    return Texts(
        np.concatenate([text.ids for text in texts]),
        np.concatenate([text.learned for text in texts]),
        np.concatenate([np.zeros(1, np.int64), *parts]),
        np.concatenate([text.answers for text in texts]),
    )


def lay_out(config: SFTConfig, objective: Objective, model: ModelConfig, folder: Path) -> Layout:
    """How examples become canvases under these settings."""
    tokenizer = load_tokenizer(folder)
    return Layout(
        config.length,
        choose_padding(config.padding, model, len(tokenizer or ())),
        config.response_length,
        config.packing,
        model.block_causal if objective.sees != "full" and model.block_causal else 1,
        config.group_by_length,
        objective.cutoff,
    )


def arrange(config: SFTConfig, layout: Layout, texts: dict[str, Texts]) -> tuple[Rows, Order]:
    """The rows of all sources, and the order in which they are taken."""
    rows = make_rows(joined(list(texts.values())), layout, [len(t.answers) for t in texts.values()])
    shares = [source.share for source in config.sources]
    given = tuple(share for share in shares if share is not None)
    mixed = given if given and config.task is None else None  # tasks were made in their shares
    lengths = rows.lengths if config.group_by_length else None
    return rows, Order(rows.sizes, config.batch, config.seed, mixed, lengths)


def prepare(config: SFTConfig) -> Job | None:
    """Loads the model and the rows, and settles the output folder; None for a finished run.

    ValueError or OSError, in one sentence, for whatever is wrong with the input.
    """
    finished = False
    if processes.is_main():
        settle(config)
        finished = result(config).exists()
    if processes.broadcast_text("finished" * finished):
        return None
    if not config.output.is_dir():  # process 0 has made it
        raise ValueError(
            f"output={config.output} is not there for process {jax.process_index()}; name a folder "
            "on a disk that all processes share"
        )
    dtype, copies = ("auto", 1) if config.lora.rank else ("float32", 4)  # of the weights
    mesh = choose_mesh(config.mesh, config.model, dtype, config.allow_unknown, copies)
    processes.say(f"{processes.describe()}, {sharding.describe(mesh)}")
    split_rows(config, mesh)
    if config.data is not None:
        data.check_sources(config.sources + config.held_out)  # before a large model is loaded
    source = locate(config.tokenizer or config.model, config.allow_unknown)
    if source is None:
        raise ValueError(f"model={config.model} has no tokenizer of its own; add tokenizer=bundled")
    facts = read_facts(config.model, dtype, config.allow_unknown)
    config.objective_of(config.adapt.applied(facts))
    subject = load_subject(config, mesh)
    return fill(config, subject, source)


def fill(config: SFTConfig, subject: Subject, source: Path) -> Job:
    """The job of a subject: its text read, its rows made, config.json written."""
    model = subject.frozen.config
    objective = config.objective_of(model)
    layout = lay_out(config, objective, model, source)
    texts = processes.main_first(lambda: load_texts(config, model, source, config.sources))
    rows, order = arrange(config, layout, texts)
    held_out = None
    if config.held_out:
        others = processes.main_first(lambda: load_texts(config, model, source, config.held_out))
        plain = dataclasses.replace(layout, packing=False, cutoff=False, longest=False)
        whole = joined(list(others.values()))
        held_out = make_rows(whole, plain, [len(whole.answers)])
    recipe = config.recipe
    if config.epochs is not None:
        recipe = dataclasses.replace(recipe, steps=config.epochs * order.steps)
    digests = {name: text.digest() for name, text in texts.items()}
    if processes.is_main():
        settle(config, digests)
    trained = sum(leaf.size for leaf in jax.tree.leaves(subject.trained))
    processes.say(
        f"{len(rows.texts.answers)} examples in {len(rows)} rows, "
        f"{count_parameters(model):,} parameters, {trained:,} trained"
    )
    facts = subject.facts | {TEXT: rows.texts.digest()}
    return Job(subject, objective, recipe, rows, order, held_out, source, facts)
