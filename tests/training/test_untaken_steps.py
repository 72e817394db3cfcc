"""Steps that cannot be taken: out of memory, and losses or gradients that are NaN or infinite."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from lab import VALIDATION, Lab, Make, bits, finish, lines, reason, until
from objectives import sft
from oracles import moved_apart
from tolerances import LOSS, MOVED, later_loss

from mlx_zh.errors import PlanError, TrainingError
from mlx_zh.system.device import Fault
from mlx_zh.training.loop import Event, Loop, Shortened, Stepped
from mlx_zh.training.objective import Row, Sums
from mlx_zh.training.sft_objective import SftObjective

METAL = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)


@pytest.fixture
def lab(tiny_model: Make, tmp_path: Path) -> Lab:
    return Lab(tiny_model, tmp_path)


class Tight(SftObjective):
    """On a machine that has no room for rows of more than `most` tokens."""

    most = 1000
    error = METAL

    def share(self, model: Any, row: Row) -> tuple[mx.array, Sums]:
        found = super().share(model, row)
        if row.batch.tokens.size > self.most:
            mx.eval(found)  # the work was begun
            raise RuntimeError(self.error)
        return found


class Spoiled(SftObjective):
    """The loss of the examples `bad` is not a number; validation's are all good."""

    bad: frozenset[int] = frozenset()

    def share(self, model: Any, row: Row) -> tuple[mx.array, Sums]:
        share, sums = super().share(model, row)
        return (share * math.nan if row.training and self.bad & set(row.examples) else share), sums


def tight(most: int, **changes: Any) -> type[Tight]:
    return type("Tight", (Tight,), {"most": most, **changes})


def spoiled(*bad: int) -> type[Spoiled]:
    return type("Spoiled", (Spoiled,), {"bad": frozenset(bad)})


def run(loop: Loop) -> tuple[list[Event], str]:
    """Its events until it ended or raised, and what it said then."""
    events: list[Event] = []
    try:
        for event in loop.run():
            events.append(event)
    except (PlanError, TrainingError) as error:
        return events, str(error)
    return events, ""


def conversations_of(objective: type[SftObjective]) -> SftObjective:
    return sft(VALIDATION, objective, micro_tokens=16)


def steps(events: list[Event]) -> list[int]:
    return [event.figures["step"] for event in events if isinstance(event, Stepped)]


# Memory


def same_run(one: Loop, other: Loop, *, relative: float) -> None:
    """The same lines and weights, up to rounding."""
    for found, expected in zip(lines(one), lines(other), strict=True):
        assert found == pytest.approx(expected, rel=relative)
    assert moved_apart(one.weights, other.weights) < MOVED


@pytest.mark.numeric
@pytest.mark.parametrize("most", [29, 22])
def test_a_step_that_ran_out_of_memory_is_taken_in_shorter_rows(lab: Lab, most: int) -> None:
    """Rows of up to 30 tokens do not fit; those of half as many do, and so does the longest example, of 21."""
    whole, cut = lab.loop("whole"), lab.loop("cut", objective=tight(most))
    finish(whole)
    events, error = run(cut)
    assert error == "" and steps(events) == list(range(1, 10))
    told = [event for event in events if isinstance(event, Shortened)]
    assert [event.work.split()[0] for event in told] == ["step"]
    assert told[0].micro_tokens == cut.objective.settings.micro_tokens <= 15
    # Nine steps; B's learning rate is 4 times 5e-3.
    weights = sum(array.size for array in whole.weights.values())
    same_run(cut, whole, relative=later_loss(rate=0.02, weights=weights, steps=9))


@pytest.mark.numeric
def test_a_validation_pass_that_ran_out_of_memory_is_taken_in_shorter_rows(lab: Lab) -> None:
    """8, 11 and 5 tokens in rows of up to 16: the largest row has 16, and half of that fits."""
    whole, cut = lab.loop("whole"), lab.loop("cut")
    cut.validation = conversations_of(tight(12))
    finish(whole)
    events, error = run(cut)
    told = [event for event in events if isinstance(event, Shortened)]
    assert (error, told) == ("", [Shortened("validation", 8, Fault("memory", METAL))])
    same_run(cut, whole, relative=LOSS)


def test_a_step_that_nothing_can_cut_is_told(lab: Lab) -> None:
    """The example of 21 tokens needs more than there is; what was done before it stays, and nothing after it is."""
    events, error = run(lab.loop("run", objective=tight(20), validate=False))
    first = next(n for n, step in enumerate(lab.loop("other").order.step(n) for n in range(3)) if 3 in step)
    assert steps(events) == list(range(1, first + 1))
    assert error.startswith(f"step {first + 1} does not fit into memory, not even one example at a time")
    assert "(the longest has 21 tokens). Set memory.checkpoint_layers: true" in error


def test_other_errors_are_not_taken_for_it(lab: Lab) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run(lab.loop("run", objective=tight(20, error="[matmul] shapes (2,3) and (4,5)")))


# Numbers


def skipped(loop: Loop) -> list[dict[str, Any]]:
    path = loop.files.skipped
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_step_whose_loss_is_no_number_is_skipped_and_its_examples_are_kept(lab: Lab) -> None:
    """Example 4 spoils a step of each epoch. An example's steps are known beforehand: order is a function of seed."""
    loop = lab.loop("run", objective=spoiled(4), validate=False)
    bad = [n + 1 for n in range(9) if 4 in loop.order.step(n)]
    assert len(bad) == 3
    before = bits(loop.weights)
    for event in loop.run():
        if isinstance(event, Stepped):
            now = bits(loop.weights)
            assert (now == before) == (event.figures["step"] in bad)
            before = now
    assert loop.progress.skipped_steps == 3
    assert [line["step"] for line in lines(loop) if "skipped_examples" in line] == bad
    found = skipped(loop)
    assert [line["step"] for line in found] == bad
    assert [line["examples"] for line in found] == [loop.order.step(n - 1).tolist() for n in bad]
    assert all(math.isnan(line["loss"]) and math.isnan(line["grad_norm"]) for line in found)


@pytest.mark.parametrize("killed_after", [4, 5, 7, 8])
def test_skipped_steps_are_the_same_after_a_kill(lab: Lab, killed_after: int) -> None:
    """Those that the resumed run takes again stand once, and the count is that of the undisturbed run."""
    whole = lab.loop("whole", objective=spoiled(4))
    finish(whole)
    cut = lab.loop("cut", objective=spoiled(4))
    until(cut.run(), killed_after)
    again = lab.resumed("cut", objective=spoiled(4))
    finish(again)
    assert repr(lines(again)) == repr(lines(whole))  # NaN is unlike itself
    assert bits(again.weights) == bits(whole.weights)
    assert again.progress.skipped_steps == whole.progress.skipped_steps == 3
    assert repr(skipped(again)) == repr(skipped(whole))


def test_a_run_without_skipped_steps_has_no_file_of_them(lab: Lab) -> None:
    """Also when an earlier run that left no checkpoint had one."""
    loop = lab.loop("run", max_steps=2)
    loop.files.skipped.parent.mkdir()
    (loop.files.skipped).write_text("{}\n")
    finish(loop)
    assert not (loop.files.skipped).exists()


def test_too_many_skipped_steps_in_a_row_end_the_run(lab: Lab) -> None:
    """All are bad from the start: two are tried, named, and nothing is saved."""
    loop = lab.loop("run", objective=spoiled(*range(7)), validate=False, max_skipped_steps=2, every=1)
    events, error = run(loop)
    assert steps(events) == [1, 2]
    assert error.startswith("2 steps in a row, up to step 2, were skipped")
    named = ", ".join(str(e) for n in (0, 1) for e in loop.order.step(n))
    assert f"training data: {named}; {loop.files.skipped} has them" in error
    assert [path.name for path in (loop.files.checkpoints).glob("step-*")] == ["step-000001"]


def test_the_count_in_a_row_survives_a_kill(lab: Lab) -> None:
    """Killed after the first bad step, the second still ends the run, at the same step as if undisturbed."""
    settings = {"objective": spoiled(*range(7)), "validate": False, "max_skipped_steps": 3, "every": 1}
    until(lab.loop("run", **settings).run(), 2)
    events, error = run(lab.resumed("run", **settings))
    assert steps(events) == [2, 3] and error.startswith("3 steps in a row, up to step 3, were skipped")


def test_a_good_step_between_starts_the_count_anew(lab: Lab) -> None:
    loop = lab.loop("run", objective=spoiled(4), validate=False, max_skipped_steps=2)
    bad = [n for n in range(9) if 4 in loop.order.step(n)]
    assert all(later - earlier > 1 for earlier, later in pairwise(bad))
    assert reason(finish(loop)) == ("done", 9)


def test_a_run_that_took_no_step_at_all_has_not_succeeded(lab: Lab) -> None:
    loop = lab.loop("run", objective=spoiled(*range(7)), validate=False, max_steps=2)
    events, error = run(loop)
    assert steps(events) == [1, 2] and error.startswith("every step was skipped, 2 in all, because")
