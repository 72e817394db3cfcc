"""Two answers at the terminal: each as it is written, and then side by side where both fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_zh.chatting.terminal import Screen, Wrapper, side_by_side, wrap

NO_ANSWER = "（没有回答 · no answer）"


@dataclass
class PairView:
    """Shows two answers under their headings.

    While they are written, one stands below the other. In the end they stand side by side if the terminal is wide
    enough and nothing of them has left the screen; else they stay as they are, so that no text is shown twice.
    """

    screen: Screen
    headings: tuple[str, str]
    _begun: dict[int, Wrapper] = field(default_factory=dict)  # by answer, in the order of writing

    def show(self, index: int, piece: str) -> None:
        """Write a piece of answer 0 or 1; "" begins it."""
        if not self.screen.live:
            return
        if index not in self._begun:
            self.end()
            self._begun[index] = Wrapper(self.screen.width)
            self.screen.heading(self.headings[index])
        self.screen.write(self._begun[index].feed(piece))

    def end(self) -> None:
        """End the last line."""
        for wrapper in self._begun.values():
            self.screen.write(wrapper.finish())

    def discard(self) -> None:
        """Take back what was shown, as far as it is still on the screen."""
        self.end()
        if self._rows() < self.screen.height:
            self.screen.erase(self._rows())

    def finish(self, left: str, right: str) -> None:
        """Show both answers whole."""
        texts = [text.strip() or NO_ANSWER for text in (left, right)]
        self.end()
        rows = side_by_side(texts[0], texts[1], self.screen.width, self.headings)
        if rows is not None and (not self.screen.live or max(self._rows(), len(rows)) < self.screen.height):
            self.screen.erase(self._rows())
            for row in rows:
                self.screen.line(row)
        elif not self.screen.live:
            for heading, text in zip(self.headings, texts, strict=True):
                self.screen.heading(heading)
                self.screen.line(text)
        elif 0 not in self._begun:
            self.screen.note(f"{self.headings[0]}：见上文 · see above")

    def _rows(self) -> int:
        """The lines of the screen that are taken; each heading takes as many as it is wrapped into."""
        headings = sum(len(wrap(self.headings[index], self.screen.width)) for index in self._begun)
        return headings + sum(wrapper.rows for wrapper in self._begun.values())
