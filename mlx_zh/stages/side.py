"""A stage of a run that answers prompts: which model that is, and its answers, drawn in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from mlx_zh.corpus.samples import Sampled, read_samples
from mlx_zh.errors import AdapterError, RecipeError
from mlx_zh.pipeline.process import run_stage
from mlx_zh.recipe import Recipe
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.digests import file_digest
from mlx_zh.system.locks import Lock


@dataclass(frozen=True)
class Side:
    """A stage (base, sft or dpo) of a run; `words` are the run on the command line, and its overrides."""

    words: tuple[str, ...]
    recipe: Recipe
    stage: str

    @staticmethod
    def of(target: str, stage: str | None = None, overrides: Sequence[str] = ()) -> Side:
        """A stage of a run, or its newest one. Raises RecipeError, and AdapterError if it has no adapter."""
        recipe = find_recipe(target, overrides)
        run = RunFolder.of(recipe)
        if stage is None:
            stage = next((name for name in reversed(TUNED) if run.stage(name).has_adapter), "base")
        if stage not in ("base", *TUNED):
            raise RecipeError(f"there is no stage {stage!r}; choose from base, {', '.join(TUNED)}.")
        if stage in TUNED and not run.stage(stage).has_adapter:
            raise AdapterError(
                f"{run.stage(stage).adapter} holds no adapter yet; run `mlx-zh {stage} {target}` first."
            )
        return Side((target, *overrides), recipe, stage)

    @property
    def run(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder.of(self.recipe)

    @property
    def name(self) -> str:
        """The run and the stage, in words."""
        return f"{self.recipe.name} {self.stage}"

    @property
    def adapter(self) -> Path | None:
        """The folder of its adapter; None for the base."""
        return None if self.stage == "base" else self.run.stage(self.stage).adapter

    @property
    def digest(self) -> str | None:
        """A digest of its adapter; None for the base."""
        return None if self.adapter is None else adapter_digest(self.adapter)

    def draw(self, prompts: str, lock: Lock, *, count: int, label: str, options: list[str]) -> int:
        """Let the stage answer the prompts of a file, `count` times each; returns the exit status of `sample`."""
        words = [*self.words, "--stage", self.stage, "--prompts", prompts, "--n", str(count), "--label", label]
        return run_stage("sample", [*words, *options], lock)

    def drawn(self, label: str) -> list[Sampled]:
        """The answers that were drawn under a label. Raises DataError."""
        return read_samples(self.run.samples_called(label).answers)


def label_of(purpose: str, stage: str, prompts: str) -> str:
    """A label for the answers of a stage to a set of prompts; another content of a file has another label."""
    file = Path(expanduser(prompts))
    return f"{purpose}-{stage}-{file_digest(file)[:8] if file.is_file() else prompts}"
