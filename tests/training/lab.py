"""A loop over a tiny model, to be stopped, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from objectives import conversations, sft

from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Checkpoint, Training
from mlx_zh.training import checkpoints
from mlx_zh.training.loop import Event, Finished, Loop, LoopFiles, Stepped
from mlx_zh.training.sft_objective import SftObjective

Make = Callable[..., Any]
MACHINES_OWN = ("tokens_per_second", "peak_memory_gb", "elapsed_seconds")
TRAIN, VALIDATION = conversations([9, 14, 4, 21, 15, 2, 12]), conversations([8, 11, 5], seed=1)
EVERY = 3  # steps between checkpoints


class Lab:
    """Makes runs of one recipe, each with a model of its own."""

    def __init__(self, tiny_model: Make, folder: Path) -> None:
        self.tiny_model, self.folder = tiny_model, folder
        self.best: list[dict[str, bytes]] = []

    def loop(
        self,
        name: str,
        *,
        validate: bool = True,
        stop_after: int | None = None,
        objective: type[SftObjective] = SftObjective,
        **changes: Any,
    ) -> Loop:
        """3 epochs of 3 steps (3, 3 and 1 examples), with dropout, NEFTune, decay and clipping on."""
        model = self.tiny_model("llama", layers=2)
        add_adapter(model, AdapterSpec("lora", num_layers=2, rank=4, dropout=0.2), seed=1)
        settings: dict[str, Any] = {
            "epochs": 3.0, "batch_size": 3, "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.01,
            "eval_steps": 4,
        }  # fmt: skip
        keep = changes.pop("keep", 2)
        every, minutes = changes.pop("every", EVERY), changes.pop("minutes", None)
        loop = Loop(
            model=model,
            objective=sft(TRAIN, objective, micro_tokens=30, dropout=0.2, neftune_alpha=2.0),
            validation=sft(VALIDATION, objective, micro_tokens=16) if validate else None,
            section=Training(**(settings | changes)),
            checkpoint=Checkpoint(every_steps=every, every_minutes=minutes, keep=keep),
            files=files_in(self.folder / name),
            seed=11,
            key="k",
            loraplus_ratio=4.0,
            save_best=lambda weights: self.best.append(bits(weights)),
        )
        loop.stop = lambda: stop_after is not None and loop.progress.step >= stop_after
        return loop

    def resumed(self, name: str, **changes: Any) -> Loop:
        loop = self.loop(name, **changes)
        found, remarks = checkpoints.load_newest(loop.files.checkpoints)
        assert found is not None and remarks == []
        loop.resume(found)
        return loop


def files_in(folder: Path) -> LoopFiles:
    return LoopFiles(folder / "metrics.jsonl", folder / "skipped.jsonl", folder / "checkpoints")


def bits(arrays: dict[str, mx.array]) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in arrays.items()}


def lines(loop: Loop) -> list[dict[str, Any]]:
    """The metrics file less what only the machine decides."""
    text = (loop.files.metrics).read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k not in MACHINES_OWN} for line in text.splitlines()]


def finish(loop: Loop) -> list[Event]:
    events = list(loop.run())
    assert isinstance(events[-1], Finished)
    return events


def reason(events: list[Event]) -> tuple[str, int]:
    last = events[-1]
    assert isinstance(last, Finished)
    return last.reason, last.step


def assert_same(one: Loop, other: Loop) -> None:
    """The same metrics line for line; weights and moments bit for bit, in the loop and in the model."""
    assert lines(one) == lines(other)
    assert bits(one.weights) == bits(other.weights) == bits(trainable(one.model)) == bits(trainable(other.model))
    assert bits(one.optimizer.arrays()) == bits(other.optimizer.arrays())
    for name in ("step", "best_loss", "best_step", "evaluations_without_gain", "skipped_steps", "evaluated_at"):
        assert getattr(one.progress, name) == getattr(other.progress, name)


def until(events: Iterator[Event], step: int) -> None:
    """Take events until a step was taken, and no more: what a kill right after it leaves."""
    for event in events:
        if isinstance(event, Stepped) and event.figures["step"] == step:
            return
    raise AssertionError(f"step {step} was never taken")
