"""Structured answers: one of some choices, or JSON of a schema, whose fixed text stands already.

The skeleton of the JSON is given; the model fills the slots between, from left to right. What
comes out is always JSON of the schema, whatever the model says.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jdllm.completion import pieces
from jdllm.engine.slots import Around, choose, complete
from jdllm.llm import LLM
from jdllm.model.model import Model
from jdllm.server.openai import Refused

STRING, DIGITS = 24, 12  # columns of a slot
MOST = 128  # slots of an answer
Kind = Literal["string", "integer", "number"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A slot for one of some texts."""

    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Free:
    """A slot for a text or a number."""

    kind: Kind
    columns: int


Part = str | Choice | Free

HANDLED = {
    "type", "properties", "required", "additionalProperties", "enum", "const", "items",
    "prefixItems", "minItems", "maxItems", "maxLength", "title", "description", "default",
    "$schema", "strict", "name", "examples",
}  # fmt: skip


def parts_of(schema: Any, where: str = "schema") -> Iterator[Part]:
    """The skeleton of a schema: its fixed text, and the slots between.

    Refused, with the word's name, for what has no fixed skeleton.
    """
    if not isinstance(schema, Mapping):
        raise Refused(400, f"{where} must be an object", "response_format")
    if unknown := sorted(set(schema) - HANDLED):
        raise Refused(400, f"{where}: {unknown[0]} is not served", "response_format")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not 1 <= len(values) <= 64:
            raise Refused(400, f"{where}: enum must be a list of 1 to 64 values", "response_format")
        texts = tuple(json.dumps(value, ensure_ascii=False) for value in values)
        yield texts[0] if len(texts) == 1 else Choice(texts)
        return
    kind = schema.get("type")
    if kind == "object":
        yield from _object(schema, where)
    elif kind == "array":
        yield from _array(schema, where)
    elif kind == "string":
        most = schema.get("maxLength", STRING)
        if not isinstance(most, int) or most < 1:
            raise Refused(400, f"{where}: maxLength must be above 0", "response_format")
        yield from ('"', Free("string", min(most, 4 * STRING)), '"')
    elif kind in ("integer", "number"):
        yield Free(kind, DIGITS)
    elif kind == "boolean":
        yield Choice(("true", "false"))
    elif kind == "null":
        yield "null"
    else:
        raise Refused(400, f"{where}: type={kind} is not served", "response_format")


def _object(schema: Mapping[str, Any], where: str) -> Iterator[Part]:
    """An object with all its properties, in order."""
    properties, more = schema.get("properties"), schema.get("additionalProperties")
    if not isinstance(properties, Mapping) or more not in (None, False):
        words = f"{where}: an object needs properties, and no additionalProperties"
        raise Refused(400, words, "response_format")
    yield "{"
    for number, (name, inner) in enumerate(properties.items()):
        yield f"{', ' * bool(number)}{json.dumps(name, ensure_ascii=False)}: "
        yield from parts_of(inner, f"{where}.{name}")
    yield "}"


def _array(schema: Mapping[str, Any], where: str) -> Iterator[Part]:
    """An array whose length is known."""
    inner = schema.get("prefixItems")
    if inner is None:
        count = schema.get("minItems")
        if not isinstance(count, int) or count != schema.get("maxItems") or not 0 <= count <= MOST:
            words = f"{where}: an array needs prefixItems, or minItems equal to maxItems"
            raise Refused(400, words, "response_format")
        inner = [schema.get("items", {})] * count
    yield "["
    for number, item in enumerate(inner):
        if number:
            yield ", "
        yield from parts_of(item, f"{where}[{number}]")
    yield "]"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the slots became."""

    text: str
    chances: dict[str, float]
    """Of a lone choice: the probability of each text."""
    nfe: int
    prompt: int
    tokens: int


class Structured:
    """Fills the slots of answers."""

    def __init__(self, llm: LLM, model: Model):
        """`model` is the one that computes: a replica of the library's."""
        self.llm, self.model = llm, model

    def answer(self, prompt: Sequence[int], parts: Sequence[Part], room: int) -> Answer:
        """An answer of these parts, in at most `room` columns with its prompt. Refused where they
        do not fit."""
        slots = [part for part in parts if not isinstance(part, str)]
        if len(slots) > MOST:
            raise Refused(400, f"an answer has at most {MOST} slots", "response_format")
        width = len(prompt) + sum(len(self._masked(part)) for part in parts)
        if width > room:
            raise Refused(400, f"prompt and answer take {width} columns of {room}", None,
                          "context_length_exceeded")  # fmt: skip
        done, chances, nfe = "", dict[str, float](), 0
        for number, part in enumerate(parts):
            if isinstance(part, str):
                done += part
                continue
            behind = [i for other in parts[number + 1 :] for i in self._masked(other)]
            ends = [self.llm.config.eos_id]
            around = Around([*prompt, *self._ids(done)], [*behind, *ends])
            if isinstance(part, Choice):
                found = choose(self.model, around, [self._ids(text) for text in part.texts])
                chances = dict(zip(part.texts, found.tolist(), strict=True))
                done, nfe = done + part.texts[int(found.argmax())], nfe + 1
            else:
                ids, calls = complete(self.model, around, self._allowed(part))
                done, nfe = done + self._value(part, ids), nfe + calls
        lone = len(parts) == 1 and bool(slots)
        return Answer(done, chances if lone else {}, nfe, len(prompt), len(self._ids(done)))

    def _ids(self, text: str) -> list[int]:
        options: Any = {"add_special_tokens": False, "split_special_tokens": True}
        return self.llm.tokenizer(text, **options)["input_ids"] if text else []  # pyright: ignore[reportOptionalCall]

    def _masked(self, part: Part) -> list[int]:
        """A part as one sees it before it is filled."""
        if isinstance(part, str):
            return self._ids(part)
        longest = max(len(self._ids(t)) for t in part.texts) if isinstance(part, Choice) else 0
        columns = longest if isinstance(part, Choice) else part.columns
        return [self.llm.config.mask_id] * columns

    @functools.cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """By kind: which tokens [V] may stand in a slot, and which end one."""
        V, special = self.llm.config.vocab, set(self.llm.tokenizer.all_special_ids)  # pyright: ignore[reportOptionalMemberAccess]
        texts = pieces(self.llm.tokenizer, V)
        plain = [(i, text) for i, text in enumerate(texts) if i not in special and text]

        def among(fits: Any) -> np.ndarray:
            table = np.zeros(V, bool)
            table[[i for i, text in plain if fits(text)]] = True
            return table

        end = among(lambda t: t[0] == '"')
        end[self.llm.config.eos_id] = True
        return {
            "string": among(lambda t: t.isprintable() and not set(t) & {'"', "\\", "\ufffd"}),
            "digits": among(lambda t: t.isascii() and t.isdigit()),
            "first": among(lambda t: re.fullmatch(r"-?[0-9]+", t)),
            "point": among(lambda t: t == "."),
            "end": end,
        }

    def _allowed(self, part: Free) -> np.ndarray:
        """Which tokens [N, V] may stand in the columns of a slot."""
        tables = self._tables
        if part.kind == "string":
            return np.broadcast_to(tables["string"] | tables["end"],
                                   (part.columns, len(tables["end"])))  # fmt: skip
        more = tables["digits"] | tables["end"]
        more = more | tables["point"] if part.kind == "number" else more
        if not tables["first"].any():
            raise Refused(400, "this model has no tokens for digits", "response_format")
        return np.stack([tables["first"], *[more] * (part.columns - 1)])

    def _value(self, part: Free, ids: Sequence[int]) -> str:
        """The tokens of a slot as JSON, without its quotes."""
        ends = [i for i, token in enumerate(ids) if self._tables["end"][token]]
        text = self.llm.tokenizer.decode(ids[: min(ends, default=len(ids))])  # pyright: ignore[reportOptionalMemberAccess]
        if part.kind == "string":
            return json.dumps(text.strip()[: part.columns], ensure_ascii=False)[1:-1]
        found = re.match(r"\s*(-?[0-9]+(?:\.[0-9]+)?)", text)
        number = found[1] if found else "0"
        value: Any = float(number) if part.kind == "number" and "." in number else None
        return json.dumps(value if value is not None else int(number.partition(".")[0]))
