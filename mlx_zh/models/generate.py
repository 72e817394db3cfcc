"""Generate answers with one key-value cache, so that each turn of a chat computes only the new part of the prompt."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers.decoders import DecodeStream

from mlx_zh.models.snapshots import REPLY_START, Snapshot, is_recurrent, restore, snapshot

StopTest = Callable[[], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.7  # 0 always takes the most likely token
    top_p: float = 0.95
    max_tokens: int = 1024


@dataclass(frozen=True)
class Statistics:
    """Tokens and times of one answer."""

    prompt_new: int = 0  # prompt tokens that were computed
    prompt_cached: int = 0  # prompt tokens that were in the cache
    generated: int = 0  # tokens of the answer
    seconds_to_first: float = 0.0
    tokens_per_second: float = 0.0
    reason: str = "end"  # why it ended: "end" (the model finished), "length" or "stopped"


class StreamDecoder:
    """Decodes token ids to text one by one. Text is held back while its last character is incomplete (U+FFFD)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # tokens whose text was not returned yet

    def push(self, token: int) -> str:
        """The text that `token` completes; often ""."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library raises plain Exception
            # With byte fallback, an invalid byte also turns the characters before it into U+FFFD, even those that
            # were already returned. A new stream begins with that byte.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, self._held)
        if text is None:
            return ""
        self._held = []
        return str(text)

    def finish(self) -> str:
        """The text that is still held back after the last token, without an incomplete character at its end."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=True)
        return text.rstrip("\ufffd")


@dataclass
class GenerationSession:
    """A model's key-value cache and the tokens that are in it.

    The caller renders the whole conversation for every turn. The longest common prefix with `tokens` stays in the
    cache and the rest is prefilled, so the model always sees exactly the rendered prompt, even if the template writes
    earlier turns differently.
    """

    model: Any
    tokenizer: Any
    eos_token_ids: Collection[int]
    prefill_chunk: int = 512  # tokens of the prompt that are computed at once
    tokens: list[int] = field(default_factory=list)  # the tokens whose keys and values are in the cache
    cache: list[Any] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    kept: Snapshot | None = None  # of a cache with recurrent layers, to come back to

    def reset(self) -> None:
        """Empty the cache. This is needed after a change of the weights."""
        self.tokens, self.cache, self.kept = [], [], None

    def stream(self, prompt: Sequence[int], sampling: Sampling, stop: StopTest = lambda: False) -> Iterator[str]:
        """Yield the answer to `prompt` (token ids) as text, piece by piece; afterwards `statistics` describes it.

        `stop` is called between prefill chunks and between tokens; if it returns true, the answer ends. However the
        iteration ends, `tokens` are those in the cache. Raises ValueError if the prompt is empty.
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
            raise  # the caller ended the iteration between two tokens, when the cache is consistent
        except BaseException:
            self.reset()  # some layers of the cache may be ahead of others
            raise
        finally:
            self.statistics = replace(self.statistics, reason=reason)

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Trim the cache to the common prefix with `prompt`; returns the number of tokens that stay."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        # The last token of the prompt is always computed, because the answer starts from its logits.
        shared = common_prefix(self.tokens, prompt[:-1])
        surplus = len(self.tokens) - shared
        if surplus and self.cache and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, surplus)
        elif surplus and self.kept is not None and common_prefix(self.kept.tokens, prompt) == len(self.kept.tokens):
            shared = len(self.kept.tokens)
            restore(self.cache, self.kept)
        elif surplus or not self.cache:  # the cache is empty, or a sliding window, which cannot be trimmed
            shared, self.cache, self.kept = 0, make_prompt_cache(self.model), None
        self.tokens = list(prompt[:shared])
        return shared

    def _steps(
        self, prompt: Sequence[int], cached: int, max_tokens: int, sampler: Any, stop: StopTest
    ) -> Iterator[int]:
        """The tokens of mlx-lm's generation loop; `tokens` is updated whenever the cache is."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        def prefilled(done: int, total: int) -> None:
            self.tokens = list(prompt[: cached + done])
            if done < total and stop():
                raise _StoppedError

        with contextlib.ExitStack() as stack:
            with contextlib.redirect_stdout(sys.stderr):  # mlx-lm's warning must not get into piped answers
                stack.enter_context(wired_limit(self.model, [generation_stream]))
            if is_recurrent(self.cache):
                with mx.stream(generation_stream):
                    cached = self._prefill_to_snapshot(prompt, cached, stop)
                if stop():
                    return
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
                    self.tokens.append(int(token))  # mlx-lm puts a token into the cache before it yields it
                    yield int(token)

    def _prefill_to_snapshot(self, prompt: Sequence[int], cached: int, stop: StopTest) -> int:
        """Compute the prompt up to where later turns surely agree with it, and keep the state there.

        Returns the number of tokens in the cache.
        """
        import mlx.core as mx

        end = len(prompt) - REPLY_START
        while cached < end and not stop():
            following = min(cached + self.prefill_chunk, end)
            self.model(mx.array(list(prompt[cached:following]))[None], cache=self.cache)
            mx.eval([layer.state for layer in self.cache])
            cached, self.tokens = following, list(prompt[:following])
        if 0 < cached <= end:
            self.kept = snapshot(self.cache, prompt[:cached])
        return cached

    def _measure(self, generated: int, began: float, first: float) -> None:
        now = time.perf_counter()
        rate = (generated - 1) / (now - first) if generated > 1 else 1 / (now - began)
        self.statistics = replace(
            self.statistics, generated=generated, seconds_to_first=first - began, tokens_per_second=rate
        )


class _StoppedError(Exception):
    """Raised between two prefill chunks to stop."""


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    shared = min(len(left), len(right))
    return next((i for i in range(shared) if left[i] != right[i]), shared)
