"""Llama 3.1's real tokenizer, built from the vocabulary that the wheel `llama-models` carries."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from chat_templates import LLAMA3_PATTERN, LLAMA31
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

WHEEL = "llama-models==0.3.0"
WHEEL_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"


def ranks(folder: Path) -> dict[bytes, int]:
    """Token -> rank, which is its id; the wheel is kept in `folder`. Raises OSError where it cannot be had."""
    wheel = folder / "llama_models-0.3.0-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and not wheel.exists():
            raise OSError(f"{WHEEL} cannot be obtained:\n{done.stderr}")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("llama_models/llama3/tokenizer.model").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def tokenizer(vocabulary_ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template."""
    spell = _byte_spelling()

    def name(token: bytes) -> str:
        return "".join(spell[byte] for byte in token)

    merges = []
    for token, rank in vocabulary_ranks.items():
        parts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [
            (vocabulary_ranks[a], vocabulary_ranks[b], a, b)
            for a, b in parts
            if a in vocabulary_ranks and b in vocabulary_ranks
        ]
        merges += [(rank, first, second, name(a), name(b)) for first, second, a, b in known]
    vocabulary = {name(token): rank for token, rank in vocabulary_ranks.items()}
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _llama31_specials()])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 128000)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>")
    made.chat_template = LLAMA31
    return made


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
