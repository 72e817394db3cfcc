"""Reference log-probs: computed once, kept through kills and damage, found by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from preferences import own_sums, pair, pairs, reference_of
from tolerances import LOGPROBS

from mlx_zh.core import numbers
from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.errors import ModelError, StorageError
from mlx_zh.models.adapters.layers import add_adapter, remove_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system import device
from mlx_zh.training import reference as module
from mlx_zh.training.pairs import tree_tokens
from mlx_zh.training.reference import Reference, ReferenceStore, forward_tokens, model_key, pair_digest
from mlx_zh.training.step import set_weights

Make = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "folder" / "model.txt")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each forward pass."""
    calls: list[int] = []
    forward = module.batch_logprobs

    def counted(model: Any, batch: Any, **options: Any) -> mx.array:
        calls.append(batch.num_sequences)
        assert options["grad"] is False and "noise" not in options
        return forward(model, batch, **options)

    monkeypatch.setattr(module, "batch_logprobs", counted)
    return calls


def entries(count: int) -> dict[str, np.ndarray]:
    return {f"{n:032x}": np.array([n, -n, 1e-30 * n, 1 / 3], dtype=np.float32) for n in range(count)}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# What is computed


@pytest.mark.numeric
@pytest.mark.parametrize("row_tokens", [1, 45, 512])
def test_log_probs_are_the_models_own(tiny_model: Make, tmp_path: Path, row_tokens: int) -> None:
    """Of the whole responses, and of each up to the length of the shorter one, whatever fits a row."""
    model, found = tiny_model(), pairs()
    expected = [
        [v.item() for limit in (None, min(len(one.chosen), len(one.rejected))) for v in own_sums(model, one, limit)]
        for one in found
    ]
    np.testing.assert_allclose(reference_of(model, found, tmp_path, row_tokens), expected, rtol=LOGPROBS)


def test_progress_counts_tokens(tiny_model: Make, store: ReferenceStore) -> None:
    reference = Reference(store, pairs())
    total = reference.missing_tokens
    assert total == sum(tree_tokens(one) for one in pairs())
    rows = list(reference.compute(tiny_model(), row_tokens=40))
    assert sum(rows) == total and len(rows) > 2 and reference.missing_tokens == 0


def test_what_is_found_is_not_computed(tiny_model: Make, store: ReferenceStore, forwards: list[int]) -> None:
    """A data set that grew by two pairs, in another order, and with a pair twice, costs two."""
    model, all_pairs = tiny_model(), pairs()
    list(Reference(store, all_pairs[:5]).compute(model, row_tokens=512))
    grown = Reference(store, [all_pairs[6], *all_pairs[::-1], all_pairs[2]])
    assert (grown.cached, len(grown.missing)) == (5, 2)
    list(grown.compute(model, row_tokens=512))
    assert forwards == [10, 4]
    again = Reference(store, all_pairs)
    assert (again.cached, again.missing) == (7, {})
    np.testing.assert_array_equal(again.logprobs(all_pairs), grown.logprobs(all_pairs))


@pytest.mark.numeric
def test_killed_half_way_only_the_rest_is_computed(
    tiny_model: Make, store: ReferenceStore, forwards: list[int]
) -> None:
    """Rows that were finished are on disk before the next one starts."""
    model, found = tiny_model(), pairs()
    whole = list(Reference(ReferenceStore(store.path.with_name("other")), found).compute(model, row_tokens=40))
    rows = len(forwards)
    assert rows == len(whole) > 3
    passing = Reference(store, found).compute(model, row_tokens=40)
    next(passing)
    next(passing)
    passing.close()  # as a KeyboardInterrupt between rows ends it
    with store.path.open("ab") as file:
        file.write(b"0123456789abcdef0123456789abcdef 41")  # and a kill while writing
    del forwards[:]
    rest = Reference(store, found)
    assert 0 < rest.cached < len(found)
    list(rest.compute(model, row_tokens=40))
    assert sum(forwards) == 2 * (len(found) - rest.cached) and len(forwards) < rows
    expected = reference_of(model, found, store.path.parent / "new")
    np.testing.assert_allclose(rest.logprobs(found), expected, rtol=LOGPROBS)
    assert Reference(store, found).missing == {}


def test_pairs_that_the_run_does_not_visit_are_not_a_number(tiny_model: Make, store: ReferenceStore) -> None:
    reference = Reference(store, pairs()[:2])
    list(reference.compute(tiny_model(), row_tokens=512))
    found = reference.logprobs(pairs()[:3])
    assert np.isfinite(found[:2]).all() and np.isnan(found[2]).all()


def test_log_probs_that_are_not_finite_are_an_error_and_not_kept(tiny_model: Make, store: ReferenceStore) -> None:
    model = tiny_model()
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(ModelError, match="not finite"):
        list(Reference(store, pairs()).compute(model, row_tokens=512))
    assert store.read() == {}


# The file


def test_entries_come_back_bit_for_bit(store: ReferenceStore) -> None:
    assert store.read() == {}
    kept = entries(9)
    store.append({name: kept[name] for name in list(kept)[:4]})
    store.append({name: kept[name] for name in list(kept)[4:]})
    assert same(store.read(), kept)


def test_a_file_cut_anywhere_gives_what_is_whole(store: ReferenceStore) -> None:
    """Cut after every byte: no entry is wrong, and the next append makes the file whole again."""
    kept = entries(3)
    store.append(kept)
    content = store.path.read_bytes()
    for size in range(len(content)):
        store.path.write_bytes(content[:size])
        found = store.read()
        assert same(found, {name: kept[name] for name in found})
        if size % 10 == 0:
            store.append(kept)
            assert same(store.read(), kept)


def test_a_flipped_bit_loses_one_entry(store: ReferenceStore) -> None:
    kept = entries(3)
    store.append(kept)
    content = bytearray(store.path.read_bytes())
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        store.path.write_bytes(damaged)
        found = store.read()
        assert len(found) >= 2 - (content[position : position + 1] == b"\n"), position
        assert same(found, {name: kept[name] for name in found}), position


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        ReferenceStore(tmp_path / "file" / "model.txt").append(entries(1))


# Names


def test_a_pair_is_named_by_its_tokens() -> None:
    """Where prompt and responses begin and end counts: cut elsewhere, the same tokens are another pair."""
    one = pair(3, 1, 2, 3)
    again = RenderedPair(one.prompt.astype(np.int64), list(one.chosen), one.rejected)
    assert pair_digest(one) == pair_digest(again)
    moved = RenderedPair(one.prompt[:-1], np.concatenate([one.prompt[-1:], one.chosen]), one.rejected)
    swapped = RenderedPair(one.prompt, one.rejected, one.chosen)
    assert len({pair_digest(p) for p in (one, moved, swapped)}) == 3


def test_a_model_is_named_by_what_it_computes(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, precision and adapter content count; an adapter that is off, or dropout in its settings, does not."""
    model = tiny_model()
    base = model_key("files", model, None)
    assert model_key("files", tiny_model(), None) == base
    spec = AdapterSpec("lora", 3, rank=4, scale=2.0)
    add_adapter(model, spec, seed=1)
    fresh = model_key("files", model, (spec, trainable(model)))
    assert model_key("files", model, None) == base
    set_weights(model, {n: w + 0.1 for n, w in trainable(model).items()})
    others = [
        base,
        fresh,
        model_key("other files", model, None),
        model_key("files", model, (spec, trainable(model))),
        model_key("files", model, (AdapterSpec("lora", 3, rank=4, scale=1.0), trainable(model))),
        model_key("files", model, (AdapterSpec("dora", 3, rank=4, scale=2.0), trainable(model))),
        model_key("files", tiny_model(dtype="bfloat16"), None),
        model_key("files", tiny_model(quantized=4), None),
        model_key("files", tiny_model(quantized=8), None),
    ]
    assert len(set(others)) == len(others)
    quieter = AdapterSpec("lora", 3, rank=4, scale=2.0, dropout=0.3)
    assert model_key("files", model, (quieter, trainable(model))) == others[3]
    remove_adapter(model)
    assert model_key("files", model, None) == base
    for version in (1, 9):
        monkeypatch.setattr(numbers, "version", lambda version=version: version)
        others.append(model_key("files", model, None))
    assert others[-1] != others[-2]
    if device.is_cpu():
        assert base not in others[-2:]


def test_free_memory_is_less_than_what_is_built_in() -> None:
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < device.free_bytes() < built_in


@pytest.mark.skipif(not device.is_cpu(), reason="of the CPU")
def test_free_is_what_the_system_could_give_without_swapping(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16 * 2**30, available=5 * 2**30, free=2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert device.free_bytes() == 5 * 2**30


def test_rows_are_as_long_as_memory_allows(tiny_model: Make) -> None:
    """A quarter of the memory at 25 arrays of 96 float32 a token, 9600 bytes; never shorter than a training row."""
    model = tiny_model()
    assert forward_tokens(model, 128, 4 * 9600 * 1000) == 1000
    assert forward_tokens(model, 2048, 4 * 9600 * 1000) == 2048
    assert forward_tokens(model, 128, 10**12) == 4096
    assert forward_tokens(tiny_model(dtype="bfloat16"), 128, 4 * 9600 * 1000) == 2000
    assert forward_tokens(tiny_model(quantized=4), 128, 4 * 9600 * 1000) == 1000
    add_adapter(model, AdapterSpec("lora", 3, rank=4), seed=0)
    assert forward_tokens(model, 128, 4 * 9600 * 1000) == 1000
