"""The bundled model learns countdown with four numbers by LoRA, then from its own right answers.

python experiments/lora_countdown.py output=runs/countdown4     (a GPU; ten minutes on an H100)

It was trained on three numbers. First supervised steps on generated puzzles; then, from there, two
ways to go on with equally many steps: more of the same, or one round of rejection sampling, which
learns from those of the model's own sampled answers that are right. Solved puzzles are counted on
held-out ones, before and after.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from jdllm import DecodeConfig
from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache
from jdllm.model.lora import LoraConfig
from jdllm.runtime import cli, files
from jdllm.runtime.environment import environment
from jdllm.tasks import TASKS
from jdllm.train.optimiser import Recipe
from jdllm.training.config import SFTConfig
from jdllm.training.dynamics import DynamicsConfig
from jdllm.training.run import fine_tune

TASK = TASKS["countdown4"]


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """How long, and how much. A killed run goes on where it was."""

    output: Path = Path("runs/countdown4")
    steps: int = 1500
    """Updates of the first, supervised stage."""
    more: int = 400
    """Updates of either way to go on."""
    batch: int = 1024
    rank: int = 32
    learning_rate: float = 2e-3
    examples: int = 200_000
    puzzles: int = 2000
    """Held-out puzzles that are graded."""
    prompts: int = 16_000
    """Training puzzles that are sampled for rejection sampling."""
    samples: int = 4
    """Answers per puzzle."""
    batch_size: int = 500


def stage(config: CountdownConfig, name: str, **settings: Any) -> Path:
    """Fine-tunes, and returns the adapter's folder."""
    output = config.output / name
    facts = {"task": "countdown4", "examples": config.examples} | settings
    lora = LoraConfig(rank=config.rank, targets="all")
    run = SFTConfig(
        model="bundled", output=output, length=104, response_length=64, batch=config.batch,
        lora=lora, save_every=500, log_every=20, **facts,
    )  # fmt: skip
    fine_tune(run)
    return output / "adapter"


def recipe(config: CountdownConfig, steps: int, rate: float) -> Recipe:
    """A short warm-up, then a cosine to zero."""
    return Recipe(
        steps=steps, learning_rate=rate, schedule="cosine", warmup=min(50, steps), beta2=0.98,
        weight_decay=0.0,
    )  # fmt: skip


def solved(config: CountdownConfig, adapter: Path | None) -> dict[str, Any]:
    """Share of held-out puzzles solved, with its standard error, by two ways of decoding."""
    llm = LLM.load("bundled", adapter=adapter)
    docs = TASK.generate(config.puzzles, 0, held_out=True)
    prompts, found = [TASK.prompt(doc) for doc in docs], {}
    for name, decode in {
        "threshold 0.9": DecodeConfig(gen_length=64, block_length=64),
        "one token per step": DecodeConfig(gen_length=64, block_length=64, rule="quota"),
    }.items():
        done = llm.generate(prompts, decode, batch_size=config.batch_size)
        right = [TASK.grade(d, c.text or "")["solved"] for d, c in zip(docs, done, strict=True)]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / len(right))
        nfe = sum(c.nfe for c in done) / len(done)
        found[name] = {"solved": share, "stderr": error, "n": len(right), "nfe": nfe}
    return found


def own_answers(config: CountdownConfig, adapter: Path, path: Path) -> dict[str, Any]:
    """Writes the right ones of sampled answers as training text, each once; returns the counts."""
    llm = LLM.load("bundled", adapter=adapter)
    docs = TASK.generate(config.prompts, 12345, held_out=False)
    asked = [doc for doc in docs for _ in range(config.samples)]
    decode = DecodeConfig(gen_length=64, block_length=64, temperature=1.0, sampling="categorical")
    done = llm.generate([TASK.prompt(doc) for doc in asked], decode, batch_size=config.batch_size)
    rows, right = {}, 0
    for doc, completion in zip(asked, done, strict=True):
        text = (completion.text or "").strip()
        if TASK.grade(doc, text)["solved"]:
            right += 1
            rows[TASK.prompt(doc), text] = {"prompt": TASK.prompt(doc), "response": text}
    with files.atomic_file(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    return {"sampled": len(asked), "right": right, "kept": len(rows)}


def main(config: CountdownConfig) -> None:
    """Trains, samples, trains and grades; writes summary.json after each of them."""
    enable_compilation_cache()
    files.make_folder(config.output)
    facts: dict[str, Any] = {"config": dataclasses.asdict(config)} | environment()
    start = time.perf_counter()

    def note(name: str, found: Any) -> None:
        facts[name] = found
        facts["seconds"] = time.perf_counter() - start
        files.write_json(config.output / "summary.json", json.loads(json.dumps(facts, default=str)))
        print(name, found, f"{facts['seconds']:.0f} s", flush=True)

    note("before", solved(config, None))
    first = recipe(config, config.steps, config.learning_rate)
    dynamics = DynamicsConfig("mean,late,ema,momentum")  # what docs/edit.md's comparison reads
    adapter = stage(config, "first", recipe=first, dynamics=dynamics)
    note("first", solved(config, adapter))
    text = config.output / "own.jsonl"
    note("own answers", own_answers(config, adapter, text))
    second = recipe(config, config.more, config.learning_rate / 4)
    more = stage(config, "more", recipe=second, adapter=adapter, seed=1)
    note("more supervised steps", solved(config, more))
    own = {"task": None, "data": str(text)}
    rejection = stage(config, "rejection", recipe=second, adapter=adapter, seed=1, **own)
    note("rejection sampling", solved(config, rejection))


if __name__ == "__main__":
    cli.run(main, CountdownConfig, "python experiments/lora_countdown.py")
