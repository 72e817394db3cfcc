"""What training asks of a GPU before the first step: once, remembered, with a way out where fused attention fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from project import Project, losses

from mlx_zh.language.notice import notice_of
from mlx_zh.stages import device_check
from mlx_zh.system import accelerator, device, storage
from mlx_zh.training import self_check
from mlx_zh.training.check_cases import Case
from mlx_zh.training.check_model import Pair

FUSED = mx.fast.scaled_dot_product_attention
GIB = 2**30
# Query counts above 8, of which this program knows. The model's own forward pass has 12 when it is opened, and 32 or
# 128 as the reference: without a gradient Metal refuses none.
ABOVE_8 = {9, *range(13, 101)} - {32}


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """On a Mac too: what a device does wrong is simulated here."""
    with mx.stream(mx.cpu):
        yield


# What a simulated Metal gives for a case is always the same, and takes a second to compute.
COMPUTED: dict[Any, self_check.Outcome] = {}


class Metal:
    """A Metal that refuses fused attention for `refused` query counts, and computes `wrong` ones wrongly."""

    def __init__(self) -> None:
        self.refused: set[int] = set()
        self.wrong: set[int] = set()
        self.checked: list[Case] = []
        self.remembers = True

    def attention(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
    ) -> mx.array:
        if q.shape[2] in self.refused and not isinstance(mask, mx.array):
            raise RuntimeError("the VJP path requires the full-attention kernel")
        out = FUSED(q, k, v, scale=scale, mask=mask)
        return 1.5 * out if q.shape[2] in self.wrong else out


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    simulated = Metal()
    info = {"memory_size": 16 * GIB, "max_recommended_working_set_size": 11 * GIB, "device_name": "Apple M2"}
    monkeypatch.setattr(mx, "device_info", lambda: info | {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limit)
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: limit)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", simulated.attention)

    def check(case: Case) -> self_check.Outcome:
        simulated.checked.append(case)
        if not simulated.remembers:
            return self_check.check(case)
        key = (case, frozenset(simulated.refused), frozenset(simulated.wrong), device.max_masked_queries())
        if key not in COMPUTED:
            COMPUTED[key] = self_check.check(case)
        return COMPUTED[key]

    monkeypatch.setattr(device_check, "check", check)
    yield simulated


def remembered() -> list[Path]:
    return sorted((storage.cache_folder() / "self-check").glob("*"))


def notices(folder: Path) -> list[Any]:
    path = folder / "warnings.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def test_the_cpu_is_not_checked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "check", lambda case: pytest.fail("checked"))
    project.train()
    assert remembered() == []


def test_a_gpu_is_checked_once_for_the_model_that_is_trained(project: Project, metal: Metal) -> None:
    first = project.sft()
    assert (first.status, first.err) == (0, "")
    assert "Checking that this device computes a training step as the CPU does; this is done once." in first.out
    assert metal.checked == [Case("float32", 16)]
    assert [json.loads(file.read_text())["attention"] for file in remembered()] == ["fused"]
    again = project.sft("--fresh")
    assert again.status == 0 and "Checking" not in again.out and len(metal.checked) == 1
    assert notices(Path("runs/tiny/sft")) == []
    assert project.sft("--fresh", "lora.type=dora").status == 0
    assert metal.checked[1:] == [Case("float32", 16, "dora")] and len(remembered()) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"about": {}}', b"\xff\xfe"])
def test_a_damaged_file_is_checked_again(project: Project, metal: Metal, damage: bytes) -> None:
    project.train()
    (file,) = remembered()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert project.sft("--fresh").status == 0
    assert len(metal.checked) == 2 and remembered() == [file] and file.read_bytes() == whole


def test_a_warning_that_cannot_be_read_is_checked_again(project: Project, metal: Metal) -> None:
    project.train()
    (file,) = remembered()
    for warning in (5, "text", {"code": "no-such-code", "values": {}}):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"warning": warning}))
        result = project.sft("--fresh")
        assert (result.status, result.err) == (0, "") and "warning: " not in result.out
    assert len(metal.checked) == 4


def test_what_another_program_caused_is_not_remembered(
    project: Project, metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault by chance is tried again. One that stays sends this run the unfused way, and the next checks again."""
    monkeypatch.setattr(accelerator, "PAUSE", 0.0)
    metal.remembers = False
    on_device, calls = Pair.on_device, []

    def victim(pair: Pair, segments: Any) -> Any:
        calls.append(1)
        if len(calls) <= failing:
            raise RuntimeError("kIOGPUCommandBufferCallbackErrorInnocentVictim")
        return on_device(pair, segments)

    monkeypatch.setattr(Pair, "on_device", victim)
    failing = 4
    result = project.sft()
    assert result.status == 0 and "computed in the unfused way" in result.out and remembered() == []
    assert len(calls) == 4 + 1  # four tries of the whole row and none of its segments, then the unfused way
    calls.clear()
    failing = 1
    result = project.sft("--fresh")
    assert (result.status, len(calls)) == (0, 2) and "warning: " not in result.out
    assert [json.loads(file.read_text())["attention"] for file in remembered()] == ["fused"]


def test_another_version_or_system_is_checked_again(
    project: Project, metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.train()
    identity = device.identity()
    assert identity["device"] == "Apple M2 applegpu_g14g" and identity["mlx"] == "0.32.4"
    for name in ("mlx", "device", "system"):
        monkeypatch.setattr(device, "identity", lambda name=name: identity | {name: "other"})
        assert project.sft("--fresh").status == 0
    for variable in ("MLX_SDPA_VJP_FALLBACK", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(variable, "1")
        assert project.sft("--fresh").status == 0
    assert len(metal.checked) == 6 and len(remembered()) == 6


def test_what_fused_attention_refuses_goes_the_unfused_way(project: Project, metal: Metal) -> None:
    expected = losses(project.train(name="before"))
    for file in remembered():
        file.unlink()
    metal.refused = ABOVE_8
    result = project.sft("name=after")
    assert (result.status, result.err) == (0, "")
    assert losses(Path("runs/after/sft")) == pytest.approx(expected, rel=1e-5)
    assert result.out.count("warning: ") == 1 and "computed in the unfused way" in result.out
    (line,) = notices(Path("runs/after/sft"))
    chinese = notice_of(line)
    assert line["code"] == "attention-unfused" and chinese is not None
    assert chinese.text("zh").startswith(
        "本机的融合注意力未通过自检（9-100 个词元的根段、9-100 个词元的分支段：MLX 报错"
    )
    checks = len(metal.checked)
    again = project.sft("name=after", "--fresh")
    assert again.status == 0 and again.out.count("warning: ") == 1 and len(metal.checked) == checks == 3
    assert device.max_masked_queries() == 8  # the switch is back


def test_a_device_that_computes_wrongly_is_refused(project: Project, metal: Metal) -> None:
    metal.wrong = {16, 100}
    result = project.sft()
    assert result.status == 2 and remembered() == []
    assert "roots of 16-100 tokens, branches of 16-100 tokens" in result.err
    assert "mlx-zh doctor --report" in result.err and "To start anyway, add --force." in result.err
    assert not list(Path("runs/tiny/sft").glob("checkpoints/*"))
    forced = project.sft("--force")
    assert forced.status == 0 and "warning: this device does not compute a training step" in forced.out
    assert [line["code"] for line in notices(Path("runs/tiny/sft"))] == ["self-check-failed"]
    assert remembered() == []


def test_force_takes_the_way_that_runs(project: Project, metal: Metal) -> None:
    metal.refused, metal.wrong = ABOVE_8, {4}
    assert project.sft("--force").status == 0


def test_a_cache_that_cannot_be_written_stops_nothing(project: Project, metal: Metal) -> None:
    storage.cache_folder().joinpath("self-check").write_text("a file, not a folder")
    result = project.sft()
    assert result.status == 0 and "The result of the check cannot be kept:" in result.out


def test_a_case_is_like_the_run(tiny_model: Callable[..., Any]) -> None:
    from types import SimpleNamespace

    from mlx_zh.models.adapters.spec import AdapterSpec

    model = tiny_model("llama", dtype="bfloat16", quantized=4)
    config = {"hidden_size": 64, "num_attention_heads": 4, "quantization": {"group_size": 32, "bits": 4}}
    recipe: Any = SimpleNamespace(memory=SimpleNamespace(checkpoint_layers=True))
    loaded: Any = SimpleNamespace(model=model, config=config)
    case = device_check.case_of(recipe, loaded, AdapterSpec("dora", 3))
    assert case == Case("bfloat16", 16, "dora", 4, 32, "affine", checkpoint=True)
