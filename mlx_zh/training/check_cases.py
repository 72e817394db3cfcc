"""What the self-check compares: kinds of base models, heads and adapters, and segments of all lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_zh.system import device

# Tokens of a segment. Metal has other kernels for up to 8 queries than for more.
LENGTHS = (*range(1, 10), 16, 100)
_SHORTEST = LENGTHS[:9]
VOCABULARY = 512  # of the tiny model
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored segment of the row: a root, or a branch of the prompt."""

    branch: bool
    length: int

    def tokens(self) -> list[int]:
        """The segment's tokens, and one more that follows it and is scored too."""
        values = np.random.default_rng([self.branch, self.length]).integers(0, VOCABULARY, self.length + 1)
        return [int(token) for token in values]

    @property
    def count(self) -> int:
        """Its scored tokens: all of a branch, all but the first of a root, and the token that follows."""
        return self.length + self.branch


@dataclass(frozen=True, slots=True)
class Case:
    """What decides which kernels a training step runs."""

    dtype: str  # of the activations: float32, bfloat16 or float16
    head: int  # values in a head of attention
    adapter: str = "lora"  # lora, dora or full
    bits: int | None = None  # of the base model's weights; None: they are not quantized
    group: int = 64  # weights that share a scale
    mode: str = "affine"  # of the quantization
    checkpoint: bool = False  # blocks are computed again in the backward pass
    width: int = 512  # of the tiny model; from 512 on, Metal has faster quantized kernels
    lengths: tuple[int, ...] = LENGTHS  # tokens of the segments

    def __str__(self) -> str:
        mode = "" if self.mode == "affine" else f"{self.mode} "
        base = f"{mode}{self.bits}-bit/{self.group} " if self.bits else ""
        adapter = {"lora": "LoRA", "dora": "DoRA"}.get(self.adapter, self.adapter)
        return f"{base}{_SHORT[self.dtype]} head {self.head} {adapter}{' recomputed' if self.checkpoint else ''}"

    @property
    def segments(self) -> tuple[Scored, ...]:
        """The scored segments: a root and a branch of each length."""
        return tuple(Scored(branch, length) for branch in (False, True) for length in self.lengths)


ON_GPU = (
    *(Case("bfloat16", head, bits=4, group=group) for group in (64, 32) for head in (64, 128)),
    Case("bfloat16", 128, "dora", bits=4),
    Case("bfloat16", 128, bits=4, checkpoint=True),
    *(Case("float16", head, bits=4) for head in (64, 128)),
    *(Case(dtype, head) for dtype in ("bfloat16", "float16", "float32") for head in (64, 128)),
    Case("bfloat16", 64, "dora"),
)
# Training on the CPU is in float32. Half precision is so slow there that its cases are short.
ON_CPU = (
    *(Case("float32", head, width=128) for head in (64, 128)),
    Case("float32", 64, "dora", width=128),
    Case("float32", 128, width=128, checkpoint=True),
    *(Case("float32", 64, bits=4, group=group, width=128, lengths=_SHORTEST) for group in (64, 32)),
    *(Case(dtype, 64, width=64, lengths=_SHORTEST) for dtype in ("bfloat16", "float16")),
)


def cases() -> tuple[Case, ...]:
    """The cases for MLX's default device."""
    return ON_CPU if device.is_cpu() else ON_GPU
