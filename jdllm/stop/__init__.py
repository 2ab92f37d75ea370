"""Stop rules decide when a row has its answer: small frozen objects that know only arrays."""

from jdllm.stop.budget import Budget
from jdllm.stop.ends import EosAnywhere, EosBlock, EosFill, EosReturn, EosStop
from jdllm.stop.rule import NoStop, Stop, Stops, StopView, Verdict
from jdllm.stop.stable import Stable
from jdllm.stop.strings import StopStrings

__all__ = [
    "Budget", "EosAnywhere", "EosBlock", "EosFill", "EosReturn", "EosStop", "StopView", "NoStop",
    "Stable", "Stop", "StopStrings", "Stops", "Verdict",
]  # fmt: skip
