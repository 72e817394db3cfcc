"""The text of tokens, and where a text is among them: as the tokenizer decodes, and as Python finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.token_text import Finder, TokenText

SENTENCE = "你好，世界。Hello 王冬 🍵\n<|im_end|>"


@pytest.mark.parametrize("family", ["llama3", "qwen2", "smollm2"])
def test_the_text_is_what_the_tokenizer_decodes(tokenizer_of: Any, family: str):
    backend = tokenizer_of(family).backend_tokenizer
    ids = np.array(backend.encode(SENTENCE, add_special_tokens=False).ids, dtype=np.int32)
    text = TokenText(backend)
    assert text.text(ids) == SENTENCE == backend.decode(ids.tolist(), skip_special_tokens=False)
    assert text.text(np.array([10**6, -1], dtype=np.int32)) == ""  # of another tokenizer


def test_a_blank_of_sentencepiece_is_a_blank(tokenizer_of: Any):
    backend = tokenizer_of("mistral").backend_tokenizer
    ids = np.array(backend.encode("Hello world", add_special_tokens=False).ids, dtype=np.int32)
    assert TokenText(backend).text(ids).strip() == "Hello world"


def test_pieces_are_whole_characters_and_learned_or_not(tokenizer_of: Any):
    backend = tokenizer_of("smollm2").backend_tokenizer
    ids = np.array(backend.encode("茶A", add_special_tokens=False).ids, dtype=np.int32)  # 茶: E8 8C B6, three tokens
    learned = np.array([False] * (len(ids) - 1) + [True])
    pieces = list(TokenText(backend).pieces(ids, learned))
    assert [(piece.text, len(piece.ids), piece.learned) for piece in pieces] == [
        ("茶", len(ids) - 1, False),
        ("A", 1, True),
    ]
    cut = list(TokenText(backend).pieces(ids[:2], learned[:2]))  # half a character at the end of what is shown
    assert "".join(piece.text for piece in cut) == "\ufffd"


WORDS = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"\xe8", b"\x8c", b"\xb6", b"\xe8\x8c", b"\xb6a"]


@given(
    rows=st.lists(st.lists(st.integers(0, len(WORDS)), max_size=8), max_size=6),
    sought=st.sampled_from(["a", "ab", "aab", "abab", "aaaab", "茶", "茶a", "a茶ab", "b" * 9]),
)
def test_the_finder_finds_what_python_finds(rows: list[list[int]], sought: str):
    # len(WORDS) stands for a token that the tokenizer does not have: no occurrence goes across it.
    values = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.array([0, *np.cumsum([len(row) for row in rows])], dtype=np.int32)
    held = Finder(WORDS, sought.encode()).rows(values, offsets)
    texts = [b"".join(WORDS[token] if token < len(WORDS) else b"\xff" for token in row) for row in rows]
    assert held.tolist() == [sought.encode() in text for text in texts]


def test_no_occurrence_goes_from_one_row_into_the_next():
    values = np.array([WORDS.index(b"a"), WORDS.index(b"b")], dtype=np.int32)
    finder = Finder(WORDS, b"ab")
    assert finder.rows(values, np.array([0, 1, 2], dtype=np.int32)).tolist() == [False, False]
    assert finder.rows(values, np.array([0, 2, 2], dtype=np.int32)).tolist() == [True, False]


def test_a_text_is_found_in_small_and_capital_letters(tokenizer_of: Any):
    backend = tokenizer_of("llama3").backend_tokenizer
    rows = [backend.encode(text, add_special_tokens=False).ids for text in ("Hello WORLD", "say hell", "世界")]
    values = np.array([token for row in rows for token in row], dtype=np.int32)
    offsets = np.array([0, *np.cumsum([len(row) for row in rows])], dtype=np.int32)
    text = TokenText(backend)
    assert text.finder("hello world").rows(values, offsets).tolist() == [True, False, False]
    assert text.finder("HELL").rows(values, offsets).tolist() == [True, True, False]
    assert text.finder("界").rows(values, offsets).tolist() == [False, False, True]
