"""What doctor says of the self-check, and the file that `doctor --report` writes: useful, and without secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from project import Project

from mlx_zh import doctor
from mlx_zh.core import attention as core_attention
from mlx_zh.errors import StorageError
from mlx_zh.language.notice import Notice
from mlx_zh.stages import bug_report, checkup
from mlx_zh.stages.checkup import Check
from mlx_zh.system import device
from mlx_zh.system.redaction import hide
from mlx_zh.training.check_cases import ON_CPU, Case

FUSED = mx.fast.scaled_dot_product_attention
SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuv",
    "MODELSCOPE_SDK_TOKEN": "7c1e4f52-aaaa-bbbb-cccc-0123456789ab",
    "MLX_ZH_SOMETHING": "correct-horse-battery-staple",  # nothing in its name says that it is a secret
    "HF_ENDPOINT": "https://someone:hunter2hunter2@mirror.example/path",
    "HTTPS_PROXY": "http://user:proxypassword@proxy.example:8080",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_HUB_USER_AGENT": "Bearer abcdefgh12345678",
}
HIDDEN = (
    *("hf_abcdef", "7c1e4f52", "correct-horse", "hunter2", "proxypassword", "0123456789abcdef", "abcdefgh1234"),
    "someone",
)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """On a Mac too: what a device does wrong is simulated here."""
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def planted(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a project in it, and secrets in the environment."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("HF_HOME", str(Path.cwd() / "models"))
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    return Path.cwd()


def test_the_report_has_what_is_needed_and_no_secret(
    planted: Path, run_stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(doctor.main, "--quick", "--report") in (0, 1)
    shown = capsys.readouterr().out
    assert "The report is in mlx-zh-report.md. Read it" in shown
    text = Path("mlx-zh-report.md").read_text(encoding="utf-8")
    for secret in (*HIDDEN, str(planted)):
        assert secret not in text and secret not in shown, secret
    for line in (
        "| mlx | 0.32.4 |",
        "| HF_HOME | ~/models |",
        "| HF_TOKEN | ••• |",
        "| MLX_ENABLE_TF32 | 0 |",
        "| MLX_ZH_SOMETHING | (set; not shown) |",
        "| HTTPS_PROXY | (set; not shown) |",
        "| HF_ENDPOINT | https://•••@mirror.example/path |",
    ):
        assert line in text.splitlines()
    assert "WANDB" not in text  # it changes nothing here
    assert "| ok | mlx | 0.32.4, the tested version |" in text and "| ok | chip | " in text


def test_a_run_is_added_when_asked(
    planted: Path, project: Project, run_stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project.train()
    warnings = [{"text": f"warning {n} in {planted}/data.jsonl with token=abcdefgh1234"} for n in range(30)]
    text = "\n".join(json.dumps(line) for line in warnings) + "\n{damaged\n"
    (folder / "warnings.jsonl").write_text(text, encoding="utf-8")
    assert run_stage(doctor.main, "--quick", "--report", "report.txt", "--run", "tiny") in (0, 1)
    report = Path("report.txt").read_text(encoding="utf-8")
    assert "| tiny | sft | finished, step 6 |" in report and "| tiny | dpo | not begun |" in report
    assert "- sft: warning 29 in ~/data.jsonl with token=•••" in report
    assert "warning 10 in" in report and "warning 9 in" not in report  # the last 20
    assert run_stage(doctor.main, "--quick", "--report", "report.txt") in (0, 1)  # a report is replaced
    report = Path("report.txt").read_text(encoding="utf-8")
    assert "warning 29" not in report and "| tiny | sft | finished, step 6 |" in report
    assert project.run(doctor.main, "--quick", "--report", "report.md", "--run", "tinny").err.startswith(
        "error: there is no run 'tinny' in runs; the runs there are: tiny."
    )


def test_an_empty_name_is_not_taken_for_no_report(project: Project) -> None:
    assert f"The report is in {bug_report.DEFAULT}." in project.run(doctor.main, "--quick", "--report", "").out
    assert Path(bug_report.DEFAULT).is_file()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("recipe.yaml", "error: --report recipe.yaml: the name must end with .md or .txt"),
        ("notes.md", "error: notes.md exists and is not a report of doctor."),
    ],
)
def test_no_other_file_is_replaced(project: Project, path: str, message: str) -> None:
    Path("notes.md").write_text("mine")
    before = Path(path).read_bytes()
    result = project.run(doctor.main, "--quick", "--report", path)
    assert result.status == 2 and result.err.startswith(message)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("option", ["--report", "--run"])
@pytest.mark.parametrize("name", ["~nobody-of-this-name", "a" * 300])
def test_impossible_names_are_one_line(project: Project, option: str, name: str) -> None:
    names = ("--report", f"{name}.txt/x") if option == "--report" else ("--report", "x.md", "--run", name)
    result = project.run(doctor.main, "--quick", *names)
    assert result.status == 2 and result.err.startswith("error: ") and "Traceback" not in result.err
    if option == "--report":
        with pytest.raises(StorageError):
            bug_report.destination("a" * 300 + ".md")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(StorageError, match="is not a report of doctor"):
        bug_report.destination(str(tmp_path / "pipe.md"))


@pytest.mark.parametrize("name", ["OPENAI_KEY", "GITHUB_PAT", "PGPASSWORD", "MYSQL_PASS", "SOMEAPIKEY", "NPM_AUTH"])
def test_secrets_of_any_variable_are_hidden_in_texts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "plantedplanted")
    monkeypatch.setenv("HARMLESS_PATH", "a-folder-of-mine")
    assert hide("got plantedplanted in a-folder-of-mine") == "got ••• in a-folder-of-mine"


def test_a_password_with_an_at_sign_is_hidden() -> None:
    assert hide('see "https://me:pass@word@mirror.example/a", me@b.example') == (
        'see "https://•••@mirror.example/a", me@b.example'
    )
    assert hide("https://mirror.example/@scope/a") == "https://mirror.example/@scope/a"


def test_a_folder_gets_the_file(tmp_path: Path) -> None:
    assert bug_report.destination(str(tmp_path)) == tmp_path / "mlx-zh-report.md"
    bug_report.write_report(tmp_path / "a.md", [Check("ok", "a|b", "x\ny")], tmp_path / "none", None)
    assert "| ok | a\\|b | x y |" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_run_needs_report(project: Project) -> None:
    result = project.run(doctor.main, "--run", "tiny")
    assert result.status == 2 and "give --report too" in result.err


# What doctor prints of the self-check


def test_a_line_for_each_case_in_eighty_columns() -> None:
    checks = list(checkup.self_checks())
    assert [check.level for check in checks] == ["ok"] * (1 + len(ON_CPU))
    lines = [f"{check.level:<5} {check.name:<10} {check.text}" for check in checks]
    assert max(map(len, lines)) <= 80
    quantities = ("hidden", "logprobs", "trained", "gradient")  # whichever differs most on another processor
    longest = max(len(Notice(f"quantity-{name}").text("en")) for name in quantities)
    assert len(f"ok    self-check {max(map(str, ON_CPU), key=len)}: 8.1e-06 of 1.3e-05") + 1 + longest <= 80
    for case, line in zip(ON_CPU, lines[1:], strict=True):
        assert line.startswith(f"ok    self-check {case}:") and " of " in line


def test_a_case_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None) -> Any:
        if q.shape[2] == 9 and not isinstance(mask, mx.array):
            raise RuntimeError("no such kernel")
        out = FUSED(q, k, v, scale=scale, mask=mask)
        return 1.5 * out if q.shape[2] in wrong else out

    wrong: set[int] = set()
    monkeypatch.setattr(core_attention, "_in_pieces", lambda queries: False)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    case = Case("float32", 64, width=128)
    check = checkup.self_check(case)
    assert check.level == "warn" and "unfused" in check.remedy and "doctor --report" in check.remedy
    assert check.text == f"{case} fails: roots of 9 tokens, branches of 9 tokens: MLX reports no such kernel"
    wrong.add(16)
    check = checkup.self_check(case)
    assert check.level == "fail" and "do not train" in check.remedy


def test_attention_is_timed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_zh.planning.machine.ATTENTION_LENGTHS", (2, 3))
    check = checkup.attention()
    assert check.level == "ok" and check.text.startswith("2/3 tokens: fused ") and "unfused " in check.text
    monkeypatch.setattr(device, "is_cpu", lambda: False)

    def refused(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("[metal] no kernel")

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", refused)
    assert checkup.attention() == Check("warn", "attention", "cannot be timed: [metal] no kernel")
