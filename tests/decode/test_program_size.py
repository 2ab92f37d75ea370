"""How many copies of the layers a program of the loop holds: compilation takes as long as those."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jdllm import DecodeConfig
from jdllm.decode import Request, make_setup
from jdllm.decode.loop import decode
from jdllm.load import read_facts
from jdllm.runtime import sharding
from jdllm.store.checkpoint import random_model

pytestmark = pytest.mark.slow


def products(cache: str, layers: int) -> int:
    """Matrix products in the lowered program of a request."""
    facts = dataclasses.replace(read_facts("random:tiny"), layers=layers)
    model = random_model(facts, sharding.parse_mesh("1x1"))
    options = DecodeConfig(gen_length=16, block_length=8, rule="quota", tokens_per_step=1,
                           cache=cache, stop="none").resolve(model=facts)  # type: ignore # fmt: skip
    setup = make_setup(options, facts)
    request = Request(
        tokens=jnp.full((1, 24), facts.mask_id, jnp.int32),
        prompt_lengths=jnp.full(1, 8, jnp.int32),
        keys=jax.random.split(jax.random.key(0), 1),
        idle=jnp.zeros(1, bool),
    )
    return decode.lower(model, request, setup).as_text().count("dot_general")


@pytest.mark.parametrize(("cache", "copies"), [("prefix", 2), ("dual", 2), ("block", 2)])
def test_copies_of_a_layer(cache: str, copies: int):
    """Full pass and step; with a block cache the prompt, and one pass for steps and commits."""
    plain = products("none", 2) - products("none", 1)
    assert plain > 0
    assert products(cache, 2) - products(cache, 1) == copies * plain
