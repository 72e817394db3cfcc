"""A simulated Metal: it records every call that Metal limits, and raises what Metal raises (see metal_rules.py).

MLX decides at the call how attention is computed: `in_grad_tracing()` is true from the start of `mx.vjp` to its end,
its backward pass included, so also while a checkpointed block is computed again. Metal raises when it evaluates a
call, the simulation already at the call itself.
"""

from __future__ import annotations

import io
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import metal_rules
import mlx.core as mx
import numpy as np
import pytest
from metal_rules import MAC, VERSION, Call

from mlx_zh.core import product_speed
from mlx_zh.language.notice import Notice
from mlx_zh.stages import device_check
from mlx_zh.system import device
from mlx_zh.training.self_check import Difference, Outcome

# These make no array of their own: their outputs share the buffers of their inputs (CustomTransforms: the last ones).
VIEWS = frozenset(
    {
        *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten"),
        *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
    }
)
GRADIENTS = ("grad", "value_and_grad")  # these return a function; mx.vjp and mx.jvp call theirs at once
FACTORIZATIONS = (
    *("qr", "svd", "inv", "tri_inv", "cholesky", "cholesky_inv", "pinv", "lu", "lu_factor", "eig", "eigvals"),
    *("eigh", "eigvalsh"),
)

# Lines of `mx.export_to_dot`: an operation, then the arrays that go in and out. Operations that a compiled function
# makes at several places have the same number.
_NODE = re.compile(r'\{ \d+ \[label ="([^"]*)"')
_INPUT = re.compile(r'"([A-Z]+)" -> \d+')
_OUTPUT = re.compile(r'\d+ -> "([A-Z]+)"')


@dataclass(frozen=True, slots=True)
class Array:
    """A large array, and the function that took or returned it."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    function: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a graph that has still to be evaluated, and the names of the arrays that go in and out."""

    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class Watchman:
    """What was recorded. `gradient` is true while a gradient is traced."""

    calls: Counter[Call] = field(default_factory=Counter)
    largest: Array = Array(0, (), "", "")
    most_alive: int = 0  # arrays at one time of an evaluation, in depth-first order
    most_evaluated: int = 0  # arrays in one evaluation, an upper bound
    evaluations: int = 0
    _tracing: threading.local = field(default_factory=threading.local)

    @property
    def gradient(self) -> bool:
        return getattr(self._tracing, "depth", 0) > 0

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """A gradient is traced inside this context."""
        self._tracing.depth = getattr(self._tracing, "depth", 0) + 1
        try:
            yield
        finally:
            self._tracing.depth -= 1

    def of(self, kind: str, *, gradient: bool | None = None) -> list[Call]:
        """The different calls of a kind, with or without a gradient."""
        return [c for c in self.calls if c.kind == kind and gradient in (None, c.gradient)]

    def fewest_queries(self, *, gradient: bool = True) -> dict[str, int]:
        """The smallest number of queries of attention for each kind of mask."""
        fewest: dict[str, int] = {}
        for call in self.of("attention", gradient=gradient):
            fewest[call["mask"]] = min(call.shapes[0][2], fewest.get(call["mask"], call.shapes[0][2]))
        return fewest

    def record(self, kind: str, arrays: list[mx.array], **options: Any) -> None:
        """Note a call, and raise what Metal raises for it."""
        shapes = tuple(array.shape for array in arrays)
        call = Call(kind, shapes, tuple(map(_dtype, arrays)), self.gradient, tuple(sorted(options.items())))
        metal_rules.check(call)
        self.calls[call] += 1

    def see(self, function: str, values: Any) -> None:
        """Look at the arrays that a function took or returned."""
        for array in _arrays(values):
            if array.nbytes <= self.largest.nbytes and array.dtype != mx.float64:
                continue
            metal_rules.check(Call("array", (array.shape,), (_dtype(array),), options=(("nbytes", array.nbytes),)))
            self.largest = max(
                self.largest, Array(array.nbytes, array.shape, _dtype(array), function), key=lambda seen: seen.nbytes
            )

    def evaluated(self, values: Any) -> None:
        """Count the arrays that an evaluation of `values` computes."""
        arrays = _arrays(values)
        if self.gradient or not arrays:
            return
        graph = io.StringIO()
        mx.export_to_dot(graph, *arrays)
        graph_counts = counts(graph.getvalue())
        self.evaluations += 1
        self.most_alive = max(self.most_alive, graph_counts["alive"])
        self.most_evaluated = max(self.most_evaluated, graph_counts["arrays"])
        metal_rules.check(Call("evaluation", options=tuple(graph_counts.items())))


def counts(dot: str) -> dict[str, int]:
    """The arrays of a graph that has still to be evaluated, and the largest numbers of inputs of its operations.

    `arrays` are its constants and inputs and every array that an operation makes; `alive` is how many of them exist
    at one time if the operations run in the order of the graph.
    """
    operations = _operations(dot)
    buffer: dict[str, str] = {}  # of an array: the first array with the same memory
    made: dict[str, int] = {}  # the operation that makes a buffer
    last: dict[str, int] = {}  # the last operation that reads it
    for index, operation in enumerate(operations):
        taken = [buffer.setdefault(array, array) for array in operation.inputs]
        shared = taken[-len(operation.outputs) :] if operation.name == "CustomTransforms" else taken
        for place, array in enumerate(operation.outputs):
            if operation.name in VIEWS and taken:
                buffer[array] = shared[min(place, len(shared) - 1)]
            else:
                buffer[array] = array
                made[array] = index
        last |= dict.fromkeys(taken, index)
    given = len(set(buffer.values()) - set(made))  # weights and constants, which outlive the evaluation
    changes = Counter(made.values())
    changes.subtract(last[array] + 1 for array in made if array in last)
    alive = list(accumulate((changes[index] for index in range(len(operations))), initial=given))
    indexed = [len(o.inputs) - 1 for o in operations if o.name.startswith(("Gather", "Scatter"))]
    compiled = [len(o.inputs) + len(o.outputs) for o in operations if o.name.startswith("Compiled")]
    return {
        "arrays": given + len(made),
        "alive": max(alive),
        "index_arrays": max(indexed, default=0),
        "compiled_arguments": max(compiled, default=0),
    }


def _operations(dot: str) -> list[Operation]:
    """The operations of a graph, each after those that it needs."""
    operations: list[Operation] = []
    for line in dot.splitlines():
        if node := _NODE.match(line):
            operations.append(Operation(node[1]))
        elif edge := _INPUT.match(line):
            operations[-1].inputs.append(edge[1])
        elif edge := _OUTPUT.match(line):
            operations[-1].outputs.append(edge[1])
    return operations


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [array for part in parts for array in _arrays(part)]


@contextmanager
def simulated_metal(*, fast_products: bool = False) -> Iterator[Watchman]:
    """Inside this context, MLX's CPU back end looks like Metal on a small Mac, and refuses what Metal refuses.

    The self-check before the first step is left out, because its calls are not those of a stage. With
    `fast_products`, quantized products are computed in float32 by the BLAS, from weights that are dequantized
    once; the CPU's own take hundreds of times as long.
    """
    watchman = Watchman()
    with pytest.MonkeyPatch.context() as patch:
        _pretend(patch)
        for module in (mx, mx.fast, mx.linalg, mx.random):
            for name, function in list(vars(module).items()):
                if type(function).__name__ == "nb_func" and not name.startswith("broadcast"):
                    patch.setattr(module, name, _seen(watchman, name, function))
        _watch_calls(patch, watchman, _dequantized_product() if fast_products else mx.quantized_matmul)
        _watch_gradients(patch, watchman)
        _watch_evaluations(patch, watchman)
        yield watchman


def _pretend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(device, "is_cpu", lambda: False)
    patch.setattr(device, "mlx_version", lambda: VERSION)
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx, "device_info", lambda *_: MAC)
    patch.setattr(mx, "set_memory_limit", lambda _: 0)  # these are the process's, and would stay after the test
    patch.setattr(mx, "set_wired_limit", lambda _: 0)
    passed = (Difference(Notice("quantity-hidden"), value=0.0, bound=1.0),)
    patch.setattr(device_check, "check", lambda case: Outcome(case, passed))
    patch.setattr(product_speed, "measured", lambda layers, dtype, most: {})  # the CPU's speed says nothing


def _seen(watchman: Watchman, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        watchman.see(name, [arguments, options])
        result = function(*arguments, **options)
        watchman.see(name, result)
        return result

    return call


def _dequantized_product() -> Callable[..., mx.array]:
    weights: dict[int, tuple[mx.array, mx.array]] = {}  # by the quantized array's id, which is kept with them

    def product(x: mx.array, w: mx.array, *scales: Any, transpose: bool, **about: Any) -> mx.array:
        if id(w) not in weights:
            weights[id(w)] = w, mx.dequantize(w, *scales, **about).astype(mx.float32)
            mx.eval(weights[id(w)][1])
        weight = weights[id(w)][1]
        return x @ (weight.T if transpose else weight)

    return product


def _watch_calls(patch: pytest.MonkeyPatch, watchman: Watchman, quantized: Callable[..., mx.array]) -> None:
    attention, rope = mx.fast.scaled_dot_product_attention, mx.fast.rope
    split, concatenate, put = mx.split, mx.concatenate, mx.put_along_axis

    def watched_attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **options: Any) -> mx.array:
        kind = _dtype(mask) if isinstance(mask, mx.array) else mask or "none"
        watchman.record("attention", [q, k, v], mask=kind, sinks=options.get("sinks") is not None)
        return attention(q, k, v, mask=mask, **options)

    def watched_rope(x: mx.array, dims: int, *, offset: int | mx.array, **options: Any) -> mx.array:
        arrays = [x, offset] if isinstance(offset, mx.array) else [x]
        watchman.record("rope", arrays, offset="array" if len(arrays) == 2 else "number")
        return rope(x, dims, offset=offset, **options)

    def watched_quantized(
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = 64,
        bits: int | None = 4,
        mode: str = "affine",
        **options: Any,
    ) -> mx.array:
        about = {"transpose": transpose, "group_size": group_size, "bits": bits, "mode": mode}
        watchman.record("quantized_matmul", [x, w], **about)
        return quantized(x, w, scales, biases, **about, **options)

    def watched_split(a: mx.array, indices_or_sections: Any, axis: int = 0, **options: Any) -> Any:
        parts = split(a, indices_or_sections, axis, **options)
        watchman.record("split", [a], parts=len(parts))
        return parts

    def watched_concatenate(arrays: list[mx.array], axis: int | None = 0, **options: Any) -> mx.array:
        watchman.record("concatenate", [], parts=len(arrays))
        return concatenate(arrays, axis, **options)

    def watched_put(a: mx.array, indices: mx.array, values: mx.array, *axis: Any, **options: Any) -> mx.array:
        watchman.record("put_along_axis", [a, indices])
        return put(a, indices, values, *axis, **options)

    patch.setattr(mx.fast, "scaled_dot_product_attention", watched_attention)
    patch.setattr(mx.fast, "rope", watched_rope)
    patch.setattr(mx, "quantized_matmul", watched_quantized)
    patch.setattr(mx, "split", watched_split)
    patch.setattr(mx, "concatenate", watched_concatenate)
    patch.setattr(mx, "concat", watched_concatenate)
    patch.setattr(mx, "put_along_axis", watched_put)
    for name in FACTORIZATIONS:
        if hasattr(mx.linalg, name):
            patch.setattr(mx.linalg, name, _factorization(watchman, name, getattr(mx.linalg, name)))


def _factorization(watchman: Watchman, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, stream: Any = None, **options: Any) -> Any:
        on_cpu = stream is not None and (stream == mx.cpu or getattr(stream, "device", None) == mx.Device(mx.cpu))
        watchman.record("linalg", _arrays(arguments), name=name, stream="cpu" if on_cpu else "default")
        return function(*arguments, stream=stream, **options)

    return call


def _watch_gradients(patch: pytest.MonkeyPatch, watchman: Watchman) -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with watchman.tracing():
                return function(*arguments, **options)

        return call

    def transform(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: traced(function(*arguments, **options))

    for name in GRADIENTS:
        patch.setattr(mx, name, transform(getattr(mx, name)))
    for name in ("vjp", "jvp"):
        patch.setattr(mx, name, traced(getattr(mx, name)))


def _watch_evaluations(patch: pytest.MonkeyPatch, watchman: Watchman) -> None:
    """MLX also evaluates what NumPy reads. What `float()` reads is a sum of a few arrays, and is not watched."""

    def before(function: Callable[..., Any], *, only_arrays: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not only_arrays or (arguments and isinstance(arguments[0], mx.array)):
                watchman.evaluated(list(arguments))
            return function(*arguments, **options)

        return call

    for name in ("eval", "async_eval"):
        patch.setattr(mx, name, before(getattr(mx, name), only_arrays=False))
    for name in ("array", "asarray"):
        patch.setattr(np, name, before(getattr(np, name), only_arrays=True))
