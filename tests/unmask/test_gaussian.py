"""EDIT's schedule: near its recorded counts, complete, and as front-loaded as it is said to be."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.decode.presets import PRESETS
from jdllm.decode.rules import make_schedule, steps_of_blocks
from jdllm.parity.edit import Counted
from jdllm.unmask.schedule import Gaussian, Pace, split_by_gaussian, split_quota
from tests.support.edit_goldens import recorded

RECORDED = recorded("schedules")
EDIT = [name for name in PRESETS if name.startswith("edit-")]
# EDIT's own names of the tasks, and what leaving with the last mask costs of each plan
SPENT: dict[str, dict[int, int]] = {
    "countdown": {128: 47, 256: 95, 512: 176}, "sudoku": {128: 51, 256: 82, 512: 183},
    "math500": {128: 44, 256: 109, 512: 162}, "gsm8k": {128: 51, 256: 97, 512: 197},
}  # fmt: skip


def plan(name: str) -> tuple[DecodeConfig, Gaussian, list[int]]:
    """The settings, the schedule and the columns of every block of a preset."""
    config = DecodeConfig.named(name).resolve()
    gen, block = config.gen_length or 0, config.block_length or 1
    lengths = list(config.block_lengths) or [block] * (gen // block)
    schedule = make_schedule(config, len(lengths))
    assert isinstance(schedule, Gaussian)
    return config, schedule, lengths


@pytest.mark.parametrize("name", EDIT)
def test_edit_schedules_are_the_recorded_ones(name: str):
    """Block lengths and steps exactly, counts up to one token, none lost."""
    config, schedule, lengths = plan(name)
    _, task, length = name.split("-")
    start = f"{task.removesuffix('500')}_seq{length}/"
    steps = steps_of_blocks(config)
    steps = list(steps) if len(steps) > 1 else list(steps) * len(lengths)
    assert lengths == RECORDED[f"{start}block_lengths"].tolist()
    assert steps == RECORDED[f"{start}block_steps"].tolist()
    for block, columns in enumerate(lengths):
        theirs, table = RECORDED[f"{start}block{block}/counts"], schedule.table()
        mine = table[min(block, len(table) - 1), columns][: steps[block]]
        assert mine.sum() == columns and theirs.sum() in (columns, columns - 1)
        assert np.abs(mine - theirs).max() <= 1


@pytest.mark.parametrize("name", EDIT)
def test_edit_schedules_are_over_long_before_their_steps(name: str):
    """What leaving with the last mask costs: the control that needs no map."""
    _, schedule, lengths = plan(name)
    table = schedule.table()
    spent = sum(
        int(np.flatnonzero(table[min(block, len(table) - 1), columns])[-1]) + 1
        for block, columns in enumerate(lengths)
    )
    _, task, length = name.split("-")
    assert spent == SPENT[task][int(length)]


def test_edit_tables_replay_through_the_schedule():
    counts = tuple(
        tuple(RECORDED[f"countdown_seq256/block{block}/counts"].tolist()) for block in (0, 1)
    )
    schedule = Counted(counts)
    for block, row in enumerate(counts):
        asked = [int(ask(schedule, 64, step, block)) for step in range(len(row) + 2)]
        assert asked == [*row, 0, 0] or block == 0 and asked[: len(row)] == list(row)


def ask(schedule: Any, opened: int, step: int, block: int) -> int:
    pace = Pace(*(jnp.array([x]) for x in (opened, opened, step, block)))
    return int(schedule(pace)[0][0])


def test_edit_schedule_by_step_block_and_masks():
    schedule = Gaussian((4, 8), (0.25, 0.5), (0.2,), 16)
    for block, (steps, peak) in enumerate([(4, 0.25), (8, 0.5), (8, 0.5)]):
        for masks in (0, 5, 16):
            wanted = split_by_gaussian(masks, steps, peak, 0.2)
            assert sum(wanted) == masks
            found = [ask(schedule, masks, step, block) for step in range(12)]
            assert found == [*wanted, *[0] * (12 - steps)]


def test_a_wide_gaussian_is_the_uniform_schedule():
    for masks in (64, 60, 7):
        wide = split_by_gaussian(masks, 32, 0.25, 1e6)
        even = [int(split_quota(jnp.array(masks), 32, jnp.array(step))) for step in range(32)]
        assert list(wide) == even


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_edit_polish_splits_as_recorded(steps: int):
    """What is left, over the calls that are left, rounded up: the odd token comes first."""
    for name, row in RECORDED.items():
        if name.startswith("uniform/") and name.endswith(f"/s{steps}"):
            left, found = int(name.split("/")[1][1:]), []
            for due in range(steps, 0, -1):
                found.append(-(-left // due))
                left -= found[-1]
            assert found == row.tolist()
