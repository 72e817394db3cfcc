"""The process that holds a model, asked as the Talk page asks it: answers, stops, crashes, memory, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from talk_runs import make_run

from mlx_zh import chat
from mlx_zh.errors import StudioError
from mlx_zh.studio.talker import LONGEST, Question, Settings, Talker, Talkers

GREEDY = Settings(temperature=0, top_p=1, max_tokens=12, system="请简短。")


@pytest.fixture(scope="module")
def run(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(model_folder(), tmp_path_factory.mktemp("project"))


Work = Callable[[Talker], Coroutine[Any, Any, None]]


def with_talker(run: Path, work: Work, **options: Any) -> None:
    """Do something with a talker of its own, which ends afterwards."""

    async def main() -> None:
        talker = Talker(run, run.parent.parent, **options)
        try:
            await asyncio.wait_for(work(talker), 120)
        finally:
            await talker.close()

    with ThreadPoolExecutor(1) as thread:  # the main thread may hold the event loop of the browser's driver
        thread.submit(lambda: asyncio.run(main())).result()


@pytest.fixture(scope="module")
def shared(run: Path) -> Iterator[Callable[[Work], None]]:
    """Does something with the one talker of these tests."""
    talker, runner = Talker(run, run.parent.parent), asyncio.Runner()

    def do(work: Work) -> None:
        thread.submit(lambda: runner.run(asyncio.wait_for(work(talker), 120))).result()

    with ThreadPoolExecutor(1) as thread:
        yield do
        thread.submit(lambda: runner.run(talker.close())).result()
        thread.submit(runner.close).result()


def asked(run: Path, stage: str, text: str = "你好", settings: Settings = GREEDY, seed: int = 1) -> Question:
    return Question(run, stage, [("user", text)], 0, settings, seed)


async def answer(talker: Talker, question: Question) -> tuple[str, dict[str, Any]]:
    text, last = "", {}
    async for event in talker.ask(question):
        text += event.get("text", "")
        last = event
    assert last["is"] == "end"
    return text, last


def test_answers_are_those_of_the_chat_command(
    run: Path, shared: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process answers as base, SFT and DPO, and as `mlx-zh chat --prompt` with the same settings."""
    warm = Settings(temperature=0.9, top_p=0.8, max_tokens=9, system="请简短。")
    said: dict[tuple[str, Settings], str] = {}

    async def work(talker: Talker) -> None:
        processes = set()
        for settings in (GREEDY, warm):
            for stage in ("base", "sft", "dpo", "sft"):  # the second time, with its own cache
                text, end = await answer(talker, asked(run, stage, settings=settings, seed=7))
                assert said.setdefault((stage, settings), text) == text
                assert end["origin"]["adapter"] == ("none" if stage == "base" else stage)
                assert end["origin"]["seed"] == 7
                assert talker._process is not None
                processes.add(talker._process.pid)
        assert len(processes) == 1

    shared(work)
    monkeypatch.chdir(run.parent.parent)
    for (stage, settings), text in said.items():
        options = ["--temp", settings.temperature, "--top-p", settings.top_p, "--max-tokens", settings.max_tokens]
        adapter = ["--adapter", "none" if stage == "base" else stage]
        assert chat.main([str(run), "--prompt", "你好", "--seed", "7", *adapter, *map(str, options)]) == 0
        assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    assert len({said[stage, GREEDY] for stage in ("base", "sft", "dpo")}) == 3


def test_a_stopped_answer_ends_with_what_it_has_and_the_next_one_is_whole(
    run: Path, shared: Callable[[Work], None]
) -> None:
    async def work(talker: Talker) -> None:
        endless = Settings(temperature=0, top_p=1, max_tokens=400, system="请简短。")
        pieces, reason = 0, ""
        async for event in talker.ask(asked(run, "sft", settings=endless)):
            pieces += event["is"] == "piece"
            if pieces == 2:
                await talker.stop(event["id"])
                pieces += 1
            reason = event.get("statistics", {}).get("reason", "")
        assert reason == "stopped" and pieces < 300
        before = await answer(talker, asked(run, "sft"))
        assert before[1]["statistics"]["reason"] in ("length", "end")
        left = talker.ask(asked(run, "base", settings=endless))
        await anext(left)
        await left.aclose()  # the page was closed: nobody waits for the answer
        assert not talker.busy
        assert (await answer(talker, asked(run, "sft")))[0] == before[0]

    shared(work)


def test_two_tabs_at_once_share_one_process_and_get_their_own_answers(
    run: Path, shared: Callable[[Work], None]
) -> None:
    async def work(talker: Talker) -> None:
        alone = [(await answer(talker, asked(run, stage, text)))[0] for stage, text in (("sft", "一"), ("dpo", "二"))]
        both = await asyncio.gather(answer(talker, asked(run, "sft", "一")), answer(talker, asked(run, "dpo", "二")))
        assert [text for text, _ in both] == alone

    shared(work)
    talkers = Talkers()
    assert talkers.of(("m",), run, run.parent) is talkers.of(("m",), run / "other", run.parent)


def test_a_conversation_goes_on_in_each_column_with_its_own_cache(run: Path, shared: Callable[[Work], None]) -> None:
    async def work(talker: Talker) -> None:
        for stage in ("base", "sft", "base", "sft"):
            turns = [("user", "一"), ("assistant", "好"), ("user", "二")]
            question = Question(run, stage, turns, 0, GREEDY, 1)
            _, end = await answer(talker, question)
        assert end["statistics"]["prompt_cached"] > 20 and end["statistics"]["prompt_new"] == 1

    shared(work)


def test_a_process_that_was_killed_or_that_nobody_asked_is_started_again_by_the_next_question(run: Path) -> None:
    async def work(talker: Talker) -> None:
        endless = Settings(max_tokens=400)
        with pytest.raises(StudioError, match=r"was killed; most likely the memory was exhausted"):
            async for event in talker.ask(asked(run, "base", settings=endless)):
                if event["is"] == "begin":
                    assert talker._process is not None
                    os.kill(talker._process.pid, signal.SIGKILL)
        assert talker.state == "off" and not talker.busy
        assert (await answer(talker, asked(run, "dpo")))[0]
        while talker.state != "off":  # nobody asks: the model leaves the memory
            await asyncio.sleep(0.05)

    with_talker(run, work, idle=0.5)


def test_the_process_ends_with_the_studio_even_if_that_is_killed(run: Path, tmp_path: Path) -> None:
    code = f"""
import asyncio
from pathlib import Path
from mlx_zh.studio.talker import Talker
async def main():
    talker = Talker(Path({str(run)!r}), Path({str(run.parent.parent)!r}))
    await talker.load()
    Path({str(tmp_path / "pid")!r}).write_text(str(talker._process.pid))
    await asyncio.sleep(600)
asyncio.run(main())
"""
    studio = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert studio.poll() is None
        time.sleep(0.05)
    model = psutil.Process(int((tmp_path / "pid").read_text()))
    studio.kill()
    studio.wait()
    psutil.wait_procs([model], timeout=60)
    assert not model.is_running() or model.status() == psutil.STATUS_ZOMBIE


def test_what_cannot_be_answered_is_said_and_the_process_stays(
    run: Path, shared: Callable[[Work], None], tmp_path: Path
) -> None:
    async def work(talker: Talker) -> None:
        cases = [
            (asked(run, "kto"), r"there is no stage 'kto'"),
            (asked(tmp_path, "base"), r"is a folder without a recipe"),
            (asked(run, "base", "长" * 5000), r"the message is too long"),
            (asked(run, "base", settings=Settings(thinking="on")), r"chat template has no switch for thinking"),
            (asked(run, "base", "字" * (LONGEST + 1)), r"characters, and at most"),
            (
                Question(run, "base", [("user", "一"), ("assistant", "二")], 0, GREEDY, 1),
                "does not end with a question",
            ),
        ]
        for question, message in cases:
            with pytest.raises(StudioError, match=message):
                await answer(talker, question)
        hostile = "\x1b[2J\u202e<script>alert(1)</script>\ud800" + "a" * 100
        assert (await answer(talker, asked(run, "base", hostile)))[1]["statistics"]["prompt_new"] > 100

    shared(work)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    import json
    import shutil

    huge = tmp_path / "huge"
    shutil.copytree(model_folder(), huge)
    config = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 500_000}))
    run = make_run(model_folder(), tmp_path)
    text = (run / "recipe.yaml").read_text("utf-8").replace(str(model_folder()), str(huge))
    (run / "recipe.yaml").write_text(text, encoding="utf-8")

    async def work(talker: Talker) -> None:
        with pytest.raises(StudioError, match=r"talking with this model takes about \d+\.\d GB of memory, and"):
            await talker.load()
        assert talker.state == "off" and talker.room is not None and talker.room.need > talker.room.free

    with_talker(run, work)


def test_a_model_that_is_gone_is_said(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(model_folder(), tmp_path)
    text = (run / "recipe.yaml").read_text("utf-8").replace(str(model_folder()), str(tmp_path / "gone"))
    (run / "recipe.yaml").write_text(text, encoding="utf-8")

    async def work(talker: Talker) -> None:
        with pytest.raises(StudioError, match="gone"):
            await talker.load()

    with_talker(run, work)
