"""The state of a run's steps, in `pipeline.json`, and the comparison of their inputs and outputs with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os.path import expanduser
from pathlib import Path

from mlx_zh.pipeline.steps import RunFiles, Step
from mlx_zh.recipe import DataSet, Recipe
from mlx_zh.system.digests import FileDigests, Reading, file_digest, known_digests, text_digest, value_digest
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import load_json, read_object
from mlx_zh.system.links import is_readable
from mlx_zh.system.redaction import redact, redacted
from mlx_zh.system.storage import write_json

_LARGE = 2**20  # bytes; the digests of larger files are remembered
VERSION = 2  # of a record; the digests of version 1 stand for sizes and times, and lack what registries name
_TOLD = {"mean_tokens", "size_mb", "source", "licence", "note"}  # what an entry of the registry only tells its reader

Inputs = dict[str, object]  # what a step depends on: a recipe's key or "file PATH", "after STEP" ... -> JSON value


@dataclass
class Record:
    """The last time that a step was begun. `outputs`, digests by path, is None until it has succeeded."""

    inputs: Inputs
    outputs: dict[str, str] | None = None
    seconds: float = 0.0
    joules: float | None = None
    peak_memory_gb: float | None = None
    version: int = 1
    keys: dict[str, str] = field(default_factory=dict)  # digests of the inputs, which are stored without secrets

    def __post_init__(self) -> None:
        self.keys = self.keys or keys_of(self.inputs)


@dataclass
class State:
    """The records of all steps of a run folder."""

    run: RunFiles
    records: dict[str, Record] = field(default_factory=dict)
    known: FileDigests = field(default_factory=known_digests)

    @staticmethod
    def of(run: RunFiles, reading: Reading | None = None) -> State:
        """The records in the folder's `pipeline.json`; none when it is missing or damaged, so every step runs.

        `reading` is called before a large file is read for its digest.
        """
        known = known_digests(reading)
        records = (read_object(run.pipeline) or {}).get("stages", {})
        if not fits(records, dict[str, Record]):
            records = {}
        return State(run, {name: Record(**record) for name, record in records.items()}, known)

    def write(self) -> None:
        """Write `pipeline.json`."""
        write_json(self.run.pipeline, {"stages": {name: asdict(record) for name, record in self.records.items()}})

    def inputs(self, step: Step, recipe: Recipe) -> Inputs:
        """Everything that `step` depends on, by name, as it is now: recipe keys, and digests of files and outputs."""
        values: Inputs = step.inputs(flat(recipe.model_dump(mode="json")))
        for path in step.files:
            if (local := Path(expanduser(path))).exists():
                values[f"file {path}"] = self._digest(local)
        for name, entry in step.entries.items():
            values |= {f"registry {name} {key}": value for key, value in _read_from(entry).items()}
        for name in step.after:
            record = self.records.get(name)
            if name != "prepare":
                samples = self.run.pattern(self.run.samples)  # these answers change nothing that comes after
                outputs = None if record is None or record.outputs is None else dict(record.outputs)
                values[f"after {name}"] = outputs and {k: v for k, v in outputs.items() if k != samples}
        if step.prepared is not None:
            values["data prepared"] = self._prepared(step.prepared)
        for path, content in self._digests(step.reads).items():
            if path != self.run.pattern(self.run.pipeline):
                values[f"file {path}"] = content
        return values

    def outputs(self, step: Step) -> dict[str, str]:
        """Digests of the files that `step` has written, by path.

        Training stages add to the report on the prepared data, so of that file only the data's keys are compared, and
        of the sample answers only the stage's own.
        """
        contents = self._digests(step.outputs)
        if (prepared := self.run.pattern(self.run.prepared)) in contents:
            contents[prepared] = " ".join(f"{name} {self._prepared(name)}" for name in ("sft", "dpo"))
        if step.trains:
            contents[self.run.pattern(self.run.samples)] = self._answers(step.stage)
        return contents

    def _digests(self, patterns: Sequence[str]) -> dict[str, str]:
        """The digest of every file in the run folder that matches a pattern, by path relative to the folder.

        Files whose names begin with a dot, and those in such folders, are left out.
        """
        folder = self.run.path
        paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        names = {path.relative_to(folder): path for path in sorted(paths)}
        shown = {name: path for name, path in names.items() if not any(part[0] == "." for part in name.parts)}
        return {name.as_posix(): self._digest(path) for name, path in shown.items()}

    def _digest(self, path: Path) -> str:
        """A digest of a file's whole content, or of all files in a folder."""
        if path.is_dir():
            parts = [f"{file.relative_to(path).as_posix()} {self._digest(file)}" for file in _files(path)]
            return text_digest("\n".join(parts))[:16]
        if path.stat().st_size > _LARGE:
            return self.known.digests([str(path)])[str(path)][:16]
        return file_digest(path)[:16]

    def _answers(self, stage: str) -> str:
        """A digest of a training stage's sample answers."""
        try:
            answers = load_json(self.run.samples)["answers"].get(stage)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            answers = None
        return value_digest(answers)[:16]

    def _prepared(self, stage: str) -> object:
        """The key of the prepared data of one stage; the data of the other stage does not matter for it."""
        try:
            return load_json(self.run.prepared)[stage]["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def outdated(self, step: Step, inputs: Inputs) -> str | None:
        """Why `step` must run; None when it is up to date."""
        record = self.records.get(step.name)
        if record is None:
            return "first run"
        if record.version != VERSION:
            return "an earlier version recorded it"
        if record.keys != keys_of(inputs):
            return changes(record.inputs, inputs) or "a value that is not shown because it holds a secret changed"
        if record.outputs is None:
            return "not finished"
        if not record.outputs:
            return "it wrote no files"
        now = self.outputs(step)
        own = [path for path in record.outputs if Path(path).name not in step.amended]
        changed = [path for path in own if now.get(path) != record.outputs[path]]
        return f"{_listed(changed)} {'was' if len(changed) == 1 else 'were'} changed or removed" if changed else None


def _read_from(entry: DataSet) -> Inputs:
    """The fields of a registry's entry that decide which rows are read, and how."""
    told = _TOLD if entry.hub == "generated" else _TOLD | {"rows"}
    return flat(entry.model_dump(mode="json", exclude=told))


def keys_of(inputs: Inputs) -> dict[str, str]:
    """A digest of each input, 16 hex digits; a name that holds a secret, such as a path, is a digest too."""
    return {
        name if redact(name) == name else text_digest(name)[:16]: value_digest(value)[:16]
        for name, value in inputs.items()
    }


def flat(values: Mapping[str, object], prefix: str = "") -> Inputs:
    """Nested mappings as one mapping with dotted keys. Lists and empty mappings are values."""
    flattened: Inputs = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


def changes(old: Inputs, new: Inputs) -> str:
    """A phrase that names the inputs which differ, at most three of them."""
    phrases = []
    old, new = redacted(old), redacted(new)
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        kind, _, name = key.partition(" ")
        if kind == "file" and name:
            phrases.append(f"{name} {'changed' if before and now else 'is new' if now else 'is gone'}")
        elif kind == "registry" and name:
            data_set, _, field_name = name.rpartition(" ")
            phrases.append(f"{field_name} of {data_set} {_shown(before)} -> {_shown(now)}")
        elif kind == "after" and name:
            phrases.append(f"{name} gave another result")
        elif kind == "data" and name:
            phrases.append("the prepared data changed")
        else:
            phrases.append(f"{key} {_shown(before)} -> {_shown(now)}")
    return _listed(phrases)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _listed(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if is_readable(folder, path) and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
