"""The memory plan: against what XLA says of the real decode loop, and for absent meshes."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdllm.convert import commands
from jdllm.convert.commands import main
from jdllm.convert.plan import describe_model
from jdllm.decode import DecodeConfig, Request, decode, make_setup
from jdllm.decode import memory as memory_plan
from jdllm.decode.memory import Plan, Planner, share, weight_bytes
from jdllm.model.config import LLADA_8B, NAMED, ModelConfig, count_parameters
from jdllm.model.model import abstract, assemble, named
from jdllm.runtime import sharding
from jdllm.store.checkpoint import placements

BUNDLED = dataclasses.replace(NAMED["bundled"], dtype="float32")
SMALL = dataclasses.replace(
    LLADA_8B, layers=6, embed=256, heads=8, kv_heads=8, head_dim=32, mlp=768, vocab=8192,
    dtype="float32",
)  # fmt: skip


def compiled(
    config: ModelConfig, decoding: DecodeConfig, batch: int, length: int, mesh: str
) -> tuple[int, int]:
    """Bytes of a device in the real program: its arguments, and all of it.

    Arguments are weights and request; the rest is outputs, which hold the cache, and scratch.
    """
    grid = sharding.parse_mesh(mesh)
    targets = placements(config, grid)
    shapes: Any = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=targets[name])
        for name, leaf in named(abstract(config)).items()
    }
    model = assemble(config, shapes, grid)

    def rows(shape: tuple[int, ...], kind: jnp.dtype) -> Any:
        spec = NamedSharding(grid, P("data"))
        return jax.ShapeDtypeStruct((batch, *shape), kind, sharding=spec)

    request = Request(
        rows((length,), jnp.dtype("int32")),
        rows((), jnp.dtype("int32")),
        rows((), jax.random.key(0).dtype),
        rows((), jnp.dtype("bool")),
    )
    setup = make_setup(decoding, config)
    found = decode.lower(model, request, setup).compile().memory_analysis()
    assert found is not None
    arguments = found.argument_size_in_bytes - found.alias_size_in_bytes
    return arguments, arguments + found.output_size_in_bytes + found.temp_size_in_bytes


@pytest.mark.parametrize(
    ("config", "batch", "length", "cache", "mesh"),
    [
        (BUNDLED, 8, 128, "dual", "1x1"),
        pytest.param(SMALL, 4, 96, "none", "1x1", marks=pytest.mark.slow),
        pytest.param(SMALL, 8, 96, "dual", "2x2", marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_what_the_real_program_needs(config, batch, length, cache, mesh):
    decoding = DecodeConfig(gen_length=64, block_length=32, cache=cache).resolve(model=config)
    plan = Planner(config, sharding.abstract_mesh(mesh), length, decoding).plan(batch)
    arguments, total = compiled(config, decoding, batch, length, mesh)
    assert plan.weights == pytest.approx(arguments, rel=0.02)
    assert plan.total == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x4"])
@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_can_be_placed(name: str, mesh: str):
    """Abstractly: a device holds its part, and parts make the whole."""
    config, grid = NAMED[name], sharding.abstract_mesh(mesh)
    parts = grid.shape["model"]
    if config.heads % parts:
        with pytest.raises(ValueError, match=f"'heads' of size {config.heads} cannot be split"):
            weight_bytes(config, grid)
        return
    held, whole = weight_bytes(config, grid), weight_bytes(config, sharding.abstract_mesh("1x1"))
    assert whole >= count_parameters(config) * jnp.dtype(config.dtype).itemsize
    assert whole / parts <= held <= whole / parts * 1.5
    mine = named(abstract(share(config, grid)))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in mine.values()) <= held


class Straight(Planner):
    """A planner that compiles nothing: the need is a curve, which one row starts at 10."""

    def __init__(self, power: float, replicas: int = 1):
        self.mesh, self.power, self.trials = AbstractMesh((replicas, 1), sharding.AXES), power, 0

    def plan(self, batch: int) -> Plan:
        self.trials += 1
        rows = batch // self.mesh.shape["data"]
        return Plan(9, 0, math.ceil(rows**self.power), 0)


@pytest.mark.parametrize("power", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("memory", [9, 10, 11, 20, 1000, 10**6])
@pytest.mark.parametrize("replicas", [1, 4])
def test_the_largest_batch(power: float, memory: int, replicas: int):
    planner = Straight(power, replicas)
    best = planner.largest_batch(memory)
    rows = best // replicas
    assert best == rows * replicas and planner.trials <= 20
    assert rows == 0 or planner.plan(best).total <= memory
    beyond = rows + 1 + rows // 50
    assert planner.plan(beyond * replicas).total > memory


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands, "enable_compilation_cache", lambda: None)  # keep the tests' own
    monkeypatch.setattr(memory_plan, "TRIALS", 2)  # of the search, which is tested by itself
    words = ["mesh=4x2", "batch=8", "length=64", "decode.gen_length=32", "memory=0.05"]
    main(["plan", "tiny", *words])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: 0.00 B parameters in float32")
    assert lines[1].startswith("mesh data=4 x model=2, batch 8, 64 columns")
    table = dict(line.split(maxsplit=1) for line in lines[4:-1])
    assert set(table) == {"weights", "cache", "activations", "copies", "total"}
    assert table["total"].endswith("fits in 0.050")
    assert int(lines[-1].split()[-1]) > 10
    main(["plan", "tiny", *words, "json=true"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["mesh"] == {"data": 4, "model": 2} and facts["fits"] is True
    assert facts["total"] == sum(facts["bytes"].values()) and facts["memory"] == 50_000_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt"], "neither a family"),
        (["tiny", "mesh=1x3"], "cannot be split over the 3 devices"),
        (["tiny", "length=4096"], "within the model's 512 columns"),
        (["nowhere/at/all"], "neither a folder nor a Hugging Face id"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["tiny", "batch=0"], ["tiny", "memory=-1"], ["tiny", "rows=3"]])
def test_bad_settings_have_status_2(words: list[str]):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2


@pytest.mark.parametrize("golden", ["llada", "dream", "qwen_verifier"])
def test_a_hugging_face_folder_needs_its_config_only(golden: str, tmp_path: Path):
    source = Path(__file__).parents[1] / "goldens" / golden
    for name in ("config.json", "tokenizer.json"):
        if (source / name).exists():
            shutil.copy(source / name, tmp_path / name)
    assert describe_model(str(tmp_path)) == describe_model(str(source))
    assert (
        describe_model(str(source)).layers
        == json.loads((source / "config.json").read_text())[
            "n_layers" if golden == "llada" else "num_hidden_layers"
        ]
    )
