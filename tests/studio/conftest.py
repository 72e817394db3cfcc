"""A studio in a process of its own, and projects for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from studio_server import RunningStudio, studio_process

pytest.importorskip("nicegui")


@pytest.fixture
def studio_at() -> Iterator[Callable[..., RunningStudio]]:
    """`studio_at(folder, *options, **environment)` starts a studio that ends with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **environment: stack.enter_context(studio_process(*arguments, **environment))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder without runs."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def tea(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    """A project with a run that has everything, see `prepared_project`; its cache is in it, in `cache`."""
    from prepared_project import prepared_project

    folder: Path = tmp_path_factory.mktemp("tea")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ZH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        # An answer of this model can be so long that there is time to stop it.
        prepared_project(folder, model_folder(max_position_embeddings=65536))
    return folder
