"""A stage killed before any file operation, or by a power cut there, is repaired by the same command.

`make soak` tries every operation; here are a few of each stage.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from kill_points import STAGES, KillPoints, server, small_project
from project import Project

POINTS = int(os.environ.get("KILL_POINTS", "1"))


def test_a_few_kills_of_every_stage_leave_nothing_that_the_next_run_does_not_repair(project: Project, tmp_path: Path):
    small_project(project.recipe)
    chance = random.Random(5)
    with server() as forks:
        points = KillPoints(forks, tmp_path / "points")
        points.straight()
        for stage in STAGES:
            for _ in range(POINTS):
                number = chance.randint(1, points.operations[stage])
                assert points.kill(stage, number, power=chance.choice([None, number])) is None
