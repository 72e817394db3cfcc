"""A tokenizer's snapshot is used only as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_zh.recipe import Model
from mlx_zh.stages import tokenizer_cache
from mlx_zh.stages.tokenizer_cache import open_tokenizer
from mlx_zh.system import storage


@pytest.mark.parametrize("name", ["tokenizer.json", "about.json", "whole.json"])
def test_a_damaged_snapshot_is_made_again(
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Flipped, cut, of another shape or gone; the two processes that make one are called in this one."""

    def make(*arguments: str) -> None:
        tokenizer_cache.main(list(arguments))

    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenizer_cache, "_in_a_process", make)
    model = Model(path=str(model_folder()))
    open_tokenizer(model)
    (folder,) = (storage.cache_folder() / "tokenizers").iterdir()
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (bytes(flipped), whole[:-9], b"[]", b"null", b'{"tokenizer.json": [1]}', None):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        open_tokenizer(model)
        assert (folder / name).read_bytes() == whole
