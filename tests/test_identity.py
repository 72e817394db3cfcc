"""One identity decides whether a run goes on: whatever enters the prepared data or the model, changed, is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from project import Project, contents, interrupt_after

from mlx_zh.core import numbers
from mlx_zh.models.identity import sampled_fingerprint
from mlx_zh.stages.run_key import as_earlier, learning_key

Change = Callable[[Project], None]
HEAD = "id,question,A,B,C,D,answer\n"


def rewrite(path: str, old: str, new: str) -> None:
    """Change a file without a change of its size or its time of modification."""
    file = Path(path)
    assert len(old.encode()) == len(new.encode())
    stat = file.stat()
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def set_entry(**values: object) -> None:
    entry = {"hub": "file", "id": "rows.jsonl", "kind": "sft", "columns": {"prompt": "q", "response": "good"}}
    Path("registry.yaml").write_text(yaml.safe_dump({"mine": entry | values}), encoding="utf-8")


def set_recipe(section: str, **values: object) -> Change:
    def change(project: Project) -> None:
        project.recipe.setdefault(section, {}).update(values)
        project.write_recipe()

    return change


def edit_embedding(project: Project) -> None:
    """Most rows of the largest tensor, away from the beginning, the middle and the end of the file's tensors."""
    path = Path("model/model.safetensors")
    stat, data = path.stat(), bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    first, last = table["model.embed_tokens.weight"]["data_offsets"]
    start, middle = 8 + length + first, 8 + length + (first + last) // 2
    data[start + 256 : middle - 256] = bytes(b ^ 1 for b in data[start + 256 : middle - 256])
    sampled = sampled_fingerprint(Path("model"))
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sampled_fingerprint(Path("model")) == sampled


CHANGES: dict[str, tuple[Change, str]] = {
    "a column of the registry file": (
        lambda _: set_entry(columns={"prompt": "q", "response": "poor"}),
        'columns of mine {"prompt": "q", "response": "good"} -> {"prompt": "q", "response": "poor"}',
    ),
    "near duplicates of the registry file": (
        lambda _: set_entry(near_duplicates=False), "near_duplicates of mine true -> false"
    ),
    "the file of the registry file": (lambda _: set_entry(id="other.jsonl"), "the content of other.jsonl"),
    "rows behind a name": (lambda _: rewrite("rows.jsonl", "好", "坏"), "the content of rows.jsonl"),
    "rows of a file": (lambda _: rewrite("train.jsonl", "好", "坏"), "the content of train.jsonl"),
    "rows of validation": (lambda _: rewrite("validation.jsonl", "好", "坏"), "the content of validation.jsonl"),
    "an exam copy": (
        lambda _: rewrite("ceval/val/law_val.csv", "宪法", "民法"), "the questions of ceval that are kept out"
    ),
    "the exams": (
        set_recipe("evaluate", benchmarks=[]), "questions of ceval are not kept out of the data any more"
    ),
    "the system message": (set_recipe("data", system="请回答"), 'data.system null -> "请回答"'),
    "normalization": (set_recipe("data", normalize=False), "data.normalize true -> false"),
    "quality rules": (set_recipe("data", quality={"refusal": "drop"}), 'data.quality.refusal null -> "drop"'),
    "decontamination": (set_recipe("data", decontaminate={"ngram": 9}), "data.decontaminate.ngram 10 -> 9"),
    "the seed": (lambda p: (p.recipe.update(seed=7), p.write_recipe())[1], "seed 42 -> 7"),
    "the template": (
        lambda _: Path("model/chat_template.jinja").write_text(
            "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
        "the tokenizer or its chat template",
    ),
    "weights between the samples": (edit_embedding, "the base model's files"),
}  # fmt: skip


@pytest.fixture
def everything(project: Project) -> Project:
    """A recipe with every kind of input, in a folder that holds them all."""
    shutil.copytree(project.model, "model")
    rows = [{"q": f"问题{n}是什么？", "good": f"好的{n}", "poor": f"不{n}"} for n in range(8)]
    for name in ("rows.jsonl", "other.jsonl"):
        Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        rows = rows[1:]
    set_entry()
    for split in ("dev", "val", "test"):
        path = Path(f"ceval/{split}/law_{split}.csv")
        path.parent.mkdir(parents=True)
        path.write_text(f"{HEAD}0,宪法规定公民享有哪些基本权利和义务？,甲,乙,丙,丁,A\n", encoding="utf-8")
    project.recipe["model"]["path"] = "model"
    project.recipe["data"]["registry_file"] = "registry.yaml"
    project.recipe["data"]["sft"]["train"] = ["train.jsonl", {"name": "mine"}]
    project.recipe["evaluate"] = {"benchmarks": ["ceval"], "folder": {"ceval": "ceval"}, "shots": 0}
    project.recipe["sft"]["max_steps"] = 2
    project.write_recipe()
    return project


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_change_of_any_input_is_refused_by_its_name(
    everything: Project, what: str, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, name = CHANGES[what]
    with monkeypatch.context() as patch:
        if stopped:
            interrupt_after(patch, step=1)
        assert everything.sft().status == (130 if stopped else 0)
    before = contents(Path("runs"))
    change(everything)
    refused = everything.sft()
    assert refused.status == 2 and name in refused.err, refused
    assert refused.err.startswith("error: runs/tiny/sft holds a run with other settings: ")
    assert contents(Path("runs")) == before  # nothing was touched


def test_nothing_changed_is_nothing_to_refuse(everything: Project) -> None:
    everything.train()
    Path("rows.jsonl").touch()
    shutil.copytree("model", "moved")
    result = everything.sft("model.path=moved")
    assert result.status == 0 and "is finished: nothing is left to train" in result.out


def test_what_registries_only_tell_and_other_entries_are_nothing_to_refuse(
    everything: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = yaml.safe_load(Path("registry.yaml").read_text(encoding="utf-8"))["mine"]
    del everything.recipe["data"]["registry_file"]
    registry = everything.recipe["data"]["registry"] = {"mine": entry}
    everything.write_recipe()
    with monkeypatch.context() as patch:
        interrupt_after(patch, step=1)
        assert everything.sft().status == 130
    registry["mine"] = entry | {"note": "checked in May", "licence": "MIT"}
    registry["other"] = {"hub": "file", "id": "other.jsonl", "kind": "sft"}
    everything.write_recipe()
    result = everything.sft()
    assert result.status == 0 and "Going on after step 1 of 2." in result.out
    registry["mine"] = entry | {"columns": {"prompt": "q", "response": "poor"}}
    everything.write_recipe()
    refused = everything.sft()
    assert refused.status == 2 and "columns of mine" in refused.err


def by_an_earlier_version(folder: Path, model: Path) -> None:
    """Make a run folder what the version before this one left."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    del settings["key"]
    earlier = as_earlier(settings, sampled_fingerprint(model))
    (folder / "settings.json").write_text(json.dumps(earlier), encoding="utf-8")
    key = learning_key(earlier)
    for path in (folder / "summary.json", *folder.glob("checkpoints/step-*/state.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(state | {"key": key}), encoding="utf-8")


def test_a_run_of_an_earlier_version_is_recognized(everything: Project) -> None:
    """Its model was sampled and its prepared data not recorded, so the rest is said not to be checked."""
    folder = everything.train()
    by_an_earlier_version(folder, Path("model"))
    result = everything.sft()
    assert result.status == 0 and "is finished: nothing is left to train" in result.out
    assert "was begun by an earlier version, which did not record everything." in result.out
    rewrite("train.jsonl", "好", "坏")
    refused = everything.sft()
    assert refused.status == 2 and "the content of train.jsonl" in refused.err
    assert "base model" not in refused.err


def test_exams_that_could_not_be_fetched_are_reported_with_a_corpus_of_the_cache(everything: Project) -> None:
    """The same rows were prepared before for a recipe without exams."""
    everything.train("evaluate.benchmarks=[]", name="without")
    everything.sft("evaluate.folder={}", "name=asked")
    report = json.loads(Path("runs/asked/data/report.json").read_text(encoding="utf-8"))["sft"]
    assert set(report["exam_questions"]["missing"]) == {"ceval"}


def test_an_unfinished_run_is_not_finished_with_other_numbers(everything: Project, monkeypatch) -> None:
    """Begun with version 1, whose records name no version; a finished run of version 1 stays finished."""
    with monkeypatch.context() as earlier:
        earlier.setattr(numbers, "version", lambda: 1)
        everything.train(name="finished")
        interrupt_after(earlier, 1)
        assert everything.sft().status == 130
    assert "numbers" not in json.loads(Path("runs/tiny/sft/settings.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(numbers, "version", lambda: 2)
    refused = everything.sft()
    assert refused.status == 2
    assert "holds a run with other settings: how this version computes sums." in refused.err
    assert "Finish it with the version that began it, give this recipe another name" in refused.err
    finished = everything.sft("name=finished")
    assert finished.status == 0 and "is finished: nothing is left to train" in finished.out
    assert everything.sft("--fresh").status == 0
    assert json.loads(Path("runs/tiny/sft/settings.json").read_text(encoding="utf-8"))["numbers"] == 2


def test_numbers_have_a_version_for_the_back_ends_that_they_change_on(monkeypatch) -> None:
    monkeypatch.setattr(numbers, "CHANGES", {2: frozenset({"cpu"}), 3: frozenset({"metal"})})
    for back_end, version in (("cpu", 2), ("metal", 3), ("cuda", 1)):
        monkeypatch.setattr(numbers.device, "back_end", lambda name=back_end: name)
        assert numbers.version() == version
        assert numbers.recorded() == ({"numbers": version} if version > 1 else {})
