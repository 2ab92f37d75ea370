"""Full decoding, with what every exit would see of it (exit_signals.py reads it off)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdllm import stop
from jdllm.batches import row_keys, row_seeds
from jdllm.decode import DecodeConfig, Request, decode
from jdllm.decode.aims import MAPS, aimed
from jdllm.decode.groups import Exit as Settings
from jdllm.decode.setup import Setup, make_setup
from jdllm.evaluation.exit_report import Line
from jdllm.evaluation.exits import base_settings
from jdllm.llm import LLM
from jdllm.runtime import files
from jdllm.runtime.progress import Bar
from jdllm.stop.exit import Prophet, Signal
from jdllm.stop.rule import Asks, StopView, fill_block, rules_of

ALONE = ("unchanged", "entropy", "prophet", "sched")
Named = tuple[str, str, Signal]
"""Mode, map or nothing, and the signal."""


@dataclasses.dataclass(frozen=True)
class SignalsConfig:
    """What is decoded. A killed run goes on where it was."""

    adapter: Path
    """Folder with a LoRA adapter and its dynamics."""
    output: Path = Path("runs/signals")
    model: str = "bundled"
    task: str = "countdown4"
    length: int = 64
    """Columns of a completion, which are one block."""
    schedule: Literal["gaussian", "uniform"] = "gaussian"
    limit: int = 500
    """Held-out documents."""
    batch_size: int = 50
    slack: float = 1.0
    """Points of accuracy that a rule may lose where its threshold is chosen."""
    replayed: int = 32
    """So many documents are decoded with some of the rules themselves."""

    @property
    def decode(self) -> DecodeConfig:
        """Plain decoding that ends with its last mask."""
        base = base_settings(self.task, self.length)
        plain = {name: value for name, value in base.items() if not name.startswith("exit.")}
        wide = {"gaussian.width": (1e6,)} if self.schedule == "uniform" else {}
        return DecodeConfig.of(plain | wide | {"stop": "none", "block_length": self.length})


@dataclasses.dataclass(frozen=True)
class Every:
    """Measures many signals after every step, keeps the values and what an exit would leave."""

    signals: tuple[Named, ...]
    steps: int

    @property
    def asks(self) -> Asks:
        probes = dict.fromkeys(p for *_, one in self.signals for p in one.asks.probes)
        return Asks(margin=True, entropy=True, probes=tuple(probes))

    def start(self, tokens_BT: jax.Array) -> Any:
        (B, T), n = tokens_BT.shape, len(self.signals)
        memory = tuple(one.start(tokens_BT) for *_, one in self.signals)
        values_BSK = jnp.full((B, self.steps, n), jnp.nan)
        return memory, values_BSK, jnp.zeros((B, self.steps, T), jnp.int32)

    def measure(self, view: StopView, memory: Any) -> tuple[jax.Array, Any]:
        assert view.look is not None
        own, values_BSK, filled_BST = memory
        kept, found = [], []
        for (mode, name, signal), before in zip(self.signals, own, strict=True):
            look = dataclasses.replace(view.look, aims=view.look.aims.get(f"{mode} {name}"))
            seen = dataclasses.replace(view, look=look)
            value_B, after = signal.measure(seen, before)
            if isinstance(signal, Prophet):  # as a multiple of its bar
                value_B = value_B / signal.bar(seen)
            kept.append(after)
            found.append(value_B)
        place = jnp.arange(len(view.step_B)), view.step_B - 1
        values_BSK = values_BSK.at[place].set(jnp.stack(found, axis=1))
        whole_BT = fill_block(view, jnp.ones(len(view.step_B), bool))
        filled_BST = filled_BST.at[place].set(whole_BT)
        return jnp.zeros(len(view.step_B)), (tuple(kept), values_BSK, filled_BST)

    def calm(self, value_B: jax.Array, threshold_B: jax.Array, view: StopView) -> jax.Array:
        return jnp.zeros(value_B.shape, bool)


def named_signals(llm: LLM, decode: DecodeConfig) -> tuple[tuple[Named, ...], dict[str, Any]]:
    """All signals, and the aims of those that read activations, by mode and map."""
    found, aims = [], {}
    for mode in ("code", "paper", *ALONE):
        for name in MAPS if mode in ("code", "paper") else [""]:
            settings = Settings(mode=mode, map=name or "mean")
            own = llm.maps.aims(settings)
            setup = aimed(make_setup(dataclasses.replace(decode, exit=settings), llm.config), own)
            (rule,) = (rule for rule in rules_of(setup.stop) if isinstance(rule, stop.Exit))
            found.append((mode, name, rule.signal))
            if own:
                aims[f"{mode} {name}"] = own
    return tuple(found), aims


def request_of(llm: LLM, rows: Sequence[list[int]], setup: Setup, aims: Any, width: int) -> Request:
    """The canvases of some prompts, padded to one width."""
    tokens = np.full((len(rows), width), llm.config.pad_id, np.int32)
    for own, row in zip(tokens, rows, strict=True):
        own[: len(row)] = row
        own[len(row) : setup.canvas_length(len(row))] = llm.config.mask_id
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    keys = row_keys(0, row_seeds(rows, None))
    return Request(jnp.asarray(tokens), lengths, keys, jnp.zeros(len(rows), bool), aims=aims)


def record(config: SignalsConfig, llm: LLM, prompts: Sequence[str]) -> Iterator[Path]:
    """Decodes, a batch at a time, what is not on disk yet; yields the batches' files."""
    plain = llm.resolve(config.decode)
    signals, aims = named_signals(llm, plain)
    setup = make_setup(plain, llm.config)
    rule = stop.Exit(Every(signals, setup.most_steps), (0.0,), (1,), (1,), (0,))
    setup = dataclasses.replace(setup, stop=stop.Stops((rule, setup.stop)))
    rows = llm.encode(prompts)
    width = max(map(len, rows)) + config.length
    for start in Bar(range(0, len(rows), config.batch_size), unit="batch"):
        path = config.output / f"{config.schedule}-{start:05}.npz"
        if not path.exists():
            own = rows[start : start + config.batch_size]
            state = decode(llm.model, request_of(llm, own, setup, aims, width), setup)
            _, values_BSK, filled_BST = state.rows.stop[0]["signal"]
            spans = [np.asarray(x)[:, len(r) : len(r) + config.length]
                     for r, x in zip(own, filled_BST, strict=True)]  # fmt: skip
            names = [f"{mode} {name}".strip() for mode, name, _ in signals]
            with files.atomic_file(path) as file:
                np.savez_compressed(
                    file, values=np.asarray(values_BSK), filled=np.asarray(spans, np.int16),
                    calls=np.asarray(state.rows.calls)[:, 0], names=names,
                )  # fmt: skip
        yield path


def replayed(llm: LLM, prompts: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """Decodes some documents with the rules themselves; says how many came out the same."""
    found = []
    for line in lines:
        done = llm.generate(prompts, line.entry.decode, batch_size=len(prompts))
        own = line.result.samples[: len(prompts)]
        same = sum(c.text == s.completion and c.calls == s.calls
                   for c, s in zip(done, own, strict=True))  # fmt: skip
        name = f"{line.entry.rule} {line.entry.map}".strip()
        found.append(f"{name} x{line.entry.scale:g}: {same} of {len(prompts)}")
    return found
