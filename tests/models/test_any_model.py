"""Any bytes as weights, any JSON as settings: a model or an adapter, or an error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import strategies
import tiny_models as tiny
from hypothesis import strategies as st

from mlx_zh.models.adapters.files import load_adapter, save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.peft import write_peft
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.folder import folder_config, folder_weights
from mlx_zh.models.gguf import read_gguf, read_tensor
from mlx_zh.models.gguf_model import gguf_config, gguf_weights
from mlx_zh.models.gguf_tokenizer import gguf_tokenizer

CONFIG = tiny.tiny_config("llama", vocab_size=len(tiny.TOKENS))
KEYS = """
    fine_tune_type num_layers lora_parameters rank scale mlx_zh r lora_alpha lora_dropout peft_type rank_pattern
    alpha_pattern use_dora bias rope_scaling rope_parameters layer_types eos_token_id model_type num_hidden_layers
    quantization tie_word_embeddings
"""
SETTINGS = st.dictionaries(st.sampled_from(KEYS.split()), strategies.values, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model(CONFIG)


@pytest.fixture(scope="module", params=["mlx", "peft"])
def adapter(request, model, tmp_path_factory) -> Path:
    """A whole adapter of two tensors a layer; damaged in copies."""
    folder = tmp_path_factory.mktemp("adapter")
    spec = AdapterSpec("lora", 2, rank=2, targets=("q_proj",))
    add_adapter(model, spec, seed=0)
    if request.param == "mlx":
        save_adapter(folder, trainable(model), spec, {"vocabulary": len(tiny.TOKENS)})
    else:
        names = [path for path, module in model.named_modules() if path.endswith("_proj")]
        write_peft(folder, spec, trainable(model), base="base", matrices=names)
    return folder


def copied(folder: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))


@hypothesis.given(data=st.data())
def test_damaged_adapters(told, model, adapter, tmp_path_factory, data):
    folder = copied(adapter, tmp_path_factory.getbasetemp() / "damaged")
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    file.write_bytes(data.draw(strategies.damaged(file.read_bytes())))
    error = told(lambda: load_adapter(model, folder))
    assert error is None or "damaged" in error


@hypothesis.given(SETTINGS | strategies.values)
def test_any_settings_of_an_adapter(told, model, adapter, tmp_path_factory, settings):
    folder = copied(adapter, tmp_path_factory.getbasetemp() / "set")
    file = folder / "adapter_config.json"
    whole = json.loads(file.read_text())
    file.write_text(strategies.as_json(whole | settings if isinstance(settings, dict) else settings))
    told(lambda: load_adapter(model, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("whole"), CONFIG, tiny.tiny_model(CONFIG))


@hypothesis.given(SETTINGS | strategies.values, strategies.values)
def test_any_config(told, folder, tmp_path_factory, settings, generation):
    place = tmp_path_factory.getbasetemp() / "config"
    place.mkdir(exist_ok=True)
    whole = CONFIG | settings if isinstance(settings, dict) else settings
    (place / "config.json").write_text(strategies.as_json(whole))
    (place / "generation_config.json").write_text(strategies.as_json({"eos_token_id": generation}))
    error = told(lambda: folder_config(place))
    assert error is None or str(place) in error


@hypothesis.given(data=st.data())
def test_damaged_weights(told, folder, tmp_path_factory, data):
    place = copied(folder, tmp_path_factory.getbasetemp() / "weights")
    head = (folder / "model.safetensors").read_bytes()
    header, rest = head[:1500], head[1500:]
    (place / "model.safetensors").write_bytes(data.draw(strategies.damaged(header)) + rest)
    error = told(lambda: folder_weights(place))
    assert error is None or str(place) in error


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return tiny.write_gguf(path, CONFIG, tiny.tiny_model(CONFIG), "Q4_0").read_bytes()


@hypothesis.given(data=st.data())
def test_damaged_gguf_files(told, gguf, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    size = data.draw(st.sampled_from([400, 12_000, len(gguf)]))  # most of the header's fields come early
    path.write_bytes(data.draw(strategies.damaged(gguf[:size])) + gguf[size:])

    def use() -> None:
        file = read_gguf(path)
        config = gguf_config(file)
        gguf_tokenizer(file)
        gguf_weights(file, config)
        for name in list(file.tensors)[:2]:
            read_tensor(file, name)

    error = told(use)
    assert error is None or str(path) in error
