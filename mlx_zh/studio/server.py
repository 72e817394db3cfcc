"""Starts the studio: a free port on this machine alone, a secret address, and NiceGUI behind the guard."""

from __future__ import annotations

import logging
import os
import socket
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from mlx_zh.errors import StudioError
from mlx_zh.language.catalogue import Language
from mlx_zh.language.translation import in_readers_language
from mlx_zh.studio.projects import Projects, language_of
from mlx_zh.studio.safety import NONCE, Asking, Guard, new_token
from mlx_zh.studio.texts import said
from mlx_zh.system import console
from mlx_zh.system.interrupts import STOPS
from mlx_zh.system.storage import cache_folder

_HOST = "127.0.0.1"
_FIRST_PORT = 8765
_PORTS = 100  # that are tried


def serve(folders: Sequence[Path], *, port: int | None, browser: bool, language: Language | None) -> None:
    """Serve the studio for these folders until a signal ends it. Raises StudioError if the port cannot be had."""
    listening = _listen(port)
    port = listening.getsockname()[1]
    projects = Projects(folders, language)
    guard = guarded(projects, port, new_token())

    import uvicorn

    address = f"http://{_HOST}:{port}/?token={guard.token}"
    options: dict[str, Any] = {
        "log_config": None,
        "log_level": "critical",
        "access_log": False,
        "server_header": False,
    }
    config = uvicorn.Config(guard, ws="wsproto", proxy_headers=False, timeout_graceful_shutdown=1, **options)
    server = uvicorn.Server(config)
    # Not through the console, which hides tokens: this one must be shown, and is worth nothing after the end.
    print(in_readers_language(f"The studio is at {address}"), flush=True)
    console.say("Only this machine reaches it. Ctrl-C closes it; a run that it started goes on.")
    if browser:
        threading.Timer(0.3, _open, [address]).start()
    with suppress(*STOPS):
        server.run(sockets=[listening])


def guarded(projects: Projects, port: int, token: str) -> Guard:
    """The whole application: NiceGUI with the studio's pages, behind the guard."""
    # NiceGUI reads this when it is imported, and would otherwise keep its storage in the current folder.
    os.environ["NICEGUI_STORAGE_PATH"] = str(cache_folder() / "studio")
    os.environ.pop("NICEGUI_REDIS_URL", None)
    os.environ["MATPLOTLIB"] = "false"  # NiceGUI would import it, which takes seconds
    from fastapi import FastAPI
    from nicegui import core, ui

    from mlx_zh.studio import frame

    logging.getLogger("nicegui").disabled = True  # the page shows errors, and their tracebacks go to files
    _nonce_for_scripts()
    core.sio.eio.cors_allowed_origins = []  # no CORS headers: the guard checks the Origin
    frame.register(projects)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        app,
        title="mlx-zh",
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        favicon="🀄",
        reconnect_timeout=5.0,
    )

    def denied(asking: Asking) -> str:
        return _denied(language_of(asking.cookies, asking.languages, projects.language))

    return Guard(app, token, port, denied)


def _listen(port: int | None) -> socket.socket:
    """A socket on this machine's own address: at `port`, or at the first free one. Raises StudioError."""
    for number in [port] if port is not None else range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((_HOST, number))
            listening.listen(128)
        except OSError as error:
            listening.close()
            if port is not None:
                raise StudioError(
                    f"port {port} cannot be used: {error.strerror}. Give another one with --port, or leave it out."
                ) from None
            continue
        return listening
    raise StudioError(
        f"no port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} is free. Give another one with --port."
    )


def _open(address: str) -> None:
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(address)


def _nonce_for_scripts() -> None:
    """Let the scripts of NiceGUI's own page template run: each gets the nonce that the policy names."""
    from jinja2 import BaseLoader, FunctionLoader
    from nicegui.client import templates

    loader = templates.env.loader
    assert isinstance(loader, BaseLoader)

    def load(name: str) -> str:
        source, _, _ = loader.get_source(templates.env, name)
        return source.replace("<script", f"<script nonce=\"{{{{ request.scope['{NONCE}'] }}}}\"")

    if not isinstance(loader, FunctionLoader):
        templates.env.loader = FunctionLoader(load)


def _denied(language: Language) -> str:
    title = escape(said("This page needs the address with the token", language))
    text = escape(
        said("Open the address that `mlx-zh studio` printed in its terminal. Each start has a new one.", language)
    )
    return (
        f'<!doctype html><html lang="{language}"><meta charset="utf-8"><title>mlx-zh</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<body style="font:16px/1.6 system-ui;max-width:34em;margin:15vh auto;padding:0 1em">'
        f"<h1 style='font-size:1.3em'>{title}</h1><p>{text}</p>"
    )
