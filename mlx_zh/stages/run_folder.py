"""The folder of a run: where each of its files lies, which command works in it, and what the run was made with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE
from mlx_zh.system import console, device
from mlx_zh.system.locks import Lock, locked
from mlx_zh.system.redaction import hide_all, redact
from mlx_zh.system.storage import write_json, write_text

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe

TUNED = ("sft", "dpo")  # stages that leave an adapter, in the order of a run
_PACKAGES = ("mlx-zh", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "datasets")


class StageFolder:
    """`runs/NAME/STAGE`: what a training stage (sft or dpo) keeps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.warnings = path / "warnings.jsonl"
        self.settings = path / "settings.json"
        self.summary = path / "summary.json"
        self.adapter = path / "adapters"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best"  # the adapter with the lowest validation loss

    @property
    def has_adapter(self) -> bool:
        """Whether training has left its weights here."""
        return (self.adapter / ADAPTER_FILE).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether training has left an adapter folder whose settings are there; they are written last."""
        return (self.adapter / CONFIG_FILE).exists()


class RunFolder:
    """`runs/NAME`: every path in it, its lock and its manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.samples = path / "samples.json"
        self.pipeline = path / "pipeline.json"
        self.prepared = path / "data" / "report.json"  # what `prepare` reports of its work
        self.exams = path / "eval"
        self.fused = path / "fused"
        self.fused_summary = self.fused / "summary.json"
        self.page = path / "report.html"
        self.text = path / "report.md"
        self.plots = path / "plots"

    @staticmethod
    def of(recipe: Recipe) -> RunFolder:
        """The folder of a recipe's run."""
        return RunFolder(recipe.run_folder())

    def at(self, path: Path) -> RunFolder:
        """Another run's folder."""
        return RunFolder(path)

    def stage(self, name: str) -> StageFolder:
        """The folder of a training stage."""
        return StageFolder(self.path / name)

    def histogram(self, stage: str) -> Path:
        """The picture of the lengths of a stage's examples."""
        return self.prepared.with_name(f"{stage}-lengths.png")

    def newest_adapter(self) -> Path | None:
        """DPO's adapter, else SFT's; None where there is neither."""
        stages = (self.stage(name) for name in reversed(TUNED))
        return next((stage.adapter for stage in stages if stage.has_adapter), None)

    def fused_model(self) -> Path:
        """The fused model in MLX's format, else in another one that can be loaded."""
        places = [self.fused / kind for kind in ("mlx", "hf", "gguf")]
        return next((place for place in places if place.is_dir()), places[0])

    def pattern(self, path: Path, *more: str) -> str:
        """A path inside the folder, as a pattern relative to it."""
        return path.relative_to(self.path).joinpath(*more).as_posix()

    @contextmanager
    def at_work(self, what: str) -> Iterator[Lock]:
        """Alone in the folder, on a machine that is kept awake. Raises StorageError where another run is at work."""
        with locked(self.path, what) as lock, device.awake(), console.hold_warnings():
            if lock.left_by:
                console.say(f"The last run here did not end by itself ({lock.left_by}); going on from what it kept.")
            if not lock.works:
                console.warn(Notice("no-locks", folder=str(self.path)))
            yield lock

    @contextmanager
    def all_at_work(self, what: str, world: World) -> Iterator[None]:
        """The same for all ranks: rank 0 has the folder."""
        with ExitStack() as stack:

            def begin() -> None:
                stack.enter_context(self.at_work(what))

            world.broadcast_result(begin)
            if not world.first:
                stack.enter_context(device.awake())
            yield

    def write_manifest(self, recipe: Recipe, loaded: LoadedModel, data: dict[str, str]) -> None:
        """`recipe.yaml` as resolved, and `manifest.json` with what a number needs to be reproduced.

        `data` has the SHA-256 of each data file by its path; those of other stages are kept.
        """
        from mlx_zh.system.hub import commit_of

        write_text(self.recipe, redact(recipe.to_yaml()))
        manifest: dict[str, Any] = {}
        if self.manifest.exists():
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        manifest |= {
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "machine": {"system": platform.platform(), "processor": platform.machine(), "device": device.name()},
            "git_commit": _git_commit(),
            "command": sys.argv,
            "model": {
                "source": loaded.source,
                "fingerprint": loaded.fingerprint,
                "revision": commit_of(loaded.path),
            },
            "data": manifest.get("data", {}) | data,
        }
        write_json(self.manifest, hide_all(manifest, redact))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
