"""Two projects, one of SFT and one of preferences after it, as one recipe."""

from __future__ import annotations

from pathlib import PurePath

from mlx_zh.bridges.draft import Draft, shown
from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say

_SEPARATE = ("dpo.", "data.dpo.")


def joined(drafts: list[Draft]) -> Draft:
    """The draft of both. Raises RecipeError if they are not one of SFT and one of preferences.

    What a recipe has once for both is that of SFT; a difference is told.
    """
    first = next((draft for draft in drafts if "data.sft.train" in draft.values), None)
    second = next((draft for draft in drafts if "data.dpo.train" in draft.values), None)
    if first is None or second is None:
        raise RecipeError(say("import-two-stages"))
    _start(first, second)
    for key, value in second.values.items():
        if key.startswith(_SEPARATE):
            first.values[key] = value
            first.comments[key] = second.comments.get(key, "")
        elif key == "data.registry":
            first.values[key] = {**first.values.get(key, {}), **value}
        elif key not in first.values:
            if key != "lora.dropout":
                first.remark(say("import-only-there", key=key, value=shown(value)))
        elif first.values[key] != value and not key.startswith("model."):
            first.remark(say("import-once", key=key, kept=shown(first.values[key]), other=shown(value)))
    told = set(first.rows)
    first.rows += [row for row in second.rows if row not in told and not _is_shared(row.ours)]
    return first


def _is_shared(ours: str) -> bool:
    return bool(ours) and not ours.startswith(_SEPARATE)


def _start(first: Draft, second: Draft) -> None:
    """What the preferences start from: the adapter of SFT, or the model if they do not go on from it."""
    values = second.settings.values
    output = first.settings.values.get("output_dir")
    adapter = values.get("adapter_name_or_path")
    if adapter is not None:
        if output is not None and _same(adapter, output):
            second.values.pop("dpo.start", None)
            second.rows = [row for row in second.rows if not row.ours.startswith("dpo.start:")]
        return
    merged = second.values.get("model.path") != first.values.get("model.path")
    if not merged:
        second.put("dpo.start", "base", note=say("import-start-base"))


def _same(one: object, other: object) -> bool:
    return PurePath(str(one).strip()) == PurePath(str(other).strip())
