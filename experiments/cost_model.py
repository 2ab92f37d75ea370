"""What a block step should cost on a mesh, from bytes, FLOPs and all-reduces: the tables of a page.

python experiments/cost_model.py output=docs/scaling.md

Products take the longer of reading their weights and of multiplying; caches, activations and
logits are read and written besides, a layer's small kernels take their time whatever they do, and
all-reduces wait for all that. Fitted are one GPU's passes, and all-reduces by themselves, as
experiments/mesh_check.py measured them; the passes of two GPUs check what follows, and so do the
rows of experiments/scaling.py, as far as there are any.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scaling_tables
from scipy.optimize import least_squares

from jdllm.kernels.head.reference import CHUNK
from jdllm.model.config import LLADA2_FLASH, LLADA_8B, NAMED, ModelConfig, count_parameters
from jdllm.model.head import Special, best
from jdllm.runtime import cli

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
BYTES = 2  # bfloat16
LOGIT_PASSES = 4  # how often float32 logits are written or read on their way to tokens
# How often a layer writes or reads a number a channel: of the residual stream, of what heads hold
# (queries, keys, values, their rotation, the mix), and of an MLP's width (gate, up, their product).
RESIDUAL_PASSES, HEAD_PASSES, MLP_PASSES = 8, 10, 6


@dataclasses.dataclass(frozen=True)
class Machine:
    """One GPU and its links. Rates per second."""

    bandwidth: float
    """Bytes of memory read."""
    flops: float
    layer: float
    """Seconds that the small kernels of a layer take, however little they do."""
    latency: float
    """Seconds of an all-reduce of nothing within a host."""
    link: float
    """Bytes that an all-reduce within a host moves through a GPU."""
    memory: float = 141e9


# GPUs of a host, and how much longer the done flag takes between hosts: an assumption.
HOST, FAR = 8, 4


@dataclasses.dataclass(frozen=True)
class Pass:
    """One model call: `columns` of each of `rows` are fed, `keys` seen, `wanted` logits read."""

    rows: int
    columns: int
    keys: int
    wanted: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one device."""

    weights: float
    """Bytes that products read."""
    streams: float
    """Bytes of caches, activations and logits, read and written."""
    flops: float
    layers: int
    sums: int
    """All-reduces over the model axis."""
    sum_bytes: float
    """Bytes of each."""

    def seconds(self, machine: Machine, data: int = 1, model: int = 1) -> float:
        """Nothing overlaps: a layer's sums wait for its products, and the next ones for them."""
        moved = 2 * (model - 1) / model * self.sum_bytes / machine.link
        sums = self.sums * (machine.latency + moved) if model > 1 else 0.0
        far = data * model > HOST
        flag = 0.0 if data == 1 else machine.latency * (FAR if far else 1)
        products = max(self.weights / machine.bandwidth, self.flops / machine.flops)
        return (
            products + self.streams / machine.bandwidth + self.layers * machine.layer + sums + flag
        )


def layer_weights(config: ModelConfig, layer: int, tokens: int, grouped: bool) -> Any:
    """Weights of a layer that split over the model axis: those read, and those times tokens.

    All experts work for all tokens; with `grouped`, as that kernel does it, only experts that some
    token picked are read, and a token pays for its own.
    """
    attention = config.embed * config.head_dim * 2 * (config.heads + config.kv_heads)
    moe = config.moe_layer(layer)
    if moe is None:
        dense = attention + 3 * config.embed * config.mlp
        return dense, dense
    expert, shared = 3 * config.embed * moe.expert_mlp, 3 * config.embed * moe.shared_mlp
    read, used = moe.experts, moe.experts
    if grouped:
        read = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** tokens)
        used = moe.top_k
    return attention + shared + read * expert, attention + shared + used * expert


def cost(
    config: ModelConfig, step: Pass, data: int = 1, model: int = 1, grouped: bool = False
) -> Cost:
    """Work of one device of a mesh for one pass, of one whose rows are all there."""
    rows = -(-step.rows // data)
    tokens, wanted = rows * step.columns, rows * step.wanted
    kv_split = model if config.kv_heads % model == 0 else min(model, config.kv_heads)
    read = used = 0.0
    for layer in range(config.layers):
        here = layer_weights(config, layer, tokens, grouped)
        read, used = read + here[0], used + here[1]
    head = config.embed * config.vocab
    cache = rows * step.keys * 2 * config.kv_heads * config.head_dim * config.layers / kv_split
    logits = 4 * LOGIT_PASSES * wanted * config.vocab / model
    attention = 4 * tokens * step.keys * config.heads * config.head_dim * config.layers
    moe = config.moe
    width = moe.top_k * moe.expert_mlp + moe.shared_mlp if moe else config.mlp
    split = HEAD_PASSES * config.heads * config.head_dim + MLP_PASSES * width
    activations = tokens * config.layers * (RESIDUAL_PASSES * config.embed + split / model)
    return Cost(
        weights=BYTES * (read + head) / model,
        streams=BYTES * (cache + activations) + logits,
        layers=config.layers,
        flops=(2 * used * tokens + 2 * head * wanted + attention) / model,
        sums=2 * config.layers + 2,
        sum_bytes=BYTES * tokens * config.embed,
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured pass."""

    name: str
    data: int
    model: int
    cost: Cost
    milliseconds: float

    @property
    def alone(self) -> bool:
        return self.data * self.model == 1

    def predicted(self, machine: Machine) -> float:
        """Milliseconds."""
        return 1e3 * self.cost.seconds(machine, self.data, self.model)


def measured(found: dict[str, Any]) -> list[Point]:
    """The block steps and opening passes of experiments/mesh_check.py."""
    words = dict(word.split("=") for word in found["command"].split() if "=" in word)
    block = int(words["block_length"])
    canvas = int(words["prompt_length"]) + int(words["gen_length"])
    points = []
    for row in found["rows"]:
        data, model = map(int, row["mesh"].split("x"))
        for kind, columns in (("block_step", block), ("opening_pass", canvas)):
            work = cost(LLADA_8B, Pass(row["rows"], columns, canvas, block), data, model)
            name = f"{row['mesh']}|{row['rows']}|{kind.replace('_', ' ')}"
            points.append(Point(name, data, model, work, row[f"ms_per_{kind}"]))
    return points


def fit(points: list[Point], links: dict[str, float]) -> Machine:
    """Bandwidth, rate and a layer's overhead with the least relative error over one GPU's passes.

    Latency and link speed come from microseconds of all-reduces over two devices, which move each
    byte once.
    """
    sizes = np.array([float(name.split()[0]) for name in links])
    times = np.array(list(links.values())) / 1e6
    slope, latency = np.polyfit(sizes, times, 1, w=1 / times)

    def machine(logs: Any) -> Machine:
        bandwidth, flops, layer = map(float, np.exp(logs))
        return Machine(bandwidth, flops, layer, max(float(latency), 0.0), float(1 / slope))

    def errors(logs: Any) -> list[float]:
        found = machine(logs)
        return [p.predicted(found) / p.milliseconds - 1 for p in points if p.alone]

    return machine(least_squares(errors, np.log([4e12, 7e14, 2e-5])).x)


def table(header: str, rows: list[list[Any]]) -> str:
    """Markdown."""
    names = header.split("|")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def checked(machine: Machine, points: list[Point]) -> str:
    """Measured and modelled passes."""
    rows = []
    for p in points:
        guess = p.predicted(machine)
        error = f"{100 * (guess / p.milliseconds - 1):+.0f} %"
        rows.append([*p.name.split("|"), f"{p.milliseconds:.2f}", f"{guess:.2f}", error])
    return table("mesh|batch|pass|measured ms|model ms|error", rows)


def scaled(found: dict[str, Any]) -> str:
    """What was measured on one and on two GPUs."""
    rows = [
        [
            row["mesh"],
            row["rows"],
            f"{row['ms_per_block_step']:.2f}",
            f"{row['forwards_per_second']:.0f}",
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in found["rows"]
    ]
    gains = [[name, f"{gain:.2f}"] for name, gain in found["efficiency"].items()]
    return "\n\n".join(
        [
            table("mesh|batch|ms per block step|forwards per second|tokens per second", rows),
            table("two GPUs against one|times as fast", gains),
        ]
    )


def settings(found: dict[str, Any]) -> str:
    """What settings of XLA and NCCL change on two GPUs at batch 1."""
    rows = []
    for name, row in found["variants"].items():
        words = [row["flags"], *(f"{k}={v}" for k, v in row["environment"].items())]
        sums = [f"{t:.0f}" for t in row["all_reduce_microseconds"].values()]
        shown = f"`{' '.join(filter(None, words))}`" if any(words) else ""
        rows.append([name, shown, f"{row['ms_per_block_step']:.2f}", " / ".join(sums)])
    return table("setting|flags|ms per block step|µs per all-reduce of 0.26 / 2.1 / 16.8 MB", rows)


def where(found: dict[str, Any]) -> str:
    """Milliseconds per forward that kernels run on the first GPU, by kind, at batch 1."""
    rows = []
    for row in (row for row in found["rows"] if "profile" in row):
        kinds = row["profile"]["milliseconds_by_kind"]
        each = [kinds.get(k, 0) for k in ("matrix products", "all-reduce", "copies", "others")]
        each = [ms / row["forwards"] for ms in each]
        whole = 1e3 / row["forwards_per_second"]
        rows.append([row["mesh"], *(f"{ms:.2f}" for ms in (*each, whole - sum(each), whole))])
    return table("mesh|matrix products|all-reduces|copies|other kernels|between kernels|all", rows)


CONTEXT, BLOCK = 1024, 32
# Model, mesh, rows of the whole batch.
DENSE = [
    (mesh, rows)
    for mesh, rows in (
        ((1, 1), 1), ((1, 1), 8), ((1, 2), 1), ((1, 2), 8), ((2, 1), 2), ((2, 1), 16),
        ((1, 4), 1), ((1, 8), 1), ((8, 1), 8), ((8, 1), 64), ((2, 4), 64), ((64, 1), 512),
    )
]  # fmt: skip
SPARSE = [((1, 4), 1), ((1, 8), 1), ((1, 8), 8), ((2, 4), 16), ((8, 8), 64)]


def predicted(machine: Machine) -> str:
    """Block steps of LLaDA-8B, against as many single GPUs."""
    rows = []
    for (data, model), count in DENSE:
        step = Pass(count, BLOCK, CONTEXT, BLOCK)
        seconds = cost(LLADA_8B, step, data, model).seconds(machine, data, model)
        alone = dataclasses.replace(step, rows=max(count // data, 1))
        single = cost(LLADA_8B, alone).seconds(machine)
        gain = data * single / seconds
        sums = cost(LLADA_8B, step, data, model)
        share = 1 - dataclasses.replace(sums, sums=0).seconds(machine, data, model) / seconds
        rows.append(
            [f"{data}x{model}", count, f"{1e3 * seconds:.2f}", f"{count / seconds:.0f}",
             f"{gain:.2f} of {data * model}", f"{100 * share:.0f} %"]
        )  # fmt: skip
    header = "mesh|batch|ms per block step|row steps per second|speed-up|in all-reduces"
    return table(header, rows)


def predicted_experts(machine: Machine) -> str:
    """Block steps of LLaDA2.0-flash with dense experts and with grouped ones."""
    rows = []
    for (data, model), count in SPARSE:
        step = Pass(count, BLOCK, CONTEXT, BLOCK)
        weights = BYTES * count_parameters(LLADA2_FLASH) / model / 1e9
        times = [
            1e3 * cost(LLADA2_FLASH, step, data, model, grouped).seconds(machine, data, model)
            for grouped in (False, True)
        ]
        rows.append([f"{data}x{model}", count, f"{weights:.0f}", *(f"{t:.1f}" for t in times)])
    return table("mesh|batch|GB of weights a GPU|ms, dense experts|ms, grouped experts", rows)


def step_milliseconds(machine: Machine, row: dict[str, Any]) -> float:
    """What a block step that experiments/scaling.py measured should take; experts are grouped."""
    data, model = scaling_tables.axes(row)
    step = Pass(row["rows"] * data, row["block"], row["columns"], row["block"])
    return 1e3 * cost(NAMED[row["model"]], step, data, model, True).seconds(machine, data, model)


def constants(machine: Machine) -> str:
    """What the model was given."""
    rows = [
        ["memory read", f"{machine.bandwidth / 1e12:.2f} TB/s"],
        ["products", f"{machine.flops / 1e12:.0f} TFLOP/s"],
        ["the small kernels of a layer", f"{1e6 * machine.layer:.0f} µs"],
        ["an all-reduce", f"{1e6 * machine.latency:.0f} µs + {machine.link / 1e9:.0f} GB/s"],
    ]
    return table("of one GPU|value", rows)


def head_memory() -> str:
    """Temporary memory of the compiled head (CPU backend): batch 8, block 32, LLaDA-8B's shapes."""
    hidden = jax.ShapeDtypeStruct((8, 32, LLADA_8B.embed), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((LLADA_8B.embed, LLADA_8B.vocab), jnp.bfloat16)
    special = Special(excluded=(LLADA_8B.mask_id,))
    rows = []
    for chunk in (LLADA_8B.vocab, 2 * CHUNK, CHUNK, CHUNK // 2, CHUNK // 4):
        find = partial(best, special=special, chunk=chunk)
        memory: Any = jax.jit(find).lower(hidden, weights).compile().memory_analysis()
        rows.append([f"{chunk:,}", f"{memory.temp_size_in_bytes / 1e6:.0f}"])
    return table("tokens of the vocabulary at a time|temporary MB", rows)


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Every table of docs/scaling.md by its name."""
    found = json.loads((results / "mesh_check.json").read_text())
    points = measured(found)
    machine = fit(points, found["all_reduce_microseconds"])
    layers = {name: facts.layers for name, facts in NAMED.items()}
    rows = scaling_tables.shown(scaling_tables.read(results / "scaling.jsonl"), layers)
    return {
        "scaled": scaled(found),
        "where": where(found),
        "settings": settings(found),
        "constants": constants(machine),
        "measured": checked(machine, points),
        "predicted": predicted(machine),
        "predicted experts": predicted_experts(machine),
        "head": head_memory(),
        **scaling_tables.tables(rows, partial(step_milliseconds, machine)),
    }


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with its tables replaced."""
    for name, text in found.items():
        page = re.sub(
            f"(<!-- table: {name} -->\n).*?(<!-- end of table -->)",
            lambda match, text=text: f"{match[1]}{text}\n{match[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


@dataclasses.dataclass(frozen=True)
class ModelCostConfig:
    """Tables of the cost model."""

    output: Path = ROOT / "docs" / "scaling.md"
    """The page whose tables are written again."""


def main(config: ModelCostConfig) -> None:
    """Prints the tables and writes them into the page."""
    found = tables()
    print("\n\n".join(found.values()))
    config.output.write_text(with_tables(config.output.read_text(), found))


if __name__ == "__main__":
    cli.run(main, ModelCostConfig, "python experiments/cost_model.py")
