"""Meshes: `mesh=AxB` is data x model, and RULES maps logical axes to these two mesh axes.

Weights name their logical axes where they are made, in jdllm/model; only this file knows the mesh.
XLA splits most of the model by itself. What it cannot split (kernels), or would split badly
(look-ups in a sharded table, top-k), runs once per shard under `per_shard`.
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
    "rank": None,
}
# Key/value heads are few: where they do not divide evenly, every shard keeps all of them. So do
# the rows of a batch that was not padded to the mesh.
REPLICATE_IF_INDIVISIBLE = {"kv_heads", "batch"}
Axes = Sequence[str | None]


def parse_mesh(
    text: str,
    devices: Sequence[Any] | None = None,
    serves: Callable[[Mesh], bool] | None = None,
) -> Mesh:
    """Builds the mesh that `text` describes: "auto", "AxB" (data x model) or "data:A,model:B".

    "auto" takes every device and puts as many as it can on the data axis: all, or with `serves`
    the first mesh for which it returns True. Fewer devices than there are come from the front of
    the list. Raises ValueError where the text has another form, asks for more devices than there
    are, or where `serves` accepts no mesh.
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
        platform = devices[0].platform
        virtual = f", or start with JAX_NUM_CPU_DEVICES={data * model} for virtual ones"
        raise ValueError(
            f"mesh={text} needs {data * model} devices, but only {len(devices)} {platform} "
            f"device(s) are here; ask for fewer{virtual if platform == 'cpu' else ''}"
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
    """Returns one line that says how a mesh was understood."""
    device = mesh.devices.flat[0].device_kind
    return f"mesh data={mesh.shape['data']} x model={mesh.shape['model']} on {device}"


def spec(name: str, shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh) -> P:
    """Returns the PartitionSpec of the array `name` by the logical `axes` (None: not split).

    Raises ValueError, naming the weight, where an axis does not divide evenly or two axes collide.
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
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, P(RULES["batch"]))


def per_shard(
    function: Callable[..., Any],
    weight: Any,
    inputs: Sequence[Axes],
    output: Axes | list[Axes],
) -> Callable[..., Any]:
    """Returns `function` as every device runs it on its own slices of the arrays.

    The mesh is the one that `weight`, a tree of arrays, lies on, so callers need not pass it.
    Without a mesh (one device, or inside another `per_shard`) the function is returned unchanged.
    `inputs` and `output` name logical axes; each output axis is one of the inputs';
    a list is of several outputs. The function
    itself sums what must be summed over shards (`sum_shards`). XLA does not split its inside, so it
    may call a kernel.
    """
    mesh = jax.typeof(jax.tree.leaves(weight)[0]).sharding.mesh
    if mesh.size <= 1 or mesh.manual_axes:
        return function

    def split(*arrays: jax.Array) -> Any:
        placed: dict[str | None, str | None] = {None: None}
        specs = []
        for x, axes in zip(arrays, inputs, strict=True):
            specs.append(spec("an activation", x.shape, axes, mesh))
            placed |= zip(axes, specs[-1], strict=True)
        outputs: list[Any] = output if isinstance(output, list) else [output]
        out = tuple(P(*(placed[axis] for axis in axes)) for axes in outputs)
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=out if isinstance(output, list) else out[0],
            check_vma=False,
        )
        return mapped(*arrays)

    return split


def shard_count(axis: str) -> int:
    """Returns how many slices the logical `axis` has inside `per_shard`, and 1 elsewhere."""
    mesh, target = jax.sharding.get_abstract_mesh(), RULES[axis]
    return mesh.shape[target] if target in mesh.manual_axes else 1


def shard_index(axis: str) -> jax.Array | int:
    """Returns which slice of the logical `axis` this device holds inside `per_shard`, else 0."""
    return jax.lax.axis_index(RULES[axis]) if shard_count(axis) > 1 else 0


def sum_shards(x: jax.Array, axis: str) -> jax.Array:
    """Returns the sum over the slices of the logical `axis` inside `per_shard`, else `x`."""
    return jax.lax.psum(x, RULES[axis]) if shard_count(axis) > 1 else x


def abstract_mesh(text: str) -> AbstractMesh:
    """Returns the shape of the mesh that `text` describes, even without the devices for it."""
    sizes = (jax.device_count(), 1) if text == "auto" else _sizes(text)
    return AbstractMesh(sizes, AXES)
