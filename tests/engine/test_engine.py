"""The engine: whatever the load, a request gets the tokens and the NFE that it gets alone."""

import dataclasses
from typing import Any

import pytest

from jdllm import DecodeConfig
from tests.engine.jobs import SMALL, canvas, make, run, setup_of
from tests.support.tiny_models import canvases, random_prompts, tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("blocks", {"threshold": 0.5}),
    "block, edited": ("blocks", {"threshold": 0.5, "edit.threshold": 0.4}),
    "dual": ("plain", {"threshold": 0.6}),
    "dual, sampled, renewed": ("plain", {"temperature": 0.8, "refresh_every": 2}),
    "prefix, shifted": ("shifted", {"threshold": 0.6, "cache": "prefix"}),
    "no cache": ("plain", {"cache": "none", "rule": "quota", "steps": 6, "stable_steps": 1}),
    "earlier blocks only": ("plain", {"cache": "block", "threshold": 0.6}),
}
PROMPTS = random_prompts(11, [9, 4, 21, 1, 13])


@pytest.mark.parametrize("case", CASES)
def test_a_request_gets_what_it_gets_alone(case: str):
    kind, options = CASES[case]
    options = {"gen_length": 12, "block_length": 4} | options
    llm = tiny(kind, 1.5)
    setup = setup_of(llm, **options)
    jobs = [make(llm, setup, prompt) for prompt in PROMPTS]
    engine = run(llm, jobs)
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        [row], [nfe], _ = canvases(llm, DecodeConfig.of(options), [prompt])
        assert canvas(job) == (row, nfe)
    assert engine.scheduler.pool.free == engine.config.pages


def test_rows_that_lose_their_pages_go_on_as_if_nothing_was():
    llm = tiny("blocks", 1.0)
    options = {"gen_length": 24, "block_length": 4, "threshold": 0.5, "temperature": 0.5}
    setup = setup_of(llm, **options)
    jobs = [make(llm, setup, prompt) for prompt in PROMPTS]
    engine = run(llm, jobs, dataclasses.replace(SMALL, pages=8))
    assert sum(job.preemptions for job in jobs) > 0
    for job, prompt in zip(jobs, PROMPTS, strict=True):
        [row], [nfe], _ = canvases(llm, DecodeConfig.of(options), [prompt])
        assert canvas(job) == (row, nfe)
    assert engine.scheduler.pool.free == 8
