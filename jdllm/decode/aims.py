"""Aims of an adapter: what exit.mode=code and paper compare its activations with, and the controls.

A map is a matrix [outputs, R] per module. EDIT's is the mean update of B; beside it stand maps that
know less, or nothing, of the training, so that one can see what the map is worth.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jdllm.stop import Aim, Drift, Exit
from jdllm.stop.dynamics import aim_at, row_energy
from jdllm.stop.rule import with_rule

if TYPE_CHECKING:  # groups.py reads the names in the table
    from jdllm.decode.groups import Exit as Settings
    from jdllm.decode.setup import Setup

Windows = Callable[[str], Mapping[str, np.ndarray]]
"""Reads the recorded maps of a window, by module."""


def shuffled(map_FR: np.ndarray, name: str) -> np.ndarray:
    """The map with its rows in another order, the same one in every run."""
    return map_FR[np.random.default_rng(zlib.crc32(name.encode())).permutation(len(map_FR))]


def gaussian(b_FR: np.ndarray, name: str) -> np.ndarray:
    """Normal draws of the shape of B, the same ones in every run."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=b_FR.shape)


WINDOW: dict[str, str] = {
    "mean": "mean", "late": "late", "ema": "ema", "momentum": "momentum", "shuffled": "mean",
}  # fmt: skip
"""exit.map: the window that it is made of; the others need none."""
MAPS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "mean": lambda x, name: x,  # the whole run (EDIT)
    "late": lambda x, name: x,  # its last tenth
    "ema": lambda x, name: x,  # a moving average
    "momentum": lambda x, name: x,  # the first moment alone
    "weights": lambda x, name: x,  # B itself
    "shuffled": shuffled,
    "gaussian": gaussian,
}
"""exit.map: from a window's map, or B where there is none, and the module's name to a map."""


def make_maps(
    settings: "Settings", b_FR: Mapping[str, np.ndarray], windows: Windows
) -> dict[str, np.ndarray]:
    """The map of every module that has a B [outputs, R]; ValueError where they do not fit."""
    window = WINDOW.get(settings.map)
    source = windows(window) if window else b_FR
    if source is not b_FR:
        missing, odd = sorted(b_FR.keys() - source.keys()), sorted(source.keys() - b_FR.keys())
        if missing or odd:
            word = f"no map for {missing[0]}" if missing else f"a map for {odd[0]}, which it lacks"
            raise ValueError(
                f"exit.map={settings.map} does not fit the adapter: the dynamics have {word}; use "
                "those that were recorded with it"
            )
        for name, b in b_FR.items():
            if source[name].shape != b.shape:
                raise ValueError(
                    f"exit.map={settings.map} does not fit the adapter: the map of {name} is "
                    f"{source[name].shape}, its B {b.shape}; use the dynamics recorded with it"
                )
    return {name: MAPS[settings.map](np.asarray(source[name]), name) for name in b_FR}


def chosen(settings: "Settings", names: Sequence[str]) -> list[str]:
    """The modules that are read; ValueError where the adapter has none of that kind."""
    which = settings.modules or ("last_query" if settings.mode == "paper" else "all")
    if which == "all":
        found = [name for name in names if ".experts." not in name and ".shared." not in name]
    else:
        queries = [name for name in names if name.endswith(".attention.q")]
        found = sorted(queries, key=lambda name: int(name.split(".")[1]))[-1:]
    if not found:
        raise ValueError(
            f"exit.mode={settings.mode} reads {which} of an adapter, which has none of that kind; "
            "set exit.modules=, or train with lora.targets=q"
        )
    return found


def make_aims(
    settings: "Settings", b_FR: Mapping[str, np.ndarray], windows: Windows
) -> dict[str, Aim]:
    """Aims by the name of the probe that is compared with them, A x of each module."""
    own = {name: b_FR[name] for name in chosen(settings, list(b_FR))}
    maps = make_maps(settings, b_FR, windows)
    found = {}
    for name, b in own.items():
        map_FR = jnp.asarray(maps[name], jnp.float32)
        if settings.mode == "paper":
            map_FR = row_energy(map_FR, settings.energy)[:, None]
        found[f"{name}.lora_A"] = aim_at(map_FR, jnp.asarray(b, jnp.float32))
    return found


def aimed(setup: "Setup", aims: Mapping[str, Aim] | None) -> "Setup":
    """The setup whose exits read the modules that there are aims for, if any."""
    if not aims:
        return setup
    directions = max(aim.directions.shape[1] for aim in aims.values())

    def aim(rule: Exit) -> Exit:
        if not isinstance(rule.signal, Drift):
            return rule
        signal = dataclasses.replace(rule.signal, modules=tuple(aims), directions=directions)
        return dataclasses.replace(rule, signal=signal)

    return dataclasses.replace(setup, stop=with_rule(setup.stop, Exit, aim))


def alignment(maps: Mapping[str, np.ndarray], b_FR: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The cosine of every map with B, both as one long vector; 0 where one of them is zero."""
    found = {}
    for name, b in b_FR.items():
        product = np.linalg.norm(maps[name]) * np.linalg.norm(b)
        found[name] = float(np.vdot(maps[name], b) / product) if product else 0.0
    return found
