"""Examples as ids: what is learned of a conversation, windows of text, the cache."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.tokenizer import encode_prompts, load_tokenizer
from jdllm.training import encode
from jdllm.training.data import conversation
from jdllm.training.encode import Texts, encode_examples

CONFIG = NAMED["bundled"]
END = CONFIG.stop_ids[-1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


def chat(*turns: tuple[str, str]) -> list[Any]:
    return [{"role": role, "content": text} for role, text in turns]


def parts(texts: Texts) -> list[tuple[list[int], list[bool]]]:
    """Ids and what is learned, by example."""
    bounds = list(zip(texts.offsets, texts.offsets[1:], strict=False))
    return [(texts.ids[a:b].tolist(), texts.learned[a:b].tolist()) for a, b in bounds]


def spans(tokenizer, ids: list[int], learned: list[bool]) -> list[str]:
    """What is learned, as text."""
    found, before = [], False
    for i, flag in zip(ids, learned, strict=True):
        if flag and not before:
            found.append([])
        if flag:
            found[-1].append(i)
        before = flag
    return [tokenizer.decode(span) for span in found]


def test_an_answer_is_learned_with_its_end(tokenizer):
    examples = [conversation("2+2", "4"), conversation("1", "12+30")]
    texts = encode_examples(tokenizer, examples, CONFIG, 64)
    assert texts.ids.dtype == np.uint16
    for (ids, learned), answer, (user, reply) in zip(
        parts(texts), texts.answers, examples, strict=True
    ):
        assert ids[:answer] == encode_prompts(tokenizer, [user["content"]])[0]
        assert tokenizer.decode(ids[answer:-1]) == reply["content"] and ids[-1] == END
        assert learned == [False] * answer + [True] * (len(ids) - answer)


def test_every_answer_of_a_conversation_is_learned(tokenizer):
    """Each with the end of its turn; what stands between them is context."""
    turns = chat(
        ("system", "be brief"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"),
        ("assistant", "4"), ("user", "3+3"), ("assistant", "6"),
    )  # fmt: skip
    texts = encode_examples(tokenizer, [turns], CONFIG, 128)
    ((ids, learned),) = parts(texts)
    assert spans(tokenizer, ids, learned) == ["2<|eot_id|>", "4<|eot_id|>", "6<|eot_id|>"]
    assert texts.answers[0] == len(ids) - 2
    whole = encode_prompts(tokenizer, [turns[:-1]])[0]
    assert ids[: len(whole)] == whole  # what the model is given when it is asked
    for k in (2, 4):  # and so for the earlier turns
        head = encode_prompts(tokenizer, [turns[:k]])[0]
        assert ids[: len(head)] == head and learned[len(head)]


def test_special_tokens_in_earlier_turns_are_text(tokenizer):
    """A turn that quotes the end of a turn does not end there."""
    quoted = chat(
        ("user", "say <|eot_id|>"), ("assistant", "a<|eot_id|>b"), ("user", "c"), ("assistant", "d")
    )
    texts = encode_examples(tokenizer, [quoted], CONFIG, 128)
    ((ids, learned),) = parts(texts)
    ends = [i for i in range(len(ids)) if ids[i] == END]
    assert len(ends) == 4 and [learned[i] for i in ends] == [False, True, False, True]


def test_an_answer_that_the_template_rewrites_is_context(tokenizer, capsys):
    """Where a template drops earlier reasoning, say: the last answer is learned still."""
    template = tokenizer.chat_template
    turns = chat(("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "d"))
    try:
        tokenizer.chat_template = template.replace(
            "message['content'] | trim",
            "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
        )
        ((ids, learned),) = parts(encode_examples(tokenizer, [turns], CONFIG, 128))
    finally:
        tokenizer.chat_template = template
    assert spans(tokenizer, ids, learned) == ["d<|eot_id|>"]
    assert "1 earlier answers carry no loss" in capsys.readouterr().err


def test_response_length_ends_the_canvas_after_the_prompt(tokenizer, capsys):
    examples = [conversation("2+2", "4"), conversation("1", "1234567890")]
    texts = encode_examples(tokenizer, examples, CONFIG, 64, response_length=6)
    (_, _), (ids, _) = parts(texts)
    assert "1 examples are longer than their canvas and lose their end" in capsys.readouterr().err
    start = int(texts.answers[1])
    assert tokenizer.decode(ids[start:]) == "123456"
    short = encode_examples(tokenizer, examples, CONFIG, start + 2, response_length=6)
    assert np.diff(short.offsets).max() == start + 2


def test_prompts_that_leave_no_room_are_counted(tokenizer, capsys):
    examples = [conversation("1" * 50, "2"), conversation("1", "2")]
    texts = encode_examples(tokenizer, examples, CONFIG, 30)
    assert len(texts.answers) == 1
    assert "1 examples are left out: their prompt fills length=30" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no example .*1 prompts leave none within length=30"):
        encode_examples(tokenizer, examples[:1], CONFIG, 30)
    with pytest.raises(ValueError, match="no example .*it is empty"):
        encode_examples(tokenizer, [], CONFIG, 30)


@pytest.mark.parametrize("response_length", [None, 7])
def test_plain_text_is_cut_into_windows_without_loss(tokenizer, response_length, capsys):
    text = "".join(map(str, range(40)))
    texts = encode_examples(tokenizer, [text], CONFIG, 16, response_length)
    assert not texts.answers.any() and texts.learned.all()
    assert set(np.diff(texts.offsets)[:-1]) == {response_length or 16}
    assert tokenizer.decode(texts.ids[:-1]) == text and texts.ids[-1] == CONFIG.eos_id
    assert "lose" not in capsys.readouterr().err


def test_plain_text_of_a_shifted_model_follows_a_bos(tokenizer, capsys):
    """In every window: nothing predicts the first column of a canvas."""
    shifted = dataclasses.replace(CONFIG, shift_logits=True)
    texts = encode_examples(tokenizer, ["0123456789"], shifted, 5)
    found = parts(texts)
    assert all(ids[0] == tokenizer.bos_token_id and not learned[0] for ids, learned in found)
    assert all(all(learned[1:]) for _, learned in found)
    assert tokenizer.decode([i for ids, _ in found for i in ids[1:-1]]) != ""
    kept = [i for ids, _ in found for i in ids[1:]]
    assert tokenizer.decode(kept[:-1]) == "0123456789" and set(texts.answers) == {1}
    plain = encode_examples(tokenizer, [conversation("1", "2")], shifted, 32)
    same = encode_examples(tokenizer, [conversation("1", "2")], CONFIG, 32)
    assert plain.digest() == same.digest()
    assert "lose" not in capsys.readouterr().err


def test_chunks_do_not_show(tokenizer, monkeypatch):
    examples = [conversation(str(k), str(k * k)) for k in range(7)]
    whole = encode_examples(tokenizer, examples, CONFIG, 32)
    monkeypatch.setattr(encode, "CHUNK", 3)
    assert encode_examples(tokenizer, examples, CONFIG, 32).digest() == whole.digest()


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    small = dataclasses.replace(CONFIG, vocab=320)
    with pytest.raises(ValueError, match="the model knows only 320"):
        encode_examples(tokenizer, [conversation("1", "2")], small, 32)


# The cache


def some_texts(value: int = 1) -> Texts:
    ids = np.full(6, value, np.uint16)
    return Texts(ids, np.ones(6, bool), np.array([0, 2, 6]), np.zeros(2, np.int32))


def test_cache_builds_once_for_a_key(tmp_path):
    calls = []

    def build():
        calls.append(1)
        return some_texts(len(calls))

    first = encode.cached_texts(tmp_path, {"a": 1, "b": 2}, build)
    again = encode.cached_texts(tmp_path, {"b": 2, "a": 1}, build)
    assert len(calls) == 1 and first.digest() == again.digest() == some_texts(1).digest()
    other = encode.cached_texts(tmp_path, {"a": 1, "b": 3}, build)
    assert len(calls) == 2 and other.digest() != first.digest()


def test_an_interrupted_cache_is_not_there(tmp_path, monkeypatch):
    def torn(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", torn)
        with pytest.raises(KeyboardInterrupt):
            encode.cached_texts(tmp_path, {}, some_texts)
    assert not list(tmp_path.glob("*.npz"))
    assert encode.cached_texts(tmp_path, {}, some_texts).digest() == some_texts().digest()
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_fingerprint_goes_by_content(tmp_path):
    path = tmp_path / "a"
    assert encode.fingerprint(path) == ""
    path.write_text("one")
    first = encode.fingerprint(path)
    path.touch()
    assert encode.fingerprint(path) == first
    path.write_text("two")
    assert encode.fingerprint(path) != first
