"""A stage killed or disturbed before any file operation is repaired by the same command.

`make soak` tries hundreds of operations of every stage; here are one of the data and one of training.
"""

from __future__ import annotations

import random
from pathlib import Path

from kill_points import KillPoints, server, small_project
from project import Project


def test_a_kill_a_power_cut_a_signal_or_a_full_disk_leaves_nothing_that_the_next_run_does_not_repair(
    project: Project, tmp_path: Path
):
    small_project(project.recipe)
    chance = random.Random(5)
    with server() as forks:
        points = KillPoints(forks, tmp_path / "points")
        points.straight(("prepare", "sft", "eval sft", "fuse", "report"))
        for stage, power in (("prepare", 1), ("sft", None)):
            assert points.kill(stage, chance.randint(1, points.operations[stage]), power=power) is None
        disturbed = {"prepare": "EFBIG", "sft": "SIGHUP", "eval sft": "SIGTERM", "fuse": "ENOSPC", "report": "SIGINT"}
        for stage, what in disturbed.items():
            assert points.disturb(stage, chance.randint(1, points.operations[stage]), what) is None
