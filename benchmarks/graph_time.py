"""Python's time to build the graph of a row: what a fast GPU waits for before it can begin.

    python benchmarks/graph_time.py [--layers 32] [--segments 8 32] [--repeats 15] [--device gpu] [--json FILE]

For SFT and DPO, at each level of computing again (`core.recompute`), and for rows of so many segments: the least
processor time of a forward and backward pass that is built and not computed, and the number of its operations. The
model is 4-bit with LoRA on every linear layer, and so narrow that its size costs nothing. MLX builds attention, RoPE
and norms of many operations on a CPU and of one on a GPU, so a GPU's times are shorter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_zh.core.pacing import paced
from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.corpus.rendered import Rendered, RenderedPair
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.objective import Objective, Settings
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import set_weights

NARROW: dict[str, Any] = measuring.LLAMA31_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
LEVELS = {"0": Levels(), "1": Levels(ALL), "2": Levels(ALL, ALL)}


def narrow_model(layers: int) -> Any:
    """A model of so many thin blocks, ready to be trained."""
    model = measuring.empty_model(NARROW | {"num_hidden_layers": layers})
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, **NARROW["quantization"])
    add_adapter(model, AdapterSpec("lora", layers, rank=measuring.RANK, scale=measuring.SCALE), seed=0)
    mx.eval(model.parameters())
    return model


def objective_of(kind: str, segments: int, levels: Levels) -> tuple[Objective, int]:
    """An objective and the number of its examples, which fill one row of `segments` segments."""
    rng = np.random.default_rng(0)
    settings = Settings(seed=0, micro_tokens=2**20, checkpoint=levels)

    def tokens(first: int, count: int) -> np.ndarray:
        return np.concatenate([[first], rng.integers(3, 250, count - 1)]).astype(np.int32)

    if kind == "sft":
        examples = [Rendered(tokens(1, 12), np.arange(12) >= 6, False) for _ in range(segments)]
        return SftObjective(examples, settings), segments
    pairs = [RenderedPair(tokens(1, 6), tokens(10, 12), tokens(11, 12)) for _ in range(segments // 3)]
    return DpoObjective(pairs, np.zeros((len(pairs), 4), np.float32), Dpo(), settings), len(pairs)


def builder(model: Any, objective: Objective, examples: int) -> Callable[[], Any]:
    """Builds the loss and gradients of the objective's only row."""
    (row,) = objective.rows(np.arange(examples), 0)
    weights = trainable(model)

    def share(weights: dict[str, mx.array]) -> mx.array:
        set_weights(model, weights)
        return objective.share(model, row)[0]

    def build() -> Any:
        with paced():
            result = mx.value_and_grad(share)(weights)
        set_weights(model, weights)
        return result

    return build


def operations(result: tuple[mx.array, dict[str, mx.array]]) -> int:
    """The number of operations of a graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), result[0], *result[1].values())
        return path.read_text().count("shape=rectangle")


def main() -> None:
    parser = measuring.parser(__doc__, repeats=15)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--segments", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    measuring.choose_device(arguments)
    model, figures = narrow_model(arguments.layers), {}
    for kind in ("sft", "dpo"):
        for segments in arguments.segments:
            for level, levels in LEVELS.items():
                build = builder(model, *objective_of(kind, segments, levels))
                times, count = [], operations(build())
                for _ in range(arguments.repeats):
                    start = time.process_time()
                    build()
                    times.append(time.process_time() - start)
                name = f"{kind}, {segments} segments, level {level}"
                figures[name] = {"milliseconds": round(1e3 * min(times), 2), "operations": count}
                print(f"{name}: {1e3 * min(times):.1f} ms, {count:,} operations", flush=True)
    measuring.write(arguments.json, measuring.about(arguments), figures)


if __name__ == "__main__":
    main()
