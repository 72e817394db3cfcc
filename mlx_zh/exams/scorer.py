"""Log-probs of letters or options. A subject is a tree: its prefix is computed once, its questions are branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.logprobs import Prefix, hidden_states, output_head, prefill, sum_by_owner, token_logprobs
from mlx_zh.core.packing import RowBuilder, plan_rows
from mlx_zh.exams.prompts import Ids, Letters, Prompt

Report = Callable[[int], None]  # called with the number of questions just scored


def letter_logprobs(
    model: nn.Module, prompts: Sequence[Prompt], *, micro_tokens: int, report: Report = lambda _: None
) -> npt.NDArray[np.float64]:
    """Log-probs (N, 4) of the four letters or options after each of N prompts, over the whole vocabulary.

    The prefix that all prompts share is computed once, `micro_tokens` at a time. The rest is packed into rows of up
    to `micro_tokens` tokens, and only the last position of each question is projected on the vocabulary. Prompts that
    were truncated have another prefix and form a group of their own. `report` gets the number of questions just
    scored.
    """
    scores = np.zeros((len(prompts), 4))
    for group in (
        [i for i, p in enumerate(prompts) if not p.truncated],
        [i for i, p in enumerate(prompts) if p.truncated],
    ):
        _score_group(model, prompts, group, scores, micro_tokens, report)
    return scores


def _score_group(
    model: nn.Module,
    prompts: Sequence[Prompt],
    group: list[int],
    scores: npt.NDArray[np.float64],
    micro_tokens: int,
    report: Report,
) -> None:
    if not group:
        return
    shared = common_prefix([prompts[i].tokens for i in group])
    prefix = prefill(model, prompts[group[0]].tokens[:shared], chunk=micro_tokens) if shared else None
    rest = [prompts[i].tokens[shared:] for i in group]
    sizes = [
        len(tokens) + sum(len(choice) - 1 for choice in prompts[i].letters)
        for tokens, i in zip(rest, group, strict=True)
    ]
    for row in plan_rows(sizes, micro_tokens):
        branches, before = [rest[k] for k in row], prefix
        if len(row) == 1 and len(branches[0]) > micro_tokens:  # a long question is computed in pieces, like a prefix
            before = prefill(model, branches[0][:-1], chunk=micro_tokens, prefix=prefix)
            branches = [branches[0][-1:]]
        chosen = [group[k] for k in row]
        scores[chosen] = _score_row(model, branches, [prompts[i].letters for i in chosen], before)
        report(len(row))


def _score_row(
    model: nn.Module, branches: Sequence[Ids], letters: Sequence[Letters], prefix: Prefix | None
) -> npt.NDArray[np.float32]:
    """Log-probs (N, 4) of a row of N questions; where a choice is several tokens, their log-probs are summed."""
    row = RowBuilder()
    owner = 0
    for tokens, choices in zip(branches, letters, strict=True):
        question = row.add(tokens)
        for choice in choices:
            row.score_token(question, choice[0], owner)
            if len(choice) > 1:
                branch = row.add(choice[:-1], parent=question)
                mask = np.ones(len(choice) - 1, dtype=bool)
                mask[0] = False  # the first token is scored above, after the question
                row.score(branch, mask, owner)
                row.score_token(branch, choice[-1], owner)
            owner += 1
    batch = row.build(owner)
    hidden = hidden_states(model, batch, prefix=prefix, grad=False, only_scored=True)
    logprobs = token_logprobs(hidden, output_head(model), batch.targets, grad=False)
    return np.array(sum_by_owner(logprobs, batch.owner, owner).reshape(-1, 4))  # (4N,) -> (N, 4)


def common_prefix(rows: Sequence[Ids]) -> int:
    """Length of the prefix that all rows share; at least one token of each row is left out of it."""
    length = min(len(row) for row in rows) - 1
    first = rows[0]
    for row in rows[1:]:
        different = np.flatnonzero(row[:length] != first[:length])
        length = int(different[0]) if different.size else length
    return length
