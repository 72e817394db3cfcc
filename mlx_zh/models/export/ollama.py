"""An Ollama Modelfile whose template writes what the model was trained on.

The template is found by rendering marks through the tokenizer's own chat template and reading off what stands
between them, so that it says the same as training did, whatever the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_zh.models.export.gguf_vocabulary import adds_bos

_SYSTEM, _USER, _ANSWER = "\ue000S\ue000", "\ue000U\ue000", "\ue000A\ue000"
_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Turns:
    """The text around each kind of message."""

    opening: str  # before everything, where there is no system message
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str  # what a reply begins after

    def template(self) -> str:
        """The same in Go's template language, as Ollama reads it."""
        start = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}"
        start += f"{{{{ else }}}}{self.opening}{{{{ end }}}}" if self.opening else "{{ end }}"
        user = f'{{{{ if eq .Role "user" }}}}{self.user[0]}{{{{ .Content }}}}{self.user[1]}'
        answer = f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
        return f"{start}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def find_turns(tokenizer: Any, date_string: str) -> Turns | None:
    """None where the chat template does not simply put messages one after the other."""

    def render(*messages: tuple[str, str], reply: bool = False) -> str:
        said = [{"role": role, "content": content} for role, content in messages]
        text: str = tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=reply, date_string=date_string
        )
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if bos and adds_bos(tokenizer) else text  # Ollama adds it

    try:
        system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
        full = render(system, user, answer, user, answer)
        alone = render(user, answer, user, answer)
        asked = render(user, reply=True)
    except Exception:  # a template may refuse any of this
        return None
    found = _read(full, alone, asked)
    if found is None or _written(found, with_system=True) != full or _written(found, with_system=False) != alone:
        return None
    return found


def _read(full: str, alone: str, asked: str) -> Turns | None:
    """The pieces between the marks: system, user, answer, user, answer in `full`, and a waiting user in `asked`."""
    pieces: list[str] = []
    rest = full
    for mark in (_SYSTEM, _USER, _ANSWER, _USER, _ANSWER):
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(before)
    opening, after_system, after_user, after_answer, _ = pieces
    before_user = after_answer.removeprefix(rest)
    head = before_user.partition("user")[0]  # what every header begins with
    cut = after_user.find(head) if head else -1
    waiting = asked.partition(_USER)[2]
    if cut < 0 or not rest or waiting[:cut] != after_user[:cut]:
        return None
    return Turns(
        opening=alone.partition(_USER)[0].removesuffix(before_user),
        system=(opening, after_system.removesuffix(before_user)),
        user=(before_user, after_user[:cut]),
        assistant=(after_user[cut:], rest),
        reply=waiting[cut:],
    )


def _written(turns: Turns, *, with_system: bool) -> str:
    """What Ollama's template would make of two exchanges, to be compared with the original."""
    start = f"{turns.system[0]}{_SYSTEM}{turns.system[1]}" if with_system else turns.opening
    exchange = _USER.join(turns.user) + _ANSWER.join(turns.assistant)
    return start + exchange * 2


def modelfile(
    file_name: str, tokenizer: Any, date_string: str, *, system: str | None, context: int, notes: Sequence[str] = ()
) -> str:
    """The Modelfile; without TEMPLATE where Ollama has to go by the template inside the GGUF file."""
    lines = [f"# {note}" for note in notes] + [f"FROM ./{file_name}", ""]
    turns = find_turns(tokenizer, date_string)
    vocabulary = tokenizer.get_vocab()
    stops = [mark for mark in _STOPS if mark in vocabulary]
    if turns is not None:
        lines += [f'TEMPLATE """{turns.template()}"""', ""]
        stops = [mark for mark in stops if mark in turns.template()] or stops
    lines += [f'PARAMETER stop "{mark}"' for mark in stops]
    lines.append(f"PARAMETER num_ctx {min(context, 8192)}")
    if system:
        lines += ["", f'SYSTEM """{system}"""']
    return "\n".join(lines) + "\n"
