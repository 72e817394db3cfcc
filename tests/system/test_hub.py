"""Downloads from a hub: a small hub of our own over HTTP, reached through HF_ENDPOINT as a mirror is."""

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
import tiny_models as tiny

from mlx_zh.errors import DownloadError, ModelError, StorageError
from mlx_zh.system import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Mirror(ThreadingHTTPServer):
    """Answers the few requests that huggingface_hub makes for one model, and refuses others by name."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.served, self.damaged = files, set[str](), False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/org/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif "/org/tiny" not in path:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.file(path.split(f"/resolve/{COMMIT}/")[-1])
        elif f"/revision/{COMMIT}" in path or "/revision/main" in path or path.endswith("/org/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.served.add(name)
        large = name.endswith(".safetensors")  # the hub names large files by their SHA-256
        digest = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        if self.server.damaged and large:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.answer(200, data, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    config = tiny.tiny_config("qwen3")
    folder = tiny.write_folder(tmp_path_factory.mktemp("hub"), config, tiny.tiny_model(config))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("modeling.py", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"):
        files[name] = b"must not be fetched"
    server = Mirror(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from mlx_zh.errors import MlxZhError
from mlx_zh.models.load import load_model, resolve_model
name, revision = sys.argv[1], sys.argv[2] or None
try:
    print(load_model(name, revision=revision).config["model_type"])
    print(resolve_model(name, revision=revision))
except MlxZhError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def ask(endpoint: str, cache: Path, name: str, revision: str = "", **more: str) -> tuple[int, str, str]:
    """In a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"} | more
    environment["MLX_ZH_CACHE"] = str(cache / "mlx-zh")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, revision], env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout, result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""


def test_model_from_a_mirror(mirror: Mirror, tmp_path: Path) -> None:
    """A whole model arrives and loads; pickles, code and second copies of the weights stay where they are."""
    status, out, error = ask(mirror.url, tmp_path, "org/tiny", COMMIT)
    assert status == 0, error
    kind, place = out.split()
    assert kind == "qwen3" and COMMIT in place
    assert mirror.served == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | {
        name for name in mirror.files if name.endswith(".jinja")
    }
    assert sorted(p.name for p in Path(place).iterdir()) == sorted(mirror.served)

    status, out, error = ask(mirror.url, tmp_path, "org/tiny", COMMIT, HF_HUB_OFFLINE="1")  # now from the cache
    assert status == 0, error


def test_weights_that_arrive_damaged_are_refused_and_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.damaged = True
    try:
        status, _, error = ask(mirror.url, tmp_path, "org/tiny", COMMIT)
    finally:
        mirror.damaged = False
    assert status and "model.safetensors arrived damaged" in error
    status, out, error = ask(mirror.url, tmp_path, "org/tiny", COMMIT)
    assert (status, out.split()[:1]) == (0, ["qwen3"]), error


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/nothing", "", ["has no model org/nothing", "spelling", "huggingface-cli login"]),
        ("org/gated", "", ["gated", "huggingface-cli login", "/org/gated"]),
        ("org/tiny", "v9", ["no revision 'v9'"]),
    ],
)
def test_what_a_hub_refuses(mirror: Mirror, tmp_path: Path, name: str, revision: str, words: list[str]) -> None:
    status, _, error = ask(mirror.url, tmp_path, name, revision)
    assert status == 1 and error.startswith("DownloadError: ")
    for word in words:
        assert word in error


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    status, _, error = ask("http://127.0.0.1:9", tmp_path, "org/tiny")
    assert status == 1 and error.startswith("DownloadError: org/tiny could not be downloaded")
    for word in ("HF_ENDPOINT", "hub: modelscope", "folder"):
        assert word in error


def test_offline_and_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        hub.download("org/not-in-any-cache")


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(StorageError, match=r"disk is full: org/tiny"):
        hub.download("org/tiny")


def test_unknown_hub() -> None:
    with pytest.raises(ModelError, match="'github' is not known; choose huggingface or modelscope"):
        hub.download("org/tiny", "github")


# ---- ModelScope, which is not among the dependencies


def test_modelscope_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(DownloadError, match="pip install"):
        hub.download("org/tiny", "modelscope")


def test_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    asked: list[Any] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.py" in allow_patterns))
        if name == "org/none":
            raise ValueError("404: no such model")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot))
    assert hub.download("org/tiny", "modelscope", "v1") == tmp_path
    assert asked == [("org/tiny", "v1", False)]
    with pytest.raises(DownloadError, match=r"404: no such model\. Check the network and the name on ModelScope"):
        hub.download("org/none", "modelscope")
