"""Data sets brought to this disk: from folders, from an address, and from a hub that refuses, over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.corpus.data_files import folder_files, registered_files
from mlx_zh.errors import DataError, DownloadError, StorageError
from mlx_zh.recipe import DataSet
from mlx_zh.system import downloads

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = b'{"instruction": "a", "output": "b"}\n'
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "dataset_infos.json": b"{}",
    "data/train-00000.jsonl": ROWS,
    "data/test-00000.jsonl": ROWS,
    "extra/notes.json": ROWS,
}


class Server(ThreadingHTTPServer):
    """Answers by path; `asked` counts requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if "limited" in path:
            self.answer(429, b"slow down", {"Retry-After": "600"})
        elif "busy" in path and self.server.asked.count(path) == 1:
            self.answer(503, b"", {"Retry-After": "0"})
        elif "short" in path:
            self.answer(200, ROWS, {"Content-Length": str(len(ROWS) + 10), "Connection": "close"})
            self.close_connection = True
        elif "empty" in path:
            self.answer(200, b"")
        elif path.startswith("/files/") and "none" not in path:
            self.answer(200, ROWS)
        elif "/org/set" in path and "/resolve/" in path:
            data = FILES[path.split(f"/resolve/{COMMIT}/")[-1]]
            self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/org/set" in path and "/tree/" in path:
            found = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            self.answer(200, json.dumps(found).encode())
        elif "/org/set" in path:
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, json.dumps({"id": "org/set", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "cache"


def at(address: str, **more: Any) -> DataSet:
    return DataSet(hub="url", kind="sft", id=address, **more)


def kept(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file()]


# ---- an address


def test_a_file_from_an_address_is_fetched_once(server: Server, cache: Path):
    before = len(server.asked)
    for _ in range(2):
        (path,) = registered_files("mine", at(f"{server.url}/files/a.jsonl", sha256=hashlib.sha256(ROWS).hexdigest()))
    assert path.read_bytes() == ROWS and path.name == "a.jsonl"
    assert len(server.asked) == before + 1


def test_a_kept_file_that_is_no_longer_the_expected_one_is_fetched_again(server: Server, cache: Path):
    entry = at(f"{server.url}/files/kept.jsonl", sha256=hashlib.sha256(ROWS).hexdigest())
    (path,) = registered_files("mine", entry)
    path.write_bytes(ROWS[::-1])
    assert registered_files("mine", entry) == [path] and path.read_bytes() == ROWS
    with pytest.raises(DownloadError, match="not the file that was expected"):
        registered_files("mine", at(entry.id, sha256="ab" * 32))
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/files/none.jsonl", ["mine: ", "/files/none.jsonl", "answers 404", "name: NAME, path: FILE-OR-FOLDER"]),
        ("/files/limited.jsonl", ["answers 429, too many requests", "wait some minutes"]),
        ("/files/short.jsonl", ["does not answer", "only"]),
        ("/files/empty.jsonl", ["does not answer", "only 0 of"]),
    ],
)
def test_what_an_address_may_answer(server: Server, cache: Path, monkeypatch, path: str, words: list[str]):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with pytest.raises(DownloadError) as error:
        registered_files("mine", at(server.url + path))
    for word in words:
        assert word in str(error.value)
    assert kept(cache) == []


def test_a_server_that_is_busy_is_asked_again(server: Server, cache: Path):
    assert registered_files("mine", at(f"{server.url}/files/busy.jsonl"))[0].read_bytes() == ROWS


def test_nobody_at_the_address(cache: Path, monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with pytest.raises(DownloadError, match=r"mine: http://127\.0\.0\.1:9/x does not answer: .*refused"):
        registered_files("mine", at("http://127.0.0.1:9/x"))
    with pytest.raises(DownloadError, match="no address does not answer: unknown url type"):
        registered_files("mine", at("no address"))
    assert kept(cache) == []


def test_another_file_than_expected(server: Server, cache: Path):
    with pytest.raises(DownloadError, match="not the file that was expected: its SHA-256 is"):
        registered_files("mine", at(f"{server.url}/files/b.jsonl", sha256="ab" * 32))
    assert kept(cache) == []


def test_a_full_disk(server: Server, cache: Path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_store", full)
    with pytest.raises(StorageError, match="disk is full: mine"):
        registered_files("mine", at(f"{server.url}/files/c.jsonl"))


# ---- a hub, asked in a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported

SCRIPT = """
import sys
from mlx_zh.corpus.data_files import registered_files
from mlx_zh.errors import MlxZhError
from mlx_zh.recipe import DataSet
name, *files = sys.argv[1:]
try:
    for path in registered_files("mine", DataSet(hub="huggingface", kind="sft", id=name, files=files)):
        print(path)
except MlxZhError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def ask(endpoint: str, cache: Path, name: str, *files: str) -> tuple[int, list[str], str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", SCRIPT, name, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.split(), done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def test_a_set_from_a_mirror(server: Server, tmp_path: Path):
    """The data files of the split, without the cards, the other splits and what the patterns leave out."""
    status, found, error = ask(server.url, tmp_path, "org/set", "data/*.jsonl")
    assert status == 0, error
    assert [Path(path).name for path in found] == ["train-00000.jsonl"]
    assert Path(found[0]).read_bytes() == ROWS
    status, _, error = ask(server.url, tmp_path, "org/set", "*.parquet")
    assert status == 1 and "holds no data file like *.parquet of split train" in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/nothing", ["mine: org/nothing", "answers 404", "HF_ENDPOINT"]),
        ("org/limited", ["answers 429", "wait some minutes"]),
    ],
)
def test_what_a_hub_refuses(server: Server, tmp_path: Path, name: str, words: list[str]):
    status, _, error = ask(server.url, tmp_path, name)
    assert status == 1 and error.startswith("DownloadError: ")
    for word in words:
        assert word in error


def test_a_hub_that_does_not_answer(tmp_path: Path):
    status, _, error = ask("http://127.0.0.1:9", tmp_path, "org/set")
    assert status == 1 and error.startswith("DownloadError: mine: org/set could not be downloaded")
    assert "path: FILE-OR-FOLDER" in error


def test_the_copy_on_the_hub_in_use_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "train.json").write_bytes(ROWS)
    asked: list[Any] = []

    def download(name: str, **request: Any) -> Path:
        asked.append((request["hub"], request["ids"]))
        return tmp_path

    monkeypatch.setattr("mlx_zh.corpus.data_files.hubs.download", download)
    both = DataSet(hub="huggingface", kind="sft", id="org/set", also={"modelscope": "other/set"})
    one = DataSet(hub="modelscope", kind="sft", id="org/set")
    for entry in (both, one, both.model_copy(update={"revision": "v1"})):
        assert registered_files("mine", entry, hub="modelscope") == [tmp_path / "train.json"]
    ids = {"huggingface": "org/set", "modelscope": "other/set"}
    # A revision is one of the set's own hub.
    assert asked == [
        ("modelscope", ids),
        ("modelscope", {"modelscope": "org/set"}),
        ("auto", {"huggingface": "org/set"}),
    ]


# ---- folders and files


def test_the_data_files_of_a_folder(tmp_path: Path):
    for name in (
        "b.jsonl",
        "a.json",
        "sub/c.parquet",
        "x.md",
        "README.md",
        "dataset_infos.json",
        "test.json",
        ".h/d.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [p.relative_to(tmp_path).as_posix() for p in folder_files(tmp_path)] == [
        "a.json",
        "b.jsonl",
        "sub/c.parquet",
    ]
    assert [p.name for p in folder_files(tmp_path, ["*.parquet"])] == ["c.parquet"]
    assert [p.name for p in folder_files(tmp_path, split="test")] == ["a.json", "b.jsonl", "c.parquet", "test.json"]
    with pytest.raises(DataError, match=r"no data file in it \(\*\.txt\)"):
        folder_files(tmp_path, ["*.txt"])


def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path):
    folder, outside = tmp_path / "data", tmp_path / "secret.jsonl"
    folder.mkdir()
    outside.write_bytes(ROWS)
    (folder / "inside.jsonl").write_bytes(ROWS)
    (folder / "same.jsonl").symlink_to("inside.jsonl")
    assert [p.name for p in folder_files(folder)] == ["inside.jsonl", "same.jsonl"]
    (folder / "out.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match=r"out\.jsonl is a link out of the folder, to .*secret\.jsonl\. It is not"):
        folder_files(folder)


def test_a_set_that_is_fetched_by_hand(tmp_path: Path):
    with pytest.raises(DataError, match=r"must be fetched by hand \(a cloud folder\); then write \{name: mine, path"):
        registered_files("mine", DataSet(hub="file", kind="sft", id="a cloud folder"))
    (tmp_path / "a.json").touch()
    assert registered_files("mine", DataSet(hub="file", kind="sft", id=str(tmp_path))) == [tmp_path / "a.json"]


def test_a_linked_folder_of_a_data_folder_is_not_passed_over(tmp_path: Path):
    """It is not entered; without a word the run would train on fewer files than its user thinks."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (data / "more").symlink_to(elsewhere)
    with pytest.raises(DataError, match="more is a link out of the folder"):
        folder_files(data)


def names_in(folder: Path, *patterns: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder_files(folder, patterns)]


NOTES = ("._a.jsonl", ".DS_Store", "__MACOSX/a.jsonl", "Thumbs.db", "desktop.ini", ".hidden/a.jsonl", "~$a.xlsx")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl", "b.JSON", "c.jsonl.gz", "d.json.zst", "e.parquet"], None),
        (["a.jsonl", "a.jsonl.gz", "b.jsonl.xz"], ["a.jsonl", "b.jsonl.xz"]),  # a.jsonl.gz is a copy
        (["a.jsonl", "b.csv.gz", "c.arrow", "d.zip"], ["a.jsonl"]),
        (["b.csv.gz", "c.TSV", "d.xlsx", "e.arrow"], ["b.csv.gz", "c.TSV", "d.xlsx"]),
        (["e.arrow", "f.zip", "dataset_info.json"], ["e.arrow", "f.zip"]),
        (["train.jsonl.gz", "test.jsonl.gz"], ["train.jsonl.gz"]),
    ],
)
def test_compressed_files_and_notes_in_a_folder(tmp_path: Path, names: list[str], expected: list[str] | None):
    for name in (*names, *NOTES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert names_in(tmp_path) == (expected or names)


def test_patterns_name_compressed_files_too(tmp_path: Path):
    for name in ("zh/a.jsonl.gz", "zh/b.zip", "en/a.jsonl.gz", "zh/._a.jsonl.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert names_in(tmp_path, "zh/*") == ["zh/a.jsonl.gz", "zh/b.zip"]
    assert names_in(tmp_path, "*.GZ") == ["en/a.jsonl.gz", "zh/a.jsonl.gz"]
