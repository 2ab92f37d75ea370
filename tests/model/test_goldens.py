"""Replays recorded forward passes of the reference implementations: logits and hidden states."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.convert.families import FAMILIES
from jdllm.convert.shards import Shards
from jdllm.convert.table import restore_sources
from jdllm.model.cache import Cache
from jdllm.model.mask import Mask
from jdllm.model.model import Model, named
from jdllm.model.transformer import rms_norm
from jdllm.score.likelihood import Canvas, Masks, losses, spread
from tests.support.recordings import CASES, ROOT, UNSUPPORTED, Case, discover, load, supported
from tests.support.reference_configs import CONFIGS

ATOL = 2e-3
MOE_ATOL = 5e-4


@jax.jit
def all_states(model: Model, tokens_BT, visible_BT):
    """Embedding, residual stream after every layer, final norm and logits."""
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = model.embed(tokens_BT)
    states, mask = [x_BTD], Mask.of(model.config, visible_BT)
    seen = mask.resolve(columns_BT)
    for layer in model.net.layers:
        x_BTD, branch_BTD, *_ = layer(x_BTD, None, columns_BT, seen)
        assert isinstance(branch_BTD, jax.Array)
        x_BTD = x_BTD + branch_BTD
        states.append(x_BTD)
    hidden = model(states[0], columns_BT, mask).hidden
    return states, hidden, model.logits(hidden)


def test_every_recorded_family_is_replayed():
    """Every checkpoint is converted by a family, every recording is read by a config or a test."""
    assert not UNSUPPORTED
    architectures = {name for family in FAMILIES.values() for name in family.architectures}
    readers = {"checkpoint": architectures, "likelihood": {"likelihood"}}
    for case in CASES:
        assert case.name in readers.get(case.kind, CONFIGS), case.id


def test_missing_or_empty_root_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds nothing to replay"):
        discover(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        discover(tmp_path / "absent")


@pytest.mark.parametrize("case", supported("checkpoint"))
def test_checkpoint(case: Case):
    """Logits; every layer's residual stream and padded inputs where they were recorded."""
    checkpoint = load(case.path)
    if not (case.path / "logits.npz").exists():  # then at least every weight is the stored one
        arrays = {name: np.asarray(leaf[...]) for name, leaf in named(checkpoint).items()}
        family, shards = FAMILIES[checkpoint.config.family], Shards(case.path)
        tensors = restore_sources(family, checkpoint.config, arrays)
        assert tensors.keys() == shards.shapes.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, shards.map(name).astype(np.float32))
        return
    stored = np.load(case.path / "logits.npz")
    ids = stored["input_ids"]

    def run(tokens, visible):
        return all_states(checkpoint, tokens, visible)

    states, hidden, logits = run(ids, np.ones(ids.shape, bool))
    np.testing.assert_allclose(logits, stored["logits"], atol=ATOL)
    if "hidden_states" in stored:
        for ours, theirs in zip(states, stored["hidden_states"], strict=True):
            np.testing.assert_allclose(ours[:1], theirs, atol=ATOL)
        np.testing.assert_allclose(hidden[:1], stored["final_norm"], atol=ATOL)
    for side in ("leftpad", "rightpad"):
        if f"{side}_logits" not in stored:
            continue
        visible = stored[f"{side}_attention_mask"].astype(bool)
        logits = np.asarray(run(stored[f"{side}_input_ids"], visible)[2])
        # Dream's padding sees nothing and means nothing; LLaDA's attends to what is real
        rows = visible if case.name == "DreamModel" else np.ones_like(visible)
        np.testing.assert_allclose(logits[rows], stored[f"{side}_logits"][rows], atol=ATOL)


def test_every_supported_recording_is_complete():
    """What test_checkpoint may skip is missing only where the goldens' README says so."""
    expected = {
        "llada": {"hidden_states", "leftpad_logits", "rightpad_logits"},
        "llada_gqa": {"hidden_states", "leftpad_logits", "rightpad_logits"},
        "dream": {"hidden_states", "leftpad_logits"},
        "qwen_verifier": set[str](),
    }
    for name, keys in expected.items():
        path = ROOT / name / "logits.npz"
        if path.exists():
            assert keys | {"logits"} <= set(np.load(path).files), name


@jax.jit
def branches(model: Model, tokens_BT, mask: Mask):
    """By name: the residual stream and both branches of every layer, routing, norm and logits."""
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    seen = mask.resolve(columns_BT)
    x_BTD = model.embed(tokens_BT)
    found: dict[str, list[jax.Array]] = {"embed": [x_BTD]}
    for layer in model.net.layers:
        h = rms_norm(x_BTD, layer.attention_norm[...], layer.eps)
        mixed, _ = layer.attention(h, columns_BT, seen)
        assert isinstance(mixed, jax.Array)
        h = rms_norm(x_BTD + mixed, layer.mlp_norm[...], layer.eps)
        out = layer.feed_forward(h)
        x_BTD, branch_BTD, *_ = layer(x_BTD, None, columns_BT, seen)
        assert isinstance(branch_BTD, jax.Array)
        x_BTD = x_BTD + branch_BTD
        states = {"layer_out": x_BTD, "attn_out": mixed, "mlp_out": out}
        if layer.sparse:
            logits, picks, weights = layer.experts.route(h)
            states |= {"router_logits": logits, "topk_idx": picks, "topk_weight": weights}
            states["experts_out"] = layer.experts(h)
        else:
            states["experts_out"] = out
        for name, value in states.items():
            found.setdefault(name, []).append(value)
    hidden = model(found["embed"][0], columns_BT, mask).hidden
    return found | {"final_norm": [hidden], "logits": [model.logits(hidden)]}


MASKS: dict[str, dict] = {
    "full": {},
    "block4": {"kind": "blocks", "size": 4},
    "block8": {"kind": "blocks", "size": 8},
}


@pytest.mark.parametrize("case", supported("checkpoint", moe=True))
def test_expert_checkpoint(case: Case):
    """Every branch of every layer under every recorded mask; routing picks exactly."""
    checkpoint, stored = load(case.path), np.load(case.path / "logits.npz")
    ids = stored["input_ids"]
    present = {name.split("__")[0] for name in stored}
    for prefix in MASKS.keys() & present:
        found = branches(checkpoint, ids, Mask(jnp.ones(ids.shape, bool), **MASKS[prefix]))
        assert {f"{prefix}__{name}" for name in found} >= {n for n in stored if prefix in n}
        if case.name == "LLaDAMoEModelLM":  # there the shared expert is not counted as MLP
            found["mlp_out"] = found["experts_out"]
        for name in found.keys() - {"experts_out"}:
            theirs = stored[f"{prefix}__{name}"]
            ours = np.asarray(found[name]).reshape(theirs.shape)
            if name == "topk_idx":
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_allclose(ours, theirs, atol=MOE_ATOL, err_msg=f"{prefix} {name}")
    if "padded__logits" in stored:
        visible = stored["padded__attention_mask"].astype(bool)
        found = branches(checkpoint, ids, Mask(visible))
        np.testing.assert_allclose(found["logits"][0], stored["padded__logits"], atol=MOE_ATOL)


@jax.jit
def run_cached(model: Model, tokens_BT, positions_BT, mask: Mask, cache):
    """Logits, keys and values of some columns of a canvas."""
    x_BTD = model.embed(tokens_BT)
    found = model(x_BTD, positions_BT, mask, cache)
    return model.logits(found.hidden), found.cache


def assert_keys_and_values(cache: Cache, stored: np.ndarray) -> None:
    """Against [L, 2, B, G, T, K], as far as that goes."""
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        for ours, theirs in zip((keys, values), stored[i], strict=True):
            theirs = theirs.transpose(0, 2, 1, 3)
            np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, atol=MOE_ATOL)


@pytest.mark.parametrize("case", supported("checkpoint", moe=True))
@pytest.mark.slow
def test_expert_checkpoint_in_parts(case: Case):
    """Positions that do not begin at 0; a block against stale keys, and against an exact cache."""
    checkpoint, stored = load(case.path), np.load(case.path / "logits.npz")
    ids, seen = stored["offset__input_ids"], Mask(jnp.ones((1, 16), bool))
    logits, _ = run_cached(checkpoint, ids, stored["offset__position_ids"], seen, None)
    np.testing.assert_allclose(logits, stored["offset__logits"], atol=MOE_ATOL)

    ids, seen = stored["input_ids"], Mask(jnp.ones((2, 24), bool))
    columns = np.broadcast_to(np.arange(24), (2, 24))
    empty = checkpoint.empty_cache(2, 24)
    if "dual__kv" in stored:
        _, cache = run_cached(checkpoint, ids, columns, seen, empty)
        assert_keys_and_values(cache, stored["dual__kv"])
        block = stored["dual__block_ids"]
        logits, _ = run_cached(checkpoint, block, columns[:, 8:16], seen, cache)
        np.testing.assert_allclose(logits, stored["dual__block_logits"], atol=MOE_ATOL)
    if "cache8__prefill_kv" in stored:
        seen = dataclasses.replace(seen, **MASKS["block8"])
        _, cache = run_cached(checkpoint, ids[:, :16], columns[:, :16], seen, empty)
        assert_keys_and_values(cache, stored["cache8__prefill_kv"])
        logits, _ = run_cached(checkpoint, ids[:, 16:], columns[:, 16:], seen, cache)
        np.testing.assert_allclose(logits, stored["cache8__block_logits"], atol=MOE_ATOL)


@pytest.mark.parametrize("case", supported("likelihood"))
def test_likelihood(case: Case):
    """LLaDA's bound on the recorded masks: every column's cross entropy, losses and estimate."""
    stored = np.load(case.path)
    meta = json.loads(str(stored["meta"]))
    checkpoint = load(ROOT / meta["checkpoint"])
    shown = stored["perturbed"].reshape(-1, stored["perturbed"].shape[2])
    B, T = shown.shape
    clean = np.concatenate([stored["prompt"], stored["answer"]])
    start, length = len(stored["prompt"]), len(stored["answer"])
    assert not np.any((shown != clean) & (shown != meta["mask_id"]))
    canvas = Canvas(
        tokens=jnp.array(np.tile(clean, (B, 1))),
        length=jnp.full(B, T),
        start=jnp.full(B, start),
        end=jnp.full(B, T),
    )
    hidden = jnp.array(shown == meta["mask_id"])
    ratio = stored["p_mask"].reshape(B, T)[:, start]
    masks = Masks(hidden, hidden, jnp.array(ratio))
    loss_B, entropy_BW = losses(checkpoint, canvas, masks, length, meta["cfg_scale"])
    theirs = stored["token_nll"].reshape(B, T)[:, start:]
    np.testing.assert_allclose(entropy_BW, theirs, atol=ATOL)
    np.testing.assert_allclose(loss_B, stored["sample_loss"].ravel(), rtol=1e-4)
    assert -np.mean(loss_B) == pytest.approx(float(stored["estimate"]), rel=1e-4)
    counts = np.asarray(hidden).sum(1).reshape(stored["perturbed"].shape[:2])
    n, b = counts.shape
    ours = spread(
        jnp.repeat(counts[:, 0], b), jnp.tile(jnp.arange(b), n), b, jnp.full(n * b, length)
    )
    np.testing.assert_array_equal(ours.reshape(n, b), counts)
