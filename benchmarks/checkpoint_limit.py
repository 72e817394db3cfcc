"""Steps of SFT within a memory limit: layers computed again row by row, against all of them.

    python benchmarks/checkpoint_limit.py [--steps 8] [--json FILE]

The model is small and random, its rows are those of the 16 GB recipe: up to 1,024 tokens, of examples of 165 tokens
in the mean and 1,024 at most. The limit is the share of the longest row's memory that a 16 GB Mac has of
Llama-3.1-8B's, so that keeping everything does not fit. The settings take turns, step by step, and the medians of
their processor time are compared. Prints also what a token and layer keeps, and the longest row that fits without
computing any again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.largest_row import uniform_examples
from mlx_zh.planning.memory import kept_bytes, step_memory
from mlx_zh.planning.search import Step
from mlx_zh.planning.shapes import ModelShape, Packing, Target, conversations, model_shape, row_of
from mlx_zh.recipe import Memory
from mlx_zh.training.objective import Settings
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import loss_and_gradients

LONGEST, MEAN, BATCH = 1024, 165.0, 16
SHARE = 11.5 / 12.4  # GB of a 16 GB Mac, and GB that Llama-3.1-8B's longest row takes if everything is kept
CPU, METAL = Target(4, None, False), Target(2, Packing(4, 64), True, 1024)
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = MODEL | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
TRAINED = AdapterSpec("lora", MODEL["num_hidden_layers"], 8)


def examples(count: int) -> list[Rendered]:
    """Conversations whose lengths vary as those of real data do: many short ones and a few long ones."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.exponential(MEAN, count), 16, LONGEST).astype(int)
    return [Rendered(rng.integers(0, 4096, n).astype(np.int32), np.arange(n) >= n // 3, False) for n in lengths]


def speed(steps: int) -> dict[str, float]:
    """Median seconds of a step with all layers computed again, and with as few as the limit allows."""
    model = llama.Model(llama.ModelArgs.from_dict(MODEL))
    model.freeze()
    add_adapter(model, TRAINED, seed=0)
    weights = trainable(model)
    mx.eval(model.parameters(), weights)
    shape, longest = model_shape(MODEL), conversations([LONGEST])
    limit = SHARE * step_memory(shape, TRAINED, CPU, longest, Levels()).peak
    step = Step(shape, TRAINED, CPU, uniform_examples("sft", LONGEST, BATCH), limit)
    auto = Settings(0, LONGEST, lambda batch: step.levels(row_of(batch), Memory()))
    objective = SftObjective(examples(steps * BATCH), auto)
    ways = {"all": Settings(0, LONGEST, True), "auto": auto, "none": Settings(0, LONGEST)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0)
    for number in range(-1, steps):  # the first is not counted
        for name, settings in ways.items():
            objective.settings = settings
            rows = objective.rows(np.arange(max(number, 0) * BATCH, (max(number, 0) + 1) * BATCH), number)
            mx.reset_peak_memory()
            start = time.process_time()
            mx.eval(loss_and_gradients(model, objective, rows, weights))
            if number >= 0:
                seconds[name].append(time.process_time() - start)
                peaks[name] = max(peaks[name], mx.get_peak_memory())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    objective.settings = auto
    again = [auto.levels(row.batch).blocks for row in objective.rows(np.arange(objective.size), 0)]
    figures = medians | {f"{name} peak": peak / 1e9 for name, peak in peaks.items()}
    return figures | {
        "limit": limit / 1e9,
        "layers again": float(np.mean(again)),
        "ratio": medians["all"] / medians["auto"],
    }


def longest_row(shape: ModelShape, trained: AdapterSpec, levels: Levels, memory: float) -> int:
    """The tokens of the longest row of conversations of 256 tokens that fits."""
    tokens = 256
    while step_memory(shape, trained, METAL, conversations([256] * (tokens // 256)), levels).peak <= memory:
        tokens += 256
    return tokens - 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    shape, trained, row = model_shape(LLAMA), AdapterSpec("lora", 32, 16), conversations([1024])
    kept = [sum(kept_bytes(shape, trained, METAL, row, level).values()) / row.tokens for level in (0, 1, 2)]
    rows = [longest_row(shape, trained, levels, 11.5e9) for levels in (Levels(), Levels(ALL))]
    figures = speed(arguments.steps) | {"kept": kept[1] / kept[0], "longest": rows[1] / rows[0]}
    print("Llama-3.1-8B in 4 bits, fused attention: bytes that a token and layer keeps, by level:")
    print(
        "  " + ", ".join(f"{number}: {size:,.0f}" for number, size in enumerate(kept)) + f"; {figures['kept']:.2f} x"
    )
    print(
        f"  longest row in 11.5 GB without recomputation: {rows[0]} -> {rows[1]} tokens, {figures['longest']:.2f} x"
    )
    print(
        f"SFT step on the CPU within {figures['limit']:.2f} GB, {arguments.steps} steps, medians of processor time:"
    )
    for name in ("all", "auto", "none"):
        words = name if name == "auto" else f"{name} layers again"
        print(f"  {words:18}{figures[name]:8.2f} s{figures[f'{name} peak']:8.2f} GB")
    print(f"  auto computes {figures['layers again']:.1f} of 6 layers again: {figures['ratio']:.2f} x as fast")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["ratio"] >= 1.25 and figures["kept"] <= 0.55 and figures["longest"] >= 1.7 else 1


if __name__ == "__main__":
    sys.exit(main())
