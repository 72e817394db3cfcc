"""What a run folder knows of its own steps: `pipeline.json`, and the fingerprints that it compares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_zh.pipeline.steps import RunFiles, Step
from mlx_zh.recipe import Recipe
from mlx_zh.system.digests import file_digest, text_digest
from mlx_zh.system.storage import write_json

_LARGE = 64 * 2**20  # bytes: beyond, size and time stand for the content, or a look would take minutes

Inputs = dict[str, Any]


@dataclass
class Record:
    """The last time that a step was begun. `outputs` is None until it has ended well."""

    inputs: Inputs
    outputs: dict[str, str] | None = None
    seconds: float = 0.0
    joules: float | None = None
    peak_memory_gb: float | None = None


@dataclass
class State:
    """The records of all steps of a run folder."""

    run: RunFiles
    records: dict[str, Record] = field(default_factory=dict)

    @staticmethod
    def of(run: RunFiles) -> State:
        """What the folder's pipeline.json holds; nothing where it is missing or damaged: then every step runs."""
        try:
            kept = json.loads(run.pipeline.read_text(encoding="utf-8"))["stages"]
            return State(run, {name: Record(**record) for name, record in kept.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return State(run)

    def write(self) -> None:
        """Keep the records."""
        write_json(self.run.pipeline, {"stages": {name: asdict(record) for name, record in self.records.items()}})

    def inputs(self, step: Step, recipe: Recipe) -> Inputs:
        """Everything that `step` depends on, as it is now."""
        values: Inputs = step.inputs(flat(recipe.model_dump(mode="json")))
        for path in step.files:
            if (place := Path(path).expanduser()).exists():
                values[f"file {path}"] = digest(place)
        for name in step.after:
            record = self.records.get(name)
            if name != "prepare":
                values[f"after {name}"] = None if record is None else record.outputs
        if step.prepared is not None:
            values["data prepared"] = self._prepared(step.prepared)
        for path, found in digests(self.run.path, step.reads).items():
            if path != self.run.pattern(self.run.pipeline):
                values[f"file {path}"] = found
        return values

    def outputs(self, step: Step) -> dict[str, str]:
        """What `step` has left, by path. Training adds to the report on the data: only its keys count."""
        found = digests(self.run.path, step.outputs)
        if (prepared := self.run.pattern(self.run.prepared)) in found:
            found[prepared] = " ".join(f"{name} {self._prepared(name)}" for name in ("sft", "dpo"))
        return found

    def _prepared(self, stage: str) -> Any:
        """The fingerprint of the prepared data of one stage; that of the other changes nothing for it."""
        try:
            return json.loads(self.run.prepared.read_text(encoding="utf-8"))[stage]["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def outdated(self, step: Step, inputs: Inputs) -> str | None:
        """Why `step` must run; None where it is up to date."""
        record = self.records.get(step.name)
        if record is None:
            return "not done yet"
        if record.inputs != inputs:
            return changes(record.inputs, inputs)
        if record.outputs is None:
            return "not finished"
        if not record.outputs:
            return "it left nothing"
        now = self.outputs(step)
        wrong = [path for path in record.outputs if now.get(path) != record.outputs[path]]
        return f"{_some(wrong)} {'is' if len(wrong) == 1 else 'are'} not as it was left" if wrong else None


def flat(values: dict[str, Any], prefix: str = "") -> Inputs:
    """Nested mappings as one, with dotted keys; lists are values."""
    found: Inputs = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def changes(old: Inputs, new: Inputs) -> str:
    """The inputs that differ, as a person says it."""
    said = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        kind, _, name = key.partition(" ")
        if kind == "file" and name:
            said.append(f"{name} {'changed' if before and now else 'is new' if now else 'is gone'}")
        elif kind == "after" and name:
            said.append(f"{name} gave another result")
        elif kind == "data" and name:
            said.append("the prepared data changed")
        else:
            said.append(f"{key} {_value(before)} -> {_value(now)}")
    return _some(said)


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _some(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def digests(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """The digest of every file in `folder` that a pattern names, by its path in there."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(paths) if path.name[0] != "."}


def digest(path: Path) -> str:
    """A digest of a file's content, or of all files in a folder."""
    if path.is_dir():
        parts = [f"{file.relative_to(path).as_posix()} {digest(file)}" for file in _files(path)]
        return text_digest("\n".join(parts))[:16]
    about = path.stat()
    if about.st_size > _LARGE:
        return f"{about.st_size} bytes at {about.st_mtime_ns}"
    return file_digest(path)[:16]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
