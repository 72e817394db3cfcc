"""The recipe of a whole run, made of all sections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
)

from mlx_zh.recipe.data import Data, filled
from mlx_zh.recipe.model import Lora, Model
from mlx_zh.recipe.results import Evaluate, Export, Rounds, SamplePrompt, as_rounds
from mlx_zh.recipe.section import LaterText, Section, folder_name, in_home
from mlx_zh.recipe.training import Checkpoint, Distributed, Dpo, Memory, Sft, Training
from mlx_zh.recipe_text.units import seconds_of, time_text
from mlx_zh.recipe_text.values import dump


def _length_of_time(value: Any) -> Any:
    """A length of time in its usual form: `90 min` becomes `1h30m`. 0 is no limit, as for `mlx-zh init`."""
    if str(value).strip() == "0":
        return None
    seconds = seconds_of(value) if isinstance(value, str) else None
    if value is not None and seconds is None:
        raise ValueError("a length of time, such as 90m, 8h, 1h30m, 8小时 or 2d")
    return None if seconds is None else time_text(seconds)


class Recipe(Section):
    """The recipe of a whole run."""

    name: Annotated[str, AfterValidator(folder_name)]
    budget: Annotated[LaterText, BeforeValidator(_length_of_time)] = None  # of time, for the whole run
    model: Model
    lora: Lora = Lora()
    data: Data = Data()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    memory: Memory = Memory()
    distributed: Distributed = Distributed()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    rounds: Annotated[Rounds | None, BeforeValidator(as_rounds), Field(exclude_if=lambda value: value is None)] = None
    export: Export = Export()
    track: tuple[Literal["tensorboard", "swanlab", "wandb"], ...] = ()
    resume: Literal["auto", "never"] = "auto"  # never: training starts anew each time, as with --fresh
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    runs: Annotated[str, Field(min_length=1), AfterValidator(in_home)] = "runs"
    _words: str = PrivateAttr("RECIPE")

    @property
    def words(self) -> str:
        """The recipe and its overrides as they stand on the command line, to be repeated in a command to type."""
        return self._words

    def called(self, words: str) -> Recipe:
        """This recipe, which the command line names with `words`."""
        recipe = self.model_copy()
        recipe._words = words
        return recipe

    def training(self, stage: str) -> Training:
        """The section of training stage `stage` (sft or dpo)."""
        return self.sft if stage == "sft" else self.dpo

    def kind(self, stage: str) -> str:
        """What the rows of a training stage are: sft (conversations), dpo (pairs) or kto (labelled answers)."""
        return "kto" if stage == "dpo" and self.dpo.unpaired else stage

    def unit(self, stage: str) -> str:
        """What the rows of a training stage are called."""
        return {"sft": "examples", "dpo": "pairs", "kto": "answers"}[self.kind(stage)]

    @property
    def budget_seconds(self) -> int | None:
        """The time that the whole run may take; None without a budget."""
        return None if self.budget is None else seconds_of(self.budget)

    def start(self, stage: str) -> str:
        """What training stage `stage` starts from: base, an adapter folder, or for DPO also sft."""
        if stage == "sft":
            return self.sft.start or "base"
        return self.dpo.start or ("sft" if self.data.sft.train else "base")

    def system_message(self) -> str | None:
        """`data.system` with `data.variables` filled in."""
        return None if self.data.system is None else filled(self.data.system, self.data.variables)

    def sample_prompts(self) -> tuple[SamplePrompt, ...]:
        """`evaluate.prompts` with `data.variables` filled in."""
        every = (SamplePrompt(prompt=p) if isinstance(p, str) else p for p in self.evaluate.prompts)
        variables = self.data.variables
        return tuple(
            SamplePrompt(
                prompt=filled(sample.prompt, variables),
                expect=None if sample.expect is None else filled(sample.expect, variables),
            )
            for sample in every
        )

    def run_folder(self) -> Path:
        """The folder of all results of this run."""
        return Path(self.runs) / self.name

    def to_yaml(self, change: Callable[[Any], Any] = lambda values: values) -> str:
        """The recipe as YAML, with every key and its value; `change` is applied to the values before."""
        return dump(change(self.model_dump(mode="json", by_alias=True)))
