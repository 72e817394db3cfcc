"""The studio's side of the process that holds a model: ask it, stop it, and notice when it ends.

Everything here runs in one event loop. The model and MLX are in the other process (`talk_process`), so that an answer
never holds a page up, and a crash there takes no page with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_zh.errors import StudioError
from mlx_zh.studio.talk_process import IDLE
from mlx_zh.system.json_text import parse_json

LONGEST = 200_000  # characters of a conversation that may be sent; no model here reads more
_LINE = 1 << 26  # bytes of a message
_TAIL = 4000  # bytes of what a process that crashed said last
_SEEDS = 1 << 31
_ENDS = 5.0  # seconds in which a process ends that has closed its output

State = Literal["off", "checking", "checked", "loading", "ready"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn; `seed` None: with a random one."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int | None = None
    thinking: str = ""  # on, off, auto, or what the recipe says
    system: str | None = None

    def drawn_seed(self) -> int:
        """The seed, or a random one."""
        return secrets.randbelow(_SEEDS) if self.seed is None else self.seed


@dataclass(frozen=True, slots=True)
class Question:
    """A question to a stage of a run: the turns (role, text) of its conversation, the question last."""

    run: Path
    stage: str
    turns: Sequence[tuple[str, str]]
    first: int
    settings: Settings
    seed: int

    def message(self) -> dict[str, Any]:
        """The fields of the line that asks. Raises StudioError if the conversation is too long to be sent."""
        length = sum(len(text) for _, text in self.turns) + len(self.settings.system or "")
        if length > LONGEST:
            raise StudioError(
                f"the conversation has {length:,} characters, and at most {LONGEST:,} can be sent. Begin a new one, "
                "or shorten the question."
            )
        sampling = {name: getattr(self.settings, name) for name in ("temperature", "top_p", "max_tokens")}
        more = {
            "system": whole(self.settings.system or "") or None,
            "thinking": self.settings.thinking,
            "sampling": sampling,
        }
        asked = {"run": str(self.run), "stage": self.stage, "first": self.first, "seed": self.seed}
        return {**asked, "turns": [[role, whole(text)] for role, text in self.turns], **more}


def whole(text: str) -> str:
    """The text with half of a surrogate pair replaced: a browser may send one, and UTF-8 cannot hold it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what talking needs, what is free, and what of the rest the runs at work will still take."""

    need: float
    free: float
    promised: float


@dataclass
class Talker:
    """The process of one base model. `folder` is where the run was started; paths in its recipe start there."""

    run: Path
    folder: Path
    idle: float = IDLE
    state: State = "off"
    room: Room | None = None
    about: dict[str, Any] = field(default_factory=dict)  # model, context, switches
    progress: dict[str, Any] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None
    _waiting: dict[int, asyncio.Queue[dict[str, Any]]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _problem: str = ""  # why the last process ended
    _ids: Callable[[], int] = field(default_factory=lambda: itertools.count(1).__next__)
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _follower: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._waiting)

    async def check(self, at_work: Sequence[Path] = ()) -> Room:
        """Start the process, which says how much memory talking takes; nothing is loaded yet.

        `at_work` are the folders of runs at work. Raises StudioError with the reason if it cannot be loaded.
        """
        async with self._starting:
            if self.state == "off":
                await self._start(at_work)
        while self.state == "checking":
            await self._change()
        if self.state == "off" or self.room is None:
            raise StudioError(self._problem)
        return self.room

    async def load(self, at_work: Sequence[Path] = ()) -> None:
        """Load the model, if it is not. Raises StudioError with the reason if it cannot be loaded."""
        await self.check(at_work)
        if self.state == "checked":
            self.state = "loading"
            await self._send({"do": "load", "at_work": [str(folder) for folder in at_work]})
        while self.state == "loading":
            await self._change()
        if self.state != "ready":
            raise StudioError(self._problem)

    async def ask(self, question: Question, at_work: Sequence[Path] = ()) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer: begin, piece …, end. To leave the iteration stops the answer.

        Raises StudioError with the reason if there is no answer, or the process ends in the middle of one.
        """
        message = question.message()
        await self.load(at_work)
        id, events = self._ids(), asyncio.Queue[dict[str, Any]]()
        self._waiting[id] = events
        try:
            await self._send({"do": "answer", "id": id, **message})
            while True:
                event = await events.get()
                if event["is"] == "error":
                    raise StudioError(event["text"])
                yield event
                if event["is"] == "end":
                    return
        finally:
            del self._waiting[id]
            with suppress(StudioError):
                await self._send({"do": "stop", "id": id})

    async def stop(self, id: int) -> None:
        """Have an answer end with what it has; its end comes as an event."""
        with suppress(StudioError):
            await self._send({"do": "stop", "id": id})

    async def close(self) -> None:
        """End the process and free the memory; answers that are waited for end with an error."""
        process, follower = self._process, self._follower
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        if follower is not None:
            await asyncio.wait([follower])

    async def _start(self, at_work: Sequence[Path]) -> None:
        words = ["-m", "mlx_zh.studio.talk_process", str(self.run), str(self.idle), *map(str, at_work)]
        pipe = asyncio.subprocess.PIPE
        self.state, self.room, self.about, self.progress, self._problem = "checking", None, {}, {}, ""
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *words, stdin=pipe, stdout=pipe, stderr=pipe, cwd=self.folder, limit=_LINE
            )
        except OSError as error:
            self.state = "off"
            raise StudioError(
                f"the process that holds the model cannot be started: {error.strerror or error}. Try again."
            ) from error
        self._follower = asyncio.create_task(self._follow(self._process))

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what the process says, until it ends."""
        said = asyncio.create_task(_tail(process))
        assert process.stdout is not None
        with suppress(ValueError):  # a line longer than any that it writes
            async for line in process.stdout:
                with suppress(ValueError):
                    self._heard(parse_json(line))
        try:
            status = await asyncio.wait_for(process.wait(), _ENDS)
        except TimeoutError:  # it closed its output, and hangs
            process.kill()
            status = await process.wait()
        self._problem = self._problem or _ended(status, await said)
        self.state = "off"
        self._signal()
        for events in self._waiting.values():
            events.put_nowait({"is": "error", "text": self._problem})

    def _heard(self, message: dict[str, Any]) -> None:
        kind, id = message["is"], message.get("id")
        if kind == "room":
            self.room = Room(message["need"], message["free"], message["promised"])
            self.state = "checked" if self.state == "checking" else self.state
        elif kind == "ready":
            self.about, self.state = message, "ready"
        elif kind == "progress":
            self.progress = message
        elif id is None:
            self._problem = str(message.get("text"))
            self.state = "off"
        elif id in self._waiting:
            self._waiting[id].put_nowait(message)
            return
        self._signal()

    async def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            raise StudioError(self._problem or _ended(0, ""))
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        except (OSError, RuntimeError) as error:  # it has just ended; `_follow` knows why
            raise StudioError(self._problem or _ended(0, "")) from error

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()


async def _tail(process: asyncio.subprocess.Process) -> str:
    """The end of what a process wrote to its standard error."""
    assert process.stderr is not None
    kept = b""
    while block := await process.stderr.read(1 << 16):
        kept = (kept + block)[-_TAIL:]
    return kept.decode(errors="replace")


def _ended(status: int, said: str) -> str:
    """Why a process ended, in a sentence."""
    if status == -signal.SIGKILL:
        return (
            "the process that holds the model was killed; most likely the memory was exhausted. Ask again to load "
            "the model anew, and close other programs before."
        )
    if status == 0:
        return "the process that holds the model has ended. Ask again to load the model anew."
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(status)
    return f"the process that holds the model has ended ({name}): {last}. Ask again to load the model anew."


@dataclass
class Talkers:
    """The processes of all models: one for each base model, whatever tabs and runs use it."""

    _of: dict[tuple[Any, ...], Talker] = field(default_factory=dict)

    def of(self, base: tuple[Any, ...], run: Path, folder: Path) -> Talker:
        """The process for a base model; `run` is a run over it."""
        return self._of.setdefault(base, Talker(run, folder))

    async def make_room(self, wanted: Talker) -> None:
        """End the processes of other models that answer nothing now: their memory is needed."""
        if wanted.state in ("off", "checked"):
            for other in self._of.values():
                if other is not wanted and not other.busy and other.state != "loading":
                    await other.close()

    async def close(self) -> None:
        """End all processes."""
        for talker in self._of.values():
            await talker.close()
