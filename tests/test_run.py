"""The pipeline: each step when its inputs changed and not otherwise, resumed wherever it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh import run
from mlx_zh.errors import RecipeError, StorageError
from mlx_zh.pipeline import energy, process, runner
from mlx_zh.pipeline import steps as table
from mlx_zh.pipeline.process import run_stage
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.stages import outlook, preflight
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.locks import Lock, locked

ALL = ["prepare", "eval-base", "sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report"]
STAGES = {"prepare", "eval", "sft", "dpo", "fuse", "report"}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes here name a model that there is not, since no stage runs."""
    monkeypatch.setattr(preflight, "problems", lambda *_: [])
    monkeypatch.setattr(outlook, "show", lambda *_: True)


class Stages:
    """Stands in for the stages' processes: writes what they leave, made of what it is made from."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fresh: list[str] = []
        self.renewed: list[str] = []
        self.stop_at: str | None = None
        self.sizes: dict[str, int] = {}

    def __call__(self, stage: str, arguments: list[str], lock: Lock) -> int:
        recipe = load_recipe(arguments[0], [text for text in arguments[1:] if "=" in text])
        model = arguments[arguments.index("--stage") + 1] if "--stage" in arguments else None
        name = f"{stage}-{model}" if model else stage
        self.ran.append(name)
        if "--fresh" in arguments:
            self.fresh.append(name)
        elif "--renew" in arguments:
            self.renewed.append(name)
        if name == self.stop_at:
            return 130
        self._leave(recipe, stage, model)
        return 0

    def _leave(self, recipe: Recipe, stage: str, model: str | None) -> None:
        folder = recipe.run_folder()
        if stage == "sft":
            data = Path(recipe.data.sft.train[0].path).read_bytes()
            self._write(folder / "sft/adapters/adapters.safetensors", recipe.sft, data.strip())
            told = json.loads((folder / "data/report.json").read_text())  # training tells more of the data
            told["sft"]["epochs"] = recipe.sft.epochs
            (folder / "data/report.json").write_text(json.dumps(told))
            metrics = [{"step": 1, "peak_memory_gb": 2.5}, {"step": 1, "eval_loss": 1.0}]
            (folder / "sft/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        elif stage == "dpo":
            sft = (folder / "sft/adapters/adapters.safetensors").read_bytes()
            self._write(folder / "dpo/adapters/adapters.safetensors", recipe.dpo, sft)
        elif stage == "prepare":
            keys = {s: {"key": getattr(recipe.data, s).model_dump_json()} for s in ("sft", "dpo")}
            keys["sft"]["epochs"] = recipe.sft.epochs
            (folder / "data").mkdir(parents=True, exist_ok=True)
            (folder / "data/report.json").write_text(json.dumps(keys))
        elif stage == "eval":
            adapter = folder / str(model) / "adapters/adapters.safetensors"
            self._write(folder / f"eval/{model}-ceval.jsonl", adapter.read_bytes() if adapter.exists() else b"")
            self._write(folder / f"eval/{model}-ceval.json", recipe.evaluate)
        else:
            left = {"fuse": "fused/mlx/model.safetensors", "report": "report.md"}
            self._write(folder / left[stage], recipe)

    @staticmethod
    def _write(path: Path, *made_of: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(hashlib.sha256(repr(made_of).encode()).hexdigest())

    def taken(self) -> list[str]:
        """What ran since the last look."""
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_stage", found)
    monkeypatch.setattr(table, "find_spec", lambda name: name.removeprefix("mlx_zh.") in STAGES or None)
    Path("sft.jsonl").write_text("one\n")
    Path("dpo.jsonl").write_text("two\n")
    write_recipe()
    return found


def write_recipe(**changes: Any) -> None:
    recipe = {
        "name": "r",
        "model": {"path": "org/model"},
        "data": {"sft": {"train": ["sft.jsonl"]}, "dpo": {"train": ["dpo.jsonl"]}},
        "evaluate": {"benchmarks": ["ceval"]},
        "export": {"formats": ["mlx"]},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | changes))


def go(*arguments: str) -> int:
    return run.main(["recipe.yaml", *arguments])


# What runs


def test_a_run_does_everything_in_order_and_a_second_one_nothing(stages, capsys):
    assert go() == 0
    assert stages.taken() == ALL
    capsys.readouterr()
    assert go() == 0
    assert stages.taken() == []
    assert "Nothing to do: runs/r is up to date." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("dpo.beta=0.3", ["dpo", "eval-dpo", "fuse", "report"]),
        ("sft.learning_rate=1e-5", ["sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report"]),
        ("lora.rank=4", ["sft", "dpo", "report"]),  # these stages make the same of it, so no more need run
        ("sft.epochs=2", ["sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report"]),
        ("memory.micro_tokens=64", ["report"]),  # memory settings never change a result
        ("evaluate.protocol=chat", ["eval-base", "eval-sft", "eval-dpo", "report"]),
        ("evaluate.prompts=[你好]", ["sft", "dpo", "report"]),
        ("evaluate.max_new_tokens=9", ["sft", "dpo", "report"]),  # both ask their models again
        ("evaluate.prompts=[{prompt: 你好, expect: 好}]", ["sft", "dpo", "report"]),
        ("data.variables.name=小明", ["prepare", "sft", "dpo", "fuse", "report"]),  # no exam and no base names it
        ("export.bits=8", ["fuse", "report"]),
        ("export.recover=true", ["fuse", "report"]),
        ("data.dpo.train=[{path: dpo.jsonl, max_samples: 1}]", ["prepare", "dpo", "report"]),
        ("seed=1", ["prepare", "eval-base", "sft", "eval-sft", "dpo", "eval-dpo", "report"]),
    ],
)
def test_a_change_redoes_what_depends_on_it_and_nothing_else(stages, change, expected):
    assert go() == 0
    stages.taken()
    assert go(change) == 0
    assert stages.taken() == expected
    assert go(change) == 0 and stages.taken() == []


def test_a_changed_data_file_redoes_its_stages(stages):
    go()
    stages.taken()
    Path("dpo.jsonl").write_text("three\n")
    assert go() == 0
    assert stages.taken() == ["prepare", "dpo"]  # a stage that makes the same is followed by none
    Path("sft.jsonl").write_text("another\n")
    assert go() == 0
    assert stages.taken() == ["prepare", "sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report"]


def entry(**values: Any) -> str:
    fields = {"hub": "file", "id": "rows.jsonl", "kind": "sft", "columns": {"prompt": "q", "response": "good"}}
    return yaml.safe_dump({"mine": fields | values})


def keeping_time(path: str, text: str) -> None:
    """Write a file again with the same size and time of modification."""
    stat = Path(path).stat()
    Path(path).write_text(text)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Path(path).stat().st_size == stat.st_size


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: keeping_time("rows.jsonl", "b" * 2**21), "rows.jsonl changed"),
        (lambda: Path("registry.yaml").write_text(entry(format="pairs")), 'format of mine "auto" -> "pairs"'),
        (lambda: Path("registry.yaml").write_text(entry(columns={"prompt": "q", "response": "poor"})), '-> "poor"'),
        (lambda: Path("registry.yaml").write_text(entry(id="sft.jsonl")), 'id of mine "rows.jsonl" -> "sft.jsonl"'),
        (lambda: keeping_time("exam/val/law_val.csv", "two"), "exam changed"),
        (lambda: Path("registry.yaml").write_text(entry(note="read me")), None),
    ],
)
def test_what_stands_behind_a_name_is_an_input_too(stages, change, reason, capsys):
    """The same size and time as before hide nothing, also of files beyond a megabyte."""
    Path("exam/val").mkdir(parents=True)
    Path("exam/val/law_val.csv").write_text("one")
    Path("rows.jsonl").write_text("a" * 2**21)
    Path("registry.yaml").write_text(entry())
    data = {"sft": {"train": ["sft.jsonl"], "validation": [{"name": "mine"}]}, "registry_file": "registry.yaml"}
    write_recipe(data=data, evaluate={"benchmarks": ["ceval"], "folder": {"ceval": "exam"}})
    go()
    stages.taken()
    assert go() == 0 and not stages.taken()
    capsys.readouterr()
    change()
    go()
    if reason is None:
        assert not stages.taken()
    else:
        assert stages.taken()[0] == "prepare" and reason in capsys.readouterr().out


def test_the_records_of_an_earlier_version_are_made_again_without_a_new_training(stages, capsys):
    """A training stage compares its own folder, so it is not told to start over."""
    go()
    path = Path("runs/r/pipeline.json")
    records = json.loads(path.read_text())
    for record in records["stages"].values():
        del record["version"]
    path.write_text(json.dumps(records))
    stages.taken(), stages.renewed.clear()
    capsys.readouterr()
    go()
    assert "an earlier version recorded it" in capsys.readouterr().out
    assert stages.taken() == ALL and not stages.fresh and stages.renewed == ["sft", "dpo"]
    assert go() == 0 and not stages.taken()


def test_a_result_that_is_gone_or_was_changed_is_made_again(stages):
    go()
    stages.taken()
    Path("runs/r/eval/sft-ceval.jsonl").unlink()
    assert go() == 0 and stages.taken() == ["eval-sft"]
    Path("runs/r/report.md").write_text("mine")
    assert go() == 0 and stages.taken() == ["report"]
    Path("runs/r/pipeline.json").write_text("{")
    assert go() == 0 and stages.taken() == ALL


def test_figures_added_to_a_fused_model_do_not_write_it_again(stages):
    """`eval --stage fused` adds to its card and summary; a recovery that was stopped leaves blocks beside it."""
    fused = Path("runs/r/fused")
    (fused / "mlx").mkdir(parents=True)
    (fused / "mlx/README.md").write_text("card")
    (fused / "summary.json").write_text("{}")
    go()
    stages.taken()
    (fused / "mlx/README.md").write_text("card, with exams")
    (fused / ".recover").mkdir()
    (fused / ".recover/block-000.safetensors").write_text("0")
    assert go() == 0 and not stages.taken()
    (fused / "summary.json").write_text('{"mlx": {"exams": {}}}')
    assert go() == 0 and stages.taken() == ["report"]
    (fused / "mlx/model.safetensors").write_text("another")
    assert go() == 0 and stages.taken() == ["fuse", "report"]


def test_steps_that_the_recipe_does_not_ask_for_are_left_out(stages):
    write_recipe(evaluate={}, data={"sft": {"train": ["sft.jsonl"]}})
    assert go() == 0 and stages.taken() == ["prepare", "sft", "fuse", "report"]
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    del recipe["export"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert go("name=other") == 0 and stages.taken() == ["prepare", "sft", "report"]
    assert go("name=third", "data.sft.train=[]", "evaluate.benchmarks=[ceval]") == 0
    assert stages.taken() == ["eval-base", "report"]


def test_dpo_may_start_from_the_base(stages):
    recipe = load_recipe("recipe.yaml")
    steps = {s.name: s for s in table.steps(recipe, RunFolder.of(recipe))}
    assert steps["dpo"].after == ("prepare", "sft")
    recipe = load_recipe("recipe.yaml", ["dpo.start=base"])
    steps = {s.name: s for s in table.steps(recipe, RunFolder.of(recipe))}
    assert steps["dpo"].after == ("prepare",) and steps["dpo"].prepared == "dpo"


# --from and --dry-run


def test_from_runs_a_step_and_those_after_it_again(stages):
    go()
    stages.taken()
    assert go("--from", "dpo") == 0
    assert stages.taken() == ["dpo", "eval-dpo", "fuse", "report"] and stages.fresh == ["dpo"]
    stages.stop_at = "eval-dpo"
    assert go("--from", "dpo") == 130
    stages.stop_at = None
    stages.taken()
    assert go() == 0  # it remembers what was asked for
    assert stages.taken() == ["eval-dpo", "fuse", "report"]


def test_from_needs_a_step_of_this_recipe(stages):
    write_recipe(evaluate={})
    with pytest.raises(
        RecipeError, match="this recipe has no step of that name; choose from prepare, sft, dpo, fuse"
    ):
        go("--from", "eval-sft")
    with pytest.raises(RecipeError, match="there is no step of that name"):
        go("--from", "train")


def test_a_dry_run_says_what_would_run_and_why_and_writes_nothing(stages, capsys):
    assert go("--dry-run") == 0
    assert stages.taken() == [] and not Path("runs").exists()
    assert capsys.readouterr().out.count("first run") == 8
    go()
    stages.taken()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    capsys.readouterr()
    assert go("--dry-run", "sft.learning_rate=1e-5", "dpo.beta=0.3") == 0
    assert stages.taken() == [] and before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["eval-base"].endswith("up to date") and " done " in lines["eval-base"]
    assert lines["sft"].endswith("sft.learning_rate 0.0001 -> 1e-05")
    assert "about 0 s" in lines["sft"] and "2.50 GB" in lines["sft"]
    assert lines["eval-sft"].endswith("if sft gives another result")
    assert lines["dpo"].endswith("dpo.beta 0.1 -> 0.3")


def test_estimates_come_from_another_run_of_the_same_model(stages, capsys):
    go()
    capsys.readouterr()
    go("--dry-run", "name=second")
    assert capsys.readouterr().out.count("about") == 8
    go("--dry-run", "name=third", "model.path=org/other")
    assert "about" not in capsys.readouterr().out


# Interruptions


@pytest.mark.parametrize("step", ALL)
def test_a_run_goes_on_in_the_step_where_it_was_stopped(stages, step, capsys):
    stages.stop_at = step
    assert go() == 130
    assert stages.taken() == ALL[: ALL.index(step) + 1]
    assert "the same command goes on from here" in capsys.readouterr().out
    stages.stop_at = None
    assert go() == 0
    assert stages.taken() == ALL[ALL.index(step) :]
    assert stages.fresh == []  # a training step takes up its checkpoints
    assert go() == 0 and stages.taken() == []


def test_a_stopped_training_with_other_settings_begins_anew(stages):
    stages.stop_at = "sft"
    go()
    stages.stop_at = None
    assert go("sft.learning_rate=1e-5") == 0
    assert stages.fresh == ["sft"]


def test_a_training_that_the_pipeline_did_not_begin_may_have_other_settings(stages):
    assert go() == 0
    assert stages.renewed == ["sft", "dpo"] and stages.fresh == []


def test_another_adapter_to_start_from_trains_again(stages):
    for text in ("one", "two"):
        Path("old").mkdir(exist_ok=True)
        Path("old/adapters.safetensors").write_text(text)
        assert go("sft.start=old") == 0
        assert "sft" in stages.taken()
    assert go("sft.start=old") == 0 and stages.taken() == []


def test_a_failing_stage_ends_the_run_with_its_status(stages, monkeypatch):
    monkeypatch.setattr(runner, "run_stage", lambda stage, arguments, lock: 2)
    assert go() == 2
    assert json.loads(Path("runs/r/pipeline.json").read_text())["stages"].keys() == {"prepare"}


def test_two_runs_do_not_work_in_one_folder(stages):
    with (
        locked(Path("runs/r"), "sft"),
        pytest.raises(StorageError, match=r"another run is at work in runs/r: sft, process \d+, since 2"),
    ):
        go()
    assert go() == 0


# Processes


def script(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(path))


def test_a_stage_gets_its_arguments_and_gives_its_status(tmp_path, monkeypatch, capfd):
    script(tmp_path / "python", 'echo "$@"; exit 3', monkeypatch)
    with locked(tmp_path / "r", "run") as lock:
        assert run_stage("sft", ["recipe.yaml", "seed=1"], lock) == 3
    assert capfd.readouterr().out == "-m mlx_zh.sft recipe.yaml seed=1\n"


def test_a_stage_that_a_signal_ends_is_told_as_a_shell_tells_it(tmp_path, monkeypatch):
    script(tmp_path / "python", "kill -KILL $$", monkeypatch)
    with locked(tmp_path / "r", "run") as lock:
        assert run_stage("sft", [], lock) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "at_terminal", "status"), [(15, True, 7), (2, False, 7), (2, True, 0)])
def test_signals_reach_the_stage_once(tmp_path, monkeypatch, number, at_terminal, status):
    """At a terminal Ctrl-C reaches the stage without us."""
    ready = tmp_path / "ready"
    waiting = "i=0; while [ $i -lt 20 ]; do sleep 0.1; i=$((i + 1)); done; exit 0"
    script(tmp_path / "python", f"trap 'exit 7' INT TERM\necho > {ready}\n{waiting}", monkeypatch)
    monkeypatch.setattr(process, "in_foreground", lambda: at_terminal)

    def send() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with locked(tmp_path / "r", "run") as lock:
        assert run_stage("sft", [], lock) == status
    sender.join()


def test_a_run_that_is_up_to_date_is_quick_and_imports_nothing_heavy(stages, monkeypatch):
    monkeypatch.setattr(table, "find_spec", find_spec)  # the steps that there are in a process of its own
    go()
    records = Path("runs/r/pipeline.json")
    code = (
        "import sys\nfrom mlx_zh.run import main\nstatus = main(['recipe.yaml'])\n"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'datasets', 'matplotlib', 'torch'}\n"
        "print(status, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    before = records.read_bytes()
    used = os.times().children_user + os.times().children_system  # not the clock: the machine may be busy
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds = os.times().children_user + os.times().children_system - used
    assert (shown.stderr, seconds < 5) == ("0 []\n", True)
    assert "Nothing to do" in shown.stdout and records.read_bytes() == before


# Energy


def test_energy_is_read_where_linux_counts_it(tmp_path, monkeypatch):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "energy_uj").write_text("9000000\n")
    (package / "max_energy_range_uj").write_text("10000000\n")
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    with energy.Meter() as meter:
        (package / "energy_uj").write_text("9500000\n")
    assert meter.joules == 0.5
    with energy.Meter() as meter:
        (package / "energy_uj").write_text("500000\n")  # the counter came to its end: 0.5 J before and 0.5 J after
    assert meter.joules == 1.0


def test_energy_is_a_macs_power_over_time(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    with energy.Meter() as meter:
        pass
    assert meter.joules is None or sys.platform == "darwin"
    watts: Callable[..., float | None] = energy._mac_watts
    assert watts(lambda: '"PowerTelemetryData" = {"SystemPowerIn"=0,"SystemLoad"=12500,"x"=1}') == 12.5
    assert watts(lambda: "") is None
    monkeypatch.setattr(energy, "_mac_watts", lambda: 10.0)
    with energy.Meter() as meter:
        time.sleep(0.3)
    assert meter.joules == pytest.approx(3.0, rel=0.5)
