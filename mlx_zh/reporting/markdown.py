"""`report.md`: the findings as Markdown, in Chinese and English side by side."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from mlx_zh.reporting import data_view, words
from mlx_zh.reporting.exam_results import Cell, ExamResult
from mlx_zh.reporting.exam_view import columns, head_line, interval, percent
from mlx_zh.reporting.figures_view import exports, flat, rounds
from mlx_zh.reporting.findings import Findings, mapped
from mlx_zh.reporting.messages import named, say
from mlx_zh.system.escaping import markdown as safe
from mlx_zh.system.escaping import markdown_block, without_controls
from mlx_zh.system.escaping import markdown_table as _table


def markdown(findings: Findings, created: str, plots: Sequence[str]) -> str:
    """The report as Markdown; `created` is its date, `plots` the paths of its pictures relative to the report."""
    parts = [f"# {safe(findings.name)}: {say('report').both()}", f"{say('created', time=created).both()}"]
    parts += _summary(findings)
    parts += _benchmarks(findings, plots)
    parts += _training(findings, plots)
    if compared := rounds(findings):
        heads = [name.both() for name in compared.columns]
        parts += [f"## {say('rounds').both()}", compared.note.both(), _table(heads, compared.rows)]
    parts += _answers(findings)
    parts += _data(findings)
    if exported := exports(findings):
        heads = [name.both() for name in exported.columns]
        parts += [f"## {say('export').both()}", exported.note.both(), _table(heads, exported.rows)]
    parts += _machine(findings)
    return "\n\n".join(parts) + "\n"


def _summary(findings: Findings) -> list[str]:
    rows = [[tile.name.both(), tile.value, tile.remark.both()] for tile in words.tiles(findings)]
    parts = [f"## {say('summary').both()}"]
    if rows:
        parts.append(_table(["", "", ""], rows))
    if not findings.alarms:
        return [*parts, f"✓ {say('no_alarm').both()}"]
    entries = [f"- **{safe(alarm.where.both())}**: {safe(alarm.what.both())}" for alarm in findings.alarms]
    return [*parts, f"### {say('alarms').both()}", "\n".join(entries)]


def _benchmarks(findings: Findings, plots: Sequence[str]) -> list[str]:
    parts = []
    for exam in findings.exams:
        parts += [f"### {safe(exam.title)}", safe(head_line(exam).both())]
        parts.append(_exam(exam) if exam.rows else say("unlabelled").both())
    if not parts:
        return []
    return [f"## {say('benchmarks').both()}", say("exam_note").both(), *parts, *_pictures(plots, "exam-")]


def _exam(exam: ExamResult) -> str:
    head = [name.both() for name in columns(exam)]
    rows = []
    for row in exam.rows:
        cells = [named(row.name).both(), *(_cell(row.cells.get(stage)) for stage in exam.stages)]
        if exam.compared and row.change:
            change = row.change
            moved = f"{words.points(change.difference)} {interval(change)}"
            cells += [moved, words.verdict(change)[0].both()]
        rows.append(cells + ["–"] * (len(head) - len(cells)))
    return _table(head, rows, right=True)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"{percent(cell.macro, 2)} [{percent(cell.low, 1)}, {percent(cell.high, 1)}]"


def _pictures(plots: Sequence[str], prefix: str) -> list[str]:
    names = {path: path.rpartition("/")[2].removesuffix(".png") for path in plots}
    shown = [
        f"![{safe(name)}]({quote(path, errors='replace')})" for path, name in names.items() if name.startswith(prefix)
    ]
    return ["\n".join(shown)] if shown else []


def _training(findings: Findings, plots: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for stage, training in findings.training.items():
        facts = [[name.both(), value.both()] for name, value in words.training_facts(training)]
        parts += [f"## {say(f'training_{stage}').both()}", _table(["", ""], facts)]
        parts += _pictures(plots, f"{stage}-")
    return parts


def _answers(findings: Findings) -> list[str]:
    if not findings.answers:
        return []
    stages = list(findings.answers)
    parts = [f"## {say('answers').both()}", say("answers_note").both()]
    for index, prompt in enumerate(findings.prompts):
        rows = []
        for stage in stages:
            answers = findings.answers[stage]
            right = findings.is_right(stage, index)
            name = named(stage).both() if right is None else f"{words.mark(right)} {named(stage).both()}"
            rows.append([name, answers[index] if index < len(answers) else ""])
        parts += [f"**{safe(prompt) or '–'}**", _table(["", ""], rows)]
    return parts


def _data(findings: Findings) -> list[str]:
    parts: list[str] = []
    heads = [name.both() for name in data_view.source_columns()]
    for stage in data_view.stages(findings):
        facts = [[name.both(), value.both()] for name, value in stage.facts]
        parts += [f"### {safe(stage.title.both())}", _table(["", ""], facts)]
        parts.append(_table(heads, [[cell.both() for cell in row] for row in stage.sources]))
        if stage.selected:
            columns = [name.both() for name in data_view.selected_columns()]
            parts.append(_table(columns, [[cell.both() for cell in row] for row in stage.selected]))
    if digests := mapped(findings.manifest.get("data")):
        parts.append(_table([say("file").both(), say("digest").both()], [list(row) for row in flat(digests)]))
    return [f"## {say('data').both()}", *parts] if parts else []


def _machine(findings: Findings) -> list[str]:
    rows = [[name, text] for name, text in flat({k: v for k, v in findings.manifest.items() if k != "data"})]
    parts = [f"## {say('run').both()}"]
    if findings.times:
        times = []
        for time in findings.times:
            drawn = "" if time.joules is None else words.energy(time.joules)
            times.append([named(time.name).both(), words.duration(time.seconds), drawn])
        parts.append(_table([say("stage").both(), say("time").both(), say("energy").both()], times))
    if rows:
        parts.append(_table([say("setting").both(), say("value").both()], rows))
    if findings.recipe:
        recipe = markdown_block(without_controls(findings.recipe.rstrip()), "yaml")
        parts += [f"### {say('recipe').both()}", recipe]
    return parts if len(parts) > 1 else []
