"""Runs as processes: started once, seen from everywhere, stopped once, never mistaken for another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mlx_zh.errors import StorageError
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.studio import processes
from mlx_zh.studio.processes import Command
from mlx_zh.system.locks import NAME as LOCK

# A stand-in for `mlx-zh run`: it holds the run folder's lock, counts the signals that ask it to stop, and ends a
# while after the first one, as a training step does.
RUN = """
import signal, sys, time
from pathlib import Path
from mlx_zh.system.locks import locked
folder, asked = Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with locked(folder, "run"):
    print("at work", flush=True)
    with (folder / "starts").open("a") as starts:
        starts.write("x")
    end = None
    while end is None or time.monotonic() < end:
        if asked and end is None:
            end = time.monotonic() + 1.5
        time.sleep(0.01)
(folder / "asked").write_text(str(len(asked)))
"""


def command(run: RunFolder) -> Command:
    return Command(("-c", RUN, str(run.path)), run.path.parent.parent)


def until(happens: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "one")
    yield folder
    if (left := processes.running(folder)) is not None:
        os.kill(left.process, signal.SIGKILL)
    if (child := processes._ours.pop(folder.path.absolute(), None)) is not None:  # or Python warns when it ends
        child.wait(20)


def starts(run: RunFolder) -> str:
    file = run.path / "starts"
    return file.read_text() if file.exists() else ""


def test_a_run_is_started_stopped_and_its_output_kept(run: RunFolder) -> None:
    assert processes.running(run) is None
    started = processes.start(run, command(run))
    until(lambda: starts(run))
    seen = processes.running(run)
    assert seen is not None and seen.process == started.process and not seen.stopping
    assert os.getsid(started.process) == started.process  # no terminal or session of ours can end it
    assert processes.stop(run)
    assert processes.running(run).stopping  # type: ignore[union-attr]
    time.sleep(0.2)  # two signals at once would be counted as one
    assert processes.stop(run)  # asking twice sends one signal: a second one would end it unsaved
    until(lambda: processes.running(run) is None)
    until(lambda: (run.path / "asked").exists())
    assert (run.path / "asked").read_text() == "1"
    assert not processes.stop(run)
    assert "at work" in processes.end_of_log(run)
    again = processes.start(run, command(run))  # the mark of the earlier request does not stop this one
    until(lambda: starts(run) == "xx")
    assert again.process != started.process
    assert not processes.running(run).stopping  # type: ignore[union-attr]


def test_many_clicks_at_once_start_one_run(run: RunFolder) -> None:
    results: list[int] = []
    clicks = [
        threading.Thread(target=lambda: results.append(processes.start(run, command(run)).process)) for _ in range(8)
    ]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    until(lambda: starts(run))
    time.sleep(0.2)
    assert len(set(results)) == 1 and len(results) == 8 and starts(run) == "x"


def test_two_studios_at_once_start_one_run(run: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from mlx_zh.studio import processes;"
        "from mlx_zh.stages.run_folder import RunFolder; from mlx_zh.studio.processes import Command;"
        "run = RunFolder(Path(sys.argv[1]));"
        "print(processes.start(run, Command(('-c', sys.argv[2], sys.argv[1]), Path.cwd())).process)"
    )
    studios = [
        subprocess.Popen([sys.executable, "-c", code, str(run.path), RUN], stdout=subprocess.PIPE) for _ in range(2)
    ]
    told = {studio.communicate()[0].strip() for studio in studios}
    until(lambda: starts(run))
    assert len(told) == 1 and starts(run) == "x"
    # Both studios have ended, and the run goes on.
    seen = processes.running(run)
    assert seen is not None and told == {str(seen.process).encode()}


def test_a_run_survives_a_killed_studio_and_another_one_stops_it(run: RunFolder) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mlx_zh.studio import processes;"
        "from mlx_zh.stages.run_folder import RunFolder; from mlx_zh.studio.processes import Command;"
        "run = RunFolder(Path(sys.argv[1]));"
        "processes.start(run, Command(('-c', sys.argv[2], sys.argv[1]), Path.cwd())); time.sleep(100)"
    )
    studio = subprocess.Popen([sys.executable, "-c", code, str(run.path), RUN])
    until(lambda: starts(run))
    studio.kill()
    studio.wait()
    assert processes.running(run) is not None
    assert processes.stop(run)
    until(lambda: processes.running(run) is None)


def test_a_run_from_a_terminal_is_seen_and_stopped(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", RUN, str(run.path)]) as terminal:
        until(lambda: starts(run))
        seen = processes.running(run)
        assert seen is not None and seen.process == terminal.pid
        assert processes.start(run, command(run)).process == terminal.pid  # not a second one
        assert processes.stop(run)
        assert terminal.wait(20) == 0
    assert starts(run) == "x"


def test_a_process_whose_id_was_used_again_is_not_signalled(run: RunFolder) -> None:
    """A killed run leaves its files, which name a process; another process has that id now."""
    run.path.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # mlx_zh"]) as other:
        for name in (LOCK, run.start.name):
            (run.path / name).write_text(json.dumps({"what": "run", "process": other.pid, "since": "now"}))
        assert processes.running(run) is None
        assert not processes.stop(run)
        assert other.poll() is None
        other.kill()


def test_a_stage_that_outlived_its_pipeline_is_found(run: RunFolder) -> None:
    """`mlx-zh run` was killed; its stage inherited the lock and goes on."""
    run.path.mkdir(parents=True)
    parent = (
        "import subprocess, sys, time; from pathlib import Path; from mlx_zh.system.locks import locked\n"
        "with locked(Path(sys.argv[1]), 'run') as lock:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)  # mlx_zh.sft'],"
        " pass_fds=(lock.descriptor,))\n"
        "    print(child.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent, str(run.path)], stdout=subprocess.PIPE) as pipeline:
        assert pipeline.stdout is not None
        child = int(pipeline.stdout.readline())
        pipeline.kill()
    until(lambda: processes.running(run) is not None)  # the child may not have its new name yet
    seen = processes.running(run)
    assert seen is not None and seen.process == child
    assert processes.stop(run)
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_the_command_that_resumes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    assert processes.resume_command(run, tmp_path) is None
    run.recipe.write_text("name: one")
    run.manifest.write_text(json.dumps({"command": ["/bin/mlx-zh", "sft", "recipe.yaml"]}))
    assert processes.resume_command(run, tmp_path) == Command(("-m", "mlx_zh.sft", "runs/one"), tmp_path)
    run.pipeline.write_text("{}")
    assert processes.resume_command(run, tmp_path) == Command(("-m", "mlx_zh.run", "runs/one"), tmp_path)
    words = ["-m", "mlx_zh.run", "one.yaml", "seed=1"]
    run.start.write_text(json.dumps({"process": 1, "command": words, "folder": str(tmp_path)}))
    assert processes.resume_command(run, tmp_path) == Command(tuple(words), tmp_path)
    # A run folder may come from elsewhere: no other program, no other folder, no recipe outside.
    for words in (["-c", "evil", "x"], ["-m", "mlx_zh.run", "../x.yaml"], ["-m", "mlx_zh.run", "x.yaml", "--force"]):
        run.start.write_text(json.dumps({"process": 1, "command": words, "folder": str(tmp_path)}))
        assert processes.resume_command(run, tmp_path) == Command(("-m", "mlx_zh.run", "runs/one"), tmp_path)
    assert processes.resume_command(run, tmp_path / "elsewhere") is None


def test_the_log_shows_the_last_state_of_a_bar(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.log.write_bytes("sft  1%\rsft 50%\rsft 99%\n完成".encode())
    assert processes.end_of_log(run) == "sft 99%\n完成"


@pytest.mark.parametrize("name", ["start", "stop", "log"])
def test_a_link_out_of_the_run_folder_is_neither_written_nor_shown(run: RunFolder, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious", encoding="utf-8")
    run.path.mkdir(parents=True)
    getattr(run, name).symlink_to(theirs)
    with pytest.raises(StorageError, match="is a link out of the folder"):
        processes.start(run, command(run))
    assert theirs.read_text(encoding="utf-8") == "precious"
    assert "precious" not in processes.end_of_log(run)
    assert not starts(run)


def test_a_link_does_not_take_the_mark_of_a_stop(run: RunFolder, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious", encoding="utf-8")
    processes.start(run, command(run))
    until(lambda: starts(run) == "x")
    run.stop.symlink_to(theirs)
    with pytest.raises(StorageError, match="is a link out of the folder"):
        processes.stop(run)
    assert theirs.read_text(encoding="utf-8") == "precious"
    run.stop.unlink()
    assert processes.stop(run)
    until(lambda: processes.running(run) is None)
