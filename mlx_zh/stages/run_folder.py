"""The folder of a run: the paths of its files, its lock, and its manifest."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_zh.errors import MlxZhError, RecipeError, StorageError, first_line
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.spec import CONFIG_FILE
from mlx_zh.system import console, device
from mlx_zh.system.interrupts import STOPS
from mlx_zh.system.json_text import read_object
from mlx_zh.system.locks import NAME as LOCK
from mlx_zh.system.locks import Lock, in_pipeline, locked
from mlx_zh.system.redaction import redact, redacted
from mlx_zh.system.storage import cache_folder, sweep, write_json, write_text

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe

TUNED = ("sft", "dpo")  # stages that train an adapter, in the order of a run
_PACKAGES = ("mlx-zh", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "datasets")


class StageFolder:
    """`runs/NAME/STAGE`: the paths of a training stage (sft or dpo)."""

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
        """Whether the adapter is here: its config is, which is written last. Its weights may be missing."""
        return self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether training is finished: the adapter's config, which is written last, is here."""
        return (self.adapter / CONFIG_FILE).exists()


class SamplesFolder:
    """`runs/NAME/samples/LABEL`: the paths of answers that `mlx-zh sample` drew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = path / "answers.jsonl"
        self.about = path / "about.json"
        self.chosen = path / "chosen.jsonl"  # which answers are better, prompt by prompt
        self.choice = path / "choice.json"  # what `mlx-zh choose` counted

    def data(self, kind: str) -> Path:
        """The data file that was chosen: pairs, kto or best."""
        return self.path / f"{kind}.jsonl"


class ArenaFolder:
    """`runs/NAME/arena/LABEL`: the verdicts on the answers of two stages, and who won."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = path / "answers.jsonl"  # of the blind arena, whose answers are drawn as one asks
        self.chosen = path / "chosen.jsonl"
        self.result = path / "result.json"


class RunFolder:
    """`runs/NAME`: the paths in it, its lock and its manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.samples = path / "samples.json"
        self.sampled = path / "samples"
        self.arena = path / "arena"
        self.rounds = path / "rounds"  # of each round a folder, which is that of a run
        self.pipeline = path / "pipeline.json"
        self.budget = path / "budget.json"  # what a time budget decided
        self.prepared = path / "data" / "report.json"  # the report of the prepared data
        self.exams = path / "eval"
        self.fused = path / "fused"
        self.fused_summary = self.fused / "summary.json"
        self.recovering = self.fused / ".recover"  # finished blocks of a recovery
        self.page = path / "report.html"
        self.text = path / "report.md"
        self.plots = path / "plots"
        self.feedback = path / "feedback.jsonl"  # what its user said of its answers in the chat
        self.ended = path / "ended.json"  # how and why the last command here ended, unless it ended well
        self.log = path / "run.log"  # the output of a run that the studio started
        self.start = path / ".start"  # held by such a run as long as it lives; its command
        self.stop = path / ".stop"  # which process was asked to stop

    @staticmethod
    def of(recipe: Recipe) -> RunFolder:
        """The folder of a recipe's run. Raises RecipeError for a name that holds a secret: every message shows it."""
        for key, text in (("name", recipe.name), ("runs", str(recipe.runs))):
            if redact(text) != text:
                raise RecipeError(
                    f"{key} holds what looks like a token or password ({redact(text)}), and it would become the name "
                    f"of a folder that everybody can read. Give the recipe another {key}, for example {key}=my-run."
                )
        return RunFolder(recipe.run_folder())

    def at(self, path: Path) -> RunFolder:
        """Another run's folder."""
        return RunFolder(path)

    def stage(self, name: str) -> StageFolder:
        """The folder of a training stage."""
        return StageFolder(self.path / name)

    def newest_stage(self) -> str | None:
        """The stage whose adapter is there, DPO before SFT; None if no stage is finished."""
        return next((name for name in reversed(TUNED) if self.stage(name).has_adapter), None)

    def samples_called(self, label: str) -> SamplesFolder:
        """The folder of the answers that were drawn under a label."""
        return SamplesFolder(self.sampled / label)

    def round(self, number: int | str) -> RoundFolder:
        """The folder of a round, from 1 on; "*" in patterns for any."""
        return RoundFolder(self.rounds / str(number))

    def arena_of(self, label: str) -> ArenaFolder:
        """The folder of a comparison of two stages."""
        return ArenaFolder(self.arena / label)

    def histogram(self, stage: str) -> Path:
        """The path of the histogram of a stage's example lengths (PNG)."""
        return self.prepared.with_name(f"{stage}-lengths.png")

    def adapters(self) -> dict[str, Path]:
        """The adapters that are here, by stage, in the order of a run."""
        stages = {name: self.stage(name) for name in TUNED}
        return {name: stage.adapter for name, stage in stages.items() if stage.has_adapter}

    def newest_adapter(self) -> Path | None:
        """DPO's adapter, else SFT's, else None."""
        return next(reversed(self.adapters().values()), None)

    def fused_model(self) -> Path:
        """The folder of the fused model: of the last `fuse` if it wrote a model that loads, MLX's format first."""
        last = read_object(self.fused_summary) or {}
        folders = [self.fused / kind for kind in sorted(("mlx", "hf", "gguf"), key=lambda kind: kind not in last)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def unused_name(self) -> str:
        """A name for a run beside this one: its own with the first number that no run has, from 2 on."""
        return next(
            name for number in count(2) if not self.path.with_name(name := f"{self.path.name}-{number}").exists()
        )

    def pattern(self, path: Path, *more: str) -> str:
        """A path inside the run folder, relative to it, with `more` parts added; with `/` on every system."""
        return path.relative_to(self.path).joinpath(*more).as_posix()

    @contextmanager
    def at_work(self, command: str) -> Iterator[Lock]:
        """Hold the folder's lock and keep the machine awake inside this context; `command` is its name, for messages.

        What killed commands left half-written here and in the cache folder is removed first.

        Raises StorageError if another command holds the lock.
        """
        with (
            told_when_stopped(),
            locked(self.path, command) as lock,
            self._end_recorded(command),
            device.awake(),
            console.hold_warnings(),
        ):
            if lock.left_by:
                console.say(f"The last run here did not end by itself ({lock.left_by}); going on from what it saved.")
            if not lock.works:
                console.warn(Notice("no-locks", folder=str(self.path)))
            for folder in (self.path, *self.path.glob("**/"), cache_folder(), *cache_folder().glob("*/")):
                sweep(folder)
            yield lock

    @contextmanager
    def _end_recorded(self, command: str) -> Iterator[None]:
        """Note in `ended.json` how and why the work inside this context ended, unless it ends by itself."""
        if not in_pipeline():
            self.ended.unlink(missing_ok=True)
        try:
            yield
        except BaseException as error:
            if isinstance(error, RecipeError) and self._has_trained:
                raise  # a refused command says nothing about the run that is here
            self.note_end(
                command,
                "stopped" if isinstance(error, STOPS) else "failed",
                str(error) if isinstance(error, MlxZhError) else first_line(error),
            )
            raise

    @property
    def _has_trained(self) -> bool:
        return any(self.stage(name).metrics.exists() for name in TUNED)

    def note_end(self, command: str, how: Literal["stopped", "failed"], why: str) -> None:
        """Write `ended.json`: how the work of a command ended, and why. A folder that holds nothing stays so."""
        with suppress(StorageError, OSError):
            if not any(path.name != LOCK for path in self.path.iterdir()):
                return
            write_json(self.ended, {"command": command, "how": how, "why": why, "time": time.time()})

    @contextmanager
    def all_at_work(self, command: str, world: World) -> Iterator[None]:
        """As `at_work` for all ranks; rank 0 holds the lock."""
        with ExitStack() as stack:

            def begin() -> None:
                stack.enter_context(self.at_work(command))

            world.broadcast_result(begin)
            if world.first:
                world.last_words = lambda why: self.note_end(command, "failed", why)
            else:
                stack.enter_context(device.awake())
            yield

    def write_manifest(self, recipe: Recipe, loaded: LoadedModel, data: dict[str, str]) -> None:
        """Write the resolved `recipe.yaml`, and `manifest.json` with everything needed to reproduce the results.

        `data` holds the SHA-256 of each data file by path. Those that earlier stages wrote are kept.
        """
        from mlx_zh.system.hub_folders import commit_of

        decision = self._decision() if recipe.budget is not None else None
        write_text(self.recipe, _origin(decision) + recipe.to_yaml(redacted))
        manifest = read_object(self.manifest) or {}
        earlier = manifest.get("data")
        manifest |= {
            "versions": {"python": platform.python_version(), **package_versions()},
            "machine": {"system": platform.platform(), "processor": platform.machine(), "device": device.name()},
            "git_commit": _git_commit(),
            "command": sys.argv,
            "model": {
                "source": loaded.source,
                "fingerprint": loaded.fingerprint,
                "revision": commit_of(loaded.path),
            },
            "data": (earlier if isinstance(earlier, dict) else {}) | data,
        }
        if decision is not None:
            manifest["budget"] = decision
        write_json(self.manifest, manifest)

    def _decision(self) -> dict[str, Any] | None:
        """What the time budget decided, from `budget.json`; None if that is damaged."""
        decision = read_object(self.budget)
        try:
            _origin(decision)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        return decision


class RoundFolder(RunFolder):
    """`runs/NAME/rounds/NUMBER`: a run whose data are chosen among the answers of the model before it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.given = path / "round.yaml"  # its recipe, made from that of the run
        self.chosen = path / "chosen.jsonl"
        self.pairs = path / "pairs.jsonl"
        self.check_prompts = path / "check-prompts.jsonl"  # those that no round learns from
        self.check = path / "check.jsonl"  # verdicts on the answers to them
        self.result = path / "round.json"


@contextmanager
def told_when_stopped() -> Iterator[None]:
    """Say how to go on when a signal ends the work inside this context."""
    try:
        yield
    except STOPS:
        with suppress(RuntimeError, OSError):  # the signal interrupted a print, or nobody reads any more
            console.say("Stopped. What is finished is kept; run the same command to go on from there.")
        raise


def _origin(decision: Mapping[str, Any] | None) -> str:
    """A comment that says which of a recipe's numbers a time budget decided; empty without a decision."""
    if decision is None:
        return ""
    numbers = [f"{stage}.max_steps {steps}" for stage, steps in decision["steps"].items()]
    numbers += [f"data.{stage}.train max_samples" for stage in decision["max_samples"]]
    numbers += [] if decision["limit"] is None else [f"evaluate.limit {decision['limit']}"]
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(decision["made"]))
    decided = ", ".join(numbers) or "nothing had to be cut"
    return f"# Decided by the budget of {decision['budget']} on {made}, from the measured speed: {decided}.\n"


def package_versions() -> dict[str, str | None]:
    """The versions of this program and of the packages that its results depend on; None for one that is absent."""
    return {name: _version(name) for name in _PACKAGES}


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
