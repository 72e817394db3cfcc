"""The command line: exit statuses, errors without traceback, and help that needs no heavy import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_zh
from mlx_zh import cli
from mlx_zh.cli import STAGES
from mlx_zh.errors import DataError
from mlx_zh.recipe import load_recipe
from mlx_zh.system.entry import entry

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SCRIPT = Path(sys.executable).with_name("mlx-zh")


def status_of(main, argv: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        entry(main, argv)
    return stop.value.code


def refuse(argv: list[str] | None) -> int:
    raise DataError("a.jsonl:3: something is wrong.")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        cwd=ROOT,
        timeout=60,
    )


# Exit statuses


def test_a_stage_that_ends_well_exits_with_0_or_its_own_status():
    assert status_of(lambda argv: None, []) == 0
    assert status_of(lambda argv: 0, []) == 0
    assert status_of(lambda argv: 130, []) == 130


def test_an_error_is_one_paragraph_and_status_2(capsys):
    assert status_of(refuse, []) == 2
    assert capsys.readouterr() == ("", "error: a.jsonl:3: something is wrong.\n")


@pytest.mark.parametrize("way", ["--debug", "MLX_ZH_DEBUG"])
def test_debug_shows_where_an_error_came_from_too(way, capsys, monkeypatch):
    if way == "MLX_ZH_DEBUG":
        monkeypatch.setenv("MLX_ZH_DEBUG", "1")
    assert status_of(refuse, ["--debug"] if way == "--debug" else []) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "in refuse" in shown
    assert shown.endswith("error: a.jsonl:3: something is wrong.\n")


def test_debug_is_understood_anywhere_and_kept_from_the_stage():
    seen = []
    assert status_of(lambda argv: seen.append(argv), ["r.yaml", "--debug", "seed=1"]) == 0
    assert seen == [["r.yaml", "seed=1"]]


def test_an_interruption_is_status_130_and_silent(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert status_of(interrupted, []) == 130
    assert capsys.readouterr() == ("", "")


class Panic(BaseException):
    """As libraries in Rust raise it: no Exception."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, RecursionError, OSError, UnicodeError, AssertionError, Panic])
def test_a_bug_is_status_70_and_its_traceback_is_in_a_file_without_secrets(kind, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_KEY", "Zq4mJ7w2Lx9vB1nK")

    def broken(argv):
        raise kind("at https://me:pass@host with Zq4mJ7w2Lx9vB1nK\nsecond line")

    assert status_of(broken, []) == 70
    out, err = capsys.readouterr()
    (file,) = (tmp_path / "crashes").iterdir()
    text = file.read_text(encoding="utf-8")
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and str(file) in err
    assert kind.__name__ in err and "Traceback" not in err and "second line" not in err
    assert "in broken" in text and "second line" in text
    assert "pass@" not in text + err and "Zq4m" not in text + err


def test_debug_shows_the_traceback_of_a_bug_too(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))

    def broken(argv):
        raise ZeroDivisionError

    assert status_of(broken, ["--debug"]) == 70
    assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["close(1)", "close(2)", "close(0)", "closerange(0, 3)"])
def test_standard_streams_that_are_closed_are_no_error(command):
    code = f"import os; os.{command}; os.execv({str(SCRIPT)!r}, ['mlx-zh', 'sft', {str(QUICKSTART)!r}, '--print'])"
    shown = run(sys.executable, "-c", code)
    assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_cannot_be_written_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([SCRIPT, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: no space is left where this command writes. Free some space, then run the same command again.\n"
    )


def test_a_reader_of_errors_that_went_away_changes_no_status():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([SCRIPT, "sft", "none.yaml"], stdout=writing, stderr=writing, timeout=60)
    os.close(writing)
    assert done.returncode == 2


# The command


def test_the_command_says_what_there_is(capsys):
    for argv in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith("usage: mlx-zh STAGE RECIPE")
        assert all(stage in shown for stage in STAGES)


def test_an_unknown_stage_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "r.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: there is no stage 'tune'; choose from {', '.join(STAGES)}.\n"


def test_the_version():
    shown = run(SCRIPT, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"mlx-zh {mlx_zh.__version__}\n")


@pytest.mark.parametrize("stage", STAGES)
def test_help_imports_nothing_heavy(stage):
    code = (
        f"import sys\nfrom mlx_zh.cli import main\ntry:\n    main(['{stage}', '--help'])\nfinally:\n"
        "    heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'datasets', 'torch', 'huggingface_hub'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    shown = run(sys.executable, "-c", code)
    assert (shown.returncode, shown.stderr) == (0, "[]\n")
    assert shown.stdout.startswith(f"usage: mlx-zh {stage} ")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_a_module_too(stage):
    shown = run(sys.executable, "-m", f"mlx_zh.{stage}", "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: mlx-zh {stage} ")


@pytest.mark.parametrize("argv", [[], ["r.yaml", "--fast"]])
def test_a_command_line_that_makes_no_sense_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", *argv])
    assert stop.value.code == 2
    assert "usage: mlx-zh sft" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_one_line_on_stderr():
    shown = run(SCRIPT, "sft", "none.yaml")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "error: there is no recipe at none.yaml.\n"


# --print


def test_print_shows_a_recipe_that_loads_and_is_the_resolved_one(tmp_path):
    shown = run(SCRIPT, "sft", QUICKSTART, "--print", "sft.learning_rate=2e-4", "name=other")
    assert (shown.returncode, shown.stderr) == (0, "")
    copy = tmp_path / "copy.yaml"
    copy.write_text(shown.stdout, encoding="utf-8")
    assert load_recipe(copy) == load_recipe(QUICKSTART, ["sft.learning_rate=2e-4", "name=other"])


def test_print_on_a_terminal_that_knows_few_characters():
    shown = run(SCRIPT, "sft", QUICKSTART, "--print", "data.system=你😀", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "system: ??\n" in shown.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["sft", "--help"], ["sft", str(QUICKSTART), "--print"]])
def test_a_reader_that_went_away_is_no_error(arguments):
    """As in `mlx-zh sft --help | true`: nobody reads any more, so there is nothing to say."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([SCRIPT, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
