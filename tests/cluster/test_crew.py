"""The crew's promises on a played Ray: every task once, whatever ends, and one sentence else."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm import LLM, DecodeConfig
from jdllm.arguments import SpreadArgs
from jdllm.bulk import complete_all
from jdllm.cluster import connect, crew, fleet
from jdllm.cluster.crew import Crew
from jdllm.cluster.fleet import Fleet, numbered
from jdllm.cluster.worker import Worker
from jdllm.runtime.journal import Journal
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.server.config import ServeConfig
from tests.cluster.played import PlayedRay
from tests.support.marks import quick
from tests.support.tiny_models import tiny

SHARE = {"num_cpus": 1.0}


class Doubler:
    """A worker without a model."""

    def load(self, wanted: str, folder: str, settings: Any) -> dict[str, Any]:
        return {"fingerprint": settings.get("weights", "w"), "pid": 1, "host": "here"}

    def double(self, x: int) -> int:
        return 2 * x


def play(
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[int, int], Any] = lambda worker, call: "",
    pick: Callable[[int], int] = lambda n: 0,
    worker: type = Doubler,
    count: int = 2,
) -> Crew:
    """A crew on a played Ray with room for two."""
    ray = PlayedRay(fault, pick)
    monkeypatch.setattr(crew, "connect", lambda: ray)
    monkeypatch.setattr(crew, "room", lambda share: 2)
    monkeypatch.setattr(crew, "answers", lambda address: True)
    monkeypatch.setattr(Crew, "worker", worker)
    return Crew({"model": "m"}, count, SHARE)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 10_000), st.floats(0, 0.6))
def test_every_task_once(count: int, tasks: int, seed: int, danger: float):
    """Workers are lost at any time, while they start too; a result is there once, or an error is
    one sentence."""
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        own = play(
            monkeypatch,
            lambda worker, call: "lost" if chance.random() < danger else "",
            lambda n: chance.randrange(n),
            count=count,
        )
        found: list[tuple[int, int]] = []
        try:
            for one in own.run("double", [(i,) for i in range(tasks)]):
                found.append(one)
        except ConnectionError as error:
            said = ("lost one after the other", "no worker is left")
            assert danger > 0 and any(words in str(error) for words in said)
        else:
            assert len(found) == tasks
        numbers = [number for number, _ in found]
        assert len(set(numbers)) == len(numbers)
        assert all(result == 2 * number for number, result in found)


def test_a_task_that_ends_every_worker_is_given_up(monkeypatch: pytest.MonkeyPatch):
    def fault(worker: int, call: int) -> str:
        return "lost" if call > 1 else ""  # all but the first two, which are loads

    with pytest.raises(ConnectionError, match=r"may not fit their memory \(batch_size="):
        list(play(monkeypatch, fault).run("double", [(1,)]))


def test_a_full_disk_of_one_node(monkeypatch: pytest.MonkeyPatch, capsys):
    """Its worker gives up, in one sentence, and the other one does everything."""
    full = OSError(errno.ENOSPC, "No space left on device", "/home/x")
    own = play(monkeypatch, lambda worker, call: full if worker == 0 and call > 1 else "")
    assert dict(own.run("double", [(i,) for i in range(5)])) == {i: 2 * i for i in range(5)}
    said = capsys.readouterr().err
    assert said.count("gives up: [Errno 28] No space left on device: '/home/x'") == 1
    both = play(monkeypatch, lambda worker, call: full if call > 1 else "")
    with pytest.raises(ConnectionError, match="no worker is left: .*No space left on device"):
        list(both.run("double", [(1,), (2,)]))


def test_a_worker_of_another_version_or_with_other_weights(monkeypatch, capsys):
    class Other(Doubler):
        made = 0

        def load(self, wanted: str, folder: str, settings: Any) -> dict[str, Any]:
            Other.made += 1
            if Other.made == 1:
                return {"refused": f"here has jdllm 0, not {wanted}; install the same there"}
            return {"fingerprint": f"w{Other.made}", "pid": 1, "host": "there"}

    own = play(monkeypatch, pick=lambda n: n - 1, worker=Other, count=3)
    assert dict(own.run("double", [(i,) for i in range(4)])) == {i: 2 * i for i in range(4)}
    said = capsys.readouterr().err
    assert f"gives up: here has jdllm 0, not {connect.identity()}; install the same" in said
    assert "there has other weights under model=m" in said
    assert own.count == 1


def test_mistakes_end_the_run_at_once(monkeypatch: pytest.MonkeyPatch):
    """What would fail everywhere is raised as it is, and no other worker tries it."""
    wrong = ValueError("threshold=2 must be below 1")
    own = play(monkeypatch, lambda worker, call: wrong if call > 1 else "")
    with pytest.raises(ValueError, match="threshold=2 must be below 1"):
        list(own.run("double", [(1,), (2,), (3,)]))


def test_a_lost_head_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    own = play(monkeypatch)
    monkeypatch.setattr(crew, "ASK_HEAD", 0)
    monkeypatch.setattr(crew, "HEAD_LOST", -1)
    monkeypatch.setattr(crew, "answers", lambda address: False)
    with pytest.raises(ConnectionError, match="head of the Ray cluster, head:1, is lost; what is"):
        list(own.run("double", [(1,)]))


@pytest.mark.parametrize("left", [True, False])
def test_a_reader_that_leaves_keeps_the_crew(monkeypatch: pytest.MonkeyPatch, left: bool):
    own = play(monkeypatch)
    results: Any = own.run("double", [(i,) for i in range(6)])
    assert next(results)[1] in (0, 2)
    if left:
        results.close()
    assert dict(own.run("double", [(7,), (8,)])) == {0: 14, 1: 16}


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A cluster that was killed is not waited for."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert connect.known_address() == ""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9"):
        connect.known_address()
    monkeypatch.setattr(connect, "answers", lambda address: True)
    assert connect.known_address() == "127.0.0.1:9"


def test_what_a_worker_takes(monkeypatch: pytest.MonkeyPatch):
    """A GPU per device of its mesh, where there are any, unless the user says."""
    has: dict[str, float] = {"CPU": 16, "GPU": 8}
    ray = SimpleNamespace(cluster_resources=lambda: has)
    monkeypatch.setattr(connect, "connect", lambda: ray)
    gpus = {"auto": 1, "1x4": 4}
    for mesh, number in gpus.items():
        taken = connect.share(mesh, None)
        assert taken["num_gpus"] == number and connect.room(taken) == 8 // number
    assert connect.room(connect.share("auto", 0.5)) == 16
    has.clear()
    has["CPU"] = 2
    assert connect.share("1x4", None) == {"num_cpus": 1, "num_gpus": 0}
    assert connect.room(connect.share("auto", None)) == 2


def test_without_ray_the_fix_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connect, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jdllm\[cluster\]'"):
        SpreadArgs(executor="ray").load_llm()


def test_settings():
    given: list[dict[str, Any]] = [{"workers": 2}, {"gpus": 0.5}]
    for words in given:
        with pytest.raises(ValueError, match="belongs to executor=ray"):
            SpreadArgs(**words)
    with pytest.raises(ValueError, match="workers=-1 must be 0 or more"):
        SpreadArgs(executor="ray", workers=-1)
    with pytest.raises(ValueError, match="replicas=2 belongs to executor=ray"):
        ServeConfig(replicas=2)


class Tiny(Worker):
    """A worker with a tiny model."""

    def load(self, wanted: str, folder: str, settings: Any) -> dict[str, Any]:
        self._llm: LLM | None = tiny()
        return {"fingerprint": self.llm.fingerprint(), "pid": 1, "host": "here"}


@pytest.mark.parametrize("lost", quick([False, True], True))
def test_a_fleet_is_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: bool):
    """The same completions, draws and scores as one LLM, repeated prompts and lost workers
    included, and nothing in the journal is done again."""
    monkeypatch.setattr(fleet, "share", lambda mesh, gpus: SHARE)
    asked: list[int] = []

    def fault(worker: int, call: int) -> str:
        asked.append(call)
        return "lost" if lost and call in (4, 6) else ""

    play(monkeypatch, fault, worker=Tiny)
    spread = Fleet.start({"mesh": "1x1", "engine": "off"}, 2, None)
    one = tiny()
    rows = [[2, 3, 4], [5, 6], [2, 3, 4], [7, 8, 9, 10], [2, 3, 4]]
    decode = DecodeConfig(gen_length=8, block_length=4, threshold=0.3, temperature=0.7)
    wanted = one.generate(rows, decode, batch_size=2)
    assert spread.generate(rows, decode, batch_size=2) == wanted
    assert spread.fingerprint() == one.fingerprint() and numbered(rows) == [0, 0, 1, 0, 2]
    pairs = [([2, 3], [4]), ([5], [6, 7]), ([2], [9])]
    scored = [
        llm.loglikelihood(pairs, LikelihoodConfig(mc_num=4, mc_batch=4), batch_size=2)
        for llm in (one, spread)
    ]
    assert [x.value for x in scored[0]] == [x.value for x in scored[1]]
    journal = Journal(tmp_path / "finished.jsonl")
    found = complete_all(spread, rows, decode, journal, batch_size=2)
    assert [record["ids"] for record in found] == [completion.ids for completion in wanted]
    count = len(asked)
    assert complete_all(spread, rows, decode, Journal(journal.path), batch_size=2) == found
    assert len(asked) == count
