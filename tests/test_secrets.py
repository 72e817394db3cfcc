"""Secrets: none is in anything that a run writes for others to read, and taking them out changes nothing else."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from project import Project

from mlx_zh import dpo, fuse, prepare, report, run, sft
from mlx_zh import eval as evaluate
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.system.redaction import HIDDEN, printable, redact, redacted

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_zh"

ENVIRONMENT = {
    "OPENAI_KEY": "Zq4mJ7w2Lx9vB1nK",
    "OPENAI_API_KEY": "plainwordsofanapi",
    "PGPASSWORD": "corr&ct<horse>\"battery'",
    "GITHUB_PAT": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_SECRETSECRETSECRETSECRET",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "MODELSCOPE_API_TOKEN": "ms-0a1b2c3d-SECRET00-1111-2222-333344445555",
    "DASHSCOPE_API_KEY": "sk-0a1b2c3d4e5f60718293a4b5c6d7e8f9",
    "VOLC_SK": "WkRZeE5tSXpaVGMwTkRoaVl6",
    "MYSQL_PWD": "十六个字符的中文密码也算数一二三四",
}
# Not in the environment, but recognised by their form.
FORMS = {
    "user:passw0rdX": "https://user:passw0rdX@host.example/x.jsonl",
    "bearer0a1b2c3d4e5f": "Authorization: Bearer bearer0a1b2c3d4e5f",
    "hf_OtherTokenOtherToken": "hf_OtherTokenOtherToken",
    "sk-proj-abcdefABCDEF0123456789": "sk-proj-abcdefABCDEF0123456789",
    "ghp_abcdefghijABCDEFGHIJ0123456789": "令牌ghp_abcdefghijABCDEFGHIJ0123456789",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0",
    "MIIEpAIBAAKCAQEAsecretkey": "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEAsecretkey\n"
    "-----END RSA PRIVATE KEY-----",
}
SECRETS = [*ENVIRONMENT.values(), *FORMS]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def leaks(folder: Path) -> list[tuple[str, str]]:
    """The files below a folder that hold a secret, with the secret; also as JSON, HTML, YAML and UTF-16 hold it."""
    held = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for secret in SECRETS:
            forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], secret.replace("'", "''")}
            forms |= {secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")}
            encoded = [form.encode(code) for form in forms for code in ("utf-8", "utf-16-le")]
            if any(form in content for form in encoded) or secret in path.name:
                held.append((str(path), secret))
    return held


@pytest.fixture
def planted(project: Project, environment: None) -> Project:
    """A project with a secret in every text that a recipe holds."""
    shutil.copytree(project.model, "merging")  # llama.cpp wants a tokenizer with merges
    path = Path("merging/tokenizer.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"] |= {"vocab": state["model"]["vocab"] | {"zq": 290}, "merges": [["z", "q"]]}
    path.write_text(json.dumps(state), encoding="utf-8")
    project.model = Path("merging").absolute()
    everything = "；".join([*ENVIRONMENT.values(), *FORMS.values()])
    rows = [{"prompt": f"第{n}个", "chosen": "好的", "rejected": "不好"} for n in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    named = f"rows-{ENVIRONMENT['OPENAI_KEY']}.jsonl"
    shutil.copy("train.jsonl", named)
    exam = Path("exam/val")
    exam.mkdir(parents=True)
    lines = [
        "id,question,A,B,C,D,answer",
        *(f'{n},"{FORMS["user:passw0rdX"]} 第{n}题",一,二,三,四,A' for n in range(4)),
    ]
    (exam / "law_val.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    project.recipe["model"]["path"] = "merging"
    project.recipe["data"] |= {
        "system": everything[:200],
        "max_length": 400,
        "variables": {"secret": everything},
        "registry": {
            "mine": {"hub": "file", "id": named, "kind": "sft"},
            "far": {"hub": "url", "id": FORMS["user:passw0rdX"], "kind": "sft"},
        },
        "dpo": {"train": ["pairs.jsonl"]},
    }
    project.recipe["data"]["sft"]["train"] = [named]
    project.recipe["sft"] |= {"max_steps": 2}
    project.recipe["dpo"] = {"batch_size": 4, "max_steps": 1, "learning_rate": 1e-4}
    prompts = [*ENVIRONMENT.values(), *FORMS.values()]
    prompts = [*prompts[:6], {"prompt": everything[:150], "expect": ENVIRONMENT["GITHUB_PAT"]}]
    project.recipe["evaluate"] = {
        "prompts": prompts,
        "max_new_tokens": 2,
        "benchmarks": ["exam"],
        "shots": 0,
        "protocol": "generate",
    }
    project.recipe["export"] = {"formats": ["mlx", "hf", "gguf", "peft"], "gguf_type": "f16"}
    project.write_recipe()
    return project


@pytest.mark.slow
def test_nothing_that_a_run_writes_holds_a_secret(planted: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys, "argv", ["mlx-zh", "sft", f"data.system={ENVIRONMENT['PGPASSWORD']}", "--token", "abcdef"]
    )
    for stage in (prepare, sft, dpo, evaluate, fuse, report):
        arguments = ["--no-measure"] if stage is fuse else []
        result = planted.run(stage.main, *arguments)
        assert result.status == 0, (stage.__name__, result.err)
        assert not [secret for secret in SECRETS if secret in result.out + result.err], stage.__name__
    files = {path.relative_to("runs/tiny").as_posix() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    assert {"samples.json", "report.html", "report.md", "sft/settings.json", "fused/gguf/Modelfile"} <= files
    assert leaks(Path("runs")) == []
    assert HIDDEN in Path("runs/tiny/samples.json").read_text(encoding="utf-8")


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_of_all_steps_with_secrets_is_up_to_date_afterwards(planted: Project):
    planted.recipe["export"] = {"formats": ["mlx"]}
    planted.write_recipe()
    first = subprocess.run(
        [sys.executable, "-m", "mlx_zh.run", "recipe.yaml"], capture_output=True, text=True, env=os.environ
    )
    assert first.returncode == 0, first.stderr
    assert leaks(Path("runs")) == []
    again = planted.run(run.main)
    assert again.status == 0 and "is up to date" in again.out, again
    sft_again = planted.sft()
    assert "nothing is left to train" in sft_again.out, sft_again


def test_a_secret_that_changed_is_a_difference_that_is_not_shown(planted: Project):
    planted.recipe["evaluate"], planted.recipe["data"]["system"] = {}, "https://a:first-secret@host"
    planted.write_recipe()
    planted.train()
    result = planted.sft("data.system=https://a:other-secret@host")
    assert result.status == 2 and "holds a run with other settings" in result.err
    assert "other-secret" not in result.err and "first-secret" not in result.err


def test_a_saved_chat_holds_no_secret(tmp_path: Path, environment: None):
    chat = Transcript(None, [Message("user", f"用{ENVIRONMENT['OPENAI_KEY']}"), Message("assistant", "好")])
    chat.save(tmp_path / "chat.json")
    assert leaks(tmp_path) == []


def test_training_data_is_kept_as_it_is(project: Project, environment: None):
    project.write_data("train.jsonl", tuple((f"第{n}个{ENVIRONMENT['OPENAI_KEY']}", "好的") for n in range(4)))
    result = project.run(prepare.main, "--show", "1")
    assert result.status == 0 and ENVIRONMENT["OPENAI_KEY"] not in result.out
    shards = b"".join(path.read_bytes() for path in Path(os.environ["MLX_ZH_CACHE"]).rglob("*.arrow"))
    assert shards


@pytest.mark.parametrize("override", ["name=OPENAI", "runs=runs-OPENAI", "name=hf_OtherTokenOtherToken"])
@pytest.mark.parametrize("stage", [sft, prepare, run, report])
def test_a_secret_becomes_no_name_of_a_folder(project: Project, environment: None, stage: Any, override: str):
    before = sorted(Path().rglob("*"))
    override = override.replace("OPENAI", ENVIRONMENT["OPENAI_KEY"])
    result = project.run(stage.main, override)
    assert result.status == 2 and "looks like a token or password (" in result.err
    assert override.partition("=")[2] not in result.out + result.err
    assert sorted(Path().rglob("*")) == before


# What is hidden, and what is not


@pytest.mark.parametrize("secret", FORMS)
def test_forms_of_secrets_are_hidden_between_chinese_letters_too(secret: str):
    for text in (FORMS[secret], f"用{FORMS[secret]}，好", f'"{FORMS[secret]}"'):
        assert secret not in redact(text) and HIDDEN in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "The basic understanding of tokens: 12, token: 128, eos_token: <|im_end|>, 3 tokens = 1 word",
        "http://host:8080/@scope/name",
        "risk-management-strategy, task-oriented-dialogue-system",
        "0.0123456789012345678901234567890123456789",
        "密码学：对称密钥与公钥。密码是什么？",
        "sha256 " + "0a1b2c3d" * 8,
        "Qwen/Qwen3-8B, mailto:someone@example.com",
        "bearer of good news, basic principles",
        "pad_token=<pad> bos_token=<s>",
        "token = tokenizer.encode(text); next_token=logits.argmax(-1)",
        "def login(password: str, token: Optional[str] = None) -> bool:",
        "api_key=os.environ['X']; password = input('...'); private_key = generate_private_key()",
        "token=${TOKEN}, TURKEY=istanbul-city, COMPASS=northnorth",
    ],
)
def test_ordinary_texts_stay(text: str):
    assert redact(text) == text


def test_numbers_and_special_tokens_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIN_PASSWORD", "12345678")
    values = {"token": 12345678, "eos_token": "<|im_end|>", "loss": 0.12345678, "text": "0.12345678 and 12345678"}
    assert redacted(values) == values | {"text": f"0.12345678 and {HIDDEN}"}


@given(st.text(alphabet=st.sampled_from("a.:/@=-_ 字0eyJtokenhf_sk"), max_size=200))
def test_redacting_twice_is_redacting_once(text: str):
    assert redact(redact(text)) == redact(text)


# Time: a quadratic pattern would need hours for a text of this length

SEEDS = (
    *("a.", "eyJ", "eyJ-", "eyJaaaaaaaa.", "eyJaaaaaaaa.b.", "://", "://a", "://a:", "://a:b", "@", "://@", "token"),
    *("token=", "token: ", "token ", "--token ", "secret=", "bearer ", "basic a", "authorization: bearer ", "hf_"),
    *(
        "sk-",
        "sk-proj-",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\n",
        "-----END PRIVATE KEY-----",
    ),
    *(
        "A_",
        "A_KEY=",
        "密码",
        "密码是",
        "AKIA",
        "LTAI",
        "ms-aaaaaaaa-",
        " ",
        "\n",
        "\\n",
        "'",
        '"',
        "\x1b[1;",
        "a",
        "0",
    ),
)


def test_no_text_takes_hours_to_redact(tmp_path: Path):
    script = tmp_path / "redact.py"
    script.write_text(
        "import sys\nfrom mlx_zh.system.redaction import printable\n"
        f"for seed in {SEEDS!r}:\n"
        "    for begin in ('', '-----BEGIN PRIVATE KEY-----'):\n"
        "        printable(begin + seed * (200_000 // len(seed)))\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, script], check=True, timeout=600)


@given(st.text(max_size=30), st.sampled_from(SEEDS))
def test_any_text_can_be_printed(begin: str, seed: str):
    shown = printable(begin + seed * 50)
    assert "\x1b[1;\x1b" not in shown


# Who may write

EXACT = {
    "corpus/build.py", "corpus/finishing.py", "corpus/hub_rows.py", "corpus/joined_encoding.py", "corpus/scan.py",
    "corpus/scanning.py", "corpus/shards.py", "core/product_speed.py",
    "models/export/recover.py", "models/export/safetensors_file.py", "stages/choosing.py", "stages/device_check.py",
    "stages/rounds.py", "stages/tokenizer_cache.py", "system/digests.py", "system/downloads.py", "system/hub.py",
    "training/checkpoints.py", "system/storage.py", "import.py",
}  # fmt: skip
# Files that no text of the user goes into: downloads, prepared data, pictures, tensors, records of floats, locks.
BINARY = {
    "corpus/contamination.py", "corpus/finishing.py", "corpus/hub_rows.py", "corpus/scan.py", "corpus/shards.py",
    "exams/archives.py", "models/export/gguf_file.py", "models/export/importance.py",
    "models/export/safetensors_file.py", "models/wheel.py", "prepare.py", "reporting/plots.py", "system/downloads.py",
    "system/locks.py", "system/storage.py", "training/metrics.py", "training/reference.py",
}  # fmt: skip
# What is copied or made from the base model's own files, and other places with a reason.
OTHERS = {
    "models/export/folder_files.py": "tokenizer files of the base",
    "models/export/licences.py": "licence files of the base",
    "system/links.py": "files of the base model",
    "stages/first_recipe.py": "the user's own recipe",
    "bridges/project.py": "the same, for a moment, to read it again",
    "system/blas.py": "names of functions",
    "system/entry.py": "/dev/null",
    "distributed/world.py": "/dev/null",
    "distributed/launching.py": "a pipe",
    "distributed/local.py": "ports of ranks, and that a rank is ready",
    "chatting/terminal.py": "the answer that the user edits",
    "system/record_lines.py": "judgements of answers, which are training data",
    "stages/placing.py": "copies of the exported model",
    "stages/sampling.py": "cuts off half a line",
    "studio/draft.py": "the user's own recipe",
    "studio/drafting.py": "a pipe to the studio",
    "studio/processes.py": "locks, and what a command prints",
    "studio/uploads.py": "the user's own data",
}
WRITES = {"write_text", "write_bytes", "savez", "savez_compressed", "copyfile", "copytree", "copy2",
          "save_pretrained", "mkstemp", "NamedTemporaryFile", "save_safetensors", "written_whole"}  # fmt: skip
REDACTING = {"write_text", "write_json", "append_json", "write_arrays"}


def _opens_for_writing(call: ast.Call, name: str) -> bool:
    if name == "dump" and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "json":
        return True
    if name == "open" and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "os":
        return "O_RDONLY" not in ast.unparse(call) and "devnull" not in ast.unparse(call)
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    return name in ("open", "fdopen", "FileIO") and any(
        isinstance(mode, str) and len(mode) < 5 and set(mode) & set("wax+") and set(mode) <= set("rwaxbt+")
        for mode in modes
    )


def test_only_the_redacting_writer_and_a_list_of_others_write_files():
    writers: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            plain = isinstance(call.func, ast.Name) and name in REDACTING  # imported from storage
            if not plain and (name in WRITES or name.startswith("write_exact") or _opens_for_writing(call, name)):
                writers.setdefault(path.relative_to(PACKAGE).as_posix(), set()).add(name)
    exact = {file for file, names in writers.items() if any(name.startswith("write_exact") for name in names)}
    assert exact == EXACT
    others = {file for file, names in writers.items() if any(not name.startswith("write_exact") for name in names)}
    assert others - BINARY - OTHERS.keys() == set()


def test_json_is_read_by_one_function_that_knows_no_recursion_error():
    readers = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("json.loads", "json.load")
    }
    assert readers == {"json_text.py", "run_key.py", "world.py"}  # the latter two read what they wrote


def test_recipes_are_stored_without_secrets_and_can_be_read(planted: Project):
    planted.recipe["evaluate"] = {}
    planted.write_recipe()
    planted.train("sft.max_steps=1")
    text = Path("runs/tiny/recipe.yaml").read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict) and leaks(Path("runs")) == []


def test_a_printed_recipe_shows_no_secret(planted: Project):
    shown = planted.sft("--print").out
    assert yaml.safe_load(shown)["data"]["variables"] == {"secret": HIDDEN}
    assert [secret for secret in SECRETS if secret in shown] == []
