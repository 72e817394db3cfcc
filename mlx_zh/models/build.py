"""Build an mlx-lm model in memory from its config and its arrays."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_zh.core.families import FAMILIES, Config, family_of
from mlx_zh.errors import ModelError
from mlx_zh.models.family_configs import is_float32, language_tensors

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Quantization formats whose scales are bytes, recognised by (bits, group size).
_BYTE_SCALED = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}

Weights = dict[str, "mx.array"]
_TENSORS_OF_A_LAYER = 6  # four matrices and two norms, where projections are fused; others have more


def build_model(
    config: Config,
    weights: Weights,
    source: str,
    *,
    dtype: mx.Dtype | None,
    keep_quantized: bool,
    quantize: tuple[int, int] | None,
) -> nn.Module:
    """A frozen mlx-lm model with `weights`, in evaluation mode. Messages name the model as `source`.

    `weights` is emptied, so that each array is freed as soon as it is used. Floating-point parameters are cast to
    `dtype` (None: as stored). Without `keep_quantized`, quantized tensors are dequantized to `dtype`. `quantize` is
    (bits, group size) for a full-precision model. `config` is changed: "quantization" says what is quantized in
    memory.

    Raises ModelError if config and weights do not fit together.
    """
    import mlx.core as mx

    _resolve_config(config, weights, source)
    model = lazy_model(config, weights, source)
    _under_own_names(model, weights, source)
    modules = dict(model.named_modules())
    if quantize is not None:
        _quantize(weights, modules, quantize, source)
    packing = _packing(config, weights, modules, source)
    config.pop("quantization_config", None)
    config.pop("quantization", None)
    if packing and keep_quantized:
        _make_quantized(model, packing)
        config["quantization"] = describe_packing(packing, _matrices(modules))
    elif packing:
        dequantize(weights, packing, dtype or mx.float32)
    _compare(model, weights, source)
    if dtype is not None:
        for name, array in weights.items():
            if mx.issubdtype(array.dtype, mx.floating):
                weights[name] = array.astype(mx.float32 if is_float32(name) else dtype)
    model.load_weights(list(weights.items()), strict=True)
    weights.clear()
    model.freeze()
    model.eval()
    for layer in model.layers:  # one layer at a time, so that memory never holds two copies of all weights
        mx.eval(layer.parameters())
    # Also arrays that are no parameters, such as the frequencies of RoPE: if they were computed first in a piece of
    # work that the accelerator gives up, they would hold garbage from then on.
    mx.eval([value for module in model.modules() for value in module.values() if isinstance(value, mx.array)])
    mx.clear_cache()
    return model


class Form(TypedDict):
    """How a quantized matrix is packed."""

    group_size: int  # columns that share a scale
    bits: int  # of each value
    mode: str  # affine, mxfp4 ...: the name that mlx.core.quantize takes


@dataclass(frozen=True, slots=True)
class Outline:
    """The tensors and modules of a model, known without reading the weights."""

    shapes: dict[str, tuple[int, ...]]  # shape of every tensor at full precision, in the model's order
    matrices: tuple[str, ...]  # modules that can be quantized
    packing: dict[str, Form]  # modules that are quantized -> bits, group_size, mode


def outline(config: Config, weights: Weights, source: str, *, quantize: tuple[int, int] | None = None) -> Outline:
    """Check lazy `weights` against `config` as `build_model` does, and leave them lazy.

    Tensors that the model does not use are removed from `weights`. With `quantize`, matrices are replaced by
    quantized ones. Raises ModelError if config and weights do not fit together.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    _resolve_config(config, weights, source)
    model = lazy_model(config, weights, source)
    _under_own_names(model, weights, source)
    modules = dict(model.named_modules())
    if quantize is not None:
        _quantize(weights, modules, quantize, source)
    packing = _packing(config, weights, modules, source)
    config.pop("quantization_config", None)
    config.pop("quantization", None)
    full = dict(weights)
    dequantize(full, packing, mx.float32)
    _compare(model, full, source)
    shapes = {name: array.shape for name, array in dict(tree_flatten(model.parameters())).items()}
    return Outline(shapes, tuple(_matrices(modules)), packing)


def _resolve_config(config: Config, weights: Weights, source: str) -> None:
    """Set tied embeddings, where mlx-lm's default differs from Hugging Face's, and remove tensors that are not used.

    Raises ModelError if the model is quantized in a format that cannot be read.
    """
    language_tensors(weights)
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = config["tie_word_embeddings"] = "lm_head.weight" not in weights
    for name in list(weights):
        if (tied and name.startswith("lm_head.")) or name.endswith("rotary_emb.inv_freq"):
            del weights[name]
    foreign = config.get("quantization_config")
    if "quantization" not in config and isinstance(foreign, dict):
        method = foreign.get("quant_method", "unknown")
        raise ModelError(
            f"{source} is quantized by {method!r}; only the formats of MLX and GGUF can be read. Take the "
            "full-precision model and set `model.quantize`, or a version quantized by mlx-lm."
        )


def lazy_model(config: Config, weights: Weights, source: str) -> Any:
    """The model with lazy random parameters, which take no memory before they are evaluated."""
    layers = config.get("num_hidden_layers")
    # A layer takes memory before its tensors are compared, so there must be at least enough of them.
    if isinstance(layers, int) and layers * _TENSORS_OF_A_LAYER > len(weights) + _TENSORS_OF_A_LAYER:
        raise ModelError(
            f"{source}: its config.json says {layers:,} layers, but there are only {len(weights)} tensors. Download "
            "the model again."
        )
    family = family_of(config)
    if family is None:
        raise ModelError(_unknown(config, source))
    try:
        module = importlib.import_module(f"mlx_lm.models.{family.mlx_lm}")
        model = _language_part(module.Model(module.ModelArgs.from_dict(config)))
        if config.get("tie_word_embeddings") and getattr(model, "tie_word_embeddings", None) is False:
            model.tie_word_embeddings = True  # Gemma 3's class has a head until it has seen the tensors
            model.pop("lm_head")
        return model
    except SystemExit as error:  # OLMo's module ends the program where a package of its own is missing
        raise ModelError(_unknown(config, source)) from error
    except Exception as error:  # mlx-lm does not check its arguments: TypeError, KeyError, ZeroDivisionError, ...
        if family.architecture is None:
            raise ModelError(f"{_unknown(config, source)} ({error})") from error
        raise ModelError(
            f"{source}: no {config['model_type']} model can be made from its config.json: {error}. Download the "
            "model again, or compare the file with the original."
        ) from error


_WHOLE = "mlx_zh_whole"
_PART = "language_model."


def _language_part(model: Any) -> Any:
    """The part of a model with images that is a language model; of any other the model itself.

    The whole model stays with it, because it knows how to name the part's tensors.
    """
    part = model.get("language_model")
    if part is None or "model" not in part:
        return model
    object.__setattr__(part, _WHOLE, model)
    return part


def _unknown(config: Config, source: str) -> str:
    return (
        f"{source}: no model of model_type {str(config.get('model_type'))[:40]!r} can be made from its config.json. "
        f"These are known to work: {', '.join(FAMILIES)}."
    )


def _under_own_names(model: Any, weights: Weights, source: str) -> None:
    """Rename tensors as the model's own class of mlx-lm does, where some are not named as it has them.

    Experts, which a hub has one by one, become one tensor. Raises ModelError.
    """
    from mlx.utils import tree_flatten

    expected = dict(tree_flatten(model.parameters()))
    stems = {name.rpartition(".")[0] for name in expected}
    whole = getattr(model, _WHOLE, model)
    if not hasattr(whole, "sanitize") or all(
        name.rpartition(".")[0] in stems and not _is_turned(array, expected.get(name))
        for name, array in weights.items()
    ):
        return
    try:
        renamed = whole.sanitize(dict(weights))
    except Exception as error:  # a missing tensor is a KeyError, one of another shape a ValueError
        raise ModelError(
            f"The tensors of {source} do not fit its config: {str(error)[:200]} is missing or of the wrong shape. "
            "Download the model again; if it is complete, its model_type in config.json is wrong."
        ) from error
    weights.clear()
    weights.update({name.removeprefix(_PART): array for name, array in renamed.items()})


def _is_turned(array: mx.array, expected: mx.array | None) -> bool:
    """Whether a convolution's tensor has its axes in the order of the hubs."""
    return (
        expected is not None
        and array.ndim == 3
        and array.shape != expected.shape
        and (sorted(array.shape) == sorted(expected.shape))
    )


_ROUTER = (".mlp.gate", ".shared_expert_gate")  # of a layer with experts; mlx-lm keeps them in 8 bits
_ROUTER_FORM = (64, 8)  # group size and bits


def _quantize(weights: Weights, modules: Mapping[str, Any], quantize: tuple[int, int], source: str) -> None:
    """Replace each matrix that can be quantized by its quantized form, as `mlx_lm.convert` does."""
    import mlx.core as mx

    bits, group_size = quantize
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ModelError(
            f"quantize: {bits} bits in groups of {group_size} is not a format of MLX; bits are one of "
            f"{', '.join(map(str, BITS))}, group_size one of {', '.join(map(str, GROUP_SIZES))}."
        )
    if any(name.endswith(".scales") for name in weights):
        raise ModelError(
            f"{source} is quantized already, and quantizing it a second time would lose quality. Leave out "
            "`model.quantize`, or give the full-precision model."
        )
    quantized = 0
    for path, module in modules.items():
        array = weights.get(f"{path}.weight")
        if array is None or not hasattr(module, "to_quantized") or array.shape[-1] % group_size:
            continue
        if path.endswith(_ROUTER) and array.shape[-1] % _ROUTER_FORM[0] == 0:
            packed, scales, biases = mx.quantize(array, *_ROUTER_FORM)
        else:
            packed, scales, biases = mx.quantize(array, group_size=group_size, bits=bits)
        weights |= {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}
        quantized += 1
    if not quantized:
        raise ModelError(
            f"quantize: no matrix of {source} has rows that divide into groups of {group_size}; choose a smaller "
            "group_size."
        )


def _packing(config: Config, weights: Weights, modules: Mapping[str, Any], source: str) -> dict[str, Form]:
    """Path of each quantized module -> its bits, group_size and mode, derived from the shapes of its arrays."""
    import mlx.core as mx

    packing: dict[str, Form] = {}
    bad: list[str] = []
    for name in weights:
        path = name.removesuffix(".scales")
        if path == name:
            continue
        module, packed, scales = modules.get(path), weights.get(f"{path}.weight"), weights[name]
        if packed is None or module is None or not hasattr(module, "to_quantized"):
            continue  # `_compare` reports it
        width = module.weight.shape[-1]
        bits, group_size = packed.shape[-1] * 32 // width, width // max(scales.shape[-1], 1)
        mode = _BYTE_SCALED.get((bits, group_size)) if scales.dtype == mx.uint8 else "affine"
        fits = packed.dtype == mx.uint32 and packed.shape[-1] * 32 == width * bits
        if mode is None or not fits or scales.shape[-1] * group_size != width or (bits not in BITS):
            bad.append(f"{path} ({packed.dtype} {packed.shape}, scales {scales.shape}, {width} columns)")
            continue
        packing[path] = {"group_size": group_size, "bits": bits, "mode": mode}
    if bad:
        raise ModelError(
            f"{source}: {len(bad)} quantized tensors do not fit config.json: {_some(bad)}. Download the model again."
        )
    return packing


def _matrices(modules: Mapping[str, Any]) -> list[str]:
    return [path for path, module in modules.items() if hasattr(module, "to_quantized")]


def describe_packing(packing: Mapping[str, Form], matrices: Iterable[str]) -> dict[str, Any]:
    """config.json's "quantization" as mlx-lm writes it: the most common format, then the modules that differ from it.

    A module that is not quantized has the value False.
    """
    counts = Counter((p["group_size"], p["bits"], p["mode"]) for p in packing.values())
    group_size, bits, mode = counts.most_common(1)[0][0]
    common: Form = {"group_size": group_size, "bits": bits, "mode": mode}
    described: dict[str, Any] = dict(common)
    for path in matrices:
        if path not in packing:
            described[path] = False
        elif packing[path] != common:
            described[path] = packing[path]
    return described


def _make_quantized(model: nn.Module, packing: Mapping[str, Form]) -> None:
    import mlx.nn as nn

    from mlx_zh.core.frozen_products import install

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return dict(packing[path]) if path in packing else False

    nn.quantize(model, class_predicate=choose)
    install(model)


def dequantize(weights: Weights, packing: Mapping[str, Form], dtype: mx.Dtype) -> None:
    """Replace quantized matrices by full ones of `dtype`, lazily.

    Scales and biases are converted to float32 first: in half precision `scale * code + bias` would be rounded again.
    """
    import mlx.core as mx

    for path, form in packing.items():
        packed, scales = weights.pop(f"{path}.weight"), weights.pop(f"{path}.scales")
        biases = weights.pop(f"{path}.biases", None)
        if form["mode"] == "affine":
            scales = scales.astype(mx.float32)
            biases = None if biases is None else biases.astype(mx.float32)
        dense = mx.dequantize(packed, scales, biases, **form)
        weights[f"{path}.weight"] = dense.astype(dtype)


def _compare(model: nn.Module, weights: Weights, source: str) -> None:
    """Raise one ModelError that lists every tensor that is missing, unexpected or of another shape."""
    from mlx.utils import tree_flatten

    expected = dict(tree_flatten(model.parameters()))
    missing = [f"{name} {expected[name].shape}" for name in expected if name not in weights]
    unknown = [f"{name} {weights[name].shape}" for name in weights if name not in expected]
    shapes = [
        f"{name} is {weights[name].shape}, should be {array.shape}"
        for name, array in expected.items()
        if name in weights and weights[name].shape != array.shape
    ]
    problems = [
        f"{len(names)} {problem}: {_some(names)}"
        for problem, names in (("missing", missing), ("unexpected", unknown), ("of the wrong shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(
            f"The tensors of {source} do not fit its config. {'; '.join(problems)}. Download the model again; if it "
            "is complete, its model_type in config.json is wrong."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
