"""Attention of a block over a long cache: every implementation, and which tiles serve best.

python experiments/attention_tiles.py output=experiments/results/attention_tiles.json
python experiments/attention_tiles.py output=FILE tune=True keys=1024 queries=32

A program calls one implementation many times, each time with keys and values that no cache holds.
Beside the time: the error against the reference in float32, and the time that the bytes of keys and
values take at the rate of a copy. Rows see all keys but some; where a model attends by blocks, a
range per query.
"""

import dataclasses
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.kernels import choose
from jdllm.kernels.attention import cudnn, mosaic, reference, split, xla
from jdllm.kernels.shapes import PAGE, PUBLISHED_HEADS, Attention
from jdllm.runtime import cli, files

BY_QUERY = ("llada2-mini",)  # attends block by block
SPLIT = [
    split.Tiles(*one)
    for one in (
        (64, 64, 256, 4, 3), (64, 64, 128, 4, 3), (64, 64, 512, 4, 3), (64, 64, 1024, 4, 3),
        (64, 64, 256, 4, 2), (64, 64, 256, 4, 4), (64, 64, 256, 8, 3), (64, 32, 256, 4, 4),
        (64, 128, 256, 8, 2), (128, 64, 256, 8, 3), (128, 128, 256, 8, 2), (64, 32, 256, 4, 3),
    )
]  # fmt: skip
PAGED = [SPLIT[0], SPLIT[5], SPLIT[7]]
MOSAIC = [
    mosaic.Tiles(*one)
    for one in (
        (64, 256, 2), (64, 256, 3), (64, 512, 2), (64, 1024, 3), (128, 256, 2), (128, 512, 1),
    )
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """What is measured."""

    output: Path
    models: str = ",".join(PUBLISHED_HEADS)
    rows: tuple[int, ...] = (1, 8, 32)
    queries: tuple[int, ...] = (32, 64)
    keys: tuple[int, ...] = (1024, 4096)
    names: str = ""
    """Only implementations of these names, with commas between them; all by default."""
    paged: bool = True
    """Whether keys in pages are measured, too."""
    tune: bool = False
    """Whether every tile of split and mosaic is measured, or what they use alone."""
    megabytes: int = 300
    """Keys and values that a program goes through: several times what caches hold."""
    repeats: int = 7
    seconds: float = 1e9
    """After so many nothing more is begun."""

    def __post_init__(self):
        if unknown := set(self.models.split(",")) - set(PUBLISHED_HEADS):
            names = ", ".join(PUBLISHED_HEADS)
            raise ValueError(f"models={unknown.pop()} must be among {names}")
        if odd := [n for n in self.keys if n % PAGE]:
            raise ValueError(f"keys={odd[0]} must be a multiple of a page, {PAGE}")


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries, and keys and values of several layers, as rows and in pages."""

    shape: Attention
    q: jax.Array
    visible: jax.Array
    layers: list[tuple[jax.Array, jax.Array]]
    pools: list[tuple[jax.Array, jax.Array]]
    table: jax.Array
    expected: jax.Array
    """Of the first layer, in float32."""

    @property
    def bytes(self) -> int:
        """Of the keys and values of a layer."""
        return sum(x.nbytes for x in self.layers[0])


def prepare(shape: Attention, by_query: bool, megabytes: int, paged: bool) -> Case:
    """Random numbers, the same for every implementation."""
    B, T, S, H, G, K = shape
    count = int(np.clip(megabytes * 1e6 // (4 * B * S * G * K), 3, 48))
    normal = jax.jit(lambda key, size: jax.random.normal(key, size, jnp.bfloat16), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 2 * count + 1)
    q = normal(keys[0], (B, T, H, K))
    layers = [
        (normal(a, (B, S, G, K)), normal(b, (B, S, G, K)))
        for a, b in itertools.batched(keys[1:], 2)
    ]
    visible = jnp.full(B, S, jnp.int32) - 3 * jnp.arange(B, dtype=jnp.int32)
    if by_query:
        last = visible[:, None] - jnp.where(jnp.arange(T) < T // 2, 32, 0)
        visible = jnp.stack([0 * last, last], -1)
    pools, table = [], jnp.zeros((0,), jnp.int32)
    if paged:
        order = np.random.default_rng(0).permutation(B * S // PAGE)
        table = jnp.asarray(order.reshape(B, -1), jnp.int32)

        @jax.jit
        def pool(x: jax.Array) -> jax.Array:
            empty = jnp.zeros((B * S // PAGE, PAGE, G, K), x.dtype)
            return empty.at[table.ravel()].set(x.reshape(-1, PAGE, G, K))

        pools = [(pool(k), pool(v)) for k, v in layers]
    with jax.default_matmul_precision("highest"):
        high = (x.astype(jnp.float32) for x in (q, *layers[0]))
        expected = jax.jit(reference.attention)(*high, visible)
    return Case(shape, q, visible, layers, pools, table, expected)


Way = tuple[str, Any, Callable[..., jax.Array]]
"""Its name, its tiles, and what is called with queries, keys and values."""


def ways(case: Case, config: TilesConfig) -> Iterator[Way]:
    """Those over rows, then those over pages."""
    yield "reference", None, partial(with_visible, reference.attention, case)
    yield "xla", None, partial(with_visible, xla.attention, case)
    yield "cudnn", None, partial(with_visible, cudnn.attention, case)
    yield from own_ways(case, config, None)
    if config.paged:
        for name, inner in (("gathered+xla", xla.attention), ("gathered+cudnn", cudnn.attention)):
            yield name, None, partial(gathered, inner, case)
        yield "paged cudnn", None, partial(cudnn_paged, case)
        yield from own_ways(case, config, case.table)


def with_visible(run: Callable, case: Case, *arrays: jax.Array) -> jax.Array:
    """An implementation, told what this case's rows see."""
    return run(*arrays, case.visible)


def gathered(run: Callable, case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """An implementation over rows that are gathered first."""
    return run(q, *(reference.gathered(x, case.table) for x in (k, v)), case.visible)


def own_ways(case: Case, config: TilesConfig, table: jax.Array | None) -> Iterator[Way]:
    """split and mosaic, as they would choose themselves and, to be tuned, by every tile."""
    ranges, place = reference.as_ranges(case.visible), "" if table is None else "paged "
    given = {"ranges": ranges, "table": table}
    yield f"{place}split", {}, partial(split.attend, **given)
    yield f"{place}mosaic", {}, partial(mosaic.attend, **given)
    if not config.tune:
        return
    for tiles, whole in itertools.product(SPLIT if table is None else PAGED, (False, True)):
        if whole == (case.shape.rows > 1) or tiles == split.TILES:
            facts = {**tiles._asdict(), "whole": whole}
            yield f"{place}split", facts, partial(split.attend, **given, tiles=tiles, whole=whole)
    for tiles in MOSAIC:
        run = partial(mosaic.attend, **given, tiles=tiles)
        yield f"{place}mosaic", tiles._asdict(), run


def cudnn_paged(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's own reading of pages, by a function of jax that it does not promise to keep."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    if case.visible.ndim != 1:
        raise NotImplementedError("it serves rows that see their first keys")
    B, T = q.shape[:2]
    table = case.table[:, None, :, None]
    return fused.paged_attention(
        q, k, v, jnp.full(B, T, jnp.int32), case.visible, table, table,
        scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING,
    )  # fmt: skip


def measure(run: Callable[..., jax.Array], case: Case, name: str, config: TilesConfig) -> dict:
    """Microseconds of a call, by the median of some runs, and its relative error."""
    paged = name.startswith(("paged", "gathered"))
    layers = case.pools if paged else case.layers
    rounds = max(1, 96 // len(layers))
    found = jax.jit(run)(case.q, *layers[0]).astype(jnp.float32) - case.expected
    error = jnp.linalg.norm(found.ravel()) / jnp.linalg.norm(case.expected.ravel())

    @jax.jit
    def loop(q: jax.Array, layers: Any) -> jax.Array:
        def once(_: Any, q: jax.Array) -> jax.Array:
            for k, v in layers:
                q = run(q, k, v)
            return q

        return jax.lax.fori_loop(0, rounds, once, q)

    jax.block_until_ready(loop(case.q, layers))
    spent = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        jax.block_until_ready(loop(case.q, layers))
        spent.append(time.perf_counter() - start)
    return {
        "microseconds": 1e6 * statistics.median(spent) / (rounds * len(layers)),
        "relative_error": float(error),
    }


def alone(run: Any, case: Case) -> bool:
    """Whether rows get the same bits alone, their parts side by side, and together."""
    facts = dict(run.keywords)
    ranges, table = facts.pop("ranges"), facts.pop("table")
    layer = case.layers[0] if table is None else case.pools[0]
    together = jax.jit(partial(run.func, **facts))(case.q, *layer, ranges, table)
    one = jax.jit(partial(run.func, **facts | dict.fromkeys(set(facts) & {"whole"}, False)))
    for b in {0, 1 % len(case.q), len(case.q) - 1}:
        own = slice(b, b + 1)
        row = [x[own] for x in layer] if table is None else layer
        found = one(case.q[own], *row, ranges[own], None if table is None else table[own])
        if not jnp.array_equal(found, together[own]):
            return False
    return True


def copy_rate(repeats: int, megabytes: int = 1024) -> float:
    """Bytes per second that the memory moves, read and written, in copies of a large array."""
    x, copy, spent = jnp.zeros(megabytes * 2**19, jnp.bfloat16), jax.jit(jnp.copy), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready([copy(x) for _ in range(10)])
        spent.append(time.perf_counter() - start)
    return 20 * x.nbytes / statistics.median(spent[1:])


def rows(config: TilesConfig, rate: float) -> Iterator[dict[str, Any]]:
    """A row for each case and way; one that fails says why."""
    begun = time.perf_counter()
    for T, S, model, B in itertools.product(
        config.queries, config.keys, config.models.split(","), config.rows
    ):
        shape = Attention(B, T, S, *PUBLISHED_HEADS[model])
        case = prepare(shape, model in BY_QUERY, config.megabytes, config.paged)
        for name, tiles, run in ways(case, config):
            if config.names and name not in config.names.split(","):
                continue
            if time.perf_counter() - begun > config.seconds:
                return
            row = {"model": model, **shape._asdict(), "name": name, "tiles": tiles}
            row |= {"bytes": case.bytes, "floor": 1e6 * case.bytes / rate}
            try:
                row |= measure(run, case, name, config)
                if tiles is not None:
                    row["alone"] = alone(run, case)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            yield row


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    what = " ".join(f"{row[name]:>5}" for name in ("rows", "queries", "keys"))
    tiles = "" if row["tiles"] is None else " ".join(map(str, row["tiles"].values()))
    head = f"{row['model']:<12}{what}  {row['name']:<16}{tiles:<24}"
    if "failed" in row:
        return f"{head} {row['failed'][:90]}"
    same = {None: "", True: "alone", False: "NOT ALONE"}[row.get("alone")]
    of_floor = f"{row['microseconds']:8.1f} us, floor {row['floor']:7.1f}"
    return f"{head}{of_floor}, error {row['relative_error']:.5f} {same}"


def versions() -> dict[str, str]:
    """Of what the kernels are made with."""
    found = {}
    for name in ("jax", "jax-triton", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def main(config: TilesConfig) -> None:
    """Measures, prints and writes all rows, anew after each."""
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "command": " ".join(["python experiments/attention_tiles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "copy_rate": copy_rate(config.repeats, config.megabytes),
        "rows": [],
    }
    print({name: facts[name] for name in ("device", "versions", "copy_rate")}, flush=True)
    for row in rows(config, facts["copy_rate"]):
        facts["rows"].append(row)
        print(line(row), flush=True)
        files.write_json(config.output, facts)
    facts["canaries"] = choose.canaries()
    print(facts["canaries"], flush=True)
    files.write_json(config.output, facts)


if __name__ == "__main__":
    cli.run(main, TilesConfig, "python experiments/attention_tiles.py")
