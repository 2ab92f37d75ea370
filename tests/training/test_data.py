"""Training rows: the forms of a file, canvases, the cache and the order of batches."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.runtime import sharding
from jdllm.tokenizer import encode_prompts, load_tokenizer
from jdllm.training import data

CONFIG = NAMED["bundled"]
END = CONFIG.stop_ids[-1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


def write(path: Path, *rows) -> Path:
    """A .jsonl file; strings are lines as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


# Files


def test_jsonl_forms(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2", "response": "4", "source": "ignored"},
        "",
        chat(("user", "hi"), ("assistant", "hello")),
        chat(("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        {"text": "once upon"},
    )
    pairs = list(data.file_pairs(path))
    turns = chat(("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "c"))["messages"]
    assert pairs == [("2+2", "4"), ("hi", "hello"), (turns, "d"), ("", "once upon")]
    assert not capsys.readouterr().out


def test_text_file_is_one_response(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGr\u00fc\u00dfe\n\nzwei".encode())
    assert list(data.file_pairs(path)) == [("", "Gr\u00fc\u00dfe\n\nzwei")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "a", "response": "b"', "line 3: not valid JSON: .* at column"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 3: a row needs .* the keys prompt, answer",
        ),
        ('{"prompt": 1, "response": "b"}', "line 3: .* strings prompt and response"),
        ("[1, 2]", "line 3: .* it is of type list"),
        ("null", "line 3: .* it is of type NoneType"),
        ("{}", "line 3: .*keys \\(none\\)"),
        (json.dumps(chat(("assistant", "a"), ("user", "b"))), "line 3: .*end with a user and an"),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "system"},
                        *chat(("user", "b"), ("assistant", "c"))["messages"],
                    ]
                }
            ),
            "line 3: .*each with the strings role and content",
        ),
        (json.dumps(chat(("user", "b"))), "line 3: .* end with a user and an assistant turn"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, rule):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(ValueError, match=rule) as caught:
        list(data.file_pairs(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        list(data.file_pairs(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"must end in \.jsonl .* or \.txt"):
        list(data.file_pairs(tmp_path / "a.csv"))
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    with pytest.raises(ValueError, match="must be UTF-8"):
        list(data.file_pairs(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        list(data.file_pairs(tmp_path / "empty.txt"))


# Tasks


def test_mixtures():
    assert data.parse_mixture("sudoku") == [("sudoku", 1.0)]
    assert data.parse_mixture("sudoku:1, countdown:3") == [("sudoku", 1.0), ("countdown", 3.0)]
    pairs = list(data.generated_pairs("sudoku:1,countdown:3", 8, seed=0))
    assert len(pairs) == 8 and pairs == list(data.generated_pairs("sudoku:1,countdown:3", 8, 0))
    assert pairs != list(data.generated_pairs("sudoku:1,countdown:3", 8, seed=1))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("sudokuu", "task=sudokuu is unknown; did you mean sudoku"),
        ("zebra", "task=zebra is unknown; there are countdown"),
        ("sudoku,,countdown", "task= is unknown"),
        ("sudoku:x", "share must be a number above 0"),
        ("sudoku:0", "share must be a number above 0"),
        ("sudoku:nan", "share must be a number above 0"),
        ("sudoku:", "share must be a number above 0"),
    ],
)
def test_impossible_mixtures_are_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        data.parse_mixture(text)


# Canvases


def test_a_conversation_is_framed_as_a_whole(tokenizer):
    turns = chat(("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "c"))["messages"]
    rows = data.encode_rows(tokenizer, [(turns, "d"), ("", "e")], CONFIG, 64, None)
    assert (
        rows.tokens[0, : rows.prompt_lengths[0]].tolist() == encode_prompts(tokenizer, [turns])[0]
    )
    assert rows.prompt_lengths[1] == 0


def test_rows_fill_the_canvas_with_padding(tokenizer):
    rows = data.encode_rows(tokenizer, [("2+2", "4"), ("1", "12+30")], CONFIG, 40, None)
    assert rows.tokens.shape == (2, 40) and rows.tokens.dtype == np.uint16
    np.testing.assert_array_equal(rows.lengths, [40, 40])
    for row, start, prompt, response in zip(
        rows.tokens, rows.prompt_lengths, ("2+2", "1"), ("4", "12+30"), strict=True
    ):
        assert row[:start].tolist() == encode_prompts(tokenizer, [prompt])[0]
        end = start + len(tokenizer(response)["input_ids"])
        assert tokenizer.decode(row[start:end]) == response
        assert row[end] == END and set(row[end + 1 :]) == {CONFIG.pad_id}


def test_response_length_ends_the_canvas_after_the_prompt(tokenizer, capsys):
    pairs = [("2+2", "4"), ("1", "1234567890")]
    rows = data.encode_rows(tokenizer, pairs, CONFIG, 64, response_length=6)
    np.testing.assert_array_equal(rows.lengths - rows.prompt_lengths, [6, 6])
    assert "1 examples are longer than their canvas and lose their end" in capsys.readouterr().err
    row, start = rows.tokens[1], rows.prompt_lengths[1]
    assert tokenizer.decode(row[start : start + 6]) == "123456"
    assert set(row[start + 6 :]) == {CONFIG.pad_id}
    short = data.encode_rows(tokenizer, pairs, CONFIG, int(start) + 2, response_length=6)
    assert short.lengths.max() == start + 2


def test_prompts_that_leave_no_room_are_counted(tokenizer, capsys):
    pairs = [("1" * 50, "2"), ("1", "2")]
    rows = data.encode_rows(tokenizer, pairs, CONFIG, 30, None)
    assert len(rows.tokens) == 1
    assert "1 examples are left out: their prompt fills length=30" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no example .*1 prompts leave none within length=30"):
        data.encode_rows(tokenizer, pairs[:1], CONFIG, 30, None)
    with pytest.raises(ValueError, match="no example .*it is empty"):
        data.encode_rows(tokenizer, [], CONFIG, 30, None)


@pytest.mark.parametrize("response_length", [None, 7])
def test_plain_text_is_cut_into_windows_without_loss(tokenizer, response_length, capsys):
    text = "".join(map(str, range(40)))
    rows = data.encode_rows(tokenizer, [("", text)], CONFIG, 16, response_length)
    assert not rows.prompt_lengths.any()
    assert set(rows.lengths) == {response_length or 16}
    ids = np.concatenate([row[:end] for row, end in zip(rows.tokens, rows.lengths, strict=True)])
    kept = len(tokenizer(text)["input_ids"])
    assert tokenizer.decode(ids[:kept]) == text
    assert set(ids[kept:]) == {CONFIG.eos_id}  # the end of the text, then padding
    assert "lose" not in capsys.readouterr().err


def test_chunks_do_not_show(tokenizer, monkeypatch):
    pairs = [(str(k), str(k * k)) for k in range(7)]
    whole = data.encode_rows(tokenizer, pairs, CONFIG, 32, None)
    monkeypatch.setattr(data, "CHUNK", 3)
    assert data.encode_rows(tokenizer, pairs, CONFIG, 32, None).digest() == whole.digest()


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    small = dataclasses.replace(CONFIG, vocab=320)
    with pytest.raises(ValueError, match="the model knows only 320"):
        data.encode_rows(tokenizer, [("1", "2")], small, 32, None)


# The cache


def some_rows(value: int = 1) -> data.Rows:
    ones = np.ones(3, np.int32)
    return data.Rows(np.full((3, 4), value, np.uint16), ones, ones * 4)


def test_cache_builds_once_for_a_key(tmp_path):
    calls = []

    def build():
        calls.append(1)
        return some_rows(len(calls))

    first = data.cached_rows(tmp_path, {"a": 1, "b": 2}, build)
    again = data.cached_rows(tmp_path, {"b": 2, "a": 1}, build)
    assert len(calls) == 1 and first.digest() == again.digest() == some_rows(1).digest()
    other = data.cached_rows(tmp_path, {"a": 1, "b": 3}, build)
    assert len(calls) == 2 and other.digest() != first.digest()


def test_an_interrupted_cache_is_not_there(tmp_path, monkeypatch):
    def torn(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", torn)
        with pytest.raises(KeyboardInterrupt):
            data.cached_rows(tmp_path, {}, some_rows)
    assert not list(tmp_path.glob("*.npz"))
    assert data.cached_rows(tmp_path, {}, some_rows).digest() == some_rows().digest()
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_fingerprint_goes_by_content(tmp_path):
    path = tmp_path / "a"
    assert data.fingerprint(path) == ""
    path.write_text("one")
    first = data.fingerprint(path)
    path.touch()
    assert data.fingerprint(path) == first
    path.write_text("two")
    assert data.fingerprint(path) != first


# The order of batches


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(rows, size, seed):
    per_epoch = max(rows // size, 1)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        index = np.concatenate([data.batch_index(rows, size, step, seed) for step in steps])
        assert len(index) == per_epoch * size and index.min() >= 0 and index.max() < rows
        counts = np.bincount(index, minlength=rows)
        if rows >= size:
            assert counts.max() == 1 and counts.sum() == rows - rows % size
        else:  # wraps around: every row, as evenly as can be
            assert counts.max() - counts.min() <= 1


def test_batches_are_a_function_of_the_step():
    steps = list(range(12))
    forward = {step: data.batch_index(20, 6, step, 0).tolist() for step in steps}
    backward = {step: data.batch_index(20, 6, step, 0).tolist() for step in steps[::-1]}
    assert forward == backward
    assert forward[0] != forward[3] != forward[6]  # another epoch, another order
    assert forward[0] != data.batch_index(20, 6, 0, 1).tolist()


def test_rows_are_placed_where_they_are_needed():
    """Rows of two micro-batches, widened, over two devices of the data axis and two others."""
    rows, index = some_rows(), np.array([[0, 2], [1, 1]])
    by_row = NamedSharding(sharding.parse_mesh("2x2"), PartitionSpec(None, "data"))
    placed = rows.place(index, by_row)
    stored = (rows.tokens, rows.prompt_lengths, rows.lengths)
    for ours, array in zip(placed, stored, strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, array[index])
        assert {part.data.shape[1] for part in ours.addressable_shards} == {1}
