"""What the page New run asks: about files, drafts, memory and time; and the process that answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.errors import StudioError
from mlx_zh.studio import drafting
from mlx_zh.studio.drafting import Desk, answer
from mlx_zh.studio.recipe_check import check_recipe
from mlx_zh.studio.worker import Latest, Worker


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    rows = [f"第{n}个问题？,第{n}个回答。\n" for n in range(30)]
    (tmp_path / "问答.csv").write_text("问题,答案\n" + "".join(rows) + "没有答案,\n" + rows[0], encoding="utf-8")
    (tmp_path / "odd.csv").write_text("foo,bar\n1,2\n", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("问题,答案\n", encoding="utf-8")
    (tmp_path / "broken.xlsx").write_bytes(b"PK\x03\x04 no workbook")
    pairs = [{"prompt": f"第{n}题", "chosen": "好<script>", "rejected": "坏"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return Desk(tmp_path)


FILES = [{"path": "问答.csv"}]


def test_a_file_is_looked_at(desk: Desk) -> None:
    told = desk.look(FILES)
    (report,) = told["files"]
    assert (report["rows"], report["usable"], report["repeated"]) == (32, 31, 1)
    assert report["mapping"] == {"prompt": "问题", "response": "答案"} and report["basis"] == "names"
    assert told["use"] == "sft" and told["uses"] == ["sft"] and told["name"] == "my-model"
    assert any("问答.csv:32" in line for line in report["remarks"])  # the row without an answer
    assert desk.look([{"path": "pairs.jsonl"}])["use"] == "sft-dpo"


def test_files_that_cannot_be_used_say_why_and_do_not_spoil_the_others(desk: Desk) -> None:
    told = desk.look([*FILES, *({"path": name} for name in ("odd.csv", "empty.csv", "broken.xlsx", "no.csv"))])
    errors = [report["error"] for report in told["files"]]
    assert errors[0] == "" and all(errors[1:])
    assert not any(str(desk._project) in error for error in errors)
    assert told["files"][1]["columns"] == [("foo", "1"), ("bar", "2")]  # to choose from
    chosen = desk.look([{"path": "odd.csv", "columns": {"prompt": "foo", "response": "bar"}}])
    assert chosen["files"][0]["error"] == "" and chosen["files"][0]["usable"] == 1


def test_samples_say_what_is_learned(desk: Desk, model_folder: Callable[..., Path]) -> None:
    samples = desk.samples(FILES, str(model_folder()))
    assert len(samples) == 3
    learned = ["".join(text for text, is_learned in sample["parts"] if is_learned) for sample in samples]
    assert all(text.endswith("个回答。<|im_end|>") for text in learned)
    assert "".join(text for text, _ in samples[0]["parts"]).startswith("<|im_start|>user\n第")


def test_a_draft_is_that_of_init_with_registered_sets(desk: Desk, model_folder: Callable[..., Path]) -> None:
    model = str(model_folder())
    text = desk.draft("one", model, "1h", "sft", FILES, ["belle-1m"])
    recipe, findings = check_recipe(text, Path("one.yaml"))
    assert findings == [] and recipe is not None
    assert [source.label for source in recipe.data.sft.train] == ["问答.csv", "belle-1m"]
    assert recipe.sft.epochs == 3 and recipe.budget == "1h" and recipe.model.path == model
    bare = check_recipe(desk.draft("two", model, None, "sft", [], ["orca-dpo-pairs"]), Path("two.yaml"))[0]
    assert bare is not None and bare.budget is None
    assert [source.label for source in bare.data.dpo.train] == ["orca-dpo-pairs"]


def test_memory_and_time_follow_the_text(
    desk: Desk, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "_MEASURING", 0.2)
    text = desk.draft("one", str(model_folder()), None, "sft", FILES, [])
    memory = desk.memory(text, "one.yaml")
    assert memory["free"] > 0
    (verdict,) = memory["stages"]
    assert verdict["stage"] == "sft" and verdict["fits"] and 0 < verdict["peak"] < memory["budget"]
    assert memory["downloads"] == []
    assert desk.time(text, "one.yaml", measured=False) is None  # another run is at work
    once = desk.time(text, "one.yaml")
    twice = desk.time(text.replace("epochs: 3", "epochs: 6"), "one.yaml")
    assert once is not None and twice is not None
    assert twice["full_steps"]["sft"] == 2 * once["full_steps"]["sft"]  # with the same measured speed
    assert twice["seconds"]["sft"] > once["seconds"]["sft"]
    cut = desk.time(text.replace("epochs: 3", "epochs: 100000") + "budget: 10m\n", "one.yaml")
    assert cut is not None and cut["total"] <= 600 and cut["steps"]["sft"] < cut["full_steps"]["sft"]


def test_a_model_that_is_not_here_needs_no_network(desk: Desk) -> None:
    text = desk.draft("one", "qwen3-8b", None, "sft", FILES, [])
    memory = desk.memory(text, "one.yaml")
    assert [item["name"] for item in memory["downloads"]] == ["qwen3-8b"] and memory["stages"]
    unknown = desk.memory(text.replace("qwen3-8b", "nobody/nothing"), "one.yaml")
    assert unknown["stages"] == []  # known when it is here


def test_errors_are_answers(desk: Desk) -> None:
    said = answer(
        desk, json.dumps({"ask": "memory", "language": "zh", "with": {"text": "name: [", "file": "a.yaml"}})
    )
    assert "YAML" in said["error"]
    os.environ["MLX_ZH_LANG"] = "en"


def test_a_process_that_ends_is_replaced(tmp_path: Path) -> None:
    async def ask() -> None:
        worker = Worker(tmp_path)
        assert {each["name"] for each in await worker.ask("sets", "en")} > {"belle-1m"}
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(StudioError, match="ended"):
            await worker.ask("sets", "en")
        assert await worker.ask("sets", "en")
        await worker.ended()

    asyncio.run(ask())


def test_only_the_last_request_counts() -> None:
    done: list[int] = []

    async def work(number: int) -> int:
        done.append(number)
        await asyncio.sleep(0.02)
        return number

    async def ask() -> list[Any]:
        latest = Latest(0.02)
        return await asyncio.gather(*(latest.of(lambda n=n: work(n)) for n in range(5)))

    assert asyncio.run(ask()) == [None, None, None, None, 4]
    assert done == [4]
