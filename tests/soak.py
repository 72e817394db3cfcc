"""The soak: stages killed at random instants until they have been killed often enough, then compared with a run that
nobody disturbed. `make soak`, or `pytest -s tests/soak.py`; SOAK_KILLS and SOAK_SEED change how many, and where.
A second test kills every stage before its file operations: SOAK_POINTS says at how many of them.

A round is a run folder and a cache of its own, taken from `prepare` to the last `eval`. Each stage of it is killed as
`kill -9` does, at a random moment of its processor time, or at one that is hard to meet by chance: while a checkpoint
is being written, in the reference pass, while the data is being prepared. It is started again until it ends, and what
it leaves must be what the undisturbed run left: metrics line for line, adapters, exam answers and prepared data byte
for byte. Run by itself, this file is the process whose forks the stages are: importing takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kill_points import STAGES as POINT_STAGES
from kill_points import KillPoints, small_project
from kill_points import server as kill_points_server
from stage_server import StageServer, become_stage, imported, requests, serving, share_cache

KILLS = int(os.environ.get("SOAK_KILLS", "60"))
POINTS = int(os.environ.get("SOAK_POINTS", "320"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
STAGES = ("prepare", "eval base", "sft", "eval sft", "dpo", "eval dpo")


# The server


def serve() -> None:
    """For every line of stdin, a JSON object: fork a stage and tell its process id; at the next line, its status."""
    from mlx_zh.system.entry import entry

    mains = imported(("prepare", "sft", "dpo", "eval"), "mlx_zh.stages.run_models")
    for wanted in requests():
        child = os.fork()
        if child == 0:
            become_stage(wanted)
            try:
                entry(mains[wanted["stage"]], wanted["arguments"])
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(int(stop.code or 0))
        print(child, flush=True)
        sys.stdin.readline()  # until then the process id stays the child's, dead or alive
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Server(StageServer):
    """The process that forks stages."""

    def start(self, stage: str, arguments: list[str], cache: Path, log: Path) -> int:
        """Begin a stage; returns its process id."""
        return self.request(stage=stage, arguments=arguments, cache=str(cache), log=str(log))

    def wait(self) -> int:
        """The exit status of the stage begun last; -9 where it was killed."""
        return self.ask()


@contextmanager
def server() -> Iterator[Server]:
    with serving(__file__) as process:
        yield Server(process)


# The rounds


@dataclass
class Round:
    """A run of the recipe under a name of its own, with a cache of its own."""

    server: Server
    name: str
    seconds: dict[str, float] = field(default_factory=dict)  # of processor time that each stage took

    def __post_init__(self) -> None:
        self.cache = Path(f"cache-{self.name}").absolute()
        self.cache.mkdir()
        share_cache(self.cache)
        self.folder = Path("runs", self.name)
        self.log = Path(f"{self.name}.log")

    def begin(self, stage: str) -> int:
        """Start a stage, for example `eval sft`; returns its process id."""
        name, *model = stage.split()
        arguments = ["recipe.yaml", f"name={self.name}", *(["--stage", *model] if model else [])]
        return self.server.start(name, arguments, self.cache, self.log)

    def finish(self, stage: str) -> None:
        """Let a stage end by itself; it must end well."""
        child = self.begin(stage)
        used = 0.0
        while (now := processor_seconds(child)) is not None:
            used = now
            time.sleep(0.02)
        status = self.server.wait()
        assert status == 0, f"{self.name}, {stage}: status {status}\n{self.log.read_text()[-3000:]}"
        self.seconds[stage] = used

    def kill(self, stage: str, due: Callable[[int], bool]) -> bool:
        """Start a stage and kill it when `due`; false where it was sooner done."""
        child = self.begin(stage)
        while not due(child):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # the server has not waited for it yet, so the number is still its own
        status = self.server.wait()
        assert status in (0, -signal.SIGKILL), f"{self.name}, {stage}: {status}\n{self.log.read_text()[-3000:]}"
        return status == -signal.SIGKILL

    def result(self) -> dict[str, Any]:
        """What must be the same in every round: parsed metrics without the machine's own figures, and bytes."""
        own = {"tokens_per_second", "peak_memory_gb", "elapsed_seconds"}
        found: dict[str, Any] = {}
        for stage in ("sft", "dpo"):
            lines = [json.loads(line) for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()]
            found[f"{stage} metrics"] = [{k: v for k, v in line.items() if k not in own} for line in lines]
            for kind in ("adapters", "checkpoints/best"):
                path = self.folder / stage / kind / "adapters.safetensors"
                found[f"{stage} {kind}"] = path.read_bytes()
        for path in sorted((self.folder / "eval").glob("*.jsonl")):
            found[path.name] = path.read_bytes()
        for path in sorted((self.cache / "corpus").rglob("*.arrow")) + sorted((self.cache / "corpus").rglob("*.npy")):
            found[str(path.relative_to(self.cache))] = path.read_bytes()
        return found

    def litter(self) -> list[Path]:
        """What a killed stage may leave for a while, and must not leave for good."""
        patterns = ("**/*.tmp", "**/damaged-*", "**/.lock", "**/*-old*", "**/*.work")
        return [path for top in (self.folder, self.cache) for pattern in patterns for path in top.glob(pattern)]


def processor_seconds(child: int) -> float | None:
    """Processor time of a process, so that a busy machine moves no instant; None when it has ended."""
    try:
        process = psutil.Process(child)
        times = process.cpu_times()
        return None if process.status() == psutil.STATUS_ZOMBIE else times.user + times.system
    except psutil.NoSuchProcess:
        return None


def instants(rounds: Round, straight: Round, chance: random.Random) -> list[tuple[str, str, Callable[[int], bool]]]:
    """The kills of one round, stage by stage: (stage, what it hits, when it is due)."""

    def anywhere(stage: str) -> Callable[[int], bool]:
        instant = chance.uniform(0, straight.seconds[stage])

        def due(child: int) -> bool:
            used = processor_seconds(child)
            return used is None or used >= instant

        return due

    def seen(pattern: str, top: Path, wait: float) -> Callable[[int], bool]:
        """When something of this name has appeared or grown, and a little later still."""
        before = sizes(top, pattern)
        delay = chance.uniform(0, wait)

        def due(child: int) -> bool:
            if processor_seconds(child) is None:
                return True
            if sizes(top, pattern) == before:
                return False
            time.sleep(delay)
            return True

        return due

    preparing = ("preparing", "*.work/*", rounds.cache / "corpus", 0.02)
    reference = ("reference pass", "*.txt", rounds.cache / "reference", 0.02)
    sft, dpo = (("saving", "checkpoints/.step-*.tmp/*", rounds.folder / stage, 0.01) for stage in ("sft", "dpo"))
    plan: dict[str, list[tuple[str, str, Path, float] | None]] = {
        "prepare": [None, preparing],
        "eval base": [None, None],
        "sft": [None, sft, None, sft, None, sft],
        "eval sft": [None, None],
        "dpo": [reference, reference, None, dpo, None, dpo],
        "eval dpo": [None, None],
    }
    return [
        (stage, hit[0] if hit else "anywhere", seen(*hit[1:]) if hit else anywhere(stage))
        for stage, hits in plan.items()
        for hit in hits
    ]


def sizes(top: Path, pattern: str) -> dict[str, int]:
    found = {}
    for path in top.glob(pattern):
        try:
            found[str(path)] = path.stat().st_size
        except OSError:
            continue
    return found


def write_project(recipe: dict[str, Any]) -> None:
    """Data of a few hundred examples, pairs and questions, so that there is time to be killed in."""
    from test_eval import write_exam

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [{"messages": [turn("user", f"第{n}个字？"), turn("assistant", "好的" * (1 + n % 9))]} for n in range(150)]
    pairs = [
        {
            "prompt": [turn("user", f"第{n}个字？")],
            "chosen": [turn("assistant", "好的" * (1 + n % 7))],
            "rejected": [turn("assistant", "好" + "no " * (1 + n % 5))],
        }
        for n in range(70)
    ]
    for name, found in {
        "train.jsonl": rows[:140],
        "validation.jsonl": rows[140:],
        "pairs.jsonl": pairs[:60],
        "pairs-validation.jsonl": pairs[60:],
    }.items():
        Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    write_exam(Path("exam"), questions=16)
    recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "validation": ["pairs-validation.jsonl"]}
    recipe["data"]["deduplicate"] = {"exact": False, "near": None}
    recipe["lora"]["dropout"] = 0.1
    recipe["sft"] = {"batch_size": 8, "max_steps": 24, "learning_rate": 1e-3, "eval_steps": 10, "neftune_alpha": 5}
    recipe["dpo"] = {"batch_size": 8, "max_steps": 12, "learning_rate": 1e-3, "eval_steps": 6}
    recipe["checkpoint"] = {"every_steps": 3, "keep": 2}
    recipe["memory"] = {"micro_tokens": 256}
    recipe["evaluate"] = {"benchmarks": ["exam"], "shots": 2, "bootstrap": 50}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")


@pytest.mark.slow
def test_soak(project: Any) -> None:
    write_project(project.recipe)
    chance = random.Random(SEED)
    kills: Counter[str] = Counter()
    compared = 0
    began = time.monotonic()
    with server() as forks:
        straight = Round(forks, "straight")
        for stage in STAGES:
            straight.finish(stage)
        expected = straight.result()
        assert len(expected["sft metrics"]) == 24 + 4 and len(expected["dpo metrics"]) == 12 + 3
        rounds = 0
        while kills.total() < KILLS:
            rounds += 1
            run = Round(forks, f"round{rounds}")
            for stage in STAGES:
                for name, what, due in instants(run, straight, chance):
                    if name == stage and run.kill(stage, due):
                        kills[f"{stage.split()[0]}, {what}"] += 1
                run.finish(stage)
            found = run.result()
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert value == expected[name], f"{run.name}: {name} differs"
                compared += len(value) if isinstance(value, bytes) else 0
            with project.capsys.disabled():
                print(f"round {rounds}: {kills.total()} kills so far, {time.monotonic() - began:.0f} s", flush=True)
            assert run.litter() == []
    resumed = sum(log.read_text().count("Going on after step") for log in Path().glob("round*.log"))
    lines = rounds * (len(expected["sft metrics"]) + len(expected["dpo metrics"]))
    with project.capsys.disabled():
        print(f"\nseed {SEED}: {kills.total()} kills in {rounds} rounds; training went on {resumed} times")
        for what, count in sorted(kills.items()):
            print(f"  {what:<24} {count}")
        print(f"{lines} metrics lines and {compared} bytes compared with the undisturbed run: no difference")


@pytest.mark.slow
def test_every_stage_killed_before_its_file_operations(project: Any, tmp_path: Path) -> None:
    """SOAK_POINTS kills, spread over all stages by their numbers of operations; every third is a power cut."""
    small_project(project.recipe)
    wrong: list[str] = []
    kills: Counter[str] = Counter()
    with kill_points_server() as forks:
        points = KillPoints(forks, tmp_path / "points")
        points.straight()
        total = sum(points.operations.values())
        stride = max(1, total // POINTS)
        for stage in os.environ.get("SOAK_STAGES", ",".join(reversed(POINT_STAGES))).split(","):
            for number in range(1 + SEED % stride, points.operations[stage] + 1, stride):
                power = None if kills.total() % 3 else number
                difference = points.kill(stage, number, power=power)
                kills[f"{stage}, {'power cut' if power else 'kill'}"] += 1
                if difference is not None:
                    wrong.append(difference)
                    with project.capsys.disabled():
                        print(difference, flush=True)
            with project.capsys.disabled():
                print(
                    f"{stage}: {points.operations[stage]} file operations; {kills.total()} kills so far", flush=True
                )
    with project.capsys.disabled():
        for what, count in sorted(kills.items()):
            print(f"  {what:<24} {count}")
    assert wrong == []


@pytest.mark.slow
def test_every_stage_disturbed_at_its_file_operations(project: Any, tmp_path: Path) -> None:
    """SOAK_POINTS signals, full disks and failing disks, spread over all stages."""
    small_project(project.recipe)
    chance = random.Random(SEED)
    with kill_points_server() as forks:
        points = KillPoints(forks, tmp_path / "points")
        points.straight()
        every = [(stage, number) for stage, count in points.operations.items() for number in range(1, count + 1)]
        wrong = []
        for stage, number in chance.sample(every, min(POINTS, len(every))):
            what = chance.choice(("SIGINT", "SIGTERM", "SIGHUP", "ENOSPC", "EDQUOT", "EFBIG", "EIO"))
            if (fault := points.disturb(stage, number, what)) is not None:
                wrong.append(fault)
                with project.capsys.disabled():
                    print(fault, flush=True)
    assert wrong == []


if __name__ == "__main__":
    serve()
