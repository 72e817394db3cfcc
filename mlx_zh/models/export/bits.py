"""How many bits a fused model needs so that the adapter's change survives."""

from __future__ import annotations

from mlx_zh.models.export.fidelity import KEPT_LIMIT
from mlx_zh.models.export.folder_files import Layout, full_layout, pack, packed_layout, unpack
from mlx_zh.models.export.merge import Fusion, Survival, SurvivalSummary, summarize, survival

CHOICES = (4, 6, 8)
_NOISE_LIMIT = 0.5  # rounding relative to the change, where the base's own rounding is part of it already


def base_bits(fusion: Fusion) -> int:
    """The base's own bits: the most common of its quantized modules, 16 where it has none."""
    bits = [form["bits"] for form in fusion.base.outline.packing.values()]
    return max(set(bits), key=bits.count) if bits else 16


def choose_layout(fusion: Fusion, group_size: int | None) -> tuple[Layout, int]:
    """The fewest bits, at least the base's, at which a sample of the changed matrices keeps its change.

    A full-precision base stays so (16). Merged into the full-precision original, rounding is fair at any number of
    bits, so that the base's own number does.
    """
    least = base_bits(fusion)
    if least > max(CHOICES):
        return full_layout(fusion, fusion.source.dtype), 16
    allowed = [bits for bits in CHOICES if bits >= least]
    for bits in allowed:
        layout = packed_layout(fusion, bits, group_size, at_least=True)
        left = sample(fusion, layout)
        if left is None or bits == allowed[-1] or _enough(left, fair=fusion.original is not None):
            return layout, bits
    raise AssertionError("the last choice was taken")


def _enough(left: SurvivalSummary, *, fair: bool) -> bool:
    kept = abs(1 - left.kept_mean) <= 1 - KEPT_LIMIT
    return kept and (fair or left.error_mean <= _NOISE_LIMIT)


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
