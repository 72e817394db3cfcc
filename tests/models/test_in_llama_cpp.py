"""The measurement in llama.cpp: its indices against a stand-in with known logits, and the package itself."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from tuned import make_tuned

from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.export import in_llama_cpp
from mlx_zh.models.export.fidelity import HeldOut, distance, held_out
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.load import load_model


def text_of(seed: int = 1) -> HeldOut:
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(3, 280, n).astype(np.int32), np.arange(n) > 2) for n in (9, 14, 21, 5, 17)]
    return held_out(examples, max_tokens=100, row_tokens=24)


def tuned_model(folder: Path):
    tuned = make_tuned(folder)
    loaded = load_model(str(tuned.base))
    load_adapter(loaded.model, tuned.adapter)
    loaded.model.eval()
    return tuned, loaded.model


class StandIn:
    """llama_cpp.Llama, computed by MLX's own model."""

    model: ClassVar = None
    closed: ClassVar[int] = 0

    def __init__(self, path: str, *, n_ctx: int, n_batch: int, logits_all: bool, verbose: bool) -> None:
        assert n_ctx == n_batch == 21 and logits_all and not verbose
        self.scores = np.zeros((0, 0), np.float32)

    def reset(self) -> None:
        self.scores = np.zeros((0, 0), np.float32)

    def eval(self, tokens: list[int]) -> None:
        assert self.scores.size == 0, "a text must not continue another one"
        self.scores = np.array(self.model(mx.array(tokens)[None])[0].astype(mx.float32))

    def close(self) -> None:
        StandIn.closed += 1


def test_every_scored_token_is_compared_with_its_own_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same model on both sides: no distance. Chunks of a few rows cross the borders of the packed rows."""
    _, model = tuned_model(tmp_path)
    monkeypatch.setattr(StandIn, "model", model)
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=StandIn))
    monkeypatch.setattr("mlx_zh.system.device.logit_bytes", lambda: 8 * 288 * 10)
    text = text_of()
    assert len(text.rows) > 2 and max(len(row.segments) for row in text.rows) > 1
    own = text.predictions(model)
    closed = StandIn.closed
    measured = in_llama_cpp.measure(tmp_path / "m.gguf", text, own)
    expected = distance(own, own, text.targets)
    assert measured.kl == pytest.approx(0, abs=1e-6) and measured.top1 == 1.0
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert StandIn.closed == closed + 1


@pytest.mark.skipif(not in_llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
def test_llama_cpp_rounds_activations_where_weights_are_q8_0(tmp_path: Path):
    """F16 agrees; Q8_0 is further away in llama.cpp than its weights are."""
    tuned, model = tuned_model(tmp_path)
    text = text_of()
    own = text.predictions(model)
    far = {}
    for kind in ("f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, plan_gguf(tuned.fusion(), kind, "Tiny"))
        weights = distance(own, text.predictions(load_model(str(path)).model), text.targets)
        far[kind] = weights.kl, in_llama_cpp.measure(path, text, own).kl
    assert far["f16"][1] < 1e-3
    assert far["q8_0"][1] > 1.1 * far["q8_0"][0] > 0
