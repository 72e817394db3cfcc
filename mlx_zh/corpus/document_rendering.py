"""Documents to tokens, without a template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from mlx_zh.corpus.conversation import Document
from mlx_zh.corpus.document_pieces import cut_tokens
from mlx_zh.corpus.encoding import PieceEncoder
from mlx_zh.corpus.rendered import Rendered

_CHARACTERS = 1 << 16  # of documents encoded at once: with the place of each token they take far more memory


class DocumentRenderer:
    """The tokens of documents, as `Renderer.documents` gives them."""

    def __init__(self, encoder: PieceEncoder) -> None:
        self._encoder = encoder

    def render(self, batch: Sequence[Document], max_length: int | None) -> list[list[Rendered]]:
        """The pieces of each document. Raises DataError for a text that cannot be encoded."""
        return [pieces for documents in _runs(batch) for pieces in self._cut(documents, max_length)]

    def _cut(self, documents: Sequence[Document], max_length: int | None) -> list[list[Rendered]]:
        before, end = self._frame
        encoded = self._encoder.encode_documents([d.text for d in documents], [d.source for d in documents])
        results: list[list[Rendered]] = []
        for document, (tokens, spans) in zip(documents, encoded, strict=True):
            after = end if document.ends else []
            room = None if max_length is None else max(max_length - len(before), len(after) + 1)
            pieces = []
            for piece in cut_tokens(document.text, [*tokens, *after], spans, room):
                whole = np.array([*before, *piece], dtype=np.int32)
                trained = np.ones(len(whole), dtype=bool)
                trained[0] = False
                if len(whole) > 1:  # one token alone teaches nothing
                    pieces.append(Rendered(whole, trained, truncated=False))
            results.append(pieces)
        return results

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        return self._encoder.frame()


def _runs(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    """Runs of documents with limited characters, each with one document at least."""
    start = characters = 0
    for stop, document in enumerate(documents):
        if stop > start and characters + len(document.text) > _CHARACTERS:
            yield documents[start:stop]
            start, characters = stop, 0
        characters += len(document.text)
    if start < len(documents):
        yield documents[start:]
