"""How much memory a training step takes, part by part, from shapes alone; docs/memory.md derives the terms.

What the backward pass needs is counted: every array that an operation of the forward pass leaves for it. What MLX
allocates ahead of computing is measured (`_AHEAD_*`): its scheduler runs some forty kernels ahead of the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.shapes import LINEAR, ModelShape, Packing, Row, Target, adapted_matrices
from mlx_zh.recipe import Memory

FLOAT = 4

# Arrays (T, F), (T, D) and (T, A) that are allocated ahead of what is computed, in the backward pass of a block, and
# where that block is computed again before.
_AHEAD_BACKWARD = {"intermediate": 3.5, "hidden": 10.0, "queries": 4.0}
_AHEAD_RECOMPUTED = {"intermediate": 9.0, "hidden": 10.0, "queries": 4.0}
_AHEAD_SCORES = 2  # score matrices of one layer
_AHEAD_MATRICES = 4  # DoRA's adapted weights
_AHEAD_UPDATES = 6  # arrays of an optimizer step in the size of a block's matrix

# Chunks of logits: arrays (C, V) float32 for one chunk, and the most that are alive at a time.
_HEAD_EACH, _HEAD_MOST = 3, 4.5
_HEAD_MOST_ON_GPU = 12  # a GPU's chunks are not spaced (`device.kernels_ahead`)
_HEAD_GRADIENTS_MOST = 9  # (V, D) gradients of a trained head, one a chunk, before they are added up


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part at the moment of the peak; `phase` says which moment that is."""

    phase: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """What MLX would report as its peak."""
        return sum(self.parts.values())

    @property
    def over_weights(self) -> float:
        """The peak without the base model."""
        return self.peak - self.parts["weights"]


def step_memory(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory, *, rows: int = 2
) -> Estimate:
    """The peak of a training step whose largest of `rows` rows is `row`."""
    values = trained_values(model, trained)
    gradients = values * FLOAT
    still = {
        "weights": weight_bytes(model, target, trained),
        "adapters (float32)": 0.0 if trained.kind == "full" else gradients,
        "optimizer": 2.0 * gradients,
        "gradients": gradients if rows > 1 else 0.0,  # the sum of the rows before
    }
    phases = [
        Estimate(name, _added(still, parts))
        for name, parts in (
            ("scoring", _scoring(model, trained, target, row, settings)),
            *_backward(model, trained, target, row, settings, gradients),
        )
    ]
    update = {
        "gradients": gradients - still["gradients"],
        "optimizer": gradients + _AHEAD_UPDATES * _matrix_bytes(model, trained) + _outer_update(model, trained),
    }
    phases.append(Estimate("updating the weights", _added(still, update)))
    return max(phases, key=lambda estimate: estimate.peak)


def _added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {
        name: left.get(name, 0.0) + right.get(name, 0.0) for name in [*left, *(n for n in right if n not in left)]
    }


def weight_bytes(model: ModelShape, target: Target, trained: AdapterSpec | None = None) -> float:
    """The base model's arrays. Blocks that are trained whole are float32."""
    matrices = {f"self_attn.{n}" if n[0] in "qkvo" else f"mlp.{n}": model.matrix(n) for n in LINEAR}
    block = sum(
        _matrix_weight(size, _packing_of(target.packing, name), target.value_bytes) for name, size in matrices.items()
    )
    vectors = model.block_values - sum(inputs * outputs for inputs, outputs in matrices.values())
    block += vectors * target.value_bytes
    table = (model.hidden, model.vocabulary)
    outer = _matrix_weight(table, _packing_of(target.packing, "embed_tokens"), target.value_bytes)
    if not model.tied:
        outer += _matrix_weight(table, _packing_of(target.packing, "lm_head"), target.value_bytes)
    outer += model.hidden * target.value_bytes
    whole = 0
    if trained is not None and trained.kind == "full":
        whole = trained.num_layers
        if whole >= model.layers:
            outer = model.outer_values * FLOAT
    return (model.layers - whole) * block + whole * model.block_values * FLOAT + outer


def _packing_of(packing: Packing | None, name: str) -> tuple[int, int] | None:
    if packing is None:
        return None
    for module, form in packing.modules:
        if module.endswith(name):
            return form
    return packing.bits, packing.group


def _matrix_weight(size: tuple[int, int], packing: tuple[int, int] | None, value_bytes: int) -> float:
    inputs, outputs = size
    if packing is None or inputs % packing[1]:
        return inputs * outputs * value_bytes
    bits, group = packing
    return outputs * (inputs * bits / 8 + 2 * value_bytes * inputs / group)  # with a scale and a bias for each group


def trained_values(model: ModelShape, trained: AdapterSpec) -> float:
    """How many numbers are trained."""
    if trained.kind == "full":
        outer = model.outer_values if trained.num_layers >= model.layers else 0
        return trained.num_layers * model.block_values + outer
    sizes = [model.matrix(name) for name in adapted_matrices(trained)]
    values = sum(trained.rank * (inputs + outputs) for inputs, outputs in sizes)
    values += sum(outputs for _, outputs in sizes) if trained.kind == "dora" else 0
    return trained.num_layers * values


def _kept(model: ModelShape, trained: AdapterSpec, target: Target, row: Row) -> dict[str, float]:
    """Bytes that one trained block leaves for its backward pass."""
    hidden, queries, keys, inner = model.hidden, model.queries, model.keys, model.intermediate
    adapted = adapted_matrices(trained)
    inputs = {
        frozenset({"q_proj", "k_proj", "v_proj"}): hidden,
        frozenset({"o_proj"}): queries,
        frozenset({"gate_proj", "up_proj"}): hidden,
        frozenset({"down_proj"}): inner,
    }
    values = 2.0 * hidden  # both norms' inputs
    values += 4 * inner  # gate and up; sigmoid and SiLU, which MLX computes as soon as it can
    if trained.kind == "full":
        values += 2 * hidden  # normalized, for the gradient of the norms' weights
    if model.qk_norm:
        values += queries + keys
    masks = 0.0
    for names, width in inputs.items():
        if found := names & adapted:
            copies = len(found) if trained.dropout > 0 else 1  # every layer drops other values
            values += copies * width
            masks += copies * width if trained.dropout > 0 else 0
    if trained.kind != "full":
        values += 2 * trained.rank * len(adapted)
    if trained.kind == "dora":
        values += sum(model.matrix(name)[1] for name in adapted)  # products before their magnitude
    size = target.value_bytes
    attention = row.tokens * (queries + 2.0 * keys) * size + 2.0 * row.joined * keys * size
    if target.fused_attention:
        attention += row.tokens * (queries * size + model.heads * FLOAT)  # its output and log-sum-exp
    else:
        attention += model.heads * row.scores * size + row.scores  # probabilities, and a byte of mask
    return {"activations": row.tokens * (values * size + masks), "attention": attention}


def _ahead(
    counts: dict[str, float], model: ModelShape, trained: AdapterSpec, target: Target, row: Row
) -> dict[str, float]:
    """Bytes that MLX has allocated for kernels that are still to run."""
    size = target.value_bytes
    parts = {"activations": row.tokens * size * sum(n * model.width(name) for name, n in counts.items())}
    if not target.fused_attention:
        largest = max(tokens * keys for tokens, keys in row.segments)
        parts["attention"] = _AHEAD_SCORES * model.heads * largest * size
    if trained.kind == "dora":
        parts["activations"] += _AHEAD_MATRICES * model.hidden * model.intermediate * FLOAT
    return parts


def _backward(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory, gradients: float
) -> list[tuple[str, dict[str, float]]]:
    """At its beginning all that was kept is there, at its end all gradients."""
    kept = _kept(model, trained, target, row)
    counts = _AHEAD_RECOMPUTED if settings.checkpoint_layers else _AHEAD_BACKWARD
    one = _added(kept, _ahead(counts, model, trained, target, row))
    others = trained.num_layers - 1
    if settings.checkpoint_layers:
        more = {"activations": float(others * row.tokens * model.hidden * target.value_bytes)}
    else:
        more = {name: others * value for name, value in kept.items()}
    each = gradients / max(trained.num_layers, 1)
    return [
        ("backward pass, at its beginning", _added(one, more) | {"gradients": each}),
        ("backward pass, at its end", one | {"gradients": gradients}),
    ]


def _scoring(model: ModelShape, trained: AdapterSpec, target: Target, row: Row, settings: Memory) -> dict[str, float]:
    """While logits are computed, everything that the blocks left is there."""
    if settings.checkpoint_layers:
        kept = {"activations": float(trained.num_layers * row.tokens * model.hidden * target.value_bytes)}
    else:
        kept = {name: trained.num_layers * n for name, n in _kept(model, trained, target, row).items()}
    return _added(kept, {"head": head_bytes(model, trained, target, row.scored, settings.logit_rows)})


def head_bytes(model: ModelShape, trained: AdapterSpec, target: Target, scored: int, logit_rows: int | None) -> float:
    """Logits and what becomes of them, for `scored` positions, with their hidden states and gradients."""
    if scored == 0:
        return 0.0
    rows = min(logit_rows or chunk_rows(model.vocabulary), scored)
    chunks = -(-scored // rows)
    logits = rows * model.vocabulary * FLOAT
    each = _HEAD_EACH + (1 if target.value_bytes < FLOAT else 0)  # logits and errors in half precision too
    total = min(each * chunks, _HEAD_MOST_ON_GPU if target.fused_attention else _HEAD_MOST) * logits
    if trained.kind == "full" and trained.num_layers >= model.layers:
        total += min(chunks, _HEAD_GRADIENTS_MOST) * model.vocabulary * model.hidden * FLOAT
    return total + 4.0 * scored * model.hidden * target.value_bytes


def _matrix_bytes(model: ModelShape, trained: AdapterSpec) -> float:
    """The largest trained array of a block."""
    sizes = [model.matrix(name) for name in adapted_matrices(trained)]
    if trained.kind == "full":
        return max(inputs * outputs for inputs, outputs in sizes) * FLOAT
    return max(max(size) for size in sizes) * trained.rank * FLOAT


def _outer_update(model: ModelShape, trained: AdapterSpec) -> float:
    whole = trained.kind == "full" and trained.num_layers >= model.layers
    return 2.0 * model.vocabulary * model.hidden * FLOAT if whole else 0.0
