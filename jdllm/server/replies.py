"""OpenAI's replies: whole ones, and the chunks of a stream."""

import json
import time
import uuid
from typing import Any

import numpy as np

from jdllm.engine import Progress
from jdllm.llm import LLM
from jdllm.server.openai import Asked
from jdllm.server.text import Text, log


class Reply:
    """What a request is answered with, in the form of its interface."""

    def __init__(self, llm: LLM, asked: Asked, name: str):
        self.llm, self.asked = llm, asked
        kind = "chat.completion" if asked.chat else "text_completion"
        self.kind = kind
        self.facts: dict[str, Any] = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The only answer of a request that is no stream."""
        return self.facts | {"object": self.kind, "choices": choices, "usage": usage}

    def choice(self, number: int, text: Text, reason: str, chances: list[float]) -> dict[str, Any]:
        """One completion of a whole answer."""
        found: dict[str, Any] = {"index": number, "finish_reason": reason}
        found["logprobs"] = self.logprobs(text.ids, chances) if self.asked.logprobs else None
        if self.asked.chat:
            return found | {"message": {"role": "assistant", "content": text.whole}}
        return found | {"text": text.whole}

    def chunk(self, **facts: Any) -> bytes:
        """A chunk of a stream."""
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        whole: dict[str, Any] = self.facts | {"object": kind, "choices": []} | facts
        return b"data: " + json.dumps(whole, ensure_ascii=False).encode() + b"\n\n"

    def delta(
        self, number: int, text: str, ids: list[int], chances: list[float], reason: str | None
    ) -> dict[str, Any]:
        """What one completion gains in a chunk."""
        found: dict[str, Any] = {"index": number, "finish_reason": reason}
        found["logprobs"] = self.logprobs(ids, chances) if self.asked.logprobs else None
        if self.asked.chat:
            return found | {"delta": {"role": "assistant", "content": text}}
        return found | {"text": text}

    def usage(self, prompt: int, tokens: int, nfe: int) -> dict[str, Any]:
        """What a request cost: tokens, and model evaluations."""
        return {
            "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
            "nfe": nfe,
        }  # fmt: skip

    def logprobs(self, ids: list[int], chances: list[float]) -> dict[str, Any]:
        """The logarithm of each token's probability when it was taken."""
        pieces = [self.piece(token) for token in ids]
        logs = [log(chance) for chance in chances]
        if self.asked.chat:
            content = [
                {"token": piece, "logprob": value, "bytes": list(piece.encode()),
                 "top_logprobs": []}
                for piece, value in zip(pieces, logs, strict=True)
            ]  # fmt: skip
            return {"content": content, "refusal": None}
        starts = np.cumsum([0, *map(len, pieces)])[:-1].tolist()
        return {
            "tokens": pieces, "token_logprobs": logs, "top_logprobs": None, "text_offset": starts,
        }  # fmt: skip

    def piece(self, token: int) -> str:
        """The text of one token."""
        return self.llm.tokenizer.decode([token])  # pyright: ignore[reportOptionalMemberAccess]

    def canvas(self, number: int, progress: Progress, cap: int) -> dict[str, Any]:
        """A canvas in work: the text of every column (null while it is open), the evaluation that
        filled it, its place in the order in which columns were filled, and its probability."""
        open_ = progress.open[:cap].tolist()
        steps = progress.filled_at[:cap]
        order = np.empty(len(steps), int)
        order[np.lexsort((np.arange(len(steps)), steps, open_))] = np.arange(len(steps))
        return {
            "index": number,
            "text": [None if o else self.piece(t)
                     for o, t in zip(open_, progress.tokens[:cap].tolist(), strict=True)],
            "step": steps.tolist(),
            "order": order.tolist(),
            "chance": np.round(progress.chance[:cap], 4).tolist(),
            "settled": min(progress.settled, cap),
            "nfe": progress.nfe,
        }  # fmt: skip
