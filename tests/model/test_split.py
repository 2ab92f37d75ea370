"""Split's algorithm without a GPU: against the definition, in pages, and rows that stay alone."""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as pallas
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.kernels import choose, triton_call
from jdllm.kernels.attention import mosaic, reference, split
from jdllm.kernels.attention.split import Tiles, in_pages
from jdllm.kernels.shapes import ATTENTION as SHAPES
from tests.model.test_kernels import by_hand, random_inputs
from tests.support.interpreted import interpreted

__all__ = ["interpreted"]

TILED = "attention:tiled,paged_attention:tiled"


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch):
    """So that the small shapes have tiles and parts, too."""
    monkeypatch.setattr(split, "TILES", Tiles(keys=2, part=4))


def ranges_of(B: int, T: int, S: int, seed: int) -> Any:
    """Of every query, one key at least; some end behind the last column."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, S, (B, T))
    return jnp.array(np.stack([first, first + rng.integers(1, S + 1, (B, T))], -1), jnp.int32)


def paged(k: jax.Array, v: jax.Array, page: int) -> Any:
    """Pools and their table; zeros fill the last pages."""
    return in_pages(padded(k, page), padded(v, page), page)


def padded(x: jax.Array, page: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % page), (0, 0), (0, 0)))


@pytest.mark.parametrize("name", ["tiled", "xla", "reference"])
@pytest.mark.parametrize(("own", "shape"), [(False, SHAPES[1]), *((True, one) for one in SHAPES)])
def test_queries_see_their_ranges(name: str, own: bool, shape: Any, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (q, k, v, _), (B, T, S, *_) = random_inputs(shape, 7), shape
    ranges = ranges_of(B, T if own else 1, S, 8)
    seen = np.broadcast_to(reference.by_query(ranges, S), (B, T, S))
    expected = by_hand(*map(np.asarray, (q, k, v, seen)))
    found = choose.attention(q, k, v, ranges, f"attention:{name}")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    pages = paged(k, v, 3)
    seen = jnp.minimum(ranges, S)  # what pads the last page is nobody's
    for kernel in (f"paged_attention:{name}", f"attention:{name}"):
        if name != "xla" or kernel[0] == "a":
            found = choose.paged_attention(q, *pages, visible=seen, kernel=kernel)
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_see_their_first_keys(shape: Any):
    q, k, v, _ = random_inputs(shape, 9)
    lengths = jnp.array([shape[2] + 3, 2][: len(q)], jnp.int32)
    found = choose.attention(q, k, v, lengths, TILED)
    np.testing.assert_allclose(found, reference.attention(q, k, v, lengths), atol=1e-5)
    unseen = choose.attention(q, k, v, 0 * lengths, TILED)
    np.testing.assert_array_equal(unseen, 0 * q)


REASONS = {
    (4, 32, 64, 28, 4, 128): "",
    (6, 32, 64, 32, 32, 128): "",
    (4, 64, 64, 16, 4, 128): "",
    (1, 32, 64, 28, 4, 128): "",
    (1, 32, 64, 32, 32, 128): "",
    (9, 65, 64, 16, 4, 128): "65 queries are more than 64",
    (9, 64, 64, 28, 4, 128): "448 queries per key head are more than 256",
    (9, 32, 64, 16, 4, 96): "head dims of 64 and 128, not 96",
}
"""Of shapes in 16 bits: why split leaves them to others, or "" where it is the first choice."""


@pytest.mark.parametrize("shape", REASONS)
def test_split_serves_blocks(shape: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(split, "TILES", Tiles())
    monkeypatch.setattr(triton_call, "require", lambda: None)
    monkeypatch.setattr(choose, "_made", {})
    for name in ("check", "check_paged"):
        monkeypatch.setattr(split, name, lambda: None)
    monkeypatch.setattr(split, "attend", lambda q, *_: q)
    B, T, S, H, G, K = shape
    q, k = jnp.zeros((B, T, H, K), jnp.bfloat16), jnp.zeros((B, S, G, K), jnp.bfloat16)
    lengths = jnp.ones(B, jnp.int32)
    choose.attention(q, k, k, lengths)
    choose.paged_attention(q, *in_pages(k, k, 32), lengths)
    found, paged_too, *_ = choose.choices()
    reason = REASONS[shape]
    assert reason in found["refused"].get("split", "")
    assert (found["chosen"] == "split") == (not reason)
    assert paged_too["operation"] == "paged_attention" or reason
    assert (paged_too["chosen"] == "split") == (not reason)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_triton_kernels_interpreted_give_the_reference(
    own: bool, heads: tuple[int, int], interpreted: None
):
    """Part by part, and all parts one after the other: not one bit differs; nor in pages."""
    B, T, S, (H, G), K = 2, 5, 40, heads, 64
    q, k, v, _ = random_inputs((B, T, S, H, G, K), 3)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    ranges = ranges_of(B, T, S, 4) if own else jnp.array([[0, 33], [7, 29]])[:, None]
    ranges = ranges.at[0, 0].set(jnp.array([9, 9])) if own else ranges  # one that sees no key
    tiles = Tiles(rows=16, keys=16, part=32)
    parts, whole = (split.attend(q, k, v, ranges, tiles=tiles, whole=one) for one in (False, True))
    np.testing.assert_array_equal(parts, whole)
    pools_k, pools_v, table = paged(k, v, 8)
    pages = split.attend(q, pools_k, pools_v, ranges, table, tiles=tiles)
    np.testing.assert_array_equal(pages, whole)
    high = (x.astype(jnp.float32) for x in (q, k, v))
    expected = np.array(reference.attention(*high, visible=ranges))
    expected[0, 0] *= not own  # zeros where nothing is seen
    np.testing.assert_allclose(whole.astype(jnp.float32), expected, atol=0.02)


def test_what_is_not_ranges_is_refused():
    q, k, v, visible = random_inputs(SHAPES[1], 9)
    with pytest.raises(ValueError, match="tiled: it serves rows and queries that see ranges"):
        choose.attention(q, k, v, visible, "tiled")


attend: Any = jax.jit(partial(choose.attention, kernel=TILED))
attend_pages: Any = jax.jit(partial(choose.paged_attention, kernel=TILED))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([5, 12]), st.integers(0, 2**16))
def test_a_row_gets_the_same_bits_in_any_company(keys: int, seed: int):
    """Alone, among others, in a wider cache, in pages: not one bit of 16 differs."""
    q, k, v, _ = random_inputs((3, 3, keys, 4, 2, 16), seed)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    ranges = jnp.minimum(ranges_of(3, 3, keys, seed), keys)
    together = np.asarray(attend(q, k, v, ranges), np.float32)
    wide = [jnp.pad(x, ((0, 0), (0, 7), (0, 0), (0, 0)), constant_values=3) for x in (k, v)]
    for b in range(3):
        own = slice(b, b + 1)
        alone = attend(q[own], wide[0][own], wide[1][own], ranges[own])
        np.testing.assert_array_equal(together[own], np.asarray(alone, np.float32))
    found = attend_pages(q, *paged(k, v, 2), ranges)
    np.testing.assert_array_equal(together, np.asarray(found, np.float32))


def test_mosaic_interpreted_gives_the_same():
    """Its copies, pages and ranges as a CPU can follow them; its products are plain ones."""
    (q, k, v, _), tiles = random_inputs((2, 5, 96, 4, 2, 128), 11), mosaic.Tiles(32, 64, 2)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    ranges = jnp.minimum(ranges_of(2, 5, 80, 12), 80)
    run = jax.jit(partial(mosaic.attend, tiles=tiles, interpret=pallas.InterpretGPUParams()))
    found = run(q, k, v, ranges)
    high = (x.astype(jnp.float32) for x in (q, k, v))
    exact = reference.attention(*high, visible=ranges)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02)
    pools_k, pools_v, table = in_pages(k, v, 16)
    np.testing.assert_array_equal(found, run(q, pools_k, pools_v, ranges, table))


def test_mosaic_says_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch):
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(triton_call, "require", lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match="compute capability 9.0 .Hopper., not 8.0"):
        mosaic.check()
    Device.compute_capability = "9.0"  # on this CPU it cannot be compiled
    with pytest.raises(NotImplementedError, match="cannot be compiled: Only interpret mode"):
        mosaic.check()
