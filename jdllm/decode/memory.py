"""Memory before anything is loaded: what one device of a mesh would hold while it decodes.

Weights are arithmetic on shapes and shardings. Cache and activations are what XLA sets aside for
the real decode loop: it is compiled, from shapes alone, for one device's share of a few layers,
and the rest is a straight line. So the mesh may be larger than this machine.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered, Traced

from jdllm.decode import DecodeConfig, Exit, Request, Setup, decode, make_setup
from jdllm.model.config import ModelConfig
from jdllm.model.model import abstract, arrays
from jdllm.runtime import sharding

# From the third layer on, each one more adds the same to what a program needs.
FEW, MORE = 3, 4
TRIALS = 16  # programs compiled at most to find the largest batch


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one device."""

    weights: int
    cache: int
    activations: int
    """What a forward pass holds at its fullest, logits included."""
    copies: int
    """What grows with the layers besides: a CPU keeps fused weights a second time, transposed."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.copies


def weight_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """What one device holds of the weights, by `sharding.RULES`; ValueError as there."""
    total = 0
    for name, (array, axes) in arrays(abstract(config)).items():
        spec = sharding.spec(name, array.shape, axes, mesh)
        parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        total += array.size * array.dtype.itemsize // parts
    return total


def share(config: ModelConfig, mesh: AbstractMesh) -> ModelConfig:
    """The model whose weights are what one device holds of `config`'s."""
    parts = mesh.shape["model"]
    spread = config.kv_heads % parts == 0  # else every device keeps all of them
    moe = config.moe
    if moe and parts > 1:
        experts = moe.experts // parts
        moe = dataclasses.replace(
            moe,
            experts=experts,
            top_k=min(moe.top_k, experts),
            shared_mlp=moe.shared_mlp // parts,
            groups=1,
            top_groups=1,
        )
    heads = config.heads // parts
    return dataclasses.replace(
        config,
        heads=heads,
        kv_heads=config.kv_heads // parts if spread else math.gcd(config.kv_heads, heads),
        mlp=config.mlp // parts,
        vocab=config.vocab // parts,
        moe=moe,
    )


class Program(NamedTuple):
    """What XLA sets aside for `decode` on one device besides its arguments."""

    cache: int
    """Bytes of the keys and values in its result."""
    scratch: int
    """Bytes of everything else."""


def trace_program(config: ModelConfig, setup: Setup, rows: int, length: int) -> Traced:
    """The decode loop for a batch of canvases of `length` columns, from shapes alone."""
    shape: Any = jax.ShapeDtypeStruct
    model = jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), abstract(config))
    request = Request(
        tokens=shape((rows, length), jnp.int32),
        prompt_lengths=shape((rows,), jnp.int32),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        idle=shape((rows,), jnp.bool),
    )
    return decode.trace(model, request, setup)


def lower_program(config: ModelConfig, setup: Setup, rows: int, length: int) -> Lowered:
    """The same, ready to be compiled."""
    return trace_program(config, setup, rows, length).lower()


def compile_program(config: ModelConfig, setup: Setup, rows: int, length: int) -> Program:
    """Compiles the decode loop from shapes alone, and looks at what it would need."""
    lowered = lower_program(config, setup, rows, length)
    # Without autotuning: that would run every matrix product at full size.
    found = lowered.compile({"xla_gpu_autotune_level": 0}).memory_analysis()
    if found is None:
        raise ValueError(f"XLA for {jax.default_backend()} does not tell what a program needs")
    sizes = found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    leaves = jax.tree.leaves(lowered.out_info.cache)
    cache = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return Program(cache, int(sizes) - cache)


class Planner:
    """Plans for one model on one mesh, at any batch; every program is compiled once.

    `length` counts the columns of a canvas: prompt, completion and padding. `decoding` is resolved.
    With `elsewhere` the devices are of another kind than this machine's: its copies do not count,
    and a CPU, which widens bfloat16, compiles for float32, so that activations are an upper bound.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: AbstractMesh,
        length: int,
        decoding: DecodeConfig,
        elsewhere: bool = False,
    ):
        if length < (decoding.gen_length or 0) or length > config.max_length:
            raise ValueError(
                f"length={length} must hold gen_length={decoding.gen_length} and stay within the "
                f"model's {config.max_length} columns"
            )
        self.config, self.mesh, self.length, self.decoding = config, mesh, length, decoding
        self._elsewhere = elsewhere
        widened = elsewhere and jax.default_backend() == "cpu"
        self._dtype = "float32" if widened else config.dtype
        self._weights = weight_bytes(config, mesh)
        self._program = functools.cache(self._compiled)

    def _rows(self, batch: int) -> int:
        return -(-batch // self.mesh.shape["data"])

    def _compiled(self, layers: int, batch: int) -> Program:
        """For a device's share of some layers."""
        moe = self.config.moe
        if moe and len(moe.dense_layers) < self.config.layers:
            moe = dataclasses.replace(moe, dense_layers=())
        some = dataclasses.replace(self.config, layers=layers, dtype=self._dtype, moe=moe)
        some = share(some, self.mesh)
        decoding = self.decoding
        if decoding.exit.aims:  # cosines of an adapter that is not known, some MB per row
            decoding = dataclasses.replace(decoding, exit=Exit())
        setup = make_setup(decoding, some)
        return compile_program(some, setup, self._rows(batch), self.length)

    def _cache(self, layers: int, batch: int) -> int:
        """Of all layers, from the program for some: in the model's dtype, with all heads held."""
        parts, kv_heads = self.mesh.shape["model"], self.config.kv_heads
        held = kv_heads if kv_heads % parts else kv_heads // parts
        compiled = share(self.config, self.mesh).kv_heads * jnp.dtype(self._dtype).itemsize
        needed = held * jnp.dtype(self.config.dtype).itemsize
        cache = self._program(layers, batch).cache // layers * self.config.layers
        return cache * needed // compiled

    @functools.cached_property
    def _layer(self) -> int:
        """What each further layer adds to the scratch; no batch changes it."""
        return max(0, self._program(MORE, 1).scratch - self._program(FEW, 1).scratch)

    def plan(self, batch: int) -> Plan:
        """What a device holds when `batch` rows are spread over the data axis."""
        layers = min(self.config.layers, MORE)
        copies = 0 if self._elsewhere else self._layer * self.config.layers
        activations = self._program(layers, batch).scratch - self._layer * layers
        cache = self._cache(layers, batch)
        return Plan(self._weights, cache, max(activations, 0), copies)

    def largest_batch(self, memory: int) -> int:
        """The largest batch, in whole rows of every replica, whose plan stays within `memory`.

        Right within 2 %, and never too large; 0 where not even one row of each replica fits. The
        need is taken to grow with the batch, about in proportion: few programs are compiled.
        """
        replicas = self.mesh.shape["data"]
        costs = {rows: self.plan(rows * replicas).total for rows in (1, 2)}
        if costs[1] > memory:
            return 0
        fits, over = (1, 2) if costs[2] > memory else (2, None)
        for trial in range(TRIALS):
            if over is None:
                slope = max(1, (costs[fits] - costs[1]) // (fits - 1))
                guess = max(2 * fits, 1 + (memory - costs[1]) // slope)
            elif over - fits <= 1 + fits // 50:
                break
            elif trial % 2:
                guess = (fits + over) // 2
            else:
                slope = max(1, (costs[over] - costs[fits]) // (over - fits))
                guess = min(max(fits + 1, fits + (memory - costs[fits]) // slope), over - 1)
            costs[guess] = self.plan(guess * replicas).total
            fits, over = (guess, over) if costs[guess] <= memory else (fits, guess)
        return fits * replicas
