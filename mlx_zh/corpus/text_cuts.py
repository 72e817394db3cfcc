"""Rendered texts that are cut where replies begin and end, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_zh.corpus.encoding import Part, PieceEncoder, Tokens
from mlx_zh.corpus.layout import Layout
from mlx_zh.corpus.stand_ins import StandIns


@dataclass(frozen=True, slots=True)
class Cut:
    """A rendered text, cut where replies begin and end: every second piece is a reply."""

    pieces: list[str]
    guarded: list[list[Part]] | None  # the pieces with contents marked, if a message spells a control token
    source: str

    def last(self) -> Cut:
        """The last piece alone."""
        return Cut(self.pieces[-1:], self.guarded and self.guarded[-1:], self.source)


def encode_cuts(encoder: PieceEncoder, cuts: Sequence[Cut]) -> list[list[Tokens]]:
    """Tokens of each piece of each text."""
    plain = iter(encoder.encode([cut.pieces for cut in cuts if cut.guarded is None]))
    return [
        next(plain) if cut.guarded is None else encoder.encode_guarded(cut.guarded, source=cut.source) for cut in cuts
    ]


def guarded(pieces: list[str], standins: StandIns, source: str) -> Cut:
    """The pieces, with the control tokens that messages spell as content."""
    return Cut(pieces, [standins.parts(piece) for piece in pieces] if standins else None, source)


def edges_of(text: str, spans: Sequence[tuple[int, int]], to_end: bool) -> list[int]:
    """Where pieces end: at the start and end of each reply, and with `to_end` at the end of the text."""
    edges = [edge for span in spans for edge in span]
    return [*edges, len(text)] if to_end else edges


def pieces_of(text: str, edges: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise((0, *edges))]


def parts_of(layout: Layout, contents: Sequence[str], edges: Sequence[int]) -> list[list[Part]]:
    """The pieces of the text, each as parts that are either content or the template's own text."""
    parts: list[Part] = [(layout.literals[0], False)]
    for content, literal in zip(contents, layout.literals[1:], strict=True):
        parts += [(content, True), (literal, False)]
    pieces: list[list[Part]] = []
    position, rest = 0, iter(parts)
    text, is_content = next(rest)
    for edge in edges:
        piece: list[Part] = []
        while position < edge:
            taken = text[: edge - position]
            piece.append((taken, is_content))
            position += len(taken)
            text = text[len(taken) :]
            if not text:
                text, is_content = next(rest, ("", False))
                while not text and position < edge:
                    text, is_content = next(rest)
        pieces.append(piece)
    return pieces
