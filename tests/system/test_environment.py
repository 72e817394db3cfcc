"""Commands for the user name the environment that this program runs in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_zh.system.environment import pip_install, python


def test_pip_is_the_environments_own(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert pip_install("mlx-zh[opencc]") == ".venv/bin/python -m pip install 'mlx-zh[opencc]'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pip_install("a", "b") == f"{tmp_path}/.venv/bin/python -m pip install 'a' 'b'"


def test_the_command_runs_in_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Also where the path of the environment has a space."""
    place = tmp_path / "my folder" / "python"
    place.parent.mkdir()
    place.write_text('#!/bin/sh\necho "$@"\n')
    place.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(place))
    done = subprocess.run(pip_install("mlx-zh[swanlab]"), shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "-m pip install mlx-zh[swanlab]\n" and python() == str(place)
