"""Greedy answers of llama.cpp to 20 prompts, for each type of GGUF, against our own reader and base + adapter."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tuned import make_tuned

from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.export.gguf_file import FILE_TYPES, plan_gguf, write_gguf
from mlx_zh.models.export.llama_quantizer import quantize
from mlx_zh.models.export.llama_types import LLAMA_TYPES
from mlx_zh.models.load import load_model

pytestmark = pytest.mark.slow

PROMPTS = [np.random.default_rng(seed).integers(3, 280, 6 + seed % 5).tolist() for seed in range(20)]
NEW = 8  # tokens of an answer
# How far the logits may be from those of the file's weights, relative: activations are rounded to 8 bits in each
# matrix, with a scale for 32 of them, and for 256 in the K and IQ4_XS types: the largest of 256 is 1.35 times that of
# 32, if they are normally distributed.
ROUNDED, ROUNDED_K = 0.15, 0.15 * 1.35
HALF = 0.02  # the same in F16


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Rows of 256, which all types take; two layers, Llama's order of rows in q and k."""
    return make_tuned(tmp_path_factory.mktemp("tuned"), hidden_size=256, intermediate_size=512, size=0.02)


def answer(model, prompt):
    """The most likely tokens one after another, and the logits before each of them."""
    tokens, rows = list(prompt), []
    for _ in range(NEW):
        logits = np.array(model(mx.array([tokens]))[0, -1].astype(mx.float32))
        rows.append(logits)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], np.stack(rows)


def agreeing(rows, others, limit):
    """How many rows have the same most likely token; where they differ, as the logits' distance explains."""
    assert np.linalg.norm(others - rows) < limit * np.linalg.norm(rows)
    same = 0
    for row, other in zip(rows, others, strict=True):
        chosen = int(other.argmax())
        assert row.max() - row[chosen] <= 2 * np.abs(other - row).max()
        same += chosen == int(row.argmax())
    return same


@pytest.mark.parametrize("kind", [*FILE_TYPES, *LLAMA_TYPES])
def test_answers_are_those_of_the_weights(tmp_path, tuned, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "m.gguf"
    if kind in LLAMA_TYPES:
        quantize(path, plan_gguf(tuned.fusion(), "f16", "Tiny"), kind, None, step=lambda: None)
    else:
        write_gguf(path, plan_gguf(tuned.fusion(), kind, "Tiny"))
    limit = HALF if kind == "f16" else ROUNDED_K if kind in LLAMA_TYPES else ROUNDED
    ours = load_model(str(path), dtype="float32").model
    exact = load_model(str(tuned.base), dtype="float32")
    load_adapter(exact.model, tuned.adapter)
    exact.model.eval()
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    same = tuned_same = 0
    for prompt in PROMPTS:
        tokens, rows = answer(ours, prompt)
        theirs.reset()
        theirs.eval(prompt + tokens[:-1])
        scored = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        same += agreeing(rows, np.array(theirs.scores[scored]), limit)
        if kind == "f16":
            logits = np.array(exact.model(mx.array([prompt + tokens[:-1]]))[0])
            tuned_same += agreeing(rows, logits[scored], limit)
    theirs.close()
    count = len(PROMPTS) * NEW
    assert same >= (0.98 if kind == "f16" else 0.85) * count, same
    assert kind != "f16" or tuned_same >= 0.98 * count, tuned_same
