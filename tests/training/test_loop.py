"""Invariant 5: a run that was stopped or killed goes on to the same metrics and the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from lab import EVERY, TRAIN, VALIDATION, Lab, Make, assert_same, bits, finish, lines, reason, until
from oracles import own_loss
from tolerances import LOSS

from mlx_zh.models.adapters.layers import trainable
from mlx_zh.training import checkpoints
from mlx_zh.training.loop import Evaluated, Evaluating, Finished, Loop, Saved, Stepped
from mlx_zh.training.schedule import learning_rate
from mlx_zh.training.step import set_weights


@pytest.fixture
def lab(tiny_model: Make, tmp_path: Path) -> Lab:
    return Lab(tiny_model, tmp_path)


@pytest.mark.numeric
def test_metrics_by_hand(lab: Lab) -> None:
    """7 examples by 3: steps of 3, 3 and 1, three times; evaluated at 0, 4, 8 and the end, 9."""
    loop = lab.loop("run")
    before = {n: np.array(w) for n, w in loop.weights.items()}
    base = float(own_loss(loop.model, VALIDATION))
    events = finish(loop)
    assert reason(events) == ("done", 9)
    found = lines(loop)
    steps, evaluations = [f for f in found if "loss" in f], [f for f in found if "eval_loss" in f]
    assert [f["step"] for f in steps] == list(range(1, 10))
    assert [f["step"] for f in evaluations] == [0, 4, 8, 9]
    assert [f["step"] for f in found] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9]
    assert evaluations[0]["eval_loss"] == pytest.approx(base, rel=LOSS)  # B is 0, so this is the base model
    assert evaluations[-1]["eval_loss"] == pytest.approx(float(own_loss(loop.model, VALIDATION)), rel=LOSS)
    assert [f["epoch"] for f in steps] == [0.3333, 0.6667, 1.0, 1.3333, 1.6667, 2.0, 2.3333, 2.6667, 3.0]
    rates = [learning_rate(n, 9, peak=5e-3, kind="cosine", warmup=2) for n in range(9)]
    assert [f["learning_rate"] for f in steps] == rates
    for index, figures in enumerate(steps):
        examples = [TRAIN[i] for i in loop.order.step(index)]
        assert figures["tokens"] == sum(len(tokens) for tokens, _ in examples)
        assert figures["scored_tokens"] == sum(int(trained[1:].sum()) for _, trained in examples)
    seen = [e for event in events if isinstance(event, Stepped) for e in event.examples]
    assert [sorted(seen[n : n + 7]) for n in (0, 7, 14)] == [list(range(7))] * 3
    assert all((np.array(w) != before[n]).any() for n, w in loop.weights.items())
    assert [e.path.name for e in events if isinstance(e, Saved)] == ["step-000003", "step-000006", "step-000009"]
    raw = loop.log.read()
    assert list(raw[1]) == [
        "step", "epoch", "loss", "learning_rate", "grad_norm", "scored_tokens", "tokens",
        "tokens_per_second", "peak_memory_gb", "elapsed_seconds",
    ]  # fmt: skip
    rows = [(e.done, e.total) for e in events if isinstance(e, Evaluating)]
    assert rows == [(n, 2) for _ in range(4) for n in (1, 2)]  # 8, 11 and 5 tokens in rows of 16


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 8])
def test_interrupted_and_resumed_equals_uninterrupted(lab: Lab, stop_after: int) -> None:
    """Before the first checkpoint, at one, at an evaluation, between, and just before the end."""
    whole = lab.loop("whole")
    finish(whole)
    assert reason(finish(lab.loop("cut", stop_after=stop_after))) == ("interrupted", stop_after)
    again = lab.resumed("cut")
    assert again.progress.step == stop_after
    assert reason(finish(again)) == ("done", 9)
    assert_same(again, whole)


def test_interrupted_at_every_step(lab: Lab) -> None:
    whole = lab.loop("whole", eval_steps=None)
    finish(whole)
    finish(lab.loop("cut", stop_after=1, eval_steps=None))
    for step in range(2, 9):
        assert reason(finish(lab.resumed("cut", stop_after=step, eval_steps=None))) == ("interrupted", step)
    last = lab.resumed("cut", eval_steps=None)
    finish(last)
    assert_same(last, whole)
    assert [f["step"] for f in lines(last) if "eval_loss" in f] == [0, 9]


@pytest.mark.parametrize("killed_after", [4, 5, 8])
def test_killed_and_resumed_equals_uninterrupted(lab: Lab, killed_after: int) -> None:
    """Killed after a step that no checkpoint has, in the middle of a line: it is taken again, and stands once."""
    whole = lab.loop("whole")
    finish(whole)
    cut = lab.loop("cut")
    until(cut.run(), killed_after)
    with (cut.files.metrics).open("ab") as file:
        file.write(b'{"step": 99, "lo')
    again = lab.resumed("cut")
    assert again.progress.step == killed_after // EVERY * EVERY
    finish(again)
    assert_same(again, whole)


def test_killed_in_a_validation_pass(lab: Lab) -> None:
    """At step 8, after its line and before the evaluation's."""
    whole = lab.loop("whole")
    finish(whole)
    events = lab.loop("cut").run()
    until(events, 8)
    assert isinstance(next(events), Evaluating)
    again = lab.resumed("cut")
    finish(again)
    assert_same(again, whole)


def test_killed_twice_with_a_damaged_checkpoint(lab: Lab) -> None:
    """The newest has a flipped bit in a weight: the run goes on from the one before it, to the same end."""
    whole = lab.loop("whole")
    finish(whole)
    until(lab.loop("cut").run(), 8)
    path = lab.folder / "cut" / "checkpoints" / "step-000006" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    again = lab.loop("cut")
    found, remarks = checkpoints.load_newest(again.files.checkpoints)
    assert found is not None and found.state["step"] == 3
    assert len(remarks) == 1 and "step-000006" in remarks[0]
    again.resume(found)
    until(again.run(), 5)
    last = lab.resumed("cut")
    assert last.progress.step == 3
    finish(last)
    assert_same(last, whole)


def test_a_finished_run_does_nothing_more(lab: Lab) -> None:
    """Neither a step nor an evaluation nor a line; the weights are the last ones."""
    whole = lab.loop("run")
    finish(whole)
    before = (whole.files.metrics).read_bytes()
    again = lab.resumed("run")
    assert finish(again) == [Finished("done", 9)]
    assert (whole.files.metrics).read_bytes() == before
    assert bits(trainable(again.model)) == bits(whole.weights)


def test_validation_changes_nothing(lab: Lab) -> None:
    """A run without validation takes the same steps to the same weights."""
    one, other = lab.loop("one"), lab.loop("other", validate=False)
    finish(one)
    finish(other)
    assert [f for f in lines(one) if "loss" in f] == lines(other)
    assert bits(one.weights) == bits(other.weights)


def test_another_seed_is_another_run(lab: Lab) -> None:
    """The comparisons above could not hold by chance: another seed gives other losses from the first step on."""
    one, other = lab.loop("one", max_steps=2, validate=False), lab.loop("other", max_steps=2, validate=False)
    other.order = type(other.order)(7, 3, seed=12)
    finish(one)
    finish(other)
    assert lines(one)[0]["loss"] != lines(other)[0]["loss"]


def test_keep_counts_checkpoints(lab: Lab) -> None:
    finish(lab.loop("run", every=2, keep=3))
    assert sorted(p.name for p in (lab.folder / "run" / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
        "step-000009",
    ]


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, list(range(1, 10))), (1e6, [9])])
def test_checkpoints_by_the_clock(lab: Lab, minutes: float, saved: list[int]) -> None:
    """Due after every step, or never before the end."""
    events = finish(lab.loop("run", every=None, minutes=minutes))
    assert [int(event.path.name[5:]) for event in events if isinstance(event, Saved)] == saved


def scripted(loop: Loop, losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses as given, one a pass."""
    coming = iter(losses)
    monkeypatch.setattr("mlx_zh.training.loop.evaluate", lambda *_: iter([(next(coming), {})]))


def test_early_stopping_by_hand(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses 5 4 4.5 3 3 3.1 with an evaluation a step and patience 2: best at step 3, no gain at 4 and 5: stop."""
    loop = lab.loop("run", eval_steps=1, early_stopping=2)
    scripted(loop, [5.0, 4.0, 4.5, 3.0, 3.0, 3.1, 0.1], monkeypatch)
    events = finish(loop)
    assert reason(events) == ("early_stopping", 5)
    assert [e.best for e in events if isinstance(e, Evaluated)] == [True, True, False, True, False, False]
    assert (loop.progress.best_loss, loop.progress.best_step) == (3.0, 3)
    saved = [e.path.name for e in events if isinstance(e, Saved)]
    assert saved[-1] == "step-000005"
    assert finish(lab.resumed("run", eval_steps=1, early_stopping=2)) == [Finished("early_stopping", 5)]


def test_a_run_that_ends_without_gain_is_done(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience runs out at the last step: nothing was left to stop, then or when it is picked up again."""
    loop = lab.loop("run", eval_steps=1, early_stopping=2, max_steps=3)
    scripted(loop, [5.0, 4.0, 4.0, 4.0], monkeypatch)
    assert reason(finish(loop)) == ("done", 3)
    again = lab.resumed("run", eval_steps=1, early_stopping=2, max_steps=3)
    assert finish(again) == [Finished("done", 3)]


def test_patience_survives_an_interruption(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation without gain before it and one after make two."""
    loop = lab.loop("run", eval_steps=1, early_stopping=2, stop_after=2)
    scripted(loop, [5.0, 4.0, 4.5], monkeypatch)
    assert reason(finish(loop)) == ("interrupted", 2)
    again = lab.resumed("run", eval_steps=1, early_stopping=2)
    scripted(again, [4.5], monkeypatch)
    assert reason(finish(again)) == ("early_stopping", 3)
    assert again.progress.best_loss == 4.0


def test_the_best_weights_are_handed_over(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses 5 6 4 4: save_best gets the weights of steps 0 and 2, of which step 0's are those before training."""
    loop = lab.loop("run", eval_steps=1, max_steps=3)
    scripted(loop, [5.0, 6.0, 4.0, 4.0], monkeypatch)
    start = bits(loop.weights)
    at: dict[int, dict[str, bytes]] = {}
    for event in loop.run():
        if isinstance(event, Stepped):
            at[event.figures["step"]] = bits(loop.weights)
    assert lab.best == [start, at[2]]
    assert lab.best[1] != at[3]


def test_a_validation_loss_that_is_no_number_is_never_the_best(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compares with NaN: taken for the best once, it would stay the best."""
    loop = lab.loop("run", eval_steps=1, max_steps=3)
    scripted(loop, [math.nan, 4.0, math.nan, 3.0], monkeypatch)
    events = finish(loop)
    assert [e.best for e in events if isinstance(e, Evaluated)] == [False, True, False, True]
    assert (loop.progress.best_loss, loop.progress.best_step, len(lab.best)) == (3.0, 3, 2)


@pytest.mark.parametrize(
    ("settings", "total", "warmup"),
    [
        ({"epochs": 1.0, "warmup_steps": None, "warmup_ratio": 0.5}, 3, 2),  # 7 examples by 3; ceil of 1.5
        ({"epochs": 0.5, "warmup_steps": 0}, 2, 0),  # ceil of 1.5 steps
        ({"epochs": 2.0, "max_steps": 100, "warmup_steps": None, "warmup_ratio": 0.05}, 100, 5),
        ({"epochs": 1.0, "batch_size": 7, "warmup_steps": None, "warmup_ratio": 0.0}, 1, 0),
    ],
)
def test_lengths_by_hand(lab: Lab, settings: dict[str, Any], total: int, warmup: int) -> None:
    loop = lab.loop("run", **settings)
    assert (loop.total, loop.warmup) == (total, warmup)


def test_a_skipped_step_is_counted_and_the_run_goes_on(lab: Lab) -> None:
    """Weights that overflow in step 2 alone: its line has its loss, its weights are those of step 1."""
    loop = lab.loop("run", max_steps=3, validate=False)
    events = loop.run()
    until(events, 1)
    good = loop.weights
    name = next(iter(good))
    loop.weights = good | {name: mx.full(good[name].shape, math.nan)}
    until(events, 2)
    assert loop.progress.skipped_steps == 1
    assert math.isnan(lines(loop)[-1]["loss"])
    loop.weights = good
    set_weights(loop.model, good)
    assert isinstance(next(events), Stepped)
    assert loop.progress.skipped_steps == 1
    assert math.isfinite(lines(loop)[-1]["loss"])
    assert int(loop.optimizer.arrays()["step"]) == 2
