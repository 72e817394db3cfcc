"""What SECURITY.md promises: no code from strangers, nothing outside its folder, no secret kept or shown."""

from __future__ import annotations

import ast
import io
import json
import signal
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from project import Project

import mlx_zh
from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.template_sandbox import Sandbox
from mlx_zh.errors import DownloadError, ModelError, TemplateError
from mlx_zh.exams import archives
from mlx_zh.exams.catalog import benchmark
from mlx_zh.models.adapters.files import read_adapter
from mlx_zh.system import console, redaction
from mlx_zh.system.entry import entry
from mlx_zh.system.hub_folders import commit_of

SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in Path(mlx_zh.__file__).parent.rglob("*.py")}
TOKEN = "hf_" + "SECRETSECRETSECRET"


def calls() -> list[tuple[Path, ast.Call, str]]:
    """Every call in the package, with the last name of what is called."""
    found = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found.append((path, node, name))
    return found


def imports(sources: Mapping[Path, ast.Module] | None = None) -> set[str]:
    names: set[str] = set()
    for tree in (SOURCES if sources is None else sources).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# No code from strangers


def test_nothing_unpickles_and_nothing_evaluates_text():
    assert not {"pickle", "marshal", "shelve", "dill", "joblib", "torch"} & imports()
    for path, call, name in calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        told = f"{path}:{call.lineno}"
        assert not (isinstance(call.func, ast.Name) and name in ("eval", "exec", "compile", "__import__")), told
        assert not isinstance(value := given.get("allow_pickle"), ast.Constant) or value.value is False, told
        assert not isinstance(value := given.get("trust_remote_code"), ast.Constant) or value.value is False, told
        assert not isinstance(value := given.get("shell"), ast.Constant) or value.value is False, told
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "yaml.load":
            assert ast.unparse(given["Loader"]) in ("_Loader", "_loader()"), told  # derives from SafeLoader; is one


def test_no_server_is_started():
    """But by `mlx-zh serve` and `mlx-zh studio`, whose own tests say who may ask them. `heartbeat.py` opens a port
    between the machines of a run, and closes it when all are there; `launching.py`, `local.py` and the studio look
    which ports are free."""
    servers = {"http.server", "socketserver", "asyncio", "flask", "uvicorn", "aiohttp", "nicegui"}
    serving = {path for path, tree in SOURCES.items() if servers & imports({path: tree})}
    assert {path.relative_to(Path(mlx_zh.__file__).parent).parts[0] for path in serving} == {"stages", "studio"}
    assert {path.name for path in serving if "studio" not in path.parts} == {"serving.py"}
    opens = {
        path.name for path, _, name in calls() if name in ("create_server", "bind") and "studio" not in path.parts
    }
    assert opens == {"heartbeat.py", "launching.py", "local.py"}


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "weights.npz"]
)
def test_weights_that_can_hold_code_are_refused(tmp_path, name):
    from mlx_zh.models.folder import folder_weights

    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=f"{name}.*pickles, which can run any program.*not read"):
        folder_weights(tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weight_map is not usable"):
        folder_weights(tmp_path)


def test_an_adapter_of_pickles_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(Exception, match=r"only as adapter_model\.bin.*pickle.*not read"):
        read_adapter(tmp_path)


# Templates

ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'|format }}{{ ''['__class__'] }}{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__code__ }}",
    "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages[0].update(content='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ range(1000000000)|list|length }}",
    "{{ 'x' * 10**10 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 9**9**9**9 }}",
    "{{ lipsum(n=1000000) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
]


@pytest.mark.parametrize("source", ATTACKS, ids=range(len(ATTACKS)))
def test_a_template_gets_nothing_but_its_values(source):
    messages = [Message("user", "hello")]
    try:
        text = ChatTemplate(source, date_string="26 Jul 2024", variables={}).render(messages)
    except TemplateError as error:
        text = str(error)
    assert not any(
        word in text for word in ("class '", "<class", "root:", "uid=", "module '", "<code", "{'__name__'")
    )
    assert messages[0].content == "hello" and len(text) < 10_000


def test_ctrl_c_ends_a_template(monkeypatch):
    """No handler of the template's errors keeps it."""
    rounds = 0

    def interrupted(_sandbox, _steps):
        nonlocal rounds
        rounds += 1
        if rounds == 10:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Sandbox, "_spend", interrupted)
    template = ChatTemplate("{% for i in range(10**5) %}x{% endfor %}", date_string="26 Jul 2024", variables={})
    with pytest.raises(KeyboardInterrupt):
        template.render([Message("user", "hello")])
    assert rounds == 10


def test_a_template_from_a_gguf_file_runs_in_the_sandbox(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "models"))
    import tiny_models as made

    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import load_tokenizer

    config = made.tiny_config()
    attack = {"tokenizer.chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}<|im_end|>"}
    path = made.write_gguf(tmp_path / "m.gguf", config, made.tiny_model(config), metadata=attack)
    with pytest.raises(TemplateError, match="unsafe"):
        Renderer(load_tokenizer(path)).text([Message("user", "hello")])


# Archives

CEVAL = benchmark("ceval")


def archive(path: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as opened:
        for member, content in members:
            opened.writestr(member, content)
    path.write_bytes(held.getvalue())
    return path


def test_a_link_in_an_archive_becomes_no_link(tmp_path):
    link = zipfile.ZipInfo("val/law_val.csv")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "victim").write_text("kept")
    archives._extract(archive(tmp_path / "a.zip", [(link, str(tmp_path / "victim").encode())]), folder)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (tmp_path / "victim").read_text() == "kept"


def test_an_archive_of_a_hundred_thousand_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MOST_FILES", 20)
    packed = archive(tmp_path / "a.zip", [(f"val/a{number}_val.csv", b"") for number in range(21)])
    with pytest.raises(DownloadError, match="more files than the benchmark"):
        archives.unpack(CEVAL, packed, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Secrets


@pytest.fixture
def secrets(monkeypatch) -> list[str]:
    """In the environment, where the hubs' and trackers' libraries look; the last two have no telling form."""
    given = {
        "HF_TOKEN": TOKEN,
        "MODELSCOPE_API_TOKEN": "ms-0a1b2c3d-SECRET00-1111-2222-333344445555",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "SWANLAB_API_KEY": "Zq4mJ7w2Lx9vB1nK",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return list(given.values())


def leaks(text: str, secrets: list[str]) -> list[str]:
    return [secret for secret in [*secrets, "user:pass"] if secret in text]


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_error_shows_no_secret(secrets, capsys, debug):
    """As the hubs' libraries put them into theirs: in headers, addresses and commands."""

    def stage(_: list[str] | None) -> int:
        raise DownloadError(
            f"no answer from https://user:pass@host/x?token=abc ({' '.join(secrets)}; Bearer {TOKEN})"
        )

    with pytest.raises(SystemExit) as stop:
        entry(stage, debug)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and leaks(err, secrets) == [] and "https://•••@host" in err
    assert ("Traceback" in err) is bool(debug)


def test_lines_and_kept_warnings_show_no_secret(secrets, capsys, tmp_path):
    with console.log_warnings(tmp_path / "warnings.jsonl"):
        console.warn(f"wandb failed: {secrets} https://user:pass@host")
    shown = capsys.readouterr().out + (tmp_path / "warnings.jsonl").read_text(encoding="utf-8")
    assert leaks(shown, secrets) == [] and shown.count("•••") >= 6


def test_a_run_folder_holds_no_secret(project: Project, secrets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx-zh", "sft", f"data.system={secrets[2]}", "--token", "abcdefgh"])
    entry_of_own = {"hub": "url", "id": "https://user:pass@host/x.jsonl", "kind": "sft"}
    project.recipe["data"]["registry"] = {"mine": entry_of_own}
    project.recipe["evaluate"] = {"prompts": [f"Say {TOKEN}"], "max_new_tokens": 2}
    project.write_recipe()
    folder = project.train("sft.max_steps=1").parent
    for name in ("manifest.json", "recipe.yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        assert leaks(text, secrets) == [] and "abcdefgh" not in text and "•••" in text, name


def test_what_a_model_or_a_file_says_cannot_repaint_the_terminal():
    said = "a\x1b]52;c;cm0gLXJm\x07b\x1b[2Jc\x9b1;1Hd\u202ee\x1b[32mgreen\x1b[0m\r\n\tf"
    shown = redaction.printable(said)
    assert not {"\x07", "\x9b", "\u202e", "\r"} & set(shown) and "\x1b]" not in shown and "\x1b[2J" not in shown
    assert "\x1b[32mgreen\x1b[0m\n\tf" in shown


@pytest.mark.parametrize("code", ["8", "0;8", "1;30;40", "38;5;0", "7", "5", ""])
def test_codes_that_hide_a_text_are_no_colours(code):
    shown = redaction.printable(f"\x1b[{code}mhidden\x1b[1;31mred\x1b[0m")
    assert shown.startswith("\ufffd[" if code else "\x1b[m") and "\x1b[1;31mred\x1b[0m" in shown


# Revisions


def test_the_commit_of_a_download_is_known(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of(tmp_path / "models--org--name" / "snapshots" / commit) == commit
    assert commit_of(tmp_path / "my-model") is None
    (tmp_path / ".mv").write_text(f"Revision:master,CreatedAt:1721000000,Commit:{commit}")
    assert commit_of(tmp_path) == commit
