"""Replays recorded runs of the reference implementations: logits, hidden states, decode traces.

The root is JDLLM_GOLDENS or tests/goldens. What there is to replay is found by content; a family
that is not supported yet stands in UNSUPPORTED with its reason.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdllm import sharding
from jdllm.cache import Cache
from jdllm.configs import ModelConfig
from jdllm.convert.families import FAMILIES
from jdllm.convert.shards import Shards
from jdllm.convert.table import restore_sources
from jdllm.decode import DecodeConfig, Request, decode, make_setup
from jdllm.likelihood import Canvas, Masks, losses, spread
from jdllm.load import load_parts
from jdllm.model import Transformer, abstract, named, rms_norm, visible_keys

ROOT = Path(os.environ.get("JDLLM_GOLDENS", Path(__file__).parent / "goldens"))
ATOL = 2e-3
MOE = {"LLaDAMoEModelLM", "LLaDA2MoeModelLM"}  # their logits.npz has a layout of its own
MOE_ATOL = 5e-4
EOT = 314  # stands for LLaDA's end-of-turn id in the tiny vocabularies

# (kind, name) -> why it is not replayed yet. Names: the architecture of a checkpoint, the family
# of a decode trace, the folder of likelihoods, the stem of a traces_*.json.
UNSUPPORTED = {
    ("decode", "apd"): "drafts checked by a verifier, and shifted logits, are not decoded yet",
    ("decode", "dinfer"): "dInfer's rules and vicinity cache are not written yet",
    ("decode", "dream"): "shifted logits and Dream's rules are not in the decode loop yet",
    ("decode", "fast_dream"): "shifted logits and Fast-dLLM's Dream blocks are not decoded yet",
    ("traces", "traces_dinfer"): "dInfer's rules and block loop are not written yet",
    ("traces", "traces_dinfer_itersmooth"): "iteration smoothing is not written yet",
    ("traces", "traces_official"): "the exact block cache of LLaDA2 is not written yet",
    ("traces", "traces_sglang"): "the exact block cache of LLaDA2 is not written yet",
}


class Case(NamedTuple):
    kind: str
    name: str
    """What UNSUPPORTED is keyed by, besides the kind."""
    id: str
    path: Path
    entry: dict[str, Any]


def discover(root: Path) -> list[Case]:
    """Everything below `root` that can be replayed; ValueError where there is nothing."""
    if not root.is_dir():
        raise ValueError(f"JDLLM_GOLDENS={root} is not a folder")
    cases = []
    for config in sorted(root.rglob("config.json")):
        folder = config.parent
        if list(folder.glob("*.safetensors")):
            architecture = json.loads(config.read_text())["architectures"][0]
            name = str(folder.relative_to(root))
            cases.append(Case("checkpoint", architecture, f"{name}-checkpoint", folder, {}))
    for index in sorted(root.rglob("decode/index.json")):
        for entry in json.loads(index.read_text()):
            family = entry["family"]
            ident = f"decode-{family}-{entry['name']}"
            cases.append(Case("decode", family, ident, index.parent.parent / entry["file"], entry))
    for path in sorted(root.rglob("likelihood/*.npz")):
        cases.append(Case("likelihood", "likelihood", f"likelihood-{path.stem}", path, {}))
    for path in sorted(root.rglob("traces_*.json")):
        for entry in json.loads(path.read_text()):
            ident = f"{path.parent.name}-{path.stem}-{entry['name']}"
            cases.append(Case("traces", path.stem, ident, path, entry))
    if not cases:
        raise ValueError(f"JDLLM_GOLDENS={root} holds nothing to replay")
    return cases


CASES = discover(ROOT)


def supported(kind: str, moe: bool = False) -> list[Any]:
    rows = [c for c in CASES if c.kind == kind and (kind, c.name) not in UNSUPPORTED]
    rows = [c for c in rows if (c.name in MOE) == moe]
    return [pytest.param(case, id=case.id) for case in rows]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State


def with_mask(folder: Path, scratch: Path) -> Path:
    """The folder, or a copy whose config.json names the mask: some leave that to a tokenizer."""
    facts = json.loads((folder / "config.json").read_text())
    if facts["architectures"][0] not in MOE or (folder / "tokenizer.json").exists():
        return folder
    copy = Path(shutil.copytree(folder, scratch / folder.name))
    facts["mask_token_id"] = facts["vocab_size"] - 1
    (copy / "config.json").write_text(json.dumps(facts))
    return copy


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    loaded: dict[Path, Checkpoint] = {}

    def get(folder: Path) -> Checkpoint:
        if folder not in loaded:
            source = str(with_mask(folder, tmp_path_factory.mktemp("goldens")))
            config, graph, params = load_parts(source, sharding.parse_mesh("1x1"), "float32")
            config = dataclasses.replace(config, stop_ids=(config.eos_id, EOT))
            loaded[folder] = Checkpoint(config, graph, params)
        return loaded[folder]

    return get


@jax.jit(static_argnames=("graph",))
def all_states(graph, params, tokens_BT, visible_BT):
    """Embedding, residual stream after every layer, final norm and logits."""
    model: Transformer = nnx.merge(graph, params)
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = model.embed(tokens_BT, jnp.dtype(jnp.float32))
    states = [x_BTD]
    for layer in model.layers:
        x_BTD, _ = layer(x_BTD, columns_BT, visible_BT, None)
        states.append(x_BTD)
    hidden, _ = model(states[0], columns_BT, visible_BT)
    return states, hidden, model.logits(hidden)


def test_every_unsupported_row_is_still_needed():
    """The table may only shrink: a row whose family is supported, or unknown, must go."""
    if Path(__file__).parent / "goldens" != ROOT:
        pytest.skip("another set of goldens need not hold every family")
    found = {(case.kind, case.name) for case in CASES}
    assert set(UNSUPPORTED) <= found
    architectures = {family.architecture for family in FAMILIES.values()}
    assert not architectures & {name for kind, name in UNSUPPORTED if kind == "checkpoint"}


def test_missing_or_empty_root_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds nothing to replay"):
        discover(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        discover(tmp_path / "absent")


@pytest.mark.parametrize("case", supported("checkpoint"))
def test_checkpoint(case: Case, load):
    """Logits; every layer's residual stream and padded inputs where they were recorded."""
    checkpoint = load(case.path)
    if not (case.path / "logits.npz").exists():  # then at least every weight is the stored one
        arrays = {name: np.asarray(leaf[...]) for name, leaf in named(checkpoint.params).items()}
        family, shards = FAMILIES[checkpoint.config.family], Shards(case.path)
        tensors = restore_sources(family, checkpoint.config, arrays)
        assert tensors.keys() == shards.shapes.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, shards.map(name).astype(np.float32))
        return
    stored = np.load(case.path / "logits.npz")
    ids = stored["input_ids"]

    def run(tokens, visible):
        return all_states(checkpoint.graph, checkpoint.params, tokens, visible)

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


@jax.jit(static_argnames=("graph",))
def branches(graph, params, tokens_BT, visible_BT):
    """By name: the residual stream and both branches of every layer, routing, norm and logits."""
    model: Transformer = nnx.merge(graph, params)
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    seen = visible_keys(model.config, columns_BT, visible_BT, cached=False)
    x_BTD = model.embed(tokens_BT, jnp.dtype(jnp.float32))
    found: dict[str, list[jax.Array]] = {"embed": [x_BTD]}
    for layer in model.layers:
        h = rms_norm(x_BTD, layer.attention_norm[...], layer.eps)
        mixed, _ = layer.attention(h, columns_BT, seen, None)
        h = rms_norm(x_BTD + mixed, layer.mlp_norm[...], layer.eps)
        out = layer.feed_forward(h)
        x_BTD = layer(x_BTD, columns_BT, seen, None)[0]
        states = {"layer_out": x_BTD, "attn_out": mixed, "mlp_out": out}
        if layer.sparse:
            logits, picks, weights = layer.experts.route(h)
            states |= {"router_logits": logits, "topk_idx": picks, "topk_weight": weights}
            states["experts_out"] = layer.experts(h)
        else:
            states["experts_out"] = out
        for name, value in states.items():
            found.setdefault(name, []).append(value)
    hidden, _ = model(found["embed"][0], columns_BT, visible_BT)
    return found | {"final_norm": [hidden], "logits": [model.logits(hidden)]}


def with_blocks(checkpoint: Checkpoint, length: int | None) -> nnx.GraphDef:
    """The graph of the same weights under another mask."""
    config = dataclasses.replace(checkpoint.config, block_causal=length)
    return nnx.split(abstract(config))[0]


MASKS = {"full": None, "block4": 4, "block8": 8}


@pytest.mark.parametrize("case", supported("checkpoint", moe=True))
def test_expert_checkpoint(case: Case, load):
    """Every branch of every layer under every recorded mask; routing picks exactly."""
    checkpoint, stored = load(case.path), np.load(case.path / "logits.npz")
    ids = stored["input_ids"]
    present = {name.split("__")[0] for name in stored}
    for prefix in MASKS.keys() & present:
        graph = with_blocks(checkpoint, MASKS[prefix])
        found = branches(graph, checkpoint.params, ids, np.ones(ids.shape, bool))
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
        found = branches(with_blocks(checkpoint, None), checkpoint.params, ids, visible)
        np.testing.assert_allclose(found["logits"][0], stored["padded__logits"], atol=MOE_ATOL)


@jax.jit(static_argnames=("graph",))
def run_cached(graph, params, tokens_BT, positions_BT, visible_BS, cache):
    """Logits, keys and values of some columns of a canvas."""
    model: Transformer = nnx.merge(graph, params)
    x_BTD = model.embed(tokens_BT, jnp.dtype(jnp.float32))
    hidden, cache = model(x_BTD, positions_BT, visible_BS, cache)
    return model.logits(hidden), cache


def assert_keys_and_values(cache: Cache, stored: np.ndarray) -> None:
    """Against [L, 2, B, G, T, K], as far as that goes."""
    for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        for ours, theirs in zip((keys, values), stored[i], strict=True):
            theirs = theirs.transpose(0, 2, 1, 3)
            np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, atol=MOE_ATOL)


@pytest.mark.parametrize("case", supported("checkpoint", moe=True))
def test_expert_checkpoint_in_parts(case: Case, load):
    """Positions that do not begin at 0; a block against stale keys, and against an exact cache."""
    checkpoint, stored = load(case.path), np.load(case.path / "logits.npz")
    params, graph = checkpoint.params, with_blocks(checkpoint, None)
    ids, seen = stored["offset__input_ids"], np.ones((1, 16), bool)
    logits, _ = run_cached(graph, params, ids, stored["offset__position_ids"], seen, None)
    np.testing.assert_allclose(logits, stored["offset__logits"], atol=MOE_ATOL)

    ids, seen = stored["input_ids"], np.ones((2, 24), bool)
    columns = np.broadcast_to(np.arange(24), (2, 24))
    empty = Cache.zeros(checkpoint.config, 2, 24, jnp.dtype(jnp.float32))
    if "dual__kv" in stored:
        _, cache = run_cached(graph, params, ids, columns, seen, empty)
        assert_keys_and_values(cache, stored["dual__kv"])
        block = stored["dual__block_ids"]
        logits, _ = run_cached(graph, params, block, columns[:, 8:16], seen, cache)
        np.testing.assert_allclose(logits, stored["dual__block_logits"], atol=MOE_ATOL)
    if "cache8__prefill_kv" in stored:
        graph = with_blocks(checkpoint, 8)
        _, cache = run_cached(graph, params, ids[:, :16], columns[:, :16], seen, empty)
        assert_keys_and_values(cache, stored["cache8__prefill_kv"])
        logits, _ = run_cached(graph, params, ids[:, 16:], columns[:, 16:], seen, cache)
        np.testing.assert_allclose(logits, stored["cache8__block_logits"], atol=MOE_ATOL)


def llada_config(params: dict[str, Any]) -> DecodeConfig:
    """LLaDA's generate.py: no cache, a fixed number of steps, no stop."""
    return DecodeConfig(
        rule="quota", cache="none", stop="none", run_all_steps=True, earlier_masks=True, **params
    )


def fast_llada_config(params: dict[str, Any]) -> DecodeConfig:
    """Fast-dLLM's generate functions, and dInfer's copy of them."""
    settings = dict(params)
    variant = settings.pop("variant")
    rule = "quota"
    if "threshold" in settings:
        rule = "threshold"
    elif "factor" in settings:
        rule = "factor"
    if rule != "quota":
        settings.pop("steps")
    early = settings.pop("early_stop", False)
    late = variant == "nvlabs" and settings["cache"] != "none"
    return DecodeConfig(
        rule=rule, stop="eos_fill" if early else "none", check_late=late, **settings
    )


CONFIGS = {"llada": llada_config, "fast_llada": fast_llada_config}


def left_aligned(prompt_BP: np.ndarray, shown_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves left padding to the right end, where our rows have it; also the prompt lengths."""
    order = np.argsort(~shown_BP.astype(bool), axis=1, kind="stable")
    return np.take_along_axis(prompt_BP, order, axis=1), shown_BP.sum(1)


@pytest.mark.parametrize("case", supported("decode"))
def test_decode(case: Case, load):
    """Canvas before every model call, NFE and output, exactly."""
    stored = np.load(case.path)
    checkpoint = load(ROOT / case.entry["checkpoint"])
    prompt, canvases = stored["prompt"], stored["canvas"].astype(np.int32)
    B, P = prompt.shape
    shown = stored["attention_mask"] if "attention_mask" in stored else np.ones((B, P), np.int32)
    options = CONFIGS[case.name](case.entry["params"]).resolve()
    aligned, lengths = left_aligned(prompt, shown)
    gen = options.gen_length or 0
    tokens = np.full((B, P + gen), checkpoint.config.mask_id, np.int32)
    for row in range(B):
        tokens[row, : lengths[row]] = aligned[row, : lengths[row]]
        tokens[row, lengths[row] + gen :] = checkpoint.config.pad_id
    draws = jnp.array(stored["uniforms"], jnp.float32) if "uniforms" in stored else None
    request = Request(
        tokens=jnp.array(tokens),
        prompt_lengths=jnp.array(lengths, jnp.int32),
        keys=jax.random.split(jax.random.key(0), B),
        idle=jnp.zeros(B, bool),
        recorded=draws,
    )
    setup = make_setup(options, checkpoint.config)
    state = decode(checkpoint.graph, checkpoint.params, request, setup, trace=True)
    assert int(state.forwards) == case.entry["nfe"]
    assert state.nfe.tolist() == [case.entry["nfe"]] * B
    trace = np.asarray(state.trace)[: case.entry["nfe"] + 1]
    for row in range(B):
        start = P - lengths[row]  # theirs begins behind the left padding
        ours = trace[:, row, : lengths[row] + gen]
        np.testing.assert_array_equal(ours, canvases[:, row, start:])
        np.testing.assert_array_equal(ours[-1], stored["final"][row, start:])


@pytest.mark.parametrize("case", supported("traces"))
def test_traces_of_one_prompt(case: Case, load):
    """LLaDA's own loop on a mixture of experts, exactly."""
    stored, entry = np.load(case.path.with_suffix(".npz")), case.entry
    checkpoint = load(case.path.parent)
    params = dict(entry["params"])
    assert params.pop("mask_id") == checkpoint.config.mask_id
    options = llada_config(params).resolve()
    prompt = entry["prompt_ids"]
    tokens = [*prompt, *[checkpoint.config.mask_id] * (options.gen_length or 0)]
    request = Request(
        tokens=jnp.array([tokens], jnp.int32),
        prompt_lengths=jnp.array([len(prompt)], jnp.int32),
        keys=jax.random.split(jax.random.key(0), 1),
        idle=jnp.zeros(1, bool),
    )
    setup = make_setup(options, checkpoint.config)
    state = decode(checkpoint.graph, checkpoint.params, request, setup, trace=True)
    trace = np.asarray(state.trace)[: entry["nfe"] + 1, 0]
    assert int(state.forwards) == entry["nfe"]
    np.testing.assert_array_equal(trace, stored[f"{entry['name']}__canvas"])
    assert trace[-1].tolist() == entry["output_ids"]


@pytest.mark.parametrize("case", supported("likelihood"))
def test_likelihood(case: Case, load):
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
    loss_B, entropy_BW = losses(
        checkpoint.graph, checkpoint.params, canvas, masks, length, meta["cfg_scale"]
    )
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
