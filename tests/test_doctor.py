"""The doctor: what it finds, what it says to do, and that nothing private is in it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from project import Project

from mlx_zh import doctor
from mlx_zh.core import product_speed
from mlx_zh.planning.machine import measure_machine
from mlx_zh.stages import checkup, memory_check
from mlx_zh.system import device, hub_choice

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a hub, save one that runs its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def by_name(recipe: Any = None) -> dict[str, checkup.Check]:
    return {check.name: check for check in checkup.checks(recipe)}


def test_a_line_for_each_thing(run_stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(doctor.main, "--quick") in (0, 1)  # 1 on a full disk
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.lstrip().startswith("->")]
    assert all(re.match(r"(ok|warn|fail) ", line) for line in lines)
    names = [line.split()[1] for line in lines]
    wanted = {"program", "mlx", "mlx-lm", "back", "chip", "memory", "wired", "disk", "hub"}
    assert wanted <= set(names) and "speed" not in names
    assert str(Path.home()) not in "\n".join(lines)


def test_a_recipe_is_looked_at_too(project: Project, run_stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(doctor.main, "recipe.yaml", "--quick") in (0, 1)
    assert re.search(r"^ok    sft +needs up to 0\.0 GB", capsys.readouterr().out, re.MULTILINE)


def test_what_cannot_fit_comes_with_the_way_out(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_zh.recipe import load_recipe

    monkeypatch.setattr(memory_check, "this_machine", lambda: memory_check.Machine("free memory", 1e5, cpu=True))
    found = by_name(load_recipe("recipe.yaml"))
    assert (found["sft"].level, found["memory"].level) == ("warn", "fail")
    assert "No memory settings help" in found["sft"].remedy
    assert "close other programs" in found["memory"].remedy


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pinned[name] for name in checkup.TESTED} == checkup.TESTED


@pytest.mark.parametrize(
    ("found", "level"), [("0.32.4", "ok"), ("0.32.10", "warn"), ("0.32.3", "fail"), ("1.0.0.dev1+abc", "warn")]
)
def test_versions(monkeypatch: pytest.MonkeyPatch, found: str, level: str) -> None:
    monkeypatch.setattr(checkup, "version", lambda name: found)
    monkeypatch.setattr(checkup, "TESTED", {"mlx": "0.32.4"})
    (check,) = checkup.versions()
    assert check.level == level
    assert bool(check.remedy) == (level != "ok")


def test_a_full_disk_fails(
    monkeypatch: pytest.MonkeyPatch, run_stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**12, 10**12, 10**9))
    assert run_stage(doctor.main, "--quick") == 1
    shown = capsys.readouterr().out
    assert "fail  disk       1 GB free; a usual run takes up to 10.0 GB" in shown
    assert "-> make room" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is for Linux")
def test_more_threads_than_idle_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "blas_warning", lambda: None)
    monkeypatch.setattr(device, "is_cpu", lambda: True)
    monkeypatch.setattr(checkup.cpu_threads, "usable_cores", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (5.2, 5.0, 5.0))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    assert checkup.blas().level == "warn"
    assert "OPENBLAS_NUM_THREADS=3" in checkup.blas().remedy
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert checkup.blas().level == "ok"
    monkeypatch.setattr(checkup, "blas_warning", lambda: "MLX is using the reference BLAS: do this")
    assert checkup.blas().level == "warn"


@pytest.fixture
def mirror() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_and_one_that_does_not(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkup.hub(None).text == "no hub is asked: HF_HUB_OFFLINE is set"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    place = mirror.removeprefix("http://")
    hub_choice.answers.cache_clear()
    assert checkup.hub(None) == checkup.Check("ok", "hub", f"{place} (HF_ENDPOINT) answers")
    hub_choice.answers.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:secret@127.0.0.1:9")  # nothing listens there
    found = checkup.hub(None)
    assert found.level == "warn" and "no hub answers (127.0.0.1:9: ConnectionRefusedError; " in found.text
    assert "mirror" in found.remedy and "secret" not in found.text + found.remedy
    hub_choice.answers.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    assert checkup.hub(None).level == "warn"
    hub_choice.answers.cache_clear()


def test_secrets_and_the_home_folder_stay_out(
    project: Project, run_stage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuv")
    gone = Path.cwd() / "gone"
    assert run_stage(doctor.main, "recipe.yaml", "--quick", f"model.path={gone}") in (0, 1)
    shown = capsys.readouterr().out
    assert "warn  recipe" in shown and "~/gone" in shown
    assert str(Path.cwd()) not in shown and "hf_" not in shown


def test_a_measurement_has_the_right_size() -> None:
    found = measure_machine(seconds=0.2)
    assert 0.1 < found.float32 < 1e6
    assert 0.01 < found.bfloat16 < 1e6 and 0.01 < found.four_bit < 1e6
    assert 1e8 < found.bandwidth < 1e13


# Memory that stays resident on macOS


@pytest.mark.parametrize(
    ("memory", "recommended", "kept"),
    [(16, 10.67, 10.67), (8, 5.33, 5.33), (16, 15.0, 12.0), (8, 7.5, 6.0), (64, 48.0, 48.0), (64, 63.0, 60.0)],
)
def test_the_desktop_keeps_its_share(memory: float, recommended: float, kept: float) -> None:
    info = {"memory_size": int(memory * GIB), "max_recommended_working_set_size": int(recommended * GIB)}
    assert device.wired_limit(info) == pytest.approx(kept * GIB)


def test_the_limits_are_set_where_there_is_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(("wired", limit)))
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: calls.append(("memory", limit)))
    assert device.wire_memory() is None and calls == []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    info = {"memory_size": 16 * GIB, "max_recommended_working_set_size": 11 * GIB, "device_name": "Apple M1"}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert device.wire_memory() == 11 * GIB
    assert calls == [("memory", 11 * GIB), ("wired", 11 * GIB)]
    check = checkup.wired()
    assert check.level == "ok" and "keeps up to 11.8 GB resident and leaves 5.4 GB" in check.text


def test_a_config_is_enough_for_the_disk(tmp_path: Path) -> None:
    from mlx_zh.recipe import load_recipe

    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "quantization": {"group_size": 64, "bits": 4},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(ROOT / "recipes/llama31-8b-zh-16gb.yaml", [f"model.path={tmp_path / 'model'}"])
    # 4.5 GB, and 8.5 GB if the export ends with 8 bits; for SFT and DPO 0.17 GB of adapter, thrice in each of 3
    # checkpoints and twice more; 1 GB beside.
    assert re.search(r"takes up to 17\.7 GB", checkup.disk(recipe).text)


# M1


def on_an_m1(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    monkeypatch.setattr(device, "back_end", lambda: "metal")
    monkeypatch.setattr(device, "chip", lambda: chip)


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M1 Pro", "Apple M1 Max", "Apple M1 Ultra"])
def test_an_m1_is_advised_to_use_float16(project: Project, monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    """By doctor and plan, and not if the model computes in float16 or float32 anyway."""
    from mlx_zh import plan

    on_an_m1(monkeypatch, chip)
    told = f"{chip} has no bfloat16 arithmetic. With model.dtype=float16, products with 4-bit weights took 17.2 ms"
    assert told in project.run(doctor.main, "--quick", "model.dtype=bfloat16").out
    assert told in project.run(plan.main, "--quick", "model.dtype=bfloat16").out
    for dtype in ("float16", "float32"):
        assert "bfloat16 arithmetic" not in project.run(doctor.main, "--quick", f"model.dtype={dtype}").out
        assert "bfloat16 arithmetic" not in project.run(plan.main, "--quick", f"model.dtype={dtype}").out
    assert "bfloat16 arithmetic" not in project.run(plan.main, "--memory", "16GB", "model.dtype=bfloat16").out


@pytest.mark.parametrize(
    "chip", ["Apple M2", "Apple M3 Max", "Apple M4 Pro", "Apple M10", "", "Apple Paravirtual device"]
)
def test_other_chips_are_not(project: Project, monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    on_an_m1(monkeypatch, chip)
    assert "bfloat16 arithmetic" not in project.run(doctor.main, "--quick", "model.dtype=bfloat16").out


def test_both_ways_of_a_quantized_product_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []

    def seconds(layer: Any, rows: int, dtype: mx.Dtype) -> tuple[float, float]:
        layers.append((layer.weight.shape, rows, dtype))
        return 0.0123, 0.0045

    monkeypatch.setattr(product_speed, "layer_of", lambda outputs, inputs, dtype: nn.QuantizedLinear(64, outputs))
    monkeypatch.setattr(product_speed, "seconds_of", seconds)
    check = checkup.products()
    assert check.text == "4-bit, 1024 rows, 4096 x 4096: 12 ms as they are, 4.5 ms from unpacked weights"
    assert layers == [((4096, 8), 1024, mx.bfloat16)]

    def fails(*_: Any) -> Any:
        raise RuntimeError("[metal::malloc] no memory\nmore")

    monkeypatch.setattr(product_speed, "seconds_of", fails)
    assert checkup.products().text == "cannot be timed: [metal::malloc] no memory"
