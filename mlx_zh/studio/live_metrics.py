"""A training stage's metrics, read as they are written: only what was added since the last look."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_zh.stages.run_folder import StageFolder
from mlx_zh.studio.curves import Point, thinned
from mlx_zh.system.json_text import parse_json, read_object
from mlx_zh.system.links import is_readable

_BLOCK = 1 << 24  # bytes that are read in one look, some 60,000 steps
_MOST = 50_000  # points of a curve that stay when it is thinned
_MARK = 64  # bytes before the place reached, by which a file that was cut and grew again is recognised
_LONGEST = 10 * 365 * 86400.0  # seconds of training that are taken seriously
_RECENT = 50  # steps over which the speed is measured


class LiveMetrics:
    """The curves of one stage. `read` adds what is new; it may be called in any thread, one at a time.

    A curve of more than a hundred thousand points is thinned, so that no file fills the memory.
    """

    def __init__(self, folder: StageFolder) -> None:
        self.folder = folder
        self.points: dict[str, list[Point]] = defaultdict(list)  # metric -> (step, value)
        self.last: Mapping[str, Any] = {}  # the numbers in the last step's line
        self._offset = 0
        self._mark = b""

    def read(self) -> bool:
        """Read the lines that were added, a block of them at most; whether anything changed.

        A run that resumes cuts its file to what it saved; then everything is read anew. A line that is not whole yet
        is left for the next look, and a damaged one is passed over.
        """
        if not is_readable(self.folder.path, self.folder.metrics):
            return False
        with self.folder.metrics.open("rb") as file:
            file.seek(self._offset - len(self._mark))
            if file.read(len(self._mark)) != self._mark:
                self.points, self.last, self._offset, self._mark = defaultdict(list), {}, 0, b""
                file.seek(0)
            block = file.read(_BLOCK)
        whole = block[: block.rfind(b"\n") + 1]
        if not whole and len(block) == _BLOCK:  # no step's line is that long
            whole = block
        for line in whole.splitlines():
            self._take(line)
        for points in self.points.values():
            if len(points) > 2 * _MOST:
                points[:] = thinned(points, _MOST)
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-_MARK:]
        return bool(whole)

    def _take(self, line: bytes) -> None:
        try:
            values = parse_json(line)
        except ValueError:
            return
        step = values.get("step") if isinstance(values, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            return
        numbers = {name: value for name, value in values.items() if _is_number(value)}
        if "loss" in numbers:
            self.last = numbers
        for name, value in numbers.items():
            if name != "step":
                self.points[name].append((step, value))

    def total_steps(self) -> int | None:
        """The steps that the stage will take, by its settings and by how far an epoch has come; None if unknown."""
        settings = read_object(self.folder.settings) or {}
        section = settings.get(self.folder.path.name)
        if not isinstance(section, dict):
            return None
        if isinstance(most := section.get("max_steps"), int) and not isinstance(most, bool):
            return most
        epochs, epoch, step = section.get("epochs"), self.last.get("epoch"), self.last.get("step")
        if not _is_number(epochs) or epoch is None or not step or epoch <= 0:
            return None
        total = epochs * step / epoch
        return max(round(total), step) if math.isfinite(total) else None

    def seconds_left(self) -> float | None:
        """Seconds of training until the stage's last step, at the speed of its last steps; None if unknown."""
        total, times = self.total_steps(), self.points["elapsed_seconds"][-_RECENT:]
        if total is None or len(times) < 2 or times[-1][0] <= times[0][0]:
            return None
        pace = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])  # seconds a step
        left = max(total - times[-1][0], 0) * pace
        return left if left < _LONGEST else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def end_of(seconds_left: float, written: float, now: float | None = None) -> float:
    """When a stage will be done, in seconds since 1970; its last step was written at `written`."""
    return max(written + seconds_left, time.time() if now is None else now)


def age(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None if it is missing."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
