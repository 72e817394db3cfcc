"""Checkpoints come back bit for bit, or are set aside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_zh.errors import StorageError
from mlx_zh.training.checkpoints import Checkpoint, load_newest, save

FILES = ["digests.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def checkpoint(step: int) -> Checkpoint:
    """Numbers of every kind that must survive: subnormal, infinite, not a number, negative zero, half precision."""
    rng = np.random.default_rng(step)
    special = np.array([1e-42, np.inf, -np.inf, np.nan, -0.0, 1 / 3], dtype=np.float32)
    return Checkpoint(
        weights={"a.lora_a": mx.array(rng.normal(size=(8, 4)).astype(np.float32)), "special": mx.array(special)},
        optimizer={
            "step": mx.array(step, dtype=mx.uint64),
            "m:a.lora_a": mx.array(rng.normal(size=(8, 4)).astype(np.float32)).astype(mx.bfloat16),
        },
        state={"step": step, "key": "k", "progress": {"elapsed_seconds": 0.1 + 0.2, "best_loss": None}},
    )


def bits(arrays: dict[str, mx.array]) -> dict[str, tuple[Any, ...]]:
    return {n: (a.dtype, a.shape, np.array(mx.view(a.reshape(-1), mx.uint8)).tobytes()) for n, a in arrays.items()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def newest(folder: Path) -> tuple[int, list[str]]:
    found, remarks = load_newest(folder)
    assert found is not None
    return found.state["step"], remarks


def test_round_trip(tmp_path: Path) -> None:
    written = checkpoint(7)
    path = save(tmp_path / "checkpoints", written, keep=2)
    assert path.name == "step-000007"
    assert names(path) == FILES
    found, remarks = load_newest(tmp_path / "checkpoints")
    assert found is not None and remarks == []
    assert bits(found.weights) == bits(written.weights)
    assert bits(found.optimizer) == bits(written.optimizer)
    assert found.state == written.state


def test_none_yet(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere") == (None, [])


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    """By number, also beyond a million steps, where names sort otherwise; what is no checkpoint is left alone."""
    (tmp_path / "best").mkdir()
    (tmp_path / "step-notes").mkdir()
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["best", "step-1000000", "step-999999", "step-notes"]
    assert newest(tmp_path) == (1_000_000, [])


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path: Path) -> None:
    half = tmp_path / ".step-000009.12345.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    save(tmp_path, checkpoint(3), keep=2)
    assert names(tmp_path) == ["step-000003"]
    half.mkdir()
    assert newest(tmp_path) == (3, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 0.97])
def test_a_flipped_bit_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str, place: float) -> None:
    """Anywhere in any file: in a header, a number, a digit of the step; loading alone would not see most of them."""
    for step in (2, 4):
        save(tmp_path, checkpoint(step), keep=2)
    path = tmp_path / "step-000004" / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    step, remarks = newest(tmp_path)
    assert step == 2
    (remark,) = remarks
    assert remark.startswith("checkpoint step-000004 is damaged (") and "damaged-step-000004" in remark
    assert names(tmp_path) == ["damaged-step-000004", "step-000002"]
    assert newest(tmp_path) == (2, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 10, -1, None])
def test_a_cut_or_missing_file_is_noticed(tmp_path: Path, name: str, size: int | None) -> None:
    for step in (2, 4):
        save(tmp_path, checkpoint(step), keep=2)
    path = tmp_path / "step-000004" / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size].rstrip(b"\n}"))  # without its last brace JSON is no longer JSON
    assert newest(tmp_path)[0] == 2


@pytest.mark.parametrize("digests", [[], {}, {"state.json": 1}, None, "x"])
def test_digests_of_another_shape_are_damage(tmp_path: Path, digests: Any) -> None:
    save(tmp_path, checkpoint(4), keep=2)
    (tmp_path / "step-000004" / "digests.json").write_text(json.dumps(digests))
    found, remarks = load_newest(tmp_path)
    assert found is None and len(remarks) == 1
    assert names(tmp_path) == ["damaged-step-000004"]


def test_all_damaged(tmp_path: Path) -> None:
    """Each is named, newest first; a second set of damaged ones takes the place of the first."""
    for _ in range(2):
        for step in (2, 4):
            (save(tmp_path, checkpoint(step), keep=2) / "weights.safetensors").write_bytes(b"")
        found, remarks = load_newest(tmp_path)
        assert found is None
        assert [remark.split()[1] for remark in remarks] == ["step-000004", "step-000002"]
        assert names(tmp_path) == ["damaged-step-000002", "damaged-step-000004"]


def test_a_failed_save_keeps_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the moments: nothing of the new checkpoint is there, and nothing was pruned for it."""
    for step in (2, 4):
        save(tmp_path, checkpoint(step), keep=2)
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".optimizer.safetensors." + str(os.getpid()) + ".tmp"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("file names of descriptors are asked of /proc")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="no space left"):
        save(tmp_path, checkpoint(6), keep=1)
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert newest(tmp_path) == (4, [])
