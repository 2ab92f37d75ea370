"""jdllm under lm-eval: scored choices, rolling texts, repeats, stop strings, and what is kept."""

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from jdllm import batches
from jdllm.batches import deal
from jdllm.completion import raw_text, stop_sequences
from jdllm.decode import DecodeConfig
from jdllm.evaluation.grading import as_lm_eval, run_task
from jdllm.evaluation.harness import JdllmLM
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED, NO_ID
from jdllm.runtime import sharding
from jdllm.runtime.journal import Journal
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.stop.rule import NoStop, StopView
from jdllm.stop.strings import StopStrings
from jdllm.store.checkpoint import random_model
from jdllm.store.fingerprint import fingerprint
from jdllm.tasks import TASKS
from jdllm.tokenizer import load_tokenizer

LOOSE = DecodeConfig(gen_length=8, block_length=4, threshold=0.02)
FEW = LikelihoodConfig(mc_num=4, mc_batch=2)


def small(seed: int = 3, mesh: str = "1x1", **facts: Any) -> LLM:
    config = dataclasses.replace(
        NAMED["bundled"],
        layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, dtype="float32",
        max_length=128, **facts,
    )  # fmt: skip
    grid = sharding.parse_mesh(mesh)
    return LLM(random_model(config, grid, seed=seed), load_tokenizer(BUNDLED))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "out" / "finished.jsonl")


def request(kind: Any, *arguments, doc_id: int = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, ("given", doc_id, 1))


def generate(prompt: str, doc_id: int = 0, **settings) -> Instance:
    return request("generate_until", prompt, {"until": [], **settings}, doc_id=doc_id)


def test_a_multiple_choice_task(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A stock lm-eval YAML, from the file to the accuracy."""
    rows = [
        {"question": "1 + 1 =", "choices": [" 2", " 3", " 44"], "label": 0},
        {"question": "2 + 2 =", "choices": [" 5", " 4"], "label": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny_choice.yaml").write_text(json.dumps(settings))  # JSON is YAML
    lm = JdllmLM(llm, likelihood=FEW, progress=False)
    with caplog.at_level(logging.WARNING, "jdllm"):
        results = simple_evaluate(
            model=lm,
            tasks=["tiny_choice"],
            task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path)),
        )
    scored: Any = results
    assert "chat template" in caplog.text
    best = []
    scores = iter(lm.likelihoods)
    for row in rows:
        values = [next(scores).value for _ in row["choices"]]
        best.append(values.index(max(values)) == row["label"])
    assert scored["results"]["tiny_choice"]["acc,none"] == sum(best) / 2
    assert len(lm.likelihoods) == 5 and all(one.stderr is not None for one in lm.likelihoods)


def test_pairs_are_encoded_as_in_lladas_harness(llm: LLM):
    lm = JdllmLM(llm, likelihood=FEW, progress=False)
    prefix, target = lm._encode_pair("4 +  ", "5")
    assert prefix == llm.encode(["4 +"], chat=False)[0]
    assert prefix + target == llm.encode(["4 +  5"], chat=False)[0]
    ((value, greedy),) = lm.loglikelihood([request("loglikelihood", "4 +  ", "5")])
    assert value == llm.loglikelihood([(prefix, target)], FEW)[0].value and not greedy


def test_rolling_adds_windows_up(llm: LLM):
    lm = JdllmLM(llm, likelihood=FEW, progress=False)
    text = "12 + 3 = 15. " * 30
    row = llm.encode([text], chat=False)[0]
    windows = [([], row[i : i + 127]) for i in range(0, len(row), 127)]
    assert len(windows) > 1
    whole, short = lm.loglikelihood_rolling(
        [request("loglikelihood_rolling", text), request("loglikelihood_rolling", "12", doc_id=1)]
    )
    parts = [one.value for one in llm.loglikelihood(windows, FEW)]
    assert whole == pytest.approx(sum(parts), rel=1e-5) and short > whole


def test_finished_likelihoods_are_not_scored_again(llm: LLM, journal: Journal, monkeypatch):
    requests = [request("loglikelihood", "1 +", f" {i}", doc_id=i) for i in range(4)]
    lm = JdllmLM(llm, likelihood=FEW, progress=False, journal=journal)
    first = lm.loglikelihood(requests[:2])
    asked: list[int] = []
    real = llm.loglikelihood

    def spy(pairs, *rest, **named):
        asked.append(len(pairs))
        return real(pairs, *rest, **named)

    monkeypatch.setattr(llm, "loglikelihood", spy)
    again = JdllmLM(llm, likelihood=FEW, progress=False, journal=Journal(journal.path))
    assert again.loglikelihood(requests)[:2] == first
    assert asked == [2]
    other = JdllmLM(llm, progress=False, journal=Journal(journal.path))
    other.likelihood = dataclasses.replace(FEW, seed=1)
    assert other.loglikelihood(requests)[:2] != first
    assert asked == [2, 4]


def test_finished_samples_are_not_generated_again(llm: LLM, journal: Journal, monkeypatch):
    """Keyed by model, settings, stop strings, task, document, prompt and number among repeats."""
    streamed: list[int] = []
    real = LLM.stream

    def spy(self, prompts, *rest, **named):
        streamed.append(len(prompts))
        return real(self, prompts, *rest, **named)

    monkeypatch.setattr(LLM, "stream", spy)

    def run(requests, model=llm, **settings):
        decode = dataclasses.replace(LOOSE, **settings)
        lm = JdllmLM(model, decode=decode, progress=False, journal=Journal(journal.path))
        streamed.clear()
        return lm.generate_until(requests), sum(streamed), lm

    requests = [generate(f"{i} 2 3", i) for i in range(3)]
    first, count, before = run(requests)
    assert count == 3
    again, count, after = run([*requests, generate("9", 9)])
    assert again[:3] == first and count == 1
    assert after.records[:3] == before.records
    assert after.speed.calls >= before.speed.calls  # the earlier run's cost counts too
    assert run(requests, seed=1)[1] == 3
    assert run([generate("0 2 3", 0, until=["x"])])[1] == 1
    assert run([generate("0 2 3", 7)])[1] == 1
    assert run([requests[0], requests[0]])[1] == 1  # the second is another sample
    assert run(requests, small(seed=4))[1] == 3
    assert run(requests)[1] == 0


def test_repeats_draw_anew_and_resume_alike(llm: LLM, journal: Journal):
    task = TASKS["countdown"]
    docs = task.generate(2, 0, held_out=True)
    noisy = dataclasses.replace(LOOSE, temperature=1.0)
    lm = JdllmLM(llm, decode=noisy, progress=False)
    score = run_task(lm, task, docs, samples=3)
    texts = {(r.doc_id, r.sample): r.completion.text for r in lm.records}
    assert set(texts) == {(d, s) for d in range(2) for s in range(3)}
    assert len({texts[0, s] for s in range(3)}) == 3
    graded = [task.grade(docs[d or 0], text or "")["solved"] for (d, _), text in texts.items()]
    assert score.metrics["solved"] == pytest.approx(sum(graded) / 6)
    part = JdllmLM(llm, decode=noisy, progress=False, journal=journal)
    run_task(part, task, docs, samples=1)  # as if killed after the first sample of each
    rest = JdllmLM(llm, decode=noisy, progress=False, journal=journal)
    run_task(rest, task, docs, samples=3)
    assert {(r.doc_id, r.sample): r.completion.text for r in rest.records} == texts


def test_fewshot_and_system_prompts_reach_the_model(llm: LLM):
    """As lm-eval frames them; the harness adds no frame of its own."""
    task = TASKS["countdown"]
    docs = task.generate(2, 0, held_out=True)
    lm = JdllmLM(llm, decode=LOOSE, progress=False)
    simple_evaluate(
        model=lm,
        tasks=[as_lm_eval(task, docs)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        system_instruction="Be brief.",
    )
    prompt = lm.records[0].prompt
    assert prompt.count("Be brief.") == 1 and prompt.count(task.prompt(docs[0])) == 1
    assert lm.encode([prompt]) == llm.encode([prompt], chat=False)


def test_stop_strings_end_a_row_early(llm: LLM):
    """Whatever stops on the device is what the host would cut, and it saves model calls."""
    config = DecodeConfig(gen_length=32, block_length=8, threshold=0.02)
    prompts = [f"{i} 7 {3 * i}" for i in range(6)]
    wholes = llm.generate(prompts, config)
    saved = 0
    for mark in (wholes[0].text[1:2], wholes[1].text[10:13]):  # type: ignore
        for whole, cut in zip(wholes, llm.generate(prompts, config, stop=[mark]), strict=True):
            text = whole.text or ""
            if mark not in text:
                assert cut == whole
                continue
            assert cut.text == text[: text.index(mark)] and cut.finish_reason == "stop"
            assert cut.ids == whole.ids[: len(cut.ids)] and mark in raw_text(llm.tokenizer, cut.ids)
            assert mark not in raw_text(llm.tokenizer, cut.ids[:-1]) and cut.nfe <= whole.nfe
            saved += whole.nfe - cut.nfe
    assert saved > 0


def test_stop_rule_waits_for_masks_on_its_left():
    rule = StopStrings(NoStop(), eos_id=9, sequences=((4, 5), (7,)))
    tokens = jnp.array(
        [
            [4, 5, 1, 4, 5, 0, 2],  # found behind the prompt
            [1, 1, 0, 4, 5, 2, 2],  # a mask before it may still become anything
            [1, 1, 4, 2, 5, 2, 0],  # not in one piece
            [1, 4, 5, 2, 7, 0, 0],  # the first begins in the prompt
        ]
    )
    generated = jnp.arange(7) >= jnp.full((4, 1), 2)
    view = StopView(
        tokens_BT=tokens,
        open_BT=generated & (tokens == 0),
        generated_BT=generated,
        block_BT=generated,
        opening=False,
        closing=False,
        done_B=jnp.zeros(4, bool),
        nfe_B=jnp.ones(4, int),
        step_B=jnp.ones(4, int),
        candidates_BT=jnp.full((4, 7), -1),
        written_BT=generated,
    )
    after, _, done, *_ = rule(view, rule.start(tokens))
    assert done.tolist() == [True, False, False, True]
    assert after[0].tolist() == [4, 5, 1, 4, 5, 9, 9]
    assert after[3].tolist() == [1, 4, 5, 2, 7, 9, 9]
    assert (after[1:3] == tokens[1:3]).all()


def test_stop_sequences_hold_the_stop_string(llm: LLM):
    found = stop_sequences(llm.tokenizer, ["\n", "1zq", ""], llm.config)
    assert len({len(one) for one in found}) > 1, "single ids and a sequence"
    assert all(
        "\n" in raw_text(llm.tokenizer, one) or "1zq" in raw_text(llm.tokenizer, one)
        for one in found
    )
    assert stop_sequences(llm.tokenizer, [], llm.config) == ()


def test_fingerprints_follow_content(llm: LLM):
    same, other = small(mesh="2x1"), small(seed=4)
    assert same.fingerprint() == llm.fingerprint() == small(mesh="1x2").fingerprint()
    assert other.fingerprint() != llm.fingerprint()
    facts = dataclasses.replace(llm.config, rope_theta=1.0)
    assert fingerprint(dataclasses.replace(llm.model, config=facts)) != llm.fingerprint()


@pytest.mark.slow
def test_replicas_share_every_batch(llm: LLM):
    """Rows are dealt out in turn, and a bucket's last batch needs no program of its own."""
    for rows, height, replicas in ((5, 8, 4), (8, 8, 2), (3, 4, 1), (7, 12, 4)):
        slots = deal(rows, height, replicas)
        assert len(set(slots)) == rows and max(slots) < height
        loads = Counter(slot // (height // replicas) for slot in slots)
        assert max(loads.values()) - min(loads.get(r, 0) for r in range(replicas)) <= 1
    spread = LLM(random_model(llm.config, sharding.parse_mesh("4x1"), seed=3), llm.tokenizer)
    prompts = [f"{i} 7 {3 * i}" for i in range(11)]
    done = spread.generate(prompts, LOOSE, batch_size=8)
    assert len(spread._programs) == 1
    assert [one.ids for one in done] == [one.ids for one in llm.generate(prompts, LOOSE)]


@pytest.mark.slow
def test_examples_are_computed_once(journal: Journal, monkeypatch: pytest.MonkeyPatch):
    """Two tasks in one call, each with examples of its own; what it saved outlives a kill."""
    monkeypatch.setattr(batches, "WORTH", 1)
    llm = small(block_causal=4)
    examples = [f"{n} + {n} = {2 * n}. " * 7 for n in (3, 4)]
    requests = [generate(f"{examples[i % 2]}{i} + {i} =", doc_id=i) for i in range(8)]
    lm = JdllmLM(llm, decode=LOOSE, chat=False, progress=False, journal=journal)
    wanted = lm.generate_until(requests)
    rows = llm.encode([one.args[0] for one in requests], chat=False)
    length = min(map(len, rows)) // 32 * 32
    assert lm.speed.shared_tokens == 8 * length == lm.speed.facts()["shared_tokens"] > 0
    again = JdllmLM(llm, decode=LOOSE, chat=False, progress=False, journal=Journal(journal.path))
    assert again.generate_until(requests) == wanted
    assert again.speed.shared_tokens == lm.speed.shared_tokens
    alone = dataclasses.replace(LOOSE, share_prefix=False)
    off = JdllmLM(llm, decode=alone, chat=False, progress=False)
    assert off.generate_until(requests) == wanted and off.speed.shared_tokens == 0


def test_a_verifier_is_part_of_the_key(journal: Journal):
    """Its verdicts change completions; other rules know nothing of it."""
    own = small()
    judges = [small(seed, causal=True, mask_id=NO_ID) for seed in (4, 5)]
    keys = []
    for judge in judges:
        llm = LLM(own.model, own.tokenizer, verifier=judge.model)
        for decode in (DecodeConfig(rule="verify", gen_length=8, block_length=0), LOOSE):
            lm = JdllmLM(llm, decode=decode, progress=False, journal=journal)
            requests = [generate("1 + 1 =")]
            rows = lm.encode([one.args[0] for one in requests])
            keys.append(lm._keys(requests, rows, lm.groups(requests))[0][0])
    assert keys[0] != keys[2] and keys[1] == keys[3]
    with pytest.raises(ValueError, match="name it, verifier=FOLDER"):
        JdllmLM("bundled", **{"decode.rule": "verify"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="rule=verify alone"):
        JdllmLM("bundled", verifier="judge")
