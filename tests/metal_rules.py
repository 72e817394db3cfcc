"""What MLX's Metal back end refuses, as a table. The CPU's back end computes all of this without a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# An Apple M1 with 16 GB and macOS 13, the smallest Mac that the recipes are for: `mx.device_info()` as published.
MAC: dict[str, str | int] = {
    "device_name": "Apple M1",
    "architecture": "applegpu_g13g",
    "memory_size": 17179869184,
    "max_recommended_working_set_size": 11453251584,
    "max_buffer_length": 8589934592,
    "resource_limit": 499000,
}
VERSION = (0, 32, 4)  # of MLX

# Attention changed after the newest stored source of MLX. These rules were read in mlx-metal 0.32.4's libmlx.dylib
# (ScaledDotProductAttention::use_fallback and ::eval_gpu, ScaledDotProductAttentionVJP::use_fallback and ::eval_gpu).
LIBRARY = "mlx-metal 0.32.4, libmlx.dylib"
METALLIB = "mlx-metal 0.32.4, mlx.metallib"  # the names of its kernels
COMMIT = "ml-explore/mlx 846d176"
FLOATS = ("float32", "float16", "bfloat16")
VECTOR_QUERIES = 8  # up to so many queries, attention takes a vector kernel

# Head sizes of queries and of values for which attention has a kernel. 512 is left out: it has rules of its own, and
# no model that can be trained here has such heads.
VECTOR_HEADS = {(size, size) for size in (64, 96, 128, 192, 256)} | {(96, 64), (192, 128)}
FULL_HEADS = {(size, size) for size in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}

# Names of quantized kernels: group sizes and bits.
QUANTIZED = {
    "affine": ((32, 64, 128), (1, 2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
INDEX_ARRAYS = 20  # METAL_MAX_INDEX_ARRAYS
ARGUMENTS = 31  # buffers that a kernel can take
STRIDES = 5  # of them, a compiled kernel takes up to 5 for strides, shape, size and rank


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function that Metal limits, or one array, or one evaluation.

    `shapes` and `dtypes` are those of the arrays in it. `gradient` says whether a gradient is traced.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    gradient: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]


@dataclass(frozen=True, slots=True)
class Rule:
    """What Metal demands of one kind of call. `refusal` returns its message, or None if it takes the call."""

    kind: str
    demand: str
    source: str
    error: type[Exception]  # as MLX's Python bindings raise it
    refusal: Callable[[Call], str | None]


def fused_kernel(call: Call) -> bool:
    """Whether Metal has a fused kernel for the shapes and the mask of this call of attention."""
    queries, keys, values = call.shapes
    heads = (queries[-1], values[-1])
    if queries[2] > VECTOR_QUERIES:
        return heads in FULL_HEADS and not (call["mask"] == "causal" and queries[2] > keys[2])
    per_key_head = queries[1] // keys[1]
    return heads in VECTOR_HEADS and queries[2] <= keys[2] and queries[2] * per_key_head <= 32


def fused_backward(call: Call) -> bool:
    """Whether attention takes the fused way that has a backward pass, and so needs a log-sum-exp."""
    array_mask = call["mask"] not in ("none", "causal")
    return call.gradient and call.dtypes[0] in FLOATS and not array_mask and fused_kernel(call)


def _few_queries(call: Call) -> str | None:
    if not fused_backward(call) or call.shapes[0][2] > VECTOR_QUERIES:
        return None
    return (
        "[scaled_dot_product_attention] the vector kernels do not produce a logsumexp; "
        "the VJP path requires the full-attention kernel."
    )


def _sinks(call: Call) -> str | None:
    return "[ScaledDotProductAttentionVJP] NYI: attention sinks" if fused_backward(call) and call["sinks"] else None


def _quantized(call: Call) -> str | None:
    groups, bits = QUANTIZED.get(call["mode"], ((), ()))
    if call["group_size"] in groups and call["bits"] in bits and call.dtypes[0] in FLOATS:
        return None
    name = f"{call['mode']}_qmm_{'t' if call['transpose'] else 'n'}_{call.dtypes[0]}"
    return f"[metal::Device] Unable to load kernel {name}_gs_{call['group_size']}_b_{call['bits']}"


def _rope(call: Call) -> str | None:
    return None if call.dtypes[0] in FLOATS else f"[metal::Device] Unable to load kernel rope_{call.dtypes[0]}"


def _double(call: Call) -> str | None:
    return "float64 is not supported on the GPU" if "float64" in call.dtypes else None


def _buffer(call: Call) -> str | None:
    if call["nbytes"] <= MAC["max_buffer_length"]:
        return None
    return (
        f"[metal::malloc] Attempting to allocate {call['nbytes']} bytes which is greater than the maximum allowed "
        f"buffer size of {MAC['max_buffer_length']} bytes."
    )


def _linear_algebra(call: Call) -> str | None:
    if call["stream"] == "cpu":
        return None
    name = f"[linalg::{call['name']}]"
    return f"{name} This op is not yet supported on the GPU. Explicitly pass a CPU stream to run it."


def _scatter(call: Call) -> str | None:
    wide = [dtype for dtype in call.dtypes[:1] if dtype in ("int64", "uint64", "complex64")]
    return f"[ScatterAxis::eval_gpu] Does not support {wide[0]}" if wide else None


def _index_arrays(call: Call) -> str | None:
    if call["index_arrays"] <= INDEX_ARRAYS:
        return None
    return f"[Gather::eval_gpu] Gathering with more than {INDEX_ARRAYS} index arrays not yet supported."


def _arguments(call: Call) -> str | None:
    if call["compiled_arguments"] + STRIDES <= ARGUMENTS:
        return None
    return "[compile] Too many inputs/outputs fused in the Metal Compiled primitive"


def _resources(call: Call) -> str | None:
    limit = MAC["resource_limit"]
    return f"[metal::malloc] Resource limit ({limit}) exceeded." if call["alive"] > limit else None


# Split and concatenate are not here, because Metal takes any number of arrays: parts of a split are views, and
# `concatenate_gpu` (metal/slicing.cpp) copies one array after another. They are recorded all the same.
RULES = (
    Rule(
        "attention",
        "with a gradient and up to 8 queries, the mask is an array",
        f"{LIBRARY}: eval_gpu of ScaledDotProductAttention",
        RuntimeError,
        _few_queries,
    ),
    Rule(
        "attention",
        "with a gradient, no attention sinks",
        f"{LIBRARY}: eval_gpu of ScaledDotProductAttentionVJP",
        RuntimeError,
        _sinks,
    ),
    Rule(
        "quantized_matmul",
        "group size, bits and type have a kernel, with and without transpose",
        f"{METALLIB}; {COMMIT}: metal/kernels/quantized.metal",
        RuntimeError,
        _quantized,
    ),
    Rule(
        "rope",
        "the type has a kernel; offsets of any integer type are read as int32, one for a batch item",
        f"{METALLIB}; {COMMIT}: metal/rope.cpp, fast.cpp",
        RuntimeError,
        _rope,
    ),
    Rule("array", "no float64", f"{COMMIT}: array.cpp", ValueError, _double),
    Rule(
        "array",
        "an array is no larger than a buffer",
        f"{COMMIT}: metal/allocator.cpp, MetalAllocator::malloc",
        RuntimeError,
        _buffer,
    ),
    Rule(
        "linalg",
        "factorizations are asked of the CPU",
        f"{COMMIT}: linalg.cpp, check_cpu_stream",
        ValueError,
        _linear_algebra,
    ),
    Rule(
        "put_along_axis",
        "values have at most 4 bytes",
        f"{COMMIT}: metal/indexing.cpp, ScatterAxis::eval_gpu",
        ValueError,
        _scatter,
    ),
    Rule(
        "evaluation",
        "an operation has at most 20 index arrays",
        f"{COMMIT}: metal/indexing.cpp, Gather::eval_gpu and Scatter::eval_gpu",
        RuntimeError,
        _index_arrays,
    ),
    Rule(
        "evaluation",
        "a compiled kernel has at most 31 arguments",
        f"{COMMIT}: metal/compiled.cpp",
        RuntimeError,
        _arguments,
    ),
    Rule(
        "evaluation",
        "at most 499,000 arrays are alive",
        f"{COMMIT}: metal/allocator.cpp and metal/device_info.cpp (iogpu.rsrc_limit)",
        RuntimeError,
        _resources,
    ),
)


def check(call: Call) -> None:
    """Raise what Metal raises for this call."""
    for rule in RULES:
        message = rule.refusal(call) if rule.kind == call.kind else None
        if message is not None:
            raise rule.error(message)
