"""LLM: strings in, completions out. Tokenises, buckets and batches; the device does the rest.

from jdllm import LLM, DecodeConfig
LLM.load("bundled").generate(["..."], DecodeConfig(threshold=0.9))
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdllm.batches import bucket, common_prefixes, deal, heights, plan_batches, row_keys, row_seeds
from jdllm.completion import Completion, complete, stop_sequences
from jdllm.decode import (
    DecodeConfig,
    Prefixes,
    Request,
    Setup,
    Trace,
    compile_blocks,
    decode,
    read_prefix,
)
from jdllm.decode.aims import aimed
from jdllm.engine.offline import EngineUse, decode_all, pays
from jdllm.kernels.choose import parse
from jdllm.load import choose_mesh, load_model, locate
from jdllm.maps import Maps
from jdllm.model.cache import Cache
from jdllm.model.config import ModelConfig
from jdllm.model.model import Model
from jdllm.parity import make_setup
from jdllm.runtime import processes, sharding
from jdllm.runtime.programs import LOOPS, Programs
from jdllm.runtime.progress import Bar
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.score.scoring import Ids, Likelihood, score
from jdllm.stop import EosStop, StopStrings
from jdllm.store.fingerprint import fingerprint
from jdllm.tokenizer import Message, encode_prompts, load_tokenizer, read_lengths
from jdllm.viz import trace

Prompt = str | Sequence[int] | Sequence[Message]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts; a prompt that comes by itself becomes a list of one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral | Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return prompts  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One finished batch: which prompts it held, and what it cost."""

    index: list[int]
    completions: list[Completion]
    forwards: int
    seconds: float
    """On the device and back, without compilation; the first batch's has that of the prefixes."""
    compile_seconds: float
    shared_tokens: int
    """Prompt tokens of its rows that were not computed with it, but once for all batches."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """What prompts begin with, computed once and kept on the device, and what that cost."""

    length: int = 0
    """Tokens; 0 where nothing is shared."""
    which: Sequence[int] = ()
    """By prompt: the number of its row in the cache."""
    cache: Cache | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0

    def of(self, index: Sequence[int]) -> tuple[Cache, list[int]] | None:
        """The cache, and the numbers of some prompts; None where nothing is shared."""
        return self.cache and (self.cache, [self.which[i] for i in index])


def _are_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids; ValueError where it is neither that, text nor messages."""
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
        return False
    if all(isinstance(part, Integral) for part in prompt):
        return True
    raise ValueError(f"a prompt is text, token ids or a list of messages, not {prompt!r}")


class LLM:
    """A model on a mesh, with its tokenizer where it has one."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any | None = None,
        defaults: DecodeConfig | None = None,
        verifier: Model | None = None,
        engine: EngineUse = "auto",
        adapter: Path | None = None,
    ):
        self.model = model
        self.engine: EngineUse = engine
        self.config: ModelConfig = model.config
        self.mesh: Mesh = model.mesh
        self.tokenizer = tokenizer
        self.defaults = defaults or DecodeConfig()
        self.verifier = verifier
        self.maps = Maps(model, adapter)
        self._programs = Programs()

    @classmethod
    def load(
        cls,
        model: str = "bundled",
        mesh: str | Mesh = "auto",
        dtype: str = "auto",
        seed: int = 0,
        verifier: str | None = None,
        allow_unknown: Sequence[str] = (),
        kernel: str = "auto",
        adapter: str | Path | None = None,
        engine: EngineUse = "auto",
    ) -> Self:
        """Loads whatever `model=` may be: bundled, a folder, random:<name>, a Hugging Face id.

        `mesh` is a Mesh or text such as "4x1" (data x model). `dtype` auto keeps the stored one,
        except that a CPU computes in float32. `verifier` is a causal model of the same tokenizer,
        which rule=verify asks; `allow_unknown` keys of a published config.json to ignore. `kernel`
        forces implementations (`kernels.choose.parse`). `adapter` is a folder with a LoRA adapter
        in PEFT's files. With `engine` rows that end make room for others at once; auto does so
        where that pays (docs/engine.md). ValueError or OSError, in one sentence, where there is no
        such model or adapter, or it does not fit.
        """
        parse(kernel)  # before anything is loaded
        mesh = choose_mesh(mesh, model, dtype, allow_unknown) if isinstance(mesh, str) else mesh
        folder = locate(model, allow_unknown)
        # Small files before large ones: what is wrong is said at once.
        tokenizer, defaults = None, DecodeConfig()
        if folder:
            tokenizer, defaults = load_tokenizer(folder), DecodeConfig(**read_lengths(folder))
        found = load_model(model, mesh, dtype, seed, allow_unknown, adapter)
        second = load_model(verifier, mesh, dtype, seed, allow_unknown) if verifier else None
        found = dataclasses.replace(found, kernel=kernel)
        return cls(found, tokenizer, defaults, second, engine, Path(adapter) if adapter else None)

    def resolve(self, config: DecodeConfig | None = None, gen_length: int = 128) -> DecodeConfig:
        """`config` with open lengths filled from the model's own defaults, then `gen_length`."""
        config = config or self.defaults
        return config.resolve(
            gen_length=self.defaults.gen_length or gen_length,
            block_length=self.defaults.block_length or self.config.block_causal or 32,
            model=self.config,
        )

    def encode(self, prompts: Prompt | Sequence[Prompt], chat: bool = True) -> list[list[int]]:
        """Token ids of every prompt.

        Where `chat`, the chat template frames strings as user messages, and conversations (lists of
        messages) as they are; an assistant's last message stays open. ValueError for ids that the
        model does not have, and for what neither it nor its template takes.
        """
        prompts = as_prompts(prompts)
        given = [_are_ids(prompt) for prompt in prompts]
        texts: Any = [prompt for prompt, ids in zip(prompts, given, strict=True) if not ids]
        if texts and self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json: pass token ids instead of text")
        encoded = iter(encode_prompts(self.tokenizer, texts, chat) if texts else [])
        rows: list[list[int]] = [
            next(encoded) if not ids else list(prompt)  # pyright: ignore[reportAssignmentType]
            for prompt, ids in zip(prompts, given, strict=True)
        ]
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.config.vocab:
                raise ValueError(f"token ids must lie in 0..{self.config.vocab - 1}, got {row}")
        return rows

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: DecodeConfig | None = None,
        *,
        batch_size: int = 32,
        chat: bool = True,
        stop: Sequence[str] = (),
        samples: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Completes every prompt (a string, token ids or messages), in order.

        One prompt may come without a list around it, and gives a list of one. Messages are dicts,
        {"role": "user", "content": "..."} say, and framed by the chat template as strings are.
        A prompt gets the tokens and the NFE that it gets alone, whatever else is in the call. A
        prompt's number in `samples` tells draws from the same prompt apart (default: it is counted
        how often the prompt came before). ValueError where a prompt and its completion exceed the
        model's length.
        """
        prompts, found = as_prompts(prompts), dict[int, Completion]()
        batches = self.stream(
            prompts, config, batch_size=batch_size, chat=chat, stop=stop, samples=samples
        )
        with Bar(total=len(prompts), unit="prompt", disable=not progress) as bar:
            for batch in batches:
                found |= zip(batch.index, batch.completions, strict=True)
                bar.update(len(batch.index))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
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
        rows, gen_length = self.encode(prompts, chat), config.gen_length or 0
        setup = self._with_stops(self._setup(config, rows), stop)
        seeds = row_seeds(rows, samples)
        if not watch and self._continuous(setup, len(rows), batch_size):
            yield from self._stream_continuously(rows, seeds, config, setup, batch_size, stop)
            return
        replicas, lengths = self.mesh.shape["data"], [len(row) for row in rows]
        batches = plan_batches(lengths, batch_size, replicas)
        tall = heights(batches, lengths, replicas)
        room = max(tall, default=0) // replicas * setup.canvas_length(max(lengths, default=0))
        shared = self._share(rows, setup, room) if config.share_prefix else Shared()
        spent, compiling = shared.seconds, shared.compile_seconds  # before the first batch
        for index, height in zip(batches, tall, strict=True):
            chosen = [rows[i] for i in index], [seeds[i] for i in index]
            request = self._request(*chosen, config, setup, height, shared.of(index))
            slots = deal(len(index), height, replicas)
            program, compile_seconds = self._program(request, setup, watch is not None)
            compiling, start = compiling + compile_seconds, time.perf_counter()
            found = program(self.model, request, self.verifier)
            for state in found if watch else [found]:
                own = state.rows
                seen = own.tokens, own.nfe, own.calls, own.exits, state.forwards, state.trace
                tokens, nfe, calls, exits, forwards, kept = processes.gather(seen)
                spent += time.perf_counter() - start
                for i, slot in zip(index, slots, strict=True):
                    if watch:
                        watch(i, self._record(kept, slot, int(forwards), len(rows[i]), setup))
                start = time.perf_counter()
            completions = [
                complete(
                    tokens[s][len(rows[i]) :][:gen_length], int(nfe[s]), self.config,
                    self.tokenizer, stop,
                ).noted(calls[s], exits[s])
                for i, s in zip(index, slots, strict=True)
            ]  # fmt: skip
            saved = len(index) * shared.length
            yield Batch(index, completions, int(forwards), spent, compiling, saved)
            spent, compiling = 0.0, 0.0

    def _continuous(self, setup: Setup, rows: int, batch_size: int) -> bool:
        """Whether the engine decodes so many rows."""
        if self.engine == "auto":
            return pays(self.model, setup, rows, batch_size)
        return self.engine == "on"

    def _stream_continuously(
        self,
        rows: list[list[int]],
        seeds: list[int],
        config: DecodeConfig,
        setup: Setup,
        batch_size: int,
        stop: Sequence[str],
    ) -> Iterator[Batch]:
        """Batches of the rows that ended together, whenever some did."""
        for found in decode_all(self.model, setup, rows, row_keys(config.seed, seeds), batch_size):
            completions = [
                complete(tokens[: config.gen_length], nfe, self.config, self.tokenizer, stop).noted(
                    calls, 0 * calls
                )
                for tokens, nfe, calls in zip(
                    found.tokens, found.nfe, found.block_calls, strict=True
                )
            ]
            yield Batch(
                found.index, completions, found.calls, found.seconds, found.compile_seconds, 0
            )

    def _setup(self, config: DecodeConfig, rows: Sequence[Sequence[int]]) -> Setup:
        """What a resolved `config` means here; ValueError where it cannot serve the prompts."""
        setup = aimed(make_setup(config, self.config), self.maps.aims(config.exit))
        longest = max(map(len, rows), default=0)
        if config.rule == "verify" and not (self.verifier and self.verifier.config.causal):
            raise ValueError("rule=verify asks a causal model: name it, verifier=FOLDER")
        if setup.canvas_length(longest) > self.config.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and gen_length={config.gen_length} exceed the "
                f"model's {self.config.max_length} columns; shorten one of them"
            )
        return setup

    def _share(self, rows: Sequence[Sequence[int]], setup: Setup, room: int) -> "Shared":
        """Computes what the prompts begin with, where that is exact and saves enough."""
        common = common_prefixes(rows, setup.block_length, room) if setup.fixed_past else None
        if common is None:
            return Shared()
        whole = sharding.replicated(self.mesh)
        tokens = [processes.device_put(np.array([ids], np.int32), whole) for ids in common.prefixes]
        program, compile_seconds = self._programs.get(
            ("prefix", common.length, setup.block_length),
            lambda: read_prefix.lower(self.model, tokens[0], setup.block_length).compile(),
        )
        start = time.perf_counter()
        caches: list[Cache] = [program(self.model, one) for one in tokens]
        cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        jax.block_until_ready(cache)
        seconds = time.perf_counter() - start
        return Shared(common.length, common.which, cache, seconds, compile_seconds)

    def _request(
        self,
        rows: list[list[int]],
        seeds: list[int],
        config: DecodeConfig,
        setup: Setup,
        height: int = 0,
        begun: tuple[Cache, list[int]] | None = None,
    ) -> Request:
        """Canvases on the mesh, dealt out to its replicas, with idle rows up to `height`.

        `begun` has keys of what the rows begin with, and which of them each row has.
        """
        replicas = self.mesh.shape["data"]
        height = max(height, -(-len(rows) // replicas) * replicas)
        slots = deal(len(rows), height, replicas)
        room = setup.canvas_length(bucket(max(1, *map(len, rows))))
        tokens = np.full((height, min(room, self.config.max_length)), self.config.pad_id, np.int32)
        lengths, which = np.ones(height, np.int32), np.zeros(height, np.int32)
        numbers = np.zeros(height, np.uint32)
        idle = np.ones(height, bool)
        for i, (slot, row, seed) in enumerate(zip(slots, rows, seeds, strict=True)):
            tokens[slot, : len(row)] = row
            tokens[slot, len(row) : setup.canvas_length(len(row))] = self.config.mask_id
            lengths[slot], numbers[slot], idle[slot] = len(row), seed, False
            which[slot] = begun[1][i] if begun else 0
        arrays = (tokens, lengths, row_keys(config.seed, numbers), idle, which)
        *placed, which = processes.device_put(arrays, sharding.by_row(self.mesh))
        prefixes = Prefixes(begun[0], which) if begun else None
        return Request(*placed, prefixes=prefixes, aims=self.maps.aims(config.exit))

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
        shared = request.prefixes and request.prefixes.cache.keys[0].shape

        def make() -> Any:
            if watched:
                return compile_blocks(self.model, request, setup, self.verifier)
            lowered = decode.lower(self.model, request, setup, False, self.verifier)
            return lowered.compile(LOOPS)

        return self._programs.get((request.tokens.shape, shared, setup, watched), make)

    def loglikelihood(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        config: LikelihoodConfig | None = None,
        *,
        batch_size: int = 32,
        finished: Callable[[int, Likelihood], None] = lambda index, found: None,
    ) -> list[Likelihood]:
        """log p(target | prefix) of pairs of token ids, in order; see jdllm.score.scoring.score."""
        config = config or LikelihoodConfig()
        return score(pairs, config, self.model, batch_size=batch_size, finished=finished)

    def fingerprint(self) -> str:
        """What tells this model from any other: a digest of its facts and weights' content."""
        return fingerprint(self.model)

    def verifier_fingerprint(self) -> str | None:
        """The verifier's, where there is one."""
        return fingerprint(self.verifier) if self.verifier else None

    def _with_stops(self, setup: Setup, stop: Sequence[str]) -> Setup:
        """`setup` whose rows also end at token ids that prove a stop string."""
        if not isinstance(setup.stop, EosStop) or setup.stop.after_block:
            return setup
        sequences = stop_sequences(self.tokenizer, stop, self.config)
        rule = StopStrings(setup.stop, self.config.eos_id, sequences)
        return dataclasses.replace(setup, stop=rule) if sequences else setup
