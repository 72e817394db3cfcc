"""Supervised fine-tuning: `python -m mlx_zh.sft RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh import stage

if TYPE_CHECKING:
    from mlx_zh.corpus.render import Rendered, Renderer
    from mlx_zh.recipe import Recipe, Sources
    from mlx_zh.samples import Samples
    from mlx_zh.session import Session
    from mlx_zh.training.sft_objective import SftObjective


def main(argv: list[str] | None = None) -> int:
    """Train an adapter on conversations."""
    parser = stage.parser("sft", "Tune a model on conversations.")
    parser.add_argument("--fresh", action="store_true", help="start over; an earlier run is kept beside the new one")
    arguments = parser.parse_intermixed_args(argv)
    recipe = stage.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh import console
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.errors import DataError
    from mlx_zh.models.lora import adapted_layers, add_adapter
    from mlx_zh.samples import Samples
    from mlx_zh.session import Session, adapter_spec, learning_key, set_aside

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
    if arguments.fresh and (aside := set_aside(session.folder)):
        console.say(f"The earlier run is kept in {aside}.")
    if session.check() is not None:
        console.say(f"{session.folder} is finished: nothing is left to train. To train again, add --fresh.")
        _conclude(recipe, session, Samples(recipe, renderer, loaded))
        return 0
    stage.write_run_files(recipe, loaded, digests)

    samples = Samples(recipe, renderer, loaded)
    samples.ask("base", again=arguments.fresh)
    add_adapter(loaded.model, spec, seed=recipe.seed)
    finished = session.train(training, validation)
    if finished.reason == "interrupted":
        return 130
    loaded.model.eval()
    samples.ask("sft")
    _conclude(recipe, session, samples)
    return 0


def _objective(recipe: Recipe, renderer: Renderer, sources: Sources) -> SftObjective:
    """The examples of some sources, rendered, and what became of their rows said aloud."""
    from collections import Counter
    from pathlib import Path

    from mlx_zh import console
    from mlx_zh.corpus.conversation import with_system
    from mlx_zh.corpus.formats import load_conversations
    from mlx_zh.errors import DataError
    from mlx_zh.training.objective import Settings
    from mlx_zh.training.sft_objective import SftObjective

    data, memory = recipe.data, recipe.memory
    examples: list[Rendered] = []
    for source in sources:
        conversations, report = load_conversations(
            Path(source.path), format=source.format, columns=source.columns, on_invalid=data.on_invalid
        )
        dropped: Counter[str] = Counter(report.dropped)
        rendered = renderer.conversations(
            [with_system(c, data.system) for c in conversations[: source.max_samples]],
            train_on=data.train_on,
            max_length=data.max_length,
            on_overflow=data.on_overflow,
            dropped=dropped,
        )
        kept = [example for example in rendered if example is not None]
        cut = sum(example.truncated for example in kept)
        examples += kept
        reasons = [f"{count} {reason}" for reason, count in dropped.items()] + ([f"{cut} cut short"] if cut else [])
        console.say(f"{source.path}: {len(kept)} examples" + (f" ({', '.join(reasons)})" if reasons else ""))
    if not examples:
        raise DataError(f"nothing is left to learn from in {', '.join(s.path for s in sources)}.")
    settings = Settings(
        seed=recipe.seed,
        micro_tokens=memory.micro_tokens,
        checkpoint=memory.checkpoint_layers,
        logit_rows=memory.logit_rows,
        dropout=recipe.lora.dropout,
        neftune_alpha=recipe.sft.neftune_alpha,
    )
    return SftObjective(examples, settings)


def _conclude(recipe: Recipe, session: Session, samples: Samples) -> None:
    import json

    from mlx_zh import console

    summary = json.loads((session.folder / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    console.say()
    if answers := samples.shown("base", "sft"):
        console.say(answers)
    if before is not None:
        console.say(f"\nvalidation loss {before:.3f} -> {after:.3f} (x {after / before:.2f})")
    console.say(f"trained {summary['steps']} steps in {console.duration(summary['seconds'])}\n")
    run = recipe.run_folder()
    places = [
        ("adapter", f"{session.folder / 'adapters'}/"),
        ("metrics", str(session.folder / "metrics.jsonl")),
        *([("answers", str(run / "samples.json"))] if answers else []),
        ("recipe as resolved", str(run / "recipe.yaml")),
    ]
    console.say(console.table(places))


if __name__ == "__main__":
    from mlx_zh.cli import entry

    entry(main)
