"""An SFT step here against mlx-lm's: the same samples, rank and layers, interleaved in one process.

    python benchmarks/sft_step.py [--repeats 5] [--batch-size 8] [--samples FILE]

Prints the median time and peak memory over the weights of one optimizer step, without and with layer
checkpointing, and the ratios. Both run the same float32 SmolLM2-135M with LoRA of rank 16 on every linear layer;
mlx-lm's side is its own loss, batching, compiled step and checkpointing, called as its trainer calls them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.render import Rendered, Renderer
from mlx_zh.models.load import LoadedModel, load_model
from mlx_zh.models.lora import AdapterSpec, add_adapter, trainable
from mlx_zh.training.objective import Settings
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import train_step

RANK, SCALE, RATE = 16, 2.0, 1e-4
DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart" / "sft-train.jsonl"
Step = Callable[[list[int]], None]


def our_step(loaded: LoadedModel, examples: list[Rendered], checkpoint: bool) -> Step:
    """One step of this program."""
    model = copy_of(loaded)
    add_adapter(model, AdapterSpec("lora", len(model.layers), rank=RANK, scale=SCALE), seed=0)
    objective = SftObjective(examples, Settings(seed=0, micro_tokens=2048, checkpoint=checkpoint))
    optimizer = GroupedAdamW(trainable(model), weight_decay=0.0, betas=(0.9, 0.999))
    state = {"weights": trainable(model)}

    def step(members: list[int]) -> None:
        rows = objective.rows(np.array(members), 0)
        _, state["weights"] = train_step(
            model, objective, rows, state["weights"], optimizer, learning_rate=RATE, max_grad_norm=None
        )

    return step


def peer_step(loaded: LoadedModel, examples: list[Rendered], checkpoint: bool) -> Step:
    """One step of mlx-lm's trainer: padded batch, full logits, compiled over its shapes."""
    model = copy_of(loaded)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    if checkpoint:
        trainer.grad_checkpoint(model.layers[0])
    model.train()
    optimizer = optim.AdamW(learning_rate=RATE)
    loss_and_grad = nn.value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(batch: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        (loss, tokens), gradients = loss_and_grad(model, *batch)
        optimizer.update(model, gradients)
        return loss, tokens

    def step(members: list[int]) -> None:
        rows = [(examples[m].tokens.tolist(), int(examples[m].trained.argmax())) for m in members]
        batch = next(trainer.iterate_batches(rows, batch_size=len(rows), max_seq_length=2048))
        mx.eval(state, *compiled(batch))

    return step


def copy_of(loaded: LoadedModel) -> Any:
    """The same weights (shared) in a model of its own."""
    model = llama.Model(llama.ModelArgs.from_dict(loaded.config))
    model.update(loaded.model.parameters())
    mx.eval(model.parameters())
    return model


def measure(steps: dict[str, Step], batches: list[list[int]]) -> dict[str, dict[str, float]]:
    """Median seconds and peak GB over the weights, each batch by every side in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[float]] = {name: [] for name in steps}
    for members in batches:
        for name, step in steps.items():
            step(members)  # warm-up: who compiles for each new shape has done so before the clock starts
            mx.clear_cache()
            mx.reset_peak_memory()
            active, start = mx.get_active_memory(), time.perf_counter()
            step(members)
            times[name].append(time.perf_counter() - start)
            peaks[name].append((mx.get_peak_memory() - active) / 1e9)
    return {n: {"seconds": statistics.median(times[n]), "gb": statistics.median(peaks[n])} for n in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=Path, default=DATA)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()

    loaded = load_model("smollm2-135m-instruct")
    conversations, _ = load_conversations(arguments.samples, on_invalid="skip")
    rendered = Renderer(loaded.tokenizer).conversations(conversations, max_length=1024, on_overflow="drop")
    examples = [example for example in rendered if example is not None]
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    size = arguments.batch_size
    batches = [order[i * size : (i + 1) * size] for i in range(arguments.repeats)]

    figures = {}
    for checkpoint in (False, True):
        sides = {"mlx-zh": our_step(loaded, examples, checkpoint), "mlx-lm": peer_step(loaded, examples, checkpoint)}
        figures["checkpointed" if checkpoint else "plain"] = measure(sides, batches)

    print(f"{'':14}{'mlx-zh':>18}{'mlx-lm':>18}{'time':>9}{'memory':>9}")
    for name, sides in figures.items():
        ours, peer = sides["mlx-zh"], sides["mlx-lm"]
        cells = [f"{side['seconds']:.2f} s {side['gb']:.2f} GB" for side in (ours, peer)]
        ratios = f"{peer['seconds'] / ours['seconds']:8.2f}x{ours['gb'] / peer['gb']:8.2f}x"
        print(f"{name:14}{cells[0]:>18}{cells[1]:>18}{ratios}")
    if arguments.json:
        about = {p: version(p) for p in ("mlx", "mlx-lm")} | {"machine": platform.platform(), "batch_size": size}
        arguments.json.write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
