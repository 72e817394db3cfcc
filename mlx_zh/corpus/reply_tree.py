"""Replies as the model writes them, for templates that write a reply otherwise once others follow it.

Qwen3's template drops the reasoning of earlier turns, and with thinking off its generation prompt holds an empty
`<think></think>` that no earlier turn has. So a reply in the text of the whole conversation does not stand after what
the model sees when it writes that reply. Here each learned reply stands after exactly its own generation prompt:

    trunk      [ question 1 ]──[ reply 1 as history, question 2 ]──[ header 2, reply 2 ]
                     └─[ header 1, reply 1 ]

The trunk is the text up to the last learned reply. A reply that stands in it as the model writes it is learned there;
each other one is a branch, which leaves the trunk at the end of the question before it. Where a template keeps the
reasoning before a call until the exchange with tools is over, the exchange is a smaller tree beside the trunk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mlx_zh.corpus.encoding import Tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as the model writes it.

    `head` ends its generation prompt, `aside` is what is not learned of it, `learned` ends with its end of turn.
    """

    at: int  # where it leaves the trunk, or stands in it
    head: str
    aside: str
    learned: str
    inside: bool  # whether it stands in the trunk

    @property
    def texts(self) -> tuple[str, str, str]:
        """All of the reply, in three parts."""
        return self.head, self.aside, self.learned


@dataclass(frozen=True, slots=True)
class Side:
    """The tree of an exchange with tools that the trunk writes otherwise: without the reasoning before its calls."""

    at: int  # where it leaves the trunk, at the end of the question
    tree: ReplyTree


@dataclass(frozen=True, slots=True)
class _Step:
    """Texts of a trunk, or of a reply, that follow each other."""

    texts: tuple[str, ...]
    reply: Reply | None
    level: int  # 0: of the trunk, 1: of what leaves it, 2: of what leaves that
    leaves: bool  # whether it leaves the level below here

    def deeper(self, leaves: bool) -> _Step:
        """The same step, one level up."""
        return replace(self, level=self.level + 1, leaves=self.leaves or leaves)


@dataclass(frozen=True, slots=True)
class ReplyTree:
    """A trunk and the learned replies in it or beside it; `cuts` are other places where its tokens are cut."""

    trunk: str
    replies: tuple[Reply | Side, ...]
    cuts: tuple[int, ...]

    @property
    def last(self) -> Reply:
        """The last reply, with which the trunk ends."""
        reply = self.replies[-1]
        assert isinstance(reply, Reply)
        return reply

    def pieces(self) -> list[str]:
        """All texts that are encoded each by itself."""
        return [text for step in self._steps() for text in step.texts]

    def wholes(self) -> Iterator[tuple[list[str], list[str]]]:
        """Each run of texts of `pieces`, with the texts that stand before it."""
        before: list[list[str]] = [[]]  # of each level
        for step in self._steps():
            if step.leaves:
                before[step.level :] = [list(before[step.level - 1])]
            yield list(before[step.level]), list(step.texts)
            before[step.level] += step.texts

    def lengths(self, encoded: Sequence[Tokens]) -> list[int]:
        """How many tokens the tree has if it ends with its first, second … reply; `encoded` are those of `pieces`."""
        lengths, total = [], 0
        tokens = iter(encoded)
        for step in self._steps():
            total += sum(len(next(tokens)) for _ in step.texts)
            if step.reply is not None:
                lengths.append(total)
        return lengths

    def arrays(self, encoded: Sequence[Tokens], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The tree up to its reply number `count`: tokens (T,), which are learned (T,), and its segments (B, 2).

        A segment is its first token and its parent, -1 for the root. None instead if there is only one segment.
        """
        runs: list[Tokens] = []
        learned: list[bool] = []
        segments = [(0, -1)]  # first run, parent
        last = [0]  # segment of each level
        tokens = iter(encoded)
        left = count
        for step in self._steps():
            left -= step.reply is not None
            if step.leaves:
                follows = left == 0 and last[step.level - 1] == len(segments) - 1  # nothing else does
                parent = None if follows or not runs else last[step.level - 1]
            else:
                parent = last[step.level] if last[step.level] != len(segments) - 1 else None
            if parent is not None:
                segments.append((len(runs), parent))
            last[step.level :] = [len(segments) - 1]
            runs += [next(tokens) for _ in step.texts]
            learned += [False] * (len(step.texts) - 1) + [step.reply is not None]
            if left == 0:
                break
        sizes = np.array([len(run) for run in runs])
        edges = np.concatenate([[0], np.cumsum(sizes)])
        joined = np.concatenate([np.asarray(run, dtype=np.int32) for run in runs])
        places = np.array([(edges[run], parent) for run, parent in segments], dtype=np.int32)
        return joined, np.repeat(np.array(learned, dtype=bool), sizes), places if len(places) > 1 else None

    def beyond(self, start: int) -> ReplyTree:
        """The tree without the text before `start`, where no reply stands."""
        replies = tuple(replace(reply, at=reply.at - start) for reply in self.replies)
        return ReplyTree(self.trunk[start:], replies, tuple(cut - start for cut in self.cuts if cut > start))

    def _steps(self) -> Iterator[_Step]:
        """Runs of the trunk and the replies, each as texts."""
        cursor = 0
        for reply in self.replies:
            inner = self.cuts[bisect_right(self.cuts, cursor) : bisect_left(self.cuts, reply.at)]
            bounds = [cursor, *inner, reply.at]
            if reply.at > cursor:
                yield _Step(tuple(self.trunk[a:b] for a, b in pairwise(bounds)), None, 0, False)
            cursor = reply.at
            if isinstance(reply, Side):
                begun = False  # a reply before the side's own trunk leaves this one too
                for step in reply.tree._steps():
                    yield step.deeper(leaves=not begun) if begun or step.level == 0 else step
                    begun |= step.level == 0
            elif reply.inside:
                yield _Step(reply.texts, reply, 0, False)
                cursor += sum(map(len, reply.texts))
            else:
                yield _Step(reply.texts, reply, 1, True)
