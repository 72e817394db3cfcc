"""Files of at most 1 MB that cost much to read: models, adapters, tokenizers, recipes and exams."""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hostile_data import CHATML, MB, case, put, tokenizer, turns

# Models and adapters


def config(**values: Any) -> str:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    return json.dumps({"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-6, **sizes, **values})


def safetensors(table: dict[str, Any], data: bytes = b"") -> bytes:
    header = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + data


def empty(name: str) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}


def weights(name: str, table: Callable[[], dict[str, Any]], data: bytes = b"", **values: Any) -> None:
    @case(f"Model: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.models.build import build_model
        from mlx_zh.models.folder import folder_config, folder_weights

        put(folder / "config.json", lambda: config(**values))
        put(folder / "model.safetensors", lambda: safetensors(table(), data))

        def load() -> None:
            loaded = folder_weights(folder)
            about = folder_config(folder)
            build_model(about, loaded, "m", dtype=None, keep_quantized=True, quantize=None)

        return load


def many(count: int, form: str = "{}") -> dict[str, Any]:
    return {key: value for i in range(count) for key, value in empty(form.format(i)).items()}


weights("14,000 empty tensors, 14,000 layers", lambda: many(14_000), num_hidden_layers=14_000)
weights("14,000 tensors of layers", lambda: many(14_000, "model.layers.{}.x"), num_hidden_layers=14_000)
weights("a width of 100 million", lambda: many(20), hidden_size=10**8, intermediate_size=10**8)
weights("10 million heads", lambda: many(20), hidden_size=2 * 10**7, num_attention_heads=10**7)
weights(
    "a shape of 300,000 dimensions",
    lambda: {"x": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}},
    bytes(4),
)


def gguf(name: str, content: Callable[[], bytes]) -> None:
    @case(f"GGUF: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.models.gguf import read_gguf

        path = put(folder / "m.gguf", content)
        return lambda: read_gguf(path)


def gguf_head(tensors: int, entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


gguf("4 million tensors", lambda: gguf_head(1 << 22, 0) + b"\0" * MB)
gguf("an array of 4 million numbers", lambda: gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 22))
gguf(
    "120,000 empty texts",
    lambda: gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 120_000) + b"\0" * 960_000,
)
gguf(
    "240,000 numbers",
    lambda: gguf_head(0, 1) + gguf_text(b"a") + struct.pack("<IIQ", 9, 0, 960_000) + b"\0" * 960_000,
)


def peft(name: str, patterns: Callable[[], dict[str, Any]]) -> None:
    @case(f"Adapter: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.models.adapters.files import read_adapter

        about = {"r": 1, "lora_alpha": 1}
        put(folder / "adapter_config.json", lambda: json.dumps({**about, "rank_pattern": patterns()}))
        data, table = b"", {}
        for number in range(100):
            for leaf, shape in (("lora_A", [1, 1]), ("lora_B", [1, 1])):
                key = f"base_model.model.model.layers.{number}.{'x' * 40}.{leaf}.weight"
                table[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4]}
                data += b"\0" * 4
        put(folder / "adapter_model.safetensors", lambda: safetensors(table, data))
        return lambda: read_adapter(folder)


peft("a pattern of optional letters", lambda: {"x?" * 40 + "x" * 40 + "y": 3})
peft("nested repetitions", lambda: {"(x*)*y": 3, "(x|x)*y": 3})
peft("20,000 patterns", lambda: {f"layers.{i}.{'x' * 20}": 3 for i in range(20_000)})
peft("20,000 regular expressions", lambda: {f"layers.{i}.x*y": 3 for i in range(20_000)})


def tokenizer_file(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    @case(f"Tokenizer: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.models.load import load_tokenizer

        about = json.loads(tokenizer().backend_tokenizer.to_str())
        change(about)
        (folder / "tokenizer.json").write_text(json.dumps(about))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
            )
        )
        (folder / "config.json").write_text(config())

        def load() -> None:
            from mlx_zh.corpus.render import Renderer

            Renderer(load_tokenizer(folder)).conversation(turns(4))

        return load


def replace_bomb(about: dict[str, Any]) -> None:
    bomb = [{"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}] * 40
    about["normalizer"] = {"type": "Sequence", "normalizers": bomb}


def regex_bomb(about: dict[str, Any]) -> None:
    pattern = {"Regex": "(x+x+)+y"}
    about["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def many_added(about: dict[str, Any]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    about["added_tokens"] += [{"id": 300 + i, "content": f"<{i}>", **flags} for i in range(7_000)]


tokenizer_file("text that doubles 40 times", replace_bomb)
tokenizer_file("a slow regular expression", regex_bomb)
tokenizer_file("7,000 added tokens", many_added)


# Recipes, registries and exams


def yaml_file(name: str, content: Callable[[], str]) -> None:
    for kind in ("Recipe", "Registry"):

        @case(f"{kind}: {name}")
        def write(folder: Path, kind: str = kind) -> Callable[[], Any]:
            from mlx_zh.corpus.registry import load_registry
            from mlx_zh.recipe import load_recipe

            path = put(folder / "file.yaml", content)
            return lambda: load_recipe(path) if kind == "Recipe" else load_registry(file=path)


def laughs() -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return "\n".join(lines)


def merges() -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    return "\n".join(lines)


yaml_file("aliases of aliases", laughs)
yaml_file("merges of merges", merges)
yaml_file("nested 190,000 deep", lambda: "a: " + "[" * 190_000)
yaml_file("20,000 keys", lambda: "\n".join(f"k{i}: 1" for i in range(20_000)))
yaml_file("80,000 keys", lambda: "\n".join(f"k{i}: 1" for i in range(80_000)))
yaml_file("a number of 1 MB", lambda: "seed: " + "9" * 990_000)


def exam(name: str, members: Callable[[], Iterable[tuple[str, bytes]]]) -> None:
    @case(f"Exam: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.exams.archives import unpack
        from mlx_zh.exams.catalog import benchmark

        def content() -> bytes:
            held = io.BytesIO()
            with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                for member, data in members():
                    archive.writestr(member, data)
            return held.getvalue()

        put(folder / "a.zip", content)
        return lambda: unpack(benchmark("ceval"), folder / "a.zip", folder / "cache")


exam("a member of 100 MB", lambda: [("val/a_val.csv", b"\0" * 100 * MB)])
exam("20 members of 8 MB", lambda: [(f"val/a{i}_val.csv", b"\0" * 8 * MB) for i in range(20)])
exam("8,000 members", lambda: [(f"val/a{i}_val.csv", b"") for i in range(8_000)])


@case("Exam: a row of 400,000 fields")
def wide_exam(folder: Path) -> Callable[[], Any]:
    from mlx_zh.exams.csvfile import read_questions

    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "A", "B", "C", "D", "answer"], ["x"] * 400_000])
    return lambda: read_questions(folder / "a.csv", [], need_answer=True)


@case("Redaction: 1 MB of dots")
def redaction(folder: Path) -> Callable[[], Any]:
    from mlx_zh.system.redaction import printable

    return lambda: [printable(part * 300_000) for part in ("a.", "eyJaaaaaaaa.", "http://a:")]
