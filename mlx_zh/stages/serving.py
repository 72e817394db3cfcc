"""The models of a run behind an OpenAI-compatible address on this machine.

The server is mlx-lm's own. What it gets from here: the model with its adapters, which are switched by the name in a
request, the program's one way from messages to tokens, and rules about who may ask.
"""

from __future__ import annotations

import hmac
import importlib
import ipaddress
import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any, Self
from urllib.parse import urlsplit
from weakref import WeakSet

import mlx.core as mx
from mlx_lm import server, tokenizer_utils
from mlx_lm.models.cache import make_prompt_cache

from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.row_messages import messages_of
from mlx_zh.corpus.tools import described_tools, has_content, with_tools
from mlx_zh.errors import AdapterError, MlxZhError, ServerError, first_line
from mlx_zh.language.translation import in_readers_language
from mlx_zh.models.adapters.files import vocabulary_size
from mlx_zh.stages.request_settings import DEFAULT, ErrorBody, check_settings, usual_settings
from mlx_zh.system import device

_LARGEST = 32 << 20  # bytes of a request
_BATCH = 8  # answers generated together
# Who may ask from a page: this machine, and programs whose pages are their own files. A page on the web may not.
_OWN_PAGES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_THIS_MACHINE = ("localhost", "host.docker.internal")


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may ask: a key, and origins beside those of this machine."""

    host: str = "127.0.0.1"
    port: int = 8080
    key: str = ""
    origins: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return _is_loopback(self.host)

    @property
    def url(self) -> str:
        """The address that clients are given."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/v1"

    def refusal(self, headers: Mapping[str, str]) -> str | None:
        """Why a request with these headers is refused; None if it is not.

        A page of the web that makes its own name point to this machine is known by `Host`, any other by `Origin`.
        """
        host = _host_in(f"http://{headers.get('Host', '')}")[1]
        if self.is_local and host not in _THIS_MACHINE and not _is_loopback(host):
            return f"this server answers to the names of this machine only, not to {host[:80]!r}"
        origin = headers.get("Origin")
        if origin is not None and not self.admits(origin):
            return f"pages of {origin[:80]} may not ask this server; start it with --allowed-origins to change that"
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            return "the key is missing or wrong; send it as `Authorization: Bearer KEY`"
        return None

    def admits(self, origin: str) -> bool:
        """Whether a page of this origin may ask."""
        if origin in self.origins or "*" in self.origins:
            return True
        scheme, host = _host_in(origin)
        return _is_loopback(host) if scheme in ("http", "https") else scheme in _OWN_PAGES


def _host_in(origin: str) -> tuple[str, str]:
    """The scheme and the host of an origin, which ends with them and a port; twice "" for any other text."""
    try:
        parts = urlsplit(origin)
        host = parts.hostname or ""
    except ValueError:
        return "", ""
    return (parts.scheme, host) if origin.endswith(f"//{parts.netloc}") and "@" not in parts.netloc else ("", "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


class _Handler(server.APIHandler):
    """mlx-lm's handler, which answers only whom the address admits."""

    timeout = 60  # seconds without a byte, after which a connection is closed
    _begun = False  # whether a part of the answer is sent
    _status = 200

    def __init__(self, address: Address, generator: Any, *arguments: Any, log: bool, **more: Any) -> None:
        self._address, self._log = address, log
        super().__init__(generator, *arguments, **more)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log a request, if that was asked for."""
        if self._log:
            super().log_message(format, *arguments)

    def _set_cors_headers(self) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and self._address.admits(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")

    def do_OPTIONS(self) -> None:
        """Say what a page may ask; a browser sends no key with this question."""
        headers = {name: value for name in ("Host", "Origin") if (value := self.headers.get(name))}
        if not self._refused(Address(self._address.host, origins=self._address.origins).refusal(headers)):
            super().do_OPTIONS()

    def do_GET(self) -> None:
        """Answer /v1/models and /health."""
        if not self._refused(self._address.refusal(self.headers)):
            super().do_GET()

    def do_POST(self) -> None:
        """Answer a chat or a completion."""
        if self._refused(self._address.refusal(self.headers)):
            return
        length = self.headers.get("Content-Length") or "0"
        if not (length.isascii() and length.isdecimal()):  # below 0 it would be read to its end, however long
            self._tell(400, "Content-Length must be a whole number")
            return
        if int(length) > _LARGEST:
            self._tell(413, f"a request may have {_LARGEST >> 20} MB")
            return
        try:
            super().do_POST()
        except OSError:  # the client is gone
            self.close_connection = True
        except (ServerError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            self.close_connection = True
            if not self._begun:
                self._headers_buffer: list[bytes] = []
                self._tell(400, f"the request cannot be answered: {first_line(error)}")

    def validate_model_parameters(self) -> None:
        """Refuse settings with which mlx-lm would fail while it computes, and end for all. Raises ValueError."""
        models: ServedModels = self.response_generator.model_provider
        for name, default in usual_settings(models.cli_args).items():
            if getattr(self, name) is None:  # as OpenAI reads it, and many programs send it
                setattr(self, name, default)
        for name in ("xtc_probability", "xtc_threshold"):
            if type(value := getattr(self, name)) is int:
                setattr(self, name, float(value))
        try:
            super().validate_model_parameters()
            check_settings(self.body, self.logit_bias, models.vocabulary)
        except ServerError as error:
            raise ValueError(in_readers_language(str(error))) from error
        except TypeError as error:
            raise ValueError(str(error)) from error
        if (self.body.get("top_k") or 0) >= models.vocabulary:
            self.top_k = 0  # all of them

    def handle_chat_completions(self) -> Any:
        """The request. What is wrong with its messages is said before the model is asked."""
        try:
            parsed_messages(self.body.get("messages"), self.body.get("tools"))
        except ServerError as error:
            raise ServerError(in_readers_language(str(error))) from error
        return super().handle_chat_completions()

    def handle_text_completions(self) -> Any:
        """The request. A prompt that the model does not take is refused before the model is asked."""
        models: ServedModels = self.response_generator.model_provider
        prompt = self.body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ServerError(in_readers_language("prompt must be text that is not empty"))
        count = len(models.tokenizer.encode(prompt))
        if count >= models.bot.context:
            raise ServerError(
                in_readers_language(f"the prompt has {count} tokens; the model takes {models.bot.context}")
            )
        return super().handle_text_completions()

    def end_headers(self) -> None:
        """Send the answer's headers."""
        self._begun = True
        super().end_headers()
        if self._status >= 400:
            self.wfile: Any = ErrorBody(self.wfile)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin the answer's headers."""
        self._status = code
        super().send_response(code, message)

    def handle_models_request(self) -> None:
        """The names of the models, the default first."""
        models: ServedModels = self.response_generator.model_provider
        names = sorted(models.adapters, key=lambda name: name != models.default)
        wanted = self.path.partition("/v1/models/")[2]
        data = [{"id": name, "object": "model", "created": self.created, "owned_by": "mlx-zh"} for name in names]
        one = next((model for model in data if model["id"] == wanted), None)
        if wanted and one is None:
            self._tell(404, f"there is no model {wanted[:80]!r} here; choose from {', '.join(names)}")
            return
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(json.dumps(one or {"object": "list", "data": data}, ensure_ascii=False).encode())

    def _refused(self, why: str | None) -> bool:
        if why is not None:
            self._tell(401 if why.startswith("the key") else 403, why)
        return why is not None

    def _tell(self, status: int, why: str) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": {"message": in_readers_language(why)}}, ensure_ascii=False).encode())


class _Generator(server.ResponseGenerator):
    """mlx-lm's generator, which goes on after a request with which the computation failed."""

    def __init__(self, models: ServedModels, cache: Any) -> None:
        self._waiting: WeakSet[Any] = WeakSet()
        super().__init__(models, cache)  # starts a thread

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None:
            self._waiting.add(request[0])
        return request

    def _run_generate(self) -> None:
        while not self._stop:
            try:
                self._generate()
            except Exception as error:  # whatever it is, other requests are answered
                waiting = list(self._waiting)
                for queue in waiting:
                    queue.put(ServerError(f"the answer could not be computed: {first_line(error)}"))
                self._waiting.clear()
                mx.random.seed(time.time_ns() % 2**32)  # a compiled sampler that failed leaves its tracers there
                if not waiting:  # the model itself cannot be loaded
                    self._generation_failed = True
                    return


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64  # connections that wait; 5 by default, and programs ask several at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or sends what is no request, is no error of the server."""


class RunningServer:
    """A server that has begun to listen; its port is `address.port`, also where 0 was asked for.

    Used as a context, at whose end its thread ends.
    """

    def __init__(self, models: ServedModels, address: Address, *, log: bool = False) -> None:
        """Begin to listen, and load the default model. Raises ServerError if the port is taken."""
        self._models = models
        try:
            models.load_default()
        except AdapterError as error:
            raise ServerError(f"the adapter cannot be served: {error}") from error
        kind = type("_Server", (_Listener,), {"address_family": AF_INET6 if ":" in address.host else AF_INET})
        handler = partial(self._handle, address, log)
        try:
            self._server = kind((address.host, address.port), handler)
        except OSError as error:
            raise ServerError(
                f"the server cannot listen at {address.host}, port {address.port}: {error.strerror}. "
                "Choose another port with --port."
            ) from error
        self.address = Address(address.host, self._server.server_address[1], address.key, address.origins)
        self.names = sorted(models.adapters, key=lambda name: name != models.default)  # the default first

    def _handle(self, address: Address, log: bool, *arguments: Any) -> _Handler:
        return _Handler(address, self._generator, *arguments, log=log)

    def __enter__(self) -> Self:
        cache = server.LRUPromptCache(self._models.cli_args.prompt_cache_size)
        self._generator = _Generator(self._models, cache)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()
        self._generator.stop_and_join()

    def run(self) -> None:
        """Answer until the program is interrupted."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._server.shutdown()


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
