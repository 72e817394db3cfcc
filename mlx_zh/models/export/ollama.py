"""An Ollama Modelfile whose template writes the same text as the chat template in training.

The tokenizer's chat template is rendered with marks as messages. The text between the marks gives Ollama's template,
for every family of models.
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
    """The text before and after each kind of message."""

    opening: str  # at the start, if there is no system message
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str  # after the last user message, before the reply

    def template(self) -> str:
        """Ollama's template, in Go's template language."""
        start = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}"
        start += f"{{{{ else }}}}{self.opening}{{{{ end }}}}" if self.opening else "{{ end }}"
        user = f'{{{{ if eq .Role "user" }}}}{self.user[0]}{{{{ .Content }}}}{self.user[1]}'
        answer = f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
        return f"{start}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def find_turns(tokenizer: Any, date_string: str) -> Turns | None:
    """The turns of a chat template; None if it does more than write messages one after the other."""

    def render(*messages: tuple[str, str], reply: bool = False) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=reply, date_string=date_string
        )
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if bos and adds_bos(tokenizer) else text  # Ollama adds BOS itself

    try:
        system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
        full = render(system, user, answer, user, answer)
        without_system = render(user, answer, user, answer)
        prompt = render(user, reply=True)
    except Exception:  # a template may refuse any of these
        return None
    turns = _read_turns(full, without_system, prompt)
    if turns is None or _rendered(turns, with_system=True) != full:
        return None
    return turns if _rendered(turns, with_system=False) == without_system else None


def _read_turns(full: str, without_system: str, prompt: str) -> Turns | None:
    """The turns from three renderings of marks; None if a mark is missing or the pieces do not agree.

    `full`: system, user, answer, user, answer. `without_system`: the same without the first. `prompt`: user, and the
    header of the reply.
    """
    pieces: list[str] = []
    rest = full
    for mark in (_SYSTEM, _USER, _ANSWER, _USER, _ANSWER):
        before, separator, rest = rest.partition(mark)
        if not separator:
            return None
        pieces.append(before)
    opening, after_system, after_user, after_answer, _ = pieces
    before_user = after_answer.removeprefix(rest)
    head = before_user.partition("user")[0]  # the text with which every header begins
    cut = after_user.find(head) if head else -1
    prompt_end = prompt.partition(_USER)[2]
    if cut < 0 or not rest or prompt_end[:cut] != after_user[:cut]:
        return None
    return Turns(
        opening=without_system.partition(_USER)[0].removesuffix(before_user),
        system=(opening, after_system.removesuffix(before_user)),
        user=(before_user, after_user[:cut]),
        assistant=(after_user[cut:], rest),
        reply=prompt_end[cut:],
    )


def _rendered(turns: Turns, *, with_system: bool) -> str:
    """Two exchanges of marks as Ollama's template would write them, for comparison with the chat template."""
    start = f"{turns.system[0]}{_SYSTEM}{turns.system[1]}" if with_system else turns.opening
    exchange = _USER.join(turns.user) + _ANSWER.join(turns.assistant)
    return start + exchange * 2


def modelfile(
    file_name: str, tokenizer: Any, date_string: str, *, system: str | None, context: int, notes: Sequence[str] = ()
) -> str:
    """The text of the Modelfile; without TEMPLATE if `find_turns` is None: Ollama then uses the GGUF file's own."""
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
