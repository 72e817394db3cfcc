"""Raw text for continued pre-training: from rows and files to tokens, compared with the tokenizer itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_zh.corpus import documents
from mlx_zh.corpus.build import prepare
from mlx_zh.corpus.choosing import DUPLICATE, EXAM, NEAR_DUPLICATE, ChoiceSettings
from mlx_zh.corpus.conversation import Conversation, Document
from mlx_zh.corpus.data_files import folder_files
from mlx_zh.corpus.documents import PASSAGE, read_document
from mlx_zh.corpus.encoding import PieceEncoder
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.prepared import Corpus, CorpusSettings, Exams
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError

FAMILIES = ("llama3", "qwen2", "mistral")
PARTS = [*"天地。，a1 🙂é", "\n", "\n\n", "\r\n", "Hello ", "人。”"]
UNITS = ["天地玄黄，宇宙洪荒。", "No sentence ends here ", "x", "日月\n", "盈昃。\n\n", "寒来\r\n\r\n"]
STORY = "从前有座山，山里有座庙。\n\n庙里有个老和尚，给小和尚讲故事。\n他说：“从前有座山。”\n\nHello world, 1234.\n"


def ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text without BOS, as Transformers gives them."""
    return tokenizer.encode(text, add_special_tokens=False)


def bos(tokenizer) -> list[int]:
    """What Transformers writes before every text."""
    whole, plain = tokenizer.encode("a"), ids(tokenizer, "a")
    return whole[: len(whole) - len(plain)]


# --- Tokens and the mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_is_bos_text_eos_and_all_but_the_first_token_is_learned(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    [[piece]] = Renderer(tokenizer).documents([Document(STORY)])
    expected = [*tokenizer(STORY).input_ids, tokenizer.eos_token_id]
    assert piece.tokens.tolist() == expected and piece.tokens.dtype == np.int32
    assert piece.trained.tolist() == [False] + [True] * (len(expected) - 1)
    assert bos(tokenizer) == ([tokenizer.bos_token_id] if family != "qwen2" else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_passage_of_a_document_ends_with_eos(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    first, last = Document("第一段。\n\n", ends=False), Document("第二段。", begins=False)
    [[one], [other]] = Renderer(tokenizer).documents([first, last])
    assert one.tokens.tolist() == [*bos(tokenizer), *ids(tokenizer, "第一段。\n\n")]
    assert other.tokens.tolist() == [*bos(tokenizer), *ids(tokenizer, "第二段。"), tokenizer.eos_token_id]


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from([*"天地。，a1 🙂é", "\n", "\n\n", "\r\n", "Hello ", "人。”"]), max_size=80).map(
        "".join
    ),
    max_length=st.integers(4, 40),
)
def test_pieces_joined_are_the_document_whatever_the_length(tokenizer_of, family, text, max_length):
    tokenizer = tokenizer_of(family)
    [pieces] = Renderer(tokenizer).documents([Document(text)], max_length=max_length)
    start = bos(tokenizer)
    assert all(len(piece.tokens) <= max_length for piece in pieces)
    assert all(piece.tokens[: len(start)].tolist() == start for piece in pieces)
    joined = [token for piece in pieces for token in piece.tokens[len(start) :].tolist()]
    whole = [*ids(tokenizer, text), tokenizer.eos_token_id]
    assert joined == (whole if len(whole) + len(start) > 1 else [])
    assert all(piece.trained.tolist() == [False] + [True] * (len(piece.tokens) - 1) for piece in pieces)


def test_a_piece_ends_with_a_paragraph_where_one_ends_in_its_room(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    paragraphs = [f"第{number}段：{'天地玄黄，宇宙洪荒。' * 3}\n" for number in range(30)]
    [pieces] = Renderer(tokenizer).documents([Document("".join(paragraphs))], max_length=150)
    assert len(pieces) > 5
    for piece in pieces[:-1]:
        assert tokenizer.decode(piece.tokens).endswith("\n")
    [pieces] = Renderer(tokenizer).documents([Document("日月盈昃。" * 200)], max_length=100)
    assert all(tokenizer.decode(piece.tokens[-1:]).endswith("。") for piece in pieces[:-1])  # no line, so a sentence


def test_no_piece_ends_inside_a_character(tokenizer_of):
    tokenizer = tokenizer_of("qwen2")
    [pieces] = Renderer(tokenizer).documents([Document("𠮷🙂" * 40)], max_length=10)
    assert len(pieces) > 10 and not any("\ufffd" in tokenizer.decode(piece.tokens) for piece in pieces)


def test_only_so_many_characters_are_encoded_at_once(tokenizer_of, monkeypatch):
    """The tokenizer's record of a token takes some hundred bytes; documents together are as each by itself."""
    renderer = Renderer(tokenizer_of("qwen2"))
    documents = [Document(STORY * count) for count in (1, 400, 2000, 1, 1, 3000, 1)]
    each = [renderer.documents([document], max_length=64)[0] for document in documents]
    encoded, original = [], PieceEncoder.encode_documents

    def counting(self, texts, sources):
        encoded.append([len(text) for text in texts])
        return original(self, texts, sources)

    monkeypatch.setattr(PieceEncoder, "encode_documents", counting)
    together = renderer.documents(documents, max_length=64)
    assert [length for lengths in encoded for length in lengths] == [len(document.text) for document in documents]
    assert all(len(lengths) == 1 or sum(lengths) <= 1 << 16 for lengths in encoded) and len(encoded) < 7
    for one, other in zip(each, together, strict=True):
        assert [piece.tokens.tolist() for piece in one] == [piece.tokens.tolist() for piece in other]


def test_a_control_token_in_a_text_is_ordinary_characters(tokenizer_of):
    tokenizer = tokenizer_of("qwen2")
    text = "The turn ends with <|im_end|>, as 你好 does."
    [[piece]] = Renderer(tokenizer).documents([Document(text)])
    assert piece.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(piece.tokens[:-1]) == text


# --- Files and rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps({"text": STORY, "source": "web"}, ensure_ascii=False) + "\n"),
        ("a.json", json.dumps([{"text": STORY, "meta": {"a": 1}}])),
        ("a.csv", f'id,text\n1,"{STORY}"\n'),
        ("a.txt", STORY),
        ("a.md", STORY),
        ("gbk.txt", STORY.encode("gb18030")),
        ("mark.txt", b"\xef\xbb\xbf" + STORY.encode()),
    ],
)
def test_every_reader_gives_the_text_as_it_is_written(write, name, content):
    path = write(content, name)
    [document], report = load_conversations(path)
    assert isinstance(document, Document)
    assert (document.text, document.begins, document.ends) == (STORY, True, True)
    assert document.source.startswith(str(path))
    assert (report.format, report.rows, report.kept) == ("text", 1, 1)


def test_a_parquet_file_and_a_column_of_another_name(write, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"content": [STORY, "另一篇。"]}), tmp_path / "a.parquet")
    texts, _ = load_conversations(tmp_path / "a.parquet", columns={"text": "content"})
    assert [document.text for document in texts] == [STORY, "另一篇。"]


@pytest.mark.parametrize("other", ["title", "label", "answer", "question", "summary", "output"])
def test_a_text_beside_a_question_a_class_or_a_title_is_not_taken_for_raw_text(write, other):
    path = write(json.dumps({"text": "甲", other: "乙"}) + "\n")
    with pytest.raises(DataError, match="no known format has the columns"):
        load_conversations(path)
    [document], _ = load_conversations(path, format="text")  # named, it is
    assert document.text == "甲"


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff\r\n"])
def test_an_empty_file_is_an_error_with_its_name(write, content):
    with pytest.raises(DataError, match=r"a\.txt: the file holds no text"):
        load_conversations(write(content, "a.txt"))


def test_a_blank_row_is_refused_also_where_normalising_makes_it_blank(write):
    path = write('{"text": " "}\n{"text": "\\u200b"}\n{"text": "好"}\n')
    [document], report = load_conversations(path, on_invalid="skip")
    assert document.text == "好" and report.dropped == {"empty text": 2}


@pytest.mark.parametrize(
    "unit", ["天地玄黄，宇宙洪荒。", "No sentence ends here ", "x", "日月\n", "盈昃。\n\n", "寒来\r\n\r\n"]
)
def test_the_passages_of_a_long_text_are_the_text_and_none_is_long(write, unit):
    text = unit * (3 * PASSAGE // len(unit))
    rows = list(read_document(write(text, "long.txt")))
    assert "".join(row["text"] for _, row in rows) == text
    assert all(0 < len(row["text"]) <= PASSAGE for _, row in rows) and len(rows) <= 7
    assert [row.begins for _, row in rows] == [True] + [False] * (len(rows) - 1)
    assert [row.ends for _, row in rows] == [False] * (len(rows) - 1) + [True]
    # A word keeps the space before it, as byte-level tokenizers have it.
    ends = ("x",) if unit == "x" else tuple("\n。") if unit.isascii() is False else ("No", "sentence", "ends", "here")
    assert all(row["text"].endswith(ends) for _, row in rows[:-1])
    for place, row in rows:
        line = int(place.rsplit(":", 1)[1])
        assert text.split("\n")[line - 1].startswith(row["text"].split("\n")[0]) or row["text"][0] in unit
    [*from_row] = load_conversations(write(json.dumps({"text": text}) + "\n"))[0]
    assert [(d.text, d.begins, d.ends) for d in from_row] == [(r["text"], r.begins, r.ends) for _, r in rows]


def test_a_file_is_read_no_further_than_the_passage_that_is_asked_for(write, monkeypatch):
    path = write("天地玄黄。\n" * 100_000, "long.txt")
    reads: list[int] = []
    passages = documents._passages

    def counted(file):
        read = file.read
        return passages(type("File", (), {"read": lambda self, n: reads.append(n) or read(n)})())

    monkeypatch.setattr(documents, "_passages", counted)
    rows = read_document(path)
    next(rows)
    assert sum(reads) <= PASSAGE + 1
    assert sum(len(row["text"]) for _, row in rows) == 600_000 - len(next(read_document(path))[1]["text"])
    assert sum(reads) < 2 * 600_000 + 4 * PASSAGE  # every character is read once in each of the two passes


def test_a_folder_gives_its_texts_but_not_what_explains_it(tmp_path: Path):
    about = ("README.md", "LICENSE.txt", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.index.json")
    for name in ("a.txt", "b.md", "c.jsonl", "._a.txt", *about):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in folder_files(tmp_path)] == ["c.jsonl"]  # notes beside rows are no data
    (tmp_path / "c.jsonl").unlink()
    assert [path.name for path in folder_files(tmp_path)] == ["a.txt", "b.md"]
    assert [path.name for path in folder_files(tmp_path, ["*.md"])] == ["b.md"]


# --- A corpus ----------------------------------------------------------------------------------------------------


def corpus_of(tokenizer, tmp_path: Path, sources: list[DataSource], **changes) -> Corpus:
    exams = changes.pop("exams", Exams({}, {}))
    max_length = changes.pop("max_length", 64)
    choice = ChoiceSettings(**changes)
    render = RenderSettings("sft", "last", max_length, "drop", "系统消息")
    return prepare(
        sources, CorpusSettings(render, choice, exams), Renderer(tokenizer), tmp_path / "cache", lambda *_: None
    )


def test_text_beside_conversations_by_weight(tokenizer_of, write, tmp_path):
    tokenizer = tokenizer_of("llama3")
    chat = write(json.dumps({"instruction": "你好", "output": "世界"}) + "\n", "chat.jsonl")
    book = "".join(f"第{n}章。{'今天天气很好，我们去公园吧。' * 3}\n\n" for n in range(12))
    sources = [
        DataSource("chat", (str(chat),), weight=3.0),
        DataSource("book", (str(write(book, "book.txt")),), weight=2.0),
    ]
    corpus = corpus_of(tokenizer, tmp_path, sources)
    [pieces] = Renderer(tokenizer).documents([Document(book)], max_length=64)
    train = corpus.conversations("train")
    assert len(pieces) > 2 and train.sources.tolist() == [0] * 3 + [1] * 2 * len(pieces)
    for example, piece in zip(train[3:], pieces * 2, strict=True):
        assert example.tokens.tolist() == piece.tokens.tolist()
        assert example.trained.tolist() == piece.trained.tolist()
        assert "系统消息" not in tokenizer.decode(example.tokens)
    [chat_report, report] = corpus.manifest["report"]["sources"]
    assert (report["rows"], report["format"], report["train"], report["cut_short"]) == (1, "text", 2 * len(pieces), 0)
    assert chat_report["train"] == 3 and corpus.manifest["report"]["over_long"] == 0
    assert corpus.manifest["report"]["train"]["scored_tokens"] == int(train.scored.sum())


def test_rows_of_texts_and_conversations_in_one_source(tokenizer_of, write, tmp_path):
    tokenizer = tokenizer_of("qwen2")
    write(json.dumps({"instruction": "你好", "output": "世界"}) + "\n", "a.jsonl")
    write("山里有座庙。\n", "b.txt")
    write(json.dumps({"instruction": "1+1", "output": "2"}) + "\n", "c.jsonl")
    files = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl"))
    train = corpus_of(tokenizer, tmp_path, [DataSource("all", files)]).conversations("train")
    renderer = Renderer(tokenizer)
    [[text]] = renderer.documents([Document("山里有座庙。\n")])
    assert [len(example.tokens) for example in train][1] == len(text.tokens)
    assert train[1].tokens.tolist() == text.tokens.tolist() and len(train) == 3


def test_repeated_texts_are_dropped(tokenizer_of, write, tmp_path):
    long = "今天天气很好，我们去公园吧。中国的首都是北京。一加一等于二。你好，世界。" * 3
    rows = [long, "完全不同的另一篇文章，讲的是山里的庙和老和尚的故事。", long, long.replace("公园", "公圆", 1)]
    path = write("".join(json.dumps({"text": text}) + "\n" for text in rows))
    corpus = corpus_of(tokenizer_of("llama3"), tmp_path, [DataSource("t", (str(path),))], near=0.75)
    [report] = corpus.manifest["report"]["sources"]
    assert report["dropped"] == {DUPLICATE: 1, NEAR_DUPLICATE: 1} and report["train"] >= 2


def test_all_passages_of_a_document_are_in_one_split(tokenizer_of, write, tmp_path):
    tokenizer = tokenizer_of("llama3")
    texts = [f"{n} " + "".join(f"第{n}篇第{k}段。\n" for k in range(12_000)) for n in range(6)]
    assert all(len(text) > PASSAGE for text in texts)
    path = write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = corpus_of(
        tokenizer, tmp_path, [DataSource("t", (str(path),))], validation_fraction=0.5, near=None, max_length=4096
    )
    numbers = {
        split: {tokenizer.decode(example.tokens).split("第")[1].split("篇")[0].strip() for example in examples}
        for split, examples in ((s, corpus.conversations(s)) for s in ("train", "validation"))
    }
    assert numbers["train"] and numbers["validation"] and not numbers["train"] & numbers["validation"]


def test_a_text_with_an_exam_question_is_dropped(tokenizer_of, write, tmp_path):
    question = "下列关于细胞膜结构与功能的叙述中哪一项是完全正确的并且有实验依据"
    folder = tmp_path / "exam" / "val"
    folder.mkdir(parents=True)
    (folder / "biology_val.csv").write_text(
        f"id,question,A,B,C,D,answer\n0,{question},流动性,全透性,对称性,刚性,A\n", encoding="utf-8"
    )
    rows = [f"练习题：{question}？A 流动性 B 全透性 C 对称性 D 刚性", "山里有座庙，庙里有个老和尚。"]
    path = write("".join(json.dumps({"text": text}) + "\n" for text in rows))
    exams = Exams({"ceval": str(tmp_path / "exam")}, {})
    corpus = corpus_of(tokenizer_of("llama3"), tmp_path, [DataSource("t", (str(path),))], exams=exams)
    [report] = corpus.manifest["report"]["sources"]
    assert report["dropped"] == {EXAM: 1} and report["train"] == 1


def test_texts_are_normalised(tokenizer_of, write, tmp_path):
    tokenizer = tokenizer_of("qwen2")
    source = DataSource("t", (str(write("ＡＢＣ１２３\u200b\r\n好", "a.txt")),))
    [example] = corpus_of(tokenizer, tmp_path, [source]).conversations("train")
    assert example.tokens.tolist() == [*ids(tokenizer, "ABC123\n好"), tokenizer.eos_token_id]


def test_a_document_survives_the_spool(tmp_path):
    from mlx_zh.corpus.scan import _item, _row

    for item in (Document("文", "a:1", begins=False), Document("文", "a:2", ends=False)):
        assert _item(tuple(json.loads(json.dumps(_row(item))))) == item
    assert replace(item, source="") != Conversation((), "")
