"""The same tokens, losses and gradients on every mesh, and what the compiled programs send.

Eight virtual CPU devices. Whatever test_traces replays is replayed here on meshes, by its own
tests; the few in QUICK by default, the rest with `-m slow`.
"""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdllm import DecodeConfig
from jdllm.decode import Request, decode
from jdllm.llm import LLM
from jdllm.load import load_model
from jdllm.model.config import NAMED, ModelConfig, MoEConfig
from jdllm.model.model import Model, forward, named
from jdllm.parity import make_setup
from jdllm.runtime import sharding
from jdllm.tasks.puzzles import countdown
from jdllm.train import objective
from jdllm.train.step import all_parameters
from tests.parity import test_traces
from tests.support.batches import batch_of
from tests.support.collectives import Collective, in_loops
from tests.support.marks import quick
from tests.support.models import on_mesh, random_arrays
from tests.support.recordings import ROOT, Case, has_ties, load, supported

MESHES = ("8x1", "4x2", "2x4", "1x8")
TINY = dataclasses.replace(NAMED["tiny"], heads=8, kv_heads=8, head_dim=8)
MODELS = {
    "multi-head": TINY,
    "grouped": dataclasses.replace(TINY, kv_heads=2),
    "tied": dataclasses.replace(TINY, tied_head=True),
    "experts": dataclasses.replace(
        TINY,
        moe=MoEConfig(experts=8, top_k=2, expert_mlp=16, shared_mlp=32, dense_layers=(0,)),
    ),
}
MODELS["blocks"] = dataclasses.replace(MODELS["experts"], kv_heads=2, block_causal=8)


def spread(request: Request, mesh: jax.sharding.Mesh) -> Request:
    """The rows by shards of the batch, filled up with idle ones, which hold no mask."""
    count = len(request.tokens)
    spare = -count % mesh.shape["data"]

    def more(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.concatenate([x, jnp.take(x, jnp.zeros(spare, int), axis=axis)], axis)

    idle = jnp.arange(count + spare) >= count
    parts = (more(request.tokens) * ~idle[:, None], more(request.prompt_lengths))
    placed = jax.device_put((*parts, more(request.keys), idle), sharding.by_row(mesh))
    recorded = request.recorded
    if recorded is not None:
        recorded = jax.device_put(more(recorded, 1), NamedSharding(mesh, P(None, "data")))
    return Request(*placed, recorded=recorded)


def fresh_request(config: ModelConfig, prompts: list[list[int]], gen: int) -> Request:
    """Rows [prompt | masks | padding]."""
    tokens = np.full((len(prompts), max(map(len, prompts)) + gen), config.pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) :][:gen] = config.mask_id
    return Request(
        tokens=jnp.array(tokens),
        prompt_lengths=jnp.array([len(p) for p in prompts], jnp.int32),
        keys=jax.random.split(jax.random.key(0), len(prompts)),
        idle=jnp.zeros(len(prompts), bool),
    )


# What the compiled loops send


def program(name: str, mesh: str, options: DecodeConfig) -> str:
    config, grid = MODELS[name], sharding.parse_mesh(mesh)
    model = on_mesh(config, random_arrays(config), grid)
    request = spread(fresh_request(config, [[0] * 8] * 8, options.gen_length or 0), grid)
    lowered = decode.lower(model, request, make_setup(options, config))
    return lowered.compile().as_text() or ""


def part(found: Collective) -> str:
    """The part of the model that sends: a branch of a layer, embed, or the head with the rule."""
    match = re.search(r"layer\d+/(?:attention|mlp)|embed(?=/)", found.source)
    return match[0] if match else "head"


OPTIONS = DecodeConfig(gen_length=16, block_length=8).resolve()


@pytest.mark.parametrize(
    ("name", "mesh"),
    quick(
        [("multi-head", "1x8"), ("grouped", "2x4"), ("experts", "4x2"), ("tied", "2x4")],
        ("grouped", "2x4"),
    ),
)
def test_a_model_axis_sums_twice_a_layer(name: str, mesh: str):
    """An all-reduce a branch, one for the lookup and one for the head, of a few numbers."""
    config, text = MODELS[name], program(name, mesh, OPTIONS)
    shape = sharding.parse_mesh(mesh).shape
    conditions, passes = in_loops(text)
    assert all(len(sent) == 1 for sent in conditions)
    assert len(passes) >= 2  # one that opens a block, one that denoises it
    branches = {f"layer{i}/{b}" for i in range(config.layers) for b in ("attention", "mlp")}
    for sent in passes:
        model, head = (
            [x for x in sent if (part(x) == "head") == wanted] for wanted in (False, True)
        )
        assert sorted(map(part, model)) == sorted(branches | {"embed"})
        assert {x.kind for x in model} == {"all-reduce"}
        positions = 8 // shape["data"] * (OPTIONS.block_length or 0)
        assert [x.kind for x in head] == ["all-reduce"]
        assert head[0].elements == 5 * shape["model"] * positions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("multi-head", {}),
        pytest.param("experts", {}, marks=pytest.mark.slow),
        pytest.param("grouped", {"cache": "prefix", "cfg_scale": 1.0}, marks=pytest.mark.slow),
        pytest.param("grouped", {"cache": "none", "temperature": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_a_data_axis_exchanges_a_done_flag(name: str, options: dict[str, Any]):
    """A single scalar per step, in the condition of the loop, and one per block."""
    conditions, passes = in_loops(program(name, "8x1", dataclasses.replace(OPTIONS, **options)))
    assert not passes
    assert len(conditions) == 2
    for sent in conditions:
        assert [(x.kind, x.shape) for x in sent] == [("all-reduce", "pred[]")]


@pytest.mark.slow
def test_a_block_cache_exchanges_two_flags_a_step():
    """Whether any row needs a step, and whether any finished block is not in the cache yet."""
    options = DecodeConfig(gen_length=16, block_length=8).resolve(model=MODELS["blocks"])
    conditions, passes = in_loops(program("blocks", "8x1", options))
    assert [[(x.kind, x.shape) for x in sent] for sent in conditions] == [
        [("all-reduce", "pred[]")]  # of the loop over blocks
    ]
    assert len(passes) == 2  # before the first step, too
    for sent in passes:
        assert [(x.kind, x.shape) for x in sent] == [("all-reduce", "pred[2]{0}")]


@pytest.mark.slow
def test_rules_that_read_logits_send_numbers_a_position():
    """XLA splits max, sum and argmax over slices of the vocabulary; logits stay where they are."""
    options = dataclasses.replace(OPTIONS, remasking="entropy")
    _, passes = in_loops(program("grouped", "2x4", options))
    positions = 4 * (OPTIONS.block_length or 0)
    for sent in passes:
        head = [x for x in sent if part(x) == "head"]
        assert 0 < sum(x.elements for x in head) <= 4 * 4 * positions


# The same tokens


REPLAYS = [
    (test_traces.test_decode, param.values[0])
    for param in supported("decode")
    if not has_ties(param)
] + [(test_traces.test_engines, param.values[0]) for param in supported("traces")]
QUICK = {
    "decode-fast_llada-dual_oneblock_thr0.7-8x1",
    "decode-fast_llada-prefix_gqa_thr0.6-2x4",
    "decode-llada-cfg_batch2_leftpad-4x2",
    "decode-dream-entropy_batch2-2x4",
    "llada2_moe-traces_official-p3_bl8_t30-4x2",
}


def replays() -> list[Any]:
    found = []
    for replay, case in REPLAYS:
        for mesh in MESHES:
            name = f"{case.id}-{mesh}"
            marks = () if name in QUICK else (pytest.mark.slow,)
            found.append(pytest.param(replay, case, mesh, id=name, marks=marks))
    return found


def test_the_quick_ones_are_there():
    names = {param.id for param in replays()}
    assert names >= QUICK or not QUICK & names  # another set of goldens has none of them


@pytest.mark.parametrize(("replay", "case", "mesh"), replays())
def test_goldens_on_a_mesh(replay: Any, case: Case, mesh: str, monkeypatch: pytest.MonkeyPatch):
    """Canvases, NFE and outputs of the recorded runs, exactly; rows are split, too."""
    grid = sharding.parse_mesh(mesh)

    def place(folder: Path) -> Model:
        one = load(folder)
        arrays = {name: np.asarray(leaf[...]) for name, leaf in named(one).items()}
        return on_mesh(one.config, arrays, grid)

    def run(model: Model, request: Request, *rest: Any, **options: Any) -> Any:
        state = decode(model, spread(request, grid), *rest, **options)
        count = len(request.tokens)
        assert not np.asarray(state.rows.nfe[count:]).any()
        trace = jax.tree.map(lambda x: x[:, :count] if x.ndim > 1 else x, state.trace)
        rows = state.rows
        rows = dataclasses.replace(rows, tokens=rows.tokens[:count], nfe=rows.nfe[:count])
        return dataclasses.replace(state, rows=rows, trace=trace)

    monkeypatch.setattr(test_traces, "load", place)
    monkeypatch.setattr(test_traces, "decode", run)
    try:
        replay(case)
    except ValueError as error:
        folder = ROOT / case.entry["checkpoint"] if case.kind == "decode" else case.path.parent
        heads = load(folder).config.heads
        assert heads % grid.shape["model"] and "cannot be split over" in str(error)


@pytest.mark.slow
def test_uneven_and_small_batches():
    """A last batch that does not divide, and one row alone, get what they get on one device."""
    arrays = random_arrays(TINY, seed=1, sharpness=5)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (5, 17, 9, 30, 3, 8, 4, 11, 21)]
    options = DecodeConfig(gen_length=16, block_length=8, threshold=0.5)
    found = []
    for text in ("1x1", "4x2"):
        grid = sharding.parse_mesh(text)
        llm = LLM(on_mesh(TINY, arrays, grid))
        together = llm.generate(prompts, options, batch_size=4)
        assert llm.generate(prompts[:1], options) == together[:1]
        found.append(together)
    assert found[0] == found[1]


# The bundled model: near-ties may fall either way, nothing else

NEAR = 1e-4


def gaps(model: Any, canvases_FT: np.ndarray, length: int, options: DecodeConfig) -> float:
    """The smallest difference of probabilities that a decision along a row's canvases hangs on.

    That is between the two best tokens of a position that is filled, between its confidence and the
    threshold, and, where nothing reaches that, between the two best positions.
    """
    mask_id, smallest = model.config.mask_id, np.inf
    gen = options.gen_length or 0
    visible = np.broadcast_to(np.arange(canvases_FT.shape[1]) < length + gen, canvases_FT.shape)
    logits = jax.jit(forward)(model, canvases_FT, visible)
    chances = np.array(jax.nn.softmax(logits))
    chances[..., mask_id] = 0
    two = np.sort(chances, axis=-1)[..., -2:]
    for step in range(len(canvases_FT) - 1):
        before, after = canvases_FT[step], canvases_FT[step + 1]
        open_ = np.flatnonzero(before == mask_id)
        if not len(open_) or np.array_equal(before, after):
            continue
        best = np.sort(two[step, open_, 1])[::-1]
        filled = open_[after[open_] != mask_id]
        differences = [*np.abs(best - options.threshold), *np.ptp(two[step, filled], axis=-1)]
        if best[0] < options.threshold and len(best) > 1:
            differences.append(best[0] - best[1])
        smallest = min(smallest, *differences)
    return smallest


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_bundled_model_differs_in_near_ties_only(mesh: str):
    """Every row whose decisions are all wider than 1e-4 has the same tokens and NFE."""
    one = LLM.load("bundled", "1x1")
    docs = countdown.generate(8, seed=5, held_out=True)
    prompts = one.encode([countdown.prompt(doc) for doc in docs])
    options = DecodeConfig(gen_length=24, block_length=24, cache="none").resolve()
    setup, states = make_setup(options, one.config), {}
    for text in ("1x1", mesh):
        grid = sharding.parse_mesh(text)
        model = load_model("bundled", grid)
        request = spread(fresh_request(model.config, prompts, options.gen_length or 0), grid)
        states[text] = decode(model, request, setup, trace=True)
    model = load_model("bundled", sharding.parse_mesh("1x1"))
    single, split = states["1x1"], states[mesh]
    trace = np.asarray(single.trace.tokens)[: int(single.forwards) + 1]
    clear = []
    for row, length in enumerate(map(len, prompts)):
        same = np.array_equal(single.rows.tokens[row], split.rows.tokens[row])
        same = same and int(single.rows.nfe[row]) == int(split.rows.nfe[row])
        clear.append(gaps(model, trace[:, row], length, options) > NEAR)
        assert same or not clear[-1], f"row {row} differs without a near-tie"
    assert sum(clear) > len(clear) / 2  # or this would show nothing


# One training step

LLADA = objective.OBJECTIVES["llada"]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(n, m, marks=() if (n, m) in default else pytest.mark.slow)
        for default in [{("grouped", "2x4")}]
        for n in MODELS
        for m in MESHES
    ],
)
def test_loss_and_gradients(name: str, mesh: str):
    """Within 1e-5 of the loss, and of the largest entry of each weight's gradient, in float32."""
    config = MODELS[name]
    rng = np.random.default_rng(0)
    batch = batch_of(rng.integers(0, 300, (8, 12)), rng.integers(1, 6, 8), rng.choice([9, 12], 8))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(params, model, batch):
        noisy = objective.corrupt(LLADA, jax.random.key(3), batch, model.config.mask_id)
        return objective.losses(LLADA, all_parameters(params, model), noisy, "layers")

    arrays, found = random_arrays(config), {}
    for text in ("1x1", mesh):
        grid = sharding.parse_mesh(text)
        model = on_mesh(config, arrays, grid)
        placed = jax.device_put(batch, sharding.by_row(grid))
        found[text] = step(model.params, model, placed)
    (losses, gradients), (expected, reference) = found[mesh], found["1x1"]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
