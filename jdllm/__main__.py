"""Names the commands and starts one: `jdllm eval ...` is `python -m jdllm.eval ...`.

jdllm eval task=countdown limit=20
jdllm generate prompt="..." viz=live
jdllm completion bash > ~/.local/share/bash-completion/completions/jdllm
"""

import difflib
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "eval": "evaluates a model on tasks; without arguments, the bundled one on 100 sudoku",
    "generate": "completes one prompt, and shows how it came about",
    "sweep": "evaluates many settings, and draws what they cost",
    "tune": "finds the fastest setting that loses little",
    "bench": "times blocked, cached decoding against vanilla",
    "sft": "fine-tunes a model, or trains one from scratch",
    "convert": "converts Hugging Face checkpoints and back; plans memory",
    "launch": "starts a command as several processes of this machine",
    "harness": "is lm-eval's own command line, which knows the model jdllm",
    "serve": "serves a model over HTTP, with OpenAI's interface and a page",
    "chat": "chats in the terminal",
    "doctor": "says whether this machine is set up right",
    "completion": "prints what makes bash or zsh complete all of these",
}
# What the words of a command set, as module:name; a name in capitals has those of subcommands.
# Only what is named is imported, so that this list and a typo take no time.
CONFIGS: dict[str, str | None] = {
    "eval": "jdllm.evaluation.config:EvalConfig",
    "generate": "jdllm.generate:GenerateConfig",
    "sweep": "jdllm.evaluation.sweeps:SweepConfig",
    "tune": "jdllm.evaluation.tuning:TuneConfig",
    "bench": "jdllm.evaluation.bench:BenchConfig",
    "bench grid": "jdllm.evaluation.grid:GridConfig",
    "sft": "jdllm.sft:SFTConfig",
    "convert": "jdllm.convert.commands:CONFIGS",
    "launch": "jdllm.launch:LaunchConfig",
    "harness": None,
    "serve": "jdllm.server.config:ServeConfig",
    "chat": "jdllm.server.terminal:ChatConfig",
    "doctor": "jdllm.doctor:DoctorConfig",
    "completion": None,
    "completion bash": None,
    "completion zsh": None,
}


def configs() -> dict[str, type | None]:
    """Returns the dataclass that each command's words set, by command; imports all of them."""
    found: dict[str, type | None] = {}
    for command, place in CONFIGS.items():
        module, _, name = (place or "").partition(":")
        config: Any = getattr(importlib.import_module(module), name) if module else None
        if isinstance(config, dict):
            found |= {command: None} | {f"{command} {word}": one for word, one in config.items()}
        else:
            found[command] = config
    return found


def completion(words: Sequence[str]) -> None:
    """Prints the script for the shell that is named."""
    from jdllm.runtime import cli, shell

    with cli.one_sentence():
        print(shell.script(" ".join(words), "jdllm", configs()), end="")


def overview() -> str:
    """Returns the commands with one line each."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    end = "jdllm COMMAND --help lists the settings of a command, which are key=value words."
    return "\n".join(["usage: jdllm COMMAND [key=value ...]", "", *lines, "", end])


def main() -> None:
    """Runs the command that the first word names, as `python -m` would."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        try:
            print(overview(), flush=True)
        except BrokenPipeError:  # its reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
    elif name == "completion":
        completion(words)
    elif name in COMMANDS:
        sys.argv = [sys.argv[0], *words]
        runpy.run_module(f"jdllm.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: jdllm has no command {name!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
