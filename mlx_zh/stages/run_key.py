"""The identity of a training run: everything that it learns from. Its digest is stored in the run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from mlx_zh.core import numbers
from mlx_zh.corpus.prepared import Corpus, CorpusContent
from mlx_zh.pipeline.state import flat
from mlx_zh.recipe import Recipe
from mlx_zh.system.digests import value_digest
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import read_object
from mlx_zh.system.redaction import redacted

Values = dict[str, Any]
_NAMED = 8  # differences that are named


def learning_values(recipe: Recipe, stage: str, digests: Values) -> Values:
    """Everything that can change what `stage` learns: parts of the recipe, and digests of what it names.

    `digests` holds `base`, `rendering`, `files` (by path), `corpus` (see `corpus_values`) and, for a stage that
    starts from an adapter, `start`.
    """
    values: Values = recipe.model_dump(mode="json", include={"model", "lora", "data", "seed", stage}) | digests
    values["data"] = {name: value for name, value in values["data"].items() if name not in {"sft", "dpo"} - {stage}}
    del values[stage]["max_skipped_steps"]  # it only says when to give up
    return values | numbers.recorded()


def corpus_values(corpus: Corpus) -> Values:
    """The prepared data: a digest of what came out, and what went in, from which differences are named."""
    return {"content": corpus.content, "made_of": corpus.manifest["made_of"]}


def learning_key(values: Values) -> str:
    """A digest of `learning_values` without paths, so that a moved folder keeps its key; 16 hex digits."""
    return str(values.get("key") or value_digest(_content(values))[:16])


def read_settings(path: Path, stage: str) -> Values | None:
    """The values that a run of `stage` has stored at `path`; None where there are none, or the file is damaged."""
    values = read_object(path)
    if values is None or not fits(values, _Stored) or not fits(values.get(stage), dict[str, Any]):
        return None
    sources = dict[str, list[dict[str, Any]]] | None
    whole = fits(values["data"].get(stage), sources) and fits(values.get("corpus"), _StoredCorpus | None)
    return values if whole else None


class _Stored(TypedDict):
    """What is looked at when settings are compared."""

    model: dict[str, Any]
    lora: dict[str, Any]
    data: dict[str, Any]
    base: str
    files: dict[str, str]


class _StoredCorpus(TypedDict):
    content: str
    made_of: CorpusContent


def without_secrets(values: Values) -> Values:
    """The values as they are stored: with their key, because it cannot be computed once secrets are taken out."""
    return {**redacted(values), "key": learning_key(values)}


def is_earlier(values: Values) -> bool:
    """Whether a version wrote these values that did not know the prepared data and sampled the model's weights."""
    return "corpus" not in values


def as_earlier(values: Values, sampled: str) -> Values:
    """The values as such a version would write them; `sampled` is its fingerprint of the model."""
    return {name: value for name, value in values.items() if name != "corpus"} | {"base": sampled}


def with_numbers_of(values: Values, recorded: Values) -> Values:
    """The values with the version of the numbers that is `recorded`."""
    kept = {name: value for name, value in values.items() if name != "numbers"}
    return kept | {name: value for name, value in recorded.items() if name == "numbers"}


def _content(values: Values) -> Values:
    """A copy of the values without paths; the digests of the files stand for these."""
    content: Values = json.loads(json.dumps(values))
    content.pop("key", None)
    _drop(content.get("model"), "path", "hub", "revision")
    for stage in ("sft", "dpo"):
        _drop(content.get(stage), "start")
    data = content.get("data", {})
    _drop(data, "registry_file")
    for split in (data.get("sft"), data.get("dpo")):
        for sources in (split or {}).values():
            for source in sources:
                _drop(source, "path")
    if "corpus" in content:  # it says how each set is read; notes and entries of other sets change nothing
        _drop(data, "registry")
    content["files"] = list(content.get("files", {}).values())
    for source in content.get("corpus", {}).get("made_of", {}).get("sources", []):
        _drop(source, "name")  # a path, or a name whose entry and files stand here
    return content


def _drop(section: Values | None, *names: str) -> None:
    for name in names:
        (section or {}).pop(name, None)


def changes(old: Values, new: Values) -> str:
    """The keys whose values differ, as `key old -> new` for the user; for digests, what has changed."""
    sides = [redacted(_content(values)) for values in (old, new)]
    before, now = (flat({name: value for name, value in side.items() if name != "corpus"}) for side in sides)
    changed = []
    for key in sorted(before.keys() | now.keys()):
        values = [json.dumps(side.get(key, _LATER.get(key)), ensure_ascii=False) for side in (before, now)]
        if values[0] == values[1]:
            continue
        if key == "files":
            changed.append(f"the content of {_changed_files(old['files'], new['files'])}")
        else:
            changed.append(_DIGESTS.get(key.partition(".")[0], f"{key} {values[0]} -> {values[1]}"))
    if "corpus" in old and "corpus" in new:
        prepared = [redacted(values["corpus"]["made_of"]) for values in (old, new)]
        changed += _source_changes(prepared[0]["sources"], prepared[1]["sources"])
        changed += _exam_changes(prepared[0]["exams"], prepared[1]["exams"])
        if not changed and sides[0]["corpus"] != sides[1]["corpus"]:
            changed += _other_changes(prepared[0], prepared[1])
    changed = list(dict.fromkeys(changed))
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return "; ".join(changed[:_NAMED]) + more or "a value that is not shown because it holds a secret"


def _changed_files(old: dict[str, str], new: dict[str, str]) -> str:
    old_digests = set(old.values())
    return ", ".join(path for path, digest in new.items() if digest not in old_digests) or "the list of data files"


def _source_changes(old: list[Values], new: list[Values]) -> Iterator[str]:
    """How sources are read, where that differs: an entry of the registry may have changed, or a column."""
    for before, now in zip(old, new, strict=False):
        for key in sorted((before.keys() | now.keys()) - {"name", "files"}):
            if before.get(key) != now.get(key):
                values = [json.dumps(side.get(key), ensure_ascii=False) for side in (before, now)]
                yield f"{key} of {now['name']} {values[0]} -> {values[1]}"


def _exam_changes(old: Values, new: Values) -> Iterator[str]:
    """The exams that are kept out of the data, where they differ."""
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            yield f"questions of {name} are kept out of the data now"
        elif name not in new:
            yield f"questions of {name} are not kept out of the data any more"
        elif old[name] != new[name]:
            yield f"the questions of {name} that are kept out of the data"


def _other_changes(old: Values, new: Values) -> Iterator[str]:
    """What else went into the prepared data, where nothing else is named."""
    before, now = (flat({key: side[key] for key in ("version", "settings")}) for side in (old, new))
    named = [f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(now) if before.get(key) != now[key]]
    yield from named or ["the prepared data itself"]


_LATER = {"model.thinking": "auto", "data.reasoning": "learn"}  # keys that are stored only if they differ from this
_DIGESTS = {
    "base": "the base model's files",
    "numbers": "how this version computes sums",
    "rendering": "the tokenizer or its chat template",
    "start": "the adapter to start from",
}
