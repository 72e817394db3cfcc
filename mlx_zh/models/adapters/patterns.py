"""PEFT's `rank_pattern` and `alpha_pattern`: names of modules, or regular expressions, matched in bounded time.

PEFT matches with Python's `re`, where a pattern of a hundred characters from a stranger can run for years. Here a
name is looked up. A regular expression is matched with sets of positions: each part of it maps the places where it
may begin to those where it may end, so nothing is tried twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"(?:[\w-]|\\?\.)+")
_ATOM = re.compile(r"\\[.dwDWsS\-/_]|\[\^?(?:\\[.dwDWsS\-/_\]]|[^\\\]\[])+\]|[^\\()\[\]{}*+?|^$]")
_REPEAT = re.compile(r"\*|\+|\?|\{(\d{1,3})(?:(,)(\d{1,3})?)?\}")
_LONGEST = 400  # characters of a regular expression
_LONGEST_PATH = 500
_MOST = 64  # regular expressions
_DEEPEST = 8  # groups within groups
_REPEATS = 2  # repetitions within repetitions

Positions = frozenset[int]
Matcher = Callable[[str, Positions], Positions]  # where a part may begin in a text -> where it may end


# Where a path begins, and where it ends.
_ANCHORS: dict[str, Matcher] = {
    "^": lambda text, starts: starts & {0},
    "$": lambda text, starts: starts & {len(text)},
}


@dataclass
class Patterns:
    """A value for each module path: that of the first pattern that matches the path or its end, after a dot."""

    names: dict[str, tuple[int, float]] = field(default_factory=dict)
    expressions: list[tuple[int, Matcher, float]] = field(default_factory=list)

    def value(self, path: str, default: float) -> float:
        """The value for a path; `default` if no pattern matches."""
        parts = path.split(".")
        if len(path) > _LONGEST_PATH:
            return default
        fitting = [self.names[name] for i in range(len(parts)) if (name := ".".join(parts[i:])) in self.names]
        starts = frozenset((0, *(match.end() for match in re.finditer(r"\.", path))))
        for index, matcher, value in self.expressions:
            if len(path) in matcher(path, starts):
                fitting.append((index, value))
                break
        return min(fitting)[1] if fitting else default


def read_patterns(patterns: dict[str, Any]) -> Patterns:
    """PEFT's mapping from patterns to numbers. Raises ValueError for a pattern or number that cannot be used."""
    result = Patterns()
    for index, (pattern, given) in enumerate(patterns.items()):
        value = float(given)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError("ranks and alphas must be positive numbers")
        if _NAME.fullmatch(pattern):
            result.names.setdefault(pattern.replace("\\", ""), (index, value))
            continue
        if len(pattern) > _LONGEST or len(result.expressions) == _MOST:
            raise ValueError(f"the pattern {pattern[:80]!r} is too complex")
        parser = _Parser(pattern)
        matcher, _ = parser.alternatives(0)
        if parser.rest:
            raise parser.unusable()
        result.expressions.append((index, matcher, value))
    return result


class _Parser:
    """Reads a regular expression from left to right; what is neither text, class, group nor repetition is refused."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.rest = pattern

    def unusable(self) -> ValueError:
        """The error for the place that the parser has reached."""
        return ValueError(f"the pattern {self.pattern[:80]!r} cannot be used, at {self.rest[:20]!r}")

    def alternatives(self, depth: int) -> tuple[Matcher, int]:
        """Sequences with | between them, in `depth` groups; and how deep repetitions stand in each other."""
        if depth > _DEEPEST:
            raise self.unusable()
        choices = [self._sequence(depth)]
        while self.rest.startswith("|"):
            self.rest = self.rest[1:]
            choices.append(self._sequence(depth))
        matchers = [matcher for matcher, _ in choices]
        return (matchers[0] if len(matchers) == 1 else _any_of(matchers)), max(nested for _, nested in choices)

    def _sequence(self, depth: int) -> tuple[Matcher, int]:
        parts: list[Matcher] = []
        deepest = 0
        while self.rest and self.rest[0] not in "|)":
            if anchor := _ANCHORS.get(self.rest[0]):
                self.rest = self.rest[1:]
                parts.append(anchor)
                continue
            part, nested = self._group(depth) if self.rest[0] == "(" else (self._character(), 0)
            if match := _REPEAT.match(self.rest):
                nested += 1
                if nested > _REPEATS:
                    raise self.unusable()
                self.rest = self.rest[match.end() :]
                part = _repeated(part, *_counts(match))
            deepest = max(deepest, nested)
            parts.append(part)
        return _in_turn(parts), deepest

    def _group(self, depth: int) -> tuple[Matcher, int]:
        opening = "(?:" if self.rest.startswith("(?:") else "("
        self.rest = self.rest[len(opening) :]
        inner = self.alternatives(depth + 1)
        if not self.rest.startswith(")"):
            raise self.unusable()
        self.rest = self.rest[1:]
        return inner

    def _character(self) -> Matcher:
        match = _ATOM.match(self.rest)
        if match is None:
            raise self.unusable()
        try:
            atom = re.compile(match.group())
        except re.error:
            raise self.unusable() from None
        self.rest = self.rest[match.end() :]
        return lambda text, starts: frozenset(start + 1 for start in starts if atom.match(text, start))


def _counts(match: re.Match[str]) -> tuple[int, int | None]:
    """How often a part stands at least and at most."""
    simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if match.group() in simple:
        return simple[match.group()]
    least = int(match[1])
    return least, (least if match[2] is None else int(match[3]) if match[3] else None)


def _in_turn(parts: list[Matcher]) -> Matcher:
    def match(text: str, starts: Positions) -> Positions:
        for part in parts:
            starts = part(text, starts)
        return starts

    return match


def _any_of(choices: list[Matcher]) -> Matcher:
    return lambda text, starts: frozenset().union(*(choice(text, starts) for choice in choices))


def _repeated(part: Matcher, least: int, most: int | None) -> Matcher:
    def match(text: str, starts: Positions) -> Positions:
        for _ in range(least):
            starts = part(text, starts)
        ends, new, count = starts, starts, least
        while new and (most is None or count < most):
            new = part(text, new) - ends
            ends, count = ends | new, count + 1
        return ends

    return match
