"""Time to the first token of the fifth turn of a chat, here and in mlx_lm.chat.

    python benchmarks/chat_turn.py [--repeats 5] [--turns 5] [--answer 48] [--device gpu] [--json FILE]

The same questions, each answered greedily with so many tokens, by the same weights, taking turns. mlx_lm.chat keeps
one cache and feeds it each question with the template's beginning (BOS, system message) again, so that from the
second turn on its model reads something that no template says; here the whole conversation is rendered anew and the
cache kept as far as it agrees. The third side renders anew and keeps nothing, as a server without sessions does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import measuring

# isort: split
import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.models.generate import GenerationSession, Sampling
from mlx_zh.models.load import LoadedModel

QUESTIONS = (
    "请介绍一下端午节的来历，并说说南方和北方的习俗有什么不同。",
    "那么中秋节呢？请用同样的方式说一说。",
    "这两个节日里，哪一个更适合全家一起出门旅行？为什么？",
    "如果要给外国朋友写一封信介绍它们，应该怎样开头？",
    "请把上面说过的内容归纳成三句话，每句不超过二十个字。",
    "再给这三句话起一个标题。",
    "标题里不要出现“节”字。",
    "最后把标题和三句话翻译成英文。",
)


@dataclass(frozen=True)
class Turn:
    """The last turn of a chat: seconds to its first token, and tokens that were computed for it."""

    seconds: float
    prefilled: int


def here(loaded: LoadedModel, turns: int, answer: int, *, keep: bool = True) -> Turn:
    """This program's chat; without `keep`, nothing of the cache is used again."""
    renderer = Renderer(loaded.tokenizer)
    session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
    messages: list[Message] = []
    for number, question in enumerate(QUESTIONS[:turns], start=1):
        messages.append(Message("user", question))
        if not keep:
            session.reset()
        start = time.perf_counter()
        prompt = renderer.prompt(messages)
        rendering = time.perf_counter() - start
        pieces = list(session.stream(prompt, Sampling(0.0, 1.0, answer if number < turns else 1)))
        messages.append(Message("assistant", "".join(pieces)))
    found = session.statistics
    return Turn(rendering + found.seconds_to_first, found.prompt_new)


def mlx_lm_chat(loaded: LoadedModel, turns: int, answer: int) -> Turn:
    """The loop of mlx_lm.chat, without its screen."""
    tokenizer = TokenizerWrapper(loaded.tokenizer, eos_token_ids=list(loaded.eos_token_ids))
    cache = make_prompt_cache(loaded.model)
    for number, question in enumerate(QUESTIONS[:turns], start=1):
        start = time.perf_counter()
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        first = 0.0
        for _ in stream_generate(
            loaded.model,
            tokenizer,
            prompt,
            max_tokens=answer if number < turns else 1,
            sampler=make_sampler(0.0),
            prompt_cache=cache,
        ):
            first = first or time.perf_counter() - start
    return Turn(first, len(prompt))


SIDES: dict[str, Callable[[LoadedModel, int, int], Turn]] = {
    "mlx-zh": here,
    "mlx_lm.chat": mlx_lm_chat,
    "everything anew": lambda loaded, turns, answer: here(loaded, turns, answer, keep=False),
}


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--turns", type=int, default=5, choices=range(1, len(QUESTIONS) + 1))
    parser.add_argument("--answer", type=int, default=48, help="tokens of each answer")
    arguments = parser.parse_args()
    loaded = measuring.load(arguments)
    found: dict[str, list[Turn]] = {name: [] for name in SIDES}
    for number in range(arguments.repeats + 1):
        for name, side in SIDES.items():
            mx.clear_cache()
            turn = side(loaded, arguments.turns, arguments.answer)
            if number:  # the first round warms up
                found[name].append(turn)
    print(f"{arguments.model}, turn {arguments.turns}, {arguments.answer} tokens an answer")
    figures = {}
    for name, side in found.items():
        seconds = measuring.median(turn.seconds for turn in side)
        ratio = measuring.median(turn.seconds / own.seconds for turn, own in zip(side, found["mlx-zh"], strict=True))
        figures[name] = {"seconds_to_first": seconds, "prefilled_tokens": side[0].prefilled, "times": ratio}
        print(f"{name:18}{seconds:8.3f} s to the first token, {side[0].prefilled:5} tokens computed, {ratio:.2f}x")
    measuring.write(arguments.json, measuring.about(arguments), figures)


if __name__ == "__main__":
    main()
