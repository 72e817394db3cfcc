"""Every sentence in the program's code, as `language/console.yaml` must word it.

    python tests/language/wordings.py        # prints the sentences that have no Chinese wording

A sentence is a string with three words or more that is not a docstring. Fields of an f-string are numbered.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx_zh

PACKAGE = Path(mlx_zh.__file__).parent

# Their strings are not sentences for the terminal: pages, plots, model cards and files for other programs.
ELSEWHERE = ("reporting/", "models/export/card.py", "models/export/ollama.py", "language/", "chatting/transcript.py")


def sentences() -> dict[str, str]:
    """Every sentence with the first place where it stands (`file:line`)."""
    places: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(ELSEWHERE):
            for line, text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
                places.setdefault(text, f"{name}:{line}")
    return places


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    seen = set(map(id, _docstrings(tree)))
    for call in _calls_of_pages(tree):
        seen |= {id(inner) for inner in ast.walk(call.args[0])}
    for node in ast.walk(tree):  # an outer expression comes before its parts
        if id(node) in seen:
            continue
        parts = _parts(node)
        if parts is None:
            continue
        seen |= {id(inner) for inner in ast.walk(node) if _is_text_of(node, inner)}
        text = _numbered(parts)
        if is_sentence(text):
            yield node.lineno, text  # type: ignore[attr-defined]


def is_sentence(text: str) -> bool:
    """Whether `text` has three English words or more. The chat's lines in both languages are none."""
    words = [word for word in re.sub(r"\{\d+\}", "", text).split() if _WORD.fullmatch(word)]
    return len(words) >= 3 and " · " not in text and not text.startswith(NAMES)


_WORD = re.compile(r"[(“\"']*[A-Za-z][a-z’']+[.,;:!?)”\"'`]*")

# Parts of scripts, other programs' messages, sample text, a licence's own words, and a sentence beside its Chinese.
NAMES = (
    "# Decided",
    "(?i:",
    "() => ",
    "Caused GPU",
    "Config name is missing",
    "Hello ",
    "Llama {0} is licensed",
    "No module named pip",
    "No space left on device",
    "[METAL]",
    "[malloc]",
    "[metal::malloc]",
    "default-src ",
    "failed: out of memory",
    "回答中断",
    "请问怎样",
)


def _parts(node: ast.AST) -> list[str | None] | None:
    """A string expression as its texts, with None for each field; None for any other expression."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else None for part in node.values]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _parts(node.left), _parts(node.right)
        return None if left is None and right is None else [*(left or [None]), *(right or [None])]
    return None


def _is_text_of(node: ast.AST, inner: ast.AST) -> bool:
    """Whether `inner` is one of the texts that `node` is made of, and not a string within one of its fields."""
    if inner is node:
        return True
    children = [node.left, node.right] if isinstance(node, ast.BinOp) else getattr(node, "values", [])
    return any(
        child is inner or (isinstance(child, ast.BinOp | ast.JoinedStr) and _is_text_of(child, inner))
        for child in children
    )


def _numbered(parts: list[str | None]) -> str:
    """The texts as one format string with numbered fields. `{name}` and `{name!r}` in a text are fields too."""
    pieces: list[str | None] = []
    for part in parts:
        texts = [None] if part is None else _NAMED.split(part)
        pieces += [piece for text in texts for piece in (None, text)][1:]
    fields = iter(range(len(pieces)))
    return "".join(
        f"{{{next(fields)}}}" if piece is None else piece.replace("{", "{{").replace("}", "}}") for piece in pieces
    )


def _calls_of_pages(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that word a text of the studio's pages, which `studio.yaml` has, and those that give code to a page."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = getattr(function, "value", None)
        own = isinstance(function, ast.Name) or getattr(owner, "id", getattr(owner, "attr", "")) in _STUDIOS
        if name in PAGE_CALLS or (name == "say" and own):
            yield node


_STUDIOS = ("studio", "_studio")
PAGE_CALLS = ("worded", "said", "props", "classes", "run_javascript")

_NAMED = re.compile(r"\{[a-z_]+(?:![rs])?\}")  # as str.format takes them


def _docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    """Strings that stand alone as a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


if __name__ == "__main__":
    from mlx_zh.language.translation import wordings

    missing = {text: place for text, place in sentences().items() if text not in wordings()}
    for text, place in missing.items():
        print(f"{place}\t{text!r}")
    sys.exit(bool(missing))
