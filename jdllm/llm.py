"""LLM: strings in, completions out. Tokenises, buckets and batches; the device does the rest.

from jdllm import LLM, DecodeConfig
LLM.load("bundled").generate(["..."], DecodeConfig(threshold=0.9))
"""

import bisect
import dataclasses
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jdllm import processes, sharding, trace
from jdllm.configs import ModelConfig
from jdllm.decode import DecodeConfig, Request, Setup, Trace, compile_blocks, decode, make_setup
from jdllm.fingerprint import fingerprint
from jdllm.likelihood import LikelihoodConfig
from jdllm.load import choose_mesh, load_parts, locate
from jdllm.scoring import Device, Ids, Likelihood, bucket, score
from jdllm.stop import EosStop
from jdllm.stop_strings import StopStrings
from jdllm.tokenizer import encode_prompts, load_tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt became."""

    text: str | None
    """Decoded ids, cut at the first stop string; None where the model has no tokenizer."""
    ids: list[int]
    """Generated ids up to, and without, the first id that ends a text, or up to a stop string."""
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


def deal(rows: int, height: int, replicas: int) -> list[int]:
    """The place of each row in a batch of `height`, so that replicas get equally many, in turn.

    A replica holds neighbouring places; none has more than one row less than another.
    """
    share = height // replicas
    return [i % replicas * share + i // replicas for i in range(rows)]


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
        verifier: tuple[ModelConfig, nnx.GraphDef, nnx.State] | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.defaults = defaults or DecodeConfig()
        self._graph, self._params = graph, params
        self._verifier = verifier or (None, None, None)
        self._programs: dict[Any, Any] = {}
        self._pieces: list[str] = []

    @classmethod
    def load(
        cls,
        model: str = "bundled",
        mesh: str | Mesh = "auto",
        dtype: str = "auto",
        seed: int = 0,
        verifier: str | None = None,
    ) -> Self:
        """Loads whatever `model=` may be: bundled, a folder, random:<name>, a Hugging Face id.

        `mesh` is a Mesh or text such as "4x1" (data x model). `dtype` auto keeps the stored one,
        except that a CPU computes in float32. `verifier` is a causal model of the same tokenizer,
        which rule=verify asks. ValueError or OSError, in one sentence, where there is no such model
        or it does not fit the mesh.
        """
        mesh = choose_mesh(mesh, model, dtype) if isinstance(mesh, str) else mesh
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
        second = load_parts(verifier, mesh, dtype, seed) if verifier else None
        return cls(*parts, mesh, tokenizer, defaults, second)

    def resolve(self, config: DecodeConfig | None = None, gen_length: int = 128) -> DecodeConfig:
        """`config` with open lengths filled from the model's own defaults, then `gen_length`."""
        config = config or self.defaults
        return config.resolve(
            gen_length=self.defaults.gen_length or gen_length,
            block_length=self.defaults.block_length or self.config.block_causal or 32,
            model=self.config,
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
        samples: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Completes every prompt (a string or token ids), in order.

        A prompt gets the tokens and the NFE that it gets alone, whatever else is in the call. A
        prompt's number in `samples` tells draws from the same prompt apart (default: it is counted
        how often the prompt came before). ValueError where a prompt and its completion exceed the
        model's length.
        """
        found: dict[int, Completion] = {}
        batches = self.stream(
            prompts, config, batch_size=batch_size, chat=chat, stop=stop, samples=samples
        )
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
        samples: Sequence[int] | None = None,
        watch: Callable[[int, trace.Record], None] | None = None,
    ) -> Iterator[Batch]:
        """As `generate`, but yields each batch when it is finished, shortest prompts first.

        `watch` is called with the index of a prompt and the record of its model calls, as soon as
        a block is finished: first with the canvas that it starts from, then with calls that follow
        on (`trace.join`). Its time is not counted. What it sees is made by programs of their own:
        without `watch` it costs nothing.
        """
        config = self.resolve(config)
        rows = self.encode(prompts, chat)
        gen_length = config.gen_length or 0
        longest = max(map(len, rows), default=0)
        setup = make_setup(config, self.config)
        if config.rule == "verify" and not (self._verifier[0] and self._verifier[0].causal):
            raise ValueError("rule=verify asks a causal model: name it, verifier=FOLDER")
        if setup.canvas_length(longest) > self.config.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and gen_length={gen_length} exceed the model's "
                f"{self.config.max_length} columns; shorten one of them"
            )
        seeds = _row_seeds(rows, samples)
        setup = self._with_stops(setup, stop)
        replicas = self.mesh.shape["data"]
        batches = plan_batches([len(row) for row in rows], batch_size, replicas)
        heights: dict[int, int] = {}  # a bucket's last batch is filled up: one program serves all
        for index in batches:
            room = bucket(max(len(rows[index[0]]), 1))
            heights[room] = max(heights.get(room, 0), -(-len(index) // replicas) * replicas)
        for index in batches:
            height = heights[bucket(max(len(rows[index[0]]), 1))]
            chosen = [rows[i] for i in index], [seeds[i] for i in index]
            request = self._request(*chosen, config, setup, height)
            slots = deal(len(index), height, replicas)
            program, compile_seconds = self._program(request, setup, watch is not None)
            seconds, start = 0.0, time.perf_counter()
            found = program(self._params, request, self._verifier[2])
            for state in found if watch else [found]:
                seen = state.tokens, state.nfe, state.forwards, state.trace
                tokens, nfe, forwards, kept = processes.gather(seen)
                seconds += time.perf_counter() - start
                for i, slot in zip(index, slots, strict=True):
                    if watch:
                        watch(i, self._record(kept, slot, int(forwards), len(rows[i]), setup))
                start = time.perf_counter()
            completions = [
                self._completion(tokens[s][len(rows[i]) :][:gen_length], int(nfe[s]), stop)
                for i, s in zip(index, slots, strict=True)
            ]
            yield Batch(index, completions, int(forwards), seconds, compile_seconds)

    def _request(
        self,
        rows: list[list[int]],
        seeds: list[int],
        config: DecodeConfig,
        setup: Setup,
        height: int = 0,
    ) -> Request:
        """Canvases on the mesh, dealt out to its replicas, with idle rows up to `height`."""
        replicas = self.mesh.shape["data"]
        height = max(height, -(-len(rows) // replicas) * replicas)
        slots = deal(len(rows), height, replicas)
        room = setup.canvas_length(bucket(max(1, *map(len, rows))))
        tokens = np.full((height, min(room, self.config.max_length)), self.config.pad_id, np.int32)
        lengths = np.ones(height, np.int32)
        numbers = np.zeros(height, np.uint32)
        idle = np.ones(height, bool)
        for slot, row, seed in zip(slots, rows, seeds, strict=True):
            tokens[slot, : len(row)] = row
            tokens[slot, len(row) : setup.canvas_length(len(row))] = self.config.mask_id
            lengths[slot], numbers[slot], idle[slot] = len(row), seed, False
        base = jax.random.key(config.seed)
        keys = jax.vmap(lambda n: jax.random.fold_in(base, n))(numbers)
        placed = processes.place((tokens, lengths, keys, idle), sharding.by_row(self.mesh))
        return Request(*placed)

    def _record(
        self, kept: Trace, slot: int, forwards: int, prompt_length: int, setup: Setup
    ) -> trace.Record:
        """What the loop kept of a row, after so many calls of the request."""
        arrays = {name: getattr(kept, name)[:, slot] for name in ("tokens", *trace.LOOKS)}
        calls, length = forwards - int(kept.first), setup.canvas_length(prompt_length)
        return trace.cut(arrays, calls, prompt_length, length, self.config.mask_id)

    def _program(self, request: Request, setup: Setup, watched: bool = False) -> tuple[Any, float]:
        """The compiled loop for this shape and these rules, and the seconds spent compiling.

        Where it is watched, it yields its state block by block.
        """
        key = (request.tokens.shape, setup, watched)
        if key in self._programs:
            return self._programs[key], 0.0
        start = time.perf_counter()
        _, second, weights = self._verifier
        given = self._graph, self._params, request, setup
        if watched:
            program = compile_blocks(*given, self.mesh, second, weights)
        else:
            program = decode.lower(*given, False, second, weights).compile()
        self._programs[key] = program
        return program, time.perf_counter() - start

    def loglikelihood(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        config: LikelihoodConfig | None = None,
        *,
        batch_size: int = 32,
        finished: Callable[[int, Likelihood], None] = lambda index, found: None,
    ) -> list[Likelihood]:
        """log p(target | prefix) of pairs of token ids, in order; see jdllm.scoring.score."""
        device = Device(self._graph, self._params, self.config, self.mesh)
        config = config or LikelihoodConfig()
        return score(pairs, config, device, batch_size=batch_size, finished=finished)

    def fingerprint(self) -> str:
        """What tells this model from any other: a digest of its facts and weights' content."""
        return fingerprint(self.config, self._params)

    def _with_stops(self, setup: Setup, stop: Sequence[str]) -> Setup:
        """`setup` whose rows also end at token ids that prove a stop string."""
        sequences = self._stop_sequences(stop)
        if not sequences or not isinstance(setup.stop, EosStop) or setup.stop.after_block:
            return setup
        rule = StopStrings(setup.stop, self.config.eos_id, sequences)
        return dataclasses.replace(setup, stop=rule)

    def _stop_sequences(self, stop: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Sequences of ids whose text holds a stop string: single ids, and its own encoding.

        A string that comes about in another way, from the end of one token and the beginning of
        the next, is not among them; `_completion` finds it in the text.
        """
        stop = [s for s in stop if s]
        if not stop or self.tokenizer is None:
            return ()
        if not self._pieces:
            ids = [[i] for i in range(min(self.config.vocab, len(self.tokenizer)))]
            self._pieces = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
        holds = {i for i, piece in enumerate(self._pieces) if any(s in piece for s in stop)}
        holds.discard(self.config.mask_id)
        spelt = [self.tokenizer.encode(s, add_special_tokens=False) for s in stop]
        proven = {
            tuple(ids)
            for s, ids in zip(stop, spelt, strict=True)
            if s in self._raw(ids) and not holds & set(ids)
        }
        return tuple(sorted({(i,) for i in holds} | proven))

    def _raw(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included: some stop strings are such."""
        tokenizer: Any = self.tokenizer
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    def _completion(self, ids: np.ndarray, nfe: int, stop: Sequence[str]) -> Completion:
        """Cuts generated ids at the first end id, then at the first stop string in their text."""
        # Under a budget of forwards blocks may have stayed masked: the text ends before them.
        ends = np.isin(ids, (*self.config.stop_ids, self.config.mask_id))
        length = int(ends.argmax()) if ends.any() else len(ids)
        kept = ids[:length].tolist()
        stopped = length < len(ids) and ids[length] != self.config.mask_id
        if self.tokenizer is None:
            return Completion(None, kept, nfe, "stop" if stopped else "length")
        stop = [s for s in stop if s]

        def holds(count: int) -> bool:
            text = self._raw(kept[:count])
            return any(s in text for s in stop)

        if stop and holds(length):
            stopped = True
            kept = kept[: bisect.bisect_left(range(length), True, key=holds)]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [place for s in stop if (place := text.find(s)) >= 0]
        text = text[: min(cuts, default=len(text))]
        return Completion(text, kept, nfe, "stop" if stopped else "length")


def _row_seeds(rows: Sequence[Sequence[int]], samples: Sequence[int] | None = None) -> list[int]:
    """A number for each prompt's random draws: from its ids, and its number among its repeats.

    So a prompt draws the same alone and in company, and repeated prompts draw differently.
    """
    seen: Counter[int] = Counter()
    seeds = []
    for i, row in enumerate(rows):
        digest = zlib.crc32(np.array(row, np.int32).tobytes())
        number = seen[digest] if samples is None else samples[i]
        seeds.append((digest + number * 0x9E3779B1) % (1 << 32))
        seen[digest] += 1
    return seeds
