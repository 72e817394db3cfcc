"""Links: a folder's own files are read, and nothing to which a link leads out of it, wherever a folder is read."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model, write_folder
from tuned import make_tuned

from mlx_zh.corpus import llama_factory
from mlx_zh.corpus.contamination import read_questions
from mlx_zh.corpus.data_files import _chosen, folder_files
from mlx_zh.corpus.reader import check_file as check_data_file
from mlx_zh.errors import AdapterError, DataError, MlxZhError, ModelError, UploadError
from mlx_zh.exams.catalog import benchmark
from mlx_zh.exams.exam import load_benchmark, load_exam
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.models.export import licences, upload
from mlx_zh.models.export.folder_files import write_tokenizer
from mlx_zh.models.export.source import open_source
from mlx_zh.models.identity import fingerprint_of
from mlx_zh.models.load import load_config, load_model, load_tokenizer, resolve_model
from mlx_zh.pipeline.state import _files
from mlx_zh.recipe import DataSet
from mlx_zh.system.digests import FileDigests
from mlx_zh.system.hub_folders import check_digests
from mlx_zh.system.links import check_file, check_folder, is_readable, target_outside

SECRET = "PRIVATE KEY of the user"
ROW = '{"instruction": "a", "output": "b"}\n'
EXAM = "id,question,A,B,C,D,answer\n0,问题一二三四五六七八九十,甲,乙,丙,丁,A\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the user's, with a secret file and a secret folder."""
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    (home / "key").write_text(SECRET)
    for name in ("key.csv", "law_dev.csv", "law_val.csv"):
        (home / "folder" / name).write_text(EXAM)
    return home


# ---- the one decision


def test_what_is_inside(tmp_path: Path, home: Path):
    folder = tmp_path / "stranger"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("x")
    for name, target in {
        "same": "a",
        "up-and-down": "sub/../a",
        "absolute": str(folder / "a"),
        "gone": "nothing",
        "loop": "loop",
    }.items():
        (folder / name).symlink_to(target)
        assert target_outside(folder, folder / name) is None, name
    (folder / "first").symlink_to("second")
    (folder / "second").symlink_to(home / "key")
    (folder / "climb").symlink_to("../home/key")
    (folder / "through").symlink_to(home / "folder")
    key = home / "key"
    leaders = {"first": key, "second": key, "climb": key, "through": home / "folder"}
    leaders |= {"through/key.csv": home / "folder" / "key.csv", "../home/key": key, "sub/../../home/key": key}
    for name, target in leaders.items():
        assert target_outside(folder, folder / name) == target, name
        assert not is_readable(folder, folder / name)
        with pytest.raises(DataError, match=r"is a link out of the folder, to .*home/"):
            check_file(folder, folder / name, DataError)


def test_a_folder_with_the_same_beginning_is_outside(tmp_path: Path):
    for name in ("model", "model-private"):
        (tmp_path / name).mkdir()
    (tmp_path / "model-private" / "key").write_text(SECRET)
    (tmp_path / "model" / "vocab.json").symlink_to("../model-private/key")
    assert target_outside(tmp_path / "model", tmp_path / "model" / "vocab.json") is not None


def test_a_folder_that_is_reached_by_links(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a").write_text("x")
    (tmp_path / "one").symlink_to("disk")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert is_readable(tmp_path / "two", tmp_path / "two" / "a")
    check_folder(tmp_path / "two", DataError)


def snapshot(cache: Path, kind: str = "models") -> tuple[Path, Path]:
    """An empty snapshot in the layout of Hugging Face's cache, and the folder `blobs`."""
    repository = cache / f"{kind}--org--name"
    revision = repository / "snapshots" / ("0" * 40)
    revision.mkdir(parents=True)
    (repository / "blobs").mkdir()
    return revision, repository / "blobs"


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_the_hub_caches_own_layout(tmp_path: Path, home: Path, kind: str):
    folder, blobs = snapshot(tmp_path / "hub", kind)
    (blobs / "f00d").write_text(ROW)
    (folder / "data").mkdir()
    (folder / "a.jsonl").symlink_to("../../blobs/f00d")
    (folder / "data" / "b.jsonl").symlink_to("../../../blobs/f00d")
    check_folder(folder, DataError)
    check_folder(folder / "data", DataError)
    assert [path.name for path in folder_files(folder)] == ["a.jsonl", "b.jsonl"]
    (folder / "c.jsonl").symlink_to("../../refs")
    (folder / "d.jsonl").symlink_to(home / "key")
    assert [name for name in "abcd" if target_outside(folder, folder / f"{name}.jsonl")] == ["c", "d"]


def test_blobs_that_are_themselves_a_link_are_outside(tmp_path: Path, home: Path):
    folder, blobs = snapshot(tmp_path / "hub")
    blobs.rmdir()
    blobs.symlink_to(home)
    (folder / "vocab.json").symlink_to("../../blobs/key")
    assert target_outside(folder, folder / "vocab.json") == home / "key"


def test_a_folder_named_snapshots_is_no_cache(tmp_path: Path):
    folder = tmp_path / "work" / "snapshots" / "today"
    folder.mkdir(parents=True)
    (tmp_path / "work" / "blobs").mkdir()
    (tmp_path / "work" / "blobs" / "key").write_text(SECRET)
    (folder / "a").symlink_to("../../blobs/key")
    assert target_outside(folder, folder / "a") is not None


NAMES = st.sampled_from(["a", "b", "folder", "..", "."])


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.lists(NAMES, min_size=1, max_size=5)), max_size=3))
def test_no_chain_of_links_reads_what_is_outside(links: list[tuple[str, list[str]]]):
    """Whatever links a folder holds: a file that may be read holds the folder's own text."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        inside = top / "a" / "folder"
        inside.mkdir(parents=True)
        for folder, text in ((inside, "own"), (top, SECRET), (top / "a", SECRET)):
            (folder / "b").write_text(text)
        (inside / "folder").mkdir()
        for name, parts in links:
            if not os.path.lexists(inside / name):
                (inside / name).symlink_to("/".join(parts))
        for path in inside.iterdir():
            if is_readable(inside, path):
                assert path.read_text() == "own"


def test_pipes_and_sockets_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(DataError, match=f"{name} is a pipe, a socket or a device. Give a file"):
            check_file(tmp_path, tmp_path / name, DataError)
    with pytest.raises(DataError, match="pipe is a pipe"):
        check_data_file(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is a pipe"):
        FileDigests(tmp_path / "cache.json").digests([str(tmp_path / "pipe")])
    with pytest.raises(UploadError, match="/dev/null is a pipe, a socket or a device"):
        check_file(Path("/dev"), Path("/dev/null"), UploadError)


# ---- everything that reads a folder


def model(folder: Path) -> Path:
    config = tiny_config()
    return write_folder(folder / "model", config, tiny_model(config))


def gguf_folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    return folder / "model"


def adapter(folder: Path) -> Path:
    return make_tuned(folder).adapter


def data(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "own.jsonl").write_text(ROW)
    return folder / "data"


def saved_data(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(folder / "data"))
    return folder / "data"


def exam(folder: Path) -> Path:
    for split in ("dev", "val"):
        (folder / "exam" / split).mkdir(parents=True)
        (folder / "exam" / split / f"law_{split}.csv").write_text(EXAM)
    return folder / "exam"


def saved_files(folder: Path) -> Any:
    from mlx_zh.corpus.tables import saved_files as files

    return files(folder, None)


def ceval(folder: Path) -> Any:
    return load_benchmark(benchmark("ceval"), folder, split="val", shots=1)


def own_exam(folder: Path) -> Any:
    return load_exam(folder, split="val", shots=1)


Case = tuple[Callable[[Path], Path], Callable[[Path], Any], str, type[MlxZhError]]
READERS: dict[str, Case] = {
    "config": (model, load_config, "config.json", ModelError),
    "generation config": (model, load_config, "generation_config.json", ModelError),
    "weights": (model, lambda path: load_model(str(path)), "model.safetensors", ModelError),
    "fingerprint": (model, fingerprint_of, "model.safetensors", ModelError),
    "config's fingerprint": (model, fingerprint_of, "config.json", ModelError),
    "index": (model, lambda path: load_model(str(path)), "model.safetensors.index.json", ModelError),
    "tokenizer": (model, load_tokenizer, "tokenizer.json", ModelError),
    "vocabulary": (model, load_tokenizer, "vocab.json", ModelError),
    "template": (model, load_tokenizer, "chat_template.jinja", ModelError),
    "more templates": (model, load_tokenizer, "additional_chat_templates/tool.jinja", ModelError),
    "fusing": (model, lambda path: open_source(path, "m"), "LICENSE.txt", ModelError),
    "gguf": (gguf_folder, lambda path: resolve_model(str(path)), "model.gguf", ModelError),
    "adapter": (adapter, read_adapter, "adapters.safetensors", AdapterError),
    "adapter config": (adapter, read_adapter, "adapter_config.json", AdapterError),
    "peft": (adapter, read_adapter, "adapter_model.safetensors", AdapterError),
    "data": (data, folder_files, "more.jsonl", DataError),
    "tables": (data, lambda path: folder_files(path, ["*.csv"]), "deep/more.csv", DataError),
    "hub data": (
        data,
        lambda path: _chosen("x", path, DataSet(hub="file", id="a", kind="sft")),
        "more.jsonl",
        DataError,
    ),
    "saved data": (saved_data, saved_files, "state.json", DataError),
    "saved rows": (saved_data, saved_files, "data-00000-of-00001.arrow", DataError),
    "exam": (exam, own_exam, "val/law_val.csv", DataError),
    "worked examples": (exam, own_exam, "dev/law_dev.csv", DataError),
    "subjects": (exam, own_exam, "subjects.json", DataError),
    "benchmark": (exam, ceval, "val/law_val.csv", DataError),
    "contamination": (exam, lambda path: read_questions(path, "exam"), "val/law_val.csv", DataError),
    "one exam file": (
        exam,
        lambda path: load_exam(path / "val" / "law_val.csv", split=None, shots=1),
        "dev/law_dev.csv",
        DataError,
    ),
    "upload": (data, lambda path: upload.push(path, "me/x", "huggingface", public=False), "LICENSE", UploadError),
}


@pytest.mark.parametrize("way", ["link", "chain", "folder", "socket"])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_a_folder_refuses(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
):
    build, read, entry, error = READERS[name]
    if way == "socket" and name in ("hub data", "worked examples", "one exam file"):
        pytest.skip("these look for a file, and a socket is none")
    folder = build(tmp_path)
    path = folder / entry
    if way == "folder" and name in ("upload", "data", "hub data", "gguf", "more templates", "tables"):
        pytest.skip("the entry is in no folder of its own, or a folder of that name is not entered")
    if way == "folder" and path.parent != folder:
        path = path.parent  # the folder that holds the entry is the link
        outside = home / "folder"
        os.rename(path, tmp_path / "aside")
        path.symlink_to(outside)
    elif way == "folder":
        path.unlink(missing_ok=True)
        path.symlink_to(home / "folder")
    else:
        path.parent.mkdir(exist_ok=True)
        kept = tmp_path / "kept"  # the same content, so that only the link is wrong with it
        if path.exists():
            path.rename(kept)
        else:
            kept.write_text(SECRET)
        if way == "socket":
            monkeypatch.chdir(path.parent)  # the name of a socket must be short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        elif way == "link":
            path.symlink_to(kept)
        else:
            (folder / ".hidden").symlink_to(kept)
            path.symlink_to(os.path.relpath(folder / ".hidden", path.parent))
    if way == "folder" and name == "contamination":
        with pytest.raises(DataError):  # a linked folder is not entered; the exam is not complete without it
            ceval(folder)
        return
    expected = "is a pipe, a socket" if way == "socket" else "is a link out of the folder"
    with pytest.raises(error, match=expected):
        read(folder)


@pytest.mark.parametrize(
    "name", [".kept.safetensors", "../kept.safetensors", "/kept.safetensors", "a/kept.safetensors"]
)
def test_an_index_names_only_visible_files_of_its_folder(tmp_path: Path, name: str):
    folder = model(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "kept.safetensors")
    (folder / ".kept.safetensors").symlink_to(tmp_path / "kept.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="its weight_map is not usable"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["../tokenizer.4.0.json", "tokenizer.4.0.json"])
def test_a_tokenizer_of_another_name_is_not_read(tmp_path: Path, name: str):
    """Transformers takes the file of the highest version that `fast_tokenizer_files` lists, wherever it is."""
    folder = model(tmp_path)
    shutil.copy(folder / "tokenizer.json", folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": [name]}))
    with pytest.raises(ModelError, match="fast_tokenizer_files names other files"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": ["tokenizer.json"]}))
    load_tokenizer(folder)


def test_links_inside_are_copied_as_files(tmp_path: Path):
    folder = model(tmp_path)
    (folder / "LICENSE.real").write_text("the text")
    (folder / "LICENSE").symlink_to("LICENSE.real")
    base = open_source(folder, "someone/something")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, base)
    licences.write_licence_files(out, licences.find_licence(base), base)
    assert (out / "LICENSE").read_text() == "the text" and not (out / "LICENSE").is_symlink()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "USE_POLICY.md", "vocab.json", "merges.txt"])
def test_a_link_made_after_opening_is_not_copied(tmp_path: Path, home: Path, name: str):
    folder = model(tmp_path)
    base = open_source(folder, "someone/something")
    (folder / name).symlink_to(home / "key")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match="is a link out of the folder"):
        write_tokenizer(out, base)
        licences.write_licence_files(out, licences.find_licence(base), base)
    assert not any(SECRET in path.read_text(errors="ignore") for path in out.iterdir())


def test_a_snapshot_is_not_mended_through_a_link_that_leads_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A damaged file of the cache is removed; a file elsewhere whose name is a SHA-256 is not."""
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    folder, _ = snapshot(tmp_path / "hub")
    (tmp_path / ("a" * 64)).write_text("the user's")
    (folder / "model.safetensors").symlink_to(tmp_path / ("a" * 64))
    check_digests(folder)
    assert (tmp_path / ("a" * 64)).read_text() == "the user's"


def test_a_digest_of_a_folder_leaves_out_what_is_outside(tmp_path: Path, home: Path):
    folder = data(tmp_path)
    (folder / "key").symlink_to(home / "key")
    os.mkfifo(folder / "pipe")
    assert list(_files(folder)) == [folder / "own.jsonl"]


def test_a_table_of_llama_factory_names_no_link_out(tmp_path: Path, home: Path):
    folder = data(tmp_path)
    (folder / "key.json").symlink_to(home / "key")
    table = folder / "dataset_info.json"
    table.write_text(json.dumps({"own": {"file_name": "own.jsonl"}, "key": {"file_name": "key.json"}}))
    own, key = llama_factory.read_entries(table)
    assert own.guess is not None and key.guess is None and "is a link out of the folder" in key.reason
