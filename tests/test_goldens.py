"""Replays recorded runs of the reference implementations: logits, hidden states, decode traces.

The root is JDLLM_GOLDENS or tests/goldens. What there is to replay is found by content; a family
that is not supported yet stands in UNSUPPORTED with its reason.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdllm import sharding
from jdllm.configs import ModelConfig
from jdllm.convert.families import FAMILIES
from jdllm.decode import DecodeConfig, Request, decode, make_setup
from jdllm.load import load_parts
from jdllm.model import Transformer

ROOT = Path(os.environ.get("JDLLM_GOLDENS", Path(__file__).parent / "goldens"))
ATOL = 2e-3
EOT = 314  # stands for LLaDA's end-of-turn id in the tiny vocabularies

# (kind, name) -> why it is not replayed yet. Names: the architecture of a checkpoint, the family
# of a decode trace, the folder of likelihoods, the stem of a traces_*.json.
UNSUPPORTED = {
    ("checkpoint", "LLaDAMoEModelLM"): "mixture-of-experts layers are not in model.py yet",
    ("checkpoint", "LLaDA2MoeModelLM"): "mixture-of-experts layers are not in model.py yet",
    ("decode", "apd"): "drafts checked by a verifier, and shifted logits, are not decoded yet",
    ("decode", "dinfer"): "dInfer's rules and vicinity cache are not written yet",
    ("decode", "dream"): "shifted logits and Dream's rules are not in the decode loop yet",
    ("decode", "fast_dream"): "shifted logits and Fast-dLLM's Dream blocks are not decoded yet",
    ("likelihood", "likelihood"): "likelihood scoring is not written yet",
    ("traces", "traces_dinfer"): "needs the mixture-of-experts checkpoints",
    ("traces", "traces_dinfer_itersmooth"): "needs the mixture-of-experts checkpoints",
    ("traces", "traces_llada_loop"): "needs the mixture-of-experts checkpoints",
    ("traces", "traces_official"): "needs the mixture-of-experts checkpoints",
    ("traces", "traces_sglang"): "needs the mixture-of-experts checkpoints",
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


def supported(kind: str) -> list[Any]:
    rows = [c for c in CASES if c.kind == kind and (kind, c.name) not in UNSUPPORTED]
    return [pytest.param(case, id=case.id) for case in rows]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State


@pytest.fixture(scope="module")
def load():
    loaded: dict[Path, Checkpoint] = {}

    def get(folder: Path) -> Checkpoint:
        if folder not in loaded:
            config, graph, params = load_parts(str(folder), sharding.parse_mesh("1x1"), "float32")
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
    if not (case.path / "logits.npz").exists():
        assert checkpoint.config.layers > 0
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
