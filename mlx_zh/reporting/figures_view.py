"""The export, the rounds and the machine as tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlx_zh.exams.statistics import wilson
from mlx_zh.reporting.findings import Findings, is_finite, listed, mapped
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import duration, energy

_SHOWN = 400  # characters of one value


@dataclass(frozen=True, slots=True)
class Exports:
    """A table of exported formats, or of rounds: its column heads, its rows, and what the columns mean."""

    columns: list[Text]
    rows: list[list[str]]
    note: Text


@dataclass(frozen=True, slots=True)
class Times:
    """A table of time and energy by stage: its column heads, and (stage, cells) for each row."""

    columns: list[Text]
    rows: list[tuple[Text, list[str]]]


def machine(findings: Findings) -> list[tuple[Text, Text]]:
    """Model, machine and software versions, as far as the manifest has them."""
    manifest = findings.manifest
    pairs: list[tuple[Text, Text]] = []
    model = mapped(manifest.get("model"))
    if model:
        pairs.append((say("model"), Text.same(f"{model.get('source')} ({str(model.get('fingerprint'))[:16]})")))
    described = mapped(manifest.get("machine"))
    if described:
        details = ", ".join(f"{value}" for key, value in described.items() if key != "device" and value)
        pairs += [(say("machine"), Text.same(details)), (say("device"), Text.same(described.get("device")))]
    if manifest.get("git_commit"):
        pairs.append((say("commit"), Text.same(manifest["git_commit"])))
    versions = {name: value for name, value in mapped(manifest.get("versions")).items() if value}
    if versions:
        pairs.append((say("versions"), Text.same(", ".join(f"{name} {value}" for name, value in versions.items()))))
    return pairs


def times(findings: Findings) -> Times | None:
    """Time by stage and in total, with energy where any was measured; None where the pipeline timed nothing."""
    if not findings.times:
        return None
    metered = any(time.joules is not None for time in findings.times)
    rows = [(named(t.name), t.seconds, t.joules) for t in findings.times]
    joules = sum(t.joules or 0 for t in findings.times)
    rows.append((say("total"), sum(t.seconds for t in findings.times), joules if metered else None))
    cells = [(name, [duration(seconds), "–" if used is None else energy(used)]) for name, seconds, used in rows]
    if metered:
        return Times([say("stage"), say("time"), say("energy")], cells)
    return Times([say("stage"), say("time")], [(name, cell[:1]) for name, cell in cells])


def exports(findings: Findings) -> Exports | None:
    """A row for each exported format; None where nothing was exported."""
    if not findings.export:
        return None
    columns = [say(code) for code in ("format", "size", "kl", "top1", "perplexity", "change_kept", "folder")]
    rows = []
    tuned = None  # the perplexity that each format is compared with
    for kind, written in findings.export.items():
        facts = mapped(written)
        fidelity, left = mapped(facts.get("fidelity")), mapped(facts.get("left"))
        tuned = tuned or _number(fidelity.get("perplexity"), ".3f")
        size = facts.get("size")
        rows.append(
            [
                f"{kind}, {facts['detail']}" if facts.get("detail") else str(kind),
                f"{size / 1e9:.2f} GB" if is_finite(size) else "–",
                _number(fidelity.get("kl"), ".4f") or "–",
                _number(fidelity.get("top1"), ".1%") or "–",
                _number(fidelity.get("fused_perplexity"), ".3f") or "–",
                _number(left.get("kept_mean"), ".0%") or "–",
                str(facts.get("folder") or "–"),
            ]
        )
    return Exports(columns, rows, say("export_note", perplexity=tuned or "–"))


def rounds(findings: Findings) -> Exports | None:
    """A row for each round that was compared; None without rounds."""
    if not findings.rounds:
        return None
    codes = (
        "round",
        "pairs",
        "prompts_better",
        "prompts_worse",
        "win_rate",
        "right_before",
        "right_after",
        "rounds_end",
    )
    rows = []
    for record in findings.rounds:
        right = [listed(counts) for counts in listed(record.get("right"))]
        rates = [_rate(*counts) if len(counts) == 2 else "–" for counts in right] or ["–", "–"]
        interval = [_number(end, ".0%") for end in listed(record.get("interval"))]
        rate = _number(record.get("win_rate"), ".0%")
        ends = record.get("ends")
        rows.append(
            [
                _shown(record.get("round")),
                _shown(record.get("pairs")),
                _shown(record.get("won")),
                _shown(record.get("lost")),
                f"{rate} [{', '.join(interval)}]" if rate else "–",
                *rates[:2],
                say(f"rounds-end-{ends}", round=record.get("round")).both() if ends in _ROUND_ENDS else "–",
            ]
        )
    return Exports([say(code) for code in codes], rows, say("rounds_note"))


_ROUND_ENDS = ("noise", "worse", "no-pairs")


def _rate(count: object, total: object) -> str:
    """A share with its 95 % interval; a dash where there is none."""
    if not (is_finite(count) and is_finite(total) and 0 <= count <= total and total):
        return "–"
    low, high = wilson(count, int(total))
    return f"{count:g}/{total:g} = {count / total:.1%} [{low:.0%}, {high:.0%}]"


def _number(value: object, form: str) -> str:
    return format(value, form) if is_finite(value) else ""


def flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            yield from flat({str(number): entry for number, entry in enumerate(value, start=1)}, f"{name}.")
        else:
            text = ", ".join(map(_shown, value)) if isinstance(value, list) else _shown(value)
            yield name, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
