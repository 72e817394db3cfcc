"""How a chat template thinks: its switch, where it takes reasoning, and which of both a conversation needs.

Templates differ. Qwen3 reads `enable_thinking`, DeepSeek V3.1 `thinking`. Some take reasoning as a key of a
message, some cut it out of the text, and GPT-OSS reads an effort that nothing switches off. There is no list of
families: the template is rendered with each variable and each key, and what changes its text is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import TemplateError

MODES = ("on", "off", "auto")
REASONING = ("learn", "context", "drop")
SWITCHES = ("enable_thinking", "thinking")  # true or false
EFFORTS = ("reasoning_effort", "thinking_budget")  # how much; not a switch
KEYS = ("reasoning_content", "reasoning", "thinking")  # of a message
INLINE = "inline"  # the template finds <think>…</think> in the content
APART = "apart"  # the template drops reasoning from every reply, so the reply is written as the model writes it
OPEN, CLOSE = "<think>", "</think>"

_THOUGHT, _ANSWER = "ThoughtOfTheProbe", "AnswerOfTheProbe"
_QUESTION = Message("user", "QuestionOfTheProbe")
_PROBES = ((_QUESTION,), (Message("system", "SystemOfTheProbe"), _QUESTION))
_INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a template does with thinking: its variable `switch`, and the `way` that it takes reasoning, if any."""

    switch: str | None
    way: str | None
    opened: bool  # whether its generation prompt ends inside of a thought
    effort: str | None = None  # a variable that sets how much is thought


def thinking_of(template: ChatTemplate) -> Thinking:
    """What the template does with thinking, found by rendering short conversations."""
    switch = next((name for name in SWITCHES if _renderings(template, name, (True, False))), None)
    effort = next((name for name in EFFORTS if _renderings(template, name, ("low", "high"))), None)
    prompt = _rendered(template, (_QUESTION,), ask=True)
    return Thinking(switch, _way(template), prompt is not None and is_open(prompt), effort)


def is_open(prompt: str) -> bool:
    """Whether a generation prompt ends inside of a thought."""
    return prompt.rstrip().endswith(OPEN)


def is_closed(prompt: str) -> bool:
    """Whether a generation prompt ends with a thought, an empty one where thinking is off."""
    return prompt.rstrip().endswith(CLOSE)


def variables_of(thinking: Thinking, mode: str) -> dict[str, bool]:
    """The variables that put the template into `mode`. Raises TemplateError if it has no such mode."""
    if mode not in MODES:
        raise ValueError(f"thinking must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "auto" or (mode == "on" and thinking.switch is None and thinking.opened):
        return {}
    if thinking.switch is not None:
        return {thinking.switch: mode == "on"}
    if thinking.effort is not None:
        raise TemplateError(
            f"model.thinking is {mode}, but this model's chat template has no such switch: it reads "
            f"{thinking.effort}, which says how much is thought. Leave model.thinking out, or set it to auto"
        )
    if thinking.opened:
        raise TemplateError(
            f"model.thinking is {mode}, but this model's chat template always begins a reply with {OPEN}. Leave "
            "model.thinking out, or set it to auto"
        )
    raise TemplateError(
        f"model.thinking is {mode}, but this model's chat template has no switch for thinking (it reads none of "
        f"{', '.join(SWITCHES)}). Leave model.thinking out, or set it to auto"
    )


def with_reasoning_apart(message: Message) -> Message:
    """The reply with a `<think>…</think>` at its start as its reasoning; any other message unchanged."""
    if message.role != "assistant" or CLOSE not in message.content:
        return message
    match = _INLINE.match(message.content)
    if match is None:
        return message
    thought = match[1].strip() if not message.reasoning else message.reasoning
    return replace(message, content=message.content[match.end() :], reasoning=thought)


def _way(template: ChatTemplate) -> str | None:
    """How the template takes the reasoning of the last reply."""
    answer = Message("assistant", _ANSWER, reasoning=_THOUGHT)
    for key in KEYS:
        text = _rendered(template.with_reasoning(key), (_QUESTION, answer))
        if text is not None and _THOUGHT in text:
            return key
    if "think" not in template.source:
        return None
    inline = _rendered(template.with_reasoning(INLINE), (_QUESTION, answer))
    plain = _rendered(template, (_QUESTION, replace(answer, reasoning="")))
    if inline is None or plain is None or _ANSWER not in inline:
        return None
    if _THOUGHT in inline:
        return INLINE
    return APART


def _renderings(template: ChatTemplate, name: str, values: tuple[object, object]) -> bool:
    """Whether the two values of a variable give different texts, in a prompt or in an answered one."""
    first, second = (template.with_variables({name: value}) for value in values)
    answered = (*_PROBES[0], Message("assistant", _ANSWER))
    for messages, ask in ((_PROBES[0], True), (_PROBES[1], True), (answered, False)):
        texts = [_rendered(which, messages, ask=ask) for which in (first, second)]
        if None not in texts and texts[0] != texts[1]:
            return True
    return False


def _rendered(template: ChatTemplate, messages: tuple[Message, ...], *, ask: bool = False) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=ask)
    except TemplateError:
        return None
