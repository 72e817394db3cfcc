"""Two SFT steps and two DPO steps of a tiny model, as numbers. `python tests/metal/tiny_steps.py` writes the file.

Run it (on a machine without a GPU) only when a change is meant to move the numbers: the tests compare both what the
CPU and what Metal computes with the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_zh  # isort: skip  (loads the fast BLAS before anything imports mlx)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_zh.corpus.rendered import Rendered, RenderedPair
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.objective import Objective, Settings
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import train_step

assert mlx_zh
FILE = Path(__file__).with_suffix(".json")
RATE, RANK, LAYERS, VOCABULARY = 1e-3, 4, 3, 300
CONVERSATIONS = (2, 3, 5, 8, 9, 17)  # tokens
# Prompt, shared beginning of the responses, rest of chosen, rest of rejected: branches of 1 to 8 tokens.
PAIRS = ((6, 0, 5, 8), (3, 4, 2, 1), (11, 0, 8, 3), (1, 2, 6, 6), (12, 0, 1, 1), (5, 7, 3, 7), (9, 0, 4, 2))

Numbers = dict[str, float]


def tiny_model() -> Any:
    """A random Llama in float32 with heads of 64, which Metal's fused kernels take, and an adapter."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=LAYERS,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    model = llama.Model(arguments)
    rng = np.random.default_rng(0)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        values = rng.normal(size=array.shape)
        values = 1 + 0.2 * values if "norm" in name else values * 1.5 / 8
        weights.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(weights)
    model.eval()
    add_adapter(model, AdapterSpec("lora", LAYERS, RANK), seed=0)
    drawn = {n: rng.normal(size=a.shape) * (0.15 if n.endswith("_b") else 0.125) for n, a in trainable(model).items()}
    model.load_weights([(n, mx.array(values.astype(np.float32))) for n, values in drawn.items()], strict=False)
    return model


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).astype(np.int32)


def sft() -> Numbers:
    """Two steps over conversations of which the latter half is trained."""
    examples = [Rendered(tokens(n, n), np.arange(n) >= n // 2, False) for n in CONVERSATIONS]
    return _two_steps(tiny_model(), lambda model: SftObjective(examples, Settings(seed=0, micro_tokens=64)))


def dpo() -> Numbers:
    """Two steps over pairs, with reference log-probs near those of the model."""
    pairs = []
    for number, (prompt, shared, chosen, rejected) in enumerate(PAIRS):
        root, both = tokens(prompt, 10 * number), tokens(shared, 10 * number + 1)
        branches = [tokens(chosen, 10 * number + 2), tokens(rejected, 10 * number + 3)]
        branches[1][0] = (branches[0][0] + 1) % VOCABULARY  # they part here
        pairs.append(RenderedPair(root, *(np.concatenate([both, branch]) for branch in branches)))

    def objective(model: Any) -> DpoObjective:
        reference = np.array([[-20.0 - n, -22.0 + n, 0.0, 0.0] for n in range(len(pairs))], dtype=np.float32)
        return DpoObjective(pairs, reference, Dpo(beta=0.05), Settings(seed=0, micro_tokens=64))

    return _two_steps(tiny_model(), objective)


def _two_steps(model: Any, objective_of: Callable[[Any], Objective]) -> Numbers:
    objective = objective_of(model)
    weights = trainable(model)
    optimizer = GroupedAdamW(weights, weight_decay=0.0, betas=(0.9, 0.999), loraplus_ratio=1.0)
    numbers: Numbers = {}
    for step in (1, 2):
        rows = objective.rows(np.arange(objective.size), step)
        result, weights = train_step(
            model, objective, rows, weights, optimizer, learning_rate=RATE, max_grad_norm=1.0
        )
        numbers |= {f"step {step} loss": result.loss, f"step {step} gradient norm": result.grad_norm}
        numbers |= {f"step {step} {name}": value for name, value in objective.metrics(result.sums).items()}
    return numbers


if __name__ == "__main__":
    with mx.stream(mx.cpu):
        FILE.write_text(json.dumps({"sft": sft(), "dpo": dpo()}, indent=2) + "\n", encoding="utf-8")
