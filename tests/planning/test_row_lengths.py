"""The rows of a user's own file are counted, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pyarrow
import pytest
from pyarrow import parquet

from mlx_zh.corpus.registry import load_registry
from mlx_zh.planning.data_sizes import data_size
from mlx_zh.planning.row_lengths import estimate_row_lengths
from mlx_zh.recipe import Source

ROWS = [{"问题": "几点开门" * 10, "答案": "早上九点" * 10, "备注": "无关" * 500} for _ in range(37)]
USED = 24 + 0.75 * 80  # tokens: the template's, and 80 Chinese characters


def _workbook(path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]:
        book.active.append(row)
    book.save(path)


def _csv(path: Path) -> None:
    lines = [",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]
    path.write_text("\n".join(lines), encoding="gb18030")


def _json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


FILES: dict[str, Callable[[Path], object]] = {
    "a.xlsx": _workbook,
    "a.csv": _csv,
    "a.jsonl": _json_lines,
    "a.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),  # all in one line
    "b.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "lines.json": _json_lines,
    "a.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_counted_and_only_the_used_columns_measured(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    lengths = estimate_row_lengths(path, ["问题", "答案"])
    assert lengths is not None
    assert (lengths.rows, lengths.sampled) == (37, 37)
    assert lengths.tokens == pytest.approx(USED)
    source = Source(path=str(path), columns={"prompt": "问题", "response": "答案"})
    size = data_size([source], "sft", load_registry(), mixing="concat", max_length=1024)
    assert (size.examples, size.counted) == (37, True)
    assert size.tokens == pytest.approx(USED)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", b"[{'a'", "问题".encode("utf-16")])
def test_a_file_that_cannot_be_read_has_no_lengths(content: bytes, tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.csv", "a.xlsx"):
        (tmp_path / name).write_bytes(content)
        assert estimate_row_lengths(tmp_path / name) is None
    assert estimate_row_lengths(tmp_path / "none.json") is None


def test_a_long_text_becomes_several_examples_and_a_long_conversation_one(tmp_path: Path) -> None:
    """100,000 Chinese characters at 0.75 tokens each are 75,048 with the two passages' 24: 293.2 rows of 256."""
    (tmp_path / "book.txt").write_text("字" * 100_000, encoding="utf-8")
    row = {"instruction": "问", "output": "字" * 100_000}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    sources = [Source(path=str(tmp_path / name)) for name in ("book.txt", "chat.jsonl")]
    sizes = [data_size((source,), "sft", {}, mixing="concat", max_length=256) for source in sources]
    assert [(size.examples, size.tokens) for size in sizes] == [(293, 256), (1, 256)]
