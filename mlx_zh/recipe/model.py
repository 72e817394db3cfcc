"""The sections `model` and `lora`: the base model, and which weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from mlx_zh.recipe.section import LaterMode, Located, Section


class Quantize(Section):
    """How a full-precision model is quantized when it is loaded."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 64


class Model(Section):
    """Where the base model comes from, and its precision."""

    path: Located
    hub: Literal["auto", "huggingface", "modelscope"] = "auto"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    thinking: LaterMode = "auto"  # auto: the chat template's own default

    @property
    def quantization(self) -> tuple[int, int] | None:
        """Bits and group size, or None when the model is not quantized on loading."""
        return None if self.quantize is None else (self.quantize.bits, self.quantize.group_size)


class Lora(Section):
    """Which weights are trained: those of adapters, or with `type: full` the blocks themselves."""

    type: Literal["lora", "dora", "full"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    num_layers: Literal["all"] | PositiveInt = "all"
    rslora: bool = False
    loraplus_ratio: PositiveFloat = 1.0
    modules_to_save: Annotated[
        tuple[Literal["embed_tokens", "lm_head"], ...], Field(exclude_if=lambda value: not value)
    ] = ()

    @field_validator("modules_to_save")
    @classmethod
    def _beside_an_adapter(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("type") == "full":
            raise ValueError("left out where lora.type is full, which trains both if it trains all layers")
        return tuple(dict.fromkeys(value))
