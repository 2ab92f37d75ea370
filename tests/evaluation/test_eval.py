"""The evaluation harness and its entry points, on a small random model with the real tokenizer."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from jdllm import generation
from jdllm.decode import DecodeConfig
from jdllm.evaluation import estimate, run, sweeps, tuning
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.grading import as_lm_eval, run_task
from jdllm.evaluation.harness import JdllmLM
from jdllm.evaluation.intervals import interval
from jdllm.evaluation.results import Sample, TaskResult, example, score
from jdllm.evaluation.speed import Speed
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.runtime import cli
from jdllm.tasks import TASKS
from tests.support.tiny_models import write_small

# Random weights spread their probability thin: a low bar makes rows differ in NFE.
LOOSE = DecodeConfig(gen_length=8, block_length=4, threshold=0.02)
WORDS = ["decode.gen_length=8", "decode.block_length=4", "decode.threshold=0.02", "mesh=1x1"]
ROW_KEYS = {
    "task", "doc_id", "sample", "prompt", "completion", "target", "metrics", "nfe", "tokens",
    "seconds", "answer", "finish_reason", "choices", "calls", "exits",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with random weights, the bundled tokenizer and its generation config."""
    path = write_small(tmp_path_factory.mktemp("model"), 64)
    assert (path / "generation_config.json").exists()
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(str(folder), "1x1")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Keeps the tests' own compilation cache, and everything else out of the user's folder."""
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(generation, "enable_compilation_cache", lambda: None)


def request(prompt: str, doc_id: int = 0, **settings) -> Instance:
    arguments = (prompt, {"until": [], **settings})
    return Instance("generate_until", {}, arguments, 0, ("given", doc_id, 1))


def evaluate(folder: Path, output: Path, *words: str) -> tuple[dict, list[dict]]:
    config = cli.parse(EvalConfig, [f"model={folder}", f"output={output}", *WORDS, *words])
    run.main(config)
    rows = (output / "samples.jsonl").read_text().splitlines()
    return json.loads((output / "results.json").read_text()), [json.loads(row) for row in rows]


def test_results_are_consistent(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    results, rows = evaluate(folder, tmp_path / "out", "task=sudoku,countdown", "limit=6")
    assert list(results) == ["command", "config", "model", "tasks", "speed", "environment"]
    assert list(results["tasks"]) == ["sudoku", "countdown"]
    assert [(r["task"], r["doc_id"]) for r in rows] == [
        (task, i) for task in ("sudoku", "countdown") for i in range(6)
    ]
    for name, scores in results["tasks"].items():
        task, mine = TASKS[name], [r for r in rows if r["task"] == name]
        docs = task.generate(6, 0, held_out=True)
        assert set(scores) == {"n", "metrics", "stderr", "intervals", "nfe_mean", "speed"}
        assert scores["n"] == 6
        assert scores["nfe_mean"] == sum(r["nfe"] for r in mine) / 6
        for row, doc in zip(mine, docs, strict=True):
            assert set(row) == ROW_KEYS
            assert row["prompt"] == task.prompt(doc)
            assert row["target"] == task.target(doc)
            assert row["metrics"] == task.grade(doc, row["completion"])
        for metric, mean in scores["metrics"].items():
            values = [r["metrics"][metric] for r in mine]
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 5 / 6)
            assert mean == pytest.approx(sum(values) / 6)
            assert scores["stderr"][metric] == pytest.approx(spread)
    speed = results["speed"]
    assert set(speed) == {
        "completion_tokens", "nfe", "calls", "seconds", "compile_seconds", "tokens_per_second",
        "tokens_per_forward", "calls_per_second", "latency_p50", "latency_p95", "shared_tokens",
    }  # fmt: skip
    seconds = sorted(r["seconds"] for r in rows)
    assert seconds[0] <= speed["latency_p50"] <= speed["latency_p95"] <= seconds[-1]
    total = sum(r["nfe"] for r in rows)
    assert speed["tokens_per_forward"] == pytest.approx(speed["completion_tokens"] / total)
    assert speed["calls_per_second"] == pytest.approx(speed["calls"] / speed["seconds"])
    assert len({r["nfe"] for r in rows}) > 1, "a model whose rows all cost the same proves little"
    assert results["config"]["decode"]["gen_length"] == 8
    assert (results["config"]["mesh"], results["config"]["dtype"]) == ("1x1", "float32")
    assert results["command"].startswith(f"python -m jdllm.eval model={folder} mesh=1x1 task=")
    assert "decode.threshold=0.02" in results["command"]
    assert {"host", "date", "device", "commit"} < set(results["environment"])
    assert results["environment"]["lm_eval"].startswith("0.4")
    assert "attention" in {row["operation"] for row in results["environment"]["kernels"]}
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(r["answer"] == TASKS[r["task"]].extract(r["completion"]) for r in rows)
    assert not list((tmp_path / "out").glob("*.partial*"))
    out, said = capsys.readouterr()
    assert "solved" in out and "countdown" in out and "mesh data" not in out
    assert "mesh data=1 x model=1" in said and "calls/s" in said and "wrote" in said
    assert "verdict" in out and rows[0]["prompt"].splitlines()[-1] in out


def test_a_standard_error_of_0_becomes_an_interval():
    assert interval(0.5, 0.0, 10) is None and interval(1.0, 0.1, 10) is None
    low, high = interval(1.0, 0.0, 100) or (0, 0)
    assert (round(low, 4), high) == (0.9630, 1.0)  # of any textbook
    assert interval(0.0, 0.0, 100) == (0.0, pytest.approx(1 - low))
    samples = [Sample("own", i, 0, "", "", "", {"acc": 1.0}, 1, 1, 0.0) for i in range(100)]
    result = TaskResult("own", "acc", {"acc": 1.0}, {"acc": 0.0}, samples, Speed(), {})
    assert score(result, "acc") == "100.0 (96.3-100.0) %"


@pytest.mark.parametrize("words", [["task=sudoku,countdown", "samples=2"], ["task=countdown"]])
def test_a_dry_run_counts_what_the_run_makes(
    words: list[str], folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    words = [f"model={folder}", "limit=3", "batch_size=2", *WORDS, *words]
    monkeypatch.setattr(estimate, "memory", lambda *_: "memory")
    run.main(cli.parse(EvalConfig, [*words, "dry_run=true", f"output={tmp_path / 'out'}"]))
    out = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and "memory" in out
    found = [line.split() for line in out.splitlines() if line.startswith(("sudoku", "countdown"))]
    config = cli.parse(EvalConfig, words)
    _, results = run.evaluate(config)
    assert [line[0] for line in found] == config.tasks
    for line, result in zip(found, results, strict=True):
        documents, prompts, calls = map(int, line[-3:])
        assert (documents, prompts) == (result.documents, len(result.samples))
        assert result.speed.calls <= calls


def test_completions_are_those_of_generate(folder: Path, llm: LLM, tmp_path: Path):
    _, rows = evaluate(folder, tmp_path, "task=countdown", "limit=5", "batch_size=2")
    alone = [llm.generate([row["prompt"]], LOOSE)[0] for row in rows]
    assert [row["completion"] for row in rows] == [c.text for c in alone]
    assert [row["nfe"] for row in rows] == [c.nfe for c in alone]


def test_mesh_does_not_change_the_samples(folder: Path, tmp_path: Path):
    texts = []
    for mesh in ("1x1", "2x1"):
        run.main(
            EvalConfig(model=str(folder), limit=3, mesh=mesh, decode=LOOSE, output=tmp_path / mesh)
        )
        rows = (tmp_path / mesh / "samples.jsonl").read_text().splitlines()
        texts.append([json.loads(row) | {"seconds": 0} for row in rows])
    assert texts[0] == texts[1]


def test_rerun_is_identical(folder: Path, tmp_path: Path):
    texts = []
    for _ in range(2):
        evaluate(folder, tmp_path, "limit=3")
        texts.append((tmp_path / "samples.jsonl").read_text())
    assert texts[0] == texts[1]
    _, rows = evaluate(folder, tmp_path, "limit=3", "seed=1")
    assert rows[0]["prompt"] not in texts[0]


def test_one_document_has_no_standard_error(folder: Path, tmp_path: Path):
    results, _ = evaluate(folder, tmp_path, "limit=1")
    assert set(results["tasks"]["sudoku"]["stderr"].values()) == {None}


def test_lengths_come_from_the_model(folder: Path, tmp_path: Path):
    config = EvalConfig(model=str(folder), limit=1, mesh="1x1", output=tmp_path)
    run.main(config)
    decode = json.loads((tmp_path / "results.json").read_text())["config"]["decode"]
    facts = json.loads((BUNDLED / "generation_config.json").read_text())
    assert decode["gen_length"] == facts["max_new_tokens"]
    assert decode["block_length"] == facts["block_length"]


def test_d1_tasks_read_the_folder(folder: Path, tmp_path: Path):
    data = tmp_path / "data"
    (data / "sudoku4x4").mkdir(parents=True)
    docs = TASKS["sudoku"].generate(4, 7, held_out=True)
    lines = [json.dumps({"Puzzle": d["puzzle"], "Solution": d["solution"]}) for d in docs]
    (data / "sudoku4x4" / "d1_test.jsonl").write_text("\n".join(lines))
    words = ["task=sudoku_d1", f"data={data}"]
    _, rows = evaluate(folder, tmp_path / "out", *words)
    assert [r["target"] for r in rows] == [d["solution"] for d in docs]
    _, rows = evaluate(folder, tmp_path / "out", *words, "limit=2")
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["task=sudokku"], ["task=sudokku", "did you mean sudoku", "countdown_d1"]),
        (["task=sudoku,"], ["names of tasks, with commas between"]),
        (["task=sudoku,sudoku"], ["twice"]),
        (["task=sudoku_d1"], ["data=FOLDER", "d1_test.jsonl"]),
        (["limit=0"], ["limit=0"]),
        (["shots=-1"], ["shots=-1 must be 0 or more"]),
        (["batch_size=0"], ["batch_size=0"]),
        (["decode.threshold=2"], ["threshold=2"]),
        ([f"output={__file__}"], ["is a file"]),
        (["preset=llada1.5-math", "decode_file=x.json"], ["preset and decode_file both"]),
    ],
)
def test_mistakes_are_found_at_once(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as stop:
        cli.parse(EvalConfig, words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_documents_of_a_group_and_samples_of_a_document_are_counted():
    sample = Sample("a", 0, 0, "", "", "", {}, 1, 1, 0.0)
    samples = [
        dataclasses.replace(sample, task=task, doc_id=doc_id, sample=number)
        for task in "ab" for doc_id in range(3) for number in range(2)
    ]  # fmt: skip
    assert TaskResult("group", "acc", {}, {}, samples, None, {}).documents == 6


def test_the_example_shows_both_ends_of_a_long_prompt():
    prompt = "\n".join(f"line {number}" for number in range(100))
    sample = Sample("own", 0, 0, prompt, "1", "1", {"solved": 1.0}, 1, 1, 0.0)
    shown = example(TaskResult("own", "solved", {}, {}, [sample], None, {})).splitlines()
    assert len(shown) == 24 and shown[1].endswith("prompt      line 0")
    assert shown[6].strip() == "[...]" and shown[20].strip() == "line 99"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"mesh": "99x1"}, "99 devices"),
        ({"model": "random:none"}, "no such shape"),
        ({"model": "random:tiny", "mesh": "1x1"}, "no tokenizer"),
        ({"task": "sudoku_d1", "data": Path("absent")}, "absent is no folder"),
        ({"mesh": "1x1", "decode": DecodeConfig(gen_length=512, block_length=32)}, "512 columns"),
    ],
)
def test_what_cannot_be_done_is_said(folder: Path, settings: dict, part: str):
    with pytest.raises((ValueError, OSError), match=part):
        run.main(EvalConfig(**({"model": str(folder), "limit": 1} | settings)))


def test_order_and_records(llm: LLM):
    prompts = ["b" * 90, "a", "3 5 7", "a", "b" * 40]
    lm = JdllmLM(llm, decode=LOOSE, batch_size=2, chat=True, progress=False)
    texts = lm.generate_until([request(p, i) for i, p in enumerate(prompts)])
    wanted = [llm.generate([p], LOOSE)[0] for p in prompts]
    assert texts == [c.text for c in wanted]
    assert [r.completion for r in lm.records] == wanted
    assert [(r.task, r.doc_id, r.prompt) for r in lm.records] == [
        ("given", i, p) for i, p in enumerate(prompts)
    ]
    assert lm.speed.nfe == sum(c.nfe for c in wanted)
    assert lm.speed.completion_tokens == sum(len(c.ids) for c in wanted)
    assert 0 < lm.speed.calls <= lm.speed.nfe
    assert lm.generate_until([]) == []


def test_until_cuts_its_own_request(llm: LLM):
    whole = llm.generate(["1 2 3"], LOOSE)[0].text or ""
    mark = whole[len(whole) // 2]
    lm = JdllmLM(llm, decode=LOOSE, chat=True, progress=False)
    cut, kept, both = lm.generate_until(
        [
            request("1 2 3", 0, until=mark),
            request("1 2 3", 1),
            request("1 2 3", 2, until=["absent", mark]),
        ]
    )
    assert cut == both == whole[: whole.index(mark)]
    assert kept == whole
    assert lm.records[0].completion.finish_reason == "stop"


def test_request_length_is_the_last_resort(llm: LLM):
    requests = [request("1 2 3", max_gen_toks=10)]
    lm = JdllmLM(llm, progress=False)
    lm.generate_until(requests)
    assert lm.records[0].completion.nfe >= 1
    lengths = {
        "model": lm._resolve(10).gen_length,
        "settings": JdllmLM(llm, decode=LOOSE)._resolve(10).gen_length,
    }
    assert lengths == {"model": 40, "settings": 8}
    bare = LLM(llm.model, llm.tokenizer)
    assert JdllmLM(bare)._resolve(10).gen_length == 10
    assert JdllmLM(bare)._resolve(100).gen_length == 128  # whole blocks of 32
    assert JdllmLM(bare, decode=DecodeConfig(block_length=4))._resolve(10).gen_length == 12


def test_finished_requests_reach_the_cache(llm: LLM):
    lm = JdllmLM(llm, decode=LOOSE, progress=False)
    seen = {}

    class Hook:
        def add_partial(self, method, arguments, text):
            seen[method, arguments[0]] = text

    lm.cache_hook = Hook()  # pyright: ignore[reportAttributeAccessIssue]
    texts = lm.generate_until([request("a"), request("b" * 50)])
    assert seen == {("generate_until", "a"): texts[0], ("generate_until", "b" * 50): texts[1]}


def test_chat_template_is_applied_once(llm: LLM):
    message = {"role": "user", "content": "1 2 3"}
    wanted = llm.generate(["1 2 3"], LOOSE)[0].text
    lm = JdllmLM(llm, decode=LOOSE, chat=True, progress=False)
    framed = lm.apply_chat_template([message])
    assert lm.generate_until([request("1 2 3"), request(framed)]) == [wanted, wanted]
    system = lm.apply_chat_template([{"role": "system", "content": "Be brief."}, message])
    assert lm.encode([system]) == llm.encode([system], chat=False)
    opened = lm.apply_chat_template([message, {"role": "assistant", "content": "So"}], False)
    assert opened.endswith("So") and lm.encode([opened]) == llm.encode([opened], chat=False)
    assert lm.encode(["1 2 3"]) == llm.encode(["1 2 3"], chat=True)
    assert lm.tokenizer_name and "/" not in lm.tokenizer_name
    assert "start_header_id" in (lm.chat_template(True) or "")


def test_prompts_are_raw_unless_lm_eval_frames_them(llm: LLM, caplog: pytest.LogCaptureFixture):
    """As for its other models; and its records agree with what was done."""
    told = JdllmLM(llm, decode=LOOSE, chat=False, progress=False)
    assert told.encode(["1 2 3"]) == llm.encode(["1 2 3"], chat=False)
    assert not caplog.text
    lm = JdllmLM(llm, decode=LOOSE, progress=False)
    assert lm.encode(["1 2 3"]) == lm.encode(["1 2 3"]) == told.encode(["1 2 3"])
    assert caplog.text.count("--apply_chat_template") == 1
    assert lm.chat_template(False) is None and lm.get_model_info()["chat"] is False
    lm.apply_chat_template([{"role": "user", "content": "1"}])
    assert lm.get_model_info()["chat"] is True
    asked = JdllmLM(llm, decode=LOOSE, chat=True, progress=False)
    assert asked.chat_template(False) and asked.get_model_info()["chat"] is True


def test_special_tokens_in_a_document_stay_text(llm: LLM):
    """Through lm-eval too, which takes the framed prompt as text; nobody sees the marks."""
    message = {"role": "user", "content": "1<|eot_id|>2"}
    lm = JdllmLM(llm, decode=LOOSE, progress=False)
    framed = lm.apply_chat_template([message])
    assert lm.encode([framed]) == llm.encode([[message]])
    lm.generate_until([request(framed)])
    assert lm.records[0].prompt == llm.tokenizer.apply_chat_template(  # pyright: ignore
        [message], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("template", [False, True])
def test_registry_entry(folder: Path, llm: LLM, template: bool):
    task = TASKS["countdown"]
    docs = task.generate(3, 0, held_out=True)
    arguments = {"model": str(folder), "mesh": "1x1", "progress": False} | {
        f"decode.{name}": getattr(LOOSE, name)
        for name in ("gen_length", "block_length", "threshold")
    }
    results = simple_evaluate(
        model="jdllm",
        model_args=arguments,
        tasks=[as_lm_eval(task, docs)],
        task_manager=TaskManager(include_defaults=False),
        batch_size=2,
        apply_chat_template=template,
    )
    assert results
    responses = [row["resps"][0][0] for row in results["samples"]["countdown"]]  # pyright: ignore
    wanted = llm.generate([task.prompt(doc) for doc in docs], LOOSE, chat=template)
    assert responses == [one.text for one in wanted]
    assert results["config"]["chat"] is template  # pyright: ignore


def test_model_arguments_as_text(folder: Path):
    text = f"model={folder},mesh=1x1,decode.threshold=0.5,decode.gen_length=16,chat=false"
    lm = JdllmLM.create_from_arg_string(text, {"batch_size": 3, "device": None})
    assert (lm.batch_size, lm.chat) == (3, False)
    assert lm.decode == DecodeConfig(threshold=0.5, gen_length=16)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"decode.treshold": 1}, "decode.threshold"),
        ({"batch_size": "many"}, "batch_size=many must be auto or a number"),
        ({"pretrained": "bundled"}, "are one thing; keep one"),
        ({"device": "cuda:1"}, "mesh="),
    ],
)
def test_model_argument_mistakes(llm: LLM, settings: dict, part: str):
    with pytest.raises(ValueError, match=part):
        JdllmLM(llm, **settings)


def test_scores_are_of_the_right_documents(llm: LLM):
    """A model that answers every third puzzle, in a shuffled order of batches."""
    task = TASKS["sudoku"]
    docs = task.generate(9, 0, held_out=True)
    lm = JdllmLM(llm, decode=LOOSE, progress=False)
    right = {task.prompt(d): task.response(d) for d in docs[::3]}
    lm.generate_until = lambda requests: [right.get(r.args[0], "") for r in requests]  # type: ignore
    score = run_task(lm, task, docs)
    assert [row["metrics"]["solved"] for row in score.samples] == [1, 0, 0] * 3
    assert score.metrics["exact_match"] == pytest.approx(1 / 3)


def test_speed_adds_up():
    one, two = Speed(10, 5, 4, 2.0, 1.0), Speed(6, 3, 4, 2.0, 0.0)
    assert one + two == Speed(16, 8, 8, 4.0, 1.0)
    both = dataclasses.replace(one, latencies=(1.0,)) + dataclasses.replace(two, latencies=(3.0,))
    assert (both.latency(50), both.latency(100), one.latency(50)) == (2.0, 3.0, 0.0)
    assert (one + two).tokens_per_second == 4
    assert (one + two).tokens_per_forward == 2
    assert (one + two).calls_per_second == 2
    assert Speed().tokens_per_second == Speed().tokens_per_forward == 0


def test_generate_prints_the_completion(folder: Path, llm: LLM, capsys: pytest.CaptureFixture):
    words = [f"model={folder}", "prompt=1 2 3", *WORDS]
    generation.generate(cli.parse(generation.GenerateConfig, words))
    out, said = capsys.readouterr()
    wanted = llm.generate(["1 2 3"], LOOSE)[0]
    assert out == f"{wanted.text}\n"
    assert f"NFE {wanted.nfe}," in said and "tokens/s" in said
    generation.generate(cli.parse(generation.GenerateConfig, [*words, "json=true"]))
    facts = json.loads(capsys.readouterr().out)
    assert facts["completion"] == wanted.text and facts["ids"] == wanted.ids
    assert (facts["nfe"], facts["finish_reason"]) == (wanted.nfe, wanted.finish_reason)


def test_data_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    for config in (EvalConfig, sweeps.SweepConfig, tuning.TuneConfig):
        with pytest.raises(SystemExit) as stop:
            cli.parse(config, [f"data={tmp_path / 'no'}"])
        assert stop.value.code == 2
        assert f"data={tmp_path / 'no'} is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["prompt= "]])
def test_generate_needs_a_prompt(words: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(generation.GenerateConfig, words)
    assert "prompt" in capsys.readouterr().err


def command(module: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs an entry point as a user does, from another folder."""
    paths = [str(Path(run.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JDLLM_HOME": str(cwd / "home"),
        "XLA_FLAGS": "",
    }
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_command_line(folder: Path, tmp_path: Path):
    done = command("jdllm.eval", f"model={folder}", "limit=4", "output=out", *WORDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NFE/sample" in done.stdout
    noise = ["PyTorch", "lm_eval", "WARNING", "fatal", "Warning", "Custom kwargs"]
    assert not [word for word in noise if word in done.stderr], done.stderr
    assert "4/4" in done.stderr  # the progress bar
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 4


def test_command_line_error(tmp_path: Path):
    done = command("jdllm.eval", "model=random:none", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
