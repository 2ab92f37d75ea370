"""Text to ids and back: the Hugging Face tokenizer beside the weights, and its chat template."""

import functools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
SLOT = "\u2402"  # stands for the message while the template is rendered once
# How Qwen2 cuts text into words before it merges bytes: contractions, letters with one sign before
# them, single digits, runs of signs, line ends, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = "tokenizer_config.json"
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

    if ready:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    settings = _settings(folder)
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(folder), **settings)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json without NOT_KEPT; empty without that file."""
    path = folder / CONFIG
    facts = _read_json(path) if path.exists() else {}
    return {key: value for key, value in facts.items() if key not in NOT_KEPT}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


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
        (output / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        names = sorted({*names, "tokenizer.json", CONFIG})
    return names


@functools.lru_cache(maxsize=8)
def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after one user message, reply header included.

    Without a template both are empty: the prompt goes to the model as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    message = [{"role": "user", "content": SLOT}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(SLOT)
    if not found:
        raise ValueError("the chat template drops the user's message; pass token ids instead")
    return before, after


def encode_prompts(tokenizer: Any, prompts: Sequence[str], chat: bool = True) -> list[list[int]]:
    """Token ids of user messages, framed by the chat template where `chat` and there is one."""
    before, after = chat_frame(tokenizer) if chat else ("", "")
    texts = [before + prompt + after for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def encode_responses(tokenizer: Any, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of replies, without an end."""
    return tokenizer(list(responses), add_special_tokens=False)["input_ids"]
