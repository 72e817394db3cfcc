"""Experiment trackers on request (`track: [tensorboard, swanlab, wandb]`): a tracker that fails never stops a run.

Each is imported when it is asked for. Without an account, SwanLab and Weights & Biases keep their files in the run
folder, to be sent later with their own `sync` commands.
"""

from __future__ import annotations

import importlib
import math
import netrc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from mlx_zh.errors import first_line
from mlx_zh.language.notice import Notice
from mlx_zh.system.redaction import hide_all

if TYPE_CHECKING:
    from mlx_zh.training.metrics import MetricsLine

PROJECT = "mlx-zh"


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run. `done` steps were taken earlier; `key` is of all that it learns from."""

    run: str
    stage: str
    folder: Path  # where trackers may keep their files
    config: dict[str, Any]
    key: str
    done: int = 0

    @property
    def name(self) -> str:
        """`RUN-STAGE`."""
        return f"{self.run}-{self.stage}"

    @property
    def id(self) -> str:
        """The same for every session of this run, and other for other settings."""
        return f"{self.name}-{self.key[:8]}"


class Tracker(Protocol):
    """What every tracker can do."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step."""

    def close(self) -> None:
        """Send or write the rest."""


class Trackers:
    """Those of a training session. `warn` hears once of each that fails; it is then left alone."""

    def __init__(self, names: Sequence[str], about: About, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._begin, name, about))

    def log(self, line: MetricsLine) -> None:
        """A line of metrics.jsonl, under the names that Transformers' Trainer gives: train/loss, eval/loss."""
        figures = {}
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                figures[f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = float(value)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, line["step"], figures))

    def close(self) -> None:
        """End them all."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _begin(self, name: str, about: About) -> None:
        self._open[name] = TRACKERS[name](about)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ImportError:
            self._open.pop(name, None)
            self._warn(Notice("tracker-not-installed", tracker=name))
        except (Exception, SystemExit) as error:  # whatever a tracker raises is its own affair
            self._open.pop(name, None)
            self._warn(Notice("tracker-failed", tracker=name, reason=hide_all(first_line(error))))


class _TensorBoard:
    """Event files, by tensorboardX: `tensorboard --logdir runs`."""

    def __init__(self, about: About) -> None:
        writer = importlib.import_module("tensorboardX").SummaryWriter
        # Steps that a killed session took after its last checkpoint are taken again: theirs are not shown.
        purge = {"purge_step": about.done + 1} if about.done else {}
        self._writer = writer(logdir=str(about.folder / "tensorboard"), **purge)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _SwanLab:
    def __init__(self, about: About) -> None:
        swanlab = importlib.import_module("swanlab")
        keys = [folder / ".swanlab" / ".netrc" for folder in (Path.cwd(), Path.home())]
        known = os.environ.get("SWANLAB_API_KEY") or any(key.is_file() for key in keys)
        chosen = os.environ.get("SWANLAB_MODE")
        options: dict[str, Any] = {} if known or chosen else {"mode": "offline"}
        if known and chosen in (None, "online", "cloud"):
            options |= {"id": about.id, "resume": "allow"}
        folder = about.folder / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        config = hide_all(about.config)
        self._run = swanlab.init(project=PROJECT, name=about.name, config=config, log_dir=str(folder), **options)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _WandB:
    def __init__(self, about: About) -> None:
        wandb = importlib.import_module("wandb")
        # Without a key it would ask for one, and wait.
        options: dict[str, Any] = {} if os.environ.get("WANDB_MODE") or _wandb_key() else {"mode": "offline"}
        about.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=PROJECT,
            name=about.name,
            group=about.run,
            id=about.id,
            resume="allow",
            dir=str(about.folder),
            config=hide_all(about.config),
            settings=wandb.Settings(console="off"),  # the terminal stays ours
            **options,
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_key() -> bool:
    """Whether there is a key where Weights & Biases looks for one, which it does not say without using it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": _TensorBoard,
    "swanlab": _SwanLab,
    "wandb": _WandB,
}
