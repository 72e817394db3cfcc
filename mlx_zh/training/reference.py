"""Reference log-probs: computed before training and cached on disk for later runs.

There is one file for each reference model (base, adapter and precision). An entry is named by a digest of its pair's
tokens, so it depends on data and rendering, but not on the loss or its settings. A run with another beta, loss or
seed, a resumed run, and a run over a larger data set use the entries that are there.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core import numbers
from mlx_zh.core.logprobs import batch_logprobs, decoder
from mlx_zh.core.packing import plan_rows
from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import ModelError
from mlx_zh.models.adapters.layers import block_of, linear_layers
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system.accelerator import AcceleratorError, accelerator_errors
from mlx_zh.system.device import Fault
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.pairs import pack, pair_sums, tree_tokens
from mlx_zh.training.stored_values import StoredValues, Values

# The values of a pair, (4,): the sums of chosen and rejected, then both within the shorter response's length.
_UNKNOWN = np.full(4, np.nan, dtype=np.float32)
_FORMAT = 1  # part of the digest in a file's name; increase it when the meaning of entries changes

# Longer rows are no faster, and a pass that is killed loses the rows that it was computing.
_MAX_TOKENS = 4096


def pair_digest(pair: RenderedPair) -> str:
    """A digest of a pair's tokens, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(struct.pack("<q", len(tokens)))
        digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.hexdigest()


def model_key(base: str, model: nn.Module, adapter: tuple[AdapterSpec, Arrays] | None) -> str:
    """A digest of everything that a model's log-probs depend on, 32 hex digits.

    `base` is the fingerprint of the base model's files. The digest also covers the precision, the adapter and
    the version of the numbers.
    """
    weight = _first_block(model)[0]
    precision = (str(decoder(model).norm.weight.dtype), getattr(weight, "bits", 0), getattr(weight, "group_size", 0))
    digest = hashlib.blake2b(repr((_FORMAT, base, precision, *numbers.recorded().values())).encode(), digest_size=16)
    if adapter is not None:
        spec, arrays = adapter
        digest.update(repr((spec.kind, spec.scale)).encode())
        for name in sorted(arrays):
            array = arrays[name]
            digest.update(repr((name, array.shape, str(array.dtype))).encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def _first_block(model: nn.Module) -> list[Any]:
    """The linear layers of the first block that has any, its attention's first."""
    layers = linear_layers(model)
    first = min(block for name in layers if (block := block_of(name)) >= 0)
    of_block = {name: layer for name, layer in layers.items() if block_of(name) == first}
    names = sorted(of_block, key=lambda name: ("q_proj" not in name, ".mlp." in name, name))
    return [of_block[name] for name in names]


class ReferenceStore(StoredValues):
    """The reference log-probs of one model, by the digests of their pairs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 4)


class Reference:
    """The log-probs of `pairs` under a reference model.

    `cached` counts the pairs that were in rank 0's `store`; `missing` holds those to compute, by digest.
    """

    def __init__(self, store: ReferenceStore, pairs: Sequence[RenderedPair], world: World = ALONE) -> None:
        self._store, self._world = store, world
        by_digest = {pair_digest(pair): pair for pair in pairs}
        stored = store.read() if world.first else {}
        values = np.array([stored.get(digest, _UNKNOWN) for digest in by_digest], np.float32).reshape(-1, 4)
        values = np.array(world.broadcast({"": mx.array(values)})[""])
        rows = zip(by_digest, values, strict=True)
        self._entries: dict[str, Values] = {digest: row for digest, row in rows if np.isfinite(row).all()}
        self.cached = len(self._entries)
        self.missing = {digest: pair for digest, pair in by_digest.items() if digest not in self._entries}

    @property
    def missing_tokens(self) -> int:
        """Tokens of the pairs to compute."""
        return sum(tree_tokens(pair) for pair in self.missing.values())

    @property
    def longest_missing(self) -> int:
        """Tokens of the longest pair to compute. No row can be shorter."""
        return max(tree_tokens(pair) for pair in self.missing.values())

    def compute(self, model: nn.Module, *, row_tokens: int, chunk: int | None = None) -> Iterator[int]:
        """Compute the missing pairs, forward only, in rows of up to `row_tokens` tokens. Yields the tokens computed.

        The ranks share the rows in rounds. After each round, rank 0 writes its entries to disk before the tokens are
        yielded. Raises ModelError when a log-prob is NaN or infinite. Raises AcceleratorError on all ranks; the
        entries of earlier rounds are kept, so the rest can be computed again, or in shorter rows.
        """
        digests, pairs = list(self.missing), list(self.missing.values())
        lengths = [tree_tokens(pair) for pair in pairs]
        for rows in self._world.rounds(plan_rows(lengths, row_tokens)):
            members = [m for row in rows for m in row]
            tokens = [sum(lengths[m] for m in row) for row in rows]
            own = {m: np.zeros(4, dtype=np.float32) for m in members}  # pairs of other ranks stay 0
            fault: Fault | None = None
            try:
                for index in self._world.share(tokens):
                    values = _pair_values(model, [pairs[m] for m in rows[index]], chunk)
                    own |= zip(rows[index], values, strict=True)
            except AcceleratorError as error:
                fault = error.fault
            if fault := self._common(fault):
                raise AcceleratorError(fault)
            values = np.stack([own[m] for m in members])
            values = np.array(self._world.sum({"": mx.array(values)})[""])  # (P, 4)
            if not np.isfinite(values).all():
                raise ModelError(
                    "the reference model's log-probs are not finite (NaN or infinity): set model.dtype: bfloat16."
                )
            entries = {digests[m]: row for m, row in zip(members, values, strict=True)}
            if self._world.first:
                self._store.append(entries)
            self._entries |= entries
            for digest in entries:
                del self.missing[digest]
            yield sum(tokens)

    def _common(self, fault: Fault | None) -> Fault | None:
        """A fault on all ranks if one of them has one, and one that shortens rows on all if one does."""
        if not self._world.any(fault is not None):
            return None
        if not self._world.any(fault is not None and fault.shortens):
            return fault or Fault("other", "another rank failed")
        return fault if fault and fault.shortens else Fault("memory", "another rank ran out of memory")

    def logprobs(self, pairs: Sequence[RenderedPair]) -> npt.NDArray[np.float32]:
        """Reference log-probs of `pairs`, (N, 4); NaN for a pair that has not been computed.

        The columns are the sums of chosen and rejected, then the same within the shorter response's length.
        """
        return np.stack([self._entries.get(pair_digest(pair), _UNKNOWN) for pair in pairs])


def _pair_values(model: nn.Module, pairs: Sequence[RenderedPair], chunk: int | None) -> Values:
    """Reference log-probs of the pairs of one row, (P, 4)."""
    batch = pack(pairs)
    with accelerator_errors():
        logprobs = batch_logprobs(model, batch, chunk=chunk, grad=False)
        return np.array(mx.concatenate(list(pair_sums(logprobs, batch, pairs)), axis=1))


def forward_tokens(model: nn.Module, minimum: int, free_bytes: int) -> int:
    """Tokens of a forward-only row that takes a quarter of `free_bytes`, but at least `minimum`."""
    width: int = max(layer.weight.shape[-2] for layer in _first_block(model))
    size: int = decoder(model).norm.weight.dtype.size
    return max(minimum, min(_MAX_TOKENS, free_bytes // 4 // (_WIDTHS_ALIVE * width * size)))


# Number of arrays (tokens, MLP width) that are alive at a time in a forward pass, measured on the CPU.
_WIDTHS_ALIVE = 25
