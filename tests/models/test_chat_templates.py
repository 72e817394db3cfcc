"""Tokenizers with several chat templates, in every format; and tokenizer files that transformers 4 reads too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from tiny_models import TEMPLATE
from tuned import make_tuned

from mlx_zh.models.chat_templates import default_template, named_templates
from mlx_zh.models.export.folder_files import full_layout, write_folder, write_tokenizer
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.export.gguf_vocabulary import tokenizer_metadata
from mlx_zh.models.export.source import open_source
from mlx_zh.models.load import end_of_turn_ids, load_tokenizer
from mlx_zh.system.storage import empty

TOOLS = "{{ tools }}" + TEMPLATE
NAMED = {"default": TEMPLATE, "tool_use": TOOLS, "rag-2": "R" + TEMPLATE}


def give_templates(base: Path, templates: dict[str, str]) -> None:
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(config), encoding="utf-8")
    (base / "chat_template.jinja").unlink(missing_ok=True)


def text_of(fields: dict, name: str) -> str:
    field = fields[name]
    return bytes(field.parts[field.data[0]]).decode()


def test_gguf_has_the_default_template_and_the_others_beside_it(tmp_path: Path):
    """Under the keys of llama.cpp's converter (gguf-py's `add_chat_template`); read back here as a table by name."""
    tuned = make_tuned(tmp_path)
    give_templates(tuned.base, NAMED)
    path = tmp_path / "model.gguf"
    write_gguf(path, plan_gguf(tuned.fusion(), "f16", "Tiny"))
    fields = gguf.GGUFReader(path).fields
    assert text_of(fields, gguf.Keys.Tokenizer.CHAT_TEMPLATE) == TEMPLATE
    assert text_of(fields, gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="tool_use")) == TOOLS
    assert text_of(fields, gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="rag_2")) == "R" + TEMPLATE
    names = fields[gguf.Keys.Tokenizer.CHAT_TEMPLATES]
    assert {bytes(names.parts[index]).decode() for index in names.data} == {"rag_2", "tool_use"}
    said = [{"role": "user", "content": "你好"}]
    before, after = load_tokenizer(tuned.base), load_tokenizer(path)
    assert after.chat_template == {"default": TEMPLATE, "tool_use": TOOLS, "rag_2": "R" + TEMPLATE}
    shown = [tokenizer.apply_chat_template(said, tokenize=False) for tokenizer in (before, after)]
    assert shown[0] == shown[1] == "<|im_start|>user\n你好<|im_end|>\n"


@pytest.mark.parametrize(
    ("templates", "keys"),
    [
        ({"default": TEMPLATE}, {"tokenizer.chat_template"}),
        ({"tool_use": TOOLS}, {"tokenizer.chat_templates", "tokenizer.chat_template.tool_use"}),
        ({}, set()),
        (None, set()),
    ],
)
def test_a_table_with_one_template_or_none(tmp_path: Path, templates: dict[str, str] | None, keys: set[str]):
    base = make_tuned(tmp_path).fusion().base
    base.tokenizer.chat_template = templates
    assert {key for key in tokenizer_metadata(base) if "chat_template" in key} == keys
    assert default_template(templates) == (templates or {}).get("default", "")
    assert named_templates(templates) == (templates or {})


def test_the_end_of_a_turn_is_that_of_the_default_template(tmp_path: Path):
    tuned = make_tuned(tmp_path)
    tokenizer = load_tokenizer(tuned.base)
    end = tokenizer.get_vocab()["<|im_end|>"]
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "x"}
    assert end in end_of_turn_ids(tokenizer, {}, tuned.base)
    tokenizer.eos_token = None
    tokenizer.chat_template = {"default": "x", "tool_use": TEMPLATE}
    assert end not in end_of_turn_ids(tokenizer, {}, tuned.base)


def test_a_folder_keeps_all_templates(tmp_path: Path):
    tuned = make_tuned(tmp_path)
    tokenizer = load_tokenizer(tuned.base)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TOOLS}
    tokenizer.save_pretrained(str(tuned.base))
    assert (tuned.base / "additional_chat_templates" / "tool_use.jinja").is_file()
    out = tmp_path / "out"
    out.mkdir()
    fusion = tuned.fusion()
    write_folder(out, full_layout(fusion, fusion.source.dtype), max_bytes=10**9, kind="pt")
    assert load_tokenizer(out).chat_template == {"default": TEMPLATE, "tool_use": TOOLS}
    empty(out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_the_tokenizers_class_is_one_that_transformers_4_knows(tmp_path: Path, kind: str):
    tuned = make_tuned(tmp_path)
    base = tuned.fusion().base
    if kind == "gguf":
        write_gguf(tmp_path / "model.gguf", plan_gguf(tuned.fusion(), "f16", "Tiny"))
        base = open_source(tmp_path / "model.gguf", "m")
    else:
        base.tokenizer.save_pretrained(str(base.path))
        saved = json.loads((base.path / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert saved["tokenizer_class"] == "TokenizersBackend"  # what transformers 5 writes
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, replace(base, tokenizer=base.tokenizer))
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(out)
    text = "hello 你好 <|im_start|>"
    assert again(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert again.chat_template == base.tokenizer.chat_template and again.eos_token == base.tokenizer.eos_token
