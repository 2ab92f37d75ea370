"""Stop rules: when a row has its answer. Small frozen objects that know arrays only."""

from jdllm.stop.budget import Budget
from jdllm.stop.ends import EosAnywhere, EosBlock, EosFill, EosReturn, EosStop
from jdllm.stop.rule import Look, NoStop, Stop, Stops, Verdict
from jdllm.stop.stable import Stable
from jdllm.stop.strings import StopStrings

__all__ = [
    "Budget", "EosAnywhere", "EosBlock", "EosFill", "EosReturn", "EosStop", "Look", "NoStop",
    "Stable", "Stop", "StopStrings", "Stops", "Verdict",
]  # fmt: skip
