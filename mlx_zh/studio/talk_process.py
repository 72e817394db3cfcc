"""The process that holds a run's model for the studio: `python -m mlx_zh.studio.talk_process RUN …`.

One JSON object a line. Standard input brings {"do": "load", "at_work": …}, {"do": "answer", "id": …, and the fields
of `stages.talking.Asked`} and {"do": "stop", "id": …}. Standard output gives:

    {"is": "room", "need": …, "free": …, "promised": …}       bytes, before anything is loaded
    {"is": "progress", "name": …, "here": …, "total": …}      of a download
    {"is": "ready", "model": …, "context": …, "switches": …}  `switches`: whether thinking can be switched
    {"is": "begin", "id": …, "first": …, "dropped": …, "thinks": …}
    {"is": "piece", "id": …, "text": …}
    {"is": "end", "id": …, "statistics": {…}, "origin": {…}}
    {"is": "error", "id": … or null, "text": …}               null: the model cannot be loaded; the process ends

It ends when its input is closed, so it never outlives the studio, and after `IDLE` seconds without a question.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_zh.errors import MlxZhError
from mlx_zh.system.crashes import record_crash
from mlx_zh.system.json_text import parse_json

IDLE = 900.0  # seconds


@dataclass
class Process:
    """Answers questions in the order in which they come; `output` is a descriptor that nothing else writes to."""

    run: str
    at_work: Sequence[str]  # folders of runs at work
    output: int
    idle: float = IDLE
    _asked: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    _stopped: set[Any] = field(default_factory=set)  # ids of answers that nobody waits for
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self) -> None:
        """Say how much room there is, load when told to, and answer until nobody asks any more."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._check()
            message = self._asked.get(timeout=self.idle)
            if message["do"] != "load":
                return
            self.at_work = message["at_work"]
            self._check()  # again: something may have taken the memory meanwhile
            talk = self._load()
        except queue.Empty:
            return
        except BaseException as error:  # libraries in Rust raise what is no Exception
            self._tell({"is": "error", "id": None, "text": _told(error)})
            return
        while True:
            try:
                message = self._asked.get(timeout=self.idle)
            except queue.Empty:
                return
            try:
                self._answer(talk, message)
            except BaseException as error:
                self._tell({"is": "error", "id": message.get("id"), "text": _told(error)})

    def _read(self) -> None:
        """Read messages until the studio closes the pipe or ends; then end too, in the middle of whatever is done."""
        for line in sys.stdin.buffer:
            try:
                message = parse_json(line)
            except ValueError:
                continue
            if not isinstance(message, dict):
                continue
            if message.get("do") == "stop":
                self._stopped.add(message.get("id"))
            else:
                self._asked.put(message)
        os._exit(0)

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self.output, line) :]

    def _check(self) -> None:
        from mlx_zh.models.load import find_config
        from mlx_zh.stages.command import find_recipe
        from mlx_zh.stages.talk_memory import require_room, room_for

        self._recipe = find_recipe(self.run)
        model = self._recipe.model
        config = find_config(model.path, hub=model.hub, revision=model.revision)
        room = room_for(self._recipe, config, [Path(folder) for folder in self.at_work])
        self._tell({"is": "room", "need": room.need, "free": room.free, "promised": room.promised})
        require_room(room)

    def _load(self) -> Any:
        from mlx_zh.stages.talking import Talk, open_chatbot
        from mlx_zh.system import device

        device.limit_cache()

        def progress(name: str, here: int, total: int | None) -> None:
            self._tell({"is": "progress", "name": name, "here": here, "total": total})

        bot = open_chatbot(self._recipe, progress=progress)
        switches = bot.renderer.thinking.switch is not None  # type: ignore[attr-defined]
        self._tell({"is": "ready", "model": bot.loaded.source, "context": bot.context, "switches": switches})
        return Talk(self._recipe, bot)

    def _answer(self, talk: Any, message: dict[str, Any]) -> None:
        id = message["id"]
        if id in self._stopped:
            self._tell({"is": "error", "id": id, "text": ""})
            return
        ready = talk.prepared(_asked_in(message))
        about = {"first": ready.first, "dropped": ready.dropped, "thinks": ready.thinks}
        self._tell({"is": "begin", "id": id, **about})
        for piece in ready.stream(lambda: id in self._stopped):
            self._tell({"is": "piece", "id": id, "text": piece})
        bot = talk.bot
        self._tell(
            {"is": "end", "id": id, "statistics": asdict(bot.session.statistics), "origin": asdict(bot.origin)}
        )


def _asked_in(message: dict[str, Any]) -> Any:
    from mlx_zh.corpus.conversation import Message
    from mlx_zh.models.generate import Sampling
    from mlx_zh.stages.talking import Asked

    turns = [Message(role, text) for role, text in message["turns"]]
    fields = ("run", "stage", "system", "first", "seed", "thinking")
    return Asked(turns=turns, sampling=Sampling(**message["sampling"]), **{name: message[name] for name in fields})


def _told(error: BaseException) -> str:
    if isinstance(error, MlxZhError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory of this machine is exhausted. Close other programs, or tune a smaller model."
    return record_crash(error)


def main() -> None:
    """Serve the studio that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the studio's terminal reaches this process as well
    output = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not get between the messages
    run, idle, *at_work = sys.argv[1:]
    Process(run, at_work, output, float(idle)).serve()
    os._exit(0)  # a thread still reads standard input, over which Python would stumble at its own end


if __name__ == "__main__":
    main()
