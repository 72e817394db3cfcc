"""Steps and validations that the accelerator gives up: done again, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from lab import Lab, Make, assert_same, bits, finish, lines, until
from metal_messages import IGNORED, PREFIX, VICTIM, WATCHDOG
from oracles import moved_apart
from tolerances import MOVED, later_loss

from mlx_zh.errors import DeviceError
from mlx_zh.system.accelerator import REPEATS
from mlx_zh.training import step
from mlx_zh.training.loop import Event, Loop, Repeated, Saved, Shortened, Stepped
from mlx_zh.training.objective import Row, Sums
from mlx_zh.training.sft_objective import SftObjective

PAGE_FAULT = PREFIX + "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)."


@pytest.fixture
def lab(tiny_model: Make, tmp_path: Any) -> Lab:
    return Lab(tiny_model, tmp_path)


class Failing:
    """Stands for `mx.eval`, or for an objective's `share`: the calls numbered `bad` (from 1) fail with `message`."""

    def __init__(self, function: Callable[..., Any], message: str, bad: range) -> None:
        self.function, self.message, self.bad, self.calls = function, message, bad, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls in self.bad:
            raise RuntimeError(self.message)
        return self.function(*arguments, **named)


def fail_in(monkeypatch: pytest.MonkeyPatch, place: str, loop: Loop, message: str, bad: range) -> Failing:
    """Let the loop's forward pass, its evaluation of a row's gradients, or its update fail."""
    if place == "forward":
        failing = Failing(loop.objective.share, message, bad)
        monkeypatch.setattr(loop.objective, "share", failing)
    elif place == "backward":
        gradients = step.loss_and_gradients

        def late(*arguments: Any) -> Any:
            found = gradients(*arguments)
            return failing(found)

        failing = Failing(lambda found: found, message, bad)
        monkeypatch.setattr(step, "loss_and_gradients", late)
    else:
        from mlx_zh.training import optimizer

        failing = Failing(optimizer._update_part, message, bad)
        monkeypatch.setattr(optimizer, "_update_part", failing)
    return failing


def events_of(loop: Loop) -> tuple[list[Event], str]:
    events: list[Event] = []
    try:
        for event in loop.run():
            events.append(event)
    except DeviceError as error:
        return events, str(error)
    return events, ""


@pytest.mark.parametrize("message", [VICTIM, IGNORED, PAGE_FAULT])
@pytest.mark.parametrize("place", ["forward", "backward", "update"])
def test_a_step_that_was_given_up_by_chance_is_taken_again_bit_for_bit(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    """Noise, order and moments are those of an undisturbed run."""
    whole, cut = lab.loop("whole"), lab.loop("cut")
    finish(whole)
    failing = fail_in(monkeypatch, place, cut, message, range(5, 6))
    events, error = events_of(cut)
    assert error == "" and failing.calls > 5
    repeated = [event for event in events if isinstance(event, Repeated)]
    assert [event.fault.message for event in repeated] == ([] if place == "update" else [message])
    assert not any(isinstance(event, Shortened) for event in events)
    assert_same(cut, whole)


def test_an_update_that_fails_half_way_is_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each array is a part; twice `mx.eval` fails in a part of the second step, after its graph was built."""
    from mlx_zh.training import optimizer

    whole, cut = lab.loop("whole"), lab.loop("cut")
    finish(whole)
    monkeypatch.setattr(optimizer, "_PART_BYTES", 1)
    evaluate, parts = mx.eval, len(cut.weights)

    def update(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "eval", failing)
            return real(*arguments)

    failing = Failing(evaluate, WATCHDOG, range(parts + 2, parts + 4))
    real = optimizer._update_part
    monkeypatch.setattr(optimizer, "_update_part", update)
    assert events_of(cut)[1] == ""
    assert failing.calls == 9 * parts + 2
    assert_same(cut, whole)


class Watched(SftObjective):
    """Rows of more than `most` tokens keep the screen waiting."""

    most = 1000

    def share(self, model: Any, row: Row) -> tuple[mx.array, Sums]:
        if row.batch.tokens.size > self.most:
            raise RuntimeError(WATCHDOG)
        return super().share(model, row)


def watched(most: int) -> type[Watched]:
    return type("Watched", (Watched,), {"most": most})


def shortened(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.work, event.micro_tokens) for event in events if isinstance(event, Shortened)]


def close_to(one: Loop, other: Loop) -> None:
    """The same lines and weights as with longer rows, up to rounding; nine steps at four times 5e-3."""
    weights = sum(array.size for array in other.weights.values())
    limit = later_loss(rate=0.02, weights=weights, steps=9)
    for left, right in zip(lines(one), lines(other), strict=True):
        assert left == pytest.approx(right, rel=limit)
    assert moved_apart(one.weights, other.weights) < MOVED


@pytest.mark.numeric
def test_work_that_kept_the_screen_waiting_is_done_again_in_shorter_rows(lab: Lab) -> None:
    """Rows of 30 tokens are stopped; those of 15 and the longest example, of 21 tokens, are not."""
    whole, cut = lab.loop("whole"), lab.loop("cut", objective=watched(22))
    finish(whole)
    events, error = events_of(cut)
    assert error == ""
    [(work, micro_tokens)] = shortened(events)
    assert work.startswith("step ") and micro_tokens <= 15
    assert cut.progress.row_limits == {"asked": 30, "training": micro_tokens}
    close_to(cut, whole)


def test_a_resumed_run_keeps_its_rows_short(lab: Lab) -> None:
    """What it was told before the kill is not told again."""
    cut = lab.loop("cut", objective=watched(22), every=1)
    until(cut.run(), 5)
    limit = cut.progress.row_limits["training"]
    again = lab.resumed("cut", objective=watched(22), every=1)
    events, error = events_of(again)
    assert error == "" and shortened(events) == []
    assert again.objective.settings.micro_tokens == limit


def test_a_recipe_that_asks_for_other_rows_gets_them(lab: Lab) -> None:
    cut = lab.loop("cut", objective=watched(22), every=1)
    until(cut.run(), 5)
    again = lab.resumed("cut", every=1)
    again.micro_tokens = 29  # the recipe's new value
    finish(again)
    assert again.objective.settings.micro_tokens == 30 and again.progress.row_limits == {}


def test_a_single_example_that_keeps_the_screen_waiting_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one example cannot be cut; the screen may go to sleep."""
    loop = lab.loop("run", validate=False)
    whole = lab.loop("whole", validate=False)
    for run in (loop, whole):
        run.objective.settings = type(run.objective.settings)(seed=3, micro_tokens=1, dropout=0.2)
    finish(whole)
    fail_in(monkeypatch, "forward", loop, WATCHDOG, range(4, 4 + REPEATS))
    events, error = events_of(loop)
    assert error == "" and shortened(events) == []
    assert sum(isinstance(event, Repeated) for event in events) == REPEATS
    assert_same(loop, whole)


@pytest.mark.parametrize("message", [VICTIM, IGNORED])
def test_a_run_that_cannot_go_on_is_saved_and_says_so(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """From the fifth step on every try fails. The four steps are saved, and the resumed run ends undisturbed."""
    whole, cut = lab.loop("whole"), lab.loop("cut")
    finish(whole)
    with monkeypatch.context() as patch:
        fail_in(patch, "backward", cut, message, range(5, 1000))
        events, error = events_of(cut)
    assert sum(isinstance(event, Stepped) for event in events) == 4
    assert error.startswith(f"step 5 failed {REPEATS + 1} times in a row: ")
    assert "Everything up to step 4 is saved." in error and error.endswith(
        "run the same command again; it goes on from there."
    )
    again = lab.resumed("cut")
    assert again.progress.step == 4
    finish(again)
    assert_same(again, whole)


def test_a_validation_that_cannot_go_on_is_taken_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations of two rows come before step 1 and after steps 4, 8 and 9; that after step 4 is given up."""
    whole, cut = lab.loop("whole"), lab.loop("cut")
    finish(whole)
    assert cut.validation is not None
    with monkeypatch.context() as patch:
        patch.setattr(cut.validation, "share", Failing(cut.validation.share, IGNORED, range(4, 1000)))
        events, error = events_of(cut)
    assert error.startswith("validation failed ") and "up to step 4 is saved" in error
    assert not any(isinstance(event, Saved) and event.path.name == "step-000004" for event in events)
    again = lab.resumed("cut")
    assert (again.progress.step, again.progress.evaluated_at) == (4, 0)
    finish(again)
    assert_same(again, whole)


def test_nothing_is_saved_before_the_first_step(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = lab.loop("run", validate=False)
    fail_in(monkeypatch, "forward", loop, VICTIM, range(1, 1000))
    before = bits(loop.weights)
    events, error = events_of(loop)
    assert "No step has been taken yet." in error and bits(loop.weights) == before
    assert not loop.files.checkpoints.exists() and all(isinstance(event, Repeated) for event in events)


@pytest.fixture(autouse=True)
def late_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on Metal: work that was under way fails after the first error, and that is raised once at the next call."""
    synchronize, pending = mx.synchronize, [True]

    def once() -> None:
        if pending.pop() if pending else False:
            raise RuntimeError(VICTIM)
        synchronize()

    monkeypatch.setattr(mx, "synchronize", once)
    yield
