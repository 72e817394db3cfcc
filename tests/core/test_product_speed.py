"""Which way a product goes is measured once for a device, and remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.core import frozen_products, product_speed
from mlx_zh.core.frozen_products import form_of
from mlx_zh.core.product_speed import layer_of, measured, remembered, smallest_rows
from mlx_zh.system import device, storage


@pytest.mark.parametrize(
    ("dense", "smallest"),
    [
        ({1024: 1.0, 512: 1.0, 256: 1.0, 128: 1.0}, 128),
        ({1024: 1.0, 512: 1.8, 256: 1.9, 128: 1.0}, 512),  # 1.9 * 1.1 > 2; fewer rows are not tried
        ({1024: 2 / 1.1, 512: 2.0, 256: 1.0, 128: 1.0}, 1024),
        ({1024: 1.9, 512: 1.0, 256: 1.0, 128: 1.0}, 0),
        ({1024: float("nan"), 512: 1.0, 256: 1.0, 128: 1.0}, 0),
    ],
)
def test_the_dense_way_must_be_clearly_faster(dense: dict[int, float], smallest: int) -> None:
    assert smallest_rows(lambda rows: (2.0, dense[rows])) == smallest


@pytest.mark.parametrize(("most", "tried"), [(1024, [1024, 512, 256, 128]), (300, [256, 128]), (100, [])])
def test_no_more_rows_are_tried_than_there_will_be(most: int, tried: list[int]) -> None:
    seen: list[int] = []

    def timed(rows: int) -> tuple[float, float]:
        seen.append(rows)
        return 2.0, 1.0

    assert smallest_rows(timed, most) == (128 if tried else 0)
    assert seen == tried


class Timer:
    """In place of seconds: the dense way is `gain` times as fast for every layer."""

    def __init__(self, gain: float) -> None:
        self.gain, self.calls = gain, 0

    def __call__(self, layer: Any, rows: int, dtype: mx.Dtype) -> tuple[float, float]:
        self.calls += 1
        return self.gain, 1.0


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Timer]:
    timer = Timer(2.0)
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setattr(product_speed, "seconds_of", timer)
    yield timer


def test_a_form_is_measured_once(timer: Timer) -> None:
    wide, narrow = layer_of(64, 128, mx.float32), layer_of(32, 128, mx.float32)
    of_wide, of_narrow = form_of(wide, mx.float32), form_of(narrow, mx.float32)
    assert measured([wide, wide], mx.float32) == {of_wide: 128}
    assert (timer.calls, remembered()) == (4, {of_wide: 128})
    timer.gain = 1.0
    assert measured([wide, narrow], mx.float32) == {of_wide: 128, of_narrow: 0}
    assert (timer.calls, remembered()) == (5, {of_wide: 128, of_narrow: 0})
    assert measured([narrow], mx.float32) == {of_narrow: 0}
    assert timer.calls == 5


def test_another_packing_or_version_is_measured_again(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer_of(64, 128, mx.float32, bits=bits, group=group) for bits, group in ((4, 64), (8, 64), (4, 32))]
    measured(layers, mx.float32)
    assert (timer.calls, len(remembered())) == (12, 3)
    monkeypatch.setattr(device, "identity", lambda: {"mlx": "9.9.9", "device": "other", "system": "1"})
    assert remembered() == {}
    measured(layers[:1], mx.float32)
    assert timer.calls == 16


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": {"a": 128}}', "rows"])
def test_a_damaged_result_is_measured_again(timer: Timer, content: str) -> None:
    layer = layer_of(64, 128, mx.float32)
    measured([layer], mx.float32)
    (file,) = (storage.cache_folder() / "products").glob("*.json")
    if content == "rows":  # numbers that nothing measured
        content = json.dumps(json.loads(file.read_text()) | {"rows": {form_of(layer, mx.float32): "1"}})
    file.write_text(content)
    assert remembered() == {}
    assert measured([layer], mx.float32) == {form_of(layer, mx.float32): 128}


def test_a_way_that_fails_is_not_taken(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that the device cannot compute, which is tried again, nor one with other numbers."""
    layer = layer_of(64, 128, mx.float32)

    def fails(*_: Any) -> Any:
        raise RuntimeError("[METAL] Insufficient Memory")

    with monkeypatch.context() as patch:
        patch.setattr(product_speed, "dense_product", fails)
        assert measured([layer], mx.float32) == {form_of(layer, mx.float32): 0}
        assert remembered() == {}
    correct = frozen_products.dense_product
    monkeypatch.setattr(product_speed, "dense_product", lambda layer, x: 1.1 * correct(layer, x))
    assert measured([layer], mx.float32) == {form_of(layer, mx.float32): 0} == remembered()
    assert timer.calls == 0


def test_both_ways_are_really_timed() -> None:
    quantized, dense = product_speed.seconds_of(layer_of(64, 128, mx.float32), 128, mx.float32)
    assert quantized > 0 and dense > 0


@given(st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4), st.integers(1, 2048))
def test_whatever_is_measured_no_product_gets_slower(gains: list[float], most: int) -> None:
    """From the smallest number of rows on, all that were tried gain clearly; one number less, they do not."""
    by_rows = dict(zip(product_speed.ROWS, gains, strict=True))
    smallest = smallest_rows(lambda rows: (by_rows[rows], 1.0), most)
    tried = [rows for rows in product_speed.ROWS if rows <= most]
    assert smallest == 0 or smallest in tried
    taken = [rows for rows in tried if smallest and rows >= smallest]
    assert all(by_rows[rows] >= 1.1 for rows in taken)
    assert len(taken) == len(tried) or by_rows[tried[len(taken)]] < 1.1
