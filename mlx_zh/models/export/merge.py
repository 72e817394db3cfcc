"""Merging: base plus adapter in float32, tensor by tensor, and what a number format leaves of the change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.build import Weights, dequantize
from mlx_zh.models.export.source import Source

# Two versions of one matrix, one of them in 4 bits, have a cosine of 0.99; matrices of two models have one near 0.
_SAME_MODEL = 0.9


@dataclass(frozen=True)
class Adapter:
    """What was trained: low-rank pairs (and DoRA's magnitudes), or whole tensors where it was a full fine-tuning."""

    folder: Path
    spec: AdapterSpec
    weights: Weights

    @property
    def tensors(self) -> set[str]:
        """Names of the model's tensors that it changes."""
        if self.spec.kind == "full":
            return set(self.weights)
        return {f"{name.rpartition('.')[0]}.weight" for name in self.weights}

    def merged(self, name: str, weight: mx.array) -> mx.array:
        """`weight` (out, in) float32 with the adapter merged into it, lazy."""
        if self.spec.kind == "full":
            return self.weights[name].astype(mx.float32)
        path = name.removesuffix(".weight")
        a, b = (self.weights[f"{path}.{leaf}"].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
        adapted = weight + (self.spec.scale * b.T) @ a.T  # (out, r) @ (r, in)
        if self.spec.kind == "dora":
            magnitude = self.weights[f"{path}.m"].astype(mx.float32)
            adapted = adapted * (magnitude / mx.linalg.norm(adapted, axis=1))[:, None]
        return adapted


def open_adapter(folder: Path, source: Source) -> Adapter:
    """Read an adapter folder (mlx-lm's or PEFT's), checked against the model. AdapterError names what is wrong."""
    spec, weights = read_adapter(folder)
    adapter = Adapter(folder, spec, weights)
    shapes, matrices = source.outline.shapes, set(source.outline.matrices)
    wrong = []
    for name in sorted(adapter.tensors):
        path = name.removesuffix(".weight")
        if spec.kind == "full":
            expected: dict[str, Any] = {name: shapes.get(name)}
        elif path not in matrices or name not in shapes:
            wrong.append(f"{path} (no such linear layer)")
            continue
        else:
            rows, columns = shapes[name]
            expected = {f"{path}.lora_a": (columns, spec.rank), f"{path}.lora_b": (spec.rank, rows)}
            if spec.kind == "dora":
                expected[f"{path}.m"] = (rows,)
        for part, shape in expected.items():
            found = weights[part].shape if part in weights else None
            if found != shape:
                wrong.append(f"{part} is {found or 'missing'}, the model needs {shape}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AdapterError(
            f"{folder} does not fit {source.name}: {'; '.join(wrong[:8])}{more}. Give the base model that the "
            "adapter was trained on."
        )
    return adapter


@dataclass(frozen=True)
class Tensor:
    """One tensor of the merged model."""

    name: str
    value: mx.array  # float32
    before: mx.array | None = None  # without the adapter, where the adapter changes it


@dataclass(frozen=True)
class Fusion:
    """A model and the adapter to be merged into it; `original` is the full-precision form of the same model."""

    base: Source
    adapter: Adapter
    original: Source | None = None

    @property
    def source(self) -> Source:
        """The model that is merged into."""
        return self.original or self.base

    @property
    def untouched(self) -> dict[str, dict[str, Any]]:
        """Modules that are quantized in the source and that the adapter leaves alone: their codes can be kept."""
        changed = self.adapter.tensors
        return {path: form for path, form in self.source.outline.packing.items() if f"{path}.weight" not in changed}

    def stored(self, packed: bool = False) -> Weights:
        """The source's tensors, lazy: full matrices, except `untouched` ones where `packed` asks for their codes."""
        weights = self.source.stored()
        forms = self.source.outline.packing
        kept = self.untouched if packed else {}
        dequantize(weights, {path: form for path, form in forms.items() if path not in kept}, mx.float32)
        return weights

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[Tensor]:
        """Merged tensors in the model's order, each freed when the next one comes."""
        weights = self.stored()
        changed = self.adapter.tensors
        for name in self.source.outline.shapes if names is None else names:
            yield self.merge(name, weights.pop(name), changed)

    def merge(self, name: str, weight: mx.array, changed: set[str]) -> Tensor:
        """One tensor, merged and evaluated."""
        weight = weight.astype(mx.float32)
        if name not in changed:
            mx.eval(weight)
            return Tensor(name, weight)
        merged = self.adapter.merged(name, weight)
        mx.eval(weight, merged)
        return Tensor(name, merged, weight)

    def check_original(self) -> None:
        """Refuse an original that is not the model which the base was quantized from. Raises ModelError."""
        if self.original is None:
            return
        mine, theirs = self.base.outline.shapes, self.original.outline.shapes
        if mine != theirs:
            strange = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise ModelError(
                f"{self.original.name} is not the original of {self.base.name}: {len(strange)} tensors differ in "
                f"shape, first {strange[0]}. Give the full-precision model that the base was quantized from."
            )
        sample = sorted(n for n in self.adapter.tensors if len(mine[n]) == 2)[:2]
        ours = self.base.stored()
        dequantize(ours, self.base.outline.packing, mx.float32)
        others = self.stored()
        for name in sample:
            a, b = ours[name].astype(mx.float32), others[name].astype(mx.float32)
            cosine = float((a * b).sum() / (mx.linalg.norm(a) * mx.linalg.norm(b)))
            if cosine < _SAME_MODEL:
                raise ModelError(
                    f"{self.original.name} is not the original of {self.base.name}: {name} has a cosine of "
                    f"{cosine:.2f} with the base's. Give the full-precision model that the base was quantized from."
                )


@dataclass(frozen=True)
class Survival:
    """What a number format leaves of the adapter's change to one matrix.

    `kept` is the part of the change that is still there: the written change projected on the intended one, 1 where
    rounding is fair and near 0 where every weight fell back on the base's own grid. `error` is the size of the
    rounding relative to the change: at few bits it is above 1, and as long as `kept` is 1 it is ordinary noise.
    """

    kept: float
    error: float


def survival(before: mx.array, merged: mx.array, written: mx.array) -> Survival | None:
    """Compare the written change with the intended one; None where nothing was changed."""
    intended, found = merged - before, written - before
    size = (intended * intended).sum()
    if float(size) == 0:
        return None
    kept = (found * intended).sum() / size
    error = mx.linalg.norm(found - intended) / mx.sqrt(size)
    return Survival(float(kept), float(error))


@dataclass(frozen=True)
class SurvivalSummary:
    """Survival over all changed matrices."""

    matrices: int
    kept_mean: float
    kept_least: float
    error_mean: float
    error_largest: float


def summarize(found: Sequence[Survival]) -> SurvivalSummary | None:
    """Mean and worst; None where the adapter changes nothing."""
    if not found:
        return None
    kept, error = [s.kept for s in found], [s.error for s in found]
    return SurvivalSummary(len(found), sum(kept) / len(kept), min(kept), sum(error) / len(error), max(error))
