"""Three rows of the user's data, as the model will see them, before anything is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

from mlx_zh.corpus.conversation import Conversation, Labelled
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.sources import Item
from mlx_zh.corpus.survey import Survey
from mlx_zh.errors import MlxZhError
from mlx_zh.language.reader import say
from mlx_zh.stages.own_models import tokenizer_at_hand
from mlx_zh.stages.showing import Segment, in_colour, painted, plain_segments, rendered_segments
from mlx_zh.system import console

_SHOWN = 3
_LONGEST = 1500  # characters of a row that are shown


class Sample(NamedTuple):
    """A row as the model will see it. `label` says of a labelled answer whether it is a good one, else ""."""

    place: str
    segments: list[Segment]
    label: str


def samples_of(surveys: Sequence[Survey], model: str) -> list[Sample]:
    """Three rows: through the template of `model` if it is on this disk, else with the names of the roles."""
    columns = zip_longest(*(result.samples for result in surveys))
    items = [item for item in chain.from_iterable(columns) if item is not None][:_SHOWN]
    renderer = _renderer(model)
    paths = [(str(result.path), result.path.name) for result in surveys]
    samples = []
    for item in items:
        place = next((item.source.replace(path, name, 1) for path, name in paths if item.source.startswith(path)), "")
        label = say("init-label-good" if item.label else "init-label-bad") if isinstance(item, Labelled) else ""
        samples.append(Sample(place, _cut(_segments(item, renderer)), label))
    return samples


def show(surveys: Sequence[Survey], model: str) -> None:
    """Print three rows, see `samples_of`."""
    for number, sample in enumerate(samples_of(surveys, model), start=1):
        code = "init-sample-colour" if in_colour() else "init-sample-marked"
        console.say()
        console.say(say(code, number=number, place=sample.place))
        console.say(painted(sample.segments) + (f"\n{sample.label}" if sample.label else ""))


def _renderer(model: str) -> Renderer | None:
    tokenizer = tokenizer_at_hand(model)
    try:
        return None if tokenizer is None else Renderer(tokenizer)
    except MlxZhError:
        return None


def _segments(item: Item, renderer: Renderer | None) -> list[Segment]:
    if renderer is not None and isinstance(item, Conversation):
        try:
            rendered = renderer.conversation(item)
        except MlxZhError:  # a template that refuses this row; `prepare` says so
            rendered = None
        if rendered is not None:
            return rendered_segments(rendered, renderer)
    roles = {
        "system": say("init-role-system"),
        "user": say("init-role-user"),
        "assistant": say("init-role-assistant"),
        "tools": say("init-role-tools"),
        "tool": say("init-role-tool"),
        "chosen": say("init-role-chosen"),
        "rejected": say("init-role-rejected"),
    }
    return plain_segments(item, roles)


def _cut(segments: Sequence[Segment]) -> list[Segment]:
    """The segments up to `_LONGEST` characters in all."""
    shown, left = [], _LONGEST
    for text, learned in segments:
        shown.append((text if len(text) <= left else f"{text[:left]} …", learned))
        left -= len(text)
        if left <= 0:
            break
    return shown
