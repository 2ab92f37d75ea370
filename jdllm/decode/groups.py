"""Settings that belong together: one frozen dataclass per method, off by its defaults."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from jdllm.decode.aims import MAPS
from jdllm.decode.checks import INFINITY, Ranges, check_group, check_read
from jdllm.decode.rules import EXITS
from jdllm.stop.dynamics import Energy
from jdllm.stop.exit import Curve

if TYPE_CHECKING:
    type ExitName = str
    type MapName = str
else:  # the names in the tables, so that a new row is a new choice
    ExitName = Literal["off", *EXITS]
    MapName = Literal[*MAPS]


@dataclasses.dataclass(frozen=True)
class Credit:
    """dInfer: tokens that were on top of a position before gain logits."""

    ranges: ClassVar[Ranges] = {"alpha": (0, INFINITY), "beta": (0, 1), "gamma": (0, INFINITY)}

    alpha: float = 0.0
    """Weight of log(1 + credit); 0 is off, dInfer has 0.7."""
    beta: float = 0.8
    """Decay of credit in every call."""
    gamma: float = 0.2
    """The top token gains p ** gamma."""

    def __post_init__(self):
        check_group(self, "credit", "alpha")


@dataclasses.dataclass(frozen=True)
class Edit:
    """LLaDA2.1, SGLang: generated tokens of a block may be replaced."""

    ranges: ClassVar[Ranges] = {
        "threshold": (0, 1), "passes": (0, INFINITY), "penalty": (0, INFINITY),
        "delete_id": (0, INFINITY), "split_id": (0, INFINITY),
    }  # fmt: skip

    threshold: float | None = None
    """A token is replaced by one of a probability above this; None is off, as 0 edits most."""
    passes: int = 16
    """Passes over a block without masks, at most."""
    penalty: float = 0.0
    """SGLang: taken off the logit of the left neighbour's token."""
    delete_id: int | None = None
    """SGLang's JointThresholdInDel: this token deletes its position."""
    split_id: int | None = None
    """SGLang's JointThresholdInDel: this token inserts a mask before its position."""

    def __post_init__(self):
        check_group(self, "edit")
        pair = f"edit.delete_id={self.delete_id} and edit.split_id={self.split_id}"
        if (self.delete_id is None) != (self.split_id is None):
            raise ValueError(f"{pair} go together; set both or neither")
        if self.delete_id is not None and self.delete_id == self.split_id:
            raise ValueError(f"{pair} must differ")
        if self.delete_id is not None and not self.on:
            raise ValueError(f"{pair} edit tokens; set edit.threshold too")

    @property
    def on(self) -> bool:
        """Whether tokens are edited."""
        return self.threshold is not None


@dataclasses.dataclass(frozen=True)
class Smooth:
    """dInfer's IterSmooth: a mask's embedding carries some of its prediction."""

    ranges: ClassVar[Ranges] = dict.fromkeys(("weight", "init", "growth", "decay"), (0, 1))

    weight: float = 0.0
    """How much of its prediction a mask's embedding carries, at most; 0 is off."""
    init: float = 0.15
    """The weight in the first call."""
    growth: float = 0.02
    """What every call adds to the weight."""
    decay: float = 0.02
    """The threshold falls from 1 by this much a call."""

    def __post_init__(self):
        check_group(self, "smooth", "weight")


@dataclasses.dataclass(frozen=True)
class Vicinity:
    """dInfer's vicinity refresh: columns near a block are computed again with it."""

    ranges: ClassVar[Ranges] = dict.fromkeys(("before", "after", "warmup"), (0, INFINITY))

    before: int = 0
    """prefix, dual: so many columns before the block are computed again with it."""
    after: int = 0
    """dual: so many columns behind the block are computed again with it."""
    warmup: int = 0
    """prefix, dual: so many passes of the first block are full."""

    def __post_init__(self):
        check_group(self, "vicinity")


@dataclasses.dataclass(frozen=True)
class Verify:
    """apd: rule=verify asks a causal model about drafts."""

    ranges: ClassVar[Ranges] = {
        "weight": (0, 1), "window": (0, INFINITY), "lookahead": (0, INFINITY),
    }  # fmt: skip

    weight: float = 0.5
    """The diffusion model's part in the mixture with the verifier; at 0 the verifier decides."""
    window: int = 0
    """Columns before the first mask that are computed again, the rest is cached; 0 is no cache."""
    lookahead: int = 0
    """Only so many columns from the first mask on are seen and filled, by any rule; 0 is all."""

    def __post_init__(self):
        check_group(self, "verify")


@dataclasses.dataclass(frozen=True)
class Dinfer:
    """parity=dinfer: how many calls its runner makes before it looks at what is left to do."""

    ranges: ClassVar[Ranges] = dict.fromkeys(("expected_tpf", "maximum_unroll"), (1, INFINITY))

    expected_tpf: int = 8
    """Masks / this = calls made without looking."""
    maximum_unroll: int = 4
    """And at most so many."""

    def __post_init__(self):
        check_group(self, "dinfer")


@dataclasses.dataclass(frozen=True)
class Klass:
    """rule=klass: a token is taken once its distribution has stood still."""

    ranges: ClassVar[Ranges] = {"kl": (0, INFINITY), "steps": (1, INFINITY)}

    kl: float = 0.01
    """What KL(now || before) must stay below."""
    steps: int = 2
    """For so many calls in a row."""

    def __post_init__(self):
        check_group(self, "klass")


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """EDIT's transfer schedule: where in a block most of its tokens are written."""

    ranges: ClassVar[Ranges] = {"peak": (0, 1), "width": (1e-3, INFINITY)}

    peak: tuple[float, ...] = (0.25,)
    """schedule=gaussian: after which share of the steps, per block; the last one serves the rest.
    EDIT's files have the reciprocal, 4."""
    width: tuple[float, ...] = (0.2,)
    """schedule=gaussian: the standard deviation as a share of the steps, per block. EDIT's files
    have the reciprocal, 5. Much above 1 is the uniform schedule."""

    def __post_init__(self):
        check_group(self, "gaussian")
        for name in ("peak", "width"):
            if not getattr(self, name):
                raise ValueError(f"gaussian.{name}= must have a value per block, or one for all")


@dataclasses.dataclass(frozen=True)
class Exit:
    """EDIT and its rivals: a block is left, and the rest of it filled, once a signal is calm."""

    ranges: ClassVar[Ranges] = {
        "patience": (1, INFINITY), "required": (1, INFINITY), "polish": (0, INFINITY),
        "temperature": (1e-6, INFINITY),
    }  # fmt: skip

    mode: ExitName = "off"
    """The signal: docs/edit.md tells each."""
    threshold: tuple[float, ...] = ()
    """What the signal is compared with, per block; the last one serves the rest, here and below
    (default: the mode's)."""
    patience: tuple[int, ...] = ()
    """So many steps that the signal must have been calm (default: the mode's)."""
    required: tuple[int, ...] = ()
    """So many of them are enough (default: all)."""
    polish: tuple[int, ...] = ()
    """Calls in which what is open is written then; 0 is at once (default: the mode's)."""
    map: MapName = "mean"
    """code, paper: what activations are compared with: a window of the gradient dynamics, or a
    control."""
    modules: Literal["all", "last_query"] | None = None
    """code, paper: the adapted modules that are read (default: code all, paper the query of the
    last layer)."""
    energy: Energy = "l2"
    """paper: how the rows of a map become one vector."""
    temperature: float | None = None
    """code, paper: of the softmax (default: 0.1 for a block that began with nothing but masks)."""
    curve: Curve = "cosine"
    """sched: how the bar falls."""

    def __post_init__(self):
        check_group(self, "exit", "mode")
        defaults = {f"exit.{f.name}": f.default for f in dataclasses.fields(self)}
        values = {f"exit.{name}": value for name, value in vars(self).items()}
        if self.mode not in ("code", "paper"):
            names = ("exit.map", "exit.modules", "exit.temperature")
            check_read(values, defaults, names, "exit.mode=code or paper")
        if self.mode != "paper":
            check_read(values, defaults, ("exit.energy",), "exit.mode=paper")
        if self.mode != "sched":
            check_read(values, defaults, ("exit.curve",), "exit.mode=sched")
        if self.mode == "step" and not self.threshold:
            raise ValueError("exit.mode=step leaves after a number of steps; set exit.threshold=")

    @property
    def on(self) -> bool:
        """Whether blocks are left early."""
        return self.mode != "off"

    @property
    def aims(self) -> bool:
        """Whether the activations of an adapter are read."""
        return self.mode in ("code", "paper")
