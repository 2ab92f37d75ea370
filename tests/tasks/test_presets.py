"""The published rows: every one can be run, says where it is from, and prints beside a result."""

import pytest

from jdllm.decode import DecodeConfig
from jdllm.tasks import TASKS
from jdllm.tasks import published as preset
from jdllm.tasks.lm_eval import ours, stock
from jdllm.tasks.published_rows import PRESETS, find


def test_there_is_a_row_for_every_published_table():
    families = {name.split("-")[0] for name in PRESETS}
    assert families == {"llada", "llada1.5", "fast", "dinfer", "dream", "diffucoder", "d1", "edit"}
    assert len(PRESETS) > 100
    for name in ("llada-instruct-gsm8k-blocks", "fast-dllm-gsm8k-256-prefix-parallel"):
        assert name in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_decode_settings_are_settings(name):
    DecodeConfig.of(PRESETS[name].decode).resolve()


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_is_whole(name):
    row = PRESETS[name]
    assert row.name == name and row.source and row.model.count("/") == 1
    assert bool(row.decode) != bool(row.likelihood)
    assert row.published is None or 0 < row.published <= 100 or "second" in row.metric
    assert row.task in {**TASKS, **ours.CONFIGS, **preset.VERSIONS}
    assert row.metric == "tokens_per_second" or row.metric.count(",") == 1


@pytest.mark.parametrize("task", preset.VERSIONS)
def test_versions_are_those_of_the_installed_tasks(task):
    found = stock.parse(stock.names()[task], functions=False)
    assert found["metadata"]["version"] == preset.VERSIONS[task]


def reported(task: str) -> set[str]:
    """The "metric,filter" names of one of lm-eval's tasks; of a group, those of its first task."""
    manager = stock.manager(task, None)
    entry = manager.task_index[task]
    while entry.kind.name != "TASK":
        member = entry.cfg["task"][0] if entry.kind.name == "GROUP" else sorted(entry.tags)[0]
        while isinstance(member, dict):
            member = member["task"] if isinstance(member["task"], str) else member["task"][0]
        entry = manager.task_index[member]
    config = stock.parse(entry.yaml_path, functions=False)
    filters = [part["name"] for part in config.get("filter_list") or [{"name": "none"}]]
    metrics = [metric["metric"].rpartition(".")[2] for metric in config["metric_list"]]
    names = [name.replace("pass_at_k", "pass@1") for name in metrics]
    return {f"{metric},{part}" for metric in names for part in filters}


@pytest.mark.parametrize("task", preset.VERSIONS)
def test_metrics_are_those_that_the_tasks_report(task):
    wanted = {row.metric for row in PRESETS.values() if row.task == task} - {"tokens_per_second"}
    assert wanted and wanted <= reported(task)


def test_a_row_prints_what_it_fixes_and_both_numbers():
    row = find("fast-dllm-gsm8k-256-prefix-parallel")
    text = preset.describe(row, 77.3, 1.2)
    for part in (
        "gsm8k, version 3.0, 5 shots, in the chat template",
        "gen_length=256 block_length=32 threshold=0.9 cache=prefix",
        "78.5 % at 54.4 tokens/s [Fast-dLLM, README]",
        "77.3 ± 1.2 %",
    ):
        assert part in text
    unknown = find("dinfer-gsm8k-llada_moe")
    assert "not in the source" in preset.describe(unknown)
    assert "not all verified" in preset.describe(unknown)
    assert "measured   not yet" in preset.describe(unknown)


def test_another_version_of_a_task_is_said(monkeypatch):
    monkeypatch.setitem(preset.VERSIONS, "gsm8k", 2.0)
    text = preset.describe(find("llada-instruct-gsm8k"))
    assert "version 2.0 (installed: 3.0, which may differ)" in text


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean .*llada-instruct-gsm8k"):
        find("llada-instruct-gsm8")
    with pytest.raises(ValueError, match="which is one of llada, llada1.5, fast"):
        find("zzz")
    with pytest.raises(ValueError) as refusal:
        find("edit")
    assert all(name in str(refusal.value) for name in PRESETS if name.startswith("edit-"))
