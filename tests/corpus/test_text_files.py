"""Compressed files give the rows of their content; what is no text is named with a remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pyarrow
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus.rows import open_rows
from mlx_zh.corpus.text_files import inner_suffix
from mlx_zh.errors import DataError


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(**members: bytes | str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return held.getvalue()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}
TEXTS = {
    "a.jsonl": '{"q": "你好", "a": "好"}\n{"q": "1", "a": "2"}\n'.encode(),
    "a.json": '[{"q": "你好", "a": "好"}, {"q": "1", "a": "2"}]'.encode(),
    "b.json": '\ufeff{"q": ["你好", "1"], "a": ["好", "2"]}'.encode(),
    "a.csv": "q,a\n你好,好\n1,2\n".encode("gb18030"),
    "a.tsv": "q\ta\r\n你好\t好\r\n1\t2\r\n".encode("utf-16"),
}
ROWS = [{"q": "你好", "a": "好"}, {"q": "1", "a": "2"}]


def rows_of(path: Path) -> list[object]:
    return [row for _, row in open_rows(path)]


@pytest.mark.parametrize("suffix", PACKINGS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_compressed_text(write, name, suffix):
    path = write(PACKINGS[suffix](TEXTS[name]), name + suffix)
    assert rows_of(path) == rows_of(write(TEXTS[name], name)) == ROWS
    assert next(iter(open_rows(path)))[0].startswith(f"{path}{'[0]' if name.endswith('.json') else ':'}")


@pytest.mark.parametrize("name", TEXTS)
def test_a_zip_archive_with_one_file(write, name):
    notes = {
        "__MACOSX/._" + name: b"\0\5\x16\7",
        ".DS_Store": "",
        "in/Thumbs.db": "",
        "desktop.ini": "",
        "README.md": "",
    }
    assert rows_of(write(zipped(**{f"in/{name}": TEXTS[name]}, **notes), "a.zip")) == ROWS


def test_a_zip_archive_that_is_not_clear(write):
    several = write(zipped(**{"a.jsonl": "{}", "b.jsonl": "{}", "__MACOSX/x": ""}), "a.zip")
    with pytest.raises(DataError, match=r"a\.zip: a zip archive of 2 files \(a\.jsonl, b\.jsonl\); unpack it"):
        rows_of(several)
    with pytest.raises(DataError, match=r"a\.zip: a zip archive of 0 files \(none\)"):
        rows_of(write(zipped(**{".DS_Store": ""}), "a.zip"))
    locked = bytearray(zipped(**{"a.jsonl": "{}"}))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[locked.index(signature) + offset] |= 1
    with pytest.raises(DataError, match=r"a\.zip: the zip archive has a password; unpack it, and name a\.jsonl"):
        rows_of(write(bytes(locked), "a.zip"))


def test_chinese_names_in_a_zip_archive_of_windows(write):
    """zipfile marks names beyond ASCII as UTF-8; Chinese Windows writes GBK without the mark."""
    content = zipped(**{"xx.jsonl": "{}", "yy.jsonl": "{}"}).replace(b"xx", "问".encode("gbk"))
    with pytest.raises(DataError, match=r"2 files \(问\.jsonl, yy\.jsonl\)"):
        rows_of(write(content, "a.zip"))


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_file_that_is_cut_short(write, suffix):
    content = "".join(f'{{"q": "{n * n}"}}\n' for n in range(9999)).encode()
    packed = PACKINGS[suffix](content)
    path = write(packed[: len(packed) // 2], "a.jsonl" + suffix)
    with pytest.raises(DataError, match=f"a.jsonl{suffix}: the compressed file is damaged or cut short"):
        rows_of(path)


@pytest.mark.parametrize("suffix", PACKINGS)
@hypothesis.given(data=st.data())
def test_any_damage_is_a_data_error(tmp_path_factory, suffix, data):
    packed = bytearray(PACKINGS[suffix](TEXTS["a.jsonl"] * 20))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(bytes(packed[: data.draw(st.integers(0, len(packed)))]))
    try:
        rows_of(path)
    except DataError as error:
        assert "damaged.jsonl" in str(error)


def test_what_is_no_text(write, tmp_path):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    cases = {
        "a.tar": (held.getvalue(), "a tar archive; unpack it"),
        "a.tar.gz": (gzip.compress(held.getvalue()), "a tar archive; unpack it"),
        "a.parquet.gz": (gzip.compress(b"PAR1"), "what is compressed is no text; unpack it"),
        "a.xlsx.gz": (gzip.compress(b"PK\3\4"), "what is compressed is no text; unpack it"),
        "a.jsonl": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a Git LFS pointer, not the data itself. Run `git lfs pull`",
        ),
        "a.csv": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        "a.xlsx": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        "._a.jsonl": (b"\0\5\x16\7\0\2\0\0Mac OS X", "a note that macOS wrote beside a file"),
        "empty.jsonl.gz": (gzip.compress(b""), "the file holds no rows"),
    }
    for name, (content, message) in cases.items():
        with pytest.raises(DataError, match=message):
            rows_of(write(content, name))


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_file_that_unpacks_to_far_more_is_refused(write, suffix):
    spaces = write(PACKINGS[suffix](b" " * (1 << 25)), "spaces.jsonl" + suffix)
    with pytest.raises(DataError, match=r"bytes unpack to more than \d+ MB, and few data sets of texts do so"):
        rows_of(spaces)
    many = write(PACKINGS[suffix](b"[" + b"{}," * 99_999 + b"{}]"), "many.json" + suffix)
    with pytest.raises(DataError, match=r"bytes unpack to more than 10,\d\d\d rows"):
        rows_of(many)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.CSV", ".csv"), ("a.csv.gz", ".csv"), ("a.gz", ""), ("a.jsonl", ".jsonl")]
)
def test_the_ending_of_the_content(write, name, suffix):
    assert inner_suffix(write(gzip.compress(b"") if name.endswith(".gz") else b"", name)) == suffix
