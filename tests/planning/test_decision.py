"""The decision of a time budget: what it costs, that it is kept, and that more time never gives less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.errors import PlanError
from mlx_zh.planning.budget import EXAMS, RESERVE, Costs, ExamCost, Training, decide, smallest_budget


def training(name: str = "sft", **changes: object) -> Training:
    values: dict[str, object] = {
        "name": name,
        "full_steps": 1000,
        "batch_size": 16,
        "examples": 16_000.0,
        "counted": True,
        "step": 10.0,
    }
    return Training(**values | changes)  # type: ignore[arg-type]


seconds = st.floats(0.001, 100.0)


@st.composite
def trainings(draw: st.DrawFn, name: str) -> Training:
    return training(
        name,
        full_steps=draw(st.integers(1, 50_000)),
        examples=draw(st.floats(1.0, 1e6)),
        counted=draw(st.booleans()),
        step=draw(seconds),
        example=draw(st.floats(0, 1)),
        validation=draw(st.floats(0, 100)),
        validation_share=draw(st.floats(0, 0.01)),
        eval_steps=draw(st.none() | st.integers(1, 1000)),
        checkpoint=draw(st.floats(0, 5)),
        every_steps=draw(st.none() | st.integers(1, 1000)),
    )


@st.composite
def all_costs(draw: st.DrawFn) -> Costs:
    names = draw(st.sampled_from([("sft",), ("dpo",), ("sft", "dpo")]))
    exam = st.builds(
        ExamCost,
        subjects=st.integers(1, 70),
        questions=st.integers(70, 12_000),
        prefix=st.floats(0, 5),
        question=st.floats(0.001, 5),
    )
    exams = tuple(draw(st.lists(exam, max_size=2)))
    return Costs(
        tuple(draw(trainings(name)) for name in names),
        exams,
        ("eval-base", *(f"eval-{name}" for name in names)) if exams else (),
        draw(st.none() | st.integers(1, 50)),
        {"prepare": draw(st.floats(0, 1000)), "sft": draw(st.floats(0, 100))},
    )


def steps_of(costs: Costs, budget: float) -> list[int]:
    """The steps that each stage takes, where the recipe's own length is a bound too."""
    decision = decide(costs, budget)
    return [min(decision.steps.get(stage.name, stage.full_steps), stage.full_steps) for stage in costs.trainings]


@given(all_costs(), st.floats(1.0, 1000.0))
def test_no_decision_costs_more_than_its_budget(costs: Costs, factor: float) -> None:
    budget = smallest_budget(costs) * factor
    decision = decide(costs, budget)
    assert decision.total <= budget * (1 - RESERVE) * (1 + 1e-8)
    assert decision == decide(costs, budget)


@given(all_costs(), st.floats(1.0, 200.0), st.floats(1.0, 200.0))
def test_a_larger_budget_gives_no_fewer_steps_or_questions(costs: Costs, one: float, other: float) -> None:
    small, large = (smallest_budget(costs) * factor for factor in sorted((one, other)))
    assert all(a <= b for a, b in zip(steps_of(costs, small), steps_of(costs, large), strict=True))
    limits = [decide(costs, budget).limit or 10**9 for budget in (small, large)]
    assert limits[0] <= limits[1]


@given(all_costs(), st.floats(0.01, 0.95))
def test_less_than_the_smallest_budget_is_refused_and_names_it(costs: Costs, factor: float) -> None:
    least = smallest_budget(costs)
    exact = sum(costs.fixed.values()) + costs.exam_seconds(costs.limit or 1)
    exact += sum(stage.seconds(stage.least_steps) for stage in costs.trainings)
    with pytest.raises(PlanError, match="The smallest useful budget is"):
        decide(costs, exact * factor)
    decide(costs, least)


@given(all_costs(), st.floats(1.0, 100.0))
def test_every_stage_gets_its_fewest_useful_steps(costs: Costs, factor: float) -> None:
    steps = steps_of(costs, smallest_budget(costs) * factor)
    assert all(got >= stage.least_steps for got, stage in zip(steps, costs.trainings, strict=True))


# By hand


def of(free: float) -> float:
    """The budget of which `free` seconds are left when 5 % are kept back and 30 s are for measuring."""
    return (free + 30) / (1 - RESERVE)


def test_what_fits_is_not_cut() -> None:
    costs = Costs((training(),), fixed={"prepare": 100.0})
    assert decide(costs, of(10_200)).steps == {}
    assert decide(costs, None).total == 10_100
    # 100 s are fixed, and a step of 10 s fits into the other 5,000 s 500 times.
    assert decide(costs, of(5_100)).steps == {"sft": 500}


def test_two_stages_share_as_their_full_lengths() -> None:
    costs = Costs((training(step=9.0), training("dpo", full_steps=100, step=10.0)))  # 9,000 s and 1,000 s
    assert decide(costs, of(5_000)).steps == {"sft": 500, "dpo": 50}
    # A tenth of 500 s would be 5 steps of DPO; it gets its ten, and SFT the other 400 s.
    assert decide(costs, of(500)).steps == {"sft": 44, "dpo": 10}


def test_exams_get_a_quarter_where_both_are_cut() -> None:
    exam = ExamCost(subjects=10, questions=10_000, prefix=0.0, question=1.0)
    costs = Costs((training(),), (exam,), ("eval-base", "eval-sft"))
    decision = decide(costs, of(8_000))
    assert decision.steps == {"sft": 600}  # three quarters of 8,000 s
    assert decision.limit == 100  # 2,000 s: two models, ten subjects, a hundred questions each
    assert EXAMS == 0.25
    small = ExamCost(subjects=10, questions=100, prefix=0.0, question=1.0)  # 200 s for both models: not cut
    decision = decide(Costs((training(),), (small,), ("eval-base", "eval-sft")), of(8_000))
    assert (decision.steps, decision.limit) == ({"sft": 780}, None)


def test_training_that_is_short_leaves_its_time_to_the_exams() -> None:
    exam = ExamCost(subjects=10, questions=10_000, prefix=0.0, question=1.0)
    decision = decide(Costs((training(full_steps=50),), (exam,), ("eval-base",)), of(4_500))
    assert (decision.steps, decision.limit) == ({}, 400)  # 500 s of training leave 4,000 s


def test_the_recipes_own_limit_stays() -> None:
    exam = ExamCost(subjects=10, questions=10_000, prefix=0.0, question=1.0)
    costs = Costs((training(),), (exam,), ("eval-base",), limit=200)  # 2,000 s
    decision = decide(costs, of(4_000))
    assert (decision.steps, decision.limit) == ({"sft": 200}, 200)


def test_data_that_nobody_counted_is_bounded_even_if_it_seems_to_fit() -> None:
    costs = Costs((training(counted=False),))
    assert decide(costs, of(20_000)).steps == {"sft": 2000}
    assert decide(costs, of(5_000)).steps == {"sft": 500}


def test_validation_checkpoints_and_reference_are_counted() -> None:
    stage = training(
        validation=7.0, eval_steps=100, checkpoint=2.0, every_steps=50, example=0.5, validation_share=0.01
    )
    # 250 steps: 2,500 s; 4,000 examples: 2,000 s; before, at 100, 200 and the end: 4 passes of 7 + 40 s;
    # after 50, 100, 150, 200, 250 and at the end: 6 checkpoints of 2 s.
    assert stage.seconds(250) == pytest.approx(2500 + 2000 + 4 * 47 + 6 * 2)
    assert stage.seconds(2000) - stage.seconds(1999) < 11 + 200  # examples are visited once
