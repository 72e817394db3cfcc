"""Stages of a small run, each killed before its file operations, started again, and compared with a straight run.

Run by itself, this file is the process whose forks the stages are: importing takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stage_server import SHARED, StageServer, become_stage, imported, requests, serving, share_cache

STAGES = ("prepare", "eval base", "sft", "eval sft", "dpo", "eval dpo", "fuse", "report")
# What a stage measures, and what depends on the folder that a test runs in
_OWN = {
    "tokens_per_second",
    "peak_memory_gb",
    "elapsed_seconds",
    "seconds",
    "folder",
    "command",
    "check",
    "made",
    "git_commit",
}


def serve() -> None:
    """For every line of stdin, a JSON object: fork a stage, and answer with its exit status (-9: killed)."""
    from file_operations import FileOperations

    from mlx_zh.system import digests
    from mlx_zh.system.entry import entry

    digests._FRESH = -1.0  # digests of files just copied are remembered too, so that operations do not depend on time
    late = ("mlx_zh.stages.fuser", "mlx_zh.reporting.findings", "mlx_zh.reporting.plots", "matplotlib.pyplot")
    mains = imported(("prepare", "sft", "dpo", "eval", "fuse", "report"), *late)
    for wanted in requests():
        reading, writing = os.pipe()  # not the log itself: a stage may not be able to write to files
        child = os.fork()
        if child == 0:
            become_stage(wanted)
            log = writing
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
            os.chdir(wanted["folder"])
            places = [Path("runs"), Path(wanted["cache"])]
            watch = FileOperations(places, wanted["kill"], wanted["power"], log, wanted["instead"])
            watch.install()
            try:
                entry(mains[wanted["stage"]], wanted["arguments"])
            except SystemExit as stop:
                sys.stdout.flush()
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                Path(wanted["log"]).with_suffix(".count").write_text(str(watch.count))
                os._exit(int(stop.code or 0))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os.close(writing)
        with open(reading, "rb") as said, open(wanted["log"], "ab") as file:
            shutil.copyfileobj(said, file)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Server(StageServer):
    """The process that forks stages."""

    def run(
        self,
        folder: Path,
        stage: str,
        *,
        kill: int | None = None,
        power: int | None = None,
        instead: str | None = None,
    ) -> int:
        """Run a stage, for example `eval sft`, in a folder; kill it before a file operation. The exit status."""
        name, *model = stage.split()
        arguments = ["recipe.yaml", *(["--stage", *model] if model else [])]
        arguments += ["--no-measure"] if name == "fuse" else []
        places = {"folder": str(folder), "cache": str(folder / "cache"), "log": str(folder / "log.txt")}
        disturbance = {"kill": kill, "power": power, "instead": instead}
        return self.request(stage=name, arguments=arguments, **disturbance, **places)


@contextmanager
def server() -> Iterator[Server]:
    with serving(__file__) as process:
        yield Server(process)


@dataclass
class KillPoints:
    """A straight run in `top/straight`, with a copy of its folder before each stage; kills happen in `top/killed`."""

    server: Server
    top: Path
    operations: dict[str, int] = field(default_factory=dict)  # file operations of each stage
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each stage left

    def straight(self, stages: tuple[str, ...] = STAGES) -> None:
        """Take the project in the current folder through the stages."""
        folder = self.top / "straight"
        folder.mkdir(parents=True)
        for path in Path().iterdir():
            if path.name.startswith("exam") or path.suffix in (".jsonl", ".yaml"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        (folder / "cache").mkdir()
        share_cache(folder / "cache")
        for stage in stages:
            shutil.copytree(folder, self.top / f"before {stage}", symlinks=True)
            status = self.server.run(folder, stage)
            assert status == 0, (folder / "log.txt").read_text()[-3000:]
            self.operations[stage] = int((folder / "log.count").read_text())
            self.expected[stage] = left_by(folder)

    def kill(self, stage: str, number: int, *, power: int | None = None) -> str | None:
        """Kill a stage before its file operation `number`, and run it again; the difference to the straight run.

        None where there is none.
        """
        folder = self._before(stage)
        statuses = [self.server.run(folder, stage, kill=number, power=power), self.server.run(folder, stage)]
        log = (folder / "log.txt").read_text(errors="replace")
        point = re.findall("^killed before .*", log, re.MULTILINE)
        about = f"{stage}, operation {number}, power {power}: {point}"
        if statuses != [-9, 0]:
            return f"{about}: statuses {statuses}\n{log[-2000:]}"
        return self._difference(folder, stage, about)

    def disturb(self, stage: str, number: int, what: str) -> str | None:
        """A signal or an error of the disk at a file operation of a stage, which is then run again; what is wrong.

        None where the stage ends with a paragraph, or goes on, and the second run ends as the straight run.
        """
        folder = self._before(stage)
        status = self.server.run(folder, stage, kill=number, instead=what)
        log = folder / "log.txt"
        said = log.read_text(errors="replace")
        about = f"{stage}, operation {number}, {' '.join(re.findall(f'^{what} .*', said, re.MULTILINE))}"
        if fault := _wrong_end(status, said, what):
            return f"{about}: {fault}\n{said[-3000:]}"
        log.unlink()
        if (again := self.server.run(folder, stage)) != 0:
            return f"{about}: status {again} of the second run\n{log.read_text(errors='replace')[-3000:]}"
        return self._difference(folder, stage, about)

    def _before(self, stage: str) -> Path:
        folder = self.top / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.top / f"before {stage}", folder, symlinks=True)
        return folder

    def _difference(self, folder: Path, stage: str, about: str) -> str | None:
        left, expected = left_by(folder), self.expected[stage]
        names = sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))
        if "SIG" in about:  # a checkpoint is saved at the signal, and an older one left out
            names = [name for name in names if "/checkpoints/step-" not in name]
        return f"{about}: {names} differ" if names else None


def _wrong_end(status: int, said: str, what: str) -> str | None:
    """What is wrong with how a disturbed stage ended; None if nothing is."""
    errors = re.findall("error: .*", said)  # perhaps behind a progress bar
    if "Traceback" in said or "not foreseen" in said:
        return "a traceback"
    if what.startswith("SIG"):
        if status not in (0, 130) or errors:
            return f"status {status}"
        return None if status == 0 or "run the same command" in said else "no word on how to go on"
    if status not in (0, 2) or len(errors) != (1 if status else 0) or (errors and "again" not in errors[0]):
        return f"status {status}, {len(errors)} errors"
    named = not errors or "runs/" in errors[0] or "cache" in errors[0]
    if named and ".tmp" not in "".join(errors):
        return None
    return "the folder is not named"


def left_by(folder: Path) -> dict[str, Any]:
    """What a run left: the content of every file, without what is measured; folders and hidden files too."""
    contents: dict[str, Any] = {}
    for top in (folder / "runs", folder / "cache"):
        for path in sorted(top.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name.startswith(tuple(f"cache/{shared}" for shared in SHARED)) or name.endswith(".lock"):
                continue
            contents[name] = "folder" if path.is_dir() else _content(path)
    return contents


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.name in ("state.json", "digests.json", "fingerprints.json") or path.suffix == ".png":
        return path.name
    if path.suffix in (".html", ".md"):
        return re.sub(rb"[\d.,:]+( GB| MB| s| min)?", b"#", data)
    if path.suffix in (".json", ".jsonl"):
        return [_without_own(json.loads(line)) for line in ([data] if path.suffix == ".json" else data.splitlines())]
    if path.parent.name == "reference":
        return sorted(line for line in data.splitlines() if line)
    return data


def _without_own(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_own(item) for key, item in value.items() if key not in _OWN}
    return [_without_own(item) for item in value] if isinstance(value, list) else value


def small_project(recipe: dict[str, Any]) -> None:
    """Data of a few examples, pairs and questions, with every stage, in the current folder."""
    import yaml
    from test_eval import write_exam

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [{"messages": [turn("user", f"第{n}个字？"), turn("assistant", "好的" * (1 + n % 9))]} for n in range(24)]
    pairs = [
        {
            "prompt": [turn("user", f"第{n}个字？")],
            "chosen": [turn("assistant", "好的" * (1 + n % 7))],
            "rejected": [turn("assistant", "好" + "no " * (1 + n % 5))],
        }
        for n in range(16)
    ]
    files = {"train": rows[:20], "validation": rows[20:], "pairs": pairs[:12], "pairs-validation": pairs[12:]}
    for name, lines in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        Path(f"{name}.jsonl").write_text(text, encoding="utf-8")
    write_exam(Path("exam"), questions=6)
    recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "validation": ["pairs-validation.jsonl"]}
    recipe["data"]["deduplicate"] = {"exact": False, "near": None}
    recipe["sft"] = {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "eval_steps": 3}
    recipe["dpo"] = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "eval_steps": 2}
    recipe["checkpoint"] = {"every_steps": 2, "keep": 2}
    recipe["evaluate"] = {
        "benchmarks": ["exam"],
        "shots": 1,
        "bootstrap": 20,
        "prompts": ["你好", "第1个字？"],
        "max_new_tokens": 4,
    }
    recipe["export"] = {"formats": ["mlx", "hf", "peft"], "bits": 8}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    serve()
