"""Loads scripts of experiments/ as modules, for the tests that use them."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """Yields experiments/<name>.py, in sys.modules meanwhile: dataclasses need that.

    Its neighbours can be imported by their names, as when it is run.
    """
    path = ROOT / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[name]
