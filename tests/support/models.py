"""Models for tests that put the same weights onto several meshes, without compiling anything."""

import jax
import numpy as np

from jdllm.model.config import ModelConfig
from jdllm.model.model import Model, abstract, assemble, named
from jdllm.runtime import sharding
from jdllm.store.checkpoint import placements

Arrays = dict[str, np.ndarray]


def random_arrays(config: ModelConfig, seed: int = 0, sharpness: float = 1.0) -> Arrays:
    """Returns float32 weights by name: ones for norms, else normal, with a sharp head."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, leaf in named(abstract(config)).items():
        if len(leaf.shape) == 1:
            arrays[name] = np.ones(leaf.shape, np.float32)
        else:
            arrays[name] = rng.normal(0, config.embed**-0.5, leaf.shape).astype(np.float32)
    if "head" in arrays:
        arrays["head"] *= sharpness
    return arrays


def on_mesh(config: ModelConfig, arrays: Arrays, mesh: jax.sharding.Mesh | str) -> Model:
    """Returns static graph and parameters, every device with its slices."""
    grid = sharding.parse_mesh(mesh) if isinstance(mesh, str) else mesh
    targets = placements(config, grid)
    placed = {name: jax.device_put(x, targets[name]) for name, x in arrays.items()}
    return assemble(config, placed, grid)
