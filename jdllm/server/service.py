"""The service: requests become jobs of the engine, and what it tells becomes their events."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import jax

from jdllm.batches import row_keys, row_seeds
from jdllm.decode.setup import Setup
from jdllm.engine import Engines, Job, Outcome, Progress, make_canvas, shared
from jdllm.llm import LLM
from jdllm.parity import make_setup
from jdllm.server.config import ServeConfig
from jdllm.server.metrics import Metrics
from jdllm.server.openai import Asked, Refused
from jdllm.server.structured import Answer, Choice, Structured, parts_of
from jdllm.server.text import Piece, Text


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to one of the completions of a request."""

    number: int
    """Which of them."""
    piece: Piece
    progress: Progress
    job: Job


class Service:
    """A model, its engine, and how many may wait for it. All but the engine runs in the server's
    event loop."""

    def __init__(self, llm: LLM, config: ServeConfig):
        if llm.tokenizer is None:
            raise ValueError(f"model={config.model} has no tokenizer.json, so it cannot serve text")
        self.llm, self.config = llm, config
        self.engines = Engines(llm.model, config.engine)
        self.metrics = Metrics(self.engines)
        self.structured = Structured(llm, self.engines.engines[0].model)
        self._answering, self._turn = 0, asyncio.Lock()
        self.closing = False

    def start(self) -> None:
        """Starts the engine, and has it compile what plain requests need."""
        self.engines.start()
        if self.config.warm:
            plain = Asked([[{"role": "user", "content": "1"}]], True, self.config.decode)
            asyncio.run(self._warm(plain))

    async def _warm(self, asked: Asked) -> None:
        async for _ in self.run(self.jobs(asked), asked):
            pass

    def encode(self, asked: Asked) -> list[list[int]]:
        """Token ids of the prompts. What users write is text, even where it spells special tokens.

        Refused where the template, or the vocabulary, does not take them.
        """
        try:
            if asked.chat:
                return self.llm.encode(asked.prompts)
            found: list[Any] = []
            for prompt in asked.prompts:
                if isinstance(prompt, str):
                    options = {"add_special_tokens": False, "split_special_tokens": True}
                    prompt = self.llm.tokenizer(prompt, **options)["input_ids"]  # pyright: ignore[reportOptionalCall]
                found.append(prompt)
            return self.llm.encode(found)
        except ValueError as error:
            raise Refused(400, str(error), "messages" if asked.chat else "prompt") from None

    def setup(self, asked: Asked) -> tuple[Setup, int]:
        """The rules for a request, and the tokens that it may have."""
        try:
            decode = asked.decode
            if asked.max_tokens:
                # Blocks stay as long as they are: each length has programs of its own.
                block = None if decode.block_lengths else self.llm.resolve(decode).block_length
                decode = dataclasses.replace(
                    decode, gen_length=asked.max_tokens, block_length=block
                )
            decode = self.llm.resolve(decode)
            return make_setup(decode, self.llm.config), decode.gen_length or 0
        except ValueError as error:
            raise Refused(400, str(error), "decode") from None

    def jobs(self, asked: Asked) -> list[tuple[Job, Text]]:
        """The jobs of a request, none of which is begun. Refused where one could never run."""
        setup, cap = self.setup(asked)
        rows = [row for row in self.encode(asked) for _ in range(asked.n)]
        if len(rows) > self.config.max_n * 8:
            raise Refused(400, f"{len(rows)} completions are too many for one request", "n")
        keys = row_keys(asked.decode.seed, row_seeds(rows))
        return [
            self.job(row, setup, keys[i], cap, asked.stop, asked.priority,
                     follows=asked.stream or bool(asked.stop))
            for i, row in enumerate(rows)
        ]  # fmt: skip

    def job(
        self,
        row: list[int],
        setup: Setup,
        key: jax.Array,
        cap: int,
        stop: tuple[str, ...],
        priority: int,
        follows: bool,
    ) -> tuple[Job, Text]:
        """One completion to be: its job, and the text that it becomes."""
        facts = self.llm.config
        canvas = make_canvas(row, setup, facts.mask_id)
        job = Job(canvas, len(row), *shared(setup), key, lambda _: None, priority, follows)
        try:
            self.engines.check(job)
        except ValueError as error:
            raise Refused(400, str(error), None, "context_length_exceeded") from None
        return job, Text(facts, self.llm.tokenizer, cap, stop)

    async def answer(self, asked: Asked) -> Answer:
        """A structured answer, one at a time. Refused where the request asks for what slots do not
        have, and where too many wait."""
        wanted = {"n": asked.n > 1, "stop": asked.stop, "logprobs": asked.logprobs,
                  "temperature": asked.decode.temperature}  # fmt: skip
        for name, given in wanted.items():
            if given:
                raise Refused(400, f"{name} has no meaning for slots; leave it out", name)
        self.admit(1 + self._answering)
        parts = list(parts_of(asked.schema)) if asked.schema else [Choice(asked.choices)]
        (prompt,) = await asyncio.to_thread(self.encode, asked)
        self._answering += 1
        try:
            async with self._turn:
                room = self.engines.config.columns
                return await asyncio.to_thread(self.structured.answer, prompt, parts, room)
        finally:
            self._answering -= 1

    async def run(self, jobs: list[tuple[Job, Text]], asked: Asked) -> AsyncIterator[Event]:
        """Sends the jobs off and yields what happens to them, until all are over.

        Whoever leaves the iterator takes back what is still running. Refused with 429 where too
        many wait, with 503 where the server is about to end, with 504 where it takes too long.
        """
        self.admit(len(jobs))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Progress]]()

        def told(number: int, event: Progress) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (number, event))

        start, first = time.perf_counter(), True
        try:
            for number, (job, _) in enumerate(jobs):
                job.listener = partial(told, number)
                self.engines.submit(job)
            while not all(text.over for _, text in jobs):
                left = self.config.timeout - (time.perf_counter() - start)
                try:
                    number, event = await asyncio.wait_for(queue.get(), max(left, 0.001))
                except TimeoutError:
                    raise Refused(
                        504, f"this took more than {self.config.timeout:g} seconds"
                    ) from None
                job, text = jobs[number]
                if text.over:
                    continue
                piece = text.take(event)
                if first and (piece.ids or piece.over):
                    self.metrics.first_block.observe(time.perf_counter() - start)
                    first = False
                if piece.over:
                    job.cancelled |= not isinstance(event, Outcome)
                    self.metrics.ended(piece, len(text.ids))
                yield Event(number, piece, event, job)
            self.metrics.seconds.observe(time.perf_counter() - start)
        finally:
            for job, text in jobs:
                if not text.over:
                    job.cancelled = True
                    self.metrics.requests.labels("cancelled").inc()

    def admit(self, count: int) -> None:
        """Refused where so many more cannot wait."""
        if self.closing:
            raise Refused(503, "the server is about to end; ask another one")
        slots = self.engines.config.slots * len(self.engines.engines)
        if self.engines.load + count > self.config.max_queue + slots:
            self.metrics.requests.labels("refused").inc()
            raise Refused(429, "too many requests wait; try again in a moment")

    def stop(self) -> None:
        """Ends what has begun, then the engine."""
        self.closing = True
        self.engines.stop()
