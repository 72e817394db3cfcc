"""`mlx-zh compare`: figures worked out by hand, honest answers for every state of a run, and nothing hostile."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SFT, paired, write_exam, write_run
from test_report import HOSTILE, Document

from mlx_zh import compare
from mlx_zh.errors import DataError, MlxZhError, RecipeError
from mlx_zh.exams.statistics import holm
from mlx_zh.reporting.compare_page import compare_page
from mlx_zh.reporting.compare_view import Comparison, exam_lines
from mlx_zh.reporting.compared_curves import compared_curves
from mlx_zh.reporting.compared_exams import own_changes
from mlx_zh.reporting.compared_figures import compared_answers, compared_figures, size
from mlx_zh.stages.comparing import chosen_runs, compared
from mlx_zh.system.storage import write_json

# Twice the tokens in each step, half the time; the lowest validation loss is not the last one.
OTHER = [
    {"step": 0, "eval_loss": 2.0},
    {"step": 1, "loss": 2.0, "scored_tokens": 200, "elapsed_seconds": 30.0},
    {"step": 1, "eval_loss": 1.25},
    {"step": 2, "loss": 1.5, "scored_tokens": 200, "elapsed_seconds": 60.0},
    {"step": 2, "eval_loss": 1.3},
]


def read(*folders: Path, stage: str | None = None) -> Comparison:
    return compared(chosen_runs([str(folder) for folder in folders]), stage)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = write_run(tmp_path / "first")
    return first, write_run(tmp_path / "second", OTHER, sft={"batch_size": 32, "learning_rate": 3e-4})


def check(comparison: Comparison, what: str) -> tuple[str, str]:
    found = next(check for check in comparison.checks if check.what.en == what)
    return found.status, found.meaning.en


# Figures


def test_only_the_keys_that_differ_are_shown_with_the_values_that_were_used(two):
    differences = [(each.key, each.values) for each in read(*two).differences]
    assert differences == [("sft.batch_size", ["16", "32"]), ("sft.learning_rate", ["0.0001", "0.0003"])]


def test_curves_lie_over_steps_tokens_and_time(two):
    """Smoothing two values has weight w = 0.0449625, see `charts.smooth`: 2, 1 becomes 2, 2 w + (1 - w) = 1 + w."""
    (sft,) = compared_curves(read(*two).runs)
    weight = 1.8 * (1 / (1 + math.exp(-0.1)) - 0.5)
    points = {axis: [series.points for series in charts[0].series] for axis, charts in sft.charts.items()}
    first, second = [2.0, pytest.approx(1 + weight)], [2.0, pytest.approx(1.5 + 0.5 * weight)]
    places = {"step": ([1, 2], [1, 2]), "scored_tokens": ([100, 200], [200, 400]), "hours": ([1, 2], [0.5, 1])}
    assert points == {
        axis: [list(zip(xs, ys, strict=True)) for xs, ys in zip(both, (first, second), strict=True)]
        for axis, both in places.items()
    }
    losses = {axis: [series.points for series in charts[1].series] for axis, charts in sft.charts.items()}
    assert losses["scored_tokens"] == [[(0, 2.0), (200, 1.5)], [(0, 2.0), (200, 1.25), (400, 1.3)]]
    assert sft.charts["hours"][0].along.en == "minutes"
    assert sft.axis == "scored_tokens"  # a step of the second run holds twice as many tokens


def test_tokens_of_different_models_are_not_compared(two):
    manifest = json.loads((two[1] / "manifest.json").read_text())
    write_json(two[1] / "manifest.json", manifest | {"model": {"source": "owner/other", "fingerprint": "fe" * 8}})
    comparison = read(*two)
    assert compared_curves(comparison.runs)[0].axis == "step"
    assert check(comparison, "base model")[0] == "differs"
    assert not comparison.verdict[0] and "base model" in comparison.verdict[1].en


def test_a_run_without_times_leaves_out_the_axis_of_time(two, tmp_path):
    untimed = [{k: v for k, v in line.items() if k != "elapsed_seconds"} for line in SFT]
    untimed[-2]["elapsed_seconds"] = 7.0  # of the last step alone
    third = write_run(tmp_path / "third", untimed)
    assert [*compared_curves(read(two[0], third).runs)[0].charts] == ["step", "scored_tokens"]


def test_the_lowest_validation_loss_is_marked_where_the_sets_are_the_same(two):
    def lowest() -> tuple[list[str], frozenset[int]]:
        groups = compared_figures(read(*two).runs)
        row = next(row for group in groups for row in group.rows if row.name.en == "lowest validation loss")
        return [value.en for value in row.values], row.best

    assert lowest() == (["1.5000 (step 2)", "1.2500 (step 1)"], {1})
    report = json.loads((two[1] / "data" / "report.json").read_text())
    report["sft"]["key"] = "cd" * 16
    write_json(two[1] / "data" / "report.json", report)
    assert lowest()[1] == {1}  # prepared anew, but from the same files with the same settings
    report["sft"]["sources"][1]["validation"] = 1
    write_json(two[1] / "data" / "report.json", report)
    assert lowest()[1] == frozenset()
    status, meaning = check(read(*two), "SFT validation set")
    assert status == "differs" and "not comparable" in meaning


def test_validation_sets_that_were_rendered_in_another_way_differ(tmp_path):
    first = write_run(tmp_path / "first")
    data = {"sft": {"train": ["my.jsonl"], "validation": ["my-validation.jsonl"]}, "max_length": 99}
    second = write_run(tmp_path / "second", data=data)
    report = json.loads((second / "data" / "report.json").read_text())
    report["sft"]["key"] = "cd" * 16
    write_json(second / "data" / "report.json", report)
    comparison = read(first, second)
    assert check(comparison, "SFT validation set")[0] == "differs"
    assert check(comparison, "SFT training data")[1].startswith("The files are the same, but they were prepared")


@pytest.mark.parametrize(
    ("count", "text"), [(950, "1 kB"), (12_400, "12 kB"), (19_600_000, "19.6 MB"), (4_517_000_000, "4.52 GB")]
)
def test_sizes_have_a_unit_that_fits(count, text):
    assert size(count).zh == size(count).en == text


# Exams


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


@pytest.mark.parametrize(("won", "lost"), [(8, 1), (12, 1), (3, 4), (1, 9), (0, 0)])
def test_a_run_is_tested_against_the_first_question_by_question(two, won, lost):
    """The interval and p against Bonett and Price's formula (2012): with one won and one lost question added,
    d = (won - lost) / (n + 2) has the variance ((won + lost + 2) / (n + 2) - d²) / n."""
    before, after = paired(won, lost)
    write_exam(two[0], {"sft": before})
    write_exam(two[1], {"sft": after})
    comparison = read(*two)
    (exam,) = comparison.exams
    test = exam.rows[0].tests[1]
    assert (test.compared.won, test.compared.lost) == (won, lost)
    assert test.compared.difference == pytest.approx((won - lost) / 200)
    assert exam.rows[0].tests[0] is None and test.p == test.compared.p  # one comparison: nothing to correct
    verdict = "noise" if mcnemar(won, lost) >= 0.05 else "better" if won > lost else "worse"
    assert test.verdict == verdict
    if won + lost:
        middle = (won - lost) / 202
        deviation = math.sqrt(((won + lost + 2) / 202 - middle**2) / 200)
        ends = [middle + side * 1.96 * deviation for side in (-1, 1)]
        assert test.compared.interval == pytest.approx(ends, abs=0.006)  # a question is 0.005
        expected = 2 * NormalDist().cdf(-abs(middle) / deviation)
        assert test.compared.p == pytest.approx(expected, rel=0.6)  # p counts draws at 0 for both sides


def test_a_gain_that_is_real_alone_may_be_luck_among_several(two, tmp_path):
    """8 won and 1 lost: McNemar's p is 0.039; Holm's correction over two comparisons makes it 0.078."""
    before, after = paired(8, 1)
    third = write_run(tmp_path / "third")
    for run, answers in ((two[0], before), (two[1], after), (third, before)):
        write_exam(run, {"sft": answers})
    alone, among = read(*two).exams[0].rows[0].tests[1], read(*two, third).exams[0].rows[0].tests
    assert alone.verdict == "better" and alone.p == pytest.approx(mcnemar(8, 1), abs=0.01)
    assert among[1].compared == alone.compared and among[1].verdict == "noise"
    assert among[1].p == pytest.approx(2 * alone.p) and among[2].p == 1.0
    lines = [line.en for line in exam_lines(read(*two, third))]
    assert lines[0].startswith("My exam: second and first do not differ beyond chance: 99.5 % and 96.0 % (p = 0.0")
    page = compare_page(read(*two, third), "now")
    assert "Holm's correction over 2 comparisons" in page.replace("&#39;", "'")


def test_holm_by_hand():
    """Sorted 0.01, 0.03, 0.04: times 3, 2, 1 gives 0.03, 0.06, 0.04, and none below the one before: 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.7, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_a_correction_never_makes_p_smaller_and_keeps_the_order(p):
    adjusted = holm(p)
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
    assert [a for _, a in sorted(zip(p, adjusted, strict=True))] == sorted(adjusted)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"asked": "other"}, "not compared: other questions (4 and 4)"),
        ({"version": 2}, "not compared: other protocol (cloze v1 and cloze v2)"),
    ],
)
def test_exams_that_were_not_the_same_are_not_tested(two, changes, reason):
    write_exam(two[0], {"sft": "1101"})
    write_exam(two[1], {"sft": "1111"}, **changes)
    comparison = read(*two)
    (exam,) = comparison.exams
    assert [row.cells[1].macro for row in exam.rows] == [1.0]  # shown, but not compared
    assert exam.rows[0].tests == [None, None] and exam.untested[1].en == reason
    assert check(comparison, "My exam") == ("differs", reason)
    assert reason in compare_page(comparison, "now")


def test_an_exam_that_only_one_has_taken_is_said_to_be_missing(two):
    write_exam(two[1], {"base": "1100", "sft": "1111"})
    comparison = read(*two)
    (exam,) = comparison.exams
    assert exam.stages == [None, "sft"] and exam.first == 1 and exam.untested[0].en == "no results"
    assert check(comparison, "My exam") == ("unknown", "Only one run has results; there are none of first.")
    compare_page(comparison, "now")


def test_answers_that_are_damaged_are_not_tested(two):
    for run in two:
        write_exam(run, {"sft": "1101"})
    (two[1] / "eval" / "sft-my.jsonl").write_text('{"subject": "town"\n')
    (exam,) = read(*two).exams
    assert exam.untested[1].en == "not compared: the single answers are missing or damaged"


def test_models_of_different_stages_are_named_and_can_be_chosen(two):
    write_exam(two[0], {"base": "1000", "sft": "1100"})
    write_exam(two[1], {"base": "1000", "sft": "1100", "dpo": "1110"})
    comparison = read(*two)
    assert comparison.exams[0].stages == ["sft", "dpo"] and comparison.exams[0].has_base
    assert check(comparison, "My exam")[0] == "differs"
    chosen = read(*two, stage="sft")
    assert chosen.exams[0].stages == ["sft", "sft"] and check(chosen, "My exam")[0] == "same"
    assert read(*two, stage="fused").exams[0].stages == [None, None]
    compare_page(read(*two, stage="fused"), "now")


def test_what_a_run_forgot_is_measured_against_its_own_base(two):
    write_exam(two[0], {"base": "1" * 100, "sft": "0" * 30 + "1" * 70})
    write_exam(two[1], {"sft": "1" * 100})
    ((title, (own, missing)),) = own_changes(read(*two).runs)
    assert title == "My exam" and missing is None
    assert own.change.difference == pytest.approx(-0.3) and not own.change.noise and own.stages == ("base", "sft")


# Answers


def test_the_same_prompts_stand_side_by_side(two):
    asked = {"prompts": ["one?", "two?"], "expected": ["1", None]}
    write_json(two[0] / "samples.json", asked | {"answers": {"base": ["?", "?"], "sft": ["1!", ""]}})
    second = {"prompts": ["two?", "three?"], "expected": [None, "3"], "answers": {"sft": ["b", "4"]}}
    write_json(two[1] / "samples.json", second)
    answers = compared_answers(read(*two).runs)
    assert [column.en for column in answers.columns] == ["base", "first · SFT", "second · SFT"]
    shown = [(prompt, [(reply.text, reply.right) for reply in replies]) for prompt, replies in answers.prompts]
    assert shown == [
        ("one?", [("?", False), ("1!", True), (None, None)]),
        ("two?", [("?", None), ("", None), ("b", None)]),
        ("three?", [(None, None), (None, None), ("4", False)]),
    ]
    assert check(read(*two), "sample prompts")[0] == "differs"


# Runs of every state


def test_runs_that_ended_early_have_an_honest_answer(two, tmp_path):
    half = write_run(tmp_path / "half", SFT[:2])
    (half / "sft" / "summary.json").unlink()
    write_json(half / "pipeline.json", {"stages": {"sft": {"inputs": {}, "outputs": None}}})
    failed = tmp_path / "failed"
    write_json(failed / "pipeline.json", {"stages": {"prepare": {"inputs": {}, "outputs": None}}})
    write_json(failed / "ended.json", {"how": "failed", "why": "there is no file at my.jsonl."})
    comparison = read(two[0], half, failed)
    assert [run.state.en for run in comparison.runs] == [
        "finished",
        "stopped before the end: figures so far",
        "failed: there is no file at my.jsonl.",
    ]
    assert [each.key for each in comparison.differences] == []
    assert check(comparison, "base model")[0] == "unknown" and not comparison.verdict[0]
    alarms = [f"{alarm.where.en}: {alarm.what.en}" for alarm in comparison.alarms]
    assert any("half · SFT: SFT is not finished" in alarm for alarm in alarms)
    assert any(alarm.startswith("failed · ") and "has no recipe.yaml" in alarm for alarm in alarms)
    compare_page(comparison, "now")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "7", '{"sft": 3, "stages": [], "answers": 1}', "\x00\xff"]
)
def test_damaged_files_are_named_and_the_rest_is_compared(two, content):
    write_exam(two[1], {"sft": "1101"})
    write_exam(two[0], {"sft": "1100"})
    for path in sorted(two[1].rglob("*.json")):
        path.write_bytes(content.encode("latin-1"))
    comparison = read(*two)
    page = compare_page(comparison, "now")
    assert comparison.runs[0].findings.training["sft"].steps and "second" in page
    assert check(comparison, "SFT training data")[0] == "unknown"


def test_a_recipe_that_cannot_be_read_leaves_the_rest(two):
    (two[1] / "recipe.yaml").write_text("name: [\n")
    comparison = read(*two)
    assert comparison.differences == [] and "Fewer than two" in comparison.recipe_note.en
    assert any("cannot be read" in alarm.what.en for alarm in comparison.alarms)
    compare_page(comparison, "now")


# Names and secrets


def test_nothing_that_a_run_says_becomes_markup(two, tmp_path):
    folder = write_run(tmp_path / "plain").rename(tmp_path / "<script>alert(1)<script>\n&\"'<b>")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("max_length: 1024", f"max_length: 1024\n  system: {json.dumps(HOSTILE)}")
    )
    recipe.write_text(recipe.read_text().replace("  system: null\n", ""))
    write_exam(folder, {"sft": "1101"}, title=HOSTILE)
    write_exam(two[0], {"sft": "1101"})
    write_json(folder / "samples.json", {"prompts": [HOSTILE], "answers": {"sft": [HOSTILE]}})
    write_json(folder / "fused" / "summary.json", {HOSTILE: {"size": 3_000_000, "warnings": [HOSTILE]}})
    comparison = read(two[0], folder)
    assert any(each.key == "data.system" for each in comparison.differences)
    document = Document(compare_page(comparison, HOSTILE))
    tags = [tag for tag, _ in document.elements]
    assert tags.count("script") == tags.count("style") == 1 and "img" not in tags
    links = [
        value for _, attributes in document.elements for key, value in attributes.items() if key in ("href", "src")
    ]
    assert links and all(link.startswith("#") for link in links)
    assert not [key for _, attributes in document.elements for key in attributes if key.startswith("on")]
    assert document.text.count("alert(1)") > 5


def test_secrets_and_the_home_folder_stay_here(two, monkeypatch):
    token = "hf_" + "a" * 34
    monkeypatch.setattr(Path, "home", lambda: two[0].parent)
    recipe = two[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("system: null", f"system: the token is {token}"))
    write_json(two[1] / "samples.json", {"prompts": [token], "answers": {"sft": [str(two[0].parent)]}})
    page = compare_page(read(*two), "now")
    assert token not in page and str(two[0].parent) not in page and "•••" in page


# The command


def test_the_command_writes_the_page_and_a_summary_in_both_languages(two, capsys, monkeypatch):
    monkeypatch.chdir(two[0].parent)
    write_exam(two[0], {"sft": paired(12, 1)[0]})
    write_exam(two[1], {"sft": paired(12, 1)[1]})
    assert compare.main(["first", "second", f"runs={two[0].parent}"]) == 0
    said = capsys.readouterr().out
    assert "may be compared" in said and re.search(r"sft\.batch_size +16 +32\n", said)
    assert "My exam: second is better than first: 94.0 % → 99.5 % (p" in said
    assert said.rstrip().endswith("compare-first-second.html")
    assert "<title>first, second 对比</title>" in (two[0].parent / "compare-first-second.html").read_text()
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    assert compare.main([str(two[0]), str(two[1]), "--out", "both.html"]) == 0
    said = capsys.readouterr().out
    assert "My exam：second 比 first 好：94.0 % → 99.5 %（p" in said and "配方差异" in said
    assert compare.main([str(two[0]), str(two[1]), "--out", "both.html"]) == 0  # its own page is replaced


def test_a_table_that_is_too_wide_becomes_a_block_for_each_run(two, capsys, monkeypatch):
    monkeypatch.chdir(two[0].parent)
    names = [f"a-run-with-a-rather-long-name-{number}" for number in range(3)]
    folders = [str(write_run(two[0].parent / name)) for name in names]
    compare.main(folders)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[2:-1])) <= 80
    assert [line.strip() for line in said.splitlines() if line.startswith("  a-run")] == names


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["first"], DataError, "of 2 to 6 runs, got 1"),
        (["first", "first"], DataError, "is there twice"),
        (["first", "../runs/first"], DataError, "is there twice"),
        (["first", "frist"], RecipeError, "did you mean first?"),
        (["first", "empty"], RecipeError, "is a folder without a recipe"),
        (["first", "second", "--out", "page.txt"], DataError, "ends in .html"),
        (["first", "second", "--out", "empty.html"], DataError, "is a folder"),
        (["first", "second", "--out", "mine.html"], DataError, "was not written by this program"),
        (["first", "recipe.yaml"], DataError, "has not been run yet"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(tmp_path, monkeypatch, arguments, error, message):
    (tmp_path / "runs").mkdir()
    for name in ("first", "second"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.html").mkdir()
    (tmp_path / "mine.html").write_text("<html>my own page</html>")
    (tmp_path / "recipe.yaml").write_text("name: other\nmodel: {path: owner/model}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)) as raised:
        compare.main(arguments)
    assert isinstance(raised.value, MlxZhError)
    assert (tmp_path / "mine.html").read_text() == "<html>my own page</html>"


def test_runs_of_the_same_name_are_told_apart_by_their_folders(two, tmp_path):
    other = write_run(tmp_path / "elsewhere" / "first")
    labels = [run.label for run in read(two[0], other).runs]
    assert len(set(labels)) == 2 and all(label.endswith("first") for label in labels)
