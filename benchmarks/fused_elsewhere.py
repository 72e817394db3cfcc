"""Do other programs say of fused models what base + adapter says here?

    mlx-zh fuse RECIPE 'export.formats=[mlx, hf, gguf]' export.gguf_type=f16
    pip install torch llama-cpp-python
    python benchmarks/fused_elsewhere.py RECIPE [--prompts N] [--tokens 24]

Each program gets the same prompts as token ids. Compared with base + adapter in float32 here: mean KL divergence of
the next token over all positions of prompt and answer, agreement of the likeliest one, the largest difference of a
logit as a share of the largest logit, and how many greedy answers are the same. A program that is not installed is
left out, and said. On a CPU mlx-lm takes minutes for a quantized model: ask one prompt there.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.load import load_model
from mlx_zh.recipe import load_recipe

Logits = Callable[[Sequence[int]], np.ndarray]  # ids (S,) to logits (S, V)
Greedy = Callable[[Sequence[int], int], list[int]]  # prompt and how many, to the tokens that follow


def mlx_program(model: Any) -> tuple[Logits, Greedy]:
    """Any MLX model, decoded by mlx_lm's own generation loop."""

    def logits(ids: Sequence[int]) -> np.ndarray:
        return np.array(model(mx.array([ids]), cache=make_prompt_cache(model))[0].astype(mx.float32))

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        steps = generate_step(mx.array(ids), model, max_tokens=count)
        return [int(token) for token, _ in steps]

    return logits, greedy


def transformers_program(folder: Path) -> tuple[Logits, Greedy]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        with torch.no_grad():
            whole = model.generate(torch.tensor([list(ids)]), max_new_tokens=count, do_sample=False)[0]
        return [int(token) for token in whole[len(ids) :]]

    return logits, greedy


def llama_cpp_program(path: Path) -> tuple[Logits, Greedy]:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=1024, logits_all=True, verbose=False)

    def logits(ids: Sequence[int]) -> np.ndarray:
        model.reset()
        model.eval(list(ids))
        return np.array(model.scores[: len(ids)])

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        model.reset()
        model.eval(list(ids))
        for _ in range(count):
            found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(found[-1:])
        return found

    return logits, greedy


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def compare(
    name: str, program: tuple[Logits, Greedy], prompts: list[list[int]], answers: list[list[int]], truths: list[Any]
) -> None:
    logits, greedy = program
    kl, agreed, largest, same = [], [], 0.0, 0
    for prompt, answer, truth in zip(prompts, answers, truths, strict=True):
        found = logits([*prompt, *answer])
        size = min(found.shape[-1], truth.shape[-1])
        p, q = log_softmax(truth[:, :size]), log_softmax(found[:, :size])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agreed.append(found[:, :size].argmax(-1) == truth[:, :size].argmax(-1))
        largest = max(largest, float(np.abs(found[:, :size] - truth[:, :size]).max() / np.abs(truth).max()))
        same += greedy(prompt, len(answer)) == answer
    print(
        f"{name:24} KL {np.concatenate(kl).mean():.2e}  top-1 {np.concatenate(agreed).mean():7.2%}  "
        f"logits within {largest:.2e}  greedy {same} of {len(prompts)} the same",
        flush=True,
    )


def until(ends: Collection[int], tokens: list[int]) -> list[int]:
    """An answer up to its end-of-turn token, that included."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--prompts", type=int, help="so many of the recipe's evaluate.prompts (default: all)")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    arguments = parser.parse_args()

    recipe = load_recipe(arguments.recipe)
    run = recipe.run_folder()
    adapter = next(run / stage / "adapters" for stage in ("dpo", "sft") if (run / stage / "adapters").is_dir())
    mx.set_default_device(mx.cpu)  # where weights become plain float32
    loaded = load_model(recipe.model.path)
    load_adapter(loaded.model, adapter)
    loaded.model.eval()
    renderer = Renderer(loaded.tokenizer, date_string=recipe.data.date_string)
    texts = recipe.evaluate.prompts[: arguments.prompts]
    prompts = [list(map(int, renderer.prompt([Message("user", text)]))) for text in texts]
    logits, greedy = mlx_program(loaded.model)
    answers = [until(loaded.eos_token_ids, greedy(prompt, arguments.tokens)) for prompt in prompts]
    truths = [logits([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    print(f"{len(prompts)} prompts, up to {arguments.tokens} tokens each, adapter {adapter}")

    fused = run / "fused"
    programs: dict[str, tuple[str, Path, Callable[[Path], tuple[Logits, Greedy]]]] = {
        "transformers": ("torch", fused / "hf", transformers_program),
    }
    for path in sorted((fused / "gguf").glob("*.gguf")):
        programs[f"llama.cpp, {path.stem[-5:]}"] = ("llama_cpp", path, llama_cpp_program)
    programs["mlx-lm"] = "mlx_lm", fused / "mlx", lambda folder: mlx_program(mlx_lm.load(str(folder))[0])
    for name, (package, place, program) in programs.items():
        if importlib.util.find_spec(package) is None or not place.exists():
            print(f"{name:24} left out: {package} is not installed or {place} is not there")
            continue
        compare(name, program(place), prompts, answers, truths)


if __name__ == "__main__":
    main()
