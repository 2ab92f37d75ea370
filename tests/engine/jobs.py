"""Jobs of tiny models, and what the engine makes of them."""

import dataclasses
from typing import Any

import jax

from jdllm import DecodeConfig
from jdllm.decode import Setup
from jdllm.engine import Engine, EngineConfig, Job, Outcome, Progress, make_canvas, shared
from jdllm.llm import LLM
from jdllm.parity import make_setup

SMALL = EngineConfig(slots=3, columns=32, page=8, rounds=2, chunk=8, lanes=2)


@dataclasses.dataclass
class Told:
    """What a listener was told."""

    events: list[Progress] = dataclasses.field(default_factory=list)

    def __call__(self, event: Progress) -> None:
        self.events.append(event)

    @property
    def outcome(self) -> Outcome:
        """The last event, which must be an end."""
        assert isinstance(self.events[-1], Outcome)
        return self.events[-1]


def setup_of(llm: LLM, **options: Any) -> Setup:
    return make_setup(llm.resolve(DecodeConfig.of(options)), llm.config)


def make(llm: LLM, setup: Setup, prompt: list[int], seed: int = 0, **facts: Any) -> Job:
    """A job with its own row's key, as `LLM` makes them."""
    canvas = make_canvas(prompt, setup, llm.config.mask_id)
    key = jax.random.fold_in(jax.random.key(0), seed)
    return Job(canvas, len(prompt), *shared(setup), key, **{"listener": Told(), **facts})


def canvas(job: Job) -> tuple[list[int], int]:
    """The whole canvas at a job's end, and its NFE."""
    outcome = job.listener.outcome  # pyright: ignore[reportFunctionMemberAccess]
    assert outcome.reason == "done"
    return [*job.canvas[: job.prompt].tolist(), *outcome.tokens.tolist()], outcome.nfe


def run(llm: LLM, jobs: list[Job], config: EngineConfig = SMALL) -> Engine:
    """The engine after all the jobs."""
    engine = Engine(llm.model, config)
    for job in jobs:
        engine.submit(job)
    engine.drain()
    return engine
