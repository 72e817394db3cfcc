"""Folders that `datasets` saved: found, read a batch at a time, and named by file and row where they are damaged."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, Features, LargeList, Sequence, Value

import mlx_zh
from mlx_zh.corpus import tables
from mlx_zh.corpus.data_files import folder_files
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.tables import is_saved, read_arrow, saved_files
from mlx_zh.errors import DataError


def asked(*numbers: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"第{n}问", "response": f"第{n}答"} for n in numbers])


def responses(files: list[Path]) -> list[str]:
    return [row["response"] for path in files for _, row in read_arrow(path)]


def test_a_saved_set_in_the_order_of_its_rows(tmp_path: Path):
    folder = tmp_path / "saved"
    asked(*range(5)).select([4, 2, 0]).save_to_disk(str(folder), num_shards=2)
    assert is_saved(folder) and not is_saved(tmp_path)
    files = saved_files(folder, None)
    assert [path.name for path in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert responses(files) == ["第4答", "第2答", "第0答"]
    assert [place for place, _ in read_arrow(files[0])] == [f"{files[0]}[0]", f"{files[0]}[1]"]
    (first, _), report = load_conversations(files[0])
    assert [m.content for m in first.messages] == ["第4问", "第4答"] and report.format == "prompt-response"


def test_the_splits_of_a_saved_set(tmp_path: Path):
    DatasetDict({"train": asked(1, 2), "held": asked(3)}).save_to_disk(str(tmp_path))
    assert is_saved(tmp_path)
    assert responses(saved_files(tmp_path, None)) == ["第1答", "第2答"]
    assert responses(saved_files(tmp_path, "held")) == ["第3答"]
    with pytest.raises(DataError, match=r"without the split 'test'\. It has train, held; write .*split: train\}"):
        saved_files(tmp_path, "test")
    asked(1).save_to_disk(str(tmp_path / "one"))
    assert responses(saved_files(tmp_path / "one", "train")) == ["第1答"]
    with pytest.raises(DataError, match="without splits; leave out `split: test`"):
        saved_files(tmp_path / "one", "test")


MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好！"}]
FEATURES = {
    "list of structs": [{"role": Value("string"), "content": Value("string")}],
    "large": LargeList({"role": Value("large_string"), "content": Value("large_string")}),
    "struct of lists": Sequence({"role": Value("string"), "content": Value("string")}),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_messages_of_every_type_that_datasets_gives_them(tmp_path: Path, kind: str):
    given = {name: [m[name] for m in MESSAGES] for name in ("role", "content")} if kind[:2] == "st" else MESSAGES
    features = Features({"id": Value("int64"), "messages": FEATURES[kind]})
    Dataset.from_list([{"id": 7, "messages": given}], features=features).save_to_disk(str(tmp_path))
    (path,) = saved_files(tmp_path, None)
    (conversation,), _ = load_conversations(path)
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "你好"), ("assistant", "您好！")]


def test_messages_as_an_object_of_lists_or_as_json_text(write):
    """`datasets` writes the one into JSON lines, and tables have the other."""
    lists = {"role": ["user", "assistant"], "content": ["a", "b"]}
    for value in (
        lists,
        json.dumps(lists),
        json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]),
    ):
        [conversation], _ = load_conversations(write(json.dumps({"messages": value}) + "\n"))
        assert [message.content for message in conversation.messages] == ["a", "b"]
    for value, what in (
        ({"role": ["user"], "content": ["a", "b"]}, "a object"),
        ("[{'role': 'user'}]", "json.dumps"),
    ):
        with pytest.raises(DataError, match=rf"'messages' (must be a list of messages, got {what}|.*{what})"):
            load_conversations(write(json.dumps({"messages": value}) + "\n"))


def test_preferences_and_their_errors_by_row(tmp_path: Path):
    rows = [{"question": "q", "chosen": "a", "rejected": r} for r in ("b", None, "a")]
    Dataset.from_list(rows).save_to_disk(str(tmp_path))
    (path,) = saved_files(tmp_path, None)
    with pytest.raises(DataError, match=r"2 of 3 rows(.|\n)*arrow\[1\]: 'rejected' is null\n.*arrow\[2\]: the cho"):
        load_preferences(path)


def test_damaged_folders(tmp_path: Path):
    asked(*range(50)).save_to_disk(str(tmp_path), num_shards=2)
    last = tmp_path / "data-00001-of-00002.arrow"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow\[\d+\]: the Arrow file is damaged"):
        list(read_arrow(last))
    last.unlink()
    with pytest.raises(DataError, match=r"cannot open this saved data set: .*It is empty or damaged; save it again"):
        saved_files(tmp_path, None)
    with pytest.raises(DataError, match="no such file"):
        list(read_arrow(last))
    (tmp_path / "sub").mkdir()
    asked(1).save_to_disk(str(tmp_path / "sub"))
    state = (tmp_path / "sub" / "state.json").read_text().replace("data-00000-of-00001", "../data-00000-of-00002")
    (tmp_path / "sub" / "state.json").write_text(state)
    with pytest.raises(
        DataError, match=r"state\.json names .*data-00000-of-00002\.arrow, which is not in the folder"
    ):
        saved_files(tmp_path / "sub", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="names no splits"):
        saved_files(tmp_path, None)


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """What Python and Arrow allocate; pages of the mapped file can be given back at any time."""
    Dataset.from_dict({"text": ["答" * 300] * 30_000}).save_to_disk(str(tmp_path))  # 27 MB
    (path,) = saved_files(tmp_path, None)
    before, arrow = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()
    for number, _ in enumerate(read_arrow(path)):
        if number % 1000 == 0:
            arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 29_999 and peak < 8 << 20 and arrow < 8 << 20


def test_only_one_module_imports_datasets_and_only_inside_functions():
    root = Path(mlx_zh.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "datasets" for name in names):
                found.append((path, node in tree.body))
    assert found == [(Path(tables.__file__), False)]


def test_json_and_csv_do_not_import_datasets(write):
    paths = [str(write('{"prompt": "a", "response": "b"}\n')), str(write("prompt,response\na,b\n", "data.csv"))]
    script = (
        "import sys; from pathlib import Path; import mlx_zh.stages.data; "
        "from mlx_zh.corpus.formats import load_conversations\n"
        "for path in sys.argv[1:]: assert len(load_conversations(Path(path))[0]) == 1\n"
        "sys.exit('datasets' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, *paths], timeout=120).returncode == 0


def test_a_bare_file_of_the_cache_of_datasets(tmp_path: Path):
    """`map` and `load_dataset` leave such files in a folder without a state.json."""
    asked(1, 2).map(lambda row: row, cache_file_name=str(tmp_path / "cache-0.arrow"))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert not is_saved(tmp_path)
    [path] = folder_files(tmp_path)
    assert [talk.messages[1].content for talk in load_conversations(path)[0]] == ["第1答", "第2答"]
