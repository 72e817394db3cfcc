"""AdamW over named arrays, and the global norm of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim

from mlx_zh.core.sums import total
from mlx_zh.errors import DeviceError
from mlx_zh.system import device
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
        self._rules = [_rule(adamw) for _, _, adamw in self._groups]

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
        for (ratio, names, adamw), rule in zip(self._groups, self._rules, strict=True):
            adamw.state["step"] = adamw.state["step"] + 1
            adamw.learning_rate = learning_rate * ratio
            for part in _parts(names, weights):
                work = partial(_update_part, adamw, rule, part, weights, gradients, scale)
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


# New weight and both moments from (step, learning rate, factor of the gradient, gradient, weight, both moments).
Rule = Callable[..., tuple[mx.array, mx.array, mx.array]]


def _rule(adamw: optim.AdamW) -> Rule:
    """The update of one array. On a GPU it is one kernel, because 15 small ones cost more than their work."""
    own = copy(adamw)  # compiling puts traced arrays into its state

    def update(
        step: mx.array,
        rate: mx.array,
        scale: mx.array | None,
        gradient: mx.array,
        weight: mx.array,
        first: mx.array,
        second: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        own.state = {"step": step, "learning_rate": rate}
        moments = {"m": first, "v": second}
        weight = own.apply_single(gradient if scale is None else gradient * scale, weight, moments)
        return weight, moments["m"], moments["v"]

    if not device.compiles():
        return update
    compiled: Rule = mx.compile(update, shapeless=True)
    one = mx.array(1.0)
    return lambda step, rate, scale, *arrays: compiled(step, rate, one if scale is None else scale, *arrays)


def _update_part(
    adamw: optim.AdamW, rule: Rule, names: Sequence[str], weights: Arrays, gradients: Arrays, scale: mx.array | None
) -> Arrays:
    """The new weights of one part; the part's moments stay as they are if that fails."""
    step, rate = adamw.state["step"], adamw.state["learning_rate"]
    new = {}
    for name in names:
        moments = adamw.state[name]
        new[name] = rule(step, rate, scale, gradients[name], weights[name], moments["m"], moments["v"])
    mx.eval(new, step)
    for name, (_, first, second) in new.items():
        adamw.state[name] = {"m": first, "v": second}
    return {name: weight for name, (weight, _, _) in new.items()}


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32."""
    return mx.sqrt(mx.stack([total(mx.square(g.astype(mx.float32))) for g in gradients.values()]).sum())
