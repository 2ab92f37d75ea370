"""The generate command: what it prints, shows and writes, and the player in the terminal."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from jdllm import generation
from jdllm.decode import DecodeConfig
from jdllm.generation import GenerateConfig, generate
from jdllm.llm import LLM
from jdllm.runtime import cli
from jdllm.viz import show, trace
from jdllm.viz.pieces import Lexicon
from jdllm.viz.show import Cell, Player, crop, layout
from jdllm.viz.trace import Record, Run
from tests.support.tiny_models import write_small

DECODE = DecodeConfig(gen_length=8, block_length=4, threshold=0.02)
MASK, END = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with random weights and the bundled tokenizer."""
    return write_small(tmp_path_factory.mktemp("model"), 32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(generation, "enable_compilation_cache", lambda: None)


def config(folder: Path, **settings) -> GenerateConfig:
    return GenerateConfig(prompt="1 2 3", model=str(folder), decode=DECODE, mesh="1x1", **settings)


def make_record(*canvases: list[int], prompt_length: int = 0) -> Record:
    """A record in which every call looks at everything and is 0.75 sure of what comes next."""
    tokens = np.array(canvases, np.int32)
    calls, length = len(tokens) - 1, tokens.shape[1]
    sure = np.full((calls, length), 0.75, np.float32)
    columns = np.tile(np.arange(length, dtype=np.int32), (calls, 1))
    return Record(tokens, columns, tokens[1:], sure, sure, prompt_length, MASK)


RECORD = make_record([7, 0, 0, 0], [7, 0, 2, 0], [7, 3, 2, 0], [7, 3, 2, 1], prompt_length=1)
PIECES = Lexicon(None, MASK, [END])


# ---- the command


def test_a_watched_run_prints_and_writes(folder: Path, tmp_path: Path, capsys):
    files = {"trace": tmp_path / "deep" / "run.jsonl", "html": tmp_path / "run.html"}
    generate(config(folder, viz="live", **files))
    out, said = capsys.readouterr()
    shown, _, rest = out.partition("\n\n")
    wanted = LLM.load(str(folder), "1x1").generate(["1 2 3"], DECODE)[0]
    assert rest == f"{wanted.text}\n"
    assert f"finish {wanted.finish_reason}, " in said and f"NFE {wanted.nfe}," in said
    run = trace.read(files["trace"])
    assert shown.split("\n") == [
        show.plain(run.record, call, run.pieces) for call in range(wanted.nfe + 1)
    ]
    assert run.about["completion"] == wanted.text and run.about["prompt"] == "1 2 3"
    assert run.about["decode"]["gen_length"] == 8
    assert run.about["environment"]["jdllm"] == "0.1.0"
    final = run.record.tokens[-1][run.record.prompt_length :].tolist()
    assert final[: len(wanted.ids)] == wanted.ids
    assert "<title>1 2 3" in files["html"].read_text()
    assert not list(tmp_path.rglob("*.partial*"))

    again = tmp_path / "again.html"
    generate(GenerateConfig(replay=files["trace"], viz="live", html=again))
    assert capsys.readouterr().out == f"{shown}\n\n{wanted.text}\n"
    assert again.read_text() == files["html"].read_text()


def test_the_documented_reader_reads(tmp_path: Path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "generate.md"
    code = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)[0]
    trace.write(tmp_path / "run.jsonl", Run(RECORD, PIECES, {}))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == (
        "1 2 '<2>' text 0.75\n2 1 '<3>' text 0.75\n3 3 '<1>' end 0.75\n"
    )


def test_a_system_prompt_is_a_turn_of_its_own(folder: Path, monkeypatch, capsys):
    """As its messages in Python; the JSON tells both."""
    framed = []
    encode = LLM.encode
    monkeypatch.setattr(LLM, "encode", lambda *a, **k: framed.append(encode(*a, **k)) or framed[-1])
    generate(config(folder, system="Short.", json=True))
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt"], facts["system"]) == ("1 2 3", "Short.")
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "1 2 3"}]
    llm = LLM.load(str(folder), mesh="1x1")
    assert framed[-1] == encode(llm, [turns]) != encode(llm, ["1 2 3"])


def test_a_model_without_a_tokenizer_takes_and_gives_ids(capsys):
    llm = LLM.load("random:tiny", mesh="1x1")
    (completion,) = llm.generate([[1, 2, 3]], DECODE)
    asked = GenerateConfig(prompt="1 2 3", model="random:tiny", decode=DECODE, mesh="1x1")
    for viz in ("none", "live"):
        generate(dataclasses.replace(asked, viz=viz))
        assert capsys.readouterr().out.rstrip().endswith(" ".join(map(str, completion.ids)))
    generate(dataclasses.replace(asked, json=True))
    assert json.loads(capsys.readouterr().out)["completion"] == " ".join(map(str, completion.ids))
    for wrong in ({"prompt": "1 two"}, {"system": "Be brief."}):
        with pytest.raises(ValueError, match="token ids"):
            generate(dataclasses.replace(asked, **wrong))


def test_what_is_not_watched_is_not_recorded(folder: Path, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("nobody asked for a record")

    monkeypatch.setattr(trace, "cut", fail)
    generate(config(folder))
    assert "finish" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="nobody asked"):
        generate(config(folder, viz="live"))


def test_an_interrupted_run_leaves_no_file(folder: Path, tmp_path: Path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "cut", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(config(folder, trace=tmp_path / "run.jsonl"))
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["prompt=x", "viz=alive"], "viz"),
        (["prompt=x", "fps=0"], "fps=0.0 must lie above 0"),
        (["prompt=x", "trace=a", "html=a"], "trace and html are both a"),
        (["prompt=x", "html=."], "html=. is a folder; name a file"),
        (["prompt=x", "system=y", "chat=false"], "system= needs the chat template"),
        (["replay=a"], "add viz=live or html=FILE"),
        (["replay=a", "prompt=x", "viz=live"], "leave prompt and trace out"),
        (["replay=a", "trace=b", "viz=live"], "leave prompt and trace out"),
    ],
)
def test_settings_that_make_no_sense(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(GenerateConfig, words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- the player


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def terminal(**settings) -> Console:
    settings = {"width": 40, "height": 10, "color_system": "truecolor"} | settings
    return Console(file=io.StringIO(), force_terminal=True, highlight=False, **settings)


def play(player: Player, *stretches: Record) -> str:
    with player:
        for stretch in stretches:
            player(stretch)
    player.finish("the text")
    return player.console.file.getvalue()  # type: ignore


def test_the_terminal_shows_every_call_at_the_pace_and_gives_the_cursor_back():
    clock = Clock()
    out = play(Player(PIECES, 10, console=terminal(), clock=clock, sleep=clock.sleep), RECORD)
    places = [out.index(f"call {call}, ") for call in range(4)]
    assert places == sorted(places)
    assert sum(clock.slept) == pytest.approx(0.3)
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1
    assert out.rindex("\x1b[?25h") > places[-1]
    red, green, blue = show.colour(0.75).color.triplet  # type: ignore
    assert f"38;2;{red};{green};{blue}" in out
    assert "the text" not in out, "the coloured completion stands for it"


def test_stretches_are_joined_and_no_call_is_shown_twice():
    view = {name: getattr(RECORD, name) for name in trace.LOOKS}
    first, last = (
        dataclasses.replace(RECORD, tokens=tokens, **{n: x[part] for n, x in view.items()})
        for part, tokens in (
            (slice(0, 1), RECORD.tokens[:2]),
            (slice(1, None), RECORD.tokens[1:]),
        )
    )
    whole, halves = (
        play(Player(PIECES, console=Console(file=io.StringIO(), force_terminal=False)), *parts)
        for parts in ([RECORD], [first, last])
    )
    assert whole == halves
    assert whole == (
        "call   0  ···\ncall   1  ·<2>·\ncall   2  <3><2>·\ncall   3  <3><2>∎\n\nthe text\n"
    )


def test_a_slow_terminal_leaves_calls_out_but_not_the_last():
    class Slow(Player):
        def frame(self, record: Record, call: int):
            clock.now += 0.3  # drawing takes three times as long as a call may be shown
            return super().frame(record, call)

    clock = Clock()
    many = make_record(*[[2 if i < n else 0 for i in range(20)] for n in range(21)])
    out = play(Slow(PIECES, 10, console=terminal(), clock=clock, sleep=clock.sleep), many)
    shown = sum(f"call {call}, " in out for call in range(21))
    assert 5 < shown < 12
    assert "call 20, " in out
    assert clock.now < 21 / 10 + 1


def test_ctrl_c_ends_the_animation_and_then_the_run():
    clock, before = Clock(), signal.getsignal(signal.SIGINT)

    def interrupt(seconds: float) -> None:
        clock.now += seconds
        signal.raise_signal(signal.SIGINT)

    player = Player(PIECES, 10, console=terminal(), clock=clock, sleep=interrupt)
    out = play(player, RECORD, dataclasses.replace(RECORD, tokens=RECORD.tokens[::-1]))
    assert out.count("\x1b[?25h") == 1
    assert "call 0, " in out and "call 1, " not in out and "Ctrl-C again ends it" in out
    assert player.record.calls == 6
    with pytest.raises(KeyboardInterrupt), player:
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_calls_ends_the_run():
    with pytest.raises(KeyboardInterrupt), Player(PIECES, console=terminal()):
        signal.raise_signal(signal.SIGINT)


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    clock = Clock()
    out = play(Player(PIECES, 10, console=terminal(), clock=clock, sleep=clock.sleep), RECORD)
    assert "38;" not in out and "call 3, " in out


def test_a_dumb_terminal_gets_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = play(Player(PIECES, console=terminal()), RECORD)
    assert "\x1b" not in out and "the text" in out


WORDS = st.text("ab 世😀\n", max_size=9)


@settings(max_examples=80, deadline=None)
@given(words=st.lists(WORDS, max_size=20), width=st.integers(2, 12), fresh=st.integers(0, 19))
def test_lines_fit_and_lose_nothing(words: list[str], width: int, fresh: int):
    row = [Cell(word, Style(), "text", i == fresh) for i, word in enumerate(words)]
    lines, focus = layout(row, width)
    assert all(cell_len(line.plain) <= width for line in lines)
    text = "".join(line.plain for line in lines)
    assert text.replace(" ", "") == "".join(words).replace(" ", "").replace("\n", "")
    last = words[fresh].replace(" ", "").split("\n")[-1] if fresh < len(words) else ""
    assert last[-1:] in lines[focus].plain
    for height in (1, 3):
        kept = crop(lines, focus, height).plain.split("\n")
        assert len(kept) == min(height, len(lines))
        assert lines[focus].plain in kept


def test_indentation_survives_a_full_line_before_it():
    row = [Cell(text, Style(), "text", False) for text in ("abcd", "\n  ", " e", " fg")]
    assert [line.plain for line in layout(row, 6)[0]] == ["abcd", "   e", "fg"]


def read_until(terminal: int, wanted: bytes, seconds: float = 60) -> bytes:
    """What comes out of a pseudo-terminal up to `wanted`, or its end."""
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            seen += data
    return seen


def test_ctrl_c_in_a_real_terminal(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    trace.write(path, Run(RECORD, PIECES, {"completion": "x", "prompt": "y"}))
    ours, theirs = pty.openpty()
    words = [f"replay={path}", "viz=live", "fps=0.02", f"html={tmp_path / 'run.html'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jdllm.generate", *words],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"TERM": "xterm-256color", "XLA_FLAGS": ""},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(theirs)
    seen = read_until(ours, b"call 0, ")
    process.send_signal(signal.SIGINT)
    seen += read_until(ours, b"never to be seen", 30)
    assert process.wait(30) == 0
    os.close(ours)
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1
    assert b"Traceback" not in seen and b"call 1, " not in seen
    assert json.loads(path.read_text().split("\n")[0])["calls"] == 3
    assert (tmp_path / "run.html").exists(), "what was asked for is written all the same"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode.preset=apd"], "name it, verifier=FOLDER"),
        (["verifier=FOLDER"], "is asked by decode.rule=verify alone"),
    ],
)
def test_a_verifier_and_its_rule_come_together(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        cli.parse(GenerateConfig, ["prompt=x", *words], "prog")
    assert message in capsys.readouterr().err
