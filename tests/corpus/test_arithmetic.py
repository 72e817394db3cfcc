"""The arithmetic generator: every step is worth the same, by another calculator."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from mlx_zh.corpus.arithmetic import problem, problems

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def worth(expression: str) -> Fraction:
    """The value of an expression, by Python's grammar and exact fractions."""
    percents = re.sub(r"([\d.]+)%", r"(\1/100)", expression)
    quoted = re.sub(r"[\d.]+", lambda number: f"F('{number[0]}')", percents)

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.Call)
        return Fraction(ast.literal_eval(node.args[0]))

    return value(ast.parse(quoted, mode="eval").body)


def test_every_step_is_exactly_worth_the_answer():
    seen = set()
    for line in problems(7, 500):
        steps = line.split("=")
        assert len(steps) >= 2
        assert len({worth(step) for step in steps}) == 1, line
        assert re.fullmatch(r"-?\d+(\.\d+)?", steps[-1]), line
        seen |= set("+-*/()%.") & set(line)
    assert seen == set("+-*/()%.")


def test_a_pure_function_of_seed_and_number():
    assert list(problems(1, 5)) == list(problems(1, 9))[:5] == [problem(1, i) for i in range(5)]
    assert problem(1, 0) != problem(2, 0)
    assert len(set(problems(1, 300))) > 290  # short sums may repeat
