"""A process beside the studio that reads data files and plans runs: slow work, a broken file or MLX stay outside.

Requests and answers are lines of JSON. `drafting` answers them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mlx_zh.errors import StudioError
from mlx_zh.language.catalogue import Language
from mlx_zh.system.json_text import parse_json

_LONGEST = 2**25  # bytes of an answer
_IDLE = 120.0  # seconds after which an unused process ends: it holds memory that a run may need
Answer = TypeVar("Answer")


class Worker:
    """One process, started when it is asked something, that answers one request after another."""

    def __init__(self, project: Path, *, limit: float = 180.0) -> None:
        self._project = project
        self._limit = limit
        self._one_by_one = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    async def ask(self, what: str, language: Language, **values: Any) -> Any:
        """The answer to a request. Raises StudioError with the message of an error, in the language."""
        async with self._one_by_one:
            if self._idle is not None:
                self._idle.cancel()
            try:
                process = await self._started()
                answer = await asyncio.wait_for(_asked(process, what, language, values), self._limit)
            except asyncio.CancelledError:
                self.close()  # its answer would be taken for that of the next request
                raise
            except (TimeoutError, OSError, ValueError, asyncio.LimitOverrunError):
                self.close()
                raise StudioError(
                    "the program that reads data and plans runs ended, or took too long. Try again; if it happens "
                    "again, look at the file with `mlx-zh init FILE` in a terminal."
                ) from None
            self._idle = asyncio.get_running_loop().call_later(_IDLE, self.close)
        if "error" in answer:
            raise StudioError(str(answer["error"]))
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(RuntimeError):  # no loop runs any more
                self._ending = asyncio.get_running_loop().create_task(_ended(process))

    async def ended(self) -> None:
        """End the process, and wait until it has ended."""
        self.close()
        if self._ending is not None:
            await self._ending

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mlx_zh.studio.drafting",
                cwd=self._project,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LONGEST,
            )
        return self._process


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()


async def _asked(process: asyncio.subprocess.Process, what: str, language: Language, values: Any) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"ask": what, "language": language, "with": values}).encode() + b"\n")
    await process.stdin.drain()
    answer: dict[str, Any] = parse_json(await process.stdout.readline())
    return answer


class Latest:
    """Work of which only the last request counts, such as a forecast that follows a slider."""

    def __init__(self, pause: float = 0.2) -> None:
        self._pause = pause
        self._newest = 0

    async def of(self, work: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """The result of `work`; None if a later request came before it was begun or done."""
        self._newest += 1
        mine = self._newest
        await asyncio.sleep(self._pause)
        if mine != self._newest:
            return None
        result = await work()
        return result if mine == self._newest else None
