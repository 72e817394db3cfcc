"""Experiment trackers: what they are told, and that none of them ever stops a run."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_zh.errors import RecipeError
from mlx_zh.recipe import load_recipe
from mlx_zh.stages.trackers import TRACKERS, About, Trackers
from mlx_zh.system.environment import pip_install

KEYS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "SWANLAB_MODE", "SWANLAB_API_KEY")


class Run:
    """A run of SwanLab or Weights & Biases."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, figures: dict[str, float], *, step: int) -> None:
        self.lines.append((step, figures))

    def finish(self) -> None:
        self.finished = True


class Module(SimpleNamespace):
    """Stands in for `swanlab` or `wandb`."""

    def __init__(self) -> None:
        super().__init__(Settings=lambda **options: options, run=Run(), options={})

    def init(self, **options: Any) -> Run:
        self.options = options
        return self.run


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in anywhere."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Module]:
    found = {"swanlab": Module(), "wandb": Module()}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def about(folder: Path, done: int = 0) -> About:
    config = {"model": {"path": "https://alice:SECRET@host/m"}, "seed": 1}
    return About("tiny", "sft", folder, config, "0123456789abcdef", done)


def opened(folder: Path, *names: str, done: int = 0) -> tuple[Trackers, list[str]]:
    warnings: list[str] = []
    return Trackers(names, about(folder, done), warnings.append), warnings


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What an event file holds: records of a length (8 bytes), its check (4), the event, and its check (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("tensorboard/events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_a_tracker_is_told_every_figure_and_no_secret(name, modules, tmp_path):
    trackers, warnings = opened(tmp_path, name)
    trackers.log({"step": 1, "epoch": 0.5, "loss": 2.0, "rewards/margins": math.nan})
    trackers.log({"step": 1, "epoch": 0.5, "eval_loss": 1.5})
    trackers.close()
    module = modules[name]
    assert module.run.lines == [
        (1, {"train/epoch": 0.5, "train/loss": 2.0}),
        (1, {"train/epoch": 0.5, "eval/loss": 1.5}),
    ]
    assert module.run.finished and warnings == []
    assert (module.options["project"], module.options["name"]) == ("mlx-zh", "tiny-sft")
    assert module.options["config"]["seed"] == 1 and "S3CRET42" not in str(module.options)


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_without_an_account_files_are_kept_and_nobody_is_asked(name, modules, tmp_path):
    opened(tmp_path, name)
    assert modules[name].options["mode"] == "offline"


def test_an_account_or_a_mode_of_ones_own_is_respected(modules, tmp_path, monkeypatch):
    for name, value in (("WANDB_API_KEY", "k"), ("SWANLAB_API_KEY", "k"), ("WANDB_MODE", "x"), ("SWANLAB_MODE", "x")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            module = name.partition("_")[0].lower()
            opened(tmp_path, module)
            assert "mode" not in modules[module].options
    Path("netrc").write_text("machine api.wandb.ai login user password k\n")
    Path("netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", "netrc")
    opened(tmp_path, "wandb")
    assert "mode" not in modules["wandb"].options


def test_a_resumed_run_is_the_same_run(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "k")
    opened(tmp_path, "wandb", "swanlab", done=7)
    for module in modules.values():
        assert (module.options["id"], module.options["resume"]) == ("tiny-sft-01234567", "allow")


def test_tensorboard_files_hold_the_figures(tmp_path):
    trackers, warnings = opened(tmp_path, "tensorboard")
    trackers.log({"step": 1, "loss": 2.0, "grad_norm": math.inf})
    trackers.log({"step": 2, "eval_loss": 1.5})
    trackers.close()
    assert scalars(tmp_path) == [("train/loss", 1, 2.0), ("eval/loss", 2, 1.5)] and warnings == []


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_that_is_not_installed_is_one_warning(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX" if name == "tensorboard" else name, None)
    trackers, warnings = opened(tmp_path, name)
    trackers.log({"step": 1, "loss": 2.0})
    trackers.close()
    assert warnings == [f"{name} is not installed ({pip_install(f'mlx-zh[{name}]')}); training goes on without it."]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("token=S3CRET42\nlong"), SystemExit(1), OSError("no space")])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(moment, error, modules, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise error

    broken = modules["wandb"]
    setattr(broken if moment == "init" else broken.run, moment, fail)
    trackers, warnings = opened(tmp_path, "wandb", "swanlab")
    for step in (1, 2, 3):
        trackers.log({"step": step, "loss": 2.0})
    trackers.close()
    assert len(warnings) == 1 and warnings[0].startswith("wandb failed and is left out from here on: ")
    assert "S3CRET42" not in warnings[0] and "\n" not in warnings[0]
    assert len(modules["swanlab"].run.lines) == 3 and modules["swanlab"].run.finished


def test_ctrl_c_is_no_failure_of_a_tracker(modules, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    trackers, _ = opened(tmp_path, "wandb")
    monkeypatch.setattr(modules["wandb"].run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trackers.log({"step": 1, "loss": 2.0})


# In a run


def test_a_run_is_tracked_and_ends_the_same_without(project):
    tracked = project.train("track=[tensorboard]", name="tracked")
    plain = project.train(name="plain")
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    told = scalars(tracked)
    for name, key in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("grad_norm", "train/grad_norm")):
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert {step: value for tag, step, value in told if tag == key} == pytest.approx(expected, rel=1e-6)
    weights = [(folder / "adapters" / "adapters.safetensors").read_bytes() for folder in (tracked, plain)]
    assert weights[0] == weights[1]


def test_a_failing_tracker_leaves_the_run_as_it_is_and_the_warning_for_the_report(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = project.train("track=[wandb]")
    assert (folder / "adapters" / "adapters.safetensors").exists()
    warnings = [json.loads(line)["text"] for line in (folder / "warnings.jsonl").read_text().splitlines()]
    assert any(text.startswith("wandb is not installed") for text in warnings)


def test_an_unknown_tracker_is_named(project):
    with pytest.raises(
        RecipeError, match=r"track\[0\] must be one of 'tensorboard', 'swanlab', 'wandb', found 'mlflow'"
    ):
        load_recipe("recipe.yaml", ["track=[mlflow]"])
