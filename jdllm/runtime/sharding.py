"""Meshes: `mesh=AxB` is data x model, and RULES says which logical axis lies along which.

Weights name their logical axes in model.py; this file alone knows the mesh. XLA splits most of the
model by itself. What it cannot look into (kernels), or would split badly (lookups in a table that
is in pieces, top-k), runs once a shard under `per_shard`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "model")

# logical axis -> mesh axis
RULES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "model",
    "expert_mlp": None,
    "router": None,
    "embed": None,
    "head_dim": None,
    "stack": None,
}
# Key/value heads are few; where they do not divide, every shard keeps them all. So it does with
# the rows of a batch that somebody else than LLM built.
REPLICATE_IF_INDIVISIBLE = {"kv_heads", "batch"}
Axes = Sequence[str | None]


def parse_mesh(
    text: str,
    devices: Sequence[Any] | None = None,
    serves: Callable[[Mesh], bool] | None = None,
) -> Mesh:
    """Builds the mesh that `text` describes: "auto", "AxB" (data x model) or "data:A,model:B".

    "auto" takes every device and puts as many as it can on the data axis: all, or with `serves`
    the first mesh of which that is true. Raises ValueError where the text has another form, asks
    for more devices than there are (fewer are taken from the front of the list), or nothing serves.
    """
    devices = jax.devices() if devices is None else devices
    if text == "auto":
        splits = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        for split in splits:
            mesh = _mesh(devices, len(devices) // split, split)
            if serves is None or serves(mesh):
                return mesh
        raise ValueError(
            f"mesh=auto finds no mesh of {len(devices)} {devices[0].platform} device(s) that the "
            "model can be split over and fits; use more devices, or choose mesh=AxB yourself"
        )
    data, model = _sizes(text)
    if data * model > len(devices):
        kind = devices[0].platform
        virtual = f", or start with JAX_NUM_CPU_DEVICES={data * model} for virtual ones"
        raise ValueError(
            f"mesh={text} needs {data * model} devices, but only {len(devices)} {kind} device(s) "
            f"are here; ask for fewer{virtual if kind == 'cpu' else ''}"
        )
    return _mesh(devices, data, model)


def _mesh(devices: Sequence[Any], data: int, model: int) -> Mesh:
    chosen = devices[: data * model]
    idle = {d.process_index for d in devices} - {d.process_index for d in chosen}
    if idle:
        raise ValueError(
            f"a mesh of {data}x{model} leaves process {min(idle)} without a device; use all "
            f"{len(devices)} devices, or start fewer processes"
        )
    grid = np.array(chosen).reshape(data, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def _sizes(text: str) -> tuple[int, int]:
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return int(match[1]), int(match[2])
    parts = dict(part.split(":") for part in text.split(",") if part.count(":") == 1)
    ok = len(parts) == text.count(",") + 1 and set(parts) <= set(AXES)
    if ok and all(re.fullmatch(r"[1-9]\d*", size) for size in parts.values()):
        return int(parts.get("data", 1)), int(parts.get("model", 1))
    raise ValueError(
        f"mesh={text} is not a mesh: write mesh=AxB (data x model, for example 4x1), "
        "mesh=data:A,model:B or mesh=auto"
    )


def describe(mesh: Mesh) -> str:
    """One line that says how a mesh was read."""
    kind = mesh.devices.flat[0].device_kind
    return f"mesh data={mesh.shape['data']} x model={mesh.shape['model']} on {kind}"


def spec(name: str, shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of an array called `name` with logical `axes` (None: whole), under RULES.

    Raises ValueError, naming the weight, where an axis does not divide or two axes collide.
    """
    placed: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES[axis] if axis else None
        parts = mesh.shape[target] if target else 1
        if size % parts and axis in REPLICATE_IF_INDIVISIBLE:
            target = None
        elif size % parts:
            raise ValueError(
                f"{name}: its axis '{axis}' of size {size} cannot be split over the "
                f"{parts} devices of mesh axis '{target}'; use a mesh whose '{target}' size "
                f"divides {size}"
            )
        if target in placed and target is not None:
            raise ValueError(f"{name}: two of its axes {tuple(axes)} map to mesh axis '{target}'")
        placed.append(target)
    return P(*placed)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, P(RULES["batch"]))


def per_shard(
    function: Callable[..., jax.Array],
    weight: jax.Array,
    inputs: Sequence[Axes],
    output: Axes,
) -> Callable[..., jax.Array]:
    """`function` of arrays, run by every device on its own slices of them.

    The mesh is the one that `weight` lies on, so nobody needs to hand it down; where there is none
    (one device, or inside another `per_shard`) the function runs as it is. `inputs` and `output`
    name logical axes, each output axis that of an input. What must be summed over shards the
    function sums itself (`sum_shards`). Nothing looks into it, so it may call a kernel.
    """
    mesh = jax.typeof(weight).sharding.mesh
    if mesh.size <= 1 or mesh.manual_axes:
        return function

    def split(*arrays: jax.Array) -> jax.Array:
        placed: dict[str | None, str | None] = {None: None}
        specs = []
        for x, axes in zip(arrays, inputs, strict=True):
            specs.append(spec("an activation", x.shape, axes, mesh))
            placed |= zip(axes, specs[-1], strict=True)
        out = P(*(placed[axis] for axis in output))
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False
        )
        return mapped(*arrays)

    return split


def shard_count(axis: str) -> int:
    """Inside `per_shard`: how many slices the logical `axis` has; else 1."""
    mesh, target = jax.sharding.get_abstract_mesh(), RULES[axis]
    return mesh.shape[target] if target in mesh.manual_axes else 1


def shard_index(axis: str) -> jax.Array | int:
    """Inside `per_shard`: which slice of the logical `axis` this device holds; else 0."""
    return jax.lax.axis_index(RULES[axis]) if shard_count(axis) > 1 else 0


def sum_shards(x: jax.Array, axis: str) -> jax.Array:
    """Inside `per_shard`: the sum over the slices of the logical `axis`; else `x` itself."""
    return jax.lax.psum(x, RULES[axis]) if shard_count(axis) > 1 else x


def abstract_mesh(text: str) -> AbstractMesh:
    """The mesh that `text` describes as a shape alone, whether or not there are the devices."""
    sizes = (jax.device_count(), 1) if text == "auto" else _sizes(text)
    return AbstractMesh(sizes, AXES)
