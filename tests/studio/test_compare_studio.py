"""The page Compare: the figures of `mlx-zh compare`, chosen by keys alone, and the same file to keep."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("nicegui")
from hostile_project import HOSTILE, comparable_runs

from mlx_zh.stages.run_list import key_of


@pytest.fixture
def runs(project: Path) -> list[Path]:
    return comparable_runs(project / "runs")


def simulate(project: Path, visit: Callable[..., Awaitable[None]], language: str = "en") -> None:
    """Let `visit(user)` use the studio's pages in NiceGUI's simulation of a user."""
    from nicegui.testing import user_simulation

    from mlx_zh.studio import frame
    from mlx_zh.studio.projects import LANGUAGE_COOKIE, Projects
    from mlx_zh.studio.safety import ASKING, Asking

    async def run() -> None:
        async with user_simulation() as user:
            frame.register(Projects([project]))
            ASKING.set(Asking({LANGUAGE_COOKIE: language}, ""))
            await visit(user)

    modules = dict(sys.modules)
    try:
        asyncio.run(run())
    finally:
        sys.modules.update(modules)  # NiceGUI removes the modules of pages, and the packages that they are in


def test_runs_chosen_by_their_keys_stand_side_by_side(project, runs):
    async def visit(user) -> None:
        await user.open(f"/compare?runs={','.join(map(key_of, runs))}")
        for text in ("Is the comparison fair?", "sft.learning_rate", "0.0003", "+5.50 better", HOSTILE):
            await user.should_see(text, retries=50)

    simulate(project, visit)


def test_keys_that_name_no_run_are_refused(project, runs):
    async def visit(user) -> None:
        for keys in ("0123456789abcdef,fedcba9876543210", "../../etc,passwd", f"{key_of(runs[0])},.."):
            await user.open(f"/compare?runs={keys}")
            await user.should_see("There is no such run here", retries=20)
        await user.open(f"/compare?runs={key_of(runs[0])},{key_of(runs[0])}")
        await user.should_see("is there twice")

    simulate(project, visit)


def test_without_a_choice_the_page_says_what_to_do_in_chinese(project, runs):
    async def visit(user) -> None:
        await user.open("/compare")
        await user.should_see("请选择两次或更多次训练")
        await user.should_see("mlx-zh compare RUN RUN")

    simulate(project, visit, "zh")
