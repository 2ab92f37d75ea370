"""Test set-up: a compilation cache, float32 matrix products, and 8 virtual CPU devices."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = Path(os.environ.get("JDLLM_TEST_CACHE", Path(tempfile.gettempdir()) / "jdllm-test-cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages wrap at the terminal's width; tests look for phrases, wherever the checkout lies."""
    monkeypatch.setenv("COLUMNS", "1000")
