"""Near duplicates, against Jaccard similarities counted with sets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mlx_zh.corpus.duplicates import BANDS, HASHES, Rows, find_exact, find_near, sketch
from mlx_zh.corpus.scan import ScanSettings, open_scan, scan
from mlx_zh.corpus.shingles import letters
from mlx_zh.corpus.sources import DataSource

CHARACTERS = [chr(code) for code in range(0x4E00, 0x5200)]


def similarity(a: str, b: str, size: int = 3) -> float:
    first, second = ({text[i : i + size] for i in range(len(text) - size + 1)} for text in (a, b))
    return len(first & second) / len(first | second)


@pytest.fixture
def rows(tmp_path: Path):
    def make(texts: list[str], numbers: list[int] | None = None, name: str = "a") -> Rows:
        signatures, bands = sketch(letters(texts), 3)
        assert signatures.shape == (len(texts), HASHES) and bands.shape == (len(texts), BANDS)
        places = tmp_path / f"{name}.u16", tmp_path / f"{name}.u32"
        places[0].write_bytes(signatures.tobytes())
        places[1].write_bytes(bands.tobytes())
        exact = np.array([[hash(text) & 0xFFFF, len(text)] for text in texts], dtype=np.uint64).reshape(-1, 2)
        return Rows(exact, np.array(numbers or [0] * len(texts), dtype=np.uint64), *places)

    return make


def near(sources: list[Rows], threshold: float = 0.75) -> list[int]:
    return find_near(sources, np.ones(sum(len(s.exact) for s in sources), dtype=bool), threshold).tolist()


def text(rng: random.Random, size: int = 300) -> str:
    return "".join(rng.choices(CHARACTERS, k=size))


def test_signatures_estimate_the_similarity(rows):
    """With 128 hashes the standard error is below 0.045; over 200 pairs the mean must be much closer."""
    rng = random.Random(0)
    errors = []
    for _ in range(200):
        first = text(rng)
        kept = rng.randrange(60, 300)
        second = first[:kept] + text(rng, 300 - kept)
        signatures, _ = sketch(letters([first, second]), 3)
        errors.append((signatures[0] == signatures[1]).mean() - similarity(first, second))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


def test_alike_is_found_and_unlike_is_not(rows):
    rng = random.Random(1)
    originals = [text(rng) for _ in range(300)]
    alike = [t[:285] + text(rng, 15) for t in originals]  # J = 283/315 = 0.90
    unlike = [t[:200] + text(rng, 100) for t in originals]  # J = 198/398 = 0.50
    found = near([rows(originals + alike + unlike)])
    assert found[:300] == [-1] * 300
    assert found[300:600] == list(range(300))
    assert found[600:] == [-1] * 300


def test_between_sources_the_first_is_kept(rows):
    rng = random.Random(2)
    one, other = text(rng), text(rng)
    assert near([rows([one], name="a"), rows([other, one + "的"], name="b")]) == [-1, -1, 0]


def test_other_numbers_are_another_exercise(rows):
    question = text(random.Random(3))
    assert near([rows([question, question + "的", question + "了"], [1, 1, 2])]) == [-1, 0, -1]


def test_a_row_like_a_dropped_one_is_kept_if_it_is_unlike_the_kept(rows):
    rng = random.Random(4)
    a = text(rng)
    b = a[40:] + text(rng, 40)  # 0.76 like a
    c = b[40:] + text(rng, 40)  # 0.76 like b, 0.58 like a
    assert similarity(a, b) > 0.75 > 0.6 > similarity(a, c)
    found = near([rows([a, b, c])], threshold=0.7)
    assert found == [-1, 0, -1]


def test_exact_copies_are_of_the_first(rows):
    source = rows(["甲甲甲", "乙乙乙", "甲甲甲", "甲甲甲", "乙乙乙"])
    everything = np.ones(5, dtype=bool)
    assert find_exact([source], everything).tolist() == [-1, -1, 0, 0, 1]
    everything[0] = False
    assert find_exact([source], everything).tolist() == [-1, -1, -1, 2, 1]


def test_sources_that_are_not_looked_at(rows):
    same = text(random.Random(5))
    blind = rows([same, same])
    blind = Rows(blind.exact, blind.numbers, None, None)
    assert near([blind, rows([same], name="b")]) == [-1, -1, -1]


def scanned(folder: Path, rows: list[tuple[str, str]]) -> Rows:
    """The hashes of rows of a question and an answer, from the first pass itself."""
    path = folder / "rows.jsonl"
    lines = (json.dumps({"prompt": asked, "response": answer}, ensure_ascii=False) + "\n" for asked, answer in rows)
    path.write_text("".join(lines), encoding="utf-8")
    scan(DataSource("a", (str(path),)), ScanSettings("sft"), folder / "scan", lambda *_: None)
    return open_scan(folder / "scan", near=True).rows


def kept_of(folder: Path, rows: list[tuple[str, str]]) -> list[int]:
    """The numbers of the rows that stay."""
    return [number for number, earlier in enumerate(near([scanned(folder, rows)])) if earlier < 0]


WHO = [
    "你是谁？",
    "你叫什么名字？",
    "请介绍一下你自己。",
    "是哪家公司开发了你？",
    "你是人还是机器？",
    "你能做什么？",
    "Who are you?",
]
NAMED = "您好，我是小明，由小明科技开发的人工智能助手，可以回答各种问题，提供实用的建议和帮助，很高兴为您服务。"


def test_many_questions_with_one_answer_stay(tmp_path: Path):
    rows = [(question, NAMED) for question in WHO]
    assert similarity(WHO[0] + NAMED, WHO[5] + NAMED) > 0.75  # as whole rows they are alike
    assert kept_of(tmp_path, rows) == list(range(len(WHO)))


def test_many_questions_about_one_text_stay(tmp_path: Path):
    rng = random.Random(6)
    context = text(rng, 900)
    rows = [(context + question, text(rng, 20)) for question in WHO]
    assert kept_of(tmp_path, rows) == list(range(len(WHO)))


def test_a_question_that_is_asked_again_goes(tmp_path: Path):
    """With other punctuation, with a polite frame, and with another end of the answer."""
    question = "请用三句话说明海豚为什么是哺乳动物而不是鱼"
    again = [(f"{question}。", NAMED), (f"您好，{question}？", NAMED), (question, NAMED[:-3] + "乐意效劳")]
    assert kept_of(tmp_path, [(question, NAMED), *again, (WHO[0], NAMED)]) == [0, 4]


@pytest.mark.parametrize("answer", ["", "好"])
def test_sides_without_an_n_gram_are_compared_as_they_are(tmp_path: Path, answer: str):
    question = text(random.Random(7), 100)
    assert kept_of(tmp_path, [(question, answer + "是"), (question + "的", answer + "是"), (question, "否")]) == [
        0,
        2,
    ]
