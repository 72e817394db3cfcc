"""Arithmetic problems in MathGLM's form (arXiv:2309.03241): an expression, each step of its reduction, the answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_DECIMALS = 6  # decimals that a value may have; an expression with a longer value is drawn again
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
    """Problem number `index`, written as `expression=step=…=answer`. The same arguments give the same problem."""
    rng = random.Random(f"arithmetic {seed} {index}")
    while True:
        tree = _grow(rng, rng.randint(1, 6))
        steps = _steps(tree)
        if steps is not None:
            return "=".join(steps)


def problems(seed: int, count: int) -> Iterator[str]:
    """Problems 0 to `count - 1`; a larger count begins with the same problems."""
    return (problem(seed, index) for index in range(count))


def _grow(rng: random.Random, operations: int) -> _Tree:
    """A random expression with this number of operations."""
    if operations == 0:
        return _number(rng)
    operator = rng.choice("++--**/")
    if operator == "/":
        return _division(rng, operations - 1)
    left = rng.randint(0, operations - 1)
    return _Operation(operator, _grow(rng, left), _grow(rng, operations - 1 - left))


def _division(rng: random.Random, operations: int) -> _Tree:
    """A division without remainder, or a division by a number that leaves only a few decimals."""
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
        return _Number(f"{_decimal(value)}%", value / 100)
    elif kind < 0.25 and value:
        value = -value
    return _leaf(value)


def _leaf(value: Fraction) -> _Number:
    return _Number(_decimal(value), value)


def _steps(tree: _Tree) -> list[str] | None:
    """The expression after each reduction, the answer last; None if a value needs too many digits."""
    steps = [_expression(tree)]
    while isinstance(tree, _Operation):
        reduced = _reduce(tree)
        if reduced is None:
            return None
        tree = reduced
        steps.append(_expression(tree))
    return steps


def _reduce(tree: _Operation) -> _Tree | None:
    """The tree with its first operation on two numbers carried out, or None if its value needs too many digits."""
    for side in ("left", "right"):
        inner = getattr(tree, side)
        if isinstance(inner, _Operation):
            reduced = _reduce(inner)
            if reduced is None:
                return None
            return _Operation(tree.operator, *((reduced, tree.right) if side == "left" else (tree.left, reduced)))
    assert isinstance(tree.left, _Number) and isinstance(tree.right, _Number)
    value = _compute(tree.operator, tree.left.value, tree.right.value)
    return None if value is None else _leaf(value)


def _compute(operator: str, a: Fraction, b: Fraction) -> Fraction | None:
    """The operation's exact value, or None if it is undefined, too large, or has too many decimals."""
    if operator == "/":
        if b == 0:
            return None
        value = a / b
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    exact = (value * 10**_DECIMALS).denominator == 1
    return value if exact and abs(value) < _LARGEST else None


def _expression(tree: _Tree) -> str:
    """The tree written out, with no more brackets than needed."""
    if isinstance(tree, _Number):
        return tree.text
    left, right = _expression(tree.left), _expression(tree.right)
    level = _PRECEDENCE[tree.operator]
    if isinstance(tree.left, _Operation) and _PRECEDENCE[tree.left.operator] < level:
        left = f"({left})"
    # On the right an operation of equal precedence needs brackets too: a*b/c would be evaluated as (a*b)/c.
    if right.startswith("-") or (isinstance(tree.right, _Operation) and _PRECEDENCE[tree.right.operator] <= level):
        right = f"({right})"
    return f"{left}{tree.operator}{right}"


def _decimal(value: Fraction) -> str:
    """The number in decimal notation; `value` must have at most _DECIMALS decimals."""
    scaled = value * 10**_DECIMALS
    assert scaled.denominator == 1
    sign, digits = ("-" if scaled < 0 else ""), str(abs(scaled.numerator)).rjust(_DECIMALS + 1, "0")
    whole, decimals = digits[:-_DECIMALS], digits[-_DECIMALS:].rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"
