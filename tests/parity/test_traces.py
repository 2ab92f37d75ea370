"""Replays recorded decode runs of the reference implementations, exactly, float32.

Every canvas before a model call, the number of calls, and the output. How a recording's parameters
read as a DecodeConfig stands in tests/support/reference_configs.py.
"""

import dataclasses
import itertools
import json
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.decode import DecodeConfig, Request, decode
from jdllm.decode.look import Call
from jdllm.decode.loop import enter_block
from jdllm.decode.start import start
from jdllm.decode.step import block_step
from jdllm.decode.trace import FULL, STEP
from jdllm.decode.work import Work
from jdllm.model.model import Model
from jdllm.parity import make_setup
from tests.support.recordings import EOT, ROOT, Case, has_ties, load, supported
from tests.support.reference_configs import CONFIGS


def left_aligned(prompt_BP: np.ndarray, shown_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves left padding to the right end, where our rows have it; also the prompt lengths."""
    order = np.argsort(~shown_BP.astype(bool), axis=1, kind="stable")
    return np.take_along_axis(prompt_BP, order, axis=1), shown_BP.sum(1)


def draws(stored: Any, canvases: np.ndarray, mask_id: int) -> jax.Array | None:
    """Recorded uniform draws by column; Dream recorded those of masked positions only."""
    if "uniforms" not in stored:
        return None
    uniforms = stored["uniforms"]
    B, T = canvases.shape[1:]
    if uniforms.ndim > 2:
        return jnp.array(uniforms, jnp.float32)
    full = np.ones((len(uniforms), B, T), np.float32)
    for call, row in enumerate(uniforms):
        masked = canvases[call] == mask_id
        full[call][masked] = row[: masked.sum()]
    return jnp.array(full)


def thinned(cases: list[Any]) -> list[Any]:
    """Returns the cases, all but every eighth of each family marked slow."""
    seen: Counter[str] = Counter()
    kept = []
    for param in cases:
        family = param.values[0].name
        marks = [] if seen[family] % 8 == 0 else [pytest.mark.slow]
        kept.append(pytest.param(*param.values, id=param.id, marks=marks))
        seen[family] += 1
    return kept


class Replay(NamedTuple):
    checkpoint: Model
    options: DecodeConfig
    request: Request


def request_of(case: Case, checkpoint: Model) -> Replay:
    """A dense recording as our own: facts, config and canvases; padding moves to the right."""
    stored = np.load(case.path)
    meta = json.loads(str(stored["meta"]))
    eos = meta.get("eos_id", checkpoint.config.eos_id)
    shift = checkpoint.config.shift_logits or "shift" in case.entry["name"]
    config = dataclasses.replace(
        checkpoint.config, eos_id=eos, stop_ids=(eos, EOT), shift_logits=shift
    )
    checkpoint = dataclasses.replace(checkpoint, config=config)
    options = CONFIGS[case.name](case.entry["params"]).resolve(model=checkpoint.config)
    prompt, gen = stored["prompt"], options.gen_length or 0
    B, P = prompt.shape
    shown = stored["attention_mask"] if "attention_mask" in stored else np.ones((B, P), np.int32)
    aligned, lengths = left_aligned(prompt, shown)
    tokens = np.full((B, P + gen), checkpoint.config.mask_id, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = aligned[row, :length]
        tokens[row, length + gen :] = checkpoint.config.pad_id
    recorded = draws(stored, stored["canvas"], checkpoint.config.mask_id)
    request = Request(
        tokens=jnp.array(tokens, jnp.int32),
        prompt_lengths=jnp.array(lengths, jnp.int32),
        keys=jax.random.split(jax.random.key(0), B),
        idle=jnp.zeros(B, bool),
        recorded=recorded,
    )
    return Replay(checkpoint, options, request)


@pytest.mark.parametrize("case", thinned([c for c in supported("decode") if not has_ties(c)]))
def test_decode(case: Case):
    """Dense models: canvas before every model call, NFE and output, exactly."""
    stored, nfe = np.load(case.path), case.entry["nfe"]
    checkpoint, options, request = request_of(case, load(ROOT / case.entry["checkpoint"]))
    verifier = load(ROOT / "qwen_verifier") if options.rule == "verify" else None
    setup = make_setup(options, checkpoint.config)
    state = decode(checkpoint, request, setup, True, verifier)
    assert int(state.forwards) == nfe
    assert state.rows.nfe.tolist() == [nfe] * len(state.rows.nfe)
    ours, theirs = np.asarray(state.trace.tokens[: nfe + 1]), stored["canvas"].astype(np.int32)
    T = theirs.shape[2]
    for row, length in enumerate(np.asarray(request.prompt_lengths)):
        start = stored["prompt"].shape[1] - length  # theirs begins behind the left padding
        np.testing.assert_array_equal(ours[:, row, : T - start], theirs[:, row, start:])
        np.testing.assert_array_equal(ours[-1, row, : T - start], stored["final"][row, start:])
    if "output" in stored:
        np.testing.assert_array_equal(
            dinfer_output(np.asarray(state.rows.tokens), checkpoint.config.eos_id), stored["output"]
        )
    if "acceptance_counts" in stored:
        kept = (np.diff(ours, axis=0) != 0).sum((1, 2))
        np.testing.assert_array_equal(kept, stored["acceptance_counts"])


def dinfer_output(tokens_BT: np.ndarray, eos_id: int) -> np.ndarray:
    """What its generate returns: of one row every eos is removed, the prompt's too."""
    return tokens_BT if len(tokens_BT) > 1 else tokens_BT[:, tokens_BT[0] != eos_id]


@pytest.mark.parametrize("case", [c for c in supported("decode") if has_ties(c)])
def test_decode_with_ties(case: Case):
    """Where top_p leaves one token, confidences are equal: other positions, the same confidences.

    Every call starts from the recorded canvas.
    """
    canvases = np.load(case.path)["canvas"].astype(np.int32)
    checkpoint, options, request = request_of(case, load(ROOT / case.entry["checkpoint"]))
    setup, recorded = make_setup(options, checkpoint.config), request.recorded

    @jax.jit
    def one_call(model, tokens, step):
        work = Work(model, setup, request)
        rows = enter_block(setup, start(work).rows, ~request.idle)
        rows = dataclasses.replace(
            rows,
            tokens=tokens,
            open=rows.generated_BT & (tokens == checkpoint.config.mask_id),
            step=jnp.full_like(rows.step, step),
        )
        draws = None if recorded is None else recorded[step]
        call = Call(active_B=~rows.done, full=True, draws=draws)
        _, _, seen, decision = block_step(work.model, setup, rows, None, call)
        return seen.columns_BN, decision

    for step, (before, after) in enumerate(itertools.pairwise(canvases)):
        columns, decision = jax.device_get(one_call(checkpoint, before, jnp.int32(step)))
        for row in range(len(before)):
            old, new = before[row, columns[row]], after[row, columns[row]]
            ours, theirs = decision.ids_BN[row] != old, new != old
            value = decision.value_BN[row]
            np.testing.assert_allclose(np.sort(value[ours]), np.sort(value[theirs]), atol=1e-5)
            np.testing.assert_array_equal(decision.candidate_BN[row][theirs], new[theirs])
            outside = np.setdiff1d(np.arange(before.shape[1]), columns[row])
            np.testing.assert_array_equal(before[row, outside], after[row, outside])


def engine_request_of(case: Case, checkpoint: Model) -> Replay:
    """A recording of an engine as our own; ragged rows begin where the shortest prompt ends."""
    entry, params, facts = case.entry, case.entry["params"], checkpoint.config
    mask, eos = params["mask_id"], params.get("eos_id", facts.eos_id)
    facts = dataclasses.replace(facts, mask_id=mask, eos_id=eos, stop_ids=(eos,))
    checkpoint = dataclasses.replace(checkpoint, config=facts)
    extra = (entry["algorithm"],) if case.name == "traces_sglang" else ()
    options = CONFIGS[case.name](params, *extra).resolve(model=checkpoint.config)
    prompts = entry["prompt_ids"]
    prompts = prompts if isinstance(prompts[0], list) else [prompts]
    short = len(prompts[0])
    if case.name.startswith("traces_dinfer"):
        short = min(sum(token != mask for token in prompt) for prompt in prompts)
        gen = (options.gen_length or 0) + max(map(len, prompts)) - short
        options = dataclasses.replace(options, gen_length=gen)
    setup = make_setup(options, checkpoint.config)
    tokens = np.full((len(prompts), setup.canvas_length(short)), mask, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    request = Request(
        tokens=jnp.array(tokens),
        prompt_lengths=jnp.full(len(prompts), short, jnp.int32),
        keys=jax.random.split(jax.random.key(0), len(prompts)),
        idle=jnp.zeros(len(prompts), bool),
    )
    return Replay(checkpoint, options, request)


@pytest.mark.parametrize("case", thinned(supported("traces")))
def test_engines(case: Case):
    """Mixtures of experts: canvases, NFE and output, exactly."""
    stored, entry, params = np.load(case.path.with_suffix(".npz")), case.entry, case.entry["params"]
    checkpoint, options, request = engine_request_of(case, load(case.path.parent))
    mask, eos, short = params["mask_id"], checkpoint.config.eos_id, int(request.prompt_lengths[0])
    setup = make_setup(options, checkpoint.config)
    state = decode(checkpoint, request, setup, trace=True)
    assert int(state.forwards) == entry["nfe"]
    kinds = np.asarray(state.trace.kind[: entry["nfe"]])
    before = np.asarray(state.trace.tokens[: entry["nfe"]])[np.isin(kinds, (FULL, STEP))]
    final = np.asarray(state.rows.tokens)
    arrays = {
        name.split("__")[1]: stored[name] for name in stored if entry["name"] == name.split("__")[0]
    }
    if case.name == "traces_sglang":
        check_sglang(arrays, before, final, entry, options, eos)
        return
    theirs = arrays["canvas"].reshape(len(before) + 1, *final.shape)
    # dInfer's rows were taken behind a decode call: what fills a row after a block comes later.
    late = (before[1:] == eos) & (theirs[1:-1] == mask) & (theirs[2:] == eos)
    np.testing.assert_array_equal(np.where(late, mask, before[1:]), theirs[1:-1])
    np.testing.assert_array_equal(before[0], theirs[0])
    filled = (final == eos) & (theirs[-1] == mask)
    np.testing.assert_array_equal(np.where(filled, mask, final), theirs[-1])
    if case.name.startswith("traces_dinfer"):
        assert dinfer_output(final, eos).tolist() == entry["output_ids"]
    elif case.name == "traces_official":
        assert official_output(final[0], short, params) == entry["output_ids"]
    else:
        assert final[0].tolist() == entry["output_ids"]


def official_output(row: np.ndarray, prompt: int, params: dict[str, Any]) -> list[int]:
    """What LLaDA2's generate returns: cut behind the first eos; early returns see the prompt's."""
    eos, mask = params["eos_id"], params["mask_id"]
    ends = np.flatnonzero(row == eos)
    if params["eos_early_stop"] and "editing_threshold" not in params and len(ends):
        wrote = (row[prompt:] == eos).any() and not (row[prompt : ends[0]] == mask).any()
        if wrote:
            return row[prompt : ends[0] + 1].tolist()
    out = row[prompt : prompt + params["gen_length"]].tolist()
    return out[: out.index(eos) + 1] if eos in out else out


def check_sglang(
    arrays: dict[str, np.ndarray],
    before: np.ndarray,
    final: np.ndarray,
    entry: dict[str, Any],
    options: DecodeConfig,
    eos: int,
) -> None:
    """Blocks before every forward, and outputs; its own driver cut those."""
    N = options.block_length or 0
    start = len(entry["prompt_ids"][0]) // N
    for call, (block, inside) in enumerate(
        zip(arrays["block_idx"], arrays["block_in"], strict=True)
    ):
        block = block if arrays["block_idx"][0] == start else block + start
        np.testing.assert_array_equal(before[call][:, block * N : (block + 1) * N], inside)
    np.testing.assert_array_equal(final[:, : arrays["final"].shape[1]], arrays["final"])
    for row, output in zip(final.tolist(), entry["output_ids"], strict=True):
        made = row[len(entry["prompt_ids"][0]) :][: options.gen_length]
        made = [token for token in made if token != entry["params"]["mask_id"]]
        assert (made[: made.index(eos) + 1] if eos in made else made) == output
