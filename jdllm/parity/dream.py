"""Dream's sampler: every step is made, and every row's quota comes from the batch's average."""

import dataclasses

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import every_step
from jdllm.unmask import CarryOver, Schedule, Timesteps


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """The setup as Dream's loop has it."""
    schedule = setup.schedule
    steps = schedule.per_block if isinstance(schedule, CarryOver) else schedule.steps
    return dataclasses.replace(
        setup, unmask=every_step(setup.unmask, steps), schedule=averaged(schedule)
    )


def averaged(schedule: Schedule) -> Schedule:
    """The schedule whose quota follows the batch's average number of masks, where it can."""
    return dataclasses.replace(schedule, mean=True) if isinstance(schedule, Timesteps) else schedule
