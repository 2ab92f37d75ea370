"""Model: what everybody is handed of a model. Its parameters are data, everything else is static.

Loading, restoring and random weights return one; decoding, scoring and training take one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.model.cache import Cache
from jdllm.model.config import ModelConfig
from jdllm.model.head import NOTHING, Best, Special
from jdllm.model.lora import Adapter, joined
from jdllm.model.mask import Mask
from jdllm.model.transformer import Output, Remat, Transformer

STATIC: Any = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A model where it lives. With other parameters it is `dataclasses.replace(model, params=...)`.

    A pytree, so that it can be an argument of a jitted function as it is.
    """

    params: nnx.State
    graph: nnx.GraphDef = dataclasses.field(metadata=STATIC)
    """What `params` are merged with into a Transformer."""
    config: ModelConfig = dataclasses.field(metadata=STATIC)
    mesh: Any = dataclasses.field(metadata=STATIC)
    """The jax.sharding.Mesh that the parameters lie on; None where that is nobody's business."""
    dtype: str = dataclasses.field(metadata=STATIC)
    """What is computed in. Training keeps its parameters in float32 whatever this is."""
    kernel: str = dataclasses.field(default="auto", metadata=STATIC)
    """Implementations that are forced, as `kernels.choose.parse` reads them."""
    adapter: Adapter | None = None
    """LoRA's factors, which `net` joins to the parameters."""

    @functools.cached_property
    def net(self) -> Transformer:
        """The modules, with the parameters in them, adapted where there is an adapter."""
        params = joined(self.params, self.adapter) if self.adapter else self.params
        return nnx.merge(self.graph, params)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D] in the compute dtype."""
        return self.net.embed(tokens_BT, jnp.dtype(self.dtype))

    def expected(self, chances_BNV: jax.Array) -> jax.Array:
        """Mean embeddings [B, N, D] of tokens that have these probabilities."""
        return self.net.expected(chances_BNV.astype(self.dtype))

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        probes: Sequence[str] | None = None,
        remat: Remat = "none",
    ) -> Output:
        """Hidden states, cache and probes of embedded tokens: see `Transformer.__call__`."""
        return self.net(x_BTD, positions_BT, mask, cache, probes, remat, self.kernel)

    def logits(self, hidden_BND: jax.Array) -> jax.Array:
        """Float32 logits [B, N, V] of hidden states, never shifted."""
        return self.net.logits(hidden_BND)

    def best(
        self, hidden_BND: jax.Array, special: Special = NOTHING, chunk: int | None = None
    ) -> Best:
        """What greedy rules read of the logits, without making all of them: see `head`."""
        return self.net.best(hidden_BND, special, chunk, self.kernel)

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache of `length` columns, in the compute dtype, that holds nothing yet."""
        return Cache.zeros(self.config, rows, length, jnp.dtype(self.dtype))


@functools.cache
def abstract(config: ModelConfig) -> Model:
    """The model with shapes and dtypes in place of arrays: nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(params):
        leaf.set_metadata(name=".".join(map(str, path)))
    return Model(params, graph, config, None, config.dtype)


def named(model: Model) -> dict[str, nnx.Param]:
    """Parameters by dotted name, for example "layers.0.attention.qkv", in a stable order."""
    return {leaf.get_metadata("name"): leaf for _, leaf in nnx.to_flat_state(model.params)}


def assemble(config: ModelConfig, arrays: dict[str, jax.Array], mesh: Any = None) -> Model:
    """The model of `config` whose arrays, given by dotted name, lie on `mesh`.

    Raises ValueError for a name or a shape that is not the model's.
    """
    model = abstract(config)
    expected = named(model)
    if set(expected) != set(arrays):
        raise ValueError(f"parameters do not match: {sorted(set(expected) ^ set(arrays))}")
    for name, leaf in expected.items():
        if leaf.shape != arrays[name].shape:
            raise ValueError(f"{name} must have shape {leaf.shape}, got {arrays[name].shape}")
    params = jax.tree.map(
        lambda leaf: leaf.replace(arrays[leaf.get_metadata("name")]),
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return dataclasses.replace(model, params=params, mesh=mesh)


def forward(model: Model, tokens_BT: jax.Array, visible_BT: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] of whole canvases, without a cache: the plainest use of a model."""
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    mask = Mask.of(model.config, visible_BT)
    return model.logits(model(model.embed(tokens_BT), columns_BT, mask).hidden)
