"""Reference log-probs: computed once, before training, and kept on disk for every later run that needs them.

One file holds what one model (base and adapter, in one precision) gave; an entry's name is a digest of the pair's
tokens, so rendering and data are part of it. Another beta, loss or seed, a resumed run, and a data set that grew
find what is there.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import batch_logprobs, decoder
from mlx_zh.core.packing import plan_rows
from mlx_zh.corpus.render import RenderedPair
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import ModelError
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system.storage import storage_errors, sync
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.pairs import pack, pair_sums, tree_tokens
from mlx_zh.training.step import OutOfMemory, out_of_memory

Values = npt.NDArray[np.float32]  # (4,): chosen, rejected, and the same over the shorter response's length only

_VALUES = struct.Struct("<4f")
_UNKNOWN = np.full(4, np.nan, dtype=np.float32)
_FORMAT = 1  # part of every file's name; raise it when entries would mean something else

# Longer rows gain nothing, and a row is what a killed pass loses.
_MOST_TOKENS = 4096


def pair_digest(pair: RenderedPair) -> str:
    """Names a pair by its tokens: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(struct.pack("<q", len(tokens)))
        digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def model_key(base: str, model: nn.Module, adapter: tuple[AdapterSpec, Arrays] | None) -> str:
    """Names a model by what it computes: its files' fingerprint, its precision, and the adapter's content."""
    weight = _linear(decoder(model).layers[0].self_attn.q_proj)
    precision = (str(decoder(model).norm.weight.dtype), getattr(weight, "bits", 0), getattr(weight, "group_size", 0))
    digest = hashlib.blake2b(repr((_FORMAT, base, precision)).encode(), digest_size=16)
    if adapter is not None:
        spec, arrays = adapter
        digest.update(repr((spec.kind, spec.scale)).encode())
        for name in sorted(arrays):
            array = arrays[name]
            digest.update(repr((name, array.shape, str(array.dtype))).encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def _linear(layer: Any) -> Any:
    return layer.get("linear", layer)  # an adapter wraps the layer


class ReferenceStore:
    """Entries appended to a text file, a line each with its checksum: whatever a kill leaves behind, the rest counts.

    Several runs may append at once; a line that is cut short or damaged is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Values]:
        """All whole entries, by digest."""
        if not self.path.exists():
            return {}
        entries: dict[str, Values] = {}
        with storage_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")
        for line in lines:
            digest, _, rest = line.partition(b" ")
            values, _, check = rest.partition(b" ")
            try:
                if len(digest) == 32 and int(check, 16) == zlib.crc32(digest + values):
                    entries[digest.decode()] = np.array(_VALUES.unpack(bytes.fromhex(values.decode())), np.float32)
            except (ValueError, struct.error):
                continue
        return entries

    def append(self, entries: dict[str, Values]) -> None:
        """Add entries, safely on disk when this returns."""
        lines = []
        for digest, values in entries.items():
            text = _VALUES.pack(*values.tolist()).hex()
            lines.append(f"{digest} {text} {zlib.crc32((digest + text).encode()):08x}\n")
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(("\n" + "".join(lines)).encode())  # an earlier line may lack its end
                file.flush()
                sync(file.fileno())


class Reference:
    """The log-probs of `pairs` under a reference model: those that rank 0's `store` has, and those to be computed."""

    def __init__(self, store: ReferenceStore, pairs: Sequence[RenderedPair], world: World = ALONE) -> None:
        self._store, self._world = store, world
        named = {pair_digest(pair): pair for pair in pairs}
        kept = store.read() if world.first else {}
        known = np.array([kept.get(digest, _UNKNOWN) for digest in named], np.float32).reshape(-1, 4)
        known = np.array(world.broadcast({"": mx.array(known)})[""])
        found = zip(named, known, strict=True)
        self._entries: dict[str, Values] = {digest: row for digest, row in found if np.isfinite(row).all()}
        self.found = len(self._entries)
        self.missing = {digest: pair for digest, pair in named.items() if digest not in self._entries}

    @property
    def missing_tokens(self) -> int:
        """What is to be computed."""
        return sum(tree_tokens(pair) for pair in self.missing.values())

    @property
    def longest_missing(self) -> int:
        """Tokens of the longest pair that is to be computed: no row can be shorter."""
        return max(tree_tokens(pair) for pair in self.missing.values())

    def compute(self, model: nn.Module, *, row_tokens: int, chunk: int | None = None) -> Iterator[int]:
        """Compute what is missing with the model as it stands, forward only, in rows of up to `row_tokens` tokens.

        The ranks deal out the rows, a few at a time, which rank 0 keeps on disk before their tokens are yielded and
        the next ones start. Raises ModelError where a log-prob is not finite; OutOfMemory, on all ranks, with what
        was yielded done, so that the rest may be asked for in shorter rows.
        """
        digests, pairs = list(self.missing), list(self.missing.values())
        lengths = [tree_tokens(pair) for pair in pairs]
        for rows in self._world.rounds(plan_rows(lengths, row_tokens)):
            members = [m for row in rows for m in row]
            tokens = [sum(lengths[m] for m in row) for row in rows]
            found = {m: np.zeros(4, dtype=np.float32) for m in members}
            failed: str | None = None
            try:
                for index in self._world.share(tokens):
                    values = _pair_values(model, [pairs[m] for m in rows[index]], chunk)
                    found |= zip(rows[index], values, strict=True)
            except OutOfMemory as error:
                failed = str(error)
            if self._world.any(failed is not None):
                raise OutOfMemory(failed or "another rank ran out of memory")
            values = np.stack([found[m] for m in members])
            values = np.array(self._world.sum({"": mx.array(values)})[""])  # (P, 4)
            if not np.isfinite(values).all():
                raise ModelError(
                    "the reference model gives log-probs that are not finite: use model.dtype: bfloat16."
                )
            entries = {digests[m]: row for m, row in zip(members, values, strict=True)}
            if self._world.first:
                self._store.append(entries)
            self._entries |= entries
            for digest in entries:
                del self.missing[digest]
            yield sum(tokens)

    def logprobs(self, pairs: Sequence[RenderedPair]) -> npt.NDArray[np.float32]:
        """(N, 4): summed log-probs of chosen and rejected, and those over the shorter response's length; NaN where
        a pair is not known."""
        return np.stack([self._entries.get(pair_digest(pair), _UNKNOWN) for pair in pairs])


def _pair_values(model: nn.Module, pairs: Sequence[RenderedPair], chunk: int | None) -> Values:
    """(P, 4) of the pairs of a row."""
    batch = pack(pairs)
    with out_of_memory():
        logprobs = batch_logprobs(model, batch, chunk=chunk, grad=False)
        return np.array(mx.concatenate(list(pair_sums(logprobs, batch, pairs)), axis=1))


def forward_tokens(model: nn.Module, at_least: int, free_bytes: int) -> int:
    """Tokens of a forward-only row that fits a quarter of `free_bytes`, and never less than a training row."""
    width: int = _linear(decoder(model).layers[0].mlp.gate_proj).weight.shape[0]
    size: int = decoder(model).norm.weight.dtype.size
    return max(at_least, min(_MOST_TOKENS, free_bytes // 4 // (_WIDTHS_ALIVE * width * size)))


# Arrays as wide as the MLP that are alive at a time in a forward pass, measured on the CPU.
_WIDTHS_ALIVE = 25
