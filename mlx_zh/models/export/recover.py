"""Quantize a merged model so that it predicts what base + adapter predicts.

Two copies of the model run over text, block by block: an exact one, and one whose matrices are rounded as soon as
their inputs are known. Each matrix is rounded so that its output on the rounded model's inputs is close to the exact
output. Only one block's weights are in memory, each until it has been used, and each rounded block is written to a
work folder at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_zh.core.packing import PackedBatch
from mlx_zh.core.sums import total
from mlx_zh.errors import ModelError
from mlx_zh.models.build import Form, Weights, dequantize
from mlx_zh.models.export.block_stream import BlockStream, block_prefix, computed
from mlx_zh.models.export.folder_files import Layout, pack, unpack
from mlx_zh.models.export.merge import Fusion
from mlx_zh.models.export.rounding import PANEL, Grid, Inputs, NotFiniteError, compensated
from mlx_zh.models.export.source import Source
from mlx_zh.system.accelerator import repeated
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import empty, make_folder, write_arrays, write_exact_json

_VERSION = 2  # of the method: blocks of another version are computed anew
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
        grids = {f"{path}.{part}" for path in self.paths for part in _PARTS[1:]}
        scales = {name: array for name, array in weights.items() if name in grids}
        embedded = _embeddings(self.layout, self.rows, weights)
        dequantize(weights, _packed_in(weights, fusion.source), mx.float32)
        exact, rounded = (BlockStream(self.layout, self.rows, embedded) for _ in range(2))
        del embedded
        for index in range(len(exact.layers)):
            self._run_block(index, _take_block(fusion, index, weights), scales, exact, rounded)
            step()
        return self.layout.with_codes(self.paths, self._stored)

    def _run_block(
        self, index: int, block: _Block, scales: Weights, exact: BlockStream, rounded: BlockStream
    ) -> None:
        """Round the matrices of a block, and move both streams behind it. `scales` has the source's, and biases.

        The matrices of `block` are taken out of it.
        """
        prefix = block_prefix(index)
        known = self._read(index)
        exact.load(index, block.values)
        rounded.load(index, block.values)
        codes: dict[str, list[mx.array]] = {}
        points = zip(exact.block(index), rounded.block(index), strict=True)
        for (leaves, right), (_, actual) in points:
            weights = {prefix + leaf: block.values.pop(f"{prefix}{leaf}.weight") for leaf in leaves}
            made = {path: known[path] for path in weights if path in known}
            made = made or self._round(weights, right, actual, block.growth, scales)
            del weights  # the streams drop their matrices when they go on
            for path, parts in made.items():
                rounded.replace(index, path.removeprefix(prefix), unpack(parts, self.layout.packing[path]))
            codes |= made
        if not known and codes:
            write_arrays(self._file(index), _flat(codes))
        exact.free(index)
        rounded.free(index)
        mx.clear_cache()

    def _round(
        self, weights: Weights, exact: list[mx.array], rounded: list[mx.array], growth: Weights, scales: Weights
    ) -> dict[str, list[mx.array]]:
        """Round those of `weights`, by path, that are rounded here. Their inputs are the same. Raises ModelError."""
        made: dict[str, list[mx.array]] = {}
        inputs = None
        for path in weights:
            if path not in self.paths:
                continue
            grid = self._grid(path, growth.get(f"{path}.weight"), scales)
            with self._finite():
                inputs = inputs or repeated(partial(Inputs.of, exact, rounded))
                form = self.layout.packing[path]
                made[path] = repeated(partial(compensated, weights[path], inputs, form, self.layout.dtype, grid))
        return made

    @contextmanager
    def _finite(self) -> Iterator[None]:
        """Raise ModelError where a matrix or its inputs are not finite."""
        try:
            yield
        except NotFiniteError as error:
            fusion = self.layout.fusion
            raise ModelError(
                f"{fusion.base.name} with the adapter {fusion.adapter.folder} computes NaN or infinity on its "
                "training data, so there is nothing to recover. Train again with a smaller learning_rate."
            ) from error

    def _grid(self, path: str, growth: mx.array | None, scales: Weights) -> Grid | None:
        """The base's own grid, on which all but the adapter's change lies already; None if there is none to keep.

        The rows of a matrix with DoRA have grown by `growth` (out,).
        """
        fusion, form = self.layout.fusion, self.layout.packing[path]
        if fusion.original is not None or fusion.base.outline.packing.get(path) != form:
            return None
        scale, bias = (scales.pop(f"{path}.{part}").astype(mx.float32) for part in ("scales", "biases"))
        if growth is not None:
            scale, bias = scale * growth[:, None], bias * growth[:, None]
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
        paths = [path for path in self.paths if path.startswith(block_prefix(index))]
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


def _flat(codes: dict[str, list[mx.array]]) -> dict[str, mx.array]:
    return {
        f"{path}.{part}": array for path, arrays in codes.items() for part, array in zip(_PARTS, arrays, strict=True)
    }


def _packed_in(weights: Weights, source: Source) -> dict[str, Form]:
    """The quantized modules of `source` that `weights` still has."""
    return {path: form for path, form in source.outline.packing.items() if f"{path}.scales" in weights}


@dataclass(frozen=True)
class _Block:
    """The merged tensors of a block by name; of each matrix that DoRA changes also its rows' growth (out,)."""

    values: dict[str, mx.array]  # float32
    growth: dict[str, mx.array]


def _take_block(fusion: Fusion, index: int, weights: Weights) -> _Block:
    """Merge a block; its tensors are taken out of `weights`."""
    changed, block = fusion.adapter.tensors, _Block({}, {})
    for name in [name for name in fusion.source.outline.shapes if name.startswith(block_prefix(index))]:
        tensor = fusion.merge(name, weights.pop(name), changed)
        block.values[name] = tensor.value
        if fusion.adapter.spec.kind == "dora" and (before := tensor.before) is not None:
            growth = (tensor.value * before).sum(axis=1) / mx.maximum((before * before).sum(axis=1), 1e-30)
            mx.eval(growth)
            block.growth[name] = growth
    return block


def _embeddings(layout: Layout, rows: Sequence[PackedBatch], weights: Weights) -> list[mx.array]:
    """The embedded tokens (T, D) of each row, as the written model has them.

    The table is taken out of `weights`. Only the rows of the tokens that occur are read into memory as numbers.
    """
    fusion, name = layout.fusion, f"{_EMBEDDING}.weight"
    ids, places = np.unique(np.concatenate([np.array(row.tokens) for row in rows]), return_inverse=True)
    whole = fusion.adapter.weights.get(name)
    parts = {part: weights.pop(f"{_EMBEDDING}.{part}", None) for part in _PARTS}
    if whole is not None:
        table = whole[mx.array(ids)].astype(mx.float32)
    else:
        used = {f"{_EMBEDDING}.{part}": array[mx.array(ids)] for part, array in parts.items() if array is not None}
        dequantize(used, _packed_in(used, fusion.source), mx.float32)
        table = used[name].astype(mx.float32)
    form = layout.packing.get(_EMBEDDING)
    if form is not None and _EMBEDDING not in layout.kept:
        table = unpack(pack(table, form, layout.dtype), form)
    ends = np.cumsum([row.tokens.size for row in rows])[:-1]
    return [computed(table.__getitem__, mx.array(part)) for part in np.split(places.reshape(-1), ends)]


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
    fusion, paths = layout.fusion, _rounded_here(layout)
    weights = fusion.source.stored()
    exact = BlockStream(layout, rows, _embeddings(layout, rows, weights))
    dequantize(weights, _packed_in(weights, fusion.source), mx.float32)
    errors: dict[str, dict[int, float]] = {}
    for index in range(len(exact.layers)):
        values, prefix = _take_block(fusion, index, weights).values, block_prefix(index)
        exact.load(index, values)
        for leaves, inputs in exact.block(index):
            for path in (prefix + leaf for leaf in leaves):
                weight = values.pop(f"{path}.weight")
                if path not in paths:
                    continue
                size = _output_size(inputs, weight)
                errors[path] = {}
                for bits in choices:
                    form: Form = {**layout.packing[path], "bits": bits}
                    error = unpack(pack(weight, form, layout.dtype), form) - weight
                    errors[path][bits] = _output_size(inputs, error) / max(size, 1e-30)
        exact.free(index)
        mx.clear_cache()
        step()
    return errors


def _output_size(inputs: Sequence[mx.array], weight: mx.array) -> float:
    """The squared output of a matrix over the rows (T, in) of its input."""
    return sum(float(computed(lambda x: total(mx.square(x @ weight.T)), x)) for x in inputs)


def needed_bytes(shapes: dict[str, tuple[int, ...]], lengths: Sequence[int]) -> int:
    """The memory at the peak of a recovery over rows of `lengths` tokens, the base's file not counted.

    Either a block is being merged, with copies and codes of its widest matrix and the text's states in both models.
    Or the inputs of that matrix are computed row by row, with normed states. Or it is rounded: with its inputs and
    states in both models, half a square for the factor of its moments with its corners' inverses, its outputs' drift,
    and four copies of itself.
    """
    tokens, longest = sum(lengths), max(lengths)
    first = block_prefix(0)
    block = {name: shape for name, shape in shapes.items() if name.startswith(first)}
    values = sum(int(np.prod(shape)) for shape in block.values())
    rows, columns = max((s for s in block.values() if len(s) == 2), key=lambda s: (s[1], s[0]))
    width = shapes[f"{_EMBEDDING}.weight"][1]
    merging = values + 13 * rows * columns // 4 + 2 * tokens * width
    loaded = values + tokens * (4 * width + 2 * columns) + longest * 4 * columns
    factor = columns * (columns + 3 * PANEL) // 2
    rounding = tokens * (2 * width + 2 * columns + rows) + factor + 4 * rows * columns
    return _FLOAT * max(merging, loaded, rounding)
