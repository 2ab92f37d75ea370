"""The safetensors files of a Hugging Face checkpoint, mapped one tensor at a time."""

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class ShardError(ValueError):
    """A shard that is missing, truncated or of an unsupported kind."""


class Shards:
    """Shapes and dtypes of every tensor, known from the headers; data on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._offset: dict[str, int] = {}
        listed = self._listed()
        for path in dict.fromkeys(listed.values()):
            self._read_header(path)
        if absent := sorted(set(listed) - set(self.shapes) - {SINGLE}):
            raise ShardError(
                f"{listed[absent[0]]} lacks {absent[0]}, which {INDEX} places there; "
                "download the checkpoint again"
            )

    def _listed(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = json.loads(index.read_text())["weight_map"]
                return {name: self.folder / file for name, file in names.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ShardError(
                    f"{index} is damaged: it must be JSON with a weight_map; download it again"
                ) from None
        if (self.folder / SINGLE).exists():
            return {SINGLE: self.folder / SINGLE}
        raise ShardError(f"{self.folder} has neither {INDEX} nor {SINGLE}: there are no weights")

    def _read_header(self, path: Path) -> None:
        if not path.exists():
            raise ShardError(f"shard {path.name} is missing from {self.folder}; download it again")
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library checks the header against the size of the file
        except SafetensorError as error:
            raise ShardError(
                f"shard {path} is truncated or damaged ({error}); download it again"
            ) from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self._file:
                raise ShardError(f"{name} is in both {self._file[name].name} and {path.name}")
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = _dtype(entry["dtype"], name, path)
            self._offset[name] = 8 + length + entry["data_offsets"][0]
            self._file[name] = path

    def map(self, name: str) -> np.ndarray:
        """Returns the tensor called `name`, as stored, mapped from its file (read-only).

        Pages come into memory as they are touched, and leave it with the array.
        """
        return np.memmap(
            self._file[name], self.dtypes[name], "r", self._offset[name], self.shapes[name]
        )

    @property
    def dtype(self) -> str:
        """Returns the dtype of most of the weights."""
        counts = Counter[str]()
        for name, shape in self.shapes.items():
            counts[self.dtypes[name]] += math.prod(shape)
        return counts.most_common(1)[0][0]

    def resolve_dtype(self, wanted: str | None, kept: Collection[str] = ()) -> str:
        """Returns the dtype to convert to: `wanted`, else the one of most weights.

        ShardError where `wanted` is no dtype of weights, or where it is not given and some tensor
        that is not among `kept`, which keep theirs, would lose precision.
        """
        if wanted is not None:
            if wanted not in DTYPES.values():
                raise ShardError(f"dtype={wanted} must be one of {', '.join(DTYPES.values())}")
            return wanted
        chosen = self.dtype
        for name, stored in self.dtypes.items():
            if stored != chosen and chosen != "float32" and name not in kept:
                raise ShardError(
                    f"{name} is stored as {stored}, but most weights are {chosen}: say which to "
                    f"store with dtype=float32 (exact) or dtype={chosen}"
                )
        return chosen

    @property
    def bytes(self) -> int:
        """Returns the size of all weights as stored, in bytes."""
        return sum(path.stat().st_size for path in set(self._file.values()))

    @property
    def count(self) -> int:
        """Returns the number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def _dtype(kind: str, name: str, path: Path) -> str:
    if kind not in DTYPES:
        raise ShardError(
            f"{name} in {path.name} is stored as {kind}; supported are {', '.join(DTYPES)}: "
            "quantised checkpoints cannot be converted, use the one they were made from"
        )
    return DTYPES[kind]
