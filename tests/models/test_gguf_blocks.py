"""Every type of block that can be read, against the gguf package's own decoding: bit for bit."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_zh.models.gguf_blocks import BITS, BLOCKS, GROUP_SIZE, unpack_blocks

QUANTIZED = [kind for kind in BLOCKS if kind not in ("F32", "F16", "BF16")]
# Where the float16 numbers of a block are; its other bytes may have any value.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2),
}  # fmt: skip


def random_blocks(kind: str, rows: int = 6, blocks: int = 3) -> np.ndarray:
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (rows, blocks, BLOCKS[kind][1]), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        raw[..., at : at + 2] = rng.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", QUANTIZED)
def test_random_blocks_are_what_the_gguf_package_decodes(kind: str):
    """Random codes reach every level, every factor and both signs; files that a quantizer wrote may not."""
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == BLOCKS[kind]
    raw = random_blocks(kind)
    parts = unpack_blocks(kind, mx.array(raw))
    assert ("scales" in parts) == (kind in BITS)
    weights = parts["weight"]
    if kind in BITS:
        scales, biases = (parts[name].astype(mx.float32) for name in ("scales", "biases"))
        weights = mx.dequantize(weights, scales, biases, group_size=GROUP_SIZE, bits=BITS[kind])
    np.testing.assert_array_equal(np.array(weights), gguf.quants.dequantize(raw.reshape(len(raw), -1), number))
