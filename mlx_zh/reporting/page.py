"""`report.html`: a single file that works offline and shows Chinese or English."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlx_zh.reporting import data_view, exam_view, figures_view, svg, words
from mlx_zh.reporting.charts import exam_charts, training_charts
from mlx_zh.reporting.findings import Findings, mapped
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.system.escaping import without_controls


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page below its summary."""

    key: str  # its anchor
    title: Text
    content: Markup


def page(findings: Findings, created: str) -> str:
    """The whole page as HTML; `created` is its date."""
    return document(
        "page",
        title=say("page_title", name=findings.name),
        name=findings.name,
        model=mapped(findings.manifest.get("model")).get("source"),
        created=created,
        tiles=words.tiles(findings),
        alarms=findings.alarms,
        sections=list(_sections(findings)),
    )


def document(template: str, **values: Any) -> str:
    """A whole page: `page.html`, or a template that extends it, with its values."""
    style, script = (
        files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    # The browser uses only this style and this script and fetches nothing, should other markup get into the page.
    policy = (
        f"default-src 'none'; style-src {_csp_hash(style)}; script-src {_csp_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    html = render(template, policy=policy, style=Markup(style), script=Markup(script), **values)
    return without_controls(html)  # HTML allows no control characters


def _csp_hash(text: str) -> str:
    """A source expression of the content security policy that allows exactly this text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _sections(findings: Findings) -> Iterator[Section]:
    """The sections for which the run folder holds something."""
    if findings.exams:
        charts = [svg.dots(chart) for chart in exam_charts(findings)]
        yield Section("benchmarks", say("benchmarks"), render("benchmarks", exams=findings.exams, charts=charts))
    for stage, training in findings.training.items():
        charts = [svg.curves(chart) for chart in training_charts(training)]
        content = render("training", facts=words.training_facts(training), charts=charts)
        yield Section(stage, say(f"training_{stage}"), content)
    if compared := figures_view.rounds(findings):
        yield Section("rounds", say("rounds"), render("export", exported=compared))
    if findings.answers:
        shown = {"prompts": findings.prompts, "answers": findings.answers, "is_right": findings.is_right}
        content = render("answers", **shown, mark=words.mark)
        yield Section("answers", say("answers"), content)
    stages, digests = data_view.stages(findings), data_view.digests(findings)
    if stages or digests:
        charts = [svg.bars(stage.lengths) for stage in stages if stage.lengths]
        charts += [svg.bars(scores) for stage in stages for scores in stage.scores]
        columns = data_view.source_columns()
        heads = {"source_columns": columns, "selected_columns": data_view.selected_columns()}
        content = render("data", stages=stages, charts=charts, digests=digests, **heads)
        yield Section("data", say("data"), content)
    if exported := figures_view.exports(findings):
        yield Section("export", say("export"), render("export", exported=exported))
    facts, times = figures_view.machine(findings), figures_view.times(findings)
    if facts or times or findings.recipe:
        yield Section("run", say("run"), render("run", facts=facts, times=times, recipe=findings.recipe))


def render(template: str, **values: Any) -> Markup:
    """A template with its values, each of them escaped."""
    return Markup(_environment().get_template(f"{template}.html").render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mlx_zh.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_in_both_languages,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "say": say,
        "named": named,
        "columns": exam_view.columns,
        "head_line": exam_view.head_line,
        "interval": exam_view.interval,
        "percent": exam_view.percent,
        "points": words.points,
        "verdict": words.verdict,
    }
    return environment


def _in_both_languages(value: object) -> object:
    """What a template shows of a value. A `Text` is shown in both languages; the page's style hides one of them."""
    if not isinstance(value, Text):
        return value
    if value.zh == value.en:
        return value.zh
    both = Markup('<span class="zh" lang="zh-Hans">{}</span><span class="en" lang="en">{}</span>')
    return both.format(value.zh, value.en)
