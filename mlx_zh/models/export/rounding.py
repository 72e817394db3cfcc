"""Round a matrix to a few bits so that the errors of its columns, and of the layers before it, cancel in its output.

Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323, and for the layers before it Li et al., "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", https://arxiv.org/abs/2504.02692.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_zh.models.build import Form
from mlx_zh.models.export.folder_files import pack

_DAMPING = 0.01  # of the mean squared input, added to every column's own, as in the paper


@dataclass(frozen=True)
class Grid:
    """The values that the weights of each group can take: scale * code + bias, with codes from 0 to 2^bits - 1."""

    scales: mx.array  # (out, in / group size), float32
    biases: mx.array  # the same


@dataclass(frozen=True)
class Moments:
    """What is known of a matrix's inputs: x of T tokens in the rounded model, and x' of the same in the exact one."""

    root: mx.array  # upper triangular U with U^T U = the inverse of the damped sum of x x^T, (in, in), float32
    drift: mx.array  # sum of (x' - x) x^T, (in, in), float32

    @staticmethod
    def of(exact: mx.array, rounded: mx.array) -> Moments:
        """Of the inputs (T, in) in both models."""
        root = _inverse_root(rounded.T @ rounded)
        drift = (exact - rounded).T @ rounded
        mx.eval(root, drift)
        return Moments(root, drift)


def compensated(weight: mx.array, inputs: Moments, form: Form, dtype: mx.Dtype, grid: Grid | None) -> list[mx.array]:
    """Quantize `weight` (out, in), float32, so that its output on x is close to that of `weight` on x'.

    Columns are rounded one after another, and the error of each is made up for by those after it. Without a `grid`,
    each group gets MLX's own for what its weights are when it is reached. Returns packed codes, and scales and biases
    in `dtype`.
    """
    group, columns = form["group_size"], weight.shape[1]
    root = inputs.root
    # The matrix with the least squared difference of the outputs: W + W (sum of (x' - x) x^T) (sum of x x^T)^-1.
    rest = weight + ((weight @ inputs.drift) @ root.T) @ root
    mx.eval(rest)
    codes, scales, biases = [], [], []
    for number, start in enumerate(range(0, columns, group)):
        now, rest = rest[:, :group], rest[:, group:]
        if grid is None:
            _, scale, bias = pack(now, form, dtype)
        else:
            scale, bias = (part[:, number : number + 1].astype(dtype) for part in (grid.scales, grid.biases))
        block = root[start : start + group]
        rounded, errors = _round_group(
            now, block[:, start : start + group], scale.astype(mx.float32), bias.astype(mx.float32), form["bits"]
        )
        rest = rest - errors @ block[:, start + group :]
        mx.eval(rounded, rest)  # one group's intermediate values are in memory
        codes.append(rounded)
        scales.append(scale)
        biases.append(bias)
    packed = packed_codes(mx.concatenate(codes, axis=1), form["bits"])
    return [packed, mx.concatenate(scales, axis=1), mx.concatenate(biases, axis=1)]


def _inverse_root(squares: mx.array) -> mx.array:
    """The upper triangular U with U^T U = the inverse of the damped `squares`."""
    matrix = np.array(squares)
    damping = _DAMPING * float(np.mean(np.diag(matrix)))
    matrix[np.diag_indices_from(matrix)] += damping if damping > 0 else 1.0
    # With M upper triangular and M M^T = squares, U is the inverse of M. Cholesky's M is lower triangular, so rows
    # and columns are turned round before and after.
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    del matrix
    upper = np.ascontiguousarray(lower[::-1, ::-1])
    del lower
    return mx.linalg.tri_inv(mx.array(upper), upper=True, stream=mx.cpu)


def _round_group(
    weight: mx.array, root: mx.array, scale: mx.array, bias: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """The codes (out, group) of a group and the errors (out, group) to be made up for by the columns after it.

    `weight` is (out, group), `root` (group, group), `scale` and `bias` (out, 1). A group of equal weights has the
    scale 0 and the code 0.
    """
    codes, errors = [], []
    divisor = mx.where(scale == 0, 1.0, scale)
    for column in range(weight.shape[1]):
        values = weight[:, column : column + 1]
        code = mx.clip(mx.round((values - bias) / divisor), 0, 2**bits - 1)
        error = (values - (scale * code + bias)) / root[column, column]
        weight = weight - error * root[column]
        codes.append(code)
        errors.append(error)
    return mx.concatenate(codes, axis=1), mx.concatenate(errors, axis=1)


def packed_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes (out, in) as `mx.quantize` packs them: the bits of a row one after another, the lowest first."""
    values = np.array(codes).astype(np.uint8)
    places = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # (out, in, bits)
    octets = np.packbits(places.reshape(values.shape[0], -1), axis=1, bitorder="little")
    return mx.array(octets.view("<u4"))
