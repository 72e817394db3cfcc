"""Which formats a model of a family can be exported in, known from its config.json alone."""

from __future__ import annotations

from mlx_zh.core.families import FAMILIES, Config
from mlx_zh.errors import ModelError
from mlx_zh.models.gguf_model import gguf_architecture
from mlx_zh.recipe import Export


def check_writable(config: Config, export: Export) -> None:
    """Raise ModelError, naming the family, if it cannot be exported as `export` asks."""
    family = str(config.get("model_type"))
    named = ", ".join(name for name, known in FAMILIES.items() if known.gguf is not None)
    asked = [name for name in ("gguf", "gguf-lora") if name in export.formats]
    if asked and gguf_architecture(config) is None:
        raise ModelError(
            f"export.formats: {asked[0]} cannot be written for models of type {family!r}, only for {named}. "
            "Export `hf` and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    known = FAMILIES.get(family)
    if "hf" in export.formats and (known is None or known.architecture is None):
        raise ModelError(
            f"models of type {family!r} cannot be exported as hf, because it is not known here which "
            "names transformers gives their tensors. Export `mlx`, or `peft`, whose adapter can be merged there."
        )
    if (export.recover or export.bits == "mixed") and not _has_plain_blocks(config):
        asked_for = "recover" if export.recover else "bits: mixed"
        raise ModelError(
            f"export.{asked_for} cannot be used for this model of type {family!r}: it computes blocks matrix by "
            f"matrix, and knows only those of {named} without windows. Leave it out."
        )


def _has_plain_blocks(config: Config) -> bool:
    layers = config.get("layer_types")
    windows = isinstance(layers, list) and "sliding_attention" in layers
    return gguf_architecture(config) is not None and not windows
