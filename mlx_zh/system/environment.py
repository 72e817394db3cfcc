"""The Python environment of this process, as commands for the user name it."""

from __future__ import annotations

import os
import shlex
import sys


def pip_install(*packages: str) -> str:
    """The command that installs packages where this program will look for them."""
    return " ".join([shlex.quote(python()), "-m", "pip", "install", *(f"'{name}'" for name in packages)])


def python() -> str:
    """The path of this environment's Python, relative if it is below the current folder."""
    path, here = sys.executable, os.path.join(os.getcwd(), "")
    return path.removeprefix(here) if len(here) > 1 else path
