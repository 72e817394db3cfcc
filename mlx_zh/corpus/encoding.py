"""From text in pieces to tokens: no token crosses the edge of a piece, and content never becomes a control token."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.joined_encoding import JoinedEncoder
from mlx_zh.errors import DataError, ModelError, TemplateError, first_line

Tokens = list[int] | npt.NDArray[np.int32]
Spans = list[tuple[int, int]]
Part = tuple[str, bool]  # text, and whether it is a message's content (True) or the template's own (False)


class PieceEncoder:
    """Encodes texts that are cut into pieces where a reply begins and ends.

    When a model generates, it sees only the prompt's tokens and continues from there, so in training too the prompt
    must be encoded without the reply. With most tokenizers each piece is encoded by itself (every byte-level BPE:
    Llama 3, Qwen, SmolLM2, GPT-2). Some tokenizers treat the start of a text differently (SentencePiece's leading
    space: Llama 2, Mistral). With these the whole text is encoded once and cut by character offsets, and a token
    that crosses a cut is an error.

    Raises ModelError if the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch"):
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; put a tokenizer.json into the model's folder"
            )
        self._backend = backend
        tokens = backend.get_added_tokens_decoder()
        self._ends = [getattr(tokenizer, name, None) for name in ("bos_token", "eos_token")]
        self._added_ids: dict[str, int] = {token.content: index for index, token in tokens.items()}
        controls = {token.content for token in tokens.values() if token.special or token.content in self._ends}
        # Control tokens structure a chat. Other added tokens (<think>, <tool_call>) may occur in a message.
        self._control_ids = frozenset(self._added_ids[content] for content in controls)
        self.added = _any_of(self._added_ids)
        self.control = _any_of(controls)
        self.joined: JoinedEncoder | None = None  # faster, gives the same tokens
        self._lock = Lock()  # the settings that `_encode_literally` changes are shared by all threads
        self.cuts_anywhere = self._probe()

    def encode(self, texts: Sequence[Sequence[str]]) -> list[list[Tokens]]:
        """Tokens of each piece of each text; control tokens are recognised everywhere, in messages too.

        Raises TemplateError if a token crosses the edge of a piece.
        """
        if self.cuts_anywhere:
            every = [piece for pieces in texts for piece in pieces]
            encoded: Sequence[Tokens] | None = None if self.joined is None else self.joined.encode(every)
            if encoded is None:
                with self._lock:
                    self._disable_padding_and_truncation()
                    encoded = self._encode_all(every)
            tokens = iter(encoded)
            return [[next(tokens) for _ in pieces] for pieces in texts]
        self._disable_padding_and_truncation()
        with _panics_told():
            whole = self._backend.encode_batch(["".join(pieces) for pieces in texts], add_special_tokens=False)
        return [self._cut(encoding, pieces) for encoding, pieces in zip(whole, texts, strict=True)]

    def encode_guarded(self, pieces: Sequence[Sequence[Part]], *, source: str) -> list[Tokens]:
        """Tokens of a text with control tokens spelled out in its messages; there they become ordinary characters.

        The text is split at the template's own control tokens, as the tokenizer itself does. The text between them is
        encoded with the recognition of special tokens switched off.

        Raises DataError, with `source` in front, if the tokenizer cannot encode a control token as ordinary text.
        """
        if not self.cuts_anywhere:
            raise _control_text(source, "this tokenizer cannot encode it as ordinary text")
        self._disable_padding_and_truncation()
        result: list[Tokens] = []
        for parts in pieces:
            tokens: list[int] = []
            for text, index in self._between_controls(parts):
                tokens += self._encode_literally(text, source)
                tokens += [] if index is None else [index]
            result.append(tokens)
        return result

    def encode_documents(self, texts: Sequence[str], sources: Sequence[str]) -> list[tuple[list[int], Spans]]:
        """The tokens of each raw text, and the characters (start, end) that each token stands for.

        A control token that a text spells becomes ordinary characters. Raises DataError, with the text's source in
        front, if the tokenizer cannot do that.
        """
        spelled = [self.control.search(text) is not None for text in texts]
        plain = [text for text, literally in zip(texts, spelled, strict=True) if not literally]
        with self._lock, _panics_told():
            self._disable_padding_and_truncation()
            encodings = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        encoded = []
        for text, source, literally in zip(texts, sources, spelled, strict=True):
            encoding = self._literal_encoding(text, source) if literally else next(encodings)
            encoded.append((encoding.ids, encoding.offsets))
        return encoded

    def frame(self) -> tuple[list[int], list[int]]:
        """What stands around a document: what the tokenizer writes before a text (BOS, or nothing), and EOS."""
        self._disable_padding_and_truncation()
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        end = self._added_ids.get(str(self._ends[1]))
        return whole[:start], [] if end is None else [end]

    def _between_controls(self, parts: Sequence[Part]) -> Iterable[tuple[str, int | None]]:
        """Runs of text, each with the id of the template's control token after it (None at the end)."""
        run = ""
        for text, is_content in parts:
            if is_content:
                run += text
                continue
            start = 0
            for match in self.control.finditer(text):
                yield run + text[start : match.start()], self._added_ids[match.group()]
                run, start = "", match.end()
            run += text[start:]
        yield run, None

    def _encode_literally(self, text: str, source: str) -> list[int]:
        return list(self._literal_encoding(text, source).ids) if text else []

    def _literal_encoding(self, text: str, source: str) -> Any:
        with self._lock:
            before = self._backend.encode_special_tokens
            self._backend.encode_special_tokens = True
            try:
                with _panics_told():
                    encoding = self._backend.encode(text, add_special_tokens=False)
            finally:
                self._backend.encode_special_tokens = before
        if not self._control_ids.isdisjoint(encoding.ids):
            raise _control_text(source, "this tokenizer has no other way to write it")
        return encoding

    def _encode_all(self, pieces: Sequence[str]) -> list[Tokens]:
        with _panics_told():
            return [encoding.ids for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    def _cut(self, encoding: Any, pieces: Sequence[str]) -> list[Tokens]:
        ids, offsets = encoding.ids, encoding.offsets
        starts = [start for start, _ in offsets]
        result: list[Tokens] = []
        begin, position = 0, 0
        for piece in pieces:
            position += len(piece)
            end = bisect.bisect_left(starts, position, begin)
            # An added token may include the blanks after it and so cross the cut; it still belongs to no reply.
            if end > begin and offsets[end - 1][1] > position and ids[end - 1] not in self._added_ids.values():
                joint = "".join(pieces)[max(0, position - 12) : position + 12]
                raise TemplateError(
                    f"a token stands across the start of a reply near {joint!r}, so prompt and reply cannot be told "
                    "apart; use the chat template that belongs to this tokenizer, or another model"
                )
            result.append(ids[begin:end])
            begin = end
        return result

    def _disable_padding_and_truncation(self) -> None:
        """Switch off the padding and truncation that a tokenizer.json may ask for."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()

    def _probe(self) -> bool:
        """Whether a text encoded in two parts gives the same tokens as the whole, for joints that templates have."""
        self._disable_padding_and_truncation()
        lefts = [token for token in self._ends if token in self._added_ids]
        joints = [(left, right) for left in (*lefts, "\n") for right in ("Hello", "你好", "1")]
        texts = [text for left, right in joints for text in (left + right, left, right)]
        tokens = self._encode_all(texts)
        return all(tokens[i] == tokens[i + 1] + tokens[i + 2] for i in range(0, len(tokens), 3))


@contextmanager
def _panics_told() -> Iterator[None]:
    """Raise ModelError where the tokenizer's library gives up, e.g. because a regular expression takes too long."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no Exception
            raise
        raise ModelError(
            f"the tokenizer cannot encode a text ({first_line(error)[:200]}); take the tokenizer.json of the "
            "original model"
        ) from error


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the tokens, longest first, as tokenizers do."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _control_text(source: str, why: str) -> DataError:
    where = f"{source}: " if source else ""
    return DataError(f"{where}a message spells one of the model's control tokens, and {why}; take it out of the text")
