"""`mlx-zh init`: from a spreadsheet to a recipe that the other commands take, and never a traceback."""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import openpyxl
import pytest
import strategies
from hypothesis import strategies as st

from mlx_zh import init
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.mixing import is_validation
from mlx_zh.errors import RecipeError
from mlx_zh.models import catalog
from mlx_zh.recipe import Memory, load_recipe
from mlx_zh.stages import interview, own_models
from mlx_zh.stages.memory_check import mac, training_step
from mlx_zh.system.entry import entry

QA = [("问题", "答案"), *[(f"{i} 号店几点开门？", f"{i} 号店早上九点开门，欢迎光临。") for i in range(1, 31)]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a machine of 16 GB on which no model is at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_zh.stages.sample_rows.tokenizer_at_hand", lambda model: None)
    monkeypatch.setattr(own_models.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 17e9}))
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command as the shell does; returns status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            entry(init.main, [str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(stop.value.code or 0), shown.out, shown.err

    return call


def sheet(path: Path | str, rows: Any = QA) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return Path(path)


def jsonl(path: Path | str, *rows: Any) -> Path:
    Path(path).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return Path(path)


PAIR = {"prompt": "几点开门？", "chosen": "早上九点。", "rejected": "不知道。"}


# From files to a recipe


def test_a_spreadsheet_becomes_a_recipe(run, folder: Path) -> None:
    sheet("客服.xlsx", [*QA, ("没有答案", None), QA[1]])
    status, out, err = run("客服.xlsx", "--yes", "--name", "my-helper")
    assert (status, err) == (0, "")
    assert "客服.xlsx: 31 of 32 rows can be used" in out
    assert "columns: 问题 → prompt, 答案 → response (by their names)" in out
    assert "客服.xlsx:32: empty reply" in out
    assert "rows that repeat an earlier one: 1" in out
    assert out.count("--- sample") == 3 and "assistant: ⟦" in out
    assert out.rstrip().endswith("Go on with: mlx-zh run my-helper.yaml")
    recipe = load_recipe("my-helper.yaml")
    (source,) = recipe.data.sft.train
    assert (source.path, source.columns) == ("客服.xlsx", {"prompt": "问题", "response": "答案"})
    assert (recipe.model.path, recipe.budget, recipe.data.on_invalid) == ("qwen3-4b", "8h", "skip")
    assert (recipe.data.validation_fraction, recipe.sft.epochs, recipe.sft.batch_size) == (0.1, 3, 8)
    assert recipe.export.formats == ("mlx",) and len(recipe.evaluate.prompts) == 3
    lines = Path("my-helper.yaml").read_text(encoding="utf-8").splitlines()
    assert 20 <= len(lines) <= 40
    assert sorted(os.listdir()) == ["my-helper.yaml", "客服.xlsx"]


def test_the_recipe_reads_the_rows_that_were_counted(run) -> None:
    sheet("qa.xlsx")
    run("qa.xlsx", "--yes")
    (source,) = load_recipe("qa.yaml").data.sft.train
    conversations, report = load_conversations(Path(str(source.path)), columns=source.columns)
    assert report.kept == 30
    assert conversations[0].messages[0].content == "1 号店几点开门？"


def test_comments_and_texts_are_in_the_readers_language(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet("qa.xlsx")
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    _, out, _ = run("qa.xlsx", "--yes")
    assert "qa.xlsx：共 30 行，可用 30 行" in out and "下一步：mlx-zh run qa.yaml" in out
    assert "结果放在 runs/qa/" in Path("qa.yaml").read_text(encoding="utf-8")


def test_pairs_are_learned_by_sft_and_then_by_dpo(run) -> None:
    jsonl("pairs.jsonl", *[{**PAIR, "prompt": f"{i} 号店几点开门？"} for i in range(30)])
    assert run("pairs.jsonl", "--yes")[0] == 0
    recipe = load_recipe("pairs.yaml")
    assert recipe.data.sft.train[0].columns == {"response": "chosen"}
    assert recipe.data.dpo.train[0].columns == {}
    assert run("pairs.jsonl", "--yes", "--use", "sft", "--name", "sft")[0] == 0
    assert load_recipe("sft.yaml").data.dpo.train == ()
    assert run("pairs.jsonl", "--yes", "--use", "dpo", "--name", "dpo")[0] == 0
    assert load_recipe("dpo.yaml").data.sft.train == ()


def test_a_use_that_the_data_cannot_serve_is_an_error(run) -> None:
    sheet("qa.xlsx")
    status, _, err = run("qa.xlsx", "--yes", "--use", "sft-dpo")
    assert status == 2 and "needs rows with a better and a worse answer" in err
    assert os.listdir() == ["qa.xlsx"]


def test_a_folder_is_all_its_files_without_what_systems_leave_there(run) -> None:
    Path("my data").mkdir()
    sheet("my data/a.xlsx")
    jsonl("my data/b.jsonl", {"query": "你好", "response": "您好", "history": [["在吗", "在"]]})
    for junk in (".DS_Store", "._a.xlsx", "~$a.xlsx", "notes.txt"):
        Path("my data", junk).write_bytes(b"\0\5\26\7junk")
    status, out, _ = run("my data", "--yes", "--name", "all")
    assert status == 0
    assert "passed over: my data/notes.txt" in out
    sources = load_recipe("all.yaml").data.sft.train
    assert [source.path for source in sources] == ["my data/a.xlsx", "my data/b.jsonl"]
    assert sources[1].columns == {}


def test_files_for_validation_and_tests_are_named_and_not_learned_from(run) -> None:
    Path("set").mkdir()
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        jsonl(f"set/{name}", {"prompt": "几点？", "response": "九点。"})
    status, out, _ = run("set", "--yes", "--name", "split")
    assert status == 0
    assert "passed over: set/dev.jsonl (its name says dev" in out and "set/test.jsonl (its name says test" in out
    assert [source.path for source in load_recipe("split.yaml").data.sft.train] == ["set/train.jsonl"]


def test_llama_factorys_table_becomes_entries(run) -> None:
    Path("lf").mkdir()
    jsonl("lf/a.json", {"q": "几点？", "a": "九点。"})
    jsonl("lf/b.json", {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好"}]})
    table = {
        "mine": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 5},
        "talk": {"file_name": "b.json", "formatting": "sharegpt"},
        "far": {"hf_hub_url": "org/set"},
    }
    Path("lf/dataset_info.json").write_text(json.dumps(table))
    for number, place in enumerate(("lf", "lf/dataset_info.json")):
        status, out, _ = run(place, "--yes", "--name", f"lf{number}")
        assert status == 0 and "passed over: far (it names no file" in out
        first, second = load_recipe(f"lf{number}.yaml").data.sft.train
        assert (first.columns, first.max_samples) == ({"instruction": "q", "output": "a"}, 5)
        assert (second.path, second.columns) == ("lf/b.json", {})


@pytest.mark.parametrize("given", ["prompt=乙,response=甲", "prompt＝乙，response：甲", "prompt=乙、response=甲"])
def test_columns_can_be_given_with_full_width_marks_too(run, given: str) -> None:
    sheet("qa.xlsx", [("甲", "乙", "丙"), *[(f"答{i}", f"问{i}", f"别{i}") for i in range(3)]])
    assert run("qa.xlsx", "--yes", "--columns", given)[0] == 0
    assert load_recipe("qa.yaml").data.sft.train[0].columns == {"prompt": "乙", "response": "甲"}


def test_a_guess_by_content_is_said_with_the_command_to_change_it(run) -> None:
    sheet("qa.xlsx", [("甲", "乙"), *[(f"{i} 号店几点？", f"{i} 号店早上九点开门。") for i in range(5)]])
    _, out, _ = run("qa.xlsx", "--yes")
    assert "GUESSED" in out and "--columns prompt=乙,response=甲" in out


def test_long_rows_and_small_data_get_their_settings(run) -> None:
    jsonl("a.jsonl", {"prompt": "长文", "response": "字" * 1500})
    run("a.jsonl", "--yes", "--budget", "0")
    recipe = load_recipe("a.yaml")
    assert (recipe.data.max_length, recipe.budget) == (2048, None)
    assert recipe.data.validation_fraction == 0


@pytest.mark.parametrize("model", ["qwen3-1.7b", "qwen3-4b", "llama3.1-8b"])
def test_the_recipe_fits_into_the_memory_of_this_machine(run, model: str) -> None:
    jsonl("pairs.jsonl", PAIR)
    run("pairs.jsonl", "--yes", "--model", model)
    recipe, config, machine = load_recipe("pairs.yaml"), catalog.planned_config(model), mac(17e9)
    assert config is not None
    for stage in ("sft", "dpo"):
        step = training_step(recipe, stage, config, machine)
        assert step.memory(recipe.memory).peak <= machine.budget
        if model == "llama3.1-8b":
            assert step.memory(Memory(micro_tokens=4096, checkpoint_layers=False)).peak > machine.budget
    assert ("memory:" in Path("pairs.yaml").read_text()) == (recipe.memory != Memory())


def test_a_question_is_never_on_both_sides() -> None:
    """Rows with the same question have the same hash, so they are in the same split, whatever their answers are."""
    from mlx_zh.corpus.scan import _hashes

    prompts = _hashes([f"{i % 40} 号店几点开门？" for i in range(400)])
    sides = is_validation(prompts, 0.1)
    assert 0 < sides.sum() < 400
    assert all(len({bool(side) for side in sides[i::40]}) == 1 for i in range(40))


# Existing files, errors


def test_a_recipe_is_never_overwritten_without_force(run) -> None:
    sheet("qa.xlsx")
    Path("qa.yaml").write_text("mine")
    for arguments in ([], ["--name", "qa"]):
        status, _, err = run("qa.xlsx", "--yes", *arguments)
        assert status == 2
        assert err == (
            "error: qa.yaml exists already and was left as it is. Choose another name with --name, or overwrite it "
            "with --force.\n"
        )
    assert Path("qa.yaml").read_text() == "mine"
    assert run("qa.xlsx", "--yes", "--force")[0] == 0
    assert load_recipe("qa.yaml").name == "qa"


def test_columns_that_cannot_be_told_are_listed_with_examples_and_the_command(run) -> None:
    sheet("my qa.xlsx", [("甲", "乙", "丙"), *[(f"一二三{i}", f"四五六{i}", f"七八九{i}") for i in range(5)]])
    status, _, err = run("my qa.xlsx", "--yes")
    assert status == 2
    for line in ("  甲: 一二三0", "  乙: 四五六0", "mlx-zh init 'my qa.xlsx' --columns prompt=甲,response=乙"):
        assert line in err


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        ([], (), "no sheet holds rows below the names of its columns"),
        (QA[:1], (), "no sheet holds rows below the names of its columns"),
        ([("文章",), ("很长的一段话",)], (), "one column of text, '文章'"),
        ([("问题", "答案"), ("只有问题", None)], (), "none of its 1 rows can be used"),
        (QA, ("--columns", "问题"), "write it as prompt=COLUMN,response=COLUMN"),
        (QA, ("--columns", "prompt=题,response=答案"), "there is no column '题'"),
        (QA, ("--columns", "frage=问题"), "these names make no format"),
        (QA, ("--sheet", "没有"), "there is no sheet '没有'; it has Sheet"),
        (QA, ("--model", "qwen9"), "There is no model 'qwen9'. Did you mean"),
        (QA, ("--budget", "soon"), "'soon' is not a length of time"),
        (QA, ("--name", "我的"), "'我的' cannot be a name"),
        (QA, ("--name", "../x"), "'../x' cannot be a name"),
    ],
)
def test_what_cannot_work_is_one_paragraph_and_leaves_nothing(run, rows: Any, arguments: Any, words: str) -> None:
    sheet("qa.xlsx", rows)
    status, _, err = run("qa.xlsx", "--yes", *arguments)
    assert status == 2 and words in err
    assert os.listdir() == ["qa.xlsx"]


def test_a_file_that_is_not_there(run) -> None:
    status, _, err = run("none.xlsx", "--yes")
    assert status == 2 and "none.xlsx: there is no such file or folder" in err


def test_a_megabyte_in_a_cell(run) -> None:
    Path("a.csv").write_text(f"问题,答案\n长,{'字' * 400_000}\n", encoding="utf-8")
    status, out, _ = run("a.csv", "--yes")
    assert status == 0 and len(out) < 4000
    assert load_recipe("a.yaml").data.max_length == 4096


# Questions


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(text))


def test_questions_have_defaults(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet("qa.xlsx")
    answers(monkeypatch, "\n\n\n")
    status, out, _ = run("qa.xlsx")
    assert status == 0 and "qwen3-0.6b" in out
    recipe = load_recipe("qa.yaml")
    assert (recipe.model.path, recipe.budget) == ("qwen3-4b", "8h")


def test_answers_of_a_chinese_input_method_are_understood(run, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl("pairs.jsonl", PAIR)
    answers(monkeypatch, "ｑｗｅｎ３－８ｂ\n很久\n９０分钟\n３\n１\n我的\nｍｙ－ｒｕｎ\n")
    status, out, _ = run("pairs.jsonl")
    assert status == 0
    assert "'很久' is not a length of time" in out and "'我的' cannot be a name" in out and "neither 1 nor 2" in out
    recipe = load_recipe("my-run.yaml")
    assert (recipe.name, recipe.model.path, recipe.budget) == ("my-run", "qwen3-8b", "1h30m")
    assert recipe.data.dpo.train == ()


def test_a_model_is_chosen_by_its_number(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet("qa.xlsx")
    answers(monkeypatch, "１\n不限\n\n")
    run("qa.xlsx")
    recipe = load_recipe("qa.yaml")
    assert (recipe.model.path, recipe.budget) == ("smollm2-135m-instruct", None)


def test_a_taken_name_is_asked_for_again(run, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet("qa.xlsx")
    Path("qa.yaml").write_text("mine")
    answers(monkeypatch, "\n\n\nother\n")
    status, out, _ = run("qa.xlsx")
    assert status == 0 and "qa.yaml exists already" in out
    assert Path("qa.yaml").read_text() == "mine" and load_recipe("other.yaml").name == "other"


@pytest.mark.parametrize("typed", ["", "\n", "qwen3-8b\n8h\n"])
def test_the_end_of_the_input_leaves_nothing_behind(run, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    sheet("qa.xlsx")
    answers(monkeypatch, typed)
    status, _, err = run("qa.xlsx")
    assert (status, err) == (130, "")
    assert os.listdir() == ["qa.xlsx"]


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("8h", "8h"),
        ("８小时", "8h"),
        ("90m", "1h30m"),
        ("半小时", "30m"),
        ("0", None),
        ("不限", None),
        (" 2d ", "2d"),
    ],
)
def test_lengths_of_time(text: str, budget: str | None) -> None:
    assert interview.budget_of(text) == budget


@pytest.mark.parametrize(
    ("file", "name"),
    [("客服 qa.v2.xlsx", "qa.v2"), ("my data.csv", "my-data"), ("客服.xlsx", "my-model"), ("-x-.csv", "x")],
)
def test_the_name_comes_from_the_file(file: str, name: str) -> None:
    Path(file).touch()
    assert interview.default_name(Path(file)) == name


@pytest.mark.parametrize(
    ("total", "model"), [(8e9, "qwen3-1.7b"), (17e9, "qwen3-4b"), (34e9, "qwen3-8b"), (6e10, "qwen3-14b")]
)
def test_the_suggested_model_fits_the_machine(monkeypatch: pytest.MonkeyPatch, total: float, model: str) -> None:
    monkeypatch.setattr(own_models.psutil, "virtual_memory", lambda: type("Memory", (), {"total": total}))
    assert own_models.suggested_model() == own_models.checked_model(model) == model


# Anything


@hypothesis.given(st.text(max_size=20))
def test_any_answer_is_understood_or_refused(text: str) -> None:
    for understand in (interview.budget_of, interview.name_of, interview.use_of, own_models.checked_model):
        try:
            understand(interview.plain(text))
        except RecipeError as error:
            assert str(error)


@hypothesis.given(st.text(max_size=20))
def test_any_columns_option(text: str) -> None:
    try:
        columns = init.columns_of(text)
    except RecipeError:
        return
    assert columns and all(ours and theirs for ours, theirs in columns.items())


columns = st.lists(
    st.sampled_from(["问题", "答案", "question", "answer", "input", "text", "chosen", "rejected", "messages"])
    | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
    unique_by=lambda name: unicodedata.normalize("NFKC", name).strip(),
)
cells = st.sampled_from(["几点？", "九点。", "", "1", "#", "- a", "a: b", "'\"", "{x}"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)


@hypothesis.given(data=st.data())
def test_any_table_becomes_a_recipe_or_one_paragraph(
    told: Any, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    place = tmp_path_factory.mktemp("any")
    names = data.draw(columns)
    rows = data.draw(st.lists(st.tuples(*[cells] * len(names)), min_size=1, max_size=4))
    path = place / "a.jsonl"
    path.write_text("\n".join(strategies.as_json(dict(zip(names, row, strict=True))) for row in rows))
    here = os.getcwd()
    os.chdir(place)
    try:
        message = told(lambda: init.main([str(path), "--yes"]))
        assert (place / "a.yaml").exists() == (message is None)
        if message is None:
            recipe = load_recipe(place / "a.yaml")
            sources = [*recipe.data.sft.train, *recipe.data.dpo.train]
            assert sources and all(Path(str(source.path)).samefile(path) for source in sources)
            assert all(set(source.columns.values()) <= set(names) for source in sources)
    finally:
        os.chdir(here)


@hypothesis.given(
    content=st.binary(max_size=200),
    suffix=st.sampled_from([".xlsx", ".xls", ".csv", ".tsv", ".json", ".jsonl", ".parquet"]),
)
def test_any_bytes_are_a_recipe_or_one_paragraph(
    told: Any, tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    path.write_bytes(content)
    told(lambda: init.main([str(path), "--yes", "--force"]))


def labelled(folder: Path, name: str = "votes.jsonl") -> Path:
    rows = [{"prompt": q, "completion": a, "label": number % 3 > 0} for number, (q, a) in enumerate(QA[1:])]
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_marked_good_or_bad_become_a_recipe_of_kto(run, folder: Path) -> None:
    labelled(folder)
    status, shown, err = run("votes.jsonl", "--yes", "--name", "votes")
    assert status == 0, err
    assert "标签：好" in shown or "label: good" in shown or "标签：坏" in shown or "label: bad" in shown
    recipe = load_recipe("votes.yaml")
    assert recipe.dpo.loss == "kto" and recipe.kind("dpo") == "kto"
    assert [source.path for source in recipe.data.dpo.train] == ["votes.jsonl"] and not recipe.data.sft.train
    assert recipe.data.on_invalid == "error"


def test_for_sft_the_good_ones_are_learned_and_the_others_left_out(run, folder: Path) -> None:
    labelled(folder)
    assert run("votes.jsonl", "--yes", "--use", "sft", "--name", "good")[0] == 0
    recipe = load_recipe("good.yaml")
    assert recipe.data.on_invalid == "skip" and not recipe.data.dpo.train
    items, report = load_conversations(folder / "votes.jsonl", on_invalid="skip")
    assert len(items) == 20 and report.dropped == {"answer not to imitate": 10}


def test_labels_that_are_all_good_or_classes_are_no_kto(run, folder: Path) -> None:
    for number, label in enumerate((True, 0)):
        rows = [{"instruction": q, "output": a, "label": label} for q, a in QA[1:]]
        (folder / "fine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert run("fine.jsonl", "--yes", "--name", f"fine{number}")[0] == 0
        assert load_recipe(f"fine{number}.yaml").data.sft.train
