"""Gradient dynamics on disk: dynamics.npz beside an adapter's files.

Arrays are named <window>/<module>, in the layout of PEFT's B [outputs, R], and energy/<module>, the
paper's vector [outputs]; `facts` is JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdllm.runtime.files import atomic_file

FILE = "dynamics.npz"
ENERGY = "energy"


def write_dynamics(
    folder: Path, maps: Mapping[str, Mapping[str, np.ndarray]], facts: Mapping[str, Any]
) -> None:
    """Writes maps by window and module, the rows' L2 norms of the first window, and facts."""
    arrays = {f"{w}/{m}": np.asarray(x) for w, own in maps.items() for m, x in own.items()}
    for module, x in next(iter(maps.values())).items():
        arrays[f"{ENERGY}/{module}"] = np.linalg.norm(np.asarray(x), axis=1)
    with atomic_file(folder / FILE) as file:
        np.savez(file, allow_pickle=False, facts=json.dumps(facts), **arrays)


def read_facts(folder: Path) -> dict[str, Any]:
    """What was noted with the maps: updates, windows, the optimiser's epsilon.

    ValueError where the folder has no dynamics.
    """
    with _opened(folder) as file:
        return json.loads(str(file["facts"]))


def read_map(folder: Path, window: str) -> dict[str, np.ndarray]:
    """The maps of one window by module.

    ValueError where the folder has no dynamics, or none of that window.
    """
    with _opened(folder) as file:
        start = f"{window}/"
        found = {n.removeprefix(start): file[n] for n in file.files if n.startswith(start)}
        kept = sorted({n.partition("/")[0] for n in file.files if "/" in n} - {ENERGY})
    if not found:
        raise ValueError(
            f"{folder / FILE} holds no window {window}; it has {', '.join(kept)}: choose one of "
            "them, exit.map="
        )
    return found


def _opened(folder: Path) -> Any:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}: its training recorded no gradient dynamics; train with "
            "dynamics.windows=mean, or set exit.map=weights, which needs none"
        )
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); train anew") from None
