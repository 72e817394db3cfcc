"""The planner's peak memory against the peak that MLX reports, over small random models.

    python benchmarks/plan_accuracy.py [--only WORD] [--json FILE]

Each case is one optimizer step of SFT or DPO as training takes it, measured in its second step, when the optimizer's
state is there. Prints both peaks with their deviation, for the whole and for what comes on top of the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.corpus.rendered import Rendered, RenderedPair
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.memory import Estimate, step_memory
from mlx_zh.planning.shapes import Target, conversations, model_shape, pairs
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.objective import Settings
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import train_step

BAR = 0.15
BOTH = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Case:
    """One configuration. `length` is of a conversation, or of each of prompt, chosen and rejected."""

    name: str
    stage: str = "sft"
    examples: int = 8
    length: int = 128
    micro_tokens: int = 1024
    checkpoint: bool = False
    levels: Levels | None = None  # what is computed again, where it is neither all nor nothing
    logit_rows: int | None = None
    kind: str = "lora"
    rank: int = 8
    trained_layers: int | None = None
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    hidden: int = 256
    layers: int = 6
    intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 1000
    tied: bool = False
    saved: tuple[str, ...] = ()
    window: int | None = None  # of all layers but each third

    @property
    def config(self) -> dict[str, Any]:
        """As a config.json says it."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "sliding_window": self.window,
            "layer_types": [self._kind(index) for index in range(self.layers)],
        }

    def _kind(self, index: int) -> str:
        return "sliding_attention" if self.window and (index + 1) % 3 else "full_attention"

    @property
    def adapter(self) -> AdapterSpec:
        """What is trained."""
        layers = self.trained_layers or self.layers
        return AdapterSpec(self.kind, layers, self.rank, 2.0, self.dropout, self.targets, self.saved)


_LONG: Any = {"micro_tokens": 16_384, "examples": 1, "hidden": 128, "intermediate": 384, "heads": 2, "kv_heads": 1}
CASES = (
    Case("length 32", length=32, examples=32),
    Case("length 128"),
    Case("length 512", length=512, examples=2),
    Case("length 1024", length=1024, examples=1),
    Case("length 2048, 6 layers with a window", length=2048, micro_tokens=2048, examples=1, window=256),
    Case("length 4096, 3 layers with a window", **_LONG, length=4096, layers=3, window=512),
    Case("length 8192, 2 layers", **_LONG, length=8192, layers=2),
    Case("length 8192, 3 layers, checkpointed", **_LONG, length=8192, layers=3, checkpoint=True, window=1024),
    Case("length 16384, 1 head", **_LONG | {"heads": 1, "kv_heads": 1}, length=16_384, layers=1),
    Case("micro 256 of 1024", micro_tokens=256),
    Case("micro 4096", micro_tokens=4096, examples=32, layers=4),
    Case("2 layers", layers=2),
    Case("16 layers", layers=16),
    Case("rank 1", rank=1),
    Case("rank 64", rank=64),
    Case("rank 128, short row", rank=128, micro_tokens=64, length=64, examples=4),
    Case("2 of 8 layers trained", layers=8, trained_layers=2),
    Case("q and v only", targets=("q_proj", "v_proj")),
    Case("dropout", dropout=0.1),
    Case("checkpointed", checkpoint=True),
    Case("checkpointed, 16 layers", checkpoint=True, layers=16),
    Case("checkpointed, length 512", checkpoint=True, length=512, examples=2),
    Case("checkpointed, wide", checkpoint=True, hidden=512, intermediate=1792, heads=8, layers=4),
    Case("checkpointed, micro 256", checkpoint=True, micro_tokens=256),
    Case("wide, 8 query heads a key head", hidden=512, intermediate=1792, heads=8, kv_heads=1, layers=4),
    Case("no grouped heads", kv_heads=4),
    Case("vocabulary 32k", vocabulary=32_000, layers=4),
    Case("vocabulary 32k, tied", vocabulary=32_000, layers=4, tied=True),
    Case("vocabulary 128k", vocabulary=128_256, hidden=128, intermediate=448, layers=4),
    Case("vocabulary 128k, tied, checkpointed", vocabulary=128_256, hidden=128, tied=True, checkpoint=True, layers=4),
    Case("vocabulary 128k, 16 logit rows", vocabulary=128_256, hidden=128, layers=4, logit_rows=16, checkpoint=True),
    Case("vocabulary 32k, 1 chunk", vocabulary=32_000, layers=4, logit_rows=4096),
    Case("cheap parts", levels=Levels(ALL)),
    Case("cheap parts, 16 layers", levels=Levels(ALL), layers=16),
    Case("cheap parts, length 512", levels=Levels(ALL), length=512, examples=2),
    Case("cheap parts, micro 256", levels=Levels(ALL), micro_tokens=256),
    Case("cheap parts, wide", levels=Levels(ALL), hidden=512, intermediate=1792, heads=8, layers=4),
    Case("cheap parts, dropout", levels=Levels(ALL), dropout=0.1),
    Case("cheap parts, dora", levels=Levels(ALL), kind="dora"),
    Case("cheap parts, full", levels=Levels(ALL), kind="full"),
    Case("cheap parts, q and v only", levels=Levels(ALL), targets=("q_proj", "v_proj")),
    Case("cheap parts, dpo", levels=Levels(ALL), stage="dpo", length=64, examples=5),
    Case("cheap parts of 8 of 16 blocks", levels=Levels(8), layers=16),
    Case("8 of 16 blocks again", levels=Levels(ALL, 8), layers=16),
    Case("15 of 16 blocks again", levels=Levels(ALL, 15), layers=16),
    Case("dora", kind="dora"),
    Case("dora, checkpointed", kind="dora", checkpoint=True),
    Case("full", kind="full"),
    Case("full, checkpointed", kind="full", checkpoint=True),
    Case("full, 2 layers", kind="full", trained_layers=2),
    Case("full, tied, vocabulary 8k", kind="full", tied=True, vocabulary=8000),
    Case("full, untied, vocabulary 8k", kind="full", vocabulary=8000, checkpoint=True),
    Case("tables, vocabulary 8k", saved=BOTH, vocabulary=8000),
    Case("tables, vocabulary 32k, checkpointed", saved=BOTH, vocabulary=32_000, layers=4, checkpoint=True),
    Case("tables, vocabulary 32k, tied", saved=BOTH, vocabulary=32_000, layers=4, tied=True),
    Case("tables, 2 of 8 layers", saved=BOTH, vocabulary=8000, layers=8, trained_layers=2),
    Case("tables, the embedding alone", saved=("embed_tokens",), vocabulary=32_000, layers=4),
    Case("tables, the head alone", saved=("lm_head",), vocabulary=32_000, layers=4),
    Case("tables, dpo", stage="dpo", length=64, examples=5, saved=BOTH, vocabulary=32_000, layers=4),
    Case("dpo", stage="dpo", length=64, examples=5),
    Case("dpo, short responses", stage="dpo", length=16, examples=21),
    Case("dpo, length 256", stage="dpo", length=256, examples=1),
    Case("dpo, checkpointed", stage="dpo", length=64, examples=5, checkpoint=True),
    Case("dpo, micro 256", stage="dpo", length=64, examples=5, micro_tokens=256),
    Case("dpo, vocabulary 128k", stage="dpo", length=64, examples=5, vocabulary=128_256, hidden=128, layers=4),
)


def predict(case: Case) -> Estimate:
    """What the planner says."""
    each = case.length if case.stage == "sft" else 3 * case.length
    together = min(case.examples, max(case.micro_tokens // each, 1))
    row = (
        conversations([case.length] * together, scored=together * (case.length - case.length // 2))
        if case.stage == "sft"
        else pairs([(case.length,) * 3] * together)
    )
    levels = case.levels or Levels(0, ALL if case.checkpoint else 0)
    model, target, rows = model_shape(case.config), Target(4, None, False), -(-case.examples // together)
    return step_memory(model, case.adapter, target, row, levels, logit_rows=case.logit_rows, rows=rows)


def measure(case: Case) -> float:
    """The peak that MLX reports for a step, in bytes, less what was there before the model."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = llama.Model(llama.ModelArgs.from_dict(case.config))
    model.freeze()
    mx.eval(model.parameters())
    add_adapter(model, case.adapter, seed=0)
    objective = _objective(case)
    state = trainable(model)
    optimizer = GroupedAdamW(state, weight_decay=0.0, betas=(0.9, 0.999))
    peak = 0
    for number in range(2):
        mx.reset_peak_memory()
        rows = objective.rows(np.arange(case.examples), number)
        _, state = train_step(model, objective, rows, state, optimizer, learning_rate=1e-4, max_grad_norm=1.0)
        peak = mx.get_peak_memory()
    return float(peak - before)


def _objective(case: Case) -> SftObjective | DpoObjective:
    rng = np.random.default_rng(0)
    settings = Settings(0, case.micro_tokens, case.levels or case.checkpoint, case.logit_rows, case.dropout)

    def tokens() -> Any:
        return rng.integers(0, case.vocabulary, case.length).astype(np.int32)

    if case.stage == "sft":
        trained = np.arange(case.length) >= case.length // 2
        return SftObjective([Rendered(tokens(), trained, False) for _ in range(case.examples)], settings)
    chosen = [RenderedPair(tokens(), tokens(), tokens()) for _ in range(case.examples)]
    return DpoObjective(chosen, np.full((case.examples, 4), -100.0, np.float32), Dpo(), settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    print(f"{'case':38}{'planned':>10}{'measured':>10}{'deviation':>11}{'over weights':>14}  peak is in")
    found = []
    for case in (case for case in CASES if arguments.only in case.name):
        estimate, peak = predict(case), measure(case)
        deviation = estimate.peak / peak - 1
        over = estimate.over_weights / (peak - estimate.parts["weights"]) - 1
        found.append(
            asdict(case) | {"planned": estimate.peak, "measured": peak, "deviation": deviation, "over": over}
        )
        line = f"{case.name:38}{estimate.peak / 1e6:7.1f} MB{peak / 1e6:7.1f} MB{deviation:+11.1%}{over:+14.1%}"
        print(f"{line}  {estimate.phase}", flush=True)
    worst = max(abs(figures["deviation"]) for figures in found)
    beyond = sum(abs(figures["deviation"]) > BAR for figures in found)
    print(f"{len(found)} cases, worst {worst:.1%}, {beyond} beyond {BAR:.0%}")
    if arguments.json:
        about = {name: version(name) for name in ("mlx", "mlx-lm")} | {"machine": platform.platform()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "cases": found}, indent=2) + "\n")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
