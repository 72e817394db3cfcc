"""Sets of Hugging Face read row by row from a hub on this machine: what is fetched, kept, and refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from forks import Forks, forks
from pyarrow import parquet

DEAD = "http://127.0.0.1:9"  # nobody listens there
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/convert/parquet": "c" * 40}


def shard(*numbers: int) -> bytes:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}？"}, {"role": "assistant", "content": f"{n}。"}]}
        for n in numbers
    ]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


CARD = """---
configs:
- config_name: zh
  data_files: [{split: train, path: zh/train-*.parquet}, {split: test, path: zh/test-*.parquet}]
- config_name: en
  data_files: [{split: train, path: en/train-*.parquet}]
---
"""
# What each repository holds, by commit.
SETS: dict[str, dict[str, dict[str, bytes]]] = {
    "org/set": {
        "a" * 40: {".gitattributes": b"#", "README.md": CARD.encode(), "en/train-0.parquet": shard(90)}
        | {f"zh/train-{i}.parquet": shard(10 * i, 10 * i + 1, 10 * i + 2) for i in range(1, 5)}
        | {"zh/test-0.parquet": shard(80)},
        "b" * 40: {".gitattributes": b"#", "README.md": CARD.encode()}
        | {"zh/train-0.parquet": shard(1), "zh/test-0.parquet": shard(2)},
    },
    "org/script": {
        "a" * 40: {".gitattributes": b"#", "script.py": b"raise SystemExit('never run')"},
        "b" * 40: {".gitattributes": b"#", "script.py": b""},
        "c" * 40: {
            ".gitattributes": b"#",
            "default/train/0000.parquet": shard(5),
            "default/train/0001.parquet": shard(6),
            "other/partial-train/0000.parquet": shard(7),
        },
    },
    "org/lines": {
        "a" * 40: {".gitattributes": b"#"}
        | {
            f"{split}.jsonl": b"".join(b'{"prompt": "%d", "response": "r", "extra": null}\n' % n for n in numbers)
            for split, numbers in {"train": range(6), "test": range(9)}.items()
        },
    },
}


class Hub(ThreadingHTTPServer):
    """The few answers that huggingface_hub and datasets need; `asked` has the path of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.do_GET(self.rfile.read(length))

    def do_GET(self, sent: bytes = b"") -> None:
        from urllib.parse import parse_qs, unquote, urlparse

        path = unquote(urlparse(self.path).path)
        self.server.asked.append(path)
        name = next((name for name in SETS if f"datasets/{name}" in path), None)
        rest = path.partition(f"datasets/{name}")[2].strip("/")
        if name is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        what, _, rest = rest.partition("/")
        known = [*COMMITS.values(), *COMMITS]
        revision = next((known for known in known if rest == known or rest.startswith(f"{known}/")), rest or "main")
        commit = COMMITS.get(revision, revision)
        files, inside = SETS[name].get(commit), rest.removeprefix(revision).strip("/")
        if files is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "resolve":
            self.file(files.get(inside), commit)
        elif what == "tree":
            self.list(
                files,
                inside,
                recursive=parse_qs(urlparse(self.path).query).get("recursive") == ["true"]
                or "recursive=True" in self.path,
            )
        elif what == "paths-info":
            form = json.loads(sent) if sent[:1] == b"{" else parse_qs(sent.decode())
            found = [self.entry(files, p) for p in form["paths"]]
            self.answer(200, json.dumps([entry for entry in found if entry]).encode())
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def entry(self, files: dict[str, bytes], path: str) -> dict[str, Any] | None:
        if path in files:
            return {
                "type": "file",
                "path": path,
                "size": len(files[path]),
                "oid": hashlib.sha1(files[path]).hexdigest(),
            }
        if any(name.startswith(f"{path}/") for name in files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None

    def list(self, files: dict[str, bytes], inside: str, recursive: bool) -> None:
        names = [name for name in files if not inside or name.startswith(f"{inside}/")]
        paths = set(names) if recursive else set()
        for name in names:
            parts = name.split("/")
            depths = range(1, len(parts) + 1) if recursive else [len(inside.split("/")) + 1 if inside else 1]
            paths |= {"/".join(parts[:depth]) for depth in depths}
        self.answer(200, json.dumps([self.entry(files, path) for path in sorted(paths)]).encode())

    def file(self, data: bytes | None, commit: str) -> None:
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        about = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if not asked:
            self.answer(200, data, about)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        about["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self.answer(206, part, about)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def server(hub: Hub) -> Hub:
    """That nobody has asked yet."""
    hub.asked.clear()
    return hub


SCRIPT = """
import json, sys
from mlx_zh.errors import MlxZhError
from mlx_zh.recipe import DataSet, Source
from mlx_zh.stages.data import resolve_source
for entry, source in json.loads(sys.argv[1]):
    try:
        registry = {"mine": DataSet(hub="huggingface", kind="sft", **entry)}
        for path in resolve_source(Source(name="mine", **source), registry, "sft", 0, validation=False).files:
            print(path)
    except MlxZhError as error:
        print(f"{type(error).__name__}: {error}")
"""


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """What huggingface_hub and datasets read when they are imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}


@pytest.fixture(scope="module")
def ready(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forks, Path]]:
    """A process that has imported both for this hub, and the link that is its Hugging Face folder."""
    link = tmp_path_factory.mktemp("ready") / "hf"
    with forks(["datasets", "mlx_zh.stages.data", "mlx_zh.corpus.hub_rows"], environment(hub.url, link)) as process:
        yield process, link


Ask = Callable[..., list[str]]


@pytest.fixture
def ask(server: Hub, ready: tuple[Forks, Path], tmp_path: Path) -> Ask:
    """What each source gives: the paths of its files, or its error. Another hub or variable takes another process."""
    process, link = ready
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "hf")
    (tmp_path / "hf").mkdir()

    def give(*sources: tuple[dict[str, Any], dict[str, Any]], endpoint: str = "", **more: str) -> list[str]:
        cache = {"MLX_ZH_CACHE": str(tmp_path / "cache")}
        if endpoint or more:
            own = environment(endpoint or server.url, tmp_path / "hf") | cache | more
            command = [sys.executable, "-c", SCRIPT, json.dumps(sources)]
            done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        else:
            done = process.run(SCRIPT, [json.dumps(sources)], tmp_path, cache, seconds=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return give


def numbers(path: str) -> list[int]:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert all(row["messages"][0]["content"] == row["messages"][1]["content"].replace("。", "？") for row in rows)
    return [int(row["messages"][0]["content"][:-1]) for row in rows]


def data_asked(server: Hub) -> list[str]:
    return sorted(
        {
            path.rpartition("/")[2]
            for path in server.asked
            if "/resolve/" in path and path.endswith((".parquet", ".jsonl"))
        }
    )


def test_a_subset_whole_and_streamed(server: Hub, ask: Ask):
    """Of the four shards of three rows, four rows need two."""
    (path,) = ask(({"id": "org/set", "subset": "zh"}, {"streaming": True, "max_samples": 4}))
    assert numbers(path) == [10, 11, 12, 20]
    assert data_asked(server) == ["train-1.parquet", "train-2.parquet"]


def test_rows_are_kept_for_a_run_without_a_network(server: Hub, ask: Ask):
    streamed = {"id": "org/set", "subset": "zh", "streaming": True}
    sources: list[Any] = [
        (streamed, {"max_samples": 2}),
        (streamed, {}),
        (streamed, {"split": "test", "max_samples": 2}),
    ]
    found = ask(*sources)
    assert [numbers(path) for path in found] == [
        [10, 11],
        [n for i in range(1, 5) for n in range(10 * i, 10 * i + 3)],
        [80],
    ]
    about = json.loads((Path(found[0]).parent / "about.json").read_text(encoding="utf-8"))
    assert about == {
        "id": "org/set",
        "commit": "a" * 40,
        "revision": None,
        "subset": "zh",
        "split": "train",
        "files": [],
        "rows": 2,
        "kept": 2,
        "sha256": hashlib.sha256(Path(found[0]).read_bytes()).hexdigest(),
    }
    asked = len(data_asked(server))
    server.asked.clear()
    assert ask(*sources) == found and data_asked(server) == [] and asked
    assert ask(*sources, endpoint=DEAD) == found
    *kept, error = ask(*sources, (streamed, {"max_samples": 3}), HF_HUB_OFFLINE="1")
    assert kept == found
    assert error.startswith("DownloadError: mine: org/set ")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "about", "about gone"])
def test_damaged_rows_are_fetched_again(ask: Ask, damage: str):
    streamed = ({"id": "org/set", "subset": "zh", "streaming": True}, {"max_samples": 2})
    path = Path(ask(streamed)[0])
    whole, about = path.read_bytes(), path.with_name("about.json")
    if damage == "flipped":
        path.write_bytes(whole.replace(b"10", b"18", 1))
    elif damage == "cut":
        path.write_bytes(whole[:-5])
    elif damage == "about":
        about.write_text("[]")
    else:
        (about if damage == "about gone" else path).unlink()
    assert ask(streamed) == [str(path)]
    assert path.read_bytes() == whole


def test_another_revision_is_another_file(ask: Ask):
    main, v1 = ask(
        ({"id": "org/set", "subset": "zh"}, {}),
        ({"id": "org/set"}, {"subset": "zh", "revision": "v1"}),
    )
    assert numbers(v1) == [1] and main != v1 and len(numbers(main)) == 12


def test_what_is_not_there_is_named_with_what_is(ask: Ask):
    errors = ask(
        ({"id": "org/set", "streaming": True}, {}),
        ({"id": "org/set"}, {"subset": "jp"}),
        ({"id": "org/set"}, {"subset": "en", "split": "test"}),
        ({"id": "org/none"}, {"subset": "en"}),
        ({"id": "org/set"}, {"subset": "en", "revision": "v9"}),
        ({"id": "org/lines"}, {"streaming": True, "split": "held"}),
    )
    words = [
        ["DataError: mine: org/set: name one of its subsets with `subset`", "zh", "en"],
        ["DataError: mine: org/set: name one of its subsets with `subset`", "jp", "zh", "en"],
        ["DataError: mine: org/set: name one of its splits with `split`", "test", "train"],
        ["DownloadError: ", "org/none"],
        ["DownloadError: ", "v9"],
        ["DataError: mine: org/lines: name one of its splits with `split`", "held", "train", "test"],
    ]
    assert len(errors) == len(words), errors
    for error, expected in zip(errors, words, strict=True):
        assert all(word in error for word in expected), error


def test_streaming_takes_the_files_that_fetching_takes(ask: Ask):
    entry = {"id": "org/lines", "files": ["*.jsonl"]}
    whole, streamed = ask((entry, {}), (entry, {"streaming": True, "max_samples": 4}))
    assert Path(whole).name == "train.jsonl"
    rows = [json.loads(line) for line in Path(streamed).read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["0", "1", "2", "3"]
    (error,) = ask(({"id": "org/lines", "files": ["*.csv"]}, {"streaming": True}))
    assert "holds no data file like *.csv of split train" in error


def test_a_set_made_by_a_script_comes_from_the_hubs_conversion(server: Hub, ask: Ask):
    found = ask(
        ({"id": "org/script"}, {}),  # no data file of its own: read through datasets without being asked
        ({"id": "org/script"}, {"subset": "other"}),
        ({"id": "org/script", "revision": "refs/convert/parquet", "streaming": True}, {"max_samples": 1}),
        ({"id": "org/script"}, {"subset": "none"}),
        ({"id": "org/script", "revision": "v1"}, {}),
    )
    assert [numbers(path) for path in found[:3]] == [[5, 6], [7], [5]]
    assert found[3].startswith(
        "DataError: mine: org/script: Hugging Face's conversion has no none/train; name `subset`"
    )
    assert "default/train, other/partial-train" in found[3]
    assert "leave out `revision: v1`" in found[4]
    assert not any(path.endswith(".py") and server.asked.count(path) for path in server.asked if "never" in path)


def test_a_folder_of_the_same_name_is_not_read_instead(ask: Ask, tmp_path: Path):
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "train.jsonl").write_text('{"messages": []}\n')
    (path,) = ask(({"id": "org/set", "subset": "en"}, {}))
    assert numbers(path) == [90]


def test_nothing_half_read_is_kept(ask: Ask, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(SETS["org/set"]["a" * 40], "zh/train-3.parquet", b"PAR1 damaged")
    (error,) = ask(({"id": "org/set", "subset": "zh"}, {}))
    assert error.startswith("DownloadError: mine: org/set could not be read through `datasets`: ")
    assert not list((tmp_path / "cache").rglob("rows*"))
    (path,) = ask(({"id": "org/set", "subset": "zh"}, {"streaming": True, "max_samples": 6}))
    assert numbers(path) == [10, 11, 12, 20, 21, 22]
