"""Finds checkpoints: a folder as it is, or a Hugging Face id, downloaded once."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jdllm.runtime.files import home

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "merges.txt")


def converted_folder(source: str) -> Path:
    """Returns where the conversion of a folder or an id is kept when no output is named."""
    path = Path(source).expanduser()
    name = path.resolve().name if path.is_dir() else source.replace("/", "--")
    return home() / "models" / name


def fetch(source: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """Returns the folder of `source`; an id such as GSAI-ML/LLaDA-1.5 is downloaded at first.

    Of a repository only the files that `patterns` name are.

    FileNotFoundError, in one sentence, where it is neither a folder nor can be downloaded.
    """
    source = os.path.expanduser(source)
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hugging Face id (owner/name)")
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{source} is no folder here and could not be downloaded: {reason}"
        ) from None
