"""Preference tuning: `python -m mlx_zh.dpo RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.stages import command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from mlx_zh.corpus.render import RenderedPair, Renderer
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.first_adapter import Start
    from mlx_zh.stages.tuning import Session
    from mlx_zh.training.loop import Finished


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on pairs of a better and a worse answer."""
    parser = command.parser("dpo", "Tune a model on preferences: better answers over worse ones.")
    command.add_fresh(parser)
    command.add_force(parser)
    launching.add_machines(parser)
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0
    if arguments.hosts or arguments.processes:
        return launching.launch("dpo", arguments, argv)

    from mlx_zh.distributed.world import joined

    with joined() as world, command.all_at_work(recipe, "dpo", world):
        return _tune(recipe, arguments, world)


def _tune(recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.errors import DataError
    from mlx_zh.stages import memory_check
    from mlx_zh.stages.data import file_digests, keep_report, prepare_stage
    from mlx_zh.stages.first_adapter import choose_start
    from mlx_zh.stages.sample_answers import Samples
    from mlx_zh.stages.tuning import report

    fresh = arguments.fresh or recipe.resume == "never"
    if not recipe.data.dpo.train:
        raise DataError(f"{arguments.recipe}: data.dpo.train names no file to learn from.")
    start = choose_start(recipe, world)
    memory_check.require(recipe, "dpo", force=arguments.force, fresh=fresh)
    loaded = command.open_model(recipe, world)
    renderer = Renderer(loaded.tokenizer, date_string=recipe.data.date_string)
    corpus = prepare_stage(recipe, "dpo", renderer)
    pairs, validation = corpus.pairs("train"), corpus.pairs("validation")
    files = file_digests(corpus)
    session = _session(recipe, loaded, renderer, start, files, world)
    samples = Samples(recipe, renderer, loaded)
    if not session.begin(fresh=fresh):
        if world.first:
            report(session, samples, ("base", "sft", "dpo"))
        return 0
    memory_check.require(recipe, "dpo", force=arguments.force, config=loaded.config, corpus=pairs)
    if world.first:
        command.write_run_files(recipe, loaded, files)
        keep_report(recipe, "dpo", corpus)
        samples.ask("base", again=False)
    finished = _train(session, loaded, start, pairs, validation)
    if finished.reason == "interrupted":
        return 130
    if world.first:
        loaded.model.eval()
        samples.ask("dpo")
        report(session, samples, ("base", "sft", "dpo"))
    return 0


def _session(
    recipe: Recipe, loaded: LoadedModel, renderer: Renderer, start: Start, files: dict[str, str], world: World
) -> Session:
    from mlx_zh.stages.run_key import learning_values
    from mlx_zh.stages.tuning import Session

    extra = {"base": loaded.fingerprint, "rendering": renderer.fingerprint, "files": files}
    values = learning_values(recipe, "dpo", extra | {"start": start.fingerprint})
    about = {"base": loaded.source, "base_fingerprint": loaded.fingerprint, "run": recipe.name, "stage": "dpo"}
    return Session(recipe, "dpo", recipe.dpo, loaded.model, start.spec(loaded), about, values, world)


def _train(
    session: Session,
    loaded: LoadedModel,
    start: Start,
    pairs: Sequence[RenderedPair],
    validation: Sequence[RenderedPair],
) -> Finished:
    """Put the adapter on, look up or compute the reference, and train."""
    from mlx_zh.core.logprobs import computes_in_float32
    from mlx_zh.models.adapters.files import load_adapter
    from mlx_zh.models.adapters.layers import add_adapter, trainable
    from mlx_zh.stages.reference_pass import find_reference
    from mlx_zh.stages.tuning import row_settings
    from mlx_zh.system import console
    from mlx_zh.training.dpo_objective import DpoObjective
    from mlx_zh.training.dpo_watch import DpoWatch

    recipe, section, spec, world = session.recipe, session.recipe.dpo, session.spec, session.world
    console.say(f"Starting from {start.described}.")
    # The reference is of the start weights, so it is settled before a checkpoint's are taken up.
    base_is_start = start.folder is None and spec.kind != "full"
    of_base = section.reference == "base" or base_is_start
    reference = find_reference(recipe, loaded, None, pairs, validation, world) if of_base else None
    if start.folder is None:
        add_adapter(loaded.model, spec, seed=recipe.seed)
    else:
        load_adapter(loaded.model, start.folder)
    if reference is None:
        reference = find_reference(recipe, loaded, (spec, trainable(loaded.model)), pairs, validation, world)

    # Without dropout, as in the reference: its noise would be taken for a difference between the two.
    settings = row_settings(recipe, section, dropout=0.0)
    objective = DpoObjective(pairs, reference.training, section, settings, world)
    checked = DpoObjective(validation, reference.validation, section, settings, world) if validation else None
    same = section.reference == "start" or (section.reference == "base" and base_is_start)
    watch = DpoWatch(
        section,
        starts_at_reference=same and section.neftune_alpha is None,
        float32=computes_in_float32(loaded.model),
    )
    return session.train(objective, checked, watch)


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
