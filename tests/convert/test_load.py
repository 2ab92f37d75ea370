"""Everything that `model=` may be."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jdllm import load
from jdllm.convert import fetch
from jdllm.convert.commands import main as convert
from jdllm.llm import LLM
from jdllm.model.model import named
from jdllm.runtime import sharding

GOLDEN = Path(__file__).parents[1] / "goldens" / "llada"
MESH = "1x1"


def arrays(model: str, dtype: str = "auto") -> dict[str, np.ndarray]:
    found = load.load_model(model, sharding.parse_mesh(MESH), dtype)
    return {name: np.asarray(leaf[...]) for name, leaf in named(found).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_a_hugging_face_folder_and_its_conversion_are_the_same_model(tmp_path):
    convert(["llada", f"source={GOLDEN}", f"output={tmp_path / 'ours'}"])
    assert same(arrays(str(GOLDEN)), arrays(str(tmp_path / "ours")))


def test_random_weights_by_name_and_seed():
    first, again = arrays("random:tiny"), arrays("random:tiny")
    assert same(first, again)
    other = load.load_model("random:tiny", sharding.parse_mesh(MESH), seed=1)
    assert not (first["head"] == np.asarray(named(other)["head"][...])).all()
    with pytest.raises(ValueError, match="there is no such shape; try llada-8b"):
        arrays("random:gpt")


def test_dtype_auto_computes_in_float32_on_a_cpu():
    assert load.compute_dtype("auto", "bfloat16") == "float32"
    assert load.compute_dtype("bfloat16", "float32") == "bfloat16"
    assert arrays(str(GOLDEN), "bfloat16")["head"].dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype=int8 must be one of"):
        load.compute_dtype("int8", "float32")


def test_dtype_auto_keeps_the_stored_one_elsewhere(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load.compute_dtype("auto", "bfloat16") == "bfloat16"


def test_a_large_download_is_converted_once_and_then_found(tmp_path, monkeypatch):
    downloads = []

    def download(source: str, **_) -> str:
        downloads.append(source)
        return str(GOLDEN)

    monkeypatch.setenv("JDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "snapshot_download", download)
    monkeypatch.setattr(load, "CONVERT_ABOVE", 1000)
    first, second = arrays("someone/llada"), arrays("someone/llada")
    assert downloads == ["someone/llada"]
    assert (tmp_path / "models" / "someone--llada" / "config.json").exists()
    assert same(first, second) and same(first, arrays(str(GOLDEN)))


def test_a_small_download_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "snapshot_download", lambda source, **_: str(GOLDEN))
    assert same(arrays("someone/llada"), arrays(str(GOLDEN)))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("model", ["nowhere", "./nowhere/at/all", "/nowhere"])
def test_what_is_neither_folder_nor_id_is_refused(model):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hugging Face id"):
        arrays(model)


def test_an_id_that_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch):
    def fail(source: str, **_) -> str:
        raise OSError("no route\nand a long story")

    monkeypatch.setenv("JDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="could not be downloaded: no route$"):
        arrays("someone/llada")


def test_a_model_without_a_tokenizer_takes_ids_only(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "hf")
    llm = LLM.load(str(tmp_path / "hf"), mesh=MESH)
    with pytest.raises(ValueError, match="no tokenizer.json: pass token ids"):
        llm.generate(["text"])
    completion = llm.generate([[1, 2, 3]])[0]
    assert completion.text is None and len(completion.ids) <= 128
