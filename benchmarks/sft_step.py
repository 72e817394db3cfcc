"""An SFT step here against mlx-lm's: the same samples, rank and layers, taking turns in one process.

    python benchmarks/sft_step.py [--repeats 5] [--batch-size 8] [--samples FILE] [--max-length 1024]
                                  [--model random-128k] [--device gpu] [--json FILE]

Prints the median time, real tokens a second and peak memory over the weights of one optimizer step, without and with
layer checkpointing, and the ratios. Both run the same weights with LoRA of rank 16 on every linear layer; mlx-lm's
side is its own loss, batching, compiled step and checkpointing, called as its trainer calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measuring
from measuring import RANK, RATE, ROOT, SCALE

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_zh.corpus.rendered import Rendered
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import LoadedModel
from mlx_zh.training.objective import Settings
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import train_step

DATA = ROOT / "data" / "quickstart" / "sft-train.jsonl"
Step = Callable[[list[int]], None]


def our_step(
    loaded: LoadedModel, examples: Sequence[Rendered], checkpoint: bool, *, micro_tokens: int = 2048
) -> Step:
    """One step of this program."""
    model = measuring.copy_of(loaded)
    add_adapter(model, AdapterSpec("lora", len(model.layers), rank=RANK, scale=SCALE), seed=0)
    objective = SftObjective(examples, Settings(seed=0, micro_tokens=micro_tokens, checkpoint=checkpoint))
    optimizer = GroupedAdamW(trainable(model), weight_decay=0.0, betas=(0.9, 0.999))
    state = {"weights": trainable(model)}

    def step(members: list[int]) -> None:
        rows = objective.rows(np.array(members), 0)
        _, state["weights"] = train_step(
            model, objective, rows, state["weights"], optimizer, learning_rate=RATE, max_grad_norm=None
        )

    return step


def peer_step(loaded: LoadedModel, examples: Sequence[Rendered], checkpoint: bool) -> Step:
    """One step of mlx-lm's trainer: padded batch, full logits, compiled over its shapes."""
    model = measuring.copy_of(loaded)
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


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--samples", type=Path, default=DATA)
    arguments = parser.parse_args()
    loaded = measuring.load(arguments)
    examples = measuring.conversations(loaded, arguments.samples, arguments.max_length)
    chosen = measuring.batches(len(examples), arguments.batch_size, arguments.repeats)
    tokens = float(np.median([sum(len(examples[m].tokens) for m in members) for members in chosen]))
    print(f"{arguments.model}, {arguments.batch_size} conversations a step, {tokens:.0f} tokens in the median")

    found = {}
    for checkpoint in (False, True):
        sides = {"mlx-zh": our_step(loaded, examples, checkpoint), "mlx-lm": peer_step(loaded, examples, checkpoint)}
        figures = measuring.medians(measuring.take_turns(sides, chosen), against="mlx-lm")
        for side in figures.values():
            side["tokens_per_second"] = tokens / side["seconds"]
        title = "both with checkpointed layers" if checkpoint else "without checkpointing"
        measuring.show(title, figures, against="mlx-lm")
        found["checkpointed" if checkpoint else "plain"] = figures
    measuring.write(arguments.json, measuring.about(arguments), found)


if __name__ == "__main__":
    main()
