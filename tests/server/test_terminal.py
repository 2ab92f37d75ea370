"""The chat in a terminal, against a server and with a model of its own."""

import io
from pathlib import Path

import pytest

from jdllm import DecodeConfig
from jdllm.llm import LLM
from jdllm.server import config
from jdllm.server.terminal import ChatConfig, chat, drawn
from tests.server.conftest import Running
from tests.support.tiny_models import write_small


def test_a_talk_goes_on(
    served: Running, small: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Each message sees those before it; what is refused ends nothing; /new forgets."""
    lines = ["7 + 5 =", "and 1?", "1 " * 999, "/new", "7 + 5 =", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat(ChatConfig(url=served.url, max_tokens=6))
    out, err = capsys.readouterr()
    block = small.resolve().block_length
    (reply,) = small.generate(lines[0], DecodeConfig(gen_length=6, block_length=block))
    assert out.startswith(f"{reply.text}\n") and out.endswith(f"{reply.text}\n")
    assert err.count("error:") == 1 and "exceeds" in err


def test_errors_are_sentences(served: Running):
    with pytest.raises(OSError, match="does not answer"):
        chat(ChatConfig(url="http://127.0.0.1:9", prompt="1"))
    with pytest.raises(ValueError, match="must begin with http"):
        ChatConfig(url="127.0.0.1")


def test_a_canvas_is_drawn():
    canvas = {"text": ["a", None, "b"], "step": [1, 0, 2]}
    assert drawn(canvas).plain == "a·b"


@pytest.mark.slow
def test_a_model_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    chat(ChatConfig(model=str(write_small(tmp_path / "small", 64)), prompt="1", max_tokens=4))
    assert capsys.readouterr().out.strip()


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config, "find_spec", lambda name: name != "uvicorn")
    with pytest.raises(ValueError, match=r"serving needs uvicorn: pip install 'jdllm\[serve\]'"):
        chat(ChatConfig(prompt="1"))
