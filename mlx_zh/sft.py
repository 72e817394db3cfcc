"""Supervised fine-tuning: `python -m mlx_zh.sft RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh import stage

if TYPE_CHECKING:
    from collections import Counter

    from mlx_zh.corpus.render import Rendered, Renderer
    from mlx_zh.recipe import Recipe, Source, Sources
    from mlx_zh.training.sft_objective import SftObjective


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on conversations."""
    parser = stage.parser("sft", "Tune a model on conversations.")
    stage.add_fresh(parser)
    arguments = parser.parse_intermixed_args(argv)
    recipe = stage.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.corpus.render import Renderer
    from mlx_zh.errors import DataError
    from mlx_zh.models.lora import adapted_layers, add_adapter
    from mlx_zh.samples import Samples
    from mlx_zh.session import Session, adapter_spec, learning_key, report

    if not recipe.data.sft.train:
        raise DataError(f"{arguments.recipe}: data.sft.train names no file to learn from.")
    loaded = stage.open_model(recipe)
    renderer = Renderer(loaded.tokenizer, date_string=recipe.data.date_string)
    training = _objective(recipe, renderer, recipe.data.sft.train)
    validation = _objective(recipe, renderer, recipe.data.sft.validation) if recipe.data.sft.validation else None

    files = [source.path for source in (*recipe.data.sft.train, *recipe.data.sft.validation)]
    digests = stage.fingerprint_files(files)
    spec = adapter_spec(recipe.lora, len(loaded.model.layers))
    adapted_layers(loaded.model, spec)  # raises before anything is written
    extra = {"base": loaded.fingerprint, "rendering": renderer.fingerprint, "files": digests}
    key, values = learning_key(recipe, "sft", extra)
    about = {"base": loaded.source, "base_fingerprint": loaded.fingerprint, "run": recipe.name, "stage": "sft"}
    session = Session(recipe, "sft", recipe.sft, loaded.model, spec, about, key, values)
    samples = Samples(recipe, renderer, loaded)
    if not session.begin(fresh=arguments.fresh):
        report(session, samples, ("base", "sft"))
        return 0
    stage.write_run_files(recipe, loaded, digests)

    samples.ask("base", again=arguments.fresh)
    add_adapter(loaded.model, spec, seed=recipe.seed)
    finished = session.train(training, validation)
    if finished.reason == "interrupted":
        return 130
    loaded.model.eval()
    samples.ask("sft")
    report(session, samples, ("base", "sft"))
    return 0


def _objective(recipe: Recipe, renderer: Renderer, sources: Sources) -> SftObjective:
    """The examples of some sources, rendered."""
    from pathlib import Path

    from mlx_zh.corpus.conversation import with_system
    from mlx_zh.corpus.formats import load_conversations
    from mlx_zh.session import row_settings
    from mlx_zh.training.sft_objective import SftObjective

    data = recipe.data

    def read(source: Source, counted: Counter[str]) -> list[Rendered | None]:
        found, report = load_conversations(
            Path(source.path), format=source.format, columns=source.columns, on_invalid=data.on_invalid
        )
        counted.update(report.dropped)
        rendered = renderer.conversations(
            [with_system(c, data.system) for c in found[: source.max_samples]],
            train_on=data.train_on,
            max_length=data.max_length,
            on_overflow=data.on_overflow,
            dropped=counted,
        )
        counted["cut short"] += sum(example.truncated for example in rendered if example is not None)
        return rendered

    examples = stage.gather(sources, read, "examples")
    return SftObjective(examples, row_settings(recipe, recipe.sft, dropout=recipe.lora.dropout))


if __name__ == "__main__":
    from mlx_zh.cli import entry

    entry(main)
