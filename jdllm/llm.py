"""LLM: strings in, completions out. Tokenises, buckets and batches; the device does the rest.

from jdllm import LLM, DecodeConfig
LLM.load("bundled").generate(["..."], DecodeConfig(threshold=0.9))
"""

import dataclasses
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jdllm import processes, sharding
from jdllm.configs import ModelConfig
from jdllm.decode import DecodeConfig, DecodeState, Request, Setup, decode, make_setup
from jdllm.load import load_parts, locate
from jdllm.tokenizer import encode_prompts, load_tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt became."""

    text: str | None
    """Decoded ids, cut at the first stop string; None where the model has no tokenizer."""
    ids: list[int]
    """Generated ids up to, and without, the first id that ends a text."""
    nfe: int
    """Model evaluations made while this row was unfinished."""
    finish_reason: Literal["stop", "length"]
    """stop: an end id or a stop string came; length: the canvas was full first."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One finished batch: which prompts it held, and what it cost."""

    index: list[int]
    completions: list[Completion]
    forwards: int
    seconds: float
    """Wall time on the device and back, without compilation."""
    compile_seconds: float


def bucket(length: int) -> int:
    """The canvas room that prompts of up to `length` tokens share: few sizes, few programs.

    Multiples of 32 up to 256, then at most eight sizes an octave.
    """
    step = max(32, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def plan_batches(lengths: Sequence[int], size: int, multiple: int) -> list[list[int]]:
    """Splits prompts, sorted by length, into even batches of at most `size` rows.

    Prompts of different buckets never share a batch; sizes are what is left after an even split,
    and callers fill rows up to a multiple of `multiple`.
    """
    size = max(size // multiple, 1) * multiple
    rooms: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rooms.setdefault(bucket(max(lengths[i], 1)), []).append(i)
    batches = []
    for rows in rooms.values():
        count = -(-len(rows) // size)
        even = -(-len(rows) // count)
        batches += [rows[start : start + even] for start in range(0, len(rows), even)]
    return batches


class LLM:
    """A model on a mesh, with its tokenizer where it has one."""

    def __init__(
        self,
        config: ModelConfig,
        graph: nnx.GraphDef,
        params: nnx.State,
        mesh: Mesh,
        tokenizer: Any | None = None,
        defaults: DecodeConfig | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.defaults = defaults or DecodeConfig()
        self._graph, self._params = graph, params
        self._programs: dict[Any, Any] = {}

    @classmethod
    def load(
        cls, model: str = "bundled", mesh: str | Mesh = "auto", dtype: str = "auto", seed: int = 0
    ) -> Self:
        """Loads whatever `model=` may be: bundled, a folder, random:<name>, a Hugging Face id.

        `mesh` is a Mesh or text such as "4x1" (data x model). `dtype` auto keeps the stored one,
        except that a CPU computes in float32. ValueError or OSError, in one sentence, where there
        is no such model or it does not fit the mesh.
        """
        mesh = sharding.parse_mesh(mesh) if isinstance(mesh, str) else mesh
        parts = load_parts(model, mesh, dtype, seed)
        folder = locate(model)
        tokenizer, defaults = None, DecodeConfig()
        if folder:
            tokenizer = load_tokenizer(folder)
            path = folder / "generation_config.json"
            facts = json.loads(path.read_text()) if path.exists() else {}
            defaults = DecodeConfig(
                gen_length=facts.get("max_new_tokens"), block_length=facts.get("block_length")
            )
        return cls(*parts, mesh, tokenizer, defaults)

    def resolve(self, config: DecodeConfig | None = None, gen_length: int = 128) -> DecodeConfig:
        """`config` with open lengths filled from the model's own defaults, then `gen_length`."""
        config = config or self.defaults
        return config.resolve(
            gen_length=self.defaults.gen_length or gen_length,
            block_length=self.defaults.block_length or 32,
        )

    def encode(self, prompts: Sequence[Prompt], chat: bool = True) -> list[list[int]]:
        """Token ids of every prompt; strings are framed as user messages where `chat`."""
        texts = [p for p in prompts if isinstance(p, str)]
        if texts and self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids instead of text")
        encoded = iter(encode_prompts(self.tokenizer, texts, chat) if texts else [])
        rows = [next(encoded) if isinstance(p, str) else list(p) for p in prompts]
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.config.vocab:
                raise ValueError(f"token ids must lie in 0..{self.config.vocab - 1}, got {row}")
        return rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: DecodeConfig | None = None,
        *,
        batch_size: int = 32,
        chat: bool = True,
        stop: Sequence[str] = (),
        progress: bool = False,
    ) -> list[Completion]:
        """Completes every prompt (a string or token ids), in order.

        A prompt gets the tokens and the NFE that it gets alone, whatever else is in the call.
        ValueError where a prompt and its completion exceed the model's length.
        """
        found: dict[int, Completion] = {}
        batches = self.stream(prompts, config, batch_size=batch_size, chat=chat, stop=stop)
        with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
            for batch in batches:
                found |= zip(batch.index, batch.completions, strict=True)
                bar.update(len(batch.index))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: DecodeConfig | None = None,
        *,
        batch_size: int = 32,
        chat: bool = True,
        stop: Sequence[str] = (),
    ) -> Iterator[Batch]:
        """As `generate`, but yields each batch when it is finished, shortest prompts first."""
        config = self.resolve(config)
        rows = self.encode(prompts, chat)
        gen_length = config.gen_length or 0
        longest = max(map(len, rows), default=0)
        if longest + gen_length > self.config.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and gen_length={gen_length} exceed the model's "
                f"{self.config.max_length} columns; shorten one of them"
            )
        seeds = _row_seeds(rows)
        setup = make_setup(config, self.config)
        replicas = self.mesh.shape["data"]
        for index in plan_batches([len(row) for row in rows], batch_size, replicas):
            request = self._request([rows[i] for i in index], [seeds[i] for i in index], config)
            program, compile_seconds = self._program(request, setup)
            start = time.perf_counter()
            state: DecodeState = program(self._params, request)
            tokens, nfe, forwards = processes.gather((state.tokens, state.nfe, state.forwards))
            seconds = time.perf_counter() - start
            completions = [
                self._completion(row[len(rows[i]) :][:gen_length], int(count), stop)
                for i, row, count in zip(index, tokens, nfe, strict=False)
            ]
            yield Batch(index, completions, int(forwards), seconds, compile_seconds)

    def _request(self, rows: list[list[int]], seeds: list[int], config: DecodeConfig) -> Request:
        """Canvases on the mesh, filled up with idle rows to a multiple of the data axis."""
        gen_length = config.gen_length or 0
        replicas = self.mesh.shape["data"]
        height = -(-len(rows) // replicas) * replicas
        room = min(bucket(max(1, *map(len, rows))), self.config.max_length - gen_length)
        tokens = np.full((height, room + gen_length), self.config.pad_id, np.int32)
        lengths = np.ones(height, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            tokens[i, len(row) : len(row) + gen_length] = self.config.mask_id
            lengths[i] = len(row)
        numbers = np.array(seeds + [0] * (height - len(rows)), np.uint32)
        base = jax.random.key(config.seed)
        keys = jax.vmap(lambda n: jax.random.fold_in(base, n))(numbers)
        idle = np.arange(height) >= len(rows)
        placed = processes.place((tokens, lengths, keys, idle), sharding.by_row(self.mesh))
        return Request(*placed)

    def _program(self, request: Request, setup: Setup) -> tuple[Any, float]:
        """The compiled loop for this shape and these rules, and the seconds spent compiling."""
        key = (request.tokens.shape, setup)
        if key in self._programs:
            return self._programs[key], 0.0
        start = time.perf_counter()
        program = decode.lower(self._graph, self._params, request, setup).compile()
        self._programs[key] = program
        return program, time.perf_counter() - start

    def _completion(self, ids: np.ndarray, nfe: int, stop: Sequence[str]) -> Completion:
        ends = np.isin(ids, self.config.stop_ids)
        length = int(ends.argmax()) if ends.any() else len(ids)
        kept = ids[:length].tolist()
        stopped = length < len(ids)
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            cuts = [place for s in stop if s and (place := text.find(s)) >= 0]
            stopped = stopped or bool(cuts)
            text = text[: min(cuts, default=len(text))]
        return Completion(text, kept, nfe, "stop" if stopped else "length")


def _row_seeds(rows: Sequence[Sequence[int]]) -> list[int]:
    """A number for each prompt's random draws: from its ids, and how often they came before.

    So a prompt draws the same alone and in company, and repeated prompts draw differently.
    """
    seen: Counter[int] = Counter()
    seeds = []
    for row in rows:
        digest = zlib.crc32(np.array(row, np.int32).tobytes())
        seeds.append((digest + seen[digest] * 0x9E3779B1) % (1 << 32))
        seen[digest] += 1
    return seeds
