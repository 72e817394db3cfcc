"""Files over HTTP from a server that stalls, breaks off, changes its file or delivers a wrong byte."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.errors import DownloadError
from mlx_zh.system import downloads
from mlx_zh.system.downloads import Limits, RemoteFile, fetch_file

DATA = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data` under `headers`; what goes wrong is set by the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.data, self.headers = DATA, {"ETag": '"one"'}
        self.statuses: list[tuple[int, dict[str, str]]] = []  # given first, one a request
        self.cuts: list[int] = []  # after so many bytes the next answers end
        self.most = 0  # bytes of an answer to Range, where not 0: it may hold less than all of the rest
        self.stall = 0  # after so many bytes, where not 0, nothing more comes
        self.ranges = self.conditions = True  # whether Range and If-Range are understood
        self.silent, self.over = False, threading.Event()
        self.asked: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.bin"


class _Answers(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(dict(self.headers))
        if server.silent:
            server.over.wait()
            return
        if server.statuses:
            status, headers = server.statuses.pop(0)
            return self.head(status, headers | {"Content-Length": "0"})
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", "") if server.ranges else "")
        condition = self.headers.get("If-Range") if server.conditions else None
        if start and condition in (None, server.headers.get("ETag"), server.headers.get("Last-Modified")):
            first = int(start[1])
            if first >= len(server.data):
                return self.head(416, {"Content-Range": f"bytes */{len(server.data)}", "Content-Length": "0"})
            body = server.data[first:][: server.most or None]
            place = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(server.data)}"}
            self.head(206, server.headers | place | {"Content-Length": str(len(body))})
        else:
            body = server.data
            self.head(200, server.headers | {"Content-Length": str(len(body))})
        if server.stall:
            self.wfile.write(body[: server.stall])
            server.over.wait()
            return
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited before the next try; nobody waits here."""
    kept: list[float] = []
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(downloads.time, "sleep", kept.append)
    return kept


def fetch(server: Server, target: Path, sha256: str | None = None, **more: Any) -> bytes:
    fetch_file(RemoteFile(server.url, "mine", "Do otherwise.", sha256), target, **more)
    return target.read_bytes()


def ranges(server: Server) -> list[tuple[str | None, str | None]]:
    return [(asked.get("Range"), asked.get("If-Range")) for asked in server.asked]


def lying(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- broken off


def test_a_lost_connection_goes_on_where_it_broke(server: Server, tmp_path: Path, waits: list[float]):
    """More often than the tries that bring nothing: each of these brings something."""
    server.cuts = [100_000, 100_000, 100_000, 100_000, 100_000]
    told: list[tuple[str, int, int | None]] = []
    assert fetch(server, tmp_path / "a.bin", progress=lambda *what: told.append(what)) == DATA
    assert ranges(server) == [
        (None, None),
        *((f"bytes={100_000 * n}-", '"one"') for n in (1, 2, 3, 4, 5)),
    ]
    assert waits == [0.5] * 5 and lying(tmp_path) == ["a.bin"]
    here = [bytes_here for _, bytes_here, _ in told]
    assert here == sorted(here) and here[-1] == 512_000
    assert {(name, total) for name, _, total in told} == {("a.bin", 512_000)}


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_part_that_is_shorter_than_the_rest_is_not_the_end(server: Server, tmp_path: Path, sha256: str | None):
    """RFC 9110, section 14.4: the length of the whole file is behind the slash of Content-Range."""
    server.cuts, server.most = [100_000], 150_000
    assert fetch(server, tmp_path / "a.bin", sha256) == DATA
    assert [begin for begin, _ in ranges(server)] == [None, "bytes=100000-", "bytes=250000-", "bytes=400000-"]


def test_an_empty_file_is_a_file(server: Server, tmp_path: Path):
    server.data = b""
    assert fetch(server, tmp_path / "a.bin", hashlib.sha256(b"").hexdigest()) == b""


def test_a_server_that_brings_nothing_new_is_left(server: Server, tmp_path: Path, waits: list[float]):
    server.cuts = [1000, 0, 0]
    with pytest.raises(
        DownloadError, match=r"^mine does not answer: only 1000 of 512000 bytes came\. Do otherwise\.$"
    ):
        fetch(server, tmp_path / "a.bin")
    assert waits == [0.5, 1.0] and lying(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.cuts.clear()
    assert fetch(server, tmp_path / "a.bin") == DATA
    assert ranges(server)[-1] == ("bytes=1000-", '"one"') and lying(tmp_path) == ["a.bin"]


SCRIPT = """
import sys
from pathlib import Path
from mlx_zh.system.downloads import RemoteFile, fetch_file
fetch_file(RemoteFile(sys.argv[1], "mine", ""), Path(sys.argv[2]), lambda *what: print(*what, flush=True))
"""


def test_a_killed_download_goes_on_where_it_stopped(server: Server, tmp_path: Path):
    server.stall = 400_000
    command = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "a.bin")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "a.bin 400000 512000\n":
                process.send_signal(signal.SIGKILL)
    assert lying(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.stall = 0
    assert fetch(server, tmp_path / "a.bin") == DATA
    assert ranges(server) == [(None, None), ("bytes=400000-", '"one"')] and lying(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_that_changed_meanwhile_is_begun_again(server: Server, tmp_path: Path, conditions: bool):
    """The server says so by 200 where it understands If-Range, else by the ETag of its 206."""
    server.cuts = [1000, 0, 0]
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "a.bin")
    server.cuts, server.data, server.headers = [], DATA[::-1], {"ETag": '"two"'}
    server.conditions = conditions
    assert fetch(server, tmp_path / "a.bin") == DATA[::-1]
    assert ranges(server)[3:] == [("bytes=1000-", '"one"')] + ([] if conditions else [(None, None)])


def test_a_date_will_do_and_a_weak_etag_will_not(server: Server, tmp_path: Path):
    server.headers = {"ETag": 'W/"one"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    server.cuts = [1000]
    assert fetch(server, tmp_path / "a.bin") == DATA
    assert ranges(server)[-1] == ("bytes=1000-", "Thu, 01 Jan 2026 00:00:00 GMT")


def test_without_etag_and_date_it_is_begun_again(server: Server, tmp_path: Path):
    server.headers, server.cuts = {}, [1000]
    assert fetch(server, tmp_path / "a.bin") == DATA
    assert ranges(server) == [(None, None), (None, None)]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path):
    server.ranges, server.cuts = False, [1000]
    assert fetch(server, tmp_path / "a.bin") == DATA


# ---- SHA-256


def test_a_known_sha256_needs_no_etag(server: Server, tmp_path: Path):
    server.headers, server.cuts = {}, [1000]
    assert fetch(server, tmp_path / "a.bin", SHA256.upper()) == DATA
    assert ranges(server) == [(None, None), ("bytes=1000-", None)]


def test_a_wrong_byte_is_refused_and_nothing_kept(server: Server, tmp_path: Path):
    server.data = DATA[:-1] + b"x"
    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path / "a.bin", SHA256)
    digest = hashlib.sha256(server.data).hexdigest()
    said = f"mine is not the file that was expected: its SHA-256 is {digest} and should be {SHA256}. Nothing was kept"
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("Do otherwise.") and len(server.asked) == 1 and lying(tmp_path) == []


def test_a_part_that_does_not_fit_is_thrown_away(server: Server, tmp_path: Path):
    (tmp_path / "a.bin.part").write_bytes(b"of another file")
    assert fetch(server, tmp_path / "a.bin", SHA256) == DATA
    assert ranges(server) == [("bytes=15-", None), (None, None)]


@pytest.mark.parametrize("surplus", [b"", b"more"])
def test_a_part_after_which_nothing_comes(server: Server, tmp_path: Path, surplus: bytes):
    """Killed between the last byte and the rename it is whole; else it is another file's."""
    (tmp_path / "a.bin.part").write_bytes(DATA + surplus)
    assert fetch(server, tmp_path / "a.bin", SHA256) == DATA
    assert len(server.asked) == (2 if surplus else 1)


# ---- no answer


def test_a_server_that_accepts_and_never_answers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "LIMITS", Limits(connect=1.0, read=0.2))
    server.silent = True
    message = rf"^mine does not answer: 127\.0\.0\.1:{server.server_port} sent nothing for 0\.2 s\. Do otherwise\.$"
    with pytest.raises(DownloadError, match=message):
        fetch(server, tmp_path / "a.bin")
    assert len(server.asked) == 3 and lying(tmp_path) == []


def test_a_server_that_does_not_accept():
    import httpx2

    error = httpx2.ConnectTimeout("timed out")
    said = downloads.reason_of(error, "https://me:secret@hub.example/x")
    assert said == "hub.example did not accept a connection within 10 s"


@pytest.mark.parametrize(
    ("status", "words", "asked"),
    [
        (401, "answers 401, it asks for a name and a password or a token", 1),
        (403, "answers 403, it refuses access from this address or account", 1),
        (404, "answers 404, there is no such file", 1),
        (418, "answers 418", 1),
        (429, "answers 429, too many requests: wait some minutes", 3),
        (503, "answers 503, it is overloaded or down: try again later", 3),
    ],
)
def test_what_a_status_means(server: Server, tmp_path: Path, status: int, words: str, asked: int):
    server.statuses = [(status, {})] * 3
    with pytest.raises(DownloadError, match=f"^mine could not be downloaded: the server {words}.*Do otherwise"):
        fetch(server, tmp_path / "a.bin")
    assert len(server.asked) == asked and lying(tmp_path) == []


def test_a_server_that_says_when_to_come_again(server: Server, tmp_path: Path, waits: list[float]):
    server.statuses = [(503, {"Retry-After": "4"}), (429, {"Retry-After": "5"})]
    assert fetch(server, tmp_path / "a.bin") == DATA and waits == [4.0, 5.0]
    server.statuses = [(503, {"Retry-After": "6"})]
    with pytest.raises(DownloadError, match="503"):
        fetch(server, tmp_path / "b.bin")
    assert waits == [4.0, 5.0]


# ---- others


def test_two_at_a_time_download_once(server: Server, tmp_path: Path):
    server.data = DATA * 20
    both = [threading.Thread(target=fetch, args=(server, tmp_path / "a.bin")) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert (tmp_path / "a.bin").read_bytes() == server.data and len(server.asked) == 1
    assert lying(tmp_path) == ["a.bin"]
