"""Training text: mixtures, the forms of rows, files, the hub, tasks."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jdllm.training import data
from jdllm.training.data import Source, conversation


def write(path: Path, *rows) -> Path:
    """A .jsonl file; strings are lines as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


# Files


def read(path: Path) -> list[data.Example]:
    return list(data.read(Source(str(path))))


def test_jsonl_forms(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2", "response": "4", "source": "ignored"},
        "",
        chat(("user", "hi"), ("assistant", "hello")),
        chat(("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        chat(("user", "a"), ("assistant", "b"), ("user", "thanks")),
        {"text": "once upon"},
        {"prompt": "", "response": "a time"},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "add 1 2", "input": "", "output": "3"},
        {"instruction": "add 1 2", "output": "3"},
        {"question": "2+2", "answer": "4", "source": "x"},
    )
    turns = chat(("system", "x"), ("user", "a"), ("assistant", "b"), ("user", "c"))["messages"]
    assert read(path) == [
        conversation("2+2", "4"),
        conversation("hi", "hello"),
        [*turns, {"role": "assistant", "content": "d"}],
        conversation("a", "b"),
        "once upon",
        "a time",
        conversation("add\n\n1 2", "3"),
        conversation("add 1 2", "3"),
        conversation("add 1 2", "3"),
        conversation("2+2", "4"),
    ]
    assert not capsys.readouterr().out


def test_s1k_is_framed_as_d1_does(tmp_path):
    row = {"question": "2+2?", "thinking_trajectories": ["hm", "no"], "attempt": "4", "cot": None}
    (found,) = read(write(tmp_path / "a.jsonl", row))
    assert not isinstance(found, str)
    assert found[0]["content"].startswith("\nRespond in the following format:\n<reasoning>")
    assert found[0]["content"].endswith("</answer>\n\n\n2+2?")
    assert found[1]["content"] == "<reasoning>hm</reasoning>\n<answer>4</answer>"


def test_text_file_is_one_response(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGr\u00fc\u00dfe\n\nzwei".encode())
    assert read(path) == ["Gr\u00fc\u00dfe\n\nzwei"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "a", "response": "b"', "line 3: not valid JSON: .* at column"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 3: a row needs .* the keys prompt, answer",
        ),
        ('{"prompt": 1, "response": "b"}', "line 3: .* strings .* prompt and response"),
        ("[1, 2]", "line 3: .* it is of type list"),
        ("null", "line 3: .* it is of type NoneType"),
        ("{}", "line 3: .*keys \\(none\\)"),
        (
            json.dumps(chat(("assistant", "a"), ("user", "b"))),
            "line 3: .*an assistant turn behind a user's",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "system"},
                        *chat(("user", "b"), ("assistant", "c"))["messages"],
                    ]
                }
            ),
            "line 3: .*the strings role and content each",
        ),
        (json.dumps(chat(("user", "b"))), "line 3: .*an assistant turn behind a user's"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, rule):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(ValueError, match=rule) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"must end in \.jsonl .* or \.txt"):
        data.parse_data("a.csv")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read(tmp_path / "empty.txt")


# Mixtures


def test_sources_and_shares(tmp_path):
    assert data.parse_data("a.jsonl") == [Source("a.jsonl")]
    assert data.parse_data("a.jsonl:2, b.txt:0.5") == [
        Source("a.jsonl", 2.0),
        Source("b.txt", 0.5),
    ]
    assert data.parse_data("owner/name@test:3") == [Source("owner/name", 3.0, "test")]
    assert data.parse_data("owner/name/main") == [Source("owner/name/main")]
    assert data.parse_data(str(tmp_path)) == [Source(str(tmp_path))]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a.jsonl:2,b.jsonl", "give each a share, or none"),
        ("a.jsonl:0", "share must be a number above 0, for example a.jsonl:2"),
        ("a.jsonl:x", "share must be a number above 0"),
        ("a.csv", "data=a.csv must end in"),
        ("a.jsonl,", "data= must end in"),
    ],
)
def test_impossible_sources_are_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        data.parse_data(text)


def test_a_hub_data_set_goes_through_datasets(monkeypatch):
    calls = []
    rows = [{"prompt": "a", "response": "b"}, {"text": "c"}, {"nothing": 1}]

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        if path == "not/there":
            raise RuntimeError("no such\ndata set")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data.load_rows.cache_clear()
    with pytest.raises(ValueError, match="owner/set/main, row 3: a row needs"):
        list(data.read(Source("owner/set/main", split="test")))
    rows.pop()
    assert list(data.read(Source("owner/set"))) == [conversation("a", "b"), "c"]
    assert calls == [("owner/set", "main", "test"), ("owner/set", None, "train")]
    with pytest.raises(ValueError, match="data=not/there@train cannot be loaded: no such data set"):
        list(data.read(Source("not/there")))
    data.load_rows.cache_clear()


def test_a_folder_is_a_data_set(tmp_path):
    write(
        tmp_path / "train.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}
    )
    write(tmp_path / "test.jsonl", {"prompt": "e", "response": "f"})
    source = data.parse_data(f"{tmp_path}@test")[0]
    assert list(data.read(source)) == [conversation("e", "f")]
    assert list(data.read(Source(str(tmp_path)))) == [
        conversation("a", "b"),
        conversation("c", "d"),
    ]
    assert data.fingerprint(source) != data.fingerprint(Source(str(tmp_path))) != ""


# Tasks


def generated(text: str, seed: int) -> list[data.Example]:
    tasks = data.parse_tasks(text)
    return [found for task in tasks for found in data.generated(task, tasks, 8, seed)]


def test_generated_tasks():
    one, two = data.parse_tasks("sudoku:1, countdown:3")
    assert (one.name, one.share, two.name, two.share) == ("sudoku", 1.0, "countdown", 3.0)
    found = generated("sudoku:1,countdown:3", 0)
    assert len(found) == 8 and found == generated("sudoku:1,countdown:3", 0)
    assert found != generated("sudoku:1,countdown:3", 1)


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
        data.parse_tasks(text)
