"""`report.html`: one file that needs nothing else, works offline, and shows Chinese or English."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from mlx_zh.reporting import data_view, exam_view, figures_view, svg, words
from mlx_zh.reporting.charts import exam_charts, training_charts
from mlx_zh.reporting.findings import Findings, TrainingResult
from mlx_zh.reporting.markup import Html, escape, join, spoken, tag
from mlx_zh.reporting.messages import Text, named, say


def page(findings: Findings, made: str) -> str:
    """The whole page; `made` is its date."""
    style, script = (
        files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    # Only this style and this script are obeyed and nothing is fetched: whatever else got into the page is dead.
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    titles = {"zh": f"{findings.name} 微调报告", "en": f"{findings.name}: fine-tuning report"}
    sections = [section for section in _sections(findings) if section is not None]
    body = tag("div", _header(findings, made), _nav(sections), *(html for _, _, html in sections), class_="page")
    return (
        f'<!doctype html>\n<html lang="zh-Hans" data-zh="{escape(titles["zh"])}" data-en="{escape(titles["en"])}">\n'
        f'<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(titles['zh'])}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


Section = tuple[str, Text, Html]


def _sections(findings: Findings) -> list[Section | None]:
    return [
        _summary(findings),
        _section("benchmarks", say("benchmarks"), _benchmarks(findings)),
        *(
            _section(stage, say(f"training_{stage}"), _training(training))
            for stage, training in findings.training.items()
        ),
        _section("answers", say("answers"), _answers(findings)),
        _section("data", say("data"), data_view.data(findings)),
        _section("export", say("export"), figures_view.export(findings)),
        _section("run", say("run"), figures_view.machine(findings)),
    ]


def _section(key: str, title: Text, content: list[Html]) -> Section | None:
    return (key, title, tag("section", tag("h2", title), *content, id=key)) if content else None


def _header(findings: Findings, made: str) -> Html:
    switch = Html(
        '<fieldset class="language" aria-label="语言 Language">'
        '<input type="radio" name="language" id="lang-zh" checked><label for="lang-zh" lang="zh-Hans">中文</label>'
        '<input type="radio" name="language" id="lang-en"><label for="lang-en" lang="en">English</label></fieldset>'
    )
    model = findings.manifest.get("model", {}).get("source")
    about = [tag("p", part) for part in (model, say("made", time=made)) if part]
    name = tag("h1", tag("small", say("report")), findings.name)
    return tag("header", tag("div", name, *about), switch)


def _nav(sections: list[Section]) -> Html:
    links = [tag("a", title, href=f"#{key}") for key, title, _ in sections]
    return tag("nav", *links, aria_label="目录 Contents")


def _summary(findings: Findings) -> Section:
    tiles = [
        tag("div", tag("dt", tile.name), tag("dd", tile.value, tag("small", tile.remark)), class_="tile")
        for tile in words.tiles(findings)
    ]
    calm: list[Html] = []
    if not findings.alarms:
        calm = [tag("p", "✓ ", say("no_alarm"), class_="calm")]
    html = tag("section", tag("h2", say("summary")), tag("dl", *tiles, class_="tiles"), *calm, id="summary")
    return "summary", say("summary"), Html(html + _alarms(findings))


def _alarms(findings: Findings) -> Html:
    if not findings.alarms:
        return Html("")
    entries = [tag("li", tag("b", alarm.where), " — ", alarm.what) for alarm in findings.alarms]
    return tag("section", tag("h2", say("alarms")), tag("ul", *entries), class_="alarms", id="alarms")


def _benchmarks(findings: Findings) -> list[Html]:
    parts: list[Html] = []
    for exam in findings.exams:
        parts.append(tag("h3", exam.title))
        parts += exam_view.table(exam)
    if parts:
        parts.insert(0, tag("p", say("exam_note"), class_="note"))
        parts.append(tag("div", *(svg.dots(chart) for chart in exam_charts(findings)), class_="charts"))
    return parts


def _training(training: TrainingResult) -> list[Html]:
    facts = figures_view.facts(words.training_facts(training), "facts across")
    charts = tag("div", *(svg.curves(chart) for chart in training_charts(training)), class_="charts")
    return [facts, charts, tag("p", say("smoothing"), class_="note")]


def _answers(findings: Findings) -> list[Html]:
    if not findings.answers:
        return []
    parts = [tag("p", say("answers_note"), class_="note")]
    for index, prompt in enumerate(findings.prompts):
        replies = []
        for stage, answers in findings.answers.items():
            answer = answers[index] if index < len(answers) else ""
            said = escape(answer) if answer else spoken(say("no_answer"))
            replies.append(tag("div", tag("h4", named(stage)), tag("p", said), class_="reply"))
        asked = tag("p", prompt, class_="prompt")
        parts.append(tag("div", asked, tag("div", *replies, class_="replies"), class_="sample"))
    return [parts[0], tag("div", join(parts[1:]))]
