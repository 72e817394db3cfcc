"""Write an adapter alone in mlx-lm's format, also one that was read from PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.files import adapter_about, save_adapter
from mlx_zh.models.export.merge import Adapter, Fusion

_ABOUT = ("base", "base_fingerprint", "vocabulary")  # facts on the base that go with the adapter


def check_for_mlx_lm(adapter: Adapter) -> None:
    """Raise AdapterError for an adapter that mlx-lm's `load_adapters` refuses."""
    if adapter.spec.kind != "full" and adapter.spec.saved:
        raise AdapterError(
            f"mlx-lm does not load trained tables ({', '.join(adapter.spec.saved)}) beside an "
            f"adapter, so `mlx-adapter` cannot be written for {adapter.folder}. Export `mlx`, which holds the "
            "merged model."
        )


def write_mlx_adapter(folder: Path, fusion: Fusion) -> None:
    """Write adapters.safetensors and adapter_config.json. Raises AdapterError as `check_for_mlx_lm` does."""
    adapter = fusion.adapter
    check_for_mlx_lm(adapter)
    layers = min(adapter.spec.num_layers, int(fusion.base.config["num_hidden_layers"]))
    about = {name: value for name, value in adapter_about(adapter.folder).items() if name in _ABOUT}
    save_adapter(folder, adapter.weights, replace(adapter.spec, num_layers=layers), about, fusion.base.config)
