"""The packed forward and the fused log-probs: what probability a model gives to tokens.

`hidden_states` runs a Llama-shaped mlx-lm model over a packed row: linear layers, norms and MLPs once over all T
tokens, attention segment by segment without any (T, T) mask. `token_logprobs` projects only the scored positions
on the vocabulary, chunk by chunk, and never keeps a chunk's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_zh.core.families import FAMILIES
from mlx_zh.core.packing import PackedBatch, RowBuilder, Tokens
from mlx_zh.errors import ModelError
from mlx_zh.system import device

# A chunk of float32 logits, in bytes. Chunks wait for one another, and four arrays of this size are alive at a time
# (measured on the CPU back end).
CHUNK_BYTES = 32 * 2**20

SUPPORTED = tuple(FAMILIES)


class TokenNoise(Protocol):
    """Randomness of a training step as a function of the token, so that packing cannot change it."""

    def embeddings(self, hidden: mx.array) -> mx.array:
        """The (T, D) embeddings with their noise."""

    def layer(self) -> Any:
        """A context manager under which the layers of one block draw their dropout."""


KeysValues = tuple[mx.array, mx.array]  # rotated keys and values, (1, H, *, d) each


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens computed once and continued by the roots of any number of rows: what each layer remembers of them."""

    length: int
    layers: tuple[KeysValues, ...]


def decoder(model: nn.Module) -> Any:
    """The part of an mlx-lm model that holds `embed_tokens`, `layers` and `norm`."""
    return model.model


def output_head(model: nn.Module) -> nn.Module:
    """The module that projects hidden states on the vocabulary; tied models give their embedding."""
    if "lm_head" in model:
        return model.lm_head
    return decoder(model).embed_tokens


def hidden_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    checkpoint: bool = False,
    noise: TokenNoise | None = None,
    prefix: Prefix | None = None,
) -> mx.array:
    """Last hidden states (T, D) of a packed row, after the final norm.

    With `checkpoint`, blocks that hold trained weights keep only their input and are computed again in the
    backward pass. `noise` switches dropout and embedding noise on; without it there is none. With `prefix`, every
    root of the row continues it.
    """
    inner = decoder(model)
    hidden = inner.embed_tokens(batch.tokens)  # (T,) -> (T, D)
    if noise is not None:
        hidden = noise.embeddings(hidden)
    for index, layer in enumerate(inner.layers):
        before = None if prefix is None else prefix.layers[index]
        hidden = _run_block(layer, hidden, batch, checkpoint, noise, before)
    return inner.norm(hidden)


def prefill(model: nn.Module, tokens: Tokens, *, chunk: int, prefix: Prefix | None = None) -> Prefix:
    """The prefix of `tokens`, or `prefix` continued by them, computed `chunk` tokens at a time. Forward only."""
    for start in range(0, len(tokens), chunk):
        row = RowBuilder()
        row.add(tokens[start : start + chunk])
        batch = row.build(0)
        inner = decoder(model)
        hidden = inner.embed_tokens(batch.tokens)
        kept: list[KeysValues] = []
        for index, layer in enumerate(inner.layers):
            hidden = _block(layer, hidden, batch, None if prefix is None else prefix.layers[index], kept)
        prefix = Prefix(len(batch.tokens) + (0 if prefix is None else prefix.length), tuple(kept))
        mx.eval(prefix.layers)  # bounds memory: one piece at a time
    if prefix is None:
        raise ValueError("a prefix needs at least one token")
    return prefix


def _run_block(
    layer: nn.Module,
    hidden: mx.array,
    batch: PackedBatch,
    checkpoint: bool,
    noise: TokenNoise | None,
    before: KeysValues | None,
) -> mx.array:
    def block(hidden: mx.array) -> mx.array:
        if noise is None:
            return _block(layer, hidden, batch, before)
        with noise.layer():  # entered here because checkpointing calls this again in the backward pass
            return _block(layer, hidden, batch, before)

    trained = layer.trainable_parameters()
    if not checkpoint or not _any_array(trained):
        return block(hidden)

    def rebuilt(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
        layer.update(parameters)
        return block(hidden)

    return mx.checkpoint(rebuilt)(trained, hidden)


def _any_array(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_any_array(v) for v in tree.values())
    if isinstance(tree, list):
        return any(_any_array(v) for v in tree)
    return True


def _block(
    layer: Any,
    hidden: mx.array,
    batch: PackedBatch,
    before: KeysValues | None = None,
    kept: list[KeysValues] | None = None,
) -> mx.array:
    hidden = hidden + _attention(layer.self_attn, layer.input_layernorm(hidden), batch, before, kept)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _attention(
    attention: Any, x: mx.array, batch: PackedBatch, before: KeysValues | None, kept: list[KeysValues] | None
) -> mx.array:
    """Attention of a row (T, D) whose roots continue `before`; the last segment's keys and values go to `kept`."""
    shift = 0 if before is None else before[0].shape[2]
    positions = batch.positions + shift if shift else batch.positions

    def heads(projected: mx.array, count: int, norm: str | None, *, turned: bool) -> list[mx.array]:
        """Of each segment, (1, H, n, d)."""
        split = projected.reshape(x.shape[0], count, 1, -1)  # (T, H * d) -> (T, H, 1, d)
        if norm is not None and norm in attention:
            split = attention[norm](split)
        if turned:  # every token is a batch of its own, for each has its own position
            split = attention.rope(split, offset=positions)
        split = split.swapaxes(0, 2)  # (T, H, 1, d) -> (1, H, T, d)
        # Not slices: their gradients would be as many arrays of the whole row, added up.
        return list(mx.split(split, batch.starts[1:], axis=2))

    queries = heads(attention.q_proj(x), attention.n_heads, "q_norm", turned=True)
    keys = heads(attention.k_proj(x), attention.n_kv_heads, "k_norm", turned=True)
    values = heads(attention.v_proj(x), attention.n_kv_heads, None, turned=False)

    shared = [] if before is None else [before]
    outputs = []
    for index, segment in enumerate(batch.segments):
        line = shared + [(keys[i], values[i]) for i in (*batch.ancestors(index), index)]
        key, value = (_joined(list(column)) for column in zip(*line, strict=True))
        # "causal" is aligned to the last key, so ancestors are seen whole
        mask = "causal" if len(segment) > 1 else None
        outputs.append(
            mx.fast.scaled_dot_product_attention(queries[index], key, value, scale=attention.scale, mask=mask)
        )
        if kept is not None and index == len(batch.segments) - 1:
            kept.append((key, value))
    return attention.o_proj(_joined(outputs)[0].swapaxes(0, 1).reshape(x.shape[0], -1))  # (1, H, T, d) -> (T, D)


def _joined(parts: list[mx.array]) -> mx.array:
    """Concatenate (1, H, *, d) along the tokens."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def chunk_rows(vocabulary: int) -> int:
    """How many rows of logits are in a chunk where nothing else is asked for."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def token_logprobs(
    hidden: mx.array, head: nn.Module, targets: mx.array, *, chunk: int | None = None, grad: bool = True
) -> mx.array:
    """Log-probs (S,) float32 of `targets` (S,) given `hidden` (S, D) and the output `head`.

    At most `chunk` rows of logits exist at a time (default: what fits `CHUNK_BYTES`). The gradient with respect to
    `hidden` is computed in the forward pass, chunk by chunk, so the backward pass needs no logits; `grad=False`
    skips that where no gradient will be asked for. A head that is itself trained, or wrapped in an adapter, is
    differentiated by recomputing each chunk instead: the same numbers for more time.
    """
    if targets.size == 0:  # a row without scored tokens; MLX refuses to reduce an empty array
        return mx.zeros(0)
    rows = chunk or chunk_rows(_vocabulary(head))
    if _any_array(head.trainable_parameters()) or not isinstance(head, _PLAIN_HEADS):
        return _trained_logprobs(hidden, head, targets, rows)
    if not grad:
        return _chained(lambda h, t: (_logprobs(_project(head, h), t),), hidden, targets, rows)[0]

    @mx.custom_function
    def fused(hidden: mx.array) -> tuple[mx.array, ...]:
        return _chained(lambda h, t: _logprobs_and_gradient(head, h, t), hidden, targets, rows)

    @fused.vjp
    def fused_vjp(_: Any, cotangents: Any, outputs: Any) -> mx.array:
        gradient = outputs[1]  # (S, D)
        return (cotangents[0][:, None] * gradient.astype(mx.float32)).astype(gradient.dtype)

    outputs: Any = fused(hidden)
    return outputs[0]


_PLAIN_HEADS = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


def _vocabulary(head: Any) -> int:
    while "weight" not in head:  # adapters wrap the layer
        head = head["linear"] if "linear" in head else head["embedding"]
    return int(head["weight"].shape[0])


def _project(head: Any, hidden: mx.array) -> mx.array:
    as_linear: Callable[[mx.array], mx.array] = getattr(head, "as_linear", head)
    return as_linear(hidden).astype(mx.float32)  # (C, D) -> (C, V); log-sum-exp needs float32


def _logprobs(logits: mx.array, targets: mx.array) -> mx.array:
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return at_target - mx.logsumexp(logits, axis=-1)


def _logprobs_and_gradient(head: Any, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probs (C,) and d log-prob / d hidden = (onehot - softmax) @ W (C, D), with a single exponential."""
    logits = _project(head, hidden)
    column = targets[:, None]
    probabilities = mx.softmax(logits, axis=-1)  # (C, V)
    # softmax is 1 / sum at its maximum, and that is never small: log-sum-exp without a second exponential.
    log_sum_exp = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))
    logprobs = mx.take_along_axis(logits, column, axis=-1)[:, 0] - log_sum_exp
    at_target = mx.take_along_axis(probabilities, column, axis=-1)
    error = mx.put_along_axis(probabilities, column, at_target - 1, axis=-1)  # softmax - onehot
    return logprobs, -_project_back(head, error.astype(hidden.dtype))


def _project_back(head: Any, rows: mx.array) -> mx.array:
    """`rows` (C, V) times the head's weight (V, D)."""
    if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return mx.quantized_matmul(
            rows,
            head.weight,
            head.scales,
            head.get("biases"),
            transpose=False,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )
    return rows @ head.weight


def _chained(
    compute: Callable[[mx.array, mx.array], tuple[mx.array, ...]],
    hidden: mx.array,
    targets: mx.array,
    rows: int,
) -> tuple[mx.array, ...]:
    """`compute` over chunks of rows, each waiting for the one before it: else MLX runs them side by side."""
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, hidden.shape[0], rows):
        piece = hidden[start : start + rows]
        if parts:
            piece = mx.depends([piece], [*parts[-1], _pause(parts[-1][0])])[0]
        parts.append(compute(piece, targets[start : start + rows]))
    if len(parts) == 1:
        return parts[0]
    return tuple(mx.concatenate(list(column)) for column in zip(*parts, strict=True))


def _pause(after: mx.array) -> mx.array:
    """A chain of one-number kernels as long as what MLX schedules ahead of the device: once it has come to the end,
    what came before it is computed and its arrays are free again."""
    link = after[:1]
    for _ in range(device.kernels_ahead()):
        link = -link
    return link


def _trained_logprobs(hidden: mx.array, head: nn.Module, targets: mx.array, rows: int) -> mx.array:
    parameters = head.trainable_parameters()

    def compute(hidden: mx.array, targets: mx.array) -> tuple[mx.array]:
        def recomputed(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
            head.update(parameters)
            return _logprobs(_project(head, hidden), targets)

        return (mx.checkpoint(recomputed)(parameters, hidden),)

    return _chained(compute, hidden, targets, rows)[0]


def batch_logprobs(
    model: nn.Module,
    batch: PackedBatch,
    *,
    checkpoint: bool = False,
    chunk: int | None = None,
    grad: bool = True,
    noise: TokenNoise | None = None,
) -> mx.array:
    """Log-probs (S,) float32 of a batch's scored tokens."""
    hidden = hidden_states(model, batch, checkpoint=checkpoint, noise=noise)
    return token_logprobs(hidden[batch.scored], output_head(model), batch.targets, chunk=chunk, grad=grad)


def sum_by_owner(values: mx.array, owner: mx.array, count: int) -> mx.array:
    """Sum `values` (S,) over the scored tokens of each of `count` sequences; a fixed order of addition."""
    member = owner[None] == mx.arange(count)[:, None]  # (N, S)
    return (member * values[None]).sum(axis=1)


def sequence_logprobs(model: nn.Module, batch: PackedBatch, *, chunk: int | None = None) -> mx.array:
    """Summed log-probs (num_sequences,) float32 of each sequence's scored tokens; forward only."""
    logprobs = batch_logprobs(model, batch, chunk=chunk, grad=False)
    return sum_by_owner(logprobs, batch.owner, batch.num_sequences)


def check_supported(model: nn.Module, config: dict[str, Any]) -> None:
    """Compare the packed forward with the model's own on a short text; refuse a family whose numbers differ.

    Raises ModelError, also where the model's own numbers are none.
    """
    family = config.get("model_type", "?")
    refusal = (
        f"models of type {family!r} cannot be trained here: their blocks are not Llama-shaped. "
        f"These work: {', '.join(SUPPORTED)}."
    )
    inner = getattr(model, "model", None)
    if inner is None or any(name not in inner for name in ("embed_tokens", "layers", "norm")):
        raise ModelError(refusal)
    if any(getattr(layer, "use_sliding", False) for layer in inner.layers):
        raise ModelError(f"{refusal[:-1]}, but not with sliding-window attention, which this one uses.")
    vocabulary = _vocabulary(output_head(model))
    tokens = [(7 * i + 3) % vocabulary for i in range(12)]
    row = RowBuilder()
    branch = row.add(tokens[5:], parent=row.add(tokens[:5]))
    row.score(branch, [True] * 7, owner=0)
    try:
        packed = _project(output_head(model), hidden_states(model, row.build(1)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(refusal) from error
    own = model(mx.array([tokens]))[0].astype(mx.float32)
    if not mx.isfinite(own).all():
        raise ModelError(
            "the model gives numbers that are not finite, before any training: its weights are damaged "
            "(get them again), or too large for float16 (set model.dtype: bfloat16)."
        )
    # Logits less their mean, relative to their own size: a wide vocabulary makes every probability small.
    difference = float(mx.linalg.norm(_centred(packed) - _centred(own)) / mx.linalg.norm(_centred(own)))
    if not difference < (1e-3 if computes_in_float32(model) else 0.1):
        raise ModelError(f"{refusal} (Its packed logits differ from its own by {difference:.2g} of their size.)")


def _centred(logits: mx.array) -> mx.array:
    return logits - logits.mean(axis=-1, keepdims=True)


def computes_in_float32(model: nn.Module) -> bool:
    """Whether hidden states are float32 (else half precision)."""
    return decoder(model).norm.weight.dtype == mx.float32
