"""Export, machine and recipe in the page: facts, tables of whatever the files hold, and the recipe's text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_zh.reporting.findings import Findings
from mlx_zh.reporting.markup import Html, tag
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import duration, energy

_SHOWN = 400  # characters of one value
_ALARMS = {"tripwires", "warnings", "alarms"}  # shown where alarms are


def facts(pairs: list[tuple[Text, Text]], style: str = "facts") -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_=style)


def export(findings: Findings) -> list[Html]:
    """What was fused and what that cost in precision."""
    return [_plain(findings.export)] if findings.export else []


def machine(findings: Findings) -> list[Html]:
    """Machine, versions, time and energy by stage, and the recipe."""
    manifest = findings.manifest
    pairs: list[tuple[Text, Text]] = []
    model = manifest.get("model", {})
    if model:
        pairs.append((say("model"), Text.same(f"{model.get('source')} ({model.get('fingerprint')})")))
    described = manifest.get("machine", {})
    if described:
        said = ", ".join(f"{value}" for key, value in described.items() if key != "device" and value)
        pairs += [(say("machine"), Text.same(said)), (say("device"), Text.same(described.get("device")))]
    if manifest.get("git_commit"):
        pairs.append((say("commit"), Text.same(manifest["git_commit"])))
    versions = {name: value for name, value in manifest.get("versions", {}).items() if value}
    if versions:
        pairs.append((say("versions"), Text.same(", ".join(f"{name} {value}" for name, value in versions.items()))))
    parts = [facts(pairs)] if pairs else []
    if findings.times:
        parts.append(_times(findings))
    if findings.recipe:
        parts.append(tag("details", tag("summary", say("recipe")), tag("pre", findings.recipe)))
    return parts


def _times(findings: Findings) -> Html:
    metered = any(time.joules is not None for time in findings.times)
    rows = [(named(t.name), t.seconds, t.joules) for t in findings.times]
    joules = sum(t.joules or 0 for t in findings.times)
    rows.append((say("total"), sum(t.seconds for t in findings.times), joules if metered else None))
    names = [say("stage"), say("time"), *([say("energy")] if metered else [])]
    cells = []
    for name, seconds, drawn in rows:
        used = [tag("td", "–" if drawn is None else energy(drawn))] if metered else []
        cells.append(tag("tr", tag("th", name, scope="row"), tag("td", duration(seconds)), *used))
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *cells), class_="times"), class_="wide")


def table(names: list[Text], rows: Sequence[tuple[object, ...]]) -> Html:
    """A table of text."""
    head = tag("tr", *(tag("th", name, scope="col", class_="text") for name in names))
    body = [tag("tr", *(tag("td", cell, class_="text") for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def _plain(values: Mapping[str, Any]) -> Html:
    """Whatever a file holds, a row a value."""
    return table([say("setting"), say("value")], list(flat(values)))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
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


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
