"""Triton kernels as JAX operations: what differs between jax-triton's versions stands here once.

Kernels are imported only where they can run. A canary holds each against its reference on small
numbers when a process first wants it: compilers have made wrong programs of right kernels.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray

from jdllm.kernels.quantised import Quantised

Run = Callable[..., Any]
CAPABILITY = 8.0  # Ampere: the first with bfloat16 products and asynchronous copies
FP8 = 8.9  # the first that widens fp8 itself
# A canary's reference is computed once: it is not worth a search for the quickest tiles.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
WRONG = 0.03  # relative error of bfloat16 products is 0.002 to 0.01


class Tiles(NamedTuple):
    """Sizes of a kernel's work: rows, columns, inner numbers at a time; warps, loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def require() -> None:
    """NotImplementedError, with the reason, where Triton kernels cannot run."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("it needs a GPU")
    if "cuda" not in jax.local_devices()[0].client.platform_version.lower():
        raise NotImplementedError("it is for NVIDIA's GPUs")
    if (found := capability()) < CAPABILITY:
        raise NotImplementedError(f"it needs compute capability {CAPABILITY}, not {found}")
    try:
        import jax_triton  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {error}") from error


def capability() -> float:
    """The compute capability of the first device."""
    return float(jax.local_devices()[0].compute_capability)


def require_kinds(*arrays: Any) -> None:
    """NotImplementedError where kernels do not serve inputs, or weights, of these dtypes."""
    for one in arrays:
        if isinstance(one, Quantised):
            if one.dtype != jnp.int8:
                require_fp8()
        elif one.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"it serves 16-bit numbers, not {one.dtype}")


def require_fp8() -> None:
    """NotImplementedError where Triton kernels cannot widen fp8."""
    if (found := capability()) < FP8:
        raise NotImplementedError(f"fp8 needs compute capability {FP8}, not {found}")


class Launch(NamedTuple):
    """All that a call of a kernel is but its arrays."""

    kernel: Any
    out: Any
    grid: tuple[int, ...]
    warps: int
    stages: int
    aliases: tuple[tuple[int, int], ...]
    constants: tuple[tuple[str, float], ...]


def call(
    kernel: Any,
    *arrays: jax.Array,
    out: Any,
    grid: Sequence[int],
    warps: int,
    stages: int,
    aliases: Mapping[int, int] | None = None,
    **constants: float,
) -> Any:
    """Runs a Triton kernel; `out` is one ShapeDtypeStruct, or several, of what it writes.

    `aliases` says which array is the memory of which output.
    """
    pairs = tuple((aliases or {}).items()), tuple(constants.items())
    return _launched(arrays, Launch(kernel, out, tuple(grid), warps, stages, *pairs))


@functools.partial(jax.jit, static_argnames="launch")
def _launched(arrays: tuple[jax.Array, ...], launch: Launch) -> Any:
    """The call. Under jit, so that the equal calls of a model's layers are lowered once."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    if jax_triton.__version__.startswith("0.3."):
        return _as_command(arrays, launch)
    return jax_triton.triton_call(
        *arrays,
        kernel=launch.kernel,
        out_type=launch.out,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **({"input_output_aliases": dict(launch.aliases)} if launch.aliases else {}),
        **dict(launch.constants),
    )


def _as_command(arrays: tuple[jax.Array, ...], launch: Launch) -> Any:
    """The call by way of jaxlib's handler that XLA may record in its command buffers (CUDA graphs).

    jax-triton 0.4 goes this way, too. What 0.3 hands to XLA by itself is kept out of them: each
    call ends one graph and begins another, at a price of several microseconds.
    """
    from jax_triton import triton_lib as lib  # pyright: ignore[reportMissingImports]

    every = (*arrays, *jax.tree.leaves(launch.out))
    shaped = [ShapedArray(x.shape, x.dtype) for x in every]
    kernel, attributes = lib.get_or_create_triton_kernel(
        lib.get_cuda_backend, "cuda", launch.kernel, [lib.get_triton_type(x) for x in shaped], [],
        num_warps=launch.warps, num_stages=launch.stages, num_ctas=1, compute_capability=None,
        enable_fp_fusion=True, metaparams=dict(launch.constants), dump=False,
    )  # fmt: skip
    library = lib.triton_kernel_call_lib
    parameters = [
        library.create_array_parameter(0, 16 * (["tt.divisibility", 16] in attributes[i,]))
        for i in range(len(shaped))
    ]
    grid = (*launch.grid, 1, 1)[:3]
    proto = library.TritonKernelCall(kernel, *grid, parameters).to_proto("", b"")
    run = jax.ffi.ffi_call(
        "triton_kernel_call_ffi", launch.out, input_output_aliases=dict(launch.aliases)
    )
    return run(*arrays, opaque=zlib.compress(proto))


def canary(
    name: str, run: Callable[..., jax.Array], reference: Callable[..., jax.Array], *arrays: Any
) -> None:
    """NotImplementedError unless `run` agrees with `reference` on `arrays`, once per process."""
    error = _error(name, run, reference, arrays)
    if not error < WRONG:
        raise NotImplementedError(f"its canary is off by {error:.3g}: wrong numbers on this device")


_errors: dict[str, float] = {}


def _error(name: str, run: Callable, reference: Callable, arrays: Sequence[Any]) -> float:
    """Computed in a thread, which knows nothing of what is traced while a kernel is wanted.

    It is one program: a start waits for its compilation.
    """

    @functools.partial(jax.jit, compiler_options=UNTUNED)
    def compute(*arrays: Any) -> jax.Array:
        found, expected = (one(*arrays).astype(jnp.float32) for one in (run, reference))
        wrong = jnp.linalg.norm((found - expected).ravel())
        return wrong / jnp.linalg.norm(expected.ravel())

    if name not in _errors:
        with ThreadPoolExecutor(1) as thread:
            _errors[name] = thread.submit(lambda: float(compute(*arrays))).result()
    return _errors[name]


def power_of_2(number: int) -> int:
    """The next power of 2, which sizes of Triton's blocks must be."""
    return 1 << (number - 1).bit_length()


@functools.cache
def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """Random bfloat16 numbers for a canary; NumPy's, for which nothing is compiled."""
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) * scale
    with jax.ensure_compile_time_eval():
        return jnp.asarray(numbers.astype(jnp.bfloat16))
