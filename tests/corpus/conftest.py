"""Tiny tokenizers of the real kinds, and Llama 3.1's real one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import llama31_tokenizer
import pytest
from chat_templates import LLAMA3_PATTERN, LLAMA31, MISTRAL, QWEN3, QWEN25, SMOLLM2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mlx_zh.system import storage

QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEXT = [
    "system user assistant You are a helpful assistant. Hello, how are you today? I am fine.",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "你好，世界。今天天气很好，我们去公园吧。中国的首都是北京。一加一等于二。",
    "\n\n\n  Hello  world\n\n1234 <think>\n\n</think>\n\n",
] * 4
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# template, pre-tokenizer pattern (None: GPT-2's), special tokens, BOS, EOS
FAMILIES = {
    "llama3": (LLAMA31, LLAMA3_PATTERN, LLAMA3_SPECIALS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": (QWEN25, QWEN_PATTERN, CHATML_SPECIALS, None, "<|im_end|>"),
    "qwen3": (QWEN3, QWEN_PATTERN, CHATML_SPECIALS, None, "<|im_end|>"),
    "smollm2": (SMOLLM2, None, CHATML_SPECIALS, "<|im_start|>", "<|im_end|>"),
}


def byte_level(pattern: str | None, specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Mistral's kind: a space before every word, one put before the text."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], show_progress=False
    )
    tokenizer.train_from_iterator([line.strip() for line in TEXT for line in line.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerFast]:
    """A tiny tokenizer of a family, with that family's chat template."""
    made: dict[str, PreTrainedTokenizerFast] = {}

    def make(family: str) -> PreTrainedTokenizerFast:
        if family in made:
            return made[family]
        if family == "mistral":
            backend, template, bos, eos = sentencepiece_like(), MISTRAL, "<s>", "</s>"
        else:
            template, pattern, specials, bos, eos = FAMILIES[family]
            backend = byte_level(pattern, specials)
            if (
                bos == "<|begin_of_text|>"
            ):  # a tokenizer that writes BOS itself: the template's must stay the only one
                backend.post_processor = processors.TemplateProcessing(
                    single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
                )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        tokenizer.chat_template = template
        made[family] = tokenizer
        return tokenizer

    return make


@pytest.fixture(scope="session")
def llama31_ranks() -> dict[bytes, int]:
    """Llama 3.1's real vocabulary, from the wheel that carries it: token -> rank, which is its id."""
    try:
        return llama31_tokenizer.ranks(storage.cache_folder() / "tests")
    except OSError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def llama31(llama31_ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """Llama 3.1's real tokenizer and chat template."""
    return llama31_tokenizer.tokenizer(llama31_ranks)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file and return its path."""

    def write(content: str | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
