"""Triton's kernels on a CPU: its interpreter stands where jax-triton hands them to a GPU.

The interpreter reads memory by address, so that kernels run as they are, one program at a time.
"""

import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported


ALONE = threading.Lock()  # the interpreter changes Triton's own functions while a kernel runs


class Memory:
    """An array as the interpreter wants it: what it asks of a tensor, on a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        return self

    def cpu(self) -> "Memory":
        return self

    def copy_(self, other: "Memory") -> None:
        """Nothing: both are the same memory."""

    def new_empty(self, *_: Any, **__: Any) -> "Memory":
        return Memory(self.array)

    def set_(self, *_: Any) -> None:
        """Nothing: there is one storage."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    grid: tuple[int, ...],
    out_type: Any,
    num_warps: int,
    num_stages: int,
    input_output_aliases: dict[int, int] | None = None,
    **constants: Any,
) -> Any:
    """What jax_triton.triton_call does, by Triton's interpreter."""
    assert num_warps & (num_warps - 1) == 0 and num_stages > 0
    shapes = out_type if isinstance(out_type, tuple) else (out_type,)
    aliases = {to: source for source, to in (input_output_aliases or {}).items()}

    def run(*given: Any) -> tuple[np.ndarray, ...]:
        inputs = [np.array(x) for x in given]
        outputs = []
        for number, shape in enumerate(shapes):
            # Nobody may rely on what is in memory that nobody has written.
            fresh = np.full(shape.shape, 77, shape.dtype)
            outputs.append(inputs[aliases[number]] if number in aliases else fresh)
        # As a GPU, which has infinities, says nothing of them.
        with ALONE, np.errstate(all="ignore"):
            kernel[grid](*map(Memory, [*inputs, *outputs]), **constants)
        return tuple(outputs)

    found = jax.pure_callback(run, shapes, *arrays)
    return found if isinstance(out_type, tuple) else found[0]


def cast(handle: Any, kind: Any) -> Any:
    """A block of numbers in another kind, rounded to the nearest: the interpreter, which holds
    bfloat16 as bits, cuts off."""
    from triton.runtime.interpreter import TensorHandle, tl

    bits = handle.dtype.scalar == tl.bfloat16
    data = handle.data.view(ml_dtypes.bfloat16) if bits else handle.data
    if kind.scalar == tl.bfloat16:
        return TensorHandle(data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return TensorHandle(data.astype(np.float32), tl.float32)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels serve on this CPU, and their canaries are asked anew."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, tl

    from jdllm.kernels import triton_call as ours

    module: Any = ModuleType("jax_triton")
    module.__version__, module.triton_call = "0.4.1", triton_call
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setattr(ours, "_errors", {})
    monkeypatch.setattr(ours, "require", lambda: None)
    monkeypatch.setattr(ours, "capability", lambda: 9.0)
    dot, others = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, cast(a, tl.float32), cast(b, tl.float32), *rest)

    def rounded(self: Any, handle: Any, kind: Any) -> Any:
        source, to = handle.dtype.scalar, kind.scalar
        whole = source.is_int() and to == tl.bfloat16  # as bits it would be another number
        floats = {source, to} == {tl.float32, tl.bfloat16}
        return cast(handle, kind) if whole or floats else others(self, handle, kind)

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        """Bounds of loops are arrays of one number, which NumPy no longer takes for numbers."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    yield
