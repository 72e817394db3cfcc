"""Work that the accelerator gives up: recognised, explained, and done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mlx_zh.language.notice import Notice
from mlx_zh.system import device
from mlx_zh.system.device import Fault

REPEATS = 3  # times that work is done again as it is, before it is given up
PAUSE = 2.0  # seconds before that: another program may leave the GPU, or the screen go to sleep

_Result = TypeVar("_Result")


class AcceleratorError(Exception):
    """The accelerator gave up a piece of work; `fault` says why. Nothing has changed, so the work can be repeated."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@contextmanager
def accelerator_errors() -> Iterator[None]:
    """Turn MLX's errors about the accelerator into `AcceleratorError`."""
    try:
        yield
    except RuntimeError as error:
        fault = device.fault_of(error)
        if fault is None:
            raise
        raise AcceleratorError(fault) from error


def settle() -> None:
    """Wait for the accelerator and free what the given-up work has left; call this outside the error's handler.

    Work that was already under way fails after the first error, and MLX reports that at the next call.
    """
    import mlx.core as mx

    for _ in range(REPEATS):
        try:
            mx.synchronize()
            break
        except RuntimeError as error:
            if device.fault_of(error) is None:
                raise
    mx.clear_cache()


def pause() -> None:
    """Wait a moment before work is done again as it is."""
    time.sleep(PAUSE)


def repeated(work: Callable[[], _Result]) -> _Result:
    """The result of `work`, which is done again when the accelerator gives it up. Raises AcceleratorError."""
    for _ in range(REPEATS):
        try:
            with accelerator_errors():
                return work()
        except AcceleratorError:
            pass
        settle()
        pause()
    with accelerator_errors():
        return work()


def cause(fault: Fault) -> Notice:
    """Why the accelerator gave work up, as part of a sentence."""
    if fault.kind == "other":
        return Notice("accelerator-error", error=fault.message)
    return Notice(f"cause-{fault.kind}")


def advice(fault: Fault) -> Notice:
    """What the user can do about it."""
    return Notice(f"advice-{fault.kind}")
