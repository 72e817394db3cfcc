"""The training stages SFT and DPO: one `tune` for both, with resume, progress bar, interruption and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.distributed.local import ranks_here
from mlx_zh.distributed.world import World
from mlx_zh.errors import RecipeError
from mlx_zh.models.adapters.files import load_adapter, save_adapter, vocabulary_size
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Recipe, Training
from mlx_zh.stages import adapter_repair, device_check, memory_check, product_choice
from mlx_zh.stages.budgeting import expected, within_epochs
from mlx_zh.stages.data import file_digests, prepare_stage, save_report
from mlx_zh.stages.earlier_run import EarlierRun
from mlx_zh.stages.forecast import Forecast
from mlx_zh.stages.rendering import renderer_of
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_key import (
    Values,
    changes,
    corpus_values,
    learning_key,
    learning_values,
    without_secrets,
)
from mlx_zh.stages.run_models import open_model
from mlx_zh.stages.sample_answers import Samples
from mlx_zh.stages.step_warnings import StepWarnings
from mlx_zh.stages.trackers import About, Trackers
from mlx_zh.stages.tuning_report import report, validation_sentence
from mlx_zh.system import console, device
from mlx_zh.system.clock import clock
from mlx_zh.system.interrupts import stop_on_interrupt, stopping
from mlx_zh.system.storage import working_in, write_json
from mlx_zh.training import checkpoints
from mlx_zh.training.loop import Evaluated, Evaluating, Finished, Loop, LoopFiles, Repeated, Shortened, Stepped
from mlx_zh.training.memory_limit import Lowered, keep_within
from mlx_zh.training.metrics import MetricsLine, TrainingSummary, validation_figures
from mlx_zh.training.objective import Objective, Settings
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.step import set_weights

if TYPE_CHECKING:
    from mlx_zh.corpus.examples import AnySplit
    from mlx_zh.corpus.prepared import Corpus
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.stages.first_adapter import Start


class Method(Protocol):
    """What SFT and DPO do differently."""

    stage: str
    answers: tuple[str, ...]  # the models whose sample answers are shown at the end

    def start(self, recipe: Recipe, world: World) -> Start:
        """Where training starts."""

    def examples(self, corpus: Corpus, split: str) -> AnySplit:
        """The examples of a split (train or validation)."""

    def objectives(self, session: Session, loaded: LoadedModel, start: Start, corpus: Corpus) -> Objectives:
        """Add the adapter to the model, and return what is optimized."""


@dataclass(frozen=True)
class Objectives:
    """The training and validation objectives."""

    training: Objective
    validation: Objective | None
    watch: Watch | None = None  # checks the metrics of each step


def tune(recipe: Recipe, method: Method, world: World, *, fresh: bool, force: bool, renew: bool = False) -> int:
    """Train a stage of a run, or resume it; returns the exit status (130 if interrupted).

    `fresh` starts over; `renew` does so only if the folder holds a run with other settings, which is otherwise an
    error. Raises MlxZhError for what the user can fix: settings, data, models, memory.
    """
    stage = method.stage
    start = method.start(recipe, world)
    world.each(lambda: memory_check.require(recipe, stage, force=force, fresh=fresh))
    loaded = open_model(recipe, world, trains=True)
    renderer = renderer_of(recipe, loaded.tokenizer)
    corpus = world.each(lambda: prepare_stage(recipe, stage, renderer))
    session = world.each(lambda: _session(recipe, method, start, loaded, renderer, corpus, world))
    samples = Samples(session.recipe, renderer, loaded)
    if session.begin(fresh=fresh, renew=renew):
        unfused = world.each(lambda: _fits(session, method.examples(corpus, "train"), force))
        if world.first:
            session.run.write_manifest(session.recipe, loaded, file_digests(corpus))
            save_report(session.recipe, stage, corpus)
            samples.ask("base")
        product_choice.keep(session.folder.checkpoints, recipe.memory, world)
        with device.unfused_attention(unfused):
            finished = session.train(method.objectives(session, loaded, start, corpus))
        if finished.reason == "interrupted":
            return 130
        if world.first:
            loaded.model.eval()
            samples.ask(stage, session.folder.adapter)
    elif world.first:
        _complete(samples, session)
    if world.first:
        report(session.run, session.folder, samples, method.answers)
    return 0


def _session(
    recipe: Recipe,
    method: Method,
    start: Start,
    loaded: LoadedModel,
    renderer: Renderer,
    corpus: Corpus,
    world: World,
) -> Session:
    """The session of a stage, with everything that it learns from."""
    stage = method.stage
    recipe = within_epochs(recipe, stage, len(method.examples(corpus, "train")))
    content: Values = {"base": loaded.fingerprint, "rendering": renderer.template_fingerprint}
    content |= {"files": file_digests(corpus), "corpus": corpus_values(corpus)}
    if stage == "dpo" or start.folder is not None:
        content["start"] = start.fingerprint
    earlier = EarlierRun(RunFolder.of(recipe), stage, loaded.path, learning_values(recipe, stage, content))
    return Session(recipe, stage, loaded, start.spec(loaded), earlier, world)


def _fits(session: Session, examples: AnySplit, force: bool) -> bool:
    """Check memory and the device; returns whether attention must be computed unfused."""
    recipe, loaded = session.recipe, session.loaded
    memory_check.require(recipe, session.stage, force=force, config=loaded.config, corpus=examples)
    return device_check.needs_unfused(recipe, loaded, session.spec, force=force)


def _complete(samples: Samples, session: Session) -> None:
    """Ask a finished run's models what they have not answered: a kill took the answers, or the prompts are new."""
    samples.ask("base")
    adapter = session.folder.adapter
    if samples.lacks(session.stage, adapter):
        load_adapter(session.loaded.model, adapter)
        session.loaded.model.eval()
        samples.ask(session.stage, adapter)


@dataclass
class Session:
    """One training stage of a run, in its folder."""

    recipe: Recipe
    stage: str
    loaded: LoadedModel
    spec: AdapterSpec
    earlier: EarlierRun
    world: World

    def __post_init__(self) -> None:
        self.section = self.recipe.training(self.stage)
        self.run, self.folder = self.earlier.run, self.earlier.folder

    def begin(self, *, fresh: bool, renew: bool = False) -> bool:
        """Whether there is work to do. With `fresh` there always is, and an earlier run is moved aside.

        With `renew`, a run with other settings is moved aside. Raises RecipeError as `EarlierRun.check` does, and
        DistributedError if the recipe, data or model of a rank differs from rank 0's.
        """
        self.world.agree(
            self.earlier.values, _rank_differences, "Give every machine the same recipe, model and data."
        )
        return self.world.broadcast_result(lambda: self._begin(fresh, renew))

    def _begin(self, fresh: bool, renew: bool) -> bool:
        if not fresh:
            self.earlier.adopt()
        if renew and not fresh and (settings := self.earlier.other_settings()) is not None:
            console.say(f"{self.folder.path} holds a run with other settings: {self.earlier.differences(settings)}.")
            fresh = True
        if fresh:
            self.earlier.set_aside()
        if self.earlier.recorded_key() == self.earlier.key:
            adapter_repair.set_result_aside(self.folder)
        if (summary := self.earlier.check()) is None:
            if self.folder.is_finished and not self.earlier.holds_checkpoints:  # its adapter would be overwritten
                self.earlier.set_aside()
            return True
        adapter_repair.mend_best(self.folder, summary["best"]["step"], self._save_best)
        checkpoints.prune(self.folder.checkpoints, self.recipe.checkpoint.keep)
        console.say(f"{self.folder.path} is finished: nothing is left to train. To train again, add --fresh.")
        return False

    def train(self, objectives: Objectives) -> Finished:
        """Train, or resume an earlier run of the same recipe; saves the adapter at the end.

        Raises RecipeError if the newest checkpoint belongs to other settings, and TrainingError or PlanError if
        training cannot go on.
        """
        if wired := device.wire_memory():
            console.say(f"Keeping up to {wired / 1e9:.1f} GB resident in memory; the rest is left to other programs.")
        first = self.world.first
        warning_log = console.log_warnings(self.folder.warnings) if first else nullcontext()
        in_place = working_in(self.folder.path)
        with warning_log, in_place, stop_on_interrupt(stopping(), _say_stopping) as stop:
            loop = Loop(
                model=self.loaded.model,
                objective=objectives.training,
                validation=objectives.validation,
                section=self.section,
                checkpoint=self.recipe.checkpoint,
                files=LoopFiles(self.folder.metrics, self.folder.skipped, self.folder.checkpoints),
                seed=self.recipe.seed,
                key=self.earlier.key,
                loraplus_ratio=self.recipe.lora.loraplus_ratio,
                save_best=self._save_best if first else lambda _: None,
                stop=stop,
                world=self.world,
            )
            self.world.broadcast_result(lambda: self._resume(loop))
            loop.align()
            self._stay_within_memory(loop)
            loop.progress.products = product_choice.record(self.recipe.memory)
            finished = self._follow(loop, objectives.watch)
        if finished.reason == "interrupted":
            console.say(f"Stopped after step {finished.step}; run the same command to go on from there.")
        if finished.reason == "interrupted" or not first:
            return finished
        if self.section.load_best and loop.progress.best_step is not None:
            best = adapter_repair.mend_best(self.folder, loop.progress.best_step, self._save_best)
            if best is not None:
                set_weights(self.loaded.model, best)
                console.say(f"Restored the weights with the lowest validation loss: step {loop.progress.best_step}.")
                loop.weights = best
        self._save_adapter(self.folder.adapter, loop.weights)
        self._summarize(loop, finished)
        return finished

    def _save_best(self, weights: Arrays) -> None:
        if self.recipe.checkpoint.keep_best or self.section.load_best:
            self._save_adapter(self.folder.best, weights)

    def _save_adapter(self, folder: Path, weights: Arrays) -> None:
        loaded = self.loaded
        about: dict[str, Any] = {
            "base": loaded.source,
            "base_fingerprint": loaded.fingerprint,
            "run": self.recipe.name,
        }
        about |= {"stage": self.stage, "vocabulary": vocabulary_size(loaded.model)}
        save_adapter(folder, weights, self.spec, about, loaded.config)

    def _resume(self, loop: Loop) -> None:
        checkpoint, warnings = checkpoints.load_newest(self.folder.checkpoints)
        for warning in warnings:
            console.warn(warning)
        if checkpoint is None:
            loop.log.cut(0)
            self.folder.warnings.unlink(missing_ok=True)
            write_json(self.folder.settings, without_secrets(self.earlier.values))
            console.log_held_warnings()
            return
        if checkpoint.state["key"] != self.earlier.key:
            raise RecipeError(
                f"{self.folder.path} holds a run with other settings, stopped after step {checkpoint.state['step']}. "
                f"{self.earlier.remedy(None)}"
            )
        console.log_held_warnings(again=False)
        loop.resume(checkpoint)
        checkpoints.prune(self.folder.checkpoints, self.recipe.checkpoint.keep)  # a power cut may bring old ones back
        console.say(f"Going on after step {checkpoint.state['step']} of {loop.total}.")

    def _stay_within_memory(self, loop: Loop) -> None:
        """Let each row compute again what it must to stay within the limit, which is decided once for a run.

        Ranks on one machine share its limit, and all ranks take the smallest share. A run that goes on keeps its own,
        so its lines stay the same; what another machine lacks of that is told by `memory_check.require` before.
        """
        memory, limits = self.recipe.memory, loop.progress.row_limits
        asked, sharing = memory.limit_bytes or 0, -self.world.min(-self.world.sharing())
        undivided = sharing / ranks_here()  # `memory_check` counts the ranks that this program started itself
        here = self.world.min(int(memory_check.memory_limit(memory, memory_check.this_machine()) / undivided))
        if (limits.get("memory_asked"), limits.get("memory_sharing", 1)) != (asked, sharing):
            limits.pop("memory_lowered", None)
            limits |= {"memory": here, "memory_asked": asked, "memory_sharing": sharing}
        limit = limits["memory"]
        logit_rows = memory.logit_rows or chunk_rows(vocabulary_size(self.loaded.model), float(limit))
        loop.objective.settings = replace(loop.objective.settings, logit_rows=logit_rows)
        step = memory_check.actual_step(self.recipe, self.stage, self.loaded.config, self.spec, float(limit))
        if (levels := memory_check.asked_levels(self.recipe, step)) is not None:
            loop.objective.settings = replace(loop.objective.settings, checkpoint=levels)
            return
        loop.within = memory_check.RowsWithin(step, memory)
        keep_within(loop.objective, loop.within, limit)

    def _follow(self, loop: Loop, watch: Watch | None) -> Finished:
        trackers = self._trackers(loop.progress.step)
        bar = console.StepBar(self.recipe.kind(self.stage).upper(), loop.total, loop.progress.step)
        section = self.section
        forecast = Forecast(
            self.stage, loop.total, loop.progress.step, section.eval_steps, expected(self.recipe, self.stage)
        )
        warnings = StepWarnings(self.recipe, self.stage, self.loaded.config, self.spec, loop)
        finished: Finished | None = None
        if watch is not None:
            for line in loop.log.read():
                if "loss" in line:
                    watch.recall(line)
        try:
            for event in loop.run():
                if isinstance(event, Stepped):
                    for sentence in forecast.stepped():
                        console.say(sentence)
                    bar.end = clock(forecast.end) if forecast.said else ""
                    bar.update(event.figures)
                    trackers.log(event.figures)
                    for warning in [*warnings.of(event), *([] if watch is None else watch.step(event.figures))]:
                        console.warn(warning)
                elif isinstance(event, Lowered | Shortened | Repeated):
                    warnings.given_up(event)
                elif isinstance(event, Evaluating):
                    bar.note(f"validating {event.done}/{event.total}")
                elif isinstance(event, Evaluated):
                    forecast.validated()
                    console.say(validation_sentence(event.figures))
                    trackers.log(event.figures)
                elif isinstance(event, Finished):
                    finished = event
        finally:
            bar.close()
            trackers.close()
        assert finished is not None
        return finished

    def _trackers(self, steps_done: int) -> Trackers:
        recipe = self.recipe
        config = recipe.model_dump(mode="json")
        about = About(recipe.name, self.stage, self.folder.path, config, self.earlier.key, steps_done)
        return Trackers(recipe.track if self.world.first else (), about, console.warn)

    def _summarize(self, loop: Loop, finished: Finished) -> None:
        lines = [line for line in loop.log.read() if "eval_loss" in line]
        if self.section.load_best:
            lines += [line for line in lines if line["step"] == loop.progress.best_step]
        summary: TrainingSummary = {
            "key": self.earlier.key,
            "finished": finished.reason,
            "steps": finished.step,
            "seconds": round(loop.progress.elapsed_seconds, 1),
            "skipped_steps": loop.progress.skipped_steps,
            "eval_loss_before": lines[0]["eval_loss"] if lines else None,
            "eval_loss_after": lines[-1]["eval_loss"] if lines else None,
            "before": validation_figures(lines[0]) if lines else {},
            "after": validation_figures(lines[-1]) if lines else {},
            "best": {"step": loop.progress.best_step, "eval_loss": loop.progress.best_loss},
        }
        write_json(self.folder.summary, summary)


class Watch(Protocol):
    """Checks the metrics of a run while it trains."""

    def recall(self, figures: MetricsLine) -> None:
        """Take in a step of an earlier session of this run."""

    def step(self, figures: MetricsLine) -> Sequence[str]:
        """Check the step just taken; returns warnings to show. Raises TrainingError to end the run."""


def row_settings(recipe: Recipe, section: Training, *, dropout: float) -> Settings:
    """The settings by which a stage computes its rows."""
    memory = recipe.memory
    return Settings(
        seed=recipe.seed,
        micro_tokens=memory.micro_tokens,
        checkpoint=memory.checkpoint_layers is True,  # the loop replaces it by the levels of each row
        logit_rows=memory.logit_rows,
        dropout=dropout,
        neftune_alpha=section.neftune_alpha,
    )


def _rank_differences(first: Values, other: Values) -> str:
    return "" if learning_key(first) == learning_key(other) else changes(first, other)


def _say_stopping() -> None:
    with suppress(RuntimeError):  # the signal interrupted a print, and print cannot be re-entered
        console.say("Finishing this step and saving; press Ctrl-C again to leave at once.")
