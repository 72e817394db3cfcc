"""The energy that a stage used, where the machine reports it.

Linux has counters of the processor's energy (RAPL). A Mac with a battery reports the power of the whole machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")
_INTERVAL = 5.0  # seconds between two readings of a Mac's power


class Meter:
    """A context that measures energy. After it, `joules` is the energy used, or None where it is not reported."""

    joules: float | None = None

    def __enter__(self) -> Meter:
        self._counters = {path: value for path in _packages() if (value := _read_counter(path)) is not None}
        self._power = None if self._counters else _mac_watts()
        if self._power is not None:
            self._ended = threading.Event()
            self._energy = 0.0
            self._thread = threading.Thread(target=self._integrate, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._counters:
            self.joules = sum(_used(path, start) for path, start in self._counters.items()) / 1e6
        elif self._power is not None:
            self._ended.set()
            self._thread.join()
            self.joules = self._energy

    def _integrate(self) -> None:
        watts, last = self._power or 0.0, time.monotonic()
        ended = False
        while not ended:
            ended = self._ended.wait(_INTERVAL)
            now = time.monotonic()
            self._energy += watts * (now - last)
            last = now
            watts = watts if ended else _mac_watts() or watts


def _packages() -> list[Path]:
    """The counters of whole processor packages. Their parts have counters too, which are included in these."""
    return sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))


def _read_counter(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # many systems let only root read it
        return None


def _used(path: Path, start: int) -> int:
    """Microjoules since the counter's value `start`. The counter wraps around at its range, here at most once."""
    end = _read_counter(path)
    if end is None:
        return 0
    return end - start if end >= start else end - start + (_read_counter(path.with_name("max_energy_range_uj")) or 0)


def _mac_watts(ask: Callable[[], str] | None = None) -> float | None:
    """The power of the whole machine in watts, as the battery controller reports it; `ask` returns ioreg's output."""
    if ask is None:
        if sys.platform != "darwin":
            return None
        ask = _ioreg
    load = re.search(r'"SystemLoad"\s*=\s*(\d+)', ask())  # milliwatts
    return int(load[1]) / 1000 if load and int(load[1]) else None


def _ioreg() -> str:
    try:
        command = ["ioreg", "-rw0", "-c", "AppleSmartBattery"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
