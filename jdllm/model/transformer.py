"""The forward pass: one transformer, made by the facts of a ModelConfig. `Model` wraps it.

Shape letters, in suffixes and einsums: B batch, T canvas, S keys, L layers, D embed, H query
heads, G key/value heads, K head dim, F mlp, V vocab, N block. Experts: see moe.py.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.kernels import choose
from jdllm.kernels.choose import attention, paged_attention
from jdllm.kernels.norm.reference import rms_norm
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.quantised import Quantised, matrix
from jdllm.kernels.rotary.reference import Facts, Target, normed, rotate, split
from jdllm.model.cache import Cache
from jdllm.model.config import ModelConfig
from jdllm.model.head import NOTHING, Best, Sampling, Special, best
from jdllm.model.mask import Mask
from jdllm.model.moe import Experts, gated
from jdllm.model.weights import bare, bias, probing, product, times, weight
from jdllm.runtime import sharding

Remat = Literal["none", "products", "layers"]
KEPT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}
"""What is kept of a layer that is computed again in the backward pass, by what is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call of the model gives."""

    hidden: jax.Array
    """[B, T, D], after the last norm."""
    cache: Cache | None
    """With the keys and values of the columns that were fed; None where there was none."""
    probes: dict[str, jax.Array]
    """What was asked for: products by the dotted names of their weights."""


def serving(x_BSGK: jax.Array, first: jax.Array | int, heads: int, group: int) -> jax.Array:
    """The key/value heads that serve `heads` query heads from number `first` on.

    They are all of them, unless a device has its own query heads but everybody's key/value heads.
    """
    if heads == x_BSGK.shape[2] * group:
        return x_BSGK
    if group % heads == 0:
        return jax.lax.dynamic_slice_in_dim(x_BSGK, first // group, 1, axis=2)
    return x_BSGK[:, :, (first + jnp.arange(heads)) // group]


class Branch(NamedTuple):
    """What a branch adds to the residual stream, before the product that closes it."""

    inner_BTF: jax.Array
    weight_FD: jax.Array | Quantised


def close(spec: str, inner: jax.Array, weight: nnx.Param, later: bool) -> "Branch | jax.Array":
    """What a branch adds: the product itself, or where it may wait for the sum, what makes it."""
    plain = bare(weight) if later else None
    if plain is None:
        return product(spec, inner, weight)
    inner_BTF = inner.reshape(*inner.shape[:2], -1)
    return Branch(inner_BTF, matrix(plain, inner_BTF.shape[-1]))


def add_norm(
    x_BTD: jax.Array, branch: Branch | jax.Array | None, scale: nnx.Param, eps: float, kernel: str
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a branch added to it, and the norm of that."""
    if branch is None:
        return x_BTD, rms_norm(x_BTD, scale[...], eps)
    if isinstance(branch, Branch):
        return choose.close(*branch, x_BTD, scale[...], eps, kernel, times)
    rows = ("batch", None, "embed")
    run = partial(choose.add_norm, eps=eps, kernel=kernel)
    run = sharding.per_shard(run, scale, (rows, rows, ("embed",)), [rows, rows])
    return run(x_BTD, branch, scale[...])


class Attention(nnx.Module):
    """Grouped-query attention. Multi-head models hold q, k, v as one weight, others q and kv."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, number: int):
        D, H, G, K = config.embed, config.heads, config.kv_heads, config.head_dim
        kind = config.dtype
        if H == G:
            self.qkv = weight(rngs, (D, 3, H, K), ("embed", "stack", "heads", "head_dim"), kind, D)
        else:
            self.q = weight(rngs, (D, H, K), ("embed", "heads", "head_dim"), kind, D)
            self.kv = weight(
                rngs, (D, 2, G, K), ("embed", "stack", "kv_heads", "head_dim"), kind, D
            )
        self.out = weight(rngs, (H, K, D), ("heads", "head_dim", "embed"), kind, H * K)
        if config.qkv_bias and H == G:
            self.qkv_bias = bias((3, H, K), ("stack", "heads", "head_dim"), kind)
        elif config.qkv_bias:
            self.q_bias = bias((H, K), ("heads", "head_dim"), kind)
            self.kv_bias = bias((2, G, K), ("stack", "kv_heads", "head_dim"), kind)
        if config.qk_norm:
            self.q_norm = weight(rngs, (K,), ("head_dim",), kind, 0)
            self.k_norm = weight(rngs, (K,), ("head_dim",), kind, 0)
        self.number = number
        self.fused = H == G
        self.group = H // G
        self.biased = config.qkv_bias
        norm_eps = config.norm_eps if config.qk_norm else None
        self.facts = Facts(config.rope_theta, config.rotary_dim, norm_eps)

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys and values [B, T, 3, H, K], or queries [B, T, H, K] and [B, T, 2, G, K]."""
        kind = x_BTD.dtype
        if self.fused:
            qkv = product("BTD,DCHK->BTCHK", x_BTD, self.qkv)
            return (qkv + self.qkv_bias[...].astype(kind) if self.biased else qkv,)
        q = product("BTD,DHK->BTHK", x_BTD, self.q)
        kv = product("BTD,DCGK->BTCGK", x_BTD, self.kv)
        if self.biased:
            q += self.q_bias[...].astype(kind)
            kv += self.kv_bias[...].astype(kind)
        return q, kv

    def projections(self) -> tuple[Projection, ...]:
        """The same products, for a kernel that makes more of them; none where it cannot."""
        names = ("qkv",) if self.fused else ("q", "kv")
        weights = [bare(getattr(self, name)) for name in names]
        biases = [getattr(self, f"{name}_bias")[...] if self.biased else None for name in names]
        pairs = zip(weights, biases, strict=True)
        found = tuple(Projection(weight, one) for weight, one in pairs if weight is not None)
        return found if len(found) == len(names) else ()

    def facts_of(self, cache: Cache) -> Facts:
        """What is known of heads, and of how this cache lies."""
        return self.facts._replace(by_row=cache.axes[0] == "batch")

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        visible: jax.Array,
        cache: Cache | None = None,
        kernel: str = "auto",
    ) -> tuple[Branch | jax.Array, Cache | None]:
        """The attention branch, and the cache after this layer's update."""
        norms = (self.q_norm[...], self.k_norm[...]) if self.facts.eps is not None else ()
        projections = None if cache is None else self.projections()
        if cache is None:
            q, k, v = split(self.project(x_BTD))
            q, k = normed(q, k, norms, self.facts)
            q, k = (rotate(x, positions_BT, self.facts.theta, self.facts.width) for x in (q, k))
        elif projections:
            target, facts = cache.target(self.number), self.facts_of(cache)
            given = x_BTD, projections, norms, positions_BT, target, facts, kernel
            q, keys, values = choose.project(*given, times)
            cache = cache.holding(self.number, keys, values)
        else:
            q, cache = self.store(self.project(x_BTD), norms, positions_BT, cache, kernel)
        if cache is not None:
            k, v = cache.view(self.number)
        table = cache and cache.table
        mixed = self.attend(q, k.astype(q.dtype), v.astype(q.dtype), visible, kernel, table)
        return close("BTHK,HKD->BTD", mixed, self.out, cache is not None), cache

    def store(
        self,
        packed: tuple[jax.Array, ...],
        norms: tuple[jax.Array, ...],
        positions_BT: jax.Array,
        cache: Cache,
        kernel: str,
    ) -> tuple[jax.Array, Cache]:
        """Queries, turned, and the cache after this layer's update; every device its own heads."""
        target, facts = cache.target(self.number), self.facts_of(cache)

        def turn(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            keys, values, places, positions, *rest = arrays
            heads, scales = tuple(rest[: len(packed)]), tuple(rest[len(packed) :])
            own = Target(keys, values, places)
            return choose.turn(heads, scales, positions, own, facts, kernel)

        rows, one = ("batch", None), ("batch", None, "heads", None)
        many = "heads" if self.fused else "kv_heads"
        both = [("batch", None, None, many, None)]
        inputs = [cache.axes, cache.axes, rows, rows]
        inputs += both if self.fused else [one, *both]
        inputs += [("head_dim",)] * len(norms)
        run = sharding.per_shard(turn, self.out, inputs, [one, cache.axes, cache.axes])
        q, keys, values = run(*target, positions_BT, *packed, *norms)
        return q, cache.holding(self.number, keys, values)

    def attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        visible: jax.Array,
        kernel: str,
        table: jax.Array | None = None,
    ) -> jax.Array:
        """Attention, every device with its own rows and query heads.

        With a `table` the keys and values are pools of pages, whose heads alone are split.
        """

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
            first = sharding.shard_index("heads") * q.shape[2]
            k, v = (serving(x, first, q.shape[2], self.group) for x in (k, v))
            run = attention if table is None else paged_attention
            return run(q, k, v, *rest, kernel=kernel)

        rest = (visible,) if table is None else (table, visible)
        queries, rows = ("batch", None, "heads", None), "batch" if table is None else None
        keys = (rows, None, "kv_heads", None)
        inputs = (queries, keys, keys, *(("batch", *[None] * (x.ndim - 1)) for x in rest))
        run = sharding.per_shard(attend, self.out, inputs, queries)
        return run(q_BTHK, k_BSGK, v_BSGK, *rest)


class MLP(nnx.Module):
    """SwiGLU feed-forward; gate and up are one weight."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, width: int | None = None):
        D, F = config.embed, width or config.mlp
        self.gate_up = weight(rngs, (D, 2, F), ("embed", "stack", "mlp"), config.dtype, D)
        self.down = weight(rngs, (F, D), ("mlp", "embed"), config.dtype, F)

    def __call__(self, x_BTD: jax.Array, kernel: str, later: bool) -> Branch | jax.Array:
        """What it adds to the residual stream; `later`: it may be the branch before its product."""
        hidden = gated(x_BTD, self.gate_up, kernel)
        return close("BTF,FD->BTD", hidden, self.down, later)


class Layer(nnx.Module):
    """Pre-norm residual layer, with an MLP or with experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, number: int):
        self.attention_norm = weight(rngs, (config.embed,), ("embed",), config.dtype, 0)
        self.attention = Attention(config, rngs, number)
        self.mlp_norm = weight(rngs, (config.embed,), ("embed",), config.dtype, 0)
        moe = config.moe_layer(number)
        if moe is None:
            self.mlp = MLP(config, rngs)
        else:
            self.experts = Experts(config.embed, moe, config.dtype, rngs)
            if moe.shared_mlp:
                self.shared = MLP(config, rngs, moe.shared_mlp)
        self.sparse, self.has_shared = moe is not None, moe is not None and moe.shared_mlp > 0
        self.eps = config.norm_eps

    def feed_forward(
        self, x_BTD: jax.Array, kernel: str = "auto", later: bool = False
    ) -> Branch | jax.Array:
        """The MLP branch of normed inputs; the shared expert is added as it is."""
        if not self.sparse:
            return self.mlp(x_BTD, kernel, later)
        shared = (self.shared.gate_up, self.shared.down) if self.has_shared else ()
        return self.experts(x_BTD, shared, kernel)

    def __call__(
        self,
        x_BTD: jax.Array,
        branch: Branch | jax.Array | None,
        positions_BT: jax.Array,
        visible: jax.Array,
        cache: Cache | None = None,
        kernel: str = "auto",
        probes: Sequence[str] | None = None,
    ) -> tuple[jax.Array, Branch | jax.Array, Cache | None, dict[str, jax.Array]]:
        """The residual stream, this layer's last branch, the cache, and the products asked for.

        A branch is added to the stream where the sum is normed: `branch` is the layer before's.
        """
        with probing(probes) as found:
            with jax.named_scope("attention"):
                x_BTD, h = add_norm(x_BTD, branch, self.attention_norm, self.eps, kernel)
                mixed, cache = self.attention(h, positions_BT, visible, cache, kernel)
            with jax.named_scope("mlp"):
                x_BTD, h = add_norm(x_BTD, mixed, self.mlp_norm, self.eps, kernel)
                branch = self.feed_forward(h, kernel, cache is not None)
        return x_BTD, branch, cache, found


class Transformer(nnx.Module):
    """A thin container of parameters, which `Model` holds as a static graph and a pytree."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, V = config.embed, config.vocab
        self.tied, self.eps = config.tied_head, config.norm_eps
        self.embedding = weight(rngs, (V, D), ("vocab", "embed"), config.dtype, D)
        self.layers = nnx.List([Layer(config, rngs, i) for i in range(config.layers)])
        self.norm = weight(rngs, (D,), ("embed",), config.dtype, 0)
        if not config.tied_head:
            self.head = weight(rngs, (D, V), ("embed", "vocab"), config.dtype, D)

    def embed(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Input embeddings [B, T, D] in the compute dtype.

        Gathered as stored and cast then, so that in training the gradient of a row that many
        tokens share (the mask's) is summed in the weights' dtype.

        Where the vocabulary lies in slices on a mesh, a device finds what is in its own, and zeros
        for the rest; the sum over devices is the lookup.
        """

        def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            rows_BT = tokens_BT - sharding.shard_index("vocab") * table_VD.shape[0]
            found_BTD = table_VD[rows_BT].astype(dtype)
            here_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
            return sharding.sum_shards(jnp.where(here_BT[..., None], found_BTD, 0), "vocab")

        table_VD, inputs = self.embedding[...], (("vocab", "embed"), ("batch", None))
        run = sharding.per_shard(look_up, table_VD, inputs, ("batch", None, "embed"))
        with jax.named_scope("embed"):
            return run(table_VD, tokens_BT)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        probes: Sequence[str] | None = None,
        remat: Remat = "none",
        kernel: str = "auto",
    ) -> Output:
        """Final-normed hidden states of embedded tokens [B, T, D], and what `Output` has besides.

        Without a cache the T columns attend to each other (S = T). With one, they are first written
        to its slots (`Cache.at`; default: `positions_BT`), then attend to all S columns of it.
        `probes` are patterns such as "layers.*.attention.out"; ValueError for one that matches no
        product of an activation and a parameter. `remat` says what the backward pass computes again
        instead of keeping it: whole layers, or all of them but the products with weights.
        """
        if cache is not None and cache.slots is None:
            cache = cache.at(positions_BT)
        visible = mask.resolve(positions_BT, None if cache is None else cache.length)
        run = partial(Layer.__call__, kernel=kernel, probes=probes)
        run = jax.checkpoint(run, policy=KEPT[remat]) if remat != "none" else run
        found, branch = {}, None
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                x_BTD, branch, cache, seen = run(layer, x_BTD, branch, positions_BT, visible, cache)
                if remat != "none" and isinstance(branch, jax.Array):
                    x_BTD, branch = x_BTD + branch, None  # the sum alone is kept between layers
            found |= seen
        for pattern in probes or ():
            if not fnmatch.filter(found, pattern):
                raise ValueError(f"probes: no product matches {pattern}; try layers.*.attention.*")
        _, hidden_BTD = add_norm(x_BTD, branch, self.norm, self.eps, kernel)
        return Output(hidden_BTD, cache and cache.at(None), found)

    def expected(self, chances_BNV: jax.Array) -> jax.Array:
        """Mean embeddings [B, N, D] of tokens that have these probabilities."""
        return product("BNV,VD->BND", chances_BNV, self.embedding)

    def logits(self, hidden_BND: jax.Array, dtype: str | None = "float32") -> jax.Array:
        """Logits [B, N, V] of final-normed hidden states, never shifted; None keeps their dtype."""
        head, letters = (self.embedding, "VD") if self.tied else (self.head, "DV")
        result = None if dtype is None else jnp.dtype(dtype)
        with jax.named_scope("head"):
            return product(f"BND,{letters}->BNV", hidden_BND, head, result=result)

    def best(
        self,
        hidden_BND: jax.Array,
        special: Special = NOTHING,
        chunk: int | None = None,
        kernel: str = "auto",
        sampling: Sampling | None = None,
    ) -> Best:
        """What rules read of the logits, without making all of them: see `head`."""
        with jax.named_scope("head"):
            weights = self.embedding[...] if self.tied else self.head[...]
            return best(hidden_BND, weights, special, self.tied, chunk, kernel, sampling)
