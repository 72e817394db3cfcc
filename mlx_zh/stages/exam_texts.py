"""The texts of the questions that a run was asked, from files that are on this disk; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.exams.archives import is_cached, open_exam
from mlx_zh.exams.catalog import NAMES, benchmark
from mlx_zh.exams.exam import Exam

if TYPE_CHECKING:
    from mlx_zh.exams.csvfile import Question
    from mlx_zh.recipe import Recipe


def exam_at_hand(recipe: Recipe, key: str, split: str, project: Path) -> Exam | None:
    """The exam that results call `key`; None if its files are not here. `project` is where relative paths begin.

    Raises DataError for files that cannot be read, and DownloadError for a damaged archive.
    """
    settings = recipe.evaluate
    if key in NAMES:
        folder = settings.folder.get(key)  # type: ignore[call-overload]
        hub = settings.hub or recipe.model.hub
        if folder is None and not is_cached(benchmark(key), hub):
            return None
        folders = {} if folder is None else {key: str(_placed(folder, project))}
        return open_exam(key, folders=folders, hub=hub, split=split or settings.split, shots=0, limit=None)
    for name in settings.benchmarks:
        path = _placed(name, project)
        if name in NAMES or not path.exists() or not _may_be(path, key):
            continue
        exam = open_exam(str(path), folders={}, hub="auto", split=settings.split, shots=0, limit=None)
        if exam.key == key:
            return exam
    return None


def texts_of(exam: Exam) -> Mapping[tuple[str, str], Question]:
    """The questions by subject and id."""
    return {(subject.key, question.id): question for subject in exam.subjects for question in subject.questions}


def _placed(path: str, project: Path) -> Path:
    """A path of the recipe, from the folder in which the run was started."""
    return project / expanduser(path)


def _may_be(path: Path, key: str) -> bool:
    """Whether an exam at `path` may have this key, which is made of its name."""
    return path.name == key or path.stem.startswith(key)
