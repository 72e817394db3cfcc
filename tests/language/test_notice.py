"""A notice is its English sentence, and has its Chinese one and its code with it wherever it goes."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from mlx_zh.language.notice import Notice, notice_of, notices_of
from mlx_zh.system import console

CUT = Notice("exam-prompts-cut", count=3, questions=100)


def test_it_is_the_english_sentence() -> None:
    assert CUT == "3 of 100 prompts were too long and were cut." and isinstance(CUT, str)
    assert f"warning: {CUT}" == "warning: 3 of 100 prompts were too long and were cut."
    assert json.loads(json.dumps([CUT])) == ["3 of 100 prompts were too long and were cut."]


def test_it_has_its_chinese_and_its_code() -> None:
    assert CUT.text("zh") == "100 个提示中有 3 个过长，已截断。" and CUT.text("en") == CUT
    assert CUT.as_dict() == {"code": "exam-prompts-cut", "values": {"count": 3, "questions": 100}}


def test_values_can_be_notices_and_lists() -> None:
    """In each language with the words and the commas of that language."""
    parts = [Notice("adapter-differs", setting=name, value=8, wanted=16) for name in ("rank", "scale")]
    notice = Notice("adapter-keeps-shape", folder="sft", differences=parts)
    assert notice == (
        "training keeps the shape of the adapter in sft: rank 8 (the recipe's lora section: 16), scale 8 (the "
        "recipe's lora section: 16)."
    )
    chinese = "训练沿用 sft 中适配器的结构：rank 为 8（配方的 lora 部分为 16）、scale 为 8（配方的 lora 部分为 16）。"
    assert notice.text("zh") == chinese
    again = notice_of(json.loads(json.dumps(notice.as_dict())))
    assert again == notice and again.text("zh") == chinese


@dataclass
class Holder:
    notices: list[str]


@pytest.mark.parametrize(
    "copied", [pickle.loads(pickle.dumps(CUT)), copy.deepcopy(CUT), asdict(Holder([CUT]))["notices"][0]]
)
def test_a_copy_is_a_notice_too(copied: Notice) -> None:
    assert copied == CUT and copied.as_dict() == CUT.as_dict()


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CUT.code = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CUT.values["count"] = 4  # type: ignore[index]


@pytest.mark.parametrize("values", [{}, {"count": 3}, {"number": 3, "questions": 100}])
def test_a_value_that_is_missing_is_an_error(values: dict[str, int]) -> None:
    with pytest.raises(KeyError):
        Notice("exam-prompts-cut", **values)


@pytest.mark.parametrize(
    "record",
    [
        None,
        "exam-prompts-cut",
        {"text": "as older versions wrote it"},
        {"code": "of-a-newer-version", "values": {}},
        {"code": "exam-prompts-cut", "values": {"count": 3}},
        {"code": "exam-prompts-cut", "values": [3, 100]},
        {"code": "exam-one-letter", "values": {"share": "most", "letter": "A"}},  # no number, so no percentage
        {"code": ["exam-prompts-cut"], "values": {}},
    ],
)
def test_what_is_no_notice_stays_the_text_that_it_is(record: object) -> None:
    assert notice_of(record) is None
    (text,) = notices_of(["as it is"], [record])
    assert text == "as it is" and not isinstance(text, Notice)


def test_texts_without_codes_and_codes_without_texts() -> None:
    assert notices_of(["one", "two"], []) == ["one", "two"]
    assert notices_of(["one", "two"], [CUT.as_dict()]) == [CUT, "two"]
    assert notices_of([], [CUT.as_dict()]) == []


def test_warnings_from_before_there_was_a_place_are_kept_once_there_is_one(tmp_path: Path) -> None:
    console.warn("nobody waits for this one")
    with console.hold_warnings():
        console.warn(CUT)
        console.warn("told elsewhere", keep=False)
        with console.log_warnings(tmp_path / "warnings.jsonl"):
            console.log_held_warnings()
            console.warn("at once")
            console.log_held_warnings()  # nothing is written twice
        console.warn("too late")
    lines = (tmp_path / "warnings.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [CUT, "at once"]
    assert json.loads(lines[0])["code"] == "exam-prompts-cut"


def test_a_warning_is_kept_with_its_code_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "SECRETSECRET")
    failed = Notice("tracker-failed", tracker="wandb", reason="401 for SECRETSECRET")
    with console.log_warnings(tmp_path / "warnings.jsonl"):
        console.warn(failed)
        console.warn("plain words")
    assert "warning: wandb failed and is left out from here on: 401 for" in capsys.readouterr().out
    kept = (tmp_path / "warnings.jsonl").read_text(encoding="utf-8")
    assert "SECRET" not in kept
    first, second = map(json.loads, kept.splitlines())
    assert first["code"] == "tracker-failed" and first["values"] == {"tracker": "wandb", "reason": "401 for •••"}
    assert first["text"] == notice_of(first) == "wandb failed and is left out from here on: 401 for •••"
    assert second == {"text": "plain words"}


def test_a_resumed_run_does_not_warn_again_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    for again in (True, False, False):
        with console.hold_warnings(), console.log_warnings(path):
            console._held = [CUT, "as it is"]
            console.log_held_warnings(again=again)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert texts.count(CUT) == 1


def test_a_notice_around_an_unknown_one_is_unknown() -> None:
    """The English text beside it in the file is shown then, and not Python's form of the inner one."""
    record = {"code": "memory-short", "values": {"need": {"code": "of-a-later-version", "values": {}}, "way": "w"}}
    assert notices_of(["in English"], [record]) == ["in English"]
