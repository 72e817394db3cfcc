"""Two and three ranks against one process: the same losses, adapters, reference and answers; and ranks that go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
import ranks
import two_processes
import yaml
from filelock import FileLock
from oracles import moved_apart
from project import VARYING, message
from tolerances import MOVED, later_loss

from mlx_zh import eval, sft
from mlx_zh.distributed import heartbeat
from mlx_zh.distributed.heartbeat import Heartbeat, Listener, connect
from mlx_zh.distributed.world import World
from mlx_zh.errors import DistributedError
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.system import storage

VARYING_HERE = VARYING | {"ranks", "communication_share", "waiting_share"}
# An epoch is 13 examples in steps of 4, so that its last step has one, and no share for most ranks.
CONVERSATIONS = [(f"第{n}个字？", "好的" * (1 + 3 * (n % 4))) for n in range(13)]
PAIRS = [(f"第{n}个字？", "好的" * (1 + n % 3), "好" + "no " * (1 + n % 4)) for n in range(9)]
STAGES = [
    ["sft", "recipe.yaml", "sft.eval_steps=2"],
    ["dpo", "recipe.yaml"],  # not its own reference: rewards of 0 would be above or below 0 by rounding alone
    ["dpo", "recipe.yaml", "name=coupled", "dpo.loss=aot", "dpo.start=runs/tiny/sft/adapters", "dpo.max_steps=2"],
    ["eval", "recipe.yaml", "--stage", "dpo"],
]
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(
    model_folder: Callable[..., Path], run_wide: Path, snapshots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Makes a folder with a recipe for everything, data, an exam and a cache of its own. All have one model."""
    model = run_wide / "ranks-model"
    with FileLock(f"{model}.lock"):
        if not model.exists():
            shutil.copytree(model_folder(), model)

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        conversations = [{"messages": [message("user", q), message("assistant", a)]} for q, a in CONVERSATIONS]
        turns = [
            {"prompt": ("user", q), "chosen": ("assistant", c), "rejected": ("assistant", r)} for q, c, r in PAIRS
        ]
        pairs = [{name: [message(*turn)] for name, turn in pair.items()} for pair in turns]
        data = {"train": conversations, "held": conversations[:3], "pairs": pairs, "pairs-held": pairs[:4]}
        for file, rows in data.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for subject, count in (("law", 2), ("maths", 7), ("music", 4)):
            lines = [f"{n},{subject}第{n}题？,甲,乙,丙{n},丁,{'ABCD'[n % 4]}" for n in range(count)]
            for split in ("dev", "test"):
                (folder / "exam" / split).mkdir(parents=True, exist_ok=True)
                path = folder / "exam" / split / f"{subject}_{split}.csv"
                path.write_text("\n".join(["id,question,A,B,C,D,answer", *lines]) + "\n", encoding="utf-8")
        split = {"sft": ("train", "held"), "dpo": ("pairs", "pairs-held")}
        recipe = {
            "name": "tiny",
            "model": {"path": str(model)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"max_length": 128, "deduplicate": {"exact": False, "near": None}}
            | {stage: {"train": [f"{t}.jsonl"], "validation": [f"{v}.jsonl"]} for stage, (t, v) in split.items()},
            "sft": {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2},
            "dpo": {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "reference": "base"},
            "memory": {"micro_tokens": 64},
            "evaluate": {"benchmarks": ["exam"], "shots": 1, "bootstrap": 200},
            "checkpoint": {"every_steps": 2},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        (folder / "cache").mkdir()
        (folder / "cache" / "blas").symlink_to(storage.cache_folder() / "blas")
        (folder / "cache" / "tokenizers").symlink_to(snapshots)
        return folder

    return write


@pytest.fixture(scope="module")
def whole(make: Make, run_wide: Path) -> Callable[[int], Path]:
    """The folder in which that many ranks ran all stages; one for all test processes."""

    def run(count: int) -> Path:
        done = run_wide / f"ranks{count}.txt"
        with FileLock(f"{done}.lock"):
            if not done.exists():
                folder = make(f"ranks{count}")
                ranks.run(count, *STAGES, folder=folder)
                done.write_text(str(folder), encoding="utf-8")
        return Path(done.read_text(encoding="utf-8"))

    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING_HERE} for line in lines]


def answers(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "runs/tiny/eval/dpo-exam.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def close(found: Path, expected: Path) -> None:
    """The same metrics and adapter, but for the order in which float32 numbers are added."""
    left, right = (read_adapter(folder / "adapters")[1] for folder in (found, expected))
    relative = later_loss(rate=0.01, weights=sum(array.size for array in right.values()), steps=6)
    for ours, theirs in zip(metrics(found), metrics(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=relative, abs=1e-5)
    assert moved_apart(left, right) < MOVED


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stage", ["tiny/sft", "tiny/dpo", "coupled/dpo"])
def test_the_number_of_ranks_changes_no_training_result(whole: Callable[[int], Path], stage: str, count: int):
    close(whole(count) / "runs" / stage, whole(1) / "runs" / stage)


@pytest.mark.parametrize("count", [2, 3])
def test_nor_what_is_evaluated_and_kept(whole: Callable[[int], Path], count: int):
    """Answers and reference log-probs: rows are computed as by one process, so that their files are the same."""
    ours, theirs = whole(count), whole(1)
    pairs = list(zip(answers(ours), answers(theirs), strict=True))
    assert all(a | {"logprobs": 0, "mass": 0} == b | {"logprobs": 0, "mass": 0} for a, b in pairs)
    assert np.allclose([a["logprobs"] for a, _ in pairs], [b["logprobs"] for _, b in pairs], atol=1e-3)
    files = [sorted(str(p.relative_to(f)) for p in (f / "runs").rglob("*") if p.is_file()) for f in (ours, theirs)]
    assert files[0] == files[1]
    # The base model is the same one everywhere, and so are its reference log-probs: the same lines in the same order.
    stores = [{p.name: p.read_bytes() for p in (f / "cache" / "reference").iterdir()} for f in (ours, theirs)]
    assert stores[0].keys() == stores[1].keys() and len(stores[0]) == 1
    assert all(stores[0][name].split() == stores[1][name].split() for name in stores[0])


def test_the_share_of_communication_is_measured(whole: Callable[[int], Path]):
    lines = [json.loads(line) for line in (whole(2) / "runs/tiny/sft/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all(line["ranks"] == 2 for line in steps)
    shares = [(line["communication_share"], line["waiting_share"]) for line in steps]
    assert all(0 <= share < 1 for pair in shares for share in pair), shares
    assert any(communication > 0 for communication, _ in shares), shares  # one on a busy machine may round to 0


def test_a_rank_that_is_killed_ends_the_run_and_the_next_one_goes_on_exactly(
    make: Make, whole: Callable[[int], Path]
):
    folder = make("killed")
    (gone, (killed, _, _)) = ranks.ends(2, STAGES[0], folder=folder, KILL_AT="3")
    assert killed == -signal.SIGKILL
    assert gone[0] == 2 and f"error: rank 1 ({socket.gethostname()}) is gone" in gone[2], gone
    ends = ranks.run(2, STAGES[0], folder=folder)
    assert "Going on after step 2 of 6." in ends[0][1] and ends[1][1] == ""
    resumed, straight = folder / "runs/tiny/sft", whole(2) / "runs/tiny/sft"
    assert metrics(resumed) == metrics(straight)
    left, right = (read_adapter(each / "adapters")[1] for each in (resumed, straight))
    assert all(mx.array_equal(array, right[name]) for name, array in left.items())


@pytest.mark.thorough
def test_a_run_changes_its_number_of_ranks(make: Make, whole: Callable[[int], Path]):
    """Interrupted at step 2 with 3 ranks and at step 4 with one, then on to the end with 2, in measured shares."""
    folder = make("changing")
    ends = ranks.run(3, STAGES[0], folder=folder, status=130, STOP_AT="2")
    assert "Stopped after step 2" in ends[0][1]
    ranks.run(1, STAGES[0], folder=folder, status=130, STOP_AT="4")
    ends = ranks.run(2, [*STAGES[0], "distributed.shares=measured"], folder=folder)
    assert "the ranks get" in ends[0][1] and "Going on after step 4 of 6." in ends[0][1]
    close(folder / "runs/tiny/sft", whole(1) / "runs/tiny/sft")


# Ranks that differ, or of which one cannot go on: every rank ends with the same words, and nothing is done


def together(folder: Path, stage: list[str], **variables: str) -> str:
    """The one error with which two ranks end."""
    first, second = ranks.ends(2, stage, folder=folder, **variables)
    assert first[0] == second[0] == 2, (first, second)
    errors = [text[text.index("error: ") :] for _, _, text in (first, second)]
    assert errors[0] == errors[1] and "is gone" not in errors[0]
    assert not (folder / "runs/tiny/sft").exists()
    return errors[0]


NAMED = f"rank 1 ({socket.gethostname()})"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("sft.learning_rate=1e-3", f"{NAMED} differs from rank 0: sft.learning_rate 0.01 -> 0.001."),
        ("budget=8h", f"{NAMED} differs from rank 0: budget None -> 8h."),
        ("data.sft.train=[other.jsonl]", f"{NAMED} differs from rank 0: the content of other.jsonl."),
        ("data.sft.train=[none.jsonl]", f"{NAMED}: none.jsonl"),
        ("sft.batch_size=none", f"{NAMED}: 'sft.batch_size=none': sft.batch_size must be a whole number"),
        ("model.path=other", f"{NAMED} differs from rank 0: the base model's files"),
    ],
)
def test_what_one_rank_has_is_named_by_all(make: Make, model_folder: Callable[..., Path], own: str, words: str):
    folder = make("different")
    (folder / "other.jsonl").write_text((folder / "train.jsonl").read_text()[:-1] + " \n")
    shutil.copytree(model_folder(), folder / "other")
    weights = folder / "other/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert words in together(folder, STAGES[0], LAST_RANK=own)


@pytest.mark.thorough
def test_a_file_that_one_rank_lacks_is_named_by_all(make: Make):
    folder = make("lacking")
    for copy in ("there", "gone"):
        shutil.copytree(folder, folder.parent / f"{folder.name}-{copy}", symlinks=True)
    machine = [folder.parent / f"{folder.name}-{copy}" for copy in ("there", "gone")]
    for name, words in (("train.jsonl", "train.jsonl"), ("recipe.yaml", "there is no recipe at recipe.yaml.")):
        (machine[1] / name).unlink()
        first, second = ranks.ends(2, STAGES[0], folder=machine[0], folders=machine)
        errors = [text[text.index("error: ") :] for _, _, text in (first, second)]
        assert errors[0] == errors[1] and f"{NAMED}: " in errors[0] and words in errors[0], (first, second)


def test_other_versions_of_a_package_are_named_by_all(make: Make):
    folder = make("versions")
    info = folder / "old/mlx-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.1\n")
    message = together(folder, STAGES[0], LAST_PATH=str(folder / "old"))
    assert (
        f"{NAMED} differs from rank 0: mlx {metadata.version('mlx')} -> 0.1. Give every machine the same" in message
    )


@pytest.mark.thorough
def test_ranks_with_other_copies_of_an_exam_do_nothing(make: Make):
    """Both have the same recipe and data files; the rows that an exam's questions remove differ."""
    folder = make("exams")
    for copy, question in (("one", "第3个字？第3个字？第3个字？"), ("two", "宪法规定公民享有哪些权利？")):
        for split in ("dev", "val", "test"):
            path = folder / copy / split / f"law_{split}.csv"
            path.parent.mkdir(parents=True)
            path.write_text(f"id,question,A,B,C,D,answer\n0,{question},甲,乙,丙,丁,A\n", encoding="utf-8")
    stage = [*STAGES[0], "data.decontaminate.benchmarks=[ceval]", "evaluate.folder={ceval: one}"]
    message = together(folder, stage, LAST_RANK="evaluate.folder={ceval: two}")
    assert f"{NAMED} differs from rank 0: the questions of ceval that are kept out of the data" in message
    asking = ["eval", "recipe.yaml", "evaluate.benchmarks=[ceval]", "evaluate.folder={ceval: one}"]
    message = together(folder, asking, LAST_RANK="evaluate.folder={ceval: two}")
    assert f"{NAMED} differs from rank 0: the questions of C-Eval" in message
    message = together(folder, asking, LAST_RANK="evaluate.folder={ceval: none}")
    assert f"{NAMED}: none" in message


# The short form


def test_the_short_form_gives_the_ranks_exit_status(make: Make):
    folder = make("refused")
    command = [sys.executable, "-m", "mlx_zh.sft", "recipe.yaml", "--processes", "2", "data.sft.train=[]"]
    environment = os.environ | {"MLX_ZH_CACHE": str(folder / "cache")}
    end = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("data.sft.train names no file") == 1


@pytest.mark.thorough
def test_an_interruption_reaches_all_ranks_of_the_short_form(make: Make):
    folder = make("interrupted")
    command = [sys.executable, "-m", "mlx_zh.sft", "recipe.yaml", "--processes", "2", "sft.max_steps=100000"]
    environment = os.environ | {"MLX_ZH_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as child:
        while not (folder / "runs/tiny/sft/checkpoints/step-000002").exists():
            assert child.poll() is None
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=600)
    assert child.returncode == 130 and "Stopped after step" in out


# Two processes that are chosen by themselves


def in_two(folder: Path, fastest: int = 2, **variables: str) -> tuple[int, str, str]:
    """SFT in two processes, to its end: exit status, output and errors. Nothing is left running."""
    child = two_processes.start(*STAGES[0], folder=folder, fastest=fastest, **variables)
    out, err = child.communicate(timeout=600)
    for _ in range(100):  # the kernel ends the other rank a moment after rank 0
        if not any(session_of(process) == child.pid for process in psutil.pids()):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a rank is left")
    return child.returncode, out, err


def session_of(process: int) -> int:
    try:
        return os.getsid(process)
    except OSError:
        return 0


def test_two_chosen_processes_are_as_one_command(make: Make, whole: Callable[[int], Path]):
    """They compute what one computes, and all is said once."""
    folder = make("chosen")
    status, out, _ = in_two(folder)
    assert status == 0 and out.count("in 2 processes with one BLAS thread each") == out.count("trained 6 steps") == 1
    undisturbed = folder / "runs/tiny/sft"
    close(undisturbed, whole(1) / "runs/tiny/sft")
    assert [line["ranks"] for line in lines_with_loss(undisturbed)] == [2] * 6


@pytest.mark.thorough
def test_two_chosen_processes_go_on_exactly_after_a_stop_a_loss_and_a_kill(make: Make):
    folder = make("disturbed")
    assert in_two(folder)[0] == 0
    shutil.move(folder / "runs", folder / "undisturbed")
    status, out, err = in_two(folder, STOP_AT="1")
    assert status == 130 and "Stopped after step 1" in out and not err
    status, out, err = in_two(folder, LOSE_AT="3")
    gone = f"rank 1 ({socket.gethostname()}) is gone: its process has ended"
    assert status == 2 and err.count("error: ") == err.count(gone) == 1
    assert "rank 1" in json.loads((folder / "runs/tiny/ended.json").read_text())["why"]
    status, _, err = in_two(folder, KILL_AT="5")
    assert status == -signal.SIGKILL and not err
    status, out, _ = in_two(folder, fastest=1)  # which changes nothing for a run that goes on
    assert (
        status == 0 and out.count("Going on in 2 processes") == 1 and not (folder / "runs/tiny/ended.json").exists()
    )
    found, expected = folder / "runs/tiny/sft", folder / "undisturbed/tiny/sft"
    assert metrics(found) == metrics(expected)
    left, right = (read_adapter(run / "adapters")[1] for run in (found, expected))
    assert all(mx.array_equal(array, right[name]).item() for name, array in left.items())


def lines_with_loss(stage: Path) -> list[dict[str, Any]]:
    return [
        line for text in (stage / "metrics.jsonl").read_text().splitlines() if "loss" in (line := json.loads(text))
    ]


@pytest.mark.parametrize("stage", [sft, eval])
def test_hosts_that_are_not_there(stage, run_stage, make: Make, monkeypatch: pytest.MonkeyPatch, capsys):
    from mlx_zh.system.entry import entry

    monkeypatch.chdir(make("nowhere"))
    assert run_stage(lambda argv: entry(stage.main, argv), "recipe.yaml", "--hosts", "none.json") == 2
    assert "--hosts none.json: there is no such file" in capsys.readouterr().err


# Dealing out


def world(rank: int, size: int, speeds: list[float] | None = None) -> World:
    made = World()
    made.rank, made.size, made.speeds = rank, size, speeds or [1.0] * size
    return made


@pytest.mark.parametrize("speeds", [[1.0, 1.0, 1.0], [3.0, 1.0, 2.0]])
def test_every_piece_goes_to_one_rank_and_loads_follow_speeds(speeds: list[float]):
    costs = np.random.default_rng(0).integers(10, 500, size=100).tolist()
    dealt = [world(rank, 3, speeds).share(costs) for rank in range(3)]
    assert sorted(piece for each in dealt for piece in each) == list(range(100))
    ends = [sum(costs[piece] for piece in each) / speed for each, speed in zip(dealt, speeds, strict=True)]
    assert max(ends) - min(ends) <= max(costs)  # a rank gets a piece only while no other would end earlier with it


def test_a_rank_may_have_nothing_to_do():
    assert [world(rank, 3).share([7, 9]) for rank in range(3)] == [[1], [0], []]


# Heartbeats


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch):
    """Makes rank 0's connections to `count` others, and each of theirs to rank 0."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    made: list[heartbeat.Peers] = []

    def join(count: int) -> list[heartbeat.Peers]:
        listener = Listener("127.0.0.1")
        others = [connect(listener.key, rank) for rank in range(1, count + 1)]
        made.extend([listener.accept(range(1, count + 1)), *others])
        return made

    yield join
    for peers in made:
        for _, connection in peers.values():
            connection.close()


def until(heard: list[str]) -> str:
    end = time.monotonic() + 60
    while not heard and time.monotonic() < end:
        time.sleep(0.01)
    return heard[0]


def test_a_rank_whose_connection_closes_is_named(connected):
    ours, theirs = connected(1)
    heard: list[str] = []
    Heartbeat(ours, heard.append)
    theirs[0][1].close()
    assert f"rank 1 ({socket.gethostname()}) is gone: its process has ended." in until(heard)


def test_a_rank_that_is_silent_is_named(connected, monkeypatch: pytest.MonkeyPatch):
    """As where a cable is pulled or a machine sleeps: the connection stays open."""
    ours, _ = connected(1)
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.1)
    heard: list[str] = []
    Heartbeat(ours, heard.append)
    assert "is gone: nothing was heard of it for" in until(heard)


def test_all_ranks_hear_of_one_that_is_gone(connected):
    ours, first, second = connected(2)
    told: list[str] = []
    here: list[str] = []
    Heartbeat(second, told.append)
    Heartbeat(ours, here.append)
    first[0][1].close()
    assert "rank 1 " in until(here)
    assert until(told) == ""  # rank 0 has said it


def test_a_rank_that_leaves_in_peace_is_not_missed(connected):
    ours, theirs = connected(1)
    heard: list[str] = []
    here = Heartbeat(ours, heard.append)
    Heartbeat(theirs, heard.append).close()
    here.close()
    assert not heard


def test_a_heartbeat_is_not_answered_at_once(connected, monkeypatch: pytest.MonkeyPatch):
    """Two ranks that answered each other would do nothing else, on a core of each."""
    ours, theirs = connected(1)
    sent: list[float] = []
    send = Heartbeat._send

    def counted(self: Heartbeat, message: bytes) -> None:
        sent.append(time.monotonic())
        send(self, message)

    monkeypatch.setattr(Heartbeat, "_send", counted)
    both = Heartbeat(ours, lambda _: None), Heartbeat(theirs, lambda _: None)
    while len(sent) < 20:
        time.sleep(0.01)
    assert sent[19] - sent[0] >= 8 * heartbeat.INTERVAL  # ten each; a late one delays the next
    for each in both:
        each.close()


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"x" * 5000, b"secret\n", b"secret 1 me\n", b"KEY\n"),
        *(b"KEY x me\n", b"KEY -1 me\n", b"KEY 9 me\n", b"KEY 0 me\n", "KEY ² me\n".encode()),
    ],
)
@pytest.mark.parametrize("stays", [False, True])
def test_a_stranger_at_the_port_ends_nothing_and_is_no_rank(connected, sent: bytes, stays: bool):
    """Port scanners connect to every port; with the secret, a rank that is not expected is no rank either."""
    listener = Listener("127.0.0.1")
    port, secret, host = listener.key.split(" ")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(sent.replace(b"KEY", secret.encode()))
        if not stays:
            stranger.close()
        (theirs,) = connect(listener.key, 1).values()
        peers = listener.accept([1])
    try:
        assert {rank: name for rank, (name, _) in peers.items()} == {1: socket.gethostname()}
    finally:
        theirs[1].close()
        peers[1][1].close()


def test_the_same_rank_twice_is_once(connected):
    listener = Listener("127.0.0.1")
    made = [connect(listener.key, rank)[0][1] for rank in (1, 1, 2)]
    peers = listener.accept([1, 2])
    assert sorted(peers) == [1, 2]
    for connection in (*made, *(connection for _, connection in peers.values())):
        connection.close()


def test_rank_0_says_for_whom_it_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "TOLD_AFTER", 0.0)
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.2)
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    listener = Listener("127.0.0.1")
    theirs = connect(listener.key, 2)[0][1]
    told: list[list[int]] = []
    with pytest.raises(DistributedError, match=r"rank 1, 3 of 4 ranks did not connect to rank 0"):
        listener.accept([1, 2, 3], told.append)
    assert told[0][-1] == 3 and 1 in told[0] and len(told) == 1
    theirs.close()


def test_a_rank_that_starts_alone_says_for_whom_it_waits(make: Make, monkeypatch: pytest.MonkeyPatch):
    """MLX itself waits in silence."""
    folder = make("alone")
    (waiting, never) = ranks.start(2, ["sft", "recipe.yaml"], folder=folder)
    never.kill()
    never.communicate()
    assert waiting.stdout is not None
    try:
        assert "waiting for rank 1 (127.0.0.1)" in waiting.stdout.readline()
    finally:
        waiting.kill()
        waiting.communicate()
