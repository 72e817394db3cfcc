"""Coverage-guided fuzzing of what reads strangers' files, with Atheris: `make fuzz`.

    python fuzz/parsers.py TARGET [options of libFuzzer]        TARGET: a key of TARGETS

A target may work or raise one of the program's own errors; anything else, and more than ten seconds, is a crash, and
its input is kept as `crash-…` in the current folder. Each one mended becomes a test.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["mlx_zh"]):
    from mlx_zh.chatting import repl, transcript
    from mlx_zh.corpus import formats, preferences
    from mlx_zh.corpus.chat_template import ChatTemplate
    from mlx_zh.corpus.conversation import Message
    from mlx_zh.exams import archives
    from mlx_zh.exams.catalog import benchmark
    from mlx_zh.models.adapters.patterns import read_patterns
    from mlx_zh.models.export import card, licences, ollama
    from mlx_zh.models.folder import read_table
    from mlx_zh.models.gguf import read_gguf
    from mlx_zh.models.gguf_model import gguf_config, gguf_weights
    from mlx_zh.models.gguf_tokenizer import gguf_tokenizer
    from mlx_zh.recipe import load_recipe
    from mlx_zh.system.redaction import printable, redact

from mlx_zh.errors import MlxZhError

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(tempfile.mkdtemp(prefix="fuzz-")) / "input"
CHAT = [Message("system", "s"), Message("user", "你好"), Message("assistant", "<b>"), Message("user", "?")]


def gguf(data: bytes) -> None:
    """Header, table, config, tokenizer and tensors of a GGUF file."""
    FILE.write_bytes(data)
    file = read_gguf(FILE)
    config = gguf_config(file)
    gguf_tokenizer(file)
    gguf_weights(file, config)


def recipe(data: bytes) -> None:
    """A recipe, and the one that is written back."""
    FILE.write_bytes(data)
    FILE.write_text(load_recipe(FILE).to_yaml(), encoding="utf-8")
    load_recipe(FILE)


def rows(data: bytes) -> None:
    """Conversations and preferences; the first two bytes choose how they are read."""
    names = ["auto", *formats.FORMATS, *preferences.FORMATS]
    options = {"format": names[data[0] % len(names)], "on_invalid": ("error", "skip")[data[1] % 2]}
    FILE.write_bytes(data[2:])
    load = preferences.load_preferences if data[1] & 2 else formats.load_conversations
    load(FILE, **options)


def template(data: bytes) -> None:
    """A chat template, rendered with and without a generation prompt."""
    text = data.decode(errors="replace")
    compiled = ChatTemplate(text, date_string="26 Jul 2024", variables={"bos_token": "<s>", "eos_token": "</s>"})
    for ask in (False, True):
        compiled.render(CHAT, add_generation_prompt=ask)


def gguf_seeds() -> list[bytes]:
    """Small models as llama.cpp's own package writes them."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    import tiny_models as tiny

    found = []
    for kind, stored in (("llama", "Q4_0"), ("qwen3", "Q8_0")):
        config = tiny.tiny_config(kind, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
        found.append(tiny.write_gguf(FILE, config, tiny.tiny_model(config), stored).read_bytes())
    return found


def row_seeds() -> list[bytes]:
    """A few rows of each kind."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"chosen": "b", "rejected": "c"}
    examples = [
        {"messages": said},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    examples += [{"instruction": "a", "input": "", "output": "b", "history": [["a", "b"]]}]
    examples += [{"instruction": "a", "instances": [{"input": "", "output": "b"}]}, {"prompt": "a", "response": "b"}]
    pairs = [
        {"prompt": "a", **pair},
        {"messages": said[:1], **pair},
        {"question": "a", "answer_zh": "b", "answer_en": "c"},
    ]
    pairs += [{"chosen": said, "rejected": [said[0], {"role": "assistant", "content": "c"}]}]
    kinds = [(b"\0\0", examples), (b"\0\2", pairs)]
    return [
        head + form(rows).encode()
        for head, rows in kinds
        for form in (json.dumps, lambda r: "\n".join(map(json.dumps, r)))
    ]


def template_seeds() -> list[bytes]:
    """Templates of known families."""
    sys.path.insert(0, str(ROOT / "tests" / "corpus"))
    import chat_templates

    return [text.encode() for name, text in vars(chat_templates).items() if name.isupper() and isinstance(text, str)]


def recipe_seeds() -> list[bytes]:
    """The recipes that come with the program."""
    return [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]


def adapter(data: bytes) -> None:
    """PEFT's and mlx-lm's settings of an adapter, over weights that are right."""
    try:
        value = json.loads(data)
        patterns = read_patterns({str(key): 1 for key in value} if isinstance(value, dict) else {str(value): 1})
        patterns.value("model.layers.11.self_attn.q_proj", 1)
    except (ValueError, RecursionError):
        return  # `read_peft` makes an AdapterError of it


def safetensors(data: bytes) -> None:
    """The table of a safetensors file."""
    FILE.write_bytes(data)
    read_table(FILE)


def parquet(data: bytes) -> None:
    """Rows of a Parquet file."""
    FILE.write_bytes(b"PAR1" + data)
    for _ in formats.load_conversations(FILE):
        pass


def archive(data: bytes) -> None:
    """An archive of an exam."""
    FILE.write_bytes(data)
    archives.unpack(benchmark("ceval"), FILE, FILE.parent / "cache")


def redaction(data: bytes) -> None:
    """What is shown and stored of any text; twice redacted is once redacted."""
    text = data.decode(errors="surrogateescape")
    printable(text)
    redact(redact(text))


def modelfile(data: bytes) -> None:
    """Ollama's Modelfile; each part of the input is a text of a stranger."""
    texts = [*data.decode(errors="replace").split("\0"), "", ""]
    written = ollama.modelfile(
        texts[0], small_tokenizer(), "26 Jul 2024", system=texts[1], context=8, notes=texts[2:]
    )
    commands = [line.split(" ")[0] for line in written.split('"""')[0].splitlines() if line]
    assert set(commands) <= {"#", "FROM", "TEMPLATE", "PARAMETER", "SYSTEM"}, commands


def model_card(data: bytes) -> None:
    """The model card: its metadata is YAML with known keys."""
    import yaml

    texts = [*data.decode(errors="replace").split("\0"), *[""] * 8][:8]
    licence = licences.Licence("other", "its base's licence")
    title, base, original, method, name, key, value, warning = texts
    run = card.RunFacts(
        title, base, base, original, licence, method, [(name, "ab")], [(key, value)], [(key, name, value)], [warning]
    )
    text = card.model_card(run, card.FormatFacts("gguf", value, f"{title}.gguf", warnings=[warning]))
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["license"] == "other"


def chat(data: bytes) -> None:
    """A line that is typed in chat, and a saved conversation."""
    text = data.decode(errors="replace")
    if (command := repl.command_in(text)) is not None:
        repl.nearest_command(command[0])
    FILE.write_bytes(data)
    for read in (repl.temperature, lambda _: transcript.Transcript.load(FILE)):
        with suppress(MlxZhError):
            read(text)


def parquet_seed() -> bytes:
    """Two rows of a data set."""
    import pyarrow
    from pyarrow import parquet as files

    held = io.BytesIO()
    files.write_table(pyarrow.table({"instruction": ["a", "b"], "output": ["c", "d"]}), held)
    return held.getvalue()


def archive_seed() -> bytes:
    """An archive with one file of an exam."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("val/law_val.csv", "id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n")
    return held.getvalue()


@cache
def small_tokenizer() -> Any:
    """A tokenizer with ChatML's template."""
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile_data

    return hostile_data.tokenizer()


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "gguf": (gguf, gguf_seeds),
    "recipe": (recipe, recipe_seeds),
    "data": (rows, row_seeds),
    "template": (template, template_seeds),
    "adapter": (adapter, lambda: [b'{"q_proj": 2, "layers\\\\.1[0-9]\\\\..*(q|k)_proj": 4}']),
    "safetensors": (
        safetensors,
        lambda: [b"\x40" + b"\0" * 7 + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(68)],
    ),
    "parquet": (parquet, lambda: [parquet_seed()[4:]]),
    "archive": (archive, lambda: [archive_seed()]),
    "modelfile": (modelfile, lambda: ['m.gguf\0你好"""\0a note'.encode(), b'a\nSYSTEM x\0"""\n\0\x1b']),
    "card": (
        model_card,
        lambda: ["title\0base\0original\0lora\0名\0key\x001|2\0---".encode()],
    ),
    "chat": (
        chat,
        lambda: [b"/temp 0.5", "／保存 a.json".encode(), b'{"messages": [{"role": "user", "content": "a"}]}'],
    ),
    "redaction": (redaction, lambda: [b"token=abcdefgh http://a:b@c hf_" + b"a" * 20]),
}


def main() -> None:
    """Fuzz one target, from its seeds and from what earlier runs found (`.fuzz/corpus/NAME`)."""
    name, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    corpus = ROOT / ".fuzz" / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        if len(data) < 2:
            return
        try:
            target(data)
        except MlxZhError as error:
            str(error).encode()

    os.chdir(ROOT / ".fuzz")
    atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=3000", *options, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
