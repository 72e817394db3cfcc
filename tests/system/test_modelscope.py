"""ModelScope's HTTP interface against a small hub of our own, and which of two hubs `auto` takes."""

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
from urllib.parse import parse_qs, urlsplit

import pytest

DATA = b"x" * 300_000
DEAD = "http://127.0.0.1:9"  # nobody listens there


class Hub(ThreadingHTTPServer):
    """One model and one data set, each with a large file, a file that nobody wants, and one with a bad path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.damaged = self.silent = False
        self.cut = 0  # the next file ends after so many bytes
        self.over = threading.Event()
        self.ranges: list[str] = []
        self.asked = 0
        self.files = {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": DATA,
            "train.json": DATA,
            "modeling.py": b"must not be fetched",
            "../outside.json": b"must not be fetched",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked += 1
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if self.server.silent:
            self.server.over.wait()
        elif "/org/" in parts.path and "/org/set" not in parts.path:
            self.head(404, {"Content-Length": "0"})
        elif parts.path.endswith(("/repo/files", "/repo/tree")):
            first = (int(query.get("PageNumber", 1)) - 1) * 200
            self.answer({"Files": [self.entry(*item) for item in list(self.server.files.items())[first:]]})
        elif "FilePath" in query:
            name, data = query["FilePath"], self.server.files[query["FilePath"]]
            self.file(data[:-1] + b"y" if self.server.damaged and data is DATA else data, large=name != "config.json")
        else:
            self.answer({})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    def answer(self, data: dict[str, Any]) -> None:
        body = json.dumps({"Code": 200, "Success": True, "Data": data}).encode()
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def file(self, data: bytes, *, large: bool) -> None:
        asked = self.headers.get("Range", "")
        if large:
            self.server.ranges.append(asked)
        first = int(asked[6:-1] or 0)
        place = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if asked else {}
        self.head(206 if asked else 200, {"Content-Length": str(len(data) - first), "ETag": '"one"'} | place)
        cut = 0
        if large:
            cut, self.server.cut = self.server.cut, 0
        self.wfile.write(data[first : cut or None])

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.over.set()
    hub.shutdown()
    hub.server_close()


SCRIPT = """
import sys
from mlx_zh.system.entry import entry
from mlx_zh.system import downloads, hub
downloads.LIMITS = downloads.Limits(connect=1.0, read=1.0, choose=1.0, head_start=0.3)
def main(arguments):
    name, place, kind = arguments
    print(hub.download(name, place, kind=kind))
    print("config", hub.cached(name, place, kind=kind, patterns=("config.json",)), file=sys.stderr)
entry(main)
"""


def ask(
    modelscope: str, cache: Path, *, kind: str = "model", hub: str = "modelscope", name: str = "org/set", **more: str
) -> tuple[int, str, str]:
    """Exit status, the last line of stdout and all of stderr, of a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    environment |= {"MODELSCOPE_CACHE": str(cache), "NO_PROXY": "*", "MLX_ZH_CACHE": str(cache / "mlx-zh")}
    environment |= {"MODELSCOPE_ENDPOINT": modelscope, "HF_ENDPOINT": DEAD, "HF_HOME": str(cache / "hf")} | more
    command = [sys.executable, "-c", SCRIPT, name, hub, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1], done.stderr


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_wrong_byte_is_refused_and_a_break_off_goes_on(server: Hub, tmp_path: Path, kind: str) -> None:
    name = "model.safetensors" if kind == "model" else "train.json"
    server.files = {path: data for path, data in server.files.items() if path in ("config.json", name)}
    server.damaged = True
    status, _, error = ask(server.url, tmp_path, kind=kind)
    assert status == 2 and f"org/set: {name} is not the file that was expected: its SHA-256 is" in error
    assert not list(tmp_path.rglob(name))
    server.damaged, server.cut, server.ranges = False, 100_000, []
    status, folder, error = ask(server.url, tmp_path, kind=kind)
    assert (Path(folder) / name).read_bytes() == DATA, error
    assert server.ranges == ["", "bytes=100000-"]


def test_a_model_arrives_where_modelscopes_tools_look_and_nothing_else_is_written(
    server: Hub, tmp_path: Path
) -> None:
    status, folder, error = ask(server.url, tmp_path)
    assert status == 0 and folder == str(tmp_path / "models" / "org--set" / "snapshots" / "master"), error
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.safetensors", "train.json"]
    assert not list(tmp_path.rglob("outside.json")) and "%|" not in error  # no progress bar of another library


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_cached_needs_no_network(server: Hub, tmp_path: Path, kind: str) -> None:
    server.files.pop("../outside.json")
    _, folder, _ = ask(server.url, tmp_path, kind=kind)
    server.silent, server.asked = True, 0
    for hub in ("modelscope", "auto"):
        assert ask(server.url, tmp_path, kind=kind, hub=hub)[:2] == (0, folder)
    assert server.asked == 0
    assert "HF_HUB_OFFLINE" not in ask(server.url, tmp_path, kind=kind, HF_HUB_OFFLINE="1")[2]


def test_a_model_that_another_tool_downloaded_is_used(server: Hub, tmp_path: Path) -> None:
    """The folder of ModelScope's older tools, in which a dot of the name is written as three underscores."""
    folder = tmp_path / "hub" / "models" / "org" / "set-1___5b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    server.silent = True
    assert ask(server.url, tmp_path, name="org/set-1.5b")[0] == 2  # no weights: not whole
    (folder / "model.safetensors").write_bytes(b"x")
    assert ask(server.url, tmp_path, name="org/set-1.5b")[:2] == (0, str(folder))


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_never_answers(server: Hub, tmp_path: Path, kind: str) -> None:
    server.silent = True
    _, _, error = ask(server.url, tmp_path, kind=kind)
    assert f"127.0.0.1:{server.server_port} sent nothing for 1 s. Check the network" in error
    assert "MODELSCOPE_API_TOKEN" in error


def test_a_repository_that_there_is_not(server: Hub, tmp_path: Path) -> None:
    status, _, error = ask(server.url, tmp_path, name="org/none")
    assert status == 2 and "org/none could not be downloaded: the server answers 404" in error


# hub: auto


def test_modelscope_is_taken_where_hugging_face_does_not_answer(server: Hub, tmp_path: Path) -> None:
    status, folder, error = ask(server.url, tmp_path, hub="auto")
    assert status == 0 and "org--set" in folder
    place = server.url.removeprefix("http://")
    line = f"Downloads come from ModelScope ({place}), because 127.0.0.1:9 does not answer."
    assert error.splitlines().count(line) == 1


def test_a_silent_hugging_face_is_not_waited_for_longer_than_the_limit(server: Hub, tmp_path: Path) -> None:
    other = Hub()
    other.silent = True
    threading.Thread(target=other.serve_forever, daemon=True).start()
    status, folder, error = ask(server.url, tmp_path, hub="auto", HF_ENDPOINT=other.url)
    assert status == 0 and "org--set" in folder, error
    other.over.set()
    other.shutdown()
    other.server_close()


def test_an_error_says_what_was_tried(server: Hub, tmp_path: Path) -> None:
    status, _, error = ask(server.url, tmp_path, hub="auto", name="org/none")
    assert status == 2
    for words in ("the server answers 404", "Hugging Face was tried first: ConnectionRefusedError", "HF_ENDPOINT"):
        assert words in error, error
    status, _, error = ask(DEAD, tmp_path, hub="auto")
    assert status == 2 and "no hub answers. Tried: Hugging Face (127.0.0.1:9)" in error and "ModelScope (" in error
