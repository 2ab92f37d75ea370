"""Stop rules decide when a row has its answer: small frozen objects that know only arrays."""

from jdllm.stop.budget import Budget
from jdllm.stop.dynamics import Aim, Drift
from jdllm.stop.ends import EosAnywhere, EosBlock, EosFill, EosReturn, EosStop
from jdllm.stop.exit import Entropy, Exit, Prophet, SchED, Signal, Steps, Unchanged
from jdllm.stop.rule import Asks, Look, NoStop, Stop, Stops, StopView, Verdict
from jdllm.stop.stable import Stable
from jdllm.stop.strings import StopStrings

__all__ = [
    "Aim", "Asks", "Budget", "Drift", "Entropy", "EosAnywhere", "EosBlock", "EosFill", "EosReturn",
    "EosStop", "Exit", "Look", "NoStop", "Prophet", "SchED", "Signal", "Stable", "Steps", "Stop",
    "StopStrings", "StopView", "Stops", "Unchanged", "Verdict",
]  # fmt: skip
