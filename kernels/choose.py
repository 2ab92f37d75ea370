"""Which implementation does an operation: one table per operation, and a record of the choices.

An implementation raises NotImplementedError, with its reason, where it does not serve a case; the
next one in the table is tried. So it is where it serves, but others are quicker: see PREFERRED.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.kernels import split_product
from jdllm.kernels.attention import cudnn, mosaic, reference, split, tiled, xla
from jdllm.kernels.closing import reference as closing_reference
from jdllm.kernels.closing import split as closing_split
from jdllm.kernels.experts import dense, grouped, ragged
from jdllm.kernels.head import fused as head_fused
from jdllm.kernels.head import reference as head_reference
from jdllm.kernels.head.reference import Found, Noise
from jdllm.kernels.mlp import fused as mlp_fused
from jdllm.kernels.mlp import reference as mlp_reference
from jdllm.kernels.norm import fused as norm_fused
from jdllm.kernels.norm import reference as norm_reference
from jdllm.kernels.opening import reference as opening_reference
from jdllm.kernels.opening import split as opening_split
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.product import narrow
from jdllm.kernels.product import reference as plain
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised
from jdllm.kernels.rotary import fused as rotary_fused
from jdllm.kernels.rotary import reference as rotary_reference
from jdllm.kernels.rotary.reference import Facts, Target
from jdllm.kernels.routing import fused as routing_fused
from jdllm.kernels.routing import reference as routing_reference
from jdllm.kernels.routing.reference import Rule


def gathered(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
    kernel: str = "auto",
) -> jax.Array:
    """Attention to rows that are first gathered from their pages, by the operation `attention`."""
    k_BSGK, v_BSGK = (reference.gathered(x, table) for x in (k_PNGK, v_PNGK))
    return attention(q_BTHK, k_BSGK, v_BSGK, visible, kernel)


# In order of preference. The reference serves every case: what stands behind it serves by name
# only, until the whole loop has been measured with it (docs/performance.md).
TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "attention": {
        "split": split.attention,
        "cudnn": cudnn.attention,
        "xla": xla.attention,
        "reference": reference.attention,
        "mosaic": mosaic.attention,
        "tiled": tiled.attention,
    },
    "paged_attention": {
        "split": split.paged_attention,
        "gathered": gathered,
        "reference": reference.paged_attention,
        "mosaic": mosaic.paged_attention,
        "tiled": tiled.paged_attention,
    },
    "experts": {
        "grouped": grouped.experts,
        "reference": dense.experts,
        "ragged": ragged.experts,
    },
    "routing": {"reference": routing_reference.route, "fused": routing_fused.route},
    "norm": {"fused": norm_fused.add_norm, "reference": norm_reference.add_norm},
    "mlp": {"fused": mlp_fused.gated, "reference": mlp_reference.gated},
    "closing": {"split": closing_split.close, "reference": closing_reference.close},
    "opening": {"split": opening_split.project, "reference": opening_reference.project},
    "rotary": {"fused": rotary_fused.turn, "reference": rotary_reference.turn},
    "head": {"reference": head_reference.search, "fused": head_fused.search},
    "product": {
        "reference": plain.product,
        "narrow": narrow.product,
    },
}


# NotImplementedError, with the reason, for cases that an implementation serves by name alone: what
# others do as quickly, or was not measured.
PREFERRED: dict[str, Callable[..., None]] = {
    "attention:cudnn": cudnn.prefer,
    "norm:fused": norm_fused.prefer,
    "mlp:fused": mlp_fused.prefer,
    "closing:split": closing_split.prefer,
    "opening:split": opening_split.prefer,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one case of an operation."""

    operation: str
    shapes: str
    """Of the arrays, for example "bfloat16[8,32,4,128] bfloat16[8,1024,4,128]"."""
    chosen: str
    refused: tuple[tuple[str, str], ...]
    """Those that were tried before it, with their reasons."""


CHECKS = {
    "attention:split": split.check,
    "attention:mosaic": mosaic.check,
    "paged_attention:split": split.check_paged,
    "paged_attention:mosaic": mosaic.check_paged,
    "experts:grouped": grouped.check,
    "routing:fused": routing_fused.check,
    "norm:fused": norm_fused.check,
    "opening:split": opening_split.check,
    "rotary:fused": rotary_fused.check,
    "mlp:fused": mlp_fused.check,
    "closing:split": closing_split.check,
    "opening and closing:split in 8 bits": split_product.check_narrow,
    "mlp:fused in 8 bits": mlp_fused.check_narrow,
    "head:fused": head_fused.check,
    "experts:grouped in training": grouped.check_training,
    "experts:grouped in 8 bits": grouped.check_narrow,
    "product:narrow": narrow.check,
}
"""Those that hold themselves against their reference before they serve."""

_made: dict[Choice, None] = {}  # in order; filled while programs are traced


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visible: jax.Array,
    kernel: str = "auto",
) -> jax.Array:
    """Attention [B, T, H, K] of T queries over S keys: see kernels/attention/reference.py."""
    return run("attention", kernel, q_BTHK, k_BSGK, v_BSGK, visible)


def paged_attention(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
    kernel: str = "auto",
) -> jax.Array:
    """Attention of T queries over keys in pages: see kernels/attention/reference.py.

    Where `kernel` says how to attend, and not how to attend to pages, they are gathered for it.
    """
    arrays, forced = (q_BTHK, k_PNGK, v_PNGK, table, visible), parse(kernel)
    if "attention" in forced and "paged_attention" not in forced:
        return gathered(*arrays, kernel)
    return run("paged_attention", kernel, *arrays)


def experts(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array | Quantised,
    down_EMD: jax.Array | Quantised,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
    kernel: str = "auto",
) -> jax.Array:
    """The mixed outputs of each token's experts [T, D]: see kernels/experts/dense.py."""
    return run("experts", kernel, x_TD, gate_up_EDCM, down_EMD, picks_TP, weights_TP)


def route(
    x_TD: jax.Array,
    router_DE: jax.Array,
    bias_E: jax.Array | None,
    rule: Rule,
    kernel: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Picks and factors [T, P] of each token: see kernels/routing/reference.py."""
    return run("routing", kernel, x_TD, router_DE, bias_E, rule=rule)


def add_norm(
    x_BTD: jax.Array, branch_BTD: jax.Array, scale_D: jax.Array, eps: float, kernel: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """The sum of two and its norm [B, T, D]: see kernels/norm/reference.py."""
    return run("norm", kernel, x_BTD, branch_BTD, scale_D, eps=eps)


def gated(
    x_BTD: jax.Array,
    gate_up_DCF: jax.Array | Quantised,
    kernel: str = "auto",
    times: Times = plain.times,
) -> jax.Array:
    """The inner numbers of a feed-forward [B, T, F]: see kernels/mlp/reference.py."""
    return run("mlp", kernel, x_BTD, gate_up_DCF, times=times)


def close(
    x_BTF: jax.Array,
    weight_FD: jax.Array | Quantised,
    total_BTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    kernel: str = "auto",
    times: Times = plain.times,
) -> tuple[jax.Array, jax.Array]:
    """A product, added to the residual stream, and the norm of it: kernels/closing/reference.py."""
    arrays, own = (x_BTF, weight_FD, total_BTD, scale_D), partial(add_norm, kernel=kernel)
    return run("closing", kernel, *arrays, eps=eps, add_norm=own, times=times)


def turn(
    packed: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    kernel: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K] and a cache with new keys and values: kernels/rotary/reference.py."""
    return run("rotary", kernel, packed, norms, positions_BT, target, facts=facts)


def project(
    x_BTD: jax.Array,
    projections: tuple[Projection, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    kernel: str = "auto",
    times: Times = plain.times,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K] and a cache with new columns: see kernels/opening/reference.py."""
    arrays, own = (x_BTD, projections, norms, positions_BT, target), partial(turn, kernel=kernel)
    return run("opening", kernel, *arrays, facts=facts, turn=own, times=times)


def head(
    hidden_BND: jax.Array,
    head: jax.Array,
    usable_V: jax.Array,
    counted_V: jax.Array,
    noise: Noise | None = None,
    tied: bool = False,
    chunk: int | None = None,
    kernel: str = "auto",
) -> Found:
    """The best tokens [B, N] of rows: see kernels/head/reference.py."""
    arrays = hidden_BND, head, usable_V, counted_V, noise
    return run("head", kernel, *arrays, tied=tied, chunk=chunk)


_forced: ContextVar[str] = ContextVar("forced", default="auto")


@contextlib.contextmanager
def forcing(kernel: str) -> Iterator[None]:
    """Products inside are made by what `kernel` forces, as they are traced."""
    token = _forced.set(kernel)
    try:
        yield
    finally:
        _forced.reset(token)


def product(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array) -> jax.Array:
    """The product with a weight in 8 bits [M, N]: see kernels/product/reference.py."""
    return run("product", _forced.get(), x_MK, values_NK, scale_N)


def run(operation: str, kernel: str, *arrays: Any, **facts: Any) -> Any:
    """The result of the first implementation that serves, or of the one that `kernel` forces.

    `arrays` are trees of arrays; `facts` whatever else the operation takes. ValueError
    where `kernel` cannot be read, or forces one that does not serve.
    """
    table, forced, refused = TABLES[operation], parse(kernel).get(operation), {}
    leaves = jax.tree.leaves(arrays)
    shapes = " ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in leaves)
    for name in [forced] if forced else table:
        try:
            if not forced and (prefer := PREFERRED.get(f"{operation}:{name}")):
                prefer(*arrays)
            found = table[name](*arrays, **facts)
        except NotImplementedError as error:
            refused[name] = str(error)
            continue
        _made[Choice(operation, shapes, name, tuple(refused.items()))] = None
        return found
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise ValueError(
        f"kernel={kernel} does not serve {operation} of {shapes} ({reasons}); use kernel=auto"
    )


def parse(kernel: str) -> dict[str, str]:
    """The implementation that `kernel` forces, by operation; none for auto.

    It is auto, a name, which is meant wherever there is one of that name (reference is everywhere),
    or operation:name, several with commas between them. ValueError for anything else.
    """
    if kernel == "auto":
        return {}
    if ":" not in kernel:
        found = {operation: kernel for operation, table in TABLES.items() if kernel in table}
    else:
        pairs = [part.partition(":")[::2] for part in kernel.split(",")]
        found = {operation: name for operation, name in pairs if name in TABLES.get(operation, ())}
        found = found if len(found) == len(pairs) else {}
    if not found:
        names = (f"{operation}:{name}" for operation, table in TABLES.items() for name in table)
        raise ValueError(f"kernel={kernel} must be auto, reference, or of {', '.join(names)}")
    return found


def in_training(kernel: str, dtype: str, widths: Sequence[int]) -> str:
    """The `kernel` of a model with experts of these widths while it is trained.

    auto is the grouped experts where they serve and their gradient is right: a training step has
    so many tokens that every expert for every token is out of the question.
    """
    if kernel != "auto":
        return kernel
    try:
        grouped.check_kinds(widths, jnp.dtype(dtype))
        grouped.check_training()
    except NotImplementedError:
        return kernel
    return "experts:grouped"


def canaries() -> dict[str, str]:
    """What each implementation with a canary says of this device: "" where it may serve."""
    said = {}
    for name, check in CHECKS.items():
        try:
            check()
            said[name] = ""
        except NotImplementedError as error:
            said[name] = str(error)
    return said


def choices() -> list[dict[str, Any]]:
    """What this process has chosen so far, and why: cases that were decided alike are one row."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for made in _made:
        rows.setdefault((made.operation, made.chosen, made.refused), []).append(made.shapes)
    return [
        {"operation": operation, "chosen": chosen, "refused": dict(refused), "shapes": shapes}
        for (operation, chosen, refused), shapes in rows.items()
    ]
