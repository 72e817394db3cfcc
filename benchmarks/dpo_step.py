"""A DPO step here against mlx-lm-lora's: the same pairs, rank and layers, taking turns in one process.

    pip install --no-deps mlx-lm-lora
    python benchmarks/dpo_step.py [--repeats 5] [--batch-size 8] [--pairs FILE] [--max-length 1024] [--checkpoint]
                                  [--model random-128k] [--device gpu] [--json FILE]

Prints the median pairs per second and peak memory over the weights of one optimizer step, and the ratios. Both run
the same weights with LoRA of rank 16 on every linear layer. mlx-lm-lora's side is its own loss, batching
and compiled step, called as its trainer calls them; its reference model (a second copy of the base weights) runs
within each step. Here the reference is computed once before training, so a step is timed without it, and also with
the reference pass of exactly its pairs, as if no pair were ever seen twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from measuring import RANK, RATE, ROOT, SCALE

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_lora.trainer import dpo_trainer

from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import LoadedModel
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.objective import Settings
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.reference import Reference, ReferenceStore
from mlx_zh.training.step import train_step

DATA = ROOT / "data" / "quickstart" / "dpo-train.jsonl"
BETA = 0.1
Step = Callable[[list[int]], None]


def our_step(loaded: LoadedModel, pairs: list[RenderedPair], *, with_reference: bool, checkpoint: bool) -> Step:
    """One step of this program; with the reference pass of its pairs where that is to be counted."""
    base, model = measuring.copy_of(loaded), measuring.copy_of(loaded)
    add_adapter(model, AdapterSpec("lora", len(model.layers), rank=RANK, scale=SCALE), seed=0)
    optimizer = GroupedAdamW(trainable(model), weight_decay=0.0, betas=(0.9, 0.999))
    settings = Settings(seed=0, micro_tokens=2048, checkpoint=checkpoint)
    state = {"weights": trainable(model)}
    folder = tempfile.TemporaryDirectory()
    known = np.zeros((len(pairs), 4), dtype=np.float32)  # the numbers do not matter to the clock

    def step(members: list[int], folder: Any = folder) -> None:
        if with_reference:
            chosen = [pairs[m] for m in members]
            with tempfile.TemporaryDirectory(dir=folder.name) as fresh:
                reference = Reference(ReferenceStore(Path(fresh) / "reference.txt"), chosen)
                for _ in reference.compute(base, row_tokens=4096):
                    pass
                known[members] = reference.logprobs(chosen)
        objective = DpoObjective(pairs, known, Dpo(beta=BETA), settings)
        rows = objective.rows(np.array(members), 0)
        _, state["weights"] = train_step(
            model, objective, rows, state["weights"], optimizer, learning_rate=RATE, max_grad_norm=None
        )

    return step


def peer_step(loaded: LoadedModel, pairs: list[RenderedPair], *, checkpoint: bool) -> Step:
    """One step of mlx-lm-lora's trainer: chosen and rejected padded, policy and reference, full logits, compiled."""
    reference, model = measuring.copy_of(loaded), measuring.copy_of(loaded)
    reference.update(tree_map(lambda array: array + 0, reference.parameters()))  # its step cannot share arrays
    mx.eval(reference.parameters())
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    if checkpoint:
        dpo_trainer.grad_checkpoint(model.layers[0])
    model.train()
    optimizer = optim.AdamW(learning_rate=RATE)
    scores = dpo_trainer.get_token_scores

    def loss(chosen: mx.array, rejected: mx.array, chosen_mask: mx.array, rejected_mask: mx.array) -> Any:
        def summed(which: Any, tokens: mx.array, mask: mx.array) -> mx.array:
            return dpo_trainer.compute_score(scores(which, tokens, mask), mask, "sigmoid")

        return dpo_trainer.dpo_loss(
            policy_chosen_score=summed(model, chosen, chosen_mask),
            policy_rejected_score=summed(model, rejected, rejected_mask),
            reference_chosen_score=mx.stop_gradient(summed(reference, chosen, chosen_mask)),
            reference_rejected_score=mx.stop_gradient(summed(reference, rejected, rejected_mask)),
            chosen_masks=chosen_mask,
            rejected_masks=rejected_mask,
            beta=BETA,
            delta=50.0,
            loss_type="sigmoid",
        )

    loss_and_grad = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(batch: tuple[mx.array, ...]) -> Any:
        found, gradients = loss_and_grad(*batch)
        optimizer.update(model, gradients)
        return found

    def row(pair: RenderedPair) -> dict[str, Any]:
        prompt = pair.prompt.tolist()
        sides = {name: prompt + getattr(pair, name).tolist() for name in ("chosen", "rejected")}
        return sides | {"chosen_prompt_length": len(prompt), "rejected_prompt_length": len(prompt)}

    def step(members: list[int]) -> None:
        rows = [row(pairs[m]) for m in members]
        batch = next(dpo_trainer.iterate_dpo_batches(rows, batch_size=len(rows), max_seq_length=2048))
        mx.eval(state, *compiled(batch)[:1])

    return step


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=Path, default=DATA)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--checkpoint", action="store_true", help="recompute layers in the backward pass, both sides")
    arguments = parser.parse_args()
    loaded = measuring.load(arguments)
    preferences, _ = load_preferences(arguments.pairs, on_invalid="skip")
    rendered = Renderer(loaded.tokenizer).preferences(preferences, max_length=arguments.max_length)
    pairs = [pair for pair in rendered if pair is not None]
    chosen = measuring.batches(len(pairs), arguments.batch_size, arguments.repeats)
    lengths = [[len(getattr(pair, name)) for pair in pairs] for name in ("prompt", "chosen", "rejected")]
    means = ", ".join(f"{np.mean(column):.0f}" for column in lengths)
    print(f"{arguments.model}; mean tokens of prompt, chosen, rejected: {means}")

    sides = {
        "mlx-zh": our_step(loaded, pairs, with_reference=False, checkpoint=arguments.checkpoint),
        "mlx-zh, reference counted": our_step(loaded, pairs, with_reference=True, checkpoint=arguments.checkpoint),
        "mlx-lm-lora": peer_step(loaded, pairs, checkpoint=arguments.checkpoint),
    }
    figures = measuring.medians(measuring.take_turns(sides, chosen), against="mlx-lm-lora")
    for side in figures.values():
        side["pairs_per_second"] = arguments.batch_size / side["seconds"]
    measuring.show(f"{arguments.batch_size} pairs a step", figures, against="mlx-lm-lora")
    measuring.write(arguments.json, measuring.about(arguments, ("mlx-lm-lora",)), figures)


if __name__ == "__main__":
    main()
