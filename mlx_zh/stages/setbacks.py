"""Warnings about work that the accelerator gave up. Why, and what helps, is said once in a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mlx_zh.errors import DeviceError
from mlx_zh.language.notice import Notice
from mlx_zh.recipe_text.units import size_text
from mlx_zh.system import console
from mlx_zh.system.accelerator import (
    REPEATS,
    AcceleratorError,
    accelerator_errors,
    advice,
    cause,
    pause,
    settle,
)
from mlx_zh.system.device import Fault

_Result = TypeVar("_Result")
_SMALLEST = 64  # tokens; smaller pieces of work do not help

_explained: set[str] = set()  # kinds of faults


def persistent(work: Callable[[int], _Result], what: str, micro_tokens: int) -> tuple[_Result, int]:
    """The result of `work(micro_tokens)`, which is done again, in smaller pieces if need be, when it is given up.

    Returns it with the `micro_tokens` that it took. Raises DeviceError if it is given up again and again.
    """
    repeats = 0
    while True:
        try:
            with accelerator_errors():
                return work(micro_tokens), micro_tokens
        except AcceleratorError as error:
            fault = error.fault  # the handler ends before the next try, so that arrays of the error are freed
        settle()
        if fault.shortens and micro_tokens >= 2 * _SMALLEST:
            micro_tokens //= 2
            warn_shortened(what, micro_tokens, fault)
        elif repeats == REPEATS or fault.kind == "memory":
            raise DeviceError(f"{what}: {cause(fault)}. {advice(fault)} Then run the same command again.")
        else:
            repeats += 1
            warn_repeated(what, fault)
            pause()


def warn_lowered(work: str, limit: int) -> None:
    """Say that `work` is done again within `limit` bytes."""
    console.warn(Notice("limit-lowered", what=work, limit=size_text(limit)))


def warn_shortened(work: str, micro_tokens: int, fault: Fault) -> None:
    """Say that `work` is done again in rows of at most `micro_tokens` tokens."""
    if fault.kind == "memory":
        console.warn(Notice("rows-shortened", what=work, micro_tokens=micro_tokens))
        return
    console.warn(Notice("work-shortened", what=work, cause=cause(fault), micro_tokens=micro_tokens))
    _explain(fault)


def warn_repeated(work: str, fault: Fault) -> None:
    """Say that `work` is done again as it was."""
    console.warn(Notice("work-repeated", what=work, cause=cause(fault)))
    _explain(fault)


def _explain(fault: Fault) -> None:
    """Say once what helps."""
    if fault.kind not in _explained:
        _explained.add(fault.kind)
        console.warn(advice(fault))
