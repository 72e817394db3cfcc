"""Ctrl-C: the first asks to stop, the second leaves at once."""

from __future__ import annotations

import signal
import threading

import pytest

from mlx_zh.system.interrupts import stop_on_interrupt


def test_the_first_signal_is_noted_and_the_second_interrupts() -> None:
    noted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt(noted=lambda: noted.append(True)) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop() and noted == [True]
        signal.raise_signal(signal.SIGINT)
    assert noted == [True]
    assert signal.getsignal(signal.SIGINT) == before


def test_other_signals_are_taken_where_they_are_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_interrupt((signal.SIGINT, signal.SIGTERM)) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_taken() -> None:
    """Python delivers signals to the main thread alone, and refuses handlers elsewhere."""
    answers: list[bool] = []

    def work() -> None:
        with stop_on_interrupt() as stop:
            answers.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
