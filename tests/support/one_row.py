"""Builds by hand what rules and stops are given of one row."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jdllm.stop.rule import StopView
from jdllm.unmask import View

MASK, VOCAB = 9, 10


def one_hot(tokens: list[int], sharpness: float | list[float] = 9.0) -> jnp.ndarray:
    """Returns logits [1, N, V] that favour a token at every position."""
    logits = np.zeros((1, len(tokens), VOCAB), np.float32)
    logits[0, np.arange(len(tokens)), tokens] = sharpness
    return jnp.array(logits)


def view(open_: list[bool], quota: int = 1, **facts: Any) -> View:
    """Returns a rule's view without draws and floor: masks where `open_`, elsewhere token 0."""
    open_BN = jnp.array([open_])
    known = {
        "logits": jnp.zeros((1, len(open_), VOCAB)),
        "ids_BN": jnp.where(open_BN, MASK, 0),
        "open_BN": open_BN,
        "settled_BN": jnp.zeros_like(open_BN),
        "quota_B": jnp.array([quota]),
        "share_B": jnp.ones(1),
        "floor_B": jnp.array([-jnp.inf]),
        "draw": lambda shape: jnp.zeros((1, *shape)),
    }
    return View(**known | facts)


def canvas_view(ids: list[int], prompt: int, logits: jnp.ndarray, quota: int = 1, **facts) -> View:
    """Returns the view of a block whose first `prompt` columns are given."""
    open_ = [token == MASK for token in ids]
    settled = [i >= prompt and not m for i, m in enumerate(open_)]
    seen = {"ids_BN": jnp.array([ids]), "settled_BN": jnp.array([settled]), "logits": logits}
    return view(open_, quota, **seen | facts)


def stop_view(tokens: list[int], prompt: int, block: tuple[int, int], **facts: Any) -> StopView:
    """Returns a stop's view after a step of `block` that wrote nothing, changed by the facts."""
    columns = jnp.arange(len(tokens))[None]
    tokens_BT, generated_BT = jnp.array([tokens]), columns >= prompt
    known = {
        "tokens_BT": tokens_BT,
        "open_BT": generated_BT & (tokens_BT == MASK),
        "generated_BT": generated_BT,
        "block_BT": (columns >= block[0]) & (columns < block[1]),
        "opening": False,
        "closing": False,
        "done_B": jnp.array([False]),
        "nfe_B": jnp.array([1]),
        "step_B": jnp.array([1]),
        "candidates_BT": jnp.full(columns.shape, -1),
        "written_BT": jnp.zeros(columns.shape, bool),
    }
    return StopView(**known | facts)
