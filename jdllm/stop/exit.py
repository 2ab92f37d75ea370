"""Exit leaves a block once a signal has been calm for some steps; its signals are the rivals' too.

All of them share the schedule, the check after every step, and how a block is finished.
"""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Asks, StopView, Verdict, fill_block

HIGH, LOW = 7.5, 2.5  # logits between which Prophet's and SchED's bars fall
Curve = Literal["cosine", "linear", "exponential"]


class Signal(Protocol):
    """Measures one number per row after every step, and says when it is calm."""

    @property
    def asks(self) -> Asks: ...

    def start(self, tokens_BT: jax.Array) -> Any:
        """Returns the memory before the first step; the first axis of its arrays is the row."""
        ...

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        """Returns the value of each row [B], and the memory after this step."""
        ...

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        """Returns the rows [B] whose value speaks for leaving the block."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """What signals share that remember nothing."""

    @property
    def asks(self) -> Asks:
        return Asks()

    def start(self, tokens_BT: jax.Array) -> Any:
        return ()

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return value_B >= threshold_B


@dataclasses.dataclass(frozen=True)
class Steps(Plain):
    """The number of the step: leaves a block after so many, whatever the model says."""

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        return view.step_B.astype(jnp.float32), memory


@dataclasses.dataclass(frozen=True)
class Entropy(Plain):
    """The mean entropy of the block's open columns, in nats."""

    @property
    def asks(self) -> Asks:
        return Asks(entropy=True)

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        assert view.look is not None and view.look.entropy_BT is not None
        return _mean_over_open(view, view.look.entropy_BT), memory

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return value_B < threshold_B


@dataclasses.dataclass(frozen=True)
class Prophet(Plain):
    """The mean margin of the block's open columns, in logits, over Prophet's falling stairs.

    The bar is 7.5 in the first third of the steps, 5 in the second and 2.5 in the last. Prophet
    looks at the whole canvas; with one block over it all this is the same rule.
    """

    @property
    def asks(self) -> Asks:
        return Asks(margin=True)

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        assert view.look is not None and view.look.margin_BT is not None
        return _mean_over_open(view, view.look.margin_BT), memory

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return value_B >= self.bar(view) * threshold_B

    def bar(self, view: StopView) -> jax.Array:
        """The margin that is enough, by how far the block has come."""
        assert view.look is not None
        share_B = view.step_B / view.look.steps_B
        stairs_B = jnp.where(share_B < 2 / 3, (HIGH + LOW) / 2, LOW)
        return jnp.where(share_B < 1 / 3, HIGH, stairs_B)


@dataclasses.dataclass(frozen=True)
class SchED(Prophet):
    """The same margin over SchED's smooth bar, which falls from 7.5 to 2.5."""

    curve: Curve = "cosine"

    def bar(self, view: StopView) -> jax.Array:
        assert view.look is not None
        share_B = (view.step_B - 1) / jnp.maximum(view.look.steps_B - 1, 1)
        fall = {
            "cosine": (1 + jnp.cos(jnp.pi * share_B)) / 2,
            "linear": 1 - share_B,
            "exponential": jnp.exp(-4 * share_B),
        }
        return LOW + (HIGH - LOW) * fall[self.curve]


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """The share of the block's open columns whose best token is another than a step ago."""

    @property
    def asks(self) -> Asks:
        return Asks()

    def start(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.full_like(tokens_BT, -1)

    def measure(self, view: StopView, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        open_BT = view.block_BT & view.open_BT
        other_BT = open_BT & (view.candidates_BT != memory)
        share_B = jnp.sum(other_BT, 1) / jnp.maximum(jnp.sum(open_BT, 1), 1)
        return jnp.where(view.step_B == 1, jnp.inf, share_B), view.candidates_BT

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return value_B <= threshold_B


@dataclasses.dataclass(frozen=True)
class Exit:
    """Leaves a block once `required` of the last `patience` steps were calm.

    What is open then is written in `polish` more calls, or as many as the schedule still has; with
    none, at once. Numbers are one per block; the last one serves all blocks that follow.
    """

    signal: Signal
    thresholds: tuple[float, ...]
    patience: tuple[int, ...]
    required: tuple[int, ...]
    polish: tuple[int, ...]
    leaves_open: bool = False
    """EDIT's quirk: with no call left for it, open columns stay open."""

    @property
    def asks(self) -> Asks:
        return self.signal.asks

    def start(self, tokens_BT: jax.Array) -> dict[str, Any]:
        rows = len(tokens_BT)
        calm_BS = jnp.zeros((rows, max(self.patience)), bool)
        memory = self.signal.start(tokens_BT)
        return {"calm": calm_BS, "signal": memory, "value": jnp.zeros(rows)}

    def __call__(self, view: StopView, carry: dict[str, Any]) -> Verdict:
        none_B = jnp.zeros(len(view.tokens_BT), bool)
        if view.look is None:
            return Verdict(view.tokens_BT, none_B, none_B, carry)
        look = view.look
        value_B, memory = self.signal.measure(view, carry["signal"])
        calm_B = self.signal.calm(value_B, of_block(self.thresholds, look.block_B), view)
        before_BS = carry["calm"][:, 1:] & (view.step_B > 1)[:, None]
        calm_BS = jnp.concatenate([before_BS, calm_B[:, None]], axis=1)
        span_B = of_block(self.patience, look.block_B)
        recent_BS = jnp.arange(calm_BS.shape[1]) >= calm_BS.shape[1] - span_B[:, None]
        count_B = jnp.sum(calm_BS & recent_BS, axis=1)
        exits_B = (count_B >= of_block(self.required, look.block_B)) & (view.step_B >= span_B)
        exits_B &= look.due_B < 0
        calls_B = jnp.clip(look.steps_B - view.step_B, 0, of_block(self.polish, look.block_B))
        tokens_BT = view.tokens_BT
        if not self.leaves_open:
            tokens_BT = fill_block(view, (exits_B & (calls_B == 0)) | (look.due_B == 1))
        kept = {"calm": calm_BS, "signal": memory, "value": value_B}
        return Verdict(tokens_BT, none_B, none_B, kept, jnp.where(exits_B, calls_B, -1))


def of_block(values: tuple[Any, ...], block_B: jax.Array) -> jax.Array:
    """Returns the value of each row's block [B]; the last one serves all that follow."""
    return jnp.asarray(values)[jnp.minimum(block_B, len(values) - 1)]


def _mean_over_open(view: StopView, x_BT: jax.Array) -> jax.Array:
    """The mean over the columns of the block that the call was still asked for.

    They are those that were open before it, the ones that it has just written included.
    """
    assert view.look is not None
    asked_BT = view.block_BT & view.generated_BT & ~view.look.settled_BT
    total_B = jnp.sum(jnp.where(asked_BT, x_BT, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(asked_BT, axis=1), 1)
