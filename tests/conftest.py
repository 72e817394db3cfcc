"""Shared fixtures: tiny random models and the places of the real samples."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network says so with a marker
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real samples of public data sets; they lie beside the checkout where the project is developed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real samples are not here (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The small real model, obtained as a user obtains it. Use with the marker `network`."""
    from mlx_zh.errors import DownloadError
    from mlx_zh.models.load import BUILT_IN, resolve_model

    try:
        return resolve_model(BUILT_IN)
    except DownloadError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def run_stage():
    """Call a stage's `main` and return its exit status, whether it returns or exits."""

    def run(main, *argv: object) -> int:
        try:
            status = main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        return 0 if status is None else int(status)

    return run
