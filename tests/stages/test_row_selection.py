"""`data.sft.select` as its user meets it: what is kept, what is said, and what is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_zh import prepare, report
from mlx_zh.recipe import load_recipe
from mlx_zh.system import storage
from mlx_zh.training.ifd import IfdScores

ROWS = [(f"第{n}个问题是什么？", "好" * (n + 1)) for n in range(30)]


def write(name: str, rows: list[tuple[str, str]]) -> None:
    text = "".join(json.dumps({"instruction": a, "output": b}, ensure_ascii=False) + "\n" for a, b in rows)
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def selected(project: Any) -> Any:
    """A project with 30 rows whose replies get longer, and two ways to prepare it."""
    write("train.jsonl", ROWS)
    project.recipe["data"] = {
        "sft": {"train": ["train.jsonl"]},
        "deduplicate": {"near": None},
        "max_length": 256,
    }
    return project


def prepared(project: Any, select: dict[str, Any] | None, **data: Any) -> dict[str, Any]:
    """The report of the prepared data."""
    project.recipe["data"] |= data
    sft = project.recipe["data"]["sft"]
    sft.pop("select", None)
    if select is not None:
        sft["select"] = select
    project.write_recipe()
    result = project.run(prepare.main, "--show", "0")
    assert result.status == 0, result.err
    found = json.loads(Path("runs/tiny/data/report.json").read_text(encoding="utf-8"))["sft"]
    found["out"], found["err"] = result.out, result.err
    return found


def replies(found: dict[str, Any]) -> list[int]:
    """The characters of the training rows' replies, from their scored tokens: 3 bytes a character, and the end."""
    from mlx_zh.corpus.prepared import open_corpus

    examples = open_corpus(Path(found["folder"]), "sft", ready=True).splits["train"]
    return [(int(size) - 1) // 3 for size in examples.scored]


def test_the_longest_replies_are_kept_and_told(selected: Any):
    found = prepared(selected, {"method": "longest", "count": 5})
    assert replies(found) == [26, 27, 28, 29, 30]
    assert found["sources"][0]["dropped"] == {"not selected": 25} and found["sources"][0]["train"] == 5
    selection = found["selection"]
    assert (selection["candidates"], selection["wanted"], selection["kept"]) == (30, 5, 5)
    assert [row["answered"] for row in selection["top"]] == ["好" * n for n in (30, 29, 28)]
    assert [row["answered"] for row in selection["bottom"]] == ["好" * n for n in (3, 2, 1)]
    assert selection["top"][0]["row"] == "train.jsonl:30"
    assert sum(selection["histograms"][0]["candidates"]) == 30 and sum(selection["histograms"][0]["kept"]) == 5
    assert "Selected 5 of 30 rows by longest:" in found["out"] and "train.jsonl:30" in found["out"]


def test_rows_that_are_too_long_take_no_place(selected: Any):
    """The rows that do not fit into 128 tokens are those with the longest replies."""
    longest = max(replies(prepared(selected, None, max_length=128)))
    assert longest < 30
    found = prepared(selected, {"method": "longest", "count": 5}, max_length=128)
    assert replies(found) == list(range(longest - 4, longest + 1))
    assert found["sources"][0]["dropped"]["first exchange longer than max_length"] == 30 - longest
    assert found["over_long_share"] == (30 - longest) / 30


@pytest.mark.parametrize("method", ["random", "diverse", ["diverse", "longest"]])
def test_a_larger_count_keeps_the_rows_of_a_smaller_one(selected: Any, method: Any):
    smaller = replies(prepared(selected, {"method": method, "count": 6}))
    larger = replies(prepared(selected, {"method": method, "fraction": 0.5}))
    assert len(smaller) == 6 and len(larger) == 15 and set(smaller) < set(larger)


def test_sources_keep_their_shares(selected: Any):
    """20 and 10 rows: 6 are 4 and 2. Without per_source, the longest are all of the second file."""
    write("short.jsonl", ROWS[:20])
    write("long.jsonl", ROWS[20:])
    data = {"train": ["short.jsonl", "long.jsonl"]}
    found = prepared(selected, {"method": "longest", "count": 6}, sft=data)
    assert [source["kept"] for source in found["selection"]["sources"]] == [4, 2]
    assert replies(found) == [17, 18, 19, 20, 29, 30]
    found = prepared(selected, {"method": "longest", "count": 6, "per_source": False}, sft=data)
    assert [source["kept"] for source in found["selection"]["sources"]] == [0, 6]


def test_interleaved_sources_and_weights(selected: Any):
    """Interleaved 1 to 1, both files give 10 rows, so 6 selected rows are 3 and 3. Weights repeat selected rows."""
    write("short.jsonl", ROWS[:20])
    write("long.jsonl", ROWS[20:])
    data = {"train": ["short.jsonl", "long.jsonl"]}
    found = prepared(selected, {"method": "longest", "count": 6}, sft=data, mixing="interleave")
    assert replies(found) == [18, 28, 19, 29, 20, 30]
    data = {"train": ["short.jsonl", {"path": "long.jsonl", "weight": 2.0}]}
    found = prepared(selected, {"method": "longest", "count": 3}, sft=data, mixing="concat")
    assert replies(found) == [19, 20, 30, 30]
    data = {"train": [{"path": "short.jsonl", "weight": 0.5}, "long.jsonl"]}
    found = prepared(selected, {"method": "longest", "count": 6}, sft=data)
    assert replies(found) == [18, 19, 20, 28, 29, 30]


def test_documents_are_rows_too(selected: Any):
    """A document of several examples is one row: by length it is kept whole, and it has no IFD."""
    Path("book.jsonl").write_text(json.dumps({"text": "书中自有黄金屋。" * 40}) + "\n", encoding="utf-8")
    data = {"train": ["train.jsonl", "book.jsonl"]}
    found = prepared(selected, {"method": "longest", "count": 1, "per_source": False}, sft=data)
    assert found["selection"]["candidates"] == 31
    assert [source["kept"] for source in found["selection"]["sources"]] == [0, 1]
    assert found["train"]["examples"] > 1 and found["train"]["tokens"] >= 40 * 8 * 3
    found = prepared(selected, {"method": ["diverse", "ifd"], "count": 4}, sft=data)
    assert found["sources"][1]["dropped"] == {"no IFD: raw text, or no reply that fits": 1}


def test_the_validation_set_is_that_of_the_whole_data(selected: Any):
    whole = prepared(selected, None, validation_fraction=0.3)
    found = prepared(selected, {"method": "longest", "count": 5}, validation_fraction=0.3)
    assert found["validation"] == whole["validation"] and found["train"]["examples"] == 5


def test_scores_are_kept_and_found_again(selected: Any, monkeypatch: pytest.MonkeyPatch):
    computed: list[int] = []
    compute = IfdScores.compute

    def counted(self: Any, model: Any, rows: Any, **options: Any) -> Any:
        computed.append(len(rows))
        return compute(self, model, rows, **options)

    monkeypatch.setattr(IfdScores, "compute", counted)
    write("train.jsonl", ROWS[:20])
    first = prepared(selected, {"method": "ifd", "count": 8})
    assert sum(computed) == 20 and first["selection"]["model"] == str(selected.model)
    assert len(list((storage.cache_folder() / "scores").iterdir())) == 1
    computed.clear()
    prepared(selected, {"method": ["diverse", "ifd"], "count": 8})
    assert computed == []
    write("train.jsonl", ROWS)
    grown = prepared(selected, {"method": "ifd", "count": 8})
    assert sum(computed) == 10
    scores = {row["row"]: row["score"] for row in (*grown["selection"]["top"], *grown["selection"]["bottom"])}
    assert all(score < 1 for score in scores.values())
    top = [row["score"] for row in grown["selection"]["top"]]
    assert top == sorted(top, reverse=True)
    helped = "question does not help the reply (IFD of 1 or more)"
    assert grown["sources"][0]["dropped"].get(helped, 0) + grown["sources"][0]["dropped"]["not selected"] == 22


def test_a_killed_pass_goes_on(selected: Any, monkeypatch: pytest.MonkeyPatch):
    """What was scored before the stop is not scored again, and the corpus is what it would have been."""
    from mlx_zh.training import ifd

    monkeypatch.setattr(ifd, "_BLOCK", 4)
    calls: list[int] = []
    losses = ifd.losses

    def stopping(model: Any, rows: Any, chunk: Any = None) -> Any:
        calls.append(len(rows))
        if stop and len(calls) > 3:
            raise KeyboardInterrupt
        return losses(model, rows, chunk)

    monkeypatch.setattr(ifd, "losses", stopping)
    stop = True
    selected.recipe["data"]["sft"]["select"] = {"method": "ifd", "count": 8}
    selected.write_recipe()
    assert selected.run(prepare.main).status != 0
    kept = sum(calls[:3])
    calls.clear()
    stop = False
    found = prepared(selected, {"method": "ifd", "count": 8})
    assert 0 < kept < 30 and sum(calls) <= 30 - kept + 4
    assert found["selection"]["kept"] == 8


def test_corpora_without_selection_keep_their_key(selected: Any):
    found = prepared(selected, None)
    made_of = json.loads((Path(found["folder"]) / "manifest.json").read_text())["made_of"]
    assert "select" not in made_of["settings"] and "selection" not in found


def test_a_budget_takes_rows_in_the_order_of_the_selection(selected: Any):
    """Six steps of four rows and a tenth more are 27 rows; the budget sets the count and leaves `max_samples`."""
    from mlx_zh.planning.workload import thinned
    from mlx_zh.stages.budgeting import applied
    from mlx_zh.stages.data import registry_of

    selected.recipe["data"]["sft"]["select"] = {"method": "longest"}
    selected.write_recipe()
    recipe = load_recipe(Path("recipe.yaml"))
    counts = thinned(recipe, {"sft": 6}, registry_of(recipe))
    assert counts == {"sft": [27]}
    record: Any = {"max_samples": counts, "steps": {"sft": 6}, "limit": None}
    cut = applied(recipe, record)
    assert cut.data.sft.select is not None and cut.data.sft.select.count == 27
    assert cut.data.sft.train[0].max_samples is None
    smaller = load_recipe(Path("recipe.yaml"), ["data.sft.select.count=9"])
    assert applied(smaller, record).data.sft.select == smaller.data.sft.select
    half = load_recipe(Path("recipe.yaml"), ["data.sft.select.fraction=0.5"])
    assert thinned(half, {"sft": 6}, registry_of(half)) == {}  # 15 rows are fewer than the steps take


def test_a_budget_selects_by_itself(selected: Any, monkeypatch: pytest.MonkeyPatch):
    """A recipe without `select` gets that of the budget, and is known again after it was written into it."""
    from mlx_zh.stages import budgeting
    from mlx_zh.stages.run_folder import RunFolder

    selected.write_recipe()
    recipe = load_recipe(Path("recipe.yaml"), ["budget=1h"])
    record: Any = {name: {} for name in budgeting.BudgetRecord.__required_keys__}
    record |= {"asked": budgeting.asked_of(recipe), "max_samples": {"sft": [27]}, "steps": {"sft": 6}, "limit": None}
    record |= {"budget": "1h", "made": 1.0, "machine": "a test"}
    record |= {"pace": {"training": 1.0, "forward": 1.0, "update": 1.0, "generation": 1.0}}
    for methods in (None, ["diverse", "longest"]):
        if methods is not None:
            record["select"] = {"sft": methods}
        cut = budgeting.applied(recipe, record)
        select, source = cut.data.sft.select, cut.data.sft.train[0]
        assert (select is None, source.max_samples) == ((True, 27) if methods is None else (False, None))
        if select is not None:
            assert (select.method, select.count) == (("diverse", "longest"), 27)
        RunFolder.of(recipe).path.mkdir(parents=True, exist_ok=True)
        RunFolder.of(recipe).budget.write_text(json.dumps(record))
        assert budgeting.matching(recipe, RunFolder.of(recipe)) == record
        assert budgeting.matching(cut, RunFolder.of(recipe)) == record


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"method": "ifdd"}, "data.sft.select.method"),
        ({"method": ["random", "ifd"]}, "without random"),
        ({"method": ["ifd", "ifd"]}, "different ones"),
        ({"count": 5, "fraction": 0.5}, "left out where count is given"),
        ({"fraction": 0}, "fraction"),
        ({"method": "longest", "model": "x"}, "only the method ifd"),
    ],
)
def test_selections_that_mean_nothing_are_refused(selected: Any, select: dict[str, Any], said: str):
    selected.recipe["data"]["sft"]["select"] = select
    selected.write_recipe()
    result = selected.run(prepare.main)
    assert result.status == 2 and said in result.err


def test_pairs_have_no_ifd_and_interleaving_fixes_shares(selected: Any):
    selected.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "select": {"method": "ifd"}}
    selected.write_recipe()
    assert "ifd scores conversations, not pairs" in selected.run(prepare.main).err
    selected.recipe["data"].pop("dpo")
    selected.recipe["data"] |= {"mixing": "interleave"}
    selected.recipe["data"]["sft"]["select"] = {"per_source": False}
    selected.write_recipe()
    assert "mixing: interleave sets the share" in selected.run(prepare.main).err


def test_pairs_are_selected_too(selected: Any):
    rows = [{"prompt": f"第{n}问", "chosen": "好" * (n + 1), "rejected": "不"} for n in range(10)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selected.recipe["data"] |= {"sft": {}, "dpo": {"train": ["pairs.jsonl"]}}
    selected.recipe["data"]["dpo"]["select"] = {"method": ["diverse", "longest"], "count": 4}
    selected.write_recipe()
    assert selected.run(prepare.main, "--show", "0").status == 0
    found = json.loads(Path("runs/tiny/data/report.json").read_text())["dpo"]
    assert found["train"]["examples"] == 4 and found["selection"]["kept"] == 4


def test_the_report_shows_the_selection(selected: Any):
    prepared(selected, {"method": "longest", "count": 5})
    assert selected.run(report.main).status == 0
    for name in ("report.md", "report.html"):
        text = Path(f"runs/tiny/{name}").read_text(encoding="utf-8")
        assert "5 of 30 rows by longest" in text and "train.jsonl:30" in text and "好" * 30 in text
    assert "longest of all rows" in Path("runs/tiny/report.html").read_text(encoding="utf-8")


def test_the_smallest_model_at_hand_that_knows_chinese(model_folder: Any, monkeypatch: pytest.MonkeyPatch):
    from mlx_zh.models.load import BUILT_IN
    from mlx_zh.stages import row_scores

    base = str(model_folder())
    assert row_scores.smallest_at_hand(base) == base  # nothing is smaller
    present = {"qwen3-1.7b"}
    tokens = {BUILT_IN: 1.9, "qwen3-1.7b": 0.6}
    monkeypatch.setattr(row_scores, "_is_at_hand", lambda name: name in present)
    monkeypatch.setattr(row_scores, "_tokens_a_character", tokens.get)
    assert row_scores.smallest_at_hand("qwen3-8b") == "qwen3-1.7b"
    present.add(BUILT_IN)
    assert row_scores.smallest_at_hand("qwen3-8b") == "qwen3-1.7b"
    present.remove("qwen3-1.7b")
    assert row_scores.smallest_at_hand("qwen3-8b") == "qwen3-8b"
    tokens[BUILT_IN] = 1.0
    assert row_scores.smallest_at_hand("qwen3-8b") == BUILT_IN


def test_tokens_of_a_chinese_character(model_folder: Any):
    """The tokenizer of tests has one token a byte, so three a character; scores by its model are told as noise."""
    from mlx_zh.planning.row_lengths import tokens_a_character
    from mlx_zh.stages import row_scores

    assert row_scores._tokens_a_character(str(model_folder())) == 3
    assert tokens_a_character(len) == 1
    assert row_scores._tokens_a_character("no-such-model") is None


def test_a_model_that_hardly_knows_chinese_is_told(selected: Any):
    found = prepared(selected, {"method": "ifd", "count": 8})
    assert "needs 3.0 tokens for a Chinese character" in found["out"] + found["err"]


@pytest.mark.network
def test_the_built_in_model_is_not_chosen(smollm2_path: Path):
    from mlx_zh.stages import row_scores

    assert not row_scores._knows_chinese(str(smollm2_path))


def test_a_run_keeps_its_scoring_model_unless_it_fits_no_more(selected: Any, monkeypatch: pytest.MonkeyPatch):
    """A name that was taken out of the recipe, or is larger than a new base, does not come back from the report."""
    from mlx_zh.stages import row_scores
    from mlx_zh.stages.run_folder import RunFolder

    selected.recipe["data"]["sft"]["select"] = {"method": "ifd"}
    selected.recipe["model"] = {"path": "qwen3-4b"}
    selected.write_recipe()
    recipe = load_recipe(Path("recipe.yaml"))
    RunFolder.of(recipe).prepared.parent.mkdir(parents=True)
    tokens = {"qwen3-1.7b": 0.6, "qwen3-8b": 0.6, "smollm2-135m-instruct": 1.9, "qwen3-4b": 0.6}
    monkeypatch.setattr(row_scores, "_is_at_hand", lambda name: name in tokens)
    monkeypatch.setattr(row_scores, "_tokens_a_character", tokens.get)
    expected = {"qwen3-1.7b": "qwen3-1.7b", "qwen3-4b": "qwen3-4b", "qwen3-8b": None, "smollm2-135m-instruct": None}
    for name, kept in expected.items():
        RunFolder.of(recipe).prepared.write_text(json.dumps({"sft": {"selection": {"model": name}}}))
        assert row_scores._earlier(recipe, "sft") == kept
