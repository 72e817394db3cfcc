"""Tensors in the types of GGUF: MLX's own codes where they fit a block, else what the gguf package rounds them to."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_zh.core.sums import norm
from mlx_zh.errors import ModelError
from mlx_zh.models.build import Form
from mlx_zh.models.export.folder_files import unpack
from mlx_zh.models.gguf_blocks import BLOCKS, GROUP_SIZE

_HALF_LIMIT = 65504.0  # the maximum of float16, the type of scales, minima and F16
# The largest weight of each type, as a multiple of that: a code times a scale.
_LARGEST = {"F16": 1, "Q4_0": 8, "Q4_1": 1, "Q5_0": 16, "Q5_1": 1, "Q8_0": 127}
_SAME_CODES = {4: "Q4_1", 5: "Q5_1"}  # MLX's bits -> the type that has the same codes, a scale and a minimum


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is written."""

    data: mx.array  # a row's bytes, or its numbers if the type is F32 or F16; rows in the model's order
    value: mx.array  # float32: what `data` stands for
    rounded: int = 0  # groups whose scale or minimum float16 does not hold exactly; only where codes were kept
    error: float = 0.0  # the norm of that rounding, as a share of the tensor's


def same_codes(form: Form | None) -> str | None:
    """The type whose blocks hold the codes, scales and minima of MLX's format `form`; None if there is none."""
    if form is None or form["mode"] != "affine" or form["group_size"] % GROUP_SIZE:
        return None
    return _SAME_CODES.get(form["bits"])


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of this type."""
    weights, size = BLOCKS[kind]
    return int(np.prod(shape)) // weights * size


def encode(value: mx.array, kind: str, name: str) -> Encoded:
    """A float32 tensor in a type; `name` is for the message. Raises ModelError for weights that it cannot hold."""
    largest = float(mx.abs(value).max())
    limit = _HALF_LIMIT * _LARGEST[kind] if kind in _LARGEST else np.finfo(np.float32).max
    if not largest <= limit:
        raise _too_large(name, kind)
    if kind == "F32":
        return Encoded(value, value)
    if kind == "F16":
        half = value.astype(mx.float16)
        return Encoded(half, half.astype(mx.float32))
    if kind == "BF16":
        half = value.astype(mx.bfloat16)
        return Encoded(half.view(mx.uint8), half.astype(mx.float32))
    if kind == "Q8_0":
        codes, scales = quantize_q8_0(value)
        written = (codes.astype(mx.float32) * scales.astype(mx.float32)).reshape(value.shape)
        blocks = mx.concatenate([scales.view(mx.uint8), codes.view(mx.uint8)], axis=1)
        return Encoded(blocks.reshape(value.shape[0], -1), written)
    return _by_package(value, kind)


def _by_package(value: mx.array, kind: str) -> Encoded:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    with np.errstate(all="ignore"):  # a block of zeros divides by zero, and the package replaces the result
        data = gguf.quants.quantize(np.array(value), number)
    return Encoded(mx.array(data), mx.array(gguf.quants.dequantize(data, number)))


def keep_codes(parts: list[mx.array], form: Form, name: str) -> Encoded:
    """A matrix that MLX quantized, as blocks with the same codes: Q4_1 for 4 bits, Q5_1 for 5.

    Only scales and minima in bfloat16 or float32 that float16 does not hold are rounded. Raises ModelError for
    scales beyond float16.
    """
    packed, *numbers = parts
    wide = [part.astype(mx.float32) for part in numbers]
    halves = [part.astype(mx.float16) for part in wide]
    if not all(bool(mx.isfinite(half).all()) for half in halves):
        raise _too_large(name, str(same_codes(form)))
    changed = [half.astype(mx.float32) != number for half, number in zip(halves, wide, strict=True)]
    rounded = int((changed[0] | changed[1]).sum()) * (form["group_size"] // GROUP_SIZE)
    value = unpack([packed, *halves], form)
    error = 0.0
    if rounded:
        before = unpack([packed, *wide], form)
        error = float(norm(value - before) / norm(before))
    ones, zeros = mx.ones_like(wide[0]), mx.zeros_like(wide[0])
    codes = mx.dequantize(packed, ones, zeros, **form).astype(mx.uint8).reshape(value.shape[0], -1, GROUP_SIZE)
    repeats = form["group_size"] // GROUP_SIZE  # a larger group is several blocks with the same scale and minimum
    fields = [mx.repeat(half, repeats, axis=1)[..., None].view(mx.uint8) for half in halves]
    if form["bits"] == 5:
        bits = (codes >> 4).reshape(*codes.shape[:-1], -1, 8) << mx.arange(8, dtype=mx.uint8)
        fields.append(bits.sum(axis=-1).astype(mx.uint8))
    low = codes & 15
    fields.append(low[..., :16] | (low[..., 16:] << 4))
    return Encoded(mx.concatenate(fields, axis=-1).flatten(1), value, rounded, error)


def quantize_q8_0(value: mx.array) -> tuple[mx.array, mx.array]:
    """Codes (blocks, 32) int8 and scales (blocks, 1) float16, equal to llama.cpp's quantize_row_q8_0 bit for bit."""
    blocks = value.reshape(-1, GROUP_SIZE)
    scale = mx.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = mx.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    rounded = mx.sign(scaled) * mx.floor(mx.abs(scaled) + 0.5)  # rounds halves away from zero, as C's roundf
    return rounded.astype(mx.int8), scale.astype(mx.float16)


def _too_large(name: str, kind: str) -> ModelError:
    return ModelError(
        f"{name} has weights beyond what {kind} can hold (or NaN), so no GGUF file is written. Export `hf` in "
        "bfloat16 instead, and look at the losses of the training."
    )
