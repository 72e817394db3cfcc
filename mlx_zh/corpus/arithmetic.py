"""Arithmetic in MathGLM's manner (arXiv:2309.03241): an expression, every step of its reduction, an exact answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_DECIMALS = 6  # no value has more; a division that would is never set
_LARGEST = 10**12


@dataclass(frozen=True, slots=True)
class _Number:
    text: str
    value: Fraction


@dataclass(frozen=True, slots=True)
class _Operation:
    operator: str
    left: _Tree
    right: _Tree


_Tree = _Number | _Operation


def problem(seed: int, index: int) -> str:
    """Problem number `index` as MathGLM writes one: `expression=step=…=answer`. A pure function of its arguments."""
    rng = random.Random(f"arithmetic {seed} {index}")
    while True:
        tree = _grow(rng, rng.randint(1, 6))
        steps = _steps(tree)
        if steps is not None:
            return "=".join(steps)


def problems(seed: int, count: int) -> Iterator[str]:
    """The first `count` problems; a larger count begins with the same ones."""
    return (problem(seed, index) for index in range(count))


def _grow(rng: random.Random, operations: int) -> _Tree:
    """A random expression of so many operations."""
    if operations == 0:
        return _number(rng)
    operator = rng.choice("++--**/")
    if operator == "/":
        return _division(rng, operations - 1)
    left = rng.randint(0, operations - 1)
    return _Operation(operator, _grow(rng, left), _grow(rng, operations - 1 - left))


def _division(rng: random.Random, operations: int) -> _Tree:
    """A division that comes out even, or one by a number that leaves a few decimals."""
    if operations == 0 and rng.random() < 0.7:
        divisor = rng.randint(2, 999)
        return _Operation("/", _leaf(Fraction(divisor * rng.randint(1, 999))), _leaf(Fraction(divisor)))
    return _Operation("/", _grow(rng, operations), _leaf(Fraction(rng.choice((2, 4, 5, 8, 10, 16, 20, 25, 50)))))


def _number(rng: random.Random) -> _Number:
    kind = rng.random()
    value = Fraction(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    if kind < 0.15:
        value += Fraction(rng.randint(0, 99), 100)
    elif kind < 0.2:
        return _Number(f"{_written(value)}%", value / 100)
    elif kind < 0.25 and value:
        value = -value
    return _leaf(value)


def _leaf(value: Fraction) -> _Number:
    return _Number(_written(value), value)


def _steps(tree: _Tree) -> list[str] | None:
    """The expression after each reduction, the answer last; None where a value is not exact in a few decimals."""
    steps = [_shown(tree)]
    while isinstance(tree, _Operation):
        reduced = _reduce(tree)
        if reduced is None:
            return None
        tree = reduced
        steps.append(_shown(tree))
    return steps


def _reduce(tree: _Operation) -> _Tree | None:
    """The tree with its first operation on two numbers carried out, in the order of evaluation."""
    for side in ("left", "right"):
        inner = getattr(tree, side)
        if isinstance(inner, _Operation):
            below = _reduce(inner)
            if below is None:
                return None
            return _Operation(tree.operator, *((below, tree.right) if side == "left" else (tree.left, below)))
    assert isinstance(tree.left, _Number) and isinstance(tree.right, _Number)
    value = _value(tree.operator, tree.left.value, tree.right.value)
    return None if value is None else _leaf(value)


def _value(operator: str, a: Fraction, b: Fraction) -> Fraction | None:
    if operator == "/":
        if b == 0:
            return None
        value = a / b
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    exact = (value * 10**_DECIMALS).denominator == 1
    return value if exact and abs(value) < _LARGEST else None


def _shown(tree: _Tree) -> str:
    if isinstance(tree, _Number):
        return tree.text
    left, right = _shown(tree.left), _shown(tree.right)
    level = _PRECEDENCE[tree.operator]
    if isinstance(tree.left, _Operation) and _PRECEDENCE[tree.left.operator] < level:
        left = f"({left})"
    # To the right even an operation of the same rank needs brackets: a*(b/c) is evaluated in that order.
    if right.startswith("-") or (isinstance(tree.right, _Operation) and _PRECEDENCE[tree.right.operator] <= level):
        right = f"({right})"
    return f"{left}{tree.operator}{right}"


def _written(value: Fraction) -> str:
    """A terminating decimal, written out."""
    scaled = value * 10**_DECIMALS
    assert scaled.denominator == 1
    sign, digits = ("-" if scaled < 0 else ""), str(abs(scaled.numerator)).rjust(_DECIMALS + 1, "0")
    whole, decimals = digits[:-_DECIMALS], digits[-_DECIMALS:].rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"
