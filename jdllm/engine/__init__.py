"""The engine: many requests share one model, each at its own block, in pages of one cache."""

from jdllm.engine.engine import Engine, EngineConfig
from jdllm.engine.job import Job, Outcome, Progress

__all__ = ["Engine", "EngineConfig", "Job", "Outcome", "Progress"]
