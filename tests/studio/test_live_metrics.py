"""The curves of a live page: what is read of a growing file, how it is thinned and smoothed, and the forecast."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_zh.stages.run_folder import StageFolder
from mlx_zh.studio import live_metrics
from mlx_zh.studio.curves import smoothed, thinned
from mlx_zh.studio.live_metrics import LiveMetrics, end_of


def line(step: int, loss: float = 1.0, **more: Any) -> str:
    return json.dumps({"step": step, "epoch": step / 100, "loss": loss, "elapsed_seconds": 2.0 * step, **more}) + "\n"


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    folder = StageFolder(tmp_path / "sft")
    folder.path.mkdir()
    return folder


def test_only_whole_lines_are_read_and_the_rest_with_the_next_look(stage: StageFolder) -> None:
    metrics = LiveMetrics(stage)
    assert not metrics.read()  # there is no file yet
    whole = line(1, 3.0) + line(2, 2.0)
    stage.metrics.write_text(whole[:-9])
    assert metrics.read() and metrics.points["loss"] == [(1, 3.0)]
    stage.metrics.write_text(whole)
    assert metrics.read() and metrics.points["loss"] == [(1, 3.0), (2, 2.0)]
    assert not metrics.read()


def test_what_was_read_is_not_read_again(stage: StageFolder) -> None:
    metrics = LiveMetrics(stage)
    stage.metrics.write_text("".join(line(step) for step in range(1, 200)))
    metrics.read()
    with stage.metrics.open("r+") as file:
        file.write("x" * 100)  # the beginning, which a second reading from the start would pass over
    with stage.metrics.open("a") as file:
        file.write(line(200))
    metrics.read()
    assert [step for step, _ in metrics.points["loss"]] == list(range(1, 201))


def test_a_run_that_resumes_from_an_earlier_step_starts_the_curves_anew(stage: StageFolder) -> None:
    """The file is cut to the checkpoint's step, and may have grown past its old length before the next look."""
    metrics = LiveMetrics(stage)
    stage.metrics.write_text("".join(line(step, 9.0) for step in range(1, 20)))
    metrics.read()
    stage.metrics.write_text("".join(line(step, 1.0 if step > 10 else 9.0) for step in range(1, 40)))
    metrics.read()
    assert metrics.points["loss"] == [(step, 1.0 if step > 10 else 9.0) for step in range(1, 40)]


def test_damaged_lines_and_what_is_no_number_are_passed_over(stage: StageFolder) -> None:
    stage.metrics.write_text('{"step": 1, "loss": NaN}\nnonsense\n[1]\n{"loss": 2}\n{"step": "3"}\n\n' + line(4, 0.5))
    metrics = LiveMetrics(stage)
    metrics.read()
    assert metrics.points["loss"] == [(4, 0.5)]


def test_a_link_to_another_file_is_not_read(stage: StageFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(line(1))
    stage.metrics.symlink_to(tmp_path / "secret")
    metrics = LiveMetrics(stage)
    assert not metrics.read() and not metrics.points


def test_the_forecast_is_of_the_last_steps_pace(stage: StageFolder) -> None:
    """200 steps in 2 epochs of 100; at step 150 each takes 2 s, so 50 steps take 100 s."""
    stage.metrics.write_text("".join(line(step) for step in range(1, 151)))
    stage.settings.write_text(json.dumps({"sft": {"epochs": 2.0, "max_steps": None}}))
    metrics = LiveMetrics(stage)
    metrics.read()
    assert metrics.total_steps() == 200
    assert metrics.seconds_left() == 100.0
    assert end_of(100.0, written=1000.0, now=1010.0) == 1100.0
    assert end_of(100.0, written=1000.0, now=1200.0) == 1200.0  # late: at the earliest now
    stage.settings.write_text(json.dumps({"sft": {"epochs": 2.0, "max_steps": 160}}))
    assert metrics.seconds_left() == 20.0


@pytest.mark.parametrize("settings", ["", "[]", "{}", '{"sft": 1}', '{"sft": {"epochs": "x", "max_steps": null}}'])
def test_without_usable_settings_there_is_no_forecast(stage: StageFolder, settings: str) -> None:
    stage.metrics.write_text(line(1) + line(2))
    stage.settings.write_text(settings)
    metrics = LiveMetrics(stage)
    metrics.read()
    assert metrics.total_steps() is None and metrics.seconds_left() is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_ends_and_its_peaks(heights: list[float], most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(heights)]
    kept = thinned(points, most)
    assert len(kept) <= max(most, 1) and set(kept) <= set(points)
    assert kept == sorted(kept) and kept[0] == points[0] and kept[-1] == points[-1]
    assert {min(heights), max(heights)} <= {y for _, y in kept}


def test_a_constant_stays_a_constant_when_smoothed() -> None:
    points = [(float(x), 3.0) for x in range(1000)]
    assert [y for _, y in smoothed(points)] == pytest.approx([3.0] * 1000)


def test_a_step_is_followed_at_the_pace_of_the_average() -> None:
    """100 points: a span of 5, so the weight is 4/5. After the jump the distance shrinks to 4/5 at each point."""
    points = [(float(x), 0.0 if x < 50 else 1.0) for x in range(100)]
    after = [y for _, y in smoothed(points)][50:60]
    assert after == pytest.approx([1 - 0.8 ** (n + 1) for n in range(10)], abs=1e-4)


def test_few_points_are_not_smoothed() -> None:
    points = [(float(x), float(x % 3)) for x in range(39)]
    assert smoothed(points) == points


KEYS = st.sampled_from(["step", "loss", "epoch", "epochs", "max_steps", "elapsed_seconds", "eval_loss"])
NUMBERS = st.integers(-3, 10**307) | st.floats() | st.sampled_from([True, None, "1", [], {}])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.dictionaries(KEYS, NUMBERS), max_size=4), own=st.dictionaries(KEYS, NUMBERS))
def test_any_line_and_any_settings_are_read(stage: StageFolder, lines: list[Any], own: dict[str, Any]) -> None:
    stage.metrics.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    stage.settings.write_text(json.dumps({"sft": own}), encoding="utf-8")
    metrics = LiveMetrics(stage)
    metrics.read()
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.last.values())
    left = metrics.seconds_left()
    assert left is None or 0 <= left < 1e9


def test_a_large_file_is_read_in_blocks_and_its_curves_are_thinned(
    stage: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_metrics, "_BLOCK", 1000)
    monkeypatch.setattr(live_metrics, "_MOST", 50)
    text = "".join(line(step, loss=99.0 if step == 170 else 1.0) for step in range(1, 301))
    stage.metrics.write_text(text + "x" * 2500 + "\n" + line(301), encoding="utf-8")
    metrics, looks = LiveMetrics(stage), 0
    while metrics.read():
        looks += 1
    assert looks == pytest.approx(len(text) / 1000 + 3, abs=len(text) / 10_000 + 2)
    assert metrics.last["step"] == 301
    losses = metrics.points["loss"]
    assert len(losses) <= 100 and losses[-1] == (301, 1.0) and losses[0] == (1, 1.0)
    assert (170, 99.0) in losses
    assert [step for step, _ in losses] == sorted({step for step, _ in losses})
