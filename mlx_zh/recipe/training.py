"""The sections `sft`, `dpo`, `memory`, `distributed` and `checkpoint`: how a stage is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from mlx_zh.recipe.section import Fraction, LaterWeight, Located, Measured, NotNegative, Recomputed, Section
from mlx_zh.recipe_text.units import size_of


class Training(Section):
    """Optimizer, schedule and validation, for SFT and DPO."""

    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: PositiveFloat | None = 1.0
    max_skipped_steps: PositiveInt = 5
    neftune_alpha: PositiveFloat | None = None
    eval_steps: PositiveInt | None = None
    early_stopping: PositiveInt | None = None
    load_best: bool = False


class Sft(Training):
    """Supervised fine-tuning.

    `start` is an adapter folder to train further; without it, a new adapter is trained on the base.
    """

    start: Annotated[Located | None, Field(exclude_if=lambda value: value is None)] = None


# The losses that use label_smoothing, f_divergence and no reference. A test compares them with `core.losses.LOSSES`.
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot")
_DIVERGENT = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
_WITHOUT_REFERENCE = ("simpo", "orpo")
# The losses that learn from single answers with a label, instead of pairs.
_UNPAIRED = ("kto", "apo_zero_unpaired")

_LOSSES_OF = {
    "label_smoothing": _SMOOTHED,
    "f_divergence": _DIVERGENT,
    "desirable_weight": _UNPAIRED,
    "undesirable_weight": _UNPAIRED,
}

PreferenceLossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "aot",
    "simpo",
    "orpo",
    "kto",
    "apo_zero_unpaired",
]


class Dpo(Training):
    """Preference tuning: from pairs, or with `loss` kto and apo_zero_unpaired from single answers with a label.

    `start` is sft (the SFT adapter of this run), base, or an adapter folder. Its default is sft when the recipe has
    SFT data, otherwise base. `reference` is start, base, or none (for losses without a reference).
    """

    learning_rate: PositiveFloat = 5e-6
    loss: PreferenceLossName = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: NotNegative = 0.0
    ld_alpha: Fraction | None = None
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    f_alpha: float = 0.5
    simpo_gamma: NotNegative = 0.5
    discopop_tau: PositiveFloat = 0.05
    start: Located | None = None
    reference: Annotated[Literal["start", "base", "none"], Field(validate_default=True)] = "start"
    desirable_weight: LaterWeight = 1.0
    undesirable_weight: LaterWeight = 1.0

    @property
    def unpaired(self) -> bool:
        """Whether the loss learns from single answers with a label (KTO), instead of pairs."""
        return self.loss in _UNPAIRED

    @property
    def has_kl(self) -> bool:
        """Whether every step needs one more forward pass, for KTO's KL term."""
        return self.loss == "kto"

    @field_validator("reference", mode="before")
    @classmethod
    def _fits_loss(cls, value: Any, info: ValidationInfo) -> Any:
        without = info.data.get("loss") in _WITHOUT_REFERENCE
        if without and value == cls.model_fields["reference"].default:
            return "none"
        if "loss" in info.data and without != (value == "none"):
            raise ValueError(
                f"none, because dpo.loss {info.data['loss']} has no reference"
                if without
                else f"start or base, because dpo.loss {info.data['loss']} needs a reference"
            )
        return value

    @field_validator("ld_alpha")
    @classmethod
    def _of_pairs(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("loss") in _UNPAIRED:
            raise ValueError(f"left out, because it has no effect on dpo.loss {info.data['loss']}")
        return value

    @field_validator("label_smoothing", "f_divergence", "desirable_weight", "undesirable_weight")
    @classmethod
    def _used_by_loss(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        losses = _LOSSES_OF[name]
        default = cls.model_fields[name].default
        if value != default and info.data.get("loss", losses[0]) not in losses:
            raise ValueError(f"left at {default}, because it has no effect on dpo.loss {info.data['loss']}")
        return value


def _no_number(value: Any) -> Any:
    """Refuse a number, which could be bytes or gigabytes."""
    if isinstance(value, int | float):
        raise ValueError("a size of memory with its unit, such as 10GB or 800MB")
    return value


def _size(value: str) -> str:
    """A size of memory; `memory.limit` is kept as it was written."""
    if size_of(value) is None:
        raise ValueError("a size of memory with its unit, such as 10GB or 800MB")
    return value


class Memory(Section):
    """Settings that change memory and speed, but never the result."""

    micro_tokens: PositiveInt = 2048
    checkpoint_layers: Recomputed = "auto"
    limit: Annotated[Annotated[str, AfterValidator(_size)] | None, BeforeValidator(_no_number)] = None
    logit_rows: PositiveInt | None = None
    dense_products: Measured = "auto"

    @property
    def limit_bytes(self) -> int | None:
        """`limit` in bytes; None where this machine's memory is the limit."""
        return None if self.limit is None else size_of(self.limit)


class Distributed(Section):
    """How several machines share the work: equally, or in proportion to their speed, which is measured for 10 s."""

    shares: Literal["equal", "measured"] = "equal"


class Checkpoint(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: PositiveInt | None = 100
    every_minutes: PositiveFloat | None = 15.0
    keep: PositiveInt = 2
    keep_best: bool = True
