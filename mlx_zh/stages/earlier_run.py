"""The run that a stage's folder already holds: whether it is this one, and what to do when it is another."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import RecipeError
from mlx_zh.models.identity import sampled_fingerprint
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_key import (
    Values,
    as_earlier,
    changes,
    is_earlier,
    learning_key,
    read_settings,
    with_numbers_of,
)
from mlx_zh.system import console
from mlx_zh.system.redaction import redacted
from mlx_zh.training.metrics import TrainingSummary, read_summary


@dataclass
class EarlierRun:
    """What the folder of a stage holds, against the settings of the run that is to be trained there."""

    run: RunFolder
    stage: str
    base: Path  # the folder of the base model
    values: Values  # what this run learns from, see `learning_values`; `adopt` may change them

    def __post_init__(self) -> None:
        self.key = learning_key(self.values)
        self.folder = self.run.stage(self.stage)

    def check(self) -> TrainingSummary | None:
        """The summary of a finished run with the same settings; None if there is work to do. Writes nothing.

        Raises RecipeError if the folder holds a run with other settings.
        """
        if (settings := self.other_settings()) is not None:
            raise RecipeError(
                f"{self.folder.path} holds a run with other settings: {self.differences(settings)}. "
                f"{self.remedy(settings)}"
            )
        summary = read_summary(self.folder.summary)
        if summary is None or not self.folder.is_finished:
            return None
        if summary.get("key") == self.key:
            return summary
        if self.holds_checkpoints:  # the newest one has the key of its settings
            return None
        raise RecipeError(
            f"{self.folder.path} holds a run with other settings: its key is another. {self.remedy(None)}"
        )

    @property
    def holds_checkpoints(self) -> bool:
        """Whether the folder has a checkpoint to go on from."""
        return any(self.folder.checkpoints.glob("step-*"))

    def other_settings(self) -> Values | None:
        """The settings of the run in the folder if they differ from this run's."""
        if not self.holds_checkpoints and not self.folder.is_finished:
            return None
        settings = read_settings(self.folder.settings, self.stage)
        if settings is None or self.recorded_key() == self.key:  # settings.json alone may be damaged
            return None
        return settings if learning_key(settings) != self.key else None

    def recorded_key(self) -> object:
        """The key of the finished run in the folder; None if it is not finished or its summary is damaged."""
        summary = read_summary(self.folder.summary)
        return None if summary is None else summary.get("key")

    def differences(self, settings: Values) -> str:
        """The differences between `settings`, which the folder holds, and this run's, as a text."""
        return changes(settings, self._in_the_form_of(settings))

    def _in_the_form_of(self, settings: Values) -> Values:
        """This run's values, without what the version that wrote `settings` did not know.

        A finished run keeps the version of its numbers, because nothing is added to it.
        """
        values = self.values
        if is_earlier(settings):
            values = as_earlier(values, sampled_fingerprint(self.base))
        if self.folder.is_finished and read_summary(self.folder.summary) is not None:
            values = with_numbers_of(values, settings)
        return values

    def adopt(self) -> None:
        """Go on with a run that an earlier version began, if all that it recorded is the same."""
        settings = self.other_settings()
        if settings is None:
            return
        values = self._in_the_form_of(settings)
        if learning_key(values) != learning_key(settings):
            return
        self.values, self.key = values, learning_key(values)
        if not is_earlier(settings):
            return
        console.say(
            f"{self.folder.path} was begun by an earlier version, which did not record everything. Recipe, data "
            "files and samples of the model's weights are the same. Whether registry entries, exams kept out of the "
            "data and the other weights are, could not be checked."
        )

    def set_aside(self) -> None:
        """Rename the stage's folder to `STAGE-oldN`, and say so, if there is one."""
        folder = self.folder.path
        if not folder.exists():
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}-old{number}")).exists():
            number += 1
        shutil.move(folder, aside)
        console.say(f"The earlier run is kept in {aside}.")

    def remedy(self, settings: Values | None) -> str:
        """What to do when the folder holds a run with other settings, if they are known."""
        fresh = "start over with --fresh (the old folder is kept beside it)"
        if settings is not None and settings.get("numbers") != self._in_the_form_of(settings).get("numbers"):
            return (
                "Its numbers and the new ones would be mixed. Finish it with the version that began it, "
                f"give this recipe another name, or {fresh}."
            )
        if (
            settings is None
            or not self.folder.is_finished
            or settings.get("base") != self._in_the_form_of(settings)["base"]
        ):
            return f"Give this recipe another name, or {fresh}."
        longer = ""
        lengths = [redacted(values[self.stage]) for values in (settings, self.values)]
        if lengths[0] != lengths[1] and _without_length(settings, self.stage) == _without_length(
            self.values, self.stage
        ):
            longer = "Its learning rate was planned for its own number of steps, so it cannot be made longer. "
        name = self.run.unused_name()
        return (
            f"{longer}Give this recipe another name, or {fresh}. To train the adapter that is here for "
            f"{self.stage}.epochs more: name={name} {shlex.quote(f'{self.stage}.start={self.folder.adapter}')}"
        )


def _without_length(values: Values, stage: str) -> Values:
    """The settings without those that say how long the stage trains."""
    section = {key: value for key, value in values[stage].items() if key not in ("epochs", "max_steps")}
    return {
        "key": learning_key(redacted({name: values[name] for name in values if name != "key"} | {stage: section}))
    }
