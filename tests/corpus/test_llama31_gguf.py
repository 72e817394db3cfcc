"""Llama 3.1's real vocabulary through a GGUF file: our reader and llama.cpp cut text as the tokenizer does."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_zh.models.adapters.files import load_adapter, save_adapter
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.export.merge import Fusion, open_adapter
from mlx_zh.models.export.source import open_source
from mlx_zh.models.load import load_model, load_tokenizer

pytestmark = pytest.mark.slow

TEXTS = (
    "你好，世界！今天天气很好，我们去公园吧。1234567 个苹果，3.14159",
    "  Hello  world\n\n\t it's IT'S we'LL 12345\r\n\r\n ½ c² — “引号” 😀🇨🇳\u3000全角",
    "def f(x):\n    return x**2  # 平方\n\n\n",
    "<|start_header_id|>user<|end_header_id|>\n\n画蛇添足<|eot_id|>",
)


# Llama 3.1's, but of another length: short enough for a test to be beyond it.
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 24}  # fmt: skip
CHAT = [{"role": "system", "content": "请用中文回答。"}, {"role": "user", "content": "镇里那条河叫什么名字？"}]


@pytest.fixture(scope="module")
def exported(llama31, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama31")
    model = tiny_model("llama", tied=True, layers=1, vocabulary=128256, hidden_size=64)
    config = {name: value for name, value in dataclasses.asdict(model.args).items() if value is not None}
    config["rope_scaling"] = SCALING
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [128001, 128008, 128009]}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    llama31.save_pretrained(folder)
    path = "model.layers.0.self_attn.q_proj"
    weights = {
        f"{path}.lora_a": mx.zeros((64, 2)),
        f"{path}.lora_b": 0.1 * mx.random.normal((2, 64), key=mx.random.key(1)),
    }
    save_adapter(folder / "adapter", weights, AdapterSpec("lora", 1, 2, 1.0), {})
    base = open_source(folder, "Llama-3.1")
    plan = plan_gguf(Fusion(base, open_adapter(folder / "adapter", base)), "f16", "Llama-3.1-zh")
    write_gguf(folder / "model.gguf", plan)
    return plan.metadata, folder / "model.gguf"


def test_metadata(exported):
    metadata, _ = exported
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe" and metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.bos_token_id"] == 128000
    assert metadata["tokenizer.ggml.eos_token_id"] == 128009 or metadata["tokenizer.ggml.eot_token_id"] == 128009
    assert metadata["tokenizer.ggml.eom_token_id"] == 128008
    assert metadata["tokenizer.ggml.tokens"][128009] == "<|eot_id|>"
    assert metadata["tokenizer.ggml.token_type"][128009] == 3
    assert len(metadata["tokenizer.ggml.tokens"]) == 128256 and len(metadata["tokenizer.ggml.merges"]) > 250_000


def test_our_reader(exported, llama31):
    found = load_tokenizer(exported[1])
    for text in TEXTS:
        assert found(text)["input_ids"] == llama31(text)["input_ids"]


def test_llama_cpp(exported, llama31):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(exported[1]), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == llama31(text)["input_ids"]
    model.close()


def test_a_chat_has_one_bos_and_the_answer_of_base_and_adapter(exported, llama31):
    """40 tokens and more, beyond the length that the positions are scaled from."""
    llama_cpp = pytest.importorskip("llama_cpp")
    text = llama31.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = llama31.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    loaded = load_model(str(exported[1].parent), dtype="float32")
    load_adapter(loaded.model, exported[1].parent / "adapter")
    loaded.model.eval()
    model = llama_cpp.Llama(str(exported[1]), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    assert model.tokenize(text.encode(), add_bos=False, special=True) == ids and len(ids) > 40
    assert ids.count(128000) == 1 and model.token_bos() == 128000
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ends = {token for token in range(128000, 128256) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
    assert {128001, 128008, 128009} <= ends
    expected = list(ids)
    for _ in range(12):
        expected.append(int(loaded.model(mx.array([expected]))[0, -1].argmax()))
    model.eval(expected[:-1])
    found = np.array(model.scores[len(ids) - 1 : len(expected) - 1]).argmax(axis=-1)
    assert found.tolist() == expected[len(ids) :]
    model.close()
