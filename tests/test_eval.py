"""The eval stage from command line to run folder, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from project import Project

from mlx_zh import eval
from mlx_zh import report as report_stage
from mlx_zh.exams import answers as asking
from mlx_zh.exams.records import Records
from mlx_zh.language.notice import notice_of
from mlx_zh.models.adapters.files import save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import load_model
from mlx_zh.recipe import load_recipe
from mlx_zh.stages import run_models
from mlx_zh.system.entry import entry

HEADER = "id,question,A,B,C,D,answer\n"
SUBJECTS = {"maths": "数学", "law": "法学", "music": "音乐"}
Ask = Callable[..., Any]


def rows(subject: str, count: int, answers: bool = True) -> str:
    head = HEADER if answers else HEADER.replace(",answer", "")
    lines = [
        f"{n},{subject}第{n}题是什么？,{n}甲,乙,{n + 1}丙,丁" + (f",{'ABCD'[n % 4]}" if answers else "")
        for n in range(count)
    ]
    return head + "\n".join(lines) + "\n"


def write_exam(folder: Path, questions: int = 6, split: str = "test", answers: bool = True) -> Path:
    for key in SUBJECTS:
        for part, count, known in (("dev", 2, True), (split, questions, answers)):
            path = folder / part / f"{key}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rows(key, count, known), encoding="utf-8")
    return folder


def write_adapter(project: Project, stage: str, kind: str = "lora", seed: int = 0) -> None:
    """An adapter that changes answers, as if the stage had learned it."""
    model = load_model(str(project.model)).model
    spec = AdapterSpec(kind, num_layers=3, rank=4)
    add_adapter(model, spec, seed=seed)
    rng = np.random.default_rng(seed)
    weights = {
        name: array + mx.array(rng.normal(size=array.shape, scale=0.3).astype(np.float32))
        for name, array in trainable(model).items()
    }
    save_adapter(Path("runs/tiny") / stage / "adapters", weights, spec, {})


@pytest.fixture
def ask(project: Project) -> Ask:
    """`mlx-zh eval recipe.yaml ARGUMENTS` in a folder with an exam; returns status, output and errors."""
    write_exam(Path("exam"))
    project.recipe["evaluate"] = {"benchmarks": ["exam"], "shots": 1, "bootstrap": 200, "max_new_tokens": 4}
    project.write_recipe()

    def run(*arguments: str) -> tuple[int, str, str]:
        project.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry(eval.main, ["recipe.yaml", *arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *project.capsys.readouterr()

    return run


def report(stage: str, exam: str = "exam") -> dict[str, Any]:
    return json.loads(Path(f"runs/tiny/eval/{stage}-{exam}.json").read_text(encoding="utf-8"))


def lines(stage: str, exam: str = "exam") -> list[dict[str, Any]]:
    text = Path(f"runs/tiny/eval/{stage}-{exam}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def count_questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The subjects that a model is really asked, from now on."""
    asked: list[str] = []
    answer = asking.Examinee.answer

    def counted(self: Any, exam: Any, subject: Any, *rest: Any) -> Any:
        asked.append(subject.key)
        return answer(self, exam, subject, *rest)

    monkeypatch.setattr(asking.Examinee, "answer", counted)
    return asked


def test_the_base_alone(ask: Ask):
    status, out, err = ask()
    assert (status, err) == (0, "")
    assert {path.name for path in Path("runs/tiny/eval").iterdir()} == {
        "base-exam.json",
        "base-exam.jsonl",
        "subjects",
    }
    assert "exam, test: 18 questions in 3 subjects; protocol official, 1 worked examples" in out
    assert "runs/tiny/eval/base-exam.json" in out and Path("runs/tiny/manifest.json").exists()
    first = lines("base")[0]
    assert set(first) == {
        *("subject", "id", "truth", "choice", "logprobs", "mass", "tokens", "truncated", "text"),
    }
    assert (first["subject"], first["id"], first["truth"], len(first["logprobs"])) == ("law", "0", "A", 4)
    assert first["choice"] == "ABCD"[int(np.argmax(first["logprobs"]))]
    assert first["mass"] == pytest.approx(np.exp(first["logprobs"]).sum(), abs=1e-5)
    found = report("base")
    right = [line["choice"] == line["truth"] for line in lines("base")]
    assert found["rows"][0]["macro"] == pytest.approx(np.mean(right))
    assert found["about"]["protocol"] == {"name": "official", "version": 1}
    assert found["tripwires"] and all(f"warning: exam, base: {wire}" in out for wire in found["tripwires"])
    assert list(map(notice_of, found["tripwire_codes"])) == found["tripwires"]


def test_stages_side_by_side(ask: Ask, project: Project):
    write_adapter(project, "sft", seed=1)
    write_adapter(project, "dpo", kind="full", seed=2)
    status, out, err = ask()
    assert (status, err) == (0, "")
    header = next(line for line in out.splitlines() if line.split()[:1] == ["%"])
    assert header.split() == ["%", "base", "sft", "dpo", "questions"]
    for sentence in ("sft against base: ", "dpo against base: ", "dpo against sft: "):
        assert sentence in out
    assert "lost, p" in out and ("within noise" in out or "better" in out)
    assert set(report("dpo")["against"]) == {"base", "sft"}
    won = report("sft")["against"]["base"]["won"]
    assert won == report("base")["against"]["sft"]["lost"]
    assert len({json.dumps([line["logprobs"] for line in lines(stage)]) for stage in ("base", "sft", "dpo")}) == 3


def test_one_stage_meets_what_was_measured_before(ask: Ask, project: Project):
    ask("--stage", "base")
    write_adapter(project, "sft")
    _, out, _ = ask("--stage", "sft")
    assert "sft against base: " in out
    # Another exam, or another way to ask, is not comparable.
    _, out, _ = ask("--stage", "sft", "evaluate.limit=2")
    assert "sft against base: " not in out


def test_a_killed_run_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    ask("name=whole")
    keep, kept = Records.save_subject, []

    def killed(self: Records, subject: str, *rest: Any) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append(subject)
        keep(self, subject, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "save_subject", killed)
        assert ask()[0] == 130
    assert not Path("runs/tiny/eval/base-exam.json").exists()
    asked = count_questions(monkeypatch)
    assert ask()[0] == 0
    assert asked == ["maths", "music"]  # law was finished
    for name in ("base-exam.json", "base-exam.jsonl"):
        assert Path("runs/tiny/eval", name).read_text() == Path("runs/whole/eval", name).read_text()


def test_what_is_known_is_not_asked_again(ask: Ask, project: Project, monkeypatch: pytest.MonkeyPatch):
    write_adapter(project, "sft", seed=1)
    ask()
    asked = count_questions(monkeypatch)
    for unchanged in ([], ["memory.micro_tokens=50"], ["evaluate.bootstrap=300"], ["seed=7"]):
        ask(*unchanged)
    assert asked == []
    path = Path("exam/test/maths_test.csv")
    path.write_text(path.read_text(encoding="utf-8").replace("甲", "申"), encoding="utf-8")
    ask()
    assert asked == ["maths", "maths"]  # of base and of sft
    write_adapter(project, "sft", seed=5)
    ask()
    assert asked[2:] == ["law", "maths", "music"]  # sft's adapter is another one
    del asked[:]
    ask("--stage", "base", "evaluate.shots=0")
    ask("--stage", "base", "evaluate.protocol=lm-eval")
    ask("--stage", "base", "model.dtype=bfloat16")
    assert len(asked) == 9


def test_damaged_records_are_asked_again(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    ask()
    before = lines("base")
    Path("runs/tiny/eval/subjects/base-exam/law.json").write_text("{", encoding="utf-8")
    Path("runs/tiny/eval/subjects/base-exam/music.json").write_text("[]", encoding="utf-8")
    asked = count_questions(monkeypatch)
    assert ask()[0] == 0
    assert asked == ["law", "music"] and lines("base") == before


def test_memory_settings_change_no_answer(ask: Ask):
    ask("name=tiny")
    ask("name=small", "memory.micro_tokens=37")
    small = [json.loads(line) for line in Path("runs/small/eval/base-exam.jsonl").read_text().splitlines()]
    assert [line["choice"] for line in small] == [line["choice"] for line in lines("base")]
    gaps = [np.subtract(a["logprobs"], b["logprobs"]) for a, b in zip(small, lines("base"), strict=True)]
    assert np.abs(gaps).max() < 1e-4


@pytest.mark.parametrize("protocol", ["chat", "zero-shot-chat", "lm-eval"])
def test_other_protocols(ask: Ask, protocol: str):
    status, out, err = ask(f"evaluate.protocol={protocol}")
    assert (status, err) == (0, "") and f"protocol {protocol}" in out
    assert all(line["logprobs"] and line["mass"] <= 1 for line in lines("base"))


def test_the_texts_of_options(ask: Ask):
    status, out, err = ask("evaluate.protocol=cloze")
    assert (status, err) == (0, "") and "protocol cloze" in out
    assert "of the probability on average" not in out  # a warning about letters
    for line in lines("base"):
        assert line["mass"] is None and len(line["logprobs"]) == 4
        assert line["choice"] == "ABCD"[int(np.argmax(line["logprobs"]))]
    assert report("base")["mass"] is None and report("base")["calibration_error"] is None


def test_generated_answers(ask: Ask):
    status, out, err = ask("evaluate.protocol=generate", "evaluate.limit=2")
    assert (status, err) == (0, "")
    assert all(isinstance(line["text"], str) and line["logprobs"] is None for line in lines("base"))
    found = report("base")
    assert found["mass"] is None and found["calibration_error"] is None
    assert sum(found["letters"]["predicted"].values()) == 6
    assert "6 of 6 answers give no letter; they count as wrong." in out  # a random model writes random bytes


def test_limits_and_parts_are_told(ask: Ask, samples: Path, model_folder: Callable[..., Path]):
    _, out, _ = ask("evaluate.limit=2")
    assert "exam, test: 6 questions" in out
    status, out, _ = ask(
        *("--benchmark", "cmmlu", f"evaluate.folder={{cmmlu: {samples / 'cmmlu'}}}", "evaluate.limit=1"),
        f"model.path={model_folder(max_position_embeddings=8192)}",
    )
    assert status == 0
    assert "warning: CMMLU, base: 34 questions were asked; CMMLU test has 11582." in out
    names = [row["name"] for row in report("base", "cmmlu")["rows"]]
    assert names == ["Average", "STEM", "Social Sciences", "Humanities", "Other", "China-specific"]


def test_prompts_that_do_not_fit_are_counted(ask: Ask):
    _, out, _ = ask("evaluate.max_length=150")
    cut = report("base")["truncated"]
    assert cut and f"warning: exam, base: {cut} of 18 prompts were too long and were cut." in out


def test_ceval_s_unlabelled_split_makes_a_submission(ask: Ask):
    for key in ("law", "logic"):
        for split, count in (("dev", 1), ("test", 3)):
            path = Path("mine", split, f"{key}_{split}.csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rows(key, count, answers=split == "dev"), encoding="utf-8")
    status, out, err = ask("--benchmark", "ceval", "evaluate.folder={ceval: mine}", "evaluate.split=test")
    assert (status, err) == (0, "")
    path = Path("runs/tiny/eval/base-ceval-submission.json")
    assert str(path) in out and "Average" not in out
    found = json.loads(path.read_text())
    assert {key: sorted(ids) for key, ids in found.items()} == {"law": ["0", "1", "2"], "logic": ["0", "1", "2"]}
    assert {letter for ids in found.values() for letter in ids.values()} <= set("ABCD")


def test_a_fused_model_is_a_model_of_its_own(ask: Ask, project: Project):
    import shutil

    status, _, err = ask("--stage", "fused")
    assert status == 2 and "there is no fused model at runs/tiny/fused/mlx" in err
    ask()
    shutil.copytree(project.model, "runs/tiny/fused/mlx")
    status, out, _ = ask("--stage", "fused")
    assert status == 0 and "fused against base: +0.00 points [+0.0, +0.0], 0 questions won, 0 lost" in out
    assert [line["logprobs"] for line in lines("fused")] == [line["logprobs"] for line in lines("base")]


def test_figures_of_an_earlier_model_are_left_out(ask: Ask, project: Project, model_folder: Callable[..., Path]):
    """After the model was fused again, and after the adapter was trained again, until each is asked again."""
    import shutil

    write_adapter(project, "sft")
    shutil.copytree(project.model, "runs/tiny/fused/mlx")
    ask()
    ask("--stage", "fused")

    def write_report() -> str:
        assert report_stage.main(["recipe.yaml"]) == 0
        return Path("runs/tiny/report.md").read_text(encoding="utf-8")

    assert "fused against base" in ask("--stage", "base")[1]
    assert "so its earlier figures are left out" not in write_report()

    shutil.rmtree("runs/tiny/fused/mlx")
    shutil.copytree(model_folder("qwen3"), "runs/tiny/fused/mlx")
    status, out, _ = ask("--stage", "base")
    assert status == 0 and "fused against" not in out and "sft against base" in out
    assert "the fused model, or the adapter in it, has changed since it was asked exam" in out
    assert "mlx-zh eval RECIPE --stage fused" in write_report()

    record = Path("runs/tiny/eval/sft-exam.json")
    stored = json.loads(record.read_text(encoding="utf-8"))
    stored["about"]["base"] = stored["about"]["base"][:16]  # as earlier versions named a model
    record.write_text(json.dumps(stored), encoding="utf-8")
    assert "sft has changed since" not in ask("--stage", "base")[1]

    write_adapter(project, "sft", seed=1)
    status, out, _ = ask("--stage", "base")
    assert "sft has changed since it was asked exam" in out and "sft against" not in out
    assert "mlx-zh eval RECIPE --stage sft" in write_report()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--benchmark", "mmlu"], "'mmlu' is no benchmark; give ceval, cmmlu, or the path"),
        (["evaluate.benchmarks=[]"], "evaluate.benchmarks names no exam"),
        (["evaluate.protocol=offical"], "evaluate.protocol must be one of 'official', 'chat'"),
        (["--benchmark", "exam", "copy/exam"], "two exams called exam"),
        (["evaluate.shots=5"], "has 2 dev questions, and 5 are shown"),
        (["--stage", "dpo"], "the recipe has no data to train it (data.dpo.train)"),
        (["evaluate.folder={mmlu: exam}"], "evaluate.folder"),
    ],
)
def test_mistakes_are_explained(ask: Ask, arguments: list[str], complaint: str):
    write_exam(Path("copy/exam"))
    status, _, err = ask(*arguments)
    assert status == 2 and complaint in err and "Traceback" not in err
    assert not Path("runs/tiny/eval").exists()


def test_overrides_may_stand_anywhere(ask: Ask):
    status, out, _ = ask("evaluate.limit=1", "--stage", "base", "--benchmark", "exam", "evaluate.shots=0")
    assert status == 0 and "3 questions in 3 subjects; protocol official, 0 worked examples" in out


def test_the_base_comes_back_after_every_adapter(project: Project):
    write_adapter(project, "sft", seed=1)
    write_adapter(project, "dpo", kind="full", seed=2)
    found = run_models.RunModels(load_recipe("recipe.yaml"))
    assert found.names == ["base", "sft", "dpo"]

    def says() -> mx.array:
        return found.take(name).model(mx.array([[5, 6, 7]]))[0, -1]

    seen: dict[str, mx.array] = {}
    for name in ("base", "sft", "base", "dpo", "base", "dpo", "sft", "dpo"):
        now = says()
        assert mx.array_equal(seen.setdefault(name, now), now).item(), name
    assert not mx.array_equal(seen["base"], seen["sft"]).item()
    assert not mx.array_equal(seen["dpo"], seen["sft"]).item()
