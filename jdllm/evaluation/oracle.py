"""The oracle's stop: the first call from which a document's verdict stays as it ends."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdllm.completion import complete
from jdllm.decode import DecodeConfig
from jdllm.evaluation.results import Sample
from jdllm.viz import trace


def answers(record: trace.Record, gen_length: int) -> list[np.ndarray]:
    """The generated ids after every call, what the call had in view filled with its candidates.

    That is what an exit at this call would leave of the block; later blocks stay masked.
    """
    start = record.prompt_length
    found = []
    for call in range(1, record.calls + 1):
        ids, guess = record.tokens[call], record.guesses[call - 1]
        open_T = (ids == record.mask_id) & (guess >= 0)
        found.append(np.where(open_T, guess, ids)[start : start + gen_length])
    return found


def settled(verdicts: Sequence[bool]) -> int:
    """The number, from 1, of the first call from which the verdict is right to the end.

    All of them where the last one is wrong.
    """
    last = max((i for i, right in enumerate(verdicts) if not right), default=-1)
    return min(last + 2, len(verdicts))


def stops(
    llm: Any, samples: Sequence[Sample], decode: DecodeConfig, right: Callable[[Sample, str], bool],
    batch_size: int, chat: bool,
) -> list[int]:  # fmt: skip
    """The oracle's stop of every sample, decoded again with every call recorded.

    `right` judges a text. ValueError where the texts are not those of the samples.
    """
    parts: list[list[trace.Record]] = [[] for _ in samples]
    texts: dict[int, str | None] = {}
    prompts = [sample.prompt for sample in samples]
    for batch in llm.stream(
        prompts, decode, batch_size=batch_size, chat=chat,
        watch=lambda i, part: parts[i].append(part),
    ):  # fmt: skip
        texts |= {i: c.text for i, c in zip(batch.index, batch.completions, strict=True)}
    if any(texts[i] != sample.completion for i, sample in enumerate(samples)):
        raise ValueError("the oracle decodes other texts than the run it is compared with")
    gen_length = llm.resolve(decode).gen_length
    found = []
    for sample, own in zip(samples, parts, strict=True):
        seen: dict[str, bool] = {}
        verdicts = []
        for ids in answers(trace.join(own), gen_length):
            text = complete(ids, 0, llm.config, llm.tokenizer).text or ""
            if text not in seen:
                seen[text] = right(sample, text)
            verdicts.append(seen[text])
        found.append(settled(verdicts))
    return found
