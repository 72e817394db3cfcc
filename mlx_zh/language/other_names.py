"""What settings of other programs are called here: the table `other_names.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

Effect = Literal["none", "differs", "refused"]


class OtherName(NamedTuple):
    """A setting of another program: its key here, or what takes its place, and what `mlx-zh import` makes of it."""

    key: str
    note: str
    zh: str
    effect: Effect
    fine: tuple[Any, ...]  # values that are the same as turned off

    def plain(self, stage: str) -> tuple[str, str]:
        """The note in English and in Chinese; `stage` (sft or dpo) is named where both have the key."""
        return self.note.format(stage=stage), self.zh.format(stage=stage)

    def told(self, stage: str) -> tuple[str, str]:
        """The sentences that an error says about it, in English and in Chinese."""
        key, (note, zh) = self.key.format(stage=stage), self.plain(stage)
        first = (f"Here it is {key}.", f"这里叫 {key}。") if key else ("It is not needed here.", "这里不需要它。")
        if not key and self.effect != "none":
            return note, zh
        return " ".join(filter(None, (first[0], note))), first[1] + zh


@cache
def other_names() -> Mapping[str, OtherName]:
    """The whole table, by name in lower case with underscores."""
    import yaml  # not at the top: every command imports this module, but few need the table

    text = files(__package__).joinpath("other_names.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {
        name: OtherName(
            entry.get("key", ""),
            entry.get("note", ""),
            entry.get("zh", ""),
            entry.get("import", "none"),
            tuple(entry.get("fine", ())),
        )
        for name, entry in entries.items()
    }


def in_both_languages() -> Iterator[tuple[str, str]]:
    """Every sentence that errors say about a name, in English and in Chinese."""
    for entry in other_names().values():
        yield from dict.fromkeys(entry.told(stage) for stage in ("sft", "dpo"))
