"""The escapes of `report.md`, read back by a CommonMark reader: the text comes out as it went in."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mlx_zh.reporting.findings import Findings
from mlx_zh.reporting.markdown import markdown, safe

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# Letters and digits, and everything that means something to Markdown, more often than chance would have it.
TEXTS = st.text(st.one_of(st.sampled_from("\\`*_[]()|~$#>+-=.!&<:;19a中 "), st.characters(exclude_categories=["C"])))


def shown(source: str) -> list[str]:
    """The texts of the paragraphs and cells that a reader sees; nothing else may be in the page."""
    page = READER.render(source)
    pieces = re.findall(r"<(?:p|td|th)>(.*?)</(?:p|td|th)>", page, re.DOTALL)
    rest = re.sub(r"<(p|td|th)>.*?</\1>|</?(?:table|thead|tbody|tr)>|\s", "", page, flags=re.DOTALL)
    assert rest == "", page
    assert not any("<" in piece for piece in pieces), page
    return [html.unescape(piece) for piece in pieces]


def plain(text: str) -> str:
    """The text on one line. `safe` puts an invisible space into addresses."""
    return " ".join(text.split())


@pytest.mark.parametrize("text", ["25.00", "0.1 s", "22.50 → 32.50", "+3.10", "−1.00", "-0.5", "1e-5", "3)"])
def test_figures_need_no_backslash_but_for_a_list(text):
    assert safe(text) == ("3\\)" if text == "3)" else text)


@given(TEXTS)
@example("25.00")
@example("1. a list")
@example("12) a list")
@example("\\1.5")
@example("- a")
@example("+")
@example("===")
@example("---")
@example("# a heading")
@example("> a quotation")
@example("| a | b |")
@example("a\\|b")
@example("&lt; &amp; &#35;")
def test_a_paragraph_reads_as_the_text(text):
    text = plain(text)
    assert [piece.replace("\u200b", "") for piece in shown(safe(text))] == (
        [text.replace("\u200b", "")] if text else []
    )


@given(TEXTS, TEXTS)
@example("22.50", "a\\|b")
def test_a_cell_reads_as_the_text(left, right):
    report = markdown(Findings("run", prompts=["?"], answers={"base": [left], "sft": [right]}), "now", [])
    table = report[report.index("| ") : report.rindex("|") + 1]
    cells = [piece.replace("\u200b", "") for piece in shown(table)[3::2]]
    assert cells == [plain(text).replace("\u200b", "") for text in (left, right)]
