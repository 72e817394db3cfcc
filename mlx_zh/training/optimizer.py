"""AdamW over named arrays, the global norm of gradients, and learning-rate schedules."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim

Arrays = dict[str, mx.array]


class GroupedAdamW:
    """MLX's AdamW (arXiv:1711.05101) with bias correction. Only matrices decay, not vectors.

    `loraplus_ratio` multiplies the learning rate of LoRA's B matrices (LoRA+, arXiv:2402.12354). `arrays` returns the
    whole state, which a resumed run needs.
    """

    def __init__(
        self, weights: Arrays, *, weight_decay: float, betas: tuple[float, float], loraplus_ratio: float = 1.0
    ) -> None:
        groups: dict[tuple[float, float], Arrays] = {}
        for name, array in weights.items():
            ratio = loraplus_ratio if name.endswith("lora_b") else 1.0
            decay = weight_decay if array.ndim >= 2 else 0.0
            groups.setdefault((ratio, decay), {})[name] = array
        self._groups = []
        for (ratio, decay), members in groups.items():
            adamw = optim.AdamW(0.0, betas=list(betas), eps=1e-8, weight_decay=decay, bias_correction=True)
            adamw.init(members)
            self._groups.append((ratio, list(members), adamw))

    def update(self, weights: Arrays, gradients: Arrays, learning_rate: float) -> Arrays:
        """The weights after one step. All names of `weights` must be in `gradients`."""
        updated: Arrays = {}
        for ratio, names, adamw in self._groups:
            adamw.learning_rate = learning_rate * ratio
            updated |= adamw.apply_gradients({n: gradients[n] for n in names}, {n: weights[n] for n in names})
        return {name: updated[name] for name in weights}

    def arrays(self) -> Arrays:
        """The state by name: the step count, and both moments of every weight."""
        state: Arrays = {"step": self._groups[0][2].state["step"]}
        for _, names, adamw in self._groups:
            for name in names:
                state |= {f"{moment}:{name}": array for moment, array in adamw.state[name].items()}
        return state

    def load(self, arrays: Arrays) -> None:
        """Restore the state that `arrays` returned."""
        for _, names, adamw in self._groups:
            adamw.state["step"] = arrays["step"]
            for name in names:
                adamw.state[name] = {moment: arrays[f"{moment}:{name}"] for moment in ("m", "v")}


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32."""
    return mx.sqrt(mx.stack([mx.square(g.astype(mx.float32)).sum() for g in gradients.values()]).sum())


def learning_rate(step: int, total: int, *, peak: float, kind: str, warmup: int) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    Over the `warmup` steps the rate rises linearly to `peak`; no step has rate 0. After that, `cosine` and `linear`
    fall towards 0 over the remaining steps, like the schedules of the same names in Transformers.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(total - warmup, 1)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
