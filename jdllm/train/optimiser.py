"""How a gradient changes what trains: learning rate schedules, and AdamW behind a clip."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the optimiser."""

    steps: int = 1000
    learning_rate: float = 1e-5
    schedule: str = "linear"
    """linear or cosine, both down to the floor after the warm-up; or constant."""
    warmup: float = 0
    """Steps, or below 1 their share of all."""
    cooldown: float = 0.0
    """Share of the steps in which a constant rate falls to the floor in the end."""
    floor: float = 0.0
    """The last rate, as a share of the peak."""
    optimizer: Literal["adamw", "adamw_hf"] = "adamw"
    """adamw_hf is transformers' own: epsilon is not corrected, decay reads the new weights."""
    weight_decay: float = 0.1
    """Decoupled; applied to matrices only."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule} must be one of {', '.join(SCHEDULES)}")
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"steps={self.steps} must be at least 1 and warmup={self.warmup} between 0 and it"
            )
        for name in ("learning_rate", "clip", "epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        for name in ("cooldown", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")

    @property
    def warmup_steps(self) -> int:
        """Updates that rise from 0 to the peak."""
        return round(self.warmup * self.steps if self.warmup < 1 else self.warmup)


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Learning rate by update count (from 0): linear warm-up, then the schedule's tail."""
    peak, rise = recipe.learning_rate, recipe.warmup_steps
    rest = max(recipe.steps - rise, 1)
    warm = optax.linear_schedule(0.0, peak, max(rise, 1))
    if recipe.schedule == "constant":
        fall = min(max(round(recipe.cooldown * recipe.steps), 1), rest)
        end = optax.linear_schedule(peak, recipe.floor * peak, fall)
        flat = optax.constant_schedule(peak)
        if not recipe.cooldown:
            return optax.join_schedules([warm, flat], [rise])
        return optax.join_schedules([warm, flat, end], [rise, recipe.steps - fall])
    tails = {
        "linear": optax.linear_schedule(peak, recipe.floor * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, recipe.floor),
    }
    return optax.join_schedules([warm, tails[recipe.schedule]], [rise])


def matrices(params: Any) -> Any:
    """Which parameters decay."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_transformers(recipe: Recipe) -> optax.GradientTransformation:
    """What AdamW of transformers does with optax's moments: its own correction and decay.

    The step is lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon); then the new weights lose
    lr * decay of themselves. It follows a transformation that passes the gradient on.
    """
    adam = optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2, eps=recipe.epsilon)
    rate = learning_rate(recipe)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        assert params is not None
        moments: optax.ScaleByAdamState
        _, moments = adam.update(gradient, state)  # pyright: ignore[reportAssignmentType]
        t = jnp.asarray(moments.count, jnp.float32)
        lr = jnp.asarray(rate(state.count), jnp.float32)
        size = lr * jnp.sqrt(1 - recipe.beta2**t) / (1 - recipe.beta1**t)

        def one(m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            moved = -size * m / (jnp.sqrt(v) + recipe.epsilon)
            decay = recipe.weight_decay * (p.ndim > 1)
            return moved - lr * decay * (p + moved)

        return jax.tree.map(one, moments.mu, moments.nu, params), moments

    return optax.GradientTransformation(adam.init, update)  # pyright: ignore[reportArgumentType]


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm."""
    adamw = optax.adamw(
        learning_rate(recipe),
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        mask=matrices,
    )
    kinds = {"adamw": adamw, "adamw_hf": by_transformers(recipe)}
    return optax.chain(optax.clip_by_global_norm(recipe.clip), kinds[recipe.optimizer])
