"""Snapshots of tokenizers in the cache folder. One opens in half a second with 200 MB, without Transformers.

A separate process reads the tokenizer with Transformers once and saves it as `tokenizers` holds it in memory. So
prepared text has the same tokens, and the same fingerprint, as in the training stages.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import ModelError
from mlx_zh.language.notice import Notice
from mlx_zh.system import console, storage
from mlx_zh.system.digests import damage, digests_of, known_digests, text_digest
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_folder
from mlx_zh.system.storage import write_exact_json, write_exact_text

if TYPE_CHECKING:
    from mlx_zh.corpus.joined_encoding import Vocabulary
    from mlx_zh.recipe import Model

_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


_SNAPSHOT = ("tokenizer.json", "about.json", "vocabulary.json")  # files of a snapshot; the last is not always there


class SnapshotTokenizer:
    """The part of Transformers' tokenizer that rendering needs, read from a snapshot folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        about = load_json(folder / "about.json")
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.chat_template = about["chat_template"]
        self.special_tokens_map: dict[str, Any] = about["special_tokens_map"]
        self.bos_token = about["bos_token"]
        self.eos_token = about["eos_token"]
        self._vocabulary = folder / "vocabulary.json"

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What the faster encoder needs; None if that encoder would not give the same tokens."""
        from mlx_zh.corpus.joined_encoding import Vocabulary

        return Vocabulary.load(self._vocabulary) if self._vocabulary.exists() else None


def save_snapshot(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer into a snapshot folder; `save_vocabulary` completes it."""
    from mlx_zh.corpus.render import Renderer

    write_exact_text(folder / "tokenizer.json", Renderer(tokenizer, raw_text=True).tokenizer_json())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = {"chat_template": tokenizer.chat_template, "special_tokens_map": special}
    ends = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token")}
    write_exact_json(folder / "about.json", about | ends)


def save_vocabulary(folder: Path) -> None:
    """Add what the faster encoder needs, then `whole.json`, the digests of all files: the snapshot is complete."""
    from mlx_zh.corpus.joined_encoding import vocabulary_of

    if (vocabulary := vocabulary_of((folder / "tokenizer.json").read_text(encoding="utf-8"))) is not None:
        vocabulary.save(folder / "vocabulary.json")
    names = [name for name in _SNAPSHOT if (folder / name).exists()]
    write_exact_json(folder / "whole.json", digests_of(folder, names))


def open_tokenizer(model: Model) -> SnapshotTokenizer:
    """The tokenizer of a recipe's model, from a snapshot that is made if needed. Raises ModelError, DownloadError."""
    from mlx_zh.models.load import resolve_model

    path = resolve_model(model.path, hub=model.hub, revision=model.revision, progress=console.DownloadBar())
    folder = storage.cache_folder() / "tokenizers" / _key(path)
    if (reason := _damage(folder)) is not None:
        if (folder / "whole.json").exists():
            console.warn(Notice("tokenizer-damaged", folder=str(folder), reason=reason), keep=False)
            storage.remove(folder)
        _in_a_process(str(folder), str(path))
        _in_a_process(str(folder))  # a second process, because the first needs 500 MB for Transformers
    return SnapshotTokenizer(folder)


def _damage(folder: Path) -> str | None:
    """Why a snapshot cannot be used; None if it is complete and what was written."""
    try:
        digests = load_json(folder / "whole.json")
        return damage(folder, dict.fromkeys(_SNAPSHOT[:2], "") | digests)
    except (OSError, ValueError, TypeError) as error:
        return f"whole.json: {error}"


def _in_a_process(*arguments: str) -> None:
    command = [sys.executable, "-m", "mlx_zh.stages.tokenizer_cache", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(reason.removeprefix("error: "))


def _key(model: Path) -> str:
    """A snapshot's name: it changes with the tokenizer's files and with the packages that read them."""
    check_folder(model, ModelError)
    files = [model] if model.is_file() else sorted({path for name in _FILES for path in model.glob(name)})
    digests = known_digests(console.say_reading).digests(map(str, files))
    states = [(path.name, digests[str(path)]) for path in files]
    state = (4, str(model.resolve()), states, version("transformers"), version("tokenizers"))
    return text_digest(repr(state))[:24]


def main(argv: list[str] | None = None) -> int:
    """`FOLDER MODEL` writes the tokenizer of a local model into FOLDER; `FOLDER` alone adds its vocabulary."""
    folder, *model = sys.argv[1:] if argv is None else argv
    if model:
        from mlx_zh.models.load import load_tokenizer

        save_snapshot(load_tokenizer(Path(model[0])), Path(folder))
    else:
        save_vocabulary(Path(folder))
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
