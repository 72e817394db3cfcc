"""The data of KTO: labelled answers, each with the response of another row, and whether both kinds count the same."""

from __future__ import annotations

import numpy as np

from mlx_zh.core.losses import UNPAIRED
from mlx_zh.corpus.prepared import Corpus
from mlx_zh.errors import DataError
from mlx_zh.language.notice import Notice
from mlx_zh.recipe import Dpo, Recipe
from mlx_zh.system import console
from mlx_zh.training.mismatched import MismatchedAnswers, other_rows

_LEAST, _MOST = (
    1.0,
    4 / 3,
)  # of desirable to undesirable answers, each times its weight (arXiv:2402.01306, equation 8)


def with_other_answers(recipe: Recipe, corpus: Corpus, split: str) -> MismatchedAnswers:
    """The labelled answers of a split, each with the response of another row if the loss has a KL term.

    Raises DataError if all training prompts are the same.
    """
    answers = corpus.answers(split)
    others = None
    if UNPAIRED[recipe.dpo.loss].kl and len(answers):
        try:
            others = other_rows(answers, recipe.seed)
        except DataError:
            if split == "train":
                raise
            others = np.roll(np.arange(len(answers)), 1)  # a validation set may be about one prompt
    return MismatchedAnswers(answers, others, recipe.data.max_length)


def warn_unbalanced(section: Dpo, corpus: Corpus) -> None:
    """Warn if good and bad answers, times their weights, are far from balanced."""
    labels = corpus.answers("train").labels
    good = int(labels.sum())
    notice = imbalance(section, good, len(labels) - good)
    if notice is not None:
        console.warn(notice)


def imbalance(section: Dpo, good: int, bad: int) -> Notice | None:
    """What to say about a training set with these numbers of answers; None if it is balanced."""
    if not good or not bad:
        return Notice("kto-one-kind", good=good, bad=bad)
    desirable, undesirable = section.desirable_weight * good, section.undesirable_weight * bad
    if _LEAST * undesirable - 1e-9 <= desirable <= _MOST * undesirable + 1e-9:
        return None
    if not desirable or not undesirable:  # a kind that the user has turned off
        return None
    if desirable < undesirable:
        change = f"dpo.desirable_weight={undesirable / good:.3g}"
    else:
        change = f"dpo.undesirable_weight={desirable / bad:.3g}"
    return Notice("kto-unbalanced", good=good, bad=bad, change=change)
