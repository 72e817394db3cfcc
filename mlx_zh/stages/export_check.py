"""Whether the formats that a recipe asks for can hold the tuned model."""

from __future__ import annotations

from collections.abc import Callable

from mlx_zh.errors import AdapterError, RecipeError
from mlx_zh.models.export import llama_quantizer
from mlx_zh.models.export.gguf_lora import check_for_gguf
from mlx_zh.models.export.llama_types import LLAMA_TYPES
from mlx_zh.models.export.merge import Fusion
from mlx_zh.models.export.mlx_adapter import check_for_mlx_lm
from mlx_zh.models.export.writable import check_writable
from mlx_zh.recipe import Export


def check_formats(export: Export, fusion: Fusion, mlx_bits: Callable[[], int]) -> None:
    """Check every format before one is written; `mlx_bits` tells the bits of `mlx`.

    Raises AdapterError if a format cannot hold the adapter, RecipeError for settings that exclude each other.
    """
    if export.recover and not any(recovers(export, kind) for kind in export.formats):
        raise RecipeError(
            "export.recover is for models in few bits, and export.formats asks for none: write `export.formats: "
            "[mlx]`, or [gguf] with `export.gguf_type: q4_1`. hf, and GGUF files of other types, are written "
            "without it."
        )
    if export.size_gb is not None and export.bits != "mixed":
        raise RecipeError(
            f"export.size_gb limits mixed bits, and export.bits is {export.bits}. Write export.bits=mixed, "
            "or leave out export.size_gb."
        )
    if export.recover and export.bits == 16:
        raise RecipeError(
            "export.recover is for a model that is quantized, and export.bits is 16: with 16 bits nothing is "
            "lost. Leave one of them out, or write export.bits=4."
        )
    check_writable(fusion.source.config, export)
    if "gguf-lora" in export.formats:
        check_for_gguf(fusion.adapter)
    if "mlx-adapter" in export.formats:
        check_for_mlx_lm(fusion.adapter)
    if "peft" in export.formats and fusion.adapter.spec.kind == "full":
        raise AdapterError("export.formats: a full fine-tuning has no adapter, so `peft` cannot be written; use hf.")
    if "gguf" in export.formats:
        _check_gguf(export, mlx_bits)


def _check_gguf(export: Export, mlx_bits: Callable[[], int]) -> None:
    kind = export.gguf_type
    llama_quantizer.check(kind)
    if export.imatrix and kind not in LLAMA_TYPES:
        raise RecipeError(
            f"export.imatrix is for the types that llama.cpp writes ({', '.join(LLAMA_TYPES)}), and "
            f"export.gguf_type is {kind}. Choose one of them, or leave out export.imatrix."
        )
    if recovers(export, "gguf") and mlx_bits() != 4:
        raise RecipeError(
            "With export.recover, a GGUF file of the type q4_1 has 4 bits, and so must mlx beside it: write "
            "export.bits=4."
        )


def recovers(export: Export, kind: str) -> bool:
    """Whether a format is written with codes that keep the tuning."""
    q4_1 = kind == "gguf" and export.gguf_type == "q4_1"
    return export.recover and (kind == "mlx" or q4_1)
