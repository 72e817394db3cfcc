"""Stop and resume a run, for the pages that show one."""

from __future__ import annotations

from nicegui import run as background
from nicegui import ui

from mlx_zh.errors import MlxZhError, StudioError
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_list import RunInfo
from mlx_zh.studio import processes
from mlx_zh.studio.projects import Studio


class RunControls:
    """Two buttons, of which the one that fits the run's state is shown."""

    def __init__(self, studio: Studio, info: RunInfo) -> None:
        self._studio, self._run = studio, RunFolder(info.path)
        with ui.element("div").classes("z-row"):
            self._stop = ui.button(studio.say("Stop"), icon="stop", on_click=self._ask_to_stop)
            self._stop.props("outline no-caps dense")
            self._resume = ui.button(studio.say("Resume"), icon="play_arrow", on_click=self._go_on)
            self._resume.props("unelevated no-caps dense")
            self._note = ui.label("").classes("z-note")
        self.show(info)

    def show(self, info: RunInfo) -> None:
        """Show what can be done in the run's state."""
        studio = self._studio
        now = processes.running(self._run) if info.state == "running" else None
        stopping = now is not None and now.stopping
        self._stop.set_visibility(now is not None and not stopping)
        self._resume.set_visibility(info.state in ("stopped", "failed") and self._command() is not None)
        if stopping:
            self._note.text = studio.say("It finishes its step, saves, and stops.")
        elif now is None:
            self._note.text = ""

    def _command(self) -> processes.Command | None:
        folders = [folder for folder in self._studio.folders if self._run.path.is_relative_to(folder)]
        project = max(folders, key=lambda folder: len(folder.parts), default=None)
        return None if project is None else processes.resume_command(self._run, project)

    async def _ask_to_stop(self) -> None:
        self._stop.set_visibility(False)
        self._note.text = self._studio.say("It finishes its step, saves, and stops.")
        try:
            await background.io_bound(processes.stop, self._run)
        except MlxZhError as error:
            self._note.text = self._studio.error(error)

    async def _go_on(self) -> None:
        self._resume.set_visibility(False)
        try:
            command = self._command()
            if command is None:
                raise StudioError(
                    "nothing tells how this run was begun; resume it in a terminal: `mlx-zh run RECIPE`."
                )
            language: dict[str, str] = {"MLX_ZH_LANG": self._studio.language}
            await background.io_bound(processes.start, self._run, command, language)
            self._note.text = self._studio.say("It goes on from what it saved.")
        except MlxZhError as error:
            self._note.text = self._studio.error(error)
