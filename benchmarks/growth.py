"""How the cost of a step grows: with the length of sequences, the batch, the vocabulary, and the number of pairs.

    python benchmarks/growth.py [--axis length] [--layers 8] [--repeats 3] [--device gpu] [--json FILE]

Each value is a step of random tokens over a random model of SmolLM2's shape (on a GPU of Llama-3.1-8B's, 4-bit) cut
to so many layers, here and in mlx-lm's trainer, taking turns; pairs are compared with mlx-lm-lora where it is
installed (pip install --no-deps mlx-lm-lora). Half of each sequence is scored. Layers are not checkpointed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measuring
from sft_step import our_step, peer_step

# isort: split
import numpy as np

from mlx_zh.corpus.rendered import Rendered, RenderedPair
from mlx_zh.models.load import LoadedModel

Step = Callable[[list[int]], None]


@dataclass(frozen=True)
class Point:
    """A step to measure."""

    length: int = 128
    examples: int = 8
    vocabulary: int = 32_000


AXES: dict[str, tuple[Point, ...]] = {
    "length": tuple(Point(length=n, examples=2) for n in (64, 128, 256, 512, 1024, 2048)),
    "examples": tuple(Point(examples=n) for n in (1, 2, 4, 8, 16)),
    "vocabulary": tuple(Point(vocabulary=n) for n in (1_000, 8_000, 32_000, 64_000, 128_256)),
    "pairs": tuple(Point(examples=n) for n in (1, 2, 4, 8, 16)),
}


def model(arguments: Any, vocabulary: int) -> LoadedModel:
    """A random model with that vocabulary."""
    shape = measuring.LLAMA31_8B if arguments.device == "gpu" else measuring.SMOLLM2
    return measuring.random_model(shape | {"vocab_size": vocabulary, "num_hidden_layers": arguments.layers})


def sft_sides(loaded: LoadedModel, point: Point) -> dict[str, Step]:
    rng = np.random.default_rng(0)
    trained = np.arange(point.length) >= point.length // 2
    examples = [Rendered(_tokens(rng, point), trained, False) for _ in range(point.examples)]
    ours = our_step(loaded, examples, False, micro_tokens=point.length * point.examples)
    return {"mlx-zh": ours, "mlx-lm": peer_step(loaded, examples, False)}


def dpo_sides(loaded: LoadedModel, point: Point) -> dict[str, Step]:
    """Prompts of half the length, and two answers of half the length each."""
    from dpo_step import our_step as ours
    from dpo_step import peer_step as peer

    rng = np.random.default_rng(0)
    half = Point(point.length // 2, point.examples, point.vocabulary)
    pairs = [RenderedPair(*(_tokens(rng, half) for _ in range(3))) for _ in range(point.examples)]
    return {
        "mlx-zh": ours(loaded, pairs, with_reference=False, checkpoint=False),
        "mlx-lm-lora": peer(loaded, pairs, checkpoint=False),
    }


def _tokens(rng: np.random.Generator, point: Point) -> np.ndarray:
    return rng.integers(0, point.vocabulary, point.length).astype(np.int32)


def main() -> None:
    parser = measuring.parser(__doc__, repeats=3)
    parser.add_argument("--axis", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    measuring.choose_device(arguments)
    found: dict[str, Any] = {}
    for axis in arguments.axis:
        if axis == "pairs" and importlib.util.find_spec("mlx_lm_lora") is None:
            print("\npairs: left out, for mlx-lm-lora is not installed")
            continue
        peer = "mlx-lm-lora" if axis == "pairs" else "mlx-lm"
        print(f"\n{axis:>10}{'mlx-zh':>20}{peer:>20}{'speed':>9}{'memory':>9}")
        for point in AXES[axis]:
            loaded = model(arguments, point.vocabulary)
            sides = (dpo_sides if axis == "pairs" else sft_sides)(loaded, point)
            members = [list(range(point.examples))] * arguments.repeats
            figures = measuring.medians(measuring.take_turns(sides, members), against=peer)
            value = point.examples if axis == "pairs" else getattr(point, axis)
            cells = [f"{side['seconds']:.3f} s {side['gb']:.2f} GB" for side in figures.values()]
            ours = figures["mlx-zh"]
            print(f"{value:>10}{cells[0]:>20}{cells[1]:>20}{ours['speed']:8.2f}x{ours['memory']:8.2f}x", flush=True)
            found.setdefault(axis, {})[value] = figures
    measuring.write(arguments.json, measuring.about(arguments, ("mlx-lm-lora",)), found)


if __name__ == "__main__":
    main()
