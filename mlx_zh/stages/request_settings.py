"""Settings of a request to `mlx-zh serve`: which are refused, what null means, and how a refusal is written."""

from __future__ import annotations

import io
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from mlx_zh.errors import ServerError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.system.json_text import parse_json

DEFAULT = "default_model"  # mlx-lm's name for the model of a request that names none
_NUMBERS = (  # settings of a request that are numbers
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "top_logprobs"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty", "presence_context_size"),
    *("frequency_penalty", "frequency_context_size", "xtc_probability", "xtc_threshold", "num_draft_tokens"),
)
_LARGEST_NUMBER = 2**31 - 1
_MOST_STOPS = 64


def check_settings(body: Mapping[str, Any], bias: Mapping[int, float] | None, vocabulary: int) -> None:
    """Raise ServerError for settings of a request that the model's computation does not take.

    A token outside the vocabulary would be written outside the array of logits, which ends the program.
    """
    for name in _NUMBERS:
        value = body.get(name)
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
            raise ServerError(f"{name} must be a finite number up to {_LARGEST_NUMBER}")
    if isinstance(body.get("seed"), int) and body["seed"] < 0:
        raise ServerError("seed must not be negative")
    if outside := [token for token in bias or () if not 0 <= token < vocabulary]:
        raise ServerError(f"logit_bias names token {outside[0]}; this model has tokens 0 to {vocabulary - 1}")
    if bias and not all(map(math.isfinite, bias.values())):
        raise ServerError("logit_bias must have finite numbers")
    if body.get("n") not in (None, 1):
        raise ServerError("this server gives one answer to a request; leave out `n`, or ask several times")
    wanted = body.get("response_format")
    if wanted is not None and (not isinstance(wanted, dict) or wanted.get("type") != "text"):
        raise ServerError("this server does not force a form of the answer; leave out `response_format`")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ServerError("stop must be text, or a list of texts that are not empty")
    if len(stops) > _MOST_STOPS:
        raise ServerError(f"stop may have {_MOST_STOPS} texts")
    if (body.get("xtc_threshold") or 0) > 0.5:
        raise ServerError("xtc_threshold must be at most 0.5")
    template = body.get("chat_template_kwargs")
    if template is not None and not isinstance(template, dict):
        raise ServerError("chat_template_kwargs must be an object")
    if not isinstance((template or {}).get("enable_thinking"), bool | None):
        raise ServerError("chat_template_kwargs: enable_thinking must be true or false")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ServerError("stream_options must be an object")


def usual_settings(settings: Namespace) -> dict[str, Any]:
    """The settings of a request where it says null, by the name of mlx-lm's attribute."""
    return {
        **{"stream": False, "requested_model": DEFAULT, "requested_draft_model": DEFAULT, "logprobs": False},
        **{"max_tokens": settings.max_tokens, "temperature": settings.temp, "top_p": settings.top_p},
        **{"top_k": settings.top_k, "min_p": settings.min_p, "num_draft_tokens": settings.num_draft_tokens},
        **{"repetition_penalty": 0.0, "repetition_context_size": 20, "presence_penalty": 0.0},
        **{"presence_context_size": 20, "frequency_penalty": 0.0, "frequency_context_size": 20},
        **{"xtc_probability": 0.0, "xtc_threshold": 0.1, "top_logprobs": -1},
    }


class ErrorBody(io.BufferedIOBase):
    """The body of a refusal in OpenAI's form, without which its programs show no reason."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Write mlx-lm's `{"error": "text"}` as an error with a message; anything else as it is."""
        try:
            error = parse_json(bytes(data).decode())["error"]
        except (ValueError, TypeError, LookupError, AttributeError):
            error = None
        if isinstance(error, str):
            told = {"message": in_readers_language(error), "type": "invalid_request_error"}
            data = json.dumps({"error": told}, ensure_ascii=False).encode()
        return int(self._file.write(data))

    def writable(self) -> bool:
        """It is written only."""
        return True

    def flush(self) -> None:
        """Send what is written."""
        if not self._file.closed:
            self._file.flush()
