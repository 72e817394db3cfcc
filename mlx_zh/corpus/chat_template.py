"""A chat template as a pure function from messages to text: the date that it prints is fixed."""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import TemplateError

NO_TEMPLATE = (
    "the tokenizer has no chat template; choose an instruct model, or put a chat_template.jinja beside its "
    "tokenizer.json"
)

_LARGEST = 1_000_000  # characters, items or number that a product may reach


class ChatTemplate:
    """A template compiled once, with the settings that transformers uses for chat templates.

    Unlike in transformers, `strftime_now` and `date_string` give a fixed date. Chat templates come with downloaded
    models and are not trusted, so they run in Jinja's immutable sandbox.

    Raises TemplateError if the source is not valid Jinja.
    """

    def __init__(self, source: str, *, date_string: str, variables: dict[str, Any]):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: _pinned_date(date_string, form),
            dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself would expose its attributes
            namespace=_Namespace,
        )
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # untrusted code: RecursionError, SyntaxError, OverflowError, …
            raise TemplateError(f"the chat template is not valid Jinja: {_reason(error)}") from error
        self._variables = {**variables, "date_string": date_string, "tools": None, "documents": None}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, source: str = "") -> str:
        """The text of a conversation.

        Raises TemplateError if the template refuses it; the message begins with `source` ("file:line").
        """
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(self._variables, messages=rows, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # untrusted code may raise anything
            where = f"{source}: " if source else ""
            roles = listed([message.role for message in messages])
            raise TemplateError(f"{where}the chat template refuses the roles {roles}: {_reason(error)}") from error


def listed(roles: Sequence[str]) -> str:
    """Roles in an error message: the first few, and how many there are."""
    return ", ".join(roles) if len(roles) <= 12 else f"{', '.join(roles[:12])} … ({len(roles)} messages)"


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


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a limit on the size of values, so that a template cannot exhaust memory.

    Jinja's sandbox already limits `range`. Here products and powers are limited too, including those that Jinja
    computes while it compiles.
    """

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]  # writes filler text of any length

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power. Raises SecurityError if it would be too large."""
        if operator == "**" or isinstance(left, Sized) or isinstance(right, Sized):
            sizes = [len(side) if isinstance(side, Sized) else abs(side) for side in (left, right)]
            large = sizes[0] * sizes[1] > _LARGEST if operator == "*" else sizes[0] > _LARGEST or sizes[1] > 64
            if large:
                raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large for a chat template")
        return super().call_binop(context, operator, left, right)


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


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter would escape HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _pinned_date(date_string: str, form: str) -> str:
    """The fixed date in the format `form` (strftime's), or unchanged if it is not written like 26 Jul 2024."""
    try:
        return datetime.strptime(date_string, "%d %b %Y").strftime(form)
    except ValueError:
        return date_string
