"""Layers whose tokens see a window of keys: which they are."""

from __future__ import annotations

from mlx_zh.core.families import Config, family_of

_GEMMA3, _GEMMA3_WINDOW, _GEMMA3_PATTERN = "gemma3_text", 512, 6  # mlx-lm's own defaults


def windows_of(config: Config) -> tuple[int, ...]:
    """The window of each layer in keys, 0 for a layer that sees the whole text; empty if all do."""
    family = family_of(config)
    if family is None or not family.windows:
        return ()
    layers, kinds, size = int(config["num_hidden_layers"]), config.get("layer_types"), config.get("sliding_window")
    if isinstance(kinds, list) and len(kinds) == layers:
        windowed = [kind == "sliding_attention" for kind in kinds]
    elif family.mlx_lm == _GEMMA3:
        pattern = int(config.get("sliding_window_pattern") or _GEMMA3_PATTERN)
        windowed, size = [(index + 1) % pattern != 0 for index in range(layers)], size or _GEMMA3_WINDOW
    else:
        return ()
    return tuple(int(size) if has else 0 for has in windowed) if size and any(windowed) else ()
