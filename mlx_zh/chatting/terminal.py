"""The chat's terminal: streamed text, notes, columns of Chinese text, and a line editor."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from wcwidth import iter_graphemes, wcswidth

from mlx_zh.errors import MlxZhError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system import escaping
from mlx_zh.system.interrupts import stop_on_interrupt

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

# Characters that must not begin a line (a part of the lists in JIS X 4051 and CLREQ).
_CLOSING = frozenset("，。、；：！？）》」』】〕…—·”’,.;:!?)]}")
NARROWEST_COLUMN = 30


def without_controls(text: str) -> str:
    """The text without the characters that a terminal would obey; a model may write any."""
    return escaping.without_controls(text, "")


@dataclass
class Screen:
    """Output to a terminal or to a file."""

    stream: TextIO
    colour: bool = False
    live: bool = False  # whether a line can be rewritten, as in a terminal
    fixed_width: int | None = None  # columns; None: those of the terminal
    fixed_height: int | None = None  # lines, likewise

    @classmethod
    def on(cls, stream: TextIO) -> Screen:
        """A screen that writes to `stream`, in colour if it is a terminal and NO_COLOR is not set."""
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
        return cls(stream, colour=live and not os.environ.get("NO_COLOR"), live=live)

    @property
    def width(self) -> int:
        """The width in columns."""
        return self.fixed_width or shutil.get_terminal_size().columns

    @property
    def height(self) -> int:
        """The height in lines."""
        return self.fixed_height or shutil.get_terminal_size().lines

    def erase(self, rows: int) -> None:
        """Take back the last `rows` lines of the terminal; the cursor is below them."""
        if rows and self.live:
            self.stream.write(f"\r\x1b[{rows}A\x1b[J")
            self.stream.flush()

    def write(self, text: str) -> None:
        """Write text at once, without control characters."""
        self.stream.write(without_controls(text))
        self.stream.flush()

    def line(self, text: str = "") -> None:
        """Write a line."""
        self.write(text + "\n")

    def note(self, text: str) -> None:
        """Write a dim line, for what is not part of the conversation."""
        self._styled("2", text)

    def error(self, text: str) -> None:
        """Write a red line, in the reader's language."""
        self._styled("31", in_readers_language(text))

    def heading(self, text: str) -> None:
        """Write a bold line."""
        self._styled("1", text)

    def progress(self, text: str) -> None:
        """Write a line that the next output replaces; does nothing if lines cannot be rewritten."""
        if self.live:
            shown = fit_width(without_controls(text), self.width - 1)
            self.stream.write(f"\r\x1b[K\x1b[2m{shown}\x1b[0m" if self.colour else f"\r\x1b[K{shown}")
            self.stream.flush()

    def done(self) -> None:
        """Clear the progress line."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _styled(self, code: str, text: str) -> None:
        for line in wrap(text, self.width) if self.live else [without_controls(text)]:
            self.stream.write(f"\x1b[{code}m{line}\x1b[0m\n" if self.colour else line + "\n")
        self.stream.flush()


def text_width(text: str) -> int:
    """The number of columns that `text` takes in a terminal; a Chinese character takes two."""
    return max(0, wcswidth(without_controls(text)))


class Wrapper:
    """Breaks text into lines of `width` columns while it is written, as `wrap` does; a word waits for its end."""

    def __init__(self, width: int) -> None:
        self._width, self._used, self._held = width, 0, ""
        self.rows = 0  # lines that are finished

    def feed(self, text: str) -> str:
        """What can be shown now."""
        first, *others = without_controls(text).replace("\t", "    ").split("\n")
        shown = self._line(first, ended=bool(others))
        for number, line in enumerate(others, start=1):
            shown += "\n"
            self.rows, self._used = self.rows + 1, 0
            shown += self._line(line, ended=number < len(others))
        return shown

    def finish(self) -> str:
        """What is still held back, with a line break if the last line has none."""
        shown = self._line("", ended=True)
        return shown + self.feed("\n") if self._used else shown

    def _line(self, text: str, *, ended: bool) -> str:
        pieces = list(_pieces(self._held + text, self._width))
        self._held = "" if ended or not pieces else pieces.pop()
        return "".join(map(self._placed, pieces))

    def _placed(self, piece: str) -> str:
        columns = text_width(piece.rstrip())
        broken = bool(self._used) and self._used + columns > self._width
        if broken:
            self.rows, self._used = self.rows + 1, 0
            piece = piece.lstrip(" ")
        if self._used + text_width(piece) > self._width:
            piece = piece.rstrip()
        self._used += text_width(piece)
        return "\n" + piece if broken else piece


def fit_width(text: str, width: int) -> str:
    """The start of `text` that fits into `width` columns."""
    shown, used = [], 0
    for grapheme in iter_graphemes(text):
        used += text_width(grapheme)
        if used > width:
            break
        shown.append(grapheme)
    return "".join(shown)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns. Breaks are at spaces and next to Chinese characters, never before a 。"""
    lines: list[str] = []
    for paragraph in without_controls(text.expandtabs(4)).split("\n"):
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
    """The parts that stay on one line: a word with its spaces, or a Chinese character with closing punctuation."""
    piece, wide = "", False
    for grapheme in iter_graphemes(paragraph):
        now_wide = text_width(grapheme) > 1
        joins = grapheme in _CLOSING or grapheme.isspace() or not (wide or now_wide or piece.endswith(" "))
        if piece and (not joins or text_width(piece) + text_width(grapheme) > width):
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
    """The lines of two texts side by side, or None if `width` leaves less than 30 columns for each."""
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
    """Reads messages of one or more lines, and keeps their history in a file."""

    def __init__(self, history_file: Path, commands: list[str], adapters: Sequence[str] = ()) -> None:
        self._session = _prompt_session(history_file, commands, adapters)

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt on Ctrl-C, EOFError on Ctrl-D."""
        return plain(self._session.prompt())

    def ask(self, question: str) -> str:
        """The answer to a question, one line that is not kept. Raises KeyboardInterrupt, EOFError."""
        from prompt_toolkit import PromptSession

        return PromptSession[str](question + " ").prompt()


_EDITORS = ("nano", "vim", "vi")  # where neither VISUAL nor EDITOR is set: the first that is installed


def edit_text(text: str) -> str:
    """The text as it is after the user edited it in VISUAL or EDITOR. Raises MlxZhError."""
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    installed = next((name for name in _EDITORS if shutil.which(name)), None)
    try:
        command = shlex.split(chosen or installed or "")
    except ValueError as problem:
        raise MlxZhError(f"EDITOR={chosen} is no command: {problem}") from problem
    if not command:
        raise MlxZhError("there is no editor: set EDITOR, for example to nano, and start the chat again")
    with tempfile.TemporaryDirectory(prefix="mlx-zh-") as folder:  # only its owner can read it
        file = Path(folder) / "answer.md"
        file.write_text(text + "\n", encoding="utf-8", errors="replace")
        try:
            with stop_on_interrupt():
                done = subprocess.run([*command, str(file)])
            edited = file.read_text(encoding="utf-8-sig")
        except OSError as problem:
            raise MlxZhError(f"the editor {command[0]} did not run: {problem.strerror or problem}") from problem
        except UnicodeDecodeError as problem:
            raise MlxZhError("the editor did not save UTF-8 text, so nothing is changed") from problem
    if done.returncode:
        raise MlxZhError(f"the editor {command[0]} ended with status {done.returncode}, so nothing is changed")
    return edited.removesuffix("\n")


@contextmanager
def unechoed_keys() -> Iterator[None]:
    """In this context typed keys are not shown in the answer; they go to the next prompt."""
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
    '''The typed message, without the quotes of a """ block.'''
    text = text.strip()
    if len(text) >= 6 and text.startswith('"""') and text.endswith('"""'):
        return text[3:-3].strip("\n")
    return text


def unfinished(text: str) -> bool:
    '''Whether Enter begins a new line: after a backslash, and inside a """ block.'''
    text = text.strip()
    in_block = text.startswith('"""') and (len(text) < 6 or not text.endswith('"""'))
    return in_block or text.endswith("\\")


def _prompt_session(history_file: Path, commands: list[str], adapters: Sequence[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.styles import Style

    from mlx_zh.chatting.completion import completer

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
        completer=completer(commands, adapters),
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
