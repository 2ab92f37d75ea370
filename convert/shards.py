"""The safetensors files of a Hugging Face checkpoint, read one tensor at a time."""

import json
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
    """Shapes and dtypes of every tensor, known from the headers; data on demand.

    A shard is mapped only while one tensor is read, so resident memory stays at one tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file: dict[str, Path] = {}
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
            names = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in names.items()}
        if (self.folder / SINGLE).exists():
            return {SINGLE: self.folder / SINGLE}
        raise ShardError(f"{self.folder} has neither {INDEX} nor {SINGLE}: there are no weights")

    def _read_header(self, path: Path) -> None:
        if not path.exists():
            raise ShardError(f"shard {path.name} is missing from {self.folder}; download it again")
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _dtype(part.get_dtype(), name, path)
                    self._file[name] = path
        except SafetensorError as error:
            raise ShardError(
                f"shard {path} is truncated or damaged ({error}); download it again"
            ) from None

    def read(self, name: str) -> np.ndarray:
        """The tensor called `name`, as stored."""
        with safe_open(self._file[name], framework="numpy") as file:
            return file.get_tensor(name)

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights."""
        kinds = list(self.dtypes.values())
        return max(set(kinds), key=kinds.count)

    @property
    def bytes(self) -> int:
        """Size of all weights as stored."""
        return sum(path.stat().st_size for path in set(self._file.values()))

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def _dtype(kind: str, name: str, path: Path) -> str:
    if kind not in DTYPES:
        raise ShardError(
            f"{name} in {path.name} is stored as {kind}; supported are {', '.join(DTYPES)} "
            "(quantised checkpoints are not supported yet)"
        )
    return DTYPES[kind]
