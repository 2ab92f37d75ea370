"""Weights on disk: a folder with config.json and one Orbax checkpoint per layer.

Weights from elsewhere are written piece by piece, so a conversion never holds a whole weight. A
restore reads only each device's slices, into memory that a CPU device uses without a copy.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh, NamedSharding

from jdllm.kernels.quantised import quantise
from jdllm.model.config import ModelConfig, is_converted
from jdllm.model.model import Model, abstract, arrays, assemble, named
from jdllm.model.weights import initial
from jdllm.runtime import processes, sharding

PIECE_BYTES = 4 << 20  # how much of a weight is read, encoded and written at a time
ALIGNMENT = 64  # bytes: JAX uses host memory that starts at a multiple of this, and copies other
READERS = 4  # weights of a unit that are read at the same time

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read in pieces when it is written or placed, never as a whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    """Takes one slice per axis and returns that piece, a new contiguous array of `dtype`."""

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    def __deepcopy__(self, memo: Any) -> "LazyArray":
        return self  # Orbax copies host arrays before it writes them; this one cannot change

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape)).astype(dtype or self.dtype, copy=False)


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays as Orbax writes numpy arrays, but piece by piece.

    Orbax copies whole arrays and encodes all their chunks at once, which takes several times their
    size in memory. If a later Orbax does not call the methods below, it will do that again.
    """

    async def _background_serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):  # none left after an error
            await super()._background_serialize([value], [info], [arg])

    async def _open_and_write(self, value: LazyArray, tspec: dict, ts_context: Any) -> None:
        store = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        chunk: Any = store.chunk_layout.write_chunk.shape
        for index in pieces(value.shape, chunk, PIECE_BYTES // value.dtype.itemsize):
            await store[index].write(value.read(index))


def pieces(shape: Sequence[int], chunk: Sequence[int], limit: int) -> Iterator[Index]:
    """Yields indices that tile `shape` in whole chunks: at most `limit` elements, or one chunk."""
    steps = list(chunk)
    for axis, size in reversed(list(enumerate(shape))):
        rest = math.prod(steps) // steps[axis]
        whole = limit // (rest * chunk[axis]) * chunk[axis]
        steps[axis] = min(size, max(chunk[axis], whole))
    for start in itertools.product(*map(range, [0] * len(shape), shape, steps)):
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(start, steps, shape, strict=True))


def unit_of(name: str) -> str:
    """Returns the unit that holds a parameter: its layer ("layers.3"), else its own name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def units(config: ModelConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns shapes of arrays by dotted name, grouped by unit, in the order of the model."""
    grouped: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for name, (array, _) in arrays(abstract(config)).items():
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        grouped.setdefault(unit_of(name), {})[name] = shape
    return grouped


def stored_bytes(config: ModelConfig) -> int:
    """Returns the size of all weights as they are stored."""
    leaves = (leaf for unit in units(config).values() for leaf in unit.values())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def write_model(
    folder: Path,
    config: ModelConfig,
    stream: Iterable[tuple[str, dict[str, LazyArray] | dict[str, jax.Array]]],
) -> None:
    """Writes config.json and the units of `stream`, one at a time, into an existing folder.

    Every process calls this and writes what its devices hold.
    """
    handlers = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, LazyHandler()),
        (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),
    )
    writer = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    with ocp.Checkpointer(writer) as checkpointer:
        for unit, arrays in stream:
            save_args = {name: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES) for name in arrays}
            args = ocp.args.PyTreeSave(arrays, save_args=save_args)
            try:
                checkpointer.save(folder.absolute() / "weights" / unit, args=args)
            except (OSError, ValueError) as error:  # tensorstore has one type for every failure
                if "No space left" not in str(error):
                    raise
                raise OSError(
                    f"the disk of {folder.parent} filled up while {unit} was written: make room "
                    "and start again"
                ) from error
    if processes.is_main():
        (folder / "config.json").write_text(config.to_json())


def save_model(folder: Path, model: Model) -> None:
    """Writes a model that is in memory (on any mesh) into an existing folder."""
    leaves = arrays(model)
    grouped = units(model.config)
    stream = ((unit, {n: leaves[n][0] for n in names}) for unit, names in grouped.items())
    write_model(folder, model.config, stream)


def refuse_run(folder: Path) -> None:
    """Raises ValueError for the folder of a training run or of an adapter, which is no model."""
    if is_converted(folder / "model"):
        raise ValueError(f"{folder} is a training run; its model is {folder / 'model'}")
    named = "adapter_config.json"
    if (folder / named).exists() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is a LoRA adapter; use it with model=BASE adapter={folder}")
    if (folder / "adapter" / named).exists() and (folder / "checkpoints").exists():
        adapter = folder / "adapter"
        raise ValueError(f"{folder} is a training run; use it with model=BASE adapter={adapter}")


def read_config(folder: Path) -> ModelConfig:
    """Returns the ModelConfig of a converted folder. Raises ValueError for any other folder."""
    if not is_converted(folder):
        refuse_run(folder)
        raise ValueError(f"{folder} is not a converted model: it has no config.json of ours")
    path = folder / "config.json"
    try:
        return ModelConfig.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend it there or convert the model again") from None


def placements(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter, by dotted name, on `mesh`."""
    return {
        name: NamedSharding(mesh, sharding.spec(name, array.shape, axes, mesh))
        for name, (array, axes) in arrays(abstract(config)).items()
    }


def _check_shapes(
    checkpointer: ocp.StandardCheckpointer, path: Path, wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises ValueError, naming a weight, where a unit is missing or differs from config.json."""
    if not path.is_dir():
        raise ValueError(f"{path} is missing, which config.json asks for; convert the model again")
    stored = checkpointer.metadata(path).item_metadata or {}
    for name, leaf in wanted.items():
        shape = stored[name].shape if name in stored else None
        if shape != leaf.shape:
            raise ValueError(
                f"{path} holds {name} with shape {shape}, but config.json asks for {leaf.shape}; "
                "convert the model again"
            )


def _open(path: Path, name: str) -> Any:
    """Opens the stored array `name` of the unit at `path` without reading it."""
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{path}/"},
        "path": f"{name}/",
    }
    return tensorstore.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()


def _read(store: Any, dtype: np.dtype, index: Index) -> np.ndarray:
    """Reads one slice of a stored array as `dtype`, without a second copy."""
    view = tensorstore.cast(store[index], dtype) if store.dtype != dtype else store[index]
    memory = np.empty(view.size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    array = memory[start : start + view.size * dtype.itemsize].view(dtype).reshape(view.shape)
    tensorstore.array(array, copy=False).write(view).result()
    return array


def stored_units(folder: Path, config: ModelConfig) -> Iterator[tuple[str, dict[str, LazyArray]]]:
    """Yields the units of a converted folder, read in pieces as they are written or placed.

    Raises ValueError, naming a weight, where the folder does not hold what `config` asks for.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        for unit, leaves in units(config).items():
            path = folder.absolute() / "weights" / unit
            _check_shapes(checkpointer, path, leaves)
            found = {}
            for name, leaf in leaves.items():
                dtype = np.dtype(leaf.dtype)
                read = functools.partial(_read, _open(path, name), dtype)
                found[name] = LazyArray(leaf.shape, dtype, read)
            yield unit, found


def read_array(path: Path, name: str, dtype: str) -> np.ndarray:
    """Returns the whole stored array `name` of the checkpoint at `path`."""
    store = _open(path.absolute(), name)
    return _read(store, np.dtype(dtype), (slice(None),) * store.rank)


def _restore(path: Path, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    read: Any = functools.partial(_read, _open(path, name), np.dtype(leaf.dtype))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def restore_model(folder: Path, mesh: Mesh, dtype: str | None = None) -> Model:
    """Reads a converted model straight into its sharding on `mesh`, as `dtype` (default: stored).

    Every device reads only its own slices. Raises ValueError, naming the folder, where it is not a
    converted model or its weights do not fit.
    """
    config = read_config(folder)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    targets = placements(config, mesh)
    found: dict[str, jax.Array] = {}
    with ocp.StandardCheckpointer() as checkpointer, ThreadPoolExecutor(READERS) as pool:
        for unit, leaves in units(config).items():
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=targets[name])
                for name, leaf in leaves.items()
            }
            path = folder.absolute() / "weights" / unit
            _check_shapes(checkpointer, path, wanted)
            restored = pool.map(functools.partial(_restore, path), wanted, wanted.values())
            found |= zip(wanted, restored, strict=True)
    return assemble(config, found, mesh)


def place_stream(
    config: ModelConfig, mesh: Mesh, stream: Iterable[tuple[str, dict[str, LazyArray]]]
) -> Model:
    """Puts streamed weights onto `mesh`; for each device only its own slices are read.

    The stream's arrays have the config's dtype.
    """
    targets = placements(config, mesh)
    found: dict[str, jax.Array] = {}
    for _, unit in stream:
        for name, lazy in unit.items():
            if name not in targets:
                raise ValueError(f"{name} is no parameter of the model")
            read: Any = lazy.read  # called with one slice per axis, for each device
            found[name] = jax.make_array_from_callback(lazy.shape, targets[name], read)
    return assemble(config, found, mesh)


def random_maker(config: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Model]:
    """The function that makes a model of a key, its weights directly in their sharding.

    It compiles one small program per shape instead of one for the model: seconds, not a minute.
    """
    targets = placements(config, mesh)
    leaves = named(abstract(config))

    @functools.cache
    def maker(
        shape: tuple[int, ...], dtype: Any, fan_in: int | None, inputs: Any, places: Any
    ) -> Any:
        def draw(key: jax.Array) -> list[jax.Array]:
            if inputs is None:
                return [initial(key, shape, dtype, fan_in)]
            drawn = initial(key, shape, config.dtype, fan_in)
            return jax.tree.leaves(quantise(drawn, inputs, str(config.weights)))

        return jax.jit(draw, out_shardings=list(places))

    def make(key: jax.Array) -> Model:
        found: dict[str, jax.Array] = {}
        for number, (name, leaf) in enumerate(leaves.items()):
            names = [own for own in targets if own == name or own.rpartition(".")[0] == name]
            inputs = getattr(leaf.get_value(), "inputs", None)
            places = tuple(targets[own] for own in names)
            draw = maker(leaf.shape, leaf.dtype, leaf.get_metadata("fan_in"), inputs, places)
            found |= zip(names, draw(jax.random.fold_in(key, number)), strict=True)
        return assemble(config, found, mesh)

    return make


def random_model(config: ModelConfig, mesh: Mesh, seed: int = 0) -> Model:
    """Random weights made directly on the devices, in the target sharding."""
    return random_maker(config, mesh)(jax.random.key(seed))
