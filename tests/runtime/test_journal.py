"""Nothing finished is lost or done twice: the journal, and a real run killed at random."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jdllm.evaluation import run
from jdllm.evaluation.config import EvalConfig
from jdllm.runtime import files
from jdllm.runtime.journal import FINISHED, Journal, digest

RECORDS = [{"key": f"k{i}", "text": "späß\n" * i, "nfe": i} for i in range(4)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Journal(tmp_path / "finished.jsonl").append(RECORDS)
    return tmp_path / "finished.jsonl"


def test_records_come_back(path: Path):
    found = Journal(path)
    assert list(found.records.values()) == RECORDS
    assert "k1" in found and "k9" not in found and found["k2"]["nfe"] == 2
    found.append([{"key": "k9"}])
    assert list(Journal(path).records) == ["k0", "k1", "k2", "k3", "k9"]
    assert not Journal(path.with_name("new.jsonl")).records


def test_a_torn_line_is_cut_off_wherever_it_tore(path: Path):
    whole = path.read_bytes()
    keep = whole[: whole[:-1].rfind(b"\n") + 1]
    for size in range(len(keep), len(whole)):
        path.write_bytes(whole[:size])
        found = Journal(path)
        assert list(found.records) == ["k0", "k1", "k2"]
        assert path.read_bytes() == keep
        found.append(RECORDS[3:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["letter", "zeros", "twice", "not a record"])
def test_damage_is_an_error_that_names_the_line(path: Path, damage: str):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = {
        "letter": lines[1].replace(b'"nfe": 1', b'"nfe": 7'),
        "zeros": b"\0" * 20 + b"\n",
        "twice": lines[0],
        "not a record": b"[1]\n",
    }[damage]
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"finished.jsonl: line 2 is damaged"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_full_disk_loses_nothing(path: Path):
    """The system refuses in the middle of a line, as a full disk does."""
    journal, before = Journal(path), path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="make room and start again"):
            journal.append([{"key": "k9", "text": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert "k9" not in journal
    journal.append([{"key": "k9"}])
    assert list(Journal(path).records)[-1] == "k9"


def test_a_record_is_kept_once(path: Path):
    with pytest.raises(ValueError, match="already: k1"):
        Journal(path).append([{"key": "k1"}])
    with pytest.raises(ValueError, match="already"):
        Journal(path).append([{"key": "a"}, {"key": "a"}])


def test_digests_follow_content():
    assert digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})


WORDS = ["batch_size=1", "decode.gen_length=40", "mesh=1x1", "task=countdown"]


def start(output: Path, limit: int) -> subprocess.Popen[str]:
    paths = [str(Path(run.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JDLLM_HOME": str(output.parent / "home"),
        "XLA_FLAGS": "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jdllm.eval", f"output={output}", f"limit={limit}", *WORDS],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def killed_at_random(output: Path, kills: int, seed: int) -> None:
    """Kills a real run `kills` times while it writes, lets it end, and compares what is there."""
    chance, journal, limit = random.Random(seed), output / FINISHED, 20 * kills + 45
    kept = b""
    for _ in range(kills):
        run = start(output, limit)
        wanted = len(kept) + chance.randrange(1, 10000)
        while size(journal) < wanted and run.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() / 50)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not (output / "results.json").exists(), "it ended before it was killed"
        now = journal.read_bytes()
        assert now.startswith(kept) and len(now) > len(kept)
        kept = now[: now.rfind(b"\n") + 1]
    run = start(output, limit)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err
    assert f"{kept.count(b'\n')} samples are finished" in err
    assert journal.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == list(range(limit))
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == limit


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path):
    killed_at_random(tmp_path / "out", kills=3, seed=int(time.time()))


@pytest.mark.slow
def test_a_run_killed_twenty_times_goes_on(tmp_path: Path):
    killed_at_random(tmp_path / "out", kills=20, seed=int(time.time()))


def test_two_runs_into_one_folder(tmp_path: Path):
    config = EvalConfig(output=tmp_path, limit=1, mesh="1x1")
    with (
        files.alone(tmp_path),
        pytest.raises(BlockingIOError, match="another run is writing"),
    ):
        run.main(config)
