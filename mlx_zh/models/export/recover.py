"""Quantize a merged model so that it predicts what base + adapter predicts.

Two copies of the model run over text, block by block: an exact one, and one whose matrices are rounded as soon as
their inputs are known. Each matrix is rounded so that its output on the rounded model's inputs is close to the exact
output. Only one block's weights are in memory, and each rounded block is written to a work folder at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zh.core.logprobs import attention_output, decoder
from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.sums import total
from mlx_zh.models.build import Form, Weights, dequantize, lazy_model
from mlx_zh.models.export.folder_files import Layout, pack, unpack
from mlx_zh.models.export.merge import Fusion, Tensor
from mlx_zh.models.export.rounding import Grid, Moments, compensated
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import empty, make_folder, write_arrays, write_exact_json

_VERSION = 1  # of the method: blocks of another version are computed anew
_LAYERS, _EMBEDDING = "model.layers.", "model.embed_tokens"
_FLOAT = 4


@dataclass(frozen=True)
class Recovery:
    """A model that is being quantized for the text in `rows`; finished blocks are kept in the folder `work`."""

    layout: Layout
    rows: tuple[PackedBatch, ...]
    work: Path

    @property
    def tokens(self) -> int:
        """The number of tokens of the text."""
        return sum(row.tokens.size for row in self.rows)

    @property
    def paths(self) -> frozenset[str]:
        """The matrices that are rounded here."""
        return _rounded_here(self.layout)

    def run(self, adapter: str, step: Callable[[], None]) -> Layout:
        """Round what is not yet in `work`; returns the layout with the codes. `step` is called after each block.

        `adapter` is a digest of the adapter. Raises StorageError.
        """
        self._open_work(adapter)
        fusion = self.layout.fusion
        weights = fusion.source.stored()
        scales = {name: array for name, array in weights.items() if name.endswith((".scales", ".biases"))}
        dequantize(weights, fusion.source.outline.packing, mx.float32)
        embedded = _embeddings(self.layout, self.rows, weights)
        exact, rounded = (_Stream(self.layout, self.rows, embedded) for _ in range(2))
        for index in range(len(exact.layers)):
            self._run_block(index, _take_block(fusion, index, weights), scales, exact, rounded)
            step()
        return self.layout.with_codes(self.paths, self._stored)

    def _run_block(
        self, index: int, tensors: list[Tensor], scales: Weights, exact: _Stream, rounded: _Stream
    ) -> None:
        """Round the matrices of a block, and move both streams behind it. `scales` has the source's, and biases."""
        prefix = _prefix(index)
        known = self._read(index)
        exact.load(index, tensors)
        rounded.load(index, tensors)
        by_name = {tensor.name: tensor for tensor in tensors}
        codes: dict[str, list[mx.array]] = {}
        points = zip(exact.block(index), rounded.block(index), strict=True)
        for (leaves, right), (_, actual) in points:
            changed = [leaf for leaf in leaves if prefix + leaf in self.paths]
            moments = None
            for leaf in changed:
                path = prefix + leaf
                form = self.layout.packing[path]
                if (parts := known.get(path)) is None:
                    moments = moments or Moments.of(right, actual)
                    tensor = by_name[f"{path}.weight"]
                    grid = self._grid(path, tensor, scales)
                    parts = compensated(tensor.value, moments, form, self.layout.dtype, grid)
                codes[path] = parts
                rounded.replace(index, leaf, unpack(parts, form))
        if not known and codes:
            write_arrays(self._file(index), _flat(codes))
        exact.free(index)
        rounded.free(index)
        mx.clear_cache()

    def _grid(self, path: str, tensor: Tensor, scales: Weights) -> Grid | None:
        """The base's own grid, on which all but the adapter's change lies already; None if there is none to keep."""
        fusion, form = self.layout.fusion, self.layout.packing[path]
        if fusion.original is not None or fusion.base.outline.packing.get(path) != form:
            return None
        scale, bias = (scales.pop(f"{path}.{part}").astype(mx.float32) for part in ("scales", "biases"))
        if fusion.adapter.spec.kind == "dora" and tensor.before is not None:  # it also changes the rows' lengths
            before = tensor.before
            length = (tensor.value * before).sum(axis=1) / mx.maximum((before * before).sum(axis=1), 1e-30)
            scale, bias = scale * length[:, None], bias * length[:, None]
        return Grid(scale, bias)

    # The work folder ------------------------------------------------------------------------------------------

    def _open_work(self, adapter: str) -> None:
        """Make the work folder, and remove from it what was computed for another model, adapter or text."""
        layout = self.layout
        source, original = layout.fusion.base, layout.fusion.original
        key = value_digest(
            [
                _VERSION,
                source.fingerprint,
                original and original.fingerprint,
                adapter,
                str(layout.dtype),
                layout.packing,
                [[row.tokens.tolist(), row.starts] for row in self.rows],
            ]
        )
        make_folder(self.work)
        if (read_object(self.work / "key.json") or {}).get("key") != key:
            empty(self.work)
            write_exact_json(self.work / "key.json", {"key": key})

    def _file(self, index: int) -> Path:
        return self.work / f"block-{index:03}.safetensors"

    def _read(self, index: int) -> dict[str, list[mx.array]]:
        """The rounded matrices of a block by path; none if it is not finished, or its file is damaged."""
        try:
            arrays = mx.load(str(self._file(index)))
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError):
            return {}
        assert isinstance(arrays, dict)
        paths = [path for path in self.paths if path.startswith(_prefix(index))]
        names = [f"{path}.{part}" for path in paths for part in _PARTS]
        if set(arrays) != set(names):
            return {}
        return {path: [arrays[f"{path}.{part}"] for part in _PARTS] for path in paths}

    def _stored(self, path: str) -> list[mx.array]:
        """The packed codes, scales and biases of a finished matrix."""
        arrays = mx.load(str(self._file(int(path.split(".")[2]))))
        assert isinstance(arrays, dict)
        return [arrays[f"{path}.{part}"] for part in _PARTS]


_PARTS = ("weight", "scales", "biases")


def _prefix(index: int) -> str:
    return f"{_LAYERS}{index}."


def _flat(codes: dict[str, list[mx.array]]) -> dict[str, mx.array]:
    return {
        f"{path}.{part}": array for path, arrays in codes.items() for part, array in zip(_PARTS, arrays, strict=True)
    }


def _take_block(fusion: Fusion, index: int, weights: Weights) -> list[Tensor]:
    """The merged tensors of a block, for DoRA with what they were; they are taken out of `weights`."""
    changed = fusion.adapter.tensors
    names = [name for name in fusion.source.outline.shapes if name.startswith(_prefix(index))]
    tensors = (fusion.merge(name, weights.pop(name), changed) for name in names)
    if fusion.adapter.spec.kind == "dora":
        return list(tensors)
    return [replace(tensor, before=None) for tensor in tensors]


def _embeddings(layout: Layout, rows: Sequence[PackedBatch], weights: Weights) -> list[mx.array]:
    """The embedded tokens (T, D) of each row, as the written model has them. The table is taken out of `weights`."""
    fusion, name = layout.fusion, f"{_EMBEDDING}.weight"
    table = fusion.merge(name, weights.pop(name), fusion.adapter.tensors).value
    form = layout.packing.get(_EMBEDDING)
    if form is not None and _EMBEDDING not in layout.kept:
        table = unpack(pack(table, form, layout.dtype), form)
    return _computed(table[row.tokens] for row in rows)


class _Stream:
    """A model's hidden states between two blocks, and its blocks, of which one at a time has weights."""

    def __init__(self, layout: Layout, rows: Sequence[PackedBatch], embedded: list[mx.array]) -> None:
        source = layout.fusion.source
        model = lazy_model(dict(source.config), dict.fromkeys(source.outline.shapes, mx.zeros(0)), source.name)
        model.eval()
        self.layers: list[Any] = decoder(model).layers
        self.rows = rows
        self.hidden = embedded

    def load(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Give a block its weights."""
        prefix = _prefix(index)
        self.layers[index].load_weights([(tensor.name.removeprefix(prefix), tensor.value) for tensor in tensors])

    def replace(self, index: int, leaf: str, weight: mx.array) -> None:
        """Give a matrix another weight."""
        parent, name = leaf.split(".")
        self.layers[index][parent][name].weight = weight

    def free(self, index: int) -> None:
        """Drop a block."""
        self.layers[index] = None

    def block(self, index: int) -> Iterator[tuple[tuple[str, ...], mx.array]]:
        """Run a block; yields the names of matrices and their common input (T, in) before they are used."""
        layer = self.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        normed = _computed(layer.input_layernorm(hidden) for hidden in self.hidden)
        yield ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), mx.concatenate(normed)

        with _passing(attention, "o_proj"):
            inner = _computed(attention_output(attention, x, row) for x, row in zip(normed, self.rows, strict=True))
        yield ("self_attn.o_proj",), mx.concatenate(inner)

        self.hidden = _computed(h + attention.o_proj(x) for h, x in zip(self.hidden, inner, strict=True))
        normed = _computed(layer.post_attention_layernorm(hidden) for hidden in self.hidden)
        yield ("mlp.gate_proj", "mlp.up_proj"), mx.concatenate(normed)

        with _passing(mlp, "down_proj"):
            inner = _computed(mlp(x) for x in normed)
        yield ("mlp.down_proj",), mx.concatenate(inner)

        self.hidden = _computed(h + mlp.down_proj(x) for h, x in zip(self.hidden, inner, strict=True))


class _passing:
    """Inside this context, a module's last matrix passes its input through."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.matrix = module, name, module[name]

    def __enter__(self) -> None:
        self.module[self.name] = nn.Identity()

    def __exit__(self, *_: object) -> None:
        self.module[self.name] = self.matrix


def _computed(arrays: Iterator[mx.array]) -> list[mx.array]:
    """The arrays, each computed before the next."""
    values = []
    for array in arrays:
        mx.eval(array)
        values.append(array)
    return values


def _rounded_here(layout: Layout) -> frozenset[str]:
    """The quantized matrices of the blocks that do not keep the base's codes."""
    return frozenset(
        path
        for path, form in layout.packing.items()
        if path.startswith(_LAYERS) and path not in layout.kept and form["mode"] == "affine"
    )


def rounding_errors(
    layout: Layout, rows: Sequence[PackedBatch], choices: Sequence[int], step: Callable[[], None]
) -> dict[str, dict[int, float]]:
    """What plain rounding to each number of bits does to each matrix's output over a text.

    For each matrix that is rounded: the squared error of its output divided by the squared output, by bits. `step` is
    called after each block.
    """
    weights = layout.fusion.stored()
    exact, paths = _Stream(layout, rows, _embeddings(layout, rows, weights)), _rounded_here(layout)
    errors: dict[str, dict[int, float]] = {}
    for index in range(len(exact.layers)):
        tensors, prefix = _take_block(layout.fusion, index, weights), _prefix(index)
        exact.load(index, tensors)
        values = {tensor.name: tensor.value for tensor in tensors}
        for leaves, inputs in exact.block(index):
            squares = inputs.T @ inputs
            for path in (prefix + leaf for leaf in leaves if prefix + leaf in paths):
                weight = values[f"{path}.weight"]
                size = float(total((weight @ squares) * weight))
                errors[path] = {}
                for bits in choices:
                    form: Form = {**layout.packing[path], "bits": bits}
                    error = unpack(pack(weight, form, layout.dtype), form) - weight
                    errors[path][bits] = float(total((error @ squares) * error)) / max(size, 1e-30)
        exact.free(index)
        mx.clear_cache()
        step()
    return errors


def needed_bytes(shapes: dict[str, tuple[int, ...]], tokens: int) -> int:
    """The memory at the peak of a recovery over `tokens` tokens: one block, the text's states, and the widest matrix.

    A block is in memory exact and rounded. At the widest matrix: its inputs in both models, in rows and in one piece
    (T, n), five arrays (n, n) for its moments and their Cholesky factor, and four copies of the weight.
    """
    first = _prefix(0)
    block = {name: shape for name, shape in shapes.items() if name.startswith(first)}
    values = sum(int(np.prod(shape)) for shape in block.values())
    rows, columns = max((s for s in block.values() if len(s) == 2), key=lambda s: (s[1], s[0]))
    width = shapes[f"{_EMBEDDING}.weight"][1]
    parts = 2 * values + 8 * tokens * width + 4 * tokens * columns + 5 * columns * columns + 4 * rows * columns
    table = int(np.prod(shapes[f"{_EMBEDDING}.weight"]))
    return _FLOAT * max(parts, 2 * table)
