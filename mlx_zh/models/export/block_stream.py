"""Runs a model over text block by block, with the weights of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.blocks import attention_output
from mlx_zh.core.logprobs import decoder
from mlx_zh.core.packing import PackedBatch
from mlx_zh.models.build import lazy_model
from mlx_zh.models.export.folder_files import Layout
from mlx_zh.system.accelerator import repeated

_LAYERS = "model.layers."


def block_prefix(index: int) -> str:
    """What the names of a block's tensors begin with."""
    return f"{_LAYERS}{index}."


class BlockStream:
    """A model's hidden states between two blocks, and its blocks, of which one at a time has weights."""

    def __init__(self, layout: Layout, rows: Sequence[PackedBatch], embedded: Sequence[mx.array]) -> None:
        source = layout.fusion.source
        model = lazy_model(dict(source.config), dict.fromkeys(source.outline.shapes, mx.zeros(0)), source.name)
        model.eval()
        self.layers: list[Any] = decoder(model).layers
        self.rows = rows
        self.hidden = list(embedded)

    def load(self, index: int, values: Mapping[str, mx.array]) -> None:
        """Give a block its weights."""
        start = block_prefix(index)
        self.layers[index].load_weights([(name.removeprefix(start), value) for name, value in values.items()])

    def replace(self, index: int, leaf: str, weight: mx.array) -> None:
        """Give a matrix another weight."""
        parent, name = leaf.split(".")
        self.layers[index][parent][name].weight = weight

    def free(self, index: int) -> None:
        """Drop a block."""
        self.layers[index] = None

    def block(self, index: int) -> Iterator[tuple[tuple[str, ...], list[mx.array]]]:
        """Run a block; yields the names of matrices and the rows (T, in) of their input before they are used.

        A matrix is dropped as soon as it has been used.
        """
        layer = self.layers[index]
        normed = self._each(layer.input_layernorm)
        yield ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), normed

        with _passing(layer.self_attn, "o_proj"):
            inner = [computed(attention_output, layer.self_attn, x, row) for x, row in _pairs(normed, self.rows)]
        _drop(layer.self_attn, "q_proj", "k_proj", "v_proj")
        del normed
        yield ("self_attn.o_proj",), inner

        self._add(layer.self_attn.o_proj, inner)
        _drop(layer.self_attn, "o_proj")
        del inner
        normed = self._each(layer.post_attention_layernorm)
        yield ("mlp.gate_proj", "mlp.up_proj"), normed

        with _passing(layer.mlp, "down_proj"):
            inner = [computed(layer.mlp, x) for x in normed]
        _drop(layer.mlp, "gate_proj", "up_proj")
        del normed
        yield ("mlp.down_proj",), inner

        self._add(layer.mlp.down_proj, inner)

    def _each(self, function: Callable[[mx.array], mx.array]) -> list[mx.array]:
        return [computed(function, hidden) for hidden in self.hidden]

    def _add(self, matrix: Callable[[mx.array], mx.array], inputs: Sequence[mx.array]) -> None:
        """Add the matrix's outputs to the hidden states."""
        for number, x in enumerate(inputs):
            self.hidden[number] = computed(lambda hidden, x: hidden + matrix(x), self.hidden[number], x)


def _pairs(inputs: Sequence[mx.array], rows: Sequence[PackedBatch]) -> Iterator[tuple[mx.array, PackedBatch]]:
    return zip(inputs, rows, strict=True)


def _drop(module: Any, *names: str) -> None:
    """Free matrices of a module."""
    for name in names:
        module[name] = nn.Identity()


class _passing:
    """Inside this context, a module's last matrix passes its input through."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.matrix = module, name, module[name]

    def __enter__(self) -> None:
        self.module[self.name] = nn.Identity()

    def __exit__(self, *_: object) -> None:
        self.module[self.name] = self.matrix


def computed(function: Callable[..., mx.array], *arguments: Any) -> mx.array:
    """The result of `function`, computed at once; again if the accelerator gives it up. Raises AcceleratorError."""

    def work() -> mx.array:
        result = function(*arguments)
        mx.eval(result)
        return result

    return repeated(work)
