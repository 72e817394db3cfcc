"""Draw several answers of a model of a run to each of many prompts.

`python -m mlx_zh.sample RECIPE --prompts FILE|SET [--n 4] [--stage S] [KEY=VALUE ...]`
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.stages import command
from mlx_zh.system.arguments import count, number

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.sampling import Drawing


def main(argv: list[str] | None = None) -> int:
    """Draw the answers and print how many there are; returns the exit status. Raises MlxZhError."""
    arguments = _arguments(argv)
    return command.on_ranks("sample", arguments, argv, lambda recipe, world: _sample(recipe, arguments, world))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser("sample", "Draw several answers of a model to each of many prompts.")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE|SET",
        help="a file of prompts, or a set of the recipe: train, validation or evaluate",
    )
    parser.add_argument(
        "--stage", choices=("base", "sft", "dpo"), help="the model that answers (default: dpo, else sft, else base)"
    )
    parser.add_argument("--n", type=count, default=4, metavar="N", help="answers to each prompt (default 4)")
    parser.add_argument("--limit", type=count, metavar="N", help="use only the first prompts (default: all)")
    parser.add_argument(
        "--temperature", type=number(0, 10), default=0.8, metavar="T", help="0 is greedy (default 0.8)"
    )
    parser.add_argument(
        "--top-p",
        type=number(0.01, 1),
        default=0.95,
        metavar="P",
        help="nucleus sampling; 1 turns it off (default 0.95)",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=512, metavar="N", help="longest answer, in tokens (default 512)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the answers (default: the recipe's)")
    parser.add_argument(
        "--label", type=_label, metavar="NAME", help="name of the folder of the answers (default: STAGE-PROMPTS)"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="answers generated together (default: by the free memory)"
    )
    launching.add_machines(parser)
    return parser.parse_intermixed_args(argv)


def _sample(recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.models.generate import Sampling
    from mlx_zh.stages import same_everywhere
    from mlx_zh.stages.prompt_sets import prompt_set
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.stages.run_models import RunModels
    from mlx_zh.stages.sampling import Drawing, Request

    run = RunFolder.of(recipe)
    stage = world.broadcast_result(lambda: arguments.stage or run.newest_stage() or "base")
    request = Request(
        stage=stage,
        label=arguments.label or f"{stage}-{_name_of(arguments.prompts)}",
        count=arguments.n,
        sampling=Sampling(arguments.temperature, arguments.top_p, arguments.max_tokens),
        seed=recipe.seed if arguments.seed is None else arguments.seed,
        batch_size=arguments.batch_size,
    )
    same_everywhere.require(world, recipe, "sample", {"--stage": stage, "--label": request.label})
    with run.all_at_work("sample", world):
        prompts = world.each(lambda: prompt_set(recipe, arguments.prompts, arguments.limit))
        drawing = Drawing(recipe, request, prompts, RunModels(recipe, stage, world), world)
        drawing.run()
    if world.first:
        _conclude(drawing)
    return 0


def _label(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(
            f"expected a name of letters, digits, '-', '_' and '.', beginning with a letter or digit, got {text!r}"
        )
    return text


def _name_of(prompts: str) -> str:
    """A part of a folder's name that tells a file or set of prompts."""
    name = prompts.replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem = name.rpartition(".")[0] or name if "." in name and not name.endswith((".train", ".validation")) else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:60].strip("-.") or "prompts"


def _conclude(drawing: Drawing) -> None:
    from mlx_zh.language.translation import in_readers_language
    from mlx_zh.system import console

    if drawing.answers:
        speed = drawing.tokens / max(drawing.seconds, 1e-9)
        console.say(
            f"{drawing.answers:,} answers of {drawing.tokens:,} tokens, {speed:.0f} tokens/s; "
            f"{drawing.cut_off:,} were cut off by --max-tokens."
        )
    left_out = ", ".join(f"{count:,} {in_readers_language(reason)}" for reason, count in drawing.left_out.items())
    if left_out:
        console.say(f"Rows left out: {left_out}.")
    console.say(f"The answers are in {drawing.path}.")


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
