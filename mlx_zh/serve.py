"""Serve the models of a run to other programs: `python -m mlx_zh.serve RECIPE|RUN|MODEL [--stage S] [--port N]`."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from mlx_zh.errors import RecipeError
from mlx_zh.system.arguments import Parser, add_target, count, number, port

if TYPE_CHECKING:
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.serving import RunningServer

KEY_VARIABLE = "MLX_ZH_SERVER_KEY"


def main(argv: list[str] | None = None) -> int:
    """Answer requests until Ctrl-C; returns the exit status. Raises MlxZhError."""
    arguments = _arguments(argv)

    from mlx_zh.stages.command import recipe_or_model

    recipe = recipe_or_model(arguments.target, arguments.overrides)
    with _open(arguments, recipe) as running, suppress(KeyboardInterrupt):
        _show(running, arguments.host)
        running.run()
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("mlx-zh serve", description="Serve the models of a run to other programs on this machine.")
    add_target(parser)
    parser.add_argument(
        "--stage",
        choices=("base", "sft", "dpo", "fused"),
        help="the model that answers where a request names none (default: dpo, else sft, else base)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=port(0), default=8080, help="the port to listen at; 0 is any that is free (default 8080)"
    )
    parser.add_argument(
        "--allowed-origins",
        metavar="ORIGIN,…",
        default="",
        help="web pages that may ask, beside those of this machine, for example https://chat.example.com",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="system prompt where a request has none (default: the recipe's)"
    )
    parser.add_argument(
        "--temp", type=number(0, 10), default=0.7, help="temperature where a request names none (default 0.7)"
    )
    parser.add_argument(
        "--top-p",
        type=number(0.01, 1),
        default=0.95,
        help="nucleus sampling where a request names none (default 0.95)",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=1024, help="longest answer where a request names none (default 1024)"
    )
    parser.add_argument("--max-context", type=count, help="longest conversation, in tokens (default: the model's)")
    parser.add_argument(
        "--hub",
        choices=("auto", "huggingface", "modelscope"),
        help="hub of the model (default: the recipe's, else auto: the one that answers)",
    )
    parser.add_argument("--verbose", action="store_true", help="print each request")
    return parser.parse_intermixed_args(argv)


def _open(arguments: argparse.Namespace, recipe: Recipe | None) -> RunningServer:
    """The server, which listens, with its model loaded."""
    from mlx_zh.models.generate import Sampling
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.stages.run_models import RunModels, fused_recipe
    from mlx_zh.stages.served_models import served
    from mlx_zh.stages.serving import RunningServer
    from mlx_zh.stages.serving_address import Address
    from mlx_zh.stages.talking import open_chatbot
    from mlx_zh.system import console, device

    if recipe is None and arguments.stage is not None:
        raise RecipeError(f"--stage is for a run or a recipe; {arguments.target} is a model")
    device.limit_cache()
    sampling = Sampling(arguments.temp, arguments.top_p, arguments.max_tokens)
    run, chosen, base = None, "", recipe
    if recipe is not None:
        run = RunFolder.of(recipe)
        RunModels(recipe, arguments.stage)  # says what is missing
        chosen = arguments.stage or run.newest_stage() or "base"
        base = fused_recipe(recipe) if chosen == "fused" else recipe
    console.say(f"Loading {base.model.path if base else arguments.target} …")
    bot = open_chatbot(
        base or arguments.target,
        hub=arguments.hub,
        max_context=arguments.max_context,
        sampling=sampling,
        progress=console.DownloadBar(),
        reading=console.say_reading,
    )
    if run is not None and chosen != "fused":
        bot.stages = run.adapters()
    name = recipe.name if recipe else os.path.basename(os.path.normpath(arguments.target))
    system = arguments.system if arguments.system is not None else recipe.system_message() if recipe else None
    origins = tuple(origin.strip().rstrip("/") for origin in arguments.allowed_origins.split(",") if origin.strip())
    address = Address(arguments.host, arguments.port, os.environ.get(KEY_VARIABLE, ""), origins)
    models = served(bot, f"{name}-fused" if chosen == "fused" else name, chosen, system)
    return RunningServer(models, address, log=arguments.verbose)


def _show(running: RunningServer, host: str) -> None:
    """Say where the server is, and how to ask it."""
    from mlx_zh.system import console

    address, names = running.address, running.names
    console.say(f"Models: {', '.join(names)} (the first one answers where a request names none)")
    console.say(f"Address for other programs (OpenAI-compatible): {address.url}")
    key = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if address.key else ""
    body = '{"messages": [{"role": "user", "content": "你好"}]}'
    console.say(f"  curl {address.url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if not address.is_local and not address.key:
        console.warn(
            f"everyone who reaches this machine at {host} can ask the model. Set a key in the environment variable "
            f"{KEY_VARIABLE}, which clients then send."
        )
    console.say("Ctrl-C stops the server.")


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
