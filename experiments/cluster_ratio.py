"""Throughput of two workers of a Ray cluster on this machine against one, the journal on.

python experiments/cluster_ratio.py output=experiments/results/cluster_ratio.json

Every worker has one thread (XLA's pool is off, and each is a process of one CPU to Ray). After a
pass that compiles, the same prompts are generated again and again, by one worker and by two in
turn, each time into a new journal. The load average tells what the machine did besides; where it
was busy, the ratio by CPU seconds is the one that says how the work scales.
"""

import dataclasses
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# Before JAX starts here, or in a worker, which gets the environment of this process.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
    os.environ[name] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else what runs beside it comes first

from jdllm.bulk import complete_all  # noqa: E402
from jdllm.cluster.connect import need_ray  # noqa: E402
from jdllm.cluster.fleet import Fleet  # noqa: E402
from jdllm.decode import DecodeConfig  # noqa: E402
from jdllm.runtime import cli  # noqa: E402
from jdllm.runtime.environment import environment  # noqa: E402
from jdllm.runtime.files import write_json  # noqa: E402
from jdllm.runtime.journal import Journal  # noqa: E402


@dataclasses.dataclass(frozen=True)
class RatioConfig:
    """One worker against two."""

    model: str = "bundled"
    prompts: int = 24
    batch_size: int = 2
    rounds: int = 5
    """Passes of each number of workers."""
    output: Path = Path("experiments/results/cluster_ratio.json")


def connect() -> None:
    """Starts Ray with room for three workers, of which two at most have something to do."""
    need_ray()
    import ray  # pyright: ignore[reportMissingImports]

    ray.init("local", num_cpus=3, logging_level=logging.ERROR, log_to_driver=False)


def settings(model: str) -> dict[str, Any]:
    """Those of LLM.load."""
    return {"model": model, "mesh": "1x1", "engine": "off"}


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass over the prompts took."""

    seconds: float
    workers: list[float]
    """CPU seconds of each worker."""
    driver: float
    """CPU seconds of this process, which plans and writes the journal: what does not scale."""
    load: float
    """The machine's load average behind it: more than the workers means that others worked, too."""


def timed(fleet: Fleet, rows: list[list[int]], config: RatioConfig, decode: DecodeConfig) -> Pass:
    """Lets a fleet complete the prompts, its journal on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "finished.jsonl")
        pids = [pid for pid, _ in fleet.crew.places]
        start, own, theirs = time.perf_counter(), time.process_time(), [*map(cpu_seconds, pids)]
        complete_all(fleet, rows, decode, journal, batch_size=config.batch_size)
        seconds, driver = time.perf_counter() - start, time.process_time() - own
        workers = [cpu_seconds(pid) - old for pid, old in zip(pids, theirs, strict=True)]
        return Pass(seconds, workers, driver, os.getloadavg()[0])


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alone(one: Pass) -> float:
    """Seconds that a pass would take if each process had a core to itself: CPU seconds of the
    busiest worker, and of the driver, whose work for a batch may fall between two."""
    return max(one.workers) + one.driver


def main(config: RatioConfig) -> None:
    """Measures, prints and writes."""
    decode = DecodeConfig(rule="quota", gen_length=64, block_length=32, steps=64)
    connect()
    fleets = {n: Fleet.start(settings(config.model), n, 0) for n in (1, 2)}
    rows = fleets[1].encode([f"Add {100 + i} and one." for i in range(2 * config.prompts)])
    rows = [row for row in rows if len(row) == len(rows[0])][: config.prompts]  # one program serves
    for fleet in fleets.values():
        fleet.crew.ready()
        timed(fleet, rows, config, decode)  # compiles
    passes: dict[int, list[Pass]] = {n: [] for n in fleets}
    for number in range(config.rounds):
        for count, fleet in fleets.items():
            passes[count].append(timed(fleet, rows, config, decode))
            print(f"round {number}: {count} workers {passes[count][-1]}", flush=True)
    rates = {n: len(rows) / statistics.median(p.seconds for p in own) for n, own in passes.items()}
    ratios = [one.seconds / two.seconds for one, two in zip(passes[1], passes[2], strict=True)]
    by_cpu = statistics.median(map(alone, passes[1])) / statistics.median(map(alone, passes[2]))
    facts = {
        "command": cli.command(config, "experiments.cluster_ratio"),
        "environment": environment(),
        "cpus": os.cpu_count(),
        "prompts": len(rows),
        "decode": dataclasses.asdict(decode),
        "passes": {n: [dataclasses.asdict(one) for one in own] for n, own in passes.items()},
        "prompts_per_second": rates,
        "ratio": rates[2] / rates[1],
        "ratio_of_rounds": sorted(ratios),
        "ratio_by_cpu": by_cpu,
    }
    write_json(config.output, facts)
    print(
        f"{rates[1]:.2f} and {rates[2]:.2f} prompts per second: {facts['ratio']:.2f} times "
        f"({by_cpu:.2f} by CPU seconds)"
    )


if __name__ == "__main__":
    cli.run(main, RatioConfig, "python experiments/cluster_ratio.py")
