"""Apple's chips, and the speed that their published figures let expect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

import yaml

from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.flops import training_flops
from mlx_zh.planning.memory import trained_values, weight_bytes
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.shapes import ModelShape, Target

# Share of a GPU's peak that is reached.
#
# Training. M1 Max, an 8B model in 4 bits with adapters on all layers, packed rows: 99 tokens/s published, 0.27 of the
# peak by `training_flops`. The M1 has no bfloat16 units: a quantized product takes 1.78 times as long there as in
# float16 (30.6 ms and 17.2 ms, ml-explore/mlx#4216), so later chips would reach 0.48. mlx-lm publishes 250 tokens/s
# on an M1 Max (4 layers trained) and 475 on an M2 Ultra (16 layers, both float16, its LORA.md): 0.39 and 0.35, with
# padding. 0.40 is assumed for later chips.
# Forward. The M4 needs 36 s for a prompt of 4,096 tokens and a 14B model in 4 bits (Apple, machinelearning.apple.com,
# "Exploring LLMs with MLX and the Neural Accelerators in the M5 GPU"): 0.9. 0.65 is assumed for rows of hundreds of
# tokens, and 0.4 on the M1.
# M5. Its neural accelerators made the same prompt up to 4 times as fast as on an M4. 3 is assumed there, and 2 in
# training, where other work than matrix products takes a larger share.
_TRAINING = {1: 0.27, 2: 0.40, 3: 0.40, 4: 0.40, 5: 0.80}
_FORWARD = {1: 0.40, 2: 0.65, 3: 0.65, 4: 0.65, 5: 1.95}
_GENERATION = 0.7  # share of the bandwidth that is reached when tokens are generated one by one
_FLOPS_PER_CORE = 256  # a clock: 128 multiplications and as many additions


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip: GPU cores, their clock, bandwidth in GB/s, and the memory sizes sold in GB."""

    name: str
    cores: int
    gigahertz: float
    bandwidth: float
    memory: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Peak floating-point operations per second of the GPU, float32."""
        return self.cores * _FLOPS_PER_CORE * self.gigahertz * 1e9

    @property
    def generation(self) -> int:
        """1 for M1, 2 for M2, and so on."""
        return int(self.name[1])


@cache
def chips() -> Mapping[str, Chip]:
    """All known chips by name, such as `M2 Pro`."""
    table = yaml.safe_load(files(__package__).joinpath("chips.yaml").read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: Chip(name, **row | {"memory": tuple(row["memory"])}) for name, row in table.items()}
    )


def chip_named(text: str) -> Chip | None:
    """The chip that `text` names, as `m2 pro`, `M2Pro` or `Apple M2 Pro`; None for an unknown one."""
    wanted = re.sub(r"^apple|[\s_-]", "", text.strip().lower())
    return next((chip for name, chip in chips().items() if name.replace(" ", "").lower() == wanted), None)


def predicted_pace(
    chip: Chip, model: ModelShape, trained: AdapterSpec, target: Target, *, again: float, scored: float
) -> Pace:
    """The pace that `chip` is expected to have. `scored` is the share of SFT's tokens that are scored.

    `again` is the share of the blocks' forward passes that the backward pass repeats.
    """
    peak = chip.flops
    flops = training_flops(model, trained, scored=scored, again=again)
    weights = weight_bytes(model, target)
    return Pace(
        training=flops / (peak * _TRAINING[chip.generation]),
        forward=2 * model.layers * model.active_values / (peak * _FORWARD[chip.generation]),
        update=trained_values(model, trained) * 4 * 8 / (0.7 * chip.bandwidth * 1e9),  # 8 passes over float32 arrays
        generation=weights / (_GENERATION * chip.bandwidth * 1e9),
    )
