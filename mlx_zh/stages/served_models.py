"""What mlx-lm's server is given: a model with its adapters by name, a tokenizer, and settings."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import tokenizer_utils
from mlx_lm.models.cache import make_prompt_cache

from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.row_messages import messages_of
from mlx_zh.corpus.tools import described_tools, has_content, with_tools
from mlx_zh.errors import MlxZhError, ServerError
from mlx_zh.models.adapters.files import vocabulary_size
from mlx_zh.stages.request_settings import DEFAULT
from mlx_zh.system import device

_BATCH = 8  # answers generated together


@dataclass
class ServedModels:
    """A model and its adapters by name, as mlx-lm's server asks for them; its thread is the only one that does."""

    bot: Chatbot
    adapters: Mapping[str, Path | None]  # by the name in a request; None is the base
    default: str
    system: str | None  # the recipe's system prompt, for requests without one
    cli_args: Namespace
    draft_model: None = None
    processor: None = None
    model_key: tuple[str, None, None] | None = None
    model: Any = field(init=False)
    tokenizer: Any = field(init=False)
    is_batchable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.bot.loaded.model
        mx.eval(self.model.parameters())  # here, because arrays of this thread are then mere data for the server's
        self.tokenizer = _ServedTokenizer(self.bot, self.system)
        self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model))

    def load_default(self) -> None:
        """Load the adapter of requests that name no model."""
        self.load(DEFAULT)

    def load(self, name: str, adapter: str | None = None, draft: str | None = None) -> tuple[Any, Any]:
        """The model of a request, and its tokenizer. Raises ServerError, AdapterError."""
        if adapter is not None or draft not in (None, DEFAULT):
            raise ServerError("this server reads no files for a request; leave out `adapters` and `draft_model`")
        name = self.default if name == DEFAULT else name
        if name not in self.adapters:
            raise ServerError(f"there is no model {name[:80]!r} here; choose from {', '.join(self.adapters)}")
        if (name, None, None) != self.model_key:
            self.model_key = None
            self.bot.swap(self.adapters[name])
            mx.eval(self.model.parameters())
            self.model_key = (name, None, None)
        return self.model, self.tokenizer

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have a logit."""
        return vocabulary_size(self.bot.loaded.model)

    def reset(self) -> None:
        """Let go of the model."""
        self.model = self.tokenizer = self.model_key = None


class _ServedTokenizer(tokenizer_utils.TokenizerWrapper):
    """mlx-lm's view of a tokenizer, which turns messages into tokens as training, evaluation and chat do."""

    def __init__(self, bot: Chatbot, system: str | None) -> None:
        loaded = bot.loaded
        kind = tokenizer_utils._infer_tool_parser(loaded.tokenizer)
        tools = importlib.import_module(f"mlx_lm.tool_parsers.{kind}") if kind else None
        super().__init__(
            loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            tool_parser=tools and tools.parse_tool_call,
            tool_call_start=tools and tools.tool_call_start,
            tool_call_end=tools and tools.tool_call_end,
        )
        assert isinstance(bot.renderer, Renderer)
        self._context, self._system = bot.context, system
        self._renderers = {bot.renderer.mode: bot.renderer}
        self._usual = bot.renderer

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **unknown: Any,
    ) -> list[int]:
        """The tokens of the prompt. Raises ServerError, TemplateError or DataError."""
        if unknown:
            raise ServerError(f"chat_template_kwargs takes enable_thinking alone, got {', '.join(unknown)}")
        parsed = parsed_messages(messages, tools, self._system)
        tokens = self._renderer(enable_thinking).prompt(parsed)
        if len(tokens) >= self._context:
            raise ServerError(f"the conversation has {len(tokens)} tokens; the model takes {self._context}")
        return tokens

    def _renderer(self, thinking: bool | None) -> Renderer:
        if thinking is None:
            return self._usual
        mode = "on" if thinking else "off"
        if mode not in self._renderers:
            self._renderers[mode] = self._usual.with_thinking(mode)
        return self._renderers[mode]


def parsed_messages(messages: Any, tools: Any = None, system: str | None = None) -> list[Message]:
    """The messages of a request, with `system` as system message where they have none. Raises ServerError."""
    try:
        parsed = messages_of(messages, "messages")
        described = described_tools({"tools": tools}) if has_content(tools) else ""
    except InvalidRow as error:
        raise ServerError(str(error)) from error
    if not parsed or parsed[-1].role not in ("user", "tool"):
        raise ServerError("the last message must be the user's, or the result of a tool")
    if system and parsed[0].role != "system":
        parsed.insert(0, Message("system", system))
    return list(with_tools(parsed, described)) if described else parsed


def server_settings(bot: Chatbot) -> Namespace:
    """The settings of mlx-lm's server: how answers are drawn where a request does not say, and limits of memory."""
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        allowed_origins=[],
        num_draft_tokens=3,
        temp=bot.sampling.temperature,
        top_p=bot.sampling.top_p,
        top_k=0,
        min_p=0.0,
        max_tokens=bot.sampling.max_tokens,
        chat_template_args={},
        decode_concurrency=_BATCH,
        prompt_concurrency=_BATCH,
        prefill_step_size=512,
        prompt_cache_size=10,
        prompt_cache_bytes=device.free_bytes() // 3,  # asked before the first answer, after the weights are read
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
    )


def served(bot: Chatbot, name: str, chosen: str, system: str | None) -> ServedModels:
    """What is served: the base and each adapter of `bot.stages` as NAME-STAGE; `chosen` is the default's stage.

    Without adapters the model is called `name`. Raises MlxZhError if the model has no chat template.
    """
    adapters: dict[str, Path | None] = {f"{name}-{stage}": folder for stage, folder in bot.stages.items()}
    adapters = {f"{name}-base": None, **adapters} if adapters else {name: None}
    default = f"{name}-{chosen}" if len(adapters) > 1 else name
    if default not in adapters:
        raise MlxZhError(f"there is no stage {chosen!r} to serve; choose from base, {', '.join(bot.stages)}.")
    return ServedModels(bot, adapters, default, system, server_settings(bot))
