"""Metrics for Prometheus: what waits, what runs, how long it takes, and what it costs."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jdllm.engine import Engines
from jdllm.server.text import Piece

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's, in a registry of their own."""

    def __init__(self, engines: Engines):
        self.registry = registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": registry}
        self.requests = Counter(
            "jdllm_completions", "Completions by how they ended", ["reason"], **make
        )
        self.tokens = Counter("jdllm_completion_tokens", "Tokens of completions", **make)
        self.nfe = Counter("jdllm_nfe", "Model evaluations of completions", **make)
        self.first_block = Histogram(
            "jdllm_first_block_seconds", "Time to the first block", buckets=SECONDS, **make
        )
        self.seconds = Histogram(
            "jdllm_request_seconds", "Time to the end of a request", buckets=SECONDS, **make
        )
        for name, words, value in (
            ("waiting", "Completions that wait", lambda e: len(e.scheduler.waiting)),
            ("running", "Completions that run", lambda e: len(e.scheduler.running)),
            ("free_pages", "Pages of the cache that are free", lambda e: e.scheduler.pool.free),
            ("forwards", "Model calls so far", lambda e: e.calls),
        ):
            gauge = Gauge(f"jdllm_{name}", words, **make)
            gauge.set_function(lambda value=value: sum(map(value, engines.engines)))

    def ended(self, piece: Piece, tokens: int) -> None:
        """Counts a completion that is over."""
        self.requests.labels(piece.reason).inc()
        self.tokens.inc(tokens)
        self.nfe.inc(piece.nfe)

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self.registry)
