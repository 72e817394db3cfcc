"""Conversations as trees of replies, each of which stands after its own generation prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.encoding import PieceEncoder, Tokens
from mlx_zh.corpus.rendered import FIRST_EXCHANGE_OVERFLOW, NO_REPLY, NOT_TRAINED, OVERFLOW, Rendered
from mlx_zh.corpus.reply_tree import ReplyTree
from mlx_zh.corpus.reply_writer import ReplyWriter
from mlx_zh.corpus.stand_ins import StandIns
from mlx_zh.corpus.text_cuts import Cut, encode_cuts, guarded
from mlx_zh.corpus.tools import uses_tools
from mlx_zh.errors import RefusedReasoning, RefusedTools

FIRST_REPLIES = 64  # a longer conversation is rendered up to here first, to see whether max_length ends it before


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `Renderer.conversation`; `truncate`: what is too long is cut instead of dropped."""

    train_on: str
    max_length: int | None
    truncate: bool


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree of a conversation; `beyond`: others of its replies were left out because max_length ends before."""

    tree: ReplyTree
    standins: StandIns
    source: str
    ends: list[bool]  # of each learned reply: whether the conversation may end with it
    beyond: bool = False

    def cut(self) -> Cut:
        """Its pieces, to be encoded."""
        return guarded(self.tree.pieces(), self.standins, self.source)


class TreeRenderer:
    """The trees of a renderer's conversations, and their tokens. `mode`: whether the model is asked to think."""

    def __init__(self, encoder: PieceEncoder, mode: str) -> None:
        self._encoder, self._mode = encoder, mode

    def tree(
        self,
        messages: Sequence[Message],
        source: str,
        writer: ReplyWriter,
        options: Options,
        dropped: Counter[str],
    ) -> Tree | None:
        """The tree of the replies that can matter; None, counted, if there is nothing to learn."""
        replies = [k for k, message in enumerate(messages) if message.role == "assistant"]
        learned = [k for k in replies if messages[k].trained]
        if options.train_on != "assistant":
            learned = [k for k in learned if k == replies[-1]]
        if not learned:
            dropped[NOT_TRAINED if replies else NO_REPLY] += 1
            return None
        self.check_reasoning([messages[k] for k in learned], source)
        standins = self.standins(messages, source)
        written = standins.into(messages)
        ends = learned if options.train_on == "assistant" else replies
        count = FIRST_REPLIES
        while options.max_length is not None and count < len(ends):
            first = ends[:count] if options.train_on == "assistant" else [ends[count - 1]]
            tree = Tree(
                writer.tree(written, first, source=source), standins, source, may_end_after(messages, first), True
            )
            [encoded] = self.encode([tree])
            lengths = tree.tree.lengths(encoded)
            if lengths[-2 if len(lengths) > 1 else -1] > options.max_length:
                return replace(tree, beyond=True)
            count *= 2
        return Tree(
            writer.tree(written, learned, source=source), standins, source, may_end_after(messages, learned), False
        )

    def encode(self, trees: Sequence[Tree]) -> list[list[Tokens]]:
        """The tokens of each tree's pieces."""
        if self._encoder.cuts_anywhere:
            return encode_cuts(self._encoder, [tree.cut() for tree in trees])
        return [self._encode_whole(tree) for tree in trees]

    def _encode_whole(self, tree: Tree) -> list[Tokens]:
        """The same for tokenizers that encode only whole texts: each reply with all that stands before it."""
        pieces: list[Tokens] = []
        for before, texts in tree.tree.wholes():
            [encoded] = encode_cuts(self._encoder, [guarded([*before, *texts], tree.standins, tree.source)])
            pieces += encoded[len(before) :]
        return pieces

    def fitting(
        self, tree: Tree, encoded: Sequence[Tokens], options: Options, dropped: Counter[str]
    ) -> Rendered | None:
        """The tree up to the last reply with which it fits into max_length; None, counted, if none fits."""
        lengths = tree.tree.lengths(encoded)
        fits = sum(options.max_length is None or length <= options.max_length for length in lengths)
        complete = fits == len(lengths) and not tree.beyond
        while not complete and fits and not tree.ends[fits - 1]:
            fits -= 1
        if not complete and (fits == 0 or not options.truncate):
            dropped[FIRST_EXCHANGE_OVERFLOW if options.truncate else OVERFLOW] += 1
            return None
        tokens, trained, segments = tree.tree.arrays(encoded, fits)
        if options.train_on == "all":
            trained[1:] = True
        return Rendered(tokens, trained, not complete, segments)

    def check_reasoning(self, learned: Sequence[Message], source: str) -> None:
        """Raise RefusedReasoning if a learned reply has reasoning, and thinking is off."""
        if self._mode == "off" and any(message.reasoning for message in learned):
            raise RefusedReasoning(
                f"{at(source)}a reply has reasoning, and model.thinking is off, so the model never writes it; set "
                "data.reasoning: drop to leave the reasoning out, or model.thinking: on to learn it"
            )

    def standins(self, messages: Sequence[Message], source: str) -> StandIns:
        """What stands in for control tokens that the messages spell. Raises RefusedTools if they have tools too."""
        standins = StandIns(self._encoder, messages)
        if standins and uses_tools(messages):
            raise spelled_with_tools(source)
        return standins


def may_end_after(messages: Sequence[Message], replies: Sequence[int]) -> list[bool]:
    """Whether a conversation may be cut after each of these replies: a call stays with its result."""
    return [not messages[k].calls and (k + 1 == len(messages) or messages[k + 1].role != "tool") for k in replies]


def at(source: str) -> str:
    return f"{source}: " if source else ""


def spelled_with_tools(source: str) -> RefusedTools:
    return RefusedTools(
        f"{at(source)}a conversation with tools spells one of the model's control tokens; take it out of the text"
    )
