"""What `fuse` will need, against what is written and against the measured figures of docs/export.md."""

from __future__ import annotations

import pytest

from mlx_zh.planning.exports import export_bytes, recovery_bytes, rounding_seconds
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.shapes import Packing, Target, model_shape
from mlx_zh.recipe import Export

LLAMA = model_shape(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)
SMOL = model_shape(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
)
BASE = Target(2, Packing(4, 32, (("model.embed_tokens", (8, 32)),)), True)


@pytest.mark.parametrize(
    ("settings", "written"),  # bytes of the weights' files of the quickstart, as they lie on the disk
    [
        ({"formats": ["mlx"], "bits": 4}, 98_351_792),
        ({"formats": ["gguf"], "gguf_type": "q4_1"}, 98_362_624),
        ({"formats": ["hf"]}, 269_060_544),
        ({"formats": ["mlx", "hf"], "bits": 4}, 98_351_792 + 269_060_544),
        ({"formats": ["peft", "mlx-adapter", "gguf-lora"]}, 0),
    ],
)
def test_the_space_is_that_of_the_files(settings: dict[str, object], written: int) -> None:
    export = Export.model_validate(settings)
    assert 0.98 * written <= export_bytes(export, SMOL, BASE) <= 1.02 * written


def test_a_recovery_takes_the_space_of_its_blocks_too() -> None:
    plain = Export(formats=("gguf",), gguf_type="q4_1")
    recovered = plain.model_copy(update={"recover": True})
    once, twice = (export_bytes(export, LLAMA, BASE) for export in (plain, recovered))
    assert twice == pytest.approx(2 * once, rel=0.02) and 4.9e9 < once < 5.4e9


def test_llama_cpp_quantizes_a_half_precision_file() -> None:
    half = export_bytes(Export(formats=("hf",)), LLAMA, BASE)
    assert 1.3 * half < export_bytes(Export(formats=("gguf",), gguf_type="q4_k_m"), LLAMA, BASE) < 1.5 * half


def test_mixed_bits_are_limited_by_their_size() -> None:
    assert export_bytes(Export(bits="mixed", size_gb=5.5), LLAMA, BASE) == 5.5e9


def test_the_memory_and_time_of_a_recovery() -> None:
    """2.7 GB for Llama 3.1 8B, and 14 * 10^14 operations: 12 minutes at 2 TFLOPS."""
    assert recovery_bytes(LLAMA) == pytest.approx(2.74e9, rel=0.01)
    operations = 2 * LLAMA.layers * LLAMA.block_values  # of a forward pass, for each token
    pace = Pace(training=1.0, forward=operations / 2e12, update=1.0, generation=1.0)
    assert 10 * 60 < rounding_seconds(Export(recover=True), pace) < 14 * 60
    assert rounding_seconds(Export(), pace) == 0
