"""Tokens a second of several answers to each prompt, against `mlx_lm.batch_generate` and one answer after another.

    python benchmarks/sampling.py [--repeats 5] [--prompts 8] [--answers 4] [--tokens 48] [--rows 32] [--device gpu]

The same prompts and weights, temperature 0.8 and top-p 0.95, taking turns. No token ends an answer, so that every
side generates as many tokens. mlx-lm gets each prompt once for every answer, as its function asks for.
"""

from __future__ import annotations

import measuring

# isort: split
import mlx.core as mx
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.models.batched import BatchedGeneration, Question
from mlx_zh.models.generate import Sampling
from mlx_zh.models.load import LoadedModel

SAMPLING = Sampling(0.8, 0.95)
SUBJECTS = ("端午节", "中秋节", "春节", "元宵节", "清明节", "重阳节", "七夕", "冬至")
QUESTION = "请介绍一下{}的来历，并说说南方和北方的习俗有什么不同。"
PASSAGE = "参考材料：各地过节的风俗与当地的气候、物产和历史有关，同一个节日在不同的地方有不同的食物和活动。"


class Endless:
    """What `batch_generate` uses of a tokenizer, without tokens that end an answer."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, tokens: list[int]) -> str:
        return ""


def prompts_of(loaded: LoadedModel, count: int) -> list[list[int]]:
    """Prompts of 60 to 300 tokens: the question alone, or with a passage once or several times."""
    renderer = Renderer(loaded.tokenizer)
    texts = [PASSAGE * (i % 4) + QUESTION.format(SUBJECTS[i % len(SUBJECTS)]) for i in range(count)]
    return [renderer.prompt([Message("user", text)]) for text in texts]


def here(loaded: LoadedModel, prompts: list[list[int]], answers: int, tokens: int, rows: int) -> int:
    generation = BatchedGeneration(loaded.model, (), SAMPLING, rows=min(rows, answers * len(prompts)))
    asked = [Question(p, [1000 * n + i for i in range(answers)], tokens) for n, p in enumerate(prompts)]
    return sum(len(reply.tokens) for _, replies in generation.answers(asked) for reply in replies)


def batched(loaded: LoadedModel, prompts: list[list[int]], answers: int, tokens: int, rows: int) -> int:
    repeated = [prompt for prompt in prompts for _ in range(answers)]
    sampler = make_sampler(SAMPLING.temperature, SAMPLING.top_p)
    options = {"completion_batch_size": rows, "return_token_ids": True, "sampler": sampler}
    found = batch_generate(loaded.model, Endless(), repeated, max_tokens=tokens, **options)
    return sum(map(len, found.token_ids))


def one_by_one(loaded: LoadedModel, prompts: list[list[int]], answers: int, tokens: int) -> int:
    sampler = make_sampler(SAMPLING.temperature, SAMPLING.top_p)
    count = 0
    for prompt in prompts:
        for _ in range(answers):
            count += sum(1 for _ in generate_step(mx.array(prompt), loaded.model, max_tokens=tokens, sampler=sampler))
    return count


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--rows", type=int, default=32, help="answers generated together")
    arguments = parser.parse_args()
    loaded = measuring.load(arguments)
    prompts = prompts_of(loaded, arguments.prompts)
    answers, tokens, rows = arguments.answers, arguments.tokens, arguments.rows
    expected = len(prompts) * answers * tokens

    def checked(count: int) -> None:
        assert count == expected, (count, expected)

    sides = {
        "mlx-zh": lambda _: checked(here(loaded, prompts, answers, tokens, rows)),
        "mlx_lm.batch_generate": lambda _: checked(batched(loaded, prompts, answers, tokens, rows)),
        "one by one": lambda _: checked(one_by_one(loaded, prompts, answers, tokens)),
    }
    readings: dict[str, list[measuring.Reading]] = {name: [] for name in sides}
    for number in range(arguments.repeats):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            readings[name].append(measuring.read(lambda name=name: sides[name](None)))
            print(f"round {number + 1}: {name} {expected / readings[name][-1].seconds:.1f} tokens/s", flush=True)
    figures = measuring.medians(readings, "mlx-zh")
    for name, side in figures.items():
        side["tokens_per_second"] = expected / side["seconds"]
        print(f"{name:24}{side['tokens_per_second']:8.1f} tokens/s, {side['gb']:.2f} GB over the weights")
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {answers} answers of {tokens} tokens")
    measuring.show(arguments.model, figures, "mlx-zh")
    measuring.write(arguments.json, measuring.about(arguments), figures)


if __name__ == "__main__":
    main()
