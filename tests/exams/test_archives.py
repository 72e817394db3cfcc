"""Archives: unpacked whole or not at all, nothing outside the cache, nothing larger than it may be."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.errors import DataError, DownloadError
from mlx_zh.exams import archives
from mlx_zh.exams.catalog import benchmark

CEVAL, CMMLU = benchmark("ceval"), benchmark("cmmlu")
HEADER = "id,question,A,B,C,D,answer\n"


def rows(count: int) -> str:
    return HEADER + "".join(f"{n},第{n}题,甲,乙,丙,丁,{'ABCD'[n % 4]}\n" for n in range(count))


def ceval_files(questions: int = 2) -> dict[str, str]:
    """Every file of C-Eval's archive, with too few questions."""
    return {
        f"{split}/{key}_{split}.csv": rows(5 if split == "dev" else questions)
        for split in CEVAL.splits
        for key in CEVAL.subjects
    }


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    def write(files: dict[str, str | bytes], name: str = "ceval-exam.zip") -> Path:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as opened:
            for member, text in files.items():
                opened.writestr(member, text)
        path = tmp_path / "hub" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(held.getvalue())
        return path

    return write


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_an_archive_is_unpacked_once(archive: Callable[..., Path], tmp_path: Path):
    packed = archive(ceval_files() | {"README.md": "no CSV", "ceval-exam/notes.csv": "no split"})
    folder = archives.unpack(CEVAL, packed, tmp_path / "cache")
    assert left(tmp_path / "cache") == [folder.name]
    assert len(list(folder.rglob("*.csv"))) == 3 * 52
    before = folder.stat().st_mtime_ns
    assert archives.unpack(CEVAL, packed, tmp_path / "cache") == folder
    assert folder.stat().st_mtime_ns == before


def test_names_from_the_archive_cannot_lead_out(archive: Callable[..., Path], tmp_path: Path):
    evil = {"../../outside/val/evil.csv": "x", "/val/absolute.csv": "y", "val/../../up.csv": "z"}
    folder = archives.unpack(CEVAL, archive(ceval_files() | evil), tmp_path / "cache")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "up.csv").exists()
    assert {path.parent.name for path in folder.rglob("*.csv")} == {"dev", "val", "test"}


def test_a_bomb_is_not_unpacked(archive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = archive(ceval_files() | {"val/bomb.csv": b"0" * (9 * 2**20)})
    with pytest.raises(DownloadError, match=r"val/bomb.csv is larger than any file"):
        archives.unpack(CEVAL, packed, tmp_path / "cache")
    monkeypatch.setattr(archives, "_LARGEST_ARCHIVE", 4000)
    with pytest.raises(DownloadError, match="is larger than"):
        archives.unpack(CEVAL, archive(ceval_files()), tmp_path / "cache")
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_an_interrupted_download_leaves_nothing(archive: Callable[..., Path], tmp_path: Path, kept: float):
    packed = archive(ceval_files())
    whole = packed.read_bytes()
    packed.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DownloadError, match=r"ceval-exam.zip is damaged or incomplete .*Delete it and run"):
        archives.unpack(CEVAL, packed, tmp_path / "cache")
    assert left(tmp_path / "cache") == []
    packed.write_bytes(whole)
    assert archives.unpack(CEVAL, packed, tmp_path / "cache").is_dir()


def test_a_flipped_byte_is_noticed(archive: Callable[..., Path], tmp_path: Path):
    packed = archive(ceval_files(50))
    data = bytearray(packed.read_bytes())
    data[200] ^= 0xFF
    packed.write_bytes(data)
    with pytest.raises(DownloadError, match="damaged or incomplete"):
        archives.unpack(CEVAL, packed, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "digests"])
def test_a_damaged_copy_is_unpacked_again(archive: Callable[..., Path], tmp_path: Path, damage: str):
    packed = archive(ceval_files(50))
    folder = archives.unpack(CEVAL, packed, tmp_path / "cache")
    path = sorted(folder.rglob("*.csv"))[0]
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "gone":
        path.unlink()
    else:
        next(folder.glob("*.json")).write_text("[1]")
    assert archives.unpack(CEVAL, packed, tmp_path / "cache") == folder
    assert path.read_bytes() == whole


def test_another_archive_is_refused(archive: Callable[..., Path], tmp_path: Path):
    files = {name: text for name, text in ceval_files().items() if "law" not in name}
    with pytest.raises(DownloadError, match=r"is not C-Eval's archive: it lacks dev/law, val/law, test/law\."):
        archives.unpack(CEVAL, archive(files), tmp_path / "cache")


def open_ceval(**changes: object):
    options = {"folders": {}, "hub": "huggingface", "split": None, "shots": 5, "limit": None}
    return archives.open_exam("ceval", **(options | changes))  # type: ignore[arg-type]


def test_from_a_hub(archive: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # 52 subjects; val has 1,346 questions: 46 subjects of 26 and 6 of 25.
    files = ceval_files()
    for number, key in enumerate(CEVAL.subjects):
        files[f"val/{key}_val.csv"] = rows(26 if number < 46 else 25)
    packed = archive(files)
    asked: list[object] = []

    def download(name: str, hub: str, *, ids: Any, kind: str, patterns: Any, progress: None) -> Path:
        assert (name, kind) == ("C-Eval", "dataset")
        asked.append((hub, ids["huggingface"], ids["modelscope"], patterns["modelscope"]))
        return packed.parent

    monkeypatch.setattr(archives.hubs, "download", download)
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    exam = open_ceval(limit=3)
    assert (len(exam), exam.expected) == (3 * 52, 1346)
    assert len(open_ceval()) == 1346
    open_ceval(hub="modelscope")
    where = ("ceval/ceval-exam", "modelscope/ceval-exam", ("ceval-exam.zip",))
    assert (asked[0], asked[-1]) == (("huggingface", *where), ("modelscope", *where))
    with pytest.raises(DataError, match="The hub delivered 104 questions of C-Eval test, which has 12342"):
        open_ceval(split="test")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def download(*_: object, **__: object) -> Path:
        raise DownloadError("ceval/ceval-exam could not be downloaded: no route.")

    monkeypatch.setattr(archives.hubs, "download", download)
    with pytest.raises(DownloadError, match=r"no route.*evaluate.folder: \{ceval: FOLDER\}.*dev, val, test/"):
        open_ceval()
    monkeypatch.setattr(archives.hubs, "download", lambda *_, **__: tmp_path)
    with pytest.raises(DownloadError, match=r"C-Eval: the download in .* holds no ceval-exam.zip"):
        open_ceval()


def test_a_folder_may_hold_a_part(samples: Path):
    exam = open_ceval(folders={"ceval": str(samples / "ceval")})
    assert len(exam) == 688 and exam.expected == 1346


def test_unknown_names():
    with pytest.raises(DataError, match="'mmlu' is no benchmark; give ceval, cmmlu, or the path"):
        archives.open_exam("mmlu", folders={}, hub="huggingface", split=None, shots=5, limit=None)
