"""A chat template as a pure function from messages to text: the date that it prints is fixed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.template_sandbox import Sandbox
from mlx_zh.errors import RefusedByTemplate, TemplateError
from mlx_zh.system.json_text import parse_json

NO_TEMPLATE = (
    "the tokenizer has no chat template; choose an instruct model, or put a chat_template.jinja beside its "
    "tokenizer.json"
)

_LONGEST = 1 << 17  # characters of a template; the longest of known models have a tenth of it
_SHOWN = 500  # characters of what a template says in an error


class ChatTemplate:
    """A template compiled once, with the settings that transformers uses for chat templates.

    Unlike in transformers, `strftime_now` and `date_string` give a fixed date. Chat templates come with downloaded
    models and are not trusted, so they run in Jinja's immutable sandbox.

    Raises TemplateError if the source is not valid Jinja.
    """

    def __init__(self, source: str, *, date_string: str, variables: dict[str, Any]):
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: _pinned_date(date_string, form),
            dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself would expose its attributes
            namespace=_Namespace,
        )
        if len(source) > _LONGEST:
            raise TemplateError(
                f"the chat template has {len(source):,} characters, more than {_LONGEST:,}; take the one of the "
                "original model"
            )
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # untrusted code: RecursionError, SyntaxError, OverflowError, …
            raise TemplateError(f"the chat template is not valid Jinja: {_reason(error)}") from error
        self._environment = environment
        self._text_arguments = False
        self._variables = {**variables, "date_string": date_string, "tools": None, "documents": None}
        self._reasoning: str | None = None  # the key of a message that takes its reasoning
        self.source = source

    def with_variables(self, variables: dict[str, Any]) -> ChatTemplate:
        """The same template with these variables too."""
        changed = copy.copy(self)
        changed._variables = self._variables | variables
        return changed

    def with_text_arguments(self, text_arguments: bool) -> ChatTemplate:
        """The same template, which gets the arguments of calls as JSON text, or as an object."""
        changed = copy.copy(self)
        changed._text_arguments = text_arguments
        return changed

    def with_reasoning(self, key: str | None) -> ChatTemplate:
        """The same template, which gets a reply's reasoning as `key` of the message.

        "inline" puts it into the content, before the answer; None leaves it out.
        """
        changed = copy.copy(self)
        changed._reasoning = key
        return changed

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, source: str = "") -> str:
        """The text of a conversation.

        Raises RefusedByTemplate if the template refuses it; the message begins with `source` ("file:line").
        """
        self._environment.start(len(messages), sum(map(_characters, messages)))
        variables = self._variables
        if messages and messages[0].role == "tools":
            variables = {**variables, "tools": parse_json(messages[0].content)}
            messages = messages[1:]
        rows = [self._row(message) for message in messages]
        try:
            return self._template.render(variables, messages=rows, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # untrusted code may raise anything
            where = f"{source}: " if source else ""
            roles = listed([message.role for message in messages])
            raise RefusedByTemplate(
                f"{where}the chat template refuses the roles {roles}: {_reason(error)}"
            ) from error

    def _row(self, message: Message) -> dict[str, Any]:
        """A message as the template gets it."""
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning and self._reasoning == "inline":
            row["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
        elif message.reasoning and self._reasoning is not None:
            row[self._reasoning] = message.reasoning
        return self._with_calls(row, message) if message.calls else row

    def _with_calls(self, row: dict[str, Any], message: Message) -> dict[str, Any]:
        """A reply with calls, or a result, in the form that transformers gives to templates."""
        calls = parse_json(message.calls)
        if message.role == "assistant":
            return row | {"tool_calls": [self._call(**call) for call in calls]}
        names = {"name": "name", "id": "tool_call_id"}
        return row | {names[key]: value for key, value in calls.items()}

    def _call(self, name: str, arguments: dict[str, Any], id: str = "") -> dict[str, Any]:
        given = json.dumps(arguments, ensure_ascii=False) if self._text_arguments else arguments
        call = {"type": "function", "function": {"name": name, "arguments": given}}
        return call | {"id": id} if id else call


def _characters(message: Message) -> int:
    return len(message.content) + len(message.reasoning) + len(message.calls)


def listed(roles: Sequence[str]) -> str:
    """Roles in an error message: the first few, and how many there are."""
    return ", ".join(roles) if len(roles) <= 12 else f"{', '.join(roles[:12])} … ({len(roles)} messages)"


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template of any form."""
    source = getattr(tokenizer, "chat_template", None)
    return bool(source.strip() if isinstance(source, str) else source)


def template_source(tokenizer: Any, chosen: str | None = None) -> str:
    """The template's text: `chosen` if given, else the tokenizer's own (the one named `default` if it has several).

    Raises TemplateError if there is no template.
    """
    source = chosen if chosen is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        if "default" not in source:
            names = ", ".join(sorted(source)) or "none"
            raise TemplateError(
                f"the tokenizer has several chat templates and none is named default (it has: {names}); save the one "
                "to use as chat_template.jinja in the model's folder"
            )
        source = source["default"]
    if not isinstance(source, str) or not source.strip():
        raise TemplateError(NO_TEMPLATE)
    return source


def tool_template_source(tokenizer: Any, chosen: str | None = None) -> str | None:
    """The text of a template of its own for conversations with tools (`tool_use`); None if there is none."""
    sources = getattr(tokenizer, "chat_template", None)
    source = sources.get("tool_use") if chosen is None and isinstance(sources, dict) else None
    return source if isinstance(source, str) and source.strip() else None


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}` marks a reply for transformers' loss mask; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, because they lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` must stay free as a name in the template
        namespace, *rest = args
        for name in (attributes := dict(*rest, **kwargs)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(namespace, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # values that hold each other could be written without end


def _reason(error: BaseException) -> str:
    return str(error)[:_SHOWN] or type(error).__name__


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _pinned_date(date_string: str, form: str) -> str:
    """The fixed date in the format `form` (strftime's), or unchanged if it is not written like 26 Jul 2024."""
    try:
        return datetime.strptime(date_string, "%d %b %Y").strftime(form)
    except ValueError:
        return date_string
