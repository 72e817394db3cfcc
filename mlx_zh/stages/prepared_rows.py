"""The prepared data of a run, row by row: filtered, searched, and as the model is trained on it.

Rows stay on disk. Of N rows the numbers in memory take about 40 bytes a row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.examples import Answers, AnySplit, Conversations, Pairs
from mlx_zh.corpus.left_out import FILE as LEFT_OUT
from mlx_zh.corpus.left_out import LeftOutRow
from mlx_zh.corpus.prepared import Corpus, open_corpus
from mlx_zh.corpus.statistics import CorpusReport
from mlx_zh.corpus.token_text import Piece, TokenText
from mlx_zh.errors import DataError, MlxZhError
from mlx_zh.recipe import Recipe
from mlx_zh.stages.own_models import tokenizer_at_hand
from mlx_zh.stages.rendering import renderer_of
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.digests import value_digest
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import load_json, read_object
from mlx_zh.system.storage import cache_folder

ORDERS = ("as trained", "longest", "shortest")
ONLY = ("all", "cut short", "good", "bad")
_BEFORE, _BEHIND = 70, 150  # tokens of a preview
_KEY = re.compile(r"[0-9a-f]{32}")
_UNREADABLE = "the prepared data cannot be read. The next `mlx-zh prepare` makes it again."
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class View:
    """Which rows are shown, and in what order."""

    split: str = "train"
    order: str = "as trained"  # one of ORDERS
    only: str = "all"  # one of ONLY
    source: int | None = None  # None: all sources


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a row: what comes before the answer, an answer, or the whole conversation."""

    role: str  # conversation, branch, prompt, chosen, rejected or answer
    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is trained."""

    number: int  # in its split
    source: str
    tokens: int
    learned: int
    cut_short: bool
    label: bool | None  # of an answer for KTO: whether it is good
    parts: tuple[Part, ...]


class PreparedData:
    """The prepared data of one training stage."""

    def __init__(self, corpus: Corpus, kind: str, text: TokenText | None, *, same_tokenizer: bool) -> None:
        self.kind, self.key = kind, corpus.key
        self.report: CorpusReport = corpus.manifest["report"]
        self.sources = [source["name"] for source in self.report["sources"]]
        self.text, self.same_tokenizer = text, same_tokenizer
        self._corpus = corpus

    def sizes(self) -> dict[str, int]:
        """The number of rows in each split that has any."""
        return {name: len(rows) for name, rows in self._corpus.splits.items() if len(rows)}

    def numbers(self, view: View) -> Indices:
        """The numbers of the rows of a view, in its order."""
        rows = self.examples(view.split)
        wanted = np.ones(len(rows), dtype=bool)
        if view.source is not None:
            wanted &= rows.sources == view.source
        if view.only == "cut short":
            wanted &= rows.truncated.astype(bool) if isinstance(rows, Conversations) else False
        elif view.only in ("good", "bad"):
            wanted &= (rows.labels == (view.only == "good")) if isinstance(rows, Answers) else False
        numbers = np.flatnonzero(wanted)
        if view.order != "as trained":
            lengths = rows.lengths[numbers].astype(np.int64)
            numbers = numbers[np.argsort(-lengths if view.order == "longest" else lengths, kind="stable")]
        return numbers

    def row(self, split: str, number: int) -> Row:
        """A row. Raises DataError if the files changed under it."""
        rows = self.examples(split)
        try:
            parts, label, cut = _parts(rows, number)
        except _DAMAGED as error:
            raise DataError(_UNREADABLE) from error
        source = int(rows.sources[number])
        name = self.sources[source] if 0 <= source < len(self.sources) else "?"
        return Row(number, name, int(rows.lengths[number]), int(rows.scored[number]), cut, label, parts)

    def left_out(self) -> list[LeftOutRow] | None:
        """Rows that were left out, with what they resemble; None of data that an earlier version prepared."""
        try:
            rows = load_json(self._corpus.folder / LEFT_OUT)["rows"]
        except FileNotFoundError:
            return None
        except _DAMAGED:
            return []
        return [row for row in rows if fits(row, LeftOutRow)] if isinstance(rows, list) else []

    def examples(self, split: str) -> AnySplit:
        """The rows of a split, on disk."""
        return self._corpus.splits["validation" if split == "validation" else "train"]


class Search:
    """A search for words in the rows of a view, done in steps so that a page can show what it has so far."""

    def __init__(self, data: PreparedData, view: View, words: str) -> None:
        rows = data.examples(view.split)
        self._numbers = data.numbers(view)
        self._at = rows.rows[self._numbers]  # where the rows of the view are in the files
        self._held = np.zeros(int(rows.rows.max(initial=-1)) + 1, dtype=bool)
        text = data.text
        self._finders = [] if text is None else [text.finder(word) for word in words.split()]
        self._batches = rows.batches() if self._finders else iter(())
        self.total, self.looked_at = len(rows), 0
        self.done = not self._finders

    def get_hits(self) -> Indices:
        """The numbers of the rows that hold all words, in the order of the view."""
        return self._numbers[self._held[self._at]]

    def step(self, seconds: float = 0.2) -> None:
        """Go on for about so long. Raises DataError if the files changed under it."""
        stop = time.monotonic() + seconds
        while not self.done:
            try:
                self._next_batch()
            except _DAMAGED as error:
                raise DataError(_UNREADABLE) from error
            if time.monotonic() >= stop:
                return

    def _next_batch(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self.looked_at, self.done = self.total, True
            return
        first, columns = batch
        held = np.ones(len(columns[0][1]) - 1, dtype=bool)
        for finder in self._finders:
            held &= np.logical_or.reduce([finder.rows(values, offsets) for values, offsets in columns])
        part = self._held[first : first + len(held)]
        part |= held[: len(part)]
        self.looked_at = min(self.total, self.looked_at + len(held))


def _parts(rows: AnySplit, number: int) -> tuple[tuple[Part, ...], bool | None, bool]:
    """The parts of a row, its label, and whether it was cut short."""
    if isinstance(rows, Conversations):
        conversation = rows.example(number)
        role = "conversation" if conversation.segments is None else "branch"
        parts = tuple(Part(role, tokens, learned) for tokens, learned in conversation.paths())
        return parts, None, conversation.truncated
    if isinstance(rows, Pairs):
        pair = rows.example(number)
        sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
        return (_unlearned(pair.prompt), *(_learned(role, tokens) for role, tokens in sides)), None, False
    answer = rows.example(number)
    return (_unlearned(answer.prompt), _learned("answer", answer.response)), answer.label, False


def _unlearned(tokens: npt.NDArray[np.int32]) -> Part:
    return Part("prompt", tokens, np.zeros(len(tokens), dtype=bool))


def _learned(role: str, tokens: npt.NDArray[np.int32]) -> Part:
    return Part(role, tokens, np.ones(len(tokens), dtype=bool))


def pieces(data: PreparedData, part: Part, first: int, count: int) -> list[Piece]:
    """The pieces of at most `count` tokens of a part, from token `first` on; empty without a tokenizer."""
    if data.text is None:
        return []
    window = slice(first, first + count)
    return list(data.text.pieces(part.tokens[window], part.learned[window]))


def preview(data: PreparedData, part: Part) -> list[tuple[str, bool]]:
    """The end of what comes before the first learned token, and the beginning of what is learned, as runs of text.

    Without the tokens that structure a chat, so that two lines show what is asked and answered.
    """
    if data.text is None:
        return []
    learned = np.flatnonzero(part.learned)
    first = int(learned[0]) if len(learned) else len(part.tokens)
    start = max(0, first - _BEFORE) if len(learned) else 0
    window = slice(start, (first if len(learned) else start) + _BEHIND)
    tokens, mask = part.tokens[window], part.learned[window]
    plain = ~np.isin(tokens, list(data.text.added))
    runs: list[tuple[str, bool]] = [("… ", False)] if start else []
    for piece in data.text.pieces(tokens[plain], mask[plain]):
        if runs and runs[-1][1] == piece.learned:
            runs[-1] = runs[-1][0] + piece.text, piece.learned
        else:
            runs.append((piece.text, piece.learned))
    return runs


def reports(run: RunFolder) -> dict[str, Mapping[str, Any]]:
    """What `prepare` wrote about each stage's data; empty if nothing was prepared yet, or the file is damaged."""
    stages = read_object(run.prepared) or {}
    return {name: report for name, report in stages.items() if name in ("sft", "dpo") and isinstance(report, dict)}


def open_prepared(run: RunFolder, stage: str, recipe: Recipe | None, project: Path) -> PreparedData:
    """The prepared data of a stage; `project` is where the recipe's relative paths begin. Raises DataError.

    The folder is named by the key in the run's report, not by the path there: a run folder may come from anywhere.
    """
    key = reports(run).get(stage, {}).get("key")
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise DataError(f"{run.prepared} names no prepared data for {stage}. Run `mlx-zh prepare` on the recipe.")
    folder = cache_folder() / "corpus" / key
    if not folder.is_dir():
        raise DataError(
            f"the prepared data of {stage} is not in {folder.parent} any more: it was removed, or the run is from "
            "another machine. The next `mlx-zh prepare` makes it again."
        )
    try:
        manifest = load_json(folder / "manifest.json")
        check = manifest.pop("check")
        if value_digest(manifest) != check:
            raise ValueError("manifest")
        kind = str(manifest["made_of"]["settings"]["render"]["kind"])
        corpus = open_corpus(folder, kind, ready=True)
    except _DAMAGED as error:
        raise DataError(f"{folder} is damaged. The next `mlx-zh prepare` makes it again.") from error
    text, same = _text_of(recipe, manifest["made_of"]["rendering"], project)
    return PreparedData(corpus, kind, text, same_tokenizer=same)


def _text_of(recipe: Recipe | None, rendering: str, project: Path) -> tuple[TokenText | None, bool]:
    """The text of the tokens, and whether the tokenizer is the one that made them; None if it is not on this disk."""
    if recipe is None:
        return None, True
    path = project / expanduser(recipe.model.path)
    tokenizer = tokenizer_at_hand(str(path) if path.exists() else recipe.model.path)
    if tokenizer is None:
        return None, True
    try:
        same = renderer_of(recipe, tokenizer).fingerprint == rendering
    except MlxZhError:
        same = False
    return TokenText(tokenizer.backend_tokenizer), same
