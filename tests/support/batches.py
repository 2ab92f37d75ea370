"""Batches of made-up tokens for the training step."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jdllm.train import objective as objectives


def batch_of(tokens: Any, prompts: Any, lengths: Any) -> objectives.Batch:
    """Returns rows of one example each: a prompt, a response, hidden columns from a length on."""
    columns = np.arange(tokens.shape[-1])
    inside = columns < np.asarray(lengths)[..., None]
    learned = inside & (columns >= np.asarray(prompts)[..., None])
    rows = np.arange(inside[..., 0].size).reshape(inside.shape[:-1])
    example = np.where(inside, rows[..., None], objectives.HIDDEN)
    tokens, example = (jnp.asarray(x, jnp.int32) for x in (tokens, example))
    visit = jnp.zeros(rows.shape, jnp.int32)
    return objectives.Batch(tokens, jnp.asarray(learned), example, visit)
