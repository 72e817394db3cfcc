"""Data sets of Hugging Face that are read row by row, through `datasets`, into a file in the cache folder.

Which sets: those whose source or registry entry has `subset` or `streaming: true`, and those without data files of a
known kind. All others are downloaded as files (`data_files.py`), even if `max_samples` needs few of their rows,
because `max_samples` chooses among all rows by a hash of their text, and old recipes must keep giving the same rows.

Which rows: with `streaming: true`, the first `max_samples` of the split, in the order of the set's files. A larger
number keeps the rows of a smaller one, the seed has no influence, and nothing after these rows is downloaded. They
are counted before cleaning, so rows that are dropped as invalid or duplicate are not replaced. Without `streaming`,
all rows.

The rows are stored as JSON lines under a digest of the set's id and commit, the subset, the split, the files and the
number of rows. Later runs, resumed runs and runs without a network read that file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_zh.corpus.data_files import WAY, data_file_names
from mlx_zh.corpus.tables import CONVERTED, MadeByScript, hub_rows
from mlx_zh.errors import DataError, DownloadError
from mlx_zh.recipe import DataSet
from mlx_zh.system import hub, hub_folders, huggingface, storage
from mlx_zh.system.digests import damage, file_digest, value_digest
from mlx_zh.system.downloads import reason_of
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import write_exact_json, written_whole

_ABOUT = "about.json"  # written last
_EVERY_REPOSITORY_HAS = ".gitattributes"
_REPORTED = 100  # rows between two reports of progress


def rows_file(
    name: str,
    entry: DataSet,
    max_samples: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Path:
    """The file with the rows of a set on Hugging Face, downloaded if it is not in the cache folder.

    `name` is the user's name of the set; `progress` is called with the number of rows read so far. Raises
    DownloadError, StorageError, and DataError for a subset or split that does not exist or has no rows.
    """
    count = max_samples if entry.streaming else None
    where = f"{name}: {entry.id}"
    commit = _commit(where, entry.id, entry.revision)
    rows_key = {
        "id": entry.id,
        "commit": commit,
        "subset": entry.subset,
        "split": entry.split,
        "files": list(entry.files),
        "rows": count,
    }
    folder = storage.cache_folder() / "hub-rows" / value_digest(rows_key)[:32]
    path = folder / "rows.jsonl"
    if not _is_whole(path):
        written = _write(where, path, _rows(where, entry, commit, count), progress)
        about = {"revision": entry.revision, "kept": written, "sha256": file_digest(path)}
        write_exact_json(path.with_name(_ABOUT), rows_key | about)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the rows are those that were written. Earlier versions noted no digest; their rows are taken."""
    about = read_object(path.with_name(_ABOUT))
    if about is None or not path.is_file():
        return False
    return "sha256" not in about or damage(path.parent, {path.name: about["sha256"]}) is None


def _commit(where: str, id: str, revision: str | None) -> str:
    """The commit of a branch or tag of a data set; without a network, the commit at the last download."""
    options: dict[str, Any] = {
        "kind": "dataset",
        "patterns": (_EVERY_REPOSITORY_HAS,),
        "label": where,
        "advice": WAY,
    }
    folder = hub.download(id, "huggingface", revision, **options)
    return hub_folders.commit_of(folder) or folder.name


def _rows(where: str, entry: DataSet, commit: str, count: int | None) -> Iterator[dict[str, Any]]:
    """The rows of a set, or of the hub's conversion of the set if a script generates its rows."""
    with tempfile.TemporaryDirectory() as work:
        shared: dict[str, Any] = {"split": entry.split, "count": count, "work": Path(work)}
        if entry.revision == CONVERTED:
            yield from _converted(where, entry, commit, shared)
            return
        files: list[str] = []
        if entry.files and entry.subset is None:
            files = data_file_names(_names(where, entry.id, commit), entry.files, entry.split)
            if not files:
                raise DownloadError(
                    f"{where} holds no data file like {', '.join(entry.files)} of split {entry.split}"
                )
        try:
            yield from hub_rows(where, entry.id, commit=commit, subset=entry.subset, files=files, **shared)
        except MadeByScript as error:
            if entry.revision is not None:
                raise DataError(
                    f"{where}: a script generates its rows. The script is not run, and Hugging Face has converted "
                    f"only the newest state of the set; leave out `revision: {entry.revision}`"
                ) from error
            yield from _converted(where, entry, _commit(where, entry.id, CONVERTED), shared)


def _converted(where: str, entry: DataSet, commit: str, shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the hub's Parquet files, which are in SUBSET/SPLIT/, or for large sets in SUBSET/partial-SPLIT/."""
    names = [name for name in _names(where, entry.id, commit) if name.endswith(".parquet")]
    folders = sorted({name.rpartition("/")[0] for name in names})
    subset = entry.subset or "default"
    wanted = [f"{subset}/{entry.split}", f"{subset}/partial-{entry.split}"]
    files = sorted(name for name in names if name.rpartition("/")[0] in wanted)
    if not files:
        raise DataError(
            f"{where}: Hugging Face's conversion has no {wanted[0]}; name `subset` and `split` as in one of its "
            f"folders: {', '.join(folders) or 'none'}"
        )
    yield from hub_rows(where, entry.id, commit=commit, subset=None, files=files, **shared)


def _names(where: str, id: str, commit: str) -> list[str]:
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().list_repo_files(id, revision=commit, repo_type="dataset")
    except Exception as error:  # the errors of huggingface_hub and of its HTTP library
        raise DownloadError(
            f"{where}: its files could not be listed: {reason_of(error, huggingface.endpoint())}. {WAY}"
        ) from error


def _write(where: str, path: Path, rows: Iterable[dict[str, Any]], progress: Callable[[int], None]) -> int:
    """Write rows as JSON lines; returns their number. Raises DataError if there are none."""
    count = 0
    with written_whole(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
            count += 1
            if count % _REPORTED == 0:
                progress(count)
        if not count:
            raise DataError(f"{where} has no rows in this split")
    return count
