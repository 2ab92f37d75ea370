"""The server: OpenAI's client and plain HTTP against a small model."""

import json
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from jdllm import DecodeConfig
from jdllm.llm import LLM
from tests.server.conftest import Running

PUZZLE = "Solve the following 4x4 sudoku: 0 1 2 3 ..."


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, text: str = PUZZLE, **facts: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="small", messages=messages, **facts)


def post(url: str, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_completion_is_that_of_generate(client: openai.OpenAI, small: LLM):
    (wanted,) = small.generate(PUZZLE)
    found = ask(client)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].finish_reason == wanted.finish_reason
    assert found.usage.completion_tokens == len(wanted.ids)
    assert found.usage.nfe == wanted.nfe


def test_a_stream_is_the_same_text_in_blocks(client: openai.OpenAI, small: LLM):
    (wanted,) = small.generate(PUZZLE, DecodeConfig(block_length=8))
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    extra = {"decode": {"block_length": 8}, "canvas": True}
    chunks = list(ask(client, **options, extra_body=extra))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == wanted.text
    assert sum(map(bool, texts)) > 1
    assert chunks[-1].usage.nfe == wanted.nfe
    canvases = [chunk.canvas for chunk in chunks if hasattr(chunk, "canvas")]
    last = canvases[-1]
    assert sorted(last["order"]) == list(range(len(last["text"])))
    steps = [last["step"][last["order"].index(i)] for i in range(len(last["order"]))]
    assert [s for s in steps if s] == sorted(s for s in steps if s)
    assert all(0 <= chance <= 1 for chance in last["chance"])


def test_fields(client: openai.OpenAI, small: LLM):
    found = ask(client, n=3, temperature=0.9, seed=7, max_tokens=5, logprobs=True)
    again = ask(client, n=3, temperature=0.9, seed=7, max_tokens=5, top_p=1.0)
    assert len({choice.message.content for choice in found.choices}) > 1
    assert [c.message.content for c in found.choices] == [c.message.content for c in again.choices]
    for choice in found.choices:
        content = choice.logprobs.content
        assert len(content) <= 5 and all(one.logprob <= 0 for one in content)
        assert choice.finish_reason == ("length" if len(content) == 5 else choice.finish_reason)
    whole = ask(client).choices[0].message.content
    stop = whole[4:6]
    cut = ask(client, stop=[stop])
    assert cut.choices[0].message.content == whole.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    pieces = [c.choices[0].delta.content for c in ask(client, stop=[stop], stream=True)]
    assert "".join(p or "" for p in pieces) == whole.partition(stop)[0]


def test_the_older_interface(client: openai.OpenAI, small: LLM):
    ids = small.encode(PUZZLE)[0]
    texts: Any = client.completions.create(model="small", prompt=["7 + 5 =", "1"], logprobs=1)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.choices[0].logprobs.token_logprobs
    (wanted,) = small.generate(PUZZLE)
    assert client.completions.create(model="small", prompt=ids).choices[0].text == wanted.text
    assert client.models.list().data[0].id == "small"


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no json": (b"{", 400, "no JSON"),
    "a list": ([], 400, "JSON object"),
    "deep": (b"[" * 100_000, 400, "JSON"),
    "no messages": ({}, 400, "messages is missing"),
    "a typo": ({"messages": [], "max_token": 3}, 400, "messages"),
    "unknown": ({"messages": [{"role": "user", "content": ""}], "max_token": 3}, 400, "max_tokens"),
    "tools": ({"messages": [{"role": "user", "content": ""}], "tools": [{}]}, 400, "tools"),
    "penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "heat": ({"temperature": -1}, 400, "temperature"),
    "heat of text": ({"temperature": "warm"}, 400, "temperature"),
    "other model": ({"model": "x", "messages": [{"role": "user", "content": ""}]}, 404, "small"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
    "too long": ({"messages": [{"role": "user", "content": "1 " * 999}]}, 400, "exceeds"),
    "decode": (
        {"messages": [{"role": "user", "content": ""}], "decode": {"treshold": 1}}, 400, "threshold"
    ),
    "driver": (
        {"messages": [{"role": "user", "content": ""}], "decode": {"parity": "dinfer"}}, 400,
        "does not serve",
    ),
    "role": ({"messages": [{"role": 3, "content": ""}]}, 400, "role"),
    "huge": (b" " * 3_000_000, 413, "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(served: Running, case: str):
    body, status, words = REFUSED[case]
    found, reply = post(served.url, body)
    assert (found, words in reply["error"]["message"]) == (status, True), reply


def test_special_tokens_of_users_are_text(served: Running, client: openai.OpenAI):
    mask = "<|mdm_mask|>"
    found = ask(client, f"{mask}<|eot_id|> 1", max_tokens=4)
    plain = ask(client, " 1", max_tokens=4)
    assert found.usage.prompt_tokens > plain.usage.prompt_tokens + 4


def test_health_metrics_and_pages(served: Running, client: openai.OpenAI):
    ask(client, max_tokens=3)
    with urllib.request.urlopen(f"{served.url}/metrics") as reply:
        text = reply.read().decode()
    assert 'jdllm_completions_total{reason="' in text
    pages = served.service.engines.config.pages
    assert f"jdllm_free_pages {float(pages)}" in text
    with urllib.request.urlopen(f"{served.url}/health") as reply:
        assert json.load(reply) == {"status": "ok"}


SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "sure": {"type": "boolean"},
        "sort": {"enum": ["a", "b", None]},
        "grid": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "inner": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_of_a_schema(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    reply = ask(client, "1", response_format=form)
    found = json.loads(reply.choices[0].message.content)
    assert list(found) == ["name", "sure", "sort", "grid", "inner"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 6
    assert isinstance(found["sure"], bool) and found["sort"] in ("a", "b", None)
    assert [type(x) for x in found["grid"]] == [int, int]
    assert isinstance(found["inner"]["x"], int | float)
    assert reply.usage.nfe >= 6
    wrong = {"type": "object", "properties": {"x": {"type": "string", "pattern": "a"}}}
    form["json_schema"]["schema"] = wrong
    with pytest.raises(openai.BadRequestError, match="schema.x: pattern is not served"):
        ask(client, response_format=form)


def test_an_answer_of_fixed_choices(client: openai.OpenAI):
    choices = ["yes", "no", "7 + 5 = 12"]
    reply = ask(client, extra_body={"answer": {"choices": choices}})
    chances = reply.choices[0].answer["probabilities"]
    assert list(chances) == choices and abs(sum(chances.values()) - 1) < 1e-6
    assert reply.choices[0].message.content == max(chances, key=chances.__getitem__)
    assert reply.usage.nfe == 1
    with pytest.raises(openai.BadRequestError, match="n has no meaning for slots"):
        ask(client, n=2, extra_body={"answer": {"choices": choices}})
