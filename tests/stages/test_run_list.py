"""The list of runs: states, figures, what is not followed, and that nothing is read twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_zh.errors import DataError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.stages import run_list
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_list import KILLED, RunList
from mlx_zh.system.interrupts import Stopped
from mlx_zh.system.locks import NAME as LOCK

STEP = {"step": 7, "epoch": 0.5, "loss": 1.5, "elapsed_seconds": 1800.0}
DONE = {"outputs": {"a": "b"}, "seconds": 1800.0}


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make(name, **records)`: a run folder whose pipeline has these records, and that trained 7 steps of SFT."""

    def run(name: str, *, metrics: bool = True, **records: Any) -> Path:
        folder = tmp_path / "runs" / name
        write(folder / "pipeline.json", {"stages": records})
        text = "model: {path: qwen3-0.6b}\ndata: {sft: {train: [{path: rows.jsonl}, {name: zhihu}]}}\n"
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        if metrics:
            write(
                folder / "sft" / "metrics.jsonl", {"step": 0, "eval_loss": 2.5}, STEP, {"step": 7, "eval_loss": 1.25}
            )
        return folder

    return run


def states(folder: Path) -> dict[str, tuple[str, str | None]]:
    return {info.name: (info.state, info.why) for info in RunList([folder]).read()}


def test_the_state_is_what_the_run_folder_says(tmp_path: Path, make: Callable[..., Path]) -> None:
    make("done", prepare=DONE, sft=DONE, report=DONE)
    make("stopped", prepare=DONE, sft={"outputs": None, "seconds": 3.0})
    make("between", prepare=DONE, sft=DONE)
    make("waiting", metrics=False)
    (make("killed", sft={"outputs": None}) / ".lock").write_text('{"what": "run", "process": 1, "since": ""}')
    write(make("failed", sft={"outputs": None}) / "ended.json", {"how": "failed", "why": "no space left"})
    write(make("asked", sft={"outputs": None}) / "ended.json", {"how": "stopped", "why": "KeyboardInterrupt"})
    (tmp_path / "runs" / "no run").mkdir()
    assert states(tmp_path) == {
        "done": ("done", None),
        "stopped": ("stopped", None),
        "between": ("stopped", None),
        "waiting": ("waiting", None),
        "killed": ("stopped", KILLED),
        "failed": ("failed", "no space left"),
        "asked": ("stopped", None),
    }


def test_a_run_in_a_terminal_is_running_as_long_as_its_process_lives(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlx_zh.stages.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).at_work('sft'): print('here', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "runs" / "mine"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        (info,) = RunList([tmp_path]).read()
        assert (info.state, info.process) == ("running", process.pid)
        process.kill()
        process.wait()
        (info,) = RunList([tmp_path]).read()
        assert (info.state, info.why) == ("stopped", KILLED)


def test_the_main_figures_are_those_that_the_run_wrote(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make("a", prepare={**DONE, "seconds": 1800.0}, sft={"outputs": None, "seconds": 0.0})
    write(folder / "eval" / "sft-cmmlu.json", {"benchmark": "cmmlu", "against": {"base": {"difference": 0.5}}})
    write(folder / "eval" / "sft-ceval.json", {"benchmark": "ceval", "against": {"base": {"difference": 0.025}}})
    (info,) = RunList([tmp_path]).read()
    assert (info.model, info.data, info.stages, info.step) == ("qwen3-0.6b", ("rows.jsonl", "zhihu"), ("sft",), 7)
    assert info.hours == 1.0  # 1,800 s of prepare and 1,800 s of steps, which the pipeline has not recorded yet
    assert info.best_loss == 1.25
    assert (info.exam, info.exam_gain) == ("ceval", 0.025)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": 3}', '{"stages": {"sft": 1}}', "\x00", "[" * 5000])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, make: Callable[..., Path], text: str) -> None:
    folder = make("a")
    for path in ("pipeline.json", "ended.json", "recipe.yaml", "sft/metrics.jsonl", "eval/sft-x.json"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    (info,) = RunList([tmp_path]).read()
    assert (info.model, info.step, info.best_loss, info.exam_gain) == (None, None, None, None)


def test_the_same_run_keeps_its_key_and_another_has_another(tmp_path: Path, make: Callable[..., Path]) -> None:
    make("a"), make("b")
    runs = RunList([tmp_path])
    keys = {info.name: info.key for info in runs.read()}
    assert keys == {info.name: info.key for info in RunList([tmp_path / "runs"]).read()}
    assert len(set(keys.values())) == 2
    one = RunList([tmp_path]).one(keys["a"])
    assert one is not None and one.name == "a"


@pytest.mark.parametrize("key", ["", ".", "..", "../a", "a", "/etc/passwd", "runs/a", "a\x00", "%2e%2e", "0" * 16])
def test_a_path_is_no_key(tmp_path: Path, make: Callable[..., Path], key: str) -> None:
    make("a")
    assert RunList([tmp_path]).one(key) is None


def test_a_link_to_a_run_elsewhere_is_left_out_and_told(tmp_path: Path, make: Callable[..., Path]) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(make("secret"), elsewhere)
    make("a")
    (tmp_path / "runs" / "link").symlink_to(elsewhere)
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs" / "a")
    runs = RunList([tmp_path / "runs"])
    assert [info.name for info in runs.read()] == ["a"]
    assert runs.outside == [tmp_path / "runs" / "link"]


def test_a_file_that_is_a_link_out_of_the_run_is_not_read(tmp_path: Path, make: Callable[..., Path]) -> None:
    folder = make("a")
    write(tmp_path / "secret", {"step": 3, "loss": 0.5, "eval_loss": 0.125})
    (folder / "sft" / "metrics.jsonl").unlink()
    (folder / "sft" / "metrics.jsonl").symlink_to(tmp_path / "secret")
    (info,) = RunList([tmp_path]).read()
    assert (info.step, info.best_loss) == (None, None)


def test_a_run_whose_folder_became_a_link_is_no_longer_there(tmp_path: Path, make: Callable[..., Path]) -> None:
    project, folder = tmp_path / "runs", make("a")
    runs = RunList([project])
    (info,) = runs.read()
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert runs.one(info.key) is None


def test_only_what_changed_is_read_again(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reading = run_list._Reading

    def noted(run: RunFolder, process: int | None) -> Any:
        read.append(run.path.name)
        return reading(run, process)

    monkeypatch.setattr(run_list, "_Reading", noted)
    make("a"), make("b")
    runs = RunList([tmp_path])
    runs.read(), runs.read()
    assert sorted(read) == ["a", "b"]
    with (tmp_path / "runs" / "b" / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**STEP, "step": 8}) + "\n")
    assert {info.name: info.step for info in runs.read()} == {"a": 7, "b": 8}
    assert sorted(read) == ["a", "b", "b"]


def test_why_a_command_failed_is_kept_until_one_ends_well(tmp_path: Path, make: Callable[..., Path]) -> None:
    run = RunFolder(make("a", sft={"outputs": None}))
    with pytest.raises(DataError), run.at_work("sft"):
        raise DataError("rows.jsonl:3: no answer. Correct the row.")
    assert states(tmp_path)["a"] == ("failed", "rows.jsonl:3: no answer. Correct the row.")
    with pytest.raises(Stopped), run.at_work("sft"):
        raise Stopped(130)
    assert states(tmp_path)["a"][0] == "stopped"
    with run.at_work("sft"):
        pass
    assert not run.ended.exists()


def test_a_command_that_fails_before_it_wrote_anything_leaves_no_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "a")
    with pytest.raises(DataError), run.at_work("sft"):
        raise DataError("no")
    assert not os.path.lexists(run.path)


ANY_NUMBER = (
    st.integers(-3, 10**320)
    | st.floats()
    | st.floats(1e300, 1e308)
    | st.sampled_from([True, None, "1", "<b>", [], {}])
)
ANY_VALUE = st.recursive(
    ANY_NUMBER | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(number=ANY_NUMBER, value=ANY_VALUE, digits=st.text("0123456789.eE+-", min_size=1))
def test_no_run_folder_hides_the_others(tmp_path: Path, number: Any, value: Any, digits: str) -> None:
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    good, bad = (RunFolder(tmp_path / "runs" / name) for name in ("good", "bad"))
    write(good.pipeline, {"stages": {}})
    write(bad.pipeline, {"stages": {"sft": {"seconds": number, "outputs": value, "inputs": {"model.path": value}}}})
    write(bad.stage("sft").metrics, {"step": number, "loss": value, "elapsed_seconds": number})
    with bad.stage("sft").metrics.open("a", encoding="utf-8") as file:
        file.write(f'{{"eval_loss": {digits}}}\n')
    write(bad.ended, {"how": value, "why": value})
    write(bad.recipe, {"model": {"path": value}, "data": {"sft": {"train": [{"path": value}, value]}}})
    write(bad.exams / "sft-ceval.json", {"benchmark": value, "against": {"base": {"difference": number}}})
    listed = {info.name: info for info in RunList([tmp_path]).read()}
    assert set(listed) == {"good", "bad"}
    hours, gain = listed["bad"].hours, listed["bad"].exam_gain
    assert all(each is None or abs(each) < 1e16 for each in (hours, gain))


def test_a_link_in_a_circle_does_not_hide_the_runs(tmp_path: Path, make: Callable[..., Path]) -> None:
    make("good")
    (tmp_path / "runs" / "circle").symlink_to("circle")
    assert set(states(tmp_path)) == {"good"}


def test_a_pipe_in_a_run_folder_blocks_nobody(tmp_path: Path, make: Callable[..., Path]) -> None:
    run = RunFolder(make("pipes"))
    for path in (run.start, run.path / LOCK, run.ended):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert set(states(tmp_path)) == {"pipes"}


def test_a_run_that_may_not_be_read_is_shown_with_the_reason(
    tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("mine")
    theirs = make("theirs")
    exists = Path.exists

    def refused(path: Path) -> bool:
        if path.is_relative_to(theirs / "sft"):
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    listed = states(tmp_path)
    state, why = listed["theirs"]
    assert set(listed) == {"mine", "theirs"} and state == "failed"
    assert why is not None and "Permission denied" in why and str(theirs / "sft") in why
    assert "无法读取" in in_readers_language(why, "zh")
