"""An Ollama Modelfile whose template writes the same text as the chat template in training.

The tokenizer's chat template is rendered with marks as messages. The text between the marks gives Ollama's template,
for every family of models.

How Ollama reads a Modelfile (its parser/parser.go): a command's value that begins with three quotes ends at the first
end of a line at which the text so far, without white space around it, also ends with three quotes; nothing escapes
them. Characters that Go's strconv.IsPrint refuses, such as U+3000, are dropped. So not every text can be a value. A
string constant in a template can hold every text, so a system message that cannot be a value goes into the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mlx_zh.system.escaping import one_line

_SYSTEM, _USER, _ANSWER = "\ue000S\ue000", "\ue000U\ue000", "\ue000A\ue000"
_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Turns:
    """The text before and after each kind of message."""

    opening: str  # at the start, if there is no system message
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str  # after the last user message, before the reply

    def template(self, default_system: str | None = None) -> str:
        """Ollama's template, in Go's template language; `default_system` is said where the user gives none."""
        system, user, answer = (tuple(map(go_text, pair)) for pair in (self.system, self.user, self.assistant))
        opening = self.opening if default_system is None else default_system.join(self.system)
        start = f"{{{{ if .System }}}}{system[0]}{{{{ .System }}}}{system[1]}"
        start += f"{{{{ else }}}}{go_text(opening)}{{{{ end }}}}" if opening else "{{ end }}"
        turn = f'{{{{ if eq .Role "user" }}}}{user[0]}{{{{ .Content }}}}{user[1]}'
        turn += f'{{{{ else if eq .Role "assistant" }}}}{answer[0]}{{{{ .Content }}}}{answer[1]}'
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{{{{ end }}}}{go_text(self.reply)}"


_LINE_BREAKS = "\n\r\t"  # of the characters that are not printable, those that Ollama keeps


def _kept(character: str) -> bool:
    """Whether Ollama keeps a character of a Modelfile. Python's idea of a printable character is Go's."""
    return character.isprintable() or character in _LINE_BREAKS


def quoted(text: str) -> str | None:
    """The text as the value of a Modelfile's command; None if Ollama would not read the same text from it."""
    if not all(map(_kept, text)):
        return None
    closed_early = re.search(r'"""[ \t]*[\n\r]', text)
    return None if closed_early else f'"""{text}"""'


def go_text(text: str) -> str:
    """A literal text inside a template in Go's template language, so that `quoted` can write the template.

    What Go or Ollama would take for something else becomes a string constant: `{{ "{" }}`.
    """
    plain = all(map(_kept, text)) and not re.search('{{|{$|"""', text)
    return text if plain else re.sub(r'{+|"{3,}|[^\n\r\t -~]', _go_constant, text)


def _go_constant(match: re.Match[str]) -> str:
    piece = match[0]
    if _kept(piece[0]) and piece[0] not in '{"':
        return piece
    whole = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # Go refuses halves of pairs
    escaped = [f"\\{c}" if c == '"' else c if c == "{" else f"\\U{ord(c):08X}" for c in whole]
    return '{{ "' + "".join(escaped) + '" }}'


def find_turns(tokenizer: Any, date_string: str) -> Turns | None:
    """The turns of a chat template; None if it does more than write messages one after the other.

    Only prompts are compared, since Ollama writes nothing else: an answer is always followed by a question. What
    a template changes within an answer, such as the thoughts in it, is not seen.
    """

    from mlx_zh.models.export.gguf_vocabulary import adds_bos  # imports MLX, which a name does not need

    def render(*messages: tuple[str, str], reply: bool = True) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=reply, date_string=date_string
        )
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if bos and adds_bos(tokenizer) else text  # Ollama adds BOS itself

    try:
        system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
        full = render(system, user, answer, user, answer, user)
        without_system = render(user, answer, user, answer, user)
        prompt = render(user)
        last = render(user, answer, reply=False)
    except Exception:  # a template may refuse any of these
        return None
    for end in _answer_ends(last, without_system, prompt):
        turns = _read_turns(full, without_system, prompt, end)
        if turns is None or _rendered(turns, with_system=True) != full:
            continue
        if _rendered(turns, with_system=False) == without_system:
            return turns
    return None


def _answer_ends(last: str, without_system: str, prompt: str) -> list[str]:
    """What may end an answer: the text after the last one, or all before the header of the next message.

    They differ if a template writes the last answer in a way of its own, as Qwen3's does.
    """
    following = without_system.partition(_ANSWER)[2].partition(_USER)[0]
    header = prompt.partition(_USER)[2].rpartition("assistant")[0]
    head = header[header.rfind("<") :] if "<" in header else ""
    cut = following.rfind(head) if head else -1
    return [last.partition(_ANSWER)[2], *([following[:cut]] if cut > 0 else [])]


def _read_turns(full: str, without_system: str, prompt: str, end: str) -> Turns | None:
    """The turns from three prompts of marks; None if a mark is missing or the pieces do not agree.

    `full`: system, user, answer, user, answer, user. `without_system`: the same without the first. `prompt`: user,
    and the header of the reply. `end`: the text that ends an answer.
    """
    pieces: list[str] = []
    rest = full
    for mark in (_SYSTEM, _USER, _ANSWER, _USER, _ANSWER):
        before, separator, rest = rest.partition(mark)
        if not separator:
            return None
        pieces.append(before)
    opening, after_system, after_user, after_answer, _ = pieces
    before_user = after_answer.removeprefix(end)
    head = before_user.partition("user")[0]  # the text with which every header begins
    cut = after_user.find(head) if head else -1
    prompt_end = prompt.partition(_USER)[2]
    if cut < 0 or not end or prompt_end[:cut] != after_user[:cut]:
        return None
    return Turns(
        opening=without_system.partition(_USER)[0].removesuffix(before_user),
        system=(opening, after_system.removesuffix(before_user)),
        user=(before_user, after_user[:cut]),
        assistant=(after_user[cut:], end),
        reply=prompt_end[cut:],
    )


def _rendered(turns: Turns, *, with_system: bool) -> str:
    """The prompt after two exchanges of marks as Ollama's template would write it."""
    start = f"{turns.system[0]}{_SYSTEM}{turns.system[1]}" if with_system else turns.opening
    exchange = _USER.join(turns.user) + _ANSWER.join(turns.assistant)
    return start + exchange * 2 + _USER.join(turns.user) + turns.reply


def ollama_name(title: str) -> str:
    """A name that Ollama accepts: at most 80 of a-z, 0-9, `-`, `_` and `.`, the first a letter or digit."""
    name = re.sub(r"[^a-z0-9_.-]+", "-", title.lower())[:80].strip("-_.")
    return name or "tuned-model"


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile."""

    text: str
    lacks_system: bool = False  # whether the system message could not be written


def modelfile(
    file_name: str,
    tokenizer: Any,
    date_string: str,
    *,
    system: str | None,
    context: int,
    base: str | None = None,
    parameters: Mapping[str, float] | None = None,
    licences: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Modelfile:
    """The Modelfile of a GGUF file beside it: of a whole model, or with `base` of an adapter over that model.

    It has no TEMPLATE if `find_turns` is None: Ollama then uses the GGUF file's own, and a system message that cannot
    be a value is left out. `parameters` are Ollama's, by name; `licences` are the texts of licences.
    """
    source = [f"FROM ./{one_line(file_name)}"]
    if base is not None:
        source = [f"FROM {one_line(base)}", f"ADAPTER ./{one_line(file_name)}"]
    lines = [f"# {one_line(note)}" for note in notes] + source + [""]
    turns = find_turns(tokenizer, date_string)
    value = quoted(system) if system else None
    inside = system if system and value is None else None  # what the template must hold
    template = None if turns is None else quoted(turns.template(inside))
    if template is not None:
        lines += [f"TEMPLATE {template}", ""]
    lines += [f'PARAMETER stop "{mark}"' for mark in _stops(tokenizer, turns)]
    lines.append(f"PARAMETER num_ctx {min(context, 8192)}")
    lines += [f"PARAMETER {name} {number:g}" for name, number in (parameters or {}).items()]
    if value is not None:
        lines += ["", f"SYSTEM {value}"]
    elif inside is not None:
        left_out = "# The system message is left out: a Modelfile cannot hold it. Set it where you use the model."
        lines += ["", left_out if template is None else "# The system message is in the template."]
    lines += [line for text in licences for line in ("", _licence(text))]
    return Modelfile("\n".join(lines) + "\n", lacks_system=inside is not None and template is None)


_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # of generation_config.json -> of Ollama


def parameters(generation: Mapping[str, Any]) -> dict[str, float]:
    """Ollama's sampling parameters from the base's generation_config.json, as its makers recommend them."""
    if generation.get("do_sample") is False:
        return {}
    return {
        name: value
        for key, name in _PARAMETERS.items()
        if isinstance(value := generation.get(key), int | float) and not isinstance(value, bool) and isfinite(value)
    }


def _stops(tokenizer: Any, turns: Turns | None) -> list[str]:
    """The marks at which an answer ends: those of the template, else all that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    marks = dict.fromkeys([*_STOPS, tokenizer.eos_token])
    plain = [
        mark for mark in marks if mark in vocabulary and re.fullmatch(r'[^"\s]+', mark) and all(map(_kept, mark))
    ]
    used = [] if turns is None else [mark for mark in plain if mark in turns.template()]
    return used or plain


def _licence(text: str) -> str:
    """The LICENSE command; unusual white space becomes a space, other characters that Ollama drops go."""
    spaced = "".join(c if _kept(c) else " " if c.isspace() else "" for c in text)
    value = quoted(spaced)
    return "# The licence is in a file beside this one." if value is None else f"LICENSE {value}"
