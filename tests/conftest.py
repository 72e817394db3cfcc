"""Shared fixtures: tiny random models and the places of the real samples."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network says so with a marker
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tiny matrices: on a busy machine threads mostly wait

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real samples of public data sets; they lie beside the checkout where the project is developed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real samples are not here (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The small real model, obtained as a user obtains it. Use with the marker `network`."""
    from mlx_zh.errors import DownloadError
    from mlx_zh.models.load import BUILT_IN, resolve_model

    try:
        return resolve_model(BUILT_IN)
    except DownloadError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def run_stage():
    """Call a stage's `main` and return its exit status, whether it returns or exits."""

    def run(main, *argv: object) -> int:
        try:
            status = main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        return 0 if status is None else int(status)

    return run


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes mlx-lm's own model of a family, small and random: norms and biases too, or their faults were hidden."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    def make(
        family: str = "llama",
        *,
        tied: bool = False,
        quantized: int | None = None,
        rope_scaling: dict[str, Any] | None = None,
        layers: int = 3,
        vocabulary: int = 300,
        dtype: str = "float32",
        seed: int = 0,
        **changes: Any,
    ) -> Any:
        config = {
            "model_type": family,
            "hidden_size": 64,
            "num_hidden_layers": layers,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": vocabulary,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": tied,
            "head_dim": 32 if family == "qwen3" else 16,  # heads need not add up to hidden_size
        }
        model_class, args_class = _get_classes(config | changes)
        model = model_class(args_class.from_dict(config | changes))
        rng = np.random.default_rng(seed)
        weights = []
        for name, array in tree_flatten(model.parameters()):
            values = rng.normal(size=array.shape)
            values = 1 + 0.2 * values if "norm" in name else values * (1.5 / np.sqrt(64) if array.ndim == 2 else 0.2)
            weights.append((name, mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))))
        model.load_weights(weights)
        if quantized is not None:
            nn.quantize(model, group_size=32, bits=quantized)
        model.eval()
        mx.eval(model.parameters())
        return model

    return make
