"""LoRA: low-rank factors beside frozen weights, y = W x + scale B A x.

An `Adapter` is a tree of its own, {module name: Factors}; `Model.net` joins it to the parameters,
and `product` adds it. Names are those of jdllm/model/linear.py, "layers.3.attention.q", on every
family: also where weights are fused, q, k, v and gate, up have factors of their own. So gradients
and optimiser moments of B are found as factors["layers.3.attention.q"].b.

Two probes of every adapted module show what passes through the factors, before the scale:
"layers.3.attention.q.lora_A" is A x [B, T, R], "layers.3.attention.q.lora_B" is B A x.

Experts (shared ones, too) and routers run inside kernels: there the factors are added to the
weight itself, so these modules know neither dropout nor probes.
"""

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jdllm.model.linear import STACK, Linear, Module, linear_of, module_names
from jdllm.runtime import sharding
from jdllm.runtime.hints import asked, nearest

ATTENTION, MLP = ("q", "k", "v", "out"), ("gate", "up", "down")
# What a target may be besides a pattern of whole names. Experts and routers are never meant by all.
GROUPS: dict[str, tuple[str, ...]] = (
    {part: (f"layers.*.attention.{part}",) for part in ATTENTION}
    | {part: (f"layers.*.mlp.{part}",) for part in MLP}
    | {
        "attention": ("layers.*.attention.*",),
        "mlp": ("layers.*.mlp.*",),
        "all": ("layers.*.attention.*", "layers.*.mlp.*"),
        "shared": ("layers.*.shared.*",),
        "experts": tuple(f"layers.*.experts.{part}" for part in MLP),
        "router": ("layers.*.experts.router",),
    }
)
INSIDE = ("shared.", "experts.")  # modules inside kernels, by what follows the layer's number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The two matrices of a module, in the layout of its weight; R is the rank."""

    a: jax.Array
    """[*inputs, R]; with experts [E, *inputs, R]."""
    b: jax.Array
    """[R, *outputs]; with experts [E, R, *outputs]."""
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of a model, and how they are dropped out while they are trained."""

    factors: dict[str, Factors]
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    keys: jax.Array | None = None
    """[B]: one random key per row and step; without them nothing is dropped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen weight, and the factors of the modules in it."""

    base: Any
    """What `product` takes: an array, or a quantised weight."""
    parts: dict[str, Factors]
    """By module name; modules without factors are absent."""
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    """All modules of the weight, in the order of its stack."""
    linear: Linear = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    keys: jax.Array | None = None

    @property
    def stacked(self) -> Factors | None:
        """The factors of all modules side by side; None where some are missing or unlike others."""
        parts = [self.parts[name] for name in self.names if name in self.parts]
        kinds = {(part.a.shape, part.b.shape, part.scale) for part in parts}
        if len(parts) < len(self.names) or len(kinds) > 1:
            return None
        a, b = (jnp.stack([getattr(part, side) for part in parts]) for side in "ab")
        return Factors(a, b, parts[0].scale)

    def dense(self, base: jax.Array) -> jax.Array:
        """The whole weight in the dtype of `base`, which is its own base as an array.

        The sum is rounded once: products of factors are float32.
        """
        own, many = self.linear, self.linear.experts
        rule = f"{many}{own.inputs}R,{many}R{own.outputs}->"
        rule += "".join(x for x in own.letters if x != STACK)

        def update(part: Factors) -> jax.Array:
            highest = jax.lax.Precision.HIGHEST
            found = jnp.einsum(rule, part.a, part.b * part.scale, precision=highest)
            return found.astype(jnp.float32)

        wide = base.astype(jnp.float32)
        if STACK not in own.letters:
            return (wide + update(self.parts[self.names[0]])).astype(base.dtype)
        axis = own.letters.index(STACK)
        none = jnp.zeros_like(jnp.take(wide, 0, axis))
        updates = [update(self.parts[n]) if n in self.parts else none for n in self.names]
        return (wide + jnp.stack(updates, axis)).astype(base.dtype)


def joined(params: nnx.State, adapter: Adapter) -> nnx.State:
    """The parameters with `Adapted` weights wherever the adapter has factors."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        name = leaf.get_metadata("name")
        linear, names = linear_of(name), module_names(name)
        parts = {n: adapter.factors[n] for n in names if n in adapter.factors}
        if linear is None or not parts:
            return leaf
        base = leaf.get_value()
        return leaf.replace(Adapted(base, parts, names, linear, adapter.dropout, adapter.keys))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def drop(x: jax.Array, keys_B: jax.Array, rate: float, name: str) -> jax.Array:
    """Inputs [B, ...] with zeros at random places, a matter of the row's key and the module."""

    def row(key: jax.Array, x: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jnp.where(scattered(key, x.shape) < rate * 2**32, 0, x / (1 - rate))

    return jax.vmap(row)(keys_B, x)


def scattered(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32, a function of the key and the place: two rounds of Murmur's last mixing.

    They are good enough to drop things out. What is drawn costs a few operations that XLA makes
    part of whatever uses it, forwards and backwards, where jax.random's numbers cost passes.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for seed in jax.random.key_data(key):
        x = (x + seed) ^ (seed >> 7)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        x ^= x >> 16
    return x


def product(
    multiply: Callable[..., jax.Array],
    note: Callable[[str, jax.Array], None],
    spec: str,
    x: jax.Array,
    weight: Adapted,
    **options: Any,
) -> jax.Array:
    """The product with an adapted weight, in the dtype of `x`.

    `multiply` makes one with a base or a factor; `note` is told the products of the factors.
    """
    operands, out = spec.split("->")
    own, (before, letters) = weight.linear, operands.split(",")
    summed = "".join(letters[i] for i in own.axes(own.inputs))
    kept = "".join(letters[i] for i in own.axes(own.outputs))
    stack = letters[own.letters.index(STACK)] if STACK in own.letters else ""
    inner = "".join(letter for letter in before if letter not in summed) + "R"
    after = "".join(letter for letter in out if letter != stack)

    def dropped(name: str) -> jax.Array:
        return x if weight.keys is None else drop(x, weight.keys, weight.dropout, name)

    def added(name: str, part: Factors) -> jax.Array:
        narrow = multiply(f"{before},{summed}R->{inner}", dropped(name), part.a)
        wide = multiply(f"{inner},R{kept}->{after}", narrow, part.b)
        note(f"{name}.lora_A", narrow)
        note(f"{name}.lora_B", wide)
        return wide * part.scale

    found = multiply(spec, x, weight.base, **options)
    if not stack:
        return found + added(*next(iter(weight.parts.items()))).astype(found.dtype)
    if whole := weight.stacked:
        # All modules at once: what would have to be put side by side comes out so.
        own = x if weight.keys is None else jnp.stack([dropped(name) for name in weight.names])
        many = "" if weight.keys is None else stack
        narrow = multiply(f"{many}{before},{stack}{summed}R->{stack}{inner}", own, whole.a)
        wide = multiply(f"{stack}{inner},{stack}R{kept}->{out}", narrow * whole.scale, whole.b)
        for number, name in enumerate(weight.names):
            note(f"{name}.lora_A", narrow[number])
            note(f"{name}.lora_B", jnp.take(wide, number, out.index(stack)) / whole.scale)
        return found + wide.astype(found.dtype)
    updates = {name: added(name, part) for name, part in weight.parts.items()}
    none = jnp.zeros_like(next(iter(updates.values())))
    ordered = [updates.get(name, none) for name in weight.names]
    return found + jnp.stack(ordered, out.index(stack)).astype(found.dtype)


# Which modules, and their first factors


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation: what is trained instead of all parameters."""

    rank: int = 0
    """Of the factors; 0 trains all parameters."""
    alpha: float | None = None
    """The factors' product counts alpha / rank (default: 2 rank, so twice)."""
    targets: str = "q,k,v"
    """Groups (q, k, v, out, attention, gate, up, down, mlp, all, shared, experts, router) or
    patterns of module names: layers.31.attention.*."""
    dropout: float = 0.0
    """Share of a module's inputs that is zeroed in training, for the factors alone."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    base: Literal["stored", "int8"] = "stored"
    """How the frozen weights are held: in dtype, or linear maps as int8 per output channel."""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be 1 or more, or 0 for all parameters")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be 0 or more and less than 1")
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.rank:
            raise ValueError(f"lora.{changed[0]} does nothing without lora.rank; add lora.rank=16")

    @property
    def scale_alpha(self) -> float:
        """Alpha, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.scale_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def find(names: Iterable[str], targets: str) -> list[str]:
    """The module names that comma-separated targets mean, in the model's order.

    A target is a group (GROUPS) or a pattern of whole names, layers.31.attention.*. ValueError,
    with the nearest names, for one that matches nothing.
    """
    names, found = list(names), set[str]()
    for target in targets.split(","):
        patterns = GROUPS.get(target.strip(), (target.strip(),))
        matched = [name for pattern in patterns for name in fnmatch.filter(names, pattern)]
        if not matched:
            near = asked(nearest(target, [*GROUPS, *names]))
            raise ValueError(
                f"lora.targets: {target!r} matches no module of this model; "
                f"{near + ' ' if near else ''}there are {', '.join(GROUPS)}, and patterns such as "
                f"{names[0]}"
            )
        found |= set(matched)
    return [name for name in names if name in found]


def check_rank(modules: Mapping[str, Module], names: Sequence[str], rank: int) -> None:
    """ValueError, naming a module, where the rank exceeds its narrower side."""
    for name in names:
        width = min(math.prod(modules[name].inputs), math.prod(modules[name].outputs))
        if rank > width:
            raise ValueError(
                f"lora.rank={rank} exceeds the width of {name}, which is {width}; a rank up to "
                f"{width} can express every change of it"
            )


def refuse_dropout(names: Iterable[str], dropout: float) -> None:
    """ValueError for dropout where a module is inside a kernel."""
    inside = [name for name in names if name.split(".", 2)[2].startswith(INSIDE)]
    if dropout and inside:
        raise ValueError(
            f"lora.dropout={dropout} does not reach {inside[0]}, whose factors are added to the "
            "weight itself; use lora.dropout=0 or leave experts, shared and router out of "
            "lora.targets"
        )


def shapes(module: Module, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and logical axes of the factors `a` and `b` of a module."""
    many, axes = module.experts, module.expert_axes
    return {
        "a": ((*many, *module.inputs, rank), (*axes, *module.input_axes, "rank")),
        "b": ((*many, rank, *module.outputs), (*axes, "rank", *module.output_axes)),
    }


def placements(
    modules: Mapping[str, Module], ranks: Mapping[str, int], mesh: Mesh
) -> dict[str, dict[str, NamedSharding]]:
    """The sharding of both factors by module: as the weight's inputs, and as its outputs."""
    return {
        name: {
            side: NamedSharding(mesh, sharding.spec(f"{name}.{side}", shape, axes, mesh))
            for side, (shape, axes) in shapes(modules[name], rank).items()
        }
        for name, rank in ranks.items()
    }


def initial(
    modules: Mapping[str, Module],
    names: Sequence[str],
    rank: int,
    scale: float,
    key: jax.Array,
    mesh: Mesh,
) -> dict[str, Factors]:
    """First factors in float32, as PEFT draws them: A uniform in +-1/sqrt(inputs), B zero.

    A module's draw depends on the key and its name alone, not on what else is adapted.
    """
    check_rank(modules, names, rank)
    placed = placements(modules, dict.fromkeys(names, rank), mesh)

    @functools.cache
    def drawer(shape: tuple[int, ...], bound: float, place: NamedSharding) -> Any:
        def draw(key: jax.Array) -> jax.Array:
            return bound * jax.random.uniform(key, shape, minval=-1.0)

        return jax.jit(draw, out_shardings=place)

    found = {}
    for name in names:
        own, place = shapes(modules[name], rank), placed[name]
        bound = 1 / math.sqrt(math.prod(modules[name].inputs))
        seed = jax.random.fold_in(key, zlib.crc32(name.encode()))
        a = drawer(own["a"][0], bound, place["a"])(seed)
        found[name] = Factors(a, drawer(own["b"][0], 0.0, place["b"])(seed), scale)
    return found
