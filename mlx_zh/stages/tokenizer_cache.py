"""A model's tokenizer alone, kept in the cache folder: opened in half a second and 200 MB, without Transformers.

It is read once by Transformers, in a process of its own, and written down as `tokenizers` has it in memory, so that
text prepared with it has the very tokens, and the fingerprint, that the training stages see.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import ModelError
from mlx_zh.system import console, storage
from mlx_zh.system.digests import text_digest
from mlx_zh.system.storage import write_json, write_text

if TYPE_CHECKING:
    from mlx_zh.corpus.joined_encoding import Vocabulary
    from mlx_zh.recipe import Model

_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


class SnapshotTokenizer:
    """As much of Transformers' tokenizer as rendering needs."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.chat_template = about["chat_template"]
        self.special_tokens_map: dict[str, Any] = about["special_tokens_map"]
        self.bos_token = about["bos_token"]
        self.eos_token = about["eos_token"]
        self._vocabulary = folder / "vocabulary.json"

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """For the faster encoder, where it gives the same tokens."""
        from mlx_zh.corpus.joined_encoding import Vocabulary

        return Vocabulary.load(self._vocabulary) if self._vocabulary.exists() else None


def save_snapshot(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer down; `save_vocabulary` makes the snapshot whole."""
    from mlx_zh.corpus.render import Renderer

    write_text(folder / "tokenizer.json", Renderer(tokenizer).tokenizer_json())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = {"chat_template": tokenizer.chat_template, "special_tokens_map": special}
    ends = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token")}
    write_json(folder / "about.json", about | ends)


def save_vocabulary(folder: Path) -> None:
    """Write what the faster encoder needs beside a snapshot; `whole` comes last and says that nothing is missing."""
    from mlx_zh.corpus.joined_encoding import vocabulary_of

    if (vocabulary := vocabulary_of((folder / "tokenizer.json").read_text(encoding="utf-8"))) is not None:
        vocabulary.save(folder / "vocabulary.json")
    write_text(folder / "whole", "")


def open_tokenizer(model: Model) -> SnapshotTokenizer:
    """The tokenizer of a recipe's model. Raises ModelError, DownloadError."""
    from mlx_zh.models.load import resolve_model

    place = resolve_model(model.path, hub=model.hub, revision=model.revision, progress=console.DownloadBar())
    folder = storage.cache_folder() / "tokenizers" / _key(place)
    if not (folder / "whole").exists():
        _in_a_process(str(folder), str(place))
        _in_a_process(str(folder))  # after the first has given its 500 MB back
    return SnapshotTokenizer(folder)


def _in_a_process(*arguments: str) -> None:
    command = [sys.executable, "-m", "mlx_zh.stages.tokenizer_cache", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(reason.removeprefix("error: "))


def _key(place: Path) -> str:
    """Changes with the tokenizer's files and with the packages that read them."""
    files = [place] if place.is_file() else sorted({path for name in _FILES for path in place.glob(name)})
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    state = (2, str(place.resolve()), states, version("transformers"), version("tokenizers"))
    return text_digest(repr(state))[:24]


def main(argv: list[str] | None = None) -> int:
    """FOLDER PLACE: write the tokenizer of a resolved model into a folder. FOLDER: write its vocabulary there."""
    folder, *place = sys.argv[1:] if argv is None else argv
    if place:
        from mlx_zh.models.load import load_tokenizer

        save_snapshot(load_tokenizer(Path(place[0])), Path(folder))
    else:
        save_vocabulary(Path(folder))
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
