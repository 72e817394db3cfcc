"""Markdown of a model as HTML that can do nothing: what a model writes is text, and only this program writes tags.

Every text is escaped before a tag is put around it, so there is no HTML to be cleaned. There are no pictures and no
HTML of the text's own; a link is one only to http or https. Each line is read once: a hostile text costs no more time
than a long one. Supported are the parts of CommonMark that models write: headings, lists, quotations, code, tables,
rules, emphasis and links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from mlx_zh.system.escaping import without_controls

LONGEST = 100_000  # characters that are read as Markdown; a longer text is shown as it is
_LONGEST_LINE = 5_000  # characters of a line in which emphasis and links are looked for

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]{0,30})[^`]*$")
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*$")
_RULE = re.compile(r"^ {0,3}(?:-[ \t]*){3,}$|^ {0,3}(?:\*[ \t]*){3,}$|^ {0,3}(?:_[ \t]*){3,}$")
_ITEM = re.compile(r"^([ \t]*)(?:([-*+])|(\d{1,9})[.)])[ \t]+(.*)$")
_QUOTE = re.compile(r"^ {0,3}> ?(.*)$")
_TABLE_RULE = re.compile(r"^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_CODE = re.compile(r"(`+)(.+?)(?<!`)\1(?!`)")
# Escaped text, in which these characters stand for themselves.
_LINK = re.compile(r"!?\[([^\[\]]{1,500})\]\((https?://[^\s()<>]{1,1000})\)")
_STRONG = re.compile(r"(\*\*|__)(?=\S)([^*_]{1,1000}?)(?<=\S)\1")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]{1,1000}?)(?<=[^\s*])\*(?![\w*])")
_STRUCK = re.compile(r"~~(?=\S)([^~]{1,1000}?)(?<=\S)~~")
_DEEPEST = 6  # lists and quotations within each other


def safe_html(text: str) -> str:
    """The text as HTML made of a fixed set of tags without attributes, links and classes of code excepted."""
    text = without_controls(text.replace("\r\n", "\n").replace("\r", "\n"))
    if len(text) > LONGEST:
        return f"<pre>{escape(text)}</pre>"
    return "".join(_blocks(text.split("\n"), 0))


def _blocks(lines: list[str], depth: int) -> Iterator[str]:
    at, paragraph = 0, list[str]()
    while at < len(lines):
        line = lines[at]
        reader = _reader(lines, at, depth)
        if reader is None and line.strip():
            paragraph.append(line.strip())
            at += 1
            continue
        if paragraph:
            yield f"<p>{'<br>'.join(map(_inline, paragraph))}</p>"
            paragraph = []
        if reader is None:
            at += 1
        else:
            html, at = reader
            yield html
    if paragraph:
        yield f"<p>{'<br>'.join(map(_inline, paragraph))}</p>"


def _reader(lines: list[str], at: int, depth: int) -> tuple[str, int] | None:
    """The block that begins at a line, and the line after it; None for a paragraph's line and a blank one."""
    line = lines[at]
    if fence := _FENCE.match(line):
        return _code(lines, at, fence)
    if heading := _HEADING.match(line):
        level = min(6, 2 + len(heading[1]))  # the page has headings of its own
        return f"<h{level}>{_inline(heading[2])}</h{level}>", at + 1
    if _RULE.match(line):
        return "<hr>", at + 1
    if depth < _DEEPEST and _QUOTE.match(line):
        return _quotation(lines, at, depth)
    if depth < _DEEPEST and _ITEM.match(line):
        return _list(lines, at, depth)
    if "|" in line and at + 1 < len(lines) and "|" in lines[at + 1] and _TABLE_RULE.match(lines[at + 1]):
        return _table(lines, at)
    return None


def _code(lines: list[str], at: int, fence: re.Match[str]) -> tuple[str, int]:
    """A block of code; one that is not ended yet goes to the end of the text."""
    end = at + 1
    while end < len(lines) and not _closes(lines[end], fence[1]):
        end += 1
    code = escape("\n".join(lines[at + 1 : end]))
    label = f"<small>{escape(fence[2])}</small>" if fence[2] else ""
    return f"{label}<pre><code>{code}</code></pre>", end + 1


def _closes(line: str, fence: str) -> bool:
    text = line.strip()
    return len(text) >= len(fence) and not text.strip(fence[0])


def _quotation(lines: list[str], at: int, depth: int) -> tuple[str, int]:
    inner = []
    while at < len(lines) and (quoted := _QUOTE.match(lines[at])):
        inner.append(quoted[1])
        at += 1
    return f"<blockquote>{''.join(_blocks(inner, depth + 1))}</blockquote>", at


def _list(lines: list[str], at: int, depth: int) -> tuple[str, int]:
    """A list; what is indented further than its marks belongs to the item before."""
    first = _ITEM.match(lines[at])
    assert first is not None
    indent, numbered = _width(first[1]), first[3] is not None
    start = f' start="{int(first[3])}"' if numbered and int(first[3]) != 1 else ""
    items: list[list[str]] = []
    while at < len(lines):
        item = _ITEM.match(lines[at])
        if item and _width(item[1]) <= indent:
            if (item[3] is not None) != numbered or _width(item[1]) < indent:
                break
            items.append([item[4]])
        elif not lines[at].strip():
            follows = lines[at + 1] if at + 1 < len(lines) else ""
            again = _ITEM.match(follows)
            if not (again and _width(again[1]) >= indent) and _width(follows) <= indent:
                break
            items[-1].append("")
        elif _width(lines[at]) > indent:
            items[-1].append(lines[at].expandtabs(4)[min(indent + 2, _width(lines[at])) :])
        else:
            break
        at += 1
    name = "ol" if numbered else "ul"
    inner = "".join(f"<li>{_tight(''.join(_blocks(item, depth + 1)))}</li>" for item in items)
    return f"<{name}{start}>{inner}</{name}>", at


def _tight(html: str) -> str:
    """The content of an item that is one paragraph, without its tags."""
    single = html.startswith("<p>") and html.count("<p>") == 1
    return html.removeprefix("<p>").replace("</p>", "", 1) if single else html


def _width(text: str) -> int:
    """Columns of white space at the beginning."""
    text = text.expandtabs(4)
    return len(text) - len(text.lstrip(" "))


def _table(lines: list[str], at: int) -> tuple[str, int]:
    head = _cells(lines[at])
    rows, at = [], at + 2
    while at < len(lines) and "|" in lines[at] and lines[at].strip():
        cells = _cells(lines[at])[: len(head)]
        rows.append(cells + [""] * (len(head) - len(cells)))
        at += 1
    html = _row(head, "th") + "".join(_row(row, "td") for row in rows)
    return f"<div><table>{html}</table></div>", at


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    """A line with emphasis, code and links; what is code stays as it is."""
    if len(text) > _LONGEST_LINE:
        return escape(text)
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_styled(text[end : code.start()]), f"<code>{escape(code[2].strip() or code[2])}</code>"]
        end = code.end()
    return "".join([*parts, _styled(text[end:])])


def _styled(text: str) -> str:
    parts, end = [], 0
    for link in _LINK.finditer(text):
        address = escape(link[2])
        shown = f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{escape(link[1])}</a>'
        parts += [_emphasised(text[end : link.start()]), shown]
        end = link.end()
    return "".join([*parts, _emphasised(text[end:])])


def _emphasised(text: str) -> str:
    text = _STRONG.sub(r"<strong>\2</strong>", escape(text))
    return _STRUCK.sub(r"<del>\1</del>", _EMPHASIS.sub(r"<em>\1</em>", text))
