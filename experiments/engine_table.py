"""The engine beside static batches at several numbers of slots: random weights, one model in one
process.

python experiments/engine_table.py model=random:llada2-mini cache=block
python experiments/engine_table.py model=random:llada-8b cache=block slots=1,8,32

Requests come all at once, some per slot, with prompts of one length and completions of many; every
step takes the same number of tokens. Programs of all cells are compiled first, side by side. Then
each cell is on the clock by itself, with prompts that no cache has seen. `alone` decodes some
requests again one by one, in the same engine, and compares tokens and NFE with those in company.
Rows are appended to the file as they are measured.
"""

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm import DecodeConfig
from jdllm.batches import row_keys, row_seeds
from jdllm.decode import Setup
from jdllm.engine import Engines, Job, Outcome, make_canvas, shared
from jdllm.evaluation import traffic
from jdllm.evaluation.traffic import Call, Traffic
from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache, read_facts
from jdllm.parity import make_setup
from jdllm.runtime import cli, profiling, sharding
from jdllm.store.checkpoint import random_model

RESULTS = Path(__file__).resolve().parent / "results" / "engine.jsonl"


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """What is measured."""

    output: Path = RESULTS
    model: str = "random:llada2-mini"
    layers: int | None = None
    """Of random weights: fewer than the shape has, where compiling must be short."""
    cache: Any = "block"
    slots: tuple[int, ...] = (1, 8, 32, 64, 128)
    batches_at: tuple[int, ...] = (1, 32)
    """Numbers of slots at which batches are measured, too."""
    per_slot: tuple[int, ...] = (10, 10, 16, 6, 4)
    """Requests for each slot, by number of slots; the last number holds for the rest."""
    prompt: int = 256
    completion: int = 128
    """Median of the completions' tokens."""
    spread: float = 0.7
    block: int = 32
    tokens_per_step: int = 4
    alone: int = 3
    """Requests that are decoded again one by one, at the largest number of slots up to 32."""
    profile: Path | None = None
    """Folder for a trace of the engine at the most slots up to 32, after its time is taken."""
    threads: int = 8
    """Cells that are compiled side by side."""
    seed: int = 37

    def traffic(self, slots: int) -> Traffic:
        """The requests of a cell."""
        each = dict(zip(self.slots, self.per_slot, strict=False)).get(slots, self.per_slot[-1])
        return Traffic(
            requests=slots * each, prompt=self.prompt, completion=self.completion,
            spread=self.spread, prompt_spread=0.0,
        )  # fmt: skip

    @property
    def decode(self) -> DecodeConfig:
        """How all decode."""
        return DecodeConfig(
            rule="quota", tokens_per_step=self.tokens_per_step, block_length=self.block,
            cache=self.cache, stop="none",
        )  # fmt: skip


class Cell:
    """A number of slots: the engine and the batches that decode the same requests."""

    def __init__(self, llm: LLM, config: TableConfig, slots: int):
        self.llm, self.config, self.slots = llm, config, slots
        self.plain = LLM(llm.model, None, llm.defaults, engine="off")
        self.calls = traffic.draw(config.traffic(slots), llm, config.seed)
        self.engines: Engines | None = None
        self.ways = ["engine", *(["batches"] if slots in config.batches_at else [])]

    def begin(self) -> None:
        """Pages for the engine."""
        self.engines = traffic.engines_for(self.llm, self.config.decode, self.slots, self.calls)

    def compile(self, way: str) -> float:
        """Compiles the large programs of a way, and runs nothing; the seconds that took."""
        start = time.perf_counter()
        longest = max(self.calls, key=lambda call: call.tokens)
        if way == "engine":
            assert self.engines is not None
            setup, dials = shared(self.setup(longest))
            for engine in self.engines.engines:
                engine.device.compile(setup, dials, engine.config.columns)
        else:
            batches = traffic.Batches(self.plain, self.config.decode, self.slots, longest.tokens)
            batches.program(self.calls[: self.slots])
        return time.perf_counter() - start

    def warm(self, way: str) -> float:
        """Runs a few requests of a way; the seconds that took."""
        start = time.perf_counter()
        longest = max(self.calls, key=lambda call: call.tokens)
        short = min(self.calls, key=lambda call: call.tokens)
        some = traffic.others([longest, *[short] * (self.slots - 1)], self.llm, 1)
        if way == "engine":
            assert self.engines is not None
            traffic.by_engine(self.llm, self.config.decode, self.engines, some)
            if self.slots == 1:  # short canvases have programs of their own
                more = traffic.others([short], self.llm, 2)
                traffic.by_engine(self.llm, self.config.decode, self.engines, more)
        else:
            traffic.by_batches(self.plain, self.config.decode, self.slots, some)
        return time.perf_counter() - start

    def setup(self, call: Call) -> Setup:
        """What decoding a request means."""
        resolved = dataclasses.replace(self.config.decode, gen_length=call.tokens)
        return make_setup(self.llm.resolve(resolved), self.llm.config)

    def run(self) -> dict[str, Any]:
        """Both ways on the clock."""
        found, decode = {}, self.config.decode
        for way in self.ways:
            if way == "engine":
                assert self.engines is not None
                clock = traffic.by_engine(self.llm, decode, self.engines, self.calls)
            else:
                clock = traffic.by_batches(self.plain, decode, self.slots, self.calls)
            found[way] = traffic.figures(self.calls, clock)
        return found

    def alone(self, count: int) -> dict[str, Any]:
        """Whether requests get in company what they get alone, in the same engine."""
        calls = traffic.others(self.calls[: 2 * self.slots], self.llm, 3)
        together = self.outcomes(calls)
        chosen = list(range(0, len(calls), max(1, len(calls) // count)))[:count]
        # New engines, so that no page of the first run serves the second; same programs.
        self.engines = None
        self.begin()
        same, first = 0, []
        for i in chosen:
            (other,) = self.outcomes([calls[i]])
            equal = np.array_equal(other.tokens, together[i].tokens)
            same += equal and other.nfe == together[i].nfe
            if not equal:
                first.append(int(np.argmax(other.tokens != together[i].tokens)))
        return {"alone": len(chosen), "same": int(same), "first_difference": first}

    def outcomes(self, calls: Sequence[Call]) -> list[Outcome]:
        """What the engine gives for some requests."""
        assert self.engines is not None
        found: dict[int, Outcome] = {}
        keys = row_keys(self.config.seed, row_seeds([call.prompt for call in calls]))
        for i, call in enumerate(calls):
            setup = self.setup(call)
            canvas = make_canvas(call.prompt, setup, self.llm.config.mask_id)

            def told(event: Any, i: int = i) -> None:
                if isinstance(event, Outcome):
                    found[i] = event

            self.engines.submit(Job(canvas, len(call.prompt), *shared(setup), keys[i], told))
        self.engines.drain()
        return [found[i] for i in range(len(calls))]

    def free(self) -> None:
        """Gives the pages back."""
        self.engines = None


def rows(llm: LLM, config: TableConfig):
    """All rows: small cells together, as their caches fit beside each other, then the large one."""
    groups = [[s for s in config.slots if s <= 64], [s for s in config.slots if s > 64]]
    for group in filter(None, groups):
        cells = [Cell(llm, config, slots) for slots in group]
        for cell in cells:
            cell.begin()
        with ThreadPoolExecutor(config.threads) as pool:
            jobs = [(c, way, pool.submit(c.compile, way)) for c in cells for way in c.ways]
        for cell, way, job in jobs:
            seconds = {"compile_seconds": job.result(), "seconds": cell.warm(way)}
            yield {"name": "warm", "slots": cell.slots, "way": way} | seconds
        for cell in cells:
            row: dict[str, Any] = {"name": "traffic", "slots": cell.slots}
            try:
                row |= cell.run()
                speeds = [row[way]["tokens_per_second"] for way in cell.ways]
                if len(speeds) == 2:
                    row["ratio"] = speeds[0] / speeds[1]
            except Exception as error:
                row["failed"] = str(error)[:300]
            yield row
            if config.profile and cell.slots == max(s for s in config.slots if s <= 32):
                assert cell.engines is not None
                some = traffic.others(cell.calls[: 3 * cell.slots], llm, 5)
                traffic.by_engine(llm, config.decode, cell.engines, some, config.profile)
                found = profiling.profile(profiling.read(config.profile))
                print(profiling.shown(found), flush=True)
                yield {"name": "profile", "slots": cell.slots} | found.facts()
            if config.alone and cell.slots == max((s for s in config.slots if s <= 32), default=0):
                yield {"name": "alone", "slots": cell.slots} | cell.alone(config.alone)
        for cell in cells:
            cell.free()


def main(config: TableConfig) -> None:
    """Appends every row to the file as soon as it is measured."""
    enable_compilation_cache()
    mesh = sharding.parse_mesh("1x1")
    if config.layers is None:
        llm = LLM.load(config.model, mesh)
    else:
        facts = dataclasses.replace(read_facts(config.model), layers=config.layers)
        llm = LLM(random_model(facts, mesh), None, engine="off")
    jax.block_until_ready(llm.model)
    facts = {
        "model": config.model,
        "layers": llm.config.layers,
        "cache": config.cache,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "command": " ".join(["python experiments/engine_table.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    for row in rows(llm, config):
        with config.output.open("a") as file:
            file.write(json.dumps(row | facts) + "\n")
        print(json.dumps(row, default=float)[:900], flush=True)


if __name__ == "__main__":
    cli.run(main, TableConfig, "python experiments/engine_table.py")
