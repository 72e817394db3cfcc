"""A conversation as Markdown, to be read or passed on."""

from __future__ import annotations

from pathlib import Path

from mlx_zh.chatting.transcript import Transcript
from mlx_zh.errors import MlxZhError, StorageError
from mlx_zh.language.reader import say
from mlx_zh.system.storage import storage_errors, write_text

MARKDOWN = (".md", ".markdown")
_MARK = "<!-- mlx-zh chat -->"  # the first line of such a file, by which a later /save knows it


def save_markdown(transcript: Transcript, path: Path, model: str, adapter: str) -> int:
    """Write the answered turns; returns their number.

    Only a file that this wrote is overwritten: raises StorageError for another one, and MlxZhError if nothing has
    been answered.
    """
    turns = transcript.turns[:-1] if transcript.pending else transcript.turns
    if not turns:
        raise MlxZhError("nothing to save: no question has been answered yet")
    with storage_errors(path):
        if path.exists() and not path.read_bytes().startswith(_MARK.encode()):
            raise StorageError(f"{path} exists and is not a saved chat; choose another name")
    parts = [_MARK, f"# {say('chat-title')}", say("chat-made-by", model=model, adapter=adapter)]
    if transcript.system:
        parts += [f"## {say('chat-role-system')}", transcript.system.strip()]
    for message in turns:
        parts += [f"## {say(f'chat-role-{message.role}')}", message.content.strip()]
    write_text(path, "\n\n".join(parts) + "\n")
    return len(turns)
