"""Text to ids and back: the Hugging Face tokenizer beside the weights, and its chat template."""

import functools
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
    # Dream's kind of tokenizer: kept for whoever builds a tokenizer.json from them
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
SLOT = "\u2402"  # stands for the message while the template is rendered once


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in `folder`, or None where the folder has none (no code from it is run)."""
    if not (folder / "tokenizer.json").exists():
        return None
    # Only the tokenizer is wanted: neither the absence of PyTorch nor that transformers does not
    # know the model's type need worry anybody. The import takes half a second, hence its place.
    logging.getLogger("transformers").addFilter(_worth_saying)
    from transformers import AutoTokenizer

    logging.getLogger("transformers.configuration_utils").addFilter(_worth_saying)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _worth_saying(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return "PyTorch was not" not in text and "You are using a model of type" not in text


def copy_tokenizer(source: Path, output: Path) -> list[str]:
    """Copies the tokenizer's files; returns the names of those that `source` has."""
    names = [name for name in FILES if (source / name).exists()]
    for name in names:
        shutil.copyfile(source / name, output / name)
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
