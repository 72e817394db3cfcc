"""The settings of the Talk page: how answers are drawn, the system prompt, and thinking."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from mlx_zh.recipe import Recipe
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.talker import Settings, Talker

_DEFAULT = Settings()
_LONGEST_SYSTEM = 20_000  # characters


class SettingsView:
    """A folded form; `now` are its values."""

    def __init__(self, studio: Studio, recipe: Recipe, talker: Talker) -> None:
        self._talker = talker
        with ui.expansion(studio.say("Settings")).props("dense dense-toggle").classes("z-talk-settings"):
            self._system = ui.textarea(studio.say("System prompt"), value=recipe.system_message() or "")
            self._system.props(f"outlined dense autogrow rows=1 maxlength={_LONGEST_SYSTEM}")
            with ui.element("div").classes("z-talk-numbers"):
                self._temperature = _number(studio.say("Temperature"), _DEFAULT.temperature, 0, 10, 0.1)
                self._top_p = _number(studio.say("Top-p"), _DEFAULT.top_p, 0.01, 1, 0.05)
                self._tokens = _number(studio.say("Longest answer, tokens"), _DEFAULT.max_tokens, 1, 32768, 64)
                self._seed = _number(studio.say("Seed"), None, 0, 2**31 - 1, 1)
                self._seed.props["placeholder"] = studio.say("random")
                modes = {
                    "": studio.say("as in the recipe"),
                    "auto": studio.say("automatic"),
                    "on": studio.say("on"),
                    "off": studio.say("off"),
                }
                self._thinking = ui.select(modes, value="", label=studio.say("Thinking")).props(
                    "outlined dense options-dense"
                )
            ui.label(
                studio.say("Temperature 0 always takes the most likely token. All columns draw with the same seed.")
            ).classes("z-note")
            self._no_switch = ui.label(studio.say("This model has no switch for thinking.")).classes("z-note")
            self._no_switch.set_visibility(False)
        ui.timer(2.0, self._show_switch)

    def _show_switch(self) -> None:
        fixed = self._talker.about.get("switches") is False
        if fixed != self._no_switch.visible:
            self._no_switch.set_visibility(fixed)
            self._thinking.set_enabled(not fixed)
            if fixed:
                self._thinking.set_value("")

    @property
    def now(self) -> Settings:
        """The values; one that is no number, or out of its range, is the default or the nearest in range."""
        seed = self._seed.value
        return Settings(
            temperature=_within(self._temperature.value, 0, 10, _DEFAULT.temperature),
            top_p=_within(self._top_p.value, 0.01, 1, _DEFAULT.top_p),
            max_tokens=int(_within(self._tokens.value, 1, 32768, _DEFAULT.max_tokens)),
            seed=None if seed is None else int(_within(seed, 0, 2**31 - 1, 0)),
            thinking=str(self._thinking.value or ""),
            system=(self._system.value or "").strip() or None,
        )


def _number(label: str, value: float | None, low: float, high: float, step: float) -> Any:
    return ui.number(label, value=value, min=low, max=high, step=step).props("outlined dense")


def _within(value: Any, low: float, high: float, default: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return default
    return min(max(number, low), high) if number == number else default
