"""How a gradient changes what trains: learning rate schedules, and AdamW behind a clip."""

import dataclasses

import jax
import optax

SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the optimiser."""

    steps: int = 1000
    learning_rate: float = 1e-5
    schedule: str = "linear"
    """linear or cosine, both down to zero after the warm-up."""
    warmup: int = 0
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


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Learning rate by update count (from 0): linear warm-up, then linear or cosine decay to 0."""
    decay = max(recipe.steps - recipe.warmup, 1)
    tails = {
        "linear": optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(recipe.learning_rate, decay),
    }
    rise = optax.linear_schedule(0.0, recipe.learning_rate, max(recipe.warmup, 1))
    return optax.join_schedules([rise, tails[recipe.schedule]], [recipe.warmup])


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """optax.adamw behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(
            learning_rate(recipe),
            b1=recipe.beta1,
            b2=recipe.beta2,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
