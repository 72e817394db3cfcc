"""Work that would hold the page up, done in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from nicegui import run

Result = TypeVar("Result")


async def in_thread(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work` returns, which is never None. Raises what it raises, and CancelledError when the studio ends."""
    result = await run.io_bound(work, *arguments)
    if result is None:
        raise asyncio.CancelledError
    return result
