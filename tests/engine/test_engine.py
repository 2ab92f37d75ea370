"""The engine: whatever the load, a request gets the tokens and the NFE that it gets alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from jdllm import DecodeConfig
from jdllm.engine import Engine, EngineConfig, Engines, Job, rounds
from jdllm.llm import LLM
from jdllm.model.model import assemble, named
from tests.engine.jobs import SMALL, canvas, make, run, setup_of
from tests.support.models import on_mesh, random_arrays
from tests.support.tiny_models import TINY, canvases, random_prompts, tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "block, edited": ("blocks", {"threshold": 0.5, "edit.threshold": 0.4}),
    "dual, sampled, renewed": ("plain", {"temperature": 0.8, "refresh_every": 2}),
    "earlier blocks only": ("plain", {"cache": "block", "threshold": 0.6}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "block, sampled": ("blocks", {"temperature": 0.7, "top_p": 0.9, "max_forwards": 5}),
    "dual": ("plain", {"threshold": 0.6}),
    "prefix, shifted": ("shifted", {"threshold": 0.6, "cache": "prefix"}),
    "no cache": ("plain", {"cache": "none", "rule": "quota", "steps": 6, "stable_steps": 1}),
    "smooth": ("plain", {"smooth.weight": 0.4, "threshold": 0.6}),
    "warm": ("plain", {"vicinity.warmup": 2, "vicinity.after": 3, "stop": "eos_block"}),
}
LENGTHS = {"gen_length": 12, "block_length": 4}
FULL: Any = LENGTHS | {"threshold": 0.5, "stop": "none"}
PROMPTS = random_prompts(11, [9, 4, 17, 6, 13])


def same_as_alone(llm: LLM, options: dict[str, Any], jobs: list[Job]) -> None:
    for job in jobs:
        prompt = job.canvas[: job.prompt].tolist()
        [row], [nfe], _ = canvases(llm, DecodeConfig.of(options), [prompt])
        assert canvas(job) == (row, nfe)


def check_case(kind: str, options: dict[str, Any]) -> None:
    llm, options = tiny(kind, 1.5), LENGTHS | options
    jobs = [make(llm, setup_of(llm, **options), prompt) for prompt in PROMPTS]
    engine = run(llm, jobs)
    same_as_alone(llm, options, jobs)
    assert engine.scheduler.pool.free == engine.config.pages


@pytest.mark.parametrize("case", CASES)
def test_a_request_gets_what_it_gets_alone(case: str):
    check_case(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_a_request_gets_what_it_gets_alone_by_other_rules(case: str):
    check_case(*MORE[case])


@pytest.mark.parametrize(
    "forced", ["tiled", pytest.param("attention:tiled", marks=pytest.mark.slow)]
)
def test_pages_are_read_alike_where_they_lie_and_gathered(forced: str):
    """The first looks pages up tile by tile, the second gathers rows for the same tiles."""
    llm = tiny("blocks", 1.5)
    own = LLM(dataclasses.replace(llm.model, kernel=forced), None, llm.defaults)
    jobs = [make(own, setup_of(own, **FULL), prompt) for prompt in PROMPTS]
    run(own, jobs)
    same_as_alone(llm, FULL, jobs)


@pytest.mark.slow
def test_rows_that_lose_their_pages_go_on_as_if_nothing_was():
    llm = tiny("blocks", 1.5)
    jobs = [make(llm, setup_of(llm, **FULL), prompt) for prompt in PROMPTS]
    engine = run(llm, jobs, dataclasses.replace(SMALL, pages=5))
    assert sum(job.preemptions for job in jobs) > 0
    same_as_alone(llm, FULL, jobs)
    assert engine.scheduler.pool.free == 5


def test_what_prompts_begin_with_is_read_once():
    llm = tiny("blocks", 1.5)
    start = random_prompts(5, [16])[0]
    prompts = [start + own for own in random_prompts(6, [3, 2, 1, 3])]
    jobs = [make(llm, setup_of(llm, **FULL), prompt) for prompt in prompts]
    engine = Engine(llm.model, SMALL)
    reads: list[tuple[int, int, int]] = []
    schedule = engine.scheduler.read

    def read(group: Any) -> Any:
        reads.extend(found := schedule(group))
        return found

    engine.scheduler.read = read
    for job in jobs:
        engine.submit(job)
    engine.drain()
    assert sum(stop - begin for _, begin, stop in reads) == len(start)
    same_as_alone(llm, FULL, jobs)
    again = make(llm, setup_of(llm, **FULL), canvas(jobs[0])[0][:20])
    reads.clear()
    engine.submit(again)
    engine.drain()
    assert sum(stop - begin for _, begin, stop in reads) == 4, "two pages of the answer were kept"
    assert engine.scheduler.pool.free == engine.config.pages


def test_priority_is_worth_places_and_no_more():
    llm = tiny("blocks", 1.5)
    setup, order = setup_of(llm, **FULL), []

    def job(name: str, priority: int) -> Job:
        return make(
            llm, setup, PROMPTS[0], listener=lambda _: order.append(name), priority=priority
        )

    names = ["late"] + [f"plain{i}" for i in range(4)] + ["soon"]
    run(llm, [job(n, {"late": 1, "soon": -1}.get(n, 0)) for n in names],
        dataclasses.replace(SMALL, slots=1))  # fmt: skip
    assert order == ["soon", *names[1:5], "late"]


def test_what_is_no_number_ends_its_request_alone():
    """Token 7 has an embedding that is no number; the pages that it soils serve others later."""
    llm = tiny("blocks", 1.5)
    arrays = {name: np.array(leaf[...]) for name, leaf in named(llm.model).items()}
    arrays["embedding"][7] = np.nan
    sick = LLM(assemble(llm.config, {k: jnp.array(x) for k, x in arrays.items()}, llm.mesh))
    prompts = [[i for i in prompt if i != 7] for prompt in PROMPTS]
    prompts[1] = [3, 7, 5, 7, 2, 1, 7, 8, 9]
    setup = setup_of(sick, **FULL)
    jobs = [make(sick, setup, prompt) for prompt in prompts]
    engine = run(sick, jobs, dataclasses.replace(SMALL, pages=9))
    outcome = jobs.pop(1).listener.outcome  # pyright: ignore[reportFunctionMemberAccess]
    assert outcome.reason == "failed"
    same_as_alone(sick, FULL, jobs)
    assert engine.scheduler.pool.free == 9


PLAN = st.lists(
    st.tuples(
        st.integers(0, 4),  # dispatches before it comes
        st.integers(0, len(PROMPTS) - 1),
        st.sampled_from([0, 0, 1]),  # priority
        st.sampled_from([None, None, None, 0, 1, 3]),  # dispatches until it is taken back
        st.booleans(),  # whether it is followed
    ),
    max_size=9,
)
QUICK: Any = {
    "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True,
}  # fmt: skip


def check_load(plan: list[tuple[int, int, int, int | None, bool]], pages: int) -> None:
    """Jobs that come, wait, lose their pages and are taken back: those that end, end as alone."""
    llm = tiny("blocks", 1.5)
    setup = setup_of(llm, **FULL)
    engine = Engine(llm.model, dataclasses.replace(SMALL, pages=pages))
    jobs, leaving = [], []
    for wait, which, priority, leaves, follows in plan:
        for _ in range(wait):
            engine.step()
            leaving = [(left - 1, job) for left, job in leaving]
            for left, job in leaving:
                job.cancelled |= left < 0
        job = make(llm, setup, PROMPTS[which], priority=priority, follows=follows)
        jobs.append(job)
        engine.submit(job)
        leaving += [(leaves, job)] if leaves is not None else []
    engine.drain()
    ends: Any = [job.listener for job in jobs]
    assert all(told.outcome.reason in ("done", "cancelled") for told in ends)
    same_as_alone(llm, FULL, [j for j, e in zip(jobs, ends, strict=True)
                              if e.outcome.reason == "done"])  # fmt: skip
    for job, told in zip(jobs, ends, strict=True):
        for earlier, later in zip(told.events, told.events[1:], strict=False):
            if later.reason != "cancelled" if later is told.outcome else True:
                fixed = earlier.tokens[: earlier.settled]
                assert (later.tokens[: earlier.settled] == fixed).all()
        assert job.cancelled or told.outcome.reason == "done"
    assert engine.scheduler.pool.free == pages


@settings(max_examples=5, **QUICK)
@given(PLAN, st.integers(4, 9))
def test_any_load(plan, pages: int):
    check_load(plan, pages)


@pytest.mark.slow
@settings(max_examples=300, **QUICK)
@given(PLAN, st.integers(4, 9))
def test_very_many_loads(plan, pages: int):
    check_load(plan, pages)


@pytest.mark.parametrize("mesh", ["2x2"])
def test_replicas_and_split_models_give_the_same(mesh: str):
    """Two engines of two devices each; two layers, so that keys depend on what attention sees."""
    config = dataclasses.replace(TINY, layers=2, heads=4, kv_heads=2, head_dim=8, block_causal=4)
    arrays = random_arrays(config, seed=1, sharpness=3.0)
    single, split = (LLM(on_mesh(config, arrays, m)) for m in ("1x1", mesh))
    jobs = [make(split, setup_of(split, **FULL), prompt) for prompt in PROMPTS]
    engines = Engines(split.model, SMALL)
    for job in jobs:
        engines.submit(job)
    engines.drain()
    assert len(engines.engines) == 2 and all(engine.calls for engine in engines.engines)
    same_as_alone(single, FULL, jobs)


@pytest.mark.slow
def test_programs_can_be_compiled_before_anybody_comes(tmp_path: Path):
    """The first dispatch finds them on disk: nothing of what it needs is compiled again."""
    llm = tiny("blocks", 1.5)
    setup = setup_of(llm, **FULL)
    job = make(llm, setup, PROMPTS[0])

    def programs() -> set[str]:
        names = (path.name for path in tmp_path.iterdir())
        return {name for name in names if name.startswith(("jit_run-", "jit_read-"))}

    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        engine = Engine(llm.model, EngineConfig(slots=2, columns=32, page=8, chunk=8, lanes=1))
        engine.device.compile(job.setup, job.dials, engine.config.columns)
        compiled = programs()
        engine.submit(job)
        engine.drain()
        assert len(compiled) >= 2 and programs() == compiled
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    same_as_alone(llm, FULL, [job])


def test_shorter_canvases_share_the_program_of_longer_ones():
    """Unless more than half of its columns would stay idle."""
    llm = tiny("blocks")
    engine = Engine(llm.model, EngineConfig(columns=256, page=32, chunk=32))
    setup = setup_of(llm, **FULL)
    assert engine._width(setup, 100) == 128
    engine.device.widths(setup).add(256)
    assert engine._width(setup, 129) == engine._width(setup, 100) == 256
    assert engine._width(setup, 60) == 64
    engine.device.widths(setup).add(128)
    assert engine._width(setup, 100) == engine._width(setup, 60) == 128


def test_rows_of_other_temperatures_and_thresholds_share_a_program():
    """Each is as alone; only what is off or on tells groups apart."""
    llm, jobs = tiny("blocks", 1.5), []
    ways = [{"temperature": t, "threshold": b} for t, b in ((0.3, 0.5), (0.9, 0.4), (0.6, 0.7))]
    for prompt, way in zip(PROMPTS, ways, strict=False):
        jobs.append(make(llm, setup_of(llm, **FULL | way | {"top_p": way["threshold"]}), prompt))
    engine = run(llm, jobs)
    assert len(engine.scheduler.groups) == 1
    for job, way in zip(jobs, ways, strict=True):
        same_as_alone(llm, FULL | way | {"top_p": way["threshold"]}, [job])


def test_a_dispatch_that_fails_ends_what_ran_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    llm = tiny("blocks", 1.5)
    setup, run_, told = setup_of(llm, **FULL), rounds.run, []
    engine = Engine(llm.model, SMALL)

    def broken(*given: Any, **named: Any) -> Any:
        told.append(len(told))
        if len(told) == 2:
            raise RuntimeError("out of memory")
        return run_(*given, **named)

    monkeypatch.setattr(rounds, "run", broken)
    jobs = [make(llm, setup, prompt) for prompt in PROMPTS]
    for job in jobs:
        engine.submit(job)
    engine.stop()  # once nothing is left to do
    engine.serve()
    ends: Any = [job.listener for job in jobs]
    assert [told.outcome.reason for told in ends] == ["failed"] * 3 + ["done"] * 2
    same_as_alone(llm, FULL, jobs[3:])
    assert engine.scheduler.pool.free == engine.config.pages


def test_a_listener_that_fails_loses_its_job_alone():
    llm = tiny("blocks", 1.5)

    def deaf(_: Any) -> None:
        raise OSError("gone")

    jobs = [make(llm, setup_of(llm, **FULL), prompt) for prompt in PROMPTS[:2]]
    lost = make(llm, setup_of(llm, **FULL), PROMPTS[2], listener=deaf, follows=True)
    engine = run(llm, [lost, *jobs])
    assert lost.cancelled
    same_as_alone(llm, FULL, jobs)
    assert engine.scheduler.pool.free == engine.config.pages


@pytest.mark.parametrize("end", [40, 33])
def test_what_cannot_run_is_refused_at_once(end: int):
    llm = tiny("blocks")
    engine = Engine(llm.model, SMALL if end > 33 else dataclasses.replace(SMALL, pages=2))
    words = "exceeds the 32 columns" if end > 33 else "needs 4 pages of 8, and the cache has 2"
    setup = setup_of(llm, gen_length=20 if end > 33 else 12, block_length=4)
    with pytest.raises(ValueError, match=words):
        engine.submit(make(llm, setup, PROMPTS[2]))
    with pytest.raises(ValueError, match="multiples of the model's blocks of 4"):
        Engine(llm.model, dataclasses.replace(SMALL, page=6))
