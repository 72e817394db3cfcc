"""The last screen of `mlx-zh run`: what the run achieved, and what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from wcwidth import wcswidth, wcwidth

from mlx_zh.language.catalogue import Language
from mlx_zh.recipe import Recipe
from mlx_zh.reporting.ending import Ending
from mlx_zh.reporting.findings import gather
from mlx_zh.stages.current_models import current_models
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console
from mlx_zh.system.redaction import redacted

_COLUMNS = 80  # of the narrowest terminal that is in common use
# Overrides that `chat` needs to find the same model and to say the same system message.
_LOCATES = ("name=", "runs=", "model.", "data.system=", "data.variables")


def last_screen(recipe: Recipe, recipe_file: str, overrides: Sequence[str], language: Language) -> str:
    """The screen as text; empty parts are left out.

    It is at most 80 columns wide, but a command is never cut: one that names a long path may be wider.
    """
    run = RunFolder.of(recipe)
    findings = gather(
        run,
        recipe.to_yaml(redacted),
        name=recipe.name,
        bootstrap=recipe.evaluate.bootstrap,
        seed=recipe.seed,
        current=current_models(run),
    )
    ending = Ending(findings, language)
    chat = ["chat", recipe_file, *(text for text in overrides if text.startswith(_LOCATES))]
    blocks = ["\n".join(ending.verdict())]
    for prompt, shown in ending.answers():
        table = console.table([answer.cells for answer in shown], indent="    ")
        blocks.append("\n".join([_cut(f"  {prompt}"), *map(_cut, table.split("\n"))]))
    if style := ending.style():
        blocks.append(console.table(style))
    commands = ending.commands(_command(*chat), str(run.page), _command("init", "FILE"))
    return "\n\n".join([*filter(None, blocks), console.table(commands)])


def _command(*words: str) -> str:
    """A command of this program as the user would type it: by its path where it is not on PATH."""
    program = "mlx-zh"
    if shutil.which(program) is None:
        beside = Path(sys.executable).with_name(program)
        program = os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return shlex.join([program, *words])


def _cut(line: str) -> str:
    """The line cut to fit the terminal; a Chinese character takes two columns."""
    if wcswidth(line) <= _COLUMNS:
        return line
    width, kept = 0, ""
    for character in line:
        width += max(wcwidth(character), 0)
        if width >= _COLUMNS:
            break
        kept += character
    return f"{kept}…"
