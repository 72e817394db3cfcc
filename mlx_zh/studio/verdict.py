"""What a run will take, beside its form: memory, time, downloads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nicegui import ui

from mlx_zh.language.translation import label
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.texts import worded

_STEPS = {
    "measure": worded("Measuring the speed"),
    "prepare": worded("Preparing the data"),
    "eval-base": worded("Exam before training"),
    "sft": worded("SFT"),
    "eval-sft": worded("Exam after SFT"),
    "dpo": worded("DPO"),
    "eval-dpo": worded("Exam after DPO"),
    "rounds": worded("Rounds"),
    "fuse": worded("Writing the model"),
    "report": worded("Writing the report"),
}


class VerdictView:
    """Memory and time of the draft; `use` is awaited with memory settings that fit when the user takes them."""

    def __init__(self, studio: Studio, use: Callable[[Mapping[str, Any]], Awaitable[None]]) -> None:
        self._studio, self._use = studio, use
        with ui.element("div").classes("z-card z-step"):
            with ui.element("div").classes("z-row"):
                ui.label(studio.say("What it will take")).classes("z-step-title z-grow")
                self._spinner = ui.spinner(size="18px")
            self._memory = ui.element("div").classes("z-step")
            self._time = ui.element("div").classes("z-step")
        self.show_nothing()

    def wait(self) -> None:
        """Show that a forecast is on its way."""
        self._spinner.set_visibility(True)

    def done(self) -> None:
        """Show that no forecast is on its way any more."""
        self._spinner.set_visibility(False)

    def wait_for_time(self) -> None:
        """Show that the time follows; where it is measured, that takes some seconds."""
        self._time.clear()
        with self._time:
            ui.label(self._studio.say("Estimating the time …")).classes("z-note")

    def show_nothing(self) -> None:
        """Show that there is no forecast."""
        self._spinner.set_visibility(False)
        self._memory.clear()
        self._time.clear()
        with self._memory:
            ui.label(self._studio.say("The forecast appears here.")).classes("z-note")

    def show_error(self, text: str) -> None:
        """Show why there is no forecast of the time."""
        self._spinner.set_visibility(False)
        self._time.clear()
        with self._time:
            ui.label(text).classes("z-finding")

    def show_memory(self, memory: Mapping[str, Any]) -> None:
        """Show whether each stage fits."""
        studio = self._studio
        self._memory.clear()
        with self._memory:
            if not memory["stages"]:
                ui.label(studio.say("The memory is known once the model is on this machine.")).classes("z-note")
            for verdict in memory["stages"]:
                self._draw_stage(verdict, memory)
            self._draw_downloads(memory)

    def _draw_stage(self, verdict: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
        studio = self._studio
        peak, budget = verdict["peak"] / 1e9, memory["budget"] / 1e9
        with ui.element("div"):
            with ui.element("div").classes("z-row"):
                ui.label(studio.say("Memory, {stage}", stage=verdict["stage"].upper())).classes("z-note z-grow")
                name = studio.say("fits") if verdict["fits"] else studio.say("does not fit")
                ui.label(name).classes("z-fits" if verdict["fits"] else "z-too-large")
            with ui.element("div").classes("z-bar" if verdict["fits"] else "z-bar z-bar-over"):
                ui.element("div").style(f"width: {min(100 * peak / max(budget, 1e-9), 100):.0f}%")
            ui.label(studio.say("{peak:.1f} GB of {budget:.1f} GB", peak=peak, budget=budget)).classes("z-note")
        if not verdict["fits"]:
            if verdict["fitting"]:
                ui.button(studio.say("Use settings that fit"), on_click=lambda: self._use(verdict["fitting"])).props(
                    "outline dense no-caps"
                )
                ui.label(studio.say("They need more time; the result stays the same.")).classes("z-note")
            else:
                ui.label(studio.say("No setting makes it fit. Choose a smaller model.")).classes("z-note")

    def _draw_downloads(self, memory: Mapping[str, Any]) -> None:
        studio = self._studio
        for item in memory["downloads"]:
            size = f" · {item['gigabytes']:.2g} GB" if item["gigabytes"] else ""
            ui.label(studio.say("Download: {name}", name=item["name"]) + size).classes("z-note")
        if memory["disk"]:
            size, free = memory["disk"] / 1e9, memory["free"] / 1e9
            text = studio.say("Disk space: {size:.1f} GB of {free:.1f} GB that are free", size=size, free=free)
            ui.label(text).classes("z-note" if size < free else "z-finding")

    def show_time(self, time: Mapping[str, Any] | None, *, busy: bool) -> None:
        """Show how the time is spent."""
        studio = self._studio
        self._spinner.set_visibility(False)
        self._time.clear()
        with self._time:
            if time is None:
                text = (
                    studio.say("The time is not measured while another run is at work.")
                    if busy
                    else studio.say("The time is known once the model is on this machine.")
                )
                ui.label(text).classes("z-note")
                return
            with ui.element("div").classes("z-row"):
                ui.label(studio.say("Time")).classes("z-note z-grow")
                ui.label(studio.say("about {time}", time=duration(self._studio, time["total"]))).classes("z-total")
            with ui.element("div").classes("z-times"):
                for step, seconds in time["seconds"].items():
                    ui.label(self._content(step, time)).classes("z-note")
                    ui.label(duration(self._studio, seconds))
            how = (
                studio.say("From this chip's published figures. The run measures before it decides.")
                if time["how"] == "predicted"
                else studio.say("Measured on this machine. Expect it within a third.")
            )
            ui.label(how).classes("z-note")

    def _content(self, step: str, time: Mapping[str, Any]) -> str:
        studio = self._studio
        title = studio.say(_STEPS[step]) if step in _STEPS else label(step, self._studio.language)
        if step not in time["full_steps"]:
            return title
        full = time["full_steps"][step]
        steps = min(time["steps"].get(step, full), full)
        if steps < full:
            return studio.say("{title}: {steps:,} of {full:,} steps", title=title, steps=steps, full=full)
        return studio.say("{title}: all {full:,} steps", title=title, full=full)


def duration(studio: Studio, seconds: float) -> str:
    """A time in words: seconds, minutes, or hours and minutes."""
    if seconds < 60:
        return studio.say("{seconds:.0f} s", seconds=max(seconds, 1))
    if seconds < 3570:
        return studio.say("{minutes:.0f} min", minutes=seconds / 60)
    hours, minutes = divmod(round(seconds / 60), 60)
    if not minutes:
        return studio.say("{hours} h", hours=hours)
    return studio.say("{hours} h {minutes} min", hours=hours, minutes=minutes)
