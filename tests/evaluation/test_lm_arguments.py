"""What lm-eval hands over: gen_kwargs of tasks and users become decode settings, or are refused."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from jdllm.decode import Credit, DecodeConfig, Edit
from jdllm.evaluation.grading import as_lm_eval
from jdllm.evaluation.harness import JdllmLM
from jdllm.evaluation.lm_arguments import (
    batch_rows,
    given_names,
    overlay,
    read_gen_kwargs,
    read_settings,
)
from jdllm.evaluation.results import TaskResult
from jdllm.evaluation.run import run
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.runtime import sharding
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.store.checkpoint import random_model
from jdllm.tasks import TASKS
from jdllm.tokenizer import load_tokenizer

LOOSE = DecodeConfig(gen_length=8, block_length=4, threshold=0.02)


@pytest.fixture(scope="module")
def llm() -> LLM:
    config = dataclasses.replace(
        NAMED["bundled"],
        layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, dtype="float32",
        max_length=128,
    )  # fmt: skip
    grid = sharding.parse_mesh("1x1")
    defaults = DecodeConfig(gen_length=8, block_length=4)
    tokenizer = load_tokenizer(BUNDLED)
    return LLM(random_model(config, grid, seed=3), tokenizer, defaults)


def request(**gen_kwargs: Any) -> Instance:
    return Instance("generate_until", {}, ("1 2 3", gen_kwargs), 0, ("given", 0, 1))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.95, "top_k": 40, "do_sample": True},
         {"temperature": 0.7, "top_p": 0.95, "top_k": 40}),
        ({"do_sample": False, "top_p": 0.95, "top_k": 40}, {"temperature": 0.0}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.0}),
        ({"top_p": 1.0, "top_k": 0}, {"top_p": None, "top_k": None}),
        ({"top_k": -1}, {"top_k": None}),
        ({"steps": 4, "gen_length": 16, "block_length": 8, "cfg_scale": 0.5, "seed": 7},
         {"steps": 4, "gen_length": 16, "block_length": 8, "cfg_scale": 0.5, "seed": 7}),
        ({"diffusion_steps": 4, "cfg": 0.5}, {"steps": 4, "cfg_scale": 0.5}),
        ({"rule": "quota", "remasking": "random"}, {"rule": "quota", "remasking": "random"}),
        ({"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "min_p": None}, {}),
    ],
)  # fmt: skip
def test_gen_kwargs_are_translated(given: dict, wanted: dict):
    asked = read_gen_kwargs(given)
    assert asked.decode == wanted
    overlay(DecodeConfig(), (), asked)


def test_words_of_model_args_reach_the_groups():
    bases: dict[str, Any] = {
        "decode": DecodeConfig(edit=Edit(0.9)),
        "likelihood": LikelihoodConfig(),
    }
    words = {"decode.edit.passes": 3, "decode.credit.alpha": 0.7, "likelihood.mc_num": 4}
    found = read_settings(words, bases)
    assert found["decode"] == DecodeConfig(edit=Edit(0.9, passes=3), credit=Credit(0.7))
    assert found["likelihood"].mc_num == 4
    named = given_names(bases["decode"], words)
    assert named == {"edit.passes", "credit.alpha", "edit.threshold"}
    config, used, remarks = overlay(
        found["decode"], named, read_gen_kwargs({"edit.passes": 5, "edit.penalty": 0.5})
    )
    assert config.edit == Edit(0.9, 3, 0.5) and used == {"edit.penalty": 0.5}
    assert remarks == ["decode.edit.passes=3 wins over gen_kwargs: edit.passes=5"]
    with pytest.raises(ValueError, match="^decode.credit_alpha is decode.credit.alpha now"):
        read_settings({"decode.credit_alpha": 0.7}, bases)


def test_stop_strings_and_lengths():
    asked = read_gen_kwargs({"until": "x", "max_new_tokens": 9, "max_tokens": 5})
    assert (asked.stop, asked.length) == (("x",), 9)
    assert read_gen_kwargs({"until": ["a", "b"], "max_gen_toks": 3}).stop == ("a", "b")
    assert read_gen_kwargs({"until": None, "max_gen_toks": None}).length is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 has no meaning here; leave it out"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 has no meaning"),
        ({"temprature": 1}, "temprature=1 has no meaning here; did you mean temperature"),
        ({"zzz": 1}, "zzz=1 has no meaning here; leave it out"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9' must be"),
        ({"until": 5}, "until=5 must be a text or a list"),
        ({"until": ["a", 5]}, "must be a text or a list"),
        ({"do_sample": "maybe"}, "do_sample='maybe' must be true or false"),
        ({"temperature": -1}, "temperature=-1: temperature=-1 is out of range"),
        ({"temperature": "hot"}, "gen_kwargs: temperature=hot: "),
        ({"factor": 2.0}, "factor=2.0: factor=2.0 is read by rule=factor only"),
        ({"credit_alpha": 0.7}, "gen_kwargs: credit_alpha=0.7 is credit.alpha now"),
        ({"edit.threshold": 2}, "edit.threshold=2: edit.threshold=2 is out of range"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(given: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        overlay(DecodeConfig(), (), read_gen_kwargs(given))


def test_every_option_of_lm_evals_own_tasks_is_understood():
    folder = Path(lm_eval.tasks.__file__).parent
    part = re.compile(r"^generation_kwargs:\n(?:[ ]+.*\n|\s*\n)+", re.M)
    found: dict[str, dict] = {}
    for file in folder.rglob("*.yaml"):
        text = re.sub(r"!\w+ ", "", file.read_text(errors="replace"))
        for block in part.findall(text + "\n"):
            found[block] = yaml.safe_load(block)["generation_kwargs"] or {}
    assert len(found) > 50
    for given in found.values():
        overlay(DecodeConfig(), (), read_gen_kwargs(given))


def test_what_was_given_to_the_model_wins():
    """By words even where it is the default; in a config, what is not the default; by preset."""
    assert given_names(DecodeConfig(), {"decode.temperature": 0.0, "likelihood.seed": 1}) == {
        "temperature"
    }
    assert given_names(LOOSE, {}) == {"gen_length", "block_length", "threshold"}
    preset = given_names(DecodeConfig(), {"decode.preset": "llada"})
    assert preset == {"rule", "cache", "block_length"}
    asked = read_gen_kwargs({"temperature": 0.7, "top_p": 0.9, "seed": 0})
    config, used, remarks = overlay(DecodeConfig(temperature=0.2), {"temperature"}, asked)
    assert (config.temperature, config.top_p) == (0.2, 0.9) and used == {"top_p": 0.9}
    assert remarks == ["decode.temperature=0.2 wins over gen_kwargs: temperature=0.7"]


@pytest.mark.parametrize(
    ("given", "draws", "remark"),
    [
        ({"do_sample": False, "temperature": 0.8}, False, "makes temperature=0.8 greedy"),
        ({"do_sample": True}, False, "draws nothing without a temperature"),
        ({"do_sample": True, "temperature": 0.0}, False, "draws nothing without a temperature"),
        ({"do_sample": True, "temperature": 0.8}, True, None),
        ({"temperature": 0.8}, True, None),
        ({"do_sample": False, "temperature": 0.0}, False, None),
    ],
)
def test_contradictions_are_said(given: dict, draws: bool, remark: str | None):
    config, _, remarks = overlay(DecodeConfig(), (), read_gen_kwargs(given))
    assert config.draws is draws
    assert (remark in remarks[0] and len(remarks) == 1) if remark else not remarks


@pytest.mark.parametrize(
    ("given", "most", "rows"),
    [(8, None, 8), ("8", 4, 8), ("auto", None, 32), ("auto:4", None, 32), ("auto", 16, 16),
     ("auto", 64, 32)],
)  # fmt: skip
def test_batch_sizes(given: int | str, most: int | None, rows: int):
    assert batch_rows(given, most) == rows


@pytest.mark.parametrize("given", [0, -1, "many", "auto:x", "autos", "1.5"])
def test_batch_sizes_that_are_none(given: int | str):
    with pytest.raises(ValueError, match="must be auto or a number of rows"):
        batch_rows(given)


def test_a_users_gen_kwargs_win_over_the_tasks(llm: LLM, caplog: pytest.LogCaptureFixture):
    """Through lm-eval; a temperature changes the completions, and repeats differ."""
    task = TASKS["countdown"]
    docs = task.generate(1, 0, held_out=True)

    def texts(lm: JdllmLM, **settings: Any) -> tuple[list[str], Any]:
        built = as_lm_eval(task, docs, 3)
        built.set_config("generation_kwargs", {"do_sample": True, "temperature": 0.0}, update=True)
        results = simple_evaluate(
            model=lm, tasks=[built], task_manager=TaskManager(include_defaults=False), **settings
        )
        return [record.completion.text or "" for record in lm.records], results

    greedy, _ = texts(lm := JdllmLM(llm, progress=False))
    assert len(set(greedy)) == 1 and lm.gen_kwargs == {}
    assert caplog.text.count("repeats of a document are equal without chance") == 1
    caplog.clear()
    hot, results = texts(lm := JdllmLM(llm, progress=False), gen_kwargs="temperature=5,seed=1")
    assert len(set(hot)) == 3 and "repeats" not in caplog.text
    assert lm.gen_kwargs == {"countdown": {"temperature": 5, "seed": 1}}
    (used,) = results["config"]["decode"]
    assert (used["temperature"], used["seed"], used["gen_length"]) == (5, 1, 8)
    assert json.dumps(results["config"]["decode"])
    words: Any = {"decode.temperature": 0.0}
    cold, _ = texts(lm := JdllmLM(llm, progress=False, **words), gen_kwargs="temperature=5")
    assert cold == greedy
    assert "decode.temperature=0.0 wins over gen_kwargs: temperature=5" in caplog.text


def test_requests_set_lengths_and_steps(llm: LLM, caplog: pytest.LogCaptureFixture):
    lm = JdllmLM(llm, progress=False, chat=False)
    with caplog.at_level(logging.WARNING, "jdllm"):
        (group,) = lm.groups([request(max_gen_toks=64), request(max_gen_toks=64)])
    assert group.decode.gen_length == 8
    assert caplog.text.count("own length of 8 wins over gen_kwargs: max_gen_toks=64") == 1
    asked = request(gen_length=16, block_length=16, steps=2, rule="quota", cache="none")
    (group,) = lm.groups([asked])
    assert (group.decode.gen_length, group.decode.block_length, group.decode.steps) == (16, 16, 2)
    lm.generate_until([asked])
    assert lm.records[0].completion.nfe == 2
    with pytest.raises(ValueError, match="gen_kwargs: num_beams=4 has no meaning here"):
        lm.generate_until([request(num_beams=4)])


def test_results_say_what_a_task_changed(llm: LLM):
    task = TASKS["countdown"]
    built = as_lm_eval(task, task.generate(1, 0, held_out=True))
    built.set_config("generation_kwargs", {"temperature": 0.2, "top_p": 0.9}, update=True)
    loaded = {"tasks": {"countdown": built}, "groups": {}}
    result = run("countdown", loaded, JdllmLM(llm, progress=False, chat=True))
    assert isinstance(result, TaskResult)
    assert result.gen_kwargs == {"countdown": {"temperature": 0.2, "top_p": 0.9}}


def test_pretrained_is_another_word_for_model(monkeypatch: pytest.MonkeyPatch, llm: LLM):
    asked: list[str] = []
    monkeypatch.setattr(LLM, "load", lambda model, *_, **__: asked.append(model) or llm)
    JdllmLM.create_from_arg_string("pretrained=models/mine", {"batch_size": "auto:4"})
    JdllmLM.create_from_arg_string("model=models/mine", {"batch_size": 1})
    JdllmLM.create_from_arg_string("", {"batch_size": 1})
    assert asked == ["models/mine", "models/mine", "bundled"]
