"""The figures of docs/qwen3.5.md: the gated delta rule in chunks against mlx-lm's loop over tokens.

python benchmarks/gated_delta.py [one_layer] [whole_model] [chunk_sizes]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KEY_HEADS, VALUE_HEADS, SIZE = 16, 16, 128
LENGTHS = (128, 512, 2048)
MODEL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "full_attention_interval": 4,
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
TREES = {
    "64 of 8": [(8, None)] * 64,
    "32 of 16": [(16, None)] * 32,
    "16 of 32": [(32, None)] * 16,
    "8 of 64": [(64, None)] * 8,
    "one of 512": [(512, None)],
    "two pairs, 100 + 60 + 60": [(100, None), (60, 0), (60, 0), (100, None), (60, 3), (60, 3)],
    "a prefix of 400 and ten questions of 12": [(400, None), *[(12, 0)] * 10],
}


def measured(run: Callable[[], object], times: int = 2) -> tuple[float, float]:
    """The least seconds of processor time of a call, and the megabytes that it allocated at most."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, least = mx.get_active_memory(), float("inf")
    for _ in range(times):
        start = time.process_time()  # other work may share the processor
        mx.eval(run())
        least = min(least, time.process_time() - start)
    return least, (mx.get_peak_memory() - before) / 1e6


def random_inputs(tokens: int) -> list[mx.array]:
    """Normalized queries and keys, values, logs of gates, betas."""
    from mlx_lm.models.gated_delta import normalize_qk

    shapes = (tokens, KEY_HEADS, SIZE), (tokens, VALUE_HEADS, SIZE)
    queries, keys = (mx.random.normal(shapes[0]) for _ in range(2))
    queries, keys = normalize_qk(queries, keys, inv_scale=SIZE**-0.5, eps=1e-6)
    gates = -mx.random.uniform(0, 0.4, (tokens, VALUE_HEADS))
    inputs = [queries, keys, mx.random.normal(shapes[1]), gates, mx.sigmoid(mx.random.normal(gates.shape))]
    mx.eval(inputs)
    return inputs


def segments_of(lengths: list[tuple[int, int | None]]) -> list[Any]:
    """Segments of a row, from their lengths and parents."""
    from mlx_zh.core.packing import Segment

    segments, start = [], 0
    for length, parent in lengths:
        segments.append(Segment(start, start + length, parent, 0))
        start += length
    return segments


def one_layer() -> None:
    """Forward and backward of the rule alone."""
    from mlx_lm.models.gated_delta import gated_delta_ops

    from mlx_zh.core.gated_delta import gated_delta

    def loop(q: mx.array, k: mx.array, v: mx.array, gates: mx.array, betas: mx.array) -> mx.array:
        return (gated_delta_ops(q[None], k[None], v[None], mx.exp(gates)[None], betas[None])[0] ** 2).sum()

    print(f"One layer, {VALUE_HEADS} heads of {SIZE}, forward and backward\n")
    print("| Tokens | loop | chunks |\n| --- | --- | --- |")
    everything = tuple(range(5))
    for tokens in LENGTHS:
        inputs, segments = random_inputs(tokens), segments_of([(tokens, None)])

        def chunks(*arrays: mx.array, segments: Any = segments) -> mx.array:
            return (gated_delta(*arrays, segments)[0] ** 2).sum()

        figures = [
            measured(lambda f=f, inputs=inputs: mx.grad(f, argnums=everything)(*inputs)) for f in (loop, chunks)
        ]
        print(f"| {tokens:,} | " + " | ".join(f"{s:.2f} s, {mb:,.0f} MB" for s, mb in figures) + " |", flush=True)


def whole_model() -> None:
    """A step of LoRA: mlx-lm's own forward in training, and ours."""
    from families import family_config, own_class

    from mlx_zh.core.logprobs import batch_logprobs
    from mlx_zh.core.packing import pack_conversations
    from mlx_zh.models.adapters.layers import add_adapter, trainable
    from mlx_zh.models.adapters.spec import AdapterSpec
    from mlx_zh.training.step import set_weights

    model = own_class(family_config("qwen3_5", **MODEL))
    add_adapter(model, AdapterSpec("lora", 4, rank=8), seed=0)
    weights = trainable(model)
    mx.eval(model.parameters())
    print("\nA model of 4 layers, hidden size 256, 8 heads of 64: a step of LoRA\n")
    print("| Tokens | loop | chunks | chunks, checkpointed |\n| --- | --- | --- | --- |")
    for tokens in LENGTHS:
        ids = [(7 * i + 3) % 300 for i in range(tokens)]
        row = pack_conversations([(ids, [True] * tokens)])

        def own(weights: dict[str, mx.array], ids: list[int] = ids) -> mx.array:
            set_weights(model, weights)
            logits = model(mx.array([ids[:-1]]))[0]
            return (
                mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
            ).sum()

        def ours(weights: dict[str, mx.array], checkpoint: bool = False, row: Any = row) -> mx.array:
            set_weights(model, weights)
            return batch_logprobs(model, row, checkpoint=checkpoint).sum()

        model.train()
        figures = [measured(lambda f=f: mx.grad(f)(weights)) for f in (own, ours, lambda w: ours(w, True))]
        print(f"| {tokens:,} | " + " | ".join(f"{s:.2f} s, {mb:,.0f} MB" for s, mb in figures) + " |", flush=True)
    set_weights(model, weights)


def chunk_sizes() -> None:
    """Forward and backward with each size of a chunk; the one that is chosen has a star."""
    from mlx_zh.core.gated_delta import CHUNKS, chunk_for, gated_delta

    print(
        "\n| Segments | " + " | ".join(f"{chunk}" for chunk in CHUNKS) + " |\n| ---" + " | ---" * len(CHUNKS) + " |"
    )
    for name, lengths in TREES.items():
        segments = segments_of(lengths)
        inputs = random_inputs(segments[-1].stop)
        cells = []
        for chunk in CHUNKS:

            def rule(*arrays: mx.array, chunk: int = chunk, segments: Any = segments) -> mx.array:
                return (gated_delta(*arrays, segments, chunk=chunk)[0] ** 2).sum()

            seconds, megabytes = measured(lambda f=rule, inputs=inputs: mx.grad(f, argnums=(0, 1, 2, 3, 4))(*inputs))
            star = "*" if chunk == chunk_for([len(segment) for segment in segments]) else ""
            cells.append(f"{seconds:.2f} s, {megabytes:,.0f} MB{star}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    for part in (one_layer, whole_model, chunk_sizes):
        if part.__name__ in (sys.argv[1:] or [part.__name__]):
            part()
