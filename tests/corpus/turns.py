"""Short ways to write conversations, and what of them is trained."""

from __future__ import annotations

import numpy as np

from mlx_zh.corpus.conversation import Message


def system(content: str) -> Message:
    return Message("system", content)


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


TWO_TURNS = (user("你好"), assistant("Hello 世界🙂"), user("再见"), assistant("好，今天天气很好。"))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def branches(rendered) -> list[tuple[list[int], list[int]]]:
    """For each learned branch of an example: the tokens before what is learned, and what is learned."""
    pairs = []
    for tokens, trained in rendered.paths():
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]]))).reshape(-1, 2)
        pairs += [(tokens[:start].tolist(), tokens[start:stop].tolist()) for start, stop in edges]
    return pairs


def trained_runs(tokenizer, rendered) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rendered.trained, [False]]).astype(int)))
    runs = edges.reshape(-1, 2)
    return [tokenizer.decode(rendered.tokens[start:stop]) for start, stop in runs]
