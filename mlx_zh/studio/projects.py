"""What the studio was started for, and one visit of a page.

A page names a run by its key, which is looked up among the runs that are here: no path comes from the browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_zh.errors import MlxZhError, StudioError
from mlx_zh.language.catalogue import Language
from mlx_zh.language.reader import reader_language
from mlx_zh.language.translation import in_readers_language
from mlx_zh.stages.run_list import RunInfo, RunList
from mlx_zh.studio.texts import said

LANGUAGE_COOKIE = "mlx-zh-language"
THEME_COOKIE = "mlx-zh-theme"


class Projects:
    """The folders that the studio was started for, shared by all pages."""

    def __init__(self, folders: Sequence[Path], language: Language | None = None) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self.language = language
        self._runs = RunList(self.folders)

    def runs(self) -> list[RunInfo]:
        """The runs, the newest first. Reads only what changed; takes a while for many runs, see `run.io_bound`."""
        return self._runs.read()

    def outside(self) -> list[Path]:
        """Links to run folders outside the folders, which are left out."""
        return self._runs.outside

    def run(self, key: str) -> RunInfo:
        """The run with a key, as it is now. Raises StudioError if there is none."""
        info = self._runs.one(key)
        if info is None:
            raise StudioError("there is no such run here. It was renamed or removed, or the address is wrong.")
        return info


class Studio:
    """One visit of a page: what a page's builder gets.

    `query` holds the parameters of the address, which anybody can write: look keys up, and never make paths of them.
    """

    def __init__(self, projects: Projects, query: Mapping[str, str], language: Language) -> None:
        self.projects = projects
        self.query = query
        self.language: Language = language

    @property
    def folders(self) -> list[Path]:
        """The project folders, resolved. Nothing outside may be read or written for a page."""
        return self.projects.folders

    def runs(self) -> list[RunInfo]:
        """See `Projects.runs`."""
        return self.projects.runs()

    def run(self, key: str) -> RunInfo:
        """See `Projects.run`."""
        return self.projects.run(key)

    def say(self, text: str, /, **values: object) -> str:
        """A text of the page in its language: `studio.say("{count} runs", count=3)`. See `texts`."""
        return said(text, self.language, **values)

    def error(self, error: MlxZhError | str) -> str:
        """The message of an error, or a notice, in the page's language."""
        text = in_readers_language(str(error) if isinstance(error, MlxZhError) else error, self.language)
        first = text.partition(" ")[0]  # in a terminal, `error: ` stands before it; a key or a file name stays
        return text[:1].upper() + text[1:] if first.isascii() and first.isalpha() else text

    def is_inside(self, path: Path) -> bool:
        """Whether a path, its links followed, is in one of the folders."""
        return any(path.resolve().is_relative_to(folder) for folder in self.folders)


def language_of(cookies: Mapping[str, str], accepted: str, chosen: Language | None) -> Language:
    """The language of a browser: its own choice, that of `--language`, this machine's, then what it accepts."""
    if (cookie := cookies.get(LANGUAGE_COOKIE)) in ("en", "zh"):
        return "en" if cookie == "en" else "zh"
    if chosen is not None:
        return chosen
    return "zh" if accepted.strip().lower().startswith("zh") else reader_language()
