"""Every JSON file of a finished run with another shape, and every command that reads it afterwards.

`python tests/damaged_json.py [WORDS...]` tries all of them, or those whose names hold one of the words. With
`--serve`, this file is the process whose forks the commands are: importing takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stage_server import StageServer, become_stage, imported, requests, serving, share_cache

READERS = (  # of which `run` makes the finished run
    "report",
    "chat",
    "eval",
    "fuse",
    "plan",
    "run",
    "sft",
    "dpo",
    "prepare",
)
CLOSELY = (
    ("runs/tiny/eval/subjects/sft-exam/law.json", "eval"),
    ("runs/tiny/eval/sft-exam.json", "report"),
    ("runs/tiny/samples.json", "sft"),
    ("runs/tiny/pipeline.json", "run"),
    ("runs/tiny/data/report.json", "plan"),
    ("runs/tiny/sft/settings.json", "sft"),
    ("runs/tiny/fused/summary.json", "fuse"),
)
WHOLE = {
    "object": b"{}",
    "null": b"null",
    "list": b"[]",
    "text": '"字"'.encode(),
    "number": b"0",
    "list of lists": b"[[1], {}]",
    "empty": b"",
    "deep": b"[" * 5000 + b"]" * 5000,
    "bytes": b"\xff\xfe\x00",
}
_MOST = 40  # keys of an object; the vocabulary of a tokenizer has more
OTHER: tuple[Any, ...] = (None, [], {}, "字", 0, -1.5, True, [None], {"字": None}, 10**400, float("nan"))


@dataclass(frozen=True)
class Case:
    """A file of a run folder or of its cache, and what is done to it."""

    file: str
    damage: str
    command: str

    def __str__(self) -> str:
        return f"{self.file}: {self.damage}; {self.command}"


def damages(path: Path) -> dict[str, bytes]:
    """What a file may hold instead, by name."""
    data = path.read_bytes()
    changed = {**WHOLE, "half": data[: len(data) // 2]}
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    for place, value in _inner(json.loads(lines[0]) if lines else None):
        removed, *others = _without(lines[0], place), *(_with(lines[0], place, other) for other in OTHER)
        name = ".".join(map(str, place))
        rest = [b"", *lines[1:]]
        changed |= {f"without {name}": removed + b"\n".join(rest)}
        for other, content in zip(OTHER, others, strict=True):
            if type(other) is not type(value) or other != value:
                changed[f"{name}={json.dumps(other, ensure_ascii=False)[:12]}"] = content + b"\n".join(rest)
    if path.suffix == ".jsonl":
        for name, content in WHOLE.items():
            changed[f"line {name}"] = b"\n".join([content, *lines[1:], b""])
    return changed


def _inner(value: Any, place: tuple[Any, ...] = (), levels: int = 3) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The places of values in objects, and in the first item of lists, as deep as `levels`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    most = _MOST if isinstance(value, dict) else 1
    for key, inner in islice(items, most if levels else 0):
        yield (*place, key), inner
        yield from _inner(inner, (*place, key), levels - 1)


def _with(text: bytes, place: Sequence[Any], other: Any) -> bytes:
    value = holder = json.loads(text)
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = other
    return json.dumps(value, ensure_ascii=False).encode()


def _without(text: bytes, place: Sequence[Any]) -> bytes:
    value = holder = json.loads(text)
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return json.dumps(value, ensure_ascii=False).encode()


def serve() -> None:
    """For every line of stdin, a JSON object: fork a command, and answer with its exit status."""
    from mlx_zh.pipeline import runner
    from mlx_zh.system.entry import entry

    late = ("mlx_zh.stages.fuser", "mlx_zh.reporting.findings", "mlx_zh.reporting.plots", "matplotlib.pyplot")
    mains = imported(READERS, *late, "mlx_zh.stages.budgeting")
    runner.run_stage = lambda stage, arguments, lock: _run_here(mains[stage], arguments, lock)
    for wanted in requests():
        child = os.fork()
        if child == 0:
            become_stage(wanted)
            os.chdir(wanted["folder"])
            opened = _opened()
            sys.stdin = open("question.txt", encoding="utf-8")  # noqa: SIM115
            try:
                entry(mains[wanted["stage"]], ["recipe.yaml", *wanted["arguments"]])
            except SystemExit as stop:
                sys.stdout.flush()
                Path(wanted["log"]).with_suffix(".opened").write_text("\n".join(opened))
                os._exit(int(stop.code or 0))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _opened() -> dict[str, None]:
    """The files below the current folder that this process opens from now on."""
    here, paths = os.getcwd(), dict[str, None]()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(here):
                paths[os.path.relpath(path, here)] = None

    sys.addaudithook(note)
    return paths


def _run_here(main: Any, arguments: Sequence[str], lock: Any) -> int:
    os.environ.update(lock.environment)
    return main(list(arguments)) or 0


class Battery(StageServer):
    """A finished run in `top/whole`; each case happens in a copy of it."""

    def __init__(self, process: Any, top: Path) -> None:
        super().__init__(process)
        self._whole, self._copy = top / "whole", top / "copy"

    def finish(self) -> None:
        """Take the project in the current folder through all stages."""
        self._whole.mkdir(parents=True)
        for path in Path().iterdir():
            if path.name.startswith("exam") or path.suffix in (".jsonl", ".yaml"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, self._whole / path.name)
        (self._whole / "question.txt").write_text("你好\n", encoding="utf-8")
        (self._whole / "cache").mkdir()
        share_cache(self._whole / "cache")
        shared = self._whole / "cache" / "tokenizers"  # its files are damaged too
        place = shared.resolve()
        shared.unlink()
        shutil.copytree(place, shared)
        status, said = self.run(self._whole, "run")
        assert status == 0, said

    def run(self, folder: Path, command: str) -> tuple[int, str]:
        """Run a command in a folder; its exit status, and what it said."""
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        arguments = ["--no-measure"] if command == "fuse" else []
        places = {"folder": str(folder), "cache": str(folder / "cache"), "log": str(log)}
        status = self.request(stage=command, arguments=arguments, **places)
        return status, log.read_text(errors="replace")

    def cases(self, words: Sequence[str] = ()) -> list[Case]:
        """Every JSON file of the run and its cache that has one of the words, with each command that reads it."""
        cases: list[Case] = []
        for command in READERS:
            self._begin()
            status, said = self.run(self._copy, command)
            assert status == 0, said
            for name in sorted(set((self._copy / "log.opened").read_text().splitlines())):
                inside = name.startswith(("runs/", "cache/")) and (self._whole / name).is_file()
                chosen = not words or any(word in name for word in words)
                if inside and chosen and Path(name).suffix in (".json", ".jsonl"):
                    cases += [Case(name, damage, command) for damage in damages(self._whole / name)]
        return cases

    def damages(self, file: str) -> dict[str, bytes]:
        """What a file may hold instead, by name."""
        return damages(self._whole / file)

    def _begin(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._whole, self._copy, symlinks=True)

    def fault(self, case: Case) -> str | None:
        """What is wrong with how a command ends; None where it is done, or refuses with a file named."""
        self._begin()
        path = self._copy / case.file
        path.write_bytes(damages(path)[case.damage])
        status, said = self.run(self._copy, case.command)
        if status not in (0, 2) or "Traceback" in said or "not foreseen" in said:
            crashes = sorted((self._copy / "cache" / "crashes").glob("*"))
            return f"{case}: status {status}\n{said[-1500:]}\n{crashes[0].read_text()[-1500:] if crashes else ''}"
        if status == 2 and Path(case.file).name not in said and Path(case.file).parent.as_posix() not in said:
            return f"{case}: refused without the file's name\n{said[-1500:]}"
        return None


@contextmanager
def battery(top: Path) -> Iterator[Battery]:
    """The battery over the project in the current folder."""
    with serving(__file__, "--serve") as process:
        whole = Battery(process, top)
        whole.finish()
        yield whole


def some_of_each(battery: Battery, seed: int = 0) -> list[Case]:
    """A damage of each of a few files, for a command that looks closely at it."""
    chance = random.Random(seed)
    return [Case(file, chance.choice(list(battery.damages(file))), command) for file, command in CLOSELY]


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        import pytest

        os.environ["DAMAGED_WORDS"] = " ".join(sys.argv[1:])
        sys.exit(pytest.main(["-q", "-s", str(Path(__file__).with_name("test_damaged_json.py"))]))
