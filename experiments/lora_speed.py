"""A LoRA step on one GPU: memory and tokens per second by remat policy, and torch with peft beside.

Every step has a noise level of its own, and the mean step counts: our head looks at masked columns
alone, so a step's time depends on how many there are (torch's, as written here, does not).

python experiments/lora_speed.py output=experiments/results/lora_speed.json
python experiments/lora_speed.py output=FILE cases=qkv remats=none steps=5      (two minutes)

Random weights of LLaDA-8B, one row: rank 128 on q, k, v at 4096 columns, rank 32 on every linear
map at 1024; and LLaDA2-mini at 2048. torch's model has the same shapes, bfloat16 weights, peft's
LoRA, fused attention and torch.compile per layer, and computes the same loss.
"""

# pyright: reportMissingImports=false

import concurrent.futures
import dataclasses
import datetime
import gc
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.kernels.choose import in_training
from jdllm.load import enable_compilation_cache
from jdllm.model.config import NAMED, ModelConfig, count_parameters
from jdllm.model.linear import modules
from jdllm.model.lora import Adapter, LoraConfig, find, initial
from jdllm.model.model import Model, named
from jdllm.model.model import abstract as model_shapes
from jdllm.runtime import cli, files, sharding
from jdllm.store.checkpoint import random_model
from jdllm.train.objective import Batch, Objective, choose, corrupt
from jdllm.train.optimiser import Recipe, make_optimizer
from jdllm.train.step import beside, create_state, train_step
from jdllm.training.dynamics import DynamicsConfig

DENSE_RATE = 989.4e12  # bfloat16 operations per second of the data sheet


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    lora: LoraConfig
    length: int


CASES = {
    "qkv": Case("llada-8b", LoraConfig(rank=128, targets="q,k,v", dropout=0.05), 4096),
    "all": Case("llada-8b", LoraConfig(rank=32, targets="all"), 1024),
    "tiny": Case("tiny", LoraConfig(rank=4, targets="all"), 64),  # to try the script
    "sparse": Case("llada2-mini", LoraConfig(rank=16, targets="all"), 2048),
}


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Timings of training steps."""

    output: Path
    cases: str = "qkv,all,sparse"
    remats: str = "none,products,layers"
    layers: int | None = None
    """Only the first so many."""
    kernel: str = "auto"
    """Implementations that are forced; auto is what training takes."""
    steps: int = 8
    torch: bool = True
    """Time torch and peft on the cases of LLaDA-8B, too."""
    profile: int = 0
    """List so many of the dearest kernels of a step, too."""
    dynamics: bool = False
    """Time each policy with the window `mean` of gradient dynamics, too: EDIT's map."""


def batch_of(config: ModelConfig, length: int) -> Batch:
    """One example: an eighth of it is a prompt."""
    rng = np.random.default_rng(0)
    low = min(config.mask_id, config.eos_id, *config.stop_ids)
    tokens = jnp.asarray(rng.integers(0, low, (1, 1, length)), jnp.int32)
    learned = jnp.broadcast_to(jnp.arange(length) >= length // 8, tokens.shape)
    example = jnp.zeros(tokens.shape, jnp.int32)
    return Batch(tokens, learned, example, jnp.zeros((1, 1), jnp.int32))


def operations(config: ModelConfig, length: int, masked: float = 1.0) -> float:
    """Of a step: products forward, and backward to the activations alone; attention both ways.

    Of experts only those that a token picks count, of two streams both, of the head the columns
    that carry loss. What is computed again does not count.
    """
    head, columns = config.vocab * config.embed, length * (2 if config.block_causal else 1)
    if config.moe:
        picked = dict(experts=config.moe.top_k, groups=1, top_groups=1)
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **picked))
    active = count_parameters(config) - 2 * head  # the embedding is looked up
    attention = 4 * config.layers * config.heads * config.head_dim * columns
    return columns * (2 * 2 * active + 3 * attention) + length * masked * 2 * 2 * head


def ours(case: Case, config: SpeedConfig) -> list[dict[str, Any]]:
    """A row per remat policy; policies compile side by side."""
    facts, mesh = NAMED[case.model], sharding.parse_mesh("1x1")
    facts = dataclasses.replace(facts, layers=config.layers or facts.layers)
    model = dataclasses.replace(random_model(facts, mesh, 0), dtype="bfloat16")
    model = dataclasses.replace(model, kernel=config.kernel)
    if facts.moe:
        widths = facts.moe.expert_mlp, facts.embed
        model = dataclasses.replace(model, kernel=in_training(config.kernel, "bfloat16", widths))
    own = modules(named(model_shapes(facts)))
    names, lora = find(own, case.lora.targets), case.lora
    optimizer = make_optimizer(Recipe())
    frozen = dataclasses.replace(model, adapter=Adapter({}, lora.dropout))
    batch, objective = batch_of(facts, case.length), choose("auto", facts)
    keys, share = spread_keys(objective, facts, batch, config.steps)
    keys = [keys[0], keys[-1], *keys]  # two steps that are not counted

    def state(windows: str) -> Any:
        return create_state(
            initial(own, names, lora.rank, lora.scale, jax.random.key(0), mesh), optimizer, mesh,
            DynamicsConfig(windows).begin(Recipe()),
        )  # fmt: skip

    def compiled(kind: tuple[Any, str]) -> Any:
        remat, windows = kind
        step = train_step.lower(
            abstract[windows], batch, keys[0], frozen=frozen, join=beside, objective=objective,
            optimizer=optimizer, remat=remat,
        )  # fmt: skip
        return step.compile()

    watched = ("", "mean") if config.dynamics else ("",)
    abstract = {windows: abstract_of(state(windows)) for windows in watched}
    found, kinds = [], list(itertools.product(config.remats.split(","), watched))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(kinds, pool.map(attempt(compiled), kinds), strict=True))
    for (remat, windows), program in programs.items():
        row: dict[str, Any] = {"who": "jdllm", "remat": remat, "dynamics": windows}
        row |= {"kernel": model.kernel, "masked": share}
        try:
            if isinstance(program, Exception):
                raise program
            memory = program.memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes
            row["peak_gb"] = (held + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 1e9
            run = partial(advance, program, batch, iter(keys), frozen)
            row["seconds"], row["losses"] = timed(run, state(windows), config.steps)
            if config.profile:
                run = partial(
                    advance, program, batch, itertools.repeat(keys[len(keys) // 2]), frozen
                )
                row["kernels"] = dearest(run, state(windows), config.profile)
        except Exception as error:
            row["failed"] = str(error).splitlines()[0][:200]
        found.append(row)
    return found


def attempt(function: Callable) -> Callable:
    """The function, but with its error as result."""

    def run(argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            return error

    return run


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def advance(
    program: Any, batch: Batch, keys: Iterator[jax.Array], frozen: Model, state: Any
) -> Any:
    """The state after a step, and its loss."""
    state, values = program(state, batch, next(keys), frozen=frozen)
    return state, float(values["loss"])


def spread_keys(
    objective: Objective, facts: ModelConfig, batch: Batch, count: int
) -> tuple[list[jax.Array], float]:
    """Keys of steps whose shares of masked columns are spread as those of many, and the mean."""
    one = jax.tree.map(lambda x: x[0], batch)

    @jax.jit
    def share(key: jax.Array) -> jax.Array:
        return corrupt(objective, key, one, facts.mask_id).masked.mean()

    found = sorted((float(share(jax.random.key(n))), n) for n in range(8 * count))
    chosen = found[4::8]
    keys = [jax.random.key(number) for _, number in chosen]
    return keys, statistics.mean(masked for masked, _ in chosen)


def dearest(run: Callable[[Any], tuple[Any, float]], state: Any, count: int) -> list[list[Any]]:
    """The device's dearest kernels of a step: milliseconds, calls, name."""
    state, _ = run(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(state)
        path = next(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        spent: dict[str, list[float]] = {}
        for line in (line for plane in planes if "GPU" in plane.name for line in plane.lines):
            for event in line.events if line.name.startswith("Stream") else ():
                spent.setdefault(event.name, []).append(event.duration_ns / 1e6)
    rows = [[round(sum(ms), 3), len(ms), name[:120]] for name, ms in spent.items()]
    return sorted(rows, reverse=True)[:count]


def timed(run: Callable[[Any], tuple[Any, float]], state: Any, steps: int) -> tuple[float, list]:
    """The mean step's seconds, after two that are not counted, and all losses."""
    seconds, losses = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, loss = run(state)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    return statistics.mean(seconds[2:]), losses


def peers(case: Case, remat: bool, config: SpeedConfig) -> dict[str, Any]:
    """The same step by torch and peft: bfloat16 weights, float32 factors, layers compiled."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    facts = NAMED[case.model]
    facts = dataclasses.replace(facts, layers=config.layers or facts.layers)
    D, H, K, M = facts.embed, facts.heads, facts.head_dim, facts.mlp

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RMSNorm(D, 1e-5), nn.RMSNorm(D, 1e-5)
            self.q_proj, self.k_proj = linear(D, H * K), linear(D, H * K)
            self.v_proj, self.out_proj = linear(D, H * K), linear(H * K, D)
            self.gate_proj, self.up_proj, self.down_proj = linear(D, M), linear(D, M), linear(M, D)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            h, shape = self.first(x), (*x.shape[:2], H, K)
            q, k, v = (p(h).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))

            def turn(z: Any) -> Any:
                a, b = z.float().chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(z.dtype)

            q, k, v = (z.transpose(1, 2) for z in (turn(q), turn(k), v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.out_proj(mixed)
            h = self.second(x)
            return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(facts.vocab, D)
            self.layers = nn.ModuleList(Layer() for _ in range(facts.layers))
            self.norm, self.head = nn.RMSNorm(D, 1e-5), linear(D, facts.vocab)

        def forward(self, tokens: Any) -> Any:
            half = torch.arange(K // 2, device="cuda") / (K // 2)
            angle = torch.arange(tokens.shape[1], device="cuda")[:, None] * facts.rope_theta**-half
            cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
            x = self.embedding(tokens)
            for layer in self.layers:
                again = remat and torch.is_grad_enabled()
                x = (
                    checkpoint(layer, x, cos, sin, use_reentrant=False)
                    if again
                    else layer(x, cos, sin)
                )
            return self.norm(x)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network = Network()
    torch.set_default_dtype(torch.float32)
    targets = ["q_proj", "k_proj", "v_proj"]
    if case.lora.targets == "all":
        targets += ["out_proj", "gate_proj", "up_proj", "down_proj"]
    settings = PeftConfig(
        r=case.lora.rank, lora_alpha=2 * case.lora.rank, lora_dropout=case.lora.dropout,
        target_modules=targets,
    )  # fmt: skip
    network = get_peft_model(network, settings)
    for layer in network.base_model.model.layers:
        layer.compile()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 120_000, (1, case.length), device="cuda")

    def nll(head: Any, x: Any, targets: Any) -> Any:
        return F.cross_entropy(head(x).float(), targets, reduction="none")

    def step(_: Any) -> tuple[Any, float]:
        t = torch.rand((), device="cuda") * 0.999 + 0.001
        hit = (torch.rand(tokens.shape, device="cuda") < t) & (
            torch.arange(case.length, device="cuda") >= case.length // 8
        )
        with torch.autocast("cuda", torch.bfloat16):
            hidden = network(torch.where(hit, facts.mask_id, tokens))
            head = network.base_model.model.head
            parts = [
                checkpoint(nll, head, x, y, use_reentrant=False)
                for x, y in zip(hidden[0].split(512), tokens[0].split(512), strict=True)
            ]
            loss = (torch.cat(parts) * hit[0]).sum() / t / (case.length * 7 / 8)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return None, float(loss)

    torch.cuda.reset_peak_memory_stats()
    seconds, losses = timed(step, None, config.steps)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": seconds, "losses": losses, "peak_gb": peak}


def by_torch(name: str, config: SpeedConfig) -> list[dict[str, Any]]:
    """Rows of torch by remat policy, each in a process that gives its memory back."""
    found, case = [], CASES[name]
    if not config.torch or case.model != "llada-8b":
        return found
    for remat in (name for name in config.remats.split(",") if name != "products"):
        row = {"who": "torch, peft", "remat": remat}
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            try:
                row |= pool.submit(peers, case, remat == "layers", config).result()
            except Exception as error:
                row["failed"] = str(error).splitlines()[0][:200]
        found.append(row)
    return found


def main(config: SpeedConfig) -> None:
    """Measures every case, writes the rows and prints a table."""
    names = config.cases.split(",")
    measured = {name: by_torch(name, config) for name in names}  # before JAX takes memory
    enable_compilation_cache()
    rows = []
    for name in names:
        case = CASES[name]
        found = measured[name] + ours(case, config)
        gc.collect()
        for row in found:
            row |= {"case": name, "length": case.length, "model": case.model}
            if seconds := row.get("seconds"):
                row["tokens_per_second"] = case.length / seconds
                facts = NAMED[case.model]
                if config.layers:
                    facts = dataclasses.replace(facts, layers=config.layers)
                work = operations(facts, case.length, row.get("masked", 1.0))
                row["share_of_rate"] = work / seconds / DENSE_RATE
            rows.append(row)
            print({k: v for k, v in row.items() if k != "losses"}, flush=True)
        facts = {
            "device": jax.devices()[0].device_kind,
            "versions": {name: version(name) for name in ("jax", "flax", "optax")},
            "command": " ".join(["python experiments/lora_speed.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "rows": rows,
        }
        files.write_json(config.output, facts)
    print(json.dumps([row for row in rows if "failed" in row], indent=1))


if __name__ == "__main__":
    cli.run(main, SpeedConfig, "python experiments/lora_speed.py")
