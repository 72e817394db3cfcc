"""From files to examples on disk: what is kept, what is dropped and why, and that nothing unfinished is served."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_zh.corpus import build, finishing, json_rows, scan, scanning, shards, text_files
from mlx_zh.corpus.build import prepare
from mlx_zh.corpus.choosing import ChoiceSettings
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.prepared import Corpus, CorpusSettings, Exams
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError, TemplateError
from mlx_zh.stages.tokenizer_cache import SnapshotTokenizer, save_snapshot, save_vocabulary

SFT = CorpusSettings(
    RenderSettings("sft", "assistant", 400, "truncate", None), ChoiceSettings(), Exams({}, {}), on_invalid="error"
)
DPO = replace(SFT, render=RenderSettings("dpo", "assistant", 400, "drop", None))
CHARACTERS = [chr(code) for code in range(0x4E00, 0x5600)]


def said(rng: random.Random, size: int = 40) -> str:
    return "".join(rng.choices(CHARACTERS, k=size))


def row(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [row(said(rng, 20), said(rng, 40)) for _ in range(count)]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., DataSource]:
    """Write rows as JSON lines and return them as a source of that name."""

    def save(name: str, content: list[Any] | bytes, **options: Any) -> DataSource:
        path = tmp_path / f"{name}.jsonl"
        if not isinstance(content, bytes):
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content).encode()
        path.write_bytes(content)
        return DataSource(name, (str(path),), **options)

    return save


@pytest.fixture
def renderer(tokenizer_of) -> Renderer:
    return Renderer(tokenizer_of("llama3"))


@pytest.fixture
def run(tmp_path: Path, renderer: Renderer) -> Callable[..., Corpus]:
    def run(*sources: DataSource, settings: CorpusSettings = SFT) -> Corpus:
        return prepare(sources, settings, renderer, tmp_path / "cache", lambda *_: None)

    return run


def told(corpus: Corpus, name: str) -> dict[str, Any]:
    return next(source for source in corpus.manifest["report"]["sources"] if source["name"] == name)


def left(folder: Path) -> list[str]:
    """What a failed run leaves in the cache folder, less the memory of file digests and locks."""
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [name for name in found if name != "fingerprints.json" and not name.endswith(".lock")]


# ---- examples


def test_examples_are_what_the_renderer_gives(save, run, renderer: Renderer):
    given = rows(700)
    corpus = run(save("a", given))
    examples = corpus.conversations("train")
    expected = renderer.conversations(
        [[Message("user", r["instruction"]), Message("assistant", r["output"])] for r in given], max_length=400
    )
    assert len(examples) == len(expected) == 700
    for found, one in zip(examples, expected, strict=True):
        assert one is not None
        np.testing.assert_array_equal(found.tokens, one.tokens)
        np.testing.assert_array_equal(found.trained, one.trained)
    assert examples.lengths.tolist() == [len(one.tokens) for one in expected if one is not None]
    assert examples.scored.tolist() == [int(one.trained[1:].sum()) for one in expected if one is not None]
    assert examples[3:5][1].tokens.tolist() == examples[4].tokens.tolist() == examples[-696].tokens.tolist()
    assert not examples[0].tokens.flags.owndata  # a view of the file
    with pytest.raises(IndexError, match="example 700 of 700"):
        examples[700]
    assert len(corpus.conversations("validation")) == 0


def test_pairs_are_what_the_renderer_gives(save, run, renderer: Renderer):
    from mlx_zh.corpus.conversation import Preference

    rng = random.Random(1)
    given = [{"system": "", "question": said(rng), "chosen": said(rng), "rejected": said(rng)} for _ in range(60)]
    pairs = run(save("orca", given), settings=DPO).pairs("train")
    expected = renderer.preferences(
        [Preference((Message("user", r["question"]),), r["chosen"], r["rejected"], "") for r in given]
    )
    for found, one in zip(pairs, expected, strict=True):
        assert one is not None
        for name in ("prompt", "chosen", "rejected"):
            np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
    assert pairs.lengths.tolist() == [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]


def test_datasets_opens_the_folder_too(save, run):
    datasets = pytest.importorskip("datasets")
    corpus = run(save("a", rows(20)))
    opened = datasets.load_from_disk(str(corpus.folder))
    assert opened.column_names == ["tokens", "trained", "scored", "truncated", "source", "row", "segments"]
    assert opened[7]["tokens"] == corpus.conversations("train")[7].tokens.tolist()
    assert opened[7]["truncated"] is False


def test_a_system_message_and_what_is_trained_on(save, run, renderer: Renderer):
    source = save("a", rows(3))
    settings = replace(SFT, render=RenderSettings("sft", "all", 400, "truncate", "你是助手"))
    example = run(source, settings=settings).conversations("train")[0]
    assert "你是助手" in renderer.decode(example.tokens.tolist())
    assert example.trained.tolist() == [False] + [True] * (len(example.tokens) - 1)


# ---- what is dropped


def test_rows_are_counted_by_what_became_of_them(save, run):
    rng = random.Random(3)
    long = row(said(rng), said(rng, 2000))
    base = rows(10)
    near = row(base[0]["instruction"], base[0]["output"][:-1] + "的")
    listed = [*base, base[1], near, long, {"instruction": "没有答案"}, row("问", " ")]
    corpus = run(save("a", listed), save("b", [base[2], *rows(5, seed=9)]), settings=replace(SFT, on_invalid="skip"))
    assert told(corpus, "a")["dropped"] == {
        "missing field": 1,
        "empty reply": 1,
        "duplicate": 1,
        "near duplicate": 1,
        "first exchange longer than max_length": 1,
    }
    assert (told(corpus, "a")["rows"], told(corpus, "a")["train"]) == (15, 10)
    assert told(corpus, "b")["dropped"] == {"duplicate": 1}
    (repeated,) = told(corpus, "b")["examples"]["duplicate"]
    assert repeated.endswith("a.jsonl:3") and "b.jsonl:1 repeats" in repeated
    assert corpus.manifest["report"]["over_long"] == 1


def test_what_counts_as_a_duplicate_can_be_said(save, run):
    base = rows(5)
    near = row(base[0]["instruction"], base[0]["output"][:-1] + "的")
    source = save("a", [*base, base[0], near])

    def kept(**options: Any) -> int:
        return len(run(source, settings=replace(SFT, choice=ChoiceSettings(**options))).conversations("train"))

    assert (kept(), kept(near=None), kept(near=None, exact=False), kept(near=1.0)) == (5, 6, 7, 6)
    with_other_system = [
        {"messages": [{"role": "system", "content": s}, *t]} for s in "甲乙" for t in [talk(base[0])]
    ]
    assert len(run(save("b", with_other_system)).conversations("train")) == 1
    arithmetic = save("c", [row("请计算", "1+1=2"), row("请计算", "1+1=2。")], near_duplicates=False)
    assert len(run(arithmetic).conversations("train")) == 2


def talk(given: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": given["instruction"]}, {"role": "assistant", "content": given["output"]}]


def test_other_spellings_are_duplicates(save, run):
    source = save("a", [row("Ｈｅｌｌｏ１２", "你好\r\n朋友"), row("Hello12", "你好\n朋友\u200b")])
    assert told(run(source), "a")["dropped"] == {"duplicate": 1}
    plain = replace(SFT, normalize=False, choice=ChoiceSettings(near=None))
    assert told(run(source, settings=plain), "a")["dropped"] == {}


def test_traditional_rows_are_simplified_on_request(save, run, renderer: Renderer):
    pytest.importorskip("opencc")
    corpus = run(save("a", [row("頭髮", "漢語")]), settings=replace(SFT, simplify=True))
    assert "头发" in renderer.decode(corpus.conversations("train")[0].tokens.tolist())


REFUSAL = "很抱歉，我无法回答这个问题。"


def test_quality_rules_count_mask_and_drop(save, run, renderer: Renderer):
    given = [row("今天几号？", REFUSAL), row("联系方式是什么？", "电话是13912345678。"), *rows(3)]
    source = save("a", given)
    counted = run(source)
    assert told(counted, "a")["quality"]["refusal"] == {
        "action": "sample", "checked": 5, "rows": 1, "examples": [f"{source.files[0]}:1: 很抱歉，我无法"]
    }  # fmt: skip
    assert len(counted.conversations("train")) == 5 and "quality" not in counted.manifest["made_of"]["settings"]

    changed = run(source, settings=replace(SFT, quality={"refusal": "drop", "personal": "mask"}))
    assert changed.key != counted.key
    assert told(changed, "a")["dropped"] == {"refusal": 1} and len(changed.conversations("train")) == 4
    texts = "".join(renderer.decode(example.tokens.tolist()) for example in changed.conversations("train"))
    assert "10000000001" in texts and "13912345678" not in texts
    assert "13912345678" not in json.dumps(changed.manifest)


def test_a_corpus_whose_rows_all_have_the_fault(save, run):
    with pytest.raises(DataError, match="nothing is left to learn from in a \\(1 refusal\\)"):
        run(save("a", [row("今天几号？", REFUSAL)]), settings=replace(SFT, quality={"refusal": "drop"}))


def test_what_validates_is_never_learned(save, run):
    """Rows that the validation files hold too are taken out of training, wherever these stand."""
    base = rows(6)
    near = row(base[1]["instruction"], base[1]["output"][:-1] + "的")
    corpus = run(save("train", [base[0], near, *base[2:]]), save("held", base[:2], validation=True))
    assert told(corpus, "train")["dropped"] == {"also in the validation set": 2}
    assert (len(corpus.conversations("train")), len(corpus.conversations("validation"))) == (4, 2)


def test_exam_questions_are_dropped_and_listed(save, run, tmp_path: Path):
    rng = random.Random(5)
    question = said(rng, 40)
    folder = tmp_path / "exam" / "val"
    folder.mkdir(parents=True)
    (folder / "law_val.csv").write_text(f"id,question,A,B,C,D,answer\n0,{question},甲,乙,丙,丁,A\n", encoding="utf-8")
    source = save("a", [*rows(4), row(f"请回答：{question}", "甲")])
    corpus = run(source, settings=replace(SFT, exams=Exams({"ceval": str(folder.parent)}, {"cmmlu": "no network"})))
    assert told(corpus, "a")["dropped"] == {"exam question": 1}
    report = corpus.manifest["report"]
    assert report["exam_rows"] == [{"row": f"{source.files[0]}:5", "question": "ceval val/law_val 1", "overlap": 1.0}]
    assert report["exam_questions"] == {
        **{"exams": ["ceval"], "missing": {"cmmlu": "no network"}, "questions": 1, "checked": 1},
    }
    (folder / "law_val.csv").write_text(
        "id,question,A,B,C,D,answer\n0,另一道题目而已,甲,乙,丙,丁,A\n", encoding="utf-8"
    )
    assert run(source, settings=replace(SFT, exams=Exams({"ceval": str(folder.parent)}, {}))).key != corpus.key


def test_nothing_is_left(save, run, tmp_path: Path):
    source = save("a", [row("问", "答" * 5000)])
    with pytest.raises(DataError, match=r"nothing is left to learn from in a \(1 first exchange longer than"):
        run(source)
    assert left(tmp_path / "cache") == []


# ---- mixing and splitting


def test_growing_a_set_moves_no_example_between_splits(save, run):
    settings = replace(SFT, choice=ChoiceSettings(validation_fraction=0.2))

    def split(count: int) -> tuple[set[str], set[str]]:
        corpus = run(save("a", rows(count)), settings=settings)
        return tuple({str(e.tokens.tolist()) for e in corpus.conversations(s)} for s in ("train", "validation"))  # type: ignore[return-value]

    (train, held), (more, more_held) = split(100), split(300)
    assert train < more and held < more_held and len(held) > 5
    assert not more & more_held


def test_one_prompt_lies_on_one_side(save, run):
    rng = random.Random(2)
    prompts = [said(rng) for _ in range(60)]
    source = save("a", [row(prompt, said(rng)) for prompt in prompts for _ in range(3)])
    corpus = run(source, settings=replace(SFT, choice=ChoiceSettings(validation_fraction=0.3)))
    assert len(corpus.conversations("validation")) % 3 == 0 < len(corpus.conversations("validation"))


def test_weights_and_max_samples(save, run):
    sources = save("a", rows(40, 1), weight=2.0, max_samples=10), save("b", rows(40, 2), max_samples=30, weight=0.5)
    corpus = run(*sources)
    assert np.bincount(corpus.conversations("train").sources).tolist() == [20, 15]
    assert told(corpus, "a")["dropped"] == {"beyond max_samples": 30}
    mixed = run(*sources, settings=replace(SFT, choice=ChoiceSettings(mixing="interleave")))
    assert np.bincount(mixed.conversations("train").sources).tolist() == [10, 2]  # shares of 2 : 0.5


def test_the_generator_is_a_source(run, renderer: Renderer):
    corpus = run(DataSource("sums", (), generate=(7, 50), near_duplicates=False))
    text = renderer.decode(corpus.conversations("train")[0].tokens.tolist())
    assert "请一步一步计算：" in text and "=" in text
    assert len(corpus.conversations("train")) + sum(told(corpus, "sums")["dropped"].values()) == 50


# ---- the cache


def test_a_second_run_finds_it(save, run, monkeypatch):
    source = save("a", rows(50))
    first = run(source)
    assert not first.ready
    monkeypatch.setattr(build, "_build", None)  # must not be called
    begun = time.perf_counter()
    again = run(source)
    assert time.perf_counter() - begun < 2
    assert again.ready and again.key == first.key and len(again.conversations("train")) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"on_invalid": "skip"},
        {"normalize": False},
        {"near_ngram": 4},
        {"choice": ChoiceSettings(seed=7)},
        {"render": RenderSettings("sft", "last", 400, "truncate", None)},
    ],
    ids=str,
)
def test_other_settings_are_another_corpus(save, run, change: dict[str, Any]):
    source = save("a", rows(5))
    assert run(source, settings=replace(SFT, **change)).key != run(source).key


def test_other_content_is_another_corpus(save, run, tokenizer_of, tmp_path: Path):
    source = save("a", rows(5))
    first = run(source)
    os.utime(source.files[0], (1, 1))
    assert run(source).key == first.key  # another time is not another content
    save("a", rows(5, seed=8))
    assert run(source).key != first.key
    other = Renderer(tokenizer_of("llama3"), date_string="1 Jan 2025")
    assert prepare([source], SFT, other, tmp_path / "cache", lambda *_: None).key != run(source).key


def test_large_sources_are_read_in_processes_of_their_own(save, run, renderer, monkeypatch, tmp_path: Path):
    sources = save("a", rows(30, 1)), save("b", rows(40, 2), validation=True)
    alone = run(*sources)
    texts = [example.tokens.tolist() for example in alone.conversations("train")]
    monkeypatch.setattr(scanning, "_LARGE", 0)
    for path in (tmp_path / "cache").glob(alone.key):
        path.rename(tmp_path / "elsewhere")
    seen: list[tuple[str, int]] = []
    apart = prepare(sources, SFT, renderer, tmp_path / "cache", lambda what, name, n: seen.append((name, n)))
    assert [example.tokens.tolist() for example in apart.conversations("train")] == texts
    assert ("a", 30) in seen and ("b", 40) in seen

    bad = save("c", [row("问", "答"), {"instruction": 3, "output": "x"}])
    with pytest.raises(DataError, match=r"c\.jsonl:2: 'instruction' must be text, got a number"):
        run(sources[0], bad)
    assert left(tmp_path / "cache") == [alone.key]


def test_long_rows_are_held_in_small_batches_and_give_the_same_data(save, run, monkeypatch, tmp_path: Path):
    """Batches and spool files end when their characters are enough: 20 rows of 60 characters are ten parts of two."""
    source = save("a", rows(20))
    whole = run(source)
    expected = [example.tokens.tolist() for example in whole.conversations("train")]
    (tmp_path / "cache" / whole.key).rename(tmp_path / "elsewhere")

    monkeypatch.setattr(scan, "_PART_CHARACTERS", 120)
    monkeypatch.setattr(scan, "_BATCH_CHARACTERS", 60)
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 60)
    assert [example.tokens.tolist() for example in run(source).conversations("train")] == expected
    scan.scan(source, scan.ScanSettings("sft"), tmp_path / "scan", lambda *_: None)
    assert scan.open_scan(tmp_path / "scan", near=False).parts.tolist() == list(range(0, 20, 2))


# ---- interruption


def small_files(monkeypatch) -> None:
    for module, name, value in ((shards, "ROWS", 64), (scan, "PART", 32)):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("moment", ["scanning", "rendering", "finishing"])
def test_an_interrupted_run_is_taken_up_and_never_served(save, run, monkeypatch, tmp_path: Path, moment: str):
    """Interrupted anywhere, nothing is there to be served; the next run keeps what was finished."""
    small_files(monkeypatch)

    sources = save("a", rows(150, 1)), save("b", rows(150, 2))
    whole = run(*sources)
    expected = [example.tokens.tolist() for example in whole.conversations("train")]
    (tmp_path / "cache" / whole.key).rename(tmp_path / "whole")

    with monkeypatch.context() as patch:
        interrupt(patch, moment)
        with pytest.raises(KeyboardInterrupt):
            run(*sources)
    assert not (tmp_path / "cache" / whole.key).exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("data-*.arrow")}
    scanned = len(list((tmp_path / "cache").rglob("scan.json")))
    assert (scanned, len(done)) == {"scanning": (1, 0), "rendering": (2, 2), "finishing": (2, 5)}[moment]

    written: list[Path] = []
    original = shards._write
    monkeypatch.setattr(shards, "_write", lambda *a: (written.append(a[4]), original(*a))[1])
    again = run(*sources)
    assert len(written) == 5 - len(done)
    assert [example.tokens.tolist() for example in again.conversations("train")] == expected
    assert left(tmp_path / "cache") == [whole.key]


def interrupt(patch: Any, moment: str) -> None:
    calls = 0

    def after(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > count:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return wrapped

    if moment == "scanning":
        patch.setattr(scanning, "scan", after(1, scan.scan))
    elif moment == "rendering":
        patch.setattr(shards, "_write", after(2, shards._write))
    else:
        patch.setattr(finishing.statistics, "describe", after(0, None))  # type: ignore[arg-type]


def test_a_killed_run_leaves_nothing_to_be_served(save, tokenizer_of, tmp_path: Path):
    """`kill -9` in the middle; the folder under the key appears in one rename, or not."""
    source = save("a", rows(3000))
    save_snapshot(tokenizer_of("llama3"), tmp_path / "tokenizer")
    save_vocabulary(tmp_path / "tokenizer")
    script = (
        "import sys, pathlib\n"
        "from mlx_zh.corpus.choosing import ChoiceSettings\n"
        "from mlx_zh.corpus.build import prepare\n"
        "from mlx_zh.corpus.prepared import CorpusSettings, Exams\n"
        "from mlx_zh.corpus.render import Renderer\n"
        "from mlx_zh.corpus.shards import RenderSettings\n"
        "from mlx_zh.corpus.sources import DataSource\n"
        "from mlx_zh.stages.tokenizer_cache import SnapshotTokenizer\n"
        "file, folder = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        "settings = CorpusSettings(RenderSettings('sft', 'assistant', 400, 'truncate', None), ChoiceSettings(), "
        "Exams({}, {}))\n"
        "prepare([DataSource('a', (file,))], settings, Renderer(SnapshotTokenizer(folder / 'tokenizer')), "
        "folder / 'killed', lambda what, *_: print(what, flush=True))\n"
    )
    command = [sys.executable, "-c", script, source.files[0], str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("render"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("*.work")) != []
    assert list((tmp_path / "killed").glob("*/manifest.json")) == []


def test_a_tokenizer_survives_as_a_snapshot(tokenizer_of, renderer: Renderer, tmp_path: Path):
    save_snapshot(tokenizer_of("llama3"), tmp_path / "snapshot")
    save_vocabulary(tmp_path / "snapshot")
    again = Renderer(SnapshotTokenizer(tmp_path / "snapshot"))
    assert again.fingerprint == renderer.fingerprint
    talk = [Message("user", "你好"), Message("assistant", "你好！")]
    assert again.conversation(talk).tokens.tolist() == renderer.conversation(talk).tokens.tolist()  # type: ignore[union-attr]


# ---- bad input: named with file, row and remedy; nothing is left behind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "\n".join(['{"instruction": "问", "output": "答"}'] * 3).encode()
            + '\n{"instruction": "编码", "output": "混了"}\n'.encode("gbk"),
            ["bad.jsonl:4", "looks like GBK", "on_invalid=skip"],
        ),
        (b'{"instruction": "q", "output": "' + b"a" * 3_000_000 + b'"}\n', ["bad.jsonl:1", "is no row"]),
        (b'[{"instruction": "q", "output": "' + b"a" * 3_000_000 + b'"}]\n', ["bad.jsonl:1", "a value of more"]),
        (
            b'{"instruction": "q", "output": "a"}\n' * 2500 + b'{"instruction": "q", "output": {"a": 1}}\n',
            ["bad.jsonl:2501: 'output' must be text, got a object", "data.on_invalid=skip"],
        ),
        (b'{"conversations": [null]}\n', ["bad.jsonl:1", "'conversations'[0] must be an object"]),
        (b'{"conversations": [{"from": "human", "value": null}]}\n', ["bad.jsonl:1", "'value' is missing or null"]),
        (b'{"instruction": null, "output": null}\n', ["bad.jsonl:1", "'output' is null"]),
        (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}\n', ["bad.jsonl:1"]),
    ],
    ids=[
        "mixed encodings",
        "long line",
        "long value",
        "wrong type far down",
        "null turn",
        "null value",
        "nulls",
        "parts",
    ],
)
def test_bad_input_is_named(save, run, monkeypatch, tmp_path: Path, content: bytes, words: list[str]):
    for module in (json_rows, text_files):
        monkeypatch.setattr(module, "LONGEST", 1 << 20)
    good, bad = save("good", rows(5)), save("bad", content)
    with pytest.raises(DataError) as error:
        run(good, bad)
    for word in words:
        assert word in str(error.value)
    assert left(tmp_path / "cache") == []
    assert len(run(good).conversations("train")) == 5  # and nothing else was lost


def test_rows_with_mistakes_can_be_left_out_and_are_counted(save, run):
    listed = [
        row("问一", "答一"),
        {"instruction": 3, "output": "x"},
        {"conversations": [None]},
        "text",
        row("问二", "答二"),
    ]
    corpus = run(save("a", listed), settings=replace(SFT, on_invalid="skip"))
    assert told(corpus, "a")["dropped"] == {"wrong type": 2, "missing field": 1}
    assert len(corpus.conversations("train")) == 2


def test_a_file_that_is_not_there(run, tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        run(DataSource("a", (str(tmp_path / "none.jsonl"),)))


# ---- damage


def spoil(path: Path, how: str, at: float) -> None:
    """Remove a file, empty it, cut it short or flip one of its bits, at a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    place = min(int(at * len(content)), len(content) - 2)  # the last byte of a JSON file says nothing
    if how == "flipped":
        content[place] ^= 1 << (place % 8)
    else:
        del content[0 if how == "emptied" else place :]
    path.write_bytes(content)


HOW = st.sampled_from(["removed", "emptied", "cut short", "flipped"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), how=HOW, at=st.floats(0, 1))
def test_a_damaged_corpus_is_made_again(save, run, tmp_path: Path, data: st.DataObject, how: str, at: float):
    """Whatever happened to whichever of its files, and it is said in one line."""
    source = save("a", rows(40))
    whole = run(source)
    expected = [example.tokens.tolist() for example in whole.conversations("train")]
    names = ["manifest.json", *whole.manifest["digests"]]
    spoil(whole.folder / data.draw(st.sampled_from(names)), how, at)
    again = run(source)
    assert [remark.code for remark in again.remarks] == ["corpus-damaged"] and not again.ready
    assert [example.tokens.tolist() for example in again.conversations("train")] == expected
    assert left(tmp_path / "cache") == [whole.key]
    ready = run(source)
    assert ready.ready and ready.remarks == ()


@pytest.mark.parametrize("how", ["removed", "emptied", "cut short", "flipped"])
def test_what_an_interrupted_run_left_is_used_only_as_it_was_written(
    save, run, monkeypatch, tmp_path: Path, how: str
):
    """A power cut may take the ends of its files; each file in turn is spoilt."""
    small_files(monkeypatch)

    source = save("a", rows(150, 1))
    whole = run(source)
    expected = [example.tokens.tolist() for example in whole.conversations("train")]
    with monkeypatch.context() as patch:
        (tmp_path / "cache" / whole.key).rename(tmp_path / "whole")
        interrupt(patch, "rendering")
        with pytest.raises(KeyboardInterrupt):
            run(source)
    work = tmp_path / "cache" / f"{whole.key}.work"
    shutil.copytree(work, tmp_path / "kept")
    for file in sorted(path.relative_to(work) for path in work.rglob("*") if path.is_file()):
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(tmp_path / "kept", work)
        spoil(work / file, how, 0.5)
        assert [example.tokens.tolist() for example in run(source).conversations("train")] == expected, file
        assert left(tmp_path / "cache") == [whole.key]


def test_work_beside_a_finished_corpus_and_old_work_are_removed(save, run, tmp_path: Path):
    """A kill between the corpus's rename and the clean-up leaves it. Recent work of another corpus is kept."""
    whole = run(source := save("a", rows(40)))
    cache = tmp_path / "cache"
    for name, age in ((f"{whole.key}.work", 0.0), (f"{'0' * 32}.work", 0.0), (f"{'1' * 32}.work", 31 * 86400.0)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age, time.time() - age))
    assert run(source).ready
    assert sorted(left(cache)) == sorted([whole.key, f"{'0' * 32}.work"])


# ---- templates that refuse a conversation

NO_SYSTEM = (  # as Gemma's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)


@pytest.fixture
def without_system(tokenizer_of) -> Renderer:
    return Renderer(tokenizer_of("llama3"), chat_template=NO_SYSTEM)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(has_system=st.lists(st.booleans(), min_size=1, max_size=6).filter(lambda some: not all(some)))
def test_a_system_message_that_the_template_refuses_costs_its_row(
    tmp_path_factory: pytest.TempPathFactory, without_system: Renderer, has_system: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("refused")
    path = folder / "a.jsonl"
    given_rows = [line | ({"system": "你是助手"} if s else {}) for line, s in zip(rows(6), has_system, strict=False)]
    path.write_text("".join(json.dumps(line) + "\n" for line in given_rows), encoding="utf-8")
    sources = [DataSource("a", (str(path),))]
    corpus = prepare(sources, replace(SFT, on_invalid="skip"), without_system, folder / "cache", lambda *_: None)
    expected = without_system.conversations(
        [
            [Message("user", line["instruction"]), Message("assistant", line["output"])]
            for line in given_rows
            if "system" not in line
        ],
        max_length=400,
    )
    assert [one.tokens.tolist() for one in corpus.conversations("train")] == [one.tokens.tolist() for one in expected]
    assert told(corpus, "a")["dropped"].get("refused by the chat template", 0) == sum(has_system)
    if any(has_system):
        place = (
            rf"a\.jsonl:{has_system.index(True) + 1}: the chat template refuses the roles system, user, assistant: "
        )
        with pytest.raises(TemplateError, match=place + r"System role not supported\. .*data\.on_invalid=skip"):
            prepare(sources, SFT, without_system, folder / "cache", lambda *_: None)


def test_a_pair_that_the_template_refuses_costs_its_row(save, tmp_path: Path, without_system: Renderer) -> None:
    pairs = [{"prompt": said(random.Random(n)), "chosen": f"好{n}", "rejected": f"坏{n}"} for n in range(3)]
    source = save("p", [*pairs, pairs[0] | {"prompt": "另一个问题", "system": "s"}])
    corpus = prepare([source], replace(DPO, on_invalid="skip"), without_system, tmp_path / "c", lambda *_: None)
    assert len(corpus.pairs("train")) == 3
    assert told(corpus, "p")["dropped"]["refused by the chat template"] == 1


def test_a_template_that_refuses_every_row_leaves_nothing(save, tmp_path: Path, without_system: Renderer) -> None:
    with pytest.raises(DataError, match=r"nothing is left to learn from in a \(2 refused by the chat template\)"):
        source = save("a", [line | {"system": "s"} for line in rows(2)])
        prepare([source], replace(SFT, on_invalid="skip"), without_system, tmp_path / "c", lambda *_: None)


# ---- rows that are equal once normalised


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.sampled_from(["\u200b", "\ufeff", "\x07", "\u2060", "\u00ad", "\u202a"]),
    wide=st.booleans(),
    side=st.sampled_from(["instruction", "output"]),
    at=st.integers(0, 40),
)
def test_rows_that_are_equal_once_normalised_are_exact_duplicates(
    tmp_path_factory: pytest.TempPathFactory, renderer: Renderer, noise: str, wide: bool, side: str, at: int
) -> None:
    folder = tmp_path_factory.mktemp("equal")
    first, other = (line | {side: line[side] + "ABC 123"} for line in rows(2))
    text = first[side].replace("ABC", "ＡＢＣ").replace("123", "１２３") if wide else first[side]
    path = folder / "a.jsonl"
    again = first | {side: text[:at] + noise + text[at:]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, again, other)), encoding="utf-8")
    choice = replace(SFT.choice, near=None)
    sources = [DataSource("a", (str(path),))]
    corpus = prepare(sources, replace(SFT, choice=choice), renderer, folder / "cache", lambda *_: None)
    assert told(corpus, "a")["dropped"] == {"duplicate": 1}
    assert len(corpus.conversations("train")) == 2
