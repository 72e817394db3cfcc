"""Readers of Ollama's Modelfile and of Go's text/template, written from their sources: enough for these tests."""

from __future__ import annotations

import re

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
}


class NotRead(Exception):
    """Ollama refuses the file."""


def unquote(text: str) -> str | None:
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : len(text) - len(mark)] if closed else None
    return text


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands and their values, a character at a time as Ollama's state machine takes them."""
    commands: list[tuple[str, str]] = []
    state, name, held = "nothing", "", ""
    for character in text:
        printed = character if character.isprintable() else ""
        space, end = character in " \t", character in "\n\r"
        if state == "nothing":
            if character == "#":
                state = "comment"
            elif not (space or end):
                state, held = "name", printed
        elif state == "comment":
            state = "nothing" if end else state
        elif state == "name":
            if character.isascii() and character.isalpha():
                held += character
            elif space and held.lower() in COMMANDS:
                name, held = held.lower(), ""
                state = name if name in ("parameter", "message") else "value"
            else:
                raise NotRead(f"no command: {held + character!r}")
        elif state in ("parameter", "message"):
            if space:
                if state == "message" and held not in ("system", "user", "assistant"):
                    raise NotRead(f"no role: {held!r}")
                name, held, state = f"{name} {held}", "", "value"
            elif character.isascii() and (character.isalnum() or character == "_"):
                held += character
            else:
                raise NotRead(f"no name: {held + character!r}")
        elif space or end:
            value = unquote(held.strip())
            if value is None or space:
                held += character
            else:
                commands.append((name, value))
                state, held = "nothing", ""
        else:
            held += printed
    if state == "value":
        if (value := unquote(held.strip())) is None:
            raise NotRead(f"an open quotation: {held!r}")
        commands.append((name, value))
    elif state not in ("nothing", "comment"):
        raise NotRead("the file ends within a command")
    if not any(command == "from" for command, _ in commands):
        raise NotRead("no FROM")
    return commands


_ESCAPE = re.compile(r'\\(?:U([0-9A-Fa-f]{8})|(["\\]))')


def run_template(template: str, system: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of a template with `if`, `else if`, `range`, fields and string constants."""
    pieces = []
    rest = template
    while "{{" in rest:
        text, _, rest = rest.partition("{{")
        match = re.match(r'\s(?:"(?:[^"\\\n]|\\.)*"|[^"{}]|"[a-z]+")*?\s\}\}', rest)
        if match is None:
            raise NotRead(f"no action: {rest[:40]!r}")
        pieces += [("text", text), ("action", match[0][:-2].strip())]
        rest = rest[match.end() :]
    pieces.append(("text", rest))
    at = 0

    def block(here: dict[str, str], wanted: bool) -> str:
        """The output up to `else` or `end`, at which `at` then stands."""
        nonlocal at
        out = ""
        while at < len(pieces):
            kind, text = pieces[at]
            if kind == "text":
                out += text
                at += 1
            elif text == "end" or text.startswith("else"):
                return out if wanted else ""
            elif text.startswith('"'):
                out += _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else m[2], text[1:-1])
                at += 1
            elif text in here:
                out += here[text]
                at += 1
            elif text.startswith("if "):
                out += branches(here, text.removeprefix("if "))
            elif text == "range .Messages":
                at += 1
                body = at
                turns = []
                for role, content in messages or [("", "")]:
                    at = body
                    turns.append(block(here | {".Role": role, ".Content": content}, bool(messages)))
                out += "".join(turns)
                at += 1  # `end`
            else:
                raise NotRead(f"no such action: {text!r}")
        return out if wanted else ""

    def true(condition: str, here: dict[str, str]) -> bool:
        if match := re.fullmatch(r'eq (\.\w+) "(\w+)"', condition):
            return here[match[1]] == match[2]
        return bool(here[condition])

    def branches(here: dict[str, str], condition: str) -> str:
        nonlocal at
        out, done, holds = "", False, true(condition, here)
        while True:
            at += 1
            out += block(here, holds and not done)
            done = done or holds
            action = pieces[at][1]
            if action == "end":
                at += 1
                return out
            holds = action == "else" or true(action.removeprefix("else if "), here)

    return block({".System": system}, True)
