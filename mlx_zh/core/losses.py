"""Losses as pure functions of log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


def sft_loss(logprobs: mx.array, total_scored: int) -> mx.array:
    """A micro-batch's share of a step's loss: minus the sum of its log-probs (S,), divided by `total_scored`.

    `total_scored` counts the scored tokens of the whole step. The shares of all micro-batches of a step add up to the
    mean cross-entropy of its scored tokens.
    """
    return -logprobs.sum() / total_scored


def preference_loss(
    policy_chosen: mx.array,
    policy_rejected: mx.array,
    reference_chosen: mx.array | None,
    reference_rejected: mx.array | None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: mx.array | None = None,
    rejected_lengths: mx.array | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
) -> mx.array:
    """Loss of each of P preference pairs, (P,) float32, from summed log-probs (P,).

    `loss` is a name in `LOSSES`, whose entries say which arguments each loss reads. Formulas are those of TRL's
    DPOTrainer (1.16); `simpo` and `orpo` are those of LLaMA-Factory. Lengths (P,) are in scored tokens.
    `f_divergence` (f-DPO, arXiv:2309.16240) replaces the log-ratio log(pi / pi_ref) by f'(pi / pi_ref), and
    `f_alpha` is the alpha of "alpha". Raises ValueError for an unknown name, for a missing argument that the loss
    needs, and for an f_divergence that the loss does not use.
    """
    kind = LOSSES.get(loss)
    if kind is None:
        raise ValueError(f"there is no preference loss {loss!r}; choose from {', '.join(LOSSES)}")
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"there is no f_divergence {f_divergence!r}; choose from {', '.join(DIVERGENCES)}")
    if f_divergence != "reverse_kl" and not kind.divergence:
        raise ValueError(f"f_divergence {f_divergence!r} has no effect on {loss}")
    if kind.lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"{loss} needs chosen_lengths and rejected_lengths")
    if kind.reference and (reference_chosen is None or reference_rejected is None):
        raise ValueError(f"{loss} needs reference log-probs")
    policy = _float32(policy_chosen), _float32(policy_rejected)
    reference = (_float32(reference_chosen), _float32(reference_rejected)) if kind.reference else policy
    ratio = policy[0] - reference[0], policy[1] - reference[1]
    score = DIVERGENCES[f_divergence]
    pairs = Pairs(
        policy=policy,
        reference=reference,
        ratio=ratio,
        score=(score(ratio[0], f_alpha), score(ratio[1], f_alpha)),
        lengths=(_float32(chosen_lengths), _float32(rejected_lengths)) if kind.lengths else policy,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
        discopop_tau=discopop_tau,
    )
    return kind.formula(pairs)


def answer_loss(
    policy: mx.array,
    reference: mx.array,
    good: mx.array,
    *,
    kl: float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """Loss of each of P single answers, (P,) float32, from summed log-probs (P,); `good` (P,) says which are good.

    w (1 - s(beta (r - z))) of a good answer and w (1 - s(beta (z - r))) of a bad one, with r = log(pi / pi_ref), z =
    `kl` and the weight of its kind: KTO (arXiv:2402.01306, equation 7), as in TRL's KTOTrainer (1.16). With z = 0 it
    is TRL's apo_zero_unpaired, from APO-zero (arXiv:2408.06266, equation 7).
    """
    advantage = beta * (_float32(policy) - _float32(reference) - kl)
    weight = mx.where(good, desirable_weight, undesirable_weight)
    return weight * mx.sigmoid(mx.where(good, -advantage, advantage))


def rewards(
    policy: mx.array, reference: mx.array | None, *, loss: str, beta: float, lengths: mx.array | None = None
) -> mx.array:
    """Implicit rewards of responses: beta * log(pi / pi_ref) (DPO, arXiv:2305.18290, section 4).

    `policy` and `reference` are summed log-probs; the result has their shape. Losses without a reference take beta
    times the mean log-prob of a token instead, and need `lengths` in scored tokens.
    """
    if LOSSES[loss].reference:
        return beta * (_float32(policy) - _float32(reference))
    return beta * _float32(policy) / _float32(lengths)


def chosen_cross_entropy(policy_chosen: mx.array, chosen_lengths: mx.array) -> mx.array:
    """Mean cross-entropy of the tokens of each chosen response, (P,); `sft_weight` multiplies it.

    This is RPO's regularizer (arXiv:2404.19733; `pref_ftx` in LLaMA-Factory). It helps where the chosen responses
    lose probability together with the rejected ones.
    """
    return -_float32(policy_chosen) / _float32(chosen_lengths)


def length_desensitized(total: mx.array, shared: mx.array, ld_alpha: float) -> mx.array:
    """Summed log-probs in which tokens beyond the length of the pair's shorter response are weighted by `ld_alpha`.

    LD-DPO (arXiv:2409.06411). `total` sums all tokens of a response; `shared` sums its first
    min(chosen length, rejected length) tokens. Both have the same shape, and so has the result.
    """
    return shared + ld_alpha * (total - shared)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The input of a loss formula. Each tuple holds (chosen, rejected), each of shape (P,)."""

    policy: tuple[mx.array, mx.array]  # summed log-probs
    reference: tuple[mx.array, mx.array]
    ratio: tuple[mx.array, mx.array]  # log(pi / pi_ref)
    score: tuple[mx.array, mx.array]  # f'(pi / pi_ref) of the f-divergence; for reverse_kl, the log-ratio
    lengths: tuple[mx.array, mx.array]  # scored tokens
    beta: float
    label_smoothing: float
    simpo_gamma: float
    discopop_tau: float

    @property
    def margin(self) -> mx.array:
        """beta * (chosen score - rejected score), (P,): the difference of implicit rewards."""
        return self.beta * (self.score[0] - self.score[1])

    @property
    def means(self) -> tuple[mx.array, mx.array]:
        """Mean log-prob of a token under the policy, (P,) each."""
        return self.policy[0] / self.lengths[0], self.policy[1] / self.lengths[1]


def _float32(array: mx.array | None) -> mx.array:
    assert array is not None
    return array.astype(mx.float32)


def _log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, mx.zeros_like(x))  # log(sigmoid(x)) would underflow for large negative x


def _sigmoid(pairs: Pairs) -> mx.array:
    """-(1 - e) log s(m) - e log s(-m), m = beta (r_chosen - r_rejected).

    DPO (arXiv:2305.18290, equation 7); with label smoothing e, conservative DPO (Mitchell, 2023).
    """
    return _smoothed(pairs.margin, pairs.label_smoothing)


def _smoothed(margin: mx.array, smoothing: float) -> mx.array:
    if smoothing == 0:
        return -_log_sigmoid(margin)
    return -(1 - smoothing) * _log_sigmoid(margin) - smoothing * _log_sigmoid(-margin)


def _hinge(pairs: Pairs) -> mx.array:
    """max(0, 1 - m). SLiC-HF (arXiv:2305.10425) in the normalized form of RSO (arXiv:2309.06657)."""
    return mx.maximum(1 - pairs.margin, 0)


def _ipo(pairs: Pairs) -> mx.array:
    """(r_chosen / |chosen| - r_rejected / |rejected| - 1 / (2 beta))^2; beta is IPO's tau.

    IPO (arXiv:2310.12036, equation 17), averaged over tokens as its authors did.
    """
    (chosen, rejected), (chosen_length, rejected_length) = pairs.score, pairs.lengths
    return mx.square(chosen / chosen_length - rejected / rejected_length - 1 / (2 * pairs.beta))


def _robust(pairs: Pairs) -> mx.array:
    """(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e): unbiased when a share e of the labels is flipped.

    Robust DPO (arXiv:2403.00409); e < 0.5.
    """
    noise, margin = pairs.label_smoothing, pairs.margin
    return (-(1 - noise) * _log_sigmoid(margin) + noise * _log_sigmoid(-margin)) / (1 - 2 * noise)


def _exo_pair(pairs: Pairs) -> mx.array:
    """s(m) (log s(m) - log(1 - e)) + s(-m) (log s(-m) - log e): the reverse KL to smoothed labels.

    EXO (arXiv:2402.00856, equation 16). e must be above 0; a label smoothing of 0 means the paper's 1e-3.
    """
    smoothing = mx.array(pairs.label_smoothing or 1e-3)
    margin = pairs.margin
    chosen, rejected = _log_sigmoid(margin), _log_sigmoid(-margin)
    return mx.exp(chosen) * (chosen - mx.log1p(-smoothing)) + mx.exp(rejected) * (rejected - mx.log(smoothing))


def _nca_pair(pairs: Pairs) -> mx.array:
    """-log s(c) - log s(-c) / 2 - log s(-r) / 2 of the rewards c and r.

    NCA for pairs (arXiv:2402.05369).
    """
    chosen, rejected = pairs.beta * pairs.ratio[0], pairs.beta * pairs.ratio[1]
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def _bco_pair(pairs: Pairs) -> mx.array:
    """-log s(c) - log s(-r) of the rewards c and r.

    BCO (arXiv:2404.04656) with reward shift 0, as in TRL. In the paper, the shift is a running mean of all rewards.
    """
    return -_log_sigmoid(pairs.beta * pairs.ratio[0]) - _log_sigmoid(-pairs.beta * pairs.ratio[1])


def _sppo_hard(pairs: Pairs) -> mx.array:
    """(log-ratio of chosen - 1 / (2 beta))^2 + (log-ratio of rejected + 1 / (2 beta))^2.

    SPPO (arXiv:2405.00675, equation 4.7) with win probabilities 1 and 0.
    """
    target = 0.5 / pairs.beta
    return mx.square(pairs.ratio[0] - target) + mx.square(pairs.ratio[1] + target)


def _apo_zero(pairs: Pairs) -> mx.array:
    """1 - s(c) + s(r) of the rewards c and r: raises the chosen reward and lowers the rejected one.

    APO-zero (arXiv:2408.06266, equation 7), for chosen responses better than the model's own.
    """
    return mx.sigmoid(-pairs.beta * pairs.ratio[0]) + mx.sigmoid(pairs.beta * pairs.ratio[1])


def _apo_down(pairs: Pairs) -> mx.array:
    """s(c) + 1 - s(c - r) of the rewards c and r: lowers both, and the rejected one more.

    APO-down (arXiv:2408.06266, equation 8), for chosen responses worse than the model's own.
    """
    chosen, rejected = pairs.beta * pairs.ratio[0], pairs.beta * pairs.ratio[1]
    return mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen)


def _discopop(pairs: Pairs) -> mx.array:
    """-(1 - w) log s(m) + w exp(-m), w = s(m / tau).

    DiscoPOP, the log-ratio modulated loss (arXiv:2406.08414, equation 5).
    """
    margin = pairs.margin
    scaled = margin / pairs.discopop_tau
    # w * exp(-m) as one exponential, because exp(-m) alone overflows where w is near 0.
    return -mx.sigmoid(-scaled) * _log_sigmoid(margin) + mx.exp(_log_sigmoid(scaled) - margin)


def _sigmoid_norm(pairs: Pairs) -> mx.array:
    """-log s(beta (r_chosen / |chosen| - r_rejected / |rejected|)).

    Length-normalized DPO (Tulu 3, arXiv:2411.15124).
    """
    (chosen, rejected), (chosen_length, rejected_length) = pairs.score, pairs.lengths
    return -_log_sigmoid(pairs.beta * (chosen / chosen_length - rejected / rejected_length))


def _aot(pairs: Pairs) -> mx.array:
    """The sigmoid loss of beta (k-th smallest policy margin - k-th smallest reference margin).

    AOT paired (arXiv:2406.05882). Entry k of the result belongs to the k-th smallest margin, and the gradient of
    every pair depends on all pairs of the call.
    """
    policy = mx.sort(pairs.policy[0] - pairs.policy[1])
    reference = mx.sort(pairs.reference[0] - pairs.reference[1])
    return _smoothed(pairs.beta * (policy - reference), pairs.label_smoothing)


def _simpo(pairs: Pairs) -> mx.array:
    """-log s(beta (mean log-prob of chosen - of rejected) - gamma). SimPO (arXiv:2405.14734, equation 6)."""
    chosen, rejected = pairs.means
    return -_log_sigmoid(pairs.beta * (chosen - rejected) - pairs.simpo_gamma)


def _orpo(pairs: Pairs) -> mx.array:
    """-l_c - beta log s(log-odds of chosen - of rejected), l the mean log-prob of a token, odds p / (1 - p).

    ORPO (arXiv:2403.07691); beta is its lambda.
    """
    chosen, rejected = pairs.means
    return -chosen - pairs.beta * _log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: mx.array) -> mx.array:
    below_one = mx.minimum(logprob, -1e-6)  # at probability 1 the odds are infinite
    return logprob - mx.log(-mx.expm1(below_one))


def _forward_kl(ratio: mx.array, _alpha: float) -> mx.array:
    return 1 - mx.exp(mx.minimum(-ratio, _MAX_EXPONENT))


def _js(ratio: mx.array, _alpha: float) -> mx.array:
    return _LN2 + _log_sigmoid(ratio)


def _alpha(ratio: mx.array, alpha: float) -> mx.array:
    if abs(alpha - 1) < 1e-6:
        return ratio  # the limit for alpha -> 1
    return mx.expm1(mx.minimum((alpha - 1) * ratio, _MAX_EXPONENT)) / (alpha - 1)


_LN2 = 0.6931471805599453
_MAX_EXPONENT = 40.0  # exp(40) squared is still finite in float32

# f'(pi / pi_ref) of each divergence, as a function of log(pi / pi_ref) and alpha (f-DPO, arXiv:2309.16240).
DIVERGENCES: dict[str, Callable[[mx.array, float], mx.array]] = {
    "reverse_kl": lambda ratio, _alpha: ratio,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A formula, and which inputs it reads besides beta and the policy's log-probs."""

    formula: Callable[[Pairs], mx.array]
    reference: bool = True  # reference log-probs
    lengths: bool = False
    divergence: bool = False  # f_divergence
    smoothing: bool = False  # label_smoothing
    coupled: bool = False  # a pair's loss depends on the other pairs of the call


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(_sigmoid, divergence=True, smoothing=True),
    "hinge": PreferenceLoss(_hinge, divergence=True),
    "ipo": PreferenceLoss(_ipo, lengths=True, divergence=True),
    "robust": PreferenceLoss(_robust, divergence=True, smoothing=True),
    "exo_pair": PreferenceLoss(_exo_pair, divergence=True, smoothing=True),
    "nca_pair": PreferenceLoss(_nca_pair),
    "bco_pair": PreferenceLoss(_bco_pair),
    "sppo_hard": PreferenceLoss(_sppo_hard),
    "apo_zero": PreferenceLoss(_apo_zero),
    "apo_down": PreferenceLoss(_apo_down),
    "discopop": PreferenceLoss(_discopop, divergence=True),
    "sigmoid_norm": PreferenceLoss(_sigmoid_norm, lengths=True, divergence=True),
    "aot": PreferenceLoss(_aot, smoothing=True, coupled=True),
    "simpo": PreferenceLoss(_simpo, reference=False, lengths=True),
    "orpo": PreferenceLoss(_orpo, reference=False, lengths=True),
}


@dataclass(frozen=True, slots=True)
class UnpairedLoss:
    """A loss of single answers with a label, which `answer_loss` computes."""

    kl: bool  # whether it has a KL term; with it, an answer's loss depends on the other answers of the step


UNPAIRED: dict[str, UnpairedLoss] = {"kto": UnpairedLoss(kl=True), "apo_zero_unpaired": UnpairedLoss(kl=False)}
