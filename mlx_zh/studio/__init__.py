"""The studio, a local page for runs: `python -m mlx_zh.studio [FOLDER …]`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mlx_zh.errors import RecipeError, StudioError
from mlx_zh.system.arguments import Parser, port
from mlx_zh.system.environment import pip_install


def main(argv: list[str] | None = None) -> int:
    """Serve the studio until Ctrl-C; returns the exit status. Raises MlxZhError."""
    parser = Parser(
        "mlx-zh studio",
        description="Show runs in the browser, on this machine only: watch, compare, start and talk.",
        epilog="Ctrl-C closes the studio. A run that it started goes on.",
    )
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="folders with recipes and runs; the current folder by default"
    )
    parser.add_argument("--port", type=port(1), help="the port; by default a free one, from 8765 on")
    parser.add_argument("--no-browser", action="store_true", help="print the address, and do not open the browser")
    parser.add_argument(
        "--language", choices=("en", "zh"), help="the language of the pages; by default the browser's"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if find_spec("nicegui") is None:
        raise StudioError(f"the studio needs NiceGUI, which is not installed. Run `{pip_install('nicegui>=3.18')}`.")

    from mlx_zh.studio.server import serve

    folders = [Path(folder).expanduser() for folder in arguments.folders or ["."]]
    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"{folder} is not a folder. Name folders that hold recipes or runs.")
    serve(folders, port=arguments.port, browser=not arguments.no_browser, language=arguments.language)
    return 0
