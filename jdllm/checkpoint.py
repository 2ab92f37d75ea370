"""Weights on disk: a folder with config.json and one Orbax checkpoint a layer.

One checkpoint a layer lets a conversion write a model that does not fit into host memory, and a
restore put every weight straight into its sharding. A folder is complete or it is not there: it is
written under a temporary name and renamed at the end.
"""

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jdllm import sharding
from jdllm.configs import ModelConfig, is_converted
from jdllm.model import abstract, assemble, named

PARTIAL = ".partial-"


def unit_of(name: str) -> str:
    """The checkpoint that holds a parameter: its layer ("layers.3"), else the parameter itself."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def units(config: ModelConfig) -> dict[str, dict[str, nnx.Param]]:
    """Abstract parameters by dotted name, grouped by unit, in the order of the model."""
    grouped: dict[str, dict[str, nnx.Param]] = {}
    for name, leaf in named(nnx.state(abstract(config))).items():
        grouped.setdefault(unit_of(name), {})[name] = leaf
    return grouped


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `folder` that takes its name when the block ends without error.

    What an interrupted earlier attempt left behind is removed first. FileExistsError where
    `folder` is already there.
    """
    folder = folder.absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it or name another output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f"{folder.name}{PARTIAL}*"):
        shutil.rmtree(stale)
    partial = folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    folder: Path, config: ModelConfig, stream: Iterable[tuple[str, dict[str, np.ndarray]]]
) -> None:
    """Writes config.json and the units of `stream`, one at a time, into an existing folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        for unit, arrays in stream:
            checkpointer.save(folder.absolute() / "weights" / unit, arrays)
            checkpointer.wait_until_finished()
    (folder / "config.json").write_text(config.to_json())


def save_model(folder: Path, config: ModelConfig, params: nnx.State) -> None:
    """Writes a model that is in memory (on any mesh) into an existing folder."""
    leaves = named(params)
    grouped = units(config)
    stream = ((unit, {n: leaves[n][...] for n in names}) for unit, names in grouped.items())
    write_model(folder, config, stream)


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder written by this module; ValueError where it is not one."""
    if not is_converted(folder):
        raise ValueError(f"{folder} is not a converted model: it has no config.json of ours")
    return ModelConfig.from_json((folder / "config.json").read_text())


def placements(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter, by dotted name, on `mesh`."""
    leaves = named(nnx.state(abstract(config)))
    return {
        name: NamedSharding(mesh, sharding.spec(name, leaf.shape, leaf.get_metadata("axes"), mesh))
        for name, leaf in leaves.items()
    }


def restore_model(
    folder: Path, mesh: Mesh, dtype: str | None = None
) -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
    """Reads a converted model straight into its sharding on `mesh`, as `dtype` (default: stored).

    Every device reads only its own slices.
    """
    config = read_config(folder)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    targets = placements(config, mesh)
    arrays: dict[str, jax.Array] = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for unit, leaves in units(config).items():
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, config.dtype, sharding=targets[name])
                for name, leaf in leaves.items()
            }
            arrays |= checkpointer.restore(folder.absolute() / "weights" / unit, wanted)
    return config, *assemble(config, arrays)


def place_stream(
    config: ModelConfig, mesh: Mesh, stream: Iterable[tuple[str, dict[str, np.ndarray]]]
) -> tuple[nnx.GraphDef, nnx.State]:
    """Puts streamed units onto `mesh`, one at a time, in the config's dtype."""
    targets = placements(config, mesh)
    arrays: dict[str, jax.Array] = {}
    for _, unit in stream:
        for name, array in unit.items():
            arrays[name] = jax.device_put(array.astype(config.dtype), targets[name])
    return assemble(config, arrays)


def random_model(
    config: ModelConfig, mesh: Mesh, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """Random weights made directly on the devices, in the target sharding."""
    from jdllm.model import Transformer

    targets = placements(config, mesh)
    graph, params = nnx.split(abstract(config))
    shardings = jax.tree.unflatten(jax.tree.structure(params), list(targets.values()))

    def make(key: jax.Array) -> nnx.State:
        return nnx.state(Transformer(config, nnx.Rngs(params=key)))

    return graph, jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
