"""convert weights=int8 and fp8: what is stored, what reads it, and what cannot be undone."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm import LLM, DecodeConfig
from jdllm.convert import commands
from jdllm.convert.families import open_source
from jdllm.convert.quantise import quantised, widened
from jdllm.decode.memory import Planner
from jdllm.kernels.quantised import KINDS, Quantised
from jdllm.load import load_model
from jdllm.model.config import NAMED
from jdllm.model.linear import linear_of
from jdllm.model.model import Model, assemble, forward, named
from jdllm.model.quantise import quantise_params
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.training.config import SFTConfig
from jdllm.training.subject import load_subject
from tests.support.marks import quick
from tests.support.recordings import with_mask

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "goldens"
ONE = sharding.parse_mesh("1x1")
CASES = {"llada": "llada", "dream": "dream", "llada2_moe": "llada2"}


def converted(case: str, folder: Path, *words: str) -> Path:
    output = folder / "_".join([case, *words])
    source = with_mask(GOLDENS / case, folder / f"of_{output.name}")
    commands.main([CASES[case], f"source={source}", f"output={output}", *words])
    return output


def leaves(model: Model) -> dict[str, Any]:
    return {name: leaf.get_value() for name, leaf in named(model).items()}


def assert_same(first: Model, second: Model) -> None:
    one, two = leaves(first), leaves(second)
    assert one.keys() == two.keys()
    for name in one:
        for a, b in zip(*map(jax.tree.leaves, (one[name], two[name])), strict=True):
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("case", "kind"),
    quick(itertools.product(CASES, KINDS), ("llada2_moe", "fp8")),
)
def test_what_is_streamed_is_what_whole_weights_become(case, kind, tmp_path, monkeypatch):
    """Piece by piece, restored on one device and on a mesh."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 4096)
    folder = converted(case, tmp_path, f"weights={kind}")
    plain = load_model(str(converted(case, tmp_path)), ONE)
    wanted = dataclasses.replace(plain, params=quantise_params(plain.params, kind))
    found = load_model(str(folder), ONE)
    assert_same(found, wanted)
    assert found.config.weights == kind and found.config.dtype == plain.config.dtype
    for name, value in leaves(found).items():
        held = linear_of(name) is not None and not name.endswith("router")
        assert isinstance(value, Quantised) == held, name
    assert_same(load_model(str(folder), sharding.parse_mesh("2x2")), wanted)
    stored = sum(array.nbytes for array in jax.tree.leaves(found.params))
    assert checkpoint.stored_bytes(checkpoint.read_config(folder)) == stored


def test_pieces_stay_small(tmp_path, monkeypatch):
    """No read of a source is larger than a piece, or than all inputs of one channel."""
    config = checkpoint.read_config(converted("llada", tmp_path))
    reads: list[int] = []

    def watched(lazy: checkpoint.LazyArray) -> checkpoint.LazyArray:
        def read(index: checkpoint.Index) -> np.ndarray:
            piece = lazy.read(index)
            reads.append(piece.size)
            return piece

        return dataclasses.replace(lazy, read=read)

    monkeypatch.setattr("jdllm.convert.quantise.PIECE_BYTES", 4 * 512)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 512)
    units = [
        (unit, {name: watched(lazy) for name, lazy in arrays.items()})
        for unit, arrays in open_source(GOLDENS / "llada").units()
        if unit == "layers.0"
    ]
    (tmp_path / "out").mkdir()
    held: Any = "int8"
    own = dataclasses.replace(config, weights=held)
    checkpoint.write_model(tmp_path / "out", own, quantised(units, "int8"))
    assert reads and max(reads) <= 512


def test_every_command_s_loader_decodes_from_it(tmp_path):
    folder = converted("llada", tmp_path, "weights=int8")
    llm = LLM.load(str(folder), "1x1")
    options = DecodeConfig(gen_length=8, block_length=8)
    (found,) = llm.generate([[5, 6, 7]], options)
    dense = {n: v.dense() if isinstance(v, Quantised) else v for n, v in leaves(llm.model).items()}
    config = dataclasses.replace(llm.model.config, weights=None)
    plain = LLM(assemble(config, dense, ONE), None, llm.defaults)
    (wanted,) = plain.generate([[5, 6, 7]], options)
    assert found.ids == wanted.ids
    assert (
        llm.fingerprint() != plain.fingerprint() != LLM.load(str(GOLDENS / "llada")).fingerprint()
    )


@pytest.mark.parametrize("kind", quick(KINDS, "int8"))
def test_merge_widens_and_may_round_again(kind, tmp_path):
    """The sum of a rounded base and an adapter is a plain model, or one in 8 bits."""
    base, adapter = converted("llada", tmp_path, f"weights={kind}"), GOLDENS / "peft" / "llada_all"
    words = ["merge", f"source={base}", f"adapter={adapter}"]
    commands.main([*words, f"output={tmp_path / 'plain'}"])
    commands.main([*words, f"output={tmp_path / 'again'}", f"weights={kind}"])
    plain, again = (load_model(str(tmp_path / name), ONE) for name in ("plain", "again"))
    assert plain.config.weights is None and again.config.weights == kind
    assert_same(again, dataclasses.replace(plain, params=quantise_params(plain.params, kind)))
    tokens, seen = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)
    beside = load_model(str(base), ONE, adapter=adapter)
    got, wanted = (jax.jit(forward)(model, tokens, seen) for model in (plain, beside))
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_widened_weights_are_those_that_products_use(tmp_path):
    folder = converted("llada2_moe", tmp_path, "weights=fp8")
    config = checkpoint.read_config(folder)
    units = widened(checkpoint.stored_units(folder, config), config)
    model = load_model(str(folder), ONE)
    for _, arrays in units:
        for name, lazy in arrays.items():
            value = leaves(model)[name]
            wanted = value.dense(config.dtype) if isinstance(value, Quantised) else value
            np.testing.assert_array_equal(np.asarray(lazy), wanted)


def test_export_says_that_there_is_no_way_back(tmp_path, capsys):
    folder = converted("llada", tmp_path, "weights=int8")
    with pytest.raises(SystemExit):
        commands.main(["export", f"source={folder}", f"output={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert "in int8, which cannot go back" in said and "without weights=" in said
    assert not (tmp_path / "out").exists()


def test_whole_training_is_refused_and_factors_are_not(tmp_path):
    folder = converted("llada", tmp_path, "weights=fp8")
    config = SFTConfig(task="sudoku", model=str(folder), output=tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds its weights in fp8, .* lora.rank=16"):
        load_subject(config, ONE)
    lora = dataclasses.replace(config.lora, rank=2)
    subject = load_subject(dataclasses.replace(config, lora=lora), ONE)
    kinds = {type(value).__name__ for value in leaves(subject.frozen).values()}
    assert "Quantised" in kinds and subject.trained


def test_the_plan_knows_what_is_held(capsys, monkeypatch):
    monkeypatch.setattr(Planner, "largest_batch", lambda self, memory: 0)  # compiles many programs
    held: Any = "int8"
    words = ["plan", "tiny", "mesh=1x1", "batch=1", "length=64", "json=true", f"weights={held}"]
    commands.main(words)
    facts = json.loads(capsys.readouterr().out)
    config = dataclasses.replace(NAMED["tiny"], dtype="float32", weights=held)
    assert facts["bytes"]["weights"] == checkpoint.stored_bytes(config)
    assert facts["weights"] == held and facts["held"] == "float32, linear maps in int8"


def test_half_of_the_bytes_of_a_large_model():
    held: Any = "int8"
    wide, narrow = (
        checkpoint.stored_bytes(dataclasses.replace(NAMED["llada-8b"], weights=kind)) / 1e9
        for kind in (None, held)
    )
    maps = 32 * (4 * 4096**2 + 3 * 4096 * 12288) / 1e9
    assert wide - narrow == pytest.approx(maps, rel=0.001)
