"""What the library `datasets` reads for us: folders of `save_to_disk`, and sets of Hugging Face, row by row.

No other module imports it. It is imported inside the functions: it takes a second and 100 MB, which JSON, CSV and
Parquet files and `--help` do not need. Parquet files are read with PyArrow alone (`reader.py`), a batch of rows at a
time, which is also what `datasets` does with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_zh.corpus.data_files import WAY
from mlx_zh.errors import DataError, DownloadError, first_line
from mlx_zh.system.downloads import reason_of
from mlx_zh.system.hub import endpoint

CONVERTED = "refs/convert/parquet"  # the branch that holds the hub's own conversion of a set
_BATCH = 256  # rows made Python objects at once
# With a hub that breaks off or refuses; the library's own 20 tries with up to a minute between them say no word.
_PATIENCE = {
    "STREAMING_OPEN_MAX_RETRIES": 3,
    "STREAMING_READ_MAX_RETRIES": 3,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 5,  # seconds
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 5,
}


class MadeByScript(DownloadError):
    """A set on the hub whose rows a program makes. `datasets` no longer runs such programs."""


def _datasets() -> Any:
    """The library, without its progress bars and its messages: what goes wrong is raised and said once."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for name, value in _PATIENCE.items():
        setattr(datasets.config, name, value)
    return datasets


# ---- folders that Dataset.save_to_disk and DatasetDict.save_to_disk wrote


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a saved folder, in the order of their rows; of several splits, those of `split` ("train").

    Raises DataError for a split that is not there, and for a folder that is damaged or of another version.
    """
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
    except Exception as error:  # datasets and PyArrow raise many kinds, IndexError for a set without rows among them
        raise DataError(
            f"{part}: `datasets` cannot open this saved data set: {first_line(error)}. It is empty or damaged; save "
            "it again with save_to_disk"
        ) from error
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{folder}: its state.json names {file}, which is not in the folder; copy it there")
    return files


def _splits(folder: Path) -> list[str]:
    path = folder / "dataset_dict.json"
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        return [str(split) for split in splits] or ["none"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: names no splits; save the data set again with save_to_disk") from error


def read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of an Arrow file of `datasets` with its place, "file[index]". Raises DataError.

    The file is mapped into memory, not read into it; a batch of rows at a time becomes Python objects.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    index = 0
    try:
        for batch in _datasets().Dataset.from_file(str(path)).iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield f"{path}[{index}]", dict(zip(batch, values, strict=True))
                index += 1
    except Exception as error:  # as above; errors of rows are raised by whoever reads them, not here
        raise DataError(
            f"{path}[{index}]: the Arrow file is damaged or not of `datasets` ({first_line(error)}); save it again "
            "with save_to_disk"
        ) from error
    if not index:
        raise DataError(f"{path}: the file holds no rows")


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
    """The rows of a split of a subset, in their order, the first `count` or all. Only what is asked for is fetched.

    `files` are the set's files to read, instead of those that its card names. `work` is an empty folder: `datasets`
    looks there for other states of the set, which must not stand for this one. `where` begins every error.

    Raises MadeByScript; DataError for a subset or split that is not there, with those that are; DownloadError.
    """
    library = _datasets()
    # Without the prefix, a folder ./ORG/SET of the user's would be read instead.
    options: dict[str, Any] = {"path": f"hf://datasets/{id}", "revision": commit, "cache_dir": str(work)}
    options |= {"data_files": {split: list(files)}} if files else {"name": subset}
    try:
        rows = library.load_dataset(split=split, streaming=True, **options)
        yield from islice(rows, count)  # `rows.take` begins to read one file more than it needs
    except Exception as error:
        raise _said(where, error) from error


def _said(where: str, error: Exception) -> DataError | DownloadError:
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return MadeByScript(f"{where} is made by a program, which is not run")
    if isinstance(error, ValueError) and ("Config name is missing" in text or "BuilderConfig" in text):
        return DataError(f"{where}: name one of its subsets with `subset`: {text}")
    if isinstance(error, ValueError) and "Bad split" in text:
        return DataError(f"{where}: name one of its splits with `split`: {text}")
    return DownloadError(f"{where} could not be read through `datasets`: {reason_of(error, endpoint())}. {WAY}")
