"""Rows at different blocks in one step: each gets the tokens and the NFE that it gets alone."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.decode.look import Call
from jdllm.decode.loop import active, enter_block, leave_block
from jdllm.decode.start import start
from jdllm.decode.step import block_step
from jdllm.decode.work import State, Work
from jdllm.llm import LLM
from jdllm.parity import make_setup
from tests.support.marks import quick
from tests.support.tiny_models import TINY, canvases, random_prompts, tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dual": ("plain", {"threshold": 0.6}),
    "prefix, shifted": ("shifted", {"threshold": 0.6, "cache": "prefix"}),
    "no cache, sampled": ("plain", {"threshold": 0.5, "temperature": 0.8, "cache": "none"}),
    "block": ("blocks", {"threshold": 0.5, "edit.threshold": 0.4}),
    "steps": ("plain", {"rule": "quota", "steps": 9, "stable_steps": 1, "cfg_scale": 0.5}),
}


def tick(work: Work, state: State, turn_B: jax.Array) -> State:
    """What an engine does in a round: finished blocks go, new ones begin, the rows whose turn it is
    make a step, wherever they are."""
    setup = work.setup

    def call(state: State, active_B: jax.Array, full: bool) -> State:
        told = Call(active_B, full, apart=True)
        rows, cache, _, _ = block_step(work.model, setup, state.rows, state.cache, told)
        return dataclasses.replace(state, rows=rows, cache=cache, forwards=state.forwards + 1)

    begun_B = state.rows.last > state.rows.first
    due_B = ~state.rows.done & ~active(setup, state.rows)
    state = leave_block(work, state, due_B & begun_B)
    entering_B = due_B & ~state.rows.done
    state = dataclasses.replace(state, rows=enter_block(setup, state.rows, entering_B))
    if setup.plan.refreshes:
        state = call(state, entering_B & active(setup, state.rows), True)
    return call(state, turn_B & active(setup, state.rows), False)


def staggered(llm: LLM, config: DecodeConfig, prompts: list[list[int]]):
    """Canvases, NFE, and the numbers of the blocks that the rows were in, round by round."""
    config = llm.resolve(config)
    setup = make_setup(config, llm.config)
    request = llm._request(prompts, [0] * len(prompts), config, setup)

    def begin(model, request):
        return start(Work(model, setup, request))

    @partial(jax.jit, donate_argnums=1)
    def round_(model, state, request, turn_B):
        return tick(Work(model, setup, request), state, turn_B)

    state, blocks = jax.jit(begin)(llm.model, request), []
    rates = 1 + np.arange(len(request.tokens))
    for number in range(400):
        state = round_(llm.model, state, request, jnp.array(number % rates == 0))
        blocks.append(state.rows.block.tolist())
        if state.rows.done.all():
            break
    assert state.rows.done.all()
    tokens = np.asarray(state.rows.tokens)
    rows = [
        row[: setup.canvas_length(len(p))].tolist() for row, p in zip(tokens, prompts, strict=True)
    ]
    return rows, state.rows.nfe.tolist(), blocks


@pytest.mark.parametrize("case", quick(CASES, "dual", "no cache, sampled", "block"))
def test_rows_at_different_blocks_get_their_own_tokens(case: str):
    kind, options = CASES[case]
    config = DecodeConfig.of({"gen_length": 12, "block_length": 4} | options)
    llm, prompts = tiny(kind, 1.5), random_prompts(11, [9, 4])
    rows, nfe, blocks = staggered(llm, config, prompts)
    alone = [canvases(llm, config, [prompt]) for prompt in prompts]
    assert rows == [row for [row], _, _ in alone]
    assert nfe == [count for _, [count], _ in alone]
    assert any(first != second for first, second in blocks), "they were never apart"


def test_a_mask_in_a_prompt_is_text():
    """It is neither filled nor waited for, whatever is cached, and in the block that it shares."""
    for kind, options in CASES.values():
        config = DecodeConfig.of({"gen_length": 12, "block_length": 4, "align": True} | options)
        llm, prompt = tiny(kind, 1.5), random_prompts(2, [7])[0]
        prompt[1] = prompt[5] = prompt[6] = TINY.mask_id
        [row], _, _ = canvases(llm, config, [prompt])
        assert row[:7] == prompt
        assert TINY.mask_id not in row[7:]
