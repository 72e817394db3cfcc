"""Where the tokens of a document are cut, so that each piece fits into a row of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_BLANK_LINES = ("\n\n", "\r\n\r\n")
_SENTENCE_ENDS = tuple("。！？!?…．；;") + tuple(f"{end}{mark}" for end in "。！？!?…．" for mark in "”’」』）)\"'")


def cut_tokens(
    text: str, tokens: Sequence[int], spans: Sequence[tuple[int, int]], room: int | None
) -> Iterator[Sequence[int]]:
    """The tokens (T,) in pieces of at most `room`, in order, each token once.

    A piece ends at a blank line in the second half of its room, else at the end of a line, else of a sentence, else
    between two characters. `spans` (S,) are the characters of `text` that the first S tokens stand for; one more
    token may follow them (EOS).
    """
    start, total = 0, len(tokens)
    while room is not None and total - start > room:
        # The next piece gets two tokens at least, because the first one of a piece may not be learned.
        stop = max(min(start + room, total - 2), start + 1)
        end = _end(text, spans, start, stop)
        yield tokens[start:end]
        start = end
    yield tokens[start:]


def _end(text: str, spans: Sequence[tuple[int, int]], start: int, stop: int) -> int:
    """The number of the first token of the next piece: at most `stop`."""
    half = start + (stop - start) // 2
    line = sentence = whole = 0
    for place in range(stop, min(start + 1, stop - 1), -1):
        at = spans[place][0]
        if at < spans[place - 1][1]:  # the two tokens share a character
            continue
        if place < half and line:
            return line
        whole = whole or place
        if text.endswith("\n", 0, at):
            if place >= half and text.endswith(_BLANK_LINES, 0, at):
                return place
            line = line or place
        elif not sentence and text.endswith(_SENTENCE_ENDS, 0, at):
            sentence = place
    return line or sentence or whole or stop
