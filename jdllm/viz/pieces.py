"""The text of token ids: words, parts of characters, and names for ids that are no text."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

Kind = Literal["text", "bytes", "mask", "end", "special"]
KINDS = get_args(Kind)
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# Byte-level BPE spells a byte as the character of its number where that can be printed, and as
# the next one from 256 on where it cannot.
SPELLING = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """The text of one id."""

    text: str
    """For the kind "bytes", which is part of a character: the bytes in hexadecimal."""
    kind: Kind


class Lexicon(dict[int, Piece]):
    """The piece of every id that is looked up, from a tokenizer; without one, the id's number."""

    def __init__(self, tokenizer: Any | None, mask_id: int, end_ids: Iterable[int]):
        super().__init__()
        self.tokenizer = tokenizer
        self.kinds: dict[int, Kind] = dict.fromkeys(end_ids, "end")
        self.kinds[mask_id] = "mask"

    def __missing__(self, token: int) -> Piece:
        piece = self[token] = self._read(token)
        return piece

    def _read(self, token: int) -> Piece:
        text = self._decode(token)
        kind = self.kinds.get(token)
        if kind or not text:
            return Piece(text or f"<{token}>", kind or "special")
        if "\ufffd" in text and (data := self._bytes(token)):
            return Piece(data.hex(), "bytes")
        plain = self._decode(token, skip_special_tokens=True)
        return Piece(text, "text" if plain else "special")

    def _decode(self, token: int, **how: bool) -> str:
        if self.tokenizer is None:
            return f"<{token}>"
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False, **how)

    def _bytes(self, token: int) -> bytes:
        """Returns the bytes of a token that is part of a character; empty where unknown."""
        name = self.tokenizer.convert_ids_to_tokens(token) if self.tokenizer else ""
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return bytes(SPELLING[c] for c in name) if set(name) <= set(SPELLING) else b""


def spell(pieces: Sequence[Piece]) -> list[str]:
    """Returns the texts of consecutive pieces; the first part of a character gets all of it.

    Parts that form no character, because their neighbours are still masked, become U+FFFD.
    """
    texts = [piece.text for piece in pieces]
    start = 0
    while start < len(pieces):
        end = start
        while end < len(pieces) and pieces[end].kind == "bytes":
            end += 1
        texts[start:end] = _decode([bytes.fromhex(piece.text) for piece in pieces[start:end]])
        start = end + 1
    return texts


def _decode(parts: Sequence[bytes]) -> list[str]:
    owners = [i for i, part in enumerate(parts) for _ in part]
    data, texts, at = b"".join(parts), [""] * len(parts), 0
    while at < len(data):
        for size in range(1, 5):
            try:
                character = data[at : at + size].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            character, size = "\ufffd", 1
        texts[owners[at]] += character
        at += size
    return texts


def visible(text: str) -> str:
    """Returns the text with every control character replaced by its name.

    Line ends and tabs stay, and so do the joiners of emoji and of some scripts.
    """
    return "".join(_name(c) if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    kept = "\n\t\u200c\u200d"
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in kept


def _name(character: str) -> str:
    number = ord(character)
    return chr(0x2400 + number) if number < 32 else f"<U+{number:04X}>"
