"""The held-out text that comes with the program, for measuring fused models."""

from __future__ import annotations

from importlib.resources import files

import yaml


def bundled_conversations() -> list[list[tuple[str, str]]]:
    """The conversations, each as (role, text) pairs."""
    text = files("mlx_zh.models.export").joinpath("held_out.yaml").read_text(encoding="utf-8")
    return [[next(iter(turn.items())) for turn in turns] for turns in yaml.safe_load(text)]
