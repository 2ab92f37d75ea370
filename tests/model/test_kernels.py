"""Every attention implementation against the reference, over one list of shapes."""

import sys
import zlib
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.kernels import choose, triton_call
from jdllm.kernels.attention import cudnn
from jdllm.kernels.attention.reference import attention as reference
from jdllm.kernels.choose import attention
from jdllm.kernels.shapes import ATTENTION as SHAPES
from jdllm.model.mask import Mask

# Kernels run on GPUs alone: experiments/gpu_check.py holds them against the reference.
IMPLEMENTATIONS = [name for name in choose.TABLES["attention"] if name not in ("split", "mosaic")]


MASKED = ["xla", "reference"]  # those that serve any mask


def random_inputs(shape: tuple[int, ...], seed: int) -> Any:
    B, T, S, H, G, K = shape
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=s) for s in ((B, T, H, K), (B, S, G, K), (B, S, G, K)))
    visible = rng.random((B, S)) < 0.7
    visible[:, 0] = True
    return *(jnp.array(x, jnp.float32) for x in (q, k, v)), jnp.array(visible)


def by_hand(q, k, v, visible):
    """One query and one head at a time, in float64; `visible` [B, S] or [B, T, S]."""
    B, T, H, K = q.shape
    group = H // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = np.flatnonzero(visible[b] if visible.ndim == 2 else visible[b, t])
                scores = k[b, keys, h // group].astype(float) @ q[b, t, h].astype(float) / K**0.5
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, keys, h // group].astype(float)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_definition(shape):
    inputs = random_inputs(shape, 0)
    np.testing.assert_allclose(reference(*inputs), by_hand(*map(np.asarray, inputs)), atol=1e-5)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_may_see_keys_of_their_own(name, shape, monkeypatch):
    """As in causal attention, where query t stands in some column and sees what is left of it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v, visible = random_inputs(shape, 4)
    B, T, S, *_ = shape
    columns = jnp.broadcast_to(jnp.arange(T) * 2 % S, (B, T))
    mask = Mask(visible, kind="causal").resolve(columns, S)
    assert mask.shape == (B, T, S)
    for b, t, s in np.ndindex(B, T, S):
        assert bool(mask[b, t, s]) == (bool(visible[b, s]) and s <= int(columns[b, t]))
    expected = by_hand(*map(np.asarray, (q, k, v, mask)))
    np.testing.assert_allclose(attention(q, k, v, mask, f"attention:{name}"), expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MASKED if name != "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_implementations_equal_the_reference(name, shape, monkeypatch):
    """On a CPU the GPU's choice is made to serve, so that its mathematics are checked here too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    inputs = random_inputs(shape, 1)
    np.testing.assert_allclose(
        attention(*inputs, kernel=f"attention:{name}"), reference(*inputs), atol=1e-5
    )


@pytest.fixture
def without_cudnn(monkeypatch):
    """What cuDNN is asked for, done by XLA, on a machine that seems to have a GPU."""
    asked = []

    def attend(*arrays, implementation, **words):
        asked.append(implementation)
        return attention_of_jax(*arrays, **words)

    attention_of_jax = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "PROCESSORS", 1)
    return asked


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_may_see_their_first_keys(name, shape, without_cudnn):
    kind = jnp.bfloat16 if name == "cudnn" else jnp.float32
    q, k, v = (x.astype(kind) for x in random_inputs(shape, 5)[:3])
    lengths = jnp.array([shape[2] + 3, 2][: len(q)], jnp.int32)  # beyond the last key: all of them
    mask = np.arange(shape[2]) < np.asarray(lengths)[:, None]
    queries, keys, values = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = by_hand(queries, keys, values, mask)
    found = np.asarray(attention(q, k, v, lengths, f"attention:{name}"), np.float32)
    np.testing.assert_allclose(found, expected, atol=2e-2 if name == "cudnn" else 1e-5)


def test_cudnn_serves_masks_per_query_of_whole_canvases(without_cudnn):
    """As of training in two streams, against each query by hand."""
    q, k, v, _ = random_inputs((2, 8, 8, 4, 2, 16), 7)
    low = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    seen = np.random.default_rng(7).random((2, 8, 8)) < 0.6
    seen[:, :, 0] = True
    found = np.asarray(attention(*low, jnp.array(seen), "attention:cudnn"), np.float32)
    assert without_cudnn == ["cudnn"]
    queries, keys, values = (np.asarray(x, np.float32) for x in low)
    np.testing.assert_allclose(found, by_hand(queries, keys, values, seen), atol=2e-2)


def test_cudnn_serves_enough_16_bit_rows_that_see_their_first_keys(without_cudnn, monkeypatch):
    q, k, v, visible = random_inputs((2, 3, 9, 4, 2, 16), 6)
    low = (q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    lengths = jnp.array([4, 9], jnp.int32)
    attention(q, k, v, lengths)
    attention(*low, visible)
    attention(*low, jnp.repeat(visible[:, None], 3, axis=1))  # over a cache
    monkeypatch.setattr(cudnn, "PROCESSORS", 9)
    attention(*low, lengths)  # 2 rows of 4 heads
    assert "cudnn" not in without_cudnn
    monkeypatch.setattr(cudnn, "PROCESSORS", 8)
    attention(*low, lengths)
    assert without_cudnn[-1] == "cudnn"

    def absent(*_, **words):
        if words["implementation"] == "cudnn":
            raise RuntimeError("cuDNN is not detected.")
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", absent)
    assert attention(*low, lengths) is v


@pytest.mark.parametrize("backend, reason", [("cpu", "needs a GPU"), ("gpu", "NVIDIA's GPUs")])
def test_tritons_kernels_fall_through_with_a_reason(backend, reason, monkeypatch):
    q, k, v, _ = random_inputs((2, 8, 9, 4, 2, 16), 6)
    lengths = jnp.array([4, 9], jnp.int32)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pytest.raises(ValueError, match=f"split: it .*{reason}"):
        attention(q, k, v, lengths, "attention:split")
    assert attention(q, k, v, lengths).shape == q.shape


def test_a_kernel_whose_canary_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(triton_call, "_errors", {})
    x = jnp.ones(4)
    triton_call.canary("right", lambda x: x * 1.001, lambda x: x, x)
    with pytest.raises(NotImplementedError, match="canary is off by 0.1: wrong numbers"):
        triton_call.canary("wrong", lambda x: x * 1.1, lambda x: x, x)
    assert list(triton_call._errors) == ["right", "wrong"]


def test_triton_calls_go_where_xla_can_record_them(monkeypatch):
    """Of jax-triton 0.3: the handler of jaxlib by its typed interface, not the old custom call."""
    kernel, made = object(), []

    def compiled(backend: Any, platform: str, function: Any, kinds: Any, scalars: Any, **facts):
        made.append((platform, function, kinds, facts["num_warps"], facts["metaparams"]))
        return "compiled", {(i,): [["tt.divisibility", 16]] for i in range(len(kinds))}

    def launch(compiled: str, *rest: Any) -> Any:
        return SimpleNamespace(to_proto=lambda name, metadata: f"{compiled} {rest}".encode())

    calls = SimpleNamespace(
        create_array_parameter=lambda zeros, divisor: (zeros, divisor), TritonKernelCall=launch
    )
    library: Any = ModuleType("jax_triton.triton_lib")
    library.triton_kernel_call_lib, library.get_or_create_triton_kernel = calls, compiled
    library.get_cuda_backend, library.get_triton_type = None, lambda x: f"*{x.dtype}"
    module: Any = ModuleType("jax_triton")
    module.__version__, module.triton_lib = "0.3.1", library
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setitem(sys.modules, "jax_triton.triton_lib", library)
    x = jnp.ones((4, 8), jnp.bfloat16)

    def run(x: jax.Array, y: jax.Array) -> Any:
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return triton_call.call(
            kernel, x, y, out=(out, out), grid=(3, 2), warps=4, stages=2, aliases={1: 0}, WIDTH=8
        )

    text = jax.jit(run).trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @triton_kernel_call_ffi" in text
    assert "mhlo.backend_config = {opaque = " in text, "attributes by name: the typed interface"
    assert "output_tuple_indices = [0], operand_index = 1" in text
    assert made == [("cuda", kernel, ["*bfloat16"] * 4, 4, {"WIDTH": 8})]
    (closed,) = jax.make_jaxpr(run)(x, x).eqns
    (handed,) = (e for e in closed.params["jaxpr"].eqns if e.primitive.name == "ffi_call")
    opaque = dict(handed.params["attributes"])["opaque"]
    assert zlib.decompress(bytes(opaque)) == f"compiled {(3, 2, 1, [(0, 16)] * 4)}".encode()


def test_a_row_that_sees_nothing_is_finite():
    q, k, v, _ = random_inputs(SHAPES[0], 2)
    out = reference(q, k, v, jnp.zeros((1, 5), bool))
    np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


def test_the_next_one_is_tried_where_one_does_not_serve(monkeypatch):
    def never(*_):
        raise NotImplementedError("it never does")

    monkeypatch.setitem(choose.TABLES, "attention", {"never": never, "reference": reference})
    monkeypatch.setattr(choose, "_made", {})
    inputs = random_inputs(SHAPES[1], 3)
    q, k, v, visible = inputs
    np.testing.assert_array_equal(attention(q, k, v, visible), reference(q, k, v, visible))
    shapes = "float32[2,3,4,16] float32[2,9,2,16] float32[2,9,2,16] bool[2,9]"
    row = {"operation": "attention", "chosen": "reference", "shapes": [shapes]}
    assert choose.choices() == [row | {"refused": {"never": "it never does"}}]
    with pytest.raises(ValueError, match="kernel=never does not serve attention .*it never does"):
        attention(q, k, v, visible, "never")
    attention(q, k, v, visible, "reference")
    assert choose.choices()[1:] == [row | {"refused": {}}]


@pytest.mark.parametrize(
    ("kernel", "forced"),
    [
        ("auto", {}),
        ("reference", dict.fromkeys(choose.TABLES, "reference")),
        ("ragged", {"experts": "ragged"}),
        ("attention:xla", {"attention": "xla"}),
        ("attention:xla,experts:ragged", {"attention": "xla", "experts": "ragged"}),
    ],
)
def test_kernels_are_forced_by_name(kernel: str, forced: dict[str, str]):
    assert choose.parse(kernel) == forced


@pytest.mark.parametrize(
    "kernel", ["fast", "", "attention:", "attention:ragged", "attention:xla,x"]
)
def test_unknown_kernels_are_refused(kernel: str):
    with pytest.raises(ValueError, match=f"kernel={kernel} must be auto, reference, or of attent"):
        choose.parse(kernel)
