"""Write the report of a run: `python -m mlx_zh.report RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

from mlx_zh.stages import command


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run from what its folder holds; returns the exit status. Raises MlxZhError."""
    parser = command.parser("report", "Write the report of a run: report.html, report.md and plots/*.png.")
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    import time

    from mlx_zh.errors import DataError
    from mlx_zh.language.reader import reader_language
    from mlx_zh.reporting.findings import gather
    from mlx_zh.reporting.markdown import markdown
    from mlx_zh.reporting.page import page
    from mlx_zh.reporting.plots import write_plots
    from mlx_zh.stages.budgeting import decided
    from mlx_zh.stages.current_models import current_models
    from mlx_zh.stages.run_folder import TUNED, RunFolder, told_when_stopped
    from mlx_zh.system import console
    from mlx_zh.system.redaction import redacted
    from mlx_zh.system.storage import write_text

    recipe = decided(recipe)
    run = RunFolder.of(recipe)
    if not run.path.is_dir():
        raise DataError(
            f"{run.path} does not exist: nothing has been run yet. Run `mlx-zh run {recipe.words}` first, then "
            "write the report."
        )
    with told_when_stopped():
        bootstrap = recipe.evaluate.bootstrap
        trains = [stage for stage in TUNED if recipe.data.split(stage).train]
        findings = gather(
            run,
            recipe.to_yaml(redacted),
            name=recipe.name,
            bootstrap=bootstrap,
            seed=recipe.seed,
            trains=trains,
            current=current_models(run),
        )
        written_at = time.strftime("%Y-%m-%d %H:%M")
        plots = write_plots(findings, run.plots)
        write_text(run.text, markdown(findings, written_at, [run.pattern(path) for path in plots]))
        write_text(run.page, page(findings, written_at))
    for alarm in findings.alarms:
        where, what = (getattr(text, reader_language()) for text in (alarm.where, alarm.what))
        console.warn(f"{where}: {what}")
    paths = [("page", str(run.page)), ("text", str(run.text)), ("plots", f"{run.plots}/")]
    console.say(console.table(paths))
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
