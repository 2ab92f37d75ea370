"""Triton's kernels as Triton compiles them for a Hopper GPU, which needs none.

python -m tests.support.compiled prints a row of JSON for each. The interpreter knows neither the
compiler's types nor how much memory a processor shares; a process of its own, since what is once
interpreted is not compiled.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jdllm.kernels import choose, triton_call
from jdllm.kernels.experts import grouped
from jdllm.kernels.head.reference import Noise
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.quantised import KINDS, Quantised
from jdllm.kernels.rotary.reference import Facts, Target
from jdllm.kernels.routing.reference import Rule

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "uint32": "*u32", "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv", "bool": "*i1",
}  # fmt: skip
told: dict[str, None] = {}  # rows, in their order
Shape: Any = jax.ShapeDtypeStruct  # stands for arrays


def compiled(
    *arrays: jax.Array,
    kernel: Any,
    out_type: Any,
    num_warps: int,
    num_stages: int,
    grid: tuple[int, ...],
    input_output_aliases: dict[int, int] | None = None,
    **constants: Any,
) -> Any:
    """What jax_triton.triton_call does but the launch."""
    del grid, input_output_aliases
    shapes = out_type if isinstance(out_type, tuple) else (out_type,)
    every = [*arrays, *shapes]
    kinds = [POINTERS[x.dtype.name] for x in every]
    signature = dict(zip(kernel.arg_names, kinds, strict=False)) | dict.fromkeys(
        constants, "constexpr"
    )
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i in range(len(every))}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made: Any = triton.compile(source, target=TARGET, options=options)
    row = {"kernel": kernel.__name__, "shared": made.metadata.shared, "stages": num_stages}
    told[json.dumps(row | {name: str(value) for name, value in constants.items()})] = None
    found = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)
    return found if isinstance(out_type, tuple) else found[0]


def low(*shape: int) -> Any:
    return Shape(shape, jnp.bfloat16)


def whole(*shape: int) -> Any:
    return Shape(shape, jnp.int32)


def narrow(kind: str, inputs: tuple[int, ...], *shape: int) -> Quantised:
    """As `quantise` would make it, without numbers."""
    make = partial(Quantised, inputs=inputs)
    order = [i for i in range(len(shape)) if i not in inputs] + list(inputs)
    values = tuple(shape[i] for i in order)
    scale = tuple(n for i, n in enumerate(shape) if i not in inputs)
    return make(Shape(values, KINDS[kind].dtype), Shape(scale, jnp.float32))


def run(operation: str, kernel: str, *arrays: Any, **facts: Any) -> None:
    jax.eval_shape(partial(choose.run, operation, f"{operation}:{kernel}", **facts), *arrays)


def attention() -> None:
    for rows, heads in ((1, 6), (64, 6)):
        q, k = low(rows, 32, heads, 128), low(rows, 1024, 2, 128)
        for visible in (whole(rows), whole(rows, 32, 2)):
            run("attention", "split", q, k, k, visible)
            pages = low(rows * 32, 32, 2, 128)
            run("paged_attention", "split", q, pages, pages, whole(rows, 32), visible)


def experts() -> None:
    E, D, M, P = 8, 256, 128, 2
    gate_up, down = low(E, D, 2, M), low(E, M, D)
    for tokens in (8, 24, 200):  # few, more and many pairs per expert
        rest = whole(tokens, P), Shape((tokens, P), jnp.float32)
        run("experts", "grouped", low(tokens, D), gate_up, down, *rest)
        for kind in KINDS:
            small = narrow(kind, (1,), E, D, 2, M), narrow(kind, (1,), E, M, D)
            run("experts", "grouped", low(tokens, D), *small, *rest)
    for number in grouped.SLOPES:
        slope = grouped.slope(partial(choose.experts, kernel="experts:grouped"), number)
        jax.eval_shape(slope, low(24, D), gate_up, down, whole(24, P), Shape((24, P), jnp.float32))


def products() -> None:
    for rows in (1, 5, 40):
        x, total = low(1, rows, 512), low(1, rows, 256)
        run("norm", "fused", total, total, low(256), eps=1e-5)
        run("mlp", "fused", x, low(512, 2, 256))
        run("closing", "split", x, low(512, 256), total, low(256), eps=1e-5)
        for kind in KINDS:
            values = narrow(kind, (0,), 512, 256)
            run("product", "narrow", low(rows, 512), values.values, values.scale)
            run("mlp", "fused", x, narrow(kind, (0,), 512, 2, 256))
            run("closing", "split", x, values, total, low(256), eps=1e-5)


def heads() -> None:
    B, T, D, K = 2, 9, 256, 64
    for H, G, biased, normed in ((4, 4, False, False), (4, 2, True, False), (4, 2, False, True)):
        sizes = [(3, H, K)] if H == G else [(H, K), (2, G, K)]
        maps = tuple(Projection(low(D, *size), low(*size) if biased else None) for size in sizes)
        norms = (low(K), low(K)) if normed else ()
        packed = tuple(low(B, T, *size) for size in sizes)
        for by_row, shape in ((True, (B, 16, G, K)), (False, (8, 4, G, K))):
            rest = norms, whole(B, T), Target(low(*shape), low(*shape), whole(B, T))
            facts = Facts(1e4, None, 1e-5 if normed else None, by_row)
            run("rotary", "fused", packed, *rest, facts=facts)
            run("opening", "split", low(B, T, D), maps, *rest, facts=facts)
            for kind in KINDS:
                small = tuple(Projection(narrow(kind, (0,), D, *size), None) for size in sizes)
                run("opening", "split", low(B, T, D), small, *rest, facts=facts)


def vocabulary() -> None:
    D, V = 128, 1000
    all_V = Shape((V,), jnp.bool_)
    for rows in (5, 20, 40, 80):
        floats = (Shape((1, rows), jnp.float32),) * 2
        words = Shape((1, rows, 2), jnp.uint32), Shape((1, rows), jnp.uint32)
        for noise, tied in ((None, False), (Noise(*words, *floats), True)):
            table = low(V, D) if tied else low(D, V)
            run("head", "fused", low(1, rows, D), table, all_V, all_V, noise, tied=tied)


def routing() -> None:
    router, bias = Shape((256, 256), jnp.float32), Shape((256,), jnp.float32)
    for tokens in (5, 40):
        for added, rule in (
            (None, Rule(8)),
            (bias, Rule(8, "sigmoid", "selection", 8, 4, True, 2.5)),
        ):
            run("routing", "fused", low(tokens, 256), router, added, rule=rule)


PARTS: tuple[Callable[[], None], ...] = (attention, experts, routing, products, heads, vocabulary)


def main() -> None:
    """Compiles all, and prints what was made."""
    module: Any = ModuleType("jax_triton")
    module.__version__, module.triton_call = "0.4.1", compiled
    sys.modules["jax_triton"] = module
    # On no machine are they asked whether they run.
    triton_call.require = triton_call.require_fp8 = lambda: None
    triton_call.canary = lambda *_: None
    for part in PARTS:
        part()
    print("\n".join(told))


if __name__ == "__main__":
    main()
