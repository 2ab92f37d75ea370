"""Gradient dynamics: what the optimiser did to the B of every LoRA module, averaged while it runs.

An update is m / (sqrt(v) + eps) of Adam's raw moments: no bias correction, no learning rate, no
weight decay, the sign kept. Averages over several windows of the run stand side by side in the
training state, so that a killed run loses none of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdllm.model.lora import Factors

TOP = 5  # rows and columns that the statistics call the largest
STATISTICS = (
    "m_norm", "m_std", "v_mean", "v_std", "update_mean", "update_std", "update_norm",
    "topk_mean_row", "topk_mean_col",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Window:
    """Which updates an average is made of, and how much each counts."""

    after: float = 0.0
    """Updates before this share of the run are left out."""
    keep: float = 1.0
    """What is left of an update's weight after each that follows; 1 is a plain mean."""
    moment: bool = False
    """The first moment is averaged, without the division by the second's root."""


WINDOWS: dict[str, Window] = {
    "mean": Window(),
    "late": Window(after=0.9),
    "ema": Window(keep=0.99),
    "momentum": Window(moment=True),
}
"""The windows by name. EDIT's map is `mean`, but for its last update: see `Dynamics`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dynamics:
    """Weighted sums of the updates so far, by window and module; `maps` are the means.

    Everything is float32, whatever the moments are. The reference keeps bfloat16 moments for
    bfloat16 parameters: there v * 0.999 rounds back to v, so that v never decays and its maps are
    others (EDIT's quirk, not copied); and it writes its files one update late, so that its map for
    checkpoint T is the mean over updates 1 to T - 1.
    """

    totals: dict[str, dict[str, jax.Array]]
    """By window, then module: [R, *outputs], as the B of `Factors`."""
    weights: dict[str, jax.Array]
    """By window: what the weights of the updates sum to."""
    count: jax.Array
    """int32: updates so far."""
    steps: int = dataclasses.field(metadata={"static": True})
    """Updates of the whole run."""
    epsilon: float = dataclasses.field(metadata={"static": True})
    """The optimiser's."""

    @classmethod
    def of(
        cls, trained: Any, steps: int, epsilon: float, windows: tuple[str, ...] = tuple(WINDOWS)
    ) -> "Dynamics":
        """Dynamics before the first update of what trains, which holds `Factors` by module."""
        own = b_of(trained)
        if not own:
            raise ValueError(
                "gradient dynamics are those of LoRA's B and nothing of that kind trains; set "
                "lora.rank=, or dynamics.windows= to nothing"
            )
        return cls(
            totals={
                window: {name: jnp.zeros_like(b, jnp.float32) for name, b in own.items()}
                for window in windows
            },
            weights={name: jnp.zeros(()) for name in windows},
            count=jnp.zeros((), jnp.int32),
            steps=steps,
            epsilon=epsilon,
        )

    def updated(self, moments: Any) -> "Dynamics":
        """With the moments after one more update of the optimiser."""
        mu, nu = (b_of(optax.tree.get(moments, name)) for name in ("mu", "nu"))
        count = self.count + 1
        totals, weights = {}, {}
        for name, own in self.totals.items():
            window = WINDOWS[name]
            counts = (count > window.after * self.steps).astype(jnp.float32)
            weights[name] = window.keep * self.weights[name] + counts
            totals[name] = {
                module: window.keep * total
                + counts * self.seen(mu[module], nu[module], window.moment)
                for module, total in own.items()
            }
        return dataclasses.replace(self, totals=totals, weights=weights, count=count)

    def seen(self, m: jax.Array, v: jax.Array, moment: bool) -> jax.Array:
        """What a window averages of a module's moments."""
        m, v = m.astype(jnp.float32), v.astype(jnp.float32)
        return m if moment else m / (jnp.sqrt(v) + self.epsilon)

    def maps(self) -> dict[str, dict[str, jax.Array]]:
        """The means by window and module; zeros where a window has not begun."""
        return {
            name: {module: total / jnp.maximum(self.weights[name], 1e-30) for module, total in
                   own.items()}
            for name, own in self.totals.items()
        }  # fmt: skip


def b_of(tree: Any) -> dict[str, jax.Array]:
    """The B of every `Factors` in a tree, by the module name that it stands under."""

    def is_factors(node: Any) -> bool:
        return isinstance(node, Factors)

    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_factors)[0]
    return {path[-1].key: leaf.b for path, leaf in found if is_factors(leaf)}


def statistics(m_RF: jax.Array, v_RF: jax.Array, epsilon: float) -> jax.Array:
    """STATISTICS of one matrix's moments [9], as EDIT logs them, in the dtype of the moments.

    Standard deviations are unbiased; the last two are means of the largest sums of |update| over
    a row and over a column.
    """
    kind = m_RF.dtype
    m, v = m_RF.astype(jnp.float32), v_RF.astype(jnp.float32)
    root = (jnp.sqrt(v).astype(kind) + jnp.asarray(epsilon, kind)).astype(kind)
    update = (m_RF / root).astype(jnp.float32)

    def largest(axis: int) -> jax.Array:
        sums = jnp.sum(jnp.abs(update), axis=axis).astype(kind)
        return jnp.mean(jax.lax.top_k(sums, min(TOP, len(sums)))[0].astype(jnp.float32))

    found = (
        jnp.linalg.norm(m), jnp.std(m, ddof=1), jnp.mean(v), jnp.std(v, ddof=1),
        jnp.mean(update), jnp.std(update, ddof=1), jnp.linalg.norm(update),
        largest(1), largest(0),
    )  # fmt: skip
    return jnp.stack(found).astype(kind)


def described(moments: Any, epsilon: float) -> dict[str, jax.Array]:
    """STATISTICS of the B of every module, [9] each, by name; rows are those of PEFT's B."""
    mu, nu = (b_of(optax.tree.get(moments, name)) for name in ("mu", "nu"))

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1).T

    return {name: statistics(flat(mu[name]), flat(nu[name]), epsilon) for name in mu}


def flattened(maps: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Maps [R, *outputs] by module in the layout of PEFT's B, [outputs, R]."""
    return {name: x.reshape(x.shape[0], -1).T for name, x in maps.items()}
