"""Triton kernels as JAX operations: what differs between jax-triton's versions stands here once.

Kernels are imported only where they can run. A canary holds each against its reference on small
numbers when a process first wants it: compilers have made wrong programs of right kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Run = Callable[..., Any]
CAPABILITY = 8.0  # Ampere: the first with bfloat16 products and asynchronous copies
FP8 = 8.9  # the first that widens fp8 itself
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
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        raise NotImplementedError("it is for NVIDIA's GPUs")
    if (found := float(device.compute_capability)) < CAPABILITY:
        raise NotImplementedError(f"it needs compute capability {CAPABILITY}, not {found}")
    try:
        import jax_triton  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {error}") from error


def require_fp8() -> None:
    """NotImplementedError where Triton kernels cannot widen fp8."""
    found = float(jax.local_devices()[0].compute_capability)
    if found < FP8:
        raise NotImplementedError(f"fp8 needs compute capability {FP8}, not {found}")


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
    import jax_triton  # pyright: ignore[reportMissingImports]

    shapes = "out_type" if jax_triton.__version__ >= "0.4" else "out_shape"
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=tuple(grid),
        num_warps=warps,
        num_stages=stages,
        **{shapes: out},
        **({"input_output_aliases": dict(aliases)} if aliases else {}),
        **constants,
    )


def canary(
    name: str, run: Callable[..., jax.Array], reference: Callable[..., jax.Array], *arrays: Any
) -> None:
    """NotImplementedError unless `run` agrees with `reference` on `arrays`, once per process."""
    error = _error(name, run, reference, arrays)
    if not error < WRONG:
        raise NotImplementedError(f"its canary is off by {error:.3g}: wrong numbers on this device")


_errors: dict[str, float] = {}


def _error(name: str, run: Callable, reference: Callable, arrays: Sequence[Any]) -> float:
    """Computed in a thread, which knows nothing of what is traced while a kernel is wanted."""

    def compute() -> float:
        found, expected = (jax.jit(one)(*arrays).astype(jnp.float32) for one in (run, reference))
        wrong = jnp.linalg.norm((found - expected).ravel())
        return float(wrong / jnp.linalg.norm(expected.ravel()))

    if name not in _errors:
        with ThreadPoolExecutor(1) as thread:
            _errors[name] = thread.submit(compute).result()
    return _errors[name]


def power_of_2(number: int) -> int:
    """The next power of 2, which sizes of Triton's blocks must be."""
    return 1 << (number - 1).bit_length()


@functools.cache
def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """Random bfloat16 numbers for a canary."""
    with jax.ensure_compile_time_eval():
        found = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale
        return found.astype(jnp.bfloat16)
