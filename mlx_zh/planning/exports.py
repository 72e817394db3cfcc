"""What `fuse` will need: disk space for the formats, memory and time for a recovery."""

from __future__ import annotations

from mlx_zh.models.export.llama_types import LLAMA_TYPES
from mlx_zh.models.export.recover import needed_bytes
from mlx_zh.planning.memory import weight_bytes
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.shapes import LINEAR, ModelShape, Packing, Target
from mlx_zh.recipe import ADAPTER_FORMATS, Export

_TEXT = 8192  # tokens that a recovery, mixed bits and an importance matrix are computed on
_ROW = 1024  # tokens of its longest row

# As times of a forward pass over the text. A recovery of an 8B model has 7 * 10^14 operations, six forward passes;
# to round one column after another takes about as long again (docs/export.md).
_RECOVERY, _ERRORS, _IMPORTANCE = 12.0, 4.0, 1.0

_GGUF_BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}  # of types in blocks of 32


def export_bytes(export: Export, model: ModelShape, target: Target) -> float:
    """The most disk space that the formats of `export` and their work files take; adapters are not counted."""
    sizes = [_size(export, kind, model, target) for kind in export.formats if kind not in ADAPTER_FORMATS]
    if export.recover:
        kind = "mlx" if "mlx" in export.formats else "gguf"
        sizes.append(_size(export, kind, model, target))  # of the finished blocks, until the end
    return sum(sizes)


def _size(export: Export, kind: str, model: ModelShape, target: Target) -> float:
    if kind == "gguf" and (llama := LLAMA_TYPES.get(export.gguf_type)) is not None:
        half = weight_bytes(model, Target(2, None, True))  # llama.cpp quantizes this file, which is then removed
        return half + half * llama.most_bits / 16
    packing = None
    if kind == "mlx":
        packing = _mlx_packing(export, target.packing)
    elif kind == "gguf" and export.gguf_type in _GGUF_BITS:
        packing = _packed(_GGUF_BITS[export.gguf_type], 32, target.packing)
    size = weight_bytes(model, Target(2, packing, True))
    mixed = kind == "mlx" and export.size_gb is not None
    return min(size, (export.size_gb or 0.0) * 1e9) if mixed else size


def _mlx_packing(export: Export, base: Packing | None) -> Packing | None:
    """The bits of `mlx`, those of the largest layout where several are tried; None for half precision."""
    group = export.group_size or (64 if base is None else base.group)
    if export.bits == "auto":
        if export.recover:
            return base or Packing(4, group)
        return None if base is None else _packed(max(base.bits, 8), group, base)
    if export.bits == "mixed":
        return _packed(8 if export.size_gb else 6, group, base)
    return None if export.bits == 16 else _packed(export.bits, group, base)


def _packed(bits: int, group: int, base: Packing | None) -> Packing:
    """Matrices that differ in the base keep their form, if it has more bits."""
    forms = () if base is None else base.modules
    return Packing(bits, group, tuple((name, form) for name, form in forms if form is None or form[0] > bits))


def recovery_bytes(model: ModelShape) -> float:
    """The memory that a recovery, or the choice of mixed bits, needs at its peak."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocabulary, model.hidden)}
    for name in LINEAR:
        inputs, outputs = model.matrix(name)
        shapes[f"model.layers.0.{name}.weight"] = (outputs, inputs)
    return float(needed_bytes(shapes, [_ROW] * (_TEXT // _ROW)))


def rounding_seconds(export: Export, pace: Pace) -> float:
    """The time of what `fuse` computes before it writes: a recovery, mixed bits, an importance matrix."""
    passes = _RECOVERY if export.recover else 0.0
    passes += _ERRORS if export.bits == "mixed" and "mlx" in export.formats else 0.0
    passes += _IMPORTANCE if export.imatrix else 0.0
    return passes * _TEXT * pace.forward
