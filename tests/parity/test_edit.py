"""EDIT's recorded runs, replayed call by call: tokens, masks, divergences, counts and exits."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.decode import Request
from jdllm.decode.loop import active, enter_block, leave_block, step
from jdllm.decode.setup import Setup
from jdllm.decode.start import start
from jdllm.decode.work import State, Work
from jdllm.parity import make_setup
from jdllm.parity.edit import counted
from jdllm.stop import Drift, Exit, Stops
from jdllm.stop.rule import with_rule
from jdllm.unmask import Gaussian
from tests.support.edit_goldens import SCENARIOS, aims_of, recorded, settings_of, tiny_model

LOSES = {"long_block_std5", "long_block_exit", "polish_clipped"}
"""Scenarios whose schedule lost a token; the others need no recorded counts."""
DEFAULT = {"two_blocks_span2", "uneven_blocks", "polish_clipped", "cfg_scale1"}


def counts_of(run: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    """The tokens that each step of each block asked for; after an exit, what the formula says."""
    config = settings_of(run)
    schedule = make_setup(config, tiny_model(run).config).schedule
    assert isinstance(schedule, Gaussian) and config.block_length
    table = schedule.table()
    lengths = config.block_lengths or (config.block_length,) * len(run["exit_steps"])
    found, place = [], 0
    for block, (length, calls) in enumerate(zip(lengths, run["exit_steps"], strict=True)):
        row = table[min(block, len(table) - 1), length].tolist()
        row = row[: steps_of(config, length)]
        index = run["fwd_step_idx"][place : place + calls]
        regular = int(np.argmax(np.diff(index, append=-1) < 0)) + 1
        row[:regular] = run["fwd_transfer"][place : place + regular].tolist()
        found.append(tuple(row))
        place += calls
    return tuple(found)


def steps_of(config: Any, length: int) -> int:
    return length * config.steps // config.gen_length


def prepare(run: dict[str, np.ndarray], loses: bool) -> tuple[Any, Setup, Request]:
    config, model, aims = settings_of(run), tiny_model(run), aims_of(run)
    setup = make_setup(config, model.config)
    if loses:
        setup = counted(setup, counts_of(run))

    def aimed(rule: Exit) -> Exit:
        assert isinstance(rule.signal, Drift)
        signal = dataclasses.replace(rule.signal, modules=tuple(aims), directions=6)
        return dataclasses.replace(rule, signal=signal)

    setup = dataclasses.replace(setup, stop=with_rule(setup.stop, Exit, aimed))
    prompt = run["prompt"].tolist()
    canvas = prompt + [model.config.mask_id] * int(run["gen_length"])
    return model, setup, Request(
        tokens=jnp.array([canvas]), prompt_lengths=jnp.array([len(prompt)]),
        keys=jax.vmap(jax.random.key)(jnp.zeros(1, jnp.int32)), idle=jnp.array([False]), aims=aims,
    )  # fmt: skip


def value_of(setup: Setup, state: State) -> float:
    stop = setup.stop
    assert isinstance(stop, Stops)
    place = [isinstance(rule, Exit) for rule in stop.rules].index(True)
    return float(state.rows.stop[place]["value"][0])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in SCENARIOS],
)
def test_edit_replays_the_recorded_run(name: str):
    run = recorded(f"generate_{name}")
    model, setup, request = prepare(run, name in LOSES)

    @partial(jax.jit, static_argnames="what")
    def call(state: State | None, model: Any, request: Request, what: str) -> State:
        work = Work(model, setup, request)
        if what == "start":
            return start(work)
        assert state is not None
        if what == "enter":
            rows = enter_block(setup, state.rows, ~state.rows.done)
            return dataclasses.replace(state, rows=rows)
        return (
            step(work, state, False)
            if what == "step"
            else leave_block(work, state, ~state.rows.done)
        )

    state = call(None, model, request, "start")
    values, before, after = [], [], []
    while not bool(state.rows.done[0]):
        state = call(state, model, request, "enter")
        while bool(active(setup, state.rows)[0]):
            before.append(np.asarray(state.rows.tokens[0]))
            finishing = bool(state.rows.due[0] >= 0)
            state = call(state, model, request, "step")
            after.append(np.asarray(state.rows.tokens[0]))
            if not finishing:
                values.append(value_of(setup, state))
        state = call(state, model, request, "leave")
    np.testing.assert_array_equal(before, run["fwd_x_before"])
    np.testing.assert_array_equal(after, run["fwd_x_after"])
    np.testing.assert_allclose(values, run["kl"], rtol=1e-4, atol=1e-6)
    assert state.rows.calls[0].tolist() == run["exit_steps"].tolist()
    assert state.rows.tokens[0].tolist() == run["x_final"].tolist()
    assert int(np.sum(state.rows.tokens[0] == model.config.mask_id)) == int(run["masks_left"])
