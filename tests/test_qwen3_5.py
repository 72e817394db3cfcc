"""Qwen3.5 through the stages: SFT, DPO, KTO, exams, chat, fuse; also on a simulated Metal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from project import Project, Result, losses
from test_metal import write_exam, write_pairs
from watchman import Watchman

from mlx_zh import chat, dpo, eval, fuse, plan
from mlx_zh.core import proof


def well(result: Result) -> str:
    assert (result.status, result.err) == (0, ""), result
    return result.out


@pytest.fixture
def recurrent(project: Project, model_folder: Any) -> Project:
    """A project whose model is a tiny Qwen3.5."""
    project.recipe["model"]["path"] = str(model_folder("qwen3_5"))
    write_pairs("pairs.jsonl", [("好的", "不行"), ("好", "好好的"), ("是的是的", "是不是")])
    write_pairs("pairs-validation.jsonl", [("ab", "no"), ("c", "nono")])
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "validation": ["pairs-validation.jsonl"]}
    project.recipe["dpo"] = {"batch_size": 3, "max_steps": 2, "learning_rate": 1e-2, "start": "base"}
    write_exam(Path("exam"))
    project.recipe["evaluate"] = {"benchmarks": ["exam"], "shots": 2, "bootstrap": 50, "max_new_tokens": 3}
    project.write_recipe()
    return project


def test_sft_then_dpo(recurrent: Project) -> None:
    folder = recurrent.train("sft.max_steps=20")
    found = losses(folder)
    assert len(found) == 20 and np.mean(found[-4:]) < 0.8 * np.mean(found[:4])
    assert json.loads((folder / "adapters" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    stored = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    assert "language_model.model.layers.0.linear_attn.in_proj_qkv.lora_a" in stored
    well(recurrent.run(dpo.main, "name=tiny", "dpo.start=sft"))
    # The policy is the reference at the first step, so every margin is 0.
    assert losses(Path("runs/tiny/dpo"))[0] == pytest.approx(math.log(2), rel=1e-6)


def test_kto(recurrent: Project) -> None:
    well(recurrent.run(dpo.main, "dpo.loss=kto", "name=kto"))
    assert all(map(math.isfinite, losses(Path("runs/kto/dpo"))))


def answers_of(folder: str) -> list[Any]:
    file = next(Path("runs", folder).rglob("questions*.jsonl"), None) or next(Path("runs", folder).rglob("*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_exams_with_and_without_a_shared_prefix(recurrent: Project) -> None:
    """Questions go on from the state at the end of what they share, or each is computed whole."""
    well(recurrent.run(eval.main, "--stage", "base", "name=long"))
    well(recurrent.run(eval.main, "--stage", "base", "name=short", "memory.micro_tokens=16"))
    long, short = answers_of("long"), answers_of("short")
    assert len(long) == len(short) > 0
    for one, other in zip(long, short, strict=True):
        assert one["choice"] == other["choice"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)  # of numbers of order 10 in float32


def test_fuse_chat_and_plan(recurrent: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent.train()
    well(recurrent.run(fuse.main, "export.formats=[mlx, hf, peft, mlx-adapter]"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好".encode())))
    result = recurrent.run(chat.main, "--max-tokens", "3", "--seed", "3")
    assert result.status == 0 and len(result.err.splitlines()) == 1
    well(recurrent.run(plan.main))
    refused = recurrent.sft("export.formats=[gguf]", "name=other")
    assert refused.status != 0 and "gguf cannot be written for models of type 'qwen3_5'" in refused.out + refused.err


def test_all_of_it_on_metal(
    recurrent: Project, metal: Watchman, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call that Metal refuses; the comparison on loading is left out, as it would be among the recorded calls."""
    monkeypatch.setattr(proof, "differences", lambda *_, **__: (0.0, 0.0))
    path = f"model.path={model_folder('qwen3_5', head_dim=64, quantized=4)}"
    for settings in ([], ["memory.checkpoint_layers=true", "lora.dropout=0.1"], ["model.dtype=bfloat16"]):
        name = f"name=metal{len(settings)}{'b' if 'bfloat16' in str(settings) else ''}"
        well(recurrent.sft(path, "sft.max_steps=2", name, *settings))
        well(recurrent.run(dpo.main, path, "memory.micro_tokens=60", name, *settings))
    well(recurrent.run(eval.main, path, "--stage", "base"))
    assert metal.of("attention", gradient=True) and metal.of("attention", gradient=False)
