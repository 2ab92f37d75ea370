"""A chat in the terminal, with a server or with a model of its own."""

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jdllm.arguments import ModelArgs
from jdllm.decode import DecodeConfig
from jdllm.engine import EngineConfig
from jdllm.runtime.fields import leaves


@dataclasses.dataclass(frozen=True)
class ChatConfig(ModelArgs):
    """A chat in the terminal."""

    url: str = ""
    """A server's address, http://127.0.0.1:8000 say (default: the model runs here)."""
    api_key: str = ""
    """What that server asks for (default: the variable JDLLM_API_KEY)."""
    prompt: str = ""
    """One message to answer; then the command ends."""
    max_tokens: int | None = None
    """Tokens of a reply at most (default: the model's own length)."""
    decode: DecodeConfig = DecodeConfig()
    """How to decode."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 1 or more")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url} must begin with http:// or https://")


def chat(config: ChatConfig) -> None:
    """Reads messages and shows replies until the input ends; ValueError as the server says."""
    with contextlib.ExitStack() as stack:
        url, key = config.url.rstrip("/"), config.api_key or os.environ.get("JDLLM_API_KEY", "")
        if not url:
            url, key = stack.enter_context(own_server(config))
        talk = Talk(url, key, config)
        if config.prompt:
            talk.say(config.prompt)
            return
        print("/new begins anew; end with Ctrl-D", file=sys.stderr)
        while (text := ask()) is not None:
            if text == "/new":
                talk.messages.clear()
            elif text:
                try:
                    talk.say(text)
                except ValueError as error:  # the talk goes on
                    print(f"error: {error}", file=sys.stderr)


def ask() -> str | None:
    """The next message; None where the input ends."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@contextlib.contextmanager
def own_server(config: ChatConfig) -> Iterator[tuple[str, str]]:
    """The address and the key of a server of this process, for as long as the block lasts."""
    from jdllm.server.config import ServeConfig, need_packages

    need_packages()
    from jdllm.server.run import background, listen, prepare

    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelArgs)}
    key = secrets.token_urlsafe()
    own = ServeConfig(**shared, port=0, api_key=key, engine=EngineConfig(slots=1), warm=False)
    listener = listen(own)
    with background(prepare(own), listener) as url:
        yield url, key


class Talk:
    """The messages so far, and whom they are exchanged with."""

    def __init__(self, url: str, key: str, config: ChatConfig):
        self.url, self.key, self.config = url, key, config
        self.messages: list[dict[str, str]] = []
        self.console = Console(highlight=False)
        self.model = json.load(self.open("/v1/models"))["data"][0]["id"]

    def open(self, path: str, body: Any = None) -> Any:
        """The server's reply. ValueError with what it says, OSError where it says nothing."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(json.load(error)["error"]["message"]) from None
        except urllib.error.URLError as error:
            raise OSError(f"{self.url} does not answer: {error.reason}") from None

    def say(self, text: str) -> None:
        """Sends a message and shows the reply as it comes about."""
        messages = [*self.messages, {"role": "user", "content": text}]
        default, decode = leaves(DecodeConfig()), leaves(self.config.decode)
        body = {
            "model": self.model, "messages": messages, "stream": True, "canvas": True,
            "decode": {name: value for name, value in decode.items() if value != default[name]},
            "max_tokens": self.config.max_tokens,
        }  # fmt: skip
        whole = ""
        with self.open("/v1/chat/completions", body) as reply, self.live() as live:
            for event in events(reply):
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                for choice in event["choices"]:
                    whole += choice["delta"].get("content") or ""
                if live and "canvas" in event:
                    live.update(drawn(event["canvas"]))
            if live:
                live.update(Text(whole))
        if not self.console.is_terminal:
            print(whole)
        self.messages = [*messages, {"role": "assistant", "content": whole}]

    def live(self) -> Any:
        """What shows canvases, where there is a terminal."""
        if not self.console.is_terminal:
            return contextlib.nullcontext()
        return Live(console=self.console, auto_refresh=False, vertical_overflow="visible")


def events(reply: Any) -> Iterator[dict[str, Any]]:
    """The server-sent events of a reply."""
    for line in reply:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def drawn(canvas: dict[str, Any]) -> Text:
    """A canvas in work: open columns are dots, what the last call wrote is bold."""
    steps: Sequence[int] = canvas["step"]
    newest, text = max(steps, default=0), Text()
    for piece, step in zip(canvas["text"], steps, strict=True):
        if piece is None:
            text.append("·", "dim")
        else:
            text.append(piece, "bold" if step == newest else "")
    return text
