"""What a stage drew, where the machine tells: Linux counts it itself, a Mac with a battery says its power."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")
_EVERY = 5.0  # seconds between two looks at a Mac's power


class Meter:
    """Use as a context; afterwards `joules` is what was drawn meanwhile, or None where the machine does not tell."""

    joules: float | None = None

    def __enter__(self) -> Meter:
        self._counters = {path: value for path in _packages() if (value := _number(path)) is not None}
        self._power = None if self._counters else _mac_watts()
        if self._power is not None:
            self._ended = threading.Event()
            self._energy = 0.0
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._counters:
            self.joules = sum(_drawn(path, start) for path, start in self._counters.items()) / 1e6
        elif self._power is not None:
            self._ended.set()
            self._thread.join()
            self.joules = self._energy

    def _follow(self) -> None:
        watts, last = self._power or 0.0, time.monotonic()
        ended = False
        while not ended:
            ended = self._ended.wait(_EVERY)
            now = time.monotonic()
            self._energy += watts * (now - last)
            last = now
            watts = watts if ended else _mac_watts() or watts


def _packages() -> list[Path]:
    """Processor packages and no parts of them, which are counted in the whole."""
    return sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # many systems let only root read it
        return None


def _drawn(path: Path, start: int) -> int:
    """Microjoules since `start`; the counter begins again at its range, which it does at most once in a while."""
    end = _number(path)
    if end is None:
        return 0
    return end - start if end >= start else end - start + (_number(path.with_name("max_energy_range_uj")) or 0)


def _mac_watts(ask: Callable[[], str] | None = None) -> float | None:
    """The whole machine's power from the battery's controller."""
    if ask is None:
        if sys.platform != "darwin":
            return None
        ask = _ioreg
    found = re.search(r'"SystemLoad"\s*=\s*(\d+)', ask())  # milliwatts
    return int(found[1]) / 1000 if found and int(found[1]) else None


def _ioreg() -> str:
    try:
        command = ["ioreg", "-rw0", "-c", "AppleSmartBattery"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
