"""A tokenizer's snapshot is used only as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_zh.errors import ModelError
from mlx_zh.recipe import Model
from mlx_zh.stages import tokenizer_cache
from mlx_zh.stages.tokenizer_cache import open_tokenizer
from mlx_zh.system import storage

_IN_A_PROCESS = tokenizer_cache._in_a_process  # which the other tests do not use, see conftest.py


def test_processes_of_their_own_make_the_same_snapshot_or_say_why_not(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("here", "processes"):
        monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / name))
        open_tokenizer(Model(path=str(model_folder())))
        (folder,) = (storage.cache_folder() / "tokenizers").iterdir()
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        monkeypatch.setattr(tokenizer_cache, "_in_a_process", _IN_A_PROCESS)
    assert made[0] == made[1] and made[0].keys() >= {"tokenizer.json", "about.json", "whole.json"}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_tokenizer(Model(path=str(broken)))


@pytest.mark.parametrize("name", ["tokenizer.json", "about.json", "whole.json"])
def test_a_damaged_snapshot_is_made_again(
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Flipped, cut, of another shape or gone."""
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
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
