"""The model that answers in a conversation, of a recipe or by name: for the chat command and for the studio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_zh.chatting.chatbot import Chatbot, context_length
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.thinking import is_open
from mlx_zh.errors import AdapterError, MlxZhError
from mlx_zh.models.generate import Sampling, StopTest
from mlx_zh.stages.side import Side

if TYPE_CHECKING:
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.recipe import Recipe
    from mlx_zh.system.digests import Reading
    from mlx_zh.system.downloads import Progress

_TAIL = 16  # tokens of a prompt's end in which a thought may be opened


def open_chatbot(
    source: Recipe | str,
    *,
    hub: str | None = None,
    max_context: int | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    reading: Reading | None = None,
) -> Chatbot:
    """Load the base model of a recipe, or the model that is named, without an adapter.

    Raises ModelError, DownloadError, and TemplateError if the model has no usable chat template.
    """
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import load_model
    from mlx_zh.stages.rendering import renderer_of

    if isinstance(source, str):
        loaded = load_model(source, hub=hub or "auto", progress=progress, reading=reading)
        renderer = Renderer(loaded.tokenizer)
    else:
        model = source.model
        loaded = load_model(
            model.path,
            hub=hub or model.hub,
            revision=model.revision,
            dtype=model.dtype,
            quantize=model.quantization,
            progress=progress,
            reading=reading,
        )
        renderer = renderer_of(source, loaded.tokenizer)
        renderer.check_template()
    context = context_length(loaded.config, max_context)
    return Chatbot(loaded, renderer, context, sampling or Sampling(), seed=seed)


@dataclass(frozen=True)
class Asked:
    """A question to a stage of a run: the conversation up to it, and how the answer is drawn."""

    run: str  # the folder of the run
    stage: str  # base, sft or dpo
    system: str | None
    turns: Sequence[Message]  # the last one is the question
    first: int  # turns before it have left the context
    sampling: Sampling
    seed: int
    thinking: str  # on, off, auto, or "" for what the recipe says


@dataclass
class Talk:
    """A base model that is in memory once, and answers as any stage of any run over it."""

    recipe: Recipe
    bot: Chatbot
    _renderers: dict[str, Renderer] = field(default_factory=dict)  # by what the recipe says of rendering

    def prepared(self, asked: Asked) -> Ready:
        """Switch to the adapter, and render the prompt. Raises MlxZhError: nothing has been answered then."""
        side = Side.of(asked.run, asked.stage)
        if base_of(side.recipe) != base_of(self.recipe):
            raise AdapterError(
                f"{asked.run} was trained over {side.recipe.model.path}, and the model in memory is "
                f"{self.recipe.model.path}. Talk with it on its own page."
            )
        self.bot.renderer = self._renderer(side.recipe, asked.thinking)
        self.bot.stages = side.run.adapters()
        self.bot.turn_to(side.adapter)
        self.bot.sampling = asked.sampling
        self.bot.set_seed(asked.seed)
        transcript = Transcript(asked.system, list(asked.turns), asked.first)
        if not transcript.pending:
            raise MlxZhError("the conversation does not end with a question")
        prompt, dropped = self.bot.fit(transcript)
        tail = self.bot.loaded.tokenizer.decode(prompt[-_TAIL:])
        return Ready(self.bot, prompt, transcript.first, dropped, is_open(tail))

    def _renderer(self, recipe: Recipe, thinking: str) -> Renderer:
        from mlx_zh.stages.rendering import renderer_of

        mode = thinking or recipe.model.thinking
        key = repr((recipe.data.date_string, recipe.data.reasoning, mode))
        if key not in self._renderers:
            plain = renderer_of(recipe, self.bot.loaded.tokenizer)
            self._renderers[key] = plain if mode == plain.mode else plain.with_thinking(mode)
        return self._renderers[key]


@dataclass(frozen=True)
class Ready:
    """An answer that can be drawn: `stream` of the bot with this prompt."""

    bot: Chatbot
    prompt: list[int]
    first: int
    dropped: int  # exchanges that left the context now
    thinks: bool  # whether the prompt ends inside of a thought

    def stream(self, stop: StopTest) -> Iterator[str]:
        """The answer, piece by piece."""
        return self.bot.stream(self.prompt, stop)


def base_of(recipe: Recipe) -> tuple[object, ...]:
    """What decides which weights the base model has."""
    model = recipe.model
    return model.path, model.hub, model.revision, model.dtype, model.quantization
