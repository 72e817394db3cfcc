"""The memory of a training step by part, computed from sizes alone; docs/memory.md derives the terms.

The arrays that the forward pass saves for the backward pass are counted. The arrays that MLX allocates ahead of
computing them are measured (`_AHEAD_*`): its scheduler runs about forty kernels ahead of the device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlx_zh.core.logprobs import chunk_rows
from mlx_zh.core.recompute import Levels
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.delta_shapes import DELTA_LINEAR
from mlx_zh.planning.pieces import in_block
from mlx_zh.planning.shapes import ModelShape, Packing, Row, Target, adapted_matrices

FLOAT = 4

# Numbers of arrays (T, F), (T, D) and (T, A) that are allocated ahead in the backward pass of a block, by its level:
# where it keeps all, where it makes its cheap parts again, and where the whole block is computed again first.
_AHEAD_BACKWARD = (
    {"intermediate": 3.5, "hidden": 10.0, "queries": 4.0},
    {"intermediate": 9.0, "hidden": 10.0, "queries": 4.0},
    {"intermediate": 12.0, "hidden": 13.0, "queries": 4.0},
)
_AHEAD_SIGMOID = (0.0, 4.0, 2.5)  # more arrays (T, F) by level on a CPU, for SwiGLU's sigmoid (`core.exponentials`)
_AHEAD_SCORES = (2, 2, 0)  # score matrices of one layer by level, of a CPU's attention (`core.attention`)
_AHEAD_SCORES_OF_MLX = 2  # of MLX's own
_AHEAD_MASKS = (3, 2, 1)  # masks of MLX's own by level, a byte a score, for all heads at once
_AHEAD_MATRICES = 4  # DoRA's adapted weights
_AHEAD_UPDATES = 6  # arrays of an optimizer step, of the size of a block's largest trained array

# Arrays (C, V) float32 of a chunk of logits. Chunks of a trained head are allocated ahead of each other, up to the
# second number on the CPU, and up to the third on a GPU (`device.kernels_ahead` is 0).
_HEAD_EACH, _HEAD_MAX, _HEAD_MAX_ON_GPU = 3, 4, 12
_HEAD_IN_PIECES = 1  # more of them on a CPU, where the exponentials are made in pieces and joined
_TABLE_GRADIENTS = 3  # (V, D) gradients of a head beside an adapter: so far, of a chunk, their sum
_TABLE_UPDATES = 6.0  # arrays of an update (V, D) of a table on a CPU; on a GPU one kernel makes it
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
    model: ModelShape,
    trained: AdapterSpec,
    target: Target,
    row: Row,
    levels: Levels,
    *,
    logit_rows: int | None = None,
    rows: int = 2,
) -> Estimate:
    """The peak memory of a step of `rows` rows, of which `row` is the largest, with its blocks at `levels`."""
    values = trained_values(model, trained)
    gradients = values * FLOAT
    always = dict(
        weights=weight_bytes(model, target, trained),
        adapters=0.0 if trained.kind == "full" else gradients,
        optimizer=2.0 * gradients,
        gradients=gradients if rows > 1 else 0.0,  # the sum over the earlier rows
        unpacked=target.unpacked,
    )
    blocks = _Blocks(model, trained, target, row, levels)
    head = {"head": head_bytes(model, trained, target, row.scored, logit_rows)}
    moments = [("scoring", _added(blocks.kept(blocks.count), head)), *_backward(blocks, gradients)]
    phases = [Estimate(name, _added(always, parts)) for name, parts in moments]
    update = {
        "gradients": gradients - always["gradients"],
        "optimizer": gradients
        + _AHEAD_UPDATES * _matrix_bytes(model, trained)
        + _outer_update(model, trained, target),
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


_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


def kept_bytes(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, level: int, *, last: bool = False
) -> dict[str, float]:
    """Bytes that one trained block keeps for its backward pass at `level`, see `core.recompute`.

    Where there are two kinds of blocks, it is their mean. The `last` block of a model computes its output for the
    scored tokens alone.
    """
    outputs = _outputs(model, row) if last else row.tokens
    attention = _kept_by(model, trained, target, row, level, outputs, recurrent=False)
    if model.delta is None or level == 2:
        return attention
    recurrent = _kept_by(model, trained, target, row, level, outputs, recurrent=True)
    share = model.share("out_proj", trained.num_layers)
    return {name: share * size + (1 - share) * attention[name] for name, size in recurrent.items()}


def _outputs(model: ModelShape, row: Row) -> int:
    """The number of tokens whose output the last block computes (`only_scored` of `core.logprobs.hidden_states`)."""
    return row.tokens if model.experts else min(row.scored, row.tokens)


def _kept_at_most(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, level: int, outputs: int
) -> dict[str, float]:
    """The same of the kind of block that keeps more, if it computes `outputs` tokens' output."""
    kinds = [False] if model.delta is None else [False, True]
    kept = [_kept_by(model, trained, target, row, level, outputs, recurrent=kind) for kind in kinds]
    return max(kept, key=lambda parts: sum(parts.values()))


def _kept_by(
    model: ModelShape, trained: AdapterSpec, target: Target, row: Row, level: int, outputs: int, *, recurrent: bool
) -> dict[str, float]:
    if level == 2:
        return {"activations": float(row.tokens * model.hidden * target.value_bytes)}
    hidden, queries, keys, inner = model.hidden, model.queries, model.keys, model.intermediate
    absent = DELTA_LINEAR.keys() if not recurrent else {"q_proj", "k_proj", "v_proj", "o_proj"}
    adapted = adapted_matrices(model, trained) - absent
    before = {  # inputs of the layers up to attention, and of those after it
        frozenset({"q_proj", "k_proj", "v_proj"}): hidden,
        frozenset({"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}): hidden,
        frozenset({"out_proj"}): 0 if model.delta is None else model.delta.values,
    }
    after = {
        frozenset({"o_proj"}): queries,
        frozenset({"gate_proj", "up_proj"}): hidden,
        frozenset({"down_proj"}): inner,
    }
    size, tokens = target.value_bytes, row.tokens
    values = {tokens: 0.0} | {outputs: 0.0}  # bytes by the number of tokens that have them
    values[tokens] += hidden * size  # inputs of both norms
    values[outputs] += hidden * size
    values[outputs] += (model.routed_values + 2 * inner) * size  # gate and up
    if model.qk_norm and not recurrent:
        values[tokens] += (queries + keys) * size
    if model.gated and not recurrent:
        values[tokens] += 3 * queries * size  # the gate, its sigmoid and the attention's output before it
    whole_mlp = level == 0 or not model.swiglu  # any other MLP is left as it is
    if whole_mlp:
        # The sigmoid, and SiLU, which MLX computes early; on a CPU SwiGLU's own gradient makes SiLU again.
        values[outputs] += (1 if model.swiglu and not target.fused_attention else 2) * inner * size
    if level == 0 and trained.kind == "full":
        values[tokens] += hidden * size  # normalized values, for the gradient of the norms' weights
        values[outputs] += hidden * size
    for count, inputs in ((tokens, before), (outputs, after)):
        for names, width in inputs.items():
            layers = names & adapted
            if layers and (whole_mlp if names & _MLP else level == 0):
                copies = len(layers) if trained.dropout > 0 else 1  # with dropout, each layer has its own input
                values[count] += copies * width * (size + (1 if trained.dropout > 0 else 0))  # and a mask
        own = adapted & frozenset().union(*inputs)
        if level == 0 and trained.kind != "full":
            values[count] += 2 * trained.rank * len(own) * size
        if trained.kind == "dora":  # products before scaling by the magnitude
            values[count] += sum(model.matrix(name)[1] for name in own) * size
    activations = sum(count * each for count, each in values.items())
    if recurrent and model.delta is not None:
        lengths = [length for length, _ in row.segments]
        return {"activations": activations, "attention": model.delta.saved_bytes(lengths, size)}
    attention = tokens * (queries + 2.0 * keys) * size + 2.0 * row.joined * keys * size
    if target.fused_attention:
        attention += tokens * (queries * size + model.heads * FLOAT)  # its output and log-sum-exp
    elif target.attention_of_products:
        attention += model.heads * (row.scores + tokens) * size + tokens * queries * size  # weights, sums and output
    else:
        attention += model.heads * row.scores * size + row.scores  # probabilities, and a byte of mask
        if level == 1 and "o_proj" in adapted:
            attention += tokens * queries * size  # its output, from which the input of o_proj is made again
    return {"activations": activations, "attention": attention}


def _ahead(
    level: int, model: ModelShape, trained: AdapterSpec, target: Target, row: Row, outputs: int
) -> dict[str, float]:
    """Bytes that MLX has allocated for kernels that have not run yet, in a block that computes `outputs` tokens."""
    size, counts = target.value_bytes, _AHEAD_BACKWARD[level]
    rows = {name: outputs if name == "intermediate" else row.tokens for name in counts}
    parts = {"activations": size * sum(n * rows[name] * model.width(name) for name, n in counts.items())}
    if not target.fused_attention:
        if model.swiglu:
            parts["activations"] += _AHEAD_SIGMOID[level] * outputs * model.intermediate * size
        if target.attention_of_products:
            parts["attention"] = _AHEAD_SCORES[level] * model.heads * size * row.largest_scores
        else:
            each = _AHEAD_SCORES_OF_MLX * model.heads * size + _AHEAD_MASKS[level]
            parts["attention"] = each * row.largest_scores
    if model.delta is not None:
        ahead = model.delta.ahead_bytes([tokens for tokens, _ in row.segments], size)
        parts["attention"] = max(parts.get("attention", 0.0), ahead)
    if trained.kind == "dora":
        parts["activations"] += _AHEAD_MATRICES * model.hidden * model.intermediate * FLOAT
    return parts


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of a model that a gradient goes through, with the row that they compute."""

    model: ModelShape
    trained: AdapterSpec
    target: Target
    row: Row
    levels: Levels

    @property
    def count(self) -> int:
        return backward_blocks(self.model, self.trained)

    def one(self, level: int, window: int, *, last: bool = False) -> dict[str, float]:
        """What one block with a `window` (0: none) keeps."""
        row, target = in_block(self.row, self.target, window)
        return kept_bytes(self.model, self.trained, target, row, level, last=last)

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each block, from the lowest that a gradient goes through; 0 for none."""
        return self.model.windows[self.model.layers - self.count :] or (0,) * self.count

    def kept(self, count: int) -> dict[str, float]:
        """What the lowest `count` blocks keep."""
        if count and count == self.count:
            return _added(self.kept(count - 1), self.one(self.levels.of(count - 1), self.windows[-1], last=True))
        whole = min(self.levels.blocks, count)
        pieces = min(max(self.levels.pieces, whole), count)
        parts: dict[str, float] = {}
        for level, start, end in ((2, 0, whole), (1, whole, pieces), (0, pieces, count)):
            for window, blocks in Counter(self.windows[start:end]).items():
                parts = _added(parts, {name: blocks * size for name, size in self.one(level, window).items()})
        return parts

    def worked_on(self, index: int) -> dict[str, float]:
        """What is there while the backward pass is in block `index`, gradients aside."""
        level = self.levels.of(index)
        row, target = in_block(self.row, self.target, self.windows[index])
        outputs = _outputs(self.model, row) if index == self.count - 1 else row.tokens
        one = _kept_at_most(self.model, self.trained, target, row, min(level, 1), outputs)
        parts = _added(one, _ahead(level, self.model, self.trained, target, row, outputs))
        if target.attention_tile:
            parts["workspace"] = attention_workspace(self.model, target, row)
        return _added(parts, self.kept(index))

    @property
    def highest(self) -> list[int]:
        """The last block and, of those below, whose output is of all tokens, the highest of each level and window."""
        below = self.count - 1
        ends = sorted({below, min(self.levels.pieces, below), min(self.levels.blocks, below)} - {0})
        highest = {below}
        for start, end in zip([0, *ends], ends, strict=False):
            windows = self.windows[start:end]
            highest |= {end - 1 - windows[::-1].index(window) for window in set(windows)}
        return sorted(highest, reverse=True)


_BEGINNING = "backward pass, at its beginning"
_LOWER = "backward pass, where it comes to layers that are computed again"


def _backward(blocks: _Blocks, gradients: float) -> list[tuple[str, dict[str, float]]]:
    """Parts of some moments of the backward pass: at its beginning, at each lower level's highest block, at its end.

    At its beginning, the kept arrays of all blocks are in memory; at its end, all gradients are.
    """
    model, trained = blocks.model, blocks.trained
    tables = saved_values(model, trained) * FLOAT
    head = model.vocabulary * model.hidden * FLOAT if trains_head(model, trained) else 0.0
    each = (gradients - tables) / max(trained.num_layers, 1)
    moments = []
    for index in blocks.highest:
        done = min(blocks.count - index, trained.num_layers)
        where = _BEGINNING if blocks.levels.of(index) == blocks.levels.of(blocks.count - 1) else _LOWER
        moments.append((where, blocks.worked_on(index) | {"gradients": done * each + head}))
    moments.append(("backward pass, at its end", blocks.worked_on(0) | {"gradients": gradients}))
    return moments


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
    if not trains_head(model, trained) and not target.fused_attention:
        each += _HEAD_IN_PIECES
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


def _outer_update(model: ModelShape, trained: AdapterSpec, target: Target) -> float:
    if trained.saved:
        return (2.0 if target.fused_attention else _TABLE_UPDATES) * model.vocabulary * model.hidden * FLOAT
    trains_embedding = trained.kind == "full" and trained.num_layers >= model.layers
    return 2.0 * model.vocabulary * model.hidden * FLOAT if trains_embedding else 0.0
