"""Supervised fine-tuning: `python -m mlx_zh.sft RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.corpus.examples import Conversations
    from mlx_zh.corpus.prepared import Corpus
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.first_adapter import Start
    from mlx_zh.stages.tuning import Objectives, Session


class Sft:
    """What SFT does differently from DPO: the `Method` of `stages.tuning`."""

    stage = "sft"
    answers: tuple[str, ...] = ("base", "sft")

    def start(self, recipe: Recipe, world: World) -> Start:
        """The recipe's `sft.start`: the base or an adapter."""
        from mlx_zh.stages.first_adapter import choose_start

        return choose_start(recipe, self.stage, world)

    def examples(self, corpus: Corpus, split: str) -> Conversations:
        """The conversations of `split` (train or validation)."""
        return corpus.conversations(split)

    def objectives(self, session: Session, loaded: LoadedModel, start: Start, corpus: Corpus) -> Objectives:
        """Add the adapter; the objectives are the cross-entropy of the trained tokens."""
        from mlx_zh.stages.tuning import Objectives, row_settings
        from mlx_zh.system import console
        from mlx_zh.training.sft_objective import SftObjective

        recipe, world = session.recipe, session.world
        if start.folder is not None:
            console.say(f"Starting from {start.described}.")
        start.attach(loaded, session.spec)
        settings = row_settings(recipe, recipe.sft, dropout=recipe.lora.dropout)
        held_out = self.examples(corpus, "validation")
        return Objectives(
            SftObjective(self.examples(corpus, "train"), settings, world),
            SftObjective(held_out, settings, world) if held_out else None,
        )


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on conversations; returns the exit status. Raises MlxZhError."""
    return command.train(Sft(), "Fine-tune a model on conversations.", argv)


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
