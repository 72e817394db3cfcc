"""The sizes that memory and time depend on: the model, the rows, and the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_zh.core.attention import query_pieces
from mlx_zh.core.families import FAMILIES, Config, family_of
from mlx_zh.core.packing import PackedBatch
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.delta_shapes import DELTA_LINEAR, DeltaShape, delta_shape
from mlx_zh.planning.windows import windows_of

# The linear layers of a block, with the names of their input and output widths; see `ModelShape.width`.
LINEAR = {
    "q_proj": ("hidden", "queries"),
    "k_proj": ("hidden", "keys"),
    "v_proj": ("hidden", "keys"),
    "o_proj": ("queries", "hidden"),
    "gate_proj": ("hidden", "intermediate"),
    "up_proj": ("hidden", "intermediate"),
    "down_proj": ("intermediate", "hidden"),
}
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder. `queries` and `keys` are numbers of heads times the head size.

    Where some layers are gated delta nets, a block is the mean of both kinds, and `gated` queries have a gate each.
    `intermediate` is the width that a token sees. With experts, each of the `experts` has `expert_width` of it, and
    a token sees some of them beside `shared`; layers whose MLP is not split are counted as if it were.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False
    attention_bias: bool = False
    norms: int = 2
    experts: int = 0
    silu: bool = True  # the MLP is of gate, up and down with SiLU
    expert_width: int = 0
    shared: int = 0
    gated: bool = False
    delta: DeltaShape | None = None
    windows: tuple[int, ...] = ()  # of each layer, see `windows_of`

    @property
    def linear(self) -> dict[str, tuple[str, str]]:
        """The linear layers of a block by name, as in `LINEAR`."""
        return LINEAR if self.delta is None else LINEAR | DELTA_LINEAR

    def share(self, name: str, last: int | None = None) -> float:
        """The share of the `last` blocks (default: of all) that have the linear layer `name`."""
        if self.delta is None or name in _MLP:
            return 1.0
        last = last or self.layers
        recurrent = self.delta.layers(self.layers, last) / last
        return recurrent if name in DELTA_LINEAR else 1.0 - recurrent

    def width(self, name: str) -> int:
        """The width called `name`: `hidden`, `queries`, `keys`, `intermediate`, or one of a gated delta net."""
        if self.delta is not None and name in ("mixed", "states", "state_heads"):
            own = {"mixed": self.delta.mixed, "states": self.delta.values, "state_heads": self.delta.value_heads}
            return own[name]
        return int(getattr(self, name))

    def matrix(self, name: str) -> tuple[int, int]:
        """Input and output widths of the linear layer `name` of a block; of all its experts side by side."""
        inputs, outputs = self.linear[name]
        factor = 2 if self.gated and name == "q_proj" else 1
        return self._whole(inputs), self._whole(outputs) * factor

    def _whole(self, name: str) -> int:
        if self.experts and name == "intermediate":
            return self.experts * self.expert_width + self.shared
        return self.width(name)

    def sides(self, name: str) -> int:
        """Input and output width of the linear layer `name` together, of all its experts: LoRA's values a rank."""
        if self.experts and "intermediate" in self.linear[name]:
            return self.experts * (self.hidden + self.expert_width)
        return sum(self.matrix(name))

    @property
    def active_values(self) -> float:
        """Parameters of one block that a token meets: without experts, all."""
        idle = self._whole("intermediate") - self.intermediate
        return self.block_values - 3 * self.hidden * idle

    @property
    def swiglu(self) -> bool:
        """Whether the MLP is one SwiGLU, of which `core.feed_forward` keeps less."""
        return self.silu and not self.experts

    @property
    def routed_values(self) -> int:
        """Values a token that the choice of experts saves for the backward pass beside theirs: each one's output."""
        return self.hidden * ((self.intermediate - self.shared) // self.expert_width) if self.experts else 0

    @property
    def block_values(self) -> float:
        """Parameters of one block: matrices, norms and biases."""
        return self.matrix_values + self.vector_values

    @property
    def matrix_values(self) -> float:
        """Parameters of a block's linear layers."""
        sizes = {name: self.matrix(name) for name in self.linear}
        return sum(self.share(name) * inputs * outputs for name, (inputs, outputs) in sizes.items())

    @property
    def vector_values(self) -> float:
        """Parameters of a block outside its linear layers; the router of its experts is one of them."""
        attention = 2 * self.queries // self.heads if self.qk_norm else 0
        attention += self.queries + 2 * self.keys if self.attention_bias else 0
        values = self.norms * self.hidden + self.experts * self.hidden + self.share("q_proj") * attention
        if self.delta is not None:
            values += self.share("out_proj") * self.delta.other_values
        return values

    def cache_bytes(self, tokens: float, value_bytes: int) -> float:
        """Bytes that a text of so many tokens leaves in the caches of all layers."""
        attention = self.share("q_proj") * self.layers
        size = 2.0 * attention * self.keys * tokens * value_bytes
        if self.delta is not None:
            size += (self.layers - attention) * self.delta.state_bytes(value_bytes)
        return size

    @property
    def outer_values(self) -> int:
        """Parameters outside the blocks: embedding, head and final norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden


_BIASES = ("attention_bias", "qkv_bias", "use_bias")  # keys of config.json for biases of queries, keys and values


def model_shape(config: Config) -> ModelShape:
    """The shape of the model with this `config.json`. A damaged one raises a built-in exception."""
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    size = int(config.get("head_dim") or hidden // heads)
    family = family_of(config) or FAMILIES["llama"]
    tied = config.get("tie_word_embeddings")
    experts, expert_width = int(config.get("num_experts") or 0), int(config.get("moe_intermediate_size") or 0)
    used, shared = (
        int(config.get("num_experts_per_tok") or 0),
        int(config.get("shared_expert_intermediate_size") or 0),
    )
    if not (experts and expert_width and used):
        experts = expert_width = shared = 0
    return ModelShape(
        hidden=hidden,
        layers=int(config["num_hidden_layers"]),
        intermediate=used * expert_width + shared if experts else int(config["intermediate_size"]),
        heads=heads,
        queries=heads * size,
        keys=int(config.get("num_key_value_heads") or heads) * size,
        vocabulary=int(config["vocab_size"]),
        tied=bool(tied) if tied is not None else False,
        qk_norm=family.query_key_norms,
        attention_bias=family.attention_bias or any(config.get(key) for key in _BIASES),
        norms=family.norms,
        experts=experts,
        silu=family.swiglu
        and str(config.get("hidden_activation") or config.get("hidden_act") or "silu") in ("silu", "swish"),
        expert_width=expert_width,
        shared=shared,
        gated=family.recurrent,
        delta=delta_shape(config) if family.recurrent else None,
        windows=windows_of(config),
    )


@dataclass(frozen=True, slots=True)
class Packing:
    """Bits and group size of quantized matrices.

    `modules` names the matrices that differ, with their (bits, group), or None for a matrix that is not quantized.
    """

    bits: int
    group: int
    modules: tuple[tuple[str, tuple[int, int] | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """How the model runs: bytes per hidden value, quantization of the weights, and kind of attention.

    Fused attention keeps no score matrix. `attention_tile` is the largest number of queries and of keys in a tile in
    which its backward pass works, 0 if it needs no memory for tiles. `unpacked` is how many bytes of frozen weights
    are there unpacked, for dense products (`core.frozen_products`). `masked` attention is MLX's own, which keeps its
    mask and its scores.
    """

    value_bytes: int
    packing: Packing | None
    fused_attention: bool
    attention_tile: int = 0
    unpacked: float = 0.0
    masked: bool = False

    @property
    def attention_of_products(self) -> bool:
        """Whether attention is that of a CPU in float32 (`core.attention`), which keeps exponentials and no mask."""
        return not self.fused_attention and not self.masked and self.value_bytes == 4


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def planned_targets(model: ModelShape, targets: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names in `ModelShape.linear` of the layers that `lora.targets` names (None: all); None for all of them.

    A fused projection counts as its parts. All layers of a block with experts are those outside its MLP.
    """
    if targets is None:
        return tuple(name for name in model.linear if name not in _MLP) if model.experts else None
    named = [part for name in targets for part in _FUSED.get(name, (name,))]
    return tuple(name for name in model.linear if name in named)


def adapted_matrices(model: ModelShape, trained: AdapterSpec) -> frozenset[str]:
    """The names in `ModelShape.linear` of the matrices that are trained or have an adapter."""
    return frozenset(model.linear if trained.kind == "full" or trained.targets is None else trained.targets)


@dataclass(frozen=True, slots=True)
class Row:
    """The sizes of a packed row.

    `segments` has, for each segment, its tokens and the number of keys that it attends to (its own and those of its
    ancestors). `scored` is the number of scored tokens. With `cut`, attention cuts the segments in pieces, and a
    piece has scores only for the keys up to its last query (`core.attention.query_pieces`).
    """

    segments: tuple[tuple[int, int], ...]
    scored: int
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return sum(tokens for tokens, _ in self.segments)

    @property
    def scores(self) -> int:
        """Entries of the score matrices of one head."""
        return sum(self._matrices())

    @property
    def largest_scores(self) -> int:
        """Entries of the largest score matrix of one head."""
        return max(self._matrices())

    def _matrices(self) -> Iterator[int]:
        for tokens, keys in self.segments:
            start = 0
            for end in query_pieces(tokens) if self.cut else [tokens]:
                yield (end - start) * (keys - tokens + end)
                start = end

    @property
    def joined(self) -> int:
        """Keys that are copied, because a branch's keys are concatenated with those of its parent."""
        return sum(keys for tokens, keys in self.segments if keys > tokens)


def conversations(lengths: Sequence[int], scored: int | None = None) -> Row:
    """A row of conversations. By default, all tokens but the first of each are scored."""
    return Row(tuple((n, n) for n in lengths), sum(lengths) - len(lengths) if scored is None else scored)


def pairs(sizes: Sequence[tuple[int, int, int]]) -> Row:
    """A row of pairs, from tokens of (prompt, chosen, rejected). A prompt includes the responses' common prefix."""
    segments: list[tuple[int, int]] = []
    for prompt, chosen, rejected in sizes:
        segments += [(prompt, prompt), (chosen, prompt + chosen), (rejected, prompt + rejected)]
    return Row(tuple(segments), sum(chosen + rejected for _, chosen, rejected in sizes))


def row_of(batch: PackedBatch) -> Row:
    """The sizes of a row that is there."""
    segments = tuple((len(segment), segment.position + len(segment)) for segment in batch.segments)
    return Row(segments, int(batch.targets.size))
