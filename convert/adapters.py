"""LoRA adapters in PEFT's files, read into factors and written from them.

Where a family fuses modules that are apart here (LLaDA2's query_key_value), the fused module's A
serves each of them; three different ones are written as one module of three times the rank, whose
B is block-diagonal: the same function. Ranks and scales that differ go into PEFT's patterns.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jdllm.convert.families import FAMILIES
from jdllm.convert.table import apply, sizes, source_shape, undo
from jdllm.model.config import ModelConfig
from jdllm.model.linear import linear_of, module_names, modules
from jdllm.model.lora import Factors, LoraConfig, placements, shapes
from jdllm.model.model import abstract, named
from jdllm.runtime import files
from jdllm.store import checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Options of PEFT that change what an adapter computes, with the values that change nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "peft_type": ("LORA",),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of our modules inside one of Hugging Face's."""

    name: str
    expert: int | None
    a_rule: str
    b_rule: str
    span: tuple[int, int] | None
    """Rows of B that are ours; None where all of them are."""


def _groups(rule: str) -> tuple[str, str]:
    """The outputs and the inputs on the left side of a table's rule: "(HK)D" is (HK) and D."""
    outputs, inputs = re.findall(r"\([A-Z]+\)|[A-Z]", rule.split("->")[0])
    return outputs, inputs


def pieces(config: ModelConfig) -> dict[str, list[Piece]]:
    """Our modules by the path of the Hugging Face module that holds them, in the model's order."""
    found: dict[str, list[Piece]] = {}
    for row in FAMILIES[config.family].rows(config):
        linear, names = linear_of(row.name), module_names(row.name)
        if linear is None:
            continue
        outputs, inputs = _groups(row.rule)
        a_rule = f"R{inputs}->{inputs.strip('()')}R"
        b_rule = f"{outputs}R->R{outputs.strip('()')}"
        for i, source in enumerate(row.sources):
            expert, part = divmod(i, len(names))
            piece = Piece(
                names[part],
                expert if linear.experts else None,
                a_rule,
                b_rule,
                row.spans[i] if row.spans else None,
            )
            found.setdefault(source.removesuffix(".weight"), []).append(piece)
    return found


# Reading


def _facts(folder: Path) -> dict[str, Any]:
    """The checked adapter_config.json; ValueError, naming the key, for what is not plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        inside = folder / "adapter"
        hint = f"; this run's adapter is {inside}" if (inside / CONFIG).is_file() else ""
        raise ValueError(f"adapter={folder} holds no {CONFIG}{hint or ': it is no PEFT adapter'}")
    try:
        facts = json.loads(path.read_text())
        float(facts["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no LoRA adapter: {error}") from None
    for key, values in INERT.items():
        if key in facts and facts[key] not in values:
            raise ValueError(
                f"{path} has {key}={facts[key]!r}, which is not supported; only plain LoRA is "
                f"({key}={values[0]!r})"
            )
    return facts


def _tensors(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Float32 A and B by module path; ValueError for other tensors, and where one is alone."""
    path, found = folder / WEIGHTS, collections.defaultdict[str, dict[str, np.ndarray]](dict)
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                match = KEY.fullmatch(key)
                if match is None:
                    raise ValueError(f"{path} holds {key}, which is no factor of LoRA")
                found[match["path"]][match["side"]] = _float32(file.get_tensor(key))
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read ({error}); save the adapter again") from None
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{path} holds only one factor of {name}; save the adapter again")
    return found


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # how some versions hand over bfloat16
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float32)


def _chosen(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a path, from a dot on."""
    hits = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", path))
    return next(hits, default)


def _scale(facts: dict[str, Any], path: str, rank: int) -> float:
    alpha = _chosen(facts.get("alpha_pattern"), path, facts["lora_alpha"])
    return alpha / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def read_factors(folder: Path, config: ModelConfig) -> dict[str, Factors]:
    """The factors, in host memory, that an adapter's folder holds for a model of this config.

    ValueError, in one sentence, where it is no plain LoRA adapter, or of another model.
    """
    facts, tensors, known = _facts(folder), _tensors(folder), pieces(config)
    base = f"adapter={folder} (made for {facts.get('base_model_name_or_path') or 'an unnamed base'}"
    base += f") does not fit this {config.family} model"
    ours, found = modules(named(abstract(config))), dict[str, Factors]()
    for path, pair in tensors.items():
        if path not in known:
            raise ValueError(f"{base}, which has no module {path} that can be adapted")
        rank = pair["A"].shape[0]
        size = sizes(config) | {"R": rank}
        for piece in known[path]:
            rows = slice(*piece.span) if piece.span else slice(None)
            a, b = pair["A"], pair["B"][rows]
            for side, array, rule in (("A", a, piece.a_rule), ("B", b, piece.b_rule)):
                if array.shape != (wanted := source_shape(rule, size)):
                    raise ValueError(
                        f"{base}: lora_{side} of {path} has shape {array.shape}, not {wanted}"
                    )
            part = apply(piece.a_rule, a, size), apply(piece.b_rule, b, size)
            scale = _scale(facts, path, rank)
            if piece.expert is None:
                found[piece.name] = Factors(*map(np.ascontiguousarray, part), scale)  # type: ignore
                continue
            if piece.name not in found:
                own = shapes(ours[piece.name], rank)
                none = (np.zeros(own[side][0], np.float32) for side in "ab")
                found[piece.name] = Factors(*none, scale)  # type: ignore
            stacked = found[piece.name]
            if (stacked.rank, stacked.scale) != (rank, scale):
                raise ValueError(f"{base}: the experts of {piece.name} differ in rank or alpha")
            stacked.a[piece.expert], stacked.b[piece.expert] = part  # type: ignore
    if not found:
        raise ValueError(f"{folder / WEIGHTS} holds no factors; save the adapter again")
    return found


def place(factors: Mapping[str, Factors], config: ModelConfig, mesh: Mesh) -> dict[str, Factors]:
    """Factors on a mesh: A as the weight's inputs, B as its outputs; ValueError as from `spec`."""
    ranks = {name: part.rank for name, part in factors.items()}
    targets = placements(modules(named(abstract(config))), ranks, mesh)

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {
        name: Factors(put(f.a, targets[name]["a"]), put(f.b, targets[name]["b"]), f.scale)
        for name, f in factors.items()
    }


# Writing


def whole(alpha: float) -> float:
    """A whole number where it is meant to be one."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What PEFT is told of ranks and scales where modules do not differ."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    def alpha_of(self, rank: int, scale: float) -> float:
        """The alpha that gives `scale` at `rank`, whole where it is meant to be."""
        return whole(scale * (math.sqrt(rank) if self.rslora else rank))


def scaling_of(lora: LoraConfig) -> Scaling:
    """What PEFT is told of a run's factors."""
    return Scaling(lora.rank, lora.scale_alpha, lora.rslora, lora.dropout)


def commonest(factors: Mapping[str, Factors]) -> Scaling:
    """The commonest rank and scale."""
    pairs = collections.Counter((part.rank, part.scale) for part in factors.values())
    (rank, scale), _ = pairs.most_common(1)[0]
    plain = Scaling(rank, 0.0)
    return dataclasses.replace(plain, alpha=plain.alpha_of(rank, scale))


def _one(piece: Piece, factors: Factors, size: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B of one of our modules, or of one of its experts."""
    a, b = np.asarray(factors.a), np.asarray(factors.b)
    if piece.expert is not None:
        a, b = a[piece.expert], b[piece.expert]
    size = size | {"R": factors.rank}
    return undo(piece.a_rule, a, size), undo(piece.b_rule, b, size)


def _module(
    held: list[Piece], factors: Mapping[str, Factors], size: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A, B and scale of one Hugging Face module; None where none of its pieces is adapted."""
    mine = [piece for piece in held if piece.name in factors]
    if not mine:
        return None
    scale = factors[mine[0].name].scale
    pairs = [_one(piece, factors[piece.name], size) for piece in mine]
    if mine[0].span is None:
        return *pairs[0], scale
    pairs = [
        (a, b * np.float32(factors[p.name].scale / scale))
        for p, (a, b) in zip(mine, pairs, strict=True)
    ]
    shared = all(np.array_equal(a, pairs[0][0]) for a, _ in pairs)
    ranks = [a.shape[0] for a, _ in pairs]
    rows = max(piece.span[1] for piece in held if piece.span)
    joint = np.zeros((rows, ranks[0] if shared else sum(ranks)), np.float32)
    for i, (piece, (_, b)) in enumerate(zip(mine, pairs, strict=True)):
        start = 0 if shared else sum(ranks[:i])
        joint[slice(*piece.span), start : start + ranks[i]] = b  # type: ignore
    return pairs[0][0] if shared else np.concatenate([a for a, _ in pairs]), joint, scale


def target_pattern(paths: Iterable[str], known: Iterable[str]) -> str:
    """A regex that matches exactly `paths` in full, among the `known` modules.

    A list would not do: PEFT matches the ends of names, and LLaDA's head ends as its MLPs do.
    """
    paths, known = set(paths), list(known)
    digits = {re.sub(r"(?<=\\.)\d+(?=\\.)", r"\\d+", re.escape(path)) for path in paths}
    for parts in (digits, {re.escape(path) for path in paths}):
        heads = {re.match(r"(.*?\\\.\\d\+\\\.)?", part)[0] for part in parts}  # type: ignore
        head = heads.pop() if len(heads) == 1 else ""
        pattern = f"{head}({'|'.join(sorted(part.removeprefix(head) for part in parts))})"
        if {path for path in known if re.fullmatch(pattern, path)} == paths:
            return pattern
    raise AssertionError("escaped paths match themselves alone")


def run_factors(run: Path, step: int | None) -> tuple[LoraConfig, dict[str, Factors]]:
    """The settings of a LoRA run, and its factors after `step` updates (default: the newest).

    ValueError where that checkpoint is not there, or the run trains all parameters.
    """
    facts = json.loads((run / "config.json").read_text())
    lora = LoraConfig(**facts.get("lora", {}))
    if not lora.rank:
        raise ValueError(f"{run} trains all parameters: export its model/ when it is finished")
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    if not kept or step not in (None, *kept):
        raise ValueError(
            f"step={step} is not among the checkpoints of {run}: {', '.join(map(str, kept))}"
        )
    folder = run / "checkpoints" / str(step or kept[-1])
    names = json.loads((folder / "run" / "metadata").read_text())["modules"]

    def read(name: str) -> Any:
        return checkpoint.read_array(folder / "state", f"trained.{name}", "float32")

    return lora, {n: Factors(read(f"{n}.a"), read(f"{n}.b"), lora.scale) for n in names}


def write_adapter(
    folder: Path,
    config: ModelConfig,
    factors: Mapping[str, Factors],
    base: str,
    scaling: Scaling | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into an existing folder.

    `base` is what PEFT loads the adapter onto. ValueError for a family without Hugging Face form.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"models of the family {config.family} cannot be exported")
    scaling, size = scaling or commonest(factors), sizes(config)
    tensors, ranks, alphas, known = dict[str, np.ndarray](), {}, {}, pieces(config)
    for path, held in known.items():
        if (found := _module(held, factors, size)) is None:
            continue
        a, b, scale = found
        for side, array in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{path}.lora_{side}.weight"] = np.ascontiguousarray(array)
        ranks[path], alphas[path] = a.shape[0], scaling.alpha_of(a.shape[0], scale)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    alpha = whole(scaling.alpha)
    facts = {
        "alpha_pattern": {k: v for k, v in alphas.items() if not math.isclose(v, alpha)},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": scaling.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": scaling.rank,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != scaling.rank},
        "target_modules": target_pattern(ranks, known),
        "task_type": None,
        "use_dora": False,
        "use_rslora": scaling.rslora,
    }
    files.write_json(folder / CONFIG, dict(sorted(facts.items())))
