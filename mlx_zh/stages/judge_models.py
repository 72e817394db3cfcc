"""The judge that a command line names: a model behind an address, or a local one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import RecipeError
from mlx_zh.stages.needs import other_model
from mlx_zh.system.chat_api import ChatApi

if TYPE_CHECKING:
    from mlx_zh.judging.judges import Judge
    from mlx_zh.recipe import Recipe


MAX_TOKENS = 1024  # of a judge's reply, where nothing else is said


class LocalJudge:
    """A model on this machine, which is loaded for the first question. It answers greedily."""

    def __init__(self, recipe: Recipe, name: str, max_tokens: int) -> None:
        self._recipe = recipe.model_copy(update={"model": other_model(recipe, name)})
        self.name, self._max_tokens = name, max_tokens
        self._session: Any = None

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Its reply. Raises ModelError, DownloadError, DeviceError."""
        from mlx_zh.corpus.conversation import Message
        from mlx_zh.models.generate import Sampling

        session, renderer = self._opened()
        tokens = renderer.prompt([Message(turn["role"], turn["content"]) for turn in messages])
        return "".join(session.stream(tokens, Sampling(0.0, 1.0, self._max_tokens)))

    def _opened(self) -> Any:
        if self._session is None:
            from mlx_zh.models.generate import GenerationSession
            from mlx_zh.stages.rendering import renderer_of
            from mlx_zh.stages.run_models import open_model

            loaded = open_model(self._recipe)
            loaded.model.eval()
            session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
            self._session = session, renderer_of(self._recipe, loaded.tokenizer)
        return self._session


def judge_of(arguments: argparse.Namespace, recipe: Recipe) -> Judge:
    """The judge that a command line names. Raises RecipeError, JudgeError."""
    if arguments.judge and arguments.judge_url:
        raise RecipeError("--judge and --judge-url name two judges; give one of them.")
    if arguments.judge_url and not arguments.judge_model:
        raise RecipeError("--judge-url needs --judge-model too: the name of the model at that address.")
    if not arguments.judge and not arguments.judge_url:
        raise RecipeError(
            "--by judge needs a judge: --judge MODEL for one on this machine, or --judge-url URL --judge-model NAME "
            "for one behind an OpenAI-compatible address."
        )
    address = (arguments.judge_url, arguments.judge_model) if arguments.judge_url else None
    return judge_named(recipe, arguments.judge, address, arguments.judge_tokens)


def judge_named(
    recipe: Recipe, model: str | None, address: tuple[str, str] | None, max_tokens: int = MAX_TOKENS
) -> Judge:
    """The judge at an address (URL, name of the model), else a local model. Raises JudgeError."""
    if address is not None:
        return ChatApi(*address, max_tokens)
    return LocalJudge(recipe, model or recipe.model.path, max_tokens)
