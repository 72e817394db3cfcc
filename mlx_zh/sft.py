"""Supervised fine-tuning: `python -m mlx_zh.sft RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.stages import command

if TYPE_CHECKING:
    import argparse

    from mlx_zh.distributed.world import World
    from mlx_zh.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on conversations."""
    parser = command.parser("sft", "Tune a model on conversations.")
    command.add_fresh(parser)
    command.add_force(parser)
    launching.add_machines(parser)
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0
    if arguments.hosts or arguments.processes:
        return launching.launch("sft", arguments, argv)

    from mlx_zh.distributed.world import joined

    with joined() as world, command.all_at_work(recipe, "sft", world):
        return _tune(recipe, arguments, world)


def _tune(recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.errors import DataError
    from mlx_zh.models.adapters.layers import adapted_layers, add_adapter
    from mlx_zh.stages import memory_check
    from mlx_zh.stages.data import file_digests, keep_report, prepare_stage
    from mlx_zh.stages.run_key import learning_values
    from mlx_zh.stages.sample_answers import Samples
    from mlx_zh.stages.tuning import Session, adapter_spec, report, row_settings
    from mlx_zh.training.sft_objective import SftObjective

    fresh = arguments.fresh or recipe.resume == "never"
    if not recipe.data.sft.train:
        raise DataError(f"{arguments.recipe}: data.sft.train names no file to learn from.")
    memory_check.require(recipe, "sft", force=arguments.force, fresh=fresh)
    loaded = command.open_model(recipe, world)
    renderer = Renderer(loaded.tokenizer, date_string=recipe.data.date_string)
    corpus = prepare_stage(recipe, "sft", renderer)
    settings = row_settings(recipe, recipe.sft, dropout=recipe.lora.dropout)
    training = SftObjective(corpus.conversations("train"), settings, world)
    held = corpus.conversations("validation")
    validation = SftObjective(held, settings, world) if held else None

    digests = file_digests(corpus)
    spec = adapter_spec(recipe.lora, len(loaded.model.layers))
    adapted_layers(loaded.model, spec)  # raises before anything is written
    extra = {"base": loaded.fingerprint, "rendering": renderer.fingerprint, "files": digests}
    values = learning_values(recipe, "sft", extra)
    about = {"base": loaded.source, "base_fingerprint": loaded.fingerprint, "run": recipe.name, "stage": "sft"}
    session = Session(recipe, "sft", recipe.sft, loaded.model, spec, about, values, world)
    samples = Samples(recipe, renderer, loaded)
    if not session.begin(fresh=fresh):
        if world.first:
            report(session, samples, ("base", "sft"))
        return 0
    examples = corpus.conversations("train")
    memory_check.require(recipe, "sft", force=arguments.force, config=loaded.config, corpus=examples)
    if world.first:
        command.write_run_files(recipe, loaded, digests)
        keep_report(recipe, "sft", corpus)
        samples.ask("base", again=fresh)
    add_adapter(loaded.model, spec, seed=recipe.seed)
    finished = session.train(training, validation)
    if finished.reason == "interrupted":
        return 130
    if world.first:
        loaded.model.eval()
        samples.ask("sft")
        report(session, samples, ("base", "sft"))
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
