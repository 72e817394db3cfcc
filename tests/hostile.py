"""Files of at most 1 MB that cost much to read, and what each costs here.

    python tests/hostile.py             prints a table; docs/reliability.md has its summary
    python tests/hostile.py NAME        measures one, and prints it as JSON

A case writes its file and returns what opens it; its imports are not measured. Each case runs in a process of its
own, with a limit on processor time and memory, so one that is not bounded ends.
"""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

MB = 1_000_000
SECONDS, MEGABYTES = 60, 6000  # where a case is ended
CASES: dict[str, Callable[[Path], Callable[[], Any]]] = {}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def case(name: str) -> Callable[[Callable[[Path], Callable[[], Any]]], Callable[[Path], Callable[[], Any]]]:
    def add(write: Callable[[Path], Callable[[], Any]]) -> Callable[[Path], Callable[[], Any]]:
        CASES[name] = write
        return write

    return add


def put(path: Path, content: Callable[[], str | bytes]) -> Path:
    """Write a file, unless an earlier call has."""
    if not path.exists():
        data = content()
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# Rows of data


def rows(name: str, content: Callable[[], str | bytes], suffix: str = ".jsonl") -> None:
    """A data file, read row by row and prepared as `mlx-zh prepare` does first."""

    @case(name)
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.corpus.normalize import normalize
        from mlx_zh.corpus.rows import LoadReport
        from mlx_zh.corpus.sources import DataSource

        path = put(folder / f"data{suffix}", content)
        source = DataSource("data", (str(path),))
        return lambda: sum(1 for _ in source.items("sft", "skip", LoadReport(), normalize))


def pair(question: str, answer: str = "b") -> str:
    return json.dumps({"instruction": question, "output": answer}, ensure_ascii=False)


rows("JSON: combining marks out of order", lambda: pair("a" + "\u0301" * 240_000 + "\u0327" * 240_000))
rows("JSON: combining marks in turn", lambda: pair("a" + "\u0301\u0327" * 240_000))
rows("JSON: nested 500,000 deep", lambda: "[" * 500_000 + "]" * 500_000)
rows("JSON: a row nested 500,000 deep", lambda: '{"instruction": ' + "[" * 990_000)
rows("JSON: a number of 1,000,000 digits", lambda: '{"instruction": ' + "9" * 999_000 + "}")
rows("JSON: a column's name of 1 MB", lambda: json.dumps({"a." * 490_000: 1}))
rows("JSON: 90,000 columns", lambda: json.dumps({str(number): 1 for number in range(80_000)}))
rows("JSON: 250,000 empty rows", lambda: "{}\n" * 330_000)
rows("JSON: array of 500,000 numbers", lambda: "[" + "1," * 499_000 + "1]")
rows("JSON: an open string", lambda: '[{"instruction": "' + "a" * 990_000)
rows("CSV: a quoted field of 1 MB", lambda: 'instruction,output\n"' + 'a""' * 330_000 + '",b\n', ".csv")
rows("CSV: an open quotation mark", lambda: 'instruction,output\n"' + "a\n" * 490_000, ".csv")
rows("CSV: 500,000 columns", lambda: "a," * 490_000 + "\n" + "," * 10_000, ".csv")
rows("CSV: 300,000 short rows", lambda: "instruction,output\n" + "a,b\n" * 240_000, ".csv")
rows("CSV: blank lines", lambda: "instruction,output\n" + "\n" * 990_000, ".csv")


def workbook(dimension: str, cells: str, strings: str = "") -> bytes:
    """A workbook with a sheet of this XML, packed as tightly as possible."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    relations = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"/>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{relations}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{relations}"><sheets>'
        '<sheet name="s" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{relations}/worksheet" Target="worksheets/sheet1.xml"/>'
        f'<Relationship Id="r2" Type="{relations}/sharedStrings" Target="sharedStrings.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet {main}><dimension ref="{dimension}"/>'
        f"<sheetData>{cells}</sheetData></worksheet>",
        "xl/sharedStrings.xml": f"<sst {main}>{strings}</sst>",
    }
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return held.getvalue()


def cell(reference: str, text: str = "a") -> str:
    return f'<c r="{reference}" t="inlineStr"><is><t>{text}</t></is></c>'


ROW = f'<row r="1">{cell("A1")}{cell("B1")}</row><row r="2">{cell("A2")}{cell("B2")}</row>'
FAR = f'<row r="1">{cell("A1")}</row><row r="1048576">{cell("XFD1048576")}</row>'
MANY = "".join(
    f'<row r="{n}"><c r="A{n}" t="s"><v>0</v></c><c r="B{n}" t="s"><v>0</v></c></row>' for n in range(1, 20_000)
)
rows("Excel: dimension of 17 billion cells", lambda: workbook("A1:XFD1048576", ROW), ".xlsx")
rows("Excel: two cells far apart", lambda: workbook("A1:B2", FAR), ".xlsx")
rows(
    "Excel: one column 16,384 wide",
    lambda: workbook(
        "A1",
        f'<row r="1">{cell("A1")}</row>' + "".join(f'<row r="{n}">{cell(f"AVL{n}")}</row>' for n in range(2, 13_000)),
    ),
    ".xlsx",
)
rows("Excel: 400 MB of one text", lambda: workbook("A1:B2", ROW, f"<si><t>{'a' * 400 * MB}</t></si>"), ".xlsx")
rows(
    "Excel: 20,000 rows share a text of 1 MB", lambda: workbook("A1:B2", MANY, f"<si><t>{'a' * MB}</t></si>"), ".xlsx"
)
rows("Excel: 5,000,000 empty texts", lambda: workbook("A1:B2", ROW, "<si><t/></si>" * 5 * MB), ".xlsx")


def parquet(column: Callable[[], Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    held = io.BytesIO()
    table = pyarrow.table({"instruction": column(), "output": column()})
    parquet.write_table(table, held, compression="zstd", compression_level=19)
    return held.getvalue()


def repeated(text: str, count: int) -> Any:
    import pyarrow

    return pyarrow.array([text], pyarrow.large_string()).take(pyarrow.array([0] * count))


rows(
    "Parquet: 50,000 rows share a text of 10 kB", lambda: parquet(lambda: repeated("a" * 10_000, 50_000)), ".parquet"
)
rows("Parquet: 400 MB in a row", lambda: parquet(lambda: repeated("a" * 200 * MB, 1)), ".parquet")
rows("Parquet: 20,000,000 empty rows", lambda: parquet(lambda: repeated("", 20 * MB)), ".parquet")
rows(
    "Parquet: damaged footer", lambda: b"PAR1" + b"\xff" * 900_000 + struct.pack("<I", 900_000) + b"PAR1", ".parquet"
)


# Conversations


def turns(count: int) -> list[Any]:
    from mlx_zh.corpus.conversation import Message

    return [Message(("user", "assistant")[i % 2], str(i)) for i in range(count)]


def tokenizer(template: str = CHATML) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


def conversation(name: str, messages: int, max_length: int | None, template: str = CHATML, thought: str = "") -> None:
    @case(name)
    def write(folder: Path) -> Callable[[], Any]:
        from dataclasses import replace

        from mlx_zh.corpus.render import Renderer

        renderer = Renderer(tokenizer(template))
        said = turns(messages)
        said = [replace(m, content=thought + m.content) if m.role == "assistant" else m for m in said]
        return lambda: renderer.conversation(said, max_length=max_length)


THINK = CHATML.replace("m.content +", "(m.content.split('</think>')[-1] if not loop.last else m.content) +")
conversation("Chat: 32,000 messages, 2,048 tokens", 32_000, 2048)
conversation("Chat: 32,000 messages, no limit", 32_000, None)
conversation("Chat: 66,000 messages", 66_000, None)
conversation("Chat: 20,000 messages, rewritten by the template", 20_000, None, THINK, "<think>x</think>")
conversation("Chat: numbered rounds", 20_000, None, CHATML.replace("m.role +", "m.role ~ loop.index +"))


# Chat templates

TEMPLATES = {
    "width": "{{ 'x'.ljust(3000000000) }}{{ 'x'|center(3000000000) }}",
    "format": "{{ '%3000000000d' % 1 }}{{ '{:3000000000}'.format(1) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(100000) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
    "join": "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "batch": "{{ [1]|batch(300000000, 1)|list }}",
    "indent": "{{ [[1]]|tojson(indent=1000000000) }}",
    "square": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "searches": "{% set x = range(99999)|list %}{% for a in x %}{% if -1 in x %}{% endif %}{% endfor %}",
    "searches from the end": "{% set x = 'a' * 900000 %}{{ x.rfind('a' * 400000 ~ 'b' ~ 'a' * 400000) }}",
    "words": "{% set x = 'a ' * 400000 %}{% for i in range(999) %}{{ x|wordcount }}{% set y = x|title %}{% endfor %}",
    "largest character": "{% set x = 'a' * 900000 %}{% for i in range(999) %}{{ x|max }}{% endfor %}",
    "punycode": "{{ '" + "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "'.encode('punycode') }}",
    "130 kB": "{{ x }}" * 18_000,
    "1 MB": "{{ x }}" * 140_000,
    "error of 800 kB": "{{ raise_exception('a.' * 400000) }}",
}


def template(name: str, source: str) -> None:
    @case(f"Template: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.corpus.chat_template import ChatTemplate
        from mlx_zh.system.redaction import printable

        def render() -> None:
            try:
                ChatTemplate(source, date_string="26 Jul 2024", variables={}).render(turns(2))
            except Exception as error:
                printable(str(error)[:8000])
                raise

        return render


for _name, _source in TEMPLATES.items():
    template(_name, _source)


# Models and adapters


def config(**values: Any) -> str:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    return json.dumps({"model_type": "llama", "num_hidden_layers": 1, "rms_norm_eps": 1e-6, **sizes, **values})


def safetensors(table: dict[str, Any], data: bytes = b"") -> bytes:
    header = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + data


def empty(name: str) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}


def weights(name: str, table: Callable[[], dict[str, Any]], **values: Any) -> None:
    @case(f"Model: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.models.build import build_model
        from mlx_zh.models.folder import folder_config, folder_weights

        put(folder / "config.json", lambda: config(**values))
        put(folder / "model.safetensors", lambda: safetensors(table()))

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
weights("10 million heads", lambda: many(20), num_attention_heads=10**7)
weights(
    "a shape of 300,000 dimensions", lambda: {"x": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}}
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
yaml_file("nested 300,000 deep", lambda: "a: " + "[" * 300_000)
yaml_file("100,000 keys", lambda: "\n".join(f"k{i}: 1" for i in range(80_000)))
yaml_file("a number of 1 MB", lambda: "seed: " + "9" * 990_000)


def exam(name: str, members: Callable[[], Iterable[tuple[str, bytes]]]) -> None:
    @case(f"Exam: {name}")
    def write(folder: Path) -> Callable[[], Any]:
        from mlx_zh.exams.archives import unpack
        from mlx_zh.exams.catalog import benchmark

        def content() -> bytes:
            held = io.BytesIO()
            with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for member, data in members():
                    archive.writestr(member, data)
            return held.getvalue()

        put(folder / "a.zip", content)
        return lambda: unpack(benchmark("ceval"), folder / "a.zip", folder / "cache")


exam("a member of 1 GB", lambda: [("val/a_val.csv", b"\0" * 900 * MB)])
exam("120 members of 8 MB", lambda: [(f"val/a{i}_val.csv", b"\0" * 8 * MB) for i in range(120)])
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


# Measuring


def peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Open one file in this process: processor seconds, MB above the start, and how it ended."""
    if (writer := os.fork()) == 0:  # the memory that it takes to write the file does not count
        CASES[name](folder)
        os._exit(0)
    os.waitpid(writer, 0)
    opened = CASES[name](folder)
    for kind, limit in (
        (resource.RLIMIT_CPU, SECONDS + int(time.process_time())),
        (resource.RLIMIT_AS, MEGABYTES << 20),
    ):
        with suppress(OSError, ValueError):  # macOS has no limit on the address space
            resource.setrlimit(kind, (limit, limit))
    from mlx_zh.errors import MlxZhError

    before, start = peak(), time.process_time()
    try:
        opened()
        end = "read"
    except MlxZhError as error:
        end = type(error).__name__
    return {"name": name, "seconds": time.process_time() - start, "megabytes": peak() - before, "end": end}


def measured(name: str) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        killed = f"ended by {done.returncode}: {done.stderr.strip()[-200:]}"
        return {"name": name, "seconds": float("inf"), "megabytes": float("inf"), "end": killed}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(sys.argv[1], Path(folder))))
        return
    print("| File of at most 1 MB | seconds | MB | end |\n| --- | ---: | ---: | --- |")
    for name in CASES:
        if len(sys.argv) < 2 or any(part in name for part in sys.argv[1:]):
            result = measured(name)
            print(
                f"| {name} | {result['seconds']:.2f} | {result['megabytes']:.0f} | {result['end'][-120:]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
