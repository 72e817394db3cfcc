"""Chat with a model, before or after tuning: `python -m mlx_zh.chat RECIPE|RUN|MODEL`."""

from __future__ import annotations

import argparse
import sys
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.system.arguments import Parser, add_target, count, number

if TYPE_CHECKING:
    from mlx_zh.chatting.chatbot import Chatbot
    from mlx_zh.chatting.terminal import Screen
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.run_folder import RunFolder

_EPILOG = (
    "One answer: `mlx-zh chat MODEL --prompt 你好`, or piped: `echo 你好 | mlx-zh chat MODEL`. Standard output gets "
    "the answer and nothing else; of a run, standard error says which of its models answers."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 if it is invalid."""
    parser = Parser("mlx-zh chat", description=__doc__, epilog=_EPILOG)
    add_target(parser)
    parser.add_argument(
        "--adapter", metavar="NAME", help="sft, dpo, a folder, or none (default: the run's DPO adapter, else SFT's)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one question, and exit")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the recipe's)")
    parser.add_argument("--temp", type=number(0, 10), default=0.7, help="temperature; 0 is greedy (default 0.7)")
    parser.add_argument(
        "--top-p", type=number(0.01, 1), default=0.95, help="nucleus sampling; 1 turns it off (default 0.95)"
    )
    parser.add_argument("--max-tokens", type=count, default=1024, help="longest answer, in tokens (default 1024)")
    parser.add_argument("--max-context", type=count, help="longest conversation, in tokens (default: the model's)")
    parser.add_argument("--seed", type=_seed, help="seed that makes sampling reproducible")
    parser.add_argument(
        "--feedback",
        metavar="FILE",
        help="file of what /good, /bad, /better and /edit record (default: feedback.jsonl of the run)",
    )
    parser.add_argument(
        "--hub",
        choices=("auto", "huggingface", "modelscope"),
        help="hub of the model (default: the recipe's, else auto: the one that answers)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="with piped input: print progress and statistics on stderr"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Chat at a terminal, or answer piped input; returns the exit status. Raises MlxZhError."""
    arguments = parse(argv)
    piped = arguments.prompt is None and not sys.stdin.isatty()
    once = piped or arguments.prompt is not None

    from mlx_zh.chatting.piped import answer_once, prompt_in, read_prompt
    from mlx_zh.chatting.terminal import LineEditor, Screen
    from mlx_zh.chatting.transcript import Transcript
    from mlx_zh.stages.command import recipe_or_model

    text = read_prompt() if piped else prompt_in(arguments.prompt) if once else ""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a terminal that cannot show 你 must not end the chat
    screen = Screen.on(sys.stderr if once else sys.stdout)
    quiet = once and not arguments.verbose
    recipe = recipe_or_model(arguments.target, arguments.overrides)
    run = _run(recipe)
    bot = _open(arguments, recipe, run, screen, quiet)
    system = recipe.system_message() if recipe else None
    transcript = Transcript(arguments.system if arguments.system is not None else system)
    if once:
        transcript.ask(text)
        return answer_once(bot, transcript, None if quiet else screen)

    from mlx_zh.chatting.commands import COMMANDS
    from mlx_zh.chatting.repl import Repl
    from mlx_zh.system import storage

    feedback = Path(expanduser(arguments.feedback)) if arguments.feedback else run.feedback if run else None
    screen.note("/help 帮助 · Ctrl-C 中止回答 stops an answer · Ctrl-D 退出 leaves")
    editor = LineEditor(storage.cache_folder() / "chat-history", sorted(COMMANDS), list(bot.stages))
    Repl(bot, screen, editor.read, transcript, editor.ask, feedback).run()
    return 0


def _open(
    arguments: argparse.Namespace, recipe: Recipe | None, run: RunFolder | None, screen: Screen, quiet: bool
) -> Chatbot:
    """Load the model with its adapter, and say which model answers."""
    from mlx_zh.models.generate import Sampling
    from mlx_zh.stages.talking import open_chatbot
    from mlx_zh.system import blas, console

    if not quiet:
        screen.progress(f"loading {recipe.model.path if recipe else arguments.target} …")
    try:
        bot = open_chatbot(
            recipe or arguments.target,
            hub=arguments.hub,
            max_context=arguments.max_context,
            sampling=Sampling(arguments.temp, arguments.top_p, arguments.max_tokens),
            seed=arguments.seed,
            progress=console.DownloadBar(),
            reading=console.say_reading,
        )
        bot.stages = run.adapters() if run else {}
        newest = run.newest_adapter() if run else None
        bot.swap(bot.named(arguments.adapter) if arguments.adapter else newest)
    finally:
        if not quiet:
            screen.done()
    name = bot.name_of(bot.adapter)
    place = f" ({bot.adapter})" if name in bot.stages else ""
    if not quiet:
        screen.note(f"model: {bot.loaded.source} · adapter: {name}{place} · context: {bot.context} tokens")
        if warning := blas.blas_warning():
            screen.note(warning)
    elif run:
        screen.note(f"model: {bot.loaded.source} · adapter: {name}{place}")
    if run and not bot.stages and not arguments.adapter:
        screen.note(
            f"还没有训练好的适配器，由基座模型回答 · {run.path} has no adapter yet, so the base model answers"
        )
    return bot


def _run(recipe: Recipe | None) -> RunFolder | None:
    from mlx_zh.stages.run_folder import RunFolder

    return RunFolder.of(recipe) if recipe else None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
