"""A prepared corpus: what it depends on, the key that names its folder, its manifest, and its examples.

It is a folder of Arrow files, which `datasets.load_from_disk` opens too. The folder is named by a digest of all that
the corpus depends on, and it appears only when it is complete.

A corpus is read only if each file's SHA-256 is that in the manifest; else it is set aside and made again. This check
reads all files once when a stage starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mlx_zh.corpus import choosing
from mlx_zh.corpus.exam_table import exam_files
from mlx_zh.corpus.examples import (
    OPENED,
    Answers,
    AnySplit,
    Conversations,
    Pairs,
    Shards,
)
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.selecting import SelectSettings
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.statistics import CorpusReport
from mlx_zh.language.notice import Notice
from mlx_zh.system.digests import FileDigests, damage, value_digest
from mlx_zh.system.json_text import load_json

VERSION = 5  # part of the key; raise it when the same input would give another corpus
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Exams:
    """The exams whose questions are removed from the training data."""

    folders: dict[str, str]  # exam -> folder with its CSV files
    missing: dict[str, str]  # exam whose questions are not available -> the reason
    ngram: int = 10  # letters and digits of an n-gram
    overlap: float = 0.4  # a row is dropped if it contains at least this share of a question's n-grams


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that a corpus depends on, apart from its sources and the tokenizer."""

    render: RenderSettings
    choice: choosing.ChoiceSettings
    exams: Exams
    near_ngram: int = 3
    on_invalid: str = "error"
    normalize: bool = True
    simplify: bool = False
    quality: dict[str, str] | None = None  # quality rule -> what it does, for those that the recipe sets
    select: SelectSettings | None = None


class CorpusContent(TypedDict):
    """Everything that a corpus depends on; its key is a digest of it."""

    version: int
    rendering: str  # fingerprint of tokenizer and chat template
    sources: list[dict[str, Any]]  # the fields of each DataSource, with SHA-256 digests for its files
    settings: dict[str, Any]  # the fields of CorpusSettings without places
    exams: dict[str, list[str]]  # exam -> SHA-256 of its files


class Manifest(TypedDict):
    """`manifest.json` of a prepared corpus. The key that names its folder says which version wrote it."""

    files: list[str]  # Arrow files in the folder, in order
    digests: dict[str, str]  # SHA-256 of each Arrow file and of the files with the rows of each split
    made_of: CorpusContent
    report: CorpusReport
    content: str  # `content_digest` of the splits
    check: str  # digest of all the other values


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; its rows stay on disk."""

    folder: Path
    key: str
    manifest: Manifest
    splits: dict[str, AnySplit]  # train and validation
    ready: bool  # whether it came from the cache
    remarks: tuple[Notice, ...] = ()  # about an earlier copy that was damaged

    @property
    def content(self) -> str:
        """A digest of what came out: all tokens and which of them are trained, in order; 64 hex digits."""
        return self.manifest["content"]

    def conversations(self, split: str) -> Conversations:
        """The examples of a split ("train" or "validation") of a corpus for SFT."""
        examples = self.splits[split]
        assert isinstance(examples, Conversations)
        return examples

    def pairs(self, split: str) -> Pairs:
        """The pairs of a split ("train" or "validation") of a corpus for DPO."""
        pairs = self.splits[split]
        assert isinstance(pairs, Pairs)
        return pairs

    def answers(self, split: str) -> Answers:
        """The labelled answers of a split ("train" or "validation") of a corpus for KTO."""
        answers = self.splits[split]
        assert isinstance(answers, Answers)
        return answers


def corpus_key(
    sources: Sequence[DataSource], settings: CorpusSettings, renderer: Renderer, cache: Path
) -> tuple[str, CorpusContent]:
    """A digest of everything that the corpus depends on, and the values that went into the digest."""
    exams = {name: list(map(str, exam_files(Path(folder)))) for name, folder in settings.exams.folders.items()}
    every = [path for source in sources for path in source.files] + [
        path for paths in exams.values() for path in paths
    ]
    digests = FileDigests(cache / "fingerprints.json").digests(every)
    values: CorpusContent = {
        "version": VERSION,
        "rendering": renderer.fingerprint,
        "sources": [_fields_of(source) | {"files": [digests[path] for path in source.files]} for source in sources],
        "settings": _settings_fields(settings),
        "exams": {name: [digests[path] for path in paths] for name, paths in exams.items()},
    }
    return value_digest(values)[:32], values


def _fields_of(source: DataSource) -> dict[str, Any]:
    """The fields of a source; those that came later are left out while unset, so that older corpora stay valid."""
    fields = asdict(replace(source, files=()))
    return {name: value for name, value in fields.items() if value or name not in ("sheet", "variables")}


def _settings_fields(settings: CorpusSettings) -> dict[str, Any]:
    """The settings without places; later ones are left out while unset, so that older corpora stay valid."""
    fields = asdict(replace(settings, exams=replace(settings.exams, folders={}, missing={})))
    return {name: value for name, value in fields.items() if value or name not in ("quality", "select")}


def damage_of(folder: Path) -> str | None:
    """Why a prepared corpus cannot be used: it is missing, incomplete, or not what was written. None if it can."""
    try:
        manifest = load_json(folder / MANIFEST)
        check = manifest.pop("check")
        if value_digest(manifest) != check:
            return f"{MANIFEST} is not what was written"
        return damage(folder, manifest["digests"])
    except OSError as error:
        return f"{MANIFEST}: {error.strerror or error}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"


def open_corpus(folder: Path, kind: str, *, ready: bool) -> Corpus:
    """A finished corpus; its rows stay on disk."""
    manifest: Manifest = load_json(folder / MANIFEST)
    shards = Shards([folder / name for name in manifest["files"]])
    splits = {split: OPENED[kind](shards, np.load(folder / f"{split}.npy")) for split in ("train", "validation")}
    return Corpus(folder, folder.name, manifest, splits, ready)
