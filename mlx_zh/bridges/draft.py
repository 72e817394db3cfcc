"""A recipe in the making: what another program's settings are, what became of each, and what cannot be taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_zh.language.other_names import OtherName, other_names
from mlx_zh.language.reader import reader_language, say

Program = Literal["llama-factory", "mlx-lm", "mlx-lm-lora", "trl", "unsloth"]
Level = Literal["mapped", "none", "differs"]

TITLES: dict[Program, str] = {
    "llama-factory": "LLaMA-Factory",
    "mlx-lm": "mlx-lm",
    "mlx-lm-lora": "mlx-lm-lora",
    "trl": "TRL",
    "unsloth": "Unsloth",
}
_OFF = (None, False, 0, "", "none", "no", "false", "null", "off")
_LONGEST = 60  # characters of a value that are shown


@dataclass
class Settings:
    """The settings of one project: names in lower case with underscores, with plain values."""

    program: Program
    path: Path
    values: dict[str, Any]
    devices: int | None = None  # that the file or the command line names
    several: bool = False  # it is started on every card of a machine, however many there are
    hub: str | None = None
    tables: list[Path] = field(default_factory=list)  # dataset_info.json given beside it
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a script: call -> its keywords
    remarks: list[str] = field(default_factory=list)  # what could not be read

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path.parent

    @property
    def scripted(self) -> bool:
        """Whether it is a Python script, where settings are keywords of calls."""
        return bool(self.calls)


@dataclass(frozen=True)
class Row:
    """A line of the table: their setting, ours, and what there is to know."""

    theirs: str
    ours: str = ""
    note: str = ""
    level: Level = "mapped"


class Draft:
    """Their values by name, read with a type each; ours as they are put; and the table of both."""

    def __init__(self, settings: Settings, defaults: Mapping[str, Any], target_folder: Path) -> None:
        self.settings = settings
        self.target_folder = target_folder  # of the recipe
        self.defaults = defaults
        self.values: dict[str, Any] = {}  # ours: dotted key -> value
        self.comments: dict[str, str] = {}
        self.rows: list[Row] = []
        self.refusals: list[str] = []
        self._used: set[str] = set()

    # What they say ------------------------------------------------------------------------------------------

    def given(self, name: str) -> bool:
        """Whether the file names this setting, with a value."""
        return self.settings.values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value of a setting, or their default. It is then no longer left over."""
        self._used.add(name)
        value = self.settings.values.get(name)
        return self.defaults.get(name) if value is None else value

    def number(self, name: str, least: float = -math.inf) -> float | None:
        """A finite number of at least `least`; None if there is none. Anything else is refused."""
        value = self.raw(name)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < least:
            self._bad(name, value, "import-wants-number" if least == -math.inf else "import-wants-least", least)
            return _number(self.defaults.get(name))
        return number

    def whole(self, name: str, least: int = 0) -> int | None:
        """A whole number of at least `least`; None if there is none. Anything else is refused."""
        number = self.number(name)
        if number is None:
            return None
        if number != int(number) or number < least or abs(number) > _MOST:
            self._bad(name, self.raw(name), "import-wants-whole", least)
            default = _number(self.defaults.get(name))
            return None if default is None else int(default)
        return int(number)

    def switch(self, name: str) -> bool:
        """Whether a setting is turned on. A text that is neither true nor false is refused."""
        value = self.raw(name)
        if isinstance(value, str):
            word = value.strip().lower()
            if word in ("true", "1", "yes", "on", "t", "y"):
                return True
            if word not in ("false", "0", "no", "off", "none", "null", "", "f", "n"):
                self._bad(name, value, "import-wants-switch")
            return False
        if value is not None and not isinstance(value, bool | int | float):
            self._bad(name, value, "import-wants-switch")
            return False
        return bool(value)

    def text(self, name: str) -> str | None:
        """A text; None if there is none. Lists and mappings are refused."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, list | dict | tuple | bool):
            self._bad(name, value, "import-wants-text")
            return None
        return str(value).strip() or None

    def names(self, name: str) -> list[str]:
        """A list, or a text with commas, as texts without blanks."""
        value = self.raw(name)
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, dict | list | bool) for part in parts):
            self._bad(name, value, "import-wants-text")
            return []
        return [str(part).strip() for part in parts if part is not None and str(part).strip()]

    def section(self, name: str) -> dict[str, Any]:
        """A mapping; empty if there is none. Anything else is refused."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._bad(name, value, "import-wants-section")
            return {}
        return {str(key): below for key, below in value.items()}

    def choice(self, name: str, known: Mapping[str, str]) -> str | None:
        """What a text of theirs is called here; other texts are refused, with those that are known."""
        value = self.text(name)
        if value is None:
            return None
        if value.lower() not in known:
            self.refuse(say("import-wants-choice", key=name, value=shown(value), known=", ".join(known)))
            return None
        return known[value.lower()]

    def _bad(self, name: str, value: Any, code: str, least: float = 0) -> None:
        self.refuse(say(code, key=name, value=shown(value), least=f"{least:g}"))

    # What becomes of it -------------------------------------------------------------------------------------

    def put(
        self, ours: str, value: Any, *theirs: str, note: str = "", level: Level = "mapped", words: str | None = None
    ) -> None:
        """Set a key of the recipe that comes from these settings; a row and a comment tell it.

        `words` are told in place of the settings' own names and values.
        """
        self._used.update(theirs)
        self.values[ours] = value
        if words is None:
            words = ", ".join(self.said(name) for name in theirs if self.given(name) or name in self.defaults)
        self.comments[ours] = say("import-joint", first=words, second=note) if words and note else words or note
        self.rows.append(Row(words, f"{ours}: {shown(value)}", note, level))

    def batch(self, ours: str, value: int, theirs: Sequence[str], note: str) -> None:
        """Set a key that several settings make together; the comment says how."""
        self.put(ours, value, *theirs, note=note)
        self.comments[ours] = note

    def note(self, theirs: str, note: str, level: Level = "none") -> None:
        """A setting that sets no key, and why that does not matter, or that it does."""
        self._used.add(theirs)
        self.rows.append(Row(self.said(theirs), "", note, level))

    def remark(self, note: str) -> None:
        """A difference that belongs to no single setting."""
        self.rows.append(Row("", "", note, "differs"))

    def refuse(self, reason: str) -> None:
        """A reason why there is no recipe. All of them are told together."""
        if reason not in self.refusals:
            self.refusals.append(reason)

    def said(self, name: str) -> str:
        """A setting as the file has it, or as their default."""
        if self.given(name):
            return f"{name}: {shown(self.settings.values[name])}"
        if name in self.defaults:
            return say("import-their-default", key=name, value=shown(self.defaults[name]))
        return name

    def use(self, *names: str) -> None:
        """These settings are dealt with."""
        self._used.update(names)

    def idle(self, *names: str) -> None:
        """Settings that another kind of training of the same program reads, and this one does not."""
        for name in names:
            if self.given(name) and name not in self._used and not is_off(self.settings.values[name]):
                self.note(name, say("import-idle"))
            self._used.add(name)

    def finish(self, stage: str) -> None:
        """Deal with all settings that no code has told of, by the table of other names."""
        told = {part.split(":")[0] for row in self.rows for part in row.theirs.split(", ")}
        for name, value in self.settings.values.items():
            if name in told or (name in self._used and name not in other_names()) or value is None:
                continue
            entry = other_names().get(name)
            known = entry is not None and (not entry.key or name in self._used)
            if is_off(value) or (entry is not None and _is_fine(value, entry)):
                self.note(name, say("import-off"))
            elif entry is None or not known:
                self.note(name, say("import-unknown", program=TITLES[self.settings.program]), "differs")
            else:
                self._by_table(name, entry, stage)

    def _by_table(self, name: str, entry: OtherName, stage: str) -> None:
        told = (
            entry.told(stage)[reader_language() == "zh"]
            if entry.key
            else entry.plain(stage)[reader_language() == "zh"]
        )
        if entry.effect == "refused":
            self.refuse(say("import-refused", key=self.said(name), reason=told))
        else:
            self.note(name, told, "differs" if entry.effect == "differs" else "none")


_MOST = 2**53


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def is_off(value: Any) -> bool:
    """Whether a value is that of a setting that is turned off, or says nothing."""
    if isinstance(value, str):
        return value.strip().lower() in _OFF
    return value in ([], {}, ()) if isinstance(value, list | dict | tuple) else value in _OFF


def _is_fine(value: Any, entry: OtherName) -> bool:
    return any(str(value).strip().lower() == str(fine).lower() or _same(value, fine) for fine in entry.fine)


def _same(value: Any, fine: Any) -> bool:
    try:
        return not isinstance(fine, str | bool) and float(value) == float(fine)
    except (TypeError, ValueError):
        return False


def shown(value: Any) -> str:
    """A value for the table, on one line and not long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(map(shown, value)) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(below)}" for key, below in value.items()) + "}"
    else:
        text = str(value)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def effects(rows: Sequence[Row], level: Level) -> list[Row]:
    """The rows of one level."""
    return [row for row in rows if row.level == level]
