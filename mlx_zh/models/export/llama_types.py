"""The types of GGUF that only llama.cpp itself can write."""

from __future__ import annotations

from typing import NamedTuple


class LlamaType(NamedTuple):
    """A mixture of tensor types."""

    number: int  # of llama.cpp's llama_ftype
    bits: int  # of most weights
    most_bits: float  # of a weight at most, on average over the file; an upper estimate


# Where a row is no multiple of 256, llama.cpp takes a type with blocks of 32 and more bits.
LLAMA_TYPES = {
    "q4_k_m": LlamaType(15, 4, 6.6),
    "q5_k_m": LlamaType(17, 5, 7.6),
    "q6_k": LlamaType(18, 6, 8.5),
    "iq4_nl": LlamaType(25, 4, 5.6),
    "iq4_xs": LlamaType(30, 4, 5.6),
}
