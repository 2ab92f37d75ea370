"""Generation from one prompt: its completion, what it cost, and how it came about."""

import dataclasses
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

import jdllm
from jdllm.arguments import SpreadArgs
from jdllm.bulk import complete_file
from jdllm.decode import DecodeConfig
from jdllm.evaluation.settings import check_verifier
from jdllm.load import enable_compilation_cache
from jdllm.runtime import files, processes, sharding
from jdllm.runtime.journal import going_on
from jdllm.runtime.machine import process_age
from jdllm.runtime.progress import Bar
from jdllm.viz import replay, trace
from jdllm.viz.pieces import Lexicon
from jdllm.viz.show import Player

if TYPE_CHECKING:  # imported when it runs, so that --help is quick
    from jdllm.completion import Completion
    from jdllm.llm import LLM, Batch, Prompt


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SpreadArgs):
    """Generation from one prompt, or from a file of them."""

    prompt: str = ""
    """The user's message, needed unless file or replay is given; token ids with spaces between them
    for a model without a tokenizer."""
    file: Path | None = None
    """Prompts, one per line: text, or in a .jsonl file objects with prompt or messages."""
    output: Path | None = None
    """Folder for the completions of file; the same command goes on after a kill."""
    batch_size: int = 32
    """file: most rows of a batch."""
    system: str = ""
    """A system prompt before it, as the chat template writes one."""
    decode: DecodeConfig = DecodeConfig()
    chat: bool = True
    """Frame the prompt with the model's chat template; false passes it on as it is."""
    viz: Literal["none", "live"] = "none"
    """live: show the canvas after every model call; without a terminal, as lines of text."""
    fps: float = 10
    """viz=live: model calls shown per second."""
    trace: Path | None = None
    """JSON lines to write: token, confidence, entropy and commit step by call and column."""
    html: Path | None = None
    """Page to write: replays the run in a browser, on its own."""
    replay: Path | None = None
    """A trace to show instead of running a model; needs viz or html."""
    seed: int = 0
    """Seed of the weights of random:<name>; sampling has decode.seed."""
    json: bool = False
    """Print one JSON object with the completion and its cost instead of the text."""

    def __post_init__(self):
        super().__post_init__()
        self.check_file()
        if self.replay is None and not self.file and not self.prompt.strip():
            raise ValueError('prompt is empty; write prompt="some text"')
        if self.system and not self.chat:
            raise ValueError("system= needs the chat template; leave out chat=false")
        if self.replay and (self.prompt or self.trace):
            raise ValueError("replay shows a run that is over; leave prompt and trace out")
        check_verifier(self.verifier, [self.decode])
        if self.replay and not self.html and self.viz == "none":
            raise ValueError(f"replay={self.replay} shows nothing; add viz=live or html=FILE")
        if self.json and (self.replay or self.viz == "live"):
            raise ValueError("json=true prints one object and nothing else; leave viz, replay out")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps} must lie above 0 and not above 1000")
        if self.trace and self.trace == self.html:
            raise ValueError(f"trace and html are both {self.html}; name two files")
        for name, path in self.outputs.items():
            if path.is_dir():
                raise ValueError(f"{name}={path} is a folder; name a file")

    def check_file(self) -> None:
        """ValueError for settings that have no meaning with, or without, a file of prompts."""
        own = {"output": self.output, "executor": self.executor == "ray"}
        if not self.file:
            if given := [name for name, value in own.items() if value]:
                raise ValueError(f"{given[0]}= is for many prompts: name them, file=PROMPTS.jsonl")
            return
        if not self.output:
            raise ValueError("file= has many completions: name a folder for them, output=FOLDER")
        one = ("prompt", "system", "trace", "html", "replay", "json")
        given = [n for n in one if getattr(self, n)] + ["viz"] * (self.viz != "none")
        if given:
            raise ValueError(f"{given[0]}= is for one prompt; leave it out, or file=")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return going_on(self.output) if self.file else ""

    def asked(self, llm: "LLM") -> "Prompt":
        """What the model is asked; ValueError where it has no tokenizer and this is no ids."""
        if llm.tokenizer is None:
            if self.system or not all(word.isdecimal() for word in self.prompt.split()):
                raise ValueError(
                    f"{self.model} has no tokenizer: write token ids, prompt='1 2 3', and no "
                    f"system prompt, got {self.system + self.prompt[:40]!r}"
                )
            return [int(word) for word in self.prompt.split()]
        user = {"role": "user", "content": self.prompt}
        return [{"role": "system", "content": self.system}, user] if self.system else self.prompt

    @property
    def outputs(self) -> dict[str, Path]:
        """The files to write."""
        return {n: path for n in ("trace", "html") if (path := getattr(self, n))}


@processes.joined()
def generate(config: GenerateConfig) -> None:
    """Completes the prompt, or shows a recorded run, and writes the files that were asked for."""
    for path in config.outputs.values():
        files.require_writable(path)  # now rather than after the run
    if config.file:
        enable_compilation_cache()
        complete_file(config)
    elif config.replay:
        show_again(config, trace.read(config.replay))
    else:
        complete(config)


def complete(config: GenerateConfig) -> None:
    """Prints the completion; a line on standard error says what it cost."""
    enable_compilation_cache()
    age, begun = process_age(), time.perf_counter()
    with Bar(total=1, unit="prompt", leave=False, disable=not processes.is_main()) as bar:
        bar.set_postfix_str(f"loading {config.model}")
        llm = config.load_llm()
        jax.block_until_ready(llm.model)
        weights = time.perf_counter() - begun
        bar.set_postfix_str("")
        watched = config.viz == "live" or config.outputs
        if not watched:
            (batch,) = llm.stream([config.asked(llm)], config.decode, chat=config.chat)
    if watched:
        batch = watch(llm, config)
    elif not config.json:
        print(shown(batch.completions[0]))
    completion = batch.completions[0]
    tokens = len(completion.ids)
    start = {} if age is None else {"start": age}
    start |= {
        "weights": weights,
        "compilation": batch.compile_seconds,
        "tokens": time.perf_counter() - begun - weights - batch.compile_seconds,
    }
    if config.json:
        facts = describe(llm, config, llm.resolve(config.decode), batch)
        facts |= {"ids": completion.ids, "compile_seconds": round(batch.compile_seconds, 6)}
        facts["start_seconds"] = {name: round(seconds, 6) for name, seconds in start.items()}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    processes.say(
        f"\nfinish {completion.finish_reason}, {tokens} tokens, NFE {completion.nfe}, "
        f"{tokens / batch.seconds:.1f} tokens/s on {processes.describe()}, "
        f"{sharding.describe(llm.mesh)} "
        f"(compilation {batch.compile_seconds:.1f} s apart)\n"
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in start.items())
    )


def shown(completion: "Completion") -> str:
    """A completion's text, or its ids where the model has no tokenizer."""
    return " ".join(map(str, completion.ids)) if completion.text is None else completion.text


def watch(llm: "LLM", config: GenerateConfig) -> "Batch":
    """Completes the prompt with every model call shown and recorded."""
    facts, decode = llm.config, llm.resolve(config.decode)
    pieces = Lexicon(llm.tokenizer, facts.mask_id, (*facts.stop_ids, facts.eos_id))
    with Player(pieces, config.fps, shown=config.viz == "live") as player:
        (batch,) = llm.stream(
            [config.asked(llm)],
            decode,
            chat=config.chat,
            watch=lambda _, stretch: player(stretch),
        )
    about = describe(llm, config, decode, batch)
    if not config.json:
        player.finish(shown(batch.completions[0]))
    save(config, trace.Run(player.record, pieces, about))
    return batch


def show_again(config: GenerateConfig, run: trace.Run) -> None:
    """Shows a recorded run."""
    with Player(run.pieces, config.fps, shown=config.viz == "live") as player:
        player(run.record)
    player.finish(run.about.get("completion") or "")
    save(config, run)


def save(config: GenerateConfig, run: trace.Run) -> None:
    """Writes the trace and the page, where they were asked for."""
    if not processes.is_main():
        return
    if config.trace:
        trace.write(config.trace, run)
    if config.html:
        replay.write(config.html, run)


def describe(
    llm: "LLM", config: GenerateConfig, decode: DecodeConfig, batch: "Batch"
) -> dict[str, Any]:
    """What a trace says about its run."""
    completion = batch.completions[0]
    return {
        "prompt": config.prompt,
        "system": config.system,
        "completion": shown(completion),
        "finish_reason": completion.finish_reason,
        "nfe": completion.nfe,
        "seconds": round(batch.seconds, 6),
        "model": config.model,
        "chat": config.chat,
        "decode": dataclasses.asdict(decode),
        "environment": {
            "jdllm": jdllm.__version__,
            "jax": version("jax"),
            "python": platform.python_version(),
            "mesh": sharding.describe(llm.mesh),
            "dtype": llm.config.dtype,
        },
    }
