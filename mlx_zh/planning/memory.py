"""The memory of a training step by part, computed from sizes alone; docs/memory.md derives the terms.

The arrays that the forward pass saves for the backward pass are counted. The arrays that MLX allocates ahead of
computing them are measured (`_AHEAD_*`): its scheduler runs about forty kernels ahead of the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.delta_shapes import DELTA_LINEAR
from mlx_zh.planning.shapes import ModelShape, Packing, Row, Target, adapted_matrices
from mlx_zh.recipe import Memory

FLOAT = 4

# Numbers of arrays (T, F), (T, D) and (T, A) that are allocated ahead in the backward pass of a block: without
# checkpointing, and with it, where the block is recomputed first.
_AHEAD_BACKWARD = {"intermediate": 3.5, "hidden": 10.0, "queries": 4.0}
_AHEAD_RECOMPUTED = {"intermediate": 9.0, "hidden": 10.0, "queries": 4.0}
_AHEAD_SCORES = 2  # score matrices of one layer
_AHEAD_MATRICES = 4  # DoRA's adapted weights
_AHEAD_UPDATES = 6  # arrays of an optimizer step, of the size of a block's largest trained array

# Arrays (C, V) float32 of a chunk of logits. Chunks of a trained head are allocated ahead of each other, up to the
# second number on the CPU, and up to the third on a GPU (`device.kernels_ahead` is 0).
_HEAD_EACH, _HEAD_MAX, _HEAD_MAX_ON_GPU = 3, 4.5, 12
_TABLE_GRADIENTS = 3  # (V, D) gradients of a head beside an adapter: so far, of a chunk, their sum
_HEAD_GRADIENTS_MAX = 9  # (V, D) gradients of a trained head, one per chunk, before they are added up


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part at the peak of a step; `phase` is the moment of the step at which the peak occurs."""

    phase: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes that MLX would report as its peak memory."""
        return sum(self.parts.values())

    @property
    def over_weights(self) -> float:
        """The peak in bytes without the base model."""
        return self.peak - self.parts["weights"]


def step_memory(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory, *, rows: int = 2
) -> Estimate:
    """The peak memory of a training step of `rows` rows, of which `row` is the largest."""
    values = trained_values(model, trained)
    gradients = values * FLOAT
    always = dict(
        weights=weight_bytes(model, target, trained),
        adapters=0.0 if trained.kind == "full" else gradients,
        optimizer=2.0 * gradients,
        gradients=gradients if rows > 1 else 0.0,  # the sum over the earlier rows
    )
    phases = [
        Estimate(name, _added(always, parts))
        for name, parts in (
            ("scoring", _scoring(model, trained, target, row, settings)),
            *_backward(model, trained, target, row, settings, gradients),
        )
    ]
    update = {
        "gradients": gradients - always["gradients"],
        "optimizer": gradients + _AHEAD_UPDATES * _matrix_bytes(model, trained) + _outer_update(model, trained),
    }
    phases.append(Estimate("updating the weights", _added(always, update)))
    return max(phases, key=lambda estimate: estimate.peak)


def _added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {
        name: left.get(name, 0.0) + right.get(name, 0.0) for name in [*left, *(n for n in right if n not in left)]
    }


def weight_bytes(model: ModelShape, target: Target, trained: AdapterSpec | None = None) -> float:
    """Bytes of the base model's arrays. Blocks that full fine-tuning trains are float32."""
    block = sum(
        model.share(name)
        * _matrix_weight(model.matrix(name), _packing_of(target.packing, _path(name)), target.value_bytes)
        for name in model.linear
    )
    block += model.vector_values * target.value_bytes
    table = (model.hidden, model.vocabulary)
    outer = _matrix_weight(table, _packing_of(target.packing, "embed_tokens"), target.value_bytes)
    if not model.tied:
        outer += _matrix_weight(table, _packing_of(target.packing, "lm_head"), target.value_bytes)
    outer += model.hidden * target.value_bytes
    full = 0  # blocks that are trained themselves
    if trained is not None and trained.kind == "full":
        full = trained.num_layers
        if full >= model.layers:
            outer = model.outer_values * FLOAT
    return (model.layers - full) * block + full * model.block_values * FLOAT + outer


def _path(name: str) -> str:
    """The name of a linear layer in its block."""
    if name in DELTA_LINEAR:
        return f"linear_attn.{name}"
    return f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}"


def _packing_of(packing: Packing | None, name: str) -> tuple[int, int] | None:
    if packing is None:
        return None
    for module, bits_and_group in packing.modules:
        if module.endswith(name):
            return bits_and_group
    return packing.bits, packing.group


def _matrix_weight(size: tuple[int, int], packing: tuple[int, int] | None, value_bytes: int) -> float:
    inputs, outputs = size
    if packing is None or inputs % packing[1]:
        return inputs * outputs * value_bytes
    bits, group = packing
    return outputs * (inputs * bits / 8 + 2 * value_bytes * inputs / group)  # each group has a scale and a bias


def saved_values(model: ModelShape, trained: AdapterSpec) -> float:
    """Number of values of the tables that are trained beside an adapter; a tied model has one."""
    tables = min(len(trained.saved), 1 if model.tied else 2)
    return float(tables * model.vocabulary * model.hidden)


def trains_head(model: ModelShape, trained: AdapterSpec) -> bool:
    """Whether the table that the logits are computed with is trained beside an adapter."""
    return "lm_head" in trained.saved or (model.tied and bool(trained.saved))


def backward_blocks(model: ModelShape, trained: AdapterSpec) -> int:
    """Blocks that the gradient goes through: a trained embedding needs it through all of them."""
    return model.layers if "embed_tokens" in trained.saved or (model.tied and trained.saved) else trained.num_layers


def trained_values(model: ModelShape, trained: AdapterSpec) -> float:
    """Number of trained values."""
    if trained.kind == "full":
        outer = model.outer_values if trained.num_layers >= model.layers else 0
        return trained.num_layers * model.block_values + outer
    values = 0.0
    for name in adapted_matrices(model, trained):
        own = trained.rank * model.sides(name) + (model.matrix(name)[1] if trained.kind == "dora" else 0)
        values += model.share(name, trained.num_layers) * own
    return trained.num_layers * values + saved_values(model, trained)


def _saved(model: ModelShape, trained: AdapterSpec, target: Target, row: Row) -> dict[str, float]:
    """Bytes that one trained block saves for its backward pass; the mean of both kinds, where there are two."""
    attention = _saved_by(model, trained, target, row, recurrent=False)
    if model.delta is None:
        return attention
    recurrent = _saved_by(model, trained, target, row, recurrent=True)
    share = model.share("out_proj", trained.num_layers)
    return {name: share * size + (1 - share) * attention[name] for name, size in recurrent.items()}


def _saved_at_most(model: ModelShape, trained: AdapterSpec, target: Target, row: Row) -> dict[str, float]:
    """The same of the kind of block that saves more."""
    kinds = [False] if model.delta is None else [False, True]
    return max(
        (_saved_by(model, trained, target, row, recurrent=kind) for kind in kinds), key=lambda s: sum(s.values())
    )


def _saved_by(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, *, recurrent: bool
) -> dict[str, float]:
    hidden, queries, keys, inner = model.hidden, model.queries, model.keys, model.intermediate
    absent = DELTA_LINEAR.keys() if not recurrent else {"q_proj", "k_proj", "v_proj", "o_proj"}
    adapted = adapted_matrices(model, trained) - absent
    inputs = {
        frozenset({"q_proj", "k_proj", "v_proj"}): hidden,
        frozenset({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}): hidden,
        frozenset({"out_proj"}): 0 if model.delta is None else model.delta.values,
        frozenset({"o_proj"}): queries,
        frozenset({"gate_proj", "up_proj"}): hidden,
        frozenset({"down_proj"}): inner,
    }
    values = 2.0 * hidden  # inputs of both norms
    values += model.routed_values
    values += 4 * inner  # gate and up, and sigmoid and SiLU, which MLX computes early
    if trained.kind == "full":
        values += 2 * hidden  # normalized values, for the gradient of the norms' weights
    if model.qk_norm and not recurrent:
        values += queries + keys
    if model.gated and not recurrent:
        values += 3 * queries  # the gate, its sigmoid and the attention's output before it
    masks = 0.0
    for names, width in inputs.items():
        if layers := names & adapted:
            copies = len(layers) if trained.dropout > 0 else 1  # with dropout, each layer has its own input
            values += copies * width
            masks += copies * width if trained.dropout > 0 else 0
    if trained.kind != "full":
        values += 2 * trained.rank * len(adapted)
    if trained.kind == "dora":
        values += sum(model.matrix(name)[1] for name in adapted)  # products before scaling by the magnitude
    size = target.value_bytes
    if recurrent and model.delta is not None:
        lengths = [tokens for tokens, _ in row.segments]
        states = model.delta.saved_bytes(lengths, size)
        return {"activations": row.tokens * (values * size + masks), "attention": states}
    attention = row.tokens * (queries + 2.0 * keys) * size + 2.0 * row.joined * keys * size
    if target.fused_attention:
        attention += row.tokens * (queries * size + model.heads * FLOAT)  # its output and log-sum-exp
    else:
        attention += model.heads * row.scores * size + row.scores  # probabilities, and a byte of mask
    return {"activations": row.tokens * (values * size + masks), "attention": attention}


def _ahead(
    counts: dict[str, float], model: ModelShape, trained: AdapterSpec, target: Target, row: Row
) -> dict[str, float]:
    """Bytes that MLX has allocated for kernels that have not run yet."""
    size = target.value_bytes
    parts = {"activations": row.tokens * size * sum(n * model.width(name) for name, n in counts.items())}
    if not target.fused_attention:
        largest = max(tokens * keys for tokens, keys in row.segments)
        parts["attention"] = _AHEAD_SCORES * model.heads * largest * size
    if model.delta is not None:
        ahead = model.delta.ahead_bytes([tokens for tokens, _ in row.segments], size)
        parts["attention"] = max(parts.get("attention", 0.0), ahead)
    if trained.kind == "dora":
        parts["activations"] += _AHEAD_MATRICES * model.hidden * model.intermediate * FLOAT
    return parts


def _backward(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory, gradients: float
) -> list[tuple[str, dict[str, float]]]:
    """Parts of two moments of the backward pass.

    At its beginning, the saved arrays of all blocks are in memory; at its end, all gradients are.
    """
    saved = _saved(model, trained, target, row)
    counts = _AHEAD_RECOMPUTED if settings.checkpoint_layers else _AHEAD_BACKWARD
    current_block = _added(_saved_at_most(model, trained, target, row), _ahead(counts, model, trained, target, row))
    if target.attention_tile:
        current_block["workspace"] = attention_workspace(model, target, row)
    others = backward_blocks(model, trained) - 1
    tables = saved_values(model, trained) * FLOAT
    head = model.vocabulary * model.hidden * FLOAT if trains_head(model, trained) else 0.0
    if settings.checkpoint_layers:
        other_blocks = {"activations": float(others * row.tokens * model.hidden * target.value_bytes)}
    else:
        other_blocks = {name: others * value for name, value in saved.items()}
    block_gradients = (gradients - tables) / max(trained.num_layers, 1) + head
    return [
        ("backward pass, at its beginning", _added(current_block, other_blocks) | {"gradients": block_gradients}),
        ("backward pass, at its end", current_block | {"gradients": gradients}),
    ]


def attention_workspace(model: ModelShape, target: Target, row: Row) -> float:
    """Bytes that the backward pass of fused attention works in: for one segment at a time, so for the largest.

    A tile of queries and keys has scores, their gradients and probabilities, and shares of the gradients of queries,
    keys and values. The whole segment has those gradients once more, in float32, and a number a query and head.
    """
    size, most = target.value_bytes, 0.0
    for tokens, keys in row.segments:
        queries_in_tile, keys_in_tile = min(tokens, target.attention_tile), min(keys, target.attention_tile)
        tile = 3 * model.heads * queries_in_tile * keys_in_tile + (queries_in_tile + 2 * keys_in_tile) * model.queries
        whole = tokens * (model.queries + model.heads) + 2 * keys * model.keys
        most = max(most, float(tile * size + whole * FLOAT))
    return most


def _scoring(model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory) -> dict[str, float]:
    """Parts while logits are computed: everything that the blocks saved, and the head."""
    if settings.checkpoint_layers:
        saved = {
            "activations": float(backward_blocks(model, trained) * row.tokens * model.hidden * target.value_bytes)
        }
    else:
        saved = {name: backward_blocks(model, trained) * n for name, n in _saved(model, trained, target, row).items()}
    return _added(saved, {"head": head_bytes(model, trained, target, row.scored, settings.logit_rows)})


def head_bytes(model: ModelShape, trained: AdapterSpec, target: Target, scored: int, logit_rows: int | None) -> float:
    """Bytes of logits, probabilities and gradients for `scored` positions, in chunks of `logit_rows`."""
    if scored == 0:
        return 0.0
    rows = min(logit_rows or chunk_rows(model.vocabulary), scored)
    chunks = -(-scored // rows)
    logits = rows * model.vocabulary * FLOAT
    each = _HEAD_EACH + (1 if target.value_bytes < FLOAT else 0)  # logits and errors in half precision too
    whole = trained.kind == "full" and trained.num_layers >= model.layers
    table = model.vocabulary * model.hidden
    if not whole and not trains_head(model, trained):
        total = float(each * logits)
    else:
        total = min(each * chunks, _HEAD_MAX_ON_GPU if target.fused_attention else _HEAD_MAX) * logits
    if whole:
        total += min(chunks, _HEAD_GRADIENTS_MAX) * table * FLOAT
    if trains_head(model, trained):  # three gradients, and the weights in half precision
        total += table * (_TABLE_GRADIENTS * FLOAT + (target.value_bytes if target.value_bytes < FLOAT else 0))
    return total + 4.0 * scored * model.hidden * target.value_bytes


def _matrix_bytes(model: ModelShape, trained: AdapterSpec) -> float:
    """Bytes of the largest trained array of a block."""
    sizes = [model.matrix(name) for name in adapted_matrices(model, trained)]
    if trained.kind == "full":
        return max(inputs * outputs for inputs, outputs in sizes) * FLOAT
    return max(max(size) for size in sizes) * trained.rank * FLOAT


def _outer_update(model: ModelShape, trained: AdapterSpec) -> float:
    if trained.saved:
        return 2.0 * model.vocabulary * model.hidden * FLOAT
    trains_embedding = trained.kind == "full" and trained.num_layers >= model.layers
    return 2.0 * model.vocabulary * model.hidden * FLOAT if trains_embedding else 0.0
