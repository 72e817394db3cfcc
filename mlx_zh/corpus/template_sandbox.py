"""Jinja's immutable sandbox for templates of strangers, with bounds on the size of values and on the work done.

Jinja's own sandbox keeps a template away from files and attributes, but a template of thirty bytes could fill the
memory or run for ever. Here every value that a template makes is measured: texts, lists and numbers, before they are
made where they could be large. Rounds of loops, calls and large operands are counted. All bounds grow with the
conversation, so they are far from what a template for chats needs.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_zh.corpus.template_guard import JOINED, MEASURED, ROUNDS, USED, Guard

_LARGEST = 1_000_000  # characters or items of a value, and the size of a number given to a filter or method
_STEPS = 300_000  # rounds and calls; a template for chats needs some tens a message
_STEPS_A_MESSAGE, _TEXT_A_MESSAGE = 500, 1000
_UNIT = 1024  # characters or items of an operand that count as one step
_BITS = 4096  # of a product
_FEW = 16  # items of a list
_DEEPEST = 100  # lists within lists
_WIDEST = 16  # indentation and separators of JSON
_ABSENT = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint")  # slow, and no template for chats needs them
_CHEAP_TESTS = frozenset(
    ("defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean", "true")
)
# Methods of texts whose result is not much longer than the text; those with a check stand in `_check_method`.
_REFUSED_METHODS = ("translate", "maketrans")
_FROM_THE_END = ("rfind", "rindex", "rsplit", "rpartition")  # their time may be the product of both lengths
_CODECS = ("utf-8", "utf8", "ascii")  # some others, such as punycode, are slow
# Filters that work on a text's characters or words one by one, in Python.
_BY_CHARACTER = frozenset(
    ("batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "slice")
) | {"sort", "sum", "title", "unique", "wordcount"}
_OF_DICT = frozenset(dir(dict))
_NAMES = 1024  # of attributes that are remembered as safe or not
_NUMBER = re.compile(r"\d{1,18}")


class _Extent(NamedTuple):
    """How large a value is."""

    size: int  # characters and items, those of inner values included, as often as they would be written
    items: int
    depth: int  # of lists within lists


class _Work(threading.local):
    """What this thread's rendering may still do."""

    steps = _STEPS
    largest = _LARGEST


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with these bounds. Its errors are jinja2's SecurityError."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._work = _Work()
        self._safe: dict[tuple[type, str], bool] = {}
        del self.globals["lipsum"]  # writes filler text of any length
        for name in _ABSENT:
            del self.filters[name]
        own: dict[str, Callable[..., Any]] = {
            "join": self._join_filter,
            "replace": self._replace_filter,
            "format": self._format_filter,
            "tojson": self._tojson,
        }
        filters: dict[str, Callable[..., Any]] = {**self.filters, **own}
        self.filters = {name: self._measuring(name, function) for name, function in filters.items()}
        self.filters |= {ROUNDS: self._rounds, USED: self._used, MEASURED: self._measured, JOINED: self.concat}
        tests: dict[str, Any] = {**self.tests}
        self.tests = {
            name: test if name in _CHEAP_TESTS else self._measuring(name, test) for name, test in tests.items()
        }

    def start(self, messages: int, characters: int) -> None:
        """Allow the work of one rendering, in this thread, of so many messages and characters."""
        self._work.steps = _STEPS + _STEPS_A_MESSAGE * messages + characters // 16
        self._work.largest = _LARGEST + _TEXT_A_MESSAGE * messages + 4 * characters

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = Guard().visit(super()._parse(source, name, filename))
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The attribute or item, as in Jinja; a key of a message is looked up at once."""
        if type(obj) is not dict or attribute in _OF_DICT:
            return super().getattr(obj, attribute)
        try:
            return obj[attribute]
        except KeyError:
            return self.undefined(obj=obj, name=attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use the attribute, as in Jinja, where the object's type and the name decide."""
        key = (type(obj), attr)
        if (safe := self._safe.get(key)) is None:
            if len(self._safe) >= _NAMES:
                self._safe.clear()
            safe = self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return safe

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The sum, product, power or formatted text. Raises SecurityError if it would be too large."""
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) < _UNIT:
            return left + right  # what templates do most
        if operator == "%" and isinstance(left, str | bytes):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "**":
            self._check(abs(left) <= _LARGEST and abs(right) <= 64, operator)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            self._check(left.bit_length() + right.bit_length() <= _BITS, operator)
        elif operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            sizes = [self._extent(side).size if isinstance(side, Sized) else abs(side) for side in (left, right)]
            self._check(sizes[0] * sizes[1] <= self._work.largest, operator)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self._check(self._extent(left).size + self._extent(right).size <= self._work.largest, operator)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call. Raises SecurityError if the call is not safe, or its values are too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            args = __self._check_method(owner, getattr(method, "__name__", ""), args, kwargs)
        for value in (*args, *kwargs.values()) if kwargs else args:
            if not _is_small(value):
                __self._extent(value)
        __self._spend(1)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if _is_small(result) else __self._measured(result)

    def concat(self, parts: Iterable[Any]) -> str:
        """The parts as one text. Raises SecurityError as soon as it is too large."""
        texts, length, largest = [], 0, self._work.largest
        for part in parts:
            text = str(part)
            length += len(text)
            if length > largest:
                self._check(False, "the text")
            texts.append(text)
        self._spend(length // _UNIT)
        return "".join(texts)

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise jinja2.exceptions.SecurityError(f"the result of {what} is too large for a chat template")

    def _spend(self, steps: int) -> None:
        self._work.steps -= steps
        if self._work.steps < 0:
            raise jinja2.exceptions.SecurityError(
                "it loops and calls far more often than a chat template needs to for such a conversation"
            )

    def _extent(self, value: Any) -> _Extent:
        """How large a value is; its parts are counted as work. Raises SecurityError if it is too large."""
        if isinstance(value, str | bytes):
            self._spend(len(value) // _UNIT)
            self._check(len(value) <= self._work.largest, "the text")
            return _Extent(len(value), 1, 0)
        if type(value) is list and len(value) <= _FEW and all(map(_is_short, value)):  # what `split` gives
            self._spend(1 + len(value))
            return _Extent(1 + len(value) + sum(map(len, value)), 1 + len(value), 1)
        size = items = deepest = 0
        waiting = [(value, 0)]
        while waiting:
            part, depth = waiting.pop()
            items += 1
            if isinstance(part, str | bytes):
                size += 1 + len(part)
                continue
            size += 1
            if isinstance(part, list | tuple | set | frozenset):
                inner: Sequence[Any] = list(part)
            elif isinstance(part, Mapping):
                inner = [*part.keys(), *part.values()]
            else:
                continue
            deepest = max(deepest, depth + 1)
            self._check(deepest <= _DEEPEST and size + len(inner) <= self._work.largest, "the list")
            waiting.extend((item, depth + 1) for item in inner)
        self._check(size <= self._work.largest, "the list")
        self._spend(items)
        return _Extent(size, items, deepest)

    def _rounds(self, values: Any) -> Any:
        """The values of a loop, each counted as a step."""
        if isinstance(values, jinja2.Undefined):
            return values  # which may be one that raises an error, or an empty one
        return self._counted(values) if not isinstance(values, Sized) else _Counted(self, values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(1)
            yield value

    def _used(self, value: Any) -> Any:
        """A value that is compared or sliced: a large one is work."""
        if not _is_small(value) and isinstance(value, Sized) and not isinstance(value, jinja2.Undefined):
            self._spend(len(value) // _UNIT)
        return value

    def _measured(self, value: Any) -> Any:
        """A value that a template made. Raises SecurityError if it is too large."""
        if isinstance(value, int):
            self._check(value.bit_length() <= _BITS, "the number")
        else:
            self._extent(value)
        return value

    def _measuring(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test whose arguments and result are measured."""

        @functools.wraps(function)  # keeps what Jinja stores about the function
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._spend(1)
            for value in (*args, *kwargs.values()) if kwargs else args:
                if not _is_small(value):
                    self._check(not isinstance(value, int) or abs(value) <= self._work.largest, name)
                    self._extent(value)
            if name in _BY_CHARACTER:
                self._spend(sum(len(value) for value in args if isinstance(value, str | bytes)) // 16)
            elif name == "indent":
                self._check_indent(args, kwargs)
            result = function(*args, **kwargs)
            return result if _is_small(result) else self._measured(result)

        return measured

    def _check_indent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        width = kwargs.get("width", args[1] if len(args) > 1 else 4)
        length = len(width) if isinstance(width, str) else int(width)
        self._check(length * (str(args[0]).count("\n") + 2) <= self._work.largest, "indent")

    def _check_method(
        self, owner: str | bytes | int, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments of a call of a text's or number's own method, checked; an iterator is read into a list."""
        numbers = [abs(value) for value in (*args, *kwargs.values()) if isinstance(value, int)]
        self._check(max(numbers, default=0) <= self._work.largest and name not in _REFUSED_METHODS, name)
        if isinstance(owner, int):
            return args
        self._used(owner)
        if name == "expandtabs":
            tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
            self._check(tabs * max(numbers, default=8) <= self._work.largest, name)
        elif name in _FROM_THE_END:
            wanted = args[0] if args else kwargs.get("sep")
            self._spend(len(owner) * (len(wanted) if isinstance(wanted, str | bytes) else 1) // (8 * _UNIT))
        elif name in ("encode", "decode"):
            self._check({*args[:1], *kwargs.values()} <= {*_CODECS}, name)
        elif name == "replace" and len(args) > 1:
            self._check_replace(owner, *args[:3])
        elif name == "join" and args:
            parts = list(args[0])
            self._check(self._extent(parts).size + len(owner) * len(parts) <= self._work.largest, name)
            return (parts, *args[1:])
        elif name in ("format", "format_map"):
            self._check_format(owner, (*args, *kwargs.values()))
        return args

    def _check_replace(self, text: Any, old: Any, new: Any, count: int = -1) -> None:
        places = text.count(old) if count < 0 else min(count, text.count(old))
        self._check(len(text) + places * max(0, len(new) - len(old)) <= self._work.largest, "replace")

    def _check_format(self, form: str | bytes, values: Sequence[Any]) -> None:
        """Refuse widths, and values that are written often, if the text could become too large."""
        text = form if isinstance(form, str) else form.decode("latin-1")
        widths = sum(map(int, _NUMBER.findall(text)))
        numbers = [abs(value) for value in values if isinstance(value, int) and abs(value) < 1 << 63]
        longest = max([24, *(self._extent(value).size for value in values)])
        by_value = max(numbers, default=0) if "*" in text or text.count("{") > text.count("}}") + 1 else 0
        places = text.count("%") + text.count("{")
        self._check(len(text) + widths + places * (longest + by_value) <= 4 * self._work.largest, "format")

    def _join_filter(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        items = map(make_attrgetter(self, attribute), value) if attribute is not None else value
        texts, between = [], str(d)
        length = 0
        for item in items:
            texts.append(str(item))
            length += len(texts[-1]) + len(between)
            self._check(length <= self._work.largest, "join")
        return between.join(texts)

    def _replace_filter(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, most = str(s), -1 if count is None else count
        self._check_replace(text, str(old), str(new), most)
        return text.replace(str(old), str(new), most)

    def _format_filter(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise jinja2.exceptions.FilterArgumentError("format takes positional or keyword arguments, not both")
        self._check_format(str(value), (*args, *kwargs.values()))
        return str(value) % (kwargs or args)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter would escape HTML characters.
        width = len(indent) if isinstance(indent, str) else indent or 0
        self._check(width <= _WIDEST and sum(map(len, separators or ())) <= _WIDEST, "tojson")
        extent = self._extent(value)
        self._check(extent.items * extent.depth * width <= self._work.largest, "tojson")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_small(value: Any) -> bool:
    """Whether a value needs no further look: what templates work with most."""
    kind = type(value)
    if kind is str:
        return len(value) < _UNIT
    return kind in _NEVER_LARGE or (kind is dict and not value)  # Jinja passes the variables of loops so


def _is_short(value: Any) -> bool:
    return type(value) is str and len(value) < _UNIT


_NEVER_LARGE = frozenset((bool, type(None), Context, nodes.EvalContext, float))


class _Counted:
    """The values of a loop with a known length, each counted as a step when it is taken."""

    def __init__(self, sandbox: Sandbox, values: Any) -> None:
        self._sandbox, self._values = sandbox, values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return self._sandbox._counted(self._values)
