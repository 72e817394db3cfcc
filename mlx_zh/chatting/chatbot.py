"""The model that answers: its prompt, cache and adapter, and the comparison of base and tuned model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from mlx_zh.chatting.transcript import Transcript
from mlx_zh.core.families import Config
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import AdapterError, DeviceError
from mlx_zh.models.generate import GenerationSession, Sampling, Statistics, StopTest
from mlx_zh.system.accelerator import AcceleratorError, accelerator_errors, advice, cause

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel


class PromptRenderer(Protocol):
    """What the chat needs of `corpus.render.Renderer`, which training and evaluation use too."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens from which a reply is generated."""
        ...

    @property
    def mode(self) -> str:
        """Whether the model is asked to think: on, off or auto."""
        ...

    def with_thinking(self, mode: str) -> Self:
        """The same renderer in another mode. Raises TemplateError if the template has no such mode."""
        ...


@dataclass(frozen=True)
class Answer:
    """An answer of one of the two models of a comparison."""

    text: str
    statistics: Statistics


@dataclass
class Chatbot:
    """A loaded model with at most one adapter."""

    loaded: LoadedModel
    renderer: PromptRenderer
    context: int  # tokens that prompt and answer may have together
    sampling: Sampling = field(default_factory=Sampling)
    adapter: Path | None = None  # the folder of the loaded adapter
    session: GenerationSession = field(init=False)
    _replaced: dict[str, Any] = field(default_factory=dict)  # the base's weights under a fully tuned model

    def __post_init__(self) -> None:
        self.session = self._new_session()

    def fit(self, transcript: Transcript) -> tuple[list[int], int]:
        """The prompt's tokens for the last question, and the number of old exchanges dropped to make room.

        Raises ContextError if the question alone does not fit.
        """
        reserve = min(self.sampling.max_tokens, self.context // 4)
        return transcript.fit(self._render, self.context, reserve)

    def stream(self, prompt: Sequence[int], stop: StopTest = lambda: False) -> Iterator[str]:
        """The answer, piece by piece, until `stop` returns true; afterwards `session.statistics` describes it.

        Raises DeviceError if the accelerator gives up.
        """
        with _explained():
            yield from self.session.stream(prompt, self._sampling_for(prompt), stop)

    def swap(self, folder: Path | None) -> None:
        """Load another adapter, or with None only remove the loaded one.

        Raises AdapterError if the new one does not fit; the old one is then loaded again.
        """
        previous = self.adapter
        self.session.reset()  # its keys and values come from the old weights
        self._remove_adapter()
        try:
            if folder:
                self._load_adapter(folder)
        except AdapterError:
            if previous:
                self._load_adapter(previous)
            raise

    def _load_adapter(self, folder: Path) -> None:
        from mlx.utils import tree_flatten

        from mlx_zh.models.adapters.files import load_adapter

        model = self.loaded.model
        weights = dict(tree_flatten(model.parameters()))  # references, not copies
        spec = load_adapter(model, folder)
        model.eval()
        # A full fine-tuning has no adapter layers: its weights replace the base's, which are kept to go back to.
        self._replaced = weights if spec.kind == "full" else {}
        self.adapter = folder

    def _remove_adapter(self) -> None:
        from mlx_zh.models.adapters.layers import remove_adapter

        if self.adapter:
            remove_adapter(self.loaded.model)
            self.loaded.model.load_weights(list(self._replaced.items()), strict=False)
            self.adapter, self._replaced = None, {}

    def compare(
        self, prompt: Sequence[int], stop: StopTest, progress: Callable[[str, int], None]
    ) -> tuple[Answer, Answer]:
        """The answers of the base and of the tuned model; the chat's cache stays valid.

        `progress` is called with the model's name ("base" or "tuned") and the tokens generated so far. Raises
        AdapterError if no adapter is loaded.
        """
        with self._base_model():
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
        with _explained():
            for piece in session.stream(prompt, self._sampling_for(prompt), stop):
                pieces.append(piece)
                progress(name, session.statistics.generated)
        return Answer("".join(pieces), session.statistics)

    @contextlib.contextmanager
    def _base_model(self) -> Iterator[None]:
        """Remove the adapter in this context. The cache is kept, because the same weights are loaded again."""
        if self.adapter is None:
            raise AdapterError("there is nothing to compare with: no adapter is loaded (/adapter DIR loads one)")
        folder = self.adapter
        self._remove_adapter()
        try:
            yield
        finally:
            try:
                self._load_adapter(folder)
            except AdapterError:
                self.session.reset()  # the folder was deleted meanwhile, so the model is now the base model
                raise

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self.renderer.prompt(messages)

    def _sampling_for(self, prompt: Sequence[int]) -> Sampling:
        room = max(1, self.context - len(prompt))
        return Sampling(self.sampling.temperature, self.sampling.top_p, min(self.sampling.max_tokens, room))

    def _new_session(self) -> GenerationSession:
        return GenerationSession(self.loaded.model, self.loaded.tokenizer, self.loaded.eos_token_ids)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the accelerator into one paragraph in Chinese and English."""
    try:
        with accelerator_errors():
            yield
    except AcceleratorError as error:
        why, help_ = cause(error.fault), advice(error.fault)
        raise DeviceError(
            f"回答中断：{why.text('zh')}。{help_.text('zh')}\nThe answer was cut off: {why}. {help_}"
        ) from error


def context_length(config: Config, chosen: int | None) -> int:
    """The context in tokens: `chosen`, but at most what the model was trained for. Without both, 4096."""
    trained = config.get("max_position_embeddings")
    limit = trained if isinstance(trained, int) and trained > 0 else None
    if chosen is None:
        return limit or 4096
    return min(chosen, limit) if limit else chosen
