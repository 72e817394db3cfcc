"""The training loop of SFT and DPO. It yields events and prints nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core import expert_loads
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import DeviceError, PlanError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.layers import trainable
from mlx_zh.recipe import Checkpoint as CheckpointSection
from mlx_zh.recipe import Training
from mlx_zh.system import cpu_threads
from mlx_zh.system.accelerator import REPEATS, AcceleratorError, advice, cause, pause, settle
from mlx_zh.system.device import Fault
from mlx_zh.training import checkpoints, memory_limit
from mlx_zh.training.checkpoints import Progress
from mlx_zh.training.memory_limit import Lowered, Within
from mlx_zh.training.metrics import MetricsLine, MetricsLog, Skipped
from mlx_zh.training.objective import Objective, Row, can_shorten, limit_rows, shorten
from mlx_zh.training.optimizer import Arrays, GroupedAdamW
from mlx_zh.training.order import Order
from mlx_zh.training.schedule import learning_rate
from mlx_zh.training.step import StepResult, evaluate, set_weights, train_step


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step was taken; `figures` is its line in `metrics.jsonl`."""

    figures: MetricsLine
    result: StepResult
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shortened:
    """The accelerator gave up `work` ("step 3" or "validation").

    It is done again, and rows have at most `micro_tokens` tokens from now on.
    """

    work: str
    micro_tokens: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class Repeated:
    """The accelerator gave up `work`, which is done again as it was."""

    work: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Evaluating:
    """`done` of `total` rows of the validation set were scored."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The validation set was scored. `figures` is its line in `metrics.jsonl`; `best` is true for the lowest loss."""

    figures: MetricsLine
    best: bool


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written."""

    path: Path


@dataclass(frozen=True, slots=True)
class Finished:
    """The loop ended after `step` steps. `reason` is done, early_stopping or interrupted."""

    reason: str
    step: int


@dataclass(frozen=True, slots=True)
class LoopFiles:
    """Where a loop writes: a file with a line per step, one with a line per skipped step, and a folder."""

    metrics: Path
    skipped: Path
    checkpoints: Path


Event = Stepped | Lowered | Shortened | Repeated | Evaluating | Evaluated | Saved | Finished


@dataclass
class Loop:
    """A training run of `total` steps. The trained weights of `model` are already unfrozen.

    `save_best` is called with the weights when the validation loss improves. `stop` is called after every step; the
    loop ends when it returns true. `key` identifies the run's settings in its checkpoints. All ranks of `world` take
    every step together, and only rank 0 writes files. `within` plans what rows compute again, if the recipe does not
    say it; the limit is that of `progress`.
    """

    model: nn.Module
    objective: Objective
    validation: Objective | None
    section: Training
    checkpoint: CheckpointSection
    files: LoopFiles
    seed: int
    key: str
    loraplus_ratio: float = 1.0
    save_best: Callable[[Arrays], None] = lambda weights: None
    stop: Callable[[], bool] = lambda: False
    world: World = ALONE
    within: Within | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        section = self.section
        self.order = Order(self.objective.size, section.batch_size, self.seed)
        self.total = self.order.steps(section.epochs, section.max_steps)
        ratio_steps = math.ceil(section.warmup_ratio * self.total)
        self.warmup = ratio_steps if section.warmup_steps is None else section.warmup_steps
        self.micro_tokens = self.objective.settings.micro_tokens
        self.weights = trainable(self.model)
        self.optimizer = GroupedAdamW(
            self.weights,
            weight_decay=section.weight_decay,
            betas=(section.adam_beta1, section.adam_beta2),
            loraplus_ratio=self.loraplus_ratio,
        )
        mx.eval(self.weights, self.optimizer.arrays())  # so that work that is given up cannot spoil them
        self.log = MetricsLog(self.files.metrics, keep=self.world.first)
        self.skipped = Skipped(self.files.skipped, self.log, section.max_skipped_steps)

    def resume(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint of this run: restore weights, moments and progress, and shorten the metrics."""
        self.weights = {name: checkpoint.weights[name] for name in self.weights}
        set_weights(self.model, self.weights)
        self.optimizer.load(checkpoint.optimizer)
        self.progress = Progress(**checkpoint.state["progress"])
        cpu_threads.use(self.progress.threads)
        self.log.cut(self.progress.metrics_size)

    def align(self) -> None:
        """Broadcast rank 0's weights, moments and progress to all ranks."""
        if self.world.size == 1:
            return
        self.weights = self.world.broadcast(self.weights)
        set_weights(self.model, self.weights)
        self.optimizer.load(self.world.broadcast(self.optimizer.arrays()))
        self.progress = Progress(**self.world.broadcast_result(lambda: self.progress.__dict__))

    def run(self) -> Iterator[Event]:
        """Train until the end, an early stop or an interruption, and yield every event.

        Raises TrainingError when too many steps are skipped, PlanError when one example does not fit into memory, and
        DeviceError when the accelerator gives up the same work again and again.
        """
        progress = self.progress
        self._keep_row_limits()
        began = time.monotonic() - progress.elapsed_seconds
        saved_at = time.monotonic()
        self.skipped.write()
        if self._validation_due():
            yield from self._evaluate()
        reason = "early_stopping" if progress.step < self.total and self._no_gain() else "done"
        while reason == "done" and progress.step < self.total:
            yield from self._step(began)
            if progress.skipped_in_a_row:
                self.world.broadcast_result(lambda: self.skipped.check(progress, self.total))
            last = progress.step == self.total
            stopping = self.world.any(self.stop())
            if self._validation_due():
                yield from self._evaluate()
            if not last:
                reason = "early_stopping" if self._no_gain() else "interrupted" if stopping else "done"
            due = self._checkpoint_due(saved_at)
            if self.world.first and (due or last or reason != "done"):
                yield self._save()
                saved_at = time.monotonic()
        yield Finished(reason, progress.step)

    def _validation_due(self) -> bool:
        """Also true after a resume from a checkpoint that was saved because this validation was given up."""
        step, at, every = self.progress.step, self.progress.evaluated_at, self.section.eval_steps
        return at < 0 or (at < step and (step == self.total or (every is not None and step % every == 0)))

    def _keep_row_limits(self) -> None:
        """Shorten the rows as the resumed run did, unless the recipe now asks for other rows."""
        limits = self.progress.row_limits
        if limits.get("asked") != self.micro_tokens:
            for name in ("asked", "training", "validation"):
                limits.pop(name, None)
            return
        for name, objective in (("training", self.objective), ("validation", self.validation)):
            if objective is not None and name in limits:
                limit_rows(objective, limits[name])

    def _no_gain(self) -> bool:
        patience = self.section.early_stopping
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _step(self, began: float) -> Iterator[Event]:
        progress, step = self.progress, self.progress.step
        start = time.monotonic()
        examples = self.order.step(step)
        rate = learning_rate(
            step, self.total, peak=self.section.learning_rate, kind=self.section.lr_scheduler, warmup=self.warmup
        )
        mx.reset_peak_memory()
        world = self.world
        transfer, waiting = world.transfer_seconds, world.waiting_seconds
        world.start_clock()  # rank 0 may have saved a checkpoint, which is no part of this step
        lowered = progress.row_limits.get(memory_limit.LOWERED)
        result, rows = yield from self._take_step(examples, rate)
        changed = progress.row_limits.get(memory_limit.LOWERED) != lowered
        progress.step += 1
        progress.skipped_steps += not result.applied
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        now = time.monotonic()
        progress.elapsed_seconds = now - began
        line = {
            "step": progress.step,
            "epoch": round(progress.step / self.order.steps_per_epoch, 4),
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "scored_tokens": result.scored_tokens,
            "tokens": result.tokens,
            **self.objective.metrics(result.sums),
            **expert_loads.figures(result.sums, result.tokens),
            "tokens_per_second": round(result.tokens / (now - start), 1),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
            "elapsed_seconds": round(progress.elapsed_seconds, 2),
            **memory_limit.figures(self.objective, rows, progress.row_limits),
        }
        figures = cast(MetricsLine, line)  # the objective names some of the keys
        if not result.applied:
            figures["skipped_examples"] = [int(e) for e in examples]
        if world.size > 1:
            figures |= {
                "ranks": world.size,
                "communication_share": round((world.transfer_seconds - transfer) / (now - start), 4),
                "waiting_share": round((world.waiting_seconds - waiting) / (now - start), 4),
            }
        memory_limit.agree(self.objective, self.within, progress.row_limits, world, changed=changed)
        self.log.append(figures)
        if not result.applied and world.first:
            self.skipped.write()
        yield Stepped(figures, result, tuple(int(e) for e in examples))

    def _take_step(
        self, examples: npt.NDArray[np.int64], rate: float
    ) -> Generator[Event, None, tuple[StepResult, list[Row]]]:
        """Take a step over `examples`; returns its numbers and rows.

        If the accelerator gives it up, take it again, perhaps within less memory or in shorter rows.
        """
        repeats = 0
        while True:
            rows = self.objective.rows(examples, self.progress.step)
            try:
                result, self.weights = train_step(
                    self.model,
                    self.objective,
                    rows,
                    self.weights,
                    self.optimizer,
                    learning_rate=rate,
                    max_grad_norm=self.section.max_grad_norm,
                    world=self.world,
                )
                return result, rows
            except AcceleratorError as error:
                fault = error.fault  # the handler ends before the next try, so that arrays of the error are freed
            work = Notice("during-step", step=self.progress.step + 1)
            event = self._again(self.objective, rows, work, fault, repeats)
            repeats += isinstance(event, Repeated)
            yield event

    def _again(self, objective: Objective, rows: list[Row], work: str, fault: Fault, repeats: int) -> Event:
        """Make `work` ready to be done again on this rank, while the other ranks wait; returns what to tell.

        Raises PlanError when one example does not fit into memory, or when the loss needs the rows of all ranks at
        once, and DeviceError after too many `repeats`.
        """
        settle()
        if self.world.size > 1 and objective.coupled:
            raise PlanError(
                f"{work}: {cause(fault)}. This loss couples the pairs of all ranks, so a single rank cannot repeat "
                "its share. Set a smaller memory.micro_tokens and run the same command again."
            )
        if fault.kind == "memory" and objective is self.objective:
            limit = memory_limit.lower(objective, self.within, self.progress.row_limits, rows)
            if limit is not None:
                return Lowered(work, limit, fault)
        if fault.kind == "memory" or (fault.shortens and can_shorten(rows)):
            micro_tokens = shorten(objective, rows, work)
            name = "training" if objective is self.objective else "validation"
            self.progress.row_limits |= {"asked": self.micro_tokens, name: micro_tokens}
            return Shortened(work, micro_tokens, fault)
        if repeats == REPEATS:
            raise self._given_up(work, fault)
        pause()
        return Repeated(work, fault)

    def _given_up(self, work: str, fault: Fault) -> DeviceError:
        """Save what was learned so far; returns the error that ends the run."""
        step, saved = self.progress.step, "The newest checkpoint is kept."
        if step == 0:
            saved = "No step has been taken yet."
        elif self.world.first:
            with suppress(RuntimeError):  # the weights need not be computed, but the accelerator may be gone
                self._save()
                saved = f"Everything up to step {step} is saved."
        return DeviceError(
            f"{work} failed {REPEATS + 1} times in a row: {cause(fault)}. {saved} {advice(fault)} Then run the same "
            "command again; it goes on from there."
        )

    def _evaluate(self) -> Iterator[Event]:
        progress = self.progress
        if self.validation is None:
            progress.evaluated_at = progress.step
            return
        repeats = 0
        while True:
            rows = self.validation.rows(np.arange(self.validation.size), None)
            sums = {"loss": 0.0, **dict.fromkeys(self.validation.sums, 0.0)}
            try:
                for done, (share, figures) in enumerate(evaluate(self.model, self.validation, rows), start=1):
                    sums = {name: sums[name] + value for name, value in {"loss": share, **figures}.items()}
                    yield Evaluating(done, len(rows))
                break
            except AcceleratorError as error:
                fault = error.fault
            event = self._again(self.validation, rows, Notice("during-validation"), fault, repeats)
            repeats += isinstance(event, Repeated)
            yield event
        sums = self.world.add(sums)
        progress.evaluated_at = progress.step
        loss = sums.pop("loss")
        best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        progress.evaluations_without_gain = 0 if best else progress.evaluations_without_gain + 1
        if best:
            progress.best_loss, progress.best_step = loss, progress.step
            self.save_best(self.weights)
        line = {
            "step": progress.step,
            "epoch": round(progress.step / self.order.steps_per_epoch, 4),
            "eval_loss": loss,
            **{f"eval_{name}": value for name, value in self.validation.metrics(sums).items()},
        }
        validated = cast(MetricsLine, line)  # the objective names some of the keys
        self.log.append(validated)
        yield Evaluated(validated, best)

    def _checkpoint_due(self, saved_at: float) -> bool:
        every = self.checkpoint
        by_steps = every.every_steps is not None and self.progress.step % every.every_steps == 0
        minutes = (time.monotonic() - saved_at) / 60
        return by_steps or (every.every_minutes is not None and minutes >= every.every_minutes)

    def _save(self) -> Saved:
        self.progress.metrics_size = self.log.size()
        self.progress.threads = cpu_threads.current()
        self.progress.ranks = self.world.size if self.world.here == self.world.size else 0
        state: checkpoints.CheckpointState = {
            "step": self.progress.step,
            "key": self.key,
            "progress": self.progress.__dict__,
        }
        checkpoint = checkpoints.Checkpoint(self.weights, self.optimizer.arrays(), state)
        return Saved(checkpoints.save(self.files.checkpoints, checkpoint, keep=self.checkpoint.keep))
