"""A folder with a recipe, data and a tiny model, and the SFT stage run in it as its user runs it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mlx_zh import sft
from mlx_zh.system.entry import entry
from mlx_zh.system.locks import Lock

Pair = tuple[str, str]
TRAIN: tuple[Pair, ...] = tuple((f"第{n}个字？", "好的" * (1 + n % 3)) for n in range(12))
VALIDATION: tuple[Pair, ...] = (("第一个字？", "好的好的"), ("第二个字？", "好"))
VARYING = {"tokens_per_second", "peak_memory_gb", "elapsed_seconds"}  # figures that differ from run to run


@dataclass(frozen=True)
class Result:
    """What a run of the stage left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@dataclass
class Project:
    """The current folder of a test; relative paths are in it."""

    model: Path
    capsys: pytest.CaptureFixture[str]
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.write_data("train.jsonl", TRAIN)
        self.write_data("validation.jsonl", VALIDATION)
        self.recipe = {
            "name": "tiny",
            "model": {"path": str(self.model)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"sft": {"train": ["train.jsonl"], "validation": ["validation.jsonl"]}, "max_length": 128},
            "sft": {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2},
        }
        self.write_recipe()

    @staticmethod
    def write_data(name: str, pairs: tuple[Pair, ...]) -> None:
        rows = [{"messages": [message("user", asked), message("assistant", said)]} for asked, said in pairs]
        Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def write_recipe(self) -> None:
        Path("recipe.yaml").write_text(yaml.safe_dump(self.recipe, allow_unicode=True), encoding="utf-8")

    def sft(self, *arguments: str) -> Result:
        """`mlx-zh sft recipe.yaml ARGUMENTS`, in this process."""
        return self.run(sft.main, *arguments)

    def run(self, main: Callable[[list[str] | None], int], *arguments: str) -> Result:
        """A stage with this recipe, in this process."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry(main, ["recipe.yaml", *arguments])
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, *self.capsys.readouterr())

    def train(self, *arguments: str, name: str = "tiny") -> Path:
        """The folder of a run that must end well: `runs/NAME/sft`."""
        result = self.sft(f"name={name}", *arguments)
        assert (result.status, result.err) == (0, ""), result
        return Path("runs", name, "sft")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, "-m", "mlx_zh.sft", "recipe.yaml", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **(pipes | options))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run without the figures that no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(folder) if name in line]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file under a folder: when it was written, and its bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if the user pressed Ctrl-C while `step` is shown."""
    from mlx_zh.system.console import StepBar

    update: Callable[..., None] = StepBar.update

    def shown(bar: StepBar, figures: dict[str, Any]) -> None:
        update(bar, figures)
        if figures["step"] == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepBar, "update", shown)


def run_stages_here(
    monkeypatch: pytest.MonkeyPatch,
    modules: Sequence[ModuleType],
    name: Callable[[str, Sequence[str]], str] = lambda stage, arguments: stage,
) -> Callable[[], list[str]]:
    """Let the pipeline run stages in this process, which spares their imports.

    `run_stage` is replaced in each of `modules`. Returns a function that gives what ran since its last call, each as
    `name` of a stage and its arguments.
    """
    names: list[str] = []

    def run_here(stage: str, arguments: list[str], lock: Lock) -> int:
        names.append(name(stage, arguments))
        with monkeypatch.context() as stage_only:
            for variable, value in lock.environment.items():
                stage_only.setenv(variable, value)
            return importlib.import_module(f"mlx_zh.{stage}").main(list(arguments)) or 0

    def taken() -> list[str]:
        ran = names[:]
        names.clear()
        return ran

    for module in modules:
        monkeypatch.setattr(module, "run_stage", run_here)
    return taken
