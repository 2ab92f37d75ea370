"""`LLM.generate` by the engine: the completions of the batches, in the order of the prompts."""

import dataclasses

import pytest

from jdllm import DecodeConfig
from jdllm.engine.offline import pays
from jdllm.llm import LLM
from tests.engine.jobs import setup_of
from tests.support.tiny_models import random_prompts, tiny

SHORT = DecodeConfig(gen_length=8, block_length=4, threshold=0.5, temperature=0.3)


def test_completions_are_those_of_batches():
    llm = tiny("blocks", 1.5)
    prompts = random_prompts(2, [5, 9, 4, 12, 7, 5])
    prompts.append(prompts[0])  # its draws are others
    engine = LLM(llm.model, engine="on")
    batches = list(engine.stream(prompts, SHORT, batch_size=2))
    assert sorted(i for batch in batches for i in batch.index) == list(range(7))
    assert len(batches) > 2 and sum(batch.forwards for batch in batches) > 0
    assert engine.generate(prompts, SHORT, batch_size=2) == llm.generate(prompts, SHORT)


def test_it_is_used_where_it_pays():
    llm = tiny("blocks")
    setup = setup_of(llm, gen_length=8)
    assert pays(llm.model, setup, 9, 8)
    assert not pays(llm.model, setup, 8, 8)  # one batch
    assert not pays(llm.model, setup, 9, 4)  # few rows
    assert not pays(tiny("plain").model, setup_of(tiny("plain"), gen_length=8), 9, 8)
    lone = LLM(llm.model, engine="on")
    with pytest.raises(ValueError, match="engine=off"):
        lone.generate([[1, 2]], dataclasses.replace(SHORT, parity="dinfer"))
