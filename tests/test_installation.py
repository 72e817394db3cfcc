"""`make` installs: it shows what happens, and says what to do where the package index cannot be reached."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands in for Python: makes a virtual environment whose pip says what it does and ends with a given status.
PYTHON = """#!/bin/sh
test "$1" = -m || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "Collecting mlx: $*"; exit STATUS\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""


def install(folder: Path, status: int, what: str = "installed") -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / "python"
    python.write_text(PYTHON.replace("STATUS", str(status)))
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f".venv/.{what}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_installation_shows_what_it_does(tmp_path: Path) -> None:
    done = install(tmp_path, 0)
    assert done.returncode == 0 and (tmp_path / ".venv/.installed").exists()
    assert "some hundred megabytes are downloaded" in done.stdout and "Collecting mlx: -m pip install" in done.stdout
    assert "--quiet" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_installation_that_fails_names_the_way_to_a_mirror(tmp_path: Path) -> None:
    done = install(tmp_path, 1)
    assert done.returncode != 0 and not (tmp_path / ".venv/.installed").exists()
    assert "PIP_INDEX_URL=https://MIRROR/simple make .venv/.installed" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_tools_and_program_are_installed_at_once(tmp_path: Path) -> None:
    done = install(tmp_path, 0, "develop")
    assert done.returncode == 0 and done.stdout.count("Collecting mlx") == 1 and "-e .[dev]" in done.stdout
    again = subprocess.run(["make", "--question", ".venv/.installed"], cwd=tmp_path, timeout=60)
    assert again.returncode == 0, "the program is installed already"
