"""The quality rules of a recipe, applied to the rows of a source: counted, masked or dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TypedDict

from mlx_zh.corpus.conversation import Conversation, Document, Labelled, Message, Preference
from mlx_zh.corpus.quality import characters, loops, replies
from mlx_zh.corpus.quality.personal import Masks
from mlx_zh.corpus.row_messages import changed_message
from mlx_zh.corpus.rows import LoadReport

Item = Conversation | Preference | Document
ReplyRule = Callable[[str, str], str | None]  # (question, reply) -> what is wrong with the reply, or None

REPLY_RULES: dict[str, ReplyRule] = {
    "refusal": replies.refusal,
    "language": replies.language,
    "repetition": loops.repetition,
    "truncated": replies.truncated,
    "mixed_script": characters.mixed_script,
    "echo": replies.echo,
    "numbering": loops.numbering,
}
# What excuses all later replies of a conversation when a question or the system message says it.
_EXCUSES: dict[str, Callable[[str], bool]] = {
    "language": replies.names_language,
    "mixed_script": characters.is_about_scripts,
}
MOJIBAKE, PERSONAL = "mojibake", "personal"
RULES = (*REPLY_RULES, MOJIBAKE, PERSONAL)
REASONS = {  # for which rows are dropped
    "refusal": "refusal",
    "language": "other language",
    "repetition": "looping reply",
    "truncated": "cut-off reply",
    "mixed_script": "mixed script",
    "echo": "question repeated",
    "numbering": "broken numbering",
    MOJIBAKE: "mojibake",
    PERSONAL: "personal data",
}
SAMPLE = "sample"
_FIRST, _EVERY = 500, 128  # with `sample`, the first rows are checked, and of the others one in 128
_EXAMPLES = 3


class RuleReport(TypedDict):
    """What a rule did in one source."""

    action: str
    checked: int  # rows that the rule looked at
    rows: int  # of them, those with the fault: counted, masked or dropped
    examples: list[str]  # the first few, as "file:line: what is wrong"


class Quality:
    """The rules of a source. `actions` says what each does: off, sample, count, mask or drop; default: sample."""

    def __init__(self, actions: Mapping[str, str]) -> None:
        self._actions = {name: actions.get(name, SAMPLE) for name in RULES if actions.get(name) != "off"}
        self._always = {name for name, action in self._actions.items() if action != SAMPLE}
        self._rows = self._sampled = 0
        self._faults: dict[str, int] = dict.fromkeys(self._actions, 0)
        self._examples: dict[str, list[str]] = {name: [] for name in self._actions}

    def kept(self, items: Iterator[Item], report: LoadReport) -> Iterator[Item]:
        """The rows that stay, with masks if they are asked for. `report` gets those that are dropped."""
        for item in items:
            sampled = self._rows < _FIRST or self._rows % _EVERY == 0
            self._rows += 1
            self._sampled += sampled
            names = self._actions.keys() if sampled else self._always
            result = self._checked(item, names, report) if names else item
            if result is not None:
                yield result

    def report(self) -> dict[str, RuleReport]:
        """What each rule did so far."""
        return {
            name: {
                "action": action,
                "checked": self._sampled if action == SAMPLE else self._rows,
                "rows": self._faults[name],
                "examples": self._examples[name],
            }
            for name, action in self._actions.items()
        }

    def _checked(self, item: Item, names: Collection[str], report: LoadReport) -> Item | None:
        faults, masked = faults_of(item, names)
        for name, text in faults.items():
            self._faults[name] += 1
            if len(self._examples[name]) < _EXAMPLES:
                self._examples[name].append(f"{item.source}: {text}")
        dropped = next((name for name in faults if self._actions[name] == "drop"), None)
        if dropped is not None:
            report.kept -= 1
            report.drop(REASONS[dropped], item.source)
            return None
        return masked if self._actions.get(PERSONAL) == "mask" else item


def faults_of(item: Item, names: Collection[str] = RULES) -> tuple[dict[str, str], Item]:
    """What these rules find in a row, by rule, and the row with its personal data masked, if that is looked for.

    Personal data is named by its kind, and what other rules quote has it masked. Of a pair, only the chosen answer is
    a reply: the rejected one may be bad, and so may one that is labelled bad.
    """
    masks = Masks()
    faults = _reply_faults(item, names)
    if MOJIBAKE in names:
        damaged = next(filter(None, map(characters.mojibake, _texts(item))), None)
        if damaged is not None:
            faults[MOJIBAKE] = damaged
    masked = _changed(item, masks.mask) if PERSONAL in names else item
    if masks.kinds:
        faults[PERSONAL] = ", ".join(masks.kinds)
    return {name: " ".join(Masks().mask(text).split()) for name, text in faults.items()}, masked


def _reply_faults(item: Item, names: Collection[str]) -> dict[str, str]:
    """The first fault that each rule finds in the replies of a row. Only trained replies are looked at."""
    faults: dict[str, str] = {}
    rules = {name: rule for name, rule in REPLY_RULES.items() if name in names}
    question = ""
    for message in _turns(item):
        if message.role == "assistant":
            if not message.trained or (message.calls and not message.content.strip()):
                continue
            for name, rule in list(rules.items()):
                fault = rule(question, message.content)
                if fault is not None:
                    faults[name] = fault
                    del rules[name]
        else:
            question = message.content if message.role == "user" else question
            for name, excuse in _EXCUSES.items():
                if name in rules and excuse(message.content):
                    del rules[name]
    return faults


def _turns(item: Item) -> tuple[Message, ...]:
    """The turns of a row; the last one of a pair is its chosen answer, and earlier answers are not learned.

    A labelled answer is learned if it is good.
    """
    if isinstance(item, Document):
        return ()
    if isinstance(item, Labelled):
        before = (replace(message, trained=False) for message in item.messages[:-1])
        return (*before, replace(item.messages[-1], trained=item.label))
    if isinstance(item, Conversation):
        return item.messages
    asked = (replace(message, trained=False) for message in item.prompt)
    return (*asked, item.answers[0])


def _texts(item: Item) -> list[str]:
    if isinstance(item, Document):
        return [item.text]
    return [text for message in item.messages for text in message.texts]


def _changed(item: Item, change: Callable[[str], str]) -> Item:
    """The row with `change` applied to all its texts, in order."""
    if isinstance(item, Conversation):
        return replace(item, messages=_changed_turns(item.messages, change))
    if isinstance(item, Document):
        return replace(item, text=change(item.text))
    *prompt, chosen, rejected = _changed_turns(item.messages, change)
    changed = replace(item, prompt=tuple(prompt), chosen=chosen.content, rejected=rejected.content)
    return replace(changed, chosen_calls=chosen.calls, rejected_calls=rejected.calls)


def _changed_turns(messages: tuple[Message, ...], change: Callable[[str], str]) -> tuple[Message, ...]:
    return tuple(changed_message(message, change) for message in messages)
