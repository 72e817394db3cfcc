"""Compare runs: `python -m mlx_zh.compare RUN RUN ... [--out FILE.html]`."""

from __future__ import annotations

from mlx_zh.system.arguments import Parser


def main(argv: list[str] | None = None) -> int:
    """Compare two runs or more: a summary, and a page that can be passed on. Returns the exit status.

    Raises MlxZhError.
    """
    parser = Parser("mlx-zh compare", description="Compare two runs or more: what differs, and what came of it.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a recipe file, or the name or folder of a run; two to six"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: compare-RUN-RUN.html in the folder of the runs)"
    )
    parser.add_argument(
        "--stage",
        choices=("base", "sft", "dpo", "fused"),
        help="compare this model in exams and answers (default: the newest of each run)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    overrides = [word for word in arguments.runs if word.startswith("runs=")]
    targets = [word for word in arguments.runs if word not in overrides]

    import time

    from mlx_zh.language.reader import reader_language
    from mlx_zh.reporting.compare_page import compare_page
    from mlx_zh.stages.compare_summary import summary
    from mlx_zh.stages.comparing import chosen_runs, compared, page_path
    from mlx_zh.system import console
    from mlx_zh.system.storage import write_text

    chosen = chosen_runs(targets, overrides)
    path = page_path(chosen, arguments.out)
    comparison = compared(chosen, arguments.stage)
    write_text(path, compare_page(comparison, time.strftime("%Y-%m-%d %H:%M")))
    for block in summary(comparison, reader_language()):
        console.say(f"{block}\n")
    console.say(f"  {path}")
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
