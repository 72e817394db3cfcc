"""Export and machine: whatever the files hold as names and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlx_zh.reporting.findings import Findings, mapped
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import duration, energy

_SHOWN = 400  # characters of one value
_ALARMS = {"warnings", "warning_codes", "unmeasured", "unmeasured_code"}  # shown where alarms are


@dataclass(frozen=True, slots=True)
class Times:
    """Time and energy by stage: the heads of a table, and (stage, cells) for each row."""

    columns: list[Text]
    rows: list[tuple[Text, list[str]]]


def machine(findings: Findings) -> list[tuple[Text, Text]]:
    """Model, machine and versions."""
    manifest = findings.manifest
    pairs: list[tuple[Text, Text]] = []
    model = mapped(manifest.get("model"))
    if model:
        pairs.append((say("model"), Text.same(f"{model.get('source')} ({model.get('fingerprint')})")))
    described = mapped(manifest.get("machine"))
    if described:
        said = ", ".join(f"{value}" for key, value in described.items() if key != "device" and value)
        pairs += [(say("machine"), Text.same(said)), (say("device"), Text.same(described.get("device")))]
    if manifest.get("git_commit"):
        pairs.append((say("commit"), Text.same(manifest["git_commit"])))
    versions = {name: value for name, value in mapped(manifest.get("versions")).items() if value}
    if versions:
        pairs.append((say("versions"), Text.same(", ".join(f"{name} {value}" for name, value in versions.items()))))
    return pairs


def times(findings: Findings) -> Times | None:
    """Time by stage and together, and energy where a stage's was measured; None where the pipeline timed nothing."""
    if not findings.times:
        return None
    metered = any(time.joules is not None for time in findings.times)
    rows = [(named(t.name), t.seconds, t.joules) for t in findings.times]
    joules = sum(t.joules or 0 for t in findings.times)
    rows.append((say("total"), sum(t.seconds for t in findings.times), joules if metered else None))
    cells = [(name, [duration(seconds), "–" if drawn is None else energy(drawn)]) for name, seconds, drawn in rows]
    if metered:
        return Times([say("stage"), say("time"), say("energy")], cells)
    return Times([say("stage"), say("time")], [(name, cell[:1]) for name, cell in cells])


def flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text), without the alarms, which have a place of their own."""
    for key, value in values.items():
        if key in _ALARMS:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            yield from flat({str(number): entry for number, entry in enumerate(value, start=1)}, f"{name}.")
        else:
            text = ", ".join(map(_said, value)) if isinstance(value, list) else _said(value)
            yield name, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _said(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
