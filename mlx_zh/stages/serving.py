"""The models of a run behind an OpenAI-compatible address on this machine.

The server is mlx-lm's own. What it gets: rules about who may ask (serving_address.py), the model with its adapters,
which are switched by the name in a request, and the program's one way from messages to tokens (served_models.py).
"""

from __future__ import annotations

import json
import time
from functools import partial
from http.server import ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import Any, Self
from weakref import WeakSet

import mlx.core as mx
from mlx_lm import server

from mlx_zh.errors import AdapterError, ServerError, first_line
from mlx_zh.language.translation import in_readers_language
from mlx_zh.stages.request_settings import ErrorBody, check_settings, usual_settings
from mlx_zh.stages.served_models import ServedModels, parsed_messages
from mlx_zh.stages.serving_address import Address

_LARGEST = 32 << 20  # bytes of a request


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
