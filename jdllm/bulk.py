"""Bulk generation: a file of prompts in, a folder with their completions out, kill after kill."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdllm.decode import DecodeConfig
from jdllm.evaluation.run import open_journal
from jdllm.runtime import processes
from jdllm.runtime.files import write_json_lines
from jdllm.runtime.journal import Journal, digest, number_repeats
from jdllm.runtime.progress import Bar

if TYPE_CHECKING:  # imported when it runs, so that --help is quick
    from jdllm.llm import LLM, Prompt

COMPLETIONS = "completions.jsonl"


def read_prompts(path: Path) -> list["Prompt"]:
    """The prompts of a file: lines of text, or of JSON with `prompt` or `messages`.

    ValueError, with the line, where one is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file={path} cannot be read: {error}") from None
    found = [
        read_line(line, f"{path}: line {number}") if path.suffix == ".jsonl" else line
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"file={path} has no prompt; write one per line")
    return found


def read_line(line: str, where: str) -> "Prompt":
    """The prompt of a line of JSON."""
    try:
        facts = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    facts = facts if isinstance(facts, dict) else {}
    prompt, messages = facts.get("prompt"), facts.get("messages")
    if isinstance(prompt, str) and messages is None:
        return prompt
    if prompt is None and isinstance(messages, list) and messages:
        return messages
    raise ValueError(f'{where} must be {{"prompt": "text"}} or {{"messages": [...]}}')


def complete_all(
    llm: "LLM", prompts: Sequence["Prompt"], decode: DecodeConfig, journal: Journal,
    chat: bool = True, batch_size: int = 32,
) -> list[dict[str, Any]]:  # fmt: skip
    """A record per prompt, in order; what the journal holds is not generated again."""
    decode, rows = llm.resolve(decode), llm.encode(prompts, chat)
    facts = {"model": llm.fingerprint(), "decode": dataclasses.asdict(decode)}
    if decode.rule == "verify":
        facts["verifier"] = llm.verifier_fingerprint()
    if decode.exit.aims:
        facts["maps"] = llm.maps.digest(decode.exit)
    keys, samples = number_repeats([digest(facts | {"prompt": row}) for row in rows])
    missing = [i for i, key in enumerate(keys) if key not in journal]
    with Bar(total=len(rows), unit="prompt", disable=not processes.is_main()) as bar:
        bar.update(len(rows) - len(missing))
        for batch in llm.stream(
            [rows[i] for i in missing], decode, batch_size=batch_size,
            samples=[samples[i] for i in missing],
        ):  # fmt: skip
            chosen = [missing[i] for i in batch.index]
            journal.append(
                {"key": keys[i]} | dataclasses.asdict(completion)
                for i, completion in zip(chosen, batch.completions, strict=True)
            )
            bar.update(len(chosen))
    return [{name: v for name, v in journal[key].items() if name != "key"} for key in keys]


def complete_file(config: Any) -> None:
    """Completes every prompt of `config.file`, a jdllm.generation.GenerateConfig.

    Completions go into `config.output`, in the order of the file.
    """
    prompts = read_prompts(config.file)
    with contextlib.ExitStack() as stack:
        journal = open_journal(config.output, stack)
        if journal.records:
            processes.say(f"{len(journal.records)} prompts are finished in {config.output} already")
        llm = config.load_llm()
        found = complete_all(llm, prompts, config.decode, journal, config.chat, config.batch_size)
        if processes.is_main():
            lines = ({"prompt": p} | one for p, one in zip(prompts, found, strict=True))
            write_json_lines(config.output / COMPLETIONS, lines)
    processes.say(f"wrote {config.output / COMPLETIONS}: {len(found)} completions")
