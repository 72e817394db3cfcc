"""Round a matrix to a few bits so that the errors of its columns, and of the layers before it, cancel in its output.

Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323, and for the layers before it Li et al., "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration", https://arxiv.org/abs/2504.02692. The papers invert the sum of x x^T. Here
its Cholesky factor M (M M^T, M upper triangular) serves instead, as in Chen et al., "The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm", https://arxiv.org/abs/2507.18553: the codes are the same, and
only half a square of numbers is in memory. It is kept in panels of `PANEL` columns, down to the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.sums import total
from mlx_zh.models.build import Form
from mlx_zh.models.export.folder_files import pack, unpack

_DAMPING = 0.01  # of the mean squared input, added to every column's own, as in the paper
_DAMPINGS = 4  # that are tried, each 10 times the one before: rounding can leave the sum of x x^T without a factor
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's grid, as a share of MLX's own; the first one is MLX's
PANEL = 512  # columns; a multiple of every group size


@dataclass(frozen=True)
class Grid:
    """The values that the weights of each group can take: scale * code + bias, with codes from 0 to 2^bits - 1."""

    scales: mx.array  # (out, in / group size), float32
    biases: mx.array  # the same


class NotFiniteError(Exception):
    """A matrix or its inputs contain NaN or infinity."""


@dataclass(frozen=True)
class Inputs:
    """A matrix's inputs x in the rounded model and x' in the exact one, in rows (T, in), and what is derived of x."""

    exact: Sequence[mx.array]
    rounded: Sequence[mx.array]
    panels: list[mx.array]  # of M: all rows down to the panel's last column, (stop, panel), float32
    inverses: list[mx.array]  # of the panels' last, triangular parts, (panel, panel), float32

    @staticmethod
    def of(exact: Sequence[mx.array], rounded: Sequence[mx.array]) -> Inputs:
        """Of the inputs in both models. Raises NotFiniteError."""
        _need_finite(exact)
        _need_finite(rounded)
        return Inputs(exact, rounded, *_factor(rounded))

    def pulls(self, weight: mx.array) -> list[mx.array]:
        """What the difference of the inputs asks of each panel's columns, (out, panel) each.

        They are W (sum of (x' - x) x^T) M^-T, solved panel by panel from the last one on.
        """
        drifts = []
        for exact, rounded in zip(self.exact, self.rounded, strict=True):
            drifts.append((exact - rounded) @ weight.T)  # (T, in) -> (T, out)
            mx.eval(drifts)
        solved: list[mx.array] = []  # from the last panel on
        for index in reversed(range(len(self.panels))):
            start, stop = _bounds(index, weight.shape[1])
            value = _sum(d.T @ x[:, start:stop] for d, x in zip(drifts, self.rounded, strict=True))
            for panel, part in zip(reversed(self.panels[index + 1 :]), solved, strict=True):
                value = value - part @ panel[start:stop].T
                mx.eval(value)
            value = value @ self.inverses[index].T
            mx.eval(value)
            solved.append(value)
        return solved[::-1]


def compensated(weight: mx.array, inputs: Inputs, form: Form, dtype: mx.Dtype, grid: Grid | None) -> list[mx.array]:
    """Quantize `weight` (out, in), float32, so that its output on x is close to that of `weight` on x'.

    Columns are rounded one after another, and the error of each is made up for by those after it. Without a `grid`,
    each group gets one that fits what its weights are when it is reached. Returns packed codes, and scales and biases
    in `dtype`. Raises NotFiniteError.
    """
    _need_finite([weight])
    pulls = inputs.pulls(weight)
    parts: list[list[mx.array]] = []
    errors: list[mx.array] = []  # of the panels, (out, panel) each
    for index, root in enumerate(inputs.inverses):
        start, stop = _bounds(index, weight.shape[1])
        pull = pulls[index]
        pulls[index] = mx.zeros(0)
        for before, error in enumerate(errors):
            above = slice(*_bounds(before, weight.shape[1]))
            pull = pull + error @ inputs.panels[index][above]
            mx.eval(pull)
        exact = weight[:, start:stop]
        part = _round_panel(exact + pull @ root, root, form, dtype, grid and _columns(grid, form, start, stop))
        error = exact - unpack(part, form)
        mx.eval(part, error)
        parts.append(part)
        errors.append(error)
    return [mx.concatenate(list(arrays), axis=1) for arrays in zip(*parts, strict=True)]


def _need_finite(arrays: Sequence[mx.array]) -> None:
    if not all(mx.isfinite(array).all().item() for array in arrays):
        raise NotFiniteError


def _bounds(index: int, columns: int) -> tuple[int, int]:
    """The first column of a panel, and the one after its last."""
    return index * PANEL, min((index + 1) * PANEL, columns)


def _sum(arrays: Iterable[mx.array]) -> mx.array:
    """The sum of the arrays, each of which is computed before the next."""
    result = None
    for array in arrays:
        result = array if result is None else result + array
        mx.eval(result)
    assert result is not None
    return result


def _columns(grid: Grid, form: Form, start: int, stop: int) -> Grid:
    """The grid of the columns from `start` to `stop`."""
    groups = slice(start // form["group_size"], stop // form["group_size"])
    return Grid(grid.scales[:, groups], grid.biases[:, groups])


def _factor(rows: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """The panels of M with M M^T = the damped sum of x x^T, M upper triangular, and the inverses of their ends.

    Raises NotFiniteError.
    """
    squares = sum(float(total(mx.square(row))) for row in rows)
    damping = _DAMPING * squares / rows[0].shape[1] or 1.0
    for power in range(_DAMPINGS):
        try:
            return _factor_damped(rows, damping * 10**power)
        except np.linalg.LinAlgError:
            pass
    raise NotFiniteError


def _factor_damped(rows: Sequence[mx.array], damping: float) -> tuple[list[mx.array], list[mx.array]]:
    """`_factor` with `damping` added to the diagonal. Raises LinAlgError if there is no such factor."""
    columns = rows[0].shape[1]
    panels: list[mx.array] = []  # from the last one on
    inverses: list[mx.array] = []
    for index in reversed(range(-(-columns // PANEL))):
        start, stop = _bounds(index, columns)
        panel = _sum(row[:, :stop].T @ row[:, start:stop] for row in rows)  # (stop, panel)
        for right in panels:
            panel = panel - right[:stop] @ right[start:stop].T
            mx.eval(panel)  # so that intermediate values are freed
        corner, inverse = _triangle(np.array(panel[start:]), damping)
        panel = mx.concatenate([panel[:start] @ inverse.T, corner])
        mx.eval(panel)
        panels.append(panel)
        inverses.append(inverse)
    return panels[::-1], inverses[::-1]


def _triangle(square: npt.NDArray[np.float32], damping: float) -> tuple[mx.array, mx.array]:
    """The upper triangular M with M M^T = `square` with `damping` on its diagonal, and the inverse of M.

    Raises LinAlgError if there is none.
    """
    wide = square.astype(np.float64)
    wide[np.diag_indices_from(wide)] += damping
    # Cholesky's factor is lower triangular, so rows and columns are turned round before and after.
    upper = np.linalg.cholesky(wide[::-1, ::-1])[::-1, ::-1]
    inverse = np.triu(np.linalg.inv(upper))
    return mx.array(upper.astype(np.float32)), mx.array(inverse.astype(np.float32))


def _round_panel(rest: mx.array, root: mx.array, form: Form, dtype: mx.Dtype, grid: Grid | None) -> list[mx.array]:
    """Quantize a panel (out, columns), group by group; `root` is its triangle's inverse."""
    group = form["group_size"]
    codes, scales, biases = [], [], []
    for number, start in enumerate(range(0, root.shape[0], group)):
        now, rest = rest[:, :group], rest[:, group:]
        block = root[start : start + group]
        if grid is None:
            scale, bias = _fitted(now, block[:, start : start + group], form, dtype)
        else:
            scale, bias = (part[:, number : number + 1].astype(dtype) for part in (grid.scales, grid.biases))
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


def _fitted(weight: mx.array, root: mx.array, form: Form, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The scale and bias (out, 1) of a group (out, group): of `_WIDTHS`, those with the least error in each row."""
    _, scale, bias = pack(weight, form, dtype)
    middle = bias.astype(mx.float32) + scale.astype(mx.float32) * (2 ** form["bits"] - 1) / 2
    scales = [(scale * width).astype(dtype) for width in _WIDTHS]
    biases = [(middle - s.astype(mx.float32) * (2 ** form["bits"] - 1) / 2).astype(dtype) for s in scales]
    scales[0], biases[0] = scale, bias
    tried = [mx.concatenate(parts).astype(mx.float32) for parts in ([weight] * len(_WIDTHS), scales, biases)]
    _, errors = _round_group(tried[0], root, tried[1], tried[2], form["bits"])
    losses = mx.square(errors).sum(axis=1).reshape(len(_WIDTHS), -1)  # (widths * out, group) -> (widths, out)
    best = losses.argmin(axis=0)[None, :, None]  # (1, out, 1)
    chosen = (mx.take_along_axis(mx.stack(parts), best, axis=0)[0] for parts in (scales, biases))
    scale, bias = chosen
    return scale, bias


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
