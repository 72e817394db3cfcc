"""`fuse --to`: the model is in the program's list, and no other model is replaced silently."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_zh import fuse
from mlx_zh.errors import PlacingError, StorageError, UploadError
from mlx_zh.models.export import upload
from mlx_zh.stages import placing

OLLAMA = """#!/bin/sh
[ "$1" = list ] && { [ -n "$BROKEN" ] && { echo "could not connect" >&2; exit 1; }
  printf 'NAME\\tID\\n'; cat "$STORE/list" 2>/dev/null; exit 0; }
[ "$1" = create ] && [ "$3" = -f ] && [ -f "$4" ] || exit 9
[ -n "$FULL" ] && { echo "no space" >&2; exit 3; }
file=$(sed -n 's/^FROM //p' "$4"); [ -f "$file" ] || exit 8
echo "creating $2"; cp "$4" "$STORE/$2"; printf '%s:latest\\tabc\\n' "$2" >> "$STORE/list"
"""


@pytest.fixture
def home(monkeypatch, tmp_path):
    folder = tmp_path / "home"
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr("pathlib.Path.home", lambda: folder)
    monkeypatch.setenv("STORE", str(folder))
    return folder


@pytest.fixture
def ollama(home, monkeypatch):
    program = home / "bin" / "ollama"
    program.write_text(OLLAMA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    return home


@pytest.fixture
def run(project):
    """`mlx-zh fuse recipe.yaml --no-measure ARGUMENTS` after training, of a base that llama.cpp can run."""
    shutil.copytree(project.model, "merging")
    path = Path("merging/tokenizer.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"] |= {"vocab": state["model"]["vocab"] | {"zq": 290}, "merges": [["z", "q"]]}
    path.write_text(json.dumps(state), encoding="utf-8")
    project.model = Path("merging").absolute()
    project.recipe["model"]["path"] = "merging"
    project.write_recipe()
    project.train()
    return lambda *arguments: project.run(fuse.main, "--no-measure", *map(str, arguments))


def test_ollama_gets_the_model_once(run, ollama):
    result = run("--to", "ollama", "export.name=My_Model")
    assert result.status == 0 and "ollama run my_model" in result.out, result.err
    assert "FROM ./My_Model-Q8_0.gguf" in (ollama / "my_model").read_text(encoding="utf-8")
    (ollama / "my_model").write_text("another model")
    for name in ("My_Model", "MY_MODEL"):
        refused = run("--to", "ollama", f"export.name={name}")
        assert refused.status == 2 and "Ollama already has a model named my_model" in refused.err
    assert (ollama / "my_model").read_text() == "another model"
    assert run("--to", "ollama", "export.name=my_model", "--replace").status == 0
    assert "FROM ./my_model-Q8_0.gguf" in (ollama / "my_model").read_text(encoding="utf-8")


def test_what_ollama_says_goes_on_to_the_user(run, ollama, monkeypatch):
    monkeypatch.setenv("FULL", "1")
    failed = run("--to", "ollama")
    assert failed.status == 2 and "ended with status 3" in failed.err
    assert "cd runs/tiny/fused/gguf && ollama create tiny -f Modelfile" in failed.err
    assert Path("runs/tiny/fused/gguf/tiny-Q8_0.gguf").is_file()
    monkeypatch.setenv("BROKEN", "1")
    shutil.rmtree("runs/tiny/fused")
    silent = run("--to", "ollama")
    assert silent.status == 2 and "Ollama does not answer (could not connect)" in silent.err
    assert not Path("runs/tiny/fused").exists()  # it is told before the work


def test_without_the_programs_the_steps_are_given(run, home, monkeypatch):
    monkeypatch.setattr("mlx_zh.stages.placing.shutil.which", lambda name: None)
    result = run("--to", "ollama")
    assert result.status == 0 and "Ollama is not installed here" in result.out
    assert "\n  cd runs/tiny/fused/gguf && ollama create tiny -f Modelfile\n  ollama run tiny" in result.out
    result = run("--to", "lmstudio")
    assert result.status == 0
    shown = result.out.partition("then run:\n")[2].splitlines()[:2]
    kind = Path(shown[1].split()[2]).parts[-1]
    for _ in range(2):  # also where an earlier copy lies
        subprocess.run(["sh", "-ec", "\n".join(shown)], check=True, env={**os.environ, "HOME": str(home)})
    placed = home / ".lmstudio/models/mlx-zh/tiny"
    written = Path("runs/tiny/fused") / kind
    assert sorted(path.name for path in placed.iterdir()) == sorted(path.name for path in written.iterdir())


@pytest.mark.parametrize(("system", "kind"), [("Darwin", "mlx"), ("Linux", "gguf")])
def test_lm_studio_gets_files_that_it_lists(run, home, monkeypatch, system, kind):
    monkeypatch.setattr("mlx_zh.stages.placing.platform.system", lambda: system)
    (home / ".lmstudio" / "models").mkdir(parents=True)
    result = run("--to", "lmstudio", "export.formats=[peft]")
    assert result.status == 0 and "In LM Studio: mlx-zh/tiny" in result.out, result.err
    target, source = home / ".lmstudio" / "models" / "mlx-zh" / "tiny", Path("runs/tiny/fused") / kind
    expected = "model.safetensors" if kind == "mlx" else "tiny-Q8_0.gguf"
    assert os.path.samefile(target / expected, source / expected)  # a link needs no space
    assert ((target / "config.json").is_file(), (target / "Modelfile").exists()) == (kind == "mlx", False)
    before = (target / expected).read_bytes()
    refused = run("--to", "lmstudio")
    assert refused.status == 2 and "already has a model named tiny" in refused.err
    (target / "mine.txt").write_text("mine")
    assert run("--to", "lmstudio", "--replace").status == 0
    assert not (target / "mine.txt").exists() and (target / expected).read_bytes() == before


def test_lm_studios_folder_is_where_it_says(home):
    assert placing.lmstudio_models() is None
    old = home / ".cache" / "lm-studio"
    old.mkdir(parents=True)
    assert placing.lmstudio_models() == old / "models"
    (home / "elsewhere").mkdir()
    (home / ".lmstudio-home-pointer").write_text(f"{home}/elsewhere\n")
    assert placing.lmstudio_models() == home / "elsewhere" / "models"
    (home / "big").mkdir()
    (home / "elsewhere" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "big")}))
    assert placing.lmstudio_models() == home / "big"
    for damaged in ("{", '{"downloadsFolder": 3}', '{"downloadsFolder": "gone"}'):
        (home / "elsewhere" / "settings.json").write_text(damaged)
        assert placing.lmstudio_models() == home / "elsewhere" / "models"


def test_the_hub_is_that_of_the_logged_in_user(run, monkeypatch):
    pushed = []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "me"})
    monkeypatch.setattr(
        "mlx_zh.models.export.upload.push", lambda folder, name, hub, public: pushed.append((name, hub)) or "done"
    )
    assert run("--to", "hub").status == 0 and pushed == [("me/tiny", "huggingface")]
    refused = run("--to", "hub", "--hub", "modelscope")
    assert refused.status == 2 and "--push-to-hub OWNER/tiny" in refused.err


STRANGE = {
    "fails": 'echo 1>&2; printf "\\033[?25l\\033[31mError: no server\\033[0m\\r\\n" >&2; exit 1',
    "is cut off": 'printf "NAME\\tID\\n\\377\\376 x\\n"; kill -9 $$',
    "prints nothing": "exit 0",
    "prints other bytes": 'printf "NAME\\n\\377\\376:latest x\\n"',
}


@pytest.mark.parametrize("how", STRANGE)
def test_whatever_ollama_answers_no_traceback_follows(ollama, how):
    (ollama / "bin" / "ollama").write_text(f"#!/bin/sh\n{STRANGE[how]}\n")
    place = placing.Place("ollama", "tiny", False)
    if how.startswith("prints"):
        place.check()
    else:
        reason = "Error: no server" if how == "fails" else "no reason given"
        with pytest.raises(PlacingError, match=rf"does not answer \({reason}\)"):
            place.check()


def test_ollama_that_hangs_or_cannot_run(ollama, monkeypatch):
    monkeypatch.setattr(placing, "_ANSWER", 0.2)
    (ollama / "bin" / "ollama").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(PlacingError, match="gave no answer in"):
        placing.Place("ollama", "tiny", False).check()
    (ollama / "bin" / "ollama").write_bytes(b"\x7fELF and no more")
    with pytest.raises(PlacingError, match="could not be run"):
        placing.Place("ollama", "tiny", False).check()


def test_a_model_that_came_while_this_one_was_written_is_not_replaced(ollama, tmp_path):
    place = placing.Place("ollama", "tiny", False)
    place.check()
    (ollama / "list").write_text("TINY:latest\tabc\n")
    with pytest.raises(PlacingError, match=r"already has a model named tiny.*is whole in .*ollama create tiny"):
        place.put(tmp_path, ("gguf",))
    assert not (ollama / "tiny").exists()


def test_the_adapter_alone_is_not_for_ollama():
    assert placing.Place("ollama", "tiny", False).formats(("gguf-lora",)) == ("gguf-lora", "gguf")
    assert placing.Place("ollama", "tiny", False).formats(("peft", "gguf")) == ("peft", "gguf")


@pytest.mark.parametrize(
    "pointer", [b"\xff\xfe", b"", b"relative", b"/" + b"x" * 5000, b"/a\0b", b"~no_such_user/x", b"/gone"]
)
def test_a_broken_pointer_is_passed_over(home, pointer):
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio-home-pointer").write_bytes(pointer)
    assert placing.lmstudio_models() == home / ".lmstudio" / "models"


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_what_lm_studio_had_stays_if_the_copy_fails(home, tmp_path, monkeypatch, fault):
    models = home / ".lmstudio" / "models"
    old = models / "mlx-zh" / "tiny"
    old.mkdir(parents=True)
    (old / "old.gguf").write_text("old")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "new.gguf").write_text("new")

    def fail(*arguments):
        raise OSError(errno.ENOSPC if fault == "full" else errno.EROFS, "no")

    monkeypatch.setattr("os.link", fail)
    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(StorageError):
        placing.Place("lmstudio", "tiny", True).put(tmp_path, ("gguf",))
    assert [path.name for path in old.parent.iterdir()] == ["tiny"] and (old / "old.gguf").read_text() == "old"


@pytest.mark.parametrize("arguments", [["--replace"], ["--replace", "--to", "hub"]])
def test_replace_is_for_a_program(project, arguments):
    result = project.run(fuse.main, *arguments)
    assert result.status == 2 and "--replace is for --to ollama and --to lmstudio" in result.err


@pytest.mark.parametrize(
    "name", ["我/模型", "me/a..b", "me/a--b", "me/a.", "me/" + "a" * 100, "me/a.git", "me", "a/b/c"]
)
def test_a_repository_that_a_hub_would_refuse_is_refused_before_the_work(name):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(UploadError, match="is not a repository's name"):
        upload.check(name, "modelscope")
    if name != "me":
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_own_repository_has_such_a_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "me"})
    for title, name in (("a--b..c", "a-b-c"), ("x" * 150, "x" * 60), ("a-", "a"), ("Llama-3.1-x", "Llama-3.1-x")):
        assert upload.own_repository(title, "huggingface") == f"me/{name}"


def test_the_card_names_only_the_stages_that_made_the_adapter(run):
    assert run("export.formats=[mlx-adapter]").status == 0
    card = Path("runs/tiny/fused/mlx-adapter/README.md")
    own = card.read_text(encoding="utf-8")
    assert " by SFT. " in own and "Data:" in own
    shutil.copytree("runs/tiny/sft/adapters", "another")
    assert run("export.formats=[mlx-adapter]", "--adapter", "another").status == 0
    text = card.read_text(encoding="utf-8")
    assert "SFT" not in text and "Data:" not in text
