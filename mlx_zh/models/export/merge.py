"""Merge an adapter into its base in float32, tensor by tensor; measure what a number format keeps of the change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.core.sums import norm, total
from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.files import one_table, read_adapter
from mlx_zh.models.adapters.spec import SAVED, AdapterSpec
from mlx_zh.models.build import Form, Weights, dequantize
from mlx_zh.models.export.source import Source

# Minimum cosine of two versions of one matrix. With one version in 4 bits it is 0.99; in two models it is near 0.
_SAME_MODEL = 0.9


@dataclass(frozen=True)
class Adapter:
    """An adapter: low-rank pairs (with magnitudes for DoRA), or whole tensors for a full fine-tuning."""

    folder: Path
    spec: AdapterSpec
    weights: Weights

    @property
    def tensors(self) -> set[str]:
        """The names of the model's tensors that the adapter changes."""
        return {name if self._is_whole(name) else f"{name.rpartition('.')[0]}.weight" for name in self.weights}

    def _is_whole(self, name: str) -> bool:
        """Whether the adapter has this tensor of the model itself, and no low-rank change to it."""
        return self.spec.kind == "full" or name in SAVED.values()

    def merged(self, name: str, weight: mx.array) -> mx.array:
        """The weight (out, in), or (E, out, in) of experts, float32, with the adapter merged into it; lazy."""
        if name in self.weights:
            return self.weights[name].astype(mx.float32)
        path = name.removesuffix(".weight")
        a, b = (self.weights[f"{path}.{leaf}"].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
        if weight.ndim == 3:  # experts
            return weight + (self.spec.scale * b) @ a  # (E, out, r) @ (E, r, in) -> (E, out, in)
        adapted = weight + (self.spec.scale * b.T) @ a.T  # (out, r) @ (r, in) -> (out, in)
        if self.spec.kind == "dora":
            magnitude = self.weights[f"{path}.m"].astype(mx.float32)
            adapted = adapted * (magnitude / mx.linalg.norm(adapted, axis=1))[:, None]
        return adapted


def open_adapter(folder: Path, source: Source) -> Adapter:
    """Read an adapter folder (mlx-lm's or PEFT's) and check it against the model.

    Raises AdapterError with the tensors that do not fit and both shapes.
    """
    spec, weights = read_adapter(folder)
    weights = one_table(weights, folder, tied=SAVED["lm_head"] not in source.outline.shapes)
    adapter = Adapter(folder, spec, weights)
    shapes, matrices = source.outline.shapes, set(source.outline.matrices)
    wrong = []
    for name in sorted(adapter.tensors):
        path = name.removesuffix(".weight")
        if name in weights:
            expected: dict[str, Any] = {name: shapes.get(name)}
        elif path not in matrices or name not in shapes:
            wrong.append(f"{path} (no such linear layer)")
            continue
        else:
            *experts, rows, columns = shapes[name]
            if experts:
                parts = {"lora_a": (*experts, spec.rank, columns), "lora_b": (*experts, rows, spec.rank)}
                expected = {f"{path}.{leaf}": shape for leaf, shape in parts.items()}
            else:
                expected = {f"{path}.lora_a": (columns, spec.rank), f"{path}.lora_b": (spec.rank, rows)}
            if spec.kind == "dora":
                expected[f"{path}.m"] = (rows,)
        for part, shape in expected.items():
            actual = weights[part].shape if part in weights else None
            if actual != shape:
                wrong.append(f"{part} is {actual or 'missing'}, the model needs {shape}")
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
    before: mx.array | None = None  # float32, without the adapter; None if the adapter does not change it


@dataclass(frozen=True)
class Fusion:
    """A model and the adapter to be merged into it; `original` is the same model in full precision."""

    base: Source
    adapter: Adapter
    original: Source | None = None

    @property
    def source(self) -> Source:
        """The model into which the adapter is merged: the original if there is one, else the base."""
        return self.original or self.base

    @property
    def untouched(self) -> dict[str, Form]:
        """The quantized modules of the source that the adapter does not change; their codes can be copied."""
        changed = self.adapter.tensors
        return {path: form for path, form in self.source.outline.packing.items() if f"{path}.weight" not in changed}

    def stored(self, packed: bool = False) -> Weights:
        """The source's tensors, lazy and dequantized; with `packed`, `untouched` modules stay quantized."""
        weights = self.source.stored()
        forms = self.source.outline.packing
        kept = self.untouched if packed else {}
        dequantize(weights, {path: form for path, form in forms.items() if path not in kept}, mx.float32)
        return weights

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[Tensor]:
        """The merged tensors, all or those of `names`, one in memory at a time."""
        weights = self.stored()
        changed = self.adapter.tensors
        for name in self.source.outline.shapes if names is None else names:
            yield self.merge(name, weights.pop(name), changed)

    def merge(self, name: str, weight: mx.array, changed: set[str]) -> Tensor:
        """One tensor, merged and evaluated; `changed` are the names of the tensors that the adapter changes."""
        weight = weight.astype(mx.float32)
        if name not in changed:
            mx.eval(weight)
            return Tensor(name, weight)
        merged = self.adapter.merged(name, weight)
        mx.eval(weight, merged)
        return Tensor(name, merged, weight)

    def check_original(self) -> None:
        """Raise ModelError if the original is not the model from which the base was quantized."""
        if self.original is None:
            return
        base_shapes, original_shapes = self.base.outline.shapes, self.original.outline.shapes
        if base_shapes != original_shapes:
            names = base_shapes.keys() | original_shapes.keys()
            different = sorted(n for n in names if base_shapes.get(n) != original_shapes.get(n))
            raise ModelError(
                f"{self.original.name} is not the original of {self.base.name}: {len(different)} tensors differ in "
                f"shape, first {different[0]}. Give the full-precision model that the base was quantized from."
            )
        sample = sorted(n for n in self.adapter.tensors if len(base_shapes[n]) == 2)[:2]
        base_weights = self.base.stored()
        dequantize(base_weights, self.base.outline.packing, mx.float32)
        original_weights = self.stored()
        for name in sample:
            a, b = base_weights[name].astype(mx.float32), original_weights[name].astype(mx.float32)
            cosine = float(total(a * b) / (norm(a) * norm(b)))
            if cosine < _SAME_MODEL:
                raise ModelError(
                    f"{self.original.name} is not the original of {self.base.name}: {name} has a cosine of "
                    f"{cosine:.2f} with the base's. Give the full-precision model that the base was quantized from."
                )


@dataclass(frozen=True)
class Survival:
    """What a number format keeps of the adapter's change to one matrix.

    `kept` is the written change projected on the intended one. It is 1 if rounding errors cancel out, and near 0 if
    every weight is rounded back to the base's value. `error` is the norm of the rounding error divided by the norm of
    the change. With few bits it is above 1; as long as `kept` is about 1 this is only noise.
    """

    kept: float
    error: float


def survival(before: mx.array, merged: mx.array, written: mx.array) -> Survival | None:
    """Compare the written change of a matrix (out, in) with the intended one; None if nothing was changed."""
    intended, actual = merged - before, written - before
    size = total(intended * intended)
    if float(size) == 0:
        return None
    kept = total(actual * intended) / size
    error = norm(actual - intended) / mx.sqrt(size)
    return Survival(float(kept), float(error))


@dataclass(frozen=True)
class SurvivalSummary:
    """`Survival` over all changed matrices: means and worst values."""

    matrices: int
    kept_mean: float
    kept_least: float
    error_mean: float
    error_largest: float


def summarize(survivals: Sequence[Survival]) -> SurvivalSummary | None:
    """Means and worst values; None if there is no changed matrix."""
    if not survivals:
        return None
    kept, error = [s.kept for s in survivals], [s.error for s in survivals]
    return SurvivalSummary(len(survivals), sum(kept) / len(kept), min(kept), sum(error) / len(error), max(error))
