"""ModelScope's own library, where it is installed, against a small hub of our own: what `hub` relies on it for."""

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
from urllib.parse import urlsplit

import pytest

pytest.importorskip("modelscope_hub", reason="the package `modelscope` is not installed")

DATA = b"x" * 300_000


class Hub(ThreadingHTTPServer):
    """One repository with one file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.damaged = self.silent = False
        self.cut = 0  # the next file ends after so many bytes
        self.over = threading.Event()
        self.ranges: list[str] = []


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if self.server.silent:
            self.server.over.wait()
        elif path.path.endswith(("/repo/files", "/repo/tree")):
            digest = hashlib.sha256(DATA).hexdigest()
            file = {"Path": "train.json", "Name": "train.json", "Type": "blob", "Size": len(DATA), "Sha256": digest}
            self.answer({"Files": [file], "TotalCount": 1})
        elif "FilePath" in path.query:
            self.file(DATA[:-1] + b"y" if self.server.damaged else DATA)
        else:
            self.answer({})

    def answer(self, data: dict[str, Any]) -> None:
        body = json.dumps({"Code": 200, "Success": True, "Data": data}).encode()
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def file(self, data: bytes) -> None:
        asked = self.headers.get("Range", "")
        self.server.ranges.append(asked)
        first = int(asked[6:-1] or 0)
        place = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if asked else {}
        self.head(206 if asked else 200, {"Content-Length": str(len(data) - first), "ETag": '"one"'} | place)
        cut, self.server.cut = self.server.cut, 0
        self.wfile.write(data[first : cut or None])

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Hub]:
    found = Hub()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()


SCRIPT = """
import sys
from mlx_zh.errors import MlxZhError
from mlx_zh.system import downloads, hub
downloads.LIMITS = downloads.Limits(connect=1.0, read=1.0)
try:
    print(hub.download("org/set", "modelscope", kind=sys.argv[1]))
except MlxZhError as error:
    print(f"{type(error).__name__}: {error}")
"""


def ask(server: Hub, cache: Path, kind: str) -> str:
    """In a process of its own, since the library reads its settings when it is imported."""
    more = {"MODELSCOPE_CACHE": str(cache), "NO_PROXY": "*"}
    more["MODELSCOPE_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    command = [sys.executable, "-c", SCRIPT, kind]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_wrong_byte_is_refused_and_a_break_off_goes_on(server: Hub, tmp_path: Path, kind: str):
    server.damaged = True
    said = ask(server, tmp_path, kind)
    assert said.startswith("DownloadError: org/set arrived damaged: ") and "Hash mismatch for train.json" in said
    assert not list(tmp_path.rglob("train.json"))
    server.damaged, server.cut, server.ranges = False, 100_000, []
    assert (Path(ask(server, tmp_path, kind)) / "train.json").read_bytes() == DATA
    assert server.ranges == ["", "bytes=100000-"]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_never_answers(server: Hub, tmp_path: Path, kind: str):
    server.silent = True
    said = ask(server, tmp_path, kind)
    assert f"127.0.0.1:{server.server_port} sent nothing for 1 s. Check the network" in said and "hub: hug" in said
