"""Compare two models on the same prompts: `python -m mlx_zh.arena RUN RUN --prompts FILE`."""

from __future__ import annotations

from mlx_zh.stages.judge_options import parsed_choosing, settings_of
from mlx_zh.system.arguments import Parser

_EPILOG = "Two stages of one run: `mlx-zh arena RUN RUN --stage sft,dpo --prompts FILE`."


def main(argv: list[str] | None = None) -> int:
    """Let two stages answer the same prompts and compare the answers; returns the exit status. Raises MlxZhError."""
    parser = Parser("mlx-zh arena", description="Compare two models on the same prompts.", epilog=_EPILOG)
    for name in ("first", "second"):
        parser.add_argument(name, metavar="RUN", help="a recipe file, or the name or folder of a run")
    parser.add_argument(
        "--prompts", metavar="FILE|SET", required=True, help="a file of prompts, or a set, as for `mlx-zh sample`"
    )
    parser.add_argument(
        "--stage", metavar="A[,B]", help="base, sft or dpo; two for two different ones (default: the newest of each)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=512, help="longest answer, in tokens (default 512)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parsed_choosing(parser, argv)
    if arguments.stage is not None and arguments.stage.count(",") > 1:
        parser.error(f"--stage takes one stage or two, got {arguments.stage!r}")

    from mlx_zh.stages.contest import Arena
    from mlx_zh.stages.judge_models import judge_of
    from mlx_zh.stages.run_folder import told_when_stopped
    from mlx_zh.stages.side import Asked, Side
    from mlx_zh.system.locks import locked

    stages = [None, None] if arguments.stage is None else (arguments.stage.split(",") * 2)[:2]
    first, second = (
        Side.of(name, stage) for name, stage in zip((arguments.first, arguments.second), stages, strict=True)
    )
    asked = Asked("arena", arguments.prompts, 1, ("--temperature", "0", "--max-tokens", str(arguments.max_tokens)))
    arena = Arena((first, second), asked)
    judge = judge_of(arguments, first.recipe) if arguments.by == "judge" else None
    settings = settings_of(arguments)
    with told_when_stopped(), locked(arena.folder.path, "arena") as lock:
        if status := arena.answer(lock):
            return status
        if judge is not None:
            arena.decided.by_judge(judge, arguments.parallel)
        elif arguments.by == "hand":
            arena.decided.by_hand()
        else:
            arena.decided.by_rules(settings)
        arena.finish()
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
