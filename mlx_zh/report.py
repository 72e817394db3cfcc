"""What a run gained: `python -m mlx_zh.report RECIPE [KEY=VALUE ...]` writes report.md, report.html and plots/."""

from __future__ import annotations

from mlx_zh.stages import command


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run from whatever its folder holds."""
    parser = command.parser("report", "Write a run's report: report.md, report.html and plots/*.png.")
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    import time

    from mlx_zh.errors import DataError
    from mlx_zh.reporting.findings import gather
    from mlx_zh.reporting.markdown import markdown
    from mlx_zh.reporting.page import page
    from mlx_zh.reporting.plots import write_plots
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.system import console
    from mlx_zh.system.storage import write_text

    run = RunFolder.of(recipe)
    if not run.path.is_dir():
        raise DataError(f"{run.path} is not there: nothing has been run yet that could be reported.")
    bootstrap = recipe.evaluate.bootstrap
    findings = gather(run, recipe.to_yaml(), name=recipe.name, bootstrap=bootstrap, seed=recipe.seed)
    made = time.strftime("%Y-%m-%d %H:%M")
    plots = write_plots(findings, run.plots)
    write_text(run.text, markdown(findings, made, [run.pattern(path) for path in plots]))
    write_text(run.page, page(findings, made))
    for alarm in findings.alarms:
        console.warn(f"{alarm.where.en}: {alarm.what.en}")
    places = [("page", str(run.page)), ("text", str(run.text)), ("plots", f"{run.plots}/")]
    console.say(console.table(places))
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
