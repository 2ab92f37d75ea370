"""Loops of the references as plain twins, where no recording is open: schedules and counters.

One row, Python loops, float64 numpy; greedy, so nothing is drawn.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.decode import Dinfer, Smooth
from tests.support.oracle import candidates, confidences, select, times
from tests.support.plain_model import PlainModel, softmax
from tests.support.tiny_models import canvases, plain, random_prompts, tiny

GREEDY = DecodeConfig()
ENTROPY = DecodeConfig(remasking="entropy")


class Canvas:
    """A row, and logits of some of its columns, shifted where the model is."""

    def __init__(self, model: PlainModel, prompt: list[int], gen: int):
        self.model, self.facts, self.prompt = model, model.facts, len(prompt)
        self.x = np.array(prompt + [model.facts.mask_id] * gen)
        self.inputs = model.table_VD[self.x].copy()
        self.keys = model.empty(len(self.x))
        self.nfe = 0

    def __call__(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Logits by column of the window; the shift reuses the first row, as the references do."""
        self.nfe += 1
        columns = np.arange(first, last or len(self.x))
        logits = self.model(self.inputs[columns], columns, np.full(len(self.x), True), self.keys)
        return np.concatenate([logits[:1], logits[:-1]]) if self.facts.shift_logits else logits

    def open(self, first: int, last: int) -> list[int]:
        return [i for i in range(first, last) if self.x[i] == self.facts.mask_id]

    def fill(
        self, logits: np.ndarray, start: int, places: list[int], quota: int, like: DecodeConfig
    ) -> None:
        """The quota's best of the places, by logits whose first row is column `start`."""
        ids = candidates(logits, like, self.facts.mask_id)
        c = confidences(logits, ids, like, self.facts.stop_ids)
        for i in select(c, [p - start for p in places], like, quota, -np.inf):
            self.x[start + i] = ids[i]
        self.inputs[:] = self.model.table_VD[self.x]


def llada(canvas: Canvas, gen: int, block: int, steps: int) -> None:
    """Every step is made; a quota may be zero."""
    like, each = DecodeConfig(rule="quota"), steps // (gen // block)
    for start in range(canvas.prompt, canvas.prompt + gen, block):
        for step in range(each):
            quota = block // each + (step < block % each)
            canvas.fill(canvas(), 0, canvas.open(0, start + block), quota, like)


def dream(canvas: Canvas, gen: int, block: int, steps: int) -> None:
    """Every step is made; what the truncated share leaves, the last one takes."""
    like, t = DecodeConfig(rule="quota", remasking="entropy"), times(steps, 1e-3)
    for step in range(steps):
        places = canvas.open(0, len(canvas.x))
        share = np.float32(1) - t[step + 1] / t[step] if step < steps - 1 else np.float32(1)
        canvas.fill(canvas(), 0, places, int(np.float32(len(places)) * share), like)


def fast_dream(canvas: Canvas, gen: int, block: int, steps: int) -> None:
    """A full pass takes a block's first column; steps go on from the second of its times."""
    like, each = DecodeConfig(rule="quota", remasking="entropy"), steps // (gen // block)
    t = times(each, 1e-3)
    for start in range(canvas.prompt, canvas.prompt + gen, block):
        canvas.fill(canvas(), 0, [start], 1, like)
        for step in range(1, each):
            places = canvas.open(start, start + block)
            if not places:
                break
            share = np.float32(1) - t[step + 1] / t[step] if step < each - 1 else np.float32(1)
            canvas.fill(canvas(start), start, places, int(np.float32(len(places)) * share), like)


MANY: list[tuple[str, Callable[..., None], dict[str, Any]]] = [
    ("plain", llada, {"parity": "llada", "block_length": 4}),
    ("shifted", dream, {"parity": "dream", "schedule": "timesteps", "remasking": "entropy",
                        "block_length": 8}),
    ("shifted", fast_dream, {"parity": "fast_dream", "schedule": "timesteps", "cache": "prefix",
                             "remasking": "entropy", "block_length": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "twin", "options"), MANY, ids=[t.__name__ for _, t, _ in MANY])
def test_more_steps_than_tokens_are_made_as_the_reference_makes_them(kind, twin, options):
    llm, prompts = tiny(kind), random_prompts(5, [7, 7, 7])
    config = DecodeConfig(rule="quota", gen_length=8, steps=20, stop="none", **options)
    assert llm.resolve(config).steps == 20
    for prompt in prompts:
        rows, nfe, forwards = canvases(llm, config, [prompt])
        canvas = Canvas(plain(llm), prompt, 8)
        twin(canvas, 8, config.block_length, 20)
        assert rows == [canvas.x.tolist()]
        assert nfe == [forwards] == [canvas.nfe]
    assert canvas.nfe == 20 or twin is fast_dream


@pytest.mark.parametrize("schedule", ["masks", "timesteps"])
def test_more_steps_than_tokens_are_cut_where_no_reference_is_copied(schedule: Any):
    """They could only idle; a last block that is short has as many steps as the others."""
    options: dict[str, Any] = {"rule": "quota", "schedule": schedule, "block_length": 4}
    for gen, steps in ((8, 20), (7, 20), (7, None)):
        config = DecodeConfig(gen_length=gen, steps=steps, **options).resolve()
        assert config.steps == 8 and config.resolve() == config
    assert DecodeConfig(gen_length=8, steps=8, minimal_topk=2, **options).resolve().steps == 4


def smoothed(
    canvas: Canvas, gen: int, block: int, cache: str, every: int, threshold: float
) -> None:
    """dInfer's IterSmooth without vicinity: every call counts, for the cache's age as well."""
    n, table = 0, canvas.model.table_VD
    mask_id = canvas.facts.mask_id

    def decode(first: int, last: int, start: int) -> None:
        nonlocal n
        weight, bar = min(0.15 + 0.02 * n, 0.3), max(1 - 0.02 * n, threshold)
        logits = canvas(first, last)
        ids = candidates(logits, GREEDY, mask_id)
        c = confidences(logits, ids, GREEDY, ())
        places = [i - first for i in canvas.open(start, start + block)]
        best = max((c[i] for i in places), default=0.0)
        for i in places:
            if c[i] >= min(best - 1e-5, bar):
                canvas.x[first + i] = ids[i]
        for i in range(len(logits)):
            column = first + i
            canvas.inputs[column] = table[canvas.x[column]]
            if canvas.x[column] == mask_id:
                canvas.inputs[column] += weight * softmax(logits[i]) @ table
        n += 1

    for start in range(canvas.prompt, canvas.prompt + gen, block):
        fresh, stored = True, canvas.keys
        while masks := len(canvas.open(start, start + block)):
            for _ in range(max(min(masks // 2, 4), 1)):
                if fresh or n % every == 0:
                    decode(0, len(canvas.x), start)
                    fresh, stored = False, canvas.keys
                canvas.keys = [(k.copy(), v.copy()) for k, v in stored]
                decode(start, len(canvas.x) if cache == "prefix" else start + block, start)


@pytest.mark.parametrize(("cache", "every"), [("dual", 2), ("dual", 5), ("prefix", 3)])
def test_itersmooth_counts_every_call_for_the_age_of_its_cache(cache: Any, every: int):
    llm = tiny("plain")
    config = DecodeConfig(
        gen_length=12, block_length=6, threshold=0.8, edge="slack", cache=cache,
        refresh_every=every, smooth=Smooth(0.3), parity="dinfer", dinfer=Dinfer(2), stop="none",
    )  # fmt: skip
    for prompt in random_prompts(11, [7, 7]):
        rows, nfe, _ = canvases(llm, config, [prompt])
        canvas = Canvas(plain(llm), prompt, 12)
        smoothed(canvas, 12, 6, cache, every, 0.8)
        assert nfe == [canvas.nfe]
        assert rows == [canvas.x.tolist()]
