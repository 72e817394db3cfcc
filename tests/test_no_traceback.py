"""No input shows a traceback: each of these was an error that nobody caught."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from mlx_zh import prepare, sft
from mlx_zh.chatting.repl import Repl
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.registry import load_registry
from mlx_zh.errors import DataError, DownloadError, MlxZhError
from mlx_zh.exams.archives import unpack
from mlx_zh.exams.catalog import benchmark
from mlx_zh.system.entry import entry
from mlx_zh.system.json_text import DEEPEST, parse_json

YAMLS = (
    *("x: 2024-13-45", "[" * 3000, "{a: " * 1500, "x: !!int abc", "x: !!bool zz", "x: !!timestamp q", "x: !!float q"),
    *('x: !!binary "é"', "? [a]: b", "x: {<<: 1}", "!!map x", "x: !!omap 3", "a: &a [*a]", "{[1]: 2}", "x: !!null z"),
)


@pytest.mark.parametrize("text", YAMLS)
def test_a_registry_that_cannot_be_read_is_a_data_error(text, tmp_path):
    file = tmp_path / "registry.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"registry\.yaml"):
        load_registry(file=file)


@pytest.mark.parametrize("text", YAMLS)
def test_a_recipe_that_cannot_be_read_is_one_paragraph(text, project):
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    assert project.run(prepare.main, "--list").status == 2


@pytest.mark.parametrize(
    "override",
    [f"name={'a' * 300}", f"model.path={'a' * 300}", "model.path=~no-such-user/x", f"sft.start={'a/' * 3000}",
     "sft.start=~no-such-user/x", f"runs={'a' * 300}", f"data.registry_file={'a' * 300}", "lora.targets=[nix]",
     'data.system="\\ud800"'],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_paragraph(override, project):
    result = project.run(sft.main, override)
    assert result.status == 2 and result.err.startswith("error: ") and "foreseen" not in result.err


def test_json_is_refused_before_what_walks_through_it_is_too_deep():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    for text in (
        "[" * 900 + "]" * 900,
        "[" * 10**6,
        '{"a":' * 5000,
        "1" * 5000,
        "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2),
    ):
        with pytest.raises(ValueError):
            parse_json(text)
    assert len(parse_json(json.dumps([[0]] * 1000))) == 1000  # many brackets are not deep


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_exam_archive_is_a_download_error(method, tmp_path):
    path = tmp_path / "ceval.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("val/law_val.csv", "id,question\n" * 2000)
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    with pytest.raises(DownloadError, match="damaged or incomplete"):
        unpack(benchmark("ceval"), path, tmp_path / "cache")


class Shown:
    """The part of a screen that commands use."""

    width = 80

    def __init__(self):
        self.errors: list[str] = []

    def error(self, text):
        self.errors.append(text)

    def note(self, text): ...


@pytest.mark.parametrize(
    "command",
    ["/load digits.json", "/load deep.json", f"/load {'a' * 300}", "/save ~no-such-user/x", f"/save {'a' * 300}",
     "/save no/\0x", "/load ~no-such-user/x", "/adapter ~no-such-user/x"],
)  # fmt: skip
def test_the_chat_goes_on_after_any_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    Path("digits.json").write_text("[" + "1" * 5000 + "]")
    Path("deep.json").write_text("[" * 5000)
    lines, screen = iter([command, "/exit"]), Shown()
    chat = Transcript()
    chat.ask("问")
    chat.answer("答")
    Repl(None, screen, lambda: next(lines), chat).run()
    assert len(screen.errors) == 1 and len(chat.turns) == 2
    assert next(lines, None) is None


def test_half_a_surrogate_pair_is_loaded_and_saved(tmp_path):
    rows = [{"role": "user", "content": "a\ud800b"}, {"role": "assistant", "content": "好"}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    chat = Transcript.load(tmp_path / "chat.json")
    assert chat.turns[0].content == "a\ufffdb"
    chat.save(tmp_path / "saved.json")
    assert Transcript.load(tmp_path / "saved.json").turns == chat.turns


def test_a_panic_of_a_library_in_rust_is_one_paragraph(project, monkeypatch):
    class PanicException(BaseException):
        """As PyO3 names it."""

    def panic(*_):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    monkeypatch.setattr("mlx_zh.stages.data.prepare_stage", panic)
    monkeypatch.setattr("mlx_zh.stages.tuning.prepare_stage", panic)
    result = project.sft()
    assert result.status == 2 and "tokenizer.json" in result.err


def test_a_current_folder_that_was_removed_is_named(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as ended:
        entry(lambda _: len(str(Path("recipe.yaml").absolute())), [])
    assert ended.value.code == 2
    assert "the current folder has been removed" in capsys.readouterr().err


def test_a_user_who_does_not_exist_is_named(tmp_path):
    with pytest.raises(MlxZhError, match="no user of that name"):
        Repl(None, Shown(), str, Transcript())._save("~nobody-of-this-name/x")
