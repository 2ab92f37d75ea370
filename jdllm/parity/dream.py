"""Dream's sampler: every step is made, and the batch's average gives every row's quota."""

import dataclasses

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import every_step
from jdllm.unmask import CarryOver, Schedule, Timesteps


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of Dream's loop."""
    schedule = setup.schedule
    steps = schedule.per_block if isinstance(schedule, CarryOver) else schedule.steps
    return dataclasses.replace(
        setup, unmask=every_step(setup.unmask, steps), schedule=averaged(schedule)
    )


def averaged(schedule: Schedule) -> Schedule:
    """Returns the schedule with quotas from the batch's average number of masks, if it has them."""
    return dataclasses.replace(schedule, mean=True) if isinstance(schedule, Timesteps) else schedule
