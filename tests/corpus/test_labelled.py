"""Each published form of KTO's data becomes the same labelled answers; each row that says no label is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_zh.corpus.build import prepare
from mlx_zh.corpus.choosing import ChoiceSettings
from mlx_zh.corpus.conversation import Labelled, Message, Preference
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.labelled import iter_labelled, load_labelled
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.prepared import CorpusSettings, Exams
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError

S, Q, A, R = Message("system", "s"), Message("user", "你好"), Message("assistant", "你好！"), Message("user", "再见")
GOOD, BAD = Message("assistant", "好"), Message("assistant", "坏")
BOTH = {"chosen": "好", "rejected": "坏"}


def role(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def share(message: Message) -> dict[str, str]:
    return {"from": {"user": "human", "assistant": "gpt"}.get(message.role, message.role), "value": message.content}


def load(write, *rows, **reading) -> list[Labelled]:
    return load_labelled(write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)), **reading)[0]


def refused(write, *rows) -> dict[str, int]:
    """Why rows cannot be used, beside one that can."""
    fine = {"prompt": "你好", "completion": "好", "label": True}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (fine, *rows))
    items, report = load_labelled(write(text), on_invalid="skip")
    assert len(items) == 1
    return report.dropped


@pytest.mark.parametrize("label", [True, False, 1, 0, 1.0, 0.0, "true", "False", " TRUE ", "0", "yes", "否"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "你好", "completion": "好"}, (Q,)),
        ({"prompt": "你好", "completion": "好", "system": "s"}, (S, Q)),
        ({"prompt": [role(Q), role(A), role(R)], "completion": [role(GOOD)]}, (Q, A, R)),
        ({"messages": [role(m) for m in (S, Q, A, R, GOOD)]}, (S, Q, A, R)),
        ({"conversations": [share(m) for m in (Q, GOOD)]}, (Q,)),
        ({"instruction": "你好", "input": "", "output": "好"}, (Q,)),
        ({"query": "你好", "response": "好"}, (Q,)),
    ],
)
@pytest.mark.parametrize("column", ["label", "kto_tag", "thumbs_up", "is_correct"])
def test_a_row_with_a_label_is_one_answer(write, row, prompt, label, column):
    items = load(write, row | {column: label})
    wanted = str(label).strip().lower() in ("true", "1", "1.0", "yes")
    assert [(tuple(map(said, item.messages)), item.label) for item in items] == [
        (tuple(map(said, (*prompt, GOOD))), wanted)
    ]


def said(message: Message) -> tuple[str, str]:
    return message.role, message.content


def test_a_column_named_after_a_fault_says_the_opposite(write):
    rows = [{"prompt": "你好", "completion": "好", "thumbs_down": down} for down in (True, False)]
    assert [item.label for item in load(write, *rows)] == [False, True]
    report = LoadReport()
    list(iter_labelled(write(json.dumps(rows[0] | {"note": "x"})), report))
    assert report.unused == ["note"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "你好", **BOTH},
        {"prompt": "你好", "label": 7, **BOTH},  # of a pair, a label is something else
        {"instruction": "你好", "input": "", **BOTH},
        {"instruction": "你好", "output": ["好", "坏"]},
        {"conversations": [share(Q)], "chosen": share(GOOD), "rejected": share(BAD)},
        {"messages": [role(Q), role(GOOD)], "rejected_response": "坏"},
        {"chosen": [role(Q), role(GOOD)], "rejected": [role(Q), role(BAD)]},
    ],
)
def test_a_pair_is_a_good_and_a_bad_answer(write, row):
    items = load(write, row)
    assert [(item.messages, item.label) for item in items] == [((Q, GOOD), True), ((Q, BAD), False)]
    assert len({item.source for item in items}) == 1


def test_columns_name_the_label(write):
    row = {"问题": "你好", "回答": "好", "赞": False}
    (item,) = load(write, row, columns={"prompt": "问题", "completion": "回答", "label": "赞"})
    assert (item.messages, item.label) == ((Q, GOOD), False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "你好", "completion": "坏"}, "no label"),
        ({"prompt": "你好", "completion": "坏", "label": None}, "no label"),
        ({"prompt": "你好", "completion": "坏", "label": 2}, "wrong type"),
        ({"prompt": "你好", "completion": "坏", "label": "good?"}, "wrong type"),
        ({"prompt": "你好", "completion": "坏", "label": [True]}, "wrong type"),
        ({"prompt": "你好", "completion": "坏", "label": True, "kto_tag": False}, "two labels"),
        ({"prompt": "你好", "completion": "坏", "label": True, "thumbs_down": 1}, "two labels"),
        ({"prompt": "你好", "completion": [role(A), role(R), role(BAD)], "label": True}, "several replies"),
        ({"prompt": "你好", "completion": [role(BAD) | {"weight": 0}], "label": True}, "not to be trained"),
        ({"prompt": "你好", "completion": " ", "label": True}, "empty reply"),
        ({"prompt": "你好", "completion": "坏", "label": True, "images": ["a.png"]}, "not only text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(write, row, reason):
    assert refused(write, row) == {reason: 1}


def test_reasoning_beside_a_pair_is_refused_as_for_dpo(write):
    with pytest.raises(DataError, match="reasoning apart from its answers"):
        load(write, {"prompt": "你好", **BOTH, "reasoning": "想"})


def test_a_bad_answer_is_still_not_learned_by_sft(write):
    path = write(json.dumps({"prompt": "你好", "completion": "坏", "label": False}))
    with pytest.raises(DataError, match="not to be learned"):
        load_conversations(path)


def test_labelled_answers_given_to_dpo_name_the_loss_that_learns_from_them(write):
    path = write(json.dumps({"prompt": "你好", "completion": "好", "label": True}))
    with pytest.raises(DataError, match=r"dpo\.loss: kto"):
        load_preferences(path)


# ---- the prepared corpus


KTO = CorpusSettings(RenderSettings("kto", "assistant", 400, "drop", None), ChoiceSettings(), Exams({}, {}))


@pytest.fixture
def corpus(write, tokenizer_of, tmp_path: Path):
    renderer = Renderer(tokenizer_of("qwen2"))

    def corpus(*rows, settings: CorpusSettings = KTO, **source):
        path = write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        made = DataSource("a", (str(path),), **source)
        return prepare([made], settings, renderer, tmp_path / "cache", lambda *_: None), renderer

    return corpus


def test_the_corpus_holds_what_dpo_would_tokenize(corpus):
    """Prompt and answers have the tokens of the same pair for DPO; the label is kept in the right order."""
    rows = [{"prompt": f"{n}加一等于几？", "chosen": f"等于{n + 1}。", "rejected": "不知道"} for n in range(2, 9)]
    prepared, renderer = corpus(*rows)
    answers = prepared.answers("train")
    assert len(answers) == 2 * len(rows)
    assert answers.labels.tolist() == [1, 0] * len(rows)
    for number, row in enumerate(rows):
        messages = (Message("user", row["prompt"]),)
        pair = renderer.preference(Preference(messages, row["chosen"], row["rejected"], ""))
        assert pair is not None
        for answer, response in zip(answers[2 * number : 2 * number + 2], (pair.chosen, pair.rejected), strict=True):
            np.testing.assert_array_equal(answer.prompt, pair.prompt)
            np.testing.assert_array_equal(answer.response, response)
    again, _ = corpus(*rows)
    assert again.ready and again.content == prepared.content


def test_the_label_changes_the_content(corpus):
    row = {"prompt": "一加一等于几？", "completion": "等于二。"}
    good, _ = corpus(row | {"label": True})
    bad, _ = corpus(row | {"label": False})
    assert good.content != bad.content


def test_opposite_labels_are_no_duplicates_and_equal_ones_are(corpus):
    """A good and a nearly equal bad answer teach the most; equal votes teach nothing new."""
    row = {"prompt": "今天天气很好，我们去公园吧，好不好？", "completion": "今天天气很好，我们去公园吧。"}
    prepared, _ = corpus(*(row | {"label": label} for label in (True, False, True, False)))
    assert prepared.answers("train").labels.tolist() == [1, 0]
    assert prepared.manifest["report"]["sources"][0]["dropped"] == {"duplicate": 2}


def test_quality_rules_look_at_good_answers_only(corpus):
    """Half of the point of a bad answer is its fault."""
    row = {"prompt": "一加一等于几？", "completion": "我们去公园吧。" * 40}  # a loop
    settings = replace(KTO, quality={"repetition": "drop"})
    fine = {"prompt": "二加二等于几？", "completion": "等于四。", "label": True}
    prepared, _ = corpus(fine, row | {"label": False}, row | {"label": True}, settings=settings)
    assert prepared.answers("train").labels.tolist() == [1, 0]
    assert prepared.manifest["report"]["sources"][0]["dropped"] == {"looping reply": 1}


def test_an_answer_that_is_too_long_is_dropped_and_counted(corpus):
    long = "".join(chr(0x4E00 + 7 * n) for n in range(400))
    fine = {"prompt": "一加一等于几？", "completion": "等于二。", "label": True}
    prepared, _ = corpus(
        fine,
        {"prompt": "好吗？", "completion": long, "label": False},
        {"prompt": long, "completion": "好", "label": False},
    )
    report = prepared.manifest["report"]
    assert report["sources"][0]["dropped"] == {
        "answer does not fit into max_length": 1,
        "prompt longer than max_length": 1,
    }
    assert report["over_long"] == 2


def test_the_report_counts_rows_of_the_file(write):
    report = LoadReport()
    path = write(json.dumps({"prompt": "你好", **BOTH}))
    items, report = load_labelled(path)
    assert (report.rows, report.kept, report.format, len(items)) == (1, 1, "prompt", 2)
