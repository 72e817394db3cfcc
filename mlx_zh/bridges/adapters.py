"""The layers on which other programs put their adapters."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_zh.bridges.draft import Draft, shown
from mlx_zh.language.reader import say

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def put_targets(draft: Draft, name: str, targets: Sequence[str], words: str | None = None) -> None:
    """`lora.targets`: all, or the linear layers that a list names; others are told, and none left is refused."""
    if not targets or any(target.lower() in ("all", "all-linear") for target in targets):
        draft.put("lora.targets", "all", name, words=words)
        return
    lasts = [target.rsplit(".", 1)[-1] for target in targets]
    known = [target for target in dict.fromkeys(lasts) if target in LINEAR]
    others = [target for target in dict.fromkeys(lasts) if target not in LINEAR]
    if not known:
        draft.refuse(say("import-targets", key=name, names=shown(others), known=", ".join(LINEAR)))
        return
    draft.put("lora.targets", "all" if set(known) == set(LINEAR) else known, name, words=words)
    if others:
        draft.note(name, say("import-targets-left", names=shown(others)), "differs")
