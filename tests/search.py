"""Searches random configurations for one whose result depends on memory settings (`make search`).

    python tests/search.py [--kinds sft dpo eval] [--seconds 120] [--seed 0]

Each configuration of SFT and DPO is one step on a tiny model: loss and gradients with rows of 64 tokens, and with
other rows, chunks of logits and checkpointing. A configuration of `eval` scores prompts in pieces, and each alone.
What lies beyond rounding is printed with its seed, which makes it again; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx_zh  # isort: skip  (loads the fast BLAS before anything imports mlx)

import mlx.core as mx
import numpy as np
from conftest import tiny_model
from mlx.utils import tree_flatten
from oracles import own_logprobs
from preferences import reference_of
from tolerances import GRADIENT, LOGPROBS, ONE_LOGPROB

from mlx_zh.core.losses import LOSSES
from mlx_zh.corpus.rendered import Rendered, RenderedPair
from mlx_zh.exams.prompts import Prompt
from mlx_zh.exams.scorer import letter_logprobs
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective, PairRow
from mlx_zh.training.objective import Objective, Settings
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import loss_and_gradients, set_weights

assert mlx_zh
VOCABULARY = 300
Step = tuple[float, dict[str, np.ndarray]]
make_model: Callable[..., Any] = tiny_model.__wrapped__()


def model_of(draw: random.Random, seed: int) -> Any:
    """A float32 model with an adapter whose B is not 0. Dropout and NEFTune are off."""
    bits = draw.choice([None, None, 4, 8])
    layers = draw.choice([1, 2, 3])
    model = make_model(
        draw.choice(["llama", "qwen2", "qwen3", "mistral"]),
        tied=draw.random() < 0.5,
        quantized=bits,
        layers=layers,
        seed=seed,
    )
    kind = draw.choice(["lora", "dora"] if bits else ["lora", "dora", "full"])
    rank = draw.choice([1, 4, 7])
    scale = AdapterSpec.scale_of(draw.choice([1.0, 8.0, 16.0]), rank, rslora=draw.random() < 0.5)
    targets = draw.choice([None, ("q_proj",), ("down_proj", "v_proj")]) if kind != "full" else None
    add_adapter(model, AdapterSpec(kind, draw.choice([1, layers]), rank, scale, targets=targets), seed=seed)
    shift_weights(model, seed)
    return model


def shift_weights(model: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moved = {n: w + mx.array(0.05 * rng.normal(size=w.shape), mx.float32) for n, w in trainable(model).items()}
    set_weights(model, {name: array for name, array in moved.items() if not name.endswith("lora_a")})


def memory_settings(draw: random.Random) -> dict[str, Any]:
    return {
        "micro_tokens": draw.choice([1, 3, 7, 30, 4096]),
        "checkpoint": draw.random() < 0.7,
        "logit_rows": draw.choice([None, 1, 5]),
    }


def step_of(model: Any, objective: Objective, size: int) -> Step:
    rows = objective.rows(np.arange(size), 0)
    loss, _, gradients = loss_and_gradients(model, objective, rows, trainable(model))
    return float(loss), {name: np.array(array, dtype=np.float64) for name, array in gradients.items()}


def differences(one: Step, other: Step, loss_bound: float, sizes: dict[str, float]) -> list[str]:
    """What lies beyond the bounds. `sizes` says for each array how large an entry may differ."""
    lines = []
    if not abs(one[0] - other[0]) <= loss_bound:
        lines.append(f"loss {one[0]!r} and {other[0]!r} (bound {loss_bound:.2g})")
    for name, gradient in one[1].items():
        apart = float(np.abs(gradient - other[1][name]).max())
        if not apart <= sizes[name]:
            lines.append(f"{name}: {apart:.3g} apart (bound {sizes[name]:.3g})")
    return lines


def sft(draw: random.Random, seed: int) -> tuple[str, list[str]]:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(draw.choice([1, 2, 5, 9])):
        length = draw.choice([2, 3, 7, 20, 45])
        trained = rng.random(length) < draw.choice([0.1, 0.5, 1.0])
        trained[-1] = True
        examples.append(Rendered(rng.integers(0, VOCABULARY, length).astype(np.int32), trained, False))
    model, memory = model_of(draw, seed), memory_settings(draw)
    one = step_of(model, SftObjective(examples, Settings(seed=1, micro_tokens=64)), len(examples))
    other = step_of(model, SftObjective(examples, Settings(seed=1, **memory)), len(examples))
    # A step's gradient is a sum over examples, which may cancel out: each is rounded by itself.
    total = sum(int(e.trained[1:].sum()) for e in examples)
    sizes = dict.fromkeys(one[1], 0.0)
    for example in examples:
        _, slopes = step_of(model, SftObjective([example], Settings(seed=1, micro_tokens=64)), 1)
        share = int(example.trained[1:].sum()) / total
        for name, slope in slopes.items():
            sizes[name] += GRADIENT * share * float(np.abs(slope).max()) + 1e-9
    return f"{len(examples)} conversations, {memory}", differences(one, other, ONE_LOGPROB, sizes)


def pair_of(draw: random.Random, rng: np.random.Generator) -> RenderedPair:
    prompt, both, chosen, rejected = (
        rng.integers(0, VOCABULARY, draw.choice(sizes)).astype(np.int32)
        for sizes in ([1, 2, 9, 30], [0, 0, 3], [1, 2, 8, 20], [1, 2, 8, 20])
    )
    form = draw.random()
    if form < 0.15:
        rejected = np.concatenate([chosen, rejected])  # chosen is the beginning of rejected
    elif form < 0.3:
        chosen = np.concatenate([rejected, chosen])
    elif form < 0.4:  # only the last token differs
        rejected = chosen.copy()
        rejected[-1] = (rejected[-1] + 1) % VOCABULARY
    return RenderedPair(prompt, np.concatenate([both, chosen]), np.concatenate([both, rejected]))


def section_of(draw: random.Random) -> Dpo:
    loss = draw.choice(list(LOSSES))
    options: dict[str, Any] = {
        "loss": loss,
        "beta": draw.choice([0.01, 0.1, 2.0]),
        "sft_weight": draw.choice([0.0, 0.0, 0.5]),
        "ld_alpha": draw.choice([None, 0.0, 0.3, 1.0]),
    }
    if LOSSES[loss].smoothing:
        options["label_smoothing"] = draw.choice([0.0, 0.1, 0.3])
    if LOSSES[loss].divergence:
        options["f_divergence"] = draw.choice(["reverse_kl", "forward_kl", "js", "alpha"])
        if options["f_divergence"] == "alpha":
            options["f_alpha"] = draw.choice([0.0, 0.5, 1.0, 2.0])
    return Dpo(**options)


def dpo(draw: random.Random, seed: int) -> tuple[str, list[str]]:
    rng = np.random.default_rng(seed)
    pairs = [pair_of(draw, rng) for _ in range(draw.choice([1, 2, 6]))]
    if len(pairs) > 1 and draw.random() < 0.2:
        pairs[1] = pairs[0]
    section, model, memory = section_of(draw), model_of(draw, seed), memory_settings(draw)
    reference = None
    if section.reference != "none":
        with tempfile.TemporaryDirectory() as folder:
            reference = reference_of(model, pairs, Path(folder), row_tokens=draw.choice([1, 20, 512]))
        if draw.random() < 0.7:
            shift_weights(model, seed + 1)  # a policy that has left its reference
    objectives = [
        DpoObjective(pairs, reference, section, Settings(seed=1, **settings))
        for settings in ({"micro_tokens": 64}, memory)
    ]
    one, other = (step_of(model, objective, len(pairs)) for objective in objectives)
    bounds = dpo_bounds(model, objectives[0], len(pairs), one)
    return f"{len(pairs)} pairs, {section.loss}, {memory}", differences(one, other, *bounds)


def dpo_bounds(model: Any, objective: DpoObjective, size: int, one: Step) -> tuple[float, dict[str, float]]:
    """How far rounded log-probs move the loss, and each array of its gradient.

    Of n tokens, the sum of log-probs is off by ONE_LOGPROB sqrt(n), and so are reference and policy. The loss, and
    its slopes, are computed with all sums moved so far, either way. An entry of the gradient is a sum over responses
    of slope times the gradient of the response's log-prob. Each is rounded by itself, even if they cancel out.
    """
    rows = [row for row in objective.rows(np.arange(size), None) if isinstance(row, PairRow)]
    sums = [objective._sums(model, row, training=False) for row in rows]
    policy, reference, lengths = objective._whole_step(rows, sums)
    off = 2 * ONE_LOGPROB * mx.sqrt(lengths)  # (P, 2), of policy and reference together

    def loss(policy: mx.array) -> mx.array:
        return objective._losses(policy, reference, lengths).mean()

    value, slopes = loss(policy), mx.grad(loss)(policy)
    moved, steeper = 0.0, mx.zeros_like(slopes)
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
        there = policy + off * mx.array(signs)
        moved = max(moved, abs(float(loss(there) - value)))
        steeper = mx.maximum(steeper, mx.abs(mx.grad(loss)(there) - slopes))
    weight = objective._section.sft_weight
    loss_bound = moved + weight * ONE_LOGPROB + 4e-7 * abs(one[0])
    sizes = dict.fromkeys(one[1], 1e-9)
    order = [(row, place) for row in rows for place in range(len(row.pairs))]
    for row, place in order:
        index = row.indices[place]
        for side in range(2):
            largest = _response_gradient(model, objective, row, place, side)
            slope = abs(float(slopes[index, side])) + (weight / size if side == 0 else 0.0)
            for name, entry in largest.items():
                sizes[name] += entry * (GRADIENT * slope + float(steeper[index, side]))
    return loss_bound, sizes


def _response_gradient(model: Any, objective: DpoObjective, row: PairRow, place: int, side: int) -> dict[str, float]:
    """The largest entry of each array in the gradient of one response's summed log-prob."""
    weights = trainable(model)

    def total(weights: dict[str, mx.array]) -> mx.array:
        set_weights(model, weights)
        return objective._sums(model, row, training=True)[0][place, side]

    gradient = mx.grad(total)(weights)
    mx.eval(gradient)
    set_weights(model, weights)
    return {name: float(mx.abs(array).max()) for name, array in tree_flatten(gradient)}


def exam(draw: random.Random, seed: int) -> tuple[str, list[str]]:
    rng, model = np.random.default_rng(seed), model_of(draw, seed)
    sizes = [draw.choice([1, 2, 3]) for _ in range(4)] if draw.random() < 0.4 else [1] * 4
    letters = tuple(tuple(int(t) for t in rng.integers(0, VOCABULARY, size)) for size in sizes)
    before = rng.integers(0, VOCABULARY, draw.choice([0, 1, 5, 60]))
    prompts: list[Prompt] = []
    for _ in range(draw.choice([1, 2, 7])):
        question = rng.integers(0, VOCABULARY, draw.choice([1, 1, 3, 20, 90]))
        tokens = np.concatenate([before, question])
        if prompts and draw.random() < 0.3:  # the same question, or one that goes on
            tokens = np.concatenate([prompts[-1].tokens, draw.choice([question[:0], question])])
        prompts.append(Prompt(tokens[-200:].astype(np.int32), letters, draw.random() < 0.2))
    micro_tokens = draw.choice([1, 3, 17, 64, 4096])
    scores = letter_logprobs(model, prompts, micro_tokens=micro_tokens)
    lines = []
    for prompt, row in zip(prompts, scores, strict=True):
        for letter, score in zip(letters, row, strict=True):
            alone = own_logprobs(model, np.concatenate([prompt.tokens, letter]))[-len(letter) :].sum()
            if not abs(alone - score) <= ONE_LOGPROB * len(letter) ** 0.5 + LOGPROBS * abs(alone):
                lines.append(f"letter {letter} after {len(prompt.tokens)} tokens: {score!r} and alone {alone!r}")
    return f"{len(prompts)} prompts, micro_tokens {micro_tokens}", lines


KINDS: dict[str, Callable[[random.Random, int], tuple[str, list[str]]]] = {"sft": sft, "dpo": dpo, "eval": exam}


def search(kind: str, seconds: float, seed: int) -> int:
    """The number of configurations whose results differ; prints each and the count."""
    began, tried, wrong = time.monotonic(), 0, 0
    while time.monotonic() - began < seconds:
        what, lines = KINDS[kind](random.Random(seed + tried), seed + tried)
        if lines:
            wrong += 1
            print(f"{kind} --seed {seed + tried}: {what}", *lines, sep="\n    ", flush=True)
        tried += 1
    print(f"{kind}: {tried} configurations, {wrong} with a difference", flush=True)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=120, help="for each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration; the others follow")
    arguments = parser.parse_args(argv)
    run = partial(search, seconds=arguments.seconds, seed=arguments.seed)
    return 1 if sum(run(kind) for kind in arguments.kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
