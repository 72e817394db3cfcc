"""Tiny tokenizers of the real kinds, and Llama 3.1's real one."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_templates import LLAMA3_PATTERN, LLAMA31, MISTRAL, QWEN3, QWEN25, SMOLLM2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mlx_zh import device

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


WHEEL = "llama-models==0.3.0"
WHEEL_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"


@pytest.fixture(scope="session")
def llama31_ranks() -> dict[bytes, int]:
    """Llama 3.1's real vocabulary, from the wheel that carries it: token -> rank, which is its id."""
    folder = device.cache_folder() / "tests"
    wheel = folder / "llama_models-0.3.0-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and not wheel.exists():
            if os.environ.get("CI") == "true":
                pytest.fail(f"{WHEEL} cannot be obtained:\n{done.stderr}")
            pytest.skip(f"{WHEEL} cannot be obtained")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("llama_models/llama3/tokenizer.model").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@pytest.fixture(scope="session")
def llama31(llama31_ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """Llama 3.1's real tokenizer and chat template."""
    spell = _byte_spelling()

    def name(token: bytes) -> str:
        return "".join(spell[byte] for byte in token)

    merges = []
    for token, rank in llama31_ranks.items():
        parts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [
            (llama31_ranks[a], llama31_ranks[b], a, b) for a, b in parts if a in llama31_ranks and b in llama31_ranks
        ]
        merges += [(rank, first, second, name(a), name(b)) for first, second, a, b in known]
    vocabulary = {name(token): rank for token, rank in llama31_ranks.items()}
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _llama31_specials()])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 128000)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>")
    tokenizer.chat_template = LLAMA31
    return tokenizer


def _byte_spelling() -> dict[int, str]:
    """GPT-2's printable spelling of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _llama31_specials() -> list[str]:
    """The 256 special tokens, from id 128000 on."""
    named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    return named + [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file and return its path."""

    def write(content: str | bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
