"""A recipe from another program's project: `python -m mlx_zh.import FILE…`."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.system.arguments import Parser, count

if TYPE_CHECKING:
    from mlx_zh.bridges.project import Imported

_PROGRAMS = ("llama-factory", "mlx-lm", "mlx-lm-lora", "trl", "unsloth")


def main(argv: list[str] | None = None) -> int:
    """Write the recipe and show what it was made of; returns the exit status. Raises MlxZhError."""
    arguments = _parser().parse_args(argv)

    from mlx_zh.bridges.project import Wishes, import_project
    from mlx_zh.stages.interview import name_of
    from mlx_zh.system import storage

    wishes = Wishes(
        program=arguments.program,
        devices=arguments.devices,
        model=arguments.model,
        out=None if arguments.out is None else _recipe_path(arguments.out),
        name=None if arguments.name is None else name_of(arguments.name),
    )
    imported = import_project([Path(expanduser(name)) for name in arguments.files], wishes)
    storage.write_exact_text(imported.target, imported.text)
    _show(imported)
    return 0


def _parser() -> argparse.ArgumentParser:
    options = Parser(
        "mlx-zh import",
        description="Write a recipe from a project of LLaMA-Factory, mlx-lm, mlx-lm-lora, TRL or Unsloth.",
    )
    options.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="its YAML, JSON, shell script, Python script or notebook, and its dataset_info.json if that lies apart",
    )
    options.add_argument("--from", dest="program", choices=_PROGRAMS, help="the program, if the file does not tell")
    options.add_argument(
        "--devices", type=count, metavar="N", help="how many cards it was made for; each multiplies the batch"
    )
    options.add_argument("--model", help="another base model: a short name, a hub id, a folder or a .gguf file")
    options.add_argument("--out", metavar="RECIPE", help="the recipe's file; by default beside FILE, with -mlx")
    options.add_argument("--name", help="the name of the run")
    return options


def _recipe_path(text: str) -> Path:
    path = Path(expanduser(text))
    return path if path.suffix in (".yaml", ".yml") else path.with_name(f"{path.name}.yaml")


def _show(imported: Imported) -> None:
    """The table: what was mapped, what needs no counterpart, and what differs."""
    from mlx_zh.bridges.draft import TITLES, effects
    from mlx_zh.language.reader import say
    from mlx_zh.system import console

    console.say(say("import-heading", program=TITLES[imported.program], recipe=imported.target))
    mapped = [(row.theirs, row.ours, row.note) for row in effects(imported.rows, "mapped") if row.ours]
    lines = [
        line for theirs, ours, note in mapped for line in ((theirs, ours), *([("", f"  {note}")] if note else []))
    ]
    console.say()
    console.say(console.table([(say("import-theirs"), say("import-ours")), *lines]))
    without = effects(imported.rows, "none")
    if without:
        console.say()
        console.say(say("import-without"))
        console.say(console.table([(row.theirs, row.note) for row in without]))
    differing = effects(imported.rows, "differs")
    if differing:
        console.say()
        console.say(say("import-differs-title"))
        for row in differing:
            head = " → ".join(part for part in (row.theirs, row.ours) if part)
            console.say(console.paragraph("- " + ": ".join(part for part in (head, row.note) if part)))
    console.say()
    console.say(say("import-next", recipe=imported.target))


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
