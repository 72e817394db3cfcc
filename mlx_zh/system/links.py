"""Which files of a folder may be read: its own, and no file elsewhere to which a link in it leads.

A model, data set, exam or adapter may come from a stranger. A link in its folder could name any file of the user,
which would then be copied, uploaded or trained on.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mlx_zh.errors import MlxZhError

_REPOSITORIES = ("models--", "datasets--")
_DEPTH = 2  # levels of a folder in which Transformers looks for files of a tokenizer


def target_outside(folder: Path, path: Path) -> Path | None:
    """The file or folder outside `folder` to which `path` leads through links; None if it stays inside.

    The folder itself may be reached through links. In Hugging Face's cache, `snapshots/REVISION` holds links to the
    folder `blobs` of the same repository, which counts as inside.
    """
    root, target = (Path(os.path.realpath(place)) for place in (folder, path))
    roots = [root, *_blobs(root)]
    return None if any(target.is_relative_to(inside) for inside in roots) else target


def _blobs(root: Path) -> Iterator[Path]:
    """The folder `blobs` of the repository in Hugging Face's cache to which the real folder `root` belongs."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith(_REPOSITORIES):
            yield repository / "blobs"


def is_readable(folder: Path, path: Path) -> bool:
    """Whether `path` is a regular file, and no link leads from it out of `folder`."""
    return path.is_file() and target_outside(folder, path) is None


def check_file(folder: Path, path: Path, error: type[MlxZhError]) -> None:
    """Raise `error` if `path`, an entry of `folder`, leads out of it or can block a reader, as a named pipe does.

    A path that does not exist, or is a folder, passes.
    """
    if (target := target_outside(folder, path)) is not None:
        raise error(
            f"{path} is a link out of the folder, to {target}. It is not followed, because a stranger's folder "
            "could name any file in this way. If it is right, copy the file itself into the folder."
        )
    check_regular(path, error)


def check_regular(path: Path, error: type[MlxZhError]) -> None:
    """Raise `error` if `path` is a named pipe, a socket or a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise error(f"{path} is a pipe, a socket or a device. Give a file that is stored on a disk.")


def check_folder(folder: Path, error: type[MlxZhError], *, depth: int = _DEPTH) -> None:
    """Raise `error` if an entry of `folder`, or of a folder in it up to `depth` levels, fails `check_file`.

    Hidden entries are left out, because nothing reads them.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return
    for path in entries:
        check_file(folder, path, error)
        if depth > 1 and path.is_dir():
            check_folder(path, error, depth=depth - 1)


def copy_file(folder: Path, path: Path, target: Path, error: type[MlxZhError]) -> None:
    """Copy the content of `path`, a file of `folder`, to `target`. Raises `error` as `check_file` does."""
    check_file(folder, path, error)
    shutil.copyfile(path, target)
