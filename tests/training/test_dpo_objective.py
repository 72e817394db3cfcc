"""DPO's objective: pairs as trees, and invariants 2 and 4 for every loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles import distance, gradients
from preferences import dpo, own_sums, pair, pairs, reference_of
from tolerances import GRADIENT, LOGPROBS

from mlx_zh.core.logprobs import sequence_logprobs
from mlx_zh.core.losses import LOSSES, preference_loss
from mlx_zh.core.packing import common_prefix_length
from mlx_zh.models.adapters.layers import add_adapter, remove_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training import dpo_objective
from mlx_zh.training.pairs import pack, pair_sums, tree_tokens
from mlx_zh.training.step import evaluate, loss_and_gradients, set_weights

pytestmark = pytest.mark.numeric
Make = Callable[..., Any]
FIGURES = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
MODIFIED = [
    *((loss, {}) for loss in LOSSES),
    ("sigmoid", {"label_smoothing": 0.1, "sft_weight": 0.5, "ld_alpha": 0.3}),
    ("sigmoid", {"f_divergence": "js"}),
    ("aot", {"label_smoothing": 0.1, "sft_weight": 0.5, "ld_alpha": 0.3}),
    ("simpo", {"ld_alpha": 0.0, "sft_weight": 0.2}),
]


def with_adapter(tiny_model: Make, kind: str = "lora", seed: int = 7, **changes: Any) -> Any:
    """A model whose adapter has learned something."""
    model = tiny_model(**changes)
    add_adapter(model, AdapterSpec(kind, len(model.layers), rank=4, scale=2.0), seed=1)
    rng = np.random.default_rng(seed)
    learned = {
        name: weight if name.endswith(".m") else mx.array(rng.normal(size=weight.shape) * 0.1, mx.float32)
        for name, weight in trainable(model).items()
    }
    set_weights(model, learned)
    return model


@pytest.fixture
def policy(tiny_model: Make) -> Any:
    return with_adapter(tiny_model)


@pytest.fixture
def reference(tiny_model: Make, tmp_path: Path) -> np.ndarray:
    """Of other weights than the policy's."""
    return reference_of(with_adapter(tiny_model, seed=8), pairs(), tmp_path)


def step_of(model: Any, objective: Any, examples: Any) -> tuple[float, dict[str, float], dict[str, mx.array]]:
    loss, sums, found = loss_and_gradients(model, objective, objective.rows(np.array(examples), 0), trainable(model))
    return float(loss), objective.metrics({name: float(value) for name, value in sums.items()}), found


# The tree


def test_a_tree_holds_what_both_responses_begin_with_once() -> None:
    """Prompt 1 2, chosen 5 6 7, rejected 5 6 8 9: the root is 1 2 5 6; 5 and 6 are scored for both."""
    one = pair(2, 0, 1, 1)
    one.prompt[:] = [1, 2]
    one = type(one)(one.prompt, np.array([5, 6, 7]), np.array([5, 6, 8, 9]))
    batch = pack([one])
    assert batch.tokens.tolist() == [1, 2, 5, 6, 7, 8, 9] and tree_tokens(one) == 7
    assert [(s.start, s.stop, s.parent, s.position) for s in batch.segments] == [
        (0, 4, None, 0),
        (4, 5, 0, 4),
        (5, 7, 0, 4),
    ]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.scored.tolist() == [1, 2, 3, 1, 2, 3, 5]
    assert batch.targets.tolist() == [5, 6, 7, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [([1, 2, 3], [1, 2, 4], 2), ([1], [1, 2], 0), ([1, 2], [1, 2, 3], 1), ([4, 2], [1, 2], 0), ([3, 3], [3, 3], 1)],
)
def test_both_branches_keep_a_token(chosen: list[int], rejected: list[int], shared: int) -> None:
    assert common_prefix_length(chosen, rejected) == shared


def test_log_probs_equal_those_of_the_two_full_sequences(policy: Any) -> None:
    found = pairs()
    expected = [value.item() for one in found for value in own_sums(policy, one)]
    np.testing.assert_allclose(np.array(sequence_logprobs(policy, pack(found))), expected, rtol=LOGPROBS)


def test_sums_within_the_shorter_response(policy: Any) -> None:
    """As LD-DPO needs them: the shorter response whole, the longer one cut to its length."""
    found, batch = pairs(), pack(pairs())
    totals, shared = pair_sums(dpo_objective.batch_logprobs(policy, batch), batch, found)
    shortest = [min(len(one.chosen), len(one.rejected)) for one in found]
    expected = [[v.item() for v in own_sums(policy, one, n)] for one, n in zip(found, shortest, strict=True)]
    np.testing.assert_allclose(np.array(shared), expected, rtol=LOGPROBS)
    for row, one in enumerate(found):
        shorter = int(len(one.rejected) < len(one.chosen))
        assert totals[row, shorter].item() == pytest.approx(shared[row, shorter].item(), rel=1e-6)


@pytest.mark.parametrize(("loss", "options"), MODIFIED)
def test_loss_and_gradient_equal_those_over_full_sequences(
    policy: Any, reference: np.ndarray, loss: str, options: dict[str, Any]
) -> None:
    """The mean over the step's pairs, each response run through the model's own forward by itself."""
    found, examples = pairs(), [5, 0, 3, 1]
    alpha = options.get("ld_alpha", 1.0)
    own_options = {k: v for k, v in options.items() if k not in ("ld_alpha", "sft_weight")}

    def whole() -> mx.array:
        sums, cross_entropies, against, lengths = [], [], [], []
        for index in examples:
            one, given = found[index], mx.array(reference[index])
            totals = mx.stack(own_sums(policy, one))
            shared = mx.stack(own_sums(policy, one, min(len(one.chosen), len(one.rejected))))
            sums.append(shared + alpha * (totals - shared))
            against.append(given[2:] + alpha * (given[:2] - given[2:]))
            cross_entropies.append(-totals[0] / len(one.chosen))
            lengths.append(mx.array([len(one.chosen), len(one.rejected)]))
        s, r, n = mx.stack(sums), mx.stack(against), mx.stack(lengths)
        kept = {"chosen_lengths": n[:, 0], "rejected_lengths": n[:, 1]}
        losses = preference_loss(s[:, 0], s[:, 1], r[:, 0], r[:, 1], loss=loss, **kept, **own_options)
        return losses.mean() + options.get("sft_weight", 0.0) * mx.stack(cross_entropies).mean()

    expected, slopes = gradients(policy, whole)
    value, _, got = step_of(policy, dpo(found, reference, loss=loss, **options), examples)
    assert value == pytest.approx(expected, rel=LOGPROBS)
    assert distance(got, slopes) < GRADIENT


# Invariant 2


@pytest.mark.parametrize(("loss", "options"), MODIFIED)
def test_memory_settings_change_nothing(
    policy: Any, reference: np.ndarray, loss: str, options: dict[str, Any]
) -> None:
    """One pair a row, all in one row, recomputed layers, few logits at a time, another order of the pairs."""
    found, examples = pairs(), [4, 1, 6, 0, 2]
    value, figures, slopes = step_of(
        policy, dpo(found, reference, {"micro_tokens": 512}, loss=loss, **options), examples
    )
    assert figures.keys() == FIGURES | {"pairs"} and figures["pairs"] == 5
    for settings, order in (
        ({"micro_tokens": 1}, examples),
        ({"micro_tokens": 40, "checkpoint": True, "logit_rows": 16}, examples),
        ({"micro_tokens": 40}, examples[::-1]),
    ):
        again, same, others = step_of(policy, dpo(found, reference, settings, loss=loss, **options), order)
        assert again == pytest.approx(value, rel=LOGPROBS)
        assert same == pytest.approx(figures, rel=1e-5, abs=1e-5)
        assert distance(others, slopes) < GRADIENT


def test_a_ragged_step_weighs_every_pair_alike(policy: Any, reference: np.ndarray) -> None:
    """Steps of 4 and 3 pairs: each loss is the mean of its own pairs' losses, which a step of one gives."""
    objective = dpo(pairs(), reference)
    alone = [step_of(policy, objective, [i])[0] for i in range(7)]
    assert step_of(policy, objective, range(4))[0] == pytest.approx(np.mean(alone[:4]), rel=LOGPROBS)
    assert step_of(policy, objective, range(4, 7))[0] == pytest.approx(np.mean(alone[4:]), rel=LOGPROBS)


def test_embedding_noise_is_the_same_in_every_cut(policy: Any, reference: np.ndarray) -> None:
    """Also for aot, whose pairs pass the model twice: both passes see the same noise."""
    for loss in ("sigmoid", "aot"):
        wide, narrow = (
            dpo(pairs(), reference, {"micro_tokens": n, "neftune_alpha": 5.0}, loss=loss) for n in (512, 1)
        )
        value, _, slopes = step_of(policy, wide, range(5))
        again, _, others = step_of(policy, narrow, range(5))
        assert again == pytest.approx(value, rel=LOGPROBS) and distance(others, slopes) < GRADIENT


# Invariant 4


@pytest.mark.parametrize("row_tokens", [1, 50, 512])
def test_policy_as_reference_starts_at_ln_2(policy: Any, tmp_path: Path, row_tokens: int) -> None:
    """Every margin 0 and -log sigmoid(0) = ln 2, however the reference's rows and the policy's were packed."""
    found = pairs()
    same = reference_of(policy, found, tmp_path, row_tokens)
    loss, figures, _ = step_of(policy, dpo(found, same, ld_alpha=0.3), range(7))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    for name in ("chosen", "rejected", "margins"):
        assert figures[f"rewards/{name}"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_as_reference_is_the_model_without_its_adapter(tiny_model: Make, tmp_path: Path, kind: str) -> None:
    """Also for DoRA, where a scale of 0 would leave the magnitudes learned."""
    model = with_adapter(tiny_model, kind)
    magnitudes = {n: w * 1.3 for n, w in trainable(model).items() if n.endswith(".m")}
    set_weights(model, magnitudes)
    learned = reference_of(model, pairs(), tmp_path / "learned")
    remove_adapter(model)
    found = reference_of(model, pairs(), tmp_path / "base")
    base = reference_of(tiny_model(), pairs(), tmp_path / "other")
    np.testing.assert_array_equal(found, base)
    assert np.abs(found - learned).max() > 0.1


# Figures


def test_figures_by_hand(policy: Any, reference: np.ndarray) -> None:
    """Means over pairs of beta (policy - reference); accuracy is the share of pairs, not a comparison of means.

    Both rewards move by the reference alone, so a pair with a far lower chosen reference outweighs the others in the
    mean without being more than one pair.
    """
    given = reference[:4].copy()
    totals = np.array([[v.item() for v in own_sums(policy, one)] for one in pairs()[:4]])
    given[:, :2] = totals - [[-1, 1], [-2, 1], [-3, 1], [400, 1]]  # log-ratios: three pairs wrong, one very right
    _, figures, _ = step_of(policy, dpo(pairs(), given, beta=0.5), range(4))
    assert figures["rewards/accuracies"] == 0.25
    assert figures["rewards/chosen"] == pytest.approx(0.5 * (400 - 6) / 4, rel=1e-5)
    assert figures["rewards/rejected"] == pytest.approx(0.5, rel=1e-4)
    assert figures["rewards/margins"] == pytest.approx(0.5 * (394 - 4) / 4, rel=1e-5)
    assert figures["logps/chosen"] == pytest.approx(totals[:, 0].mean(), rel=LOGPROBS)
    assert figures["logps/rejected"] == pytest.approx(totals[:, 1].mean(), rel=LOGPROBS)


def test_losses_without_a_reference_need_none(policy: Any) -> None:
    """Rewards are beta * mean log-prob, as LLaMA-Factory logs them."""
    for loss in ("simpo", "orpo"):
        _, figures, _ = step_of(policy, dpo(pairs(), None, loss=loss, beta=2.0), range(3))
        means = [v.item() / len(one.chosen) for one in pairs()[:3] for v in own_sums(policy, one)[:1]]
        assert figures["rewards/chosen"] == pytest.approx(2.0 * np.mean(means), rel=LOGPROBS)


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_validation_computes_each_row_once(
    policy: Any, reference: np.ndarray, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss as training's, without noise, forward only."""
    calls = []
    forward = dpo_objective.batch_logprobs

    def counted(*args: Any, **options: Any) -> mx.array:
        calls.append(options["grad"])
        return forward(*args, **options)

    objective = dpo(pairs(), reference, {"micro_tokens": 40}, loss=loss)
    expected = step_of(policy, objective, range(7))[0]
    monkeypatch.setattr(dpo_objective, "batch_logprobs", counted)
    rows = objective.rows(np.arange(7), None)
    shares = [share for share, _ in evaluate(policy, objective, rows)]
    assert sum(shares) == pytest.approx(expected, rel=LOGPROBS)
    assert calls == [False] * len(rows) and len(rows) > 2
