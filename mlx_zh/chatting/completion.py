"""What the Tab key completes: commands, and after some of them paths and the names of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document

_WITH_PATH = ("/save", "/load", "/adapter", "/feedback", "/compare")
_WITH_ADAPTER = ("/adapter", "/compare")


def completer(commands: Sequence[str], adapters: Sequence[str]) -> Completer:
    """Completes `commands`, and after them what they take; `adapters` are the names of the run's stages."""
    return _ChatCompleter(commands, adapters)


class _ChatCompleter(Completer):
    def __init__(self, commands: Sequence[str], adapters: Sequence[str]) -> None:
        self._commands = WordCompleter(list(commands), sentence=True)
        self._adapters = adapters
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, argument = document.text_before_cursor.partition(" ")
        if not space:
            yield from self._commands.get_completions(document, complete_event)
        elif command in _WITH_PATH:
            if command == "/compare":
                argument = argument.rpartition(" ")[2]
            if command in _WITH_ADAPTER:
                names = [name for name in (*self._adapters, "none") if name.startswith(argument)]
                yield from (Completion(name, -len(argument)) for name in names)
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)
