"""Write a model folder for mlx-lm and transformers: weights, config.json, generation_config.json, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.core.families import FAMILIES
from mlx_zh.errors import ModelError
from mlx_zh.models.build import Form, describe_packing
from mlx_zh.models.export.merge import Fusion, Survival, Tensor, survival
from mlx_zh.models.export.safetensors_file import Entry, write_shards
from mlx_zh.models.export.source import Source
from mlx_zh.models.family_configs import expert_names, hub_config, hub_tensor, is_float32
from mlx_zh.models.folder import read_json
from mlx_zh.system.links import check_file, copy_file
from mlx_zh.system.storage import visible, write_json

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates"  # the folder of templates beside the default one
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Layout:
    """How each tensor of a fused folder is stored."""

    fusion: Fusion
    dtype: mx.Dtype  # of every tensor that is not quantized, and of scales and biases
    packing: dict[str, Form] = field(default_factory=dict)  # quantized module -> its format
    kept: frozenset[str] = frozenset()  # quantized modules whose codes are copied from the source
    chosen: frozenset[str] = frozenset()  # quantized modules whose codes `codes` has
    codes: Callable[[str], list[mx.array]] | None = None  # the arrays of one of them, as `pack` gives them
    apart: bool = False  # as transformers has it: experts are tensors of their own; for a layout without packing

    def with_codes(self, paths: frozenset[str], codes: Callable[[str], list[mx.array]]) -> Layout:
        """The same layout, in which the modules `paths` are not rounded but have what `codes` returns for them."""
        return replace(self, chosen=paths, codes=codes)

    def entries(self) -> list[Entry]:
        """The tensors to be written, in order."""
        entries = []
        for name, shape in self.fusion.source.outline.shapes.items():
            path, _, leaf = name.rpartition(".")
            form = self.packing.get(path) if leaf == "weight" else None
            if form is None:
                names, shape = self._apart(path, shape)
                entries += [Entry(f"{part}.{leaf}", self._type(name), shape) for part in names]
                continue
            groups = (*shape[:-1], shape[-1] // form["group_size"])
            entries.append(Entry(name, mx.uint32, (*shape[:-1], shape[-1] * form["bits"] // 32)))
            if form["mode"] == "affine":
                entries += [Entry(f"{path}.{part}", self.dtype, groups) for part in ("scales", "biases")]
            else:
                entries.append(Entry(f"{path}.scales", mx.uint8, groups))
        return entries

    def arrays(self, watch: Callable[[Tensor, mx.array], None], step: Callable[[], None]) -> Iterator[mx.array]:
        """The arrays of `entries`, in their order.

        `watch` is called with every merged tensor and the float32 value that its written form stands for. `step` is
        called once for each tensor of the model.
        """
        weights = self.fusion.stored(packed=bool(self.kept))
        changed = self.fusion.adapter.tensors
        for name in self.fusion.source.outline.shapes:
            step()
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in self.kept:
                parts = [weights.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")]
                yield from (self.half(part) for part in parts if part is not None)
                continue
            tensor = self.fusion.merge(name, weights.pop(name), changed)
            form = self.packing.get(path) if leaf == "weight" else None
            if form is None:
                written = tensor.value.astype(self._type(name))
                watch(tensor, written.astype(mx.float32))
                if self.apart:
                    written = hub_tensor(name, tensor.value, self.fusion.source.config).astype(written.dtype)
                names, _ = self._apart(path, written.shape)
                yield from written if len(names) > 1 else [written]
            else:
                packed = self.packed(path, tensor)
                watch(tensor, unpack(packed, form))
                yield from packed

    def _apart(self, path: str, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
        """The modules that a module is written as, and the shape of the weight of each."""
        if not self.apart or len(shape) < 3:
            return [path], shape
        if path.endswith(".conv1d"):
            return [path], (shape[0], shape[2], shape[1])
        return expert_names(path, shape[0]), shape[1:]

    def _type(self, name: str) -> mx.Dtype:
        return mx.float32 if is_float32(name) else self.dtype

    def packed(self, path: str, tensor: Tensor) -> list[mx.array]:
        """The arrays of a quantized module that does not keep its codes: chosen ones, or the rounded tensor's."""
        if self.codes is not None and path in self.chosen:
            return self.codes(path)
        return pack(tensor.value, self.packing[path], self.dtype)

    def half(self, array: mx.array) -> mx.array:
        """An array in the layout's type; codes as they are."""
        return array.astype(self.dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def pack(weight: mx.array, form: Form, dtype: mx.Dtype) -> list[mx.array]:
    """Quantize float32 `weight`; scales and biases are rounded to `dtype`, as they are stored."""
    packed, *rest = mx.quantize(weight, **form)
    return [packed, *(part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part for part in rest)]


def unpack(packed: list[mx.array], form: Form) -> mx.array:
    """The float32 weight that the quantized arrays `packed` stand for."""
    wide = [part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in packed]
    return mx.dequantize(wide[0], wide[1], wide[2] if len(wide) > 2 else None, **form)


def full_layout(fusion: Fusion, dtype: mx.Dtype) -> Layout:
    """A layout with every tensor in `dtype`."""
    return Layout(fusion, dtype)


def packed_layout(fusion: Fusion, bits: int, group_size: int | None, *, at_least: bool = False) -> Layout:
    """A layout with every matrix in `bits`. Quantized matrices that the adapter does not change keep their codes.

    `group_size` None takes the base's, or 64 if it has none. With `at_least`, matrices with more bits in the base
    keep that number.
    """
    outline, base = fusion.source.outline, fusion.base.outline.packing
    kept = fusion.untouched
    packing = dict(kept)
    for path in outline.matrices:
        if path in kept or f"{path}.weight" not in outline.shapes:
            continue
        form = base.get(path)
        group = group_size or (form["group_size"] if form else DEFAULT_GROUP)
        if group not in (32, 64, 128) or outline.shapes[f"{path}.weight"][-1] % group:
            continue
        matrix_bits = max(bits, form["bits"]) if at_least and form else bits
        packing[path] = {"group_size": group, "bits": matrix_bits, "mode": "affine"}
    ordered = {path: packing[path] for path in outline.matrices if path in packing}
    return Layout(fusion, fusion.source.dtype, ordered, frozenset(kept))


def write_folder(
    folder: Path, layout: Layout, *, max_bytes: int, kind: str, step: Callable[[], None] = lambda: None
) -> list[Survival]:
    """Write weights, configs and tokenizer into `folder`; returns what is left of the change to each changed matrix.

    `kind` is the "format" in the files' metadata: "mlx", or "pt" for transformers. A file has at most `max_bytes`.
    `step` is called once for each tensor of the model. Raises StorageError if the files cannot be written.
    """
    survivals: list[Survival] = []

    def watch(tensor: Tensor, written: mx.array) -> None:
        if tensor.before is not None and (tensor_survival := survival(tensor.before, tensor.value, written)):
            survivals.append(tensor_survival)

    write_shards(folder, layout.entries(), layout.arrays(watch, step), max_bytes, kind)
    write_configs(folder, layout)
    write_tokenizer(folder, layout.fusion.base)
    return survivals


def write_configs(folder: Path, layout: Layout) -> None:
    """Write config.json, complete for transformers and mlx-lm, and generation_config.json."""
    source = layout.fusion.source
    config = {key: value for key, value in source.config.items() if value is not None and not key.startswith("_")}
    known = FAMILIES.get(config["model_type"])
    if layout.apart:
        config = hub_config(config)
    if known is not None and known.architecture is not None:
        config.setdefault("architectures", [known.architecture])
    config.pop("dtype", None)
    config["torch_dtype"] = str(layout.dtype).rpartition(".")[2]
    if layout.packing:
        # mlx-lm writes it under both names too.
        described = describe_packing(layout.packing, source.outline.matrices)
        config["quantization"] = config["quantization_config"] = described
    write_json(folder / "config.json", dict(sorted(config.items())))
    generation = generation_config(source)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            generation[name] = config[name]
    write_json(folder / "generation_config.json", generation)


def generation_config(source: Source) -> dict[str, Any]:
    """The model's generation_config.json; empty if it has none."""
    path = source.path / "generation_config.json"
    if not (source.path.is_dir() and path.is_file()):
        return {}
    check_file(source.path, path, ModelError)
    return read_json(path)


def write_tokenizer(folder: Path, base: Source) -> None:
    """Write the base's tokenizer: a copy of its files, or for GGUF the files that transformers saves."""
    if base.path.is_dir():
        templates = [path.relative_to(base.path) for path in visible(base.path.glob(f"{_MORE_TEMPLATES}/*.jinja"))]
        for name in (*map(Path, _TOKENIZER_FILES), *templates):
            if (base.path / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                copy_file(base.path, base.path / name, folder / name, ModelError)
    else:
        base.tokenizer.save_pretrained(str(folder))
    _name_known_class(folder / "tokenizer_config.json")


def _name_known_class(path: Path) -> None:
    """Name a class that transformers 4 knows too. Transformers 5 writes a new name for the same class."""
    if path.is_file() and (config := read_json(path)).get("tokenizer_class") == "TokenizersBackend":
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
