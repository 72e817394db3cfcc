"""KTO's objective: the KL term of the whole step, and results that do not depend on rows and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import distance, following_logprobs, gradients, own_logprobs, random_tokens
from tolerances import GRADIENT, LOGPROBS

from mlx_zh.core.losses import answer_loss
from mlx_zh.corpus.rendered import RenderedAnswer
from mlx_zh.distributed.world import World
from mlx_zh.errors import DataError
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Dpo
from mlx_zh.training.kto_objective import KtoObjective
from mlx_zh.training.mismatched import MismatchedAnswers, other_rows
from mlx_zh.training.objective import Settings
from mlx_zh.training.order import Order
from mlx_zh.training.reference import Reference, ReferenceStore
from mlx_zh.training.step import evaluate, loss_and_gradients, set_weights

pytestmark = pytest.mark.numeric
Make = Callable[..., Any]
SIZES = [(6, 5), (3, 9), (11, 2), (1, 8), (8, 1), (5, 12), (9, 4)]  # prompt, response
LABELS = [True, False, False, True, True, False, True]


def answers(labels: list[bool] = LABELS) -> list[RenderedAnswer]:
    return [
        RenderedAnswer(random_tokens(prompt, seed=2 * n), random_tokens(response, seed=2 * n + 1), label)
        for n, ((prompt, response), label) in enumerate(zip(SIZES, labels, strict=True))
    ]


def with_adapter(tiny_model: Make, seed: int) -> Any:
    """A model whose adapter has learned something."""
    model = tiny_model()
    add_adapter(model, AdapterSpec("lora", len(model.layers), rank=4, scale=2.0), seed=1)
    rng = np.random.default_rng(seed)
    set_weights(model, {n: mx.array(rng.normal(size=w.shape) * 0.1, mx.float32) for n, w in trainable(model).items()})
    return model


@dataclass
class Case:
    """A policy, and answers whose reference has other weights."""

    policy: Any
    pairs: MismatchedAnswers
    reference: np.ndarray

    def objective(self, micro_tokens: int = 64, world: World | None = None, **section: Any) -> KtoObjective:
        arguments = () if world is None else (world,)
        settings = Settings(seed=3, micro_tokens=micro_tokens)
        return KtoObjective(self.pairs, self.reference, Dpo(**({"loss": "kto"} | section)), settings, *arguments)

    def step(
        self, examples: list[int], **options: Any
    ) -> tuple[float, dict[str, float], dict[str, float], dict[str, mx.array]]:
        objective = self.objective(**options)
        rows = objective.rows(np.array(examples), 0)
        loss, sums, slopes = loss_and_gradients(self.policy, objective, rows, trainable(self.policy))
        totals = {name: float(value) for name, value in sums.items()}
        return float(loss), totals, objective.metrics(totals), slopes


def case_of(tiny_model: Make, folder: Path, policy: int, reference: int) -> Case:
    given = answers()
    pairs = MismatchedAnswers(given, other_rows(given, seed=5), max_length=512)
    stored = Reference(ReferenceStore(folder / "reference.txt"), pairs)
    list(stored.compute(with_adapter(tiny_model, reference), row_tokens=512))
    return Case(with_adapter(tiny_model, policy), pairs, stored.logprobs(pairs))


@pytest.fixture
def case(tiny_model: Make, tmp_path: Path) -> Case:
    return case_of(tiny_model, tmp_path, policy=13, reference=8)  # with a KL term above 0


EVERY = list(range(len(SIZES)))


def log_ratios(case: Case, examples: list[int], *, other: bool) -> np.ndarray:
    """log(pi / pi_ref) of responses, or of the mismatched ones, by mlx-lm's own forward pass."""
    ratios = []
    for i in examples:
        response = case.pairs[i].rejected if other else case.pairs[i].chosen
        tokens = np.concatenate([case.pairs[i].prompt, response])
        policy = own_logprobs(case.policy, tokens)[len(case.pairs[i].prompt) :].sum()
        ratios.append(policy - case.reference[i, 1 if other else 0])
    return np.array(ratios)


def test_the_kl_term_is_that_of_the_mismatched_answers_of_the_step(case: Case) -> None:
    for examples in (EVERY, [2, 5], *([i] for i in EVERY)):
        expected = max(log_ratios(case, examples, other=True).mean(), 0.0)
        _, _, figures, _ = case.step(examples)
        assert figures["kl"] == pytest.approx(expected, rel=LOGPROBS, abs=1e-4)
    assert max(case.step([i])[2]["kl"] for i in EVERY) > 0.1  # it is not always 0
    assert min(log_ratios(case, EVERY, other=True)) < 0  # and some answers would make it negative


def test_value_and_gradient_equal_those_of_the_formula(case: Case) -> None:
    """The formula over full sequences, with the KL term as a constant."""
    examples = [i for i in EVERY if log_ratios(case, [i], other=True)[0] > 0]
    kl = float(log_ratios(case, examples, other=True).mean())
    assert kl > 0
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}

    def formula() -> mx.array:
        total = mx.zeros(())
        for i in examples:
            prompt, response = case.pairs[i].prompt, case.pairs[i].chosen
            policy = following_logprobs(case.policy, np.concatenate([prompt, response]))[len(prompt) - 1 :].sum()
            advantage = 0.1 * (policy - case.reference[i, 0] - kl)
            total = total + (1.5 * (1 - mx.sigmoid(advantage)) if LABELS[i] else 0.5 * (1 - mx.sigmoid(-advantage)))
        return total / len(examples)

    expected, slopes = gradients(case.policy, formula)
    value, _, _, found = case.step(examples, **weights)
    assert value == pytest.approx(expected, rel=1e-4)
    assert distance(found, slopes) < 20 * GRADIENT


@pytest.mark.parametrize("section", [{}, {"sft_weight": 0.3, "desirable_weight": 2.0}, {"loss": "apo_zero_unpaired"}])
def test_rows_of_any_length_give_the_same_step(case: Case, section: dict[str, Any]) -> None:
    value, _, figures, slopes = case.step(EVERY, micro_tokens=4096, **section)
    for micro_tokens in (1, 20, 37):
        other, _, again, found = case.step(EVERY, micro_tokens=micro_tokens, **section)
        assert other == pytest.approx(value, rel=1e-5)
        assert again == pytest.approx(figures, rel=1e-4, abs=1e-4)
        assert distance(found, slopes) < 20 * GRADIENT


def test_two_ranks_give_the_step_of_one(case: Case) -> None:
    """Each rank has its share of the rows, and the KL term of both: their sums are those of one machine."""
    value, totals, _, slopes = case.step(EVERY)
    shares = {0: [0, 2, 3], 1: [1, 4, 5, 6]}
    ratios: dict[int, Any] = {}

    class Rank(World):
        def __init__(self, rank: int) -> None:
            self.number = rank

        def share(self, lengths: Any) -> list[int]:
            return shares[self.number]

        def collect(self, value: Any) -> Any:
            ratios[self.number] = value
            return [ratios.get(0, []), ratios.get(1, [])]

    for rank in (0, 1):  # what each would send to the other
        objective = case.objective(world=Rank(rank))
        ratios[rank] = objective._log_ratios(case.policy, objective.rows(np.array(EVERY), 0))
    ends = [case.step(EVERY, world=Rank(rank)) for rank in (0, 1)]
    assert sum(end[0] for end in ends) == pytest.approx(value, rel=1e-5)
    for name, total in totals.items():
        assert sum(end[1][name] for end in ends) == pytest.approx(total, rel=1e-4, abs=1e-4), name
    summed = {name: ends[0][3][name] + ends[1][3][name] for name in slopes}
    assert distance(summed, slopes) < 20 * GRADIENT


def test_policy_as_reference_gives_half_of_every_weight(tiny_model: Make, tmp_path: Path) -> None:
    """All log-ratios 0: KL 0, rewards 0, and 1 - s(0) = 1/2 of 4 weights of 3 and 3 of 1."""
    case = case_of(tiny_model, tmp_path, policy=7, reference=7)
    value, _, figures, _ = case.step(EVERY, desirable_weight=3.0)
    assert value == pytest.approx((4 * 3 + 3) / 7 / 2, abs=1e-5)
    assert figures["kl"] == pytest.approx(0, abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert figures[name] == pytest.approx(0, abs=1e-4)
    assert (figures["count/chosen"], figures["count/rejected"]) == (4, 3)


def test_a_step_of_one_kind_has_no_figures_of_the_other(case: Case) -> None:
    figures = case.step([0, 3])[2]
    assert figures.keys() == {"kl", "rewards/chosen", "logps/chosen", "count/chosen", "count/rejected"}
    assert case.step([1])[2]["count/rejected"] == 1


def test_validation_scores_every_answer_with_the_kl_of_all(case: Case) -> None:
    objective = case.objective(micro_tokens=20)
    found = list(evaluate(case.policy, objective, objective.rows(np.array(EVERY), None)))
    assert len(found) > 2
    value, _, figures, _ = case.step(EVERY)
    assert sum(share for share, _ in found) == pytest.approx(value, rel=1e-5)
    totals = {name: sum(sums[name] for _, sums in found) for name in objective.sums}
    assert objective.metrics(totals) == pytest.approx(figures, rel=1e-4, abs=1e-4)


def test_the_loss_without_a_kl_term_needs_no_other_response(case: Case) -> None:
    pairs = MismatchedAnswers(answers(), None, 512)
    assert [len(pair.rejected) for pair in pairs] == [1] * len(EVERY)
    objective = KtoObjective(pairs, case.reference, Dpo(loss="apo_zero_unpaired"), Settings(3, 64))
    rows = objective.rows(np.array(EVERY), 0)
    assert not objective.coupled and objective.prepared(None, rows) is rows
    loss, _, _ = loss_and_gradients(case.policy, objective, rows, trainable(case.policy))
    ratios = log_ratios(case, EVERY, other=False)
    signs = np.where(LABELS, 1, -1)
    assert float(loss) == pytest.approx((1 / (1 + np.exp(0.1 * signs * ratios))).mean(), rel=1e-4)


# ---- which response is put under which prompt


def prompts(kinds: list[int]) -> list[RenderedAnswer]:
    """Answers to prompts of these kinds; the response is the number of the row."""
    return [RenderedAnswer(np.array([1, kind]), np.array([number]), True) for number, kind in enumerate(kinds)]


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=40).filter(lambda kinds: len(set(kinds)) > 1), st.integers(0, 9)
)
@settings(max_examples=200, deadline=None)
def test_the_other_response_is_to_another_prompt_and_near_in_the_order(kinds: list[int], seed: int) -> None:
    """It is the first one before it, in the first epoch's order, whose prompt is another."""
    others = other_rows(prompts(kinds), seed).tolist()
    order = Order(len(kinds), 1, seed).epoch(0).tolist()
    for place, row in enumerate(order):
        before = (order[(place - back) % len(order)] for back in range(1, len(order)))
        assert others[row] == next(i for i in before if kinds[i] != kinds[row])


def test_with_different_prompts_the_responses_of_a_step_are_moved_on_by_one() -> None:
    """As TRL does in a batch: the step's own responses, but for the first, which the step before has."""
    others = other_rows(prompts(list(range(12))), seed=42)
    order = Order(12, 4, 42)
    for number in range(3):
        step = order.step(number).tolist()
        assert others[step[1:]].tolist() == step[:-1]
    assert sorted(others.tolist()) == list(range(12))


def test_one_prompt_alone_cannot_be_mismatched() -> None:
    with pytest.raises(DataError, match="all rows have the same prompt"):
        other_rows(prompts([3, 3, 3]), seed=1)


def test_the_other_response_is_cut_to_max_length() -> None:
    long = RenderedAnswer(np.arange(5), np.arange(20), True)
    short = RenderedAnswer(np.arange(15), np.arange(4), False)
    pairs = MismatchedAnswers([long, short], np.array([1, 0]), max_length=20)
    assert [len(pair.rejected) for pair in pairs] == [4, 5]
    assert [len(pair.chosen) for pair in pairs] == [20, 4]
    assert [len(pair.rejected) for pair in pairs[0:2]] == [4, 5]


def test_the_losses_by_hand() -> None:
    """Log-ratios 2 (good) and -3 (bad), KL 1, beta 0.1: 1 - s(0.1) = 0.475021 and 1 - s(0.4) = 0.401312."""
    arguments = (mx.array([-10.0, -14.0]), mx.array([-12.0, -11.0]), mx.array([True, False]))
    assert answer_loss(*arguments, kl=1.0).tolist() == pytest.approx([0.475021, 0.401312], abs=1e-6)
    weighted = answer_loss(*arguments, kl=1.0, desirable_weight=2.0, undesirable_weight=0.5)
    assert weighted.tolist() == pytest.approx([0.950042, 0.200656], abs=1e-6)
    # Without a KL term: 1 - s(0.2) = 0.450166 and s(-0.3) = 0.425557.
    assert answer_loss(*arguments).tolist() == pytest.approx([0.450166, 0.425557], abs=1e-6)
    # At log-ratios of 10,000 nothing overflows: the good answer has lost all, the bad one too.
    far = answer_loss(mx.array([-1e5, 1e5]), mx.array([0.0, 0.0]), mx.array([True, False]))
    assert far.tolist() == [1.0, 1.0] and math.isfinite(float(far.sum()))
