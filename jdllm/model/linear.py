"""The table of linear maps: which parameters are some, and of which modules they are fused.

A module is one matrix as Hugging Face's code and LoRA know it, named by its layer and its part:
layers.3.attention.q (k, v, out), layers.3.mlp.gate (up, down), the same under layers.3.shared and
layers.3.experts, and layers.3.experts.router. Our parameters hold several of them as one weight.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

STACK, EXPERTS = "C", "E"  # letters of the axes that hold modules, and experts, side by side


@dataclasses.dataclass(frozen=True)
class Linear:
    """A parameter that maps inputs to outputs."""

    letters: str
    """Its axes; `jdllm.model.transformer` has the key."""
    inputs: str
    """Those that a product sums over."""
    parts: tuple[str, ...]
    """The modules in it, in the order of the stack where there are several."""

    @property
    def outputs(self) -> str:
        """Letters of what one module gives."""
        return "".join(x for x in self.letters if x not in self.inputs + STACK + self.experts)

    @property
    def experts(self) -> str:
        """E where every expert has its own matrix, else nothing."""
        return EXPERTS if self.letters[0] == EXPERTS else ""

    def axes(self, letters: str) -> tuple[int, ...]:
        """Where these letters stand."""
        return tuple(self.letters.index(x) for x in letters)


GATE_UP, DOWN = Linear("DCF", "D", ("gate", "up")), Linear("FD", "F", ("down",))
# By what follows the number of the layer.
LINEAR: dict[str, Linear] = {
    "attention.qkv": Linear("DCHK", "D", ("q", "k", "v")),
    "attention.q": Linear("DHK", "D", ("q",)),
    "attention.kv": Linear("DCGK", "D", ("k", "v")),
    "attention.out": Linear("HKD", "HK", ("out",)),
    "mlp.gate_up": GATE_UP,
    "mlp.down": DOWN,
    "shared.gate_up": GATE_UP,
    "shared.down": DOWN,
    "experts.router": Linear("DE", "D", ("router",)),
    "experts.gate_up": Linear("EDCM", "D", ("gate", "up")),
    "experts.down": Linear("EMD", "M", ("down",)),
}


def linear_of(parameter: str) -> Linear | None:
    """The row of LINEAR for a dotted name such as layers.3.attention.qkv; None for any other."""
    start, _, rest = parameter.partition(".")
    return LINEAR.get(rest.partition(".")[2]) if start == "layers" else None


@dataclasses.dataclass(frozen=True)
class Module:
    """Where one matrix of a model lies, and what it maps; sizes and logical axes are in step."""

    parameter: str
    experts: tuple[int, ...]
    """The number of experts, where every one has its own."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    expert_axes: tuple[str, ...]
    input_axes: tuple[str, ...]
    output_axes: tuple[str, ...]


def module_names(parameter: str) -> tuple[str, ...]:
    """The names of the modules that a parameter holds, in the order of its stack."""
    linear, place = linear_of(parameter), parameter.rpartition(".")[0]
    return tuple(f"{place}.{part}" for part in linear.parts) if linear else ()


def modules(parameters: Mapping[str, nnx.Param]) -> dict[str, Module]:
    """Every module of the parameters, given by dotted name, by layer and in the order of LINEAR.

    Of the parameters only shapes and axes are read.
    """

    def order(name: str) -> tuple[int, int]:
        _, layer, rest = name.split(".", 2)
        return int(layer), list(LINEAR).index(rest)

    found = {}
    for name in sorted(filter(linear_of, parameters), key=order):
        linear, leaf = linear_of(name), parameters[name]
        if linear:
            module = _module(linear, name, leaf.shape, leaf.get_metadata("axes"))
            found |= dict.fromkeys(module_names(name), module)
    return found


def _module(linear: Linear, name: str, shape: Sequence[int], axes: Sequence[str]) -> Module:
    sides = [linear.axes(letters) for letters in (linear.experts, linear.inputs, linear.outputs)]
    experts, inputs, outputs = (tuple(shape[i] for i in side) for side in sides)
    expert_axes, input_axes, output_axes = (tuple(axes[i] for i in side) for side in sides)
    return Module(name, experts, inputs, outputs, expert_axes, input_axes, output_axes)
