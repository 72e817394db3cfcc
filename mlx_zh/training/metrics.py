"""`metrics.jsonl`, with one line for each step in order, and `skipped.jsonl`, with the skipped steps."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict, cast

from mlx_zh.errors import TrainingError
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import parse_json, read_object
from mlx_zh.system.storage import Identity, append_json, identity, json_line, moved, storage_errors, sync, write_text

if TYPE_CHECKING:
    from mlx_zh.training.checkpoints import Progress

_SHOWN = 20  # examples named in a message; the file has them all

# A line of metrics.jsonl: a step's, or a validation's. The functional form, for keys with a slash.
MetricsLine = TypedDict(
    "MetricsLine",
    {
        "step": Required[int],  # optimizer steps so far
        "epoch": float,  # passes over the training data so far
        # A step
        "loss": float,  # mean over the step's scored tokens (SFT), pairs (DPO) or answers (KTO), all ranks together
        "learning_rate": float,
        "grad_norm": float,  # before it is limited to max_grad_norm
        "scored_tokens": int,  # tokens that the loss is over
        "tokens": int,  # tokens that the model computed
        "tokens_per_second": float,  # all ranks together
        "peak_memory_gb": float,  # MLX's peak in this step on the first rank; 10^9 bytes
        "elapsed_seconds": float,  # of training so far, earlier sessions included
        "recomputed_layers": float,  # a row's mean on the first rank, if rows decide it and one computes any again
        "memory_limit_gb": float,  # after memory ran out: within which rows stay since then
        # A step of DPO: means over its pairs
        "rewards/chosen": float,
        "rewards/rejected": float,
        "rewards/margins": float,  # chosen - rejected
        "rewards/accuracies": float,  # share of pairs whose margin is above 0
        "logps/chosen": float,
        "logps/rejected": float,
        "pairs": int,
        # A step of KTO: means over its good (chosen) and its bad (rejected) answers, if there are any
        "kl": float,  # the KL term, which is 0 or more
        "count/chosen": int,
        "count/rejected": int,
        # A step of a model with experts: means over its layers
        "experts/busiest": float,  # the busiest expert's tokens as a multiple of the mean; 1 is even
        "experts/idle": float,  # share of the experts that got no token of a row
        # A step that was skipped
        "skipped_examples": list[int],  # numbered from 0 in the prepared training data
        # A step of more than one rank
        "ranks": int,
        "communication_share": float,  # share of the step's time
        "waiting_share": float,
        # A validation: the same figures of the validation set
        "eval_loss": float,
        "eval_rewards/chosen": float,
        "eval_rewards/rejected": float,
        "eval_rewards/margins": float,
        "eval_rewards/accuracies": float,
        "eval_logps/chosen": float,
        "eval_logps/rejected": float,
        "eval_pairs": int,
        "eval_kl": float,
        "eval_count/chosen": int,
        "eval_count/rejected": int,
    },
    total=False,
)


class BestStep(TypedDict):
    """The validation with the lowest loss; None without any."""

    step: int | None
    eval_loss: float | None


class TrainingSummary(TypedDict):
    """`summary.json` of a finished training stage."""

    key: str  # digest of everything that the stage learns from
    finished: str  # done or early_stopping
    steps: int
    seconds: float  # all sessions together
    skipped_steps: int
    eval_loss_before: float | None  # None without a validation set
    eval_loss_after: float | None  # of the weights that are kept
    before: dict[str, float]  # the first validation's figures, by their names in metrics.jsonl
    after: dict[str, float]
    best: BestStep


def validation_figures(line: MetricsLine) -> dict[str, float]:
    """The figures of a validation by their names in metrics.jsonl, each of which begins with `eval_`."""
    return {
        name: value for name, value in line.items() if name.startswith("eval_") and isinstance(value, int | float)
    }


def read_summary(path: Path) -> TrainingSummary | None:
    """The summary of a finished stage; None if there is none, or if the file is damaged."""
    summary = read_object(path) or {}
    before, after, best = summary.get("before"), summary.get("after"), summary.get("best")
    if not isinstance(before, dict) or not isinstance(after, dict) or not isinstance(best, dict):
        return None
    figures = [summary.get("steps"), *before.values(), *after.values()]
    if not fits(figures, list[float]) or before.keys() != after.keys():
        return None
    seconds = summary.get("seconds")
    timed = fits(seconds, float) and math.isfinite(cast(float, seconds))
    whole = timed and fits(best.get("step"), int | None) and (not before or "eval_loss" in before)
    return cast(TrainingSummary, summary) if whole else None


class MetricsLog:
    """Appends lines to a file. `cut` shortens it to an earlier length when a run resumes.

    With `keep` false, as on all ranks but rank 0, `append` writes nothing. A file that was moved or removed meanwhile
    is not made anew: `append` and `size` raise StorageError.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._file: Identity | None = None  # of the file that was appended to

    def append(self, figures: MetricsLine) -> None:
        """Write one line. Raises StorageError."""
        if not self._keep:
            return
        self._require_same_file()
        append_json(self._path, figures)
        self._file = identity(self._path)

    def _require_same_file(self) -> None:
        if self._file is not None and identity(self._path) != self._file:
            raise moved(self._path)

    def size(self) -> int:
        """Size of the file in bytes, after flushing it to disk. Raises StorageError."""
        self._require_same_file()
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            sync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Remove everything after the first `size` bytes. Raises StorageError."""
        if self._path.exists():
            with storage_errors(self._path), self._path.open("rb+") as file:
                file.truncate(min(size, file.seek(0, os.SEEK_END)))  # `truncate` would pad a shorter file with zeros

    def read(self) -> list[MetricsLine]:
        """All lines, parsed, without those that are damaged; the report says that there are some."""
        if not self._path.exists():
            return []
        texts = text_lines(self._path.read_text(encoding="utf-8", errors="replace"))
        return [line for text in texts if (line := _line(text)) is not None]


def _line(text: str) -> MetricsLine | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if fits(line, MetricsLine) else None


class Skipped:
    """`skipped.jsonl`, with a line for each skipped step. It is made from `log`, so that the two always agree.

    `limit` is the number of skipped steps in a row at which `check` fails.
    """

    def __init__(self, path: Path, log: MetricsLog, limit: int) -> None:
        self._path, self._log, self._limit = path, log, limit

    def write(self) -> None:
        """Write the file, or remove it when no step of the log was skipped."""
        lines = self._lines()
        if not lines:
            self._path.unlink(missing_ok=True)
            return
        entries = [
            {"step": f["step"], "loss": f["loss"], "grad_norm": f["grad_norm"], "examples": f["skipped_examples"]}
            for f in lines
        ]
        write_text(self._path, "".join(map(json_line, entries)))

    def check(self, progress: Progress, total: int) -> None:
        """Raises TrainingError after too many skipped steps in a row, or when a whole run was skipped."""
        if progress.skipped_in_a_row >= self._limit:
            problem = f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, were skipped"
        elif progress.step == total == progress.skipped_steps:
            problem = f"every step was skipped, {total} in all"
        else:
            return
        examples = [e for f in self._lines()[-progress.skipped_in_a_row :] for e in f["skipped_examples"]]
        more = f" and {len(examples) - _SHOWN} more" if len(examples) > _SHOWN else ""
        named = ", ".join(map(str, examples[:_SHOWN])) + more
        raise TrainingError(
            f"{problem}, because their loss or gradient was NaN or infinite. Their examples, as numbered from 0 in "
            f"the prepared training data: {named}; {self._path} has them by step. Usual causes: a learning_rate "
            "that is too high, model.dtype: float16 (use bfloat16), damaged weights of the model or "
            "of the adapter to start from, or these examples. Nothing was saved since the last checkpoint."
        )

    def _lines(self) -> list[MetricsLine]:
        return [line for line in self._log.read() if "skipped_examples" in line]
