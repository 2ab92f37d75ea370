"""The engine's benchmark: requests that come at random times, against batches without refills."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm.batches import deal, row_keys, row_seeds
from jdllm.decode import DecodeConfig, Request
from jdllm.engine import EngineConfig, Engines, Job, Outcome, Progress, make_canvas, shared
from jdllm.evaluation.report import table
from jdllm.llm import LLM
from jdllm.parity import make_setup
from jdllm.runtime import processes, sharding
from jdllm.runtime.profiling import recording

COLUMNS = {  # figure -> its head in the table, with the unit
    "tokens_per_second": "tokens/s",
    "first_block_p50": "first block p50, s",
    "first_block_p95": "p95, s",
    "latency_p50": "latency p50, s",
    "latency_p95": "p95, s",
    "tpot_p50": "time per token p50, ms",
    "seconds": "time, s",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests that come at random, with random lengths."""

    requests: int = 64
    rate: float = 0.0
    """Requests per second, at the times of a Poisson process; 0 is all at once."""
    prompt: int = 48
    """Tokens of a prompt: from a quarter of this to four times as many."""
    completion: int = 64
    """Tokens of a completion, likewise."""
    spread: float = 0.7
    """Of the logarithms of completions' lengths; 0 makes all alike."""
    prompt_spread: float = 0.7
    """Likewise of prompts. Batches of prompts of many lengths need many programs."""

    def __post_init__(self):
        for name in ("requests", "prompt", "completion"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name}={number} of the traffic must be 1 or more")
        for name in ("rate", "spread", "prompt_spread"):
            if (number := getattr(self, name)) < 0:
                raise ValueError(f"{name}={number} of the traffic must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Call:
    """One request of the traffic."""

    due: float
    """Seconds after the start."""
    prompt: list[int]
    tokens: int


def draw(traffic: Traffic, llm: LLM, seed: int) -> list[Call]:
    """The requests, in the order in which they come."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / traffic.rate, traffic.requests) if traffic.rate else 0.0
    due = np.cumsum(np.broadcast_to(gaps, traffic.requests))

    def lengths(mean: int, spread: float) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean), spread, traffic.requests)
        return np.clip(np.rint(drawn), mean / 4, mean * 4)

    most = llm.config.max_length
    calls = []
    prompts = lengths(traffic.prompt, traffic.prompt_spread)
    completions = lengths(traffic.completion, traffic.spread)
    for at, prompt, tokens in zip(due, prompts, completions, strict=True):
        prompt, tokens = max(1, min(int(prompt), most // 2)), max(1, int(tokens))
        ids = rng.integers(0, llm.config.vocab - 1, prompt).tolist()
        calls.append(Call(float(at), ids, min(tokens, most // 4)))
    return calls


def others(calls: Sequence[Call], llm: LLM, by: int) -> list[Call]:
    """Requests of the same lengths with other prompts, whose keys no cache has yet."""

    def moved(prompt: list[int]) -> list[int]:
        return [(token + by) % (llm.config.vocab - 1) for token in prompt]

    return [dataclasses.replace(call, prompt=moved(call.prompt)) for call in calls]


@dataclasses.dataclass
class Clock:
    """When things happened, in seconds after the start."""

    first: dict[int, float] = dataclasses.field(default_factory=dict)
    last: dict[int, float] = dataclasses.field(default_factory=dict)
    calls: int = 0
    """Model calls."""
    compile_seconds: float = 0.0


Way = Callable[..., Clock]


def engines_for(llm: LLM, decode: DecodeConfig, slots: int, calls: Sequence[Call]) -> Engines:
    """Engines with room for the longest of the requests."""
    block = llm.resolve(decode).block_length or 1
    columns = max(len(call.prompt) + -(-call.tokens // block) * block for call in calls)
    return Engines(llm.model, EngineConfig(slots=slots, columns=columns + block))


def by_engine(
    llm: LLM,
    decode: DecodeConfig,
    engines: Engines,
    calls: Sequence[Call],
    trace: Path | None = None,
) -> Clock:
    """The requests through the engine; into `trace` comes what the device did meanwhile."""
    jobs, clock, start = [], Clock(), 0.0
    keys = row_keys(decode.seed, row_seeds([call.prompt for call in calls]))

    def told(i: int, event: Progress) -> None:
        now = time.perf_counter() - start
        if event.settled:
            clock.first.setdefault(i, now)
        if isinstance(event, Outcome):
            clock.last[i] = now

    for i, call in enumerate(calls):
        setup = make_setup(llm.resolve(dataclasses.replace(decode, gen_length=call.tokens)),
                           llm.config)  # fmt: skip
        canvas = make_canvas(call.prompt, setup, llm.config.mask_id)
        listener = partial(told, i)
        jobs.append(Job(canvas, len(call.prompt), *shared(setup), keys[i], listener, follows=True))
    clock.calls, clock.compile_seconds = -engines.calls, -engines.compile_seconds
    with recording(trace):
        start, sent = time.perf_counter(), 0
        while sent < len(jobs) or engines.busy:
            now = time.perf_counter() - start
            while sent < len(jobs) and calls[sent].due <= now:
                engines.submit(jobs[sent])
                sent += 1
            if engines.busy:
                engines.step()
            else:
                time.sleep(max(0.0, calls[sent].due - now))
    clock.calls += engines.calls
    clock.compile_seconds += engines.compile_seconds
    return clock


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches without refills, all of one program for equally long prompts: rows end where their
    own completions do, and a batch with the longest of them."""

    llm: LLM
    decode: DecodeConfig
    slots: int
    most: int
    """Tokens of the longest completion of all."""

    def program(self, some: Sequence[Call]) -> tuple[Any, Request, float]:
        """What decodes some requests, their canvases, and the seconds spent compiling."""
        llm, rows = self.llm, [call.prompt for call in some]
        resolved = llm.resolve(dataclasses.replace(self.decode, gen_length=self.most))
        setup = make_setup(resolved, llm.config)
        request = llm._request(rows, row_seeds(rows), resolved, setup, self.slots)
        ends = np.ones(len(request.idle), np.int32)
        places = deal(len(some), len(ends), llm.mesh.shape["data"])
        for slot, call in zip(places, some, strict=True):
            own = dataclasses.replace(setup, gen_length=call.tokens)
            ends[slot] = own.canvas_length(len(call.prompt))
        ends = processes.device_put(ends, sharding.by_row(llm.mesh))
        request = dataclasses.replace(request, ends=ends)
        program, compile_seconds = llm._program(request, setup)
        return program, request, compile_seconds


def by_batches(llm: LLM, decode: DecodeConfig, slots: int, calls: Sequence[Call]) -> Clock:
    """Whoever waits when a batch ends, at most `slots`, forms the next one."""
    clock, start, sent = Clock(), time.perf_counter(), 0
    batches = Batches(llm, decode, slots, max(call.tokens for call in calls))
    while sent < len(calls):
        now = time.perf_counter() - start
        if calls[sent].due > now:
            time.sleep(calls[sent].due - now)
            now = calls[sent].due
        chosen = [i for i in range(sent, len(calls)) if calls[i].due <= now][:slots]
        program, request, compile_seconds = batches.program([calls[i] for i in chosen])
        state = program(llm.model, request, llm.verifier)
        _, forwards = jax.device_get((state.rows.tokens, state.forwards))
        clock.calls += int(forwards)
        clock.compile_seconds += compile_seconds
        now = time.perf_counter() - start
        clock.first |= dict.fromkeys(chosen, now)
        clock.last |= dict.fromkeys(chosen, now)
        sent += len(chosen)
    return clock


def figures(calls: Sequence[Call], clock: Clock) -> dict[str, float]:
    """What the clock says."""
    order = range(len(calls))
    first = np.array([clock.first[i] - calls[i].due for i in order])
    latency = np.array([clock.last[i] - calls[i].due for i in order])
    tokens = np.array([call.tokens for call in calls])
    seconds = max(clock.last.values())
    return {
        "tokens_per_second": float(tokens.sum() / seconds),
        "first_block_p50": float(np.percentile(first, 50)),
        "first_block_p95": float(np.percentile(first, 95)),
        "latency_p50": float(np.percentile(latency, 50)),
        "latency_p95": float(np.percentile(latency, 95)),
        "tpot_p50": float(1000 * np.percentile(latency / tokens, 50)),
        "tokens": int(tokens.sum()),
        "seconds": float(seconds),
        "calls": clock.calls,
        "compile_seconds": clock.compile_seconds,
    }


def measure(
    llm: LLM,
    decode: DecodeConfig,
    traffic: Traffic,
    slots: int,
    seed: int,
    trace: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Both ways over the same requests, once to compile and once on the clock.

    Every canvas is filled to its end, so that both fill the same. Into `trace` comes what the
    device did in the engine's pass on the clock, which recording slows.
    """
    decode = dataclasses.replace(decode, stop="none")
    calls, plain = draw(traffic, llm, seed), LLM(llm.model, None, llm.defaults, engine="off")
    at_once = [dataclasses.replace(call, due=0.0) for call in others(calls, llm, 1)]
    ways: dict[str, Callable[[], Way]] = {
        "engine": lambda: partial(by_engine, llm, decode, engines_for(llm, decode, slots, calls)),
        "batches": lambda: partial(by_batches, plain, decode, slots),
    }
    found: dict[str, Any] = {}
    for name, begin in ways.items():
        way = begin()
        way(at_once)
        if traffic.rate:  # rows that come one by one meet other shapes
            way(others(calls, llm, 2))
        clock = way(calls, trace) if trace and name == "engine" else way(calls)
        found[name] = figures(calls, clock)
        del way
        gc.collect()  # an engine and its scheduler know each other; their pages make room
    return found


def shown(rows: dict[str, dict[str, float]]) -> str:
    """The table, and the comparison below it."""
    cells = [[name, *(f"{row[figure]:.2f}" for figure in COLUMNS)] for name, row in rows.items()]
    ours, theirs = rows["engine"], rows["batches"]
    return (
        f"{table([['decoding', *COLUMNS.values()], *cells])}\n\nengine against batches: "
        f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} times the tokens/s, "
        f"first block after {ours['first_block_p50'] / theirs['first_block_p50']:.2f} of the time"
    )
