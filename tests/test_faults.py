"""What a laptop does to a run, done to it: each time the same command goes on to what an undisturbed run has."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import sentences
from disks import remount, small_disk
from project import Project, losses, metrics

from mlx_zh.system.console import StepBar
from mlx_zh.training import checkpoints, sft_objective
from mlx_zh.training.loop import Loop

EVERY_TWO = ["checkpoint.every_steps=2", "sft.eval_steps=3", "lora.dropout=0.1"]
METAL = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:...OutOfMemory)."


def adapter(folder: Path) -> bytes:
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


@pytest.fixture
def straight(project: Project) -> Path:
    """The folder of a run that nothing disturbed."""
    return project.train(*EVERY_TWO, name="straight")


def assert_undisturbed(project: Project, straight: Path) -> None:
    """The same command as before goes on to the same metrics, line for line, and the same adapter, byte for byte."""
    folder = project.train(*EVERY_TWO)
    assert metrics(folder) == metrics(straight)
    assert adapter(folder) == adapter(straight)


def while_shown(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], object]) -> None:
    """Do something while `step` is shown."""
    update: Callable[..., None] = StepBar.update

    def shown(bar: StepBar, figures: dict[str, Any]) -> None:
        update(bar, figures)
        if figures["step"] == step:
            what()

    monkeypatch.setattr(StepBar, "update", shown)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_once_and_twice(
    project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    """Once: the step in hand is saved. Twice: out at once, and the last checkpoint counts.

    A closed terminal may send its signal twice, which counts as once.
    """
    monkeypatch.setattr("mlx_zh.system.interrupts.leave_terminal", lambda: None)  # pytest reads the output
    sent, times = times, 1 if number == signal.SIGHUP else times
    with monkeypatch.context() as patch:
        while_shown(patch, 5, lambda: [signal.raise_signal(number) for _ in range(sent)])
        result = project.sft(*EVERY_TWO)
    assert (result.status, result.err) == (130, "")
    assert ("Stopped after step 5; run the same command to go on from there." in result.out) == (times == 1)
    saved = sorted(path.name for path in Path("runs/tiny/sft/checkpoints").glob("step-*"))
    assert saved[-1] == ("step-000005" if times == 1 else "step-000004")
    assert not Path("runs/tiny/.lock").exists()
    assert_undisturbed(project, straight)


def test_ctrl_c_in_the_middle_of_a_print(project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is being written cannot be entered again; the signal counts all the same."""
    from mlx_zh.system import console

    say = console.say

    def busy(text: str = "") -> None:
        if text.startswith("Finishing this step"):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
        say(text)

    with monkeypatch.context() as patch:
        patch.setattr(console, "say", busy)
        while_shown(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert project.sft(*EVERY_TWO).status == 130
    assert_undisturbed(project, straight)


# Disks


def test_a_full_disk(project: Project, straight: Path, tmp_path: Path) -> None:
    """Checkpoints stop fitting in the middle of the run; with more space the same command goes on."""
    size = sum(file.stat().st_size for file in (straight / "checkpoints" / "step-000006").iterdir())
    with small_disk(tmp_path / "disk", str(int(2.5 * size))) as disk:
        Path("runs/tiny").symlink_to(disk)
        result = project.sft(*EVERY_TWO)
        assert result.status == 2 and "no space left on disk. Nothing half-written was kept" in result.err
        assert result.err.count("\n") == 1
        assert not list(disk.rglob("*.tmp"))
        remount(disk, f"size={10 * size}")
        assert_undisturbed(project, straight)


@pytest.mark.parametrize("save", [1, 2])
def test_a_disk_that_refuses_a_save(
    project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch, save: int
) -> None:
    """The same where no disk can be mounted: the operating system's answer to the second file of a checkpoint."""
    write, calls = checkpoints.write_arrays, []

    def refuse(path: Path, arrays: Any) -> None:
        calls.append(path)
        if len(calls) == 2 * save:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_arrays", refuse)
        result = project.sft(*EVERY_TWO)
    assert result.status == 2 and f"step-{2 * save:06d}: no space left on disk" in result.err
    left = sorted(path.name for path in Path("runs/tiny/sft/checkpoints").iterdir())
    assert left == ["best", *(f"step-{2 * n:06d}" for n in range(1, save))]
    assert_undisturbed(project, straight)


def test_a_read_only_run_folder(project: Project, straight: Path, tmp_path: Path) -> None:
    """Said before the model is read; nothing is there afterwards."""
    if os.geteuid() == 0:
        with small_disk(tmp_path / "disk", "10m") as disk:
            Path("runs/tiny").symlink_to(disk)
            remount(disk, "ro")
            result = project.sft(*EVERY_TWO)
            assert result.err == "error: runs/tiny cannot be written: Read-only file system.\n"
            assert result.status == 2 and not list(disk.iterdir())
            remount(disk, "rw")
            assert_undisturbed(project, straight)
        return
    Path("runs/tiny").mkdir()
    Path("runs/tiny").chmod(0o555)
    result = project.sft(*EVERY_TWO)
    assert (result.status, result.err) == (2, "error: runs/tiny cannot be written: Permission denied.\n")
    Path("runs/tiny").chmod(0o755)
    assert_undisturbed(project, straight)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_in_a_checkpoint(
    project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is named and set aside, and the one before it used."""
    with monkeypatch.context() as patch:
        while_shown(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert project.sft(*EVERY_TWO).status == 130
    path = Path("runs/tiny/sft/checkpoints/step-000005") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = project.sft(*EVERY_TWO)
    assert result.status == 0
    assert f"warning: checkpoint step-000005 is damaged ({name} is not what was written)" in result.out
    assert "set aside as damaged-step-000005" in result.out and "Going on after step 4 of 6." in result.out
    assert_undisturbed(project, straight)


# The clock


def test_a_clock_that_goes_backwards(project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour back with every look at it, in both halves of the run: nothing depends on the time of day."""
    now = [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    with monkeypatch.context() as patch:
        while_shown(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert project.sft(*EVERY_TWO).status == 130
    assert_undisturbed(project, straight)
    lines = [json.loads(line) for line in Path("runs/tiny/sft/metrics.jsonl").read_text().splitlines()]
    elapsed = [line["elapsed_seconds"] for line in lines if "loss" in line]
    assert elapsed == sorted(elapsed) and elapsed[0] >= 0


# Numbers


@pytest.fixture
def spoil(project: Project, tmp_path: Path) -> Callable[[str, int], str]:
    """The model with a row of one weight that is not a number, as a bad download or a bad merge leaves it."""

    def copy(weight: str, row: int) -> str:
        folder = tmp_path / "broken"
        shutil.copytree(project.model, folder)
        weights = mx.load(str(folder / "model.safetensors"))
        weights[weight][row] = math.nan
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        return f"model.path={folder}"

    return copy


def test_a_model_whose_weights_are_no_numbers_is_refused(project: Project, spoil: Callable[[str, int], str]) -> None:
    result = project.sft(spoil("model.layers.2.mlp.down_proj.weight", 0))
    assert result.status == 2 and not Path("runs").exists()
    assert result.err.startswith("error: the model's logits contain NaN or infinity before any training: its weights")


def test_a_run_that_only_skips_is_ended(
    project: Project, spoil: Callable[[str, int], str], byte_tokenizer: Any
) -> None:
    """Every example begins with 第, whose first byte's embedding is not a number; no other token shows that."""
    first = byte_tokenizer.encode("第")[0]
    result = project.sft(spoil("model.embed_tokens.weight", first), "sft.max_skipped_steps=3")
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith(
        "error: 3 steps in a row, up to step 3, were skipped, because their loss or gradient"
    )
    assert result.out.count("was skipped: loss nan") == 3
    folder = Path("runs/tiny/sft")
    assert len((folder / "skipped.jsonl").read_text().splitlines()) == 3
    assert not any((folder / name).exists() for name in ("adapters", "summary.json", "checkpoints"))


def test_examples_of_skipped_steps_are_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = sft_objective.sft_loss
    calls: list[int] = []

    def spoiled(logprobs: mx.array, count: int) -> mx.array:
        calls.append(count)
        return loss(logprobs, count) * (math.nan if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(sft_objective, "sft_loss", spoiled)
    project.write_data("validation.jsonl", ())
    result = project.sft("data.sft.validation=[]")
    assert result.status == 0
    lines = [line for line in metrics(Path("runs/tiny/sft")) if "skipped_examples" in line]
    kept = [json.loads(line) for line in Path("runs/tiny/sft/skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in kept] == [2, 3]
    for line in lines:
        assert len(line["skipped_examples"]) == 4
        told = f"warning: step {line['step']} was skipped: loss nan, gradient norm nan; examples "
        assert f"{told}{line['skipped_examples']}" in result.out
    warnings = sentences.kept(Path("runs/tiny/sft/warnings.jsonl"))
    assert [w and (w.code, w.values["step"]) for w in warnings] == [("step-skipped", 2), ("step-skipped", 3)]
    assert json.loads(Path("runs/tiny/sft/summary.json").read_text())["skipped_steps"] == 2


# Memory


def test_memory_that_runs_out_is_told_and_the_result_is_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = project.train(name="straight")
    forward = sft_objective.batch_logprobs

    def tight(model: Any, batch: Any, **options: Any) -> mx.array:
        if options["grad"] and batch.tokens.size > 120:
            raise RuntimeError(METAL)
        return forward(model, batch, **options)

    monkeypatch.setattr(sft_objective, "batch_logprobs", tight)
    result = project.sft()
    assert (result.status, result.err) == (0, "")
    assert "warning: step 1 ran out of memory and is done again in rows of " in result.out
    assert losses(Path("runs/tiny/sft")) == pytest.approx(losses(straight), rel=1e-5)


def test_memory_that_is_never_enough_is_one_paragraph(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, and outside of steps, where there is nothing to cut."""

    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 1073741824 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(sft_objective, "batch_logprobs", none)
        result = project.sft("data.sft.validation=[]")
    assert result.status == 2
    assert result.err.startswith(
        "error: step 1 does not fit into memory, not even one example at a time (the longest"
    )
    monkeypatch.setattr(Loop, "_save", none)
    result = project.sft("data.sft.validation=[]")
    assert result.status == 2 and result.err.startswith(
        "error: memory ran out: [malloc] Unable to allocate 1073741824"
    )
    assert result.err.count("\n") == 1


# What may change between two halves of a run


def test_a_run_whose_places_moved_goes_on(project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, data and run folder lie elsewhere now, and other memory, logging and saving is asked for."""
    with monkeypatch.context() as patch:
        while_shown(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert project.sft(*EVERY_TWO).status == 130
    shutil.copytree(project.model, "elsewhere")
    Path("moved").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.move(name, "moved")
    shutil.move("runs/tiny", "moved/tiny")
    result = project.sft(
        *EVERY_TWO,
        "model.path=elsewhere",
        "data.sft.train=[moved/train.jsonl]",
        "data.sft.validation=[moved/validation.jsonl]",
        "runs=moved",
        "checkpoint.keep=5",
        "sft.max_skipped_steps=9",
    )
    assert (result.status, result.err) == (0, "")
    assert "Going on after step 3 of 6." in result.out
    folder = Path("moved/tiny/sft")
    assert metrics(folder) == metrics(straight) and adapter(folder) == adapter(straight)


def test_resume_never_starts_over(project: Project, straight: Path) -> None:
    project.train(*EVERY_TWO)
    result = project.sft(*EVERY_TWO, "resume=never")
    assert result.status == 0 and "The earlier run is kept in runs/tiny/sft-old1." in result.out
    assert "Going on" not in result.out and "is finished" not in result.out
    assert adapter(Path("runs/tiny/sft")) == adapter(straight)


# Folders


@pytest.mark.parametrize("moved", ["runs", "runs/tiny", "runs/tiny/sft"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_that_is_moved_or_removed_while_a_run_writes_there(
    project: Project, straight: Path, monkeypatch: pytest.MonkeyPatch, moved: str, gone: bool
) -> None:
    """The run ends with an error, makes nothing anew, and goes on once the folder is back."""
    with monkeypatch.context() as patch:
        while_shown(patch, 3, lambda: Path(moved).rename("elsewhere"))
        result = project.sft(*EVERY_TWO)
    assert result.status == 2 and "was moved, removed or replaced while this command was writing there" in result.err
    assert not Path("runs/tiny/sft").exists()
    if gone:
        shutil.rmtree("elsewhere")
        if moved == "runs":
            return  # with the undisturbed run in it
    else:
        shutil.rmtree(moved, ignore_errors=True)
        Path("elsewhere").rename(moved)
    assert_undisturbed(project, straight)


# What a finished run lacks


def answers() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(Path("runs/tiny/samples.json").read_text(encoding="utf-8"))
    return stored["answers"]


def test_answers_that_a_kill_took_and_new_prompts_are_asked_of_a_finished_run(project: Project) -> None:
    """Nothing is trained for it; the answers are those that the run would have stored."""
    prompts = ["evaluate.prompts=[你好]", "evaluate.max_new_tokens=4"]
    folder = project.train(*prompts)
    expected, trained = answers(), adapter(folder)
    assert expected.keys() == {"base", "sft"}
    path = Path("runs/tiny/samples.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["answers"]["sft"], stored["keys"]["sft"]
    for left in (json.dumps(stored), "{", ""):
        path.write_text(left, encoding="utf-8")
        result = project.sft(*prompts)
        assert result.status == 0 and "nothing is left to train" in result.out
        assert answers() == expected
    path.unlink()
    assert project.sft("evaluate.prompts=[第1个字？, 你好]", "evaluate.max_new_tokens=4").status == 0
    assert [found[1:] for found in answers().values()] == list(expected.values())
    assert adapter(folder) == trained


def test_a_finished_run_without_checkpoints_is_not_trained_again(project: Project) -> None:
    """Deleting them frees space. The adapter stays, also where other settings are asked for, or nothing is known."""
    folder = project.train()
    trained = adapter(folder)
    shutil.rmtree(folder / "checkpoints")
    assert "is finished: nothing is left to train" in project.sft().out
    result = project.sft("sft.learning_rate=3e-4")
    assert result.status == 2 and "holds a run with other settings: sft.learning_rate" in result.err
    (folder / "settings.json").unlink()
    assert project.sft("sft.learning_rate=3e-4").status == 2
    assert adapter(folder) == trained
    (folder / "summary.json").unlink()
    result = project.sft()
    assert result.status == 0 and "The earlier run is kept in runs/tiny/sft-old1." in result.out
    assert adapter(Path("runs/tiny/sft-old1")) == trained
