"""Text to ids and back: the Hugging Face tokenizer beside the weights, and its chat template."""

import functools
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdllm.runtime.files import write_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    # of a repository without tokenizer.json, which is made of them
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# Within a special token that somebody wrote: it keeps that token text while the template's own are
# found. Unicode leaves these two to a program's own use, so that no text has them.
MARK = "\ufdd0\ufdd1"
Message = Mapping[str, Any]
# How Qwen2 cuts text into words before it merges bytes: contractions, letters with one sign before
# them, single digits, runs of signs, line ends, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
LENGTHS = {"gen_length": "max_new_tokens", "block_length": "block_length"}
# What a tokenizer made of vocab.json and merges.txt does not take from that file: the tokens, which
# it holds itself, and the names of the repository's own code.
NOT_KEPT = {"added_tokens_decoder", "auto_map", "tokenizer_class", "processor_class"}


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in `folder`, or None where the folder has none (no code from it is run).

    One of vocab.json and merges.txt alone is taken for Qwen2's kind, as Dream's is.
    """
    ready = (folder / "tokenizer.json").exists()
    if not ready and not (folder / "vocab.json").exists():
        return None
    # Only the tokenizer is wanted, so the absence of PyTorch need worry nobody. The import takes
    # half a second, hence its place.
    logging.getLogger("transformers").addFilter(_worth_saying)
    from transformers import PreTrainedTokenizerFast

    settings = _settings(folder)
    try:
        if ready:
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        template = folder / TEMPLATE
        if template.exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        settings["name_or_path"] = str(folder)
        return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(folder), **settings)
    except Exception as error:  # the libraries raise all kinds
        raise _broken(folder, error) from None


def _broken(folder: Path, error: Exception) -> ValueError:
    """The error that names the file because of which no tokenizer could be loaded."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            _read_json(folder / name)
    if (folder / TEMPLATE).exists():
        _read_text(folder / TEMPLATE)
    if not path.exists():
        if isinstance(error, ValueError) and str(folder) in str(error):
            return error
        return ValueError(f"the files in {folder} make no tokenizer: {error!r}")
    try:
        Tokenizer.from_file(str(path))
    except Exception as reason:  # the library has no type of its own
        return ValueError(
            f"{path} is of a kind that the installed tokenizers cannot read ({_line(reason)}); "
            "install a newer version or replace the file"
        )
    return ValueError(f"{folder / CONFIG} does not fit the tokenizer beside it: {_line(error)}")


def _line(error: Exception) -> str:
    """An error's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_lengths(folder: Path) -> dict[str, Any]:
    """gen_length and block_length, as far as generation_config.json has them; empty without it.

    ValueError, with the file's name, where it is no JSON object or a length is no number above 0.
    """
    path = folder / "generation_config.json"
    facts = _read_json(path) if path.exists() else {}
    found = {ours: facts[name] for ours, name in LENGTHS.items() if facts.get(name) is not None}
    for ours, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {LENGTHS[ours]}={value!r} must be a whole number above 0")
    return found


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json without NOT_KEPT; empty without that file."""
    path = folder / CONFIG
    facts = _read_json(path) if path.exists() else {}
    return {key: value for key, value in facts.items() if key not in NOT_KEPT}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must be a JSON object, but is a {type(facts).__name__}")
    return facts


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Tokens besides the vocabulary, by id: "content", "id" and how text is matched.

    From tokenizer.json, else tokenizer_config.json, else added_tokens.json; empty without them.
    """
    if (path := folder / "tokenizer.json").exists():
        found = _read_json(path).get("added_tokens", [])
    elif (path := folder / CONFIG).exists() and "added_tokens_decoder" in (
        facts := _read_json(path)
    ):
        found = [{"id": int(i)} | token for i, token in facts["added_tokens_decoder"].items()]
    elif (path := folder / "added_tokens.json").exists():
        found = [
            {"id": i, "content": text, "special": True} for text, i in _read_json(path).items()
        ]
    else:
        found = []
    return sorted(found, key=lambda token: token["id"])


def build_tokenizer(folder: Path) -> Any:
    """Qwen2's kind of `tokenizers.Tokenizer` from vocab.json, merges.txt and the added tokens.

    NFC, words cut by QWEN2_WORDS, byte-level BPE. ValueError where the files do not fit together.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers import models as kinds
    from tokenizers import processors as after

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        tokenizer = Tokenizer(kinds.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library has no type of its own
        raise ValueError(f"{vocab} and {merges.name} make no tokenizer: {error}") from None
    known = tokenizer.get_vocab()
    if lost := [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in known]:
        raise ValueError(f"{vocab} lacks {len(lost)} of the 256 bytes, so text would be lost")
    bytes_only: dict[str, Any] = {"add_prefix_space": False, "trim_offsets": False}
    bytes_only["use_regex"] = False
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(**bytes_only),
        ]
    )
    tokenizer.post_processor = after.ByteLevel(**bytes_only)
    tokenizer.decoder = decoders.ByteLevel(**bytes_only)
    for token in added_tokens(folder):
        number, flags = token["id"], {k: v for k, v in token.items() if k not in ("id", "content")}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if (got := tokenizer.token_to_id(token["content"])) != number:
            raise ValueError(
                f"{folder} gives {token['content']} the id {number}, but its place is {got}: "
                "ids of added tokens must follow the vocabulary without a gap"
            )
    return tokenizer


def _worth_saying(record: logging.LogRecord) -> bool:
    return "PyTorch was not" not in str(record.msg)


def copy_tokenizer(source: Path, output: Path) -> list[str]:
    """Copies the tokenizer's files; returns the names of those that are then there.

    A tokenizer.json that `source` has only the parts of is written, and its settings no longer name
    code of the repository.
    """
    names = [name for name in FILES if (source / name).exists()]
    for name in names:
        shutil.copyfile(source / name, output / name)
    if "vocab.json" in names and "tokenizer.json" not in names:
        build_tokenizer(source).save(str(output / "tokenizer.json"))
        settings = _settings(source) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(output / CONFIG, settings)
        names = sorted({*names, "tokenizer.json", CONFIG})
    return names


def render(tokenizer: Any, messages: Sequence[Message], open_last: bool | None = None) -> str:
    """Text of a conversation as the chat template writes it, up to where the reply begins.

    With `open_last` the last message is the reply's beginning and stays open (default: where the
    assistant speaks last). Special tokens that a message holds carry a MARK: `encode_texts` reads
    them as text, and `unmarked` takes the marks out. ValueError, with the file's name, where the
    template does not parse or refuses the conversation.
    """
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"a message is a dict with role and content, not {message!r}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model has no chat template to frame messages with: pass text")
    if open_last is None:
        open_last = bool(messages) and messages[-1]["role"] == "assistant"
    special = _special(tokenizer).values()
    try:
        return tokenizer.apply_chat_template(
            [_marked(message, special) for message in messages],
            tokenize=False,
            add_generation_prompt=not open_last,
            continue_final_message=open_last,
        )
    except Exception as error:  # a template can raise anything
        raise ValueError(
            f"the chat template in {_template_file(tokenizer)} does not take this conversation: "
            f"{_line(error)}"
        ) from None


def _template_file(tokenizer: Any) -> Path:
    folder = Path(str(tokenizer.name_or_path))
    return next((p for p in (folder / TEMPLATE, folder / CONFIG) if p.exists()), folder)


@functools.lru_cache(maxsize=8)
def _special(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id."""
    return {
        i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def _marked(part: Any, special: Collection[str]) -> Any:
    """A message or a part of it, every special token in its texts with a MARK."""
    if isinstance(part, str):
        found = [re.escape(token) for token in special if token in part]
        return re.sub(f"(?=(?:{'|'.join(found)}))(.)", rf"\1{MARK}", part) if found else part
    if isinstance(part, Mapping):
        return {key: _marked(value, special) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_marked(value, special) for value in part]
    return part


def unmarked(text: str) -> str:
    """Text as its reader should see it, without marks."""
    return text.replace(MARK, "")


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are; special tokens in them count as such unless marked."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [
        _encode_marked(tokenizer, text) if MARK in text else row
        for text, row in zip(texts, rows, strict=True)
    ]


def _encode_marked(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text whose marked special tokens are text.

    The text is cut at the special tokens without a mark, which is where a tokenizer cuts it too;
    a piece between them that has marks is encoded without them, and without looking for any.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = _special(tokenizer)
    ids, piece, start = [], [], 0

    def close(end: int) -> list[int]:
        part = text[start:end]
        if MARK not in part:
            return piece
        return tokenizer(unmarked(part), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    for i, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if i in special:
            ids += [*close(begin), i]
            piece, start = [], end
        else:
            piece.append(i)
    return ids + close(len(text))


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | Sequence[Message]], chat: bool = True
) -> list[list[int]]:
    """Token ids of prompts: user messages, or conversations as lists of messages.

    The chat template frames them where `chat` and there is one; else a string goes to the model as
    it is. ValueError as in `render`, and for messages without a frame.
    """
    framed = chat and bool(getattr(tokenizer, "chat_template", None))
    if not chat and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("messages are framed by the chat template: leave chat on, or pass text")

    def text(prompt: str | Sequence[Message]) -> str:
        if not isinstance(prompt, str):
            return render(tokenizer, prompt)
        return render(tokenizer, [{"role": "user", "content": prompt}]) if framed else prompt

    return encode_texts(tokenizer, [text(prompt) for prompt in prompts])


def encode_responses(tokenizer: Any, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of replies, without an end."""
    return tokenizer(list(responses), add_special_tokens=False)["input_ids"]
