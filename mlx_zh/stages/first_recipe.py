"""A first recipe for the user's own data: short, commented in the reader's language, and only what differs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_zh.corpus.columns import Guess, better_answers
from mlx_zh.corpus.conversation import Conversation, Document
from mlx_zh.corpus.feedback import tally
from mlx_zh.corpus.sources import Item
from mlx_zh.corpus.survey import Survey
from mlx_zh.errors import DataError, MlxZhError
from mlx_zh.language.reader import say
from mlx_zh.recipe import Memory, Recipe, load_recipe
from mlx_zh.recipe_text.values import inline
from mlx_zh.system import storage

Use = Literal["sft", "sft-dpo", "dpo"]
_PREFERENCES = ("dpo", "kto")  # kinds of files that the stage dpo learns from
USES: tuple[Use, ...] = ("sft", "sft-dpo", "dpo")

_COMMENT = 34  # column at which comments begin
_FEW, _SOME = 1000, 5000  # rows; fewer rows are learned more often
_SMALL_STEPS = 2000  # with fewer rows, steps of 8 rows, so that there are enough of them
_ENOUGH, _LEAST = 200, 20  # rows from which 5 % for validation, and any, make sense
_SMALL_MODELS = {"smollm2-135m-instruct": "1e-3", "qwen3-0.6b": "2e-4"}  # learning rates above the default
_LENGTHS = (1024, 2048, 4096)  # tokens; the first is the default
_PROMPTS, _PROMPT_LENGTH = 3, 80  # questions that are asked, and characters of one


@dataclass(frozen=True)
class Choices:
    """What the user chose."""

    name: str
    model: str
    budget: str | None
    use: Use


def default_use(surveys: Sequence[Survey]) -> Use:
    """SFT, or with pairs or labelled answers also DPO; DPO alone without other answers that SFT can learn."""
    if not any(result.guess.kind in _PREFERENCES for result in surveys):
        return "sft"
    return "sft-dpo" if any(result.guess.kind != "kto" and _for_sft(result) for result in surveys) else "dpo"


def check_use(use: Use, surveys: Sequence[Survey]) -> None:
    """Raise DataError if the files do not have what a use needs."""
    if use != "sft" and not any(result.guess.kind in _PREFERENCES for result in surveys):
        raise DataError(say("init-no-pairs", use=use))
    if use != "dpo" and not any(_for_sft(result) for result in surveys):
        raise DataError(say("init-only-pairs"))


def write_recipe(
    path: Path, surveys: Sequence[Survey], choices: Choices, fitting: Callable[[Recipe], Memory]
) -> None:
    """Write the recipe, with the memory settings that `fitting` gives for it.

    Nothing is left behind if the recipe cannot be loaded. Raises MlxZhError.
    """
    with storage.storage_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlx-zh-") as folder:
        draft = Path(folder) / path.name  # not in the recipe's folder: its paths are not resolved, only checked
        draft.write_text(recipe_text(path, surveys, choices, Memory()), encoding="utf-8")
        try:
            memory = fitting(load_recipe(draft))
        except MlxZhError as error:
            raise DataError(str(error).replace(str(draft), path.name)) from error
        draft.write_text(recipe_text(path, surveys, choices, memory), encoding="utf-8")
        draft.replace(path)


def recipe_text(path: Path, surveys: Sequence[Survey], choices: Choices, memory: Memory) -> str:
    """The recipe as YAML with comments."""
    lines = [f"# {say('init-recipe-title', recipe=path.name)}", ""]
    lines += [_line(f"name: {inline(choices.name)}", say("init-recipe-name", name=choices.name))]
    if choices.budget is None:
        lines += [f"# {say('init-recipe-no-budget')}"]
    else:
        lines += [_line(f"budget: {inline(choices.budget)}", say("init-recipe-budget"))]
    lines += ["", "model:", _line(f"  path: {inline(choices.model)}", say("init-recipe-model"))]
    lines += ["", *_data(path.parent, surveys, choices)]
    lines += _training(surveys, choices)
    saved = memory.model_dump(exclude_defaults=True)
    if saved:
        lines += ["", _line("memory:", say("init-recipe-memory"))]
        lines += [f"  {key}: {inline(value)}" for key, value in saved.items()]
    prompts = _prompts(surveys)
    if prompts:
        lines += ["", "evaluate:", _line("  prompts:", say("init-recipe-prompts"))]
        lines += [f"    - {inline(prompt)}" for prompt in prompts]
    lines += ["", "export:", _line("  formats: [mlx]", say("init-recipe-export"))]
    return "\n".join(lines) + "\n"


def _line(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT - 2}}  # {comment}"


def _data(folder: Path, surveys: Sequence[Survey], choices: Choices) -> list[str]:
    lines = ["data:"]
    if choices.use != "dpo":
        entries = [(result, guess) for result in surveys if (guess := _for_sft(result)) is not None]
        rows = sum(_rows_for_sft(result) for result, _ in entries)
        lines += ["  sft:", _line("    train:", say("init-recipe-rows", rows=rows))]
        lines += [line for result, guess in entries for line in _entry(folder, result, guess)]
    if choices.use != "sft":
        pairs = [result for result in surveys if result.guess.kind in _PREFERENCES]
        comment = say("init-recipe-answers" if _is_kto(surveys) else "init-recipe-pairs")
        lines += ["  dpo:", _line("    train:", comment)]
        lines += [line for result in pairs for line in _entry(folder, result, result.guess)]
    rows = sum(result.usable for result in surveys)
    if rows >= _LEAST:
        share = 0.05 if rows >= _ENOUGH else 0.1
        lines += [_line(f"  validation_fraction: {share}", say("init-recipe-validation"))]
    bad_answers = choices.use != "dpo" and _is_kto(surveys)  # SFT leaves them out
    if bad_answers or any(result.unusable for result in surveys):
        lines += [_line("  on_invalid: skip", say("init-recipe-invalid"))]
    if rows < _SOME:
        lines += [_line("  deduplicate: {near: null}", say("init-recipe-near"))]
    length = _length(surveys)
    if length != _LENGTHS[0]:
        lines += [_line(f"  max_length: {length}", say("init-recipe-length"))]
    return lines


def _for_sft(result: Survey) -> Guess | None:
    """How SFT reads a file: of pairs the better answers, of labelled ones the good ones; None if it cannot."""
    if result.guess.kind == "kto":
        return replace(result.guess, kind="sft")
    return result.guess if result.guess.kind == "sft" else better_answers(result.guess, result.head.rows)


def _is_kto(surveys: Sequence[Survey]) -> bool:
    """Whether a file has labelled answers. KTO learns from pairs too."""
    return any(result.guess.kind == "kto" for result in surveys)


def _rows_for_sft(result: Survey) -> int:
    return tally(result.path).sft if result.guess.format == "feedback" else result.usable


def _entry(folder: Path, result: Survey, guess: Guess) -> list[str]:
    """An entry of a list of files: the path alone, or with what has to be said about it."""
    path = inline(_relative(result.path, folder))
    more = []
    if result.head.sheet is not None:
        more.append(f"sheet: {inline(result.head.sheet)}")
    if guess.explicit:
        more.append(f"format: {guess.format}")
    if guess.columns:
        columns = f"        columns: {inline(guess.columns)}"
        more.append(f"{columns.strip()}  # {say('init-recipe-columns')}")
    if result.max_samples is not None:
        more.append(f"max_samples: {result.max_samples}")
    return [f"      - path: {path}", *[f"        {line}" for line in more]] if more else [f"      - {path}"]


def _relative(path: Path, folder: Path) -> str:
    """The path from the recipe's folder; a path that leads far up is absolute."""
    try:
        relative = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:  # another drive
        return str(path.absolute())
    return relative if relative.count("..") <= 3 else str(path.absolute())


def _training(surveys: Sequence[Survey], choices: Choices) -> list[str]:
    """The keys of training that differ from the defaults."""
    rows = sum(result.usable for result in surveys)
    lines: list[str] = []
    epochs = 3 if rows < _FEW else 2 if rows < _SOME else 1
    if epochs > 1:
        lines += [_line(f"  epochs: {epochs}", say("init-recipe-epochs"))]
    batch = [_line("  batch_size: 8", say("init-recipe-batch"))] if rows < _SMALL_STEPS else []
    rate = _SMALL_MODELS.get(choices.model)
    rates = [_line(f"  learning_rate: {rate}", say("init-recipe-rate"))] if rate else []
    sft = ["", "sft:", *lines, *batch, *rates] if choices.use != "dpo" and (lines or batch or rates) else []
    loss = [_line("  loss: kto", say("init-recipe-kto"))] if _is_kto(surveys) else []
    dpo = ["", "dpo:", *loss, *batch] if choices.use != "sft" and (loss or batch) else []
    return sft + dpo


def _length(surveys: Sequence[Survey]) -> int:
    """The maximum length in tokens that the longest row needs, with about a token a character."""
    longest = max((result.characters for result in surveys), default=0) + 100  # the template's own tokens
    return next((length for length in _LENGTHS if longest <= length), _LENGTHS[-1])


def _prompts(surveys: Sequence[Survey]) -> list[str]:
    """Questions from the samples, of one line and not long, without repeats."""
    questions = [_question(item) for result in surveys for item in result.samples]
    short = [q for q in questions if q and len(q) <= _PROMPT_LENGTH and q.isprintable()]
    return list(dict.fromkeys(short))[:_PROMPTS]


def _question(item: Item) -> str:
    if isinstance(item, Document):
        return ""
    messages: Any = item.messages if isinstance(item, Conversation) else item.prompt
    return next((message.content.strip() for message in messages if message.role == "user"), "")
