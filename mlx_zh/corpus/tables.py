"""Everything that is read with the library `datasets`: folders of `save_to_disk`, and rows of Hugging Face's sets.

No other module imports `datasets`. It is imported inside the functions, because it takes a second and 100 MB, and
JSON, CSV and Parquet files and `--help` do not need it. Parquet files are read with PyArrow alone (`reader.py`), a
batch of rows at a time, as `datasets` does too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_zh.corpus.data_files import WAY
from mlx_zh.corpus.text_files import HEAD, check_stored
from mlx_zh.errors import DataError, DownloadError, first_line
from mlx_zh.system.downloads import reason_of
from mlx_zh.system.huggingface import endpoint
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_folder, target_outside

CONVERTED = "refs/convert/parquet"  # the branch with the hub's own conversion of a set
_BATCH = 256  # rows that become Python objects at once
# Retries when the hub breaks off or refuses. By default the library tries 20 times, up to a minute apart, in silence.
_RETRIES = {
    "STREAMING_OPEN_MAX_RETRIES": 3,
    "STREAMING_READ_MAX_RETRIES": 3,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 5,  # seconds
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 5,
}


class MadeByScript(DownloadError):
    """A set on the hub whose rows a script generates. `datasets` no longer runs such scripts."""


def _datasets() -> Any:
    """The library without progress bars and log messages; its errors are raised and reported by us."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for name, value in _RETRIES.items():
        setattr(datasets.config, name, value)
    return datasets


# ---- folders that Dataset.save_to_disk and DatasetDict.save_to_disk wrote


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a saved folder, in the order of their rows; with several splits, those of `split`.

    `split` None is "train". Raises DataError if there is no such split, or if the folder is damaged or was written by
    another version.
    """
    check_folder(folder, DataError)
    part = folder
    if (folder / "dataset_dict.json").is_file():
        splits = _splits(folder)
        wanted = split or "train"
        if wanted not in splits:
            raise DataError(
                f"{folder}: a saved data set without the split {wanted!r}. It has {', '.join(splits)}; "
                f"write {{path: {folder}, split: {splits[0]}}}"
            )
        part = folder / wanted
    elif split not in (None, "train"):
        raise DataError(f"{folder}: a saved data set without splits; leave out `split: {split}`")
    try:
        files = [Path(file["filename"]) for file in _datasets().load_from_disk(str(part)).cache_files]
    except Exception as error:  # datasets and PyArrow raise errors of many types; IndexError for a set without rows
        raise DataError(
            f"{part}: `datasets` cannot open this saved data set: {first_line(error)}. It is empty or damaged; save "
            "it again with save_to_disk"
        ) from error
    for file in files:
        if target_outside(folder, file) is not None:
            raise DataError(f"{folder}: its state.json names {file}, which is not in the folder; copy it there")
    return files


def _splits(folder: Path) -> list[str]:
    path = folder / "dataset_dict.json"
    try:
        splits = load_json(path)["splits"]
        return [str(split) for split in splits] or ["none"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: names no splits; save the data set again with save_to_disk") from error


def read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of an Arrow file of `datasets`, with its place "file[index]". Raises DataError.

    The file is memory-mapped, and a batch of rows at a time becomes Python objects.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as file:
        check_stored(path, file.read(HEAD))
    index = 0
    try:
        for batch in _datasets().Dataset.from_file(str(path)).iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield f"{path}[{index}]", _with_objects(dict(zip(batch, values, strict=True)))
                index += 1
    except Exception as error:  # errors of many types; errors in a row's content are raised elsewhere
        raise DataError(
            f"{path}[{index}]: the Arrow file is damaged or not of `datasets` ({first_line(error)}); save it again "
            "with save_to_disk"
        ) from error
    if not index:
        raise DataError(f"{path}: the file holds no rows")


def _with_objects(row: dict[str, Any]) -> dict[str, Any]:
    """The row with lists of objects. Columns of the older type Sequence are one object of lists each."""
    return {name: _objects(value) for name, value in row.items()}


def _objects(value: Any) -> Any:
    if not isinstance(value, dict) or not value or not all(isinstance(part, list) for part in value.values()):
        return value
    if len({len(part) for part in value.values()}) > 1:
        return value  # no list of objects; the readers of rows refuse it
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


# ---- sets of Hugging Face


def hub_rows(
    where: str,
    id: str,
    *,
    commit: str,
    subset: str | None,
    split: str,
    files: Sequence[str] = (),
    count: int | None = None,
    work: Path,
) -> Iterator[dict[str, Any]]:
    """The first `count` rows, or all, of a split of a subset, in their order. No other rows are downloaded.

    `files` are the set's files to read, instead of those that its card names. `work` must be an empty folder, because
    `datasets` would use another state of the set if it found one there. `where` is the start of every error message.

    Raises MadeByScript if a script generates the rows, DataError if there is no such subset or split (the message
    lists those that exist), DownloadError if the hub fails.
    """
    library = _datasets()
    # Without the prefix, a local folder ./ORG/SET would be read instead.
    options: dict[str, Any] = {"path": f"hf://datasets/{id}", "revision": commit, "cache_dir": str(work)}
    options |= {"data_files": {split: list(files)}} if files else {"name": subset}
    try:
        rows = library.load_dataset(split=split, streaming=True, **options)
        yield from map(_with_objects, islice(rows, count))  # `rows.take` would open one file more than it needs
    except Exception as error:
        raise _hub_error(where, error) from error


def _hub_error(where: str, error: Exception) -> DataError | DownloadError:
    """Our error for one of the library's."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return MadeByScript(f"{where} is generated by a script, which is not run")
    if isinstance(error, ValueError) and ("Config name is missing" in text or "BuilderConfig" in text):
        return DataError(f"{where}: name one of its subsets with `subset`: {text}")
    if isinstance(error, ValueError) and "Bad split" in text:
        return DataError(f"{where}: name one of its splits with `split`: {text}")
    return DownloadError(f"{where} could not be read through `datasets`: {reason_of(error, endpoint())}. {WAY}")
