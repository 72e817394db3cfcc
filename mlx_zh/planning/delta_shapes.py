"""The sizes of a gated delta net, the recurrent layer of Qwen3.5, and the memory of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_zh.core.gated_delta import chunk_for

# Its linear layers, with the names of their input and output widths; see `ModelShape.width`.
DELTA_LINEAR = {
    "in_proj_qkv": ("hidden", "mixed"),
    "in_proj_z": ("hidden", "states"),
    "in_proj_b": ("hidden", "state_heads"),
    "in_proj_a": ("hidden", "state_heads"),
    "out_proj": ("states", "hidden"),
}

# Arrays that a layer keeps for its backward pass, measured on a CPU: of the convolution's width, of the values' width
# a token; and float32 ones of the padded chunks: of the values' width, of the keys', of a chunk's own length.
_MIXED, _VALUES, _CHUNK_VALUES, _CHUNK_KEYS, _CHUNK_SCORES = 3.0, 7.0, 3.0, 10.0, 2.0
_AHEAD = 0.75  # what MLX allocates ahead in the backward pass, as a share of what the layer keeps
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """The gated delta nets of a model; every `interval`-th layer has attention instead."""

    interval: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def values(self) -> int:
        """Width of the values: heads times their size."""
        return self.value_heads * self.value_size

    @property
    def mixed(self) -> int:
        """Width of what is convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key_size + self.values

    @property
    def other_values(self) -> int:
        """Parameters of a layer that are in no linear layer: convolution, decays, the norm of a head."""
        return self.mixed * self.kernel + 2 * self.value_heads + self.value_size

    def layers(self, layers: int, last: int) -> int:
        """The number of these among the `last` layers of a model with `layers`."""
        return sum((index + 1) % self.interval != 0 for index in range(layers - last, layers))

    def state_bytes(self, value_bytes: int) -> int:
        """Bytes of the state that a layer keeps of any text: a matrix a head, and the convolution's last inputs."""
        return self.values * self.key_size * _FLOAT + (self.kernel - 1) * self.mixed * value_bytes

    def saved_bytes(self, lengths: Sequence[int], value_bytes: int) -> float:
        """Bytes that a layer keeps for its backward pass over segments of these lengths, without its projections."""
        chunk = chunk_for(lengths)
        padded = sum(-(-length // chunk) for length in lengths) * chunk
        wide = sum(lengths) * (_MIXED * self.mixed + _VALUES * self.values) * value_bytes
        keys = _CHUNK_KEYS * self.key_size + _CHUNK_SCORES * chunk
        return wide + padded * (_CHUNK_VALUES * self.values + self.value_heads * keys) * _FLOAT

    def ahead_bytes(self, lengths: Sequence[int], value_bytes: int) -> float:
        """Bytes that MLX has allocated for kernels of a layer that have not run yet."""
        return _AHEAD * self.saved_bytes(lengths, value_bytes)


def delta_shape(config: dict[str, Any]) -> DeltaShape:
    """The shape of the gated delta nets of Qwen3.5's `config.json`."""
    return DeltaShape(
        interval=int(config.get("full_attention_interval", 4)),
        key_heads=int(config["linear_num_key_heads"]),
        value_heads=int(config["linear_num_value_heads"]),
        key_size=int(config["linear_key_head_dim"]),
        value_size=int(config["linear_value_head_dim"]),
        kernel=int(config.get("linear_conv_kernel_dim", 4)),
    )
