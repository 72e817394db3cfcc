"""JSON files of a finished run that have another shape: no command ends with a traceback.

Here are some cases of each file; `python tests/damaged_json.py` tries all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damaged_json import battery, some_of_each
from kill_points import small_project
from project import Project


@pytest.mark.thorough
def test_every_command_reads_or_refuses_them(project: Project, tmp_path: Path) -> None:
    small_project(project.recipe)
    words = os.environ.get("DAMAGED_WORDS")
    with battery(tmp_path / "battery") as commands:
        wrong = []
        for case in some_of_each(commands) if words is None else commands.cases(words.split()):
            if (fault := commands.fault(case)) is not None:
                wrong.append(fault)
                with project.capsys.disabled():
                    print(fault, flush=True)
    assert wrong == []
