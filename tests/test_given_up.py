"""What macOS does to work on the GPU, done to every command: explained, done again, and the result is the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from metal_messages import IGNORED, PREFIX, VICTIM, WATCHDOG
from project import Project, losses, metrics
from test_dpo import preferring  # noqa: F401  (a fixture)
from test_eval import write_exam

from mlx_zh import chat, dpo, eval, fuse
from mlx_zh.exams import scorer
from mlx_zh.language.notice import Notice, notice_of
from mlx_zh.models import generate
from mlx_zh.models.export import fidelity
from mlx_zh.stages import setbacks
from mlx_zh.training import dpo_objective, reference, sft_objective


@pytest.fixture(autouse=True)
def nothing_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(setbacks, "_explained", set())


def fail(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, message: str, bad: Callable[[int, tuple[Any, ...]], bool]
) -> list[int]:
    """Let calls of `module.name` fail where `bad(number of the call, its arguments)`; returns their numbers."""
    function, failed = getattr(module, name), []
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if bad(calls, arguments):
            failed.append(calls)
            raise RuntimeError(message)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, wrapped)
    return failed


def adapter(folder: Path) -> bytes:
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


# Training


def test_sft_is_stopped_by_the_watchdog(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 120 tokens are; it is explained once, and the report can show it in both languages."""
    straight = project.train(name="straight")
    fail(monkeypatch, sft_objective, "batch_logprobs", WATCHDOG, lambda _, a: a[1].tokens.size > 120)
    result = project.sft()
    assert (result.status, result.err) == (0, "")
    assert "warning: step 1 was stopped: it kept the GPU busy for longer than macOS allows. It is done" in result.out
    assert result.out.count("AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1") == 1 == result.out.count("pmset displaysleepnow")
    folder = Path("runs/tiny/sft")
    codes = [json.loads(line)["code"] for line in (folder / "warnings.jsonl").read_text().splitlines()]
    assert codes == ["work-shortened", "advice-watchdog"]
    assert "macOS 26 就会中止它的运算" in Notice("advice-watchdog").text("zh")
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.parametrize("call", [1, 4])
def test_sft_is_a_victim_of_another_program(project: Project, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """In the first validation, and in a step: the same bits as undisturbed."""
    straight = project.train("lora.dropout=0.1", name="straight")
    fail(monkeypatch, sft_objective, "batch_logprobs", VICTIM, lambda number, _: number == call)
    result = project.sft("lora.dropout=0.1")
    assert (result.status, result.err) == (0, "")
    assert "was stopped: an error of another program made macOS restart the GPU. It is done again" in result.out
    folder = Path("runs/tiny/sft")
    assert metrics(folder) == metrics(straight) and adapter(folder) == adapter(straight)


def test_sft_is_ignored_and_goes_on_in_a_new_process(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with one paragraph, and the same command ends as an undisturbed run does."""
    straight = project.train("checkpoint.every_steps=null", name="straight")
    with monkeypatch.context() as patch:
        fail(patch, sft_objective, "batch_logprobs", IGNORED, lambda number, _: number > 4)
        result = project.sft("checkpoint.every_steps=null")
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith("error: step ") and "Everything up to step " in result.err
    assert "A new process is accepted again." in result.err
    folder = project.train("checkpoint.every_steps=null")
    assert metrics(folder) == metrics(straight) and adapter(folder) == adapter(straight)


@pytest.mark.parametrize(("message", "says"), [(WATCHDOG, "in rows of"), (VICTIM, "It is done again;")])
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_dpo_and_its_reference(
    preferring: Project,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    says: str,
    loss: str,
) -> None:
    """The second row of the reference, and later a step's second forward pass; `aot` needs two passes for a step."""
    settings = [f"dpo.loss={loss}", "memory.micro_tokens=200"]
    assert preferring.run(dpo.main, "name=straight", *settings).status == 0
    monkeypatch.setenv("MLX_ZH_CACHE", "other-cache")
    for module, call in ((reference, 2), (dpo_objective, 6)):
        fail(monkeypatch, module, "batch_logprobs", message, lambda number, _, call=call: number == call)
    monkeypatch.setattr(reference, "_MAX_TOKENS", 200)
    result = preferring.run(dpo.main, *settings)
    assert (result.status, result.err) == (0, "")
    [of_reference, of_step] = [line for line in result.out.splitlines() if " was stopped: " in line]
    assert of_reference.startswith("warning: the reference pass was stopped: ") and says in of_reference
    assert of_step.startswith(("warning: step ", "warning: validation ")) and says in of_step
    found, expected = losses(Path("runs/tiny/dpo")), losses(Path("runs/straight/dpo"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_reference_pass_that_cannot_go_on(
    preferring: Project,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_MAX_TOKENS", 60)
    with monkeypatch.context() as patch:
        fail(patch, reference, "batch_logprobs", IGNORED, lambda number, _: number > 1)
        result = preferring.run(dpo.main, "memory.micro_tokens=60")
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith("error: the reference pass failed 4 times: macOS takes no more GPU work")
    assert "what was computed is kept" in result.err
    again = preferring.run(dpo.main, "memory.micro_tokens=60")
    assert again.status == 0 and " 0 pairs found" not in again.out


# Sample answers, exams, fusing


@pytest.mark.parametrize("message", [WATCHDOG, VICTIM])
def test_sample_answers_are_given_all_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    settings = ["evaluate.prompts=[你好,再见]", "evaluate.max_new_tokens=3"]
    straight = project.train(*settings, name="straight")
    failed = fail(monkeypatch, generate.StreamDecoder, "push", message, lambda number, _: number == 2)
    folder = project.train(*settings)
    assert failed == [2]
    stored, expected = (json.loads((run.parent / "samples.json").read_text()) for run in (folder, straight))
    assert stored["answers"] == expected["answers"] and stored["answers"].keys() == {"base", "sft"}


def test_sample_answers_that_cannot_be_given_do_not_end_a_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, generate.StreamDecoder, "push", IGNORED, lambda *_: True)
    result = project.sft("evaluate.prompts=[你好]")
    assert (result.status, result.err) == (0, "")
    assert "warning: the sample prompts were not answered, and training is not affected: " in result.out
    assert adapter(Path("runs/tiny/sft"))


@pytest.mark.parametrize("message", [WATCHDOG, VICTIM])
@pytest.mark.parametrize("protocol", ["official", "generate"])
def test_an_exam_is_given_up_and_asked_again(
    project: Project, monkeypatch: pytest.MonkeyPatch, message: str, protocol: str
) -> None:
    """The second row, or the fifth token of a free answer. Accuracy and choices are those of an undisturbed exam."""
    write_exam(Path("exam"))
    project.recipe["evaluate"] = {
        "benchmarks": ["exam"], "shots": 1, "bootstrap": 200, "max_new_tokens": 4, "protocol": protocol,
    }  # fmt: skip
    project.write_recipe()
    assert project.run(eval.main, "name=straight").status == 0
    free = protocol == "generate"
    module, name = (generate.StreamDecoder, "push") if free else (scorer, "hidden_states")
    failed = fail(monkeypatch, module, name, message, lambda number, _: number == (5 if free else 2))
    result = project.run(eval.main)
    assert (result.status, result.err, len(failed)) == (0, "", 1)
    assert "warning: the exam exam was stopped: " in result.out
    answers = [Path(f"runs/{run}/eval/base-exam.jsonl").read_text().splitlines() for run in ("tiny", "straight")]
    for found, expected in zip(*(map(json.loads, lines) for lines in answers), strict=True):
        assert (found["id"], found["choice"], found["text"]) == (expected["id"], expected["choice"], expected["text"])
        if not free:
            assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_the_measurement_of_a_fused_model_is_repeated(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.train()
    failed = fail(monkeypatch, fidelity, "hidden_states", WATCHDOG, lambda number, _: number == 1)
    result = project.run(fuse.main, "export.formats=[hf]")
    assert (result.status, result.err, failed) == (0, "", [1])


# Chat


def test_piped_chat_is_one_paragraph(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, generate.StreamDecoder, "push", WATCHDOG, lambda *_: True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好".encode())))
    result = project.run(chat.main)
    assert result.status == 2 and "Traceback" not in result.err
    assert "\nerror: 回答中断：连续占用 GPU 的时间超过了 macOS 的限制。" in result.err
    assert "The answer was cut off: it kept the GPU busy for longer than macOS allows." in result.err


def test_what_has_no_other_handling_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the model, for example."""
    evaluate = mx.eval
    fail(monkeypatch, mx, "eval", PREFIX + "Caused GPU Address Fault Error (0000000b:…PageFault).", lambda *_: True)
    result = project.sft()
    monkeypatch.setattr(mx, "eval", evaluate)
    assert result.status == 2 and result.err.count("\n") == 1
    assert result.err.startswith("error: an error of the GPU ([METAL] Command buffer execution failed: ")


def test_the_warnings_are_stored_with_their_codes() -> None:
    record = {"code": "work-repeated", "values": {"what": "x", "cause": {"code": "cause-victim", "values": {}}}}
    notice = notice_of(record)
    assert (
        notice is not None
        and notice.text("zh") == "x运算被中止：另一个程序出错，macOS 重启了 GPU。现在重新计算，结果不变。"
    )
