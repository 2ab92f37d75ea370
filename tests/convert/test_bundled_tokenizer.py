"""The bundled tokenizer: single-token digits, round trips, LLaDA's chat layout, short prompts."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jdllm.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "jdllm" / "bundled"
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)


def test_digits_and_signs_are_tokens_of_their_own(tokenizer):
    text = "100-93=7,30-7=23*4/(12+5) 3.5 a=b,(c)"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    alone = set("0123456789+-*/=(),")
    assert [t for t in tokens if set(t) & alone] == [c for c in text if c in alone]
    merged = [t for t in tokenizer.get_vocab() if set(t) & alone and len(t) > 1]
    assert merged == []


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text("0123456789+-*/=(), \n\t\\{}<>ae\u00e9\u4e16\U0001f600"))
def test_any_text_round_trips(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    special = any(token in text for token in tokenizer.all_special_tokens)
    assert special or tokenizer.decode(ids) == text


def test_special_tokens_and_size(tokenizer):
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.mask_token == "<|mdm_mask|>"
    assert tokenizer.unk_token is None
    for token in [*tokenizer.all_special_tokens, EOT, "<|start_header_id|>", "<|end_header_id|>"]:
        assert len(tokenizer(f"x{token}y")["input_ids"]) == 3
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= 1024


def test_chat_template_is_lladas(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    closed = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": "Yes"}], tokenize=False
    )
    assert closed == text + "Yes<|eot_id|>"


@pytest.mark.parametrize("name", ["sudoku", "countdown"])
def test_prompts_and_answers_are_short(name, tokenizer):
    task = TASKS[name]
    for doc in task.generate(200, 8, held_out=True):
        chat = [{"role": "user", "content": task.prompt(doc)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert len(ids) <= 40
        assert len(tokenizer(task.response(doc) + EOT)["input_ids"]) <= task.gen_length


def test_the_longest_countdown_answer_fits(tokenizer):
    # found by going through every triple and target
    doc = {"numbers": [100, 100, 100], "target": 2}
    answer = TASKS["countdown"].response(doc) + EOT
    assert len(tokenizer(answer)["input_ids"]) == 37 <= TASKS["countdown"].gen_length


def test_the_tokenizer_is_what_the_script_trains(tmp_path):
    path = ROOT / "experiments" / "bundled" / "build_tokenizer.py"
    spec = importlib.util.spec_from_file_location("build_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.save(module.train(module.VOCAB_SIZE), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (BUNDLED / name).read_bytes()
