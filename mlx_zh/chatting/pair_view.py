"""Two answers at the terminal: each as it is written, and then side by side where both fit."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_zh.chatting.terminal import Screen, rows_of, side_by_side, without_controls

NO_ANSWER = "（没有回答 · no answer）"


@dataclass
class PairView:
    """Shows two answers under their headings.

    While they are written, one stands below the other. In the end they stand side by side if the terminal is wide
    enough and nothing of them has left the screen; else they stay as they are, so that no text is shown twice.
    """

    screen: Screen
    headings: tuple[str, str]
    _written: str = ""  # what stands on the screen, without colours
    _begun: tuple[int, ...] = ()

    def show(self, index: int, piece: str) -> None:
        """Write a piece of answer 0 or 1; "" begins it."""
        if not self.screen.live:
            return
        if index not in self._begun:
            self._end_line()
            self._begun += (index,)
            self._written += self.headings[index] + "\n"
            self.screen.heading(self.headings[index])
        if piece:
            self._written += without_controls(piece)
            self.screen.write(piece)

    def finish(self, left: str, right: str) -> None:
        """Show both answers whole."""
        texts = [text.strip() or NO_ANSWER for text in (left, right)]
        self._end_line()
        rows = side_by_side(texts[0], texts[1], self.screen.width, self.headings)
        taken = rows_of(self._written, self.screen.width)
        if rows is not None and (not self.screen.live or max(taken, len(rows)) < self.screen.height):
            self.screen.erase(taken)
            for row in rows:
                self.screen.line(row)
        elif not self.screen.live:
            for heading, text in zip(self.headings, texts, strict=True):
                self.screen.heading(heading)
                self.screen.line(text)
        elif 0 not in self._begun:
            self.screen.note(f"{self.headings[0]}：见上文 · see above")

    def _end_line(self) -> None:
        if self._written and not self._written.endswith("\n"):
            self._written += "\n"
            self.screen.line()
