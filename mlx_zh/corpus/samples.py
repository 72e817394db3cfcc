"""Answers that a model gave to prompts: one line of JSON for each prompt, in any order.

{"kind": "samples", "version": 1, "id": "16 hex digits", "prompt": [{"role": …, "content": …}, …],
 "reference": "the known answer" or null,
 "answers": [{"text": …, "finish": "stop" | "length", "tokens": 12, "seed": 123}, …]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import DataError
from mlx_zh.system.digests import value_digest
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import parse_json

KIND, VERSION = "samples", 1


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One answer. `finish`: the model ended it (stop), or it was cut off (length)."""

    text: str
    finish: str
    tokens: int  # of the answer, its end token included
    seed: int  # of its random numbers


@dataclass(frozen=True, slots=True)
class Sampled:
    """A prompt, whose last message is the user's, and the answers to it. `reference` is the known answer, if any."""

    id: str  # of the prompt, see `prompt_id`
    prompt: tuple[Message, ...]
    reference: str | None
    answers: tuple[SampledAnswer, ...]

    def as_dict(self) -> dict[str, object]:
        """The line of the file as plain values."""
        answers = [asdict(answer) for answer in self.answers]
        values = {"id": self.id, "prompt": plain(self.prompt), "reference": self.reference, "answers": answers}
        return {"kind": KIND, "version": VERSION, **values}

    @staticmethod
    def of(values: Any) -> Sampled:
        """The inverse of `as_dict`. Raises ValueError for values of another form."""
        if not isinstance(values, dict) or (values.get("kind"), values.get("version")) != (KIND, VERSION):
            raise ValueError("not a line of samples")
        prompt: Any = values.get("prompt")
        answers: Any = values.get("answers")
        whole = fits(prompt, list[dict[str, str]]) and prompt and all(m.keys() == {"role", "content"} for m in prompt)
        whole = whole and fits(answers, list[dict[str, Any]]) and fits(values.get("reference"), str | None)
        if not whole or not fits(values.get("id"), str) or not all(_is_answer(answer) for answer in answers):
            raise ValueError("not a whole line of samples")
        messages = tuple(Message(m["role"], m["content"]) for m in prompt)
        return Sampled(values["id"], messages, values["reference"], tuple(SampledAnswer(**a) for a in answers))


def _is_answer(values: dict[str, Any]) -> bool:
    return fits(values, SampledAnswer) and values["finish"] in ("stop", "length")


def plain(prompt: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as plain values."""
    return [{"role": message.role, "content": message.content} for message in prompt]


def prompt_id(prompt: Sequence[Message]) -> str:
    """What tells a prompt from others: 16 hex digits of the SHA-256 of its messages."""
    return value_digest(plain(prompt))[:16]


def read_samples(path: Path) -> list[Sampled]:
    """The prompts with their answers, each once. Lines that are damaged are left out, such as one cut off by a kill.

    Raises DataError if the file cannot be read.
    """
    try:
        lines = list(text_lines(path.read_text(encoding="utf-8", errors="replace")))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    samples: dict[str, Sampled] = {}
    for line in lines:
        try:
            sampled = Sampled.of(parse_json(line))
        except ValueError:
            continue
        samples.setdefault(sampled.id, sampled)
    return list(samples.values())
