"""LoRA and DoRA layers, and the choice of the weights that are trained."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner import dora, lora

from mlx_zh.core.expert_loads import has_experts
from mlx_zh.core.trained_tables import TRAINED_TABLES, TrainedEmbedding, TrainedHead
from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.spec import SAVED, AdapterSpec

_DROPOUT_KEYS: ContextVar[mx.array | None] = ContextVar("dropout_keys", default=None)


@contextmanager
def dropout_keys(keys: mx.array | None) -> Iterator[None]:
    """Let adapter layers apply dropout in this context, with one random key a token: (T, 2) uint32; None: none."""
    token = _DROPOUT_KEYS.set(keys)
    try:
        yield
    finally:
        _DROPOUT_KEYS.reset(token)


def _dropped(x: mx.array, rate: float, salt: int) -> mx.array:
    """Inverted dropout on x (T, D).

    It depends only on the token's key and the layer's `salt`, so it is the same however sequences are packed.
    """
    keys = _DROPOUT_KEYS.get()
    if rate == 0 or keys is None:
        return x
    salted = mx.bitwise_xor(keys, mx.array([salt, 0], dtype=mx.uint32))
    keep = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, (x.shape[-1],), key=key))(salted)
    return mx.where(keep, x / (1 - rate), mx.zeros((), dtype=x.dtype))


class LoRALinear(lora.LoRALinear):
    """mlx-lm's LoRA layer (arXiv:2106.09685), computed in the input's dtype, with dropout independent of packing."""

    def __init__(self, linear: nn.Module, spec: AdapterSpec, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        _set_up(self, linear, spec, seed, name)
        self.linear = linear

    def __call__(self, x: mx.array) -> mx.array:
        return self["linear"](x) + _low_rank(self, x)


class DoRALinear(dora.DoRALinear):
    """mlx-lm's DoRA layer (arXiv:2402.09353), which uses the wrapped layer's own product, quantized or not."""

    def __init__(self, linear: nn.Module, spec: AdapterSpec, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        _set_up(self, linear, spec, seed, name)
        self.set_linear(linear)

    def __call__(self, x: mx.array) -> mx.array:
        return self.scaled(self.product(x))

    def product(self, x: mx.array) -> mx.array:
        """The output before the magnitude: (T, D) -> (T, outputs). The gradient of the magnitude needs it."""
        out: mx.array = self.linear(x) + _low_rank(self, x)
        return out - self.linear.bias if "bias" in self.linear else out  # the magnitude must not scale the bias

    def scaled(self, out: mx.array) -> mx.array:
        """The output, from that before the magnitude: (T, outputs)."""
        bias = self.linear.bias if "bias" in self.linear else None
        adapted = self._dequantized_weight() + (self.scale * self.lora_b.T) @ self.lora_a.T
        norm = mx.stop_gradient(mx.linalg.norm(adapted, axis=1))
        out = (self.m / norm).astype(out.dtype) * out
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
    """scale · dropout(x) A B: (T, D) -> (T, outputs)."""
    dropped = _dropped(x, layer.dropout_rate, layer.salt)
    # Read as a dict's: a module's attributes are looked up more slowly, and this is done for each layer of each row.
    low = layer.scale * (dropped @ layer["lora_a"].astype(x.dtype))  # (T, D) -> (T, r)
    return low @ layer["lora_b"].astype(x.dtype)


class LoRAExperts(lora.LoRASwitchLinear):
    """mlx-lm's LoRA layer over one matrix of each expert: A is (E, r, in), B is (E, out, r). It has no dropout."""

    def __init__(self, linear: Any, spec: AdapterSpec, seed: int, name: str) -> None:
        nn.Module.__init__(self)
        count, outputs, inputs = linear.num_experts, linear.output_dims, linear.input_dims
        bound = 1 / math.sqrt(inputs)
        key = mx.random.key((seed << 32) ^ zlib.crc32(name.encode()))
        self.scale, self.num_experts = spec.scale, count
        self.lora_a = mx.random.uniform(-bound, bound, (count, spec.rank, inputs), key=key)
        self.lora_b = mx.zeros((count, outputs, spec.rank))
        self.linear = linear

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        low = x
        for matrix in (self.lora_a, self.lora_b):
            matrix = matrix.astype(x.dtype).swapaxes(-1, -2)
            low = mx.gather_mm(low, matrix, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + self.scale * low


LAYERS: dict[str, Any] = {"lora": LoRALinear, "dora": DoRALinear}
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, nn.QuantizedLinear, *EXPERTS)
# mlx-lm's classes, and ours, which derive from them
_ADAPTED = (lora.LoRALinear, dora.DoRALinear, lora.LoRASwitchLinear)


def add_adapter(model: nn.Module, spec: AdapterSpec, *, seed: int) -> None:
    """Put new adapter layers into a model, in place of those it has; only the weights of `spec` become trainable.

    A starts uniform in ±1/sqrt(inputs), drawn from `seed` and the layer's name. B starts at 0, so the model's outputs
    do not change. With kind "full", all weights of the last `num_layers` blocks are trained, and if these are all
    blocks, the embedding, final norm and head too. With the other kinds, the tables of `spec.saved` are trained too.
    Trained weights become float32, because bfloat16 would round most of their updates away. Raises AdapterError if
    `spec` does not fit the model.
    """
    remove_adapter(model)
    names = adapted_layers(model, spec)
    model.freeze()
    if spec.kind == "full":
        _unfreeze_blocks(model, max(len(model.layers) - spec.num_layers, 0))
        model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    else:
        install(model, new_layers(model, names, spec, seed))
        train_tables(model, spec.saved)


def adapted_layers(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """The names of the linear layers that `spec` adapts; none with kind "full".

    A router is never among them, and experts only if `spec` names their matrices. Raises AdapterError if `spec` does
    not fit the model.
    """
    if spec.kind == "full":
        quantized = nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear
        if any(isinstance(m, quantized) for m in model.modules()):
            raise AdapterError(
                "full fine-tuning needs a model that is not quantized: use lora.type: lora, or a bf16 model."
            )
        return []
    saved_modules(model, spec.saved)
    first = max(len(model.layers) - spec.num_layers, 0)
    modules = linear_layers(model)
    experts = {name for name, module in modules.items() if isinstance(module, EXPERTS)}
    routers = {f"{name.rpartition('.switch_mlp.')[0]}.gate" for name in experts}
    linear = [name for name in modules if block_of(name) >= first and name not in routers]
    if spec.targets is None:
        linear = [name for name in linear if name not in experts]
    else:
        names = {_last(n) for n in linear}
        if missing := sorted(set(spec.targets) - names):
            raise AdapterError(
                f"lora.targets names {', '.join(missing)}, which this model does not have; "
                f"choose from {', '.join(sorted(names))}, or write `all`."
            )
        linear = [n for n in linear if _last(n) in spec.targets]
        _check_experts(spec, [name for name in linear if name in experts])
    return linear


def _check_experts(spec: AdapterSpec, experts: Sequence[str]) -> None:
    """Raise AdapterError if the adapter's layers over these experts would need what there is not."""
    needs = "lora.type: dora" if spec.kind == "dora" else "lora.dropout" if spec.dropout > 0 else None
    if experts and needs is not None:
        raise AdapterError(
            f"{needs} cannot be used for the experts of this model ({_last(experts[0])} and others in lora.targets). "
            "Use lora.type: lora without dropout, or leave them out of lora.targets."
        )


def saved_modules(model: nn.Module, saved: Sequence[str]) -> tuple[str, ...]:
    """The tables of a model that `saved` (keys of SAVED) names; of a tied model, the one that it has.

    Raises AdapterError for a head with a bias, which PEFT and mlx-lm would lose.
    """
    if "lm_head" not in model:
        return ("embed_tokens",) if saved else ()
    if "lm_head" in saved and "bias" in model["lm_head"]:
        raise AdapterError(
            "the lm_head of this model has a bias, so it cannot be trained here; take it out of lora.modules_to_save."
        )
    return tuple(name for name in SAVED if name in saved)


def train_tables(model: nn.Module, saved: Sequence[str]) -> None:
    """Put trained copies over the tables that `saved` names; quantized ones become float32."""
    for name in saved_modules(model, saved):
        if name == "lm_head":
            model.update_modules({"lm_head": TrainedHead(model["lm_head"])})
        else:
            inner = model["model"]
            inner.update_modules({"embed_tokens": TrainedEmbedding(inner["embed_tokens"])})


def block_of(name: str) -> int:
    """The number of the block that a module belongs to; -1 if it is in none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts[:-1] else -1


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _unfreeze_blocks(model: nn.Module, first: int) -> None:
    """Make all weights of the blocks from number `first` on trainable; from 0 on, the whole model."""
    if first == 0:
        model.unfreeze()
    for layer in model.layers[first:]:
        layer.unfreeze()
        if has_experts(layer.mlp):
            layer.mlp.gate.freeze()  # the router: a change of it would move tokens to experts that never saw them


def new_layers(model: nn.Module, names: Sequence[str], spec: AdapterSpec, seed: int) -> dict[str, Any]:
    """New adapter layers over the named linear layers of a model, by name; the model is not changed."""
    linear = linear_layers(model)
    layers = {name: LoRAExperts if isinstance(linear[name], EXPERTS) else LAYERS[spec.kind] for name in names}
    return {name: layer(linear[name], spec, seed, name) for name, layer in layers.items()}


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """A model's linear layers by name, without the adapter layers that may be over them."""
    unwrapped = {n: m.linear if isinstance(m, _ADAPTED) else m for n, m in model.named_modules()}
    return {name: module for name, module in unwrapped.items() if isinstance(module, _LINEAR)}


def install(model: nn.Module, layers: dict[str, Any]) -> None:
    """Put adapter layers into a model, in place of those it has; `layers` are by the name of the wrapped layer."""
    remove_adapter(model)
    model.freeze()
    model.update_modules(tree_unflatten(list(layers.items())))


def remove_adapter(model: nn.Module) -> None:
    """Replace a model's adapter layers and trained tables by what they stand in for, which is unchanged."""
    wrapped = [(n, m.linear) for n, m in model.named_modules() if isinstance(m, _ADAPTED)]
    wrapped += [(n, m.base) for n, m in model.named_modules() if isinstance(m, TRAINED_TABLES)]
    model.update_modules(tree_unflatten(wrapped))


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """A model's trainable arrays by name."""
    return dict(tree_flatten(model.trainable_parameters()))
