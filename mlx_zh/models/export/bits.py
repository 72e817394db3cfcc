"""Choose how many bits a fused model needs to keep the adapter's change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from mlx_zh.models.build import Form
from mlx_zh.models.export.fidelity import KEPT_LIMIT
from mlx_zh.models.export.folder_files import Layout, full_layout, pack, packed_layout, unpack
from mlx_zh.models.export.merge import Fusion, Survival, SurvivalSummary, summarize, survival

CHOICES = (4, 6, 8)


def base_bits(fusion: Fusion) -> int:
    """The most common number of bits of the base's quantized modules; 16 if none is quantized."""
    return most_common(fusion.base.outline.packing)


def most_common(packing: Mapping[str, Form]) -> int:
    """The most common number of bits of quantized modules; 16 if there are none."""
    bits = [form["bits"] for form in packing.values()]
    return max(set(bits), key=bits.count) if bits else 16


def own_layout(fusion: Fusion, group_size: int | None) -> Layout:
    """Every matrix in the bits that it has in the base; those not quantized there in its fewest bits, or 4."""
    bits = [form["bits"] for form in fusion.base.outline.packing.values()]
    return packed_layout(fusion, min(bits, default=min(CHOICES)), group_size, at_least=True)


def candidate_layouts(fusion: Fusion, group_size: int | None) -> list[tuple[Layout, int]]:
    """The layouts to try and their bits, fewest bits first, from the base's own number of bits on.

    A full-precision base is not quantized. Layouts that lose the change in a sample of matrices are left out: with
    the base's own bits most weights are rounded back to the base's values. A layout that keeps the change may still
    be too coarse; only a measurement of the model shows this.
    """
    min_bits = base_bits(fusion)
    if min_bits > max(CHOICES):
        return [(full_layout(fusion, fusion.source.dtype), 16)]
    layouts = [(packed_layout(fusion, n, group_size, at_least=True), n) for n in CHOICES if n >= min_bits]
    while len(layouts) > 1:
        summary = sample_survival(fusion, layouts[0][0])
        if summary is None or abs(1 - summary.kept_mean) <= 1 - KEPT_LIMIT:
            break
        del layouts[0]
    return layouts


def mixed_layout(layout: Layout, errors: Mapping[str, Mapping[int, float]], size: int) -> Layout:
    """More bits for the matrices that rounding hurts most, as far as all tensors fit into `size` bytes.

    `layout` is the one with the fewest bits; `errors` has for each matrix the error of its output by bits. One
    matrix after another goes up to the next number of bits: the one whose error falls most for a byte.
    """
    packing = dict(layout.packing)
    shapes = layout.fusion.source.outline.shapes
    room = size - sum(entry.size for entry in layout.entries())
    while True:
        best, most = None, 0.0
        for path, by_bits in errors.items():
            bits = packing[path]["bits"]
            higher = min((n for n in by_bits if n > bits), default=None)
            if higher is None:
                continue
            rows, columns = shapes[f"{path}.weight"]
            cost = rows * columns * (higher - bits) // 8
            gain = (by_bits[bits] - by_bits[higher]) / cost
            if cost <= room and gain > most:
                best, most = (path, higher, cost), gain
        if best is None:
            return replace(layout, packing=packing)
        path, higher, cost = best
        packing[path] = {**packing[path], "bits": higher}
        room -= cost


def with_fine_tables(layout: Layout) -> Layout:
    """At least 8 bits for tables (embedding, head) that the adapter changes: only blocks can be recovered."""
    changed = layout.fusion.adapter.tensors
    tables = [path for path in layout.packing if _block(path) < 0 and f"{path}.weight" in changed]
    return replace(layout, packing=layout.packing | {path: _fine(layout.packing[path]) for path in tables})


def _fine(form: Form) -> Form:
    return {**form, "bits": max(form["bits"], max(CHOICES))}


def mean_bits(layout: Layout) -> float:
    """The mean bits of a weight of the quantized matrices, without their scales."""
    shapes = layout.fusion.source.outline.shapes
    sizes = {path: prod(shapes[f"{path}.weight"]) for path in layout.packing}
    return sum(sizes[path] * form["bits"] for path, form in layout.packing.items()) / sum(sizes.values())


def sample_survival(fusion: Fusion, layout: Layout) -> SurvivalSummary | None:
    """What a layout keeps of the change in the first, middle and last changed block; None if nothing is changed."""
    shapes, changed = fusion.source.outline.shapes, fusion.adapter.tensors
    names = [name for name in shapes if name in changed and name.rpartition(".")[0] in layout.packing]
    blocks = sorted({_block(name) for name in names})
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]} if blocks else set()
    survivals: list[Survival] = []
    for tensor in fusion.tensors([name for name in names if _block(name) in chosen]):
        form = layout.packing[tensor.name.rpartition(".")[0]]
        written = unpack(pack(tensor.value, form, layout.dtype), form)
        if tensor.before is not None and (tensor_survival := survival(tensor.before, tensor.value, written)):
            survivals.append(tensor_survival)
    return summarize(survivals)


def _block(name: str) -> int:
    """The number of the block that a tensor belongs to; -1 if it is in none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
