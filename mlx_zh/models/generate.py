"""Generation over one live key-value cache: each turn of a chat prefills only what is new."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers.decoders import DecodeStream

StopTest = Callable[[], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024


@dataclass(frozen=True)
class Statistics:
    """What one answer cost. `reason`: "end" (the model finished), "length" or "stopped"."""

    prompt_new: int = 0
    prompt_cached: int = 0
    generated: int = 0
    seconds_to_first: float = 0.0
    tokens_per_second: float = 0.0
    reason: str = "end"


class StreamDecoder:
    """Token ids in, text out, never a part of a character: text is held back while its end decodes to U+FFFD."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # tokens whose text is not out yet

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library's error has no class of its own
            # With byte fallback, a stray byte turns the characters before it into U+FFFD too, also those that are
            # out: the stream begins anew with that byte.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, self._held)
        if text is None:
            return ""
        self._held = []
        return str(text)

    def finish(self) -> str:
        """What is still held back when no more tokens come, without the part of a character that is cut off."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=True)
        return text.rstrip("\ufffd")


@dataclass
class GenerationSession:
    """A model's key-value cache and the tokens that are in it.

    The caller renders the whole conversation every turn. The longest common prefix with `tokens` stays in the
    cache and the rest is prefilled, so the model always sees exactly the rendered prompt, whatever the template
    did with earlier turns.
    """

    model: Any
    tokenizer: Any
    eos_token_ids: Collection[int]
    prefill_chunk: int = 512
    tokens: list[int] = field(default_factory=list)
    cache: list[Any] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)

    def reset(self) -> None:
        """Forget everything, as after a change of the weights."""
        self.tokens, self.cache = [], []

    def stream(self, prompt: Sequence[int], sampling: Sampling, stop: StopTest = lambda: False) -> Iterator[str]:
        """Yield the answer to `prompt` as text, piece by piece; `statistics` describes it afterwards.

        `stop` is asked between prefill chunks and between tokens. However the iteration ends, `tokens` is what the
        cache holds.
        """
        from mlx_lm.sample_utils import make_sampler

        if not prompt:
            raise ValueError("the prompt is empty")
        began = time.perf_counter()
        cached = self._reuse(prompt)
        self.statistics = Statistics(prompt_new=len(prompt) - cached, prompt_cached=cached)
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
        decoder = StreamDecoder(self.tokenizer)
        first, reason, generated = 0.0, "stopped", 0
        try:
            for token in self._steps(prompt, cached, sampling.max_tokens, sampler, stop):
                generated += 1
                first = first or time.perf_counter()
                self._measure(generated, began, first)
                if token in self.eos_token_ids:
                    reason = "end"
                    break
                if piece := decoder.push(token):
                    yield piece
                if stop():
                    break
            else:
                reason = "length" if generated == sampling.max_tokens else "stopped"
            if piece := decoder.finish():
                yield piece
        except GeneratorExit:
            raise  # the caller has seen enough; between two tokens the cache is whole
        except BaseException:
            self.reset()  # a layer may have been written and the next one not
            raise
        finally:
            self.statistics = replace(self.statistics, reason=reason)

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Trim the cache to what it shares with `prompt`; returns the number of tokens kept."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        # The last token is always run again: its logits are what the answer starts from.
        shared = common_prefix(self.tokens, prompt[:-1])
        surplus = len(self.tokens) - shared
        if surplus and self.cache and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, surplus)
        elif surplus or not self.cache:  # nothing there, or a sliding window that cannot be wound back
            shared, self.cache = 0, make_prompt_cache(self.model)
        self.tokens = list(prompt[:shared])
        return shared

    def _steps(
        self, prompt: Sequence[int], cached: int, max_tokens: int, sampler: Any, stop: StopTest
    ) -> Iterator[int]:
        """mlx-lm's generation loop, with `tokens` kept in step with the cache."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        def prefilled(done: int, total: int) -> None:
            self.tokens = list(prompt[: cached + done])
            if done < total and stop():
                raise _StoppedError

        with contextlib.ExitStack() as stack:
            with contextlib.redirect_stdout(sys.stderr):  # its warning must not land in piped answers
                stack.enter_context(wired_limit(self.model, [generation_stream]))
            steps = generate_step(
                mx.array(list(prompt[cached:])),
                self.model,
                max_tokens=max_tokens,
                sampler=sampler,
                prompt_cache=self.cache,
                prefill_step_size=self.prefill_chunk,
                prompt_progress_callback=prefilled,
            )
            stack.enter_context(contextlib.closing(steps))
            with contextlib.suppress(_StoppedError):
                for token, _ in steps:
                    self.tokens.append(int(token))  # mlx-lm runs a token before it hands it out
                    yield int(token)

    def _measure(self, generated: int, began: float, first: float) -> None:
        now = time.perf_counter()
        rate = (generated - 1) / (now - first) if generated > 1 else 1 / (now - began)
        self.statistics = replace(
            self.statistics, generated=generated, seconds_to_first=first - began, tokens_per_second=rate
        )


class _StoppedError(Exception):
    """The user's wish to stop, raised between two prefill chunks."""


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    shared = min(len(left), len(right))
    return next((i for i in range(shared) if left[i] != right[i]), shared)
