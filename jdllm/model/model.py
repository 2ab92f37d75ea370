"""Model: what everybody is handed of a model. Its parameters are data, everything else is static.

Loading, restoring and random weights return one; decoding, scoring and training take one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.kernels.choose import forcing
from jdllm.kernels.quantised import Quantised
from jdllm.model.cache import Cache
from jdllm.model.config import ModelConfig
from jdllm.model.head import NOTHING, Best, Sampling, Special
from jdllm.model.lora import Adapter, joined
from jdllm.model.mask import Mask
from jdllm.model.quantise import quantise_params
from jdllm.model.transformer import Output, Remat, Transformer
from jdllm.model.weights import placed

STATIC: Any = {"static": True}
PARTS = ("values", "scale")  # the arrays of a weight in 8 bits


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
        with forcing(self.kernel):
            return self.net(x_BTD, positions_BT, mask, cache, probes, remat, self.kernel)

    def logits(self, hidden_BND: jax.Array, dtype: str | None = "float32") -> jax.Array:
        """Logits [B, N, V] of hidden states, never shifted; None keeps their dtype."""
        return self.net.logits(hidden_BND, dtype)

    def best(
        self,
        hidden_BND: jax.Array,
        special: Special = NOTHING,
        chunk: int | None = None,
        sampling: Sampling | None = None,
    ) -> Best:
        """What rules read of the logits, without making all of them: see `head`."""
        return self.net.best(hidden_BND, special, chunk, self.kernel, sampling)

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache of `length` columns, in the compute dtype, that holds nothing yet."""
        return Cache.zeros(self.config, rows, length, jnp.dtype(self.dtype))


@functools.cache
def abstract(config: ModelConfig) -> Model:
    """The model with shapes and dtypes in place of arrays: nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(params):
        leaf.set_metadata(name=".".join(map(str, path)))
    if config.weights:
        params = jax.eval_shape(partial(quantise_params, kind=config.weights), params)
    return Model(params, graph, config, None, config.dtype)


def named(model: Model) -> dict[str, nnx.Param]:
    """Parameters by dotted name, for example "layers.0.attention.qkv", in a stable order."""
    return {leaf.get_metadata("name"): leaf for _, leaf in nnx.to_flat_state(model.params)}


def arrays(model: Model) -> dict[str, tuple[Any, tuple[str | None, ...]]]:
    """Every array of the parameters with its logical axes, by dotted name.

    Those of a weight in 8 bits are called after it and their field: layers.0.mlp.down.values.
    """
    found = {}
    for name, leaf in named(model).items():
        value, axes = leaf.get_value(), leaf.get_metadata("axes")
        names = [f"{name}.{part}" for part in PARTS] if isinstance(value, Quantised) else [name]
        parts = zip(jax.tree.leaves(value), placed(value, axes), strict=True)
        found |= zip(names, parts, strict=True)
    return found


def assemble(config: ModelConfig, found: dict[str, jax.Array], mesh: Any = None) -> Model:
    """The model of `config` whose arrays, named as by `arrays`, lie on `mesh`.

    Raises ValueError for a name or a shape that is not the model's.
    """
    model = abstract(config)
    expected = arrays(model)
    if set(expected) != set(found):
        raise ValueError(f"parameters do not match: {sorted(set(expected) ^ set(found))}")
    for name, (array, _) in expected.items():
        if array.shape != found[name].shape:
            raise ValueError(f"{name} must have shape {array.shape}, got {found[name].shape}")

    def one(leaf: nnx.Variable) -> nnx.Variable:
        name, value = leaf.get_metadata("name"), leaf.get_value()
        if not isinstance(value, Quantised):
            return leaf.replace(found[name])
        values, scale = (found[f"{name}.{part}"] for part in PARTS)
        return leaf.replace(Quantised(values, scale, value.inputs))

    is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    params = jax.tree.map(one, model.params, is_leaf=is_leaf)
    return dataclasses.replace(model, params=params, mesh=mesh)


def forward(model: Model, tokens_BT: jax.Array, visible_BT: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] of whole canvases, without a cache: the plainest use of a model."""
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    mask = Mask.of(model.config, visible_BT)
    return model.logits(model(model.embed(tokens_BT), columns_BT, mask).hidden)
