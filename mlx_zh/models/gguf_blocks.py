"""The blocks of GGUF's tensor types, decoded to MLX arrays; lazy, so that one tensor at a time needs the memory.

A block holds the codes of 32 or 256 neighbouring weights of a row and their scales. Types with one scale for every
32 weights stay quantized. Q2_K, Q3_K and Q6_K have one for every 16, and the IQ4 types have a table of values: MLX
has no such formats, so these become float32. Either way a weight is the number that llama.cpp computes.

Formats: ggml-common.h and dequantize_row_* in ggml-quants.c of https://github.com/ggml-org/ggml
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

# Weights per block and bytes per block of the types that can be read.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_XS": (256, 136),
}  # fmt: skip
GROUP_SIZE = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}  # types that stay quantized

# The values of the codes of the IQ4 types.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpack_blocks(kind: str, blocks: mx.array) -> dict[str, mx.array]:
    """Blocks (..., blocks of a row, bytes) as {"weight"}, or {"weight", "scales", "biases"} in groups of 32."""
    return _UNPACK[kind](blocks)


def _half(blocks: mx.array, at: int) -> mx.array:
    """The float16 at byte `at` of every block: (..., bytes) -> (...)."""
    import mlx.core as mx

    return mx.contiguous(blocks[..., at : at + 2]).view(mx.float16).squeeze(-1)


def _single(blocks: mx.array, at: int) -> mx.array:
    """The same as float32 with a last axis of one, which a block's scales are multiplied with."""
    import mlx.core as mx

    return _half(blocks, at).astype(mx.float32)[..., None]


def _split(data: mx.array, shifts: Sequence[int], mask: int) -> mx.array:
    """The parts of every byte that start at the bits `shifts`: (..., n) -> (..., shifts, n)."""
    import mlx.core as mx

    return (data[..., None, :] >> mx.array(list(shifts), mx.uint8)[:, None]) & mask


def _nibbles(data: mx.array, width: int) -> mx.array:
    """4-bit codes in order: of `width` bytes, first all low halves, then all high ones: (..., n) -> (..., 2n)."""
    return _split(data.reshape(*data.shape[:-1], -1, width), (0, 4), 15).flatten(-3)


def _pack4(codes: mx.array) -> mx.array:
    """4-bit codes (rows, ..., n) as the words in which MLX stores them: (rows, words)."""
    import mlx.core as mx

    codes = codes.flatten(1)
    return mx.contiguous(codes[..., ::2] | (codes[..., 1::2] << 4)).view(mx.uint32)


def _pack5(codes: mx.array) -> mx.array:
    """5-bit codes (rows, ..., n) as the words in which MLX stores them, eight codes in five bytes: (rows, words)."""
    import mlx.core as mx

    c = [codes.flatten(1)[..., i::8] for i in range(8)]
    octets = [
        c[0] | (c[1] << 5),
        (c[1] >> 3) | (c[2] << 2) | (c[3] << 7),
        (c[3] >> 1) | (c[4] << 4),
        (c[4] >> 4) | (c[5] << 1) | (c[6] << 6),
        (c[6] >> 2) | (c[7] << 3),
    ]
    return mx.contiguous(mx.stack(octets, axis=-1).flatten(-2)).view(mx.uint32)


def _fifth_bits(data: mx.array) -> mx.array:
    """The fifth bit of each of 32 codes from four bytes, in place: (..., 4) -> (..., 32)."""
    return (_split(data, range(8), 1) << 4).swapaxes(-1, -2).flatten(-2)


def _q4_0(blocks: mx.array) -> dict[str, mx.array]:
    scales = _half(blocks, 0)
    return {"weight": _pack4(_nibbles(blocks[..., 2:], 16)), "scales": scales, "biases": -8 * scales}


def _q4_1(blocks: mx.array) -> dict[str, mx.array]:
    codes = _nibbles(blocks[..., 4:], 16)
    return {"weight": _pack4(codes), "scales": _half(blocks, 0), "biases": _half(blocks, 2)}


def _q5_0(blocks: mx.array) -> dict[str, mx.array]:
    scales = _half(blocks, 0)
    codes = _nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6])
    return {"weight": _pack5(codes), "scales": scales, "biases": -16 * scales}


def _q5_1(blocks: mx.array) -> dict[str, mx.array]:
    codes = _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8])
    return {"weight": _pack5(codes), "scales": _half(blocks, 0), "biases": _half(blocks, 2)}


def _q8_0(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    scales = _half(blocks, 0)
    words = mx.contiguous((blocks[..., 2:] ^ 128).flatten(1)).view(mx.uint32)
    return {"weight": words, "scales": scales, "biases": -128 * scales}


def _k_scales(blocks: mx.array) -> dict[str, mx.array]:
    """Scales and biases of Q4_K and Q5_K: two float16, and for each group of 32 two factors of 6 bits."""
    import mlx.core as mx

    a, b, c = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    factors = mx.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=-1)
    minima = mx.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=-1)
    return {
        "scales": (_single(blocks, 0) * factors.astype(mx.float32)).flatten(1),
        "biases": -(_single(blocks, 2) * minima.astype(mx.float32)).flatten(1),
    }


def _q4_k(blocks: mx.array) -> dict[str, mx.array]:
    return {"weight": _pack4(_nibbles(blocks[..., 16:], 32))} | _k_scales(blocks)


def _q5_k(blocks: mx.array) -> dict[str, mx.array]:
    fifth = (_split(blocks[..., 16:48], range(8), 1) << 4).flatten(-2)
    return {"weight": _pack5(_nibbles(blocks[..., 48:], 32) | fifth)} | _k_scales(blocks)


def _dense(scales: mx.array, values: mx.array, minima: mx.array | None = None) -> dict[str, mx.array]:
    """Weights (rows, columns) from values (rows, blocks, weights) and scales (rows, blocks, groups)."""
    import mlx.core as mx

    grouped = values.reshape(*scales.shape, -1).astype(mx.float32)
    weights = scales[..., None] * grouped
    return {"weight": (weights if minima is None else weights - minima[..., None]).flatten(1)}


def _signed(data: mx.array) -> mx.array:
    import mlx.core as mx

    return mx.contiguous(data).view(mx.int8).astype(mx.float32)


def _q2_k(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    factors = blocks[..., :16]
    codes = _split(blocks[..., 16:80].reshape(*blocks.shape[:-1], 2, 32), (0, 2, 4, 6), 3).flatten(-3)
    scales = _single(blocks, 80) * (factors & 15).astype(mx.float32)
    return _dense(scales, codes, _single(blocks, 82) * (factors >> 4).astype(mx.float32))


def _q3_k(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    low = _split(blocks[..., 96:104], (0, 4), 15).flatten(-2)
    high = _split(blocks[..., 104:108], (0, 2, 4, 6), 3).flatten(-2)
    scales = _single(blocks, 108) * ((low | (high << 4)).astype(mx.float32) - 32)
    codes = _split(blocks[..., 32:96].reshape(*blocks.shape[:-1], 2, 32), (0, 2, 4, 6), 3).flatten(-3)
    third = _split(blocks[..., :32], range(8), 1).flatten(-2)
    return _dense(scales, (codes | (third << 2)).astype(mx.float32) - 4)


def _q6_k(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    high = _split(blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 32), (0, 2, 4, 6), 3).flatten(-3)
    codes = _nibbles(blocks[..., :128], 64) | (high << 4)
    return _dense(_single(blocks, 208) * _signed(blocks[..., 192:208]), codes.astype(mx.float32) - 32)


def _iq4_nl(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    return _dense(_single(blocks, 0), mx.array(_IQ4, mx.float32)[_nibbles(blocks[..., 2:], 16)])


def _iq4_xs(blocks: mx.array) -> dict[str, mx.array]:
    import mlx.core as mx

    high = _split(blocks[..., 2:4], (0, 2, 4, 6), 3).swapaxes(-1, -2).flatten(-2)
    low = _split(blocks[..., 4:8], (0, 4), 15).swapaxes(-1, -2).flatten(-2)
    scales = _single(blocks, 0) * ((low | (high << 4)).astype(mx.float32) - 32)
    return _dense(scales, mx.array(_IQ4, mx.float32)[_nibbles(blocks[..., 8:], 16)])


_UNPACK = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
