"""Strangers' texts in terminals, Markdown and lines of JSON, read back by what reads them."""

from __future__ import annotations

import html
import io
import json
import re
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mlx_zh.chatting.terminal import Screen
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.records import Records
from mlx_zh.reporting.findings import Findings
from mlx_zh.reporting.markdown import markdown as report
from mlx_zh.system import console
from mlx_zh.system.escaping import (
    markdown,
    markdown_block,
    markdown_code,
    markdown_table,
    one_line,
    text_lines,
    without_controls,
)
from mlx_zh.system.redaction import printable
from mlx_zh.training.metrics import MetricsLog

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TEXTS = st.text(st.one_of(st.sampled_from("\\`*_[]()|~$#>+-=.!&<:;19a中 \n\t\x1b\x85\u2028\u202e"), st.characters()))
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts too


def obeyed(text: str) -> list[str]:
    """The characters that a terminal obeys: controls, and those that choose a direction, by Unicode's own table."""
    return [
        c
        for c in text
        if (unicodedata.category(c) == "Cc" and c not in "\n\t")
        or unicodedata.category(c) in ("Zl", "Zp", "Cs")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or c in DIRECTIONS
    ]


def shown(source: str) -> str:
    """The only paragraph of a page as its reader sees it."""
    page = READER.render(source)
    match = re.fullmatch(r"<p>([^<]*)</p>\n|", page)
    assert match is not None, page
    return html.unescape(match[1] or "")


# ---- terminals


@given(TEXTS)
@example(DIRECTIONS + SEPARATORS)
@example("\x1b]52;c;cm0gLXJm\x07\x1b[8mhidden\x9b2J\x90q\x9c")
def test_nothing_is_obeyed(text: str):
    assert obeyed(without_controls(text)) == [] == obeyed(one_line(text))
    assert without_controls("a中\n\tb👨\u200d👩") == "a中\n\tb👨\u200d👩"
    assert "\n" not in one_line(text) and "\t" not in one_line(text)
    assert [c for c in obeyed(printable(text)) if c != "\x1b"] == []
    out = io.StringIO()
    Screen(out).write(text)
    assert obeyed(out.getvalue()) == []


@pytest.mark.parametrize("bar", [console.RowBar, console.CountBar, console.StepBar])
def test_the_name_of_a_bar_is_that_of_a_file(bar: type, monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    name = "a\x1b[8mb\u202ec\nd.jsonl"
    made = {console.RowBar: (name,), console.CountBar: (name, 3, "row"), console.StepBar: (name, 3, 0)}[bar]
    shown_bar = bar(*made)
    assert shown_bar._bar.desc.removesuffix(": ") == "a\ufffd[8mb\ufffdc d.jsonl"
    shown_bar.close()


# ---- Markdown


@given(TEXTS)
@example("C #")
@example("# #")
@example("&#35; &lt;script&gt;")
@example("[a](javascript:alert)")
@example("a\u2028# b")
def test_markdown_is_that_text_everywhere(text: str):
    line = one_line(text)
    assert shown(markdown(text)).replace("\u200b", "") == line.replace("\u200b", "")
    heading = READER.render(f"## {markdown(text)}")
    assert html.unescape(heading).replace("\u200b", "") == f"<h2>{line}</h2>\n".replace("\u200b", "")


@given(TEXTS)
@example("`")
@example("``a` b```")
@example(" a ")
@example("<b>&amp;\\`")
def test_a_code_span_is_that_text(text: str):
    page = READER.render(f"x {markdown_code(text)} y")
    line = one_line(text)
    expected = f"<p>x <code>{html.escape(line)}</code> y</p>\n" if line else "<p>x  y</p>\n"
    assert html.unescape(page) == html.unescape(expected)


@given(TEXTS.map(without_controls))
@example("```\n# a\n````\n")
@example("~~~\n```")
def test_a_block_is_that_text(text: str):
    [token] = READER.parse(markdown_block(text, "yaml"))
    assert (token.type, token.info, token.content) == ("fence", "yaml", text + "\n")


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=2), min_size=1, max_size=4))
@example([["a|b\\", "| --- |"], ["", "\\|"]])
def test_a_table_has_those_cells(rows: list[list[str]]):
    tokens = READER.parse(markdown_table(["a", "b"], rows))
    assert tokens[-1].type == "table_close"
    cells = ["".join(t.content for t in token.children or ()) for token in tokens if token.type == "inline"][2:]
    expected = [one_line(cell).replace("\u200b", "") for row in rows for cell in row]
    assert [cell.replace("\u200b", "") for cell in cells] == expected


@given(TEXTS, TEXTS)
@example("", "#")
@example("---", "```")
def test_a_report_has_no_markup_from_prompts_answers_and_recipes(prompt: str, recipe: str):
    findings = Findings("run", prompts=[prompt], answers={"base": [prompt]}, recipe=recipe)
    page = READER.render(report(findings, "now", [f"plots/exam-{re.sub('/', '', prompt)}.png"]))
    tags = set(re.findall(r"</?([a-z0-9]+)", page))
    allowed = "h1 h2 h3 p strong table thead tbody tr th td pre code img"
    assert tags <= set(allowed.split())
    assert len(re.findall("<h[123]>", page)) == 1 + page.count("<h2>") + page.count("<h3>")
    assert one_line(prompt).replace("\u200b", "") in html.unescape(page).replace("\u200b", "")


# ---- lines of JSON


@given(st.lists(st.text(st.one_of(st.sampled_from(SEPARATORS + "\r\n"), st.characters(exclude_categories=["Cs"])))))
@example([SEPARATORS])
def test_lines_of_json_are_cut_at_line_feeds_alone(texts: list[str]):
    written = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    assert [json.loads(line) for line in text_lines(written)] == texts


def test_records_of_answers_with_separators_are_read_back(tmp_path):
    answer = Answer("law", f"1{SEPARATORS}", "A", "A", None, None, 9, False, f"答案{SEPARATORS}")
    records = Records(tmp_path, "base", "exam")
    (tmp_path / "base-exam.jsonl").write_text(
        json.dumps(answer.as_dict(), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (tmp_path / "base-exam.json").write_text("{}", encoding="utf-8")
    assert records.load_exam() == ({}, [answer])


def test_metrics_with_separators_are_read_back(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 0.5, "x": SEPARATORS}, ensure_ascii=False) + "\n", "utf-8"
    )
    assert MetricsLog(tmp_path / "m.jsonl").read() == [{"step": 1, "epoch": 0.5, "x": SEPARATORS}]
