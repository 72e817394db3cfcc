"""The model that answers: prompt, cache, adapter, and the same question put to base and tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import AdapterError
from mlx_zh.models.generate import GenerationSession, Sampling, Statistics, StopTest

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel


class PromptRenderer(Protocol):
    """The one rendering that training, evaluation and chat share."""

    def prompt(self, messages: Sequence[Message]) -> list[int]: ...


@dataclass(frozen=True)
class Answer:
    """One side of a comparison."""

    text: str
    statistics: Statistics


@dataclass
class Chatbot:
    """A loaded model with at most one adapter on it. `context` counts prompt and answer tokens."""

    loaded: LoadedModel
    renderer: PromptRenderer
    context: int
    sampling: Sampling = field(default_factory=Sampling)
    adapter: Path | None = None
    session: GenerationSession = field(init=False)
    _replaced: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = self._new_session()

    def fit(self, transcript: Transcript) -> tuple[list[int], int]:
        """The prompt for the waiting question and the exchanges that had to be dropped for it."""
        reserve = min(self.sampling.max_tokens, self.context // 4)
        return transcript.fit(self._render, self.context, reserve)

    def stream(self, prompt: Sequence[int], stop: StopTest = lambda: False) -> Iterator[str]:
        """The answer, piece by piece; `session.statistics` describes it."""
        yield from self.session.stream(prompt, self._sampling_for(prompt), stop)

    def swap(self, folder: Path | None) -> None:
        """Put another adapter on the model, or none. One that does not fit leaves the old one in place."""
        previous = self.adapter
        self.session.reset()  # its keys and values come from the old weights
        self._take_off()
        try:
            if folder:
                self._put_on(folder)
        except AdapterError:
            if previous:
                self._put_on(previous)
            raise

    def _put_on(self, folder: Path) -> None:
        from mlx.utils import tree_flatten

        from mlx_zh.models.adapters.files import load_adapter

        model = self.loaded.model
        weights = dict(tree_flatten(model.parameters()))  # references, not copies
        spec = load_adapter(model, folder)
        model.eval()
        # A fully tuned model has no layers to take off: its weights replace the base's, which are kept.
        self._replaced = weights if spec.kind == "full" else {}
        self.adapter = folder

    def _take_off(self) -> None:
        from mlx_zh.models.adapters.layers import remove_adapter

        if self.adapter:
            remove_adapter(self.loaded.model)
            self.loaded.model.load_weights(list(self._replaced.items()), strict=False)
            self.adapter, self._replaced = None, {}

    def compare(
        self, prompt: Sequence[int], stop: StopTest, progress: Callable[[str, int], None]
    ) -> tuple[Answer, Answer]:
        """The answers of the untouched and of the tuned model. The chat's own cache survives."""
        with self._untouched():
            base = self._collect("base", self._new_session(), prompt, stop, progress)
        return base, self._collect("tuned", self.session, prompt, stop, progress)

    def _collect(
        self,
        name: str,
        session: GenerationSession,
        prompt: Sequence[int],
        stop: StopTest,
        progress: Callable[[str, int], None],
    ) -> Answer:
        pieces = []
        progress(name, 0)
        for piece in session.stream(prompt, self._sampling_for(prompt), stop):
            pieces.append(piece)
            progress(name, session.statistics.generated)
        return Answer("".join(pieces), session.statistics)

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        """The base model for a while. The adapter's cache stays: the same weights come back."""
        if self.adapter is None:
            raise AdapterError("there is nothing to compare with: no adapter is loaded (/adapter DIR loads one)")
        folder = self.adapter
        self._take_off()
        try:
            yield
        finally:
            try:
                self._put_on(folder)
            except AdapterError:
                self.session.reset()  # the folder went away meanwhile; what is left is the base model
                raise

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self.renderer.prompt(messages)

    def _sampling_for(self, prompt: Sequence[int]) -> Sampling:
        room = max(1, self.context - len(prompt))
        return Sampling(self.sampling.temperature, self.sampling.top_p, min(self.sampling.max_tokens, room))

    def _new_session(self) -> GenerationSession:
        return GenerationSession(self.loaded.model, self.loaded.tokenizer, self.loaded.eos_token_ids)


def context_length(config: dict[str, Any], chosen: int | None) -> int:
    """The context to keep to: what the user chose, but never more than the model was made for."""
    known = config.get("max_position_embeddings")
    limit = known if isinstance(known, int) and known > 0 else None
    if chosen is None:
        return limit or 4096
    return min(chosen, limit) if limit else chosen
