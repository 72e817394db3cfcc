"""Prepare a recipe's data: `python -m mlx_zh.prepare RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.corpus.prepared import Corpus
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.corpus.selection import SelectionReport
    from mlx_zh.corpus.statistics import ExamCheck
    from mlx_zh.recipe import Recipe

_SHOWN = 3
_CUT = 40  # characters of a selected row's question and answer


def main(argv: list[str] | None = None) -> int:
    """Read, clean, mix and tokenize a recipe's data, unless that is done; returns the exit status.

    Raises MlxZhError.
    """
    parser = command.parser(
        "prepare", "Read, clean, mix and tokenize a recipe's data. Training does this too if it is needed."
    )
    recipe_argument = next(action for action in parser._actions if action.dest == "recipe")
    recipe_argument.nargs, recipe_argument.required = "?", False
    parser.add_argument("--list", action="store_true", help="list the data sets that a recipe can name, and stop")
    parser.add_argument(
        "--show", type=int, default=_SHOWN, metavar="N", help="number of rendered examples to show (default 3)"
    )
    command.add_dry_run(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list and arguments.recipe is None:
        _list(None)
        return 0
    if arguments.recipe is None:
        parser.error("a recipe is needed, or --list")
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0
    if arguments.list:
        _list(recipe)
        return 0

    from mlx_zh.errors import DataError
    from mlx_zh.stages import preflight
    from mlx_zh.stages.budgeting import settle
    from mlx_zh.stages.run_folder import RunFolder

    splits = {"sft": recipe.data.sft, "dpo": recipe.data.dpo}
    stages = [name for name, split in splits.items() if split.train]
    if not stages:
        raise DataError(
            f"{arguments.recipe}: neither data.sft.train nor data.dpo.train names a file to prepare. "
            "Add one to the recipe."
        )
    if arguments.dry_run:
        return command.dry_run(recipe, stages)
    with RunFolder.of(recipe).at_work("prepare"):
        preflight.check(recipe, stages)
        _prepare(settle(recipe, force=True), stages, arguments.show)
    return 0


def _prepare(recipe: Recipe, stages: list[str], show: int) -> None:
    from mlx_zh.stages.data import prepare_stage, save_report
    from mlx_zh.stages.rendering import renderer_of
    from mlx_zh.stages.tokenizer_cache import open_tokenizer
    from mlx_zh.system import console

    tokenizer = open_tokenizer(recipe.model)
    for name in stages:
        renderer = renderer_of(recipe, tokenizer)
        start = time.perf_counter()
        corpus = prepare_stage(recipe, name, renderer, lambda: tokenizer.vocabulary)
        seconds = time.perf_counter() - start
        _report(recipe, name, corpus, renderer, seconds)
        _show(corpus, renderer, show)
        path = save_report(recipe, name, corpus)
    console.say(f"The full report is in {path}.")


def _list(recipe: Recipe | None) -> None:
    from mlx_zh.stages.data import registry_of
    from mlx_zh.system import console

    for name, entry in registry_of(recipe).items():
        rows = f"{entry.rows:,} rows" if entry.rows else "number of rows: see its page"
        console.say(f"{name}  ({entry.kind}, {entry.hub}: {entry.id})")
        console.say(f"    {entry.note}")
        console.say(f"    {rows}; licence: {entry.licence}")


def _report(recipe: Recipe, name: str, corpus: Corpus, renderer: Renderer, seconds: float) -> None:
    """Print a summary of the data, and write the histogram of its lengths."""
    from mlx_zh.corpus.statistics import sparkline, write_histogram
    from mlx_zh.stages.data import training_tokens
    from mlx_zh.stages.rendering import is_default, thinking_text
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.system import console
    from mlx_zh.system.storage import written_whole

    report = corpus.manifest["report"]
    train, held_out, exams = report["train"], report["validation"], report["exam_questions"]
    planned = training_tokens(recipe, name, report)
    per_character, took = report["tokens_per_chinese_character"], console.duration(seconds)
    lines = [
        ("examples", f"{train['examples']:,} to learn from, {held_out['examples'] if held_out else 0:,} to validate"),
        ("length", f"median {train['median']}, 95 % below {train['p95']}, longest {train['longest']} tokens"),
        ("", f"|{sparkline(train['histogram']['counts'])}| 0 to {train['longest']}"),
        ("tokens", f"{train['tokens']:,}, of which {train['scored_tokens']:,} are learned"),
        ("training", f"about {planned['estimated_training_tokens']:,} tokens in {planned['epochs']:g} epochs"),
        ("over-long", f"{report['over_long']:,} rows ({report['over_long_share']:.1%}) dropped or cut short"),
        ("tokens per Chinese character", "no Chinese" if per_character is None else f"{per_character:.2f}"),
        ("exam questions", _exam_line(exams, len(report["exam_rows"]))),
        ("data", f"{corpus.folder} (found in {took})" if corpus.ready else f"{corpus.folder} (made in {took})"),
    ]
    console.say(console.table(lines))
    if renderer.thinking.way is not None or not is_default(recipe):
        console.say(thinking_text(recipe))
    if selection := report.get("selection"):
        _say_selection(selection)
    histogram = RunFolder.of(recipe).histogram(name)
    if not (corpus.ready and histogram.exists()):
        with written_whole(histogram) as file:
            write_histogram(corpus.splits["train"].lengths, file, f"{recipe.name}: {name}")


def _say_selection(selection: SelectionReport) -> None:
    """Print what was kept of each source, the scores, and a row from the top, the middle and the bottom."""
    from mlx_zh.corpus.statistics import sparkline
    from mlx_zh.stages.showing import visible
    from mlx_zh.system import console

    methods, kept = " + ".join(selection["methods"]), f"{selection['kept']:,}"
    if "model" in selection:
        console.say(
            f"Selected {kept} of {selection['candidates']:,} rows by {methods}, scored by {selection['model']}:"
        )
    else:
        console.say(f"Selected {kept} of {selection['candidates']:,} rows by {methods}:")
    console.say(console.table([(s["name"], f"{s['kept']:,} / {s['candidates']:,}") for s in selection["sources"]]))
    if selection["kept"] < selection["wanted"]:
        console.say(f"{selection['wanted']:,} rows were asked for, and no more can be selected.")
    for histogram in selection["histograms"]:
        low, high = histogram["edges"][0], histogram["edges"][-1]
        lines = [
            (histogram["score"], f"{low:g} to {high:g}"),
            ("all rows", f"|{sparkline(histogram['candidates'])}|"),
            ("selected", f"|{sparkline(histogram['kept'])}|"),
        ]
        console.say(console.table(lines))
    rows = []
    for place, shown in (("top", selection["top"]), ("middle", selection["middle"]), ("bottom", selection["bottom"])):
        for row in shown[:1]:
            score = "" if row["score"] is None else f"{row['score']:g}"
            texts = (" ".join(visible(row[side]).split())[:_CUT] for side in ("asked", "answered"))
            rows.append((place, score, row["row"], " → ".join(texts)))
    console.say(console.table(rows))


def _exam_line(exams: ExamCheck, dropped: int) -> str:
    if not exams["exams"] and not exams["missing"]:
        return "not looked for (data.decontaminate.benchmarks names no exam)"
    line = f"{dropped} rows dropped; looked for {exams.get('checked', 0):,} questions of {', '.join(exams['exams'])}"
    return line + (f"; NOT looked for: {', '.join(exams['missing'])}" if exams["missing"] else "")


def _show(corpus: Corpus, renderer: Renderer, count: int) -> None:
    """Print rendered examples, with what is learned in green; without colours it stands between ⟦ and ⟧."""
    from mlx_zh.corpus.rendered import Rendered, RenderedAnswer
    from mlx_zh.stages.showing import painted, rendered_segments
    from mlx_zh.system import console

    examples = corpus.splits["train"]
    size = len(examples)
    for number in sorted({round(i * (size - 1) / max(count - 1, 1)) for i in range(min(count, size))}):
        example = examples[number]
        console.say(f"\n--- example {number}")
        if isinstance(example, Rendered):
            console.say(painted(rendered_segments(example, renderer)))
        elif isinstance(example, RenderedAnswer):
            console.say(painted([(renderer.decode(example.prompt.tolist()), False)]))
            console.say(
                painted(
                    [
                        ("[good] " if example.label else "[bad] ", False),
                        (renderer.decode(example.response.tolist()), True),
                    ]
                )
            )
        else:
            console.say(painted([(renderer.decode(example.prompt.tolist()), False)]))
            for which in ("chosen", "rejected"):
                console.say(
                    painted([(f"[{which}] ", False), (renderer.decode(getattr(example, which).tolist()), True)])
                )


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
