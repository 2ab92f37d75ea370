"""The engine: many requests share one model, each at its own block, in pages of one cache."""

from jdllm.engine.config import EngineConfig
from jdllm.engine.dials import shared
from jdllm.engine.engine import Engine, servable
from jdllm.engine.job import Job, Outcome, Progress, make_canvas
from jdllm.engine.replicas import Engines

__all__ = [
    "Engine", "EngineConfig", "Engines", "Job", "Outcome", "Progress", "make_canvas", "servable",
    "shared",
]  # fmt: skip
