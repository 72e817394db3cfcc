"""Optional experiment trackers (`track: [tensorboard, swanlab, wandb]`). A tracker that fails never stops a run.

A tracker is imported only if the recipe names it. Without an account, SwanLab and Weights & Biases store their files
in the run folder; their own `sync` commands can upload these later.
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
from mlx_zh.system.environment import pip_install
from mlx_zh.system.redaction import hide_all

if TYPE_CHECKING:
    from mlx_zh.training.metrics import MetricsLine

PROJECT = "mlx-zh"


@dataclass(frozen=True)
class About:
    """What a tracker needs to know about a training session."""

    run: str
    stage: str
    folder: Path  # where trackers may keep their files
    config: dict[str, Any]
    key: str  # `run_key.learning_key`
    steps_done: int = 0  # by earlier sessions

    @property
    def name(self) -> str:
        """The name shown in a tracker: `RUN-STAGE`."""
        return f"{self.run}-{self.stage}"

    @property
    def id(self) -> str:
        """The same for all sessions of a run, and different for other settings."""
        return f"{self.name}-{self.key[:8]}"


class Tracker(Protocol):
    """The interface of a tracker."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Send or write what is left, and end."""


class Trackers:
    """The trackers of a training session. A tracker that fails is reported once by `warn` and then not used again."""

    def __init__(self, names: Sequence[str], about: About, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._begin, name, about))

    def log(self, line: MetricsLine) -> None:
        """Record a line of metrics.jsonl, with the metric names of Transformers' Trainer: train/loss, eval/loss."""
        figures = {}
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                figures[f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = float(value)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, line["step"], figures))

    def close(self) -> None:
        """Close all trackers."""
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
            self._warn(Notice("tracker-not-installed", tracker=name, pip=pip_install(f"mlx-zh[{name}]")))
        except (Exception, SystemExit) as error:  # no error of a tracker may stop training
            self._open.pop(name, None)
            self._warn(Notice("tracker-failed", tracker=name, reason=hide_all(first_line(error))))


class _TensorBoard:
    """Event files by tensorboardX; shown by `tensorboard --logdir runs`."""

    def __init__(self, about: About) -> None:
        writer = importlib.import_module("tensorboardX").SummaryWriter
        # Steps that a killed session took after its last checkpoint are repeated, so its events for them are hidden.
        purge = {"purge_step": about.steps_done + 1} if about.steps_done else {}
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
        logged_in = os.environ.get("SWANLAB_API_KEY") or any(key.is_file() for key in keys)
        mode = os.environ.get("SWANLAB_MODE")
        options: dict[str, Any] = {} if logged_in or mode else {"mode": "offline"}
        if logged_in and mode in (None, "online", "cloud"):
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
        # Without a key, wandb would prompt for one and wait.
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
            settings=wandb.Settings(console="off"),  # wandb must not capture the terminal
            **options,
        )

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_key() -> bool:
    """Whether Weights & Biases has an API key; it has no call that answers this without using the key."""
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
