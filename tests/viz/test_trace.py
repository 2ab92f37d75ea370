"""Records of requests, their files, and how ids read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jdllm import DecodeConfig
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.runtime import sharding
from jdllm.store.checkpoint import random_model
from jdllm.tokenizer import load_tokenizer
from jdllm.viz import trace
from jdllm.viz.pieces import Lexicon, Piece, spell, visible
from jdllm.viz.trace import LOOKS, Record, Run
from tests.support.marks import quick
from tests.support.tiny_models import plain
from tests.support.watched import watched

MASK = 0
ABOUT = {"prompt": "one\u2028two \ud7ff</script>", "model": "none", "decode": {"threshold": 0.9}}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record: tokens may be edited, masked again, and written where nobody looked."""
    calls, length = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    width = draw(st.integers(0, length))
    tokens = draw(arrays.arrays(np.int32, (calls + 1, length), elements=st.integers(0, 4)))
    order = [draw(st.permutations(range(length)))[:width] for _ in range(calls)]
    columns = np.array(order, np.int32).reshape(calls, width)
    candidates = draw(arrays.arrays(np.int32, columns.shape, elements=st.integers(1, 4)))
    floats = st.floats(0, 1, width=32) | st.just(np.nan)
    confidence, entropy = (
        draw(arrays.arrays(np.float32, columns.shape, elements=floats)) for _ in range(2)
    )
    columns = np.where(draw(arrays.arrays(bool, columns.shape)), columns, -1)
    return Record(tokens, columns, candidates, confidence, entropy, 0, MASK)


def looks(record: Record) -> list[dict[int, tuple]]:
    """What every call looked at: by column its candidate, confidence and entropy, as text."""
    rows = zip(record.columns, record.candidates, record.confidence, record.entropy, strict=True)
    return [
        {c: (int(i), str(p), str(h)) for c, i, p, h in zip(*row, strict=True) if c >= 0}
        for row in rows
    ]


def assert_same(one: Record, other: Record) -> None:
    """Equal but for how wide the arrays of looks are."""
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.tokens.dtype == other.tokens.dtype
    assert looks(one) == looks(other)
    assert (one.prompt_length, one.mask_id) == (other.prompt_length, other.mask_id)


@settings(max_examples=100, deadline=None)
@given(record=records())
def test_commits_writers_and_sureness_are_what_they_say(record: Record):
    seen = looks(record)
    for column, story in enumerate(record.tokens.T.tolist()):
        masked = [token == MASK for token in story]
        assert record.commits[column] == (-1 if all(masked) else masked.index(False))
        writer, sure = 0, np.nan
        for call in range(record.calls + 1):
            look = seen[call - 1].get(column) if call else None
            if call and story[call] != story[call - 1]:
                writer, sure = call, np.nan
                if look and look[0] == story[call]:
                    sure = np.float32(look[1])
            if masked[call] and look:
                sure = np.float32(look[1])
            assert record.writers[call, column] == (-1 if masked[call] else writer)
            np.testing.assert_equal(record.sureness[call, column], np.float32(sure))


@settings(max_examples=60, deadline=None)
@given(record=records(), data=st.data())
def test_stretches_join_to_the_whole(record: Record, data: st.DataObject):
    at = data.draw(st.integers(0, record.calls))
    arrays = {name: getattr(record, name) for name in LOOKS}
    ends = (slice(None, at), slice(at, None))
    first, last = (
        dataclasses.replace(record, tokens=tokens, **{n: x[end] for n, x in arrays.items()})
        for end, tokens in zip(ends, (record.tokens[: at + 1], record.tokens[at:]), strict=True)
    )
    assert_same(trace.join([first, last]), record)


@settings(max_examples=100, deadline=None)
@given(record=records())
def test_files_round_trip(record: Record, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    pieces = Lexicon(None, MASK, [1])
    trace.write(path, Run(record, pieces, ABOUT))
    run = trace.read(path)
    assert_same(run.record, record)
    assert run.about == ABOUT
    assert run.pieces == {i: pieces[i] for i in run.pieces}
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert lines[0]["commit"] == record.commits.tolist()
    for line in lines[1:]:
        assert line["commit"] == [record.commits[column] for column in line["columns"]]


def test_cut_drops_what_a_batch_padded():
    whole: dict[str, np.ndarray] = {n: np.full((7, 4), 3, fill.dtype) for n, fill in LOOKS.items()}
    whole["columns"] = np.tile(np.arange(3, 7, dtype=np.int32), (7, 1))
    whole["tokens"] = np.zeros((8, 9), np.int32)
    record = trace.cut(whole, calls=2, prompt_length=3, length=5, mask_id=MASK)
    assert record.tokens.shape == (3, 5)
    assert record.columns.tolist() == [[3, 4, -1, -1]] * 2


def test_arrays_that_do_not_fit_are_refused():
    short = {name: np.zeros((2, 3), fill.dtype) for name, fill in LOOKS.items()}
    with pytest.raises(ValueError, match=r"2 calls need 3 canvases"):
        Record(np.zeros((2, 5), np.int32), **short, prompt_length=0, mask_id=MASK)
    short["entropy"] = short["entropy"][:, :1]
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        Record(np.zeros((3, 5), np.int32), **short, prompt_length=0, mask_id=MASK)


BROKEN = {
    "line 1 is no jdllm trace 1: its first": lambda lines: ["{}", *lines[1:]],
    "line 1 is no jdllm trace 1: Expecting": lambda lines: [],
    "cut off: 1 of its 2 calls": lambda lines: lines[:-1],
    "line 2 is no jdllm trace": lambda lines: [lines[0], lines[1][:-5], lines[2]],
    "line 3 is no jdllm trace": lambda lines: [*lines[:2], lines[2].replace("columns", "rows")],
    "is no piece": lambda lines: [lines[0].replace('"mask"]', '"veil"]'), *lines[1:]],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_named_by_line(message: str, tmp_path: Path):
    path = tmp_path / "run.jsonl"
    view = {name: np.zeros((2, 1), fill.dtype) for name, fill in LOOKS.items()}
    record = Record(
        np.array([[0, 0], [2, 0], [2, 3]], np.int32), **view, prompt_length=0, mask_id=0
    )
    trace.write(path, Run(record, Lexicon(None, MASK, [1]), ABOUT))
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n")
    path.write_text("\n".join(BROKEN[message](lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        trace.read(path)
    assert str(path) in str(error.value)


# ---- a real run


@pytest.fixture(scope="module")
def llm() -> LLM:
    config = NAMED["tiny"]
    mesh = sharding.parse_mesh("1x1")
    return LLM(random_model(config, mesh, seed=3))


SHORT = DecodeConfig(gen_length=8, block_length=4, cache="none", stop="none")
SETTINGS = {
    "threshold": dataclasses.replace(SHORT, threshold=0.02),
    "quota": dataclasses.replace(SHORT, rule="quota", steps=4),
}


@pytest.mark.parametrize("name", quick(SETTINGS, "threshold"))
def test_watching_shows_the_run_of_the_twin_and_changes_nothing(llm: LLM, name: str):
    prompts, config = [[5, 6, 7], [8]], llm.resolve(SETTINGS[name])
    stretches: dict[int, list[Record]] = {0: [], 1: []}
    (batch,) = llm.stream(prompts, config, watch=lambda i, part: stretches[i].append(part))
    found = dict(zip(batch.index, batch.completions, strict=True))
    assert [found[i] for i in range(2)] == llm.generate(prompts, config)
    for i, prompt in enumerate(prompts):
        record = trace.join(stretches[i])
        assert record.prompt_length == len(prompt) and record.mask_id == llm.config.mask_id
        assert record.calls == batch.forwards
        wanted = watched(plain(llm), config, prompt)
        busy = np.r_[True, (record.tokens[1:] != record.tokens[:-1]).any(1)]
        np.testing.assert_array_equal(record.tokens[busy], wanted.tokens)
        np.testing.assert_array_equal(record.guesses[busy[1:]], wanted.guesses)
        np.testing.assert_allclose(record.sureness[busy], wanted.sureness, atol=1e-5)
        for fact in ("confidence", "entropy"):
            mine, theirs = (getattr(x, fact) for x in (record, wanted))
            np.testing.assert_allclose(mine[busy[1:]], theirs, atol=1e-5)
        assert found[i].nfe == wanted.calls == busy.sum() - 1


def test_every_token_that_the_twin_wrote_was_its_candidate(llm: LLM):
    config = llm.resolve(SETTINGS["quota"])
    record = watched(plain(llm), config, [5, 6, 7])
    assert record.calls == 4
    assert record.commits[:3].tolist() == [0, 0, 0]
    assert sorted(record.commits[3:].tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert np.isfinite(record.sureness[-1][3:]).all()
    for call in range(1, record.calls + 1):
        changed = record.changes(call)
        assert (record.guesses[call - 1][changed] == record.tokens[call][changed]).all()
        looked = record.guesses[call - 1] >= 0
        written = record.sureness[call][changed].min()
        left = record.sureness[call][looked & (record.tokens[call] == record.mask_id)]
        assert (left <= written).all(), "a quota takes the surest columns"


# ---- how ids read


@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.text("0123+=() \n\t\u00e9\u4e16\U0001f600\u202e\x1b"))
def test_pieces_spell_the_text(text: str, tokenizer):
    lexicon = Lexicon(tokenizer, 5, [1, 2])
    ids = tokenizer(text)["input_ids"]
    special = any(token in text for token in tokenizer.all_special_tokens)
    assert special or "".join(spell([lexicon[i] for i in ids])) == text


def test_parts_of_a_character_wait_for_the_others(tokenizer):
    lexicon = Lexicon(tokenizer, 5, [1, 2])
    ids = tokenizer("\U0001f600 a")["input_ids"]
    assert [lexicon[i].kind for i in ids] == ["bytes"] * 4 + ["text"] * 2
    assert spell([lexicon[i] for i in ids]) == ["\U0001f600", "", "", "", " ", "a"]
    masked = [*ids[:2], 5, *ids[3:]]
    assert spell([lexicon[i] for i in masked])[:4] == ["\ufffd", "\ufffd", "<|mdm_mask|>", "\ufffd"]


def test_kinds_of_ids(tokenizer):
    lexicon = Lexicon(tokenizer, 5, [1, 2])
    assert lexicon[5] == Piece("<|mdm_mask|>", "mask")
    assert lexicon[2] == Piece("<|eot_id|>", "end")
    assert lexicon[3] == Piece("<|start_header_id|>", "special")
    assert lexicon[575] == Piece("<575>", "special"), "the embedding has more rows than names"
    assert Lexicon(None, 5, [1])[7] == Piece("<7>", "text")


def test_bytes_of_another_tokenizer_are_understood():
    class Fallback:
        def decode(self, ids, **how):
            return "\ufffd"

        def convert_ids_to_tokens(self, token):
            return "<0xE4>"

    assert Lexicon(Fallback(), 5, [1])[9] == Piece("e4", "bytes")


def test_nothing_acts_on_the_terminal():
    assert visible("a\x1b[2J\r\u202eb\x7f") == "a\u241b[2J\u240d<U+202E>b<U+007F>"
    assert visible("x\n\ty \U0001f469\u200d\U0001f467") == "x\n\ty \U0001f469\u200d\U0001f467"
