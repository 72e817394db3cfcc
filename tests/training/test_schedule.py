"""Learning rates by hand and against the formulas that PyTorch's schedulers are given."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest

from mlx_zh.training.schedule import learning_rate


def rates(total: int, **settings: Any) -> list[float]:
    return [learning_rate(step, total, **settings) for step in range(total)]


def test_linear_by_hand() -> None:
    """Peak 6, 2 steps of warm-up out of 5: 3, 6, then 6 (1 - 0/3), 6 (1 - 1/3), 6 (1 - 2/3)."""
    assert rates(5, peak=6.0, kind="linear", warmup=2) == pytest.approx([3, 6, 6, 4, 2])


def test_cosine_by_hand() -> None:
    """Peak 4, 1 step of warm-up out of 5, then 2 (1 + cos(k pi / 4)): 4, 2 + sqrt 2, 2, 2 - sqrt 2."""
    expected = [4, 4, 2 + math.sqrt(2), 2, 2 - math.sqrt(2)]
    assert rates(5, peak=4.0, kind="cosine", warmup=1) == pytest.approx(expected)


def test_constant_by_hand() -> None:
    assert rates(4, peak=2.0, kind="constant", warmup=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(3, peak=2.0, kind="constant", warmup=0) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10, 50])
def test_no_step_is_spent_at_zero(kind: str, warmup: int) -> None:
    """Transformers' and PyTorch's warm-ups begin with a step at 0, which costs a batch and learns nothing."""
    assert all(0 < rate <= 1.0 for rate in rates(10, peak=1.0, kind=kind, warmup=warmup))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_one_step_and_none_left_after_warmup(kind: str) -> None:
    assert rates(1, peak=3.0, kind=kind, warmup=0) == [3.0]
    assert rates(4, peak=4.0, kind=kind, warmup=4) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 4), (101, 7)])
def test_after_warmup_equals_transformers_through_pytorch(kind: str, total: int, warmup: int) -> None:
    """Transformers' schedules of these names, stepped by PyTorch's LambdaLR."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch wants an optimizer step in between
            scheduler.step()
    ours = rates(total, peak=1e-3, kind=kind, warmup=warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
