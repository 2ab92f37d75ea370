"""The HTTP face of the service: routes, limits, keys, errors."""

import asyncio
import contextlib
import hmac
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from jdllm.server.openai import Asked, Refused, read
from jdllm.server.replies import Reply
from jdllm.server.service import Event, Service
from jdllm.server.structured import Answer

PATIENCE = 30
"""Seconds within which a body must be there."""
PAGE = Path(__file__).with_name("page.html")


def make_app(service: Service) -> FastAPI:
    """The application in front of a service that has been started."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    key = service.config.api_key or os.environ.get("JDLLM_API_KEY", "")

    async def guard(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "the API key is missing or wrong")

    kept = APIRouter(dependencies=[Depends(guard)])

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(error)

    @app.get("/health")
    async def health() -> Response:
        good = not service.closing and service.engines.alive
        return JSONResponse({"status": "ok" if good else "ending"}, 200 if good else 503)

    @kept.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @kept.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(service)]}

    @kept.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.config.title:
            raise Refused(404, f"there is no model {name} here", "model", "model_not_found")
        return describe(service)

    @kept.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(service, request, chat=True)

    @kept.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(service, request, chat=False)

    @app.get("/")
    async def page() -> Response:
        headers = {"content-security-policy": POLICY, "x-frame-options": "DENY"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    app.include_router(kept)
    return app


POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)


def refusal(error: Refused) -> Response:
    """The answer to what is not served."""
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers)


def describe(service: Service) -> dict[str, Any]:
    """The model, as clients list it."""
    return {
        "id": service.config.title, "object": "model", "created": 0, "owned_by": "jdllm",
        "max_model_len": service.engines.config.columns,
    }  # fmt: skip


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request. Refused where it is too long, before all of it is read, too slow, or
    of another kind."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Pages of other sites may send anything else without asking the browser.
        raise Refused(415, "the content-type of a request must be application/json")
    parts, length = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                length += len(part)
                if length > most:
                    raise Refused(413, f"a request must not be longer than {most} bytes")
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body of a request took more than {PATIENCE} seconds") from None
    return b"".join(parts)


async def answer(service: Service, request: Request, chat: bool) -> Response:
    """Reads a request, and answers it whole or as a stream."""
    asked = read(await body_of(request, service.config.max_body), chat, service.config)
    if asked.schema or asked.choices:
        return structured(service, asked, await service.answer(asked))
    jobs = await asyncio.to_thread(service.jobs, asked)  # tokenising takes its time
    reply = Reply(service.llm, asked, service.config.title)
    events = service.run(jobs, asked)
    prompt = sum(job.prompt for job, _ in jobs) // asked.n
    if asked.stream:
        first = await anext(events)  # so that a refusal has its status
        stream = streamed(reply, asked, first, events, jobs, prompt)
        return StreamingResponse(stream, media_type="text/event-stream")
    return await whole(reply, request, events, jobs, prompt)


def structured(service: Service, asked: Asked, found: Answer) -> Response:
    """An answer from slots: whole, or as a stream of one piece."""
    reply = Reply(service.llm, asked, service.config.title)
    usage = reply.usage(found.prompt, found.tokens, found.nfe)
    extra = {"answer": {"probabilities": found.chances}} if found.chances else {}
    if asked.stream:
        delta = reply.delta(0, found.text, [], [], "stop")
        parts = [reply.chunk(choices=[delta | extra]), b"data: [DONE]\n\n"]
        return StreamingResponse(iter(parts), media_type="text/event-stream")
    message = {"role": "assistant", "content": found.text}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    return JSONResponse(reply.whole([choice | extra], usage))


async def whole(
    reply: Reply, request: Request, events: AsyncIterator[Event], jobs: Any, prompt: int
) -> Response:
    """The answer when everything is there. Of a client that leaves the jobs are taken back."""
    chances: list[list[float]] = [[] for _ in jobs]
    reasons, nfe = [""] * len(jobs), 0

    async def collect() -> None:
        nonlocal nfe
        async for event in events:
            chances[event.number] += event.piece.chances
            if event.piece.over:
                reasons[event.number], nfe = event.piece.reason, nfe + event.piece.nfe

    async def leaving() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(collect()), asyncio.create_task(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await events.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    if "failed" in reasons:
        raise Refused(500, "the model gave something that is no number; nothing can be said")
    texts = [text for _, text in jobs]
    choices = [reply.choice(i, text, reasons[i], chances[i]) for i, text in enumerate(texts)]
    usage = reply.usage(prompt, sum(len(text.ids) for text in texts), nfe)
    return JSONResponse(reply.whole(choices, usage))


async def streamed(
    reply: Reply,
    asked: Asked,
    first: Event,
    events: AsyncIterator[Event],
    jobs: Any,
    prompt: int,
) -> AsyncIterator[bytes]:
    """The answer block by block, as server-sent events."""
    nfe = 0

    async def all_events() -> AsyncIterator[Event]:
        yield first
        async for event in events:
            yield event

    try:
        async for event in all_events():
            piece, number = event.piece, event.number
            facts: dict[str, Any] = {}
            if asked.canvas:
                facts["canvas"] = reply.canvas(number, event.progress, jobs[number][1].cap)
            if piece.reason == "failed" and piece.over:
                error = Refused(500, "the model gave something that is no number")
                yield reply.chunk(**error.body)
            elif piece.text or piece.ids or piece.over:
                reason = piece.reason if piece.over else None
                delta = reply.delta(number, piece.text, piece.ids, piece.chances, reason)
                yield reply.chunk(choices=[delta], **facts)
            elif facts:
                yield reply.chunk(**facts)
            nfe += piece.nfe if piece.over else 0
        if asked.usage_in_stream:
            tokens = sum(len(text.ids) for _, text in jobs)
            yield reply.chunk(usage=reply.usage(prompt, tokens, nfe))
        yield b"data: [DONE]\n\n"
    except Refused as error:  # too late for a status
        yield reply.chunk(**error.body)
    finally:
        await events.aclose()  # pyright: ignore[reportAttributeAccessIssue]
