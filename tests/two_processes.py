"""A stage that computes in two processes by itself, because it was measured so: `python two_processes.py sft ...`.

Rank 0, which is this process, is sent a signal after a step (STOP_AT=3: Ctrl-C, KILL_AT=3), or the other rank is
killed (LOSE_AT=3).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def start(*command: str, folder: Path, fastest: int = 2, **variables: str) -> subprocess.Popen[str]:
    """Start a stage in `folder`, in a session of its own, with a measurement of how many processes are fastest."""
    remembered = {"cores": 2, "time": time.time()}
    measured = folder / "cache" / "blas"
    if measured.is_symlink():  # the library may be shared with other tests, what was measured not
        libraries = list(measured.glob("*.so"))
        measured.unlink()
        measured.mkdir()
        for library in libraries:
            (measured / library.name).symlink_to(library.resolve())
    for name, value in (("threads", {"threads": 1}), ("processes", {"processes": fastest, "gain": 1.7})):
        (measured / f"{name}.json").write_text(json.dumps(value | remembered))
    free = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    import ranks  # not at the top: the stage's own process does not need it

    environment = free | {"MLX_ZH_CACHE": str(folder / "cache")} | variables
    return ranks.process([sys.executable, __file__, *command], environment, folder, own_session=True)


def main(stage: str, *arguments: str) -> None:
    import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)
    from mlx_zh.stages import processes
    from mlx_zh.system import cpu_threads
    from mlx_zh.system.console import StepBar
    from mlx_zh.system.entry import entry

    processes.WORTH = 0.0
    cpu_threads.usable_cores = lambda: 2
    update = StepBar.update

    def shown(bar: StepBar, figures: dict[str, Any]) -> None:
        update(bar, figures)
        for variable, number in (("STOP_AT", signal.SIGINT), ("KILL_AT", signal.SIGKILL)):
            if os.environ.get(variable) == str(figures["step"]):
                os.kill(0 if number == signal.SIGINT else os.getpid(), number)  # Ctrl-C goes to the whole group
        if os.environ.get("LOSE_AT") == str(figures["step"]):
            import psutil

            (other,) = psutil.Process().children()
            other.kill()

    StepBar.update = shown  # type: ignore[method-assign]
    entry(importlib.import_module(f"mlx_zh.{stage}").main, list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
