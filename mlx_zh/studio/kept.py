"""Values that several visits of a page share, kept while the files that they were read from stay the same."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The newest `most` values, each under a name and the state of some files."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, tuple[Hashable, Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: Hashable, files: Iterable[Path], make: Callable[[], Value]) -> Value:
        """The value called `name`, made again if one of the files changed. Raises what `make` raises."""
        state = tuple(map(stamp, files))
        with self._lock:  # two visits at once make a value once
            kept = self._values.pop(name, None)
            if kept is None or kept[0] != state:
                kept = state, make()
            self._values[name] = kept
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return kept[1]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written again; None if it is not there."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
