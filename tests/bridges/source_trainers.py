"""How the original trainers count steps and set learning rates, from their own definitions.

transformers' Trainer: the data loader gives ceil(rows / rows of a device / devices) batches; each
gradient_accumulation_steps of them, and what remains of them at the end of an epoch, are a step. Its schedules are
multipliers of the step: step / warm-up while that is below 1, then 1 - progress, or half a cosine.
mlx-lm: an optimizer step every grad_accumulation_steps iterations, and MLX's own schedules.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.optimizers as optim


def trainer_steps(
    rows: int, per_device: int, accumulation: int, devices: int = 1, epochs: float = 3.0, max_steps: int = -1
) -> int:
    if max_steps > 0:
        return max_steps
    batches = math.ceil(math.ceil(rows / per_device) / devices)
    updates = batches // accumulation + (batches % accumulation > 0)
    return math.ceil(epochs * max(updates, 1))


def trainer_rates(
    steps: int, peak: float, kind: str, warmup_ratio: float = 0.0, warmup_steps: int = 0
) -> list[float]:
    warmup = warmup_steps if warmup_steps > 0 else math.ceil(steps * warmup_ratio)

    def factor(step: int) -> float:
        if kind == "constant":
            return 1.0
        if step < warmup:
            return step / max(1, warmup)
        if kind == "constant_with_warmup":
            return 1.0
        if kind == "linear":
            return max(0.0, (steps - step) / max(1, steps - warmup))
        progress = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    return [peak * factor(step) for step in range(steps)]


def mlx_rates(iterations: int, accumulation: int, schedule: dict[str, Any] | None, peak: float) -> list[float]:
    """The learning rate that MLX's optimizer uses at each of its updates."""
    steps = iterations // accumulation
    if schedule is None:
        return [peak] * steps
    function = getattr(optim.schedulers, schedule["name"])(*schedule["arguments"])
    if warmup := schedule.get("warmup", 0):
        rise = optim.linear_schedule(schedule.get("warmup_init", 0.0), schedule["arguments"][0], warmup)
        function = optim.join_schedules([rise, function], [warmup + 1])
    import mlx.core as mx

    return [float(function(mx.array(step))) for step in range(steps)]
