"""What a message tells the user to do can be done: its commands, options, settings and variables exist and work."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Project, Result
from remedies import COMMAND, KEY, OPTION, SETTING, SPAN, VARIABLE, foreign_notes, handles, messages
from wordings import PACKAGE

from mlx_zh import cli
from mlx_zh.errors import RecipeError
from mlx_zh.recipe import Recipe, Section, load_recipe
from mlx_zh.stages import memory_check
from mlx_zh.system.entry import entry

ROOT = Path(__file__).resolve().parents[2]

# The commands that show a message with an option, by the message's beginning. One that is not here fails the test.
SAID_BY = {
    "--stage is for a run or a recipe": ("serve",),
    "pages of {0} may not ask this server": ("serve",),
    "the server cannot listen at": ("serve",),
    "no port from {0} to {1} is free": ("studio",),
    "port {0} cannot be used": ("studio",),
    "with --by judge:": ("choose", "arena"),
    "--format {0}: {1}. Give json": ("choose", "arena"),
    "--by hand asks": ("choose", "arena"),
    "--by judge needs": ("choose", "arena"),
    "--judge and --judge-url": ("choose", "arena"),
    "--judge-url needs": ("choose", "arena"),
    "No prompt has a known solution": ("choose", "arena"),
    "`mlx-zh STAGE --help`": ("sft", "dpo", "eval", "fuse", "report", "run", "chat", "plan", "prepare", "doctor"),
    "--hosts {0}: there is": ("sft", "dpo", "eval", "sample"),
    "--processes {0}: give": ("sft", "dpo", "eval", "sample", "run"),
    "--processes {0}: process": ("sft", "dpo", "eval", "sample", "run"),
    "--processes {0}: `mlx-zh run`": ("run",),
    "Computing in {0} processes": ("sft", "dpo", "eval", "sample", "run"),
    "--prompts {0}: there is no": ("sample",),
    "{0} answers of {1} tokens, {2} tokens/s": ("sample",),
    "{0} holds answers": ("sample",),
    "with --report: add": ("doctor",),
    "--run adds a run": ("doctor",),
    "--report {0}: the name": ("doctor",),
    "do not train models of": ("doctor",),
    "training here takes unfused": ("doctor",),
    "evaluate.benchmarks names no exam": ("eval",),
    "Or merge into the full": ("fuse",),
    "--from {0}: {1} of that": ("run",),
    "a recipe is needed, or --list": ("prepare",),
    "\nNothing to do: {0} is up": ("run",),
    "{0} To start anyway, add": ("sft", "dpo", "run"),
    "{0} is finished: nothing": ("sft", "dpo"),
    "start over with --fresh": ("sft", "dpo", "run"),
    "{0} is damaged: {1}. No checkpoint is left": ("sft", "dpo", "run"),
    "train anew: --from": ("run",),
    "requested by --from": ("run",),
    "Times are measured on this": ("plan",),
    "{0} has no adapter yet.": ("fuse",),
    "with --to: replace": ("fuse",),
    "--replace is for": ("fuse",),
    "`ollama list` could not": ("fuse",),
    "name the repository on ModelScope": ("fuse",),
    "the hub does not say who is logged in": ("fuse",),
    "{0} already has a model named": ("fuse",),
    "{0} has no adapter, and the": ("fuse",),
    "--fresh is an option of": ("sft", "dpo", "run"),
    "The GGUF file gets 4 bits": ("fuse",),
    "{option} is for --by": ("choose", "arena"),
    "--stage takes one stage": ("arena",),
    "{place} exceeded 65,504": ("sft", "dpo", "run"),
    "GUESSED: check the samples": ("init",),
    "--columns {given}": ("init",),
    "{recipe} exists already": ("init",),
    "{0}: the page is a web page": ("compare",),
    "{0} is a folder; give --out": ("compare",),
    "{0} exists and was not written": ("compare",),
    "--use {use} needs rows": ("init",),
    "--use sft needs rows": ("init",),
    "{file}: no command in this script": ("import",),
    "{file}: its settings ({keys})": ("import",),
    "{file} exists already and is never": ("import",),
    "{key} is missing: name the base": ("import",),
    "{model} is a model of the family": ("import",),
    "{model} ({family}) reads images": ("import",),
    "{model}: weights in this rounded": ("import",),
    "by --model": ("import",),
    "It was made for several cards": ("import",),
}
ELSEWHERE = {"--token", "--install"}  # options of other programs

# Variables of other programs that this one passes on to or takes over.
VARIABLES_ELSEWHERE = {
    *("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "PIP_INDEX_URL"),
    *("MODELSCOPE_API_TOKEN", "MODELSCOPE_CACHE", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "OPENBLAS_NUM_THREADS"),
    "Q4_K_M",  # a type of llama.cpp
}


@cache
def options_of(command: str) -> frozenset[str]:
    """The options in a command's help."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        importlib.import_module(f"mlx_zh.{command}").main(["--help"])
    return frozenset(OPTION.findall(out.getvalue()))


def said() -> list[str]:
    return [english for english, _ in messages()] + [note for _, note in foreign_notes()]


def test_both_languages_name_the_same_commands_options_settings_and_variables() -> None:
    differing = {english: handles(english) ^ handles(chinese) for english, chinese in messages()}
    assert not {english: names for english, names in differing.items() if names}


def test_every_command_that_a_message_names_exists() -> None:
    commands = {name for text in said() for name in COMMAND.findall(text)}
    assert commands and commands <= set(cli.STAGES)


@pytest.mark.parametrize("text", [text for text, _ in messages() if OPTION.search(text)], ids=lambda text: text[:40])
def test_every_option_is_one_of_the_commands_that_say_so(text: str) -> None:
    here = set(OPTION.findall(text)) - ELSEWHERE
    named = {f"`{span}`" for span in SPAN.findall(text) if OPTION.search(span) and COMMAND.search(span)}
    for span in named:  # a whole command: its options are its own
        command = COMMAND.findall(span)[0]
        assert set(OPTION.findall(span)) <= options_of(command), span
        here -= set(OPTION.findall(span))
    if here:
        commands = next((who for start, who in SAID_BY.items() if text.startswith(start)), None)
        assert commands, f"which commands say this? Add it to SAID_BY: {text}"
        for command in commands:
            assert here <= options_of(command), (command, text)


def test_the_options_of_notes_about_other_programs_exist() -> None:
    for name, note in foreign_notes():
        for command, option in re.findall(r"mlx-zh ([a-z]+)[^`]*?(--[a-z-]+)", note):
            assert option in options_of(command), (name, note)


def field_of(key: str) -> Any:
    """The field of a dotted key; KeyError if there is none."""
    schema: Any = Recipe
    field = None
    for part in key.split("."):
        names = {field.alias or name: field for name, field in schema.model_fields.items()}
        field = names[part]
        types = [field.annotation, *getattr(field.annotation, "__args__", ())]  # a section, or one that may be null
        schema = next((kind for kind in types if hasattr(kind, "model_fields")), Section)
    return field


def test_every_key_that_a_message_names_is_one() -> None:
    unknown = set()
    for text in said():
        for key in KEY.findall(text):
            try:
                field_of(key.rstrip("."))
            except KeyError:
                unknown.add((key, text))
    assert not unknown


@pytest.mark.parametrize("text", [text for text in said() if SETTING.search(text)], ids=lambda text: text[:40])
def test_every_setting_with_a_value_is_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {path: m}\n")
    for match in SETTING.finditer(text):
        key, value = match[1], match[2].rstrip(".")
        if "." in key and not value.endswith("]") and value not in ("there", "a", "an", "you", "KEY", "a "):
            load_recipe(path, [f"{key}={value}"])


def test_every_variable_that_a_message_names_is_read() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = {name for text in said() for name in VARIABLE.findall(text)} - VARIABLES_ELSEWHERE
    assert named
    unread = {name for name in named if f'"{name}"' not in code}
    assert not unread


def test_every_extra_that_pip_is_told_to_install_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"mlx-zh\[(\w+)\]", code))
    assert named and named <= set(project["optional-dependencies"])
    from mlx_zh.stages import trackers  # `mlx-zh[{name}]`: each tracker is an extra of its own

    assert trackers and {"tensorboard", "swanlab", "wandb"} <= set(project["optional-dependencies"])


def test_settings_to_copy_survive_the_shell_of_macos() -> None:
    """zsh takes brackets and braces outside quotation marks for patterns, and refuses the command."""
    bare = re.compile(r"(?<!['\"\w./])[a-z_.]+=[\[{](?!\d\})")
    assert not [text for text in said() if bare.search(text) and "yaml" not in text]


# Commands in the documentation

DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_exist_with_their_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line.partition(" # ")[0] for line in text.replace("\\\n", " ").splitlines()]
    commands = [
        re.split("[`|&;]", part)[0] for line in lines for part in re.findall(r"mlx-zh (?=[a-z]+\b)(.*)", line)
    ]
    for words in commands:
        name = words.split()[0]
        if name in cli.STAGES:
            assert {option for option in OPTION.findall(words)} <= options_of(name), words


# Remedies, carried out as they are printed


@pytest.fixture
def carried_out(project: Project) -> Callable[[str], Result]:
    """Runs a printed command word for word."""

    def run(command: str) -> Result:
        program, name, *arguments = shlex.split(command)
        assert program == "mlx-zh"
        project.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry(importlib.import_module(f"mlx_zh.{name}").main, arguments)
        return Result(int(stop.value.code or 0), *project.capsys.readouterr())

    return run


def printed(text: str) -> str:
    """The first command of this program in an error."""
    return next(span for span in SPAN.findall(text) if span.startswith("mlx-zh "))


PAIRS = [{"prompt": p, "chosen": "好" * n, "rejected": "坏"} for n, p in enumerate("一二三四", 1)]


@pytest.fixture
def pairs(project: Project) -> None:
    """The recipe with pairs and without other data."""
    Path("pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS))
    project.recipe["data"] = {"dpo": {"train": ["pairs.jsonl"]}, "max_length": 128}
    project.recipe["dpo"] = {"batch_size": 2, "max_steps": 2}
    project.write_recipe()


EXAM = ["--benchmark", "exam", "evaluate.shots=0"]


@pytest.fixture
def exam(project: Project) -> None:
    shutil.copytree(ROOT / "data" / "town" / "town-exam", "exam")


# A command that needs what is not there yet, and the commands that its errors name until it works.
MISSING = {
    "fuse": (["--no-measure"], ["sft"]),
    "report": ([], ["run"]),
    "eval": (["--stage", "sft", *EXAM], ["sft"]),
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.usefixtures("exam")
def test_a_missing_step_is_made_by_the_command_that_the_error_names(project, carried_out, name):
    arguments, expected = MISSING[name]
    main = importlib.import_module(f"mlx_zh.{name}").main
    for step in expected:
        result = project.run(main, "name=other", *arguments)
        assert result.status == 2
        command = printed(result.err)
        assert shlex.split(command)[:2] == ["mlx-zh", step] and "name=other" in command
        assert carried_out(command).status == 0
    assert project.run(main, "name=other", *arguments).status == 0


@pytest.mark.usefixtures("exam")
@pytest.mark.parametrize("formats", ["[mlx]", "[peft]"])
def test_a_missing_fused_model_is_made_by_the_command_that_the_error_names(project, carried_out, formats):
    from mlx_zh import eval as exams

    arguments = ["--stage", "fused", *EXAM, f"export.formats={formats}"]
    project.train()
    result = project.run(exams.main, *arguments)
    assert result.status == 2
    assert carried_out(printed(result.err)).status == 0
    assert project.run(exams.main, *arguments).status == 0


@pytest.mark.usefixtures("pairs")
def test_without_sft_data_the_missing_adapter_is_dpos(project, carried_out):
    from mlx_zh import fuse

    result = project.run(fuse.main, "--no-measure")
    assert printed(result.err) == "mlx-zh dpo recipe.yaml"
    assert carried_out("mlx-zh dpo recipe.yaml").status == 0
    assert project.run(fuse.main, "--no-measure").status == 0


@pytest.mark.usefixtures("pairs")
def test_dpo_from_an_sft_that_there_is_not(project):
    from mlx_zh import dpo

    result = project.run(dpo.main, "dpo.start=sft")
    assert result.status == 2 and result.err.endswith("the recipe has no SFT data, so set dpo.start=base.\n")
    assert project.run(dpo.main, "dpo.start=sft", "dpo.start=base").status == 0


def test_an_adapter_that_lies_deeper_is_named_as_the_shell_takes_it(project):
    os.rename(project.train().parent, "an old run")
    result = project.sft("sft.start=an old run", "name=next")
    setting = re.search(r"so set (.*)\.\n", result.err)[1]
    assert project.sft(*shlex.split(setting), "name=next").status == 0


def test_the_name_for_a_new_run_is_free(project):
    project.train(name="tiny")
    Path("runs/tiny-2").mkdir()
    result = project.sft("sft.start=runs/tiny/sft/adapters")
    assert "name=tiny-3," in result.err
    assert project.sft("sft.start=runs/tiny/sft/adapters", "name=tiny-3").status == 0


@pytest.mark.parametrize("free", [2e6, 3e6, 5e6])  # bytes; the recipe's own settings take 6 MB
def test_the_memory_settings_that_an_error_proposes_fit(project, monkeypatch, free):
    here = memory_check.this_machine()
    small = memory_check.Machine(here.name, free, here.cpu, here.attention_tile)
    monkeypatch.setattr(memory_check, "this_machine", lambda: small)
    settings = ["memory.checkpoint_layers=false"]
    for _ in range(3):  # the first check knows only that examples have 64 tokens or more, the second their lengths
        result = project.sft(*settings)
        if result.status == 0:
            break
        need, way = result.err.split(" are the free memory of this machine. ")
        assert "sft needs about" in need
        proposed = shlex.split(way.partition(" would need ")[0])
        assert proposed and all(setting.startswith("memory.") for setting in proposed)
        settings += proposed
    assert result.status == 0 and len(settings) > 1


@pytest.mark.thorough
def test_force_and_fresh_work_where_a_step_of_run_names_them(project):
    from mlx_zh import run

    assert project.run(run.main, "--force").status == 0
    result = project.run(run.main, "--fresh")
    assert result.status == 0 and Path("runs/tiny/sft-old1").is_dir()


def test_rows_that_are_invalid_are_dropped_as_the_error_says(project):
    with Path("train.jsonl").open("a") as file:
        file.write("{broken\n")
    result = project.sft()
    setting = re.search(r"data\.on_invalid=skip", result.err)[0]
    assert project.sft(setting).status == 0


def test_an_exam_in_another_encoding_is_converted_by_the_command(project, exam):
    from mlx_zh import eval as exams

    path = next(Path("exam").rglob("*.csv"))
    path.write_bytes(path.read_text(encoding="utf-8").encode("gb18030"))
    result = project.run(exams.main, *EXAM, "--stage", "base")
    assert result.status == 2
    command = next(span for span in SPAN.findall(result.err) if "iconv" in span)
    if shutil.which("iconv"):
        assert os.system(command) == 0
        assert project.run(exams.main, *EXAM, "--stage", "base").status == 0


def test_a_budget_that_was_begun_is_gone_on_with_by_any_command(project):
    for name in ("prepare", "eval", "fuse", "report"):
        assert project.run(importlib.import_module(f"mlx_zh.{name}").main, "budget=8h", "--print").status == 0


def test_no_budget_is_written_as_init_takes_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {path: m}\nbudget: 0\n")
    assert load_recipe(path).budget is None and load_recipe(path, ["budget=0"]).budget is None
    with pytest.raises(RecipeError):
        load_recipe(path, ["budget=false"])


def test_the_note_about_another_programs_setting_names_a_key() -> None:
    for name, entry_ in yaml.safe_load((PACKAGE / "language" / "other_names.yaml").read_text()).items():
        for stage in ("sft", "dpo"):
            if key := entry_.get("key"):
                assert field_of(key.format(stage=stage)) is not None, name


def test_plan_tells_that_the_adapter_to_start_from_is_not_there(project):
    from mlx_zh import plan

    result = project.run(plan.main, "sft.start=/nope", "--quick")
    assert result.status == 0 and "sft.start is /nope, but there is no adapter in /nope" in result.out + result.err
    assert "there is no adapter" not in str(project.run(plan.main, "--quick"))
