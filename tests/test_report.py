"""The report: figures of a run folder, right and in two languages, and no markup or secret that came with them."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fabricated
import pytest
import yaml

from mlx_zh import report
from mlx_zh.errors import DataError
from mlx_zh.exams import figures as exam_report
from mlx_zh.reporting import data_view, plots, svg
from mlx_zh.reporting.charts import Dots, Span, smooth
from mlx_zh.reporting.findings import Findings, gather
from mlx_zh.reporting.markdown import markdown
from mlx_zh.reporting.messages import Text
from mlx_zh.reporting.page import page
from mlx_zh.reporting.svg import label, ticks
from mlx_zh.reporting.words import duration
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import redaction
from mlx_zh.system.storage import write_json

ROWS = {
    "ceval": ["Average", "Average (hard)", "STEM", "Social Sciences", "Humanities", "Other"],
    "cmmlu": ["Average", "STEM", "Social Sciences", "Humanities", "Other", "China-specific"],
}
HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror='a' title=\"b\"> [x](javascript:alert(2)) |`*_"
)


def gathered(folder: Path) -> Findings:
    return gather(RunFolder(folder), yaml.safe_dump(fabricated.RECIPE), name="invented", bootstrap=200, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    questions = {"ceval": 12, "cmmlu": 6}
    return fabricated.write_run(tmp_path_factory.mktemp("runs") / "invented", steps=40, questions=questions)


@pytest.fixture(scope="module")
def findings(run) -> Findings:
    return gathered(run)


class Document(HTMLParser):
    """Elements, attributes and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# Figures


def test_smoothing_is_llama_factorys():
    """N = 2: w = 1.8 (1 / (1 + e^-0.1) - 1/2) = 0.044963, so 1, 2 becomes 1, w + 2 (1 - w) = 2 - w."""
    weight = 1.8 * (1 / (1 + math.exp(-0.1)) - 0.5)
    assert weight == pytest.approx(0.0449625, abs=1e-6)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, 2 - weight])
    assert smooth([]) == [] and smooth([3.5]) == [3.5]
    # Many values: w -> 0.9, so a jump of 1 has 0.1 of its height at once and 1 - 0.9^2 a step later.
    assert smooth([0.0] * 400 + [1.0, 1.0])[-2:] == pytest.approx([0.1, 0.19], abs=1e-6)


def test_tables_have_the_missions_rows_and_the_results_numbers(run, findings):
    assert [exam.key for exam in findings.exams] == ["ceval", "cmmlu"]
    for exam in findings.exams:
        assert [row.name for row in exam.rows] == ROWS[exam.key]
        assert exam.stages == ["base", "sft", "dpo"] and exam.compared == ("base", "dpo")
        for stage in exam.stages:
            told = json.loads((run / "eval" / f"{stage}-{exam.key}.json").read_text())
            assert [row.cells[stage].macro for row in exam.rows] == [row["macro"] for row in told["rows"]]
            assert [[c.low, c.high] for r in exam.rows if (c := r.cells[stage])] == [
                row["interval"] for row in told["rows"]
            ]


def test_changes_are_paired_and_the_averages_are_those_of_eval(run, findings):
    for exam in findings.exams:
        against = json.loads((run / "eval" / f"dpo-{exam.key}.json").read_text())["against"]["base"]
        change = exam.rows[0].change
        assert change is not None and change.paired
        assert [change.difference, [change.low, change.high]] == [against["difference"], list(against["interval"])]
        assert change.noise == (against["p"] >= 0.05)
        for row in exam.rows:
            assert row.change.difference == pytest.approx(row.cells["dpo"].macro - row.cells["base"].macro)


def test_results_that_do_not_say_their_subjects_are_compared_by_their_intervals(tmp_path):
    fabricated.write_run(tmp_path, steps=5, questions={"ceval": 3})
    for path in (tmp_path / "eval").glob("*-ceval.json"):
        told = json.loads(path.read_text())
        for row in told["rows"]:
            del row["members"]
        path.write_text(json.dumps(told))
    found = gathered(tmp_path)
    stem = next(row for row in found.exams[0].rows if row.name == "STEM")
    wide = [stem.cells[stage].high - stem.cells[stage].low for stage in ("base", "dpo")]
    assert not stem.change.paired and stem.change.high - stem.change.low == pytest.approx(math.hypot(*wide))
    assert "not paired" in page(found, "now")


def test_results_of_different_numbers_are_shown_and_not_compared(tmp_path):
    fabricated.write_run(tmp_path, steps=5, questions={"ceval": 2})
    path = tmp_path / "eval" / "dpo-ceval.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"about": told["about"] | {"numbers": 2}}))
    found = gathered(tmp_path)
    assert found.exams[0].compared is None and all(row.change is None for row in found.exams[0].rows)
    assert all("dpo" in row.cells for row in found.exams[0].rows)
    assert any("differ by up to 3e-4 a token" in alarm.what.en for alarm in found.alarms)
    assert not any("were not asked the same questions" in alarm.what.en for alarm in found.alarms)


def test_results_of_different_questions_are_not_compared(tmp_path):
    fabricated.write_run(tmp_path, steps=5, questions={"ceval": 2})
    path = tmp_path / "eval" / "dpo-ceval.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"about": told["about"] | {"asked": "other"}}))
    found = gathered(tmp_path)
    assert found.exams[0].compared is None and all(row.change is None for row in found.exams[0].rows)
    assert any("were not asked the same questions" in alarm.what.en for alarm in found.alarms)
    assert "Change (" not in page(found, "now")


def test_pages_show_what_there_is(tmp_path):
    fabricated.write_manifest(tmp_path)
    assert 'id="run"' in page(gathered(tmp_path), "now")
    fabricated.write_metrics(tmp_path, "sft", [{"step": 0, "eval_loss": 2.0}, fabricated.step_line(1, 1.9, 1)])
    shown = page(gathered(tmp_path), "now")
    assert 'id="sft"' in shown and not any(f'id="{key}"' in shown for key in ("dpo", "benchmarks", "answers"))
    assert markdown(gathered(tmp_path), "now", []).startswith("# invented: 微调报告 Fine-tuning report\n")


# Alarms


def test_everything_that_is_wrong_is_said(tmp_path):
    lines = fabricated.sft_lines(fabricated.np.random.default_rng(0), 20)
    next(line for line in lines if "loss" in line)["loss"] = math.nan
    rising = {"eval_loss_before": 1.0, "eval_loss_after": 1.5}
    fabricated.write_metrics(tmp_path, "sft", lines, skipped_steps=2, **rising)
    losing = [
        line | {"rewards/accuracies": 0.4, "eval_rewards/accuracies": 0.4}
        for line in fabricated.dpo_lines(fabricated.np.random.default_rng(0), 20)
    ]
    fabricated.write_metrics(tmp_path, "dpo", losing)
    (tmp_path / "dpo" / "summary.json").unlink()
    (tmp_path / "samples.json").write_text("{", encoding="utf-8")
    (tmp_path / "sft" / "warnings.jsonl").write_text('{"text": "odd"}\n{"text": "odd"}\n', encoding="utf-8")
    said = [f"{alarm.where.en}: {alarm.what.en}" for alarm in gathered(tmp_path).alarms]
    assert said == [
        "samples.json: samples.json cannot be read and was left out.",
        "SFT: 2 steps had a loss or gradient that is not finite, and were skipped.",
        "SFT: 1 lines of metrics hold values that are not finite; the charts leave them out.",
        "SFT: validation loss rose from 1.0000 to 1.5000: nothing was learned that helps on the validation set.",
        "SFT: odd",
        "DPO: DPO is not finished; its figures are those so far.",
        "DPO: reward accuracy at the end of DPO is 40.0%, no better than chance: the preference was not learned.",
    ]


def test_what_the_data_and_the_fused_model_lack_is_said(tmp_path):
    told = fabricated.data_report(fabricated.np.random.default_rng(0), 100) | {"over_long_share": 0.12}
    told["exam_questions"] = {"exams": [], "missing": {"ceval": "no network"}}
    write_json(tmp_path / "data" / "report.json", {"sft": told})
    write_json(tmp_path / "fused" / "summary.json", {"mlx": {"warnings": ["top-1 agreement is low"]}})
    found = gathered(tmp_path)
    assert [f"{alarm.where.en}: {alarm.what.en}" for alarm in found.alarms] == [
        "SFT data: the data was not checked for questions of ceval: no network",
        "SFT data: 12.0% of the rows are longer than max_length and were cut short or left out; a larger "
        "data.max_length keeps them.",
        "mlx · Fuse and export: top-1 agreement is low",
    ]
    assert "41 exact duplicates, 118 near duplicates" in page(found, "now")
    assert "| data/my.jsonl | 266 | 100 | 0 | 41 exact duplicates" in markdown(found, "now", [])


def test_a_run_that_failed_is_not_called_free_of_warnings(tmp_path):
    """SFT was begun by `mlx-zh run` and died before its first step; DPO has not been begun."""
    fabricated.write_manifest(tmp_path)
    done = {"inputs": {}, "outputs": {"data/report.json": "0"}, "seconds": 1.0}
    write_json(tmp_path / "pipeline.json", {"stages": {"prepare": done, "sft": done | {"outputs": None}}})
    recipe = yaml.safe_dump(fabricated.RECIPE)
    failed = gather(RunFolder(tmp_path), recipe, name="x", bootstrap=9, seed=0, trains=("sft", "dpo"))
    assert [(alarm.where.en, alarm.what.en.partition(":")[0]) for alarm in failed.alarms] == [
        ("SFT", "SFT was begun and did not finish"),
        ("DPO", "there are no figures of DPO yet"),
    ]
    assert "没有警告" not in page(failed, "now") and "没有警告" not in markdown(failed, "now", [])


def test_the_export_is_a_row_for_each_format(tmp_path):
    fidelity = {"tokens": 900, "kl": 0.0123, "top1": 0.98, "perplexity": 5.5, "fused_perplexity": 5.6, "moved": 0.2}
    left = {"matrices": 7, "kept_mean": 0.97, "kept_least": 0.9, "error_mean": 0.1, "error_largest": 0.3}
    mlx = {"detail": "4-bit", "bits": 4, "folder": "runs/x/fused/mlx", "size": 4.5e9, "left": left}
    peft = {"detail": "adapter", "bits": None, "folder": "runs/x/fused/peft", "size": 8e7, "left": None}
    unmeasured = {"fidelity": None, "unmeasured": None, "warnings": [], "warning_codes": []}
    summary = {"mlx": mlx | unmeasured | {"fidelity": fidelity}, "peft": peft | unmeasured}
    write_json(tmp_path / "fused" / "summary.json", summary)
    text, shown = markdown(gathered(tmp_path), "now", []), page(gathered(tmp_path), "now")
    rows = [line for line in text.splitlines() if "runs/x/fused" in line]
    assert rows == [
        "| mlx, 4-bit | 4.50 GB | 0.0123 | 98.0% | 5.600 | 97% | runs/x/fused/mlx |",
        "| peft, adapter | 0.08 GB | – | – | – | – | runs/x/fused/peft |",
    ]
    assert "kept_mean" not in text + shown and '<td class="text">0.0123</td>' in shown
    assert "perplexity of 5.500" in text


def test_overfitting_is_said_and_load_best_is_not_blamed(tmp_path):
    lines = fabricated.sft_lines(fabricated.np.random.default_rng(0), 20)
    best = {"best": {"step": 10, "eval_loss": 1.2}}
    fabricated.write_metrics(tmp_path, "sft", lines, eval_loss_before=2.0, eval_loss_after=1.4, **best)
    assert "lowest at step 10 (1.2000)" in gathered(tmp_path).alarms[0].what.en
    fabricated.write_metrics(tmp_path, "sft", lines, eval_loss_before=2.0, eval_loss_after=1.2, **best)
    assert gathered(tmp_path).alarms == []


def test_every_tripwire_of_eval_has_its_chinese():
    exam = SimpleNamespace(labelled=True, expected=100, title="C-Eval", split="val")
    letters = {"A": 9, "B": 0, "C": 0, "D": 0, "none": 2}
    found = {"questions": 11, "letters": {"predicted": letters}, "mass": 0.2, "truncated": 3, "chance": [0.2, 0.3]}
    wires = exam_report.tripwires(exam, found | {"rows": [{"macro": 0.25}]})
    wires += exam_report.tripwires(exam, found | {"rows": [{"macro": 0.1}]})[:1]
    assert len(wires) == 7
    for wire in wires:
        assert re.search("[\u4e00-\u9fff]", Text.of(wire).zh), wire
        numbers = re.findall(r"\d[\d.]*%?", wire)
        assert sorted(re.findall(r"\d[\d.]*%?", Text.of(wire).zh)) == sorted(n.rstrip(".") for n in numbers)


# Languages


def test_every_chinese_part_has_its_english(findings):
    document = Document(page(findings, "now"))
    counts = [
        sum(side in (found.get("class") or "").split() for _, found in document.elements) for side in ("zh", "en")
    ]
    assert counts[0] == counts[1] > 100


# What must not get in


def test_what_models_and_data_say_is_text_and_nothing_else(tmp_path):
    fabricated.write_run(tmp_path, steps=5, questions={"ceval": 2})
    samples = {"prompts": [HOSTILE], "answers": {"base": [HOSTILE], "sft": [HOSTILE], "evil<b>": [HOSTILE]}}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    fabricated.write_manifest(tmp_path, data={HOSTILE: HOSTILE}, model={"source": HOSTILE, "fingerprint": HOSTILE})
    told = json.loads((tmp_path / "eval" / "sft-ceval.json").read_text())
    (tmp_path / "eval" / "sft-ceval.json").write_text(
        json.dumps(told | {"benchmark": HOSTILE, "tripwires": [HOSTILE]})
    )
    (tmp_path / "eval" / "base-ceval.json").unlink()
    (tmp_path / "fused" / "summary.json").write_text(
        json.dumps({HOSTILE: {HOSTILE: [HOSTILE], "warnings": [HOSTILE]}})
    )
    source = {"name": HOSTILE, "dropped": {HOSTILE: 3}}
    exams = {"exams": [], "missing": {HOSTILE: HOSTILE}}
    told = {HOSTILE: {"sources": [source], "exam_questions": exams}}
    (tmp_path / "data" / "report.json").write_text(json.dumps(told))
    found = gather(RunFolder(tmp_path), HOSTILE, name=HOSTILE, bootstrap=50, seed=0)

    source = page(found, HOSTILE)
    document = Document(source)
    names = [name for name, _ in document.elements]
    assert names.count("script") == names.count("style") == 1 and "img" not in names
    assert source.count("<script") == source.count("</script>") == source.count("<style") == 1
    attributes = {key for _, found in document.elements for key in found}
    assert not any(key.startswith("on") or key == "src" for key in attributes)
    assert all((found.get("href") or "#").startswith("#") for _, found in document.elements)
    assert document.text.count("alert(1)") > 8  # it is there, as text

    text = markdown(found, "now", [])
    outside = re.sub(r"(?s)^````*yaml\n.*?^````*$", "", text, flags=re.M)
    assert "<script" not in outside and "<img" not in outside
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]\(", outside)


def test_the_page_may_fetch_nothing(findings):
    document = Document(page(findings, "now"))
    (policy,) = (found["content"] for _, found in document.elements if "Security" in (found.get("http-equiv") or ""))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert all(re.fullmatch(r"'sha256-[\w+/=]+'", rules[name]) for name in ("script-src", "style-src"))
    assert not any({"src", "style"} & found.keys() for _, found in document.elements)
    assert "url(" not in page(findings, "now") and "@import" not in page(findings, "now")


@pytest.mark.parametrize(
    "text",
    [
        "https://alice:SECRETSECRET@host/x",
        "hf_SECRETSECRETSECRETSECRET",
        "--token SECRETSECRET",
        "model.token=SECRETSECRET",
        "https://host/x?access_key=SECRETSECRET&y=1",
        "Authorization: Bearer SECRETSECRET",
        "token: SECRETSECRET",
        "sk-SECRETSECRETSECRETSECRET",
    ],
)
def test_secrets_are_hidden(text):
    assert "SECRETSECRET" not in redaction.hide(text) and redaction.HIDDEN in redaction.hide(text)


def test_secrets_in_values_are_hidden_and_other_values_are_not():
    values = {
        "hub_token": "SECRET", "api-key": "SECRET", "command": ["mlx-zh", "--token", "SECRET", "seed=1"],
        "micro_tokens": 2048, "max_new_tokens": 64, "commit": "5f" * 20, "token": "",
    }  # fmt: skip
    assert redaction.hide_all(values) == values | {
        "hub_token": redaction.HIDDEN,
        "api-key": redaction.HIDDEN,
        "command": ["mlx-zh", "--token", redaction.HIDDEN, "seed=1"],
    }
    recipe = "memory:\n  micro_tokens: 2048\nevaluate:\n  max_new_tokens: 64\n"
    assert redaction.hide(recipe) == recipe
    assert redaction.hide(f"{Path.home()}/models") == "~/models"


def test_secrets_reach_neither_report(tmp_path):
    address = "https://alice:SECRETSECRET@host/model"
    fabricated.write_manifest(tmp_path, model={"source": address}, command=["x", "--token", "SECRETSECRET"])
    found = gather(RunFolder(tmp_path), f"model:\n  path: {address}\n", name="r", bootstrap=9, seed=0)
    assert "SECRET" not in page(found, "now") + markdown(found, "now", [])


def test_the_page_escapes_everything_but_its_own_markup():
    name = '<a href="x">&\'a\x00\u202eb\ud800'
    source = page(Findings(name, answers={"base": []}, prompts=[name]), name)
    document = Document(source)
    clean = '<a href="x">&\'a\ufffd\ufffdb\ufffd'
    (root,) = (found for element, found in document.elements if element == "html")
    assert (root["data-zh"], root["data-en"]) == (f"{clean} 微调报告", f"{clean}: fine-tuning report")
    assert f"{clean}\n" in document.text and f"created {clean}" in document.text
    assert "&lt;a href=&#34;x&#34;&gt;&amp;&#39;a\ufffd\ufffdb\ufffd" in source
    assert "&lt;span" not in source and "&amp;lt;" not in source  # markup is not escaped, and nothing is twice


def test_charts_escape_what_they_draw():
    name = "<b>&\"'"
    chart = Dots("key", Text.same(name), [Text(name, "en")], [(Text.same(name), [Span(0.5, 0.4, 0.6)])], None)
    shapes = str(svg.dots(chart).shapes)
    assert Document(shapes).text.count(name) == 2  # the row's name, and the model's with its value
    assert {element for element, _ in Document(shapes).elements} == {"line", "text", "g", "title", "circle"}


# Drawing


@pytest.mark.parametrize(
    ("low", "high", "most", "shown"),
    [
        (0.0, 1.0, 5, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (1.2, 2.2, 5, ["1.2", "1.4", "1.6", "1.8", "2.0", "2.2"]),
        (-0.9, 0.4, 5, ["-0.5", "0"]),
        (0.0, 1.1, 5, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (1, 40, 6, ["10", "20", "30", "40"]),
        (1, 3000, 6, ["500", "1,000", "1,500", "2,000", "2,500", "3,000"]),
        (5.0, 5.0, 5, ["5"]),
    ],
)
def test_axis_marks_are_round(low, high, most, shown):
    marks = ticks(low, high, most)
    assert ["0" if float(text.replace(",", "")) == 0 else text for text in (label(m, marks) for m in marks)] == shown


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    points = [(float(step), 100.0 if step == 7777 else math.sin(step)) for step in range(20_000)]
    kept = svg.thinned(points, 400)
    assert len(kept) <= 402 and set(kept) <= set(points) and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1] and (7777.0, 100.0) in kept


@pytest.mark.parametrize("font", ["as it is", None])
def test_every_chart_is_a_picture_too(font, findings, tmp_path, monkeypatch):
    """Without a Chinese font the words are English: a missing glyph is a warning, and warnings are errors here."""
    if font is None:
        monkeypatch.setattr(plots, "cjk_font", lambda: None)
    paths = plots.write_plots(findings, tmp_path)
    names = "exam-ceval exam-cmmlu sft-loss sft-gradient dpo-loss dpo-rewards dpo-margins dpo-accuracies"
    assert [path.stem for path in paths] == names.split()
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


# The stage


def test_the_stage_writes_the_report(run, tmp_path, monkeypatch, capsys, run_stage):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(fabricated.RECIPE | {"runs": str(run.parent)}))
    assert run_stage(report.main, "recipe.yaml") == 0
    assert {path.name for path in run.iterdir()} >= {"report.md", "report.html", "plots"}
    text = (run / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((plots/.*?)\)", text)
    assert len(pictures) == 8 and all((run / picture).is_file() for picture in pictures)
    assert "report.html" in capsys.readouterr().out


def test_nothing_to_report_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(fabricated.RECIPE))
    with pytest.raises(DataError, match="nothing has been run yet"):
        report.main(["recipe.yaml"])


@pytest.mark.parametrize(
    ("edges", "counts", "drawn"),
    [
        ([0, 1.5, 3], [4, 5], True),
        ([0, "<b>", 3], [4, 5], False),
        ([0, 1, float("nan")], [4, 5], False),
        ([0, 1, 3], [None, 5], False),
        ([0, 1, 3], [0, 0], False),
        ([0, 1], [4, 5], False),
        ({}, [4, 5], False),
    ],
)
def test_a_histogram_is_made_of_numbers_alone(edges: Any, counts: Any, drawn: bool) -> None:
    report = {"train": {"histogram": {"edges": edges, "counts": counts}}}
    assert (data_view._lengths(Text.same("a"), report) is not None) == drawn
    selection = {"histograms": [{"score": "ifd", "edges": edges, "kept": counts}]}
    assert bool(data_view._scores(Text.same("a"), selection)) == drawn


def test_a_time_that_is_no_time_is_a_dash() -> None:
    assert [duration(each) for each in (8.2, 725.0, float("inf"))] == ["8.2 s", "12 min 05 s", "–"]
