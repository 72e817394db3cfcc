"""Where a chat template loops, compares, slices, joins texts, or makes lists: there the sandbox's own filters go."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

# Filters that `Guard` writes; no template can write these names.
ROUNDS, USED, MEASURED, JOINED = " rounds", " used", " measured", " joined"


class Guard(NodeTransformer):
    """Puts the sandbox's own filters where a template loops, compares, slices, joins texts, or makes lists."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the rounds."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, ROUNDS)  # type: ignore[arg-type]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Count large operands."""
        self.generic_visit(node)
        parts: list[Any] = [node, *node.ops]
        for part in parts:
            if not isinstance(part.expr, nodes.Const):
                part.expr = _filtered(part.expr, USED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Count what is sliced."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, USED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Join texts with a check of their length."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """Measure a new list."""
        self.generic_visit(node)
        return _filtered(node, MEASURED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Measure a new mapping."""
        self.generic_visit(node)
        return _filtered(node, MEASURED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Measure a new tuple; one that is assigned to stays as it is."""
        self.generic_visit(node)
        return _filtered(node, MEASURED) if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
