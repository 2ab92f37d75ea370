"""Test set-up: a compilation cache, float32 matrix products, and 8 virtual CPU devices."""

import gc
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are tiny and many: compiling them costs more than running them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = Path(os.environ.get("JDLLM_TEST_CACHE", Path(tempfile.gettempdir()) / "jdllm-test-cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_default_matmul_precision", "highest")


def find_chromium() -> tuple[str, str] | None:
    """Chromium and its driver on the path, or None."""
    found = (shutil.which("chromium"), shutil.which("chromedriver"))
    return found if all(found) else None  # type: ignore


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `browser` where there is none; CI and `-m browser` want them all."""
    wanted = os.environ.get("CI") or "browser" in (config.option.markexpr or "")
    if wanted or find_chromium():
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


SLOWEST = 12  # test files whose time is printed at the end


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the slowest test files, set-up and tear-down included: where the minutes go."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest test files")
        for name, time in sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
            terminalreporter.write_line(f"{time:7.1f} s  {name}")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages wrap at the terminal's width; tests look for phrases, wherever the checkout lies."""
    monkeypatch.setenv("COLUMNS", "1000")


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # of the 65 530 that Linux gives a process by default


def drop_programs() -> None:
    """Drops compiled programs before their memory maps run out, which would abort Python."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Between tests; one that compiles hundreds does it itself."""
    yield
    drop_programs()
