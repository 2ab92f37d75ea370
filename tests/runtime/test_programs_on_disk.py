"""Compiled programs on disk: where they lie, who may say otherwise, and what is kept of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdllm.runtime.files import prune
from jdllm.runtime.machine import process_age

CODE = """
import jax
from jdllm import load
load.KEPT_PROGRAMS = 100
load.enable_compilation_cache()
jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7)))
print(jax.config.jax_compilation_cache_dir)
"""


def run(home: Path, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    kept |= {"JAX_PLATFORMS": "cpu", "JDLLM_HOME": str(home)} | variables
    ran = subprocess.run([sys.executable, "-c", CODE], env=kept, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_programs_lie_in_the_home_and_old_ones_go(tmp_path: Path):
    folder = tmp_path / "xla"
    folder.mkdir()
    (folder / "old-cache").write_bytes(b"x" * 200)
    assert run(tmp_path) == str(folder)
    assert not (folder / "old-cache").exists() and list(folder.glob("*-cache"))


@pytest.mark.slow
def test_jaxs_own_settings_count_more(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "old-cache").write_bytes(b"x" * 200)
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(other)) == str(other)
    assert (other / "old-cache").exists() and not (tmp_path / "xla").exists()
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "None"
    assert not (tmp_path / "xla").exists()


@pytest.mark.parametrize("limit, left", [(30, "abc"), (25, "bc"), (10, "c"), (9, "")])
def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, limit: int, left: str):
    for age, name in enumerate("cba"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "folder").mkdir()
    prune(tmp_path, limit)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == list(left)
    prune(tmp_path / "absent", limit)


def test_a_process_knows_its_age():
    age = process_age()
    assert age is None or 0 < age < 86400
