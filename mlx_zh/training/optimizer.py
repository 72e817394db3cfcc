"""AdamW over named arrays, the global norm of gradients, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim

from mlx_zh.core.sums import total
from mlx_zh.errors import DeviceError
from mlx_zh.system.accelerator import REPEATS, AcceleratorError, advice, cause, repeated

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

    def update(
        self, weights: Arrays, gradients: Arrays, learning_rate: float, scale: mx.array | None = None
    ) -> Arrays:
        """The weights after one step, computed; `gradients` are multiplied by `scale` first.

        All names of `weights` must be in `gradients`, which is emptied, so that each is freed after its use. The
        update is computed part by part, and a part that the accelerator gives up is done again, so that old moments
        are kept for one part only. Raises DeviceError when a part is given up again and again; weights and moments
        must then be read from a checkpoint.
        """
        updated: Arrays = {}
        for ratio, names, adamw in self._groups:
            step = adamw.state["step"]
            for part in _parts(names, weights):
                work = partial(_update_part, adamw, part, step, weights, gradients, learning_rate * ratio, scale)
                try:
                    updated |= repeated(work)
                except AcceleratorError as error:
                    raise DeviceError(
                        f"the update of the weights failed {REPEATS + 1} times in a row: {cause(error.fault)}. "
                        f"{advice(error.fault)} Then run the same command again; it goes on after its newest "
                        "checkpoint."
                    ) from error
                for name in part:
                    del gradients[name]
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


def _parts(names: Sequence[str], weights: Arrays) -> Iterator[list[str]]:
    """The names in parts of about `_PART_BYTES` of weights."""
    part: list[str] = []
    size = 0
    for name in names:
        part.append(name)
        size += weights[name].nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


_PART_BYTES = 2**22


def _update_part(
    adamw: optim.AdamW,
    names: Sequence[str],
    step: mx.array,
    weights: Arrays,
    gradients: Arrays,
    learning_rate: float,
    scale: mx.array | None,
) -> Arrays:
    """The new weights of one part, computed from `step`; the part's moments stay as they are if that fails."""
    before = {name: dict(adamw.state[name]) for name in names}
    adamw.state["step"], adamw.learning_rate = step, learning_rate
    given = {name: gradients[name] if scale is None else gradients[name] * scale for name in names}
    try:
        updated: Arrays = adamw.apply_gradients(given, {name: weights[name] for name in names})
        mx.eval(updated, [adamw.state[name] for name in names], adamw.state["step"])
    except RuntimeError:
        for name in names:
            adamw.state[name] = before[name]
        raise
    return updated


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32."""
    return mx.sqrt(mx.stack([total(mx.square(g.astype(mx.float32))) for g in gradients.values()]).sum())


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
