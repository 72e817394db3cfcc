"""LoRA, DoRA and full fine-tuning: which weights are trained, and adapters on disk in mlx-lm's format."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner import dora, lora

from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.folder import read_table
from mlx_zh.system.storage import write_arrays, write_json

ADAPTER_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
_LEAVES = ("lora_a", "lora_b", "m")
_LARGEST_RANK = 1 << 20
_DROPOUT_KEYS: ContextVar[mx.array | None] = ContextVar("dropout_keys", default=None)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What is trained. `kind` is lora, dora or full; `scale` multiplies the low-rank product.

    `targets` are the last names of linear layers (`q_proj`), or None for every linear layer of a block;
    `num_layers` counts blocks from the top.
    """

    kind: str
    num_layers: int
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    @staticmethod
    def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
        """alpha / rank (LoRA, arXiv:2106.09685) or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if rslora else alpha / rank


@contextmanager
def dropout_keys(keys: mx.array | None) -> Iterator[None]:
    """Within it, adapter layers drop inputs, drawing from one random key a token ((T, 2) uint32), or None."""
    token = _DROPOUT_KEYS.set(keys)
    try:
        yield
    finally:
        _DROPOUT_KEYS.reset(token)


def _dropped(x: mx.array, rate: float, salt: int) -> mx.array:
    """Inverted dropout on (T, D), a function of token key and layer alone: the same however rows are packed."""
    keys = _DROPOUT_KEYS.get()
    if rate == 0 or keys is None:
        return x
    salted = mx.bitwise_xor(keys, mx.array([salt, 0], dtype=mx.uint32))
    keep = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, (x.shape[-1],), key=key))(salted)
    return mx.where(keep, x / (1 - rate), mx.zeros((), dtype=x.dtype))


class LoRALinear(lora.LoRALinear):
    """mlx-lm's LoRA layer, computed in the input's type and with dropout that packing cannot change."""

    def __init__(self, linear: nn.Module, spec: AdapterSpec, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        _set_up(self, linear, spec, seed, name)
        self.linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + _low_rank(self, x)


class DoRALinear(dora.DoRALinear):
    """mlx-lm's DoRA layer (arXiv:2402.09353) over the layer's own product, quantized or not."""

    def __init__(self, linear: nn.Module, spec: AdapterSpec, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        _set_up(self, linear, spec, seed, name)
        self.set_linear(linear)

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.linear.bias if "bias" in self.linear else None
        out = self.linear(x) + _low_rank(self, x)
        if bias is not None:
            out = out - bias  # the magnitude scales the product only
        adapted = self._dequantized_weight() + (self.scale * self.lora_b.T) @ self.lora_a.T
        norm = mx.stop_gradient(mx.linalg.norm(adapted, axis=1))
        out = (self.m / norm).astype(x.dtype) * out
        return out if bias is None else out + bias


def _set_up(layer: Any, linear: nn.Module, spec: AdapterSpec, seed: int, name: str) -> None:
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    salt = zlib.crc32(name.encode())
    bound = 1 / math.sqrt(inputs)
    key = mx.random.key((seed << 32) ^ salt)
    layer.scale = spec.scale
    layer.lora_a = mx.random.uniform(-bound, bound, (inputs, spec.rank), key=key)
    layer.lora_b = mx.zeros((spec.rank, outputs))
    layer.dropout_rate, layer.salt = spec.dropout, salt


def _low_rank(layer: Any, x: mx.array) -> mx.array:
    dropped = _dropped(x, layer.dropout_rate, layer.salt)
    low = layer.scale * (dropped @ layer.lora_a.astype(x.dtype))  # (T, D) -> (T, r)
    return low @ layer.lora_b.astype(x.dtype)


_LAYERS: dict[str, Any] = {"lora": LoRALinear, "dora": DoRALinear}
_LINEAR = (nn.Linear, nn.QuantizedLinear)
_ADAPTED = (lora.LoRALinear, dora.DoRALinear)  # ours derive from mlx-lm's


def add_adapter(model: nn.Module, spec: AdapterSpec, *, seed: int) -> None:
    """Put fresh adapter layers into a model, in place of any it has, and make exactly what `spec` trains trainable.

    A starts uniform in +-1/sqrt(inputs) and B at 0 (so the model's function is unchanged), drawn from `seed` and
    the layer's name. With `full`, all weights of the last `num_layers` blocks are trained, and the embedding,
    final norm and head too when that is every block; they become float32, because bfloat16 would round most of
    their updates away.
    """
    remove_adapter(model)
    names = adapted_layers(model, spec)
    model.freeze()
    if spec.kind == "full":
        _train_whole(model, max(len(model.layers) - spec.num_layers, 0))
        model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    else:
        model.update_modules(tree_unflatten(list(_wrapped(model, names, spec, seed).items())))


def adapted_layers(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """The linear layers that `spec` adapts; none with `full`. AdapterError where it does not fit the model."""
    if spec.kind == "full":
        if any(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in model.modules()):
            raise AdapterError(
                "full fine-tuning needs a model that is not quantized: use lora.type: lora, or a bf16 model."
            )
        return []
    first = max(len(model.layers) - spec.num_layers, 0)
    linear = [name for name in _linear_layers(model) if _layer_of(name) >= first]
    if spec.targets is not None:
        names = {_last(n) for n in linear}
        if missing := sorted(set(spec.targets) - names):
            raise AdapterError(
                f"lora.targets names {', '.join(missing)}, which this model does not have; "
                f"choose from {', '.join(sorted(names))}, or write all."
            )
        linear = [n for n in linear if _last(n) in spec.targets]
    return linear


def _layer_of(name: str) -> int:
    """The block that a module belongs to; -1 outside the blocks."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts[:-1] else -1


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _train_whole(model: nn.Module, first: int) -> None:
    if first == 0:
        model.unfreeze()
    for layer in model.layers[first:]:
        layer.unfreeze()


def _wrapped(model: nn.Module, names: Sequence[str], spec: AdapterSpec, seed: int) -> dict[str, Any]:
    """Fresh adapter layers over the named linear layers of a model, not yet in it."""
    linear = _linear_layers(model)
    return {name: _LAYERS[spec.kind](linear[name], spec, seed, name) for name in names}


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers by name, whether or not an adapter lies over them."""
    found = {n: m.linear if isinstance(m, _ADAPTED) else m for n, m in model.named_modules()}
    return {name: module for name, module in found.items() if isinstance(module, _LINEAR)}


def remove_adapter(model: nn.Module) -> None:
    """Take adapter layers off again; the layers they wrapped come back unchanged."""
    model.update_modules(tree_unflatten([(n, m.linear) for n, m in model.named_modules() if isinstance(m, _ADAPTED)]))


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trained arrays by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def save_adapter(folder: Path, weights: dict[str, mx.array], spec: AdapterSpec, about: dict[str, Any]) -> None:
    """Write an adapter folder that mlx-lm loads too; `about` (base model, run) is kept beside the settings."""
    write_arrays(folder / ADAPTER_FILE, weights, {"format": "mlx"})
    keys = sorted({_key(name.rpartition(".")[0]) for name in weights})
    write_json(
        folder / CONFIG_FILE,
        {
            "fine_tune_type": spec.kind,
            "num_layers": spec.num_layers,
            "lora_parameters": {
                "rank": spec.rank,
                "scale": spec.scale,
                "dropout": spec.dropout,
                "keys": keys,
            },
            "mlx_zh": about,
        },
    )


def _key(module: str) -> str:
    """A module's name as mlx-lm's `keys` have it: inside its block, or inside the model where it is in no block."""
    return module.split(".layers.", 1)[-1].split(".", 1)[-1] if _layer_of(module) >= 0 else module


def load_adapter(model: nn.Module, folder: Path, *, seed: int = 0) -> AdapterSpec:
    """Apply an adapter folder made here or by mlx-lm in place of any on the model; its weights become trainable.

    Raises `AdapterError` naming every tensor that does not fit the model, with both shapes; the model is then
    untouched.
    """
    spec, weights = read_adapter(folder)
    _check_vocabulary(model, folder)
    if spec.kind == "full":
        _fits(dict(tree_flatten(model.parameters())), weights, folder)
        add_adapter(model, spec, seed=seed)
    else:
        _wrap_as_named(model, spec, weights, folder, seed)
    model.load_weights(list(weights.items()), strict=False)
    return spec


def read_adapter(folder: Path) -> tuple[AdapterSpec, dict[str, mx.array]]:
    """The settings and the arrays of an adapter folder; one of PEFT's is converted."""
    from mlx_zh.models.adapters import peft

    if peft.is_peft(folder):
        return peft.read_peft(folder)
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} is not an adapter folder: it has no {name}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        parameters = config.get("lora_parameters") or {}
        spec = AdapterSpec(
            kind=config.get("fine_tune_type", "lora"),
            num_layers=_all_if_not_positive(int(config.get("num_layers", 0))),
            rank=int(parameters.get("rank", 0)),
            scale=float(parameters.get("scale", 0)),
            dropout=float(parameters.get("dropout", 0)),
        )
        read_table(folder / ADAPTER_FILE)
        weights = mx.load(str(folder / ADAPTER_FILE))
        mx.eval(weights)  # reads the data, so that what is missing of it shows here
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, ModelError) as error:
        raise AdapterError(f"{folder} is damaged: {error}") from error
    if spec.kind not in (*_LAYERS, "full") or not isinstance(weights, dict) or not weights:
        raise AdapterError(
            f"{folder}: fine_tune_type {spec.kind!r} with {len(weights)} tensors is no usable adapter."
        )
    if spec.kind != "full" and not (0 < spec.rank <= _LARGEST_RANK and math.isfinite(spec.scale)):
        raise AdapterError(f"{folder} is damaged: rank {spec.rank} and scale {spec.scale} make no adapter.")
    return spec, weights


def vocabulary(model: nn.Module) -> int:
    """Rows of a model's embedding."""
    return int(model.model.embed_tokens.weight.shape[0])


def _check_vocabulary(model: nn.Module, folder: Path) -> None:
    """An adapter of the blocks alone fits models with other tokens, of which it knows nothing; ours say theirs."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    about = config.get("mlx_zh") if isinstance(config, dict) else None
    trained = about.get("vocabulary") if isinstance(about, dict) else None
    if isinstance(trained, int) and trained != vocabulary(model):
        raise AdapterError(
            f"{folder} was trained on a model with a vocabulary of {trained} tokens, and this one has "
            f"{vocabulary(model)}. Load it with the base model that it was trained on."
        )


def _all_if_not_positive(layers: int) -> int:
    return layers if layers > 0 else 10**6  # mlx-lm's 0 and -1 stand for every layer


def _wrap_as_named(
    model: nn.Module, spec: AdapterSpec, weights: dict[str, mx.array], folder: Path, seed: int
) -> None:
    """Wrap the layers that the adapter's tensors name, whatever its settings say of them."""
    linear = _linear_layers(model)
    owners = {name.rpartition(".")[0] for name in weights}
    strange = [n for n in weights if n.rpartition(".")[2] not in _LEAVES]
    strange += [f"{n} (no such linear layer)" for n in owners if n not in linear]
    if strange:
        raise AdapterError(
            f"{folder} was made for another model; it has " + "; ".join(sorted(strange)[:8]) + ". "
            "Load it with the base model that it was trained on."
        )
    wrapped = _wrapped(model, sorted(owners), spec, seed)
    expected = {f"{name}.{leaf}": layer[leaf] for name, layer in wrapped.items() for leaf in _LEAVES if leaf in layer}
    _fits(expected, weights, folder)
    if missing := sorted(expected.keys() - weights.keys()):
        raise AdapterError(f"{folder} is incomplete: {', '.join(missing[:8])} is missing.")
    remove_adapter(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(wrapped.items())))


def _fits(expected: dict[str, mx.array], weights: dict[str, mx.array], folder: Path) -> None:
    wrong = [
        f"{name} is {list(array.shape)}, the model needs {list(expected[name].shape) if name in expected else 'none'}"
        for name, array in weights.items()
        if name not in expected or expected[name].shape != array.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AdapterError(
            f"{folder} does not fit this model: " + "; ".join(sorted(wrong)[:8]) + more + ". "
            "Load it with the base model that it was trained on."
        )
