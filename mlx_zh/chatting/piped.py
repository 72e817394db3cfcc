"""One question, piped or given as an option: standard output gets only the answer."""

from __future__ import annotations

import os
import sys

from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.chatting.statistics_line import describe
from mlx_zh.chatting.terminal import Screen, without_controls
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.errors import MlxZhError
from mlx_zh.system.interrupts import stop_on_interrupt


def read_prompt() -> str:
    """All of standard input, stripped. Raises MlxZhError if it is empty or not UTF-8."""
    stdin = getattr(sys.stdin, "buffer", None)
    try:
        text = stdin.read().decode("utf-8-sig") if stdin else sys.stdin.read()
    except UnicodeDecodeError as problem:
        raise MlxZhError(
            f"standard input is not UTF-8 text (byte {problem.start}); convert it first, e.g. with iconv"
        ) from problem
    if not text.strip():
        raise MlxZhError("standard input is empty: pipe a question in, or run at a terminal to chat")
    return text.strip()


def prompt_in(text: str) -> str:
    """The question of `--prompt`. Raises MlxZhError if it is empty."""
    if not text.strip():
        raise MlxZhError("the question of `mlx-zh chat --prompt` is empty; leave the option out to chat")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def answer_once(bot: Chatbot, transcript: Transcript, screen: Screen | None) -> int:
    """Write the answer to standard output and its statistics to `screen`; returns the exit status."""
    prompt, _ = bot.fit(transcript)
    last = ""
    try:
        with stop_on_interrupt() as stopped:
            for last in bot.stream(prompt, stopped):
                sys.stdout.write(without_controls(last) if sys.stdout.isatty() else last)
                sys.stdout.flush()
        sys.stdout.write("" if last.endswith("\n") else "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe; without this, Python would print an error on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    statistics = bot.session.statistics
    if screen:
        screen.note(describe(statistics))
    return 130 if statistics.reason == "stopped" else 0
