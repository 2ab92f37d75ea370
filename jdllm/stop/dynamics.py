"""Whether an adapter's activations still move: EDIT's signal, in the code's form and the paper's.

A step's activations of every adapted module are compared with directions that training left (an
Aim); what they point at, as a distribution, is compared with the step before. Letters: B rows, G 2
under guidance else 1, N columns of a block, M modules, F features, R directions.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Asks, Look, StopView

TINY = 1e-12
SMOOTHING = 1e-8
HIGHEST = jax.lax.Precision.HIGHEST
Energy = Literal["l1", "l2", "squared"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aim:
    """What the activations of one module are compared with."""

    directions: jax.Array
    """float32 [F, R]: inner products of unit directions with the features that are read."""
    gram: jax.Array | None = None
    """float32 [F, F]: inner products of those features; None where they are orthonormal."""


def unit_columns(map_FR: jax.Array) -> jax.Array:
    """Returns the matrix with columns of length 1; a column of zeros stays."""
    length_R = jnp.sqrt(jnp.sum(map_FR * map_FR, axis=0))
    return map_FR / jnp.maximum(length_R, TINY)


def row_energy(map_FR: jax.Array, kind: Energy = "l2") -> jax.Array:
    """Returns the paper's vector [F]: how much of the map lies in each of its rows.

    No code of the paper is public, so the norm is a choice: the rows' L2 norm, L1 norm, or the sum
    of their squares.
    """
    if kind == "l1":
        return jnp.sum(jnp.abs(map_FR), axis=1)
    squared_F = jnp.sum(map_FR * map_FR, axis=1)
    return squared_F if kind == "squared" else jnp.sqrt(squared_F)


def aim_at(map_FR: jax.Array, b_FK: jax.Array | None = None) -> Aim:
    """Returns the aim of a map [F, R], whose columns become directions.

    With the adapter's own B [F, K] the features are the K of x A: cosines with B A x follow from
    inner products among the columns of B, so that B's large activations are never made.
    """
    directions_FR = unit_columns(map_FR)
    if b_FK is None:
        return Aim(directions_FR)
    inner = jnp.einsum("FK,FR->KR", b_FK, directions_FR, precision=HIGHEST)
    return Aim(inner, jnp.einsum("FK,FL->KL", b_FK, b_FK, precision=HIGHEST))


def cosines(x_F: jax.Array, aim: Aim) -> jax.Array:
    """Returns cosines [..., R] of activations [..., F] with the directions; 0 for zeros."""
    x = x_F.astype(jnp.float32)
    other = x if aim.gram is None else jnp.einsum("...F,FK->...K", x, aim.gram, precision=HIGHEST)
    length = jnp.sqrt(jnp.maximum(jnp.sum(x * other, axis=-1, keepdims=True), 0.0))
    inner = jnp.einsum("...F,FR->...R", x, aim.directions, precision=HIGHEST)
    return inner / jnp.maximum(length, TINY)


def block_temperature(masked_share: jax.Array) -> jax.Array:
    """Returns EDIT's temperature by the share of masks that a block began with.

    It is 0.1 where all were masks, which is always so unless something filled a block before.
    """
    return jnp.clip(2.0 - 1.9 * masked_share, 0.1, 2.0)


def drift_of_directions(
    now_NMR: jax.Array, before_NMR: jax.Array, visible_N: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Returns EDIT's value [...], as its code has it, from cosines [..., N, M, R].

    A softmax over the directions for each token and module; KL(before || now), its mean over the
    visible tokens, and the mean of that over modules. 0 where nothing is visible.
    """
    q = jax.nn.softmax(now_NMR / temperature, axis=-1) + SMOOTHING
    p = jax.nn.softmax(before_NMR / temperature, axis=-1) + SMOOTHING
    kl_NM = jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)
    total_M = jnp.sum(jnp.where(visible_N[..., None], kl_NM, 0.0), axis=-2)
    count = jnp.sum(visible_N, axis=-1)[..., None]
    return jnp.mean(total_M / jnp.maximum(count, 1e-6), axis=-1)


def drift_of_tokens(
    now_NM: jax.Array, before_NM: jax.Array, visible_N: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Returns EDIT's value [...], as the paper tells it, from cosines [..., N, M].

    A softmax over the tokens visible at both steps, for each module; KL(before || now), and its
    mean over modules. 0 where nothing is visible. The paper's direction of KL is not known.
    """

    def spread(cosine_NM: jax.Array) -> jax.Array:
        logits = jnp.where(visible_N[..., None], cosine_NM / temperature, -jnp.inf)
        some = jnp.any(visible_N, axis=-1)[..., None, None]
        return jax.nn.softmax(jnp.where(some, logits, 0.0), axis=-2) + SMOOTHING

    p, q = spread(before_NM), spread(now_NM)
    kl_NM = jnp.where(visible_N[..., None], p * (jnp.log(p) - jnp.log(q)), 0.0)
    return jnp.mean(jnp.sum(kl_NM, axis=-2), axis=-1)


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far the activations of a block's tokens turned since the step before.

    `tokens` is the paper's form, which compares tokens with each other; else it is the code's.
    Memory: cosines of the step before, and which columns were visible then.
    """

    width: int
    """Columns of the longest block."""
    tokens: bool = False
    temperature: float | None = None
    """Of the softmax; None is `block_temperature`."""
    guided: bool = False
    """Whether guidance feeds two rows for each of the batch."""
    modules: tuple[str, ...] = ()
    """Which modules are read; what decodes fills this and the next in, by the adapter."""
    directions: int = 1

    @property
    def asks(self) -> Asks:
        return Asks(probes=self.modules)

    def start(self, tokens_BT: jax.Array) -> Any:
        if not self.modules:
            raise ValueError(
                "exit.mode=code and paper read an adapter's activations; name one with its "
                "dynamics: adapter=FOLDER"
            )
        rows = len(tokens_BT)
        shape = (rows, 1 + self.guided, self.width, len(self.modules), self.directions)
        return jnp.zeros(shape), jnp.zeros((rows, self.width), bool)

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        look = view.look
        assert look is not None
        before, seen_BN = memory
        columns_BN = jnp.argmax(view.block_BT, axis=1)[:, None] + jnp.arange(self.width)
        now = self.read(look, columns_BN)
        inside_BT = look.settled_BT & view.block_BT
        visible_BN = jnp.take_along_axis(inside_BT, columns_BN, axis=1, mode="fill", fill_value=0)
        heat_B = self.heat(view, look)
        if self.tokens:
            both_BGN = (visible_BN & seen_BN)[:, None]
            value_BG = drift_of_tokens(now[..., 0], before[..., 0], both_BGN, heat_B[..., 0])
        else:
            value_BG = drift_of_directions(now, before, visible_BN[:, None], heat_B)
        value_B = jnp.mean(value_BG, axis=1)
        return jnp.where(view.step_B == 1, jnp.inf, value_B), (now, visible_BN)

    def heat(self, view: StopView, look: Look) -> jax.Array:
        """The temperature of each row [B, 1, 1, 1, 1]."""
        if self.temperature is None:
            heat_B = block_temperature(look.opened_B / jnp.sum(view.block_BT, axis=1))
        else:
            heat_B = jnp.full(view.step_B.shape, self.temperature)
        return heat_B[:, None, None, None, None]

    def read(self, look: Look, columns_BN: jax.Array) -> jax.Array:
        """Cosines [B, G, N, M, R] of the columns of the block."""
        assert look.window_BW is not None
        place_BN = jnp.clip(columns_BN - look.window_BW[:, :1], 0, look.window_BW.shape[1] - 1)
        rows, groups = len(columns_BN), 1 + self.guided

        def one(name: str) -> jax.Array:
            x = look.probes[name]
            x = x.reshape(rows, groups, x.shape[1], -1)
            x = jax.vmap(lambda row, place: row[:, place])(x, place_BN)
            return cosines(x, look.aims[name])

        return jnp.stack([one(name) for name in self.modules], axis=3)

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return value_B < threshold_B
