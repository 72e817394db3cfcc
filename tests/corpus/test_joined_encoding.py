"""The faster encoder gives the very tokens of `tokenizers`, or is not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.joined_encoding import JoinedEncoder, Vocabulary, vocabulary_of
from mlx_zh.corpus.render import Renderer


@pytest.fixture(scope="module")
def vocabulary(llama31) -> Vocabulary:
    found = vocabulary_of(llama31.backend_tokenizer.to_str())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def joined(vocabulary: Vocabulary) -> JoinedEncoder:
    return JoinedEncoder(vocabulary)


def test_every_character_of_the_basic_plane_in_three_contexts(llama31, joined: JoinedEncoder):
    """Letters, digits, blanks and marks decide where words are cut, by two libraries' Unicode tables."""
    backend: Tokenizer = llama31.backend_tokenizer
    codes = [c for c in (*range(0x3000), *range(0x4E00, 0x4F00), *range(0xF900, 0x10000)) if not 0xD800 <= c < 0xE000]
    pieces = [f"a{chr(c)}b 1{chr(c)}2 '{chr(c)} {chr(c)}\n" for c in codes if not 0xFDD0 <= c < 0xFDF0]
    expected = backend.encode_batch_fast(pieces, add_special_tokens=False)
    found = joined.encode(pieces)
    assert found is not None
    wrong = [p for p, e, f in zip(pieces, expected, found, strict=True) if e.ids != f.tolist()]
    assert wrong == []


def test_rendered_conversations_are_the_same(llama31, joined: JoinedEncoder, samples: Path):
    from mlx_zh.corpus.formats import load_conversations

    rows, _ = load_conversations(samples / "sft" / "oaast_sft_zh.json", on_invalid="skip")
    plain, fast = Renderer(llama31), Renderer(llama31)
    fast.encode_with(joined)
    spelled = [Message("user", "<|eot_id|>是什么？"), Message("assistant", "  一个控制符 <|eot_id|>\n")]
    batch = [*rows[:150], spelled]
    for expected, found in zip(
        plain.conversations(batch, max_length=400), fast.conversations(batch, max_length=400), strict=True
    ):
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            assert expected.tokens.tolist() == found.tokens.tolist()
            assert expected.trained.tolist() == found.trained.tolist()
    assert plain.prompt(spelled[:1]) == fast.prompt(spelled[:1])


def test_what_it_cannot_do_is_left_to_the_other(llama31, joined: JoinedEncoder):
    assert joined.encode(["a \ufdd0\ufdd1\ufdd0 b"]) is None  # its own mark between pieces
    assert joined.encode([" " * 2_000_000 + "a"]) is None
    assert joined.encode(["a", "", "b"])[1].tolist() == []  # type: ignore[index]
    fast = Renderer(llama31)
    fast.encode_with(joined)
    hard = [Message("user", "\ufdd0\ufdd1\ufdd0"), Message("assistant", "好")]
    assert fast.conversation(hard).tokens.tolist() == Renderer(llama31).conversation(hard).tokens.tolist()


def test_a_vocabulary_survives_the_disk(vocabulary: Vocabulary, tmp_path: Path):
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "mistral"])
def test_tokenizers_for_which_it_is_not_proven(tokenizer_of, family: str):
    assert vocabulary_of(tokenizer_of(family).backend_tokenizer.to_str()) is None


@pytest.fixture(scope="module")
def first_words(llama31) -> str:
    """Llama 3.1's tokenizer with the first 600 words of its vocabulary, as a tokenizer.json."""
    found = json.loads(llama31.backend_tokenizer.to_str())
    model = found["model"]
    model["vocab"] = {word: index for word, index in model["vocab"].items() if index < 600}
    model["merges"] = [
        pair for pair in model["merges"] if all(word in model["vocab"] for word in (*pair, "".join(pair)))
    ]
    for number, token in enumerate(found["added_tokens"]):
        token["id"] = 600 + number
    return json.dumps(found)


def test_each_condition_counts(first_words: str):
    def after(change) -> Vocabulary | None:
        found = json.loads(first_words)
        change(found)
        return vocabulary_of(json.dumps(found))

    assert after(lambda t: None) is not None
    assert after(lambda t: t.update(normalizer={"type": "NFC"})) is None
    assert after(lambda t: t["model"].update(ignore_merges=False)) is None
    assert after(lambda t: t["model"].update(byte_fallback=True)) is None
    assert after(lambda t: t["model"]["merges"].pop(100)) is None  # a pair that only tiktoken would join
    assert after(lambda t: t["model"]["merges"].insert(0, t["model"]["merges"].pop(100))) is None  # too early
    assert after(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(invert=True)) is None
    assert after(lambda t: t["added_tokens"][0].update(lstrip=True)) is None
    assert after(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<|begin_of"})) is None
