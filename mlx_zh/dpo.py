"""Preference tuning: `python -m mlx_zh.dpo RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.corpus.examples import AnySplit
    from mlx_zh.corpus.prepared import Corpus
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.first_adapter import Start
    from mlx_zh.stages.tuning import Objectives, Session


class Dpo:
    """What DPO does differently from SFT: the `Method` of `stages.tuning`."""

    stage = "dpo"
    answers: tuple[str, ...] = ("base", "sft", "dpo")

    def start(self, recipe: Recipe, world: World) -> Start:
        """The recipe's `dpo.start`: the base, SFT's adapter or another one."""
        from mlx_zh.stages.first_adapter import choose_start

        return choose_start(recipe, self.stage, world)

    def examples(self, corpus: Corpus, split: str) -> AnySplit:
        """The pairs, or for KTO the labelled answers, of `split` (train or validation)."""
        return corpus.splits[split]

    def objectives(self, session: Session, loaded: LoadedModel, start: Start, corpus: Corpus) -> Objectives:
        """Add the adapter; the objectives are a preference loss over policy and reference log-probs."""
        from mlx_zh.core.logprobs import computes_in_float32
        from mlx_zh.stages.labelled_answers import warn_unbalanced, with_other_answers
        from mlx_zh.stages.reference_pass import attach_with_reference
        from mlx_zh.stages.tuning import Objectives, row_settings
        from mlx_zh.training.dpo_objective import DpoObjective
        from mlx_zh.training.dpo_watch import DpoWatch
        from mlx_zh.training.kto_objective import KtoObjective

        recipe, section, world = session.recipe, session.recipe.dpo, session.world
        if section.unpaired and world.first:
            warn_unbalanced(section, corpus)
        pairs, held_out = (
            with_other_answers(recipe, corpus, split) if section.unpaired else corpus.pairs(split)
            for split in ("train", "validation")
        )
        reference = attach_with_reference(recipe, loaded, start, session.spec, pairs, held_out, world)
        # No dropout: its noise would look like a difference between policy and reference.
        settings = row_settings(recipe, section, dropout=0.0)
        at_reference = reference.is_start and section.neftune_alpha is None
        make: Any = KtoObjective if section.unpaired else DpoObjective
        return Objectives(
            make(pairs, reference.training, section, settings, world),
            make(held_out, reference.validation, section, settings, world) if held_out else None,
            DpoWatch(section, starts_at_reference=at_reference, float32=computes_in_float32(loaded.model)),
        )


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on pairs of answers, or on labelled ones; returns the exit status. Raises MlxZhError."""
    purpose = "Fine-tune a model on preferences: pairs of a better and a worse answer, or good and bad answers (KTO)."
    return command.train(Dpo(), purpose, argv)


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
