"""Piped input: all of it is one prompt, and standard output gets the answer and nothing else."""

from __future__ import annotations

import os
import sys

from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.chatting.repl import describe
from mlx_zh.chatting.terminal import Screen, without_controls
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.errors import MlxZhError
from mlx_zh.system.interrupts import stop_on_interrupt


def read_prompt() -> str:
    """All of standard input."""
    stdin = getattr(sys.stdin, "buffer", None)
    try:
        text = stdin.read().decode("utf-8-sig") if stdin else sys.stdin.read()
    except UnicodeDecodeError as problem:
        raise MlxZhError(f"standard input is not UTF-8 text (byte {problem.start})") from problem
    if not text.strip():
        raise MlxZhError("standard input is empty: pipe a question in, or run at a terminal to chat")
    return text.strip()


def answer_once(bot: Chatbot, transcript: Transcript, screen: Screen | None) -> int:
    """The answer on stdout, and nothing else there."""
    prompt, _ = bot.fit(transcript)
    last = ""
    try:
        with stop_on_interrupt() as stopped:
            for last in bot.stream(prompt, stopped):
                sys.stdout.write(without_controls(last) if sys.stdout.isatty() else last)
                sys.stdout.flush()
        sys.stdout.write("" if last.endswith("\n") else "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted; Python would complain again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    statistics = bot.session.statistics
    if screen:
        screen.note(describe(statistics))
    return 130 if statistics.reason == "stopped" else 0
