"""How many bits a fused model needs so that the adapter's change survives."""

from __future__ import annotations

from mlx_zh.models.export.fidelity import KEPT_LIMIT
from mlx_zh.models.export.folder_files import Layout, full_layout, pack, packed_layout, unpack
from mlx_zh.models.export.merge import Fusion, Survival, SurvivalSummary, summarize, survival

CHOICES = (4, 6, 8)


def base_bits(fusion: Fusion) -> int:
    """The base's own bits: the most common of its quantized modules, 16 where it has none."""
    bits = [form["bits"] for form in fusion.base.outline.packing.values()]
    return max(set(bits), key=bits.count) if bits else 16


def candidates(fusion: Fusion, group_size: int | None) -> list[tuple[Layout, int]]:
    """Layouts to try, fewest bits first: from the base's own number on, without those known to lose the change.

    A full-precision base stays so. What loses the change is found from a sample: at the base's own bits most weights
    fall back on its grid. Layouts that keep it can still be too coarse, which only a measurement shows.
    """
    least = base_bits(fusion)
    if least > max(CHOICES):
        return [(full_layout(fusion, fusion.source.dtype), 16)]
    layouts = [(packed_layout(fusion, n, group_size, at_least=True), n) for n in CHOICES if n >= least]
    while len(layouts) > 1:
        left = sample(fusion, layouts[0][0])
        if left is None or abs(1 - left.kept_mean) <= 1 - KEPT_LIMIT:
            break
        del layouts[0]
    return layouts


def sample(fusion: Fusion, layout: Layout) -> SurvivalSummary | None:
    """Survival in the first, middle and last changed block."""
    shapes, changed = fusion.source.outline.shapes, fusion.adapter.tensors
    names = [name for name in shapes if name in changed and name.rpartition(".")[0] in layout.packing]
    blocks = sorted({_block(name) for name in names})
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]} if blocks else set()
    found: list[Survival] = []
    for tensor in fusion.tensors([name for name in names if _block(name) in chosen]):
        form = layout.packing[tensor.name.rpartition(".")[0]]
        written = unpack(pack(tensor.value, form, layout.dtype), form)
        if tensor.before is not None and (one := survival(tensor.before, tensor.value, written)):
            found.append(one)
    return summarize(found)


def _block(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
