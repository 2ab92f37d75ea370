"""Meshes: `mesh=AxB` is data x model, and RULES says which logical axis lies along which.

Weights name their logical axes in model.py; this file alone knows the mesh.
"""

import math
import re
from collections.abc import Sequence
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
# Key/value heads are few; where they do not divide, every shard keeps them all.
REPLICATE_IF_INDIVISIBLE = {"kv_heads"}


def parse_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh that `text` describes: "auto", "AxB" (data x model) or "data:A,model:B".

    "auto" puts every device on the data axis. Raises ValueError where the text has another form
    or asks for more devices than there are; fewer are taken from the front of the list.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(text, len(devices))
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"mesh={text} needs {count} devices, but only {len(devices)} "
            f"{devices[0].platform} device(s) are here; ask for fewer"
        )
    grid = np.array(devices[:count]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def _sizes(text: str, count: int) -> tuple[int, int]:
    if text == "auto":
        return count, 1
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


def spec(name: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of a weight called `name` with logical `axes`, under RULES.

    Raises ValueError, naming the weight, where an axis does not divide or two axes collide.
    """
    placed: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        target = RULES[axis]
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


def abstract_mesh(text: str) -> AbstractMesh:
    """The mesh that `text` describes as a shape alone, whether or not there are the devices."""
    return AbstractMesh(_sizes(text, jax.device_count()), AXES)
