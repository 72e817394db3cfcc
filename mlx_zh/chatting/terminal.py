"""What the user sees and types: streamed text, dim notes, columns of Chinese text, a line editor."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from wcwidth import iter_graphemes, wcswidth

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

# A model may emit anything; escape sequences would let it repaint the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# These may not begin a line (a shortened list of JIS X 4051 / CLREQ).
_CLOSING = frozenset("，。、；：！？）》」』】〕…—·”’,.;:!?)]}")
NARROWEST_COLUMN = 30


def without_controls(text: str) -> str:
    """What a terminal shows and does not obey."""
    return _CONTROL.sub("", text)


@dataclass
class Screen:
    """Output to a terminal, or to anything that is written to."""

    stream: TextIO
    colour: bool = False
    live: bool = False  # a terminal, where a line can be rewritten
    fixed_width: int | None = None

    @classmethod
    def on(cls, stream: TextIO) -> Screen:
        """The screen behind `stream`, with colours unless NO_COLOR or a dumb terminal forbids them."""
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
        return cls(stream, colour=live and not os.environ.get("NO_COLOR"), live=live)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self.fixed_width or shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """Text as it arrives, without control characters."""
        self.stream.write(without_controls(text))
        self.stream.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def note(self, text: str) -> None:
        """A dim line: about the program, not part of the conversation."""
        self._styled("2", text)

    def error(self, text: str) -> None:
        self._styled("31", text)

    def heading(self, text: str) -> None:
        self._styled("1", text)

    def progress(self, text: str) -> None:
        """A line that the next one replaces; nothing where lines cannot be rewritten."""
        if self.live:
            shown = fit_width(without_controls(text), self.width - 1)
            self.stream.write(f"\r\x1b[K\x1b[2m{shown}\x1b[0m" if self.colour else f"\r\x1b[K{shown}")
            self.stream.flush()

    def done(self) -> None:
        """Take the progress line away."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _styled(self, code: str, text: str) -> None:
        for line in wrap(text, self.width) if self.live else [without_controls(text)]:
            self.stream.write(f"\x1b[{code}m{line}\x1b[0m\n" if self.colour else line + "\n")
        self.stream.flush()


def text_width(text: str) -> int:
    """Columns that `text` takes in a terminal; a Chinese character takes two."""
    return max(0, wcswidth(without_controls(text)))


def fit_width(text: str, width: int) -> str:
    """As much of `text` as fits into `width` columns."""
    shown, used = [], 0
    for grapheme in iter_graphemes(text):
        used += text_width(grapheme)
        if used > width:
            break
        shown.append(grapheme)
    return "".join(shown)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns. Breaks at spaces and beside Chinese characters, never before a 。"""
    lines: list[str] = []
    for paragraph in _CONTROL.sub("", text.expandtabs(4)).split("\n"):
        line, used = "", 0
        for piece in _pieces(paragraph, width):
            columns = text_width(piece.rstrip())
            if line and used + columns > width:
                lines.append(line.rstrip())
                line, used = "", 0
                if piece.isspace():
                    continue
            line += piece
            used += text_width(piece)
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str, width: int) -> Iterator[str]:
    """What stays together on a line: a word with its spaces, a Chinese character with what closes it."""
    piece, wide = "", False
    for grapheme in iter_graphemes(paragraph):
        now_wide = text_width(grapheme) > 1
        glued = grapheme in _CLOSING or grapheme.isspace() or not (wide or now_wide or piece.endswith(" "))
        if piece and (not glued or text_width(piece) + text_width(grapheme) > width):
            yield piece
            piece = ""
        piece += grapheme
        if grapheme not in _CLOSING and not grapheme.isspace():
            wide = now_wide
        elif not piece.strip():
            wide = False
    if piece:
        yield piece


def side_by_side(left: str, right: str, width: int, headings: tuple[str, str]) -> list[str] | None:
    """Two texts in two columns, or None where `width` leaves less than 30 columns for each."""
    column = (width - 3) // 2
    if column < NARROWEST_COLUMN:
        return None
    sides = [
        [*wrap(heading, column), "─" * column, *wrap(text, column)]
        for heading, text in zip(headings, (left, right), strict=True)
    ]
    height = max(len(side) for side in sides)
    padded = [side + [""] * (height - len(side)) for side in sides]
    return [f"{a}{' ' * (column - text_width(a))} │ {b}".rstrip() for a, b in zip(*padded, strict=True)]


class LineEditor:
    """Reads one message at a time, of one line or many, and remembers them across sessions."""

    def __init__(self, history_file: Path, commands: list[str]) -> None:
        self._session = _prompt_session(history_file, commands)

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D."""
        return plain(self._session.prompt())


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """While the program writes, keys are kept for the next prompt instead of appearing in the answer."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def plain(text: str) -> str:
    '''The message in what was typed: without the marks of a """ block.'''
    text = text.strip()
    if len(text) >= 6 and text.startswith('"""') and text.endswith('"""'):
        return text[3:-3].strip("\n")
    return text


def unfinished(text: str) -> bool:
    '''Whether Enter should begin a new line: after a backslash, and inside a """ block.'''
    text = text.strip()
    in_block = text.startswith('"""') and (len(text) < 6 or not text.endswith('"""'))
    return in_block or text.endswith("\\")


def _prompt_session(history_file: Path, commands: list[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.styles import Style

    class LastingHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    history: History = InMemoryHistory()
    with suppress(OSError):
        history_file.parent.mkdir(parents=True, exist_ok=True)
        history_file.touch(mode=0o600)
        history = LastingHistory(str(history_file))
    return PromptSession(
        FormattedText([("class:prompt", "❯ ")]),
        prompt_continuation=FormattedText([("class:continuation", "… ")]),
        placeholder=FormattedText([("class:placeholder", "输入消息，/help 看帮助 · a message, or /help")]),
        style=Style.from_dict({"prompt": "bold ansigreen", "continuation": "ansigray", "placeholder": "ansigray"}),
        multiline=True,
        key_bindings=_key_bindings(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        enable_open_in_editor=True,
        history=history,
    )


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.filters import completion_is_selected
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter", filter=~completion_is_selected)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not unfinished(buffer.text):
            buffer.validate_and_handle()
            return
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
        buffer.newline(copy_margin=False)

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
