"""Downloads from a hub: a small hub of our own over HTTP, reached through HF_ENDPOINT as a mirror is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from forks import Forks, forks

from mlx_zh.errors import DownloadError, ModelError, StorageError
from mlx_zh.system import hub

DEAD = "http://127.0.0.1:9"  # nobody listens there
COMMIT = "0123456789abcdef0123456789abcdef01234567"


ROWS = b'{"instruction": "a", "output": "b"}\n' * 20_000  # 720,000 bytes
DIGEST = hashlib.sha256(ROWS).hexdigest()
SET = {"README.md": b"---\nlicense: mit\n---\n", "data/train-0.jsonl": ROWS, "data/test-0.jsonl": b"{}\n"}


class Mirror(ThreadingHTTPServer):
    """Answers the few requests that huggingface_hub makes for one model and one data set; refuses others by name."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.over = files, threading.Event()
        self.well()

    def well(self) -> None:
        """Nothing goes wrong."""
        self.served, self.ranges = set[str](), list[str]()
        self.damaged = False
        self.lfs = False  # whether listings give the SHA-256 of large files
        self.cut = 0  # the next large file ends after so many bytes
        self.silent = "no path"  # paths with this in them get no answer
        self.statuses: dict[str, tuple[int, dict[str, str]]] = {}  # the answer to paths with this in them

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
        if self.server.silent in path:
            self.server.over.wait()
            return
        for part, (status, headers) in self.server.statuses.items():
            if part in path:
                return self.answer(status, b"{}", headers)
        known = SET if "/org/set" in path else self.server.files
        if "/org/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif "/org/tiny" not in path and "/org/set" not in path:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.file(known, path.split(f"/resolve/{COMMIT}/")[-1])
        elif f"/revision/{COMMIT}" in path or "/revision/main" in path or re.search("/org/(tiny|set[^/]*)$", path):
            siblings = [{"rfilename": name} for name in known]
            self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif "/tree/" in path:
            self.answer(200, json.dumps([self.entry(name, data) for name, data in known.items()]).encode())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if self.server.lfs and name.endswith(LARGE):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def file(self, known: dict[str, bytes], name: str) -> None:
        data = known[name]
        if self.command == "GET":
            self.server.served.add(name)
        large = name.endswith(LARGE)  # the hub names large files by their SHA-256
        digest = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        if self.server.damaged and large:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD" or not large:
            return self.answer(200, data, headers)
        self.server.ranges.append(self.headers.get("Range", ""))
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut, self.server.cut = self.server.cut, 0
        headers["Content-Length"] = str(len(data) - first)
        self.close_connection = bool(cut)
        self.answer(206 if first else 200, data[first : cut or None], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


LARGE = (".safetensors", "train-0.jsonl")


@pytest.fixture
def mirror(mirrored: Mirror) -> Mirror:
    """With nothing wrong yet."""
    mirrored.well()
    return mirrored


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    config = tiny.tiny_config("qwen3")
    folder = tiny.write_folder(tmp_path_factory.mktemp("hub"), config, tiny.tiny_model(config))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("modeling.py", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors"):
        files[name] = b"must not be fetched"
    server = Mirror(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    link = tmp_path_factory.mktemp("ready") / "hf"
    with forks(["mlx_zh.models.load", "transformers", "mlx_lm", "httpx2"], environment(server.url, link)) as process:
        READY[server.url] = process, link
        yield server
    del READY[server.url]
    server.over.set()
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


# By hub: a process that has imported huggingface_hub for it, and the link that is its Hugging Face folder.
READY: dict[str, tuple[Forks, Path]] = {}


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """What huggingface_hub reads when it is imported, and how a process finds no other hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*", "MODELSCOPE_ENDPOINT": DEAD}


def ask(endpoint: str, cache: Path, name: str, revision: str = "", **more: str) -> tuple[int, str, str]:
    """What loading a model gives."""
    return python(SCRIPT, [name, revision], endpoint, cache, **more)


def python(script: str, arguments: list[str], endpoint: str, cache: Path, **more: str) -> tuple[int, str, str]:
    """The exit status, what was printed, and the last line of what was complained of.

    A fork runs it where one is ready for the hub; with more variables it is a process of its own.
    """
    caches = {"MODELSCOPE_CACHE": str(cache / "modelscope"), "MLX_ZH_CACHE": str(cache / "mlx-zh")}
    if endpoint in READY and not more:
        process, link = READY[endpoint]
        link.unlink(missing_ok=True)
        link.symlink_to(cache)
        result = process.run(script, arguments, cache, caches, seconds=120)
    else:
        command = [sys.executable, "-c", script, *arguments]
        own = environment(endpoint, cache) | caches | more
        result = subprocess.run(command, env=own, cwd=cache, capture_output=True, text=True, timeout=120)
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
    status, _, error = ask(mirror.url, tmp_path, "org/tiny", COMMIT)
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


# ---- Data sets, and what goes wrong with large files

IMPATIENT = """
import time
from mlx_zh.system import downloads
downloads.LIMITS = downloads.Limits(connect=1.0, read=0.3)
time.sleep = lambda seconds: None
"""

SET_SCRIPT = """
import sys
from mlx_zh.errors import MlxZhError
from mlx_zh.system import hub
try:
    folder = hub.download(
        "org/set", kind="dataset", patterns=("data/train*",), label="mine: org/set", advice="Do otherwise.",
        progress=lambda name, here, total: print(name, here, total),
    )
    print(folder / "data" / "train-0.jsonl")
except MlxZhError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def ask_set(mirror: Mirror, cache: Path) -> tuple[int, list[str], str]:
    status, out, error = python(IMPATIENT + SET_SCRIPT, [], mirror.url, cache)
    return status, out.splitlines(), error


def test_a_large_file_arrives_in_the_librarys_cache(mirror: Mirror, tmp_path: Path) -> None:
    mirror.lfs = True
    status, out, error = ask_set(mirror, tmp_path)
    assert status == 0, error
    place = Path(out[-1])
    assert place.read_bytes() == ROWS and COMMIT in out[-1]
    assert place.resolve().name == DIGEST and mirror.ranges == [""]
    assert out[-2] == f"train-0.jsonl {len(ROWS)} {len(ROWS)}" and mirror.served == {"data/train-0.jsonl"}
    mirror.silent = "/"  # now nobody answers, and it comes from the cache
    status, out, error = ask_set(mirror, tmp_path)
    assert (status, out) == (0, [str(place)]), error


def test_a_broken_off_large_file_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    """In the next process too: the hub refuses after the break."""
    mirror.lfs, mirror.cut = True, 500_000
    status, out, error = ask_set(mirror, tmp_path)
    assert status == 0, error
    assert Path(out[-1]).read_bytes() == ROWS and mirror.ranges == ["", "bytes=500000-"]

    mirror.well()
    mirror.lfs, mirror.cut = True, 500_000
    part = tmp_path / "two" / "hub" / "datasets--org--set" / "blobs" / f"{DIGEST}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(ROWS[:300_000])
    status, out, error = ask_set(mirror, tmp_path / "two")
    assert (status, mirror.ranges) == (0, ["bytes=300000-", "bytes=500000-"]), error
    assert Path(out[-1]).read_bytes() == ROWS


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "by its ETag"])
def test_a_wrong_byte_in_a_data_set_is_refused(mirror: Mirror, tmp_path: Path, listed: bool) -> None:
    """Where the listing has no SHA-256 the library brings the file, and it is checked in its cache."""
    mirror.lfs, mirror.damaged = listed, True
    status, _, error = ask_set(mirror, tmp_path)
    said = (
        "train-0.jsonl is not the file that was expected: its SHA-256" if listed else "train-0.jsonl arrived damaged"
    )
    assert status == 1 and error.startswith("DownloadError: ") and said in error
    assert not [path for path in tmp_path.rglob("*") if path.name in ("train-0.jsonl", f"{DIGEST}.part", DIGEST)]
    mirror.damaged = False
    status, out, error = ask_set(mirror, tmp_path)
    assert status == 0 and Path(out[-1]).read_bytes() == ROWS, error


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
STATUSES: dict[str, tuple[int, dict[str, str], str]] = {
    "gated": (
        403,
        GATED,
        "mine: {} is gated: its owner asks for your consent first. Accept the conditions on its page",
    ),
    "401": (401, {}, "could not be downloaded: the server answers 401: it needs an access token"),
    "403": (403, {}, "could not be downloaded: the server answers 403: your account"),
    "404": (
        404,
        {"X-Error-Code": "RepoNotFound"},
        "answers 404, there is no such data set, or it is private. Do other",
    ),
    "429": (429, {"Retry-After": "600"}, "answers 429, too many requests: wait some minutes"),
    "503": (503, {}, "answers 503, it is overloaded or down"),
}
WHERE = {"info": "", "list": "/tree/", "file": "/resolve/"}  # which question gets the answer

MANY = """
import sys
from mlx_zh.errors import MlxZhError
from mlx_zh.system import hub
for name in sys.argv[1:]:
    try:
        hub.download(name, kind="dataset", patterns=("data/train*",), label=f"mine: {name}", advice="Do otherwise.")
    except MlxZhError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_what_a_status_of_the_hub_means(mirror: Mirror, tmp_path: Path) -> None:
    mirror.lfs = True
    names = {f"org/set-{status}-{where}": status for status in STATUSES for where in WHERE}
    for name, status in names.items():
        mirror.statuses[f"{name}{WHERE[name.rpartition('-')[2]]}"] = STATUSES[status][:2]
    _, out, _ = python(IMPATIENT + MANY, list(names), mirror.url, tmp_path)
    said = dict(zip(names, out.splitlines(), strict=True))
    for name, status in names.items():
        assert said[name].startswith("DownloadError: mine: org/set-")
        assert STATUSES[status][2].format(name) in said[name], said[name]


@pytest.mark.parametrize("silent", ["/api/", "/tree/", "/resolve/"])
def test_a_hub_that_accepts_and_never_answers(mirror: Mirror, tmp_path: Path, silent: str) -> None:
    mirror.lfs, mirror.silent = True, silent
    status, _, error = ask_set(mirror, tmp_path)
    assert status == 1 and f"127.0.0.1:{mirror.server_port} sent nothing for 0.3 s. Do otherwise." in error, error


RECIPE = """
name: tiny
model: {path: org/tiny}
data: {registry: {mine: {hub: huggingface, id: org/set, kind: sft}}, sft: {train: [mine]}}
"""

COMMAND = """
import importlib, sys
from mlx_zh.system.entry import entry
entry(importlib.import_module(f"mlx_zh.{sys.argv[1]}").main, sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("stage", "silent"), [("plan", "/org/tiny"), ("prepare", "/org/tiny"), ("prepare", "/org/set")]
)
def test_commands_end_where_a_hub_never_answers(mirror: Mirror, tmp_path: Path, stage: str, silent: str) -> None:
    mirror.silent = silent
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    status, _, error = python(IMPATIENT + COMMAND, [stage, "recipe.yaml"], mirror.url, tmp_path)
    assert status == 2 and error.startswith("error: ")
    for word in (f"127.0.0.1:{mirror.server_port} sent nothing for 0.3 s", "HF_ENDPOINT", "hub: modelscope"):
        assert word in error, error


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    status, _, error = ask(DEAD, tmp_path, "org/tiny")
    assert status == 1 and error.startswith("DownloadError: org/tiny could not be downloaded: no hub answers.")
    for word in ("Hugging Face (127.0.0.1:9): ConnectionRefusedError", "ModelScope (127", "HF_ENDPOINT", "folder"):
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
    with pytest.raises(ModelError, match="'github' is not known; choose auto, huggingface or modelscope"):
        hub.download("org/tiny", "github")
