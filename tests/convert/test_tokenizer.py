"""Tokenizers made of vocab.json and merges.txt, as Dream's repositories have them.

JDLLM_DATA=FOLDER compares with a published tokenizer in FOLDER/tokenizers as well.
"""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from jdllm.convert.commands import main
from jdllm.store import checkpoint
from jdllm.tokenizer import added_tokens, build_tokenizer, encode_prompts, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "goldens" / "dream"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "hello world", "  two  spaces\n\n and lines ", "I'll 12345 we're", "e\u0301 caf\u00e9 \u4e16",
    "x<|mask|>y", "a\r\nb\t!?!", "\U0001f600 ok", "",
]  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """A made-up repository: every byte, seven merges, five added tokens, code of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = [*BYTES, *(pair.replace(" ", "") for pair in MERGES)]
    first = len(vocab)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {
        str(first + i): {"content": text, "special": True} | flags for i, text in enumerate(SPECIAL)
    }
    config = {
        "added_tokens_decoder": tokens,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    } | changes
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write(tmp_path_factory.mktemp("dream")))


def test_words_bytes_and_merges(tokenizer: Any):
    ids = tokenizer("hello wo12 3x")["input_ids"]
    pieces = ["hello", "\u0120wo", "1", "2", "\u0120", "3", "x"]  # digits stand alone
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text("hello wo12'\n\t\u00e9\u4e16<|mask|>"))
def test_any_normal_text_round_trips(text: str, tokenizer: Any):
    import unicodedata

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_added_tokens_and_settings_are_kept(tokenizer: Any):
    first = len(BYTES) + len(MERGES)
    assert tokenizer("a<|mask|>b")["input_ids"][1] == first + 4 == tokenizer.mask_token_id
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == first
    assert tokenizer.decode([first, first + 4], skip_special_tokens=True) == ""
    (ids,) = encode_prompts(tokenizer, ["hello"])
    assert tokenizer.decode(ids) == ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_a_converted_model_takes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write(tmp_path / "hf")
    for path in (GOLDEN / "config.json", *GOLDEN.glob("*.safetensors*")):
        shutil.copy(path, source / path.name)
    main(["dream", f"source={source}", f"output={tmp_path / 'ours'}"])
    assert "warning" not in capsys.readouterr().err
    end = len(BYTES) + len(MERGES) + 2
    assert end in checkpoint.read_config(tmp_path / "ours").stop_ids
    main(["export", f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"])
    direct: Any = load_tokenizer(source)
    for folder in (tmp_path / "ours", tmp_path / "back"):
        loaded: Any = load_tokenizer(folder)
        assert loaded(TEXTS)["input_ids"] == direct(TEXTS)["input_ids"]
        assert encode_prompts(loaded, TEXTS) == encode_prompts(direct, TEXTS)
        assert (loaded.mask_token, loaded.eos_token) == ("<|mask|>", "<|endoftext|>")
        for name in ("vocab.json", "merges.txt"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_a_template_in_a_file_of_its_own(tmp_path: Path):
    source = write(tmp_path, chat_template=None)
    (source / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    tokenizer: Any = load_tokenizer(source)
    assert tokenizer.decode(encode_prompts(tokenizer, ["hello"])[0]) == "<hello>"


def test_added_tokens_in_their_own_file(tmp_path: Path):
    source = write(tmp_path)
    (source / "tokenizer_config.json").unlink()
    first = len(BYTES) + len(MERGES)
    (source / "added_tokens.json").write_text(json.dumps({"<b>": first + 1, "<a>": first}))
    assert [token["content"] for token in added_tokens(source)] == ["<a>", "<b>"]
    tokenizer: Any = load_tokenizer(source)
    assert tokenizer("<b>")["input_ids"] == [first + 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", "{}", "make no tokenizer"),
        ("vocab.json", '{"a": 0}', "make no tokenizer"),
        ("merges.txt", "#version: 0.2\na b\n", "make no tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        (
            "tokenizer_config.json",
            json.dumps({"added_tokens_decoder": {"900": {"content": "<x>"}}}),
            "<x> the id 900, but its place is 263",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str):
    source = write(tmp_path)
    (source / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(source)


def test_bytes_must_be_complete(tmp_path: Path):
    source = write(tmp_path)
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate(BYTES[1:])}))
    with pytest.raises(ValueError, match="lacks 1 of the 256 bytes"):
        build_tokenizer(source)


def test_it_is_the_published_tokenizer(tmp_path: Path):
    """Built from vocabulary, merges and added tokens, Qwen's gives its tokenizer.json's ids."""
    folder = os.environ.get("JDLLM_DATA", "")
    packed = Path(folder) / "tokenizers" / "qwen3" / "tokenizer.json.gz"
    if not folder or not packed.exists():
        pytest.skip("JDLLM_DATA names no folder with tokenizers/qwen3/tokenizer.json.gz")
    whole = gzip.decompress(packed.read_bytes()).decode()
    facts = json.loads(whole)
    (tmp_path / "vocab.json").write_text(json.dumps(facts["model"]["vocab"]))
    merges = "\n".join(["#version: 0.2", *facts["model"]["merges"]])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    tokens = {str(token.pop("id")): token for token in facts["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    theirs, ours = Tokenizer.from_str(whole), build_tokenizer(tmp_path)
    pages = Path(__file__).parents[2].glob("docs/*.md")
    for text in [*TEXTS, *(page.read_text() for page in pages)]:
        assert ours.encode(text).ids == theirs.encode(text).ids
