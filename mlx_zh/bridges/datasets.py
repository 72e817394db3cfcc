"""The data sets of other programs as sources of a recipe: files, and sets on a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_zh.bridges.draft import Draft, shown
from mlx_zh.bridges.text_files import read_text
from mlx_zh.corpus.llama_factory import NAME, guess_of
from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system.json_text import parse_json

Entry = dict[str, Any]
_DEPTH = 5  # folders above a project's file in which its data folder is looked for
_SLICE = re.compile(r"([\w.-]+)(?:\[:(\d+)\])?")
_HUB_NAME = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")


# LLaMA-Factory ----------------------------------------------------------------------------------------------


def llama_factory_sources(draft: Draft, names: Sequence[str], kind: str) -> list[Entry]:
    """The sources of data sets that `dataset_info.json` describes; `kind` is sft, dpo, kto or pt."""
    table, folder = _table(draft)
    sources = []
    for name in names:
        if table is None:
            draft.remark(say("import-no-table", name=name, file=NAME))
            sources.append({"name": name})
        elif not isinstance(table.get(name), dict):
            near = ", ".join(list(table)[:8])
            draft.refuse(say("import-no-set", name=shown(name), file=folder / NAME, names=shown(near)))
        else:
            source = _source(draft, name, table[name], folder, kind)
            sources += [source] if source else []
    return sources


def _table(draft: Draft) -> tuple[Mapping[str, Any] | None, Path]:
    """The table of data sets and its folder; None if there is none on this disk."""
    given = draft.raw("dataset_dir")
    if isinstance(given, dict):
        return given, draft.settings.folder
    named = str(given or "data")
    if named == "ONLINE":
        return _Online(), draft.settings.folder
    home = draft.settings.path.absolute().parent
    places = [Path(named), *[place / named for place in [home, *list(home.parents)[:_DEPTH]]]]
    files = [*draft.settings.tables, *[place / NAME for place in places], home / NAME]
    for file in files:
        try:
            if not file.is_file():
                continue
            table = parse_json(read_text(file))
        except (OSError, ValueError, RecursionError, RecipeError) as error:
            draft.refuse(say("import-bad-table", file=file, reason=str(error).splitlines()[0]))
            return {}, file.parent
        if not isinstance(table, dict):
            draft.refuse(say("import-bad-table", file=file, reason=say("import-wants-names")))
            return {}, file.parent
        return table, file.parent
    return None, home


class _Online(dict[str, Any]):
    """dataset_dir: ONLINE takes every name as the id of a set on a hub."""

    def get(self, name: str, default: Any = None) -> Any:
        return {"hf_hub_url": name}


def _source(draft: Draft, name: str, keys: Mapping[str, Any], folder: Path, kind: str) -> Entry | None:
    guess = guess_of(keys)
    if isinstance(guess, str):
        draft.refuse(say("import-set-refused", name=name, reason=in_readers_language(guess)))
        return None
    wanted = "sft" if kind == "pt" else kind
    if guess.kind != wanted and not (wanted == "kto" and guess.kind == "dpo"):
        draft.refuse(say("import-set-kind", name=name, kind=guess.kind, wanted=wanted))
        return None
    reading: Entry = {"format": guess.format} | ({"columns": guess.columns} if guess.columns else {})
    if kind == "pt":
        reading = {"format": "text", "columns": {"text": guess.columns.get("instruction", "instruction")}}
        if reading["columns"]["text"] == "text":
            del reading["columns"]
    count = keys.get("num_samples")
    most = {"max_samples": count} if isinstance(count, int) and not isinstance(count, bool) and count > 0 else {}
    hubs = {hub: keys[key] for hub, key in _HUBS.items() if isinstance(keys.get(key), str) and keys[key]}
    if hubs:
        registered = _registered(draft, name, hubs, keys, kind, reading)
        return {"name": registered, **most}
    file = keys.get("file_name")
    if not isinstance(file, str) or not file:
        place = next((key for key in ("script_url", "om_hub_url", "cloud_file_name") if key in keys), "file_name")
        draft.refuse(say("import-set-place", name=name, key=place))
        return None
    return {"path": relative(draft, folder / file), **reading, **most}


_HUBS = {"huggingface": "hf_hub_url", "modelscope": "ms_hub_url"}


def _registered(
    draft: Draft, name: str, hubs: Mapping[str, str], keys: Mapping[str, Any], kind: str, reading: Entry
) -> str:
    """Put a set on a hub into data.registry; its name there."""
    first = "modelscope" if draft.settings.hub == "modelscope" and "modelscope" in hubs else next(iter(hubs))
    others = {hub: id for hub, id in hubs.items() if hub != first}
    entry: Entry = {"hub": first, "id": hubs[first]} | ({"also": others} if others else {})
    entry["kind"] = "sft" if kind in ("sft", "pt") else "dpo"
    for key in ("subset", "split"):
        value = keys.get(key)
        if isinstance(value, str) and value:
            if key == "subset" and first != "huggingface":
                draft.remark(say("import-set-subset", name=name, subset=shown(value)))
            else:
                entry[key] = value
    if isinstance(keys.get("folder"), str) and keys["folder"]:
        entry["files"] = [f"{keys['folder'].strip('/')}/*"]
    draft.values.setdefault("data.registry", {})[name] = entry | reading
    return name


# Others -----------------------------------------------------------------------------------------------------


def source_of(
    draft: Draft,
    name: str,
    kind: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    files: Any = None,
    columns: Mapping[str, str] | None = None,
) -> Entry | None:
    """A file or folder, or a set on Hugging Face by its id, of kind sft or dpo."""
    most: Entry = {}
    if split and split != "train":
        match = _SLICE.fullmatch(split.strip())
        if match is None:
            draft.remark(say("import-slice", split=shown(split)))
            split = re.split(r"[\[+]", split)[0].strip() or "train"
        else:
            split = match[1]
            most = {"max_samples": int(match[2])} if match[2] and 0 < int(match[2]) < 2**53 else {}
    reading: Entry = {"columns": dict(columns)} if columns else {}
    if name.lower() in ("json", "csv", "parquet", "text", "pandas"):
        return _file_of(draft, files, reading | most)
    path = existing(draft, name)
    if path is not None:
        return {"path": path, **reading, **most}
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        draft.remark(say("import-no-data", name=shown(name)))
        return {"path": name, **reading, **most}
    short = re.sub(r"[^\w.-]", "-", name.rsplit("/", 1)[-1])
    entry: Entry = {"hub": "huggingface", "id": name, "kind": kind}
    entry |= {"subset": subset} if subset else {}
    entry |= {"split": split} if split and split != "train" else {}
    draft.values.setdefault("data.registry", {})[short] = entry | reading
    return {"name": short, **most}


def _file_of(draft: Draft, files: Any, more: Entry) -> Entry | None:
    """The file that is loaded by `load_dataset("json", data_files=…)`."""
    if isinstance(files, dict):
        files = files.get("train", next(iter(files.values()), None))
    if isinstance(files, list | tuple):
        if len(files) > 1:
            draft.remark(say("import-several-files", files=shown(list(files))))
        files = next(iter(files), None)
    if not isinstance(files, str) or not files:
        draft.refuse(say("import-no-data-files"))
        return None
    path = existing(draft, files)
    if path is None:
        draft.remark(say("import-no-data", name=shown(files)))
    return {"path": path or files, **more}


def existing(draft: Draft, name: str) -> str | None:
    """The path of a file or folder on this disk, as the recipe names it; None if there is none."""
    try:
        for path in (Path(name).expanduser(), draft.settings.folder / name):
            if path.exists():
                return relative(draft, path)
    except (OSError, ValueError, RuntimeError):
        pass
    return None


def relative(draft: Draft, path: Path) -> str:
    """The path from the recipe's folder; one that leads far up is absolute."""
    whole = path.absolute()
    text = os.path.relpath(whole, draft.target_folder.absolute())
    return text if text.count("..") <= 3 else str(whole)
