"""The command-line parser of every command: help and errors in the reader's language."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from wcwidth import wcwidth

from mlx_zh.language.translation import in_readers_language


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviated options, whose texts are in the reader's language."""

    def __init__(self, prog: str, *, description: str | None = None, epilog: str | None = None) -> None:
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=_Formatter)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which would cut the length of the English word "usage: " off its own usage."""
        if self.usage is None:
            self.usage = self.format_usage().removeprefix(in_readers_language("usage: ")).rstrip().replace("%", "%%")
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line, and exit with status 2.

        Says what is missing, and what options of other programs are called here.
        """
        if "required: RECIPE" in message:
            message = missing_recipe(self.prog)
        if hints := [hint for word in message.split() if word.startswith("--") and (hint := _hint(word))]:
            message += ". " + " ".join(hints)
        self.exit(2, f"{self.format_usage()}{in_readers_language('error: ')}{in_readers_language(message)}\n")


def missing_recipe(command: str) -> str:
    """What is missing in a command line without a recipe, with examples."""
    return (
        "RECIPE is missing: name a recipe file or an earlier run, for example "
        f"`{command} recipes/quickstart.yaml` or `{command} my-run`"
    )


def _hint(option: str) -> str | None:
    """What to write in place of an option that a command does not have."""
    from mlx_zh.recipe_text.problems import other_name  # not at the top: --help must answer at once

    option = option.partition("=")[0]
    if option == "--fresh":
        return "--fresh is an option of the commands that train: run, sft and dpo."
    meaning = other_name(option)
    return meaning and f"{option} is a setting, written as KEY=VALUE. {meaning}"


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add what a command talks with: a recipe, a run or a model, and keys of the recipe."""
    parser.add_argument(
        "target",
        metavar="RECIPE|RUN|MODEL",
        help="a recipe (.yaml), name or folder of a run, model folder, short name (qwen3-8b), .gguf file or hub id",
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="set a key of the recipe, for example data.system=…"
    )


def port(low: int) -> Callable[[str], int]:
    """A type of arguments: a port from `low` on; 0 is any that is free."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= 65535:
            raise argparse.ArgumentTypeError(f"expected a port from {low} to 65535, got {text!r}")
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """A type of arguments: a number from `low` to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {text!r}")

    return parse


def count(text: str) -> int:
    """A type of arguments: a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


class _Formatter(argparse.HelpFormatter):
    """Puts each text of the help into the reader's language before it is laid out."""

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, prefix or in_readers_language("usage: "))

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and in_readers_language(heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and in_readers_language(text))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help and in_readers_language(action.help)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return list(wrapped(text, width))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in wrapped(text, width - len(indent)))


def wrapped(text: str, width: int) -> Iterator[str]:
    """The lines of a paragraph, each at most `width` terminal cells wide. A Chinese character takes two.

    A line ends at a space or after a Chinese character, but no line begins with Chinese punctuation.
    """
    line, cells = "", 0
    for word in _words(" ".join(text.split())):
        size = sum(max(wcwidth(letter), 0) for letter in word)
        if line and cells + size > width and word != " ":
            yield line.rstrip()
            line, cells = "", 0
        if line or word != " ":
            line, cells = line + word, cells + size
    if line.strip():
        yield line.rstrip()


def _words(text: str) -> Iterator[str]:
    """The parts of `text` that stay on one line: Western words, spaces, and Chinese characters with their stops."""
    word = ""
    for letter in text:
        wide = wcwidth(letter) == 2 or wcwidth(word[-1:] or "a") == 2
        if word and (" " in (word, letter) or (wide and letter not in _STOPS)):
            yield word
            word = ""
        word += letter
    if word:
        yield word


_STOPS = "，。、；：！？）》」』】”’"
