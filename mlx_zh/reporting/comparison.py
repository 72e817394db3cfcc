"""Several runs side by side: what each of them is, and which keys of their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.reporting.findings import Findings, mapped
from mlx_zh.reporting.messages import Text

_SHOWN = 300  # characters of one value
_NEWEST = ("dpo", "sft", "fused", "base")
_OF_THE_RUN = ("name", "runs")  # keys of a recipe that say where its results go


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison."""

    label: str  # its name, with its folder where another run has the same name
    findings: Findings
    exams: Path  # the folder of its exam results
    recipe: Mapping[str, object]  # every key with its value, secrets hidden; empty where it could not be read
    state: Text
    adapters: Mapping[str, int]  # stage -> bytes of its adapter

    @property
    def model(self) -> Mapping[str, object]:
        """Source, fingerprint and revision of its base model, as far as they are known."""
        return mapped(self.findings.manifest.get("model"))

    def newest(self, stages: Sequence[str]) -> str | None:
        """The newest tuned model among `stages`, else the fused one or the base; None without any."""
        return next((stage for stage in _NEWEST if stage in stages), None)


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the recipe that differs, with its value in each run."""

    key: str
    values: list[str]


def recipe_differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """The keys whose values are not the same in all runs whose recipes are known; `–` where a run has no such key."""
    flattened = [dict(flattened_recipe(run.recipe)) for run in runs]
    known = [values for values in flattened if values]
    differences = []
    for key in dict.fromkeys(key for values in known for key in values):
        first = known[0].get(key, _ABSENT)
        if key not in _OF_THE_RUN and any(values.get(key, _ABSENT) != first for values in known):
            differences.append(Difference(key, [shown(values.get(key, _ABSENT)) for values in flattened]))
    return differences


_ABSENT = object()


def flattened_recipe(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys with their values; the entries of a list of sections are numbered from 1."""
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value, start=1)}
        if isinstance(value, Mapping) and value:
            yield from flattened_recipe(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: object) -> str:
    """A recipe's value as YAML writes it, on one line and cut where it is long; a dash for none."""
    if value is _ABSENT:
        return "–"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        text = f"[{', '.join(map(shown, value))}]"
    else:
        text = " ".join(f"{value:g}".split() if isinstance(value, float) else str(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
