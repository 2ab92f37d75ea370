"""OpenAI's requests, read and checked; what is not served is refused by name."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jdllm.decode import DecodeConfig
from jdllm.runtime.fields import flatten, replaced
from jdllm.runtime.hints import asked, nearest
from jdllm.server.config import ServeConfig


class Refused(Exception):
    """A request that is not served: an HTTP status, and a sentence for its sender."""

    def __init__(self, status: int, sentence: str, param: str | None = None, code: str = ""):
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "error")
        facts = {"message": str(self), "type": kind, "param": self.param, "code": self.code or None}
        return {"error": facts}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    prompts: list[Any]
    """Conversations; of the older interface texts or token ids."""
    chat: bool
    decode: DecodeConfig
    stream: bool = False
    usage_in_stream: bool = False
    canvas: bool = False
    """Whether canvases in work are sent as well."""
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    priority: int = 0
    choices: tuple[str, ...] = ()
    """The answer is one of these."""
    schema: Mapping[str, Any] | None = None
    """The answer is JSON of this kind."""


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """A check for whole numbers of a range."""
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def number(low: float, high: float) -> Callable[[Any], bool]:
    """A check for numbers of a range."""
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


def flag(x: Any) -> bool:
    """Whether it is true or false."""
    return isinstance(x, bool)


def texts(x: Any) -> bool:
    """Whether it is one text or a few, none of them empty."""
    some = [x] if isinstance(x, str) else x
    return (
        isinstance(some, list) and len(some) <= 16 and all(isinstance(s, str) and s for s in some)
    )


def table(x: Any) -> bool:
    """Whether it is an object."""
    return isinstance(x, dict)


def anything(x: Any) -> bool:
    """True: the field is looked at elsewhere, or has no meaning here."""
    return True


SHARED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda x: isinstance(x, str), "a text"),
    "stream": (flag, "true or false"),
    "stream_options": (table, "an object"),
    "max_tokens": (whole(1, 1 << 20), "a whole number above 0"),
    "temperature": (number(0, 10), "a number from 0 to 10"),
    "top_p": (number(1e-6, 1), "a number above 0, at most 1"),
    "top_k": (whole(1, 1 << 20), "a whole number above 0"),
    "seed": (whole(-(1 << 63), (1 << 63) - 1), "a whole number of 64 bits"),
    "n": (whole(1, 1 << 10), "a whole number above 0"),
    "stop": (texts, "a text, or at most 16, none of them empty"),
    "priority": (whole(-100, 100), "a whole number from -100 to 100"),
    "decode": (table, "an object of decode settings"),
    "canvas": (flag, "true or false"),
    "user": (anything, ""),
    "metadata": (anything, ""),
    "store": (anything, ""),
    "safety_identifier": (anything, ""),
}
"""Fields of both interfaces: what they must be, and in words. From priority on some are ours."""
CHAT = SHARED | {
    "messages": (lambda x: isinstance(x, list) and bool(x), "a list of messages"),
    "max_completion_tokens": SHARED["max_tokens"],
    "logprobs": (flag, "true or false"),
    "top_logprobs": (whole(0, 0), "0: only the token that was taken has one"),
    "response_format": (table, "an object"),
    "answer": (table, 'an object {"choices": [...]}'),
}
COMPLETION = SHARED | {
    "prompt": (lambda x: isinstance(x, str | list) and bool(x), "a text, token ids, or several"),
    "logprobs": (whole(0, 1), "0 or 1: only the token that was taken has one"),
}
NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "web_search_options": (), "verbosity": (), "service_tier": ("auto",),
    "echo": (False,), "suffix": ("",), "best_of": (1,),
}  # fmt: skip
"""Fields that are not served, and the values that ask for nothing."""


def read(body: bytes, chat: bool, config: ServeConfig) -> Asked:
    """What a request asks for. Refused, with the field's name, where that is not served."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body must be a JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    known = CHAT if chat else COMPLETION
    for name, value in given.items():
        check(name, value, known)
    name = "messages" if chat else "prompt"
    if name not in given:
        raise Refused(400, f"{name} is missing", name)
    if given.get("model", config.title) != config.title:
        sentence = f"model={given['model']} is not served here, but {config.title}"
        raise Refused(404, sentence, "model", "model_not_found")
    if (n := given.get("n", 1)) > config.max_n:
        raise Refused(400, f"n={n} must be at most {config.max_n}", "n")
    options, form = given.get("stream_options", {}), read_format(given)
    stop = given.get("stop", [])
    return Asked(
        prompts=[conversation(given["messages"])] if chat else read_prompts(given["prompt"]),
        chat=chat,
        decode=read_decode(given, config.decode),
        stream=given.get("stream", False),
        usage_in_stream=bool(options.get("include_usage")),
        canvas=given.get("canvas", False),
        n=n,
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens")),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=given.get("logprobs", False) is not False,
        priority=given.get("priority", 0),
        choices=read_choices(given),
        schema=form,
    )


def check(name: str, value: Any, known: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Refused where a field is not served, or has no value that it may have."""
    if name in known:
        fits, words = known[name]
        if not fits(value):
            shown = json.dumps(value)
            raise Refused(400, f"{name}={shown[:80]} must be {words}", name)
    elif name in NOTHING:
        if value not in NOTHING[name]:
            raise Refused(400, f"{name} is not served here; leave it out", name)
    else:
        hint = asked(nearest(name, known)) or "leave it out"
        raise Refused(400, f"there is no field {name} here; {hint}", name)


def conversation(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose content is text. Refused where a part of one is not."""
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "a message is an object with role and content", "messages")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                raise Refused(400, "content must be text, or parts of type text", "messages")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise Refused(400, "the content of a message must be text", "messages")
        found.append({"role": message["role"], "content": content})
    return found


def read_prompts(prompt: Any) -> list[Any]:
    """One prompt or several, texts or token ids."""

    def ids(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(whole(0, 1 << 31)(i) for i in x)

    some = [prompt] if isinstance(prompt, str) or ids(prompt) else prompt
    if not all(isinstance(one, str) or ids(one) for one in some):
        raise Refused(400, "prompt must be a text, token ids, or several of one kind", "prompt")
    return some


def read_decode(given: Mapping[str, Any], decode: DecodeConfig) -> DecodeConfig:
    """The server's settings with those of the request."""
    settings = flatten(given.get("decode", {}))
    heat = given.get("temperature", settings.get("temperature", decode.temperature))
    if "temperature" in given:
        settings["temperature"] = float(heat)
    for name in ("top_p", "top_k"):
        if name in given and heat and given[name] != 1.0:  # what is greedy has no choice
            settings[name] = given[name]
    drawn = int.from_bytes(os.urandom(7)) if heat and not decode.seed else decode.seed
    settings["seed"] = given.get("seed", settings.get("seed", drawn))
    if "gen_length" in settings:
        raise Refused(400, "decode.gen_length is max_tokens here", "decode")
    try:
        DecodeConfig.of(settings)  # names what is no setting
        return replaced(decode, settings)
    except (ValueError, TypeError) as error:
        raise Refused(400, f"decode: {error}", "decode") from None


def read_format(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that the answer must follow; None where any text will do."""
    form = given.get("response_format", {"type": "text"})
    if form.get("type") == "text":
        return None
    if form.get("type") != "json_schema":
        raise Refused(400, "response_format must be of type text or json_schema", "response_format")
    schema = (form.get("json_schema") or {}).get("schema")
    if not isinstance(schema, dict):
        raise Refused(400, "response_format.json_schema.schema is missing", "response_format")
    return schema


def read_choices(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of which the answer is one; none where any text will do."""
    if "answer" not in given:
        return ()
    choices = given["answer"].get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 64 or not all(
        isinstance(choice, str) and choice for choice in choices
    ):  # fmt: skip
        raise Refused(400, "answer.choices must be 2 to 64 texts, none of them empty", "answer")
    if "response_format" in given:
        raise Refused(400, "answer and response_format exclude each other", "answer")
    return tuple(choices)
