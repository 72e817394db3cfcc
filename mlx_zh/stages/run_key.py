"""What a training stage learns from: the key that its checkpoints carry, and how two runs differ."""

from __future__ import annotations

import json
from typing import Any

from mlx_zh.pipeline.state import flat
from mlx_zh.recipe import Recipe
from mlx_zh.system.digests import value_digest

Values = dict[str, Any]


def learning_values(recipe: Recipe, stage: str, digests: Values) -> Values:
    """Everything that can change what `stage` learns: parts of the recipe, and digests of the content it names.

    `digests` are `base`, `rendering`, `files` (by path) and, of DPO, `start`.
    """
    values: Values = recipe.model_dump(mode="json", include={"model", "lora", "data", "seed", stage}) | digests
    values["data"] = {name: value for name, value in values["data"].items() if name not in {"sft", "dpo"} - {stage}}
    del values[stage]["max_skipped_steps"]  # when to give up changes nothing of what was learned until then
    return values


def learning_key(values: Values) -> str:
    """A digest of `learning_values`, less what only says where things lie: a folder may move."""
    return value_digest(_content(values))[:16]


def _content(values: Values) -> Values:
    """The values without places, which the digests of what lies there stand for."""
    found: Values = json.loads(json.dumps(values))
    _drop(found.get("model"), "path", "hub", "revision")
    _drop(found.get("dpo"), "start")
    data = found.get("data", {})
    _drop(data, "registry_file")
    for split in (data.get("sft"), data.get("dpo")):
        for sources in (split or {}).values():
            for source in sources:
                _drop(source, "path")
    found["files"] = list(found.get("files", {}).values())
    return found


def _drop(section: Values | None, *names: str) -> None:
    for name in names:
        (section or {}).pop(name, None)


def changes(old: Values, new: Values) -> str:
    """The keys whose values differ, old -> new; of digests, only that they do."""
    before, now = flat(_content(old)), flat(_content(new))
    told = []
    for key in sorted(before.keys() | now.keys()):
        values = [json.dumps(side.get(key), ensure_ascii=False) for side in (before, now)]
        if values[0] == values[1]:
            continue
        if key == "files":
            told.append(f"the content of {_changed_files(old['files'], new['files'])}")
        else:
            told.append(_DIGESTS.get(key.partition(".")[0], f"{key} {values[0]} -> {values[1]}"))
    told = list(dict.fromkeys(told))
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return "; ".join(told[:8]) + more


def _changed_files(old: dict[str, str], new: dict[str, str]) -> str:
    known = set(old.values())
    return ", ".join(path for path, digest in new.items() if digest not in known) or "the data files' list"


_DIGESTS = {
    "base": "the base model's files",
    "rendering": "the tokenizer or its chat template",
    "start": "the adapter to start from",
}
