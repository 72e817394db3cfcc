"""The prepare stage as its user runs it, with the mission's data sets in their published columns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh import prepare
from mlx_zh.corpus import data_files
from mlx_zh.errors import DownloadError, RecipeError
from mlx_zh.stages import preflight

CHARACTERS = [chr(code) for code in range(0x4E00, 0x5600)]
RNG = random.Random(0)


def said(size: int = 30) -> str:
    return "".join(RNG.choices(CHARACTERS, k=size))


def turn(role: str) -> dict[str, str]:
    return {"from": role, "value": said()}


# name -> a row with the published columns, and the texts that must be learned from it
PUBLISHED: dict[str, Callable[[], dict[str, Any]]] = {
    "belle-1m": lambda: {"instruction": said(), "input": said(), "output": said()},
    "llama3-chinese": lambda: {"conversations": [turn("human"), turn("gpt"), turn("human"), turn("gpt")]},
    "chinese-modern-poetry": lambda: {"prompt": said(), "response": said()},
    "python-code-18k": lambda: {"instruction": said(), "input": "", "output": said(), "prompt": said()},
    "dpo-en-zh-20k": lambda: {"conversations": [turn("human")], "chosen": turn("gpt"), "rejected": turn("gpt")},
    "orca-dpo-pairs": lambda: {"system": said(), "question": said(), "chosen": said(), "rejected": said()},
    "chinese-dpo-pairs": lambda: {"prompt": said(), "system": "", "chosen": said(), "rejected": said()},
    "dpo-zh-en-emoji": lambda: {"question": said(), "answer_zh": said(), "answer_en": said()},
}
SFT = ("belle-1m", "llama3-chinese", "chinese-modern-poetry", "python-code-18k")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch, model_folder: Callable[..., Path], snapshots: Path) -> Path:
    """The current folder: a recipe with every data set of the mission, each as a local file."""
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    Path("cache/tokenizers").symlink_to(snapshots)
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    sources: dict[str, list[Any]] = {"sft": [], "dpo": []}
    for name, row in PUBLISHED.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(20)))
        sources["sft" if name in SFT else "dpo"].append({"name": name, "path": f"{name}.jsonl"})
    Path("math.txt").write_text("1+2*3=1+6=7\n(4-6)/2=-2/2=-1\n")
    sources["sft"] += [
        {"name": "mathglm-arithmetic", "path": "math.txt"},
        {"name": "arithmetic-synthetic", "max_samples": 30},
    ]
    recipe = {
        "name": "mission",
        "model": {"path": str(model_folder())},
        "data": {name: {"train": listed} for name, listed in sources.items()} | {"max_length": 600},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def report() -> dict[str, Any]:
    return json.loads(Path("runs/mission/data/report.json").read_text(encoding="utf-8"))


def test_every_data_set_of_the_mission(folder: Path, run_stage, capsys):
    assert run_stage(prepare.main, "recipe.yaml", "--show", 2) == 0
    out = capsys.readouterr().out
    for name in PUBLISHED:
        assert f"{name}: 20 {'examples' if name in SFT else 'pairs'}\n" in out
    assert "mathglm-arithmetic: 2 examples" in out and "arithmetic-synthetic: " in out
    for word in ("median", "learned", "tokens per Chinese character", "0 rows (0.0%)", "--- example 0", "[chosen] ⟦"):
        assert word in out
    found = report()
    assert found.keys() == {"sft", "dpo"}
    assert {s["name"]: (s["rows"], s["format"]) for s in found["dpo"]["sources"]} == {
        "dpo-en-zh-20k": (20, "sharegpt"),
        "orca-dpo-pairs": (20, "orca"),
        "chinese-dpo-pairs": (20, "prompt"),
        "dpo-zh-en-emoji": (20, "zh-en"),
    }
    sft = found["sft"]
    assert sft["estimated_training_tokens"] == sft["train"]["tokens"] and sft["epochs"] == 1.0
    assert sum(sft["train"]["histogram"]["counts"]) == sft["train"]["examples"]
    assert 0 < sft["train"]["scored_tokens"] < sft["train"]["tokens"]
    for name in ("sft", "dpo"):
        assert Path(f"runs/mission/data/{name}-lengths.png").read_bytes().startswith(b"\x89PNG")

    before = Path("runs/mission/data/report.json").read_bytes()
    assert run_stage(prepare.main, "recipe.yaml", "--show", 0) == 0
    assert "(found in" in (out := capsys.readouterr().out) and "(made in" not in out
    assert Path("runs/mission/data/report.json").read_bytes() == before


def test_what_the_pairs_say(folder: Path):
    """The Chinese answer is preferred, whatever the columns of a re-upload are called."""
    from mlx_zh.corpus.preferences import load_preferences

    row = json.loads(Path("dpo-zh-en-emoji.jsonl").read_text().splitlines()[0])
    pair = load_preferences(Path("dpo-zh-en-emoji.jsonl"))[0][0]
    assert (pair.chosen, pair.rejected) == (row["answer_zh"], row["answer_en"])
    Path("other.jsonl").write_text(json.dumps({"prompt": "问", "reply_en": "b", "reply_zh": "甲", "id": 1}))
    pair = load_preferences(Path("other.jsonl"), format="zh-en")[0][0]
    assert (pair.prompt[0].content, pair.chosen, pair.rejected) == ("问", "甲", "b")


def test_columns_that_differ_are_named(folder: Path, run_stage, capsys):
    Path("dpo-zh-en-emoji.jsonl").write_text(json.dumps({"query": "问", "zh": "甲", "en": "b"}))
    with pytest.raises(
        Exception, match=r"no columns like question, answer_zh and answer_en \(columns: query, zh, en\)"
    ):
        prepare.main(["recipe.yaml"])


def test_a_file_goes_before_a_name(folder: Path, run_stage, capsys):
    """The plain string `belle-1m` is the file or folder of that name where there is one."""
    Path("belle-1m").write_text(json.dumps({"instruction": "问", "output": "答"}))
    override = ["data.sft.train=[belle-1m]", "data.dpo.train=[]"]
    assert run_stage(prepare.main, "recipe.yaml", *override) == 0
    assert "belle-1m: 1 examples" in capsys.readouterr().out
    Path("belle-1m").unlink()
    with pytest.raises(RecipeError, match="belle-1m must be downloaded, and HF_HUB_OFFLINE is set"):
        prepare.main(["recipe.yaml", *override])


def test_a_folder_of_files_and_ones_own_entry(folder: Path, run_stage, capsys):
    Path("mine").mkdir()
    for name in ("a", "b"):
        Path(f"mine/{name}.jsonl").write_text(json.dumps({"frage": said(), "antwort": said()}))
    own = "data.registry={mine: {hub: file, kind: sft, columns: {instruction: frage, output: antwort}}}"
    train = "data.sft.train=[{name: mine, path: mine}]"
    assert run_stage(prepare.main, "recipe.yaml", own, train, "data.dpo.train=[]") == 0
    assert "mine: 2 examples" in capsys.readouterr().out


def test_a_table_and_what_datasets_saved(folder: Path, run_stage, capsys):
    from datasets import Dataset, DatasetDict

    rows = [{"instruction": f"第{n}个问题是什么？", "output": f"这是第{n}个问题的答案。"} for n in range(6)]
    Path("excel.csv").write_bytes(
        "".join(f"{a},{b}\r\n" for a, b in [("instruction", "output"), *[r.values() for r in rows]]).encode("gb18030")
    )
    saved = DatasetDict({"train": Dataset.from_list(rows[:2]), "test": Dataset.from_list(rows[2:])})
    saved.save_to_disk("saved")
    Path("tables").mkdir()
    Path("tables/train.tsv").write_text(f"instruction\toutput\n{said()}\t{said()}\n", encoding="utf-8")
    Path("tables/test.tsv").write_text("no\tdata\n", encoding="utf-8")
    own = "data.registry={mine: {hub: file, id: saved, kind: sft, split: test}}"
    train = "data.sft.train=[excel.csv, tables, {path: saved, max_samples: 1}, {name: mine}]"
    held = "data.sft.validation=[{path: saved, split: train}]"
    again = [own, train, held, "data.dpo.train=[]", "data.deduplicate.exact=false", "data.deduplicate.near=null"]
    assert run_stage(prepare.main, "recipe.yaml", *again) == 0
    out = capsys.readouterr().out
    for line in ("excel.csv: 6 examples\n", "tables: 1 examples\n", "saved: 1 examples (1 beyond max_samples)\n"):
        assert line in out
    assert [(s["name"], s["train"], s["validation"]) for s in report()["sft"]["sources"]] == [
        ("excel.csv", 6, 0),
        ("tables", 1, 0),
        ("saved", 1, 0),
        ("mine", 4, 0),
        ("saved", 0, 2),
    ]
    assert run_stage(prepare.main, "recipe.yaml", *again) == 0
    assert "(found in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sft.train=[belle-2m]", ["belle-2m: there is no such file", "did you mean belle-1m?"]),
        (
            "data.sft.train=[orca-dpo-pairs]",
            ["orca-dpo-pairs is a data set for dpo, so it cannot be used in data.sft"],
        ),
        (
            "data.sft.train=[mathglm-arithmetic]",
            ["must be fetched by hand", "{name: mathglm-arithmetic, path: FILE}"],
        ),
        ("data.sft.train=[{max_samples: 3}]", ["a section with a name (of a registered data set) or a path"]),
        ("data.sft.train=[{name: belle-1m, wieght: 2}]", ["did you mean"]),
        ("data.sft.train=[{name: belle-1m, subst: zh}]", ["data.sft.train[0].subst", "did you mean", "subset"]),
        (
            "data.sft.train=[{name: llama3-chinese, streaming: true}]",
            ["llama3-chinese comes from modelscope, not from huggingface: `streaming` does not apply"],
        ),
        (
            "data.sft.train=[{name: arithmetic-synthetic, split: test}]",
            ["arithmetic-synthetic is generated: `split` does not apply; leave it out"],
        ),
        (
            "data.sft.train=[{path: belle-1m.jsonl, subset: zh}]",
            ["belle-1m.jsonl is read from belle-1m.jsonl: `subset` does not apply"],
        ),
        (
            "data.sft.train=[{path: belle-1m.jsonl, split: train}]",
            ["belle-1m.jsonl is the file belle-1m.jsonl: `split` does not apply"],
        ),
    ],
)
def test_sources_that_cannot_be(folder: Path, override: str, words: list[str]):
    with pytest.raises(Exception) as error:
        prepare.main(["recipe.yaml", override])
    for word in words:
        assert word in str(error.value)


def test_exams_that_cannot_be_had_are_said_aloud(folder: Path, run_stage, capsys):
    asked = "data.decontaminate.benchmarks=[ceval, cmmlu]"
    exam = folder / "ceval" / "val"
    exam.mkdir(parents=True)
    (exam / "law_val.csv").write_text(f"id,question,A,B,C,D,answer\n0,{said(40)},a,b,c,d,A\n", encoding="utf-8")
    folders = f"evaluate.folder={{ceval: {folder / 'ceval'}}}"
    assert run_stage(prepare.main, "recipe.yaml", asked, folders, "--show", 0) == 0
    out = capsys.readouterr().out
    assert "warning: sft data was NOT checked for questions of cmmlu" in out
    assert "looked for 1 questions of ceval; NOT looked for: cmmlu" in out
    assert report()["sft"]["exam_questions"]["missing"].keys() == {"cmmlu"}


def test_the_list(run_stage, capsys, folder: Path):
    assert run_stage(prepare.main, "--list") == 0
    out = capsys.readouterr().out
    for word in ("belle-1m  (sft, huggingface: BelleGroup/train_1M_CN)", "917,424 rows; licence: GPL-3.0"):
        assert word in out
    own = "data.registry={mine: {hub: url, id: 'http://x', kind: dpo, note: my own}}"
    assert run_stage(prepare.main, "recipe.yaml", own, "--list") == 0
    assert "mine  (dpo, url: http://x)\n    my own\n" in capsys.readouterr().out


def test_a_recipe_is_needed(run_stage, capsys):
    assert run_stage(prepare.main) == 2
    assert "a recipe is needed, or --list" in capsys.readouterr().err


def test_the_hubs_error_reaches_the_user(folder: Path, monkeypatch):
    def limited(*_: Any) -> list[Path]:
        raise DownloadError("belle-1m: BelleGroup/train_1M_CN could not be downloaded: the server answers 429")

    monkeypatch.setitem(data_files._PLACES, "huggingface", limited)
    monkeypatch.setattr(preflight, "problems", lambda *_: [])  # a hub that answers
    with pytest.raises(DownloadError, match="answers 429"):
        prepare.main(["recipe.yaml", "data.sft.train=[belle-1m]"])
    assert not Path("runs").exists() and not list(Path("cache").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("variables", "said_of"),
    [
        ("{author: 小智}", ["{{author}}", "{{AUTHOR}}"]),  # the nearest of the names that rows say
        ("{AUTHOR: 小智, NAME: 阿明}", []),
        ("{AUTHOR: 小智, NAME: 阿明, city: 上海}", ["{{city}}"]),  # every other name has its variable
        ("{AUTHOR: 小智, NAME: 阿明, who: 诗人}", []),  # the system message says it
    ],
)
def test_a_variable_that_no_row_names_is_told(folder: Path, capsys, variables: str, said_of: list[str]) -> None:
    row = {"instruction": "你是谁？我是{{ NAME }}", "output": "我叫{{AUTHOR}}"}
    Path("names.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = ["data.sft.train=[names.jsonl]", "data.dpo.train=[]", "data.system=你是{{who}}"]
    for _ in range(2):  # made, and taken from the cache
        assert prepare.main(["recipe.yaml", *settings, f"data.variables={variables}"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "fills in nothing" in line]
        assert len(lines) == bool(said_of)
        assert all(name in "".join(lines) for name in said_of)


def test_rows_of_one_form_that_near_duplicates_take_are_told(folder: Path, capsys) -> None:
    """Forty questions after one instruction, which differ in two letters, and the remedy that the warning names."""
    names = [chr(0x4E00 + 37 * i) + chr(0x5E00 + 11 * i) for i in range(40)]
    ask = "请判断下面这句话表达的情绪是正面的还是负面的，只回答一个词，不要解释：我非常喜欢"
    rows = [{"instruction": f"{ask}{name}。", "output": "这句话表达的情绪是正面的。"} for name in names]
    Path("moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["recipe.yaml", "data.sft.train=[moods.jsonl]", "data.dpo.train=[]"]
    assert prepare.main(settings) == 0
    assert "moods.jsonl: 39 of 40 rows are left out as near duplicates." in capsys.readouterr().out
    assert prepare.main([*settings, "data.deduplicate.near=null"]) == 0
    shown = capsys.readouterr().out
    assert "near duplicates" not in shown and "40 examples" in shown


def test_quality_is_counted_on_the_console_and_drops_on_request(folder: Path, capsys) -> None:
    rows = [{"instruction": f"第{i}题的答案是什么？", "output": f"答案是{i * 7919}。"} for i in range(30)]
    rows += [{"instruction": "今天几号？", "output": "很抱歉，我无法得知今天的日期。"}]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["recipe.yaml", "data.sft.train=[asked.jsonl]", "data.dpo.train=[]"]
    assert prepare.main(settings) == 0
    out = capsys.readouterr().out
    assert (
        "asked.jsonl: rows with faults: refusal 1/31\n" in out
        and "data.quality.RULE=drop leaves such rows out" in out
    )
    assert prepare.main([*settings, "data.quality.refusal=drop"]) == 0
    out = capsys.readouterr().out
    assert (
        "asked.jsonl: 30 examples (1 refusal)\n" in out
        and "asked.jsonl: rows with faults: refusal 1/31 (drop)\n" in out
    )
    assert report()["sft"]["sources"][0]["quality"]["refusal"]["action"] == "drop"
    assert prepare.main([*settings, "data.quality=off"]) == 0
    assert "rows with faults" not in capsys.readouterr().out
    assert report()["sft"]["sources"][0]["quality"] == {}
