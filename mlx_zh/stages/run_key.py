"""The key of a training run: a digest of everything that it learns from, stored in its checkpoints."""

from __future__ import annotations

import json
from typing import Any

from mlx_zh.pipeline.state import flat
from mlx_zh.recipe import Recipe
from mlx_zh.system.digests import value_digest

Values = dict[str, Any]


def learning_values(recipe: Recipe, stage: str, digests: Values) -> Values:
    """Everything that can change what `stage` learns: parts of the recipe, and digests of the files that it names.

    `digests` holds `base`, `rendering`, `files` (by path) and, for a stage that starts from an adapter, `start`.
    """
    values: Values = recipe.model_dump(mode="json", include={"model", "lora", "data", "seed", stage}) | digests
    values["data"] = {name: value for name, value in values["data"].items() if name not in {"sft", "dpo"} - {stage}}
    del values[stage]["max_skipped_steps"]  # it only says when to give up
    return values


def learning_key(values: Values) -> str:
    """A digest of `learning_values` without paths, so that a moved folder keeps its key; 16 hex digits."""
    return value_digest(_content(values))[:16]


def _content(values: Values) -> Values:
    """A copy of the values without paths; the digests of the files stand for these."""
    content: Values = json.loads(json.dumps(values))
    _drop(content.get("model"), "path", "hub", "revision")
    for stage in ("sft", "dpo"):
        _drop(content.get(stage), "start")
    data = content.get("data", {})
    _drop(data, "registry_file")
    for split in (data.get("sft"), data.get("dpo")):
        for sources in (split or {}).values():
            for source in sources:
                _drop(source, "path")
    content["files"] = list(content.get("files", {}).values())
    return content


def _drop(section: Values | None, *names: str) -> None:
    for name in names:
        (section or {}).pop(name, None)


def changes(old: Values, new: Values) -> str:
    """The keys whose values differ, as `key old -> new` for the user; for digests, what has changed."""
    before, now = flat(_content(old)), flat(_content(new))
    changed = []
    for key in sorted(before.keys() | now.keys()):
        values = [json.dumps(side.get(key), ensure_ascii=False) for side in (before, now)]
        if values[0] == values[1]:
            continue
        if key == "files":
            changed.append(f"the content of {_changed_files(old['files'], new['files'])}")
        else:
            changed.append(_DIGESTS.get(key.partition(".")[0], f"{key} {values[0]} -> {values[1]}"))
    changed = list(dict.fromkeys(changed))
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    return "; ".join(changed[:8]) + more


def _changed_files(old: dict[str, str], new: dict[str, str]) -> str:
    old_digests = set(old.values())
    return ", ".join(path for path, digest in new.items() if digest not in old_digests) or "the list of data files"


_DIGESTS = {
    "base": "the base model's files",
    "rendering": "the tokenizer or its chat template",
    "start": "the adapter to start from",
}
