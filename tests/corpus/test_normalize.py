"""Normalisation: what looks the same becomes the same, and what is said stays as it was written."""

from __future__ import annotations

import re
import unicodedata

import pytest

from mlx_zh.corpus.normalize import normalize, simplifier
from mlx_zh.errors import DataError


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("ＡＢＣ１２３", "ABC123"),  # full-width letters and digits
        (
            "你好，世界！（一）：“引号”……《书》",
            "你好，世界！（一）：“引号”……《书》",
        ),  # Chinese punctuation is no ASCII
        ("m² ½ ① ™ ﷼ Ⅳ", "m² ½ ① ™ ﷼ Ⅳ"),  # compatibility forms that mean something
        ("\u2f08\u2f46", "人无"),  # radicals that look like characters
        ("e\u0301", "é"),  # NFC
        ("a\r\nb\rc\u2028d\u2029e\x85f", "a\nb\nc\nd\ne\nf"),
        ("\ufeff零\u200b宽\u00ad\x00\x1b[31m\x7f", "零宽[31m"),
        ("列\t表\n", "列\t表\n"),
        ("a\u00a0b\u3000c", "a b\u3000c"),  # the ideographic space indents Chinese
        ("👨‍👩‍👧 ❤️", "👨‍👩‍👧 ❤️"),  # joiners hold emoji together
    ],
)
def test_normalize(written: str, expected: str):
    assert normalize(written) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize("count", [1, 29, 30, 31, 60, 61])
def test_long_runs_of_marks_are_stream_safe(count: int):
    """Unicode's stream-safe text: at most 30 combining marks in a run, then U+034F (UAX #15, section 13)."""
    written = "x" + "\u0301\u0327" * count  # out of order, and no letter with these marks has a code point
    normal = normalize(written)
    runs = re.split("[x\u034f]", normal)[1:]
    assert [len(run) for run in runs] == [30] * (2 * count // 30) + [2 * count % 30] * (2 * count % 30 > 0)
    assert normal.replace("\u034f", "").count("\u0301") == count
    if 2 * count <= 30:
        assert normal == unicodedata.normalize("NFC", written)
    assert normalize(normal) == normal


def test_traditional_characters_by_phrase():
    pytest.importorskip("opencc")
    assert simplifier()("頭髮與發展，乾坤與乾燥") == "头发与发展，乾坤与干燥"


def test_opencc_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opencc", None)
    with pytest.raises(DataError, match=r"pip install 'mlx-zh\[opencc\]'"):
        simplifier()
