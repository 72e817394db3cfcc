"""Character n-grams, against sets made one text at a time."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_zh.corpus.shingles import letters

TEXTS = ["你好，世界！Hello World", "", "你好世界hello", "啊", "，。！", "𠀀𠀁abc你", "一二三四五六七八一二三四"]


def plain(text: str) -> str:
    return "".join(c.lower() for c in text if c.isalnum())


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_as_many_different_ones_as_there_are(size: int):
    grams, offsets = letters(TEXTS).ngrams(size)
    by_text = {}
    for i, text in enumerate(TEXTS):
        kept = plain(text)
        expected = [kept[j : j + size] for j in range(len(kept) - size + 1)] or ([kept] if kept else [])
        found = grams[offsets[i] : offsets[i + 1]].tolist()
        assert len(found) == len(expected)
        for name, value in zip(expected, found, strict=True):
            assert by_text.setdefault(name, value) == value  # the same n-gram, the same hash, wherever it stands
    assert len(set(by_text.values())) == len(by_text)


def test_texts_do_not_run_into_each_other():
    alone = [letters([text]).ngrams(3)[0] for text in TEXTS]
    grams, offsets = letters(TEXTS).ngrams(3)
    for i, expected in enumerate(alone):
        np.testing.assert_array_equal(grams[offsets[i] : offsets[i + 1]], expected)


def test_case_space_and_punctuation_make_no_difference():
    grams, offsets = letters(["Ab，c 你好", "aB C你。好"]).ngrams(3)
    np.testing.assert_array_equal(grams[: offsets[1]], grams[offsets[1] :])
