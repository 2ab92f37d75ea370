"""A block step of a diffusion language model in PyTorch: eager, and compiled under a CUDA graph.

python experiments/torch_step.py output=rows.json                    (two minutes, one GPU; PyTorch)
python experiments/torch_step.py output=rows.json model=llada2-mini rows=1

bench_peers.py starts this beside our loop. A step embeds the block of every row, runs all layers
over a cache of all columns, whose entries of the block it replaces, and takes the most confident
token of the vocabulary into the canvas. Query, key and value are one product, gate and up another.
Compiled is a layer with torch.compile, the same for all, and all of the step in one CUDA graph.
Weights are
random; experts are picked by the plain sigmoid, without groups.
"""

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdllm.model.config import NAMED, ModelConfig
from jdllm.runtime import cli, files


@dataclasses.dataclass(frozen=True)
class TorchConfig:
    """Timings of a block step in PyTorch."""

    output: Path
    model: str = "llada-8b"
    rows: tuple[int, ...] = (1, 8)
    columns: int = 1024
    block: int = 32
    steps: int = 20
    repeats: int = 3
    mode: str = "max-autotune-no-cudagraphs"
    """Of torch.compile; the CUDA graph is this script's own."""

    def __post_init__(self):
        if self.model not in NAMED:
            raise ValueError(f"model={self.model} is none of {', '.join(NAMED)}")
        if not 0 < self.block <= self.columns:
            raise ValueError(f"block={self.block} must lie between 1 and columns={self.columns}")


def load_torch() -> Any:
    """PyTorch; RuntimeError where it is missing or sees no GPU."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise RuntimeError("torch is not installed: pip install torch") from None
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    return torch


def draw_layer(torch: Any, facts: ModelConfig, moe: bool) -> dict[str, Any]:
    """Random weights of a layer, output by input."""

    def draw(*shape: int) -> Any:
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return x.normal_(0, shape[-1] ** -0.5)

    D, H, G, K = facts.embed, facts.heads, facts.kv_heads, facts.head_dim
    found = {"qkv": draw((H + 2 * G) * K, D), "o": draw(D, H * K)}
    found |= {name: torch.ones_like(draw(D)) for name in ("norm", "mlp_norm")}
    if facts.qk_norm:
        found |= {name: torch.ones_like(draw(K)) for name in ("q_norm", "k_norm")}
    if moe and facts.moe:
        E, M, S = facts.moe.experts, facts.moe.expert_mlp, facts.moe.shared_mlp
        found |= {"router": draw(E, D), "experts_up": draw(E, D, 2 * M)}
        found["experts_down"] = draw(E, M, D)
        wide = S
    else:
        wide = facts.mlp
    if wide:
        found |= {"gate_up": draw(2 * wide, D), "down": draw(D, wide)}
    return found


def angles(torch: Any, facts: ModelConfig, columns: int) -> tuple[Any, Any]:
    """Cosines and sines [columns, half of the rotated dimensions]."""
    width = facts.rotary_dim or facts.head_dim
    powers = torch.arange(0, width, 2, device="cuda", dtype=torch.float32) / width
    at = torch.arange(columns, device="cuda", dtype=torch.float32)[:, None]
    turned = at * facts.rope_theta**-powers
    return turned.cos(), turned.sin()


def make_layer(torch: Any, facts: ModelConfig) -> Callable[..., Any]:
    """A layer, as a function of its weights."""
    F = torch.nn.functional
    H, G, K = facts.heads, facts.kv_heads, facts.head_dim
    width = facts.rotary_dim or K

    def norm(x: Any, scale: Any) -> Any:
        return F.rms_norm(x, (x.shape[-1],), scale, facts.norm_eps)

    def turn(x: Any, cos: Any, sin: Any) -> Any:
        one, two = x[..., :width].float().chunk(2, -1)
        done = torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)
        return torch.cat([done, x[..., width:]], -1) if width < K else done

    def swiglu(x: Any, gate_up: Any, down: Any) -> Any:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def experts(x: Any, w: dict[str, Any]) -> Any:
        tokens, moe = x.reshape(-1, x.shape[-1]), facts.moe
        assert moe is not None
        odds = F.linear(tokens, w["router"]).float().sigmoid()
        weights, picks = odds.topk(moe.top_k, -1)
        weights = moe.scale * weights / weights.sum(-1, keepdim=True)
        chosen, order = picks.reshape(-1).sort()
        every = torch.arange(moe.experts, device=x.device)
        ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)
        wide = torch._grouped_mm(tokens[order // moe.top_k], w["experts_up"], offs=ends)
        gate, up = wide.chunk(2, -1)
        deep = torch._grouped_mm(F.silu(gate) * up, w["experts_down"], offs=ends)
        scaled = deep * weights.reshape(-1)[order, None].to(deep.dtype)
        return torch.zeros_like(tokens).index_add_(0, order // moe.top_k, scaled).view_as(x)

    def layer(x: Any, w: dict[str, Any], cache: Any, at: Any, cos: Any, sin: Any) -> Any:
        B, T, _ = x.shape
        qkv = F.linear(norm(x, w["norm"]), w["qkv"]).view(B, T, H + 2 * G, K).transpose(1, 2)
        q, k, v = qkv.split([H, G, G], 1)
        if "q_norm" in w:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        keys, values = cache
        keys.index_copy_(2, at, turn(k, cos, sin))
        values.index_copy_(2, at, v)
        seen = F.scaled_dot_product_attention(
            turn(q, cos, sin), keys, values, enable_gqa=H != G
        )  # fmt: skip
        x = x + F.linear(seen.transpose(1, 2).reshape(B, T, H * K), w["o"])
        h = norm(x, w["mlp_norm"])
        added = swiglu(h, w["gate_up"], w["down"]) if "gate_up" in w else 0
        return x + (added + experts(h, w) if "router" in w else added)

    return layer


def make_close(torch: Any, facts: ModelConfig) -> Callable[..., None]:
    """What follows the layers: the best token of every column, and the surest into the canvas."""
    F = torch.nn.functional

    def close(x: Any, tokens: Any, norm: Any, head: Any) -> None:
        logits = F.linear(F.rms_norm(x, (x.shape[-1],), norm, facts.norm_eps), head).float()
        best, ids = logits.max(-1)
        sure = (best - logits.logsumexp(-1)).masked_fill(tokens != facts.mask_id, -torch.inf)
        surest = sure.argmax(-1, keepdim=True)
        tokens.scatter_(1, surest, ids.gather(1, surest))

    return close


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of all layers, the embedding and the head."""

    layers: list[dict[str, Any]]
    embedding: Any
    head: Any
    norm: Any


def draw_weights(torch: Any, facts: ModelConfig) -> Weights:
    """Random ones."""
    dense = facts.moe.dense_layers if facts.moe else range(facts.layers)
    layers = [draw_layer(torch, facts, i not in dense) for i in range(facts.layers)]
    shape = facts.vocab, facts.embed
    embedding, head = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, facts.embed**-0.5)
        for _ in range(2)
    )
    return Weights(layers, embedding, head, layers[0]["norm"])


def make_step(
    torch: Any, facts: ModelConfig, weights: Weights, rows: int, config: TorchConfig, compiled: bool
) -> tuple[Callable[[], None], Any]:
    """A step that changes the canvas's block in place, and that block [rows, block]."""
    layer, close = make_layer(torch, facts), make_close(torch, facts)
    if compiled:
        layer, close = (
            torch.compile(part, mode=config.mode, dynamic=False) for part in (layer, close)
        )
    shape = rows, facts.kv_heads, config.columns, facts.head_dim
    caches = [
        tuple(torch.zeros(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in "kv")
        for _ in weights.layers
    ]
    first = config.columns - config.block
    at = torch.arange(first, config.columns, device="cuda")
    cos, sin = (x[first:] for x in angles(torch, facts, config.columns))
    tokens = torch.full((rows, config.block), facts.mask_id, device="cuda")

    def step() -> None:
        x = torch.nn.functional.embedding(tokens, weights.embedding)
        for own, cache in zip(weights.layers, caches, strict=True):
            x = layer(x, own, cache, at, cos, sin)
        close(x, tokens, weights.norm, weights.head)

    return step, tokens


def captured(torch: Any, step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph, after runs on the side that compile it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(torch: Any, step: Callable[[], None], config: TorchConfig) -> float:
    """Of one step, the median of several runs of many."""
    times = []
    for _ in range(config.repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(config.steps):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / config.steps)
    return 1e3 * statistics.median(times[1:])


def measured(
    torch: Any, weights: Weights, rows: int, config: TorchConfig, compiled: bool
) -> dict[str, Any]:
    """One way's time, and its first token of every row."""
    facts = NAMED[config.model]
    start = time.perf_counter()
    step, tokens = make_step(torch, facts, weights, rows, config, compiled)
    step()
    torch.cuda.synchronize()
    spent = time.perf_counter() - start
    committed = (tokens != facts.mask_id).sum(-1).tolist()
    run = captured(torch, step) if compiled else step
    ms = milliseconds(torch, run, config)
    return {"ms": ms, "compile_seconds": spent, "committed": committed}


def main(config: TorchConfig) -> None:
    """Measures both ways at every number of rows; one that fails says why."""
    torch = load_torch()
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    facts = {"device": torch.cuda.get_device_name(), "versions": versions}
    found = []
    with torch.inference_mode():
        weights = draw_weights(torch, NAMED[config.model])
        for rows in config.rows:
            for name, compiled in (("torch eager", False), ("torch.compile, CUDA graph", True)):
                row = {"name": name, "model": config.model, "rows": rows} | facts
                try:
                    row |= measured(torch, weights, rows, config, compiled)
                except Exception as error:
                    row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
                found.append(row)
                print(row, flush=True)
                files.write_json(config.output, found)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    cli.run(main, TorchConfig, "python experiments/torch_step.py")
