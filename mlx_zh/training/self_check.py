"""Compare what training computes on MLX's device with float32 on the CPU, on a tiny random model.

The reference is mlx-lm's own forward pass over padded sequences, in float32 on the CPU, with the same weights,
dequantized. So it shares neither the device nor the packed attention with what it checks. On a machine that computes
on the CPU it still checks the packed attention and half precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_zh.errors import first_line
from mlx_zh.language.notice import Notice
from mlx_zh.system import device
from mlx_zh.system.accelerator import AcceleratorError, repeated
from mlx_zh.training.check_cases import LENGTHS, Case, Scored
from mlx_zh.training.check_model import LAYERS, Pair, Values


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a quantity is from the reference, and how far rounding can move it."""

    quantity: Notice
    value: float  # hidden states and gradients: a share of the reference's norm; log-probs: in nats
    bound: float

    @property
    def share(self) -> float:
        """The difference as a share of its bound; infinity for NaN."""
        return self.value / self.bound if self.value == self.value else math.inf


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a case."""

    case: Case
    differences: tuple[Difference, ...]  # empty if MLX raised an error
    error: str = ""  # what MLX raised
    where: tuple[Notice, ...] = ()  # the segments that fail alone
    fault: bool = False  # whether the accelerator gave the case up, which may be by chance: nothing was compared

    @property
    def passed(self) -> bool:
        """Whether the device computed every quantity, and rounding explains all differences."""
        return not self.error and self.largest.share <= 1

    @property
    def largest(self) -> Difference:
        """The difference that is the largest share of its bound."""
        return max(self.differences, key=lambda difference: difference.share)

    @property
    def problem(self) -> Notice:
        """What is wrong, and in which segments, for a case that failed."""
        where = self.where or (Notice("segments-together"),)
        if self.error:
            return Notice("self-check-raised", where=where, error=self.error)
        worst = self.largest
        return Notice(
            "self-check-differs", where=where, quantity=worst.quantity, value=worst.value, bound=worst.bound
        )


# How rounding grows, measured in float32 on this model: a relative change of 0.001 in every embedding changes hidden
# states by up to 6.2 times as much (the norm over a segment, the largest of all segments), log-probs by 7.4 times as
# many nats (root mean square) and gradients by up to 11.9 times as much (the norm over an array, the largest of all
# arrays); widths 128 and 512, heads of 64 and 128, LoRA and DoRA.
_HIDDEN_GROWTH, _LOGPROB_GROWTH, _GRADIENT_GROWTH = 6.5, 7.5, 12.0
# Operations in a row through one block, each of which rounds: norm, queries, rotation, scores, softmax, mean of the
# values, output, sum, norm, up, activation and its product, down, sum.
_IN_A_ROW = 14
# A quantized weight is scale * code + bias, rounded in half precision before it is used. The product is 2.5 times as
# large as the weight (codes 0 to 15, centre 7.5, standard deviation 3), so its rounding counts 6 times as a square.
# Four of the operations in a row have such weights.
_DEQUANTIZED = 4 * 6
_FUNCTIONS = 2e-6  # MLX's tests of rotation and softmax on GPUs allow 1e-6 to 1e-5
_LARGEST = 4.0  # standard deviations: the largest of 335 normal errors is 3 on average, and above 4 once in 47 rows
_LONGEST = 200  # characters of an error that are shown
# A false alarm stops a run, and what this looks for (a wrong mask, position or kernel) lies far above.
_MARGIN = 1.5


def bounds(case: Case) -> tuple[float, float, float]:
    """How far rounding moves hidden states, log-probs (nats) and gradients of `case` from the reference.

    Errors of the operations in a row are independent and add up as squares. All of them are counted as if they grew
    like those of the embeddings, which grow most. The backward pass has as many operations as the forward pass.
    """
    operations = _IN_A_ROW + (_DEQUANTIZED if case.bits and case.dtype != "float32" else 0)
    forward = _MARGIN * _rounding(case) * math.sqrt(operations * LAYERS)
    return (
        _HIDDEN_GROWTH * forward,
        _LARGEST * _LOGPROB_GROWTH * forward,
        _GRADIENT_GROWTH * math.sqrt(2) * forward,
    )


def _rounding(case: Case) -> float:
    """Standard deviation of one operation's error, as a share of the typical size of its result.

    A result rounded to p bits is off by up to 2^-p of its size, uniformly. In half precision that is all, because
    products are added up in float32. In float32 it is the additions that round: a sum of n products is off by
    sqrt(n / 6) 2^-24 (derived in tests/tolerances.py), on both sides. A GPU's exponentials and sines are
    off by `_FUNCTIONS`.
    """
    half = {"bfloat16": 8, "float16": 11}.get(case.dtype)
    if half is None and device.shortens_float32():
        return math.sqrt(2 / 3) * 2.0**-11  # both factors of a product are rounded to 11 bits
    if half is None:
        sums = math.sqrt(2 * (2 * case.width) / 6) * 2.0**-24  # the longest sum is that of the MLP's second product
        return math.hypot(sums, 0.0 if device.is_cpu() else _FUNCTIONS)
    return math.sqrt(1 / 3) * 2.0**-half


def check(case: Case) -> Outcome:
    """Compare the device with the reference. An error that MLX raises is the outcome, and is not raised here.

    What the accelerator gives up, such as for lack of memory or because of another program, is tried again.
    """
    pair = Pair(case)
    outcome = _compare(pair, case.segments)
    if outcome.passed or outcome.fault:
        return outcome
    failed = [segment for segment in case.segments if not _compare(pair, [segment]).passed]
    return Outcome(case, outcome.differences, outcome.error, _listed(failed))


def _compare(pair: Pair, segments: Sequence[Scored]) -> Outcome:
    """The outcome of a row of these segments."""
    case = pair.case
    try:
        measured = repeated(lambda: pair.on_device(segments))
    except AcceleratorError as error:
        return Outcome(case, (), first_line(error)[:_LONGEST], fault=True)
    except Exception as error:  # MLX's back ends raise several types, and each says that the device cannot do it
        return Outcome(case, (), first_line(error)[:_LONGEST])
    expected = pair.reference(segments)
    hidden, logprobs, gradient = bounds(case)
    return Outcome(
        case,
        (
            Difference(Notice("quantity-hidden"), _by_segment(measured.hidden, expected.hidden), hidden),
            Difference(Notice("quantity-logprobs"), _largest(measured.logprobs, expected.logprobs), logprobs),
            Difference(Notice("quantity-trained"), _largest(measured.trained_logprobs, expected.logprobs), logprobs),
            Difference(Notice("quantity-gradient"), _by_name(measured.gradient, expected.gradient), gradient),
        ),
    )


def _by_segment(measured: Sequence[Values], expected: Sequence[Values]) -> float:
    """The largest difference of a segment's hidden states, as a share of their norm."""
    return _worst([_apart(m, e) for m, e in zip(measured, expected, strict=True)])


def _by_name(measured: dict[str, Values], expected: dict[str, Values]) -> float:
    """The largest difference of a gradient array, as a share of its norm.

    Smaller norms than a hundredth of the largest array's count as that: a root of one token sees only itself, so its
    queries and keys have no gradient.
    """
    smallest = 0.01 * _worst([float(np.linalg.norm(array)) for array in expected.values()])
    return _worst([_apart(measured[name], array, smallest) for name, array in expected.items()])


def _largest(measured: Values, expected: Values) -> float:
    return _worst([abs(measured - expected).max()])


def _apart(measured: Values, expected: Values, smallest: float = 0.0) -> float:
    """The norm of the difference, as a share of the expected norm or of `smallest`."""
    return float(np.linalg.norm(measured - expected) / max(float(np.linalg.norm(expected)), smallest))


def _worst(values: Sequence[float]) -> float:
    """The largest value; NaN if any is NaN, which `max` may miss."""
    return float(np.max(values))


def _listed(failed: Sequence[Scored]) -> tuple[Notice, ...]:
    """The segments in words, for example "roots of 2-8 tokens" and "branches of 1-8 tokens"."""
    roots, branches = ([segment.length for segment in failed if segment.branch is branch] for branch in (False, True))
    listed = []
    if roots:
        listed.append(Notice("segments-roots", lengths=_ranges(roots)))
    if branches:
        listed.append(Notice("segments-branches", lengths=_ranges(branches)))
    return tuple(listed)


def _ranges(lengths: Sequence[int]) -> str:
    """Increasing numbers as text, with neighbours of `LENGTHS` joined: 1-8, 16."""
    ranges: list[list[int]] = []
    for length in lengths:
        place = LENGTHS.index(length)
        if ranges and LENGTHS[place - 1] == ranges[-1][-1]:
            ranges[-1] = [ranges[-1][0], length]
        else:
            ranges.append([length])
    return ", ".join("-".join(map(str, span)) for span in ranges)
