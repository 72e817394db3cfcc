"""Every warning of a run is in the page's language; a run of an older version shows the sentences it kept."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fabricated
import pytest
import yaml
from sentences import WARNINGS, example

from mlx_zh.language.notice import Notice
from mlx_zh.reporting.findings import gather
from mlx_zh.reporting.markdown import markdown
from mlx_zh.reporting.page import page
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console
from mlx_zh.system.storage import write_json

CHINESE = re.compile("[\u4e00-\u9fff]")


class Side(HTMLParser):
    """The text of a page as it is shown in one language, block by block."""

    def __init__(self, source: str, language: str) -> None:
        super().__init__()
        self._hidden = "en" if language == "zh" else "zh"
        self._open: list[bool] = []  # for each open element, whether it is hidden
        self.blocks: list[str] = [""]
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        if tag in ("li", "td", "th", "p", "dd", "dt"):
            self.blocks.append("")
        if tag not in ("meta", "input", "br"):
            hidden = self._hidden in (dict(attrs).get("class") or "").split()
            self._open.append(hidden or tag in ("style", "script"))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if not any(self._open):
            self.blocks[-1] += data

    def text(self) -> str:
        return "\n".join(self.blocks)


def alarms(side: str) -> list[str]:
    """The lines of a page that warn."""
    return [line for line in side.splitlines() if " — " in line]


def shown(folder: Path) -> tuple[str, str, str]:
    """The page in Chinese, the page in English, and the Markdown."""
    recipe = yaml.safe_dump(fabricated.RECIPE)
    found = gather(RunFolder(folder), recipe, name="invented", bootstrap=50, seed=0)
    source = page(found, "now")
    return Side(source, "zh").text(), Side(source, "en").text(), markdown(found, "now", [])


@pytest.fixture(scope="module")
def warned(tmp_path_factory) -> tuple[str, str, str]:
    """A run in which everything went wrong: each warning in one of the files that warnings are kept in."""
    folder = tmp_path_factory.mktemp("runs") / "invented"
    fabricated.write_run(folder, steps=5, questions={"ceval": 2})
    kept = {"sft": WARNINGS[::4], "dpo": WARNINGS[1::4]}
    for stage, codes in kept.items():
        with console.log_warnings(folder / stage / "warnings.jsonl"):
            for code in codes:
                console.warn(example(code))
    path = folder / "eval" / "sft-ceval.json"
    wires = [example(code) for code in WARNINGS[2::4]]
    coded = {"tripwires": wires, "tripwire_codes": [wire.as_dict() for wire in wires]}
    write_json(path, json.loads(path.read_text()) | coded)
    found = [example(code) for code in WARNINGS[3::4]]
    told = {"warnings": found, "warning_codes": [notice.as_dict() for notice in found]}
    write_json(folder / "fused" / "summary.json", {"mlx": told})
    return shown(folder)


@pytest.mark.parametrize("code", WARNINGS)
def test_every_warning_is_shown_in_the_readers_language(code, warned):
    chinese, english, text = warned
    notice = example(code)
    assert notice.text("zh") in chinese and notice in english
    assert notice == notice.text("zh") or not any(notice in line for line in alarms(chinese))
    first = re.match(r"[\u4e00-\u9fff]+", notice.text("zh"))
    assert first is None or first[0] in text


def test_the_chinese_page_warns_in_chinese_alone(warned):
    """Beside Chinese words there are only values, keys and names."""
    lines = alarms(warned[0])
    # Two parts of messages have one Chinese text; where they stand in one file, the page shows it once.
    assert len(lines) == sum(len({example(code).text("zh") for code in WARNINGS[i::4]}) for i in range(4))
    for line in lines:
        what = line.partition(" — ")[2]
        assert CHINESE.search(what) or re.fullmatch(r"[<>\w .]*", what), line


def test_a_run_of_an_older_version_shows_the_sentences_that_it_kept(tmp_path):
    fabricated.write_run(tmp_path, steps=5, questions={"ceval": 2})
    path = tmp_path / "eval" / "sft-ceval.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "tripwire_codes"}
    write_json(path, old | {"tripwires": ["3 of 100 prompts were too long and were cut."]})
    (tmp_path / "sft" / "warnings.jsonl").write_text('{"text": "step 7 was skipped: loss nan"}\n', encoding="utf-8")
    told = {
        "warnings": ["rounding moved it by 0.0600"],
        "unmeasured": "it takes 9.0 GB of memory and 3.0 GB are free",
    }
    write_json(tmp_path / "fused" / "summary.json", {"mlx": told})
    for side in shown(tmp_path)[:2]:
        assert "3 of 100 prompts were too long and were cut." in side
        assert "step 7 was skipped: loss nan" in side and "rounding moved it by 0.0600" in side
    assert "mlx 没有与“基座 + 适配器”比较：it takes 9.0 GB of memory and 3.0 GB are free。" in shown(tmp_path)[0]


def test_a_reason_and_the_sentence_around_it_are_in_one_language(tmp_path):
    reason = Notice("fused-too-large", needed=9.0, free=3.0)
    told = {"warnings": [], "warning_codes": [], "unmeasured": reason, "unmeasured_code": reason.as_dict()}
    write_json(tmp_path / "fused" / "summary.json", {"mlx": {"detail": "4-bit", **told}})
    chinese, english, _ = shown(tmp_path)
    assert "mlx 没有与“基座 + 适配器”比较：它需要 9.0 GB 内存，而可用的只有 3.0 GB。" in chinese
    assert "mlx was not compared with base + adapter: it takes 9.0 GB of memory and 3.0 GB are free." in english
    assert "mlx, 4-bit" in chinese and "unmeasured" not in chinese + english and "code" not in chinese + english


def test_rows_that_were_left_out_are_named_in_both_languages(tmp_path):
    told = fabricated.data_report(fabricated.np.random.default_rng(0), 100)
    told["sources"][0]["dropped"] = {"near duplicate": 1180, "exam question": 7, "a reason of tomorrow": 2}
    write_json(tmp_path / "data" / "report.json", {"sft": told})
    chinese, english, _ = shown(tmp_path)
    assert "1,180 近似重复，7 含考题，2 a reason of tomorrow" in chinese
    assert "1,180 near duplicate, 7 exam question, 2 a reason of tomorrow" in english
