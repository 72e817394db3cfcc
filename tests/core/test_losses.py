"""Preference losses: values worked by hand, PyTorch's autograd, and numbers too large for an exponential."""

from __future__ import annotations

import math
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from mlx_zh.core.losses import (
    DIVERGENCES,
    LOSSES,
    UNPAIRED,
    chosen_cross_entropy,
    length_desensitized,
    preference_loss,
    rewards,
    sft_loss,
)
from mlx_zh.recipe import training

LN2 = math.log(2)

# One pair. Log-ratios 2 and -3, so with beta 0.1 rewards c = 0.2, r = -0.3 and the margin m = 0.5. With s = sigmoid:
#   -log s(0.5) = 0.474077  -log s(-0.5) = 0.974077  s(0.5) = 0.622459  s(-0.5) = 0.377541
#   -log s(0.2) = 0.598139  -log s(-0.2) = 0.798139  s(0.2) = 0.549834
#   -log s(0.3) = 0.554355                           s(-0.3) = 0.425557
POLICY, REFERENCE, LENGTHS = (-10.0, -14.0), (-12.0, -11.0), (4, 5)

BY_HAND: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, 0.474077),
    ("sigmoid", {"label_smoothing": 0.1}, 0.524077),  # 0.9 * 0.474077 + 0.1 * 0.974077
    ("hinge", {}, 0.5),  # 1 - 0.5
    ("hinge", {"beta": 0.5}, 0.0),  # m = 2.5 is beyond the margin
    ("ipo", {}, 15.21),  # (2/4 + 3/5 - 1/0.2)^2 = (1.1 - 5)^2
    ("robust", {"label_smoothing": 0.1}, 0.411577),  # (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8
    # 0.622459 (-0.474077 - log 0.9) + 0.377541 (-0.974077 - log 0.1) = 0.622459 * -0.368717 + 0.377541 * 1.328508
    ("exo_pair", {"label_smoothing": 0.1}, 0.272055),
    # e = 0 would be infinite, so 0.001: 0.622459 (-0.474077 + 0.0010005) + 0.377541 (-0.974077 + 6.907755)
    ("exo_pair", {}, 1.945736),
    ("nca_pair", {}, 1.274386),  # 0.598139 + 0.798139 / 2 + 0.554355 / 2
    ("bco_pair", {}, 1.152494),  # 0.598139 + 0.554355
    ("sppo_hard", {}, 13.0),  # (2 - 5)^2 + (-3 + 5)^2
    ("apo_zero", {}, 0.875723),  # 1 - 0.549834 + 0.425557
    ("apo_down", {}, 0.927375),  # 0.549834 + 1 - 0.622459
    # w = s(0.5 / 0.5) = 0.731059: 0.268941 * 0.474077 + 0.731059 * exp(-0.5) = 0.127499 + 0.443410
    ("discopop", {"discopop_tau": 0.5}, 0.570909),
    ("sigmoid_norm", {}, 0.639659),  # -log s(0.1 * (2/4 + 3/5)) = log(1 + exp(-0.11))
    ("aot", {}, 0.474077),  # of one pair, sorting changes nothing: 0.1 * ((-10 + 14) - (-12 + 11)) = 0.5
    ("simpo", {}, 0.955509),  # means -2.5 and -2.8: log(1 + exp(-(0.1 * 0.3 - 0.5))) = log(1 + exp(0.47))
    # Log-odds -2.5 - log(1 - exp(-2.5)) = -2.414350 and -2.8 - log(1 - exp(-2.8)) = -2.737263, apart 0.322913:
    # 2.5 + 0.1 log(1 + exp(-0.322913)) = 2.5 + 0.1 * 0.544677
    ("orpo", {}, 2.554468),
    # (1 - e^-2) - (1 - e^3) = 19.950202: log(1 + exp(-1.9950202))
    ("sigmoid", {"f_divergence": "forward_kl"}, 0.127522),
    # log s(2) - log s(-3) = -0.126928 + 3.048587 = 2.921659: log(1 + exp(-0.2921659))
    ("sigmoid", {"f_divergence": "js"}, 0.557697),
    # (e^-1 - 1) / -0.5 = 1.264241 and (e^1.5 - 1) / -0.5 = -6.963378, apart 8.227619: log(1 + exp(-0.8227619))
    ("sigmoid", {"f_divergence": "alpha"}, 0.364099),
    ("sigmoid", {"f_divergence": "alpha", "f_alpha": 1.0}, 0.474077),  # the limit is reverse_kl
    ("ipo", {"f_divergence": "js"}, 19.248903),  # (ln 2 - 0.126928)/4 - (ln 2 - 3.048587)/5 = 0.612641; - 5; ^2
]


def one(value: float) -> mx.array:
    return mx.array([value], dtype=mx.float32)


def loss_of(policy: Any, reference: Any, lengths: Any, **options: Any) -> mx.array:
    """`preference_loss` of (P, 2) arrays."""
    policy, reference, lengths = (mx.array(a, dtype=mx.float32) for a in (policy, reference, lengths))
    return preference_loss(
        policy[:, 0],
        policy[:, 1],
        reference[:, 0],
        reference[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        **options,
    )


@pytest.mark.parametrize(("loss", "options", "expected"), BY_HAND)
def test_values_by_hand(loss: str, options: dict[str, Any], expected: float) -> None:
    found = loss_of([POLICY], [REFERENCE], [LENGTHS], loss=loss, **options)
    assert found.shape == (1,) and found.dtype == mx.float32
    assert found.item() == pytest.approx(expected, abs=2e-6 * max(1, expected))


def test_every_loss_is_worked_by_hand() -> None:
    assert {loss for loss, _, _ in BY_HAND} == LOSSES.keys()
    assert {options.get("f_divergence", "reverse_kl") for _, options, _ in BY_HAND} == DIVERGENCES.keys()


def test_aot_compares_sorted_margins() -> None:
    """Policy margins 4, -1 sorted: -1, 4; reference margins -1, 3: apart 0 and 1.

    -log s(0) = ln 2 and -log s(0.1) = log(1 + exp(-0.1)) = 0.644397, in the order of the margins.
    """
    policy, reference = [(-10, -14), (-3, -2)], [(-12, -11), (-5, -8)]
    found = loss_of(policy, reference, [LENGTHS] * 2, loss="aot")
    assert found.tolist() == pytest.approx([LN2, 0.644397], abs=1e-6)


def test_policy_as_reference_gives_the_loss_of_no_preference() -> None:
    """All log-ratios 0, so every margin is 0 and -log s(0) = ln 2, whatever label smoothing and f-divergence."""
    same = [(-10.0, -14.0), (-300.0, -2.0), (-1.0, -1.0)]
    for options in (
        {"loss": "sigmoid"},
        {"loss": "sigmoid", "label_smoothing": 0.2},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "sigmoid_norm"},
        {"loss": "aot"},
        *({"loss": "sigmoid", "f_divergence": name} for name in DIVERGENCES),
    ):
        assert loss_of(same, same, [LENGTHS] * 3, **options).tolist() == pytest.approx([LN2] * 3, abs=1e-6), options


def test_rewards() -> None:
    """beta * (policy - reference); without a reference beta * the mean log-prob of a token, as LLaMA-Factory logs."""
    policy, reference, lengths = mx.array([-10.0, -14.0]), mx.array([-12.0, -11.0]), mx.array([4, 5])
    assert rewards(policy, reference, loss="sigmoid", beta=0.1).tolist() == pytest.approx([0.2, -0.3])
    assert rewards(policy, None, loss="simpo", beta=2.0, lengths=lengths).tolist() == pytest.approx([-5.0, -5.6])


def test_modifiers_by_hand() -> None:
    """sft_weight adds -(-10) / 4 = 2.5; LD-DPO with alpha 0.5: -9 + 0.5 * (-14 + 9) = -11.5."""
    assert chosen_cross_entropy(one(-10), one(4)).item() == pytest.approx(2.5)
    assert length_desensitized(one(-14), one(-9), 0.5).item() == pytest.approx(-11.5)
    assert length_desensitized(one(-14), one(-9), 1.0).item() == -14
    assert length_desensitized(one(-14), one(-9), 0.0).item() == -9


def test_sft_loss_divides_by_the_whole_step() -> None:
    """Log-probs -1 and -2 of a step with 6 scored tokens in all: 3 / 6."""
    assert sft_loss(mx.array([-1.0, -2.0]), 6).item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_are_finite_in_value_and_gradient(loss: str) -> None:
    """Responses that became certain or impossible: no overflow, no NaN hidden behind a branch that is not taken."""
    ends = [0.0, -1e-7, -1.0, -50.0, -1e3, -1e4]
    policy = mx.array([(a, b) for a in ends for b in ends])
    reference = mx.array([(b, a) for a in ends for b in ends])
    lengths = mx.array([(1, 7)] * len(ends) ** 2)
    for name in DIVERGENCES if LOSSES[loss].divergence else ["reverse_kl"]:

        def total(policy: mx.array, name: str = name) -> mx.array:
            return loss_of(policy, reference, lengths, loss=loss, f_divergence=name).sum()

        value = loss_of(policy, reference, lengths, loss=loss, f_divergence=name)
        # DiscoPOP's exponential is meant to grow; its modulation bounds it where the margin is negative.
        assert mx.isfinite(value).all().item(), name
        assert mx.isfinite(mx.grad(total)(policy)).all().item(), name


def test_half_precision_arguments_are_computed_in_float32() -> None:
    """bfloat16 has 8 bits: -300 and -301 differ by less than its step of 2, but what is given exactly stays so."""
    chosen, rejected = mx.array([-300.0], dtype=mx.bfloat16), mx.array([-256.0], dtype=mx.bfloat16)
    found = preference_loss(chosen, rejected, mx.array([-301.0]), mx.array([-256.0]))
    exact = preference_loss(chosen.astype(mx.float32), rejected.astype(mx.float32), one(-301), one(-256))
    assert found.dtype == mx.float32 and found.item() == exact.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "no preference loss 'dpo'; choose from sigmoid, hinge"),
        ({"f_divergence": "kl"}, "no f_divergence 'kl'; choose from reverse_kl"),
        ({"loss": "apo_zero", "f_divergence": "js"}, "no effect on apo_zero"),
        ({"loss": "ipo"}, "ipo needs chosen_lengths"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(one(-1), one(-2), one(-1), one(-2), **options)


def test_a_missing_reference_is_refused_where_it_is_read() -> None:
    with pytest.raises(ValueError, match="sigmoid needs reference log-probs"):
        preference_loss(one(-1), one(-2), None, None)
    lengths = {"chosen_lengths": one(2), "rejected_lengths": one(2)}
    assert preference_loss(one(-1), one(-2), None, None, loss="simpo", **lengths).shape == (1,)


def test_the_recipe_knows_the_same_losses() -> None:
    """`recipe/` may not import MLX, so it repeats names and traits."""
    assert get_args(training.PreferenceLossName) == (*LOSSES, *UNPAIRED)
    assert tuple(UNPAIRED) == training._UNPAIRED
    assert tuple(n for n, loss in LOSSES.items() if not loss.reference) == training._WITHOUT_REFERENCE
    assert {n for n, loss in LOSSES.items() if loss.smoothing} == set(training._SMOOTHED)
    assert {n for n, loss in LOSSES.items() if loss.divergence} == set(training._DIVERGENT)
    assert get_args(training.Dpo.model_fields["f_divergence"].annotation) == tuple(DIVERGENCES)


# PyTorch: the formulas of TRL's DPOTrainer and LLaMA-Factory's trainer, as they stand there.


def torch_loss(torch: Any, pairs: Any, loss: str, beta: float, smoothing: float, divergence: str, tau: float) -> Any:
    log_sigmoid = torch.nn.functional.logsigmoid
    chosen, rejected, reference_chosen, reference_rejected, chosen_length, rejected_length = pairs
    ratios = chosen - reference_chosen, rejected - reference_rejected
    if divergence == "forward_kl":
        scores = [1 - torch.exp(-r) for r in ratios]
    elif divergence == "js":
        scores = [math.log(2) + log_sigmoid(r) for r in ratios]
    elif divergence == "alpha":
        scores = [(torch.exp(-0.5 * r) - 1.0) / -0.5 for r in ratios]
    else:
        scores = ratios
    delta = scores[0] - scores[1]
    averages = chosen / chosen_length, rejected / rejected_length
    if loss == "sigmoid":
        return -log_sigmoid(beta * delta) * (1 - smoothing) - log_sigmoid(-beta * delta) * smoothing
    if loss == "hinge":
        return torch.relu(1 - beta * delta)
    if loss == "ipo":
        return (scores[0] / chosen_length - scores[1] / rejected_length - 1 / (2 * beta)) ** 2
    if loss == "robust":
        clean, flipped = -(1 - smoothing) * log_sigmoid(beta * delta), -smoothing * log_sigmoid(-beta * delta)
        return (clean - flipped) / (1 - 2 * smoothing)
    if loss == "exo_pair":
        epsilon = torch.tensor(smoothing)
        first = torch.sigmoid(beta * delta) * (log_sigmoid(beta * delta) - torch.log1p(-epsilon))
        return first + torch.sigmoid(-beta * delta) * (log_sigmoid(-beta * delta) - torch.log(epsilon))
    if loss == "nca_pair":
        c, r = beta * ratios[0], beta * ratios[1]
        return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)
    if loss == "bco_pair":
        return -log_sigmoid(beta * ratios[0]) - log_sigmoid(-beta * ratios[1])
    if loss == "sppo_hard":
        return (ratios[0] - 0.5 / beta) ** 2 + (ratios[1] + 0.5 / beta) ** 2
    if loss == "aot":
        margins = torch.sort(chosen - rejected).values - torch.sort(reference_chosen - reference_rejected).values
        return -log_sigmoid(beta * margins) * (1 - smoothing) - log_sigmoid(-beta * margins) * smoothing
    if loss == "apo_zero":
        return 1 - torch.sigmoid(beta * ratios[0]) + torch.sigmoid(beta * ratios[1])
    if loss == "apo_down":
        return torch.sigmoid(beta * ratios[0]) + 1 - torch.sigmoid(beta * (ratios[0] - ratios[1]))
    if loss == "discopop":
        modulation = torch.sigmoid(beta * delta / tau)
        return -log_sigmoid(beta * delta) * (1 - modulation) + torch.exp(-beta * delta) * modulation
    if loss == "sigmoid_norm":
        return -log_sigmoid(beta * (scores[0] / chosen_length - scores[1] / rejected_length))
    if loss == "simpo":
        return -log_sigmoid(beta * (averages[0] - averages[1] - 0.5 / beta))
    assert loss == "orpo"
    inverse = torch.log1p(-torch.exp(averages[0])) - torch.log1p(-torch.exp(averages[1]))
    return -averages[0] + beta * -log_sigmoid((averages[0] - averages[1]) - inverse)


@pytest.mark.oracle
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_equal_pytorchs(loss: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    policy = -rng.uniform(2, 60, (9, 2))
    reference, lengths = policy + rng.normal(size=(9, 2)) * 2, rng.integers(2, 40, (9, 2))
    smoothing = 0.15 if LOSSES[loss].smoothing else 0.0
    for beta, name in [(0.1, n) for n in (DIVERGENCES if LOSSES[loss].divergence else ["reverse_kl"])] + [
        (0.7, "reverse_kl")
    ]:
        options = {"loss": loss, "beta": beta, "label_smoothing": smoothing, "f_divergence": name}
        found = loss_of(policy, reference, lengths, **options, discopop_tau=0.05)
        slope = mx.grad(lambda p, o=options: loss_of(p, reference, lengths, **o, discopop_tau=0.05).sum())(
            mx.array(policy.astype(np.float32))
        )
        inputs = torch.tensor(policy, requires_grad=True)
        columns = (*inputs.T, *torch.tensor(reference).T, *torch.tensor(lengths).T)
        expected = torch_loss(torch, columns, loss, beta, smoothing, name, 0.05)
        expected.sum().backward()
        np.testing.assert_allclose(np.array(found), expected.detach().numpy(), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(np.array(slope), inputs.grad.numpy(), rtol=2e-4, atol=1e-6)
