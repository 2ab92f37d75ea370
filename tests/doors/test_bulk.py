"""Bulk generation: prompts from a file, completions into a folder, and going on after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

from jdllm import LLM, bulk, generation
from jdllm.bulk import complete_all, read_prompts
from jdllm.decode import DecodeConfig
from jdllm.generation import GenerateConfig, generate
from jdllm.runtime import cli
from jdllm.runtime.journal import Journal
from tests.support.tiny_models import tiny, write_small

DECODE = ["decode.gen_length=8", "decode.block_length=4", "decode.threshold=0.02", "mesh=1x1"]


def test_prompts_of_both_kinds(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    turns = [{"role": "user", "content": "x"}]
    lines = [{"prompt": "one"}, {"messages": turns}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(tmp_path / "a.jsonl") == ["one", turns]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompt"),
        ('{"prompt": 1}', r"line 1 must be"),
        ('{"prompt": "a"}\n[1]', r"line 2 must be"),
        ('{"prompt": "a", "messages": []}', r"line 1 must be"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_lines_that_are_none(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file=a.txt"], "name a folder for them"),
        (["prompt=a", "output=b"], "output= is for many prompts"),
        (["prompt=a", "executor=ray"], "executor= is for many prompts"),
        (["file=a.txt", "output=b", "prompt=c"], "prompt= is for one prompt"),
        (["file=a.txt", "output=b", "viz=live"], "viz= is for one prompt"),
        (["file=a.txt", "output=b", "batch_size=0"], "batch_size=0 must be 1"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        cli.parse(GenerateConfig, words)
    assert message in capsys.readouterr().err


def test_a_kill_costs_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was finished is not done again, repeats draw anew, and nothing differs from one call."""
    llm, rows = tiny(), [[2, 3, 4], [5, 6], [2, 3, 4], [7, 8, 9, 10], [2, 3, 4]]
    decode = DecodeConfig(gen_length=8, block_length=4, threshold=0.3, temperature=0.7)
    wanted = [done.ids for done in llm.generate(rows, decode)]
    asked: list[int] = []
    stream = LLM.stream

    def counted(self: LLM, prompts: Any, *own: Any, **more: Any) -> Any:
        for number, batch in enumerate(stream(self, prompts, *own, **more)):
            if not asked and number == 1:
                asked.append(len(prompts))
                raise KeyboardInterrupt
            yield batch
        asked.append(len(prompts))

    monkeypatch.setattr(LLM, "stream", counted)
    path = tmp_path / "finished.jsonl"
    with pytest.raises(KeyboardInterrupt):
        complete_all(llm, rows, decode, Journal(path), batch_size=2)
    kept = len(Journal(path).records)
    found = complete_all(llm, rows, decode, Journal(path), batch_size=2)
    assert [one["ids"] for one in found] == wanted
    assert asked == [5, 5 - kept] and 0 < kept < 5


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(generation, "enable_compilation_cache", lambda: None)
    model = write_small(tmp_path / "model", 64)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    words = [f"file={tmp_path / 'a.txt'}", f"output={tmp_path / 'out'}", f"model={model}", *DECODE]
    config = cli.parse(GenerateConfig, words)
    assert "the same command goes on" in config.going_on
    generate(config)
    text = (tmp_path / "out" / bulk.COMPLETIONS).read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [one["prompt"] for one in found] == ["one", "two", "three"]
    alone = LLM.load(str(model), "1x1").generate(["one", "two", "three"], config.decode)
    assert [one["text"] for one in found] == [completion.text for completion in alone]
    generate(config)
    assert "3 prompts are finished" in capsys.readouterr().err
    assert (tmp_path / "out" / bulk.COMPLETIONS).read_text() == text
