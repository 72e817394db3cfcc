"""Files of at most 1 MB that cost much to read: data, conversations and chat templates. `hostile.py` measures them.

A case writes its file and returns what opens it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1_000_000
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
        from mlx_zh.corpus.survey import texts_of

        path = put(folder / f"data{suffix}", content)
        source = DataSource("data", (str(path),))

        def read() -> None:
            for item in source.items("sft", "skip", LoadReport()):
                for text in texts_of(item):
                    normalize(text)

        return read


def pair(question: str, answer: str = "b") -> str:
    return json.dumps({"instruction": question, "output": answer}, ensure_ascii=False)


rows("JSON: combining marks out of order", lambda: pair("a" + "\u0301" * 240_000 + "\u0327" * 240_000))
rows("JSON: combining marks in turn", lambda: pair("a" + "\u0301\u0327" * 240_000))
rows("JSON: nested 500,000 deep", lambda: "[" * 500_000 + "]" * 500_000)
rows("JSON: a row nested 500,000 deep", lambda: '{"instruction": ' + "[" * 990_000)
rows("JSON: a number of 1,000,000 digits", lambda: '{"instruction": ' + "9" * 999_000 + "}")
rows("JSON: a column's name of 1 MB", lambda: json.dumps({"a." * 490_000: 1}))
rows("JSON: 80,000 columns", lambda: json.dumps({str(number): 1 for number in range(80_000)}))
rows("JSON: 330,000 empty rows", lambda: pair("a") + "\n" + "{}\n" * 330_000)
rows("JSON: array of 490,000 numbers", lambda: "[" + pair("a") + ",1" * 490_000 + "]")
rows("JSON: an open string", lambda: '[{"instruction": "' + "a" * 990_000)
rows("CSV: a quoted field of 1 MB", lambda: 'instruction,output\n"' + 'a""' * 330_000 + '",b\n', ".csv")
rows("CSV: an open quotation mark", lambda: 'instruction,output\n"' + "a\n" * 490_000, ".csv")
rows("CSV: 120,000 columns", lambda: ",".join(map(str, range(120_000))) + "\n" + "x," * 119_999 + "x\n", ".csv")
rows("CSV: 240,000 short rows", lambda: "instruction,output\n" + "a,b\n" * 240_000, ".csv")
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
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return held.getvalue()


def cell(reference: str, text: str = "a") -> str:
    return f'<c r="{reference}" t="inlineStr"><is><t>{text}</t></is></c>'


HEAD = f'<row r="1">{cell("A1", "instruction")}{cell("B1", "output")}</row>'
ROW = f'{HEAD}<row r="2">{cell("A2")}{cell("B2")}</row>'
FAR = f'{HEAD}<row r="1048576">{cell("XFD1048576")}</row>'
MANY = "".join(
    f'<row r="{n}"><c r="A{n}" t="s"><v>0</v></c><c r="B{n}" t="s"><v>0</v></c></row>' for n in range(2, 20_000)
)
rows("Excel: dimension of 17 billion cells", lambda: workbook("A1:XFD1048576", ROW), ".xlsx")
rows("Excel: two cells far apart", lambda: workbook("A1:B2", FAR), ".xlsx")
rows(
    "Excel: one column 16,384 wide",
    lambda: workbook(
        "A1",
        HEAD + "".join(f'<row r="{n}">{cell(f"AVL{n}")}</row>' for n in range(2, 13_000)),
    ),
    ".xlsx",
)
rows("Excel: 100 MB of one text", lambda: workbook("A1:B2", ROW, f"<si><t>{'a' * 100 * MB}</t></si>"), ".xlsx")
rows(
    "Excel: 20,000 rows share a text of 1 MB",
    lambda: workbook("A1:B2", HEAD + MANY, f"<si><t>{'a' * MB}</t></si>"),
    ".xlsx",
)
rows("Excel: 5,000,000 empty texts", lambda: workbook("A1:B2", ROW, "<si><t/></si>" * 5 * MB), ".xlsx")


def zstandard(content: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zip_archive(content: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.jsonl", content)
    return held.getvalue()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "Zstandard": zstandard,
    "Zip": zip_archive,
}


NOISE = random.Random(0).randbytes(450_000).hex()  # which packs to half its size
for packing, pack in PACKINGS.items():
    rows(f"{packing}: 60 MB of blanks", lambda pack=pack: pack(f"{pair('a')}\n{' ' * 60 * MB}".encode()))
    rows(f"{packing}: 7,000,000 empty rows", lambda pack=pack: pack(f"[{pair('a')}{',{}' * 7 * MB}]".encode()))
    rows(f"{packing}: blank lines", lambda pack=pack: pack(f"{pair(NOISE)}\n{chr(10) * 30 * MB}".encode()))
    rows(f"{packing}: 100,000 rows, 30 MB", lambda pack=pack: pack((pair("a" * 300) + "\n").encode() * 100_000))
rows("gzip: 230,000 rows and noise", lambda: gzip.compress(f"{pair(NOISE)}\n".encode() + b"{}\n" * 230_000))
rows("JSON: columns of 1 MB", lambda: json.dumps({"instruction": ["a"] * 99_000, "output": ["b"] * 99_000}))
rows("JSON: 60,000 rows by number", lambda: json.dumps({str(number): {} for number in range(60_000)}))
rows("JSON: a table with 60,000 columns", lambda: json.dumps({"columns": list(map(str, range(60_000))), "data": []}))
rows("JSON: an object of one open list", lambda: '{\n"data": [{"instruction": "' + "a" * 990_000)
rows("CSV: 1 MB of Korean", lambda: ("instruction,output\n" + "한국어,질문\n" * 70_000).encode("euc_kr"), ".csv")


def parquet(column: Callable[[], Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    held = io.BytesIO()
    table = pyarrow.table({"instruction": column(), "output": column()})
    parquet.write_table(table, held, compression="zstd", compression_level=9)
    return held.getvalue()


def repeated(text: str, count: int) -> Any:
    import pyarrow

    return pyarrow.array([text], pyarrow.large_string()).take(pyarrow.array([0] * count))


rows(
    "Parquet: 20,000 rows share a text of 10 kB", lambda: parquet(lambda: repeated("a" * 10_000, 20_000)), ".parquet"
)
rows("Parquet: 100 MB in a row", lambda: parquet(lambda: repeated("a" * 50 * MB, 1)), ".parquet")
rows("Parquet: 5,000,000 empty rows", lambda: parquet(lambda: repeated("", 5 * MB)), ".parquet")
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
NUMBERED = CHATML.replace("m.role +", "m.role ~ loop.index +").replace(
    "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant' ~ (messages|length + 1) ~ '\\n' }}"
)
conversation("Chat: numbered rounds", 20_000, None, NUMBERED)


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
