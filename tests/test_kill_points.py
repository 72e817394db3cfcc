"""A stage killed before any file operation, or by a power cut there, is repaired by the same command.

`make soak` tries hundreds of operations of every stage; here are one of the data and one of training.
"""

from __future__ import annotations

import random
from pathlib import Path

from kill_points import KillPoints, server, small_project
from project import Project


def test_a_kill_or_a_power_cut_leaves_nothing_that_the_next_run_does_not_repair(project: Project, tmp_path: Path):
    small_project(project.recipe)
    chance = random.Random(5)
    with server() as forks:
        points = KillPoints(forks, tmp_path / "points")
        points.straight(("prepare", "sft"))
        for stage, power in (("prepare", 1), ("sft", None)):
            assert points.kill(stage, chance.randint(1, points.operations[stage]), power=power) is None
