"""Checkpoints: any mesh to any mesh, only one's own slices, complete folders or none."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdllm.load import locate
from jdllm.model.config import NAMED, NO_ID, MoEConfig, count_parameters, is_converted
from jdllm.model.model import Model, named
from jdllm.runtime import sharding
from jdllm.runtime.files import atomic_folder
from jdllm.store import checkpoint
from jdllm.store.checkpoint import LazyArray

TINY = dataclasses.replace(NAMED["tiny"], embed=32, head_dim=8, mlp=48, vocab=64)
MESHES = ["1x1", "2x2", "8x1", "1x4"]


def values(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf[...]) for name, leaf in named(model).items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A random model, saved from a 2x2 mesh, and its values."""
    folder = tmp_path_factory.mktemp("saved")
    model = checkpoint.random_model(TINY, sharding.parse_mesh("2x2"))
    checkpoint.save_model(folder, model)
    return folder, values(model)


@pytest.mark.parametrize("mesh", MESHES)
def test_restores_onto_any_mesh(saved: tuple[Path, dict[str, np.ndarray]], mesh: str):
    folder, expected = saved
    grid = sharding.parse_mesh(mesh)
    model = checkpoint.restore_model(folder, grid)
    assert model.config == TINY
    assert_equal(values(model), expected)
    split = 0
    for name, leaf in named(model).items():
        array = leaf[...]
        assert array.sharding == checkpoint.placements(TINY, grid)[name], name
        assert {shard.device for shard in array.addressable_shards} == set(grid.devices.flat)
        parts = grid.shape["model"] if "model" in array.sharding.spec else 1
        split += parts > 1
        for shard in array.addressable_shards:
            assert shard.data.size == array.size // parts, name
            np.testing.assert_array_equal(shard.data, expected[name][shard.index])
    # all but the three norms (and key/value heads where they do not divide) lie in slices
    kv_replicated = bool(TINY.kv_heads % grid.shape["model"])
    layer = 4 if kv_replicated else 5
    assert split == (0 if grid.shape["model"] == 1 else 2 + layer * TINY.layers)


def test_saving_from_one_mesh_or_another_is_the_same(
    saved: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
):
    folder, expected = saved
    model = checkpoint.restore_model(folder, sharding.parse_mesh("1x4"))
    checkpoint.save_model(tmp_path, model)
    again = checkpoint.restore_model(tmp_path, sharding.parse_mesh("1x1"))
    assert_equal(values(again), expected)


def test_casts_while_restoring(saved: tuple[Path, dict[str, np.ndarray]]):
    folder, expected = saved
    model = checkpoint.restore_model(folder, sharding.parse_mesh("2x2"), "bfloat16")
    assert model.config.dtype == "bfloat16"
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in expected.items()}
    assert_equal(values(model), half)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_cpu_keeps_what_is_read(saved: tuple[Path, dict[str, np.ndarray]], kind: str):
    """So that host memory does not hold a weight twice while it is placed."""
    store = checkpoint._open(saved[0].absolute() / "weights" / "embedding", "embedding")
    rows = slice(3, 40)
    array = checkpoint._read(store, np.dtype(kind), (rows, slice(None)))
    np.testing.assert_array_equal(array, saved[1]["embedding"][rows].astype(kind))
    placed = jax.device_put(array, jax.devices()[0])
    assert placed.unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"x" * 100)])
def test_damaged_weights_are_no_zeros(saved: tuple[Path, dict[str, np.ndarray]], harm, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved[0], folder)
    for path in (folder / "weights" / "layers.0").rglob("d/*"):
        harm(path)
    with pytest.raises((ValueError, OSError), match="layers.0"):
        checkpoint.restore_model(folder, sharding.parse_mesh("1x1"))


def test_lazy_arrays_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pieces smaller than the weights, written and restored in slices."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    rng = np.random.default_rng(0)
    largest = 0

    def lazy(array: np.ndarray) -> LazyArray:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            nonlocal largest
            piece = np.array(array[index])
            largest = max(largest, piece.nbytes)
            return piece

        return LazyArray(array.shape, array.dtype, read)

    grouped = checkpoint.units(TINY)
    whole = {
        name: rng.standard_normal(leaf.shape).astype(TINY.dtype)
        for leaves in grouped.values()
        for name, leaf in leaves.items()
    }
    stream = ((u, {name: lazy(whole[name]) for name in leaves}) for u, leaves in grouped.items())
    checkpoint.write_model(tmp_path, TINY, stream)
    assert 500 < largest <= 1000
    model = checkpoint.restore_model(tmp_path, sharding.parse_mesh("1x4"))
    assert_equal(values(model), whole)


@pytest.mark.parametrize("mesh", MESHES)
def test_streams_read_only_the_slices_of_each_device(
    saved: tuple[Path, dict[str, np.ndarray]], mesh: str
):
    folder, expected = saved
    grid = sharding.parse_mesh(mesh)
    targets = checkpoint.placements(TINY, grid)
    reads: list[tuple[str, int]] = []

    def lazy(name: str) -> LazyArray:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            piece = np.ascontiguousarray(expected[name][index])
            reads.append((name, piece.size))
            return piece

        return LazyArray(expected[name].shape, expected[name].dtype, read)

    stream = [(unit, {n: lazy(n) for n in names}) for unit, names in checkpoint.units(TINY).items()]
    model = checkpoint.place_stream(TINY, grid, stream)
    assert_equal(values(model), expected)
    for name, leaf in named(model).items():
        assert leaf[...].sharding == targets[name]
    for name, size in reads:
        assert size == np.prod(targets[name].shard_shape(expected[name].shape)), name


def test_more_than_ten_layers_keep_their_order(tmp_path: Path):
    config = dataclasses.replace(TINY, layers=12)
    grid = sharding.parse_mesh("2x2")
    model = checkpoint.random_model(config, grid)
    targets = checkpoint.placements(config, grid)
    leaves = named(model)
    assert set(leaves) == set(targets)
    for name, leaf in leaves.items():
        assert leaf[...].sharding == targets[name], name
        assert leaf[...].sharding.spec == sharding.spec(
            name, leaf.shape, leaf.get_metadata("axes"), grid
        )
    units = list(checkpoint.units(config))
    assert [u for u in units if u.startswith("layers")] == [f"layers.{i}" for i in range(12)]
    checkpoint.save_model(tmp_path, model)
    restored = checkpoint.restore_model(tmp_path, sharding.parse_mesh("1x1"))
    assert_equal(values(restored), values(model))
    tenth = values(restored)["layers.10.mlp.down"]
    assert not np.array_equal(tenth, values(restored)["layers.2.mlp.down"])


def test_random_models_do_not_depend_on_the_mesh():
    models = [
        values(checkpoint.random_model(TINY, sharding.parse_mesh(mesh), seed=3))
        for mesh in ("1x1", "1x4")
    ]
    assert_equal(*models)
    other = values(checkpoint.random_model(TINY, sharding.parse_mesh("1x1"), seed=4))
    assert not np.array_equal(models[0]["head"], other["head"])
    first, second = (models[0][f"layers.{i}.mlp.down"] for i in (0, 1))
    assert not np.array_equal(first, second)
    assert first.std() == pytest.approx(TINY.mlp**-0.5, rel=0.05)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x4"])
@pytest.mark.parametrize("name", [name for name in NAMED if name != "llada-1.5"])
def test_random_weights_of_every_named_shape(name: str, mesh: str):
    """Abstractly, nothing is allocated: all of a model's parameters, in shapes that shard."""
    config, grid = NAMED[name], sharding.parse_mesh(mesh)
    if config.heads % grid.shape["model"]:
        with pytest.raises(ValueError, match="cannot be split over"):
            checkpoint.random_maker(config, grid)
        return
    make = checkpoint.random_maker(config, grid)
    made = jax.eval_shape(make, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count_parameters(config)
    assert made.config == config


def test_atomic_folder_appears_at_the_end(tmp_path: Path):
    target = tmp_path / "new" / "model"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_atomic_folder_leaves_nothing_after_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_clears_what_was_left(tmp_path: Path):
    left = tmp_path / "model[1].partial-0123abcd"
    (left / "weights").mkdir(parents=True)
    (tmp_path / "model.partial-0123abcd").mkdir()  # another model's
    with atomic_folder(tmp_path / "model[1]"):
        assert not left.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.partial-0123abcd", "model[1]"]


def test_atomic_folder_does_not_disturb_others(tmp_path: Path):
    target = tmp_path / "model"
    with atomic_folder(target) as first:
        with (
            pytest.raises(FileExistsError, match="another process is writing .*model now"),
            atomic_folder(target),
        ):
            pass
        assert first.exists()
    with pytest.raises(FileExistsError, match="model exists already"), atomic_folder(target):
        pass
    assert target.is_dir()


def test_atomic_folder_never_replaces_a_folder(tmp_path: Path):
    target = tmp_path / "model"
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(target):
        target.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flavour": 1}, "unknown keys in the converted config: flavour"),
        ({"layers": None}, "layers"),
        ({"stop_ids": None}, "stop_ids"),
    ],
)
def test_config_with_unknown_or_missing_keys(tmp_path: Path, change: dict, message: str):
    facts = json.loads(TINY.to_json()) | change
    facts = {key: value for key, value in facts.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore_model(tmp_path, sharding.parse_mesh("1x1"))
    assert "config.json" in str(error.value)


SPARSE = dataclasses.replace(TINY, moe=MoEConfig(experts=8, top_k=2, expert_mlp=4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": "3"}, "layers='3' must be a whole number of 1 or more"),
        ({"kv_heads": 0}, "kv_heads=0 must be a whole number of 1 or more"),
        ({"embed": True}, "embed=True must be a whole number of 1 or more"),
        ({"head_dim": 8.0}, "head_dim=8.0 must be a whole number of 1 or more"),
        ({"mask_id": None}, "mask_id=None must be a whole number of 0 or more"),
        ({"mask_id": NO_ID}, "mask_id=-1 must be a whole number of 0 or more"),
        ({"stop_ids": 5}, "stop_ids=5 must be a list, each item a whole number of 0 or more"),
        ({"stop_ids": ["5"]}, "stop_ids=('5',) must be a list, each item a whole number"),
        ({"stop_ids": []}, "stop_ids=() must hold an id at least"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number above 0"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' must be a number above 0"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16, float16"),
        ({"dtype": None}, "dtype=None must be text"),
        ({"tied_head": "no"}, "tied_head='no' must be true or false"),
        ({"rotary_dim": "8"}, "rotary_dim='8' must be a whole number of 1 or more or None"),
        ({"block_causal": 0}, "block_causal=0 must be a whole number of 1 or more or None"),
        ({"moe": 4}, "moe of the converted config must be an object with facts, not 4"),
        ({"moe": {"experts": 4}}, "moe of the converted config is incomplete: it lacks top_k"),
        ({"moe": {"flavour": 4}}, "unknown keys in moe of the converted config: flavour"),
        ({"moe.experts": "8"}, "moe.experts='8' must be a whole number of 1 or more"),
        ({"moe.dense_layers": 1}, "moe.dense_layers=1 must be a list, each item a whole number"),
        ({"moe.score": "tanh"}, "moe.score=tanh must be softmax or sigmoid"),
        ({"moe.scale": None}, "moe.scale=None must be a number above 0"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_are_named(tmp_path: Path, change: dict, message: str):
    facts = json.loads(SPARSE.to_json())
    for name, value in change.items():
        inside = facts["moe"] if name.startswith("moe.") else facts
        inside[name.removeprefix("moe.")] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError) as error:
        checkpoint.read_config(tmp_path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert str(error.value).endswith("mend it there or convert the model again")


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": "other"}'])
def test_folders_that_are_not_ours(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert not is_converted(tmp_path)
    with pytest.raises(ValueError, match="is not a converted model"):
        checkpoint.read_config(tmp_path)


def test_the_folder_of_a_training_run_names_the_model_in_it(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(NAMED["tiny"].to_json())
    for read in (checkpoint.read_config, lambda folder: locate(str(folder))):
        with pytest.raises(ValueError, match="is a training run; its model is .*model$"):
            read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlp": 40}, r"mlp.down with shape \(48, 32\), but config.json asks for \(40, 32\)"),
        ({"layers": 3}, "layers.2 is missing"),
        ({"kv_heads": 4}, "layers.0 holds layers.0.attention.qkv with shape None"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    saved: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, change: dict, message: str
):
    (tmp_path / "weights").symlink_to(saved[0] / "weights")
    (tmp_path / "config.json").write_text(dataclasses.replace(TINY, **change).to_json())
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore_model(tmp_path, sharding.parse_mesh("1x1"))
    assert str(tmp_path) in str(error.value)


def test_a_mesh_that_does_not_divide(saved: tuple[Path, dict[str, np.ndarray]]):
    with pytest.raises(ValueError, match="cannot be split over the 8 devices"):
        checkpoint.restore_model(saved[0], sharding.parse_mesh("1x8"))


def test_replicated_arrays_are_whole_everywhere():
    grid = sharding.parse_mesh("2x2")
    targets = checkpoint.placements(TINY, grid)
    assert targets["norm"] == NamedSharding(grid, P(None))
    assert targets["head"] == NamedSharding(grid, P(None, "model"))
    assert jax.device_count() == 8
