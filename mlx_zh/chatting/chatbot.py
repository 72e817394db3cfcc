"""The model that answers: its prompt, cache, seed and adapter, and the comparison of two adapters."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from mlx_zh.chatting.feedback import Origin
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.core.families import Config
from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import AdapterError, DeviceError, MlxZhError
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE
from mlx_zh.models.generate import GenerationSession, Sampling, Statistics, StopTest
from mlx_zh.system.accelerator import AcceleratorError, accelerator_errors, advice, cause
from mlx_zh.system.digests import known_digests, value_digest

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel


_STAGES = ("sft", "dpo", "kto")  # names of stages that may have an adapter
_KEPT_SESSIONS = 4  # caches of other adapters that `turn_to` keeps
_NO_ADAPTER = ("base", "none", "无", "基座")


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
    """An answer, what it cost, and where it came from."""

    text: str
    statistics: Statistics
    origin: Origin


@dataclass
class Chatbot:
    """A loaded model with at most one adapter.

    `stages` are the adapters that have names: those of a run's stages. The answer number k (from 0) since `seed` was
    set is drawn with the seed `seed + k`; without `seed` each answer has a random one.
    """

    loaded: LoadedModel
    renderer: PromptRenderer
    context: int  # tokens that prompt and answer may have together
    sampling: Sampling = field(default_factory=Sampling)
    adapter: Path | None = None  # the folder of the loaded adapter
    stages: dict[str, Path] = field(default_factory=dict)
    seed: int | None = None
    session: GenerationSession = field(init=False)
    origin: Origin | None = None  # of the last answer
    _drawn: int = 0  # answers since the seed was set
    _replaced: dict[str, Any] = field(default_factory=dict)  # the base's weights under a fully tuned model
    _adapter_digest: str = ""
    _sessions: dict[str, GenerationSession] = field(default_factory=dict)  # by digest of the adapter, see `turn_to`

    def __post_init__(self) -> None:
        self.session = self._new_session()

    def fit(self, transcript: Transcript) -> tuple[list[int], int]:
        """The prompt's tokens for the last question, and the number of old exchanges dropped to make room.

        Raises ContextError if the question alone does not fit.
        """
        reserve = min(self.sampling.max_tokens, self.context // 4)
        return transcript.fit(self._render, self.context, reserve)

    def stream(
        self, prompt: Sequence[int], stop: StopTest = lambda: False, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer, piece by piece, until `stop` returns true.

        Afterwards `session.statistics` and `origin` describe it. Raises DeviceError if the accelerator gives up.
        """
        yield from self._draw(self.session, prompt, stop, sampling or self.sampling, self._next_seed())

    def set_seed(self, seed: int | None) -> None:
        """Draw the next answer with this seed; None: each with a random one."""
        self.seed, self._drawn = seed, 0

    def _next_seed(self) -> int:
        if self.seed is None:
            return secrets.randbits(31)
        self._drawn += 1
        return self.seed + self._drawn - 1

    def _draw(
        self, session: GenerationSession, prompt: Sequence[int], stop: StopTest, sampling: Sampling, seed: int
    ) -> Iterator[str]:
        import mlx.core as mx

        self.origin = Origin(self.loaded.source, self.name_of(self.adapter), self._fingerprint(), sampling, seed)
        mx.random.seed(seed)
        room = max(1, self.context - len(prompt))
        with _explained():
            yield from session.stream(prompt, replace(sampling, max_tokens=min(sampling.max_tokens, room)), stop)

    def named(self, name: str) -> Path | None:
        """The adapter's folder that a stage's name or a path stands for; None for the base model (base or none).

        Raises AdapterError for a stage that has none.
        """
        known = name.strip().lower()
        if known in _NO_ADAPTER:
            return None
        if known in self.stages:
            return self.stages[known]
        if known in _STAGES and not Path(name).is_dir():
            others = ", ".join([*self.stages, "none"])
            raise AdapterError(f"there is no adapter of {known} here; /adapter takes {others} or a folder")
        return expanded(name)

    def name_of(self, folder: Path | None) -> str:
        """The name of an adapter: its stage, else its folder; "none" for the base model."""
        if folder is None:
            return "none"
        return next((name for name, path in self.stages.items() if path == folder), str(folder))

    def swap(self, folder: Path | None) -> None:
        """Load another adapter, or with None only remove the loaded one.

        Raises AdapterError if the new one does not fit; the old one is then loaded again.
        """
        self.session.reset()  # its keys and values come from the old weights
        self._change(folder)

    def turn_to(self, folder: Path | None) -> None:
        """As `swap`, but each adapter keeps its cache, so that several conversations go on in turn.

        An adapter that was trained again meanwhile is loaded again. Raises AdapterError as `swap` does.
        """
        digest = _digest_of(folder) if folder else ""
        if folder == self.adapter and digest == self._adapter_digest:
            return
        self._sessions[self._adapter_digest] = self.session
        if len(self._sessions) > _KEPT_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._change(folder)
        kept = self._sessions.get(self._adapter_digest)
        self.session = self._new_session() if kept is None else kept

    def _change(self, folder: Path | None) -> None:
        previous = self.adapter
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
        self.adapter, self._adapter_digest = folder, _digest_of(folder)

    def _remove_adapter(self) -> None:
        from mlx_zh.models.adapters.layers import remove_adapter

        if self.adapter:
            remove_adapter(self.loaded.model)
            self.loaded.model.load_weights(list(self._replaced.items()), strict=False)
            self.adapter, self._replaced, self._adapter_digest = None, {}, ""

    def compare(
        self,
        prompt: Sequence[int],
        folders: tuple[Path | None, Path | None],
        stop: StopTest,
        show: Callable[[int, str], None],
    ) -> tuple[Answer, Answer]:
        """The answers of the model with each of two adapters (None: without one), drawn with the same seed.

        The chat's cache stays valid. `show` is called with 0 or 1 and each piece of that answer, and with "" before
        the first. Raises AdapterError if an adapter cannot be loaded.
        """
        from mlx_zh.models.adapters.files import read_adapter

        for folder in folders:
            if folder is not None and folder != self.adapter:
                read_adapter(folder)  # what is wrong with the second one is said before the first one answers
        seed = self._next_seed()
        first, second = (self._answer_with(folders[i], i, prompt, stop, show, seed) for i in (0, 1))
        return first, second

    def _answer_with(
        self,
        folder: Path | None,
        index: int,
        prompt: Sequence[int],
        stop: StopTest,
        show: Callable[[int, str], None],
        seed: int,
    ) -> Answer:
        pieces = []
        with self._temporarily(folder) as session:
            show(index, "")
            for piece in self._draw(session, prompt, stop, self.sampling, seed):
                pieces.append(piece)
                show(index, piece)
        assert self.origin is not None
        return Answer("".join(pieces), session.statistics, self.origin)

    @contextlib.contextmanager
    def _temporarily(self, folder: Path | None) -> Iterator[GenerationSession]:
        """Have another adapter in this context. The cache is kept, because the same weights are loaded again."""
        before = self.adapter
        if folder == before:
            yield self.session
            return
        self._change(folder)
        try:
            yield self._new_session()
        finally:
            try:
                self._remove_adapter()
                if before:
                    self._load_adapter(before)
            except AdapterError:
                self.session.reset()  # the folder was deleted meanwhile, so the model is now the base model
                raise

    def _fingerprint(self) -> str:
        return value_digest([self.loaded.fingerprint, self._adapter_digest])

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self.renderer.prompt(messages)

    def _new_session(self) -> GenerationSession:
        return GenerationSession(self.loaded.model, self.loaded.tokenizer, self.loaded.eos_token_ids)


def expanded(text: str) -> Path:
    """A typed path, without quotes and with ~ expanded. Raises MlxZhError."""
    path = Path(text.strip().strip("'\""))
    try:
        return path.expanduser()
    except RuntimeError as problem:  # ~NAME of a user who does not exist
        raise MlxZhError(f"{path}: there is no user of that name; write the folder out") from problem


def _digest_of(folder: Path) -> str:
    files = [str(path) for name in (CONFIG_FILE, ADAPTER_FILE, PEFT_FILE) if (path := folder / name).is_file()]
    digests = known_digests().digests(files)
    return value_digest([digests[file] for file in files])


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
